"""The public function of the projection of cells: check, resolve, call."""

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops import _schemas as _schemas  # registers the operators
from deepmsi.ops._arguments import (
    are_offsets,
    autocast,
    autocast_layers,
    autocast_type,
    check_devices,
    check_floating,
    check_packed,
    check_shape,
    keeps_for_backward,
    shape,
    type_of_layers,
    without_autocast,
)
from deepmsi.reference.project_cells import project_cells as reference

_OP = "project_cells"


def project_cells(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-5,
    norm_first: bool = False,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Project the cells of a grid and norm them: y = LN(W cell + b), as Swin V2 embeds patches and merges tokens.

    With ``norm_first``, as Swin V1 merges tokens: y = W LN(cell) + b.

    x is a view, in whose order a cell's numbers meet the columns of W; runs of c are read where they
    lie (``triton`` lays them out with ``norm_first``).

    The product is in the type of x and the weight, under autocast in its type, and so is y; the norm is in the widest
    type of its arguments. A norm that comes first reads x as it is, which may be of another type than the weight.

    Equivalent to: ``layer_norm(linear(x.flatten(3), weight, bias))``, or to
    ``linear(layer_norm(x.flatten(3)), weight, bias)``.

    Args:
        x: [F, H, W, A, B, c]. Patches of p x p of frames [F, 3, S, S] are
            ``frames.view(F, 3, H, p, W, p).permute(0, 2, 4, 1, 3, 5)``.
        weight: [C, A·B·c].
        bias: [C], or None.
        norm_weight, norm_bias: [C], or with norm_first [A·B·c].
        cu_seqlens: Offsets of frames in packed rows x [1, 1, R, A, B, c], [F + 1] int32; rows past the last one give 0.
        eps: Added to the variance.
        norm_first: Whether the norm is of the cells, not of what the weight gives.
        packed: The weight as ``pack_weight`` gives it for the type that the product is in; read in its place
            where ``cpp`` runs and no gradient is wanted.
        backend: ``reference``, ``cpp``, ``triton`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        [F, H, W, C].

    Raises:
        ValueError: An argument has the wrong shape or type.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    check_floating(x, _OP, "x")
    if x.dim() != 6:
        raise ValueError(f"{_OP}: x must be [F, H, W, A, B, c], not {shape(x)}")
    depth = x.shape[3] * x.shape[4] * x.shape[5]
    if weight.dim() != 2 or weight.shape[1] != depth:
        raise ValueError(f"{_OP}: weight must be [C, {depth}], not {shape(weight)}")
    channels = weight.shape[0]
    if bias is not None:
        check_shape(_OP, "bias", bias, channels)
    check_shape(_OP, "norm_weight", norm_weight, depth if norm_first else channels)
    check_shape(_OP, "norm_bias", norm_bias, depth if norm_first else channels)
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check_devices(x, _OP, "x", weight=weight, cu_seqlens=cu_seqlens, **vectors)
    if cu_seqlens is not None and not (x.shape[:2] == (1, 1) and are_offsets(cu_seqlens)):
        raise ValueError(
            f"{_OP}: cu_seqlens must be [F + 1] int32 beside packed rows [1, 1, R, A, B, c], not {shape(cu_seqlens)} "
            f"{cu_seqlens.dtype} beside {shape(x)}"
        )
    x_dtype = x.dtype if norm_first else autocast_type(x)
    dtype, mixed = type_of_layers(_OP, x_dtype, (norm_weight, norm_bias), weight=weight, bias=bias)
    if x_dtype != dtype and not norm_first:
        raise ValueError(f"{_OP}: x and weight must be of one type, not {x_dtype} and {dtype}")
    facts = {"mixed": mixed, "outputs": channels, "depth": depth, "norm_first": int(norm_first)}
    chosen = resolve(_OP, backend, x.device.type, dtype, **facts)
    with_grad = keeps_for_backward(x, weight, bias, norm_weight, norm_bias)
    if not norm_first and (chosen != "triton" or with_grad):
        # Triton's kernel rounds x while it reads it, but backward would keep it as it was.
        x = autocast(x)
    weight, bias = autocast_layers((weight, bias), chosen)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return reference(x, weight, bias, norm_weight, norm_bias, cu_seqlens, eps, norm_first).to(dtype)
    if chosen == "cpp":
        if packed is not None and not with_grad:
            check_packed(_OP, (packed,), 1)
            weight = packed
        # Its gradient lies as x does, in runs of c, which numbers that overlap would not be in.
        overlaps = with_grad and any(x.stride(d) == 1 and x.shape[d] > 1 for d in range(5))
        if x.stride(5) != 1 or overlaps:
            x = x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves an empty x as it lies
    forward = getattr(torch.ops.deepmsi, f"{_OP}_{chosen}_fwd")
    y, _ = forward(x, weight, bias, norm_weight, norm_bias, cu_seqlens, eps, norm_first, channels, with_grad)
    return y.view(*x.shape[:3], channels)
