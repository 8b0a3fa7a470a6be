"""The page of a run: complete, self-contained, escaped, and still written where parts are missing."""

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from deepmsi.data.files import TEMPORARY
from deepmsi.errors import UserError
from deepmsi.models.predict import Prediction
from deepmsi.report import compare, figures, report, report_comparison
from deepmsi.report.collect import collect, worst_errors
from deepmsi.report.compare import measured
from deepmsi.report.text import render_comparison, render_metrics, render_timeline
from deepmsi.train.evaluate import prediction_rows
from deepmsi.train.metrics import compare_predictions
from deepmsi.train.record import write_predictions

HOSTILE = '<script>alert("x")</script>|`$\\alpha$`'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what the tests ask about, and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(values["src"] or "")
            assert values.get("alt"), "a picture without words for it"
        if "id" in values:
            self.ids.append(values["id"] or "")
        self.references += [v or "" for k, v in attrs if k in ("href", "src", "srcset", "action", "data")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def assert_pictures_open(page: Page) -> None:
    for uri in page.images:
        kind, content = re.fullmatch(r"data:(image/[a-z+]+);base64,(.+)", uri).groups()  # type: ignore[union-attr]
        raw = base64.b64decode(content, validate=True)
        if kind == "image/svg+xml":
            assert ElementTree.fromstring(raw).tag.endswith("svg")
        else:
            Image.open(io.BytesIO(raw)).load()


def test_page_is_whole_and_self_contained(make_run) -> None:
    run = make_run()
    path = report(run)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == run / "report.html"
    assert {"made", "curves", "confusion", "classes", "errors", "missing"} <= set(page.ids)
    assert page.images
    assert_pictures_open(page)
    assert all(reference.startswith("data:") for reference in page.references)
    assert "@import" not in text
    assert "url(" not in text
    assert not {"script", "link", "iframe"} & set(page.tags)
    metrics = json.loads((run / "metrics.json").read_text())
    words = " ".join(page.words)
    for key in ("accuracy", "uar", "weighted_f1", "macro_f1"):
        assert f"{metrics[key]:.3f}" in words
    low, high = metrics["intervals"]["accuracy_wilson"]
    assert f"{low:.2f} to {high:.2f}" in words
    by = metrics["intervals_by"]["speaker"]["accuracy"]
    assert f"over 5 speakers: {by[0]:.2f} to {by[1]:.2f}" in words
    for row in metrics["per_class"].values():
        assert f"{row['legacy_f1']:.3f}" in words
    assert f"log loss {metrics['log_loss']:.3f}, Brier score {metrics['brier']:.3f}, ECE {metrics['ece']:.3f}" in words
    assert not [*run.glob("*.part"), *run.glob(f"{TEMPORARY}*")]


def test_markdown_twin_tells_the_same(make_run) -> None:
    run = make_run()
    report(run)
    text = (run / "report.md").read_text(encoding="utf-8")
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"| accuracy | {metrics['accuracy']:.3f} |" in text
    by = metrics["intervals_by"]["speaker"]["accuracy"]
    assert "| score | value | 95% over rows | over 5 speakers | over 1 dialogue |" in text
    assert f" | {by[0]:.3f} to {by[1]:.3f} |  |\n" in text, "one dialogue tells nothing of others"
    said = render_metrics(metrics)
    assert f"95% interval over 5 speakers: accuracy {by[0]:.3f} to {by[1]:.3f}, UAR " in said
    assert "95% interval over 1 dialogue: none, it takes two\n" in said
    assert text.startswith("# by hand\n\nProtocol: "), "a recipe's description need not hold of the run"
    assert "- the recipe's own words: a test (this run may be set otherwise)\n" in text.replace("\\", "")
    assert f"| 40 | 0.600 | {metrics['accuracy']:.3f} |" in text, "the bin of all rows"
    first = metrics["confusion_matrix"][0]
    assert f"| joy | {' | '.join(map(str, first))} |" in text
    assert "- rows known to training: 9 by their speaker, of 40\n" in text
    (run / "metrics.json").write_text(json.dumps({**metrics, "rows_seen_in_training": 4}))
    also = report(run).with_suffix(".md").read_text(encoding="utf-8")
    assert (
        "- rows known to training: 9 by their speaker, of 40\n- rows with the id of one that training knows: 4\n"
        in also
    )
    # every table has as many cells in each row as in its head
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") - line.count(r"\|") for line in table.splitlines()}) == 1


def test_a_comparison_tells_what_each_side_read(make_run) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text())
    told = {"protocol": "a split", "context": 2, "modalities": ["text", "audio"], "split": "test"}
    (run / "metrics.json").write_text(json.dumps(metrics | told))
    assert measured(run) == measured(run / "predictions.csv") == told
    found = compare_predictions(run, run) | {"measured": {"a": measured(run), "b": {}}}
    first, second, *_ = render_comparison("one", "two", found).splitlines()
    assert first == "A: one, a split, part test, read: text, audio, text context: 2 previous utterances"
    assert second == "B: two"
    (run / "metrics.json").write_text(json.dumps(metrics | {"modalities": None}))
    assert measured(run) == {}, "a damaged record tells nothing"


def test_several_runs_against_one_are_tested_by_holm(make_run, tmp_path: Path) -> None:
    run = make_run()
    others = [tmp_path / name for name in ("little", "much")]
    for other, mended in zip(others, (3, 12), strict=True):
        shutil.copytree(run, other)
        with (other / "predictions.csv").open(newline="", encoding="utf-8") as stream:
            header, *rows = csv.reader(stream)
        wrong = [row for row in rows if row[1] != row[2]]
        for row in wrong[:mended]:
            row[2] = row[1]
        write_predictions(other / "predictions.csv", rows, header[3:])
    assert len(wrong) == 8
    text = report_comparison([run, *others]).with_suffix(".md").read_text(encoding="utf-8")
    assert "| right alone | McNemar p | by Holm | rows |" in text
    assert "3 : 0 | 0.25 | 0.25 | 40 |" in text
    assert "8 : 0 | 0.00781 | 0.0156 | 40 |" in text
    assert "by Holm it allows for their number" in " ".join((run / "comparison.html").read_text().split())
    alone = report_comparison([run, others[0]]).with_suffix(".md").read_text(encoding="utf-8")
    assert "| right alone | McNemar p | rows |" in alone
    assert "3 : 0 | 0.25 | 40 |" in alone
    assert compare._holm([0.01, 0.5, 0.04, 0.03]) == pytest.approx([0.04, 0.5, 0.09, 0.09])


def test_classes_of_few_rows_and_a_kept_model_that_was_not_scored_are_told(make_run) -> None:
    run = make_run(n=26)
    made = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(made | {"final_fit": {"rows": 26, "epochs": 3}}))
    text = report(run).with_suffix(".md").read_text(encoding="utf-8")
    metrics = json.loads((run / "metrics.json").read_text())
    per_class = metrics["per_class"]
    rare = ", ".join(f"{name} {row['support']}" for name, row in per_class.items() if row["support"] < 10)
    assert rare
    assert f"Of some classes there are few rows ({rare})" in text.replace("\\", "")
    assert "- kept model: fitted on all 26 rows after the folds' models" in text
    assert f"few rows     {rare}: intervals of UAR and F1" in render_metrics(metrics)
    thrice = {name: row | {"support": 3 * row["support"]} for name, row in per_class.items()}
    assert f"few rows     {rare}: " in render_metrics(metrics | {"repeats": 3, "per_class": thrice})
    assert "few rows" not in render_metrics(metrics | {"intervals": {"accuracy_wilson": [0.4, 0.9]}})
    share = per_class["joy"]["support"] / 26
    assert f"| joy | {share:.3f} | {per_class['joy']['mean_probability']:.3f} |" in text


def test_a_second_report_of_one_run_is_the_same(make_run) -> None:
    run = make_run()
    first = report(run).read_bytes()
    assert first == report(run).read_bytes()


def test_a_full_disk_leaves_no_part_of_a_page(make_run, mount) -> None:
    disk = mount("64k")
    run = disk / "run"
    shutil.copytree(make_run(), run)
    before = {path.name for path in run.iterdir()}
    with pytest.raises(UserError, match="the disk is full"):
        report(run)
    assert {path.name for path in run.iterdir()} <= before | {"report.md"}


def test_untrusted_text_is_escaped(make_run) -> None:
    run = make_run(("joy", HOSTILE, "anger"), name=HOSTILE)
    text = report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "<script>alert" not in text
    assert HOSTILE in "".join(page.words)
    assert_pictures_open(page)
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown


@pytest.mark.parametrize(
    "part", ["run.json", "recipe.yaml", "history.jsonl", "metrics.json", "predictions.csv"], ids=str
)
@pytest.mark.parametrize("damage", ["absent", "garbage"])
def test_a_missing_part_is_named_and_the_rest_reported(make_run, part: str, damage: str) -> None:
    run = make_run()
    if damage == "absent":
        (run / part).unlink()
    else:
        (run / part).write_bytes(b"\xff\xfe{[: not this")
    page = Page(report(run).read_text(encoding="utf-8"))
    assert_pictures_open(page)
    assert part in " ".join(page.words)
    expected = {"history.jsonl": "curves", "metrics.json": "confusion", "predictions.csv": "errors"}
    for name, section in expected.items():
        assert (section in page.ids) == (name != part)


@pytest.mark.parametrize(
    "damage",
    [
        {"accuracy": "high"},
        {"confusion_matrix": [[1, "x", 3]] * 3},
        {"confusion_matrix": [[1, 2]]},
        {"per_class": {"joy": {}}},
        {"intervals": {"accuracy": [0.1]}},
        {"over_folds": {"accuracy": {"mean": None}}},
        {"repeats": "three"},
        {"intervals_by": {"speaker": {"groups": 3, "accuracy": [0.1]}}},
        {"context": "none"},
        {"labels": 3},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_odd_scores_are_named_and_the_rest_reported(make_run, damage: dict) -> None:
    run = make_run()
    path = run / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    page = Page(report(run).read_text(encoding="utf-8"))
    assert f"metrics.json is damaged ({next(iter(damage))}" in " ".join(page.words)
    assert "curves" in page.ids
    assert "confusion" not in page.ids


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        report(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        report(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_ablation_is_read_from_evaluations_inside_the_run(make_run) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text())
    for used, accuracy in ((["text", "audio"], 0.125), (["video"], 0.375)):
        folder = run / "ablation" / "-".join(used)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({**metrics, "accuracy": accuracy, "modalities": used}))
    (found,) = collect(run).ablations
    assert [(name, m["accuracy"]) for name, m in found.lines] == [("V", 0.375), ("T+A", 0.125)]
    page = Page(report(run).read_text(encoding="utf-8"))
    assert "ablation" in page.ids
    assert "0.125" in " ".join(page.words)


def test_an_ablation_stands_in_the_order_of_table_3(make_run) -> None:
    run = make_run(("hap", "sad", "neu", "ang", "exc", "fru"), n=60)
    metrics = json.loads((run / "metrics.json").read_text())
    names = ["without VSC", "text+audio+video", "video", "audio+video", "text", "text+video", "audio", "keep 25%"]
    lines = [{"name": name, **metrics} for name in names]
    (run / "ablation").mkdir()
    (run / "ablation" / "ablation.json").write_text(json.dumps({"mode": "retrain", "lines": lines}))
    expected = ["T", "A", "V", "T+V", "A+V", "T+A+V", "without VSC", "keep 25%"]
    (found,) = collect(run).ablations
    assert [name for name, _ in found.lines] == expected
    text = report(run).with_suffix(".md").read_text(encoding="utf-8").replace("\\", "")
    beside = text.partition("Table 3, IEMOCAP")[2]
    assert re.findall(r"^\| ([TAV+]+) \|", beside, re.MULTILINE) == ["T", "A", "V", "T+A", "T+V", "A+V", "T+A+V"]
    assert re.search(r"^\| T\+A \| – \| – \| – \| – \|", beside, re.MULTILINE)  # neither printed nor measured
    assert "under its own protocol" in beside
    (run / "ablation" / "ablation.json").write_text(json.dumps({"mode": "evaluate", "lines": lines}))
    text = report(run).with_suffix(".md").read_text(encoding="utf-8")
    assert "under its own protocol" not in text  # but on what it was given to evaluate


def test_both_kinds_of_ablation_are_shown(make_run) -> None:
    """A model trained for each line, and beside it the kept one; Table 3 has the former."""
    run = make_run(("hap", "sad", "neu", "ang", "exc", "fru"), n=60)
    metrics = json.loads((run / "metrics.json").read_text())
    for place, mode, accuracy in (("ablation", "evaluate", 0.125), ("ablation/retrained", "retrain", 0.375)):
        (run / place).mkdir()
        lines = [{"name": "text", **metrics, "accuracy": accuracy}]
        (run / place / "ablation.json").write_text(json.dumps({"mode": mode, "lines": lines}))
    path = report(run)
    for text in (path.read_text(encoding="utf-8"), path.with_suffix(".md").read_text(encoding="utf-8")):
        assert "A model trained for each line" in text
        assert re.search(r"The kept model with\smodalities hidden, on the data", text)
    for table, figure in (("## Ablation", "0.375"), ("The kept model", "0.125"), ("Table 3, IEMOCAP", "37.50")):
        assert re.search(r"^\| T \|.*", text.partition(table)[2], re.MULTILINE)[0].count(figure)  # type: ignore[index]
    assert "under its own protocol" in text


@pytest.mark.parametrize(
    ("repeats", "above"),
    [
        ({}, "of all rows together"),
        ({"repeats": 2}, "means over 2 repeats, each of all rows together, and what is counted below"),
    ],
)
def test_means_over_folds_are_told_from_scores_of_all_rows(make_run, repeats: dict, above: str) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text()) | repeats
    metrics["over_folds"] = {"accuracy": {"mean": 0.5, "std": 0.1, "n": 4}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    path = report(run)
    for text in (path.read_text(encoding="utf-8"), path.with_suffix(".md").read_text(encoding="utf-8")):
        assert f"the scores above are {above}" in text


def test_the_marks_of_thirty_classes_differ() -> None:
    marks = figures.class_marks([str(k) for k in range(30)])
    assert (
        len({(mark.colour, mark.glyph) for mark in marks}) == len({(mark.colour, mark.marker) for mark in marks}) == 30
    )
    points, classes = np.random.default_rng(0).normal(size=(30, 2)), [mark.name for mark in marks]
    right, wrong = (figures.scatter_uri(points, classes, np.full(30, value), marks) for value in (True, False))
    svg = [base64.b64decode(uri.partition(",")[2]).decode() for uri in (right, wrong)]
    for mark in marks:
        assert f"fill: {mark.colour}" in svg[0]
        assert f"fill: {mark.colour}" not in svg[1]  # hollow
        assert f"stroke: {mark.colour}" in svg[1]


def test_labels_that_have_the_name_of_a_column(make_run) -> None:
    """They were one column with the table's own, or with another label's."""
    labels = ("id", "p(id)", "start")
    run = make_run()
    rows = prediction_rows(["a", "b"], np.array([0, 1]), np.log([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]]), labels)
    write_predictions(run / "predictions.csv", rows, labels)
    assert (run / "predictions.csv").read_text().splitlines()[0] == "id,label,predicted,p(id),p(p(id)),start"
    scored = collect(run).predictions
    assert [(row.id, row.predicted, row.confidence) for row in scored] == [("a", "id", 0.5), ("b", "p(id)", 0.7)]
    window = Prediction("a.mp4", "id", dict(zip(labels, (0.5, 0.3, 0.2), strict=True)), 0.0, 1.0, ("video",))
    assert render_timeline([window]).splitlines()[0] == "start,end,label,id,p(p(id)),p(start)"


def test_worst_errors_are_wrong_and_most_confident(make_run) -> None:
    rows = collect(make_run(n=60)).predictions
    worst = worst_errors(rows, most=5)
    assert len(worst) == 5
    assert not any(row.right for row in worst)
    assert min(row.confidence for row in worst) >= max(
        (row.confidence for row in rows if not row.right and row not in worst), default=0
    )


@pytest.mark.parametrize(
    ("labels", "dataset", "figure"),
    [
        (("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"), "MELD", "92.6"),
        (("hap", "sad", "neu", "ang", "exc", "fru"), "IEMOCAP", "94.3"),
        (("joy", "anger"), None, None),
    ],
    ids=["meld", "iemocap", "own"],
)
def test_paper_stands_beside_its_own_data_sets_only(make_run, labels, dataset, figure) -> None:
    run = make_run(labels, n=80)
    page = Page(report(run).read_text(encoding="utf-8"))
    words = " ".join(page.words)
    assert ("paper" in page.ids) == (dataset is not None)
    if dataset is not None:
        assert figure in words
        assert "10-fold cross-validation over shuffled utterances" in words
