"""The public function of the residual MLP: check, resolve, call."""

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops import _schemas as _schemas  # registers the operators
from deepmsi.ops._arguments import (
    are_offsets,
    autocast_layers,
    check_devices,
    check_floating,
    check_packed,
    check_shape,
    keeps_for_backward,
    shape,
    type_of_layers,
    without_autocast,
)
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
    norm_first: bool = False,
    packed: tuple[Tensor, ...] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add the MLP of a transformer block: y = x + s · LN(W2 gelu(W1 x + b1) + b2), as in Swin V2.

    With ``norm_first``, as in Swin V1: y = x + s · (W2 gelu(W1 LN(x) + b1) + b2).

    The exact GELU. The hidden rows are not kept for the backward pass: it makes them again. Products are in the type of
    the layers' weights, under autocast in its type; the norm is in float32 or wider, and y has the type of x.

    Equivalent to: ``x + s * layer_norm(linear(gelu(linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias))``, or to
    ``x + s * linear(gelu(linear(layer_norm(x), fc1_weight, fc1_bias)), fc2_weight, fc2_bias)``.

    Args:
        x: [..., C].
        fc1_weight, fc1_bias: [H, C] and [H].
        fc2_weight, fc2_bias: [C, H] and [C]; all four of one type.
        norm_weight, norm_bias: [C].
        row_scale: s of each row [...], without a gradient (stochastic depth); None is 1.
        cu_seqlens: Offsets of frames in packed rows x [R, C], [F + 1] int32; rows past the last one are passed on as
            they are.
        eps: Added to the variance.
        norm_first: Whether the norm is of x, not of what the layers give.
        packed: fc1_weight and fc2_weight as ``pack_weight`` gives them for the type that products are in; read in
            their place where ``cpp`` runs and no gradient is wanted.
        backend: ``reference``, ``cpp``, ``triton`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        [..., C] in the type of x.

    Raises:
        ValueError: An argument has the wrong shape or type.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    check_floating(x, _OP, "x")
    if x.dim() < 1 or fc1_weight.dim() != 2 or fc1_weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{_OP}: x must be [..., C] and fc1_weight [H, C], not {shape(x)} and {shape(fc1_weight)}")
    hidden, channels = fc1_weight.shape
    if hidden == 0 or channels == 0:
        raise ValueError(f"{_OP}: fc1_weight must have an element at least, not {shape(fc1_weight)}")
    check_shape(_OP, "fc1_bias", fc1_bias, hidden)
    check_shape(_OP, "fc2_weight", fc2_weight, channels, hidden)
    check_shape(_OP, "fc2_bias", fc2_bias, channels)
    check_shape(_OP, "norm_weight", norm_weight, channels)
    check_shape(_OP, "norm_bias", norm_bias, channels)
    if row_scale is not None:
        check_shape(_OP, "row_scale", row_scale, *x.shape[:-1])
    if cu_seqlens is not None and not (x.dim() == 2 and are_offsets(cu_seqlens)):
        raise ValueError(
            f"{_OP}: cu_seqlens must be [F + 1] int32 beside packed rows [R, C], not {shape(cu_seqlens)} "
            f"{cu_seqlens.dtype} beside {shape(x)}"
        )
    layers = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    others = {"norm_weight": norm_weight, "norm_bias": norm_bias, "row_scale": row_scale, "cu_seqlens": cu_seqlens}
    check_devices(x, _OP, "x", **layers, **others)
    dtype, mixed = type_of_layers(_OP, x.dtype, (norm_weight, norm_bias), **layers)
    rows = x.reshape(-1, channels)
    scale = None if row_scale is None else row_scale.detach().reshape(-1)
    chosen = resolve(_OP, backend, x.device.type, dtype, channels=channels, mixed=mixed)
    cast = autocast_layers(layers.values(), chosen)
    if chosen == "cpp" and scale is not None:
        scale = scale.float()
    with_grad = keeps_for_backward(x, *cast, norm_weight, norm_bias)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = cast
    if chosen == "cpp" and packed is not None and not with_grad:
        check_packed(_OP, packed, 2)
        fc1_weight, fc2_weight = packed
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return reference(rows, *weights, scale, cu_seqlens, eps, norm_first).view(x.shape)
    forward = getattr(torch.ops.deepmsi, f"{_OP}_{chosen}_fwd")
    y, _ = forward(rows, *weights, scale, cu_seqlens, eps, norm_first, with_grad)
    return y.view(x.shape)
