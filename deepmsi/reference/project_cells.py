"""The projection of cells in plain PyTorch."""

import torch
from torch import Tensor


def project_cells(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
) -> Tensor:
    """Return LN(W x + b) [F, H, W, C] for cells x [F, H, W, A, B, c], each read in that order; 0 past the offsets."""
    y = torch.nn.functional.linear(x.flatten(3), weight, bias)
    y = torch.nn.functional.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps)
    if cu_seqlens is None:
        return y
    inside = torch.arange(y.shape[2], device=y.device) < cu_seqlens[-1]
    return torch.where(inside[:, None], y, 0)
