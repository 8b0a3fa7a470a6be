"""What a model's probabilities are worth: how far they are off, and the temperature that mends most of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI

BINS = 10
_SMALLEST = 5e-7
"""Half of the last digit that `predictions.csv` has: what is told as 0 has a finite logarithm."""


def log_loss(classes: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Mean of -log p of the true classes [n], by probabilities [n, K]."""
    told = probabilities[np.arange(len(classes)), classes]
    return float(-np.log(np.maximum(told, _SMALLEST)).mean())


def fit_temperature(logits: NDArray[np.float32], classes: NDArray[np.int64]) -> float:
    """Temperature T by which logits [n, K] are to be divided so that they tell the classes [n] best (Guo et al. 2017).

    It makes `Σ -log softmax(z / T)[y] + (log T)² / 2` least: few rows move it little from 1, and rows that are all
    right do not send it to 0.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def cost(log_t: float) -> float:
        # Of no least probability: rows that are told as ruled out are to move the temperature, too.
        told = log_softmax(logits.astype(np.float64) / np.exp(log_t), axis=1)
        return float(-told[np.arange(len(classes)), classes].sum() + log_t**2 / 2)

    return float(np.exp(minimize_scalar(cost, bounds=(-6, 6), method="bounded").x))


def apply_temperature(model: DeepMSI, temperature: float) -> None:
    """Divide a model's logits by a temperature, in the weights of its last layer: whatever runs it reads them."""
    with torch.no_grad():
        for parameter in model.classifier.output.parameters():
            parameter.div_(temperature)


def measure_calibration(classes: NDArray[np.int64], probabilities: NDArray[np.float64]) -> dict[str, Any]:
    """How far probabilities are off.

    Args:
        classes: [n] class ids.
        probabilities: [n, K].

    Returns:
        `log_loss`; `brier`, the mean over rows of the squared distance between probabilities and truth, 0 to 2;
        `ece`, the expected calibration error: over ten even bins of confidence, the probability of the predicted
        class, the mean distance between confidence and accuracy, weighted by rows; and `reliability`, the bins that
        hold rows: `n`, mean `confidence`, `accuracy`. Of few rows `ece` is too large even where nothing is off.
    """
    truth = np.eye(probabilities.shape[1])[classes]
    confidence, right = probabilities.max(1), probabilities.argmax(1) == classes
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    held = [bins == b for b in np.unique(bins)]
    reliability = [
        {"n": int(own.sum()), "confidence": float(confidence[own].mean()), "accuracy": float(right[own].mean())}
        for own in held
    ]
    return {
        "log_loss": log_loss(classes, probabilities),
        "brier": float(np.square(probabilities - truth).sum(1).mean()),
        "ece": sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in reliability) / len(classes),
        "reliability": reliability,
    }
