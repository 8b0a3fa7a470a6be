"""The watched scores by epoch: how they are made and read back, and which epoch is the best."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepmsi.train.calibration import fit_temperature, log_loss
from deepmsi.train.inference import softmax
from deepmsi.train.intervals import SUMMARY
from deepmsi.train.metrics import compute_metrics
from deepmsi.train.record import HISTORY

LOSSES = ("loss", "calibrated_loss")
"""Watched scores of which less is better."""

Point = dict[str, float]
"""`epoch`, and what `watched_scores` finds."""


def watched_scores(logits: np.ndarray, labels: list[int]) -> dict[str, float]:
    """Scores of logits [n, K] against class ids.

    Those of `SUMMARY`; `loss`, the mean negative log-likelihood; and `calibrated_loss`, what is left of it where the
    logits are divided by `temperature`, which is fitted to the same rows.
    """
    names, classes = [str(k) for k in range(logits.shape[1])], np.asarray(labels)
    metrics = compute_metrics(labels, logits.argmax(1), names, resamples=0)
    if not np.isfinite(logits).all():
        return {"loss": math.nan, **{name: metrics[name] for name in SUMMARY}}
    temperature = fit_temperature(logits, classes)
    return {
        "loss": log_loss(classes, softmax(logits)),
        "calibrated_loss": log_loss(classes, softmax(logits / temperature)),
        "temperature": temperature,
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
    sign = -1 if metric in LOSSES else 1
    return max(curve, key=lambda point: (sign * point[metric], -point["loss"]))


def best_epoch(curves: Sequence[Sequence[Point]], sizes: Sequence[int], metric: str) -> int:
    """The epoch that is best on average over inner parts, weighted by their rows; a tie goes to the lower loss.

    Args:
        curves: of each part, a point per epoch.
        sizes: rows of each part.
        metric: the name of a watched score.
    """
    weights = np.asarray(sizes, dtype=np.float64)
    epochs = min(len(curve) for curve in curves)

    def mean(name: str) -> NDArray[np.float64]:
        return np.average([[point[name] for point in curve[:epochs]] for curve in curves], axis=0, weights=weights)

    loss = mean("loss")
    score = -mean(metric) if metric in LOSSES else mean(metric)
    order = np.lexsort((loss, -np.round(score, 9)))
    return int(curves[0][int(order[0])]["epoch"])


def temperature_at(curves: Sequence[Sequence[Point]], sizes: Sequence[int], epoch: int) -> float | None:
    """The temperature of an epoch: over inner parts the geometric mean, weighted by their rows.

    None where a curve does not tell it, as those of an older deepmsi do not.
    """
    found = [next((point.get("temperature") for point in curve if point["epoch"] == epoch), None) for curve in curves]
    known = [temperature for temperature in found if temperature is not None]
    return float(np.exp(np.average(np.log(known), weights=sizes))) if len(known) == len(found) else None
