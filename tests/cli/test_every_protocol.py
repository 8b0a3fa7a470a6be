"""Every protocol from end to end: trained in two places, joined by the report, one row scored once, its leak told."""

import csv
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from small_corpus import FEATURES, prepared_corpus


def ids_of_iemocap(table: list[dict[str, str]]) -> None:
    """Name 60 rows as IEMOCAP does: five sessions, two speakers and two dialogues in each, three classes in each."""
    for i, row in enumerate(table):
        session, place = i // 12 + 1, i % 12
        dialogue = f"Ses0{session}F_impro0{place // 6 + 1}"
        gender = "FM"[place // 3 % 2]
        row |= {"id": f"{dialogue}_{gender}{place:03d}", "dialogue": dialogue, "speaker": f"Ses0{session}_{gender}"}
        row["split"] = ("train", "train", "train", "dev", "test")[session - 1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_corpus(tmp_path_factory.mktemp("iemocap"), rows=60, edit=ids_of_iemocap)


@dataclass(frozen=True)
class Case:
    """What a protocol must give on the 60 rows: its folds, the rows they report, the column that never straddles."""

    settings: dict[str, Any]
    folds: int
    rows: int
    apart: str | None
    epochs_from: str = "an inner validation part"


CASES = {
    "meld": Case({}, 1, 12, "dialogue", "the dev part"),
    "iemocap-session5": Case({}, 1, 12, "session"),
    "iemocap-loso": Case({}, 5, 60, "session"),
    "iemocap-speaker": Case({}, 10, 60, "speaker"),
    "group-kfold": Case({"folds": 3}, 3, 60, "dialogue"),
    "paper-kfold10": Case({}, 10, 60, None),
}
COLUMN = {
    "dialogue": lambda name: name.rpartition("_")[0],
    "session": lambda name: name[:5],
    "speaker": lambda name: name[:5] + name.rpartition("_")[2][0],
}


@pytest.mark.parametrize("name", CASES)
def test_a_protocol_from_training_to_its_report(name: str, corpus: Path, deepmsi, tmp_path: Path) -> None:
    case = CASES[name]
    recipe, run = tmp_path / "small.yaml", tmp_path / "run"
    protocol = {"name": name, "final_fit": False, **case.settings}
    train = FEATURES["train"] | {"epochs": 1, "selection": "auto"}
    recipe.write_text(yaml.safe_dump({**FEATURES, "protocol": protocol, "train": train}))
    words = ("train", recipe, "--data", corpus, "--out")
    said = []
    if case.folds == 1:
        said.append(deepmsi(*words, run))
    else:
        elsewhere = tmp_path / "elsewhere"
        numbers = [str(k + 1) for k in range(case.folds)]
        said.append(deepmsi(*words, run, "--folds", ",".join(numbers[::2])))
        said.append(deepmsi(*words, elsewhere, "--folds", ",".join(numbers[1::2])))
        for fold in (elsewhere / "folds").iterdir():
            shutil.copytree(fold, run / "folds" / fold.name)
    said.append(deepmsi("report", run))
    assert [outcome.code for outcome in said] == [0] * len(said), said

    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["complete"]
    assert (metrics["n"], len(metrics["folds"])) == (case.rows, case.folds)
    assert {fold["epochs_from"] for fold in metrics["folds"]} == {case.epochs_from}
    assert sum(map(sum, metrics["confusion_matrix"])) == case.rows
    assert ("over_folds" in metrics) == (case.folds > 1)
    scored = Counter(row["id"] for row in csv.DictReader((run / "predictions.csv").open(newline="")))
    splits = json.loads((run / "splits.json").read_text())
    assert scored == Counter(row_id for parts in splits.values() for row_id in parts["test"])
    assert set(scored.values()) == {1}
    for parts in splits.values():
        assert not set(parts["train"]) & set(parts["test"])
        if case.apart:
            group = COLUMN[case.apart]
            assert not {group(i) for i in parts["train"]} & {group(i) for i in parts["test"]}

    # Wherever figures are printed the protocol stands beside them, and so does the leak of the one that leaks.
    pages = {page: (run / page).read_text() for page in ("report.md", "report.html")}
    printed = {
        "standard output": said[0].out,
        "progress": said[0].err,
        "metrics.json": metrics["protocol"],
        "run.json": json.loads((run / "run.json").read_text())["protocol"],
        **{page: re.sub(r"\\|\s+", " ", text) for page, text in pages.items()},
        "compare": deepmsi("compare", run, run).out,
    }
    title = metrics["protocol"].partition(" (")[0].replace("'", "’").split("’")[0]
    for where, text in printed.items():
        assert ("leaks" in text) == (name == "paper-kfold10"), where
        assert title in text, where
        if where not in ("progress", "metrics.json", "run.json"):
            assert re.search(r"text context:?\s+(</dt><dd>)?none", text), where
    assert metrics["leaks"] == (name == "paper-kfold10")
    # The one protocol here that keeps a model has a map of its embeddings, with a legend of the classes.
    legend = re.search(r'<p class="legend">(.*?)</p>', pages["report.html"])
    assert (legend is not None) == (name == "meld")
    if legend is not None:
        assert re.findall(r"</i>(\w+)</span>", legend[1]) == metrics["labels"]


def test_a_leak_is_told_by_its_own_reason(corpus: Path, deepmsi, tmp_path: Path) -> None:
    recipe, run = tmp_path / "small.yaml", tmp_path / "run"
    protocol = {"name": "iemocap-session5", "seen_features": True, "final_fit": False}
    recipe.write_text(yaml.safe_dump({**FEATURES, "protocol": protocol}))
    assert "leaks: encoders that were" in deepmsi("train", recipe, "--data", corpus, "--out", run).out
    assert deepmsi("report", run, run).code == 0
    for page in ("report.md", "report.html", "comparison.md", "comparison.html"):
        text = (run / page).read_text()
        assert "leaks:" in re.sub("<[^>]*>", "", text)
        assert "encoders that were trained on reported rows" in text
        assert "one dialogue and one speaker" not in text
