"""The residual MLP of a post-norm block in plain PyTorch."""

import torch
from torch import Tensor


def within(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    """Return which rows of x [R, C] come before the last offset [R, 1] bool."""
    return (torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1]).unsqueeze(1)


def residual_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_scale: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
) -> Tensor:
    """Return x + row_scale · LN(W2 gelu(W1 x + b1) + b2) for rows x [R, C]; those past the last offset stay x."""
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, fc1_weight, fc1_bias))
    branch = torch.nn.functional.linear(hidden, fc2_weight, fc2_bias)
    branch = torch.nn.functional.layer_norm(branch, norm_weight.shape, norm_weight, norm_bias, eps)
    y = x + (branch if row_scale is None else branch * row_scale.to(branch.dtype).unsqueeze(1))
    return y if cu_seqlens is None else torch.where(within(cu_seqlens, x), y, x)
