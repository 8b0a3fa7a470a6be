"""The residual norm of a post-norm block in plain PyTorch."""

import torch
from torch import Tensor


def residual_norm(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor, row_scale: Tensor | None, eps: float
) -> Tensor:
    """Return x + row_scale · LN(branch) in the type of x; the norm is in the widest type of its arguments."""
    wide = torch.promote_types(torch.promote_types(branch.dtype, norm_weight.dtype), norm_bias.dtype)
    weight, bias = norm_weight.to(wide), norm_bias.to(wide)
    normed = torch.nn.functional.layer_norm(branch.to(wide), weight.shape, weight, bias, eps)
    return (x + (normed if row_scale is None else normed * row_scale.to(wide).unsqueeze(-1))).to(x.dtype)
