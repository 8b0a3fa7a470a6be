"""The norm and the sum of a transformer block's halves in plain PyTorch."""

import torch
from torch import Tensor


def residual_norm(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor, row_scale: Tensor | None, eps: float
) -> Tensor:
    """Return x + row_scale · LN(branch) in the type of x; the norm is in the widest type of its arguments."""
    return residual(x, layer_norm(branch, norm_weight, norm_bias, eps), row_scale)


def layer_norm(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    """Return LN(x) in the widest type of the arguments."""
    wide = torch.promote_types(torch.promote_types(x.dtype, norm_weight.dtype), norm_bias.dtype)
    weight, bias = norm_weight.to(wide), norm_bias.to(wide)
    return torch.nn.functional.layer_norm(x.to(wide), weight.shape, weight, bias, eps)


def residual(x: Tensor, branch: Tensor, row_scale: Tensor | None) -> Tensor:
    """Return x + row_scale · branch in the type of x."""
    scaled = branch if row_scale is None else branch * row_scale.to(branch.dtype).unsqueeze(-1)
    return (x + scaled).to(x.dtype)
