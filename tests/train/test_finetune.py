"""Encoders fine-tuned fold by fold: what they saw is noted, and features that saw reported rows are refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_corpus import LABELS, make_recipe, sound_manifest

from deepmsi.data.options import PrepareOptions
from deepmsi.data.prepare import prepare
from deepmsi.data.store import PreparedData
from deepmsi.errors import UserError
from deepmsi.models.encoders import build_feature_encoder, save_encoder
from deepmsi.models.finetuned import NOTES, read_notes
from deepmsi.train.evaluate import evaluate
from deepmsi.train.finetune import finetune
from deepmsi.train.recipe import Recipe
from deepmsi.train.run import train

SAID = {"anger": "you ! you !", "joy": "i am so happy !", "sadness": "i am sad ."}


def manifest(folder: Path, splits: bool = False) -> Path:
    """Rows with text, by dialogue and speaker; one row has a feature of sound alone."""
    folder.mkdir()
    rows = []
    for i in range(24):
        label = LABELS[i % 3]
        row = {"id": f"r{i:02d}", "label": label, "text": SAID[label], "audio_features": "sound.npy"}
        row |= {"dialogue": f"d{i // 4}", "speaker": f"s{i % 2}", "split": "test" if splits and i > 15 else "train"}
        rows.append(row)
    rows[5]["text"] = ""
    np.save(folder / "sound.npy", np.ones(6, np.float32))
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def recipe(text: dict[str, Any], **changes: Any) -> Recipe:
    protocol = {"name": "group-kfold", "folds": 3}
    return make_recipe(text=text, **{"protocol": protocol, "train": {"epochs": 2, "lr": 0.01}, **changes})


def prepared(path: Path, out: Path, encoder: Path | None = None) -> Path:
    options = PrepareOptions(text_encoder=None if encoder is None else str(encoder))
    prepare(path, out, options, workers=0, progress=False)
    return out


def test_features_of_each_fold_come_from_an_encoder_that_did_not_see_it(bert_folder: Path, tmp_path: Path) -> None:
    path, tuned = manifest(tmp_path / "raw"), tmp_path / "tuned"
    encoder = {"encoder": str(bert_folder), "context": 1, "max_length": 20}
    scores = finetune("text", recipe(encoder), prepared(path, tmp_path / "plain"), tuned)
    assert (scores["n"], scores["context"]) == (23, 1)  # the row without text cannot be read
    splits = json.loads((tuned / "splits.json").read_text())
    base = load_file(bert_folder / "model.safetensors")
    for fold, parts in splits.items():
        notes = read_notes(str(tuned / "folds" / fold / "encoder"))
        assert notes is not None
        assert (notes.modality, notes.fold, set(notes.seen)) == ("text", fold, set(parts["train"]))
        assert not set(notes.seen) & set(parts["test"])
        trained = load_file(tuned / "folds" / fold / "encoder" / "model.safetensors")
        # transformers 5.0 saves the norms of a BERT that was loaded under the names of old.
        assert any(not torch.equal(trained[name], base[name]) for name in base.keys() & trained.keys())

    features = {name: prepared(path, tmp_path / f"p-{name}", tuned / "folds" / name / "encoder") for name in splits} | {
        "all": prepared(path, tmp_path / "p-all", tuned / "encoder")
    }
    data = PreparedData.open(features["01"])
    assert data.encoders["text"]["fold"] == "01"
    assert data.content == PreparedData.open(features["02"]).content == PreparedData.open(tmp_path / "plain").content
    assert data.fingerprint != PreparedData.open(features["02"]).fingerprint
    module, processor = build_feature_encoder("text", str(tuned / "folds" / "01" / "encoder"))
    expected = module(**processor(["s0: you ! you !\ns1: i am so happy !"]))[0].detach().numpy()
    np.testing.assert_allclose(data.features("text", 1), expected, atol=1e-5)

    run, settings = tmp_path / "run", recipe({"encoder": "features"})
    with pytest.raises(UserError, match=r"trained on \d+ of the \d+ rows that fold '02' reports .* of '01'\)"):
        train(settings, features["01"], run, folds=["02"])
    of_first = recipe({"encoder": "features", "features_from": str(tuned / "folds" / "01" / "encoder")})
    with pytest.raises(UserError, match=r"trained on \d+ of the \d+ rows that fold '02' reports"):
        train(of_first, path, tmp_path / "run-of-first", folds=["02"])
    assert not (tmp_path / "run-of-first").exists()  # told before the clips were decoded
    for name in splits:
        result = train(settings, features[name], run, folds=[name])
    assert result["complete"]
    assert result["context"] == 1
    assert json.loads((run / "splits.json").read_text()).keys() == splits.keys()
    # No fold is left to report, so that the encoder of all rows may serve the model that is kept.
    train(settings, features["all"], run, resume=True)
    of_all = evaluate(run, features["all"])
    assert of_all["rows_seen_in_training"] == 24
    assert evaluate(run, path) == of_all  # a manifest is prepared with the encoder of all rows, too
    with pytest.raises(UserError, match=r"holds text features of .*01/encoder and the model reads those of"):
        evaluate(run, features["01"])
    with pytest.raises(UserError, match="was begun with other data"):
        train(settings, tmp_path / "plain", run, resume=True)

    # Nor does a model start from an encoder that saw the rows; what it saw is kept where it may.
    whole = recipe({"encoder": str(tuned / "encoder")})
    with pytest.raises(UserError, match=r"text\.encoder .* was trained on \d+ of the \d+ rows that fold '01' reports"):
        train(whole, path, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    for row in (new := list(csv.DictReader(path.open(encoding="utf-8")))):
        row["id"] = f"new-{row['id']}"
    with (path.parent / "new.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(new[0]))
        writer.writeheader()
        writer.writerows(new)
    other = prepared(path.parent / "new.csv", tmp_path / "p-new")
    finetune("text", whole, other, tmp_path / "again", folds=["01"])
    notes = read_notes(str(tmp_path / "again" / "folds" / "01" / "encoder"))
    assert notes is not None
    assert {f"r{i:02d}" for i in range(24)} - {"r05"} < set(notes.seen)

    accepted = recipe({"encoder": "features"}, protocol={"name": "group-kfold", "folds": 3, "seen_features": True})
    leaky = train(accepted, features["all"], tmp_path / "leaky", folds=[1])
    assert leaky["leaks"]
    assert "leaks: encoders that were trained on reported rows" in leaky["protocol"]


def test_rows_that_trained_an_encoder_are_told_where_they_choose_the_epochs(
    bert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tuned = manifest(tmp_path / "raw", splits=True), tmp_path / "tuned"
    settings = recipe({"encoder": str(bert_folder)}, protocol="split-column", train={"epochs": 1})
    finetune("text", settings, prepared(path, tmp_path / "plain"), tuned)
    features = prepared(path, tmp_path / "features", tuned / "encoder")
    capsys.readouterr()

    def fold_of(name: str, text: dict[str, Any], data: Path, **changes: Any) -> dict[str, Any]:
        told = {"epochs": 1, "selection": "inner-validation", "inner_folds": 2, **changes}
        return train(recipe(text, protocol="split-column", train=told), data, tmp_path / name)["folds"][0]

    fold = fold_of("seen", {"encoder": "features"}, features)
    assert fold["temperature"] is None
    assert fold["epochs_from"] == "an inner validation part, 7 of whose rows trained an encoder", "one has no text"
    assert "7 of the 8 rows that choose its number of epochs trained an encoder" in capsys.readouterr().err
    assert fold_of("start", {"encoder": str(tuned / "encoder")}, path)["temperature"] is None
    assert "trained an encoder" in capsys.readouterr().err
    for name, text, data, changes in (
        ("last", {"encoder": "features"}, features, {"selection": "last"}),
        ("unseen", {"encoder": str(bert_folder)}, path, {}),
    ):
        fold = fold_of(name, text, data, **changes)
        assert (fold["temperature"] is None) == (name == "last")
        assert "trained an encoder" not in fold["epochs_from"] + capsys.readouterr().err


def test_a_dev_part_that_only_chose_an_encoders_epoch_chooses_for_the_model_too(
    bert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tuned, dev = manifest(tmp_path / "raw", splits=True), tmp_path / "tuned", [f"r{i:02d}" for i in range(12, 16)]
    table = list(csv.DictReader(path.open(encoding="utf-8")))
    for row in table:
        row["split"] = "dev" if row["id"] in dev else row["split"]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    chosen = {"epochs": 1, "selection": "auto"}
    finetune("text", recipe({"encoder": str(bert_folder)}, protocol="split-column", train=chosen), path, tuned)
    notes = read_notes(str(tuned / "encoder"))
    assert notes is not None
    assert set(notes.chose) == set(dev) < set(notes.seen)
    features = prepared(path, tmp_path / "features", tuned / "encoder")
    settings = recipe({"encoder": "features"}, protocol="split-column", train=chosen)
    (fold,) = train(settings, features, tmp_path / "run")["folds"]
    assert fold["temperature"] is not None
    assert fold["epochs_from"] == "the dev part"
    assert "trained an encoder" not in capsys.readouterr().err


def test_few_rows_that_trained_an_encoder_leave_the_temperature(
    bert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, tuned = manifest(tmp_path / "raw", splits=True), tmp_path / "tuned"
    chosen = {"epochs": 1, "selection": "inner-folds", "inner_folds": 2}
    finetune("text", recipe({"encoder": str(bert_folder)}, protocol="split-column", train=chosen), path, tuned)
    start = recipe({"encoder": str(tuned / "encoder")}, protocol="split-column", train=chosen)
    notes = json.loads((tuned / "encoder" / NOTES).read_text())
    capsys.readouterr()
    for count in (1, 2):
        (tuned / "encoder" / NOTES).write_text(json.dumps({**notes, "seen": notes["seen"][:count]}))
        (fold,) = train(start, path, tmp_path / f"run-{count}")["folds"]
        said = capsys.readouterr().err
        assert f"{count} of the 16 rows that choose its number of epochs trained an encoder" in said
        assert (fold["temperature"] is None) == ("the logits stay as they are" in said) == (count == 2)


def test_a_split_of_the_manifest_has_one_encoder(bert_folder: Path, tmp_path: Path) -> None:
    data = prepared(manifest(tmp_path / "raw", splits=True), tmp_path / "plain")
    settings = recipe({"encoder": str(bert_folder)}, protocol="split-column", train={"epochs": 1})
    finetune("text", settings, data, tmp_path / "tuned")
    notes = read_notes(str(tmp_path / "tuned" / "encoder"))
    assert notes is not None
    assert sorted(notes.seen) == [f"r{i:02d}" for i in range(16) if i != 5]


def test_auto_batch_reaches_the_training(bert_folder: Path, tmp_path: Path) -> None:
    path = manifest(tmp_path / "raw", splits=True)
    scarce = recipe({"encoder": str(bert_folder)}, protocol="split-column", train={"memory_limit": 1e-5})
    with pytest.raises(UserError, match="one utterance"):
        finetune("text", scarce, path, tmp_path / "tuned", auto_batch=True)


def test_a_kill_before_the_last_encoder_does_not_lose_it(bert_folder: Path, tmp_path: Path, monkeypatch) -> None:
    data, tuned = prepared(manifest(tmp_path / "raw"), tmp_path / "plain"), tmp_path / "tuned"
    settings = recipe({"encoder": str(bert_folder)}, train={"epochs": 1})

    def killed(encoder: Any, processor: Any, part: Path, **options: Any) -> None:
        if part.parent == tuned:
            raise KeyboardInterrupt
        save_encoder(encoder, processor, part, **options)

    with monkeypatch.context() as patched:
        patched.setattr("deepmsi.train.finetune.save_encoder", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune("text", settings, data, tuned)
    (tuned / ".encoder.0a1b2c3d.part").mkdir()  # a process that is killed leaves what it was writing
    finetune("text", settings, data, tuned, resume=True)
    notes = read_notes(str(tuned / "encoder"))
    assert notes is not None
    assert notes.fold == "all rows"
    assert not list(tuned.rglob("*.part"))
    assert json.loads((tuned / "run.json").read_text())["final_fit"]["rows"] == 23


def test_a_sound_encoder_is_tuned_alike(wav2vec2_folder, tmp_path: Path) -> None:
    path = sound_manifest(tmp_path)
    data = prepared(path, tmp_path / "plain")
    audio = {"encoder": str(wav2vec2_folder()), "max_seconds": 2.0}
    settings = make_recipe(text={"encoder": "hashing"}, audio=audio, protocol="split-column", train={"epochs": 1})
    finetune("audio", settings, data, tmp_path / "tuned")
    encoder = str(tmp_path / "tuned" / "encoder")
    notes = read_notes(encoder)
    assert notes is not None
    assert (notes.reads, len(notes.seen)) == ({"max_seconds": 2.0}, 6)
    options = PrepareOptions(audio_encoder=encoder)
    features = prepare(path, tmp_path / "features", options, workers=0, progress=False)
    assert features.features("audio", 0).shape == (16,)
    with pytest.raises(UserError, match="is an encoder of audio, not of text"):
        build_feature_encoder("text", encoder)


def test_what_cannot_be_tuned(bert_folder: Path, tmp_path: Path) -> None:
    for name in ("hashing", "features"):
        with pytest.raises(UserError, match=f"text encoder is '{name}', which has no pretrained weights"):
            finetune("text", recipe({"encoder": name}), tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"text\.finetune is off"):
        finetune("text", recipe({"encoder": str(bert_folder), "finetune": False}), tmp_path, tmp_path / "out")
    (tmp_path / NOTES).write_text("{")
    with pytest.raises(UserError, match="without it nothing says which rows the encoder saw"):
        read_notes(str(tmp_path))
