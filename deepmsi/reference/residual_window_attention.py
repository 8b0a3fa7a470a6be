"""The residual window attention of a transformer block in plain PyTorch."""

import torch
from torch import Tensor

from deepmsi.reference.packed import counted, within
from deepmsi.reference.residual_norm import layer_norm, residual, residual_norm
from deepmsi.reference.window_attention import Windows, window_attention


def residual_window_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    windows: Windows,
    row_scale: Tensor | None,
    eps: float,
    norm_first: bool = False,
) -> Tensor:
    """Return x + row_scale · LN(proj(attention(qkv(x)))) for a grid x [B, H, W, C] or packed rows [R, C].

    With ``norm_first`` x + row_scale · proj(attention(qkv(LN(x)))). Rows past the last offset stay x.
    """
    cu_seqlens = windows.cu_seqlens
    rows = counted(cu_seqlens, x)
    if norm_first:
        rows = layer_norm(rows, norm_weight, norm_bias, eps)
    qkv = torch.nn.functional.linear(rows.to(qkv_weight.dtype), qkv_weight, qkv_bias)
    branch = torch.nn.functional.linear(window_attention(qkv, windows), proj_weight, proj_bias)
    if norm_first:
        y = residual(x, branch, row_scale)
    else:
        y = residual_norm(x, branch, norm_weight, norm_bias, row_scale, eps)
    return y if cu_seqlens is None else torch.where(within(cu_seqlens, x), y, x)
