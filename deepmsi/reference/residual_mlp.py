"""The residual MLP of a post-norm block in plain PyTorch."""

import torch
from torch import Tensor


def residual_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_scale: Tensor | None,
    eps: float,
) -> Tensor:
    """Return x + row_scale · LN(W2 gelu(W1 x + b1) + b2) for rows x [R, C]."""
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, fc1_weight, fc1_bias))
    branch = torch.nn.functional.linear(hidden, fc2_weight, fc2_bias)
    branch = torch.nn.functional.layer_norm(branch, norm_weight.shape, norm_weight, norm_bias, eps)
    return x + (branch if row_scale is None else branch * row_scale.to(branch.dtype).unsqueeze(1))
