"""The public function of the position bias: check, resolve, call."""

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops import _schemas as _schemas  # registers the operators
from deepmsi.ops._arguments import check_devices, check_floating, check_shape, shape, without_autocast
from deepmsi.reference.position_bias import position_bias as reference

_OP = "position_bias"


def position_bias(
    coordinates: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute the bias that each head adds at each offset (Swin V2): t = 16 · σ(W₂ · relu(W₁ · coordinates + b)).

    Autocast changes nothing: all of it is in float32, or in float64 where a weight is.

    Equivalent to: ``16 * linear(linear(coordinates, hidden_weight, hidden_bias).relu(), out_weight).sigmoid()``.

    Args:
        coordinates: [P, 2], without a gradient: of a window of side w those of its P = (2w - 1)² offsets.
        hidden_weight, hidden_bias: W₁ [D, 2] and b [D].
        out_weight: W₂ [heads, D].
        backend: ``reference``, ``triton`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        [P, heads] in float32, or float64.

    Raises:
        ValueError: An argument has the wrong shape or type.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    weights = {"hidden_weight": hidden_weight, "hidden_bias": hidden_bias, "out_weight": out_weight}
    for name, tensor in {**weights, "coordinates": coordinates}.items():
        check_floating(tensor, _OP, name)
    if coordinates.dim() != 2 or coordinates.shape[1] != 2:
        raise ValueError(f"{_OP}: coordinates must be [P, 2], not {shape(coordinates)}")
    if hidden_weight.dim() != 2 or hidden_weight.shape[1] != 2:
        raise ValueError(f"{_OP}: hidden_weight must be [D, 2], not {shape(hidden_weight)}")
    hidden = hidden_weight.shape[0]
    check_shape(_OP, "hidden_bias", hidden_bias, hidden)
    if out_weight.dim() != 2 or out_weight.shape[1] != hidden:
        raise ValueError(f"{_OP}: out_weight must be [heads, {hidden}], not {shape(out_weight)}")
    check_devices(hidden_weight, _OP, "hidden_weight", coordinates=coordinates, **weights)
    wide = any(weight.dtype == torch.float64 for weight in weights.values())
    dtype = torch.float64 if wide else hidden_weight.dtype
    device = hidden_weight.device.type
    chosen = resolve(_OP, backend, device, dtype, heads=out_weight.shape[0])
    coordinates = coordinates.detach()
    if chosen == "reference":
        with without_autocast(device):
            return reference(coordinates, *weights.values())
    return getattr(torch.ops.deepmsi, f"{_OP}_{chosen}_fwd")(coordinates, *weights.values())
