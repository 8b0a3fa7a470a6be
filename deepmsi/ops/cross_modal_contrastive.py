"""The public function of the cross-modal contrastive loss: check, resolve, call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops import _schemas as _schemas  # registers the operators
from deepmsi.ops._arguments import (
    check_devices,
    check_floating,
    check_shape,
    keeps_for_backward,
    shape,
    without_autocast,
)
from deepmsi.reference.cross_modal_contrastive import cross_modal_contrastive as reference

_OP = "cross_modal_contrastive"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def cross_modal_contrastive(
    a: Tensor,
    b: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: float = 0.5,
    include_matched: bool = False,
    normalize: str = "batch",
    valid_a: Tensor | Sequence[Tensor | None] | None = None,
    valid_b: Tensor | Sequence[Tensor | None] | None = None,
    labels_b: Tensor | None = None,
    row_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Contrast the rows of two modalities by their labels (Eq. 5).

    With a_i, b_j normalised, s_ij = ⟨a_i, b_j⟩ / τ, P(i) = {j ≠ i: y_j = y_i}, N(i) = {k: y_k ≠ y_i} and
    Z_i = Σ_{k∈N(i)} exp(s_ik): ``L = 1/B Σ_i 1/(B-1) Σ_{j∈P(i)} softplus(log Z_i - s_ij)``, which is
    -log(exp(s_ij) / (exp(s_ij) + Z_i)) without overflow. One row, one class, or no positive pair give exactly 0 with
    zero gradients. Computed in float32 or wider, also under autocast.

    Args:
        a: [B, D], normalised inside.
        b: [J, D] with J = B, or a sequence of P such tensors (usually a pair): the mean of their losses.
        labels: Integer class of each row of a [B].
        temperature: τ > 0, a number (a tensor would be read on the host) that is not learned.
        include_matched: Whether the matched pair (i, i) is a positive, too.
        normalize: ``"batch"`` divides a row's sum by B - 1, ``"positives"`` by |P(i)|.
        valid_a: Whether a row has its a-side [B] bool, or a sequence of P of them; with ``labels_b`` it may cover the
            joined batch [J] instead.
        valid_b: Whether a row has its b-side [J] bool, or a sequence of P of them. A row that lacks a side is in
            neither P, N nor B of that pair. Where a is a slice and ``valid_a`` covers the slice alone, ``valid_b``
            must say for the other rows whether *both* sides are there.
        labels_b: Labels of a gathered batch b [J]. The rows of a are then its slice [row_offset, row_offset + B), and
            the result is the slice's part of the joined loss: the parts add up to it.
        row_offset: Where a's slice begins.
        backend: ``reference``, ``triton``, ``cpp`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        A scalar in float32 (float64 for float64 inputs).

    Raises:
        ValueError: An argument has the wrong shape, type or range.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    check_floating(a, _OP, "a")
    if a.dim() != 2 or a.shape[1] < 1:
        raise ValueError(f"{_OP}: a must be [B, D] of at least one channel, not {shape(a)}")
    others = [b] if isinstance(b, Tensor) else list(b)
    if len(others) < 1:
        raise ValueError(f"{_OP}: b is an empty sequence")
    rows, dim = a.shape
    if others[0].dim() != 2:
        raise ValueError(f"{_OP}: b must be [J, {dim}], not {shape(others[0])}")
    joined = others[0].shape[0]
    for other in others:
        check_floating(other, _OP, "b")
        check_shape(_OP, "b", other, joined, dim)
        check_devices(a, _OP, "a", b=other)
    check_devices(a, _OP, "a", labels=labels, labels_b=labels_b)
    check_shape(_OP, "labels", labels, rows)
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"{_OP}: labels must be integers, not {labels.dtype}")
    if isinstance(temperature, Tensor) and temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: temperature gets no gradient, so it cannot be learned: give a number")
    if not temperature > 0:
        raise ValueError(f"{_OP}: temperature must be above 0, not {temperature}")
    if normalize not in ("batch", "positives"):
        raise ValueError(f"{_OP}: normalize must be 'batch' or 'positives', not {normalize!r}")
    if labels_b is None:
        if joined != rows or row_offset != 0:
            raise ValueError(
                f"{_OP}: b has {joined} rows and row_offset is {row_offset}: a slice of {rows} rows needs labels_b"
            )
        labels_b = labels
    check_shape(_OP, "labels_b", labels_b, joined)
    if labels_b.dtype not in _INTEGERS:
        raise ValueError(f"{_OP}: labels_b must be integers, not {labels_b.dtype}")
    if not 0 <= row_offset <= joined - rows:
        raise ValueError(f"{_OP}: rows [{row_offset}, {row_offset + rows}) do not lie in b's {joined}")

    chosen = resolve(_OP, backend, a.device.type, a.dtype)
    with without_autocast(a.device.type):
        if chosen == "reference":
            return reference(
                a,
                torch.stack([other.to(a.dtype) for other in others]),
                labels,
                labels_b,
                row_offset,
                *_taking_part(a, others, row_offset, valid_a, valid_b),
                float(temperature),
                include_matched,
                normalize == "positives",
            )
        inside, columns = None, None
        if valid_a is not None or valid_b is not None:
            inside, columns = _taking_part(a, others, row_offset, valid_a, valid_b)
        wide = a.float()
        stacked = torch.stack([other.float() for other in others])
        loss, _, _ = getattr(torch.ops.deepmsi, f"{_OP}_{chosen}_fwd")(
            wide,
            stacked,
            labels.long(),
            labels_b.long(),
            row_offset,
            inside,
            columns,
            float(temperature),
            include_matched,
            normalize == "positives",
            keeps_for_backward(wide, stacked),
        )
        return loss


def masks_of_pairs(
    a: Tensor,
    others: Sequence[Tensor],
    valid_a: Tensor | Sequence[Tensor | None] | None,
    valid_b: Tensor | Sequence[Tensor | None] | None,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Return the masks of both sides, one for each of the others.

    Raises:
        ValueError: There are too few or too many masks, or one has the wrong shape or type.
    """
    rows, joined = a.shape[0], others[0].shape[0]
    # One mask of a serves every pair; b's are told one by one, so that none is left out by mistake.
    masks_a = [valid_a] * len(others) if valid_a is None or isinstance(valid_a, Tensor) else list(valid_a)
    masks_b = [valid_b] if isinstance(valid_b, Tensor) else [None] * len(others) if valid_b is None else list(valid_b)
    for name, masks, sizes in (("valid_a", masks_a, (rows, joined)), ("valid_b", masks_b, (joined,))):
        if len(masks) != len(others):
            raise ValueError(f"{_OP}: {name} holds {len(masks)} masks for {len(others)} of b: give one for each")
        for mask in masks:
            if mask is not None and not (mask.dtype == torch.bool and mask.dim() == 1 and mask.shape[0] in sizes):
                raise ValueError(f"{_OP}: {name} must be [{sizes[0]}] bool, not {shape(mask)} {mask.dtype}")
            check_devices(a, _OP, "a", **{name: mask})
    return masks_a, masks_b


def _taking_part(
    a: Tensor,
    others: Sequence[Tensor],
    row_offset: int,
    valid_a: Tensor | Sequence[Tensor | None] | None,
    valid_b: Tensor | Sequence[Tensor | None] | None,
) -> tuple[Tensor, Tensor]:
    """Return which rows of a [P, B] and which joined rows [P, J] take part in each pair, both bool."""
    rows, joined = a.shape[0], others[0].shape[0]
    everyone = torch.ones(joined, dtype=torch.bool, device=a.device)
    masks_a, masks_b = masks_of_pairs(a, others, valid_a, valid_b)
    inside, columns = [], []
    for mask_a, mask_b in zip(masks_a, masks_b, strict=True):
        column = everyone if mask_b is None else mask_b
        part = everyone[:rows]
        if mask_a is not None and mask_a.shape[0] == joined:
            column = column & mask_a
        elif mask_a is not None:
            part = mask_a
        columns.append(column)
        inside.append(column[row_offset : row_offset + rows] & part)
    return torch.stack(inside), torch.stack(columns)
