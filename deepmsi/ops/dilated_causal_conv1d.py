"""The public function of the dilated causal convolution: check, resolve, call."""

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops._arguments import autocast, check_floating, shape
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
        [B, Cout, T].

    Raises:
        ValueError: An argument has the wrong shape, type or range.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    x, weight = autocast(x), autocast(weight)
    bias = autocast(bias) if bias is not None else None
    check_floating(x, _OP, "x")
    if x.dim() != 3:
        raise ValueError(f"{_OP}: x must be [B, Cin, T], not {shape(x)}")
    if not (weight.dim() == 3 and weight.shape[1] == x.shape[1] and weight.shape[2] >= 1):
        raise ValueError(f"{_OP}: weight must be [Cout, {x.shape[1]}, k], not {shape(weight)}")
    if not (weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)):
        raise ValueError(
            f"{_OP}: x is {x.dtype} but weight is {weight.dtype}" + (f", bias {bias.dtype}" if bias is not None else "")
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{_OP}: bias must be [{weight.shape[0]}], not {shape(bias)}")
    if dilation < 1:
        raise ValueError(f"{_OP}: dilation must be at least 1, not {dilation}")
    resolve(_OP, backend, x.device.type, x.dtype, taps=weight.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        return reference(x, weight, bias, dilation)
