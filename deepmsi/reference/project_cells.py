"""The projection of cells in plain PyTorch."""

import torch
from torch import Tensor

from deepmsi.reference.packed import counted
from deepmsi.reference.residual_norm import layer_norm


def project_cells(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    norm_first: bool = False,
) -> Tensor:
    """Return LN(W x + b) [F, H, W, C] for cells x [F, H, W, A, B, c], each read in that order; 0 past the offsets.

    It is in the widest type of its arguments. With ``norm_first`` W LN(x) + b, in the type of W.
    """
    rows = counted(cu_seqlens, x.flatten(3).flatten(0, 2))
    if norm_first:
        y = torch.nn.functional.linear(layer_norm(rows, norm_weight, norm_bias, eps).to(weight.dtype), weight, bias)
    else:
        y = layer_norm(torch.nn.functional.linear(rows, weight, bias), norm_weight, norm_bias, eps)
    return counted(cu_seqlens, y).unflatten(0, x.shape[:3])
