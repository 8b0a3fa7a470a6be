"""The ablation: which lines there are, and that each is measured on what it says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import make_recipe, prepared_corpus

from deepmsi.errors import UserError
from deepmsi.report.collect import collect
from deepmsi.train.ablate import ablate, ablation_table, subsets
from deepmsi.train.run import train


def test_the_seven_subsets() -> None:
    assert list(subsets(("video", "text", "audio"))) == [
        "text", "audio", "video", "text+audio", "text+video", "audio+video", "text+audio+video",
    ]  # fmt: skip
    assert list(subsets(("audio",))) == ["audio"]


@pytest.mark.parametrize("mode", ["evaluate", "retrain"])
def test_lines_are_measured(mode: str, split_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make_recipe(), split_corpus, run)
    variants = {"no dropout": {"fusion.dropout": "0"}} if mode == "retrain" else None
    lines = ablate(run, split_corpus, mode=mode, variants=variants)  # type: ignore[arg-type]
    names = ["text", "audio", "text+audio"] + ["no dropout"] * (mode == "retrain")
    assert [line["name"] for line in lines] == names
    if mode == "evaluate":
        assert [line["n"] for line in lines] == [48, 60, 60]
    else:
        assert [line["n"] for line in lines[1:]] == [12, 12, 12]
        assert all("protocol" in line for line in lines)
    assert lines[2]["accuracy"] > 0.9
    lines_of = run / "ablation" / ("retrained" if mode == "retrain" else "")
    written = json.loads((lines_of / "ablation.json").read_text())
    assert [line["name"] for line in written["lines"]] == names
    assert (lines_of / "text+audio" / "metrics.json").is_file()
    leaky = [line | {"protocol": "10-fold (leaks: speakers)"} for line in lines]
    assert ablation_table(leaky).splitlines()[-1] == "Protocol: 10-fold (leaks: speakers)."
    table = ablation_table(lines).splitlines()
    # The 60 rows to evaluate have 48 with text, and 36 of them trained; the 12 of the test part all have it.
    told = {
        "evaluate": [
            "Lines of different n were scored on different rows: a row with none of a line's modalities is left out.",
            "Up to 36 rows of a line have the id of a row that trained the model or its encoders or chose their epoch: "
            "where they are the same rows, its figures do not hold for new data.",
        ],
        "retrain": [f"Protocol: {lines[0].get('protocol')}."],
    }
    assert [line for line in table[2 + len(lines) :] if line] == told[mode]
    assert table[2].startswith("| text | ")


def test_both_kinds_of_lines_find_room(split_corpus: Path, tmp_path: Path) -> None:
    """A report recommends one and the other, and shows both."""
    run = tmp_path / "run"
    train(make_recipe(train={"epochs": 1}), split_corpus, run)
    for mode in ("evaluate", "retrain", "evaluate"):
        ablate(run, split_corpus, mode=mode, variants={} if mode == "retrain" else None)  # type: ignore[arg-type]
    shown = [(each.retrained, [name for name, _ in each.lines]) for each in collect(run).ablations]
    assert shown == [(True, ["T", "A", "T+A"]), (False, ["T", "A", "T+A"])]


def test_lines_are_trained_and_measured_on_the_folds_of_the_run(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    protocol = {"name": "stratified-kfold", "folds": 3, "final_fit": False}
    train(make_recipe(protocol=protocol, train={"epochs": 1}), corpus, run)
    ablate(run, corpus, mode="retrain", variants={})
    own = run / "ablation" / "retrained" / "text"
    folds, of_text = (json.loads((folder / "splits.json").read_text()) for folder in (run, own))
    assert of_text.keys() == folds.keys()
    for name, parts in of_text.items():
        for part in ("train", "test"):
            assert parts[part] == [row for row in folds[name][part] if int(row[1:]) % 5]  # the others have no text
    # A line that was begun on other folds is not continued on these.
    of_text["01"], of_text["02"] = of_text["02"], of_text["01"]
    (run / "ablation" / "retrained" / "text" / "splits.json").write_text(json.dumps(of_text))
    with pytest.raises(UserError, match=r"text was begun with other folds: delete it"):
        ablate(run, corpus, mode="retrain", variants={})


def without_text(condition: Callable[[dict[str, str]], bool]) -> Callable[[list[dict[str, str]]], None]:
    def edit(table: list[dict[str, str]]) -> None:
        for row in filter(condition, table):
            row["text"] = row["text_features"] = ""

    return edit


def test_a_line_without_rows_of_the_dev_part_chooses_its_epoch_inside_the_training_part(tmp_path: Path) -> None:
    edit, run = without_text(lambda row: row["split"] == "dev"), tmp_path / "run"
    data = prepared_corpus(tmp_path, splits=("train", "train", "train", "train", "dev", "test"), edit=edit)
    train(make_recipe(train={"epochs": 1, "selection": "auto", "inner_folds": 2}), data, run)
    ablate(run, data, mode="retrain", variants={})
    (fold,) = json.loads((run / "ablation" / "retrained" / "text" / "metrics.json").read_text())["folds"]
    assert fold["epochs_from"] == "an inner validation part"


def test_repeats_of_a_line_may_lack_folds(tmp_path: Path) -> None:
    """Six rows have text: all four folds of the second repeat have some, and three of the first."""
    edit, run = without_text(lambda row: int(row["id"][1:]) >= 8), tmp_path / "run"
    data = prepared_corpus(tmp_path, edit=edit)
    protocol = {"name": "stratified-kfold", "folds": 4, "repeats": 2, "final_fit": False}
    train(make_recipe(train={"epochs": 1}, protocol=protocol), data, run)
    ablate(run, data, mode="retrain", variants={})
    metrics = json.loads((run / "ablation" / "retrained" / "text" / "metrics.json").read_text())
    assert (len(metrics["folds"]), metrics["repeats"], metrics["n"]) == (7, 2, 6)


def test_variants_need_training(split_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make_recipe(train={"epochs": 1}), split_corpus, run)
    with pytest.raises(UserError, match="mode='retrain'"):
        ablate(run, split_corpus, variants={"x": {"fusion.dropout": "0"}})
    with pytest.raises(UserError, match="cannot be named 'text'"):
        ablate(run, split_corpus, mode="retrain", variants={"text": {"fusion.dropout": "0"}})
