"""Bad releases, labels, folds, features and runs: one sentence and exit code 2 each, and what was done is kept."""

import csv
import json
import shutil
import sys
import tarfile
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from small_corpus import FEATURES, prepared_corpus, write_corpus

from deepmsi import DeepMSI, DeepMSIConfig
from deepmsi.data.options import PrepareOptions
from deepmsi.data.prepare import prepare


def meld(raw: Path, emotion: str = "joy") -> Path:
    """Write MELD's three tables, three rows each, and a clip for each row."""
    folders = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
    for split, folder in folders.items():
        (raw / split / folder).mkdir(parents=True)
        lines = [f'{i},Hello,Joey,{emotion},positive,0,{i},1,1,"00:00:01,000","00:00:02,000"' for i in range(3)]
        (raw / f"{split}_sent_emo.csv").write_text("\n".join([header, *lines]) + "\n")
        for i in range(3):
            (raw / split / folder / f"dia0_utt{i}.mp4").write_bytes(b"a clip that broke off")
    return raw


def iemocap(raw: Path, label: str = "neu") -> Path:
    """Write five sessions of one dialogue with two turns: labels, transcripts, sounds."""
    for session in range(1, 6):
        dialogue, base = f"Ses0{session}F_impro01", raw / f"Session{session}"
        for place in ("dialog/EmoEvaluation", "dialog/transcriptions", f"sentences/wav/{dialogue}"):
            (base / place).mkdir(parents=True)
        turns = [f"{dialogue}_F000", f"{dialogue}_M000"]
        (base / "dialog/EmoEvaluation" / f"{dialogue}.txt").write_text(
            "".join(f"[{i}.0 - {i + 1}.0]\t{turn}\t{label}\t[2.5, 2.5, 2.5]\n" for i, turn in enumerate(turns))
        )
        (base / "dialog/transcriptions" / f"{dialogue}.txt").write_text(
            "".join(f"{turn} [001.0-002.0]: Well.\n" for turn in turns)
        )
        for turn in turns:
            with wave.open(str(base / f"sentences/wav/{dialogue}/{turn}.wav"), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                file.writeframes(np.full(16000, 500, "<i2").tobytes())
    return raw


def half_an_archive(folder: Path) -> None:
    """Put an archive there whose download broke off, and nothing else."""
    whole = folder.parent / "whole.tar.gz"
    with tarfile.open(whole, "w:gz") as archive:
        archive.add(meld(folder.parent / "packed"), "MELD.Raw")
    folder.mkdir()
    (folder / "MELD.Raw.tar.gz").write_bytes(whole.read_bytes()[:200])


def forget(pattern: str) -> Callable[[Path], None]:
    def do(raw: Path) -> None:
        for path in sorted(raw.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return do


def corrupt_sounds(raw: Path) -> None:
    """Write IEMOCAP without transcripts, and with sounds that are none."""
    forget("*/dialog/transcriptions")(iemocap(raw))
    for path in raw.rglob("*.wav"):
        path.write_bytes(b"RIFF")


RELEASES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a session missing": (
        "iemocap",
        lambda raw: forget("Session4")(iemocap(raw)),
        "lacks the labels of Session 4 (Session4/dialog/EmoEvaluation)",
    ),
    "two sessions missing": (
        "iemocap",
        lambda raw: forget("Session[23]")(iemocap(raw)),
        "lacks the labels of Session 2 and 3",
    ),
    "one session alone": (
        "iemocap",
        lambda raw: forget("Session[2-5]")(iemocap(raw)),
        "lacks the labels of Session 2 and 3 and 4 and 5",
    ),
    "sounds missing": (
        "iemocap",
        lambda raw: forget("Session4/sentences")(iemocap(raw)),
        "2 of 10 sounds are absent from sentences/wav",
    ),
    "clips missing": ("meld", lambda raw: forget("dev/*/*.mp4")(meld(raw)), "none of the 3 clips of the dev part"),
    "a table missing": ("meld", lambda raw: forget("train_sent_emo.csv")(meld(raw)), "no train_sent_emo.csv"),
    "the other release, meld": ("meld", iemocap, "is no MELD release"),
    "the other release, iemocap": ("iemocap", meld, "is no IEMOCAP release"),
    "an empty folder": ("iemocap", Path.mkdir, "is no IEMOCAP release"),
    "no folder": ("meld", lambda raw: None, "does not exist"),
    "half an archive, meld": ("meld", half_an_archive, "unpack"),
    "half an archive, iemocap": ("iemocap", half_an_archive, "unpack"),
    "an archive in place of a folder": ("meld", lambda raw: raw.write_bytes(b"\x1f\x8b"), "is a file: unpack it"),
    "labels outside the set, meld": ("meld", lambda raw: meld(raw, "bored"), "'bored'"),
    "labels outside the set, iemocap": (
        "iemocap",
        lambda raw: iemocap(raw, "bored"),
        "the label 'bored', which IEMOCAP",
    ),
    "no labels of the set": (
        "iemocap",
        lambda raw: iemocap(raw, "sur"),
        "holds no utterance whose label is one of the set",
    ),
    "all clips corrupt and no text": (
        "iemocap",
        corrupt_sounds,
        "none of the 10 clips could be prepared",
    ),
}


@pytest.mark.parametrize("case", RELEASES)
def test_a_bad_release_is_refused(case: str, mistake, tmp_path: Path) -> None:
    name, make, sentence = RELEASES[case]
    raw = tmp_path / "raw"
    make(raw)
    assert sentence in mistake("prepare", name, raw, "--out", tmp_path / "out", "--workers", "1")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_wrong_folder_is_refused_where_data_are_read(mistake, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    for words in (("train", "meld"), ("finetune", "text", "meld")):
        assert "photos" in mistake(*words, "--data", tmp_path / "photos", "--out", tmp_path / "run")
    assert "photos" in mistake("check", tmp_path / "photos")
    assert not (tmp_path / "run" / "run.json").exists()


def test_corrupt_and_absent_clips_are_listed_and_the_rest_is_kept(deepmsi, mistake, tmp_path: Path) -> None:
    raw, out = iemocap(tmp_path / "raw"), tmp_path / "out"
    sounds = sorted(raw.rglob("*.wav"))
    sounds[1].write_bytes(sounds[1].read_bytes()[:30])
    sounds[5].unlink()
    words = ("prepare", "iemocap", raw, "--out", out, "--workers", "1")
    assert "1 of 10 sounds are absent" in mistake(*words)
    outcome = deepmsi(*words, "--partial", "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["rows"] == 10  # the text of both rows is kept
    failures = list(csv.DictReader((out / "failures.csv").open(newline="", encoding="utf-8")))
    assert [(row["id"], row["modality"]) for row in failures] == [(sounds[1].stem, "audio")]
    rows = json.loads((out / "index.json").read_text())["rows"]
    assert sum("audio" in json.dumps(row.get("slots", row)) for row in rows) >= 8


def recipe(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**FEATURES, **changes}))
    return path


def one_class_in_one_dialogue(table: list[dict[str, str]]) -> None:
    for row in table:
        row["label"] = "joy" if row["dialogue"] == "d0" else ("anger", "sadness")[int(row["id"][1:]) % 2]


def one_speaker(table: list[dict[str, str]]) -> None:
    for row in table:
        row["speaker"] = "me"


def bored(table: list[dict[str, str]]) -> None:
    table[3]["label"] = "bored"


DATA: dict[str, tuple[Callable[[list[dict[str, str]]], None], dict[str, object], str]] = {
    "a fold without a class": (
        one_class_in_one_dialogue,
        {"protocol": {"name": "group-kfold", "folds": 3}},
        "the class 'joy' is in its test part and not in its training part",
    ),
    "one speaker only": (one_speaker, {"protocol": "iemocap-speaker"}, "All rows are of one speaker ('me')"),
    "one session only": (
        lambda table: [row.update(id=f"Ses01F_impro01_F{row['id'][1:]}") for row in table] and None,
        {"protocol": "iemocap-session5"},
        "needs Session 5 and others; the rows are of session 1",
    ),
    "a label outside the set": (bored, {"labels": ["anger", "joy", "sadness"]}, "the unknown label 'bored'"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_a_protocol_cannot_split_are_refused(case: str, mistake, tmp_path: Path) -> None:
    edit, changes, sentence = DATA[case]
    manifest = write_corpus(tmp_path / "raw", edit=edit)
    words = ("train", recipe(tmp_path / "r.yaml", **changes), "--data", manifest, "--out", tmp_path / "run")
    assert sentence in mistake(*words)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run of which one fold of two is done, its recipe and its data."""
    from deepmsi.train.recipe import load_recipe
    from deepmsi.train.run import train

    folder = tmp_path_factory.mktemp("half")
    data = prepared_corpus(folder)
    path = recipe(
        folder / "r.yaml", protocol={"name": "group-kfold", "folds": 2}, train=FEATURES["train"] | {"epochs": 1}
    )
    train(load_recipe(path), data, folder / "run", folds=[1])
    return folder / "run", path, data


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_another_length(folder: Path) -> Path:
    manifest = write_corpus(folder / "raw")
    for path in (folder / "raw").glob("*_text.npy"):
        np.save(path, np.ones(9, np.float32))
    prepare(manifest, folder / "prepared", PrepareOptions(frames=2, size=64), workers=0, progress=False)
    return folder / "prepared"


def of_another_encoder(folder: Path) -> Path:
    path = prepared_corpus(folder)
    index = json.loads((path / "index.json").read_text())
    index["options"]["text_encoder"] = "another/bert"
    (path / "index.json").write_text(json.dumps(index))
    return path


def test_features_of_another_encoder_are_refused(half, mistake, tmp_path: Path) -> None:
    data, sentence = of_another_encoder(tmp_path), "features of another/bert and the model reads those of my/bert"
    words = ("train", half[1], "--data", data, "--out", tmp_path / "run", "--set", "text.features_from=my/bert")
    assert sentence in mistake(*words)
    assert not (tmp_path / "run" / "run.json").exists()


def test_features_of_another_length_are_refused(half, mistake, tmp_path: Path) -> None:
    run, path, _ = half
    data, before = of_another_length(tmp_path), contents(run)
    words = ("train", path, "--data", data, "--set", "text.dim=6", "--out", tmp_path / "run")
    assert "holds text features of length 9 and the model reads 6" in mistake(*words)
    assert "was begun with other data" in mistake("train", path, "--data", data, "--out", run, "--resume")
    assert contents(run) == before  # the fold that is done stays as it is


def test_evaluation_on_features_of_another_kind_is_refused(mistake, tmp_path: Path) -> None:
    from deepmsi.train.recipe import load_recipe
    from deepmsi.train.run import train

    data = prepared_corpus(tmp_path / "data", splits=("train", "test"))
    run = tmp_path / "run"
    train(load_recipe(recipe(tmp_path / "r.yaml", train=FEATURES["train"] | {"epochs": 1})), data, run)
    other = of_another_length(tmp_path / "long")
    words = ("evaluate", run, "--out", tmp_path / "scores", "--data")
    assert "text features of length 9 and the model reads 6" in mistake(*words, other)
    assert not (tmp_path / "scores" / "metrics.json").exists()


OLDER = {
    "a newer format": lambda facts: {**facts, "format": 99},
    "no format": lambda facts: {key: value for key, value in facts.items() if key != "format"},
}


@pytest.mark.parametrize("case", OLDER)
def test_a_run_of_another_version_is_refused_by_every_command(case: str, half, mistake, tmp_path: Path) -> None:
    _, path, data = half
    run = tmp_path / "run"
    shutil.copytree(half[0], run)
    (run / "run.json").write_text(json.dumps(OLDER[case](json.loads((run / "run.json").read_text()))))
    before = contents(run)
    for words in (
        ("train", path, "--data", data, "--out", run, "--resume"),
        ("train", path, "--data", data, "--out", run, "--folds", "2"),
        ("evaluate", run, "--data", data),
        ("ablate", run, "--data", data),
        ("ablate", run, "--data", data, "--retrain"),
        ("report", run),
        ("report", run, run),
    ):
        line = mistake(*words)
        assert "run.json has format" in line, words
        assert "use the deepmsi that made the run" in line
        assert contents(run) == before, words


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", {"format": 1}),
        ("run.json", {"format": 1, "labels": ["joy"], "data": 3}),
        ("splits.json", {"test": 3}),
        ("splits.json", {"01": {"train": []}}),
        ("folds/01/fold.json", {}),
        ("folds/01/fold.json", {"metrics": {"accuracy": "high"}}),
        ("folds/01/fold.json", [3]),
    ],
)
def test_a_run_whose_files_are_odd_is_refused(file: str, content: object, half, mistake, tmp_path: Path) -> None:
    _, path, data = half
    run = tmp_path / "run"
    shutil.copytree(half[0], run)
    (run / file).write_text(json.dumps(content))
    for words in (("train", path, "--data", data, "--out", run, "--folds", "1"), ("report", run)):
        assert f"{file} is damaged" in mistake(*words)


def test_a_model_of_another_version_is_refused(mistake, tmp_path: Path) -> None:
    clip, model = tmp_path / "clip.mp4", tmp_path / "run" / "model"
    clip.write_bytes(b"no matter")
    sections = {"vision": {"backbone": "none"}, "text": {"dim": 4}, "audio": {"dim": 4}}
    DeepMSI(DeepMSIConfig(num_labels=3, **sections)).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "format": 99}))
    for words in (("predict", model.parent, clip), ("export", model.parent, "--out", tmp_path / "model.pt2")):
        assert "has checkpoint format 99, this deepmsi reads" in mistake(*words)


def test_a_run_whose_last_call_broke_off_goes_on(half, deepmsi, tmp_path: Path) -> None:
    run, path, data = half
    shutil.copytree(run, tmp_path / "run")
    done = contents(run / "folds" / "01")
    outcome = deepmsi("train", path, "--data", data, "--out", tmp_path / "run", "--resume")
    assert outcome.code == 0, outcome
    assert contents(tmp_path / "run" / "folds" / "01") == done
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["complete"]
