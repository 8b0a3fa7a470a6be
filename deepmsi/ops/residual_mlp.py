"""The public function of the residual MLP: check, resolve, call."""

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops import _schemas as _schemas  # registers the operators
from deepmsi.ops._arguments import check_floating, needs_grad, shape
from deepmsi.reference.residual_mlp import residual_mlp as reference

_OP = "residual_mlp"


def residual_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    row_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Add the normed MLP of a post-norm transformer block (Swin V2): y = x + s · LN(W2 gelu(W1 x + b1) + b2).

    The exact GELU. The hidden rows are not kept for the backward pass: it makes them again, while they are in cache.

    Equivalent to: ``x + s * layer_norm(linear(gelu(linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias))``.

    Args:
        x: [..., C].
        fc1_weight, fc1_bias: [H, C] and [H].
        fc2_weight, fc2_bias: [C, H] and [C].
        norm_weight, norm_bias: [C].
        row_scale: s of each row [...], without a gradient (stochastic depth); None is 1.
        cu_seqlens: Offsets of frames in packed rows x [R, C], [F + 1] int32; rows past the last one are passed on as
            they are.
        eps: Added to the variance.
        backend: ``reference``, ``cpp`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        [..., C].

    Raises:
        ValueError: An argument has the wrong shape or type.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    check_floating(x, _OP, "x")
    if x.dim() < 1 or fc1_weight.dim() != 2 or fc1_weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{_OP}: x must be [..., C] and fc1_weight [H, C], not {shape(x)} and {shape(fc1_weight)}")
    hidden, channels = fc1_weight.shape
    if fc2_weight.shape != (channels, hidden):
        raise ValueError(f"{_OP}: fc2_weight must be [{channels}, {hidden}], not {shape(fc2_weight)}")
    for name, vector, size in (
        ("fc1_bias", fc1_bias, hidden),
        ("fc2_bias", fc2_bias, channels),
        ("norm_weight", norm_weight, channels),
        ("norm_bias", norm_bias, channels),
    ):
        if vector.shape != (size,):
            raise ValueError(f"{_OP}: {name} must be [{size}], not {shape(vector)}")
    if row_scale is not None and row_scale.shape != x.shape[:-1]:
        raise ValueError(f"{_OP}: row_scale must be {shape(x[..., 0])}, not {shape(row_scale)}")
    if cu_seqlens is not None and (x.dim() != 2 or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32):
        raise ValueError(
            f"{_OP}: cu_seqlens must be [F + 1] int32 beside packed rows [R, C], not {shape(cu_seqlens)} "
            f"{cu_seqlens.dtype} beside {shape(x)}"
        )
    rows = x.reshape(-1, channels)
    scale = None if row_scale is None else row_scale.reshape(-1)
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias)
    if resolve(_OP, backend, x.device.type, x.dtype) == "reference":
        return reference(rows, *weights, scale, cu_seqlens, eps).view(x.shape)
    with_grad = needs_grad(x, *weights)
    y, _ = torch.ops.deepmsi.residual_mlp_cpp_fwd(rows, *weights, scale, cu_seqlens, eps, with_grad)
    return y.view(x.shape)
