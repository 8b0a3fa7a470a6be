"""The classification loss: cross-entropy, by class weights, focal, adjusted to the classes' shares, smoothed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

UNKNOWN = -100
"""The label of an utterance that no loss counts: torch's `ignore_index`."""


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    focal_gamma: float = 0.0,
    log_prior: Tensor | None = None,
    label_smoothing: float = 0.0,
    joined: bool = False,
) -> Tensor:
    """Cross-entropy, weighted, focal and logit-adjusted: `Σ_i w_{y_i} (1 - p_i)^γ ce_i / Σ_i w_{y_i}`.

    With `q = softmax(logits + log_prior)` and `p_i = q_{y_i}`, `ce_i = -(1 - ε) log p_i - ε Σ_k s_k log q_k`. What
    smoothing spreads, s, it spreads evenly, or over classes that were adjusted by their shares: `softmax(log_prior)`.
    Spread evenly over adjusted or over weighted classes, as torch does the latter, it would draw every row to the rare
    ones.

    Args:
        logits: [U, K].
        labels: [U] int64; -100 for an utterance that does not count.
        weights: [K] class weights; None means 1.
        focal_gamma: γ ≥ 0.
        log_prior: [K], τ·log of the classes' shares in the training part, added to the logits.
        label_smoothing: ε, the share of the target that is spread over all classes.
        joined: whether the sums run over the joined batch of all processes, times the number of processes, so that the
            mean of the gradients is that of one process.

    Returns:
        A scalar, float32 or wider.

    Equivalent to: `torch.nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)` where there are
    no weights, γ = 0 and nothing is adjusted.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    smoothing = label_smoothing
    if log_prior is not None:
        logits, smoothing = logits + log_prior, 0.0
    losses = cross_entropy(logits, labels, reduction="none", ignore_index=UNKNOWN, label_smoothing=smoothing)
    if log_prior is not None and label_smoothing:
        spread = -(logits.log_softmax(1) * log_prior.to(logits).softmax(0)).sum(1)
        losses = (1 - label_smoothing) * losses + label_smoothing * spread
    known = labels != UNKNOWN
    if focal_gamma:
        log_p = logits.log_softmax(1).gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
        # The floor keeps the power's derivative finite at p = 1, where the loss is 0 anyway.
        losses = (-torch.expm1(log_p)).clamp_min(1e-12) ** focal_gamma * losses
    share = known.to(logits.dtype) if weights is None else weights.to(logits)[labels.clamp_min(0)] * known
    total, world = share.sum(), 1
    if joined and dist.is_available() and dist.is_initialized():
        # Data parallelism takes the mean over the processes: the joined batch wants their sum.
        world = dist.get_world_size()
        dist.all_reduce(total)
    # A batch in which no label is known has a loss of 0.
    return (losses * share).sum() * world / total.clamp_min(torch.finfo(total.dtype).tiny)
