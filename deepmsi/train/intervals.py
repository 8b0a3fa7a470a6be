"""The four scores of sets of rows, and 95% intervals: over rows, and over speakers or dialogues.

Rows of one speaker or dialogue are right and wrong together, so that intervals over rows are too narrow where the
question is how a model does on other speakers. With few groups a bootstrap of groups is too narrow as well: over
groups the interval is the point with Student's t for the standard error of the jackknife that leaves out one group at
a time (MacKinnon, Nielsen and Webb, 2023, "Fast and reliable jackknife and bootstrap methods for cluster-robust
inference"), with the degrees of freedom of the effective number of groups, `(Σn)² / Σn²`, where their sizes n differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

SUMMARY = ("accuracy", "uar", "weighted_f1", "macro_f1")
_Z95 = 1.959963984540054


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion."""
    if n <= 0:
        return (0.0, 1.0)
    p, z2 = successes / n, _Z95 * _Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def resampled_scores(
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
    sets = np.broadcast_to(np.arange(resamples)[:, None], drawn.shape)
    return [_scores(*_tallies(sets, ids[0], pred, drawn, resamples, k)) for pred in ids[1:]]


def point_scores(true: NDArray[np.int64], pred: NDArray[np.int64], k: int) -> dict[str, float]:
    """The four scores of rows [n]."""
    one = np.zeros_like(true)
    return {name: float(value[0]) for name, value in _scores(*_tallies(one, true, pred, one + 1, 1, k)).items()}


def grouped_intervals(
    true: NDArray[np.int64],
    predicted: Sequence[NDArray[np.int64]],
    k: int,
    groups: Mapping[str, Iterable[str]],
    over_rows: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, dict[str, int | list[float]]]:
    """Intervals of the four scores over groups of rows.

    Args:
        true: [n] class ids.
        predicted: one array [n] for intervals of its scores, two for those of the differences, second less first.
        k: how many classes there are.
        groups: by what rows are grouped, such as "speaker": the group of each row, "" where it has none.
        over_rows: the interval of each score over rows. Groups that are alike by chance, as two are often, make none
            narrower: it reaches as far as this one at least.

    Returns:
        For each grouping `groups`, how many there are, `unnamed`, the rows that are of none, and, where there are two
        groups or more and each row is of one, the interval of each score that varies. Groupings of which no row is
        told anything, or in which each row is a group, are left out.
    """
    from scipy.stats import t as student

    over_rows = over_rows or {}
    found: dict[str, dict[str, int | list[float]]] = {}
    for grouping, of_rows in groups.items():
        names = list(of_rows)
        if not any(names):
            continue
        named, ids = np.unique(np.array(names, dtype=object), return_inverse=True)
        unnamed = names.count("")
        count = len(named) - (unnamed > 0)
        if count == len(names):
            continue
        found[grouping] = {"groups": count, "unnamed": unnamed}
        if count == 1 or unnamed:
            continue
        parts = [_tallies(ids, true, pred, np.ones_like(true), count, k) for pred in predicted]
        whole = [_scores(*(tally.sum(0, keepdims=True) for tally in part)) for part in parts]
        without = [_scores(*(tally.sum(0, keepdims=True) - tally for tally in part)) for part in parts]
        sizes = np.bincount(ids)
        quantile = float(student.ppf(0.975, len(names) ** 2 / np.square(sizes).sum() - 1))
        for name in SUMMARY:
            point, left, least = whole[-1][name][0], without[-1][name], 0.0
            if len(parts) == 2:
                point, left, least = point - whole[0][name][0], left - without[0][name], -1.0
            error = math.sqrt((count - 1) / count * float(np.square(left - point).sum()))
            reaches = [over_rows[name]] if name in over_rows else []
            if error:
                half = quantile * error
                reaches.append([max(least, float(point - half)), min(1.0, float(point + half))])
            if reaches:
                found[grouping][name] = [min(low for low, _ in reaches), max(high for _, high in reaches)]
    return found


_Tallies = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _tallies(
    sets: NDArray[np.int64],
    true: NDArray[np.int64],
    pred: NDArray[np.int64],
    counts: NDArray[np.int64],
    b: int,
    k: int,
) -> _Tallies:
    """Of each of b sets and each class how many rows are right, are there, and are predicted: [b, k] each.

    The arrays are of one shape: of each kind of row its set, truth, prediction, and how many there are.
    """

    def tally(ids: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
        tallied = np.bincount((sets * k + ids).ravel(), counts.ravel(), b * k)
        return tallied.reshape(b, k).astype(np.float64)

    return tally(true, counts * (true == pred)), tally(true, counts), tally(pred, counts)


def _scores(
    hits: NDArray[np.float64], support: NDArray[np.float64], predicted: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """The four scores [b] of tallies [b, k]."""
    total = support.sum(1)
    recall = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
    f1 = np.divide(2 * hits, support + predicted, out=np.zeros_like(hits), where=support + predicted > 0)
    return {
        "accuracy": hits.sum(1) / total,
        "uar": recall.sum(1) / (support > 0).sum(1),
        "weighted_f1": (f1 * support).sum(1) / total,
        "macro_f1": f1.sum(1) / (support + predicted > 0).sum(1),
    }
