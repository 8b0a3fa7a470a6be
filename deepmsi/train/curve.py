"""The watched scores by epoch: how they are made and read back, and which epoch is the best."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepmsi.train.inference import softmax
from deepmsi.train.metrics import SUMMARY, compute_metrics
from deepmsi.train.record import HISTORY

Point = dict[str, float]
"""`epoch`, `loss`, and the scores of `SUMMARY`."""


def watched_scores(logits: np.ndarray, labels: list[int]) -> dict[str, float]:
    """Scores of logits [n, K] against class ids: those of `SUMMARY`, and `loss`, the mean negative log-likelihood."""
    probabilities = softmax(logits)
    names = [str(k) for k in range(logits.shape[1])]
    metrics = compute_metrics(labels, logits.argmax(1), names, resamples=0)
    likelihood = probabilities[np.arange(len(labels)), labels]
    return {
        "loss": float(-np.log(np.maximum(likelihood, 1e-12)).mean()) if np.isfinite(logits).all() else math.nan,
        **{name: metrics[name] for name in SUMMARY},
    }


def curve_of(log_history: list[Point]) -> list[Point]:
    """The watched scores by epoch."""
    return [
        {"epoch": round(entry["epoch"]), **{k.removeprefix("eval_"): v for k, v in entry.items() if "eval_" in k}}
        for entry in log_history
        if "eval_loss" in entry
    ]


def read_curve(folder: Path) -> list[Point]:
    """The watched scores by epoch of a finished fit, from its history."""
    events = [json.loads(line) for line in (folder / HISTORY).read_text(encoding="utf-8").splitlines()]
    return [
        {key: value for key, value in event.items() if key not in ("step", "split")} | {"epoch": round(event["epoch"])}
        for event in events
        if event["split"] == "dev"
    ]


def best_point(curve: list[Point], metric: str) -> Point:
    """The first of the best points; a tie goes to the lower loss."""
    return max(curve, key=lambda point: (-point["loss"] if metric == "loss" else point[metric], -point["loss"]))


def best_epoch(curves: Sequence[Sequence[Point]], sizes: Sequence[int], metric: str) -> int:
    """The epoch that is best on average over inner parts, weighted by their rows; a tie goes to the lower loss.

    Args:
        curves: of each part, a point per epoch.
        sizes: rows of each part.
        metric: `loss` or the name of a score.
    """
    weights = np.asarray(sizes, dtype=np.float64)
    epochs = min(len(curve) for curve in curves)

    def mean(name: str) -> NDArray[np.float64]:
        return np.average([[point[name] for point in curve[:epochs]] for curve in curves], axis=0, weights=weights)

    loss = mean("loss")
    score = -loss if metric == "loss" else mean(metric)
    order = np.lexsort((loss, -np.round(score, 9)))
    return int(curves[0][int(order[0])]["epoch"])
