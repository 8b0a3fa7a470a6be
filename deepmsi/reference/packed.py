"""Rows of packed frames in plain PyTorch: which of them count."""

import torch
from torch import Tensor


def within(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    """Return which rows of x [R, C] come before the last offset [R, 1] bool."""
    return (torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1]).unsqueeze(1)


def counted(cu_seqlens: Tensor | None, x: Tensor) -> Tensor:
    """Return x with zeros in the rows that do not count: whatever they hold must not reach a weight's gradient."""
    return x if cu_seqlens is None else torch.where(within(cu_seqlens, x), x, x.new_zeros(()))
