"""Each bad input of a user earns one sentence that says what and where; nothing half-written stays."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deepmsi.data.files import TEMPORARY


class Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.trace),)


def write_manifest(path: Path, *rows: dict[str, str], encoding: str = "utf-8") -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding=encoding) as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def bad_clip(kind: str, folder: Path, sound: Path) -> Path:
    path = folder / "bad.mp4"
    if kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(sound.read_bytes()[: sound.stat().st_size // 3])
    elif kind == "text":
        path.write_text("this is no film\n" * 50)
    elif kind == "no streams":
        path.write_bytes(b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + b"\x00\x00\x00\x08mdat")
    elif kind == "zero frames":
        import av

        with av.open(str(path), "w", format="matroska") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width = stream.height = 32
            container.start_encoding()
    else:
        raise AssertionError(kind)
    return path


CLIPS = ["empty", "truncated", "text", "no streams", "zero frames"]


@pytest.fixture(scope="session")
def clip(clips: Path) -> Path:
    return clips / "clips" / "s00-joy-0.mp4"


def test_predict_a_missing_clip(mistake, trained, tmp_path) -> None:
    assert "nowhere.mp4" in mistake("predict", trained, tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("kind", CLIPS)
def test_predict_a_bad_clip(mistake, trained, clip, tmp_path, kind) -> None:
    bad = bad_clip(kind, tmp_path, clip)
    out = tmp_path / "out.json"
    assert "bad.mp4" in mistake("predict", trained, clip, bad, "--json", "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("kind", CLIPS)
def test_check_and_prepare_list_a_bad_clip(deepmsi, clip, tmp_path, kind) -> None:
    bad = bad_clip(kind, tmp_path, clip)
    manifest = write_manifest(
        tmp_path / "manifest.csv",
        {"id": "good", "video": str(clip), "label": "joy"},
        {"id": "broken", "video": str(bad), "label": "anger"},
    )
    outcome = deepmsi("check", manifest)
    assert outcome.code == 1
    assert "broken" in outcome.out
    out = tmp_path / "data"
    outcome = deepmsi("prepare", manifest, "--out", out, "--size", "32", "--frames", "2", "--workers", "1", "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["rows"] == 1
    failures = list(csv.DictReader((out / "failures.csv").open(newline="", encoding="utf-8")))
    assert {row["id"] for row in failures} == {"broken"}
    assert all(row["reason"] for row in failures)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "manifest.csv"),
        (b"\x00\xff\x00\xfe\x80binary", "manifest.csv"),
        (b"id,video,label\n", "manifest.csv"),
        (b"name,film\na,b\n", "id"),
    ],
    ids=["empty", "binary", "no rows", "no id"],
)
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_bad_manifest(mistake, tmp_path, command, content, says) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_bytes(content)
    words = ["prepare", manifest] if command == "prepare" else ["train", "demo", "--data", manifest]
    assert says in mistake(*words, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize(
    ("ids", "says"), [(("a", "a"), "a"), (("a/b", "c"), "a/b"), (("..", "c"), "..")], ids=["twice", "separator", "dots"]
)
def test_bad_ids(mistake, deepmsi, clip, tmp_path, ids, says) -> None:
    rows = [{"id": name, "video": str(clip), "label": "joy"} for name in ids]
    manifest = write_manifest(tmp_path / "manifest.csv", *rows)
    assert says in mistake("prepare", manifest, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    outcome = deepmsi("check", manifest)
    assert outcome.code == 1
    assert says in outcome.out


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8-sig", "utf-8"])
def test_encodings_are_read(deepmsi, clip, tmp_path, encoding) -> None:
    rows = [
        {"id": str(i), "video": str(clip), "text": "“déjà vu”", "label": label, "speaker": "Zoë"}
        for i, label in enumerate(("joy", "anger"))
    ]
    manifest = write_manifest(tmp_path / "manifest.csv", *rows, encoding=encoding)
    out = tmp_path / "data"
    outcome = deepmsi("prepare", manifest, "--out", out, "--size", "32", "--frames", "1", "--workers", "1")
    assert outcome.code == 0, outcome
    stored = json.loads((out / "index.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["id"], row["text"], row["speaker"]) for row in stored] == [
        ("0", "“déjà vu”", "Zoë"),
        ("1", "“déjà vu”", "Zoë"),
    ]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("vision.options={embed_dim: 33}", "2 heads do not divide the 33 channels"),
        ("vision.options={embed_dim: 32.5}", "embed_dim takes whole numbers from 1 to 4096, not 32.5"),
        ("vision.options={depths: [2, 0, 2]}", "depths takes whole numbers from 1 to 4096, not [2, 0, 2]"),
        ("vision.options={mlp_ratio: 1e-9}", "mlp_ratio takes numbers from 1 to 4096"),
        ("vision.options={patch_size: [4, 4]}", "patch_size takes one number, not [4, 4]"),
        ("vision.options={depths: 2}", "depths takes one number for each stage, not 2"),
        ("vision.schedule={blocks: [[1, 0]], keep: 1.5}", "keep must be from 1"),
        ("vision.keep=[8, 4, 2, 1]", "one for each of"),
        ("vision.image_size=72", "no multiple of its window"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused_before_anything_is_decoded(
    mistake, clips, tmp_path, monkeypatch, setting, words
) -> None:
    monkeypatch.setattr("deepmsi.train.run.open_shared", lambda *_: pytest.fail("the data were opened"))
    out = tmp_path / "run"
    assert words in mistake("train", "demo", "--data", clips / "manifest.csv", "--out", out, "--set", setting)
    assert not out.exists()


def test_no_label_column(mistake, clip, tmp_path) -> None:
    manifest = write_manifest(tmp_path / "manifest.csv", {"id": "a", "video": str(clip), "emotion": "joy"})
    assert "'label'" in mistake("train", "demo", "--data", manifest, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_label_at_evaluation(mistake, trained, clip, tmp_path) -> None:
    manifest = write_manifest(
        tmp_path / "manifest.csv", {"id": "a", "video": str(clip), "text": "hm", "label": "boredom"}
    )
    out = tmp_path / "evaluation"
    assert "boredom" in mistake("evaluate", trained, "--data", manifest, "--out", out)
    assert not out.exists()


def test_prepare_refuses_to_lose_rows_of_another_manifest(deepmsi, mistake, trained, tmp_path) -> None:
    first, second = (
        write_manifest(tmp_path / f"{name}.csv", {"id": name, "text": "hm", "label": "joy"}) for name in ("one", "two")
    )
    out = tmp_path / "out"
    assert deepmsi("prepare", first, "--out", out).code == 0
    assert deepmsi("prepare", first, "--out", out).code == 0
    assert f"prepared from {first}, and {second} lacks its row 'one'" in mistake("prepare", second, "--out", out)
    for manifest in (first, second):  # what a command prepares for itself is its own to replace
        outcome = deepmsi("evaluate", trained, "--data", manifest, "--out", tmp_path / "scores", "--json")
        assert outcome.code == 0, outcome


def test_scores_tell_of_clips_that_could_not_be_read(deepmsi, trained, clip, tmp_path) -> None:
    (tmp_path / "bad.mp4").write_text("this is no film")
    manifest = write_manifest(
        tmp_path / "manifest.csv",
        {"id": "a", "video": str(clip), "label": "joy"},
        {"id": "b", "video": "bad.mp4", "label": "joy"},
        {"id": "c", "video": "bad.mp4", "text": "hm", "label": "joy"},
    )
    outcome = deepmsi("evaluate", trained, "--data", manifest, "--json")
    assert outcome.code == 0, outcome
    (reason,) = json.loads(outcome.out)["left_out"].items()
    assert "could be read" in reason[0]
    assert reason[1] == 1
    assert "1 row left out: nothing of them could be read" in outcome.err
    assert f"1 row lost a modality (the first: {tmp_path / 'bad.mp4'}: " in outcome.err


def test_what_is_read_in_part_is_told_and_used(deepmsi, trained, clip, tmp_path) -> None:
    data = clip.read_bytes()
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    begin += (end - begin) // 4
    (tmp_path / "part.mp4").write_bytes(data[:begin] + bytes(end - begin) + data[end:])
    rows = [{"id": "a", "video": str(clip), "label": "joy"}, {"id": "b", "video": "part.mp4", "label": "joy"}]
    manifest = write_manifest(tmp_path / "manifest.csv", *rows)
    outcome = deepmsi("prepare", manifest, "--out", tmp_path / "out", "--size", "32", "--frames", "2")
    assert outcome.code == 0, outcome
    assert f"failed: b: part of audio: {tmp_path / 'part.mp4'}: there are " in outcome.out
    assert outcome.out.endswith(f"prepared 2 rows in {tmp_path / 'out'}\n")
    outcome = deepmsi("evaluate", trained, "--data", manifest, "--json")
    assert json.loads(outcome.out)["left_out"] == {}
    assert f"1 row could be read only in part (the first: {tmp_path / 'part.mp4'}: there are " in outcome.err
    assert "lost a modality" not in outcome.err
    outcome = deepmsi("evaluate", trained, "--data", manifest, "--drop", "video,audio", "--json")
    assert "only in part" not in outcome.err
    outcome = deepmsi("predict", trained, tmp_path / "part.mp4", "--json")
    assert outcome.code == 0, outcome
    assert f"{tmp_path / 'part.mp4'}: there are " in outcome.err


def test_scores_tell_of_a_cut_without_sound(deepmsi, trained, clip, tmp_path) -> None:
    rows = [
        {"id": "a", "video": str(clip), "start": "0", "end": "0.5", "label": "joy"},
        {"id": "b", "text": "hm", "audio": str(clip), "start": "90", "end": "91", "label": "joy"},
    ]
    manifest = write_manifest(tmp_path / "manifest.csv", *rows)
    outcome = deepmsi("evaluate", trained, "--data", manifest, "--json")
    assert outcome.code == 0, outcome
    assert f"1 row lost a modality (the first: {clip}: there is no sound from 90 s to 91 s)." in outcome.err
    outcome = deepmsi("evaluate", trained, "--data", manifest, "--drop", "audio", "--json")
    assert "lost a modality" not in outcome.err, "it was hidden in any case"


def test_a_label_with_one_row(mistake, clips, tmp_path) -> None:
    rows = list(csv.DictReader((clips / "manifest.csv").open(newline="", encoding="utf-8")))
    for row in rows:
        row["video"] = str(clips / row["video"])
        row["split"] = ""
    rows[0]["label"] = "boredom"
    manifest = write_manifest(tmp_path / "manifest.csv", *rows)
    line = mistake(
        "train", "demo", "--data", manifest, "--out", tmp_path / "run", "--set", "protocol.name=stratified-kfold"
    )
    assert "boredom" in line
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers(deepmsi, tmp_path, value) -> None:
    good, bad = np.zeros(4, np.float32), np.full(4, value, np.float32)
    np.save(tmp_path / "good.npy", good)
    np.save(tmp_path / "bad.npy", bad)
    manifest = write_manifest(
        tmp_path / "manifest.csv",
        {"id": "a", "text_features": "good.npy", "label": "joy"},
        {"id": "b", "text_features": "bad.npy", "label": "joy"},
    )
    outcome = deepmsi("prepare", manifest, "--out", tmp_path / "data", "--workers", "1")
    assert outcome.code == 0, outcome
    failures = list(csv.DictReader((tmp_path / "data" / "failures.csv").open(newline="", encoding="utf-8")))
    assert [row["id"] for row in failures] == ["b"]


def test_pickle_where_features_are_expected(deepmsi, tmp_path) -> None:
    trace = tmp_path / "loaded"
    np.save(tmp_path / "good.npy", np.zeros(4, np.float32))
    (tmp_path / "bad.npy").write_bytes(pickle.dumps(Bomb(trace)))
    manifest = write_manifest(
        tmp_path / "manifest.csv",
        {"id": "a", "text_features": "good.npy", "label": "joy"},
        {"id": "b", "text_features": "bad.npy", "label": "joy"},
    )
    assert deepmsi("prepare", manifest, "--out", tmp_path / "data", "--workers", "1").code == 0
    failures = list(csv.DictReader((tmp_path / "data" / "failures.csv").open(newline="", encoding="utf-8")))
    assert [row["id"] for row in failures] == ["b"]
    assert not trace.exists()


@pytest.fixture
def broken(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "pickle", "absent"])
def test_damaged_checkpoint(mistake, broken, clip, tmp_path, damage) -> None:
    weights = broken / "model" / "model.safetensors"
    content, trace = weights.read_bytes(), tmp_path / "loaded"
    weights.unlink()
    if damage != "absent":
        weights.write_bytes(
            {
                "truncated": content[: len(content) // 2],
                "empty": b"",
                "noise": bytes(range(256)) * 40,
                "pickle": pickle.dumps(Bomb(trace)),
            }[damage]
        )
    assert str(broken) in mistake("predict", broken, clip)
    assert not trace.exists()


def test_checkpoint_of_another_architecture(mistake, broken, clip) -> None:
    path = broken / "model" / "config.json"
    config = json.loads(path.read_text())
    config["fusion"]["projection"] = 2 * config["fusion"]["projection"]
    path.write_text(json.dumps(config))
    assert "model" in mistake("predict", broken, clip)


@pytest.mark.parametrize("content", ["", "{", '{"num_labels": 6, "surprise": 1}'], ids=["empty", "cut", "unknown key"])
def test_damaged_configuration(mistake, broken, clip, content) -> None:
    (broken / "model" / "config.json").write_text(content)
    assert "config.json" in mistake("predict", broken, clip)


@pytest.fixture
def small_disk(mount: Callable[[str], Path]) -> Path:
    """A file system of 1 MiB."""
    return mount("1m")


def test_full_disk(mistake, clips, small_disk) -> None:
    out = small_disk / "data"
    line = mistake("prepare", clips / "manifest.csv", "--out", out, "--size", "256", "--workers", "1")
    assert "the disk is full" in line
    assert "what is done is kept; free some space and run the same command again" in line
    assert not (out / "index.json").exists()


def test_full_disk_while_training(mistake, prepared, small_disk) -> None:
    words = ["--data", prepared, "--out", small_disk / "run", "--set", "train.epochs=1", "--set", "train.batch_size=8"]
    line = mistake("train", "demo", *words)
    assert "the disk is full" in line
    assert "free some space and go on with: deepmsi train demo" in line
    assert line.endswith("--resume")
    assert not (small_disk / "run" / "model").exists()
    assert not [*small_disk.rglob("*.part"), *small_disk.rglob(f"{TEMPORARY}*")]


@pytest.mark.parametrize("kilobytes", [20, 60])
def test_full_disk_under_torch_save(small_disk, kilobytes) -> None:
    import torch

    from deepmsi.errors import UserError
    from deepmsi.train.checkpoints import written_whole

    (small_disk / "fill").write_bytes(bytes((1 << 20) - kilobytes * 1024))
    with pytest.raises(UserError, match="the disk is full"), written_whole(small_disk / "checkpoint-1") as part:
        torch.save({"a": torch.zeros(100_000)}, part / "optimizer.pt")
    assert sorted(path.name for path in small_disk.iterdir()) == ["fill"]


def test_unwritable_output(mistake, clips, tmp_path) -> None:
    (tmp_path / "file").write_text("here already")
    assert "file" in mistake("prepare", clips / "manifest.csv", "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "here already"


def test_unwritable_prediction(mistake, trained, clip, tmp_path) -> None:
    assert "is a folder" in mistake("predict", trained, clip, "--out", tmp_path)
    assert "/proc" in mistake("predict", trained, clip, "--out", "/proc/out.json")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(mistake) -> None:
    assert "/proc/demo" in mistake("demo", "--out", "/proc/demo")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_refused_command_leaves_no_empty_folder(mistake, trained, tmp_path, command) -> None:
    words = ["train", "demo"] if command == "train" else ["evaluate", trained]
    mistake(*words, "--data", tmp_path / "nowhere.csv", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_are_not_utf_8(deepmsi, mistake, trained, prepared, clip, tmp_path) -> None:
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    folder.mkdir()
    shutil.copy(clip, folder / "a.mp4")
    (folder / "m.csv").write_text("id,video,label\na,a.mp4,joy\nb,b.mp4,fear\n")
    told = deepmsi("predict", trained, folder / "a.mp4", "--json", "--out", tmp_path / "p.json")
    assert told.code == 0
    assert json.loads((tmp_path / "p.json").read_text())[0]["clip"] == str(folder / "a.mp4")
    assert deepmsi("prepare", folder / "m.csv", "--out", folder / "p").code == 0
    (failure,) = json.loads((folder / "p" / "index.json").read_text())["failures"]
    assert failure["reason"].startswith(str(folder / "b.mp4"))
    command = [sys.executable, "-m", "deepmsi", "check", "--json", folder / "m.csv"]  # on a real standard output
    checked = subprocess.run(command, capture_output=True, check=False)
    assert json.loads(checked.stdout)["path"] == str(folder / "m.csv"), checked.stderr
    assert "is a path that is not UTF-8" in mistake("train", "demo", "--data", prepared, "--out", folder / "run")
    assert not (folder / "run").exists()


def test_a_locale_that_has_no_umlauts(tmp_path) -> None:
    (tmp_path / "m.csv").write_text("id,video\na,ü.mp4\n", encoding="utf-8")
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "deepmsi", "check", tmp_path / "m.csv"]
    checked = subprocess.run(command, env=ascii_only, capture_output=True, text=True, check=False)
    assert checked.returncode == 2
    assert checked.stderr.endswith("is no name in this locale's encoding, ascii: set PYTHONUTF8=1\n")
    assert checked.stderr.count("\n") == 1
