"""Each command does its work on a tiny synthetic set, and prints what it says it prints."""

import csv
import itertools
import json
import re
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from deepmsi.errors import UserError

LABELS = {"neutral", "joy", "sadness", "anger", "surprise", "fear"}


@pytest.fixture(scope="session")
def clip(clips: Path) -> Path:
    return clips / "clips" / "s00-joy-0.mp4"


def test_check(deepmsi, clips) -> None:
    outcome = deepmsi("check", clips / "manifest.csv")
    assert outcome.code == 0, outcome
    for label in LABELS:
        assert label in outcome.out


def test_check_json(deepmsi, clips) -> None:
    outcome = deepmsi("check", clips / "manifest.csv", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["problems"] == []


def test_check_finds_problems_and_fails(deepmsi, clips, tmp_path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,video,label\na,nowhere.mp4,joy\n")
    outcome = deepmsi("check", manifest)
    assert outcome.code == 1
    assert "nowhere.mp4" in outcome.out
    problems = json.loads(deepmsi("check", manifest, "--json").out)["problems"]
    assert "nowhere.mp4" in json.dumps(problems)


def test_check_lists_the_first_of_many_findings(deepmsi, tmp_path) -> None:
    manifest = tmp_path / "manifest.csv"
    rows = [f"{k},{k % 3}.mp4,{'joy' if k < 19 else f'label {k}'}" for k in range(45)]
    manifest.write_text("\n".join(["id,video,label", *rows]) + "\n")
    outcome = deepmsi("check", manifest)
    assert outcome.code == 1
    assert outcome.out.count("there is no such file") == 20
    assert "45 problems:" in outcome.out
    assert "  and 25 more: --json lists all\n\n26 warnings:\n" in outcome.out
    assert outcome.out.endswith("  and 6 more: --json lists all\n")
    report = json.loads(deepmsi("check", manifest, "--json").out)
    assert (len(report["problems"]), len(report["warnings"])) == (45, 26)


def test_prepare_twice_is_the_same(deepmsi, clips, tmp_path) -> None:
    words = ("prepare", clips / "manifest.csv", "--out", tmp_path / "d", "--size", "32", "--frames", "3", "--json")
    first = deepmsi(*words, "--workers", "1")
    assert first.code == 0, first
    summary = json.loads(first.out)
    assert summary["rows"] == 24
    assert json.loads(deepmsi(*words, "--workers", "2").out) == summary


def test_train_writes_a_run_that_says_what_made_it(trained) -> None:
    made = json.loads((trained / "run.json").read_text())
    assert made["seed"] == 0
    assert made["data"]["rows"] == 24
    assert (trained / "recipe.yaml").is_file()
    assert (trained / "model" / "model.safetensors").is_file()
    assert 0 <= json.loads((trained / "metrics.json").read_text())["accuracy"] <= 1


def test_evaluate(deepmsi, trained, prepared, tmp_path) -> None:
    out = tmp_path / "evaluation"
    outcome = deepmsi("evaluate", trained, "--data", prepared, "--out", out)
    assert outcome.code == 0, outcome
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"accuracy", "uar", "weighted_f1", "macro_f1", "per_class", "confusion_matrix", "labels"} <= set(metrics)
    assert f"accuracy     {metrics['accuracy']:.3f}" in outcome.out
    rows = list(csv.DictReader((out / "predictions.csv").open(newline="", encoding="utf-8")))
    assert set(rows[0]) >= {"id", "label", "predicted", *LABELS}
    for row in rows:
        shares = {label: float(row[label]) for label in LABELS}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
        assert row["predicted"] == max(shares, key=shares.__getitem__)


def test_evaluate_json_and_drop(deepmsi, trained, prepared) -> None:
    outcome = deepmsi("evaluate", trained, "--data", prepared, "--drop", "text, audio", "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["modalities"] == ["video"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_evaluate_on_a_device_of_its_own(deepmsi, mistake, trained, prepared) -> None:
    assert deepmsi("evaluate", trained, "--data", prepared, "--device", "cpu").code == 0
    assert "finds no CUDA device" in mistake("evaluate", trained, "--data", prepared, "--device", "cuda")
    words = ("evaluate", trained, "--data", prepared, "--device", "cpu", "--json", "--precision")
    assert "needs a GPU" in mistake(*words, "fp16")
    exact, rounded = (json.loads(deepmsi(*words, name).out) for name in ("fp32", "bf16"))
    assert "precision" not in exact
    assert rounded["precision"] == "bf16"
    assert rounded["n"] == exact["n"]


def test_evaluate_with_every_modality_dropped(mistake, trained, prepared) -> None:
    assert "video" in mistake("evaluate", trained, "--data", prepared, "--drop", "text,audio,video")


def test_predict(deepmsi, trained, clip) -> None:
    outcome = deepmsi("predict", trained, clip, "--text", "this is the best day")
    assert outcome.code == 0, outcome
    label = re.fullmatch(rf"{re.escape(str(clip))}: (\w+) \(.+\)\n", outcome.out)
    assert label is not None
    assert label[1] in LABELS


def test_predict_from_texts_alone(deepmsi, trained) -> None:
    words = ["predict", trained, "--text", "this is the best day", "--text", "leave me alone"]
    outcome = deepmsi(*words)
    assert outcome.code == 0, outcome
    assert [line.split(":")[0] for line in outcome.out.splitlines()] == ["this is the best day", "leave me alone"]
    items = json.loads(deepmsi(*words, "--json").out)
    assert [(item["clip"], item["text"], item["modalities"]) for item in items] == [
        (None, "this is the best day", ["text"]),
        (None, "leave me alone", ["text"]),
    ]


def test_predictions_of_clips_and_texts_as_csv(deepmsi, trained, clip, tmp_path) -> None:
    items = json.loads(deepmsi("predict", trained, clip, "--text", "so, that's it", "--json").out)
    assert deepmsi("predict", trained, clip, "--text", "so, that's it", "--out", tmp_path / "x.csv").code == 0
    (row,) = _table((tmp_path / "x.csv").read_text())
    assert (row["clip"], row["text"], row["label"]) == (str(clip), "so, that's it", items[0]["label"])
    assert row["joy"] == f"{items[0]['probabilities']['joy']:.6f}"
    (row,) = _table(deepmsi("predict", trained, "--text", "leave me alone", "--format", "csv").out)
    assert (row["clip"], row["text"]) == ("", "leave me alone")


def test_predictions_are_not_written_over_what_they_are_of(mistake, trained, prepared, clip, tmp_path) -> None:
    taken = tmp_path / "taken.csv"
    taken.write_bytes(clip.read_bytes())
    for words in ([taken], ["--data", taken]):
        assert "of what is to be read, and would be lost" in mistake("predict", trained, *words, "--out", taken)
    assert taken.read_bytes() == clip.read_bytes()
    for held, data in ((trained / "run.json", prepared), (prepared / "index.json", prepared)):
        before = held.read_bytes()
        words = ["predict", trained, "--data", data, "--json", "--out", held]
        assert "of what is to be read, and would be lost" in mistake(*words)
        assert held.read_bytes() == before


def test_predictions_are_written_where_a_rank_is_left_over(deepmsi, trained, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert deepmsi("predict", trained, "--text", "so be it", "--out", tmp_path / "x.json").code == 0
    assert json.loads((tmp_path / "x.json").read_text())[0]["text"] == "so be it"


def _table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def _manifest_without(clips: Path, column: str, folder: Path, changes: dict[str, dict[str, str]] | None = None) -> Path:
    """Write the manifest of a set without a column, with absolute paths, and with other cells in some rows."""
    rows = _table((clips / "manifest.csv").read_text())
    for row in rows:
        row["video"] = str(clips / row["video"])
        row |= (changes or {}).get(row["id"], {})
    file = folder / "new.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [name for name in rows[0] if name != column], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_rows_without_labels_are_predicted_as_labelled_ones(deepmsi, trained, clips, prepared, tmp_path) -> None:
    scores, unlabelled = tmp_path / "scores", _manifest_without(clips, "label", tmp_path)
    assert deepmsi("evaluate", trained, "--data", prepared, "--out", scores).code == 0
    known = _table((scores / "predictions.csv").read_text())
    outcome = deepmsi("predict", trained, "--data", unlabelled, "--out", tmp_path / "new-predictions.csv")
    assert (outcome.code, outcome.out) == (0, ""), outcome
    found = _table((tmp_path / "new-predictions.csv").read_text())
    assert found == [row | {"label": ""} for row in known]

    # Of what is prepared, with its labels, as JSON; and a part of it.
    items = json.loads(deepmsi("predict", trained, "--data", prepared, "--json").out)
    assert [[item["id"], item["label"], item["predicted"]] for item in items] == [
        [row["id"], row["label"], row["predicted"]] for row in known
    ]
    assert [f"{item['probabilities']['joy']:.6f}" for item in items] == [row["joy"] for row in known]
    part = _table(deepmsi("predict", trained, "--data", prepared, "--split", "test").out)
    assert part == [row for row in known if row["id"].startswith("s03")]
    spelled = _manifest_without(clips, "label", tmp_path, {row["id"]: {"split": "Test"} for row in part[:2]})
    assert _table(deepmsi("predict", trained, "--data", spelled, "--split", "TEST").out)[:2] == [
        row | {"label": ""} for row in part[:2]
    ]
    assert "no row has a label" in deepmsi("evaluate", trained, "--data", unlabelled).err


def test_rows_of_other_labels_and_unreadable_ones_are_told_apart(deepmsi, trained, clips, tmp_path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    bad = {"video": str(tmp_path / "bad.mp4"), "text": ""}
    data = _manifest_without(clips, "speaker", tmp_path, {"s00-joy-0": bad, "s01-joy-0": {"label": "no emotion"}})
    outcome = deepmsi("predict", trained, "--data", data)
    assert outcome.code == 0, outcome
    rows = {row["id"]: row for row in _table(outcome.out)}
    assert len(rows) == 23
    assert rows["s01-joy-0"]["label"] == "no emotion"
    assert rows["s01-joy-0"]["predicted"] in LABELS
    assert "1 row left out: nothing of them could be read" in outcome.err
    assert "bad.mp4" in outcome.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "{data}", "clip.mp4"], "leave a CLIP out, or --data"),
        (["--data", "{data}", "--text", "no"], "leave --text out, or --data"),
        (["--data", "{data}", "--timeline", "2"], "leave --timeline out, or --data"),
        (["clip.mp4", "--split", "test"], "--split is a part of the rows of --data"),
        (
            ["--data", "{data}", "--format", "srt"],
            "--format srt is for a timeline; add --timeline SECONDS to a CLIP, or",
        ),
        (["--data", "{data}", "--out", "rows.vtt"], "--out rows.vtt is for a timeline; add --timeline SECONDS"),
        (["--data", "{data}", "--out", "rows.txt"], "rows are written as .csv, .json; name the file so"),
        (["--data", "{data}", "--split", "dev"], "No row is of the part 'dev': the column split holds test, train"),
        (["--data", "nowhere.csv"], "There is no data at nowhere.csv"),
    ],
)
def test_what_goes_with_data_in_predict(mistake, trained, prepared, words, sentence) -> None:
    assert sentence in mistake("predict", trained, *(word.format(data=prepared) for word in words))


@pytest.mark.parametrize(
    ("asked", "there", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda"), ("cuda", False, "")],
)
def test_predict_runs_on_the_gpu_where_there_is_one(deepmsi, clip, monkeypatch, asked, there, device) -> None:
    def load_run(run: Path, device: str, precision: str) -> NoReturn:
        raise UserError(f"to be loaded to {device}")

    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("deepmsi.models.predict.load_run", load_run)
    outcome = deepmsi("predict", "run", clip, "--device", asked)
    assert outcome.code == 2
    assert (f"loaded to {device}\n" if device else "finds no CUDA device; give cpu or auto") in outcome.err


def test_predict_json_of_several_clips(deepmsi, trained, clips) -> None:
    paths = sorted((clips / "clips").glob("*.mp4"))[:3]
    outcome = deepmsi("predict", trained, *paths, "--json")
    assert outcome.code == 0, outcome
    items = json.loads(outcome.out)
    assert [item["clip"] for item in items] == [str(path) for path in paths]
    for item in items:
        assert sum(item["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert item["label"] == max(item["probabilities"], key=item["probabilities"].__getitem__)


def test_timeline_as_csv(deepmsi, trained, clip) -> None:
    outcome = deepmsi("predict", trained, clip, "--timeline", "0.5")
    assert outcome.code == 0, outcome
    rows = list(csv.DictReader(outcome.out.splitlines()))
    assert len(rows) >= 2
    assert float(rows[0]["start"]) == 0
    for row, following in itertools.pairwise(rows):
        assert float(row["end"]) == pytest.approx(float(following["start"]), abs=1e-3)
    assert set(rows[0]) == {"start", "end", "label", *LABELS}


def test_timelines_of_several_recordings(deepmsi, trained, clips) -> None:
    pair = [str(path) for path in sorted((clips / "clips").glob("*.mp4"))[:2]]
    outcome = deepmsi("predict", trained, *pair, "--timeline", "0.5")
    assert outcome.code == 0, outcome
    rows = list(csv.DictReader(outcome.out.splitlines()))
    assert list(dict.fromkeys(row["clip"] for row in rows)) == pair
    outcome = deepmsi("predict", trained, *pair, "--timeline", "0.5", "--json")
    assert [row["clip"] for row in json.loads(outcome.out)] == [row["clip"] for row in rows]


@pytest.mark.parametrize("how", ["name", "format"])
def test_timeline_as_subtitles(deepmsi, trained, clip, tmp_path, how) -> None:
    words = ["predict", trained, clip, "--timeline", "0.5"]
    if how == "name":
        outcome = deepmsi(*words, "--out", tmp_path / "x.srt")
        assert outcome.out == ""
        text = (tmp_path / "x.srt").read_text(encoding="utf-8")
        assert [path.name for path in tmp_path.iterdir()] == ["x.srt"]
    else:
        outcome = deepmsi(*words, "--format", "srt")
        text = outcome.out
    assert outcome.code == 0, outcome
    cues = text.strip().split("\n\n")
    for number, cue in enumerate(cues, 1):
        first, times, label = cue.splitlines()
        assert first == str(number)
        assert re.fullmatch(r"\d\d:\d\d:\d\d,\d\d\d --> \d\d:\d\d:\d\d,\d\d\d", times)
        assert re.fullmatch(rf"({'|'.join(LABELS)}) \d+%", label)


def test_report(deepmsi, trained) -> None:
    outcome = deepmsi("report", trained)
    assert outcome.code == 0, outcome
    assert outcome.out == f"{trained / 'report.html'}\n"
    text = (trained / "report.html").read_text(encoding="utf-8")
    for section in ("curves", "confusion", "classes", "tokens", "speakers"):
        assert f'id="{section}"' in text, section
    assert (trained / "report.md").is_file()


def test_export(deepmsi, trained, tmp_path) -> None:
    outcome = deepmsi("export", trained, "--out", tmp_path / "model.pt2", "--backend", "auto", "--json")
    assert outcome.code == 0, outcome
    told = json.loads(outcome.out)
    assert (tmp_path / "model.pt2").stat().st_size > 100_000
    assert told["difference"] < 1e-4
    assert set(told["labels"]) == LABELS
    assert "pixel_values" in told["inputs"]


def test_explain_tells_of_a_run_what_becomes_a_graph(deepmsi, trained: Path) -> None:
    outcome = deepmsi("explain", trained)
    assert outcome.code == 0
    assert "CUDA graphs in training: " in outcome.out
    told = json.loads(deepmsi("explain", trained, "--json").out)["cuda_graphs"]
    assert f"CUDA graphs in inference: {told['inference']}\n" in outcome.out
    if not torch.cuda.is_available():
        assert told == {"training": "no CUDA device is visible", "inference": "no CUDA device is visible"}
    assert deepmsi("explain", trained.parent / "nowhere").code == 2
