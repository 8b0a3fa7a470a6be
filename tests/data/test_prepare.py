"""Preparation: the same bytes for any number of workers and any interruption, and a sentence for each failure."""

import errno
import filecmp
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from deepmsi.data import features, store
from deepmsi.data.check import check
from deepmsi.data.decode import decode_audio, decode_frames
from deepmsi.data.options import PrepareOptions
from deepmsi.data.pool import usable_cpus
from deepmsi.data.prepare import _start, prepare
from deepmsi.data.store import FORMAT, STARTED, VERSION, PreparedData
from deepmsi.errors import UserError

SMALL = PrepareOptions(frames=4, size=32)


def run(manifest, out, options=SMALL, workers=0):
    return prepare(manifest, out, options, workers=workers, progress=False)


def contents(folder):
    """Every file of a folder by its name and bytes."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def clips(tmp_path_factory, request):
    """Forty rows over a few clips: cuts, halves, silence, sound alone, a broken file, text alone."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("clips", Path(__file__).with_name("conftest.py"))
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    folder = tmp_path_factory.mktemp("clips")
    made.write_clip(folder / "both.mp4", sound=2.0)
    made.write_clip(folder / "silent.mp4")
    made.write_clip(folder / "sound.flac", [], sound=1.5)
    (folder / "broken.mp4").write_bytes((folder / "both.mp4").read_bytes()[:5000])
    lines = ["id,video,audio,text,label,split,start,end,side,take"]
    for k in range(40):
        video = ("both.mp4", "both.mp4", "silent.mp4", "", "broken.mp4")[k % 5]
        audio = "sound.flac" if k % 5 in (2, 3) else ""
        text = f"row {k}" if k % 2 == 0 else ""
        start, end = ("0.4", "1.3") if k % 3 == 0 else ("", "")
        side = ("", "left", "right")[k % 3]
        lines.append(f"r{k:02d},{video},{audio},{text},{'joy' if k % 2 else 'fear'},train,{start},{end},{side},{k}")
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def prepared(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    run(clips / "m.csv", out)
    return out


def test_rows_and_arrays(clips, prepared):
    data = PreparedData.open(prepared)
    kept = [k for k in range(40) if k % 5 != 4 or k % 2 == 0]  # a broken clip's row lives on where it has text
    assert [row.id for row in data.rows] == [f"r{k:02d}" for k in kept]
    assert len(data) == len(kept)
    by_id = {row.id: i for i, row in enumerate(data.rows)}
    row = data.rows[by_id["r06"]]
    assert (row.text, row.label, row.split, row.extra) == ("row 6", "fear", "train", {"take": "6"})
    assert (row.video, row.start, row.end, row.has_video, row.has_audio) == ("both.mp4", 0.4, 1.3, True, True)
    want = decode_frames(clips / "both.mp4", 4, start=0.4, end=1.3, size=32)
    assert np.array_equal(data.frames(by_id["r06"]), want)
    sound = data.waveform(by_id["r06"])
    assert sound.dtype == np.float32
    assert np.abs(sound - decode_audio(clips / "both.mp4", start=0.4, end=1.3)).max() <= 2**-16 + 1e-7
    half = decode_frames(clips / "both.mp4", 4, size=32, side="left")
    assert np.array_equal(data.frames(by_id["r01"]), half)
    for k in kept:
        row, i = data.rows[by_id[f"r{k:02d}"]], by_id[f"r{k:02d}"]
        assert row.has_video == (k % 5 in (0, 1, 2)) == (data.frames(i) is not None)
        assert row.has_audio == (k % 5 != 4) == (data.waveform(i) is not None)
        assert row.has_text == (k % 2 == 0)
        assert data.features("text", i) is None


def test_frames_are_read_only_views(prepared):
    frames = PreparedData.open(prepared).frames(0)
    assert frames.dtype == np.uint8
    assert not frames.flags.writeable
    assert not frames.flags.owndata


def test_failures_are_listed_with_reasons(prepared):
    data = PreparedData.open(prepared)
    assert {f["id"] for f in data.failures} == {f"r{k:02d}" for k in range(4, 40, 5)}
    assert all(f["modality"] == "video" and "truncated" in f["reason"] for f in data.failures)
    lines = (prepared / "failures.csv").read_text().splitlines()
    assert lines[0] == "id,modality,reason"
    assert len(lines) == 1 + len(data.failures)


def test_what_is_read_in_part_is_listed_and_kept(tmp_path, clip_writer, content_zeroer):
    clip_writer(tmp_path / "a.mp4", range(0, 4000, 200), sound=4.0, gop=1)
    content_zeroer(tmp_path / "a.mp4", 0.5, 1)
    (tmp_path / "m.csv").write_text("id,video,start,end\na,a.mp4,,\nb,a.mp4,0.1,0.5\n")
    data = run(tmp_path / "m.csv", tmp_path / "out")
    assert [(f["id"], f["modality"]) for f in data.failures] == [("a", "part of video"), ("a", "part of audio")]
    assert all(f"{tmp_path / 'a.mp4'}: there are " in f["reason"] for f in data.failures)
    assert all(row.has_video and row.has_audio for row in data.rows)


def test_second_run_changes_nothing(clips, prepared):
    before = contents(prepared)
    stamps = {p: p.stat().st_mtime_ns for p in prepared.rglob("*.*")}
    run(clips / "m.csv", prepared)
    assert contents(prepared) == before
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*.*")} == stamps, "nothing was written again"


def test_second_run_from_another_folder_decodes_nothing_again(clips, prepared, monkeypatch):
    stamps = {p: p.stat().st_mtime_ns for p in prepared.rglob("*.*")}
    monkeypatch.chdir(clips)
    run("m.csv", os.path.relpath(prepared))
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*.*")} == stamps


def test_an_encoder_in_a_folder_is_recorded_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "org" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = PrepareOptions(text_encoder="org/bert", audio_encoder="org/wav2vec2")
    assert options.text_encoder == str(tmp_path / "org" / "bert")
    assert options.audio_encoder == "org/wav2vec2", "a name of the hub"
    monkeypatch.chdir("org")
    assert options == PrepareOptions(text_encoder="./bert", audio_encoder="org/wav2vec2")


def test_options_that_were_recorded_by_a_relative_path_are_the_same(tmp_path, monkeypatch):
    (tmp_path / "bert").mkdir()
    (tmp_path / "out" / "shards").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = PrepareOptions(text_encoder="bert")
    started = {"format": FORMAT, "version": VERSION, "options": options.model_dump() | {"text_encoder": "bert"}}
    (tmp_path / "out" / STARTED).write_text(json.dumps(started))
    _start(tmp_path / "out", options)
    with pytest.raises(UserError, match="was prepared with text_encoder="):
        _start(tmp_path / "out", PrepareOptions())


def test_workers_do_not_show(clips, prepared, tmp_path):
    data = run(clips / "m.csv", tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(prepared)
    assert data.fingerprint == PreparedData.open(prepared).fingerprint
    assert not list((tmp_path / "out").rglob(".tmp-*"))


@pytest.mark.parametrize(("workers", "shards"), [(0, 0), (0, 1), (2, 1)])
def test_kill_and_resume(clips, prepared, tmp_path, workers, shards):
    """SIGKILL while a shard is being written, or after one is done; then the same command."""
    out = tmp_path / "out"
    script = f"""
        from deepmsi.data.options import PrepareOptions
        from deepmsi.data.prepare import prepare
        options = PrepareOptions(frames=4, size=32)
        prepare({str(clips / "m.csv")!r}, {str(out)!r}, options, workers={workers}, progress=False)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 240
    while child.poll() is None and time.monotonic() < deadline:
        done = list(out.glob("shards/*.json"))
        if len(done) >= shards and list(out.glob("shards/.tmp-*.npy")):
            break
        time.sleep(0.0005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the child was to be killed at work"
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match="the preparation was not finished"):
        PreparedData.open(out)
    time.sleep(1.0 if workers else 0)  # workers notice at their next row that their starter is gone
    run(clips / "m.csv", out)
    assert contents(out) == contents(prepared)


def test_crashing_decoder_costs_one_row(clips, prepared, tmp_path, monkeypatch):
    """A decoder that takes its process down (here by a signal) is listed, and the others are as ever."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if sys.argv[0] == '-m':\n"
        "    import deepmsi.data.decode as decode\n"
        "    original = decode.decode_frames\n"
        "    def crash(path, *args, start=None, **options):\n"
        "        if 'silent' in str(path) and start is None:\n"
        "            os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        return original(path, *args, start=start, **options)\n"
        "    decode.decode_frames = crash\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    table = (clips / "m.csv").read_text().splitlines()
    few = [table[0], *table[1:5]]
    (clips / "few.csv").write_text("\n".join(few) + "\n")
    data = run(clips / "few.csv", tmp_path / "out", workers=1)
    assert [f["id"] for f in data.failures] == ["r02"]
    assert "ended by SIGSEGV" in data.failures[0]["reason"]
    assert [row.id for row in data.rows] == ["r00", "r01", "r02", "r03"]
    assert not data.rows[2].has_video


def test_broken_worker_is_no_bad_clip(clips, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\nif sys.argv[0] == '-m':\n    sys.modules['deepmsi.data.shards'] = None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(RuntimeError, match=r"a worker of deepmsi prepare ended with status 1"):
        run(clips / "m.csv", tmp_path / "out", workers=1)


def test_changed_manifest_remakes_what_changed(clips, tmp_path):
    table = (clips / "m.csv").read_text().splitlines()
    short = clips / "changing.csv"
    out = tmp_path / "out"
    short.write_text("\n".join(table) + "\n")
    run(short, out)
    first = PreparedData.open(out).fingerprint
    shard = out / "shards" / "00000.frames.npy"
    stamp = shard.stat().st_mtime_ns
    table[1] = table[1].replace("fear", "anger")
    short.write_text("\n".join(table[:20]) + "\n")
    data = run(short, out)
    assert data.rows[0].label == "anger"
    assert data.fingerprint != first
    assert shard.stat().st_mtime_ns == stamp, "a new label is no reason to decode again"
    run(short, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh"), "nothing of the longer manifest is left"


def test_rows_of_another_manifest_are_not_lost(clips, tmp_path, monkeypatch):
    table = (clips / "m.csv").read_text().splitlines()
    shutil.copytree(clips, tmp_path / "clips")
    mine, other, out = tmp_path / "clips" / "mine.csv", tmp_path / "clips" / "sub" / "mine.csv", tmp_path / "out"
    mine.write_text("\n".join(table[:9]) + "\n")
    run(mine, out)
    before = contents(out)
    other.parent.mkdir()
    other.write_text("id,text\nr00,so\nnew,well\n")
    monkeypatch.setattr("deepmsi.data.prepare._decode", lambda *_: pytest.fail("something is decoded"))
    with pytest.raises(UserError, match=r"prepared from .*clips/mine\.csv, and .*sub/mine\.csv lacks its row 'r01'"):
        run(other, out)
    assert contents(out) == before
    monkeypatch.undo()
    more = mine.with_name("more.csv")
    more.write_text("\n".join(table[:12]) + "\n")
    assert len(run(more, out)) == 10, "a manifest of another name that has these rows, and others"
    more.write_text("\n".join(table[:5]) + "\n")
    assert len(run(more, out)) == 4, "a manifest that has changed"
    index = json.loads((out / "index.json").read_text()) | {"manifest": "more.csv"}
    (out / "index.json").write_text(json.dumps(index))
    more.write_text("\n".join(table[:4]) + "\n")
    assert len(run(more, out)) == 3, "of folders from before its name is known"
    assert len(prepare(other, out, SMALL, workers=0, progress=False, replace=True)) == 2


def test_changed_clip_is_decoded_again(clips, tmp_path, clip_writer):
    clip_writer(tmp_path / "a.mp4")
    (tmp_path / "m.csv").write_text("id,video\na,a.mp4\n")
    before = run(tmp_path / "m.csv", tmp_path / "out")
    old = np.array(before.frames(0))
    clip_writer(tmp_path / "a.mp4", list(range(0, 900, 100)))
    after = run(tmp_path / "m.csv", tmp_path / "out")
    assert not np.array_equal(old, after.frames(0))
    assert before.fingerprint != after.fingerprint


def test_changed_options_are_refused(clips, prepared):
    with pytest.raises(UserError, match=r"prepared with size=32; choose another folder"):
        run(clips / "m.csv", prepared, PrepareOptions(frames=4, size=48))


def test_folder_of_something_else_is_refused(clips, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.txt").touch()
    with pytest.raises(UserError, match="the folder holds other data"):
        run(clips / "m.csv", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the folder cannot be made"):
        run(clips / "m.csv", tmp_path / "file")


def test_two_at_once_are_refused(clips, tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another deepmsi prepare is at work"):
            run(clips / "m.csv", tmp_path / "out")
    finally:
        os.close(handle)


def test_an_interruption_leaves_no_half_file_of_a_worker(clips, prepared, tmp_path, monkeypatch):
    """A worker that is killed cannot take away what it had begun."""

    def interrupted(tasks, *_):
        (Path(tasks[0].folder) / "shards" / ".tmp-1-00000.frames.npy").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("deepmsi.data.prepare.run_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(clips / "m.csv", tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    monkeypatch.undo()
    run(clips / "m.csv", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared)


def test_what_was_decoded_otherwise_is_decoded_anew(clips, prepared, tmp_path, monkeypatch):
    """Shards of before do not pass for those of now; what both decode alike has the fingerprint that runs know."""
    monkeypatch.setattr("deepmsi.data.prepare.DECODED", 1)
    before = run(clips / "m.csv", tmp_path / "out").fingerprint
    shards = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "shards").iterdir())]
    monkeypatch.undo()
    assert PreparedData.open(tmp_path / "out").fingerprint == before, "it is still read"
    assert run(clips / "m.csv", tmp_path / "out").fingerprint == before
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "shards").iterdir())]
    assert all(now > then for now, then in zip(again, shards, strict=True))
    assert contents(tmp_path / "out") == contents(prepared)


def test_nothing_could_be_prepared(clips, tmp_path):
    """A text keeps no row alive where every path is wrong: a model of texts alone was trained in that case."""
    (clips / "bad.csv").write_text("id,video,text\na,broken.mp4,\nb,gone.mp4,well\nc,,well\n")
    with pytest.raises(UserError, match=r"none of the 2 clips could be prepared; the first reason: .*truncated"):
        run(clips / "bad.csv", tmp_path / "out")
    assert len((tmp_path / "out" / "failures.csv").read_text().splitlines()) == 3


@pytest.fixture
def small_disk(mount):
    """A file system with room for one shard and a half."""
    return mount("1100k")


@pytest.mark.parametrize("workers", [0, 1])
def test_full_disk(clips, prepared, small_disk, workers):
    out = small_disk / "out"
    with pytest.raises(UserError, match=r"the disk is full, .* what is done is kept$") as caught:
        run(clips / "m.csv", out, workers=workers)
    assert "\n" not in str(caught.value)
    done = contents(out)
    assert "shards/00000.media.json" in done
    assert "index.json" not in done
    assert not [name for name in done if ".tmp-" in name], "half a file is not left behind"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    stamp = (out / "shards" / "00000.media.json").stat().st_mtime_ns
    run(clips / "m.csv", out)
    assert (out / "shards" / "00000.media.json").stat().st_mtime_ns == stamp
    assert contents(out) == contents(prepared)


def test_limit_on_file_size_is_a_full_disk(clips, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            run(clips / "m.csv", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_of_writing_are_told_apart(tmp_path):
    from deepmsi.data.files import replacing
    from deepmsi.errors import DiskFullError

    with (
        pytest.raises(UserError, match=r"cannot be written \(Input/output error\)") as caught,
        replacing(tmp_path / "a"),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, DiskFullError)
    assert list(tmp_path.iterdir()) == []


def save_feature(folder, name, value):
    np.save(folder / name, value, allow_pickle=True)
    return name


def test_features_only_manifest(tmp_path):
    from safetensors.torch import save_file

    vector = np.arange(6, dtype=np.float64)
    save_feature(tmp_path, "t.npy", vector)
    save_feature(tmp_path, "row.npy", vector[None])
    save_file({"x": torch.arange(3).to(torch.bfloat16)}, tmp_path / "a.safetensors")
    save_feature(tmp_path, "frames.npy", np.random.default_rng(0).integers(0, 256, (9, 3, 40, 40), np.uint8))
    (tmp_path / "m.csv").write_text(
        "id,label,text_features,audio_features,frames\n"
        "a,joy,t.npy,a.safetensors,frames.npy\nb,joy,row.npy,,\nc,fear,,a.safetensors,\n"
    )
    data = run(tmp_path / "m.csv", tmp_path / "out")
    assert data.failures == []
    assert data.feature_dims == {"text": 6, "audio": 3}
    assert data.features("text", 0).tolist() == data.features("text", 1).tolist() == vector.tolist()
    assert data.features("text", 0).dtype == np.float32
    assert data.features("audio", 2).tolist() == [0, 1, 2]
    assert [(r.has_video, r.has_text, r.has_audio) for r in data.rows] == [
        (True, True, True),
        (False, True, False),
        (False, False, True),
    ]
    assert data.frames(0).shape == (4, 3, 32, 32)


def bad_features(folder):
    nan = np.array([1, 2, np.nan, 4], np.float32)
    (folder / "p.npy").write_bytes(pickle.dumps(np.zeros(4)))
    torch.save(torch.zeros(4), folder / "torch.pt")
    (folder / "empty.npy").touch()
    (folder / "text.npy").write_text("1 2 3 4")
    (folder / "bad.safetensors").write_bytes(b"\x10" * 40)
    good = folder / save_feature(folder, "cut.npy", np.zeros(400))
    good.write_bytes(good.read_bytes()[:200])
    return {
        save_feature(folder, "nan.npy", nan): r"holds nan at position 2 \(1 of 4 are not finite in float32\)",
        save_feature(folder, "huge.npy", np.array([1, 1e300])): r"holds 1e\+300 at position 1",
        save_feature(folder, "inf.npy", nan[:2] / 0): "holds inf at position 0",
        save_feature(folder, "object.npy", np.array([{}, 1], dtype=object)): "this is a pickle",
        save_feature(folder, "words.npy", np.array(["a", "b"])): "not real numbers",
        save_feature(folder, "matrix.npy", np.zeros((2, 4))): r"shape \[2, 4\]; a feature is one vector",
        save_feature(folder, "none.npy", np.zeros(0)): r"shape \[0\]",
        save_feature(folder, "long.npy", np.zeros(5)): "has 5 numbers and most rows' have 4",
        "p.npy": "this is a pickle",
        "torch.pt": "this is a pickle",
        "empty.npy": "the file is empty",
        "text.npy": r"neither a \.npy nor a \.safetensors",
        "bad.safetensors": "damaged",
        "cut.npy": "damaged",
        "gone.npy": "no such file",
    }


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_features_are_refused_one_by_one(tmp_path):
    bad = bad_features(tmp_path)
    save_feature(tmp_path, "good.npy", np.ones(4))
    lines = ["id,text,text_features", "good,x,good.npy", *(f"{name},x,{name}" for name in bad)]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    data = run(tmp_path / "m.csv", tmp_path / "out")
    reasons = {failure["id"]: failure["reason"] for failure in data.failures}
    assert set(reasons) == set(bad)
    for name, sentence in bad.items():
        import re

        assert re.search(sentence, reasons[name]), (name, reasons[name])
        assert "\n" not in reasons[name]
    assert data.feature_dims == {"text": 4}
    assert len(data.rows) == len(bad) + 1, "their text is left"
    assert sum(data.features("text", i) is not None for i in range(len(data))) == 1


def test_a_first_feature_of_another_length_costs_itself_alone(tmp_path):
    lengths = (5, 4, 4)
    for i, length in enumerate(lengths):
        save_feature(tmp_path, f"{i}.npy", np.ones(length))
    (tmp_path / "m.csv").write_text("\n".join(["id,text,text_features", *(f"{i},x,{i}.npy" for i in range(3))]) + "\n")
    data = run(tmp_path / "m.csv", tmp_path / "out")
    assert data.feature_dims == {"text": 4}
    assert [failure["id"] for failure in data.failures] == ["0"]
    report = check(tmp_path / "m.csv", workers=0, progress=False)
    told = [problem.sentence for problem in report.problems if "numbers" in problem.sentence]
    assert told == ["0: its text_features have 5 numbers and most rows' have 4"]


class _Encoder(torch.nn.Module):
    """Stands for a frozen encoder: sums that padding does not change."""

    dim = 2

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, values):
        return torch.stack([values.sum(1) * self.scale, (values != 0).sum(1).float()], 1)


def _pad(rows):
    length = max(map(len, rows))
    return {"values": torch.tensor([[float(v) for v in r] + [0.0] * (length - len(r)) for r in rows])}


def test_features_of_frozen_encoders(clips, prepared, tmp_path, monkeypatch):
    from deepmsi.models import encoders

    built = []
    monkeypatch.setattr(encoders, "check_encoder", lambda modality, name: None)
    monkeypatch.setattr(encoders, "build_text_encoder", lambda c: (_Encoder(), lambda t: _pad([s.encode() for s in t])))
    monkeypatch.setattr(encoders, "build_audio_encoder", lambda c: built.append(c) or (_Encoder(), _pad))
    options = PrepareOptions(frames=4, size=32, text_encoder="some/bert", audio_encoder="some/wav2vec2")
    data = run(clips / "m.csv", tmp_path / "out", options)
    assert data.feature_dims == {"text": 2, "audio": 2}
    assert data.options.text_encoder == "some/bert"
    for i, row in enumerate(data.rows):
        text, sound = data.features("text", i), data.features("audio", i)
        assert (text is None) == (row.text is None)
        if row.text is not None:
            assert text.tolist() == [sum(row.text.encode()), len(row.text)]
        wave = data.waveform(i)
        assert (sound is None) == (wave is None)
        if wave is not None:
            assert sound[0] == pytest.approx(float(wave.sum()), abs=1e-2)
    assert not [f for f in data.failures if f["modality"] == "part of audio features"], "no sound here takes 20 s"
    before = contents(tmp_path / "out")
    run(clips / "m.csv", tmp_path / "out", options)
    assert contents(tmp_path / "out") == before
    assert len(built) == 1, "the second run had nothing to encode"
    monkeypatch.setattr(encoders, "heard_seconds", lambda name: 0.5)
    cut = run(clips / "m.csv", tmp_path / "out", options)
    reasons = {f["id"]: f["reason"] for f in cut.failures if f["modality"] == "part of audio features"}
    long = {row.id: len(data.waveform(i)) / 16000 for i, row in enumerate(data.rows) if data.waveform(i) is not None}
    assert reasons.keys() == {row_id for row_id, seconds in long.items() if seconds > 0.5} != set()
    first = next(iter(reasons))
    said = f"{first}: the audio encoder hears the first 0.5 s of {long[first]:.2f} s of sound"
    assert reasons[first] == said
    assert filecmp.cmp(prepared / "shards/00000.frames.npy", tmp_path / "out" / "shards/00000.frames.npy")

    monkeypatch.setattr(
        encoders,
        "build_text_encoder",
        lambda c: (_Encoder(float("nan")), lambda t: _pad([s.encode() for s in t])),
    )
    broken = run(clips / "m.csv", tmp_path / "nan", PrepareOptions(frames=4, size=32, text_encoder="some/bert"))
    reasons = [f["reason"] for f in broken.failures if f["modality"] == "text"]
    assert len(reasons) == 20
    assert "the text encoder some/bert gives features that are not finite" in reasons[0]


def test_an_encoder_that_cannot_be_had_is_told_before_anything_is_decoded(clips, tmp_path):
    for modality in ("text", "audio"):
        with pytest.raises(UserError, match=rf"{modality}\.encoder: there is no folder \./absent"):
            run(clips / "m.csv", tmp_path / "out", PrepareOptions(**{f"{modality}_encoder": "./absent"}))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_features_are_computed_on_the_gpu_where_there_is_one(monkeypatch, device):
    class Moved:
        """A module, and a tensor of its input, that tell where they were moved."""

        at = None

        def to(self, where):
            self.at = where.type
            return self

        def eval(self):
            return self

        def __call__(self, given):
            assert self.at == given.at == device
            return torch.ones(2, 3, dtype=torch.float16)

    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
    encode = features._encoder(lambda: (Moved(), lambda loaded: {"given": Moved()}), lambda i: i)
    assert encode([4, 2]).tolist() == [[1.0] * 3] * 2


def test_encoder_and_features_of_the_manifest_exclude_each_other(tmp_path):
    save_feature(tmp_path, "t.npy", np.ones(3))
    (tmp_path / "m.csv").write_text("id,text,text_features\na,x,t.npy\n")
    with pytest.raises(UserError, match="the manifest brings text_features"):
        run(tmp_path / "m.csv", tmp_path / "out", PrepareOptions(text_encoder="some/bert"))
    with pytest.raises(ValueError, match="'hashing' has no pretrained weights"):
        PrepareOptions(text_encoder="hashing")


def test_text_alone_needs_no_shard(shared_data, tmp_path):
    data = run(shared_data / "meld" / "dev_sent_emo.csv", tmp_path / "out")
    assert len(data) == 1109
    assert list((tmp_path / "out" / "shards").iterdir()) == []
    assert all(row.has_text and not row.has_video and not row.has_audio for row in data.rows)


def test_real_clips(shared_data, tmp_path):
    lines = (shared_data / "ravdess" / "manifest.csv").read_text().splitlines()
    header, few = lines[0].split(","), [lines[1], lines[3]]
    rows = [dict(zip(header, line.split(","), strict=True)) for line in few]
    for row in rows:
        for column in ("video", "audio"):
            row[column] = str(shared_data / "ravdess" / row[column]) if row[column] else ""
    (tmp_path / "m.csv").write_text(
        "\n".join([",".join(header), *(",".join(row[c] for c in header) for row in rows)]) + "\n"
    )
    data = run(tmp_path / "m.csv", tmp_path / "out", PrepareOptions(frames=8, size=64))
    assert [(r.has_video, r.has_audio, r.label) for r in data.rows] == [
        (True, True, "neutral"),
        (False, True, "calm"),
    ]
    assert len(np.unique(data.frames(0).reshape(8, -1), axis=0)) == 8
    assert 3 < len(data.waveform(1)) / 16000 < 4


# The prepared folder ------------------------------------------------------------------------------------


@pytest.fixture
def copy(prepared, tmp_path):
    import shutil

    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def edit(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "no-index": (lambda d: (d / "index.json").unlink(), "was not finished"),
    "half-index": (lambda d: halve(d / "index.json"), "index cannot be read"),
    "binary-index": (lambda d: (d / "index.json").write_bytes(b"\xff\xfe\x00"), "index cannot be read"),
    "list": (lambda d: (d / "index.json").write_text("[]"), "not the index of a prepared folder"),
    "version": (lambda d: edit(d, lambda i: i.update(version=99)), "version 99 and this deepmsi reads 1"),
    "key": (lambda d: edit(d, lambda i: i.pop("rows")), "index is damaged"),
    "row": (lambda d: edit(d, lambda i: i["rows"][0].pop("id")), "index is damaged"),
    "options": (lambda d: edit(d, lambda i: i["options"].update(frames="many")), "index is damaged"),
    "slot": (lambda d: edit(d, lambda i: i["rows"][0]["slots"].update(frames=[0, 999])), "index is damaged"),
    "shard-gone": (lambda d: (d / "shards/00000.audio.npy").unlink(), "shard is missing"),
    "half-shard": (lambda d: halve(d / "shards/00001.frames.npy"), r"has \d+ bytes where the index says"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folder_gets_one_sentence(copy, name):
    damage, sentence = DAMAGE[name]
    damage(copy)
    with pytest.raises(UserError, match=sentence) as caught:
        PreparedData.open(copy)
    assert "\n" not in str(caught.value)


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


MENDED = {name: DAMAGE[name][0] for name in ("no-index", "half-index", "shard-gone", "half-shard")} | {
    "other-bytes": lambda d: flip(d / "shards/00001.frames.npy", -9),
    "other-type": lambda d: flip(d / "shards/00000.audio.npy", 22),
}


@pytest.mark.parametrize("name", MENDED)
def test_prepare_mends_the_folder(clips, prepared, copy, name):
    MENDED[name](copy)
    assert contents(copy) != contents(prepared)
    run(clips / "m.csv", copy)
    assert contents(copy) == contents(prepared)


def test_what_is_no_prepared_folder(tmp_path):
    with pytest.raises(UserError, match="no such prepared folder"):
        PreparedData.open(tmp_path / "x")
    with pytest.raises(UserError, match=r"not a prepared folder \(it has no index\.json\)"):
        PreparedData.open(tmp_path)


def test_it_travels_to_loader_workers(prepared):
    data = PreparedData.open(prepared)
    frames = np.array(data.frames(0))
    sent = pickle.dumps(data)
    assert len(sent) < frames.nbytes
    assert np.array_equal(pickle.loads(sent).frames(0), frames)


def test_few_files_are_open_at_a_time(prepared, monkeypatch):
    monkeypatch.setattr(store, "_OPEN_MAPS", 1)
    data = PreparedData.open(prepared)
    first = data.frames(0)
    kept = np.array(first)
    for i in range(len(data)):
        data.frames(i), data.waveform(i)
    assert len(data._maps) == 1
    assert np.array_equal(first, kept), "a view outlives its map's place in the cache"


def test_no_more_processors_than_a_container_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    real = open
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("os.path.exists", lambda name: str(name).endswith("cpu.max"))
    monkeypatch.setattr("builtins.open", lambda name, *more, **words: real(quota, *more, **words))
    for written, usable in (("300000 100000", 3), ("250000 100000", 3), ("max 100000", 64)):
        quota.write_text(written)
        assert usable_cpus() == usable
