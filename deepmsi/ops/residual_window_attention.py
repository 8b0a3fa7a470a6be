"""The public function of the residual window attention: check, resolve, call."""

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops import _schemas as _schemas  # registers the operators
from deepmsi.ops._arguments import (
    autocast_layers,
    check_devices,
    check_packed,
    check_shape,
    keeps_for_backward,
    type_of_layers,
    without_autocast,
)
from deepmsi.ops.window_attention import checked, operands
from deepmsi.reference.residual_window_attention import residual_window_attention as reference
from deepmsi.reference.window_attention import Windows

_OP = "residual_window_attention"


def residual_window_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    heads: int,
    grid: tuple[int, int],
    window: int,
    shift: int,
    *,
    bias_table: Tensor,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float = 1e-5,
    norm_first: bool = False,
    packed: tuple[Tensor, ...] | None = None,
    head_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add the window attention of a transformer block: y = x + s · LN(P attention(Q x + q) + p), as in Swin V2.

    With ``norm_first``, as in Swin V1: y = x + s · (P attention(Q LN(x) + q) + p).

    ``attention`` is :func:`deepmsi.ops.window_attention`. Its q, k and v are not kept for the backward pass: it makes
    them again, some frames at a time. Products are in the type of the layers' weights, under autocast in its type; the
    norm is in the widest type of its arguments, and y has the type of x.

    Equivalent to: ``x + s * layer_norm(linear(window_attention(linear(x, qkv_weight, qkv_bias), ...), proj_weight))``,
    or to ``x + s * linear(window_attention(linear(layer_norm(x), qkv_weight, qkv_bias), ...), proj_weight)``.

    Args:
        x: [B, H, W, C], or packed rows [R, C].
        qkv_weight, qkv_bias: Q [3C, C] and q [3C], or None.
        proj_weight, proj_bias: P [C, C] and p [C]; all four of one type.
        norm_weight, norm_bias: [C].
        heads, grid, window, shift, bias_table, logit_scale, scale, positions, cu_seqlens, head_scale: As in
            ``window_attention``. Rows past the last offset are passed on as they are.
        row_scale: s of each row, [B, H, W] or [R], without a gradient (stochastic depth); None is 1.
        eps: Added to the variance.
        norm_first: Whether the norm is of x, not of what the attention gives.
        packed: qkv_weight and proj_weight as ``pack_weight`` gives them for the type that products are in; read in
            their place where ``cpp`` runs and no gradient is wanted.
        backend: ``reference``, ``cpp``, ``triton`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        The shape of x.

    Raises:
        ValueError: An argument has the wrong shape, type or range.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    windows = Windows(heads, grid, window, shift, bias_table, logit_scale, scale, positions, cu_seqlens)
    windows = checked(_OP, x, "x", 1, windows, head_scale)
    channels = x.shape[-1]
    check_shape(_OP, "qkv_weight", qkv_weight, 3 * channels, channels)
    if qkv_bias is not None:
        check_shape(_OP, "qkv_bias", qkv_bias, 3 * channels)
    check_shape(_OP, "proj_weight", proj_weight, channels, channels)
    check_shape(_OP, "proj_bias", proj_bias, channels)
    check_shape(_OP, "norm_weight", norm_weight, channels)
    check_shape(_OP, "norm_bias", norm_bias, channels)
    if row_scale is not None:
        check_shape(_OP, "row_scale", row_scale, *x.shape[:-1])
    layers = {"qkv_weight": qkv_weight, "qkv_bias": qkv_bias, "proj_weight": proj_weight, "proj_bias": proj_bias}
    check_devices(x, _OP, "x", **layers, norm_weight=norm_weight, norm_bias=norm_bias, row_scale=row_scale)
    row_scale = None if row_scale is None else row_scale.detach()
    dtype, mixed = type_of_layers(_OP, x.dtype, (norm_weight, norm_bias), **layers)
    facts = {"channels": channels, "head_dim": channels // heads, "window": window, "mixed": mixed}
    chosen = resolve(_OP, backend, x.device.type, dtype, **facts)
    cast = autocast_layers(layers.values(), chosen)
    with_grad = keeps_for_backward(x, *cast, norm_weight, norm_bias, bias_table, logit_scale)
    qkv_weight, qkv_bias, proj_weight, proj_bias = cast
    if chosen == "cpp" and packed is not None and not with_grad:
        check_packed(_OP, packed, 2)
        qkv_weight, proj_weight = packed
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias, norm_weight, norm_bias)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return reference(x, *weights, windows, row_scale, eps, norm_first)
    row_scale = None if row_scale is None else row_scale.reshape(-1).float()
    forward = getattr(torch.ops.deepmsi, f"{_OP}_{chosen}_fwd")
    rest = (row_scale, eps, norm_first, *operands(windows, head_scale), with_grad)
    y, _, _ = forward(x.reshape(-1, channels), *weights, *rest)
    return y.view(x.shape)
