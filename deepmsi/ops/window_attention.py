"""The public function of window attention: check, resolve, call."""

from typing import Any

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops import _schemas as _schemas  # registers the operators
from deepmsi.ops._arguments import (
    are_offsets,
    autocast,
    check_devices,
    check_floating,
    keeps_for_backward,
    shape,
    without_autocast,
)
from deepmsi.reference.window_attention import MAX_LOGIT_SCALE, Windows
from deepmsi.reference.window_attention import window_attention as reference

_OP = "window_attention"


def checked(op: str, x: Tensor, name: str, parts: int, windows: Windows, head_scale: Tensor | None) -> Windows:
    """Return what an attention over windows takes, the logit scale as [heads], with a scale.

    Args:
        op, name: The operation and its x, for the sentences.
        x: Rows or a grid of ``parts`` times C channels.
        windows, head_scale: As they came.

    Raises:
        ValueError: An argument has the wrong shape, type or range.
    """
    check_floating(x, op, name)
    heads, (height, width), window, shift, bias_table, logit_scale, scale, positions, cu_seqlens = windows
    wide, times = ("3C", "3 times ") if parts == 3 else ("C", "")
    packed = positions is not None or cu_seqlens is not None
    if packed:
        if positions is None or cu_seqlens is None:
            raise ValueError(f"{op}: packed rows need both positions and cu_seqlens")
        if x.dim() != 2:
            raise ValueError(f"{op}: {name} must be packed [R, {wide}] where positions are given, not {shape(x)}")
        if not (positions.shape == x.shape[:1] and positions.dtype in (torch.int32, torch.int64)):
            raise ValueError(
                f"{op}: positions must be [R] = [{x.shape[0]}] int32, not {shape(positions)} {positions.dtype}"
            )
        if not are_offsets(cu_seqlens):
            raise ValueError(f"{op}: cu_seqlens must be [F + 1] int32, not {shape(cu_seqlens)} {cu_seqlens.dtype}")
    else:
        if not (x.dim() == 4 and x.shape[1] == height and x.shape[2] == width):
            raise ValueError(
                f"{op}: {name} must be [B, {height}, {width}, {wide}] for the grid {height}x{width}, not {shape(x)}"
            )
    if height < 1 or width < 1:
        raise ValueError(f"{op}: the grid must not be empty, not {height}x{width}")
    if window < 1:
        raise ValueError(f"{op}: window must be at least 1, not {window}")
    if not 0 <= shift < window:
        raise ValueError(f"{op}: shift must lie in [0, {window}), not {shift}")
    if heads < 1:
        raise ValueError(f"{op}: heads must be at least 1, not {heads}")
    if not (x.shape[-1] % (parts * heads) == 0 and x.shape[-1] > 0):
        raise ValueError(f"{op}: {x.shape[-1]} channels of {name} are not {times}a multiple of {heads} heads")
    if bias_table.shape != ((2 * window - 1) ** 2, heads):
        raise ValueError(
            f"{op}: bias_table must be [{(2 * window - 1) ** 2}, {heads}] for window {window}, not {shape(bias_table)}"
        )
    check_floating(bias_table, op, "bias_table")
    check_devices(
        x,
        op,
        name,
        positions=positions,
        cu_seqlens=cu_seqlens,
        bias_table=bias_table,
        logit_scale=logit_scale,
        head_scale=head_scale,
    )
    if logit_scale is not None and scale is not None:
        raise ValueError(f"{op}: give logit_scale (cosine attention, V2) or scale (V1), not both")
    depth = x.shape[-1] // (parts * heads)
    if logit_scale is not None:
        if logit_scale.numel() != heads:
            raise ValueError(f"{op}: logit_scale must have {heads} elements, not {logit_scale.numel()}")
        logit_scale = logit_scale.reshape(heads)
    if head_scale is not None:
        if logit_scale is None:
            raise ValueError(f"{op}: head_scale is that of a logit_scale: give that, too")
        if head_scale.shape != (heads,) or head_scale.dtype != torch.float32:
            raise ValueError(f"{op}: head_scale must be [{heads}] float32, not {shape(head_scale)} {head_scale.dtype}")
    if scale is None:
        scale = depth**-0.5
    return windows._replace(logit_scale=logit_scale, scale=scale)


def operands(windows: Windows, head_scale: Tensor | None) -> tuple[Any, ...]:
    """Return what operators take of windows that were checked."""
    heads, grid, window, shift, bias_table, logit_scale, scale, positions, cu_seqlens = windows
    head_scale = head_scale_of(logit_scale, head_scale)
    return bias_table.float(), head_scale, scale, _narrowed(positions), cu_seqlens, heads, *grid, window, shift


def head_scale_of(logit_scale: Tensor | None, held: Tensor | None = None) -> Tensor | None:
    """Return exp(min(logit_scale, log 100)) [heads] in float32, which kernels multiply cosines by.

    What is ``held`` of it is taken where no gradient is wanted.
    """
    if logit_scale is None or (held is not None and not keeps_for_backward(logit_scale)):
        return None if held is None else held.detach()
    return logit_scale.reshape(-1).float().clamp(max=MAX_LOGIT_SCALE).exp()


def _narrowed(positions: Tensor | None) -> Tensor | None:
    """Return positions in int32, which kernels read; those that it cannot hold stay off every grid."""
    if positions is None or positions.dtype == torch.int32:
        return positions
    limits = torch.iinfo(torch.int32)
    return positions.clamp(limits.min, limits.max).to(torch.int32)


def window_attention(
    qkv: Tensor,
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
    head_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend inside (shifted) windows of a grid, over all of its places or over the tokens that are left.

    Two tokens at (y, x) and (y', x') of a frame attend to each other iff (⌊(y - s)/w⌋, ⌊(x - s)/w⌋) agree for window w
    and shift s: Swin's cyclic shift with its mask, where the grid is a multiple of w. Logit of query i and key j:
    ``exp(min(logit_scale, log 100)) · cos(q_i, k_j) + bias_table[(y_i - y_j + w - 1)(2w - 1) + x_i - x_j + w - 1]``
    (Swin V2), or ``scale · ⟨q_i, k_j⟩`` plus the same bias (V1). Softmax over the window's tokens; logits and sums in
    float32 or wider. Window and shift are taken as they are: the caller makes the window no larger than the grid.

    Equivalent to: timm's ``window_partition``, ``WindowAttention`` without its linear layers, and ``window_reverse``.

    Args:
        qkv: [B, H, W, 3C], or rows [R, 3C], by frame, then by position: packed ones, or all places of whole frames
            where ``positions`` is None; the channels are q, k, v, each of ``heads`` equal parts. Under autocast it
            takes the autocast type.
        heads: Number of heads; it divides C.
        grid: (H, W) of the grid that the positions lie on.
        window: w, side of a window.
        shift: s, 0 ≤ s < w.
        bias_table: Position bias [(2w - 1)², heads] float32 (float64 with float64 qkv); in V2 already 16 · sigmoid.
        logit_scale: Logarithm of the scale of each head, ``heads`` elements: cosine attention (V2).
        scale: Scale of the scores (V1); default (C / heads)^-½ where ``logit_scale`` is None.
        positions: Packed: y · W + x of each row [R] int32 (or int64), ascending inside a frame.
        cu_seqlens: Packed: offsets of the frames' rows [F + 1] int32; rows past the last are ignored, come out as zeros
            and get zero gradients.
        head_scale: exp(min(logit_scale, log 100)) [heads] float32, where it is at hand: kernels read it in the place of
            ``logit_scale``, which is given too, where no gradient of that is wanted. It has none itself.
        backend: ``reference``, ``triton``, ``cpp`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        [B, H, W, C] or [R, C], in the order of the input.

    Raises:
        ValueError: An argument has the wrong shape, type or range.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    places = qkv.shape[:-1]
    if positions is None and cu_seqlens is None and qkv.dim() == 2 and min(grid) > 0:
        area = grid[0] * grid[1]
        if qkv.shape[0] % area == 0:
            qkv = qkv.view(qkv.shape[0] // area, *grid, qkv.shape[1])
    qkv = autocast(qkv)
    windows = Windows(heads, grid, window, shift, bias_table, logit_scale, scale, positions, cu_seqlens)
    windows = checked(_OP, qkv, "qkv", 3, windows, head_scale)
    chosen = resolve(_OP, backend, qkv.device.type, qkv.dtype, head_dim=qkv.shape[-1] // (3 * heads))
    with without_autocast(qkv.device.type):
        if chosen == "reference":
            out = reference(qkv, windows)
            return out.reshape(*places, out.shape[-1])
        forward = getattr(torch.ops.deepmsi, f"{_OP}_{chosen}_fwd")
        out, _ = forward(qkv.reshape(-1, qkv.shape[-1]), *operands(windows, head_scale))
        return out.view(*places, out.shape[-1])
