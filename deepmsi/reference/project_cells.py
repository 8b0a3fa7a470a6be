"""The projection of cells in plain PyTorch."""

import torch
from torch import Tensor

from deepmsi.reference.packed import counted


def project_cells(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
) -> Tensor:
    """Return LN(W x + b) [F, H, W, C] for cells x [F, H, W, A, B, c], each read in that order; 0 past the offsets.

    It is in the widest type of its arguments.
    """
    rows = counted(cu_seqlens, x.flatten(3).flatten(0, 2))
    y = torch.nn.functional.linear(rows, weight, bias)
    wide = torch.promote_types(torch.promote_types(y.dtype, norm_weight.dtype), norm_bias.dtype)
    y = torch.nn.functional.layer_norm(y.to(wide), norm_weight.shape, norm_weight.to(wide), norm_bias.to(wide), eps)
    return counted(cu_seqlens, y).unflatten(0, x.shape[:3])
