"""The public function of the residual norm: check, resolve, call."""

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops import _schemas as _schemas  # registers the operators
from deepmsi.ops._arguments import check_devices, check_floating, check_shape, shape, without_autocast
from deepmsi.reference.residual_norm import residual_norm as reference

_OP = "residual_norm"


def residual_norm(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    row_scale: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Add a normed branch, as a post-norm transformer block (Swin V2) ends its halves: y = x + s · LN(branch).

    Autocast changes nothing: sums are in float32 or wider, and y has the type of x. Statistics are not kept for the
    backward pass, which makes them again from the branch.

    Equivalent to: ``x + s * layer_norm(branch, (C,), norm_weight, norm_bias, eps)``.

    Args:
        x: [..., C].
        branch: The shape of x; its type may be another.
        norm_weight, norm_bias: [C].
        row_scale: s of each row [...], without a gradient (stochastic depth); None is 1.
        eps: Added to the variance.
        backend: ``reference``, ``cpp``, ``triton`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        [..., C] in the type of x.

    Raises:
        ValueError: An argument has the wrong shape or type.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    for name, tensor in (("x", x), ("branch", branch)):
        check_floating(tensor, _OP, name)
    if x.dim() < 1 or branch.shape != x.shape:
        raise ValueError(f"{_OP}: x and branch must be [..., C], both, not {shape(x)} and {shape(branch)}")
    if (x.dtype == torch.float64) != (branch.dtype == torch.float64):
        raise ValueError(f"{_OP}: float64 goes with float64 alone, not x in {x.dtype} with branch in {branch.dtype}")
    channels = x.shape[-1]
    check_shape(_OP, "norm_weight", norm_weight, channels)
    check_shape(_OP, "norm_bias", norm_bias, channels)
    if row_scale is not None:
        check_shape(_OP, "row_scale", row_scale, *x.shape[:-1])
    row_scale = None if row_scale is None else row_scale.detach()
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "row_scale": row_scale}
    check_devices(x, _OP, "x", branch=branch, **vectors)
    chosen = resolve(_OP, backend, x.device.type, branch.dtype, channels=channels)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return reference(x, branch, norm_weight, norm_bias, row_scale, eps)
    if norm_weight.dtype != norm_bias.dtype:
        # The kernels give the gradients of both in one type.
        wide = torch.promote_types(norm_weight.dtype, norm_bias.dtype)
        norm_weight, norm_bias = norm_weight.to(wide), norm_bias.to(wide)
    forward = getattr(torch.ops.deepmsi, f"{_OP}_{chosen}_fwd")
    scale = None if row_scale is None else row_scale.reshape(-1)
    rows = x.reshape(-1, channels)
    return forward(rows, branch.reshape(-1, channels), norm_weight, norm_bias, scale, eps).view(x.shape)
