"""The dilated causal convolution: the public function, and the fused form over rows that the TCN calls."""

import torch
from torch import Tensor

from deepmsi.backend import BESIDE, resolve
from deepmsi.ops import _schemas as _schemas
from deepmsi.ops._arguments import (
    autocast,
    check_devices,
    check_floating,
    keeps_for_backward,
    shape,
    without_autocast,
)
from deepmsi.reference.dilated_causal_conv1d import causal_conv_rows as reference_rows
from deepmsi.reference.dilated_causal_conv1d import dilated_causal_conv1d as reference

_OP = "dilated_causal_conv1d"


def dilated_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve a sequence with its past (Eq. 4): y(t) = b + Σ_{i<k} w_{k-1-i} x(t - i·d), zeros before the start.

    Equivalent to: ``F.conv1d(F.pad(x, ((k - 1) * dilation, 0)), weight, bias, dilation=dilation)``.

    Args:
        x: [B, Cin, T]. Under autocast x, weight and bias take the autocast type.
        weight: [Cout, Cin, k], in torch's order of taps (the last one meets the present).
        bias: [Cout].
        dilation: d ≥ 1, in time steps.
        backend: ``reference``, ``triton``, ``cpp`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        [B, Cout, T]. The kernels work on time steps and return a transposed view: its channels lie together.

    Raises:
        ValueError: An argument has the wrong shape, type or range.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    check_devices(x, _OP, "x", weight=weight, bias=bias)
    x, weight = autocast(x), autocast(weight)
    bias = autocast(bias) if bias is not None else None
    check_floating(x, _OP, "x")
    if x.dim() != 3:
        raise ValueError(f"{_OP}: x must be [B, Cin, T], not {shape(x)}")
    if not (weight.dim() == 3 and weight.shape[1] == x.shape[1] and min(weight.shape) >= 1):
        raise ValueError(f"{_OP}: weight must be [Cout, {x.shape[1]}, k], none of them 0, not {shape(weight)}")
    if not (weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)):
        raise ValueError(
            f"{_OP}: x is {x.dtype} but weight is {weight.dtype}" + (f", bias {bias.dtype}" if bias is not None else "")
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{_OP}: bias must be [{weight.shape[0]}], not {shape(bias)}")
    if dilation < 1:
        raise ValueError(f"{_OP}: dilation must be at least 1, not {dilation}")
    chosen = resolve(_OP, backend, x.device.type, x.dtype)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return reference(x, weight, bias, dilation)
    return causal_conv_rows(x.transpose(1, 2), pack(weight), bias, dilation=dilation, backend=chosen).transpose(1, 2)


def pack(weight: Tensor) -> Tensor:
    """Return torch's weight [Cout, Cin, k] tap by tap [k, Cin, Cout], which is how the rows' form reads it."""
    return weight.permute(2, 1, 0).contiguous()


def fold_weight_norm(v: Tensor, g: Tensor) -> Tensor:
    """Return g v / |v| of a weight norm, as :func:`pack` lays it out.

    Args:
        v: [Cout, Cin, k].
        g: [Cout, 1, 1].

    Returns:
        [k, Cin, Cout].
    """
    return pack(torch._weight_norm(v, g, 0))


def causal_conv_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    g: Tensor | None = None,
    dilation: int = 1,
    count: int | None = None,
    step: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Convolve rows of time steps with their past, at the positions that are asked for, and finish a layer in one go.

    h = dropout(relu(b + Σ_i x(t - (k - 1 - i)·d) w_i)), y = relu(h + residual); each of relu, dropout and residual only
    where it is given. Zeros stand before the start. Its arguments are trusted but for their types.

    Args:
        x: [B, n, Cin].
        weight: [k, Cin, Cout] (see :func:`pack`), or v [Cout, Cin, k] of a weight norm where g is given.
        bias: [Cout].
        g: [Cout, 1, 1]. The CPU then reads v itself, forward and backward, and never writes the folded weight or its
            gradient.
        dilation: d, in rows of x.
        count: Number of positions, ``step`` rows apart and the last one at the end; None takes every row.
        step: Distance of two positions.
        relu: Whether h is cut off at 0.
        residual: [B, count, Cout].
        seed: [] int64, which dropout draws from; the same seed drops the same elements on every backend.
        dropout: Probability that an element of h becomes 0; the others are scaled by 1 / (1 - dropout). Needs relu.
        backend: As everywhere.

    Returns:
        [B, count, Cout].
    """
    x = autocast(x)
    chosen = resolve(_OP, backend, x.device.type, x.dtype)
    if g is not None and (
        chosen != "cpp" or "weight_normed_conv1d_cpp_fwd" not in BESIDE.get((_OP, x.device.type), ())
    ):
        weight, g = fold_weight_norm(weight, g), None
    weight = autocast(weight)
    bias, g = (autocast(t) if t is not None else None for t in (bias, g))
    residual = residual.to(x.dtype) if residual is not None else None
    if seed is None or dropout == 0:
        seed, dropout = None, 0.0
    with without_autocast(x.device.type):
        if chosen == "reference":
            return reference_rows(x, weight, bias, residual, seed, dilation, count, step, relu, dropout)
        with_grad = keeps_for_backward(x, weight, g, bias, residual)
        others = (bias, residual, seed, dilation, count, step, relu, dropout, with_grad)
        if g is not None:
            return torch.ops.deepmsi.weight_normed_conv1d_cpp_fwd(x, weight, g, *others)[0]
        return getattr(torch.ops.deepmsi, f"{_OP}_{chosen}_fwd")(x, weight, *others)[0]
