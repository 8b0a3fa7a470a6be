"""Joins the folds of a run: scores and predictions of all that are done, from what each fold left in its folder.

Nothing but the run directory is read, so folds may run in any process or on any machine, as long as their folders
come together under RUN/folds.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, RootModel

from deepmsi.errors import UserError
from deepmsi.models.config import validated
from deepmsi.train.intervals import SUMMARY, wilson_interval
from deepmsi.train.metrics import Scores, compute_metrics, summarize_folds
from deepmsi.train.recipe import load_recipe
from deepmsi.train.record import (
    METRICS,
    PREDICTIONS,
    RECIPE,
    RUN,
    groups_of,
    read_groups,
    read_run,
    write_json,
    write_predictions,
)

SPLITS, FOLD = "splits.json", "fold.json"
_LONGEST = 200  # bytes of a folder's name, of which file systems take 255


class _Data(BaseModel):
    fingerprint: str
    content: str | None = None


class _Begun(BaseModel):
    """What a run that goes on needs of `run.json`."""

    labels: list[str]
    data: _Data
    seconds: float = 0.0


class _Parts(BaseModel):
    test: list[str]


class _Splits(RootModel[dict[str, _Parts]]):
    """What joining needs of `splits.json`."""


class _Fold(BaseModel):
    """`fold.json`: what `metrics.json` tells of each fold."""

    name: str
    train: int
    test: int
    epochs: int
    kept_epoch: int | None
    epochs_from: str
    temperature: float | None = None
    seconds: float
    metrics: Scores


@dataclass(frozen=True)
class _Scored:
    """One fold that is done: its record, its rows of `predictions.csv`, and their probabilities [n, K]."""

    facts: dict[str, Any]
    rows: list[list[str]]
    probabilities: NDArray[np.float64]

    @property
    def truth(self) -> list[str]:
        return [row[1] for row in self.rows]

    @property
    def predicted(self) -> list[str]:
        return [row[2] for row in self.rows]


def fold_folder(run: Path, name: str, single: bool) -> Path:
    """Where a fold's files lie; the one fit of the protocol `split-column` is the run itself.

    A name may be a cell of a manifest: what would lead elsewhere is encoded, and what no file system takes is cut.
    """
    if single:
        return run
    folder = re.sub(r"[/\\%\0]|^\.", lambda found: f"%{ord(found[0]):02X}", name)
    if len(folder.encode()) > _LONGEST:
        folder = f"{folder.encode()[:100].decode(errors='ignore')}-{sha256(name.encode()).hexdigest()[:16]}"
    return run / "folds" / folder


def read_begun(run: Path) -> dict[str, Any]:
    """Read `run.json` of a run that is to be continued or joined.

    Raises:
        UserError: as `read_run`, or it lacks what the run goes on with.
    """
    facts = read_run(run)
    validated(_Begun, facts, f"{run / RUN} is damaged (begin the run again in another folder)")
    return facts


def read_splits(run: Path) -> dict[str, Any]:
    """Read `splits.json`: the ids of each fold's parts, {"01": {"train": [...], "test": [...]}}.

    Raises:
        UserError: it is missing or damaged.
    """
    return _read_json(run / SPLITS, _Splits)


def join_folds(run: Path, write: bool = True) -> dict[str, Any]:
    """Score the folds that are done, together.

    Args:
        run: a run directory of `train`.
        write: whether to write `metrics.json` and, of several folds, `predictions.csv`.

    Returns:
        What `metrics.json` holds: the scores of the joined folds (over repeats their mean), every fold's own,
        and `complete`.

    Raises:
        UserError: no such run, or a fold that is damaged or was run on other rows or data than the others.
    """
    facts, recipe = read_begun(run), load_recipe(run / RECIPE)
    protocol, names = recipe.protocol, list(facts["labels"])
    single = protocol.name == "split-column"
    splits = read_splits(run)
    done = {
        name: _read_fold(fold_folder(run, name, single), parts["test"], len(names), facts["data"].get("content"))
        for name, parts in splits.items()
        if (fold_folder(run, name, single) / FOLD).is_file()
    }
    # By number, not by place: where a plan is cut to fewer rows, a repeat may lack folds.
    numbered = protocol.name in ("stratified-kfold", "group-kfold")
    repeats: dict[int, list[_Scored]] = {}
    for name, fold in done.items():
        repeats.setdefault((int(name) - 1) // protocol.folds if numbered else 0, []).append(fold)
    each = list(repeats.values())
    result: dict[str, Any] = _join_repeats(each, names, read_groups(run)) if each else {"n": 0}
    result.update(
        protocol=protocol.title_of(splits),
        leaks=protocol.leaks,
        complete=len(done) == len(splits),
        context=facts.get("context", recipe.text.context),
        folds=[{key: fold.facts.get(key) for key in _Fold.model_fields} for fold in done.values()],
    )
    if len(done) > 1 and any(fold.facts["test"] > 1 for fold in done.values()):  # one row is right or wrong
        result["over_folds"] = summarize_folds([fold.facts["metrics"] for fold in done.values()])
    if write:
        write_json(run / METRICS, result)
        if done and not single:
            rows = [row for part in each for fold in part for row in fold.rows]
            write_predictions(run / PREDICTIONS, rows, names)
    return result


def _join_repeats(
    repeats: Sequence[Sequence[_Scored]], names: Sequence[str], groups: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Scores of the joined folds; over repeats the mean of each score, and the sum of the confusion matrices.

    Intervals are those of one repeat's rows (their ends averaged): repeating the folds adds no utterances.
    """
    truth = [[label for fold in part for label in fold.truth] for part in repeats]
    predicted = [[label for fold in part for label in fold.predicted] for part in repeats]
    told = [np.concatenate([fold.probabilities for fold in part]) for part in repeats]
    grouped = [groups_of([row[0] for fold in part for row in fold.rows], groups) for part in repeats]
    each = [
        compute_metrics(t, p, names, probabilities=q, groups=g)
        for t, p, q, g in zip(truth, predicted, told, grouped, strict=True)
    ]
    if len(each) == 1:
        return each[0]
    pooled = compute_metrics(
        list(chain(*truth)), list(chain(*predicted)), names, probabilities=np.concatenate(told), resamples=0
    )
    pooled.update({name: float(np.mean([one[name] for one in each])) for name in SUMMARY})
    pooled["n"] = max(one["n"] for one in each)
    pooled["repeats"] = len(each)
    pooled["intervals"] = _mean_ends([one["intervals"] for one in each])
    hits = round(pooled["accuracy"] * pooled["n"])
    wilson = list(wilson_interval(hits, pooled["n"]))
    pooled["intervals"]["accuracy_wilson"] = wilson
    whole = [one["intervals_by"] for one in each if one["n"] == pooled["n"]]  # others have folds still to run
    pooled["intervals_by"] = {}
    for name in whole[0]:
        pooled["intervals_by"][name] = found = _mean_ends([one[name] for one in whole])
        if "accuracy" in found:
            found["accuracy"] = [min(found["accuracy"][0], wilson[0]), max(found["accuracy"][1], wilson[1])]
    return pooled


def _mean_ends(intervals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of both ends of each interval that all have; counts, which are the same in all, as they are."""
    return {
        name: value if isinstance(value, int) else np.mean([one[name] for one in intervals], axis=0).tolist()
        for name, value in intervals[0].items()
        if all(name in one for one in intervals)
    }


def _read_fold(folder: Path, ids: Sequence[str], labels: int, content: str | None) -> _Scored:
    facts = _read_json(folder / FOLD, _Fold)
    again = f"delete {folder} to run that fold again"
    try:
        with (folder / PREDICTIONS).open(newline="", encoding="utf-8") as stream:
            _, *rows = [row for row in csv.reader(stream) if len(row) > 2]
        probabilities = np.array([row[3:] for row in rows], dtype=np.float64).reshape(len(rows), labels)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{folder / PREDICTIONS} cannot be read ({error}): {again}.") from None
    if not (np.abs(probabilities.sum(1) - 1) < 1e-3).all() or (probabilities < 0).any():
        raise UserError(f"{folder / PREDICTIONS} is damaged, it holds no probabilities: {again}.")
    if facts.get("content", content) != content:
        raise UserError(f"{folder} was run on other data than the run that it lies in: {again}.")
    if [row[0] for row in rows] != list(ids):
        raise UserError(f"{folder} holds other rows than {SPLITS} gives it: {again}.")
    return _Scored(facts, rows, probabilities)


def _read_json(path: Path, shape: type[BaseModel]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete its folder to run that part again.") from None
    validated(shape, value, f"{path} is damaged (delete its folder to run that part again)")
    return dict(value)
