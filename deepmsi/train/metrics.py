"""Scores of a set of predictions, their uncertainty, and the comparison of two runs.

The point values are scikit-learn's. Intervals describe the sampling of test utterances, or of the speakers and
dialogues that these are of, and not the variation between training runs: that is what the standard deviation over
folds and seeds is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepmsi.errors import UserError
from deepmsi.train.calibration import measure_calibration
from deepmsi.train.intervals import SUMMARY, grouped_intervals, point_scores, resampled_scores, wilson_interval
from deepmsi.train.record import groups_of, read_groups, read_predictions

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)


class ClassScores(_Shape):
    """One class of `per_class`."""

    precision: float
    recall: float
    f1: float
    legacy_f1: float
    support: int
    mean_probability: float | None = None


class Bin(_Shape):
    """One bin of `reliability`."""

    n: int
    confidence: float
    accuracy: float


class Spread(_Shape):
    """One score of `summarize_folds`."""

    mean: float
    std: float
    n: int


class Grouped(_Shape):
    """One grouping of `intervals_by`: scores are there where there are two groups or more and each row is of one."""

    groups: int
    unnamed: int = 0
    accuracy: Interval | None = None
    uar: Interval | None = None
    weighted_f1: Interval | None = None
    macro_f1: Interval | None = None


class Scores(_Shape):
    """The shape of `metrics.json` and of a fold's metrics, by which a damaged file is told from a whole one."""

    n: int
    accuracy: float
    uar: float
    weighted_f1: float
    macro_f1: float
    labels: list[str] = []
    confusion_matrix: list[list[int]] = []
    per_class: dict[str, ClassScores] = {}
    intervals: dict[str, Interval] = {}
    intervals_by: dict[str, Grouped] = {}
    over_folds: dict[str, Spread] = {}
    context: int = 0
    modalities: list[str] = []
    split: str | None = None
    rows_seen_in_training: int = 0
    repeats: int | None = None
    log_loss: float | None = None
    brier: float | None = None
    ece: float | None = None
    reliability: list[Bin] = []

    @model_validator(mode="after")
    def _square(self) -> Scores:
        if {len(self.confusion_matrix), *map(len, self.confusion_matrix)} != {len(self.labels)}:
            raise ValueError(f"confusion_matrix does not go with {len(self.labels)} labels")
        return self


def compute_metrics(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    labels: Sequence[str],
    *,
    probabilities: NDArray[np.float64] | None = None,
    groups: Mapping[str, Iterable[str]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score predictions as `metrics.json` holds them.

    UAR is the mean recall over the classes that occur in `y_true`; macro F1 is the mean over the classes that
    occur in `y_true` or `y_pred`, as scikit-learn has it.

    Args:
        y_true: [n] class ids or names.
        y_pred: [n] class ids or names.
        labels: K names; an id is a position in this list.
        probabilities: [n, K], where they are to be scored, too.
        groups: the group of each row, such as `{"speaker": [...]}`, "" where it has none.
        resamples: bootstrap resamples of the intervals; 0 leaves the bootstrap out.
        seed: of the bootstrap.

    Returns:
        `n`, `accuracy`, `uar`, `weighted_f1`, `macro_f1`, `per_class` (precision, recall, f1, support, the paper's
        `legacy_f1`, of probabilities their mean), `confusion_matrix` [K, K] (rows: truth), `labels`,
        `never_predicted`, and `intervals` (95%): Wilson's for the accuracy, percentile bootstrap for each score that
        varies, of rows that are drawn one by one; of groups also `intervals_by`, what `grouped_intervals` finds; of
        probabilities what `measure_calibration` finds.

    Raises:
        UserError: no rows, lengths that differ, or a class that is not in `labels`.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels = list(labels)
    true, pred = _as_ids(y_true, labels), _as_ids(y_pred, labels)
    if len(true) != len(pred):
        raise UserError(f"{len(true)} true labels do not go with {len(pred)} predictions.")
    if not len(true):
        raise UserError("There are no labelled rows to score: give rows that have a label.")
    classes = np.arange(len(labels))
    matrix = confusion_matrix(true, pred, labels=classes)
    precision, recall, f1, support = precision_recall_fscore_support(true, pred, labels=classes, zero_division=0.0)
    intervals: dict[str, list[float]] = {"accuracy_wilson": list(wilson_interval(int(np.trace(matrix)), len(true)))}
    if resamples:
        (sampled,) = resampled_scores(true, [pred], len(labels), resamples, seed)
        for name in SUMMARY:
            low, high = np.quantile(sampled[name], (0.025, 0.975))
            if low < high:  # rows that are all right, or all of one class, do not tell how far a score may be off
                intervals[name] = [float(low), float(high)]
    by: dict[str, Any] = {}
    if groups is not None:
        over_rows = intervals | {"accuracy": intervals["accuracy_wilson"]}
        by = {"intervals_by": grouped_intervals(true, [pred], len(labels), groups, over_rows)}
    told = [None] * len(labels) if probabilities is None else probabilities.mean(0).tolist()
    return {
        "n": len(true),
        **point_scores(true, pred, len(labels)),
        "per_class": {
            label: {
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "support": int(support[k]),
                "legacy_f1": legacy_f1(float(recall[k])),
                **({} if told[k] is None else {"mean_probability": told[k]}),
            }
            for k, label in enumerate(labels)
        },
        "confusion_matrix": matrix.tolist(),
        "labels": labels,
        "never_predicted": [label for k, label in enumerate(labels) if not matrix[:, k].any()],
        "intervals": intervals,
        **by,
        **({} if probabilities is None else measure_calibration(true, probabilities)),
    }


def legacy_f1(recall: float) -> float:
    """F1 over a class's own samples only, 2r/(1+r): precision is 1 there. The paper's per-class "F1"."""
    return 2 * recall / (1 + recall)


def summarize_folds(folds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) of each score over folds or seeds.

    Args:
        folds: dictionaries of `compute_metrics`, one per fold or seed.
    """
    table = {name: np.array([fold[name] for fold in folds], dtype=np.float64) for name in SUMMARY}
    return {
        name: {
            "mean": float(values.mean()),
            "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            "n": len(values),
        }
        for name, values in table.items()
    }


def compare_predictions(
    a: Path, b: Path, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, float | int | dict[str, Any]]:
    """Compare two runs on the rows that both predicted, in pairs.

    Args:
        a, b: `predictions.csv` files, or folders that hold one.
        resamples: paired bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        `n`, the exact two-sided McNemar p-value of the accuracies (`mcnemar_p`, with `only_a` and `only_b`
        the rows that only one of them has right), for each score `a`, `b`, `difference` (b - a) and its 95%
        `interval`, and, where a groups.csv lies beside either file, as `intervals_by` those over speakers and
        dialogues.

    Raises:
        UserError: a file is missing or no predictions file, nothing is in common, or the true labels differ.
    """
    from scipy.stats import binomtest

    left, right = read_predictions(a), read_predictions(b)
    common = [key for key in left if key in right]
    if not common:
        raise UserError(f"{a} and {b} have no row in common: compare runs that predicted the same rows.")
    differing = [key for key in common if left[key][0] != right[key][0]]
    if differing:
        raise UserError(
            f"{a} and {b} disagree on the true label of {differing[0]!r} ({left[differing[0]][0]} and "
            f"{right[differing[0]][0]}): they were scored against different labels."
        )
    names = sorted({name for key in common for name in (*left[key], right[key][1])})
    true = _as_ids([left[key][0] for key in common], names)
    pred_a = _as_ids([left[key][1] for key in common], names)
    pred_b = _as_ids([right[key][1] for key in common], names)
    groups = groups_of(common, read_groups(a), read_groups(b))
    only_a = int(((pred_a == true) & (pred_b != true)).sum())
    only_b = int(((pred_b == true) & (pred_a != true)).sum())
    score_a, score_b = (point_scores(true, p, len(names)) for p in (pred_a, pred_b))
    sampled_a, sampled_b = resampled_scores(true, [pred_a, pred_b], len(names), resamples, seed)
    result: dict[str, Any] = {
        "n": len(common),
        "only_a": only_a,
        "only_b": only_b,
        "mcnemar_p": float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    }
    over_rows = {name: np.quantile(sampled_b[name] - sampled_a[name], (0.025, 0.975)).tolist() for name in SUMMARY}
    for name in SUMMARY:
        result[name] = {
            "a": score_a[name],
            "b": score_b[name],
            "difference": score_b[name] - score_a[name],
            "interval": over_rows[name],
        }
    result["intervals_by"] = grouped_intervals(true, [pred_a, pred_b], len(names), groups, over_rows)
    return result


def _as_ids(values: ArrayLike, labels: Sequence[str]) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.dtype.kind in "iu":
        bad = array[(array < 0) | (array >= len(labels))]
        if bad.size:
            raise UserError(f"Class {int(bad.flat[0])} is outside the {len(labels)} labels.")
        return array.astype(np.int64)
    position = {label: k for k, label in enumerate(labels)}
    try:
        return np.array([position[str(value)] for value in array.tolist()], dtype=np.int64)
    except KeyError as error:
        raise UserError(f"Label {error} is not among the labels {', '.join(labels)}.") from None
