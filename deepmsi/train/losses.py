"""What the classes' counts in the training part make of the classification loss: class weights, a prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepmsi.errors import UserError


def class_weights(counts: Sequence[int], labels: Sequence[str]) -> list[float]:
    """Weights n / (K · n_k), as scikit-learn's "balanced": every class weighs the same in sum.

    Raises:
        UserError: a class has no row in the training part.
    """
    _check_rows(counts, labels, "it cannot be weighted.")
    return [sum(counts) / (len(counts) * count) for count in counts]


def log_prior(
    counts: Sequence[float], labels: Sequence[str], tau: float, weights: Sequence[float] | None = None
) -> list[float]:
    """τ · log of each class's share in the loss, to whose count half a row is added.

    Args:
        counts: rows of each class in the training part; of a sampler that draws the classes alike, all the same.
        labels: their names.
        tau: τ.
        weights: what a row of each class counts in the loss; None: all the same.

    Raises:
        UserError: a class has no row in the training part, so that its share is 0.
    """
    advice = "leave it out of labels, or set train.logit_adjustment=0."
    _check_rows(counts, labels, f"the logits cannot be adjusted to its share: {advice}")
    shares = torch.tensor(counts, dtype=torch.float64)
    if weights is not None:
        weighted = shares * torch.tensor(weights, dtype=torch.float64)
        shares = weighted * (shares.sum() / weighted.sum())
    shares += 0.5
    return (tau * (shares / shares.sum()).log()).tolist()


def _check_rows(counts: Sequence[float], labels: Sequence[str], so: str) -> None:
    for label, count in zip(labels, counts, strict=True):
        if not count:
            raise UserError(f"The class {label!r} has no row in the training part, so {so}")
