"""Checkpoints: what is saved comes back equal; what is damaged or foreign earns a sentence."""

import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from deepmsi import DeepMSI
from deepmsi.errors import UserError


@pytest.fixture
def saved(tiny, tmp_path) -> Path:
    tiny(label_names=["a", "b", "c"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(tiny, batch, tmp_path):
    model = tiny(label_names=["joy", "Wut", "哀"], loss={"class_weights": [1.0, 2.0, 3.0]}).eval()
    model.save_pretrained(tmp_path / "model")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "model").iterdir()}
    state = torch.get_rng_state()
    loaded = DeepMSI.from_pretrained(tmp_path / "model")
    assert torch.equal(state, torch.get_rng_state())
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.config.names == ["joy", "Wut", "哀"]
    labels = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        for got, expected in zip(loaded(**batch, labels=labels), model(**batch, labels=labels), strict=True):
            assert (got is None and expected is None) or torch.equal(got, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_model_card_makes_no_claims(saved):
    """Not of a licence, which those of the data decide, nor that it was pushed anywhere."""
    text = (saved / "README.md").read_text()
    assert "the labels are a, b, c." in text
    assert re.search(r"^library_name: deepmsi$", text, re.MULTILINE)
    assert not re.search("license|More Information|pushed", text)


def test_a_checkpoint_whose_lambda_is_a_scalar_is_read(saved):
    weights = load((saved / "model.safetensors").read_bytes())  # not mapped: the file is written anew
    scalars = {name for name in weights if name.endswith("guide_logit")}
    assert scalars
    save_file({n: w.squeeze(0) if n in scalars else w for n, w in weights.items()}, saved / "model.safetensors")
    read = DeepMSI.from_pretrained(saved).state_dict()
    assert all(read[name].equal(weights[name]) for name in scalars)


def test_saving_again_replaces_the_checkpoint(tiny, batch, tmp_path):
    target = tmp_path / "model"
    tiny(seed=1).save_pretrained(target)
    second = tiny(seed=2).eval()
    second.save_pretrained(target)
    assert torch.equal(DeepMSI.from_pretrained(target)(**batch).logits, second(**batch).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_leaves_other_files_alone(tiny, batch, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = tiny().eval()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert torch.equal(DeepMSI.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)


def test_a_failed_save_leaves_the_old_checkpoint(tiny, batch, saved, monkeypatch):
    before = DeepMSI.from_pretrained(saved)(**batch).logits

    def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    with pytest.raises(UserError, match="the disk is full"):
        tiny(seed=5).save_pretrained(saved)
    assert torch.equal(DeepMSI.from_pretrained(saved)(**batch).logits, before)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_others_read_a_model_as_they_read_its_folder(saved):
    """safetensors makes its file for its owner alone, which shuts a group out of the model that it shares."""
    rights = {path.name: oct(path.stat().st_mode & 0o777) for path in saved.iterdir()}
    assert set(rights.values()) == {oct(saved.stat().st_mode & 0o666)}, rights


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another file"])
@pytest.mark.parametrize("rights", [0o700, 0o770], ids=oct)
def test_a_folder_keeps_its_rights_when_a_model_is_saved_in_it_again(tiny, saved, rights, beside):
    saved.chmod(rights)
    if beside:
        (saved / "notes.txt").write_text("mine")
    tiny(seed=5).save_pretrained(saved)
    assert saved.stat().st_mode & 0o777 == rights
    assert (saved / "model.safetensors").stat().st_mode & 0o777 == rights & 0o666


def test_a_file_system_that_has_one_set_of_rights_for_all_takes_a_model(tiny, tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    tiny().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("there", [False, True], ids=["new", "saved before"])
def test_saving_where_nothing_can_be_written(tiny, mount, there):
    """A folder is exchanged as a whole, so it is the one around it that has to take another."""
    disk = mount("8m")
    if there:
        tiny().save_pretrained(disk / "model")
    before = {path: path.stat() for path in disk.rglob("*")}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError) as caught:
        tiny(seed=5).save_pretrained(disk / "model")
    assert str(caught.value) == (
        f"{disk / 'model'} cannot be written, as {disk} takes no new folder (Read-only file system): save elsewhere."
    )
    assert {path: path.stat() for path in disk.rglob("*")} == before


def test_saving_over_a_file(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        tiny().save_pretrained(tmp_path / "file")


def test_a_trained_encoder_travels_with_the_checkpoint(tiny, bert_folder, wav2vec2_folder, tmp_path):
    text_source, audio_source = tmp_path / "bert", tmp_path / "wav"
    shutil.copytree(bert_folder, text_source)
    shutil.copytree(wav2vec2_folder(), audio_source)
    model = tiny(
        vision={"backbone": "none"},
        text={"encoder": str(text_source), "dim": None},
        audio={"encoder": str(audio_source), "dim": None},
    ).eval()
    inputs = model.text_processor(["i am sad !"]) | model.audio_processor([torch.randn(500).numpy()])
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(text_source)
    shutil.rmtree(audio_source)
    loaded = DeepMSI.from_pretrained(tmp_path / "model")
    again = loaded.text_processor(["i am sad !"])
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert type(loaded.audio_processor) is type(model.audio_processor)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(DeepMSI.from_pretrained(tmp_path / "again")(**inputs).logits, model(**inputs).logits)


def test_a_frozen_encoder_is_named_not_stored(tiny, bert_folder, tmp_path):
    source = tmp_path / "bert"
    shutil.copytree(bert_folder, source)
    model = tiny(vision={"backbone": "none"}, text={"encoder": str(source), "dim": None, "finetune": False}).eval()
    inputs = model.text_processor(["i am sad !", "you"])
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert not any(name.startswith("text_encoder.") for name in stored)
    assert torch.equal(DeepMSI.from_pretrained(tmp_path / "model")(**inputs).logits, model(**inputs).logits)
    encoder = load_file(source / "model.safetensors")
    encoder[min(encoder)] += 1
    save_file(encoder, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no longer those of"):
        DeepMSI.from_pretrained(tmp_path / "model")
    shutil.rmtree(source)
    with pytest.raises(UserError, match=r"text\.encoder: there is no folder"):
        DeepMSI.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("text", [{"encoder": "bert", "finetune": False, "dim": None}, {"features_from": "bert"}])
def test_a_folder_named_from_here_is_found_from_elsewhere(text, tiny, bert_folder, tmp_path, monkeypatch):
    """`bert` would be taken for a name of the model hub from any other folder."""
    shutil.copytree(bert_folder, tmp_path / "bert")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = tiny(vision={"backbone": "none"}, text={"dim": 16, **text})
    model.save_pretrained("model")
    monkeypatch.chdir("elsewhere")
    section = DeepMSI.from_pretrained("../model").config.text
    assert str(tmp_path / "bert") in (section.encoder, section.features_from)
    (tmp_path / "elsewhere" / "features").mkdir()
    assert DeepMSI.from_pretrained("../model").config.audio.encoder == "features", "no folder of that name"


def test_offline_encoders_round_trip(tiny, tmp_path):
    model = tiny(
        vision={"backbone": "none"},
        text={"encoder": "hashing", "dim": 8, "options": {"buckets": 64}},
        audio={"encoder": "logmel", "dim": 8, "options": {"mels": 16, "width": 16, "layers": 1}},
    ).eval()
    inputs = model.text_processor(["good day"]) | model.audio_processor([torch.randn(3000).numpy()])
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(DeepMSI.from_pretrained(tmp_path / "model")(**inputs).logits, model(**inputs).logits)


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = weights.read_bytes()
    match how:
        case "half-written weights":
            weights.write_bytes(content[: len(content) // 2])
        case "empty weights":
            weights.write_bytes(b"")
        case "garbled header":
            weights.write_bytes(b"\xff" * 64 + content[64:])
        case "half-written, with the first byte of a pickle":
            weights.write_bytes(b"\x80\x07\0\0\0\0\0\0{" + content[9:])
        case "no weights":
            weights.unlink()
        case "pickle beside":
            weights.unlink()
            torch.save({}, folder / "pytorch_model.bin")
        case "zip pickle renamed":
            torch.save({}, weights)
        case "pickle renamed":
            weights.write_bytes(pickle.dumps({"a": 1}))
        case "no config":
            config.unlink()
        case "half a config":
            config.write_text(config.read_text()[:40])
        case "config is a list":
            config.write_text("[]")
        case "another architecture":
            config.write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
        case "newer format":
            rewrite(config, format=99)
        case "unknown key":
            rewrite(config, visoin={})
        case "another size":
            rewrite(config, fusion={**json.loads(config.read_text())["fusion"], "projection": 24})
        case "nan in weights":
            tensors = load_file(weights)
            tensors["classifier.output.bias"][0] = float("nan")
            save_file(tensors, weights)
        case "a tensor less":
            tensors = load_file(weights)
            del tensors["classifier.output.bias"]
            save_file(tensors, weights)
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("half-written weights", "damaged or not written to its end"),
        ("empty weights", "damaged or not written to its end"),
        ("garbled header", "damaged or not written to its end"),
        ("half-written, with the first byte of a pickle", "damaged or not written to its end"),
        ("no weights", "no model.safetensors"),
        ("pickle beside", "pytorch_model.bin where"),
        ("zip pickle renamed", "pickle under another name"),
        ("pickle renamed", "pickle under another name"),
        ("no config", "no deepmsi checkpoint"),
        ("half a config", "cannot be read as JSON"),
        ("config is a list", "another architecture"),
        ("another architecture", "BertModel"),
        ("newer format", "format 99"),
        ("unknown key", "unknown key 'visoin': did you mean 'vision'"),
        ("another size", "where the configuration makes it"),
        ("nan in weights", "NaN or infinity in classifier.output.bias"),
        ("a tensor less", "lacks classifier.output.bias"),
    ],
)
def test_a_bad_checkpoint_earns_a_sentence(saved, how, words):
    damage(saved, how)
    with pytest.raises(UserError) as caught:
        DeepMSI.from_pretrained(saved)
    sentence = str(caught.value)
    assert words in sentence
    assert "\n" not in sentence


def test_no_such_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no checkpoint folder"):
        DeepMSI.from_pretrained(tmp_path / "absent")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is no folder, and the model hub gave no such checkpoint"):
        DeepMSI.from_pretrained("nobody/no-such-checkpoint", local_files_only=True)
