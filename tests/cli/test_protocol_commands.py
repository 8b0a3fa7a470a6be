"""Folds apart and joined, reports of several runs, paired comparison and ablation, as the command line does them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from small_corpus import FEATURES, make_recipe, prepared_corpus

from deepmsi.train.ablate import variants_of
from deepmsi.train.run import train

FOLDS = {"protocol": {"name": "group-kfold", "folds": 3, "final_fit": False}, "train": {"epochs": 1}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    sections = {**FEATURES, "protocol": FOLDS["protocol"], "train": {**FEATURES["train"], **FOLDS["train"]}}
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(make_recipe(**FOLDS), corpus, run)
    return run


def timeless(run: Path) -> dict:
    metrics = json.loads((run / "metrics.json").read_text())
    for fold in metrics["folds"]:
        fold.pop("seconds")
    return metrics


def test_folds_of_two_places_are_joined_by_report(deepmsi, mistake, recipe, corpus, whole, tmp_path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert deepmsi("train", recipe, "--data", corpus, "--out", here, "--folds", "2").code == 0
    assert not json.loads((here / "metrics.json").read_text())["complete"]
    assert deepmsi("train", recipe, "--data", corpus, "--out", there, "--folds", "1, 03").code == 0
    for name in ("01", "03"):
        shutil.copytree(there / "folds" / name, here / "folds" / name)
    assert deepmsi("report", here).code == 0
    assert timeless(here) == timeless(whole)
    assert (here / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    # A fold of other rows is refused, not averaged in.
    shutil.copy(here / "folds/01/predictions.csv", here / "folds/03/predictions.csv")
    assert "holds other rows than splits.json gives it" in mistake("report", here)
    assert "names no fold" in mistake("train", recipe, "--data", corpus, "--out", tmp_path / "x", "--folds", ",")
    assert "There is no fold '7'" in mistake("train", recipe, "--data", corpus, "--out", there, "--folds", "7")


def test_several_runs_stand_side_by_side(deepmsi, mistake, corpus, whole, tmp_path) -> None:
    other, leaky = tmp_path / "other", tmp_path / "leaky"
    train(make_recipe(**FOLDS, seed=1), corpus, other)
    protocol = {"name": "paper-kfold10", "final_fit": False}
    train(make_recipe(**{**FOLDS, "protocol": protocol}), corpus, leaky)
    first = tmp_path / "first"
    shutil.copytree(whole, first)
    outcome = deepmsi("report", first, other, "--json")
    assert outcome.code == 0, outcome
    assert len(json.loads(outcome.out)) == 3
    markdown = (first / "comparison.md").read_text()
    assert "## Over seeds" in markdown
    assert "McNemar" in markdown
    assert "leaks" not in markdown
    assert deepmsi("report", first, leaky).code == 0
    for text in ((first / "comparison.md").read_text(), (first / "comparison.html").read_text()):
        assert "leaky leaks:" in text.replace("\\", "")
        assert "cannot be set against one another" in " ".join(text.split())
        assert "Over seeds" not in text
    assert "leaks" in (leaky / "report.md").read_text()

    outcome = deepmsi("compare", first, other)
    assert outcome.code == 0, outcome
    assert "36 rows that both predicted" in outcome.out
    assert "McNemar's exact test p = " in outcome.out
    found = json.loads(deepmsi("compare", first, other, "--json").out)
    scores = [json.loads((run / "metrics.json").read_text())["uar"] for run in (first, other)]
    assert (found["uar"]["a"], found["uar"]["b"]) == pytest.approx(scores)
    assert "evaluate the run first" in mistake("compare", first, tmp_path / "nowhere")


def test_ablate_hides_modalities_of_one_model(deepmsi, mistake, tmp_path_factory, tmp_path) -> None:
    data = prepared_corpus(tmp_path_factory.mktemp("split"), rows=24, splits=("train", "train", "train", "test"))
    run = tmp_path / "run"
    train(make_recipe(train={"epochs": 1}), data, run)
    outcome = deepmsi("ablate", run, "--data", data)
    assert outcome.code == 0, outcome
    assert [line.split(" | ")[0] for line in outcome.out.splitlines()[2:5]] == ["| text", "| audio", "| text+audio"]
    assert "18 rows of a line have the id of a row that trained the model" in outcome.out
    # Of a manifest the lines are the same, and it is prepared once.
    manifest, table = data.parent / "raw" / "manifest.csv", run / "ablation" / "ablation.json"
    lines = json.loads(table.read_text())
    assert deepmsi("ablate", run, "--data", manifest).code == 0
    assert json.loads(table.read_text()) == lines
    assert [path.parent.name for path in table.parent.glob("*/prepared")] == ["text"]
    assert deepmsi("report", run).code == 0
    text = (run / "report.md").read_text()
    assert "## Ablation" in text
    assert "18 rows of a line have the id of a row that trained the model" in text
    outcome = deepmsi("ablate", run, "--data", data, "--split", "test", "--device", "cpu", "--out", tmp_path / "lines")
    assert outcome.code == 0, outcome
    held_out = json.loads((tmp_path / "lines" / "ablation.json").read_text())["lines"]
    assert [(line["split"], line["rows_seen_in_training"]) for line in held_out] == [("test", 0)] * 3
    assert max(line["n"] for line in held_out) == 6
    assert "Scored on the rows of the part test alone." in outcome.out
    assert "add --retrain" in mistake("ablate", run, "--data", data, "--keep", "0.5")
    for option in (("--split", "test"), ("--device", "cpu"), ("--precision", "bf16")):
        assert f"{option[0]} is for the model of RUN" in mistake("ablate", run, "--data", data, "--retrain", *option)
    assert "separated by commas" in mistake("ablate", run, "--data", data, "--retrain", "--frames", "few")
    assert "has no video branch" in mistake("ablate", run, "--data", data, "--retrain", "--frames", "4")


def test_ablate_trains_each_line(deepmsi, mistake, tmp_path_factory, tmp_path) -> None:
    folder = tmp_path_factory.mktemp("video")
    data = prepared_corpus(folder, rows=18, video=True, splits=("train", "train", "train", "test"))
    vision = {"backbone": "small", "image_size": 64, "frames": 2, "tcn_channels": [8], "threshold": 0.5}
    recipe = make_recipe(preset="small", vision=vision, train={"epochs": 1, "capacity_quantile": 0.9})
    run = tmp_path / "run"
    train(recipe, data, run)
    assert list(variants_of(run)) == ["without VSC", "without the contrastive term"]
    variants = variants_of(run, keep=[0.25], frames=[1])
    # Blocks 0 and 2 of the middle stage, whose grid is 8x8.
    assert variants["keep 25%"] == {"vision.keep": "[16, 16]", "train.capacity_quantile": "null"}
    words = ("ablate", run, "--data", data, "--retrain", "--keep", "0.25")
    outcome = deepmsi(*words, "--json")
    assert outcome.code == 0, outcome
    lines = json.loads(outcome.out)
    assert [line["name"] for line in lines[-4:]] == [
        "text+audio+video",
        "without VSC",
        "without the contrastive term",
        "keep 25%",
    ]
    assert len(lines) == 10
    made = yaml.safe_load((run / "ablation" / "retrained" / "keep-25-percent" / "recipe.yaml").read_text())
    assert made["vision"]["keep"] == [16, 16]
    assert json.loads(deepmsi(*words, "--json").out) == lines  # done already: read back
    assert "at most 1" in mistake("ablate", run, "--data", data, "--retrain", "--keep", "25")
    # Prepared clips hold so many frames: other numbers need the manifest.
    assert "holds 2 frames per utterance" in mistake("ablate", run, "--data", data, "--retrain", "--frames", "1")
    assert deepmsi("report", run).code == 0
    text = (run / "report.md").read_text()
    assert "without VSC" in text


def test_ablate_counts_of_frames_from_a_manifest(deepmsi, clips, tmp_path) -> None:
    """Prepared clips hold a fixed number of frames: each count prepares the manifest for itself, the others once."""
    run = tmp_path / "run"
    changes = ("drop=[text,audio]", "train.epochs=1", "train.batch_size=8", "protocol.final_fit=true")
    settings = [word for change in changes for word in ("--set", change)]
    manifest = clips / "manifest.csv"
    assert deepmsi("train", "demo", "--data", manifest, "--out", run, *settings).code == 0
    # A text that such a model does not read is not left out in silence.
    told = deepmsi("predict", run, next((clips / "clips").glob("*.mp4")), "--text", "so what")
    assert told.code == 0, told
    assert "This model reads video alone: --text changes nothing." in told.err
    words = ("ablate", run, "--data", manifest, "--retrain", "--frames", "2", "--json")
    outcome = deepmsi(*words)
    assert outcome.code == 0, outcome
    lines = json.loads(outcome.out)
    assert [line["name"] for line in lines] == ["video", "without VSC", "2 frames"]
    assert all("protocol" in line and line["context"] == 0 for line in lines)
    assert {path.parent.name for path in run.glob("ablation/retrained/*/prepared")} == {"video", "2-frames"}
    assert json.loads(deepmsi(*words).out) == lines  # done already: read back
    index = json.loads((run / "ablation" / "retrained" / "2-frames" / "prepared" / "index.json").read_text())
    assert index["options"]["frames"] == 2
    assert deepmsi("report", run).code == 0
    assert "| 2 frames |" in (run / "report.md").read_text()
