"""The demo at its smallest, and the synthetic clips it is made of."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from deepmsi.data import synthetic
from deepmsi.errors import UserError


@pytest.mark.parametrize(("settings", "lines"), [((), 7), (("--set", "drop=text"), 3)], ids=["whole", "without text"])
def test_demo_goes_the_whole_way(deepmsi, tmp_path, settings, lines) -> None:
    out = tmp_path / "demo"
    words = ("demo", "--out", out, "--speakers", "3", "--takes", "1", "--set", "train.epochs=1", *settings, "--json")
    outcome = deepmsi(*words)
    assert outcome.code == 0, outcome
    summary = json.loads(outcome.out)
    assert summary["synthetic"] is True
    assert summary["clips"] == 6
    assert summary["chance"] == pytest.approx(1 / 6)
    low, high = summary["interval"]
    assert low <= summary["accuracy"] <= high
    assert summary["example"]["truth"] in synthetic.LABELS
    page = Path(summary["report"])
    text = page.read_text(encoding="utf-8")
    for section in ("curves", "confusion", "classes", "ablation", "tokens", "errors", "speakers"):
        assert f'id="{section}"' in text, section
    assert "synthe" in text.lower()
    assert list(summary["seconds"]) == ["clips", "prepare", "train", "evaluate", "predict", "report"]
    assert len(list((out / "run" / "ablation").glob("*/metrics.json"))) == lines
    # the held-out speakers took no part in training
    made = json.loads((out / "run" / "run.json").read_text())
    held_out = {row["id"] for row in csv.DictReader((out / "data" / "held-out.csv").open(newline=""))}
    assert held_out.isdisjoint(made["trained_ids"])


def test_demo_spares_a_folder_that_is_not_its_own(mistake, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert str(tmp_path) in mistake("demo", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert "is a file" in mistake("demo", "--out", tmp_path / "thesis.tex")


def test_clips_are_the_same_again(clips, tmp_path) -> None:
    plan = synthetic.plan_clips(seed=1, speakers=4, takes=1)[7]
    first = (clips / "clips" / f"{plan.id}.mp4").read_bytes()
    frames, waveform, _ = synthetic.make_clip(plan)
    synthetic.encode_clip(tmp_path / "again.mp4", frames, waveform)
    assert hashlib.sha256((tmp_path / "again.mp4").read_bytes()).digest() == hashlib.sha256(first).digest()


def test_clips_decode_to_what_was_drawn(clips) -> None:
    from deepmsi.data.decode import decode_audio, decode_frames

    plan = synthetic.plan_clips(seed=1, speakers=4, takes=1)[0]
    drawn, voice, _ = synthetic.make_clip(plan)
    path = clips / "clips" / f"{plan.id}.mp4"
    decoded = decode_frames(path, 5, size=144)
    assert decoded.shape == (5, 3, 144, 144)
    middle = drawn[len(drawn) // 2][:, 24:168].transpose(2, 0, 1).astype(float)
    assert np.abs(decoded[2].astype(float) - middle).mean() < 12  # grey levels; another clip differs by 60 and more
    sound = decode_audio(path, sample_rate=16000)
    assert len(sound) / 16000 == pytest.approx(len(voice) / synthetic.SAMPLE_RATE, abs=0.1)
    assert np.sqrt(np.mean(sound**2)) == pytest.approx(np.sqrt(np.mean(voice**2)), rel=0.2)


def test_speakers_of_the_test_part_are_new(clips) -> None:
    rows = list(csv.DictReader((clips / "manifest.csv").open(newline="", encoding="utf-8")))
    speakers = {split: {row["speaker"] for row in rows if row["split"] == split} for split in ("train", "test")}
    assert speakers["train"]
    assert speakers["test"]
    assert speakers["train"].isdisjoint(speakers["test"])
    assert {row["label"] for row in rows} == set(synthetic.LABELS)
    assert "synthetic" in (clips / "SYNTHETIC.txt").read_text()


def test_no_modality_is_sufficient() -> None:
    """A phrase that fits several labels is drawn for a good part of the clips, and every label has one."""
    shared = {phrase for _, phrase in synthetic.SHARED_PHRASES}
    for label in synthetic.LABELS:
        rng = np.random.default_rng(0)
        texts = [synthetic.make_phrase(rng, label) for _ in range(300)]
        share = np.mean([any(text.endswith(phrase) for phrase in shared) for text in texts])
        assert abs(share - synthetic.P_SHARED_PHRASE) < 0.1
        assert len(set(texts)) > 10


def test_too_small_a_set(tmp_path) -> None:
    with pytest.raises(UserError, match="at least 2 speakers"):
        list(synthetic.write_synthetic_set(tmp_path / "x", speakers=1))
    assert not (tmp_path / "x").exists()
