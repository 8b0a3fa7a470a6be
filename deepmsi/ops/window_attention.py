"""The public function of window attention: check, resolve, call."""

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops._arguments import autocast, check, check_floating, shape
from deepmsi.reference.window_attention import window_attention as reference

_OP = "window_attention"


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
        qkv: [B, H, W, 3C], or packed rows [R, 3C] (by frame, then by position); the channels are q, k, v, each of
            ``heads`` equal parts. Under autocast it takes the autocast type.
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
        backend: ``reference``, ``triton``, ``cpp`` or ``auto``; None leaves the choice to ``deepmsi.use_backend``.

    Returns:
        [B, H, W, C] or [R, C], in the order of the input.

    Raises:
        ValueError: An argument has the wrong shape, type or range.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    qkv = autocast(qkv)
    check_floating(qkv, _OP, "qkv")
    height, width = grid
    packed = positions is not None or cu_seqlens is not None
    if packed:
        check(
            positions is not None and cu_seqlens is not None,
            f"{_OP}: packed rows need both positions and cu_seqlens",
        )
        assert positions is not None
        assert cu_seqlens is not None
        check(qkv.dim() == 2, f"{_OP}: qkv must be packed [R, 3C] where positions are given, not {shape(qkv)}")
        check(
            positions.shape == qkv.shape[:1] and positions.dtype in (torch.int32, torch.int64),
            f"{_OP}: positions must be [R] = [{qkv.shape[0]}] int32, not {shape(positions)} {positions.dtype}",
        )
        check(
            cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1 and cu_seqlens.dtype == torch.int32,
            f"{_OP}: cu_seqlens must be [F + 1] int32, not {shape(cu_seqlens)} {cu_seqlens.dtype}",
        )
        check(
            positions.device == qkv.device and cu_seqlens.device == qkv.device,
            f"{_OP}: qkv is on {qkv.device}, positions on {positions.device}, cu_seqlens on {cu_seqlens.device}",
        )
    else:
        check(
            qkv.dim() == 4 and qkv.shape[1] == height and qkv.shape[2] == width,
            f"{_OP}: qkv must be [B, {height}, {width}, 3C] for the grid {height}x{width}, not {shape(qkv)}",
        )
    check(height >= 1 and width >= 1, f"{_OP}: the grid must not be empty, not {height}x{width}")
    check(window >= 1, f"{_OP}: window must be at least 1, not {window}")
    check(0 <= shift < window, f"{_OP}: shift must lie in [0, {window}), not {shift}")
    check(heads >= 1, f"{_OP}: heads must be at least 1, not {heads}")
    check(
        qkv.shape[-1] % (3 * heads) == 0 and qkv.shape[-1] > 0,
        f"{_OP}: {qkv.shape[-1]} channels of qkv are not 3 times a multiple of {heads} heads",
    )
    check(
        bias_table.shape == ((2 * window - 1) ** 2, heads),
        f"{_OP}: bias_table must be [{(2 * window - 1) ** 2}, {heads}] for window {window}, not {shape(bias_table)}",
    )
    check_floating(bias_table, _OP, "bias_table")
    check(
        logit_scale is None or scale is None,
        f"{_OP}: give logit_scale (cosine attention, V2) or scale (V1), not both",
    )
    depth = qkv.shape[-1] // (3 * heads)
    if logit_scale is not None:
        check(
            logit_scale.numel() == heads,
            f"{_OP}: logit_scale must have {heads} elements, not {logit_scale.numel()}",
        )
        logit_scale = logit_scale.reshape(heads)
    if scale is None:
        scale = depth**-0.5

    resolve(_OP, backend, qkv.device.type, qkv.dtype, heads=heads, head_dim=depth, window=window)
    with torch.autocast(qkv.device.type, enabled=False):
        return reference(
            qkv, heads, (height, width), window, shift, bias_table, logit_scale, scale, positions, cu_seqlens
        )
