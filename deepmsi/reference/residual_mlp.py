"""The residual MLP of a transformer block in plain PyTorch."""

import torch
from torch import Tensor

from deepmsi.reference.packed import counted, within
from deepmsi.reference.residual_norm import layer_norm, residual, residual_norm


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
    norm_first: bool = False,
) -> Tensor:
    """Return x + row_scale · LN(W2 gelu(W1 x + b1) + b2) for rows x [R, C]; those past the last offset stay x.

    With ``norm_first`` x + row_scale · (W2 gelu(W1 LN(x) + b1) + b2).
    """
    rows = counted(cu_seqlens, x)
    if norm_first:
        rows = layer_norm(rows, norm_weight, norm_bias, eps)
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(rows.to(fc1_weight.dtype), fc1_weight, fc1_bias))
    branch = torch.nn.functional.linear(hidden, fc2_weight, fc2_bias)
    if norm_first:
        y = residual(x, branch, row_scale)
    else:
        y = residual_norm(x, branch, norm_weight, norm_bias, row_scale, eps)
    return y if cu_seqlens is None else torch.where(within(cu_seqlens, x), y, x)
