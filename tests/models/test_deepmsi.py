"""The model: every way of calling it, missing modalities, gradients, the loss, precision, compilation."""

import itertools

import pytest
import torch
from torch import nn

from deepmsi import DeepMSI, DeepMSIConfig
from deepmsi.errors import UserError

LABELS = torch.tensor([0, 1, 0, 2])
SUBSETS = [subset for subset in itertools.product([True, False], repeat=3) if any(subset)]
NAMES = ("video", "text", "audio")


def name_of(subset: tuple[bool, ...]) -> str:
    return "+".join(name for name, there in zip(NAMES, subset, strict=True) if there)


def row(batch, i, mask=None):
    """Row i of a batch by itself."""
    alone = {key: value[i : i + 1] for key, value in batch.items() if key != "pixel_values"}
    if mask is None:
        return alone | {"pixel_values": batch["pixel_values"][i : i + 1]}
    if mask[i, 0]:
        place = int(mask[:i, 0].sum())
        alone["pixel_values"] = batch["pixel_values"][place : place + 1]
    return alone | {"modality_mask": mask[i : i + 1]}


def test_the_call_of_the_documentation():
    model = DeepMSI(DeepMSIConfig(num_labels=6, preset="paper", vision={"frames": 1})).eval()
    with torch.no_grad():
        out = model(
            pixel_values=torch.zeros(1, 1, 3, 256, 256, dtype=torch.uint8),
            text_features=torch.randn(2, 1024),
            audio_features=torch.randn(2, 768),
            modality_mask=torch.tensor([[True, True, True], [False, True, True]]),
            labels=torch.tensor([0, 5]),
        )
    assert out.logits.shape == (2, 6)
    assert out.video.shape == out.text.shape == out.audio.shape == (2, 256)
    torch.testing.assert_close(out.loss, out.cross_entropy + 0.5 * out.contrastive)
    assert out[0] is out.loss


@pytest.mark.parametrize("schedule", ["paper", {"layout": "regrid", "keep": [9, 4]}, {"keep": [9, 5]}, None])
def test_rows_do_not_see_one_another(tiny, batch, schedule):
    model = tiny(vision={"schedule": schedule}).eval()
    assert (model.guide is None) == (schedule is None)
    together = model(**batch).logits
    alone = torch.cat([model(**row(batch, i)).logits for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_rows_with_missing_modalities_do_not_see_one_another(tiny, batch):
    model = tiny().eval()
    mask = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1]]).bool()
    mixed = {**batch, "pixel_values": batch["pixel_values"][:2], "modality_mask": mask}
    together = model(**mixed).logits
    alone = torch.cat([model(**row(mixed, i, mask)).logits for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("subset", SUBSETS, ids=name_of)
def test_every_subset_may_be_missing(tiny, batch, subset):
    """Absent by mask equals not passed at all; every parameter gets a gradient either way."""
    model = tiny()
    mask = torch.tensor([subset] * 4)
    keys = dict(zip(NAMES, ("pixel_values", "text_features", "audio_features"), strict=True))
    there = {keys[name]: batch[keys[name]] for name, kept in zip(NAMES, subset, strict=True) if kept}
    masked = dict(batch) if subset[0] else {**batch, "pixel_values": batch["pixel_values"][:0]}
    outputs = []
    for inputs in (there, {**masked, "modality_mask": mask}):
        model.zero_grad()
        out = model(**inputs, labels=LABELS)
        out.loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        outputs.append(out)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    if sum(subset) < 2 or not subset[0]:
        assert out.contrastive == 0


@pytest.mark.parametrize("poison", [float("nan"), 1e6], ids=["nan", "large"])
def test_what_an_absent_row_holds_has_no_influence(tiny, batch, poison):
    model = tiny()
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0]]).bool()
    results = []
    for value in (0.0, poison):
        inputs = {key: tensor.clone() for key, tensor in batch.items()}
        inputs["text_features"][~mask[:, 1]] = value
        inputs["audio_features"][~mask[:, 2]] = value
        model.zero_grad()
        out = model(**inputs, modality_mask=mask, labels=LABELS)
        out.loss.backward()
        results.append([out.logits, out.loss, *(p.grad.clone() for p in model.parameters())])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_what_an_absent_row_holds_does_not_reach_an_encoder(tiny, bert_folder, wav2vec2_folder):
    model = tiny(
        vision={"backbone": "none"},
        text={"encoder": str(bert_folder), "dim": None},
        audio={"encoder": str(wav2vec2_folder()), "dim": None},
    ).eval()
    text, audio = model.text_processor(["i am sad", "you"]), model.audio_processor([torch.randn(400).numpy()] * 2)
    mask = torch.tensor([[0, 1, 0], [0, 0, 1]]).bool()
    results = []
    for ids, value in ((0, 0.0), (5, float("nan"))):
        text["input_ids"][1] = ids
        audio["input_values"][0] = value
        model.zero_grad()
        out = model(**text, **audio, modality_mask=mask, labels=LABELS[:2])
        out.loss.backward()
        results.append(
            [out.logits, *(p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None)]
        )
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("subset", SUBSETS, ids=name_of)
def test_every_subset_may_be_configured(tiny, batch, subset):
    """What is not configured has no parameters; what is configured trains, also for one utterance."""
    sections = {
        name: {key: "none"}
        for name, key, there in zip(
            ("vision", "text", "audio"), ("backbone", "encoder", "encoder"), subset, strict=True
        )
        if not there
    }
    model = tiny(**sections)
    assert model.modalities == tuple(name for name, there in zip(NAMES, subset, strict=True) if there)
    assert set(model.projections) == set(model.missing) == set(model.modalities)
    assert (model.guide is not None) == (subset[0] and (subset[1] or subset[2]))
    keys = dict(zip(NAMES, ("pixel_values", "text_features", "audio_features"), strict=True))
    for rows in (4, 1):
        inputs = {keys[name]: batch[keys[name]][:rows] for name in model.modalities}
        model.zero_grad()
        out = model(**inputs, labels=LABELS[:rows])
        out.loss.backward()
        assert out.logits.shape == (rows, 3)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert [getattr(out, name) is not None for name in NAMES] == list(subset)


def test_from_raw_inputs(tiny, batch, bert_folder, wav2vec2_folder):
    """Encoders inside the model give what their vectors give from outside."""
    model = tiny(
        text={"encoder": str(bert_folder), "dim": None},
        audio={"encoder": str(wav2vec2_folder()), "dim": None, "finetune": False},
    ).eval()
    text = model.text_processor(["i am sad", "you", "happy !", "so"])
    audio = model.audio_processor([torch.randn(n).numpy() for n in (400, 900, 300, 500)])
    out = model(batch["pixel_values"], **text, **audio)
    given = model(
        batch["pixel_values"],
        text_features=model.text_encoder(**text),
        audio_features=model.audio_encoder(**audio),
    )
    torch.testing.assert_close(out.logits, given.logits)
    for inputs in ({**text, **audio}, {"text_features": torch.randn(4, 16)}):
        model.train()
        model.zero_grad()
        model(**inputs, labels=LABELS).loss.backward()
        lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert lost == []
    assert all(p.grad is None for p in model.audio_encoder.parameters())


@pytest.mark.parametrize("preset_encoders", ["hashing", "logmel"])
def test_offline_encoders_train_inside_the_model(tiny, preset_encoders):
    model = tiny(
        vision={"backbone": "none"},
        text={"encoder": "hashing", "dim": 8, "options": {"buckets": 64}},
        audio={"encoder": "logmel", "dim": 8, "options": {"mels": 16, "width": 16, "layers": 1}},
    )
    text = model.text_processor(["good day", "bad"])
    audio = model.audio_processor([torch.randn(3000).numpy(), torch.randn(500).numpy()])
    inputs = text if preset_encoders == "hashing" else audio
    model(**inputs, labels=LABELS[:2]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    encoder = model.text_encoder if preset_encoders == "hashing" else model.audio_encoder
    assert sum(float(p.grad.abs().sum()) for p in encoder.parameters()) > 0


def test_uint8_is_normalised_as_the_configuration_says(tiny, batch):
    model = tiny(vision={"mean": [0.2, 0.4, 0.6], "std": [0.5, 0.25, 0.125]}).eval()
    mean, std = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.5, 0.25, 0.125])
    pixels = (batch["pixel_values"].float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = model(**{**batch, "pixel_values": pixels}).logits
    torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 3.0]])
def test_an_utterance_of_no_known_label_is_in_no_loss(tiny, batch, weights):
    model = tiny(loss={"class_weights": weights}).eval()
    unknown = torch.arange(len(LABELS)) == 1
    out = model(**batch, labels=torch.where(unknown, -100, LABELS))
    expected = model(**{name: x[~unknown] for name, x in batch.items()}, labels=LABELS[~unknown])
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.contrastive, expected.contrastive)


def test_loss_is_the_sum_of_spec_6(tiny, batch):
    from deepmsi.ops import cross_modal_contrastive

    weights = [0.5, 1.0, 3.0]
    model = tiny(loss={"class_weights": weights, "contrastive": 0.7, "cross_entropy": 2.0, "label_smoothing": 0.1})
    out = model(**batch, labels=LABELS)
    smoothed = nn.functional.cross_entropy(out.logits, LABELS, label_smoothing=0.1, reduction="none")
    share = torch.tensor(weights)[LABELS]
    torch.testing.assert_close(out.cross_entropy, (share * smoothed).sum() / share.sum())
    pairs = [cross_modal_contrastive(out.video, other, LABELS) for other in (out.text, out.audio)]
    torch.testing.assert_close(out.contrastive, sum(pairs) / 2)
    torch.testing.assert_close(out.loss, 2 * out.cross_entropy + 0.7 * out.contrastive)

    model = tiny(loss={"text_audio_pair": True})
    out = model(**batch, labels=LABELS)
    pairs = [cross_modal_contrastive(out.video, other, LABELS) for other in (out.text, out.audio)]
    pairs.append(cross_modal_contrastive(out.text, out.audio, LABELS))
    torch.testing.assert_close(out.contrastive, sum(pairs) / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_cross_entropy_with_class_weights_in_other_types(tiny, batch, dtype):
    weights = [1.0, 2.0, 0.5]
    model = tiny(loss={"class_weights": weights}).eval().to(dtype)
    out = model(**{name: x if name == "pixel_values" else x.to(dtype) for name, x in batch.items()}, labels=LABELS)
    exact = nn.functional.cross_entropy(out.logits.double(), LABELS, weight=torch.tensor(weights).double())
    accuracy = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(out.cross_entropy.double(), exact, rtol=accuracy, atol=0)


def test_the_guide_learns_in_the_default_model():
    """The gradients that reach g, λ, text and audio through the compression, beside the one at its tokens x."""
    torch.manual_seed(0)
    model = DeepMSI(DeepMSIConfig(num_labels=6, vision={"frames": 1}))
    tokens, guides = [], []

    def watch_tokens(_module, inputs):
        inputs[0].x.retain_grad()
        tokens.append(inputs[0].x)

    def watch_guide(_module, _inputs, output):
        output.retain_grad()
        guides.append(output)

    compressions = [module for name, module in model.named_modules() if name.endswith(".compress")]
    assert len(compressions) == 3
    compressions[0].register_forward_pre_hook(watch_tokens)
    model.guide.register_forward_hook(watch_guide)
    # Frames with shapes in them: the tokens of plain noise are all alike.
    frames = nn.functional.interpolate(torch.rand(2, 3, 9, 9), size=256, mode="bicubic").clamp(0, 1) * 255
    text, audio = torch.randn(2, 1024, requires_grad=True), torch.randn(2, 768, requires_grad=True)
    model(frames.byte()[:, None], text, audio, labels=torch.tensor([0, 1])).loss.backward()

    at_x = tokens[0].grad.norm()
    at_g = guides[0].grad.norm()
    weights = [module.vsc.guide_weight for module in compressions]
    at_lambda = torch.stack(
        [module.vsc.guide_logit.grad / (w * (1 - w)) for module, w in zip(compressions, weights, strict=True)]
    ).norm()
    # The way through the guide alone: text and audio reach the loss by their own projections, too.
    again = model.guide([text, audio])
    at_text, at_audio = torch.autograd.grad(again, (text, audio), guides[0].grad)
    for gradient in (at_g, at_lambda, at_text.norm(), at_audio.norm()):
        assert gradient > 1e-3 * at_x


def test_freezing_the_backbone_leaves_its_compression_free(tiny, batch):
    model = tiny(vision={"freeze": True})
    model(**batch, labels=LABELS).loss.backward()
    trained = {name for name, p in model.video.backbone.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.video.backbone.named_parameters() if ".compress." in name}
    assert trained


@pytest.mark.parametrize("schedule", ["paper", {"keep": 9}])
def test_kept_tokens_are_told(tiny, batch, schedule):
    model = tiny(vision={"schedule": schedule}).eval()
    out = model(**batch, return_kept=True)
    assert model(**batch).kept is None
    assert len(out.kept) == 2
    for kept in out.kept:
        assert kept.cu_seqlens.shape == (9,)
        assert kept.positions.max() < kept.grid[0] * kept.grid[1]
        if schedule != "paper":
            assert (kept.cu_seqlens.diff() == 9).all()


def test_compression_options_reach_the_blocks(tiny):
    model = tiny(vision={"threshold": 0.7, "fuse_alpha": 0.5, "guide_weight": 0.25})
    for module in model.modules():
        if type(module).__name__ == "VSC":
            assert (module.threshold, module.fuse_alpha) == (0.7, 0.5)
            assert float(module.guide_weight.detach()) == pytest.approx(0.25, abs=0.05)


def test_bfloat16_autocast_stays_near_float32(tiny, batch):
    model = tiny(vision={"schedule": None})
    full = model(**batch, labels=LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**batch, labels=LABELS)
    half.loss.backward()
    torch.testing.assert_close(half.logits.float(), full.logits, atol=0.1, rtol=0.1)
    assert half.loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch, labels=LABELS).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_float64_and_bfloat16_models(tiny, batch):
    for dtype in (torch.float64, torch.bfloat16):
        out = tiny().to(dtype)(**batch)
        assert out.logits.dtype == dtype
        assert torch.isfinite(out.logits).all()


def test_dropout_is_repeatable(tiny, batch):
    model = tiny(fusion={"dropout": 0.5}).train()
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(model(**batch, labels=LABELS).loss)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model(**batch, labels=LABELS).loss)


def test_no_batch_norm(tiny):
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in tiny().modules())


def test_compiles_whole(tiny, batch):
    """With static shapes the forward pass is one graph, with a mask, too."""
    model = tiny(vision={"schedule": {"keep": [9, 5]}}).eval()
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 1, 0]]).bool()
    inputs = {**batch, "pixel_values": batch["pixel_values"][:2], "modality_mask": mask, "labels": LABELS}
    expected = model(**inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    torch.testing.assert_close(compiled.logits, expected.logits)
    torch.testing.assert_close(compiled.loss, expected.loss)


def test_a_loss_is_exported_for_any_batch_size(tiny, batch):
    model = tiny().eval()
    given = {"text_features": batch["text_features"], "audio_features": batch["audio_features"], "labels": LABELS}
    size = {0: torch.export.Dim("utterances")}
    program = torch.export.export(model, (), given, dynamic_shapes=dict.fromkeys(given, size)).module()
    fewer = {name: tensor[:3] for name, tensor in given.items()}
    torch.testing.assert_close(program(**fewer).loss, model(**fewer).loss)


@pytest.mark.parametrize(
    ("sections", "inputs", "words"),
    [
        ({}, {}, "nothing was passed"),
        ({"text": {"encoder": "none"}}, {"text_features": torch.zeros(2, 12)}, "configured without it"),
        ({}, {"text_features": torch.zeros(2, 7)}, r"\[utterances, 12\]"),
        ({}, {"input_ids": torch.zeros(2, 7, dtype=torch.long)}, "needs an encoder"),
        ({}, {"text_features": torch.zeros(2, 12), "audio_features": torch.zeros(3, 10)}, "disagree"),
        ({}, {"text_features": torch.zeros(2, 12), "labels": torch.zeros(3, dtype=torch.long)}, "labels has 3"),
        *(
            ({}, {"text_features": torch.zeros(2, 12), "labels": labels}, r"give \[utterances\] int64")
            for labels in (
                torch.zeros(2),
                torch.zeros(2, dtype=torch.int32),
                torch.zeros(2, dtype=torch.uint8),
                torch.zeros(2, 1, dtype=torch.int64),
            )
        ),
        ({"text": {"encoder": "hashing"}}, {"input_ids": torch.zeros(2, dtype=torch.int64)}, "input_ids is .* longest"),
        ({"audio": {"encoder": "logmel"}}, {"input_values": torch.zeros(9)}, "input_values is .* longest"),
        ({}, {"pixel_values": torch.zeros(1, 2, 3, 16, 16)}, r"videos, frames, 3, 32, 32"),
        ({}, {"pixel_values": torch.zeros(1, 0, 3, 32, 32)}, "of at least one frame"),
        *(
            ({}, {"pixel_values": torch.zeros(1, 2, 3, 32, 32, dtype=dtype)}, f"the frames are {dtype}: give uint8")
            for dtype in (torch.int64, torch.int16, torch.bool)
        ),
        (
            {},
            {"text_features": torch.zeros(2, 12), "modality_mask": torch.ones(2, 3, dtype=torch.bool)},
            "2 rows have video",
        ),
        (
            {},
            {
                "pixel_values": torch.zeros(2, 2, 3, 32, 32),
                "modality_mask": torch.tensor([[True, False, False], [False, True, False]]),
            },
            "pixel_values holds 2|1 rows have text",
        ),
        ({}, {"text_features": torch.zeros(2, 12), "modality_mask": torch.ones(2, 2).bool()}, r"\[utterances, 3\]"),
        ({}, {"text_features": torch.zeros(0, 12), "labels": torch.zeros(0, dtype=torch.int64)}, "holds no utterance"),
    ],
)
def test_a_wrong_call_earns_a_sentence(tiny, sections, inputs, words):
    with pytest.raises(UserError, match=words):
        tiny(**sections)(**inputs)


def test_unresolved_balanced_weights():
    with pytest.raises(UserError, match="balanced"):
        DeepMSI(DeepMSIConfig(num_labels=2, vision={"backbone": "none"}, loss={"class_weights": "balanced"}))


def test_a_model_that_cannot_be_built():
    config = DeepMSIConfig(num_labels=2, vision={"backbone": "none"})
    config.fusion.__dict__["hidden"] = (10**9, 10**9)  # more than any memory has
    with pytest.raises(UserError, match="the model cannot be built as it is configured") as caught:
        DeepMSI(config)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_words_of_the_package():
    import deepmsi

    assert callable(deepmsi.fuse)
    assert deepmsi.DeepMSI is DeepMSI
    assert {"DeepMSI", "DeepMSIConfig", "explain", "fuse", "use_backend"} <= set(dir(deepmsi))
    with pytest.raises(AttributeError):
        _ = deepmsi.no_such_name
