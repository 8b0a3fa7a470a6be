"""Scores of a set of predictions, their uncertainty, and the comparison of two runs.

The point values are scikit-learn's. Intervals resample the confusion matrix of the same predictions, so they
describe the sampling of test utterances and not the variation between training runs: that is what the
standard deviation over folds and seeds is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepmsi.errors import UserError
from deepmsi.train.calibration import measure_calibration
from deepmsi.train.record import read_predictions

SUMMARY = ("accuracy", "uar", "weighted_f1", "macro_f1")
_Z95 = 1.959963984540054


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)


class ClassScores(_Shape):
    """One class of `per_class`."""

    precision: float
    recall: float
    f1: float
    legacy_f1: float
    support: int


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
    intervals: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = {}
    over_folds: dict[str, Spread] = {}
    context: int = 0
    modalities: list[str] = []
    split: str | None = None
    rows_seen_in_training: int = 0
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
        resamples: bootstrap resamples of the intervals; 0 leaves the bootstrap out.
        seed: of the bootstrap.

    Returns:
        `n`, `accuracy`, `uar`, `weighted_f1`, `macro_f1`, `per_class` (precision, recall, f1, support and the
        paper's `legacy_f1`), `confusion_matrix` [K, K] (rows: truth), `labels`, `never_predicted`, and
        `intervals` (95%): Wilson's for the accuracy, percentile bootstrap for each score;
        of probabilities also what `measure_calibration` finds.

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
    scores = _scores(true[None], pred[None], np.ones((1, len(true)), np.int64), len(labels))
    intervals: dict[str, list[float]] = {"accuracy_wilson": list(wilson_interval(int(np.trace(matrix)), len(true)))}
    if resamples:
        (sampled,) = _resampled(true, [pred], len(labels), resamples, seed)
        for name in SUMMARY:
            low, high = np.quantile(sampled[name], (0.025, 0.975))
            intervals[name] = [float(low), float(high)]
    return {
        "n": len(true),
        **{name: float(scores[name][0]) for name in SUMMARY},
        "per_class": {
            label: {
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "support": int(support[k]),
                "legacy_f1": legacy_f1(float(recall[k])),
            }
            for k, label in enumerate(labels)
        },
        "confusion_matrix": matrix.tolist(),
        "labels": labels,
        "never_predicted": [label for k, label in enumerate(labels) if not matrix[:, k].any()],
        "intervals": intervals,
        **({} if probabilities is None else measure_calibration(true, probabilities)),
    }


def legacy_f1(recall: float) -> float:
    """F1 over a class's own samples only, 2r/(1+r): precision is 1 there. The paper's per-class "F1"."""
    return 2 * recall / (1 + recall)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion."""
    if n <= 0:
        return (0.0, 1.0)
    p, z2 = successes / n, _Z95 * _Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


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
        the rows that only one of them has right), and for each score `a`, `b`, `difference` (b - a) and its
        95% interval.

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
    only_a = int(((pred_a == true) & (pred_b != true)).sum())
    only_b = int(((pred_b == true) & (pred_a != true)).sum())
    once = np.ones((1, len(true)), np.int64)
    score_a, score_b = (_scores(true[None], p[None], once, len(names)) for p in (pred_a, pred_b))
    sampled_a, sampled_b = _resampled(true, [pred_a, pred_b], len(names), resamples, seed)
    result: dict[str, Any] = {
        "n": len(common),
        "only_a": only_a,
        "only_b": only_b,
        "mcnemar_p": float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    }
    for name in SUMMARY:
        low, high = np.quantile(sampled_b[name] - sampled_a[name], (0.025, 0.975))
        result[name] = {
            "a": float(score_a[name][0]),
            "b": float(score_b[name][0]),
            "difference": float(score_b[name][0] - score_a[name][0]),
            "interval": [float(low), float(high)],
        }
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


def _resampled(
    true: NDArray[np.int64], predicted: Sequence[NDArray[np.int64]], k: int, resamples: int, seed: int
) -> list[dict[str, NDArray[np.float64]]]:
    """The four scores of each of so many resamples of the rows [n], the same ones for every array of predictions."""
    # Equal rows are drawn together, by a multinomial. The last of all cells takes what is left of a draw: it is there
    # without rows, too, so that it does not hang on the predictions which numbers are drawn.
    shape = (k,) * (1 + len(predicted))
    rows = np.ravel_multi_index((true, *predicted), shape)
    cells, counts = np.unique(np.append(rows, math.prod(shape) - 1), return_counts=True)
    counts[-1] -= 1
    drawn = np.random.default_rng(seed).multinomial(len(rows), counts / len(rows), size=resamples)
    ids = [np.broadcast_to(ids, drawn.shape) for ids in np.unravel_index(cells, shape)]
    return [_scores(ids[0], pred, drawn, k) for pred in ids[1:]]


def _scores(
    true: NDArray[np.int64], pred: NDArray[np.int64], counts: NDArray[np.int64], k: int
) -> dict[str, NDArray[np.float64]]:
    """The four scores of each of b sets of rows: true, pred and how many rows there are of that kind, [b, n]."""
    sets = np.arange(len(true))[:, None] * k

    def tally(ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
        tallied = np.bincount((sets + ids).ravel(), counts.ravel(), len(true) * k)
        return tallied.reshape(len(true), k).astype(np.float64)

    hits, support, predicted = tally(true, counts * (true == pred)), tally(true, counts), tally(pred, counts)
    total = support.sum(1)
    recall = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
    f1 = np.divide(2 * hits, support + predicted, out=np.zeros_like(hits), where=support + predicted > 0)
    return {
        "accuracy": hits.sum(1) / total,
        "uar": recall.sum(1) / (support > 0).sum(1),
        "weighted_f1": (f1 * support).sum(1) / total,
        "macro_f1": f1.sum(1) / (support + predicted > 0).sum(1),
    }
