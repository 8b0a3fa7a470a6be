"""The classification loss with the options for imbalanced classes that the model's own cross-entropy lacks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepmsi.errors import UserError
from deepmsi.train.processes import process_rank


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    focal_gamma: float = 0.0,
    log_prior: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy, focal and logit-adjusted: `Σ_i (1 - p_i)^γ ce_i / Σ_i w_{y_i}`.

    With `q = softmax(logits + log_prior)`, `p_i = q_{y_i}` and `ce_i` the cross-entropy of q, weighted and smoothed
    as torch's. With several processes the sums run over the joined batch, times the number of processes, so that the
    mean of the gradients is that of one process.

    Args:
        logits: [U, K].
        labels: [U] int64.
        weights: [K] class weights; None means 1.
        focal_gamma: γ ≥ 0.
        log_prior: [K], τ·log of the classes' shares in the training part, added to the logits.
        label_smoothing: share of the target that is spread over all classes.

    Returns:
        A scalar, float32 or wider.

    Equivalent to: `torch.nn.functional.cross_entropy(logits + log_prior, labels, weights,
    label_smoothing=label_smoothing)` where γ = 0.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if log_prior is not None:
        logits = logits + log_prior
    weights = None if weights is None else weights.to(logits)
    losses = cross_entropy(logits, labels, weights, reduction="none", label_smoothing=label_smoothing)
    if focal_gamma:
        log_p = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
        # The floor keeps the power's derivative finite at p = 1, where the loss is 0 anyway.
        losses = (-torch.expm1(log_p)).clamp_min(1e-12) ** focal_gamma * losses
    total = (torch.ones_like(losses) if weights is None else weights[labels]).sum().detach()
    _, world = process_rank()
    if world > 1:
        total = total.clone()
        dist.all_reduce(total)
        total = total / world
    return losses.sum() / total


def class_weights(counts: list[int], labels: list[str]) -> list[float]:
    """Weights n / (K · n_k), as scikit-learn's "balanced": every class weighs the same in sum.

    Raises:
        UserError: a class has no row in the training part.
    """
    for label, count in zip(labels, counts, strict=True):
        if not count:
            raise UserError(f"The class {label!r} has no row in the training part, so it cannot be weighted.")
    return [sum(counts) / (len(counts) * count) for count in counts]


def log_prior(counts: list[int], tau: float) -> list[float]:
    """τ · log of each class's share, counted with half a row more so that an empty class stays finite."""
    shares = torch.tensor(counts, dtype=torch.float64) + 0.5
    return (tau * (shares / shares.sum()).log()).tolist()
