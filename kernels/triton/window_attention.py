"""Window attention in Triton, forward and backward, dense and packed.

A program takes one head of a chunk of windows of one tile, or of a block of a larger window. It finds a window's rows
by arithmetic, or for packed tokens in a map from places to rows that a small
kernel makes by bisection. Windows are the cyclic ones on the grid padded to whole windows, since they are the fewest:
a slot whose coordinate wraps belongs to another shifted window than one that does not, and those two bits are the
whole mask. Windows of up to 64 slots are one tile; larger ones go by blocks of 64 keys.

Products are of the stored q and k, so that they are exact in 16 bits; norms and scale are applied to the sums. The
backward makes the softmax anew rather than from the saved log-sum-exp, whose rounding is common to a row, while the
gradients of a row's logits must sum to zero. Sums over windows are partial sums of a fixed number of chunks, added up
in fixed order: no atomics.
"""

from typing import Any

import torch
from deepmsi._triton.operands import chunk_of, on_hopper, upcasts
from torch import Tensor

import triton
import triton.language as tl

# Programs of a backward pass that sum over windows. It depends on nothing of the device, so that bits do not either.
_SUMMING_PROGRAMS = 1024
# Programs that attend: enough to fill any device several times, few enough that each reads its bias for many windows.
_ATTENDING_PROGRAMS = 2048
_BLOCK_PLACES = 128
_BLOCK_ROWS = 32
# Slots of a large window whose gradients are folded into entries of the position bias at once.
_FOLDED_SLOTS = 256

NORM_FLOOR = tl.constexpr(1e-12)  # torch.nn.functional.normalize's
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
EMPTY_QUERY = tl.constexpr(-1)
EMPTY_KEY = tl.constexpr(-2)


@triton.jit
def _place_to_row_kernel(
    positions_ptr, offset_ptr, map_ptr, rows, places, STEPS: tl.constexpr, BLOCK_PLACES: tl.constexpr
):
    """Write the row of every place of a frame [F, H·W], or -1: a bisection in the frame's ascending positions."""
    frame = tl.program_id(0)
    place = tl.program_id(1) * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    end = tl.minimum(tl.load(offset_ptr + frame + 1), rows)
    low = tl.zeros([BLOCK_PLACES], tl.int32) + tl.maximum(tl.load(offset_ptr + frame), 0)
    high = tl.zeros([BLOCK_PLACES], tl.int32) + end
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        before = tl.load(positions_ptr + middle, mask=low < high, other=0) < place
        narrower = low < high
        low = tl.where(narrower & before, middle + 1, low)
        high = tl.where(narrower & (before == 0), middle, high)
    found = tl.load(positions_ptr + low, mask=low < end, other=-1) == place
    tl.store(map_ptr + frame.to(tl.int64) * places + place, tl.where(found, low, -1), mask=place < places)


@triton.jit(do_not_specialize=["frames"])
def _zero_tail_kernel(x_ptr, offset_ptr, frames, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Zero the rows of x [R, width] past the last frame's end."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = tl.load(offset_ptr + frames)
    if (tl.program_id(0) + 1) * BLOCK_ROWS > valid:
        for first in range(0, width, BLOCK_WIDTH):
            column = first + tl.arange(0, BLOCK_WIDTH)
            mask = ((row >= valid) & (row < rows))[:, None] & (column < width)[None, :]
            zero = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], x_ptr.dtype.element_ty)
            tl.store(x_ptr + row.to(tl.int64)[:, None] * width + column[None, :], zero, mask=mask)


@triton.jit
def slots(
    map_ptr,
    index,
    first,
    height,
    width,
    shift,
    EMPTY: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Return of BLOCK slots of window `index`: row (int64), shifted window (EMPTY without a token), bias code."""
    down, across = (height + WINDOW - 1) // WINDOW, (width + WINDOW - 1) // WINDOW
    frame, tile = index // (down * across), index % (down * across)
    slot = first + tl.arange(0, BLOCK)
    slot_y, slot_x = slot // WINDOW, slot % WINDOW
    y = tile // across * WINDOW + slot_y + shift
    x = tile % across * WINDOW + slot_x + shift
    wraps_y, wraps_x = y >= down * WINDOW, x >= across * WINDOW
    y = tl.where(wraps_y, y - down * WINDOW, y)
    x = tl.where(wraps_x, x - across * WINDOW, x)
    taken = (slot < WINDOW * WINDOW) & (y < height) & (x < width)
    row = frame.to(tl.int64) * height * width + y * width + x
    if PACKED:
        row = tl.load(map_ptr + row, mask=taken, other=-1).to(tl.int64)
        taken = row >= 0
    kind = tl.where(taken, wraps_y.to(tl.int32) * 2 + wraps_x.to(tl.int32), EMPTY)
    return row, kind, slot_y * (2 * WINDOW - 1) + slot_x


@triton.jit
def entries(WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Return which entry of the position bias stands between two slots of one tile, and whether it has them."""
    slot = tl.arange(0, BLOCK)
    within = slot < WINDOW * WINDOW
    code = slot // WINDOW * (2 * WINDOW - 1) + slot % WINDOW
    return code[:, None] - code[None, :] + 2 * WINDOW * (WINDOW - 1), within[:, None] & within[None, :]


@triton.jit
def _read(x_ptr, row, stride, kind, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Read rows of one head [BLOCK, BLOCK_D], with zeros for empty slots and past DEPTH."""
    column = tl.arange(0, BLOCK_D)
    mask = (kind >= 0)[:, None] & (column < DEPTH)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _write(x_ptr, row, stride, kind, x, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    mask = (kind >= 0)[:, None] & (column < DEPTH)[None, :]
    tl.store(x_ptr + row[:, None] * stride + column[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def inverse_norm(x, COSINE: tl.constexpr):
    """Return 1 / norm of each row, the norm floored.

    In float32 it is rounded correctly, since its error is common to the row.
    """
    if COSINE:
        wide = x.to(tl.float32)
        square = tl.sum(wide * wide, 1)
        if x.dtype != tl.float32:
            return tl.rsqrt(tl.maximum(square, NORM_FLOOR * NORM_FLOOR))
        return tl.div_rn(tl.full(square.shape, 1.0, tl.float32), tl.maximum(tl.sqrt_rn(square), NORM_FLOOR))
    else:
        return tl.full([x.shape[0]], 1.0, tl.float32)


@triton.jit
def _unit(x, inverse, COSINE: tl.constexpr):
    if COSINE:
        x = (x.to(tl.float32) * inverse[:, None]).to(x.dtype)
    return x


@triton.jit
def _cosines(q, k, q_inverse, k_inverse, COSINE: tl.constexpr):
    """Return q k^T in float32, over the norms for cosine attention."""
    c = tl.dot(q, tl.trans(k), input_precision="ieee")
    if COSINE:
        c = c * q_inverse[:, None] * k_inverse[None, :]
    return c


@triton.jit
def _logits(
    c, factor, bias_ptr, query_kind, query_code, key_kind, key_code, WINDOW: tl.constexpr, MASKED: tl.constexpr
):
    """Return scaled products plus the position bias, for exp2; -inf where query and key do not see each other."""
    index = query_code[:, None] - key_code[None, :] + 2 * WINDOW * (WINDOW - 1)
    if MASKED:
        seen = query_kind[:, None] == key_kind[None, :]
        return c * (factor * LOG2_E) + tl.load(bias_ptr + index, mask=seen, other=float("-inf"))
    return c * (factor * LOG2_E) + tl.load(bias_ptr + index)


@triton.jit
def _seen(logits, kind, MASKED: tl.constexpr):
    """Put -inf where two slots of a window of one tile do not see each other."""
    if MASKED:
        seen = kind[:, None] == tl.where(kind >= 0, kind, EMPTY_KEY)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
    return logits


@triton.jit
def tile_logits(q, k, factor, bias, kind, COSINE: tl.constexpr, MASKED: tl.constexpr):
    """Return the logits of a window of one tile, whose factor and position bias are in powers of two, for exp2."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if COSINE:
        logits = logits * (inverse_norm(q, COSINE) * factor)[:, None] * inverse_norm(k, COSINE)[None, :] + bias
    else:
        logits = logits * factor + bias
    return _seen(logits, kind, MASKED)


@triton.jit
def factor_of(head_scale_ptr, scale, head, COSINE: tl.constexpr):
    if COSINE:
        return tl.load(head_scale_ptr + head)
    else:
        return scale


@triton.jit
def _top(old, logits):
    """Return the rows' maxima so far and what to take from logits: 0 where a row sees nothing, to make no NaN."""
    top = tl.maximum(old, tl.max(logits, 1))
    return top, tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _through_norm(gradient, along, unit, inverse, COSINE: tl.constexpr):
    """Take the gradient of x / |x| to that of x; `along` is its product with the unit rows."""
    if COSINE:
        # At the floor the norm is a constant, so nothing is taken away along x.
        inward = tl.where(inverse < 0.9999 / NORM_FLOOR, along, 0.0)
        gradient = (gradient - unit.to(tl.float32) * inward[:, None]) * inverse[:, None]
    return gradient


@triton.jit(do_not_specialize=["windows", "chunks"])
def _forward_tile_kernel(
    qkv_ptr,
    stride_row,
    bias_ptr,
    head_scale_ptr,
    map_ptr,
    out_ptr,
    lse_ptr,
    scale,
    windows,
    chunks,
    heads,
    height,
    width,
    shift,
    DEPTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend: softmax(factor · cos(q, k) + bias) v for one head of a chunk of windows of one tile each."""
    head = tl.program_id(0) % heads
    chunk = tl.program_id(0) // heads
    channels = heads * DEPTH
    qkv_ptr += head * DEPTH
    bias_ptr += head * (2 * WINDOW - 1) * (2 * WINDOW - 1)
    factor = factor_of(head_scale_ptr, scale, head, COSINE) * LOG2_E
    entry, within = entries(WINDOW, BLOCK)
    bias = tl.load(bias_ptr + entry, mask=within, other=0.0)
    begin, end = chunk_of(windows, chunk, chunks)
    for index in range(begin, end):
        row, kind, _ = slots(map_ptr, index, 0, height, width, shift, EMPTY_QUERY, WINDOW, BLOCK, PACKED)
        q = _read(qkv_ptr, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
        k = _read(qkv_ptr + channels, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
        v = _read(qkv_ptr + 2 * channels, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
        logits = tile_logits(q, k, factor, bias, kind, COSINE, MASKED)
        top, shown = _top(tl.full([BLOCK], float("-inf"), tl.float32), logits)
        p = tl.exp2(logits - shown[:, None])
        total = tl.sum(p, 1)
        total = tl.where(total > 0, total, 1.0)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1.0 / total)[:, None]
        _write(out_ptr + head * DEPTH, row, channels, kind, out, DEPTH, BLOCK_D)
        tl.store(lse_ptr + row * heads + head, (top + tl.log2(total)) * LN_2, mask=kind >= 0)


@triton.jit
def _forward_kernel(
    qkv_ptr,
    stride_row,
    bias_ptr,
    head_scale_ptr,
    map_ptr,
    out_ptr,
    lse_ptr,
    scale,
    heads,
    height,
    width,
    shift,
    DEPTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend: softmax(factor · cos(q, k) + bias) v for one block of queries of one head of one large window."""
    SLOTS: tl.constexpr = WINDOW * WINDOW
    BLOCKS: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % BLOCKS
    index = tl.program_id(0) // (heads * BLOCKS)
    channels = heads * DEPTH
    qkv_ptr += head * DEPTH
    bias_ptr += head * (2 * WINDOW - 1) * (2 * WINDOW - 1)
    factor = factor_of(head_scale_ptr, scale, head, COSINE)

    row, kind, code = slots(map_ptr, index, block * BLOCK, height, width, shift, EMPTY_QUERY, WINDOW, BLOCK, PACKED)
    q = _read(qkv_ptr, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
    q_inverse = inverse_norm(q, COSINE)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first in range(0, SLOTS, BLOCK):
        key_row, key_kind, key_code = slots(
            map_ptr, index, first, height, width, shift, EMPTY_KEY, WINDOW, BLOCK, PACKED
        )
        k = _read(qkv_ptr + channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
        v = _read(qkv_ptr + 2 * channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
        c = _cosines(q, k, q_inverse, inverse_norm(k, COSINE), COSINE)
        logits = _logits(c, factor, bias_ptr, kind, code, key_kind, key_code, WINDOW, MASKED)
        higher, shown = _top(top, logits)
        p = tl.exp2(logits - shown[:, None])
        shrink = tl.exp2(top - shown)
        total = total * shrink + tl.sum(p, 1)
        result = tl.dot(p.to(v.dtype), v, result * shrink[:, None], input_precision="ieee")
        top = higher
    total = tl.where(total > 0, total, 1.0)
    _write(out_ptr + head * DEPTH, row, channels, kind, result * (1.0 / total)[:, None], DEPTH, BLOCK_D)
    tl.store(lse_ptr + row * heads + head, (top + tl.log2(total)) * LN_2, mask=kind >= 0)


@triton.jit(do_not_specialize=["windows", "chunks"])
def _backward_tile_kernel(
    grad_out_ptr,
    qkv_ptr,
    stride_row,
    bias_ptr,
    head_scale_ptr,
    map_ptr,
    grad_qkv_ptr,
    grad_logits_ptr,
    grad_scale_ptr,
    scale,
    windows,
    chunks,
    heads,
    height,
    width,
    shift,
    DEPTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Backward of a chunk of windows of one tile each; its sum of the logits' gradients goes to [chunks, heads]."""
    head = tl.program_id(0) % heads
    chunk = tl.program_id(0) // heads
    channels = heads * DEPTH
    qkv_ptr += head * DEPTH
    grad_out_ptr += head * DEPTH
    grad_qkv_ptr += head * DEPTH
    bias_ptr += head * (2 * WINDOW - 1) * (2 * WINDOW - 1)
    factor = factor_of(head_scale_ptr, scale, head, COSINE)
    entry, within = entries(WINDOW, BLOCK)
    bias = tl.load(bias_ptr + entry, mask=within, other=0.0)
    grad_logits = tl.zeros([BLOCK, BLOCK], tl.float32)
    grad_scale = tl.zeros([BLOCK], tl.float32)
    begin, end = chunk_of(windows, chunk, chunks)
    for index in range(begin, end):
        row, kind, _ = slots(map_ptr, index, 0, height, width, shift, EMPTY_QUERY, WINDOW, BLOCK, PACKED)
        q = _read(qkv_ptr, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
        k = _read(qkv_ptr + channels, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
        v = _read(qkv_ptr + 2 * channels, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
        grad_out = _read(grad_out_ptr, row, channels, kind, DEPTH, BLOCK_D, UPCAST)
        q_inverse, k_inverse = inverse_norm(q, COSINE), inverse_norm(k, COSINE)
        c = _cosines(q, k, q_inverse, k_inverse, COSINE)
        logits = _seen(c * (factor * LOG2_E) + bias, kind, MASKED)
        _, shown = _top(tl.full([BLOCK], float("-inf"), tl.float32), logits)
        p = tl.exp2(logits - shown[:, None])
        total = tl.sum(p, 1)
        p = p * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
        grad_v = tl.dot(tl.trans(p.to(v.dtype)), grad_out, input_precision="ieee")
        _write(grad_qkv_ptr + 2 * channels, row, 3 * channels, kind, grad_v, DEPTH, BLOCK_D)

        grad_p = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        d = p * (grad_p - tl.sum(p * grad_p, 1)[:, None])
        grad_logits += d
        # From the cosines, not from the product below: that of rounded numbers is off by hundredths of their sum.
        along_q = tl.sum(d * c, 1)
        grad_scale += along_q
        q, k = _unit(q, q_inverse, COSINE), _unit(k, k_inverse, COSINE)
        d = d.to(q.dtype)
        grad_q = tl.dot(d, k, input_precision="ieee")
        grad_q = _through_norm(grad_q, along_q, q, q_inverse, COSINE) * factor
        _write(grad_qkv_ptr, row, 3 * channels, kind, grad_q, DEPTH, BLOCK_D)
        grad_k = tl.dot(tl.trans(d), q, input_precision="ieee")
        along_k = tl.sum(grad_k * k.to(tl.float32), 1)
        grad_k = _through_norm(grad_k, along_k, k, k_inverse, COSINE) * factor
        _write(grad_qkv_ptr + channels, row, 3 * channels, kind, grad_k, DEPTH, BLOCK_D)
    offs = tl.arange(0, BLOCK)
    grad_logits_ptr += tl.program_id(0).to(tl.int64) * BLOCK * BLOCK
    tl.store(grad_logits_ptr + offs[:, None] * BLOCK + offs[None, :], grad_logits)
    tl.store(grad_scale_ptr + tl.program_id(0), tl.sum(grad_scale))


@triton.jit
def _backward_queries_kernel(
    grad_out_ptr,
    qkv_ptr,
    stride_row,
    bias_ptr,
    head_scale_ptr,
    map_ptr,
    grad_qkv_ptr,
    state_ptr,
    grad_scale_ptr,
    scale,
    heads,
    height,
    width,
    shift,
    DEPTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of one block of queries of a large window; `state` [R, heads, 3]: maximum, 1 / sum, mean gradient."""
    SLOTS: tl.constexpr = WINDOW * WINDOW
    BLOCKS: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % BLOCKS
    index = tl.program_id(0) // (heads * BLOCKS)
    channels = heads * DEPTH
    qkv_ptr += head * DEPTH
    bias_ptr += head * (2 * WINDOW - 1) * (2 * WINDOW - 1)
    factor = factor_of(head_scale_ptr, scale, head, COSINE)

    row, kind, code = slots(map_ptr, index, block * BLOCK, height, width, shift, EMPTY_QUERY, WINDOW, BLOCK, PACKED)
    q = _read(qkv_ptr, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
    grad_out = _read(grad_out_ptr + head * DEPTH, row, channels, kind, DEPTH, BLOCK_D, UPCAST)
    q_inverse = inverse_norm(q, COSINE)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for first in range(0, SLOTS, BLOCK):
        key_row, key_kind, key_code = slots(
            map_ptr, index, first, height, width, shift, EMPTY_KEY, WINDOW, BLOCK, PACKED
        )
        k = _read(qkv_ptr + channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
        v = _read(qkv_ptr + 2 * channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
        c = _cosines(q, k, q_inverse, inverse_norm(k, COSINE), COSINE)
        logits = _logits(c, factor, bias_ptr, kind, code, key_kind, key_code, WINDOW, MASKED)
        higher, shown = _top(top, logits)
        p = tl.exp2(logits - shown[:, None])
        shrink = tl.exp2(top - shown)
        total = total * shrink + tl.sum(p, 1)
        mean = mean * shrink + tl.sum(p * tl.dot(grad_out, tl.trans(v), input_precision="ieee"), 1)
        top = higher
    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    mean *= inverse
    shown = tl.where(top == float("-inf"), 0.0, top)
    state_ptr += (row * heads + head) * 3
    tl.store(state_ptr, shown, mask=kind >= 0)
    tl.store(state_ptr + 1, inverse, mask=kind >= 0)
    tl.store(state_ptr + 2, mean, mask=kind >= 0)

    along = tl.zeros([BLOCK], tl.float32)
    grad_q = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first in range(0, SLOTS, BLOCK):
        key_row, key_kind, key_code = slots(
            map_ptr, index, first, height, width, shift, EMPTY_KEY, WINDOW, BLOCK, PACKED
        )
        k = _read(qkv_ptr + channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
        v = _read(qkv_ptr + 2 * channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
        k_inverse = inverse_norm(k, COSINE)
        c = _cosines(q, k, q_inverse, k_inverse, COSINE)
        logits = _logits(c, factor, bias_ptr, kind, code, key_kind, key_code, WINDOW, MASKED)
        p = tl.exp2(logits - shown[:, None]) * inverse[:, None]
        d = p * (tl.dot(grad_out, tl.trans(v), input_precision="ieee") - mean[:, None])
        along += tl.sum(d * c, 1)
        grad_q += tl.dot(d.to(k.dtype), _unit(k, k_inverse, COSINE), input_precision="ieee")
    tl.store(grad_scale_ptr + tl.program_id(0), tl.sum(along))
    unit = q.to(tl.float32) * q_inverse[:, None]
    grad_q = _through_norm(grad_q, along, unit, q_inverse, COSINE) * factor
    _write(grad_qkv_ptr + head * DEPTH, row, 3 * channels, kind, grad_q, DEPTH, BLOCK_D)


@triton.jit
def _gradient_of_logits(logits, state_ptr, row, kind, heads, grad_out, v):
    """Return softmax and gradient of a block of logits, from the state that the queries' kernel left."""
    at = (row * heads) * 3
    top = tl.load(state_ptr + at, mask=kind >= 0, other=0.0)
    inverse = tl.load(state_ptr + at + 1, mask=kind >= 0, other=0.0)
    mean = tl.load(state_ptr + at + 2, mask=kind >= 0, other=0.0)
    p = tl.exp2(logits - top[:, None]) * inverse[:, None]
    return p, p * (tl.dot(grad_out, tl.trans(v), input_precision="ieee") - mean[:, None])


@triton.jit
def _backward_keys_kernel(
    grad_out_ptr,
    qkv_ptr,
    stride_row,
    bias_ptr,
    head_scale_ptr,
    map_ptr,
    grad_qkv_ptr,
    state_ptr,
    scale,
    heads,
    height,
    width,
    shift,
    DEPTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of one block of keys and values of a large window."""
    SLOTS: tl.constexpr = WINDOW * WINDOW
    BLOCKS: tl.constexpr = (SLOTS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % BLOCKS
    index = tl.program_id(0) // (heads * BLOCKS)
    channels = heads * DEPTH
    qkv_ptr += head * DEPTH
    grad_out_ptr += head * DEPTH
    grad_qkv_ptr += head * DEPTH
    bias_ptr += head * (2 * WINDOW - 1) * (2 * WINDOW - 1)
    factor = factor_of(head_scale_ptr, scale, head, COSINE)

    key_row, key_kind, key_code = slots(
        map_ptr, index, block * BLOCK, height, width, shift, EMPTY_KEY, WINDOW, BLOCK, PACKED
    )
    k = _read(qkv_ptr + channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
    v = _read(qkv_ptr + 2 * channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
    k_inverse = inverse_norm(k, COSINE)
    along = tl.zeros([BLOCK], tl.float32)
    grad_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first in range(0, SLOTS, BLOCK):
        row, kind, code = slots(map_ptr, index, first, height, width, shift, EMPTY_QUERY, WINDOW, BLOCK, PACKED)
        q = _read(qkv_ptr, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
        grad_out = _read(grad_out_ptr, row, channels, kind, DEPTH, BLOCK_D, UPCAST)
        q_inverse = inverse_norm(q, COSINE)
        c = _cosines(q, k, q_inverse, k_inverse, COSINE)
        logits = _logits(c, factor, bias_ptr, kind, code, key_kind, key_code, WINDOW, MASKED)
        p, d = _gradient_of_logits(logits, state_ptr + head * 3, row, kind, heads, grad_out, v)
        grad_v += tl.dot(tl.trans(p.to(v.dtype)), grad_out, input_precision="ieee")
        along += tl.sum(d * c, 0)
        grad_k += tl.dot(tl.trans(d.to(q.dtype)), _unit(q, q_inverse, COSINE), input_precision="ieee")
    unit = k.to(tl.float32) * k_inverse[:, None]
    grad_k = _through_norm(grad_k, along, unit, k_inverse, COSINE) * factor
    _write(grad_qkv_ptr + channels, key_row, 3 * channels, key_kind, grad_k, DEPTH, BLOCK_D)
    _write(grad_qkv_ptr + 2 * channels, key_row, 3 * channels, key_kind, grad_v, DEPTH, BLOCK_D)


@triton.jit(do_not_specialize=["windows", "chunks"])
def _backward_logits_kernel(
    grad_out_ptr,
    qkv_ptr,
    stride_row,
    bias_ptr,
    head_scale_ptr,
    map_ptr,
    grad_logits_ptr,
    state_ptr,
    scale,
    windows,
    chunks,
    heads,
    height,
    width,
    shift,
    DEPTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sum logits' gradients of a pair of blocks over a chunk of large windows: [chunks, heads, padded, padded]."""
    BLOCKS: tl.constexpr = (WINDOW * WINDOW + BLOCK - 1) // BLOCK
    pair = tl.program_id(0) % (BLOCKS * BLOCKS)
    head = tl.program_id(0) // (BLOCKS * BLOCKS) % heads
    chunk = tl.program_id(0) // (BLOCKS * BLOCKS * heads)
    from_query, from_key = pair // BLOCKS * BLOCK, pair % BLOCKS * BLOCK
    channels = heads * DEPTH
    qkv_ptr += head * DEPTH
    bias_ptr += head * (2 * WINDOW - 1) * (2 * WINDOW - 1)
    factor = factor_of(head_scale_ptr, scale, head, COSINE)
    grad_logits = tl.zeros([BLOCK, BLOCK], tl.float32)
    begin, end = chunk_of(windows, chunk, chunks)
    for index in range(begin, end):
        row, kind, code = slots(map_ptr, index, from_query, height, width, shift, EMPTY_QUERY, WINDOW, BLOCK, PACKED)
        key_row, key_kind, key_code = slots(
            map_ptr, index, from_key, height, width, shift, EMPTY_KEY, WINDOW, BLOCK, PACKED
        )
        q = _read(qkv_ptr, row, stride_row, kind, DEPTH, BLOCK_D, UPCAST)
        k = _read(qkv_ptr + channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
        v = _read(qkv_ptr + 2 * channels, key_row, stride_row, key_kind, DEPTH, BLOCK_D, UPCAST)
        grad_out = _read(grad_out_ptr + head * DEPTH, row, channels, kind, DEPTH, BLOCK_D, UPCAST)
        c = _cosines(q, k, inverse_norm(q, COSINE), inverse_norm(k, COSINE), COSINE)
        logits = _logits(c, factor, bias_ptr, kind, code, key_kind, key_code, WINDOW, MASKED)
        _, d = _gradient_of_logits(logits, state_ptr + head * 3, row, kind, heads, grad_out, v)
        grad_logits += d
    offs = tl.arange(0, BLOCK)
    grad_logits_ptr += (chunk * heads + head).to(tl.int64) * (BLOCKS * BLOCK) * (BLOCKS * BLOCK)
    at = (from_query + offs)[:, None] * (BLOCKS * BLOCK) + (from_key + offs)[None, :]
    tl.store(grad_logits_ptr + at, grad_logits)


@triton.jit
def _fold_kernel(
    grad_logits_ptr,
    grad_bias_ptr,
    heads,
    WINDOW: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Sum gradients of logits [heads, PADDED, PADDED] over the pairs of each entry of one row of a head's table."""
    down, head = tl.program_id(0) - (WINDOW - 1), tl.program_id(1)
    entry = tl.arange(0, BLOCK_ENTRIES)
    total = tl.zeros([BLOCK_ENTRIES], tl.float32)
    for first in range(0, WINDOW * WINDOW, BLOCK_SLOTS):
        key = first + tl.arange(0, BLOCK_SLOTS)
        y = key // WINDOW + down
        x = (key % WINDOW)[None, :] + entry[:, None] - (WINDOW - 1)
        mask = ((key < WINDOW * WINDOW) & (y >= 0) & (y < WINDOW))[None, :] & (x >= 0) & (x < WINDOW)
        at = ((head * PADDED + y * WINDOW)[None, :] + x) * PADDED + key[None, :]
        total += tl.sum(tl.load(grad_logits_ptr + at, mask=mask, other=0.0), 1)
    at = (tl.program_id(0) * (2 * WINDOW - 1) + entry) * heads + head
    tl.store(grad_bias_ptr + at, total, mask=entry < 2 * WINDOW - 1)


class Windows:
    """Sizes, compile-time constants and the map of places of a call, whose products are in `dtype`."""

    def __init__(
        self,
        rows: int,
        channels: int,
        dtype: torch.dtype,
        bias_table: Tensor,
        head_scale: Tensor | None,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        heads: int,
        height: int,
        width: int,
        window: int,
        shift: int,
    ) -> None:
        self.rows, self.dtype = rows, dtype
        depth, tile = channels // heads, window * window
        wide = max(16, triton.next_power_of_2(depth))
        # What a program holds of 64 slots of wide heads does not fit its registers where a window has several blocks,
        # nor shared memory where heads of 128 are in float32.
        most = 32 if (wide > 32 and tile > 64) or (wide > 64 and dtype == torch.float32) else 64
        self.block = min(most, max(16, triton.next_power_of_2(tile)))
        self.blocks = triton.cdiv(tile, self.block)
        self.padded = self.blocks * self.block
        self.heads, self.table = heads, bias_table
        self.head_scale = head_scale.contiguous() if head_scale is not None else None
        self.cu_seqlens = cu_seqlens.contiguous() if cu_seqlens is not None else None
        self.frames = self.rows // (height * width) if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.windows = self.frames * triton.cdiv(height, window) * triton.cdiv(width, window)
        full = self.padded == tile and height % window == 0 and width % window == 0
        self.constants: dict[str, Any] = {
            "DEPTH": depth,
            "WINDOW": window,
            "BLOCK": self.block,
            "BLOCK_D": wide,
            "COSINE": head_scale is not None,
            "PACKED": positions is not None,
            # Whether some slots of a window do not see each other.
            "MASKED": positions is not None or shift > 0 or not full,
            "UPCAST": upcasts(dtype),
        }
        self.map: Tensor | None = None
        if positions is not None and self.frames:
            places = height * width
            self.map = positions.new_empty((self.frames, places))
            _place_to_row_kernel[(self.frames, triton.cdiv(places, _BLOCK_PLACES))](
                positions.contiguous(),
                self.cu_seqlens,
                self.map,
                self.rows,
                places,
                STEPS=places.bit_length() + 1,
                BLOCK_PLACES=_BLOCK_PLACES,
                num_warps=4,
            )

    def bias_by_heads(self) -> Tensor:
        """Return the table by heads [heads, (2w - 1)²], in powers of two."""
        scaled = self.table.new_empty((self.heads, self.table.shape[0]))
        return torch.mul(self.table.t(), LOG2_E.value, out=scaled)

    @property
    def warps(self) -> int:
        """Return the warps of a program: one for each 16 rows, since more would repeat the products on tensor cores.

        float32, whose products hold their operands, is spread, the more so in wide heads.
        """
        spread = 1
        if self.dtype == torch.float32:
            spread = 4 if self.constants["BLOCK_D"] > 32 else 2
        return spread * self.block // 16

    @property
    def stages(self) -> int:
        """Return of how many windows a program holds the rows: two, so that the next ones come while it computes.

        Of windows of 4 or 8, which fill their tile. In float32, with heads of more than 32 channels, where tiles have
        empty slots and on other cards than Hopper's, registers would not do for it.
        """
        filled = self.blocks == 1 and self.padded == self.constants["WINDOW"] ** 2
        narrow = self.dtype != torch.float32 and self.constants["BLOCK_D"] <= 32
        return 2 if filled and narrow and on_hopper() else 1

    def zero_tail(self, *outputs: Tensor) -> None:
        """Zero the rows that are no frame's."""
        if self.cu_seqlens is None or not self.rows:
            return
        for x in outputs:
            block = min(128, triton.next_power_of_2(x.shape[1]))
            _zero_tail_kernel[(triton.cdiv(self.rows, _BLOCK_ROWS),)](
                x, self.cu_seqlens, self.frames, self.rows, x.shape[1], BLOCK_ROWS=_BLOCK_ROWS, BLOCK_WIDTH=block
            )


def window_attention_fwd(
    qkv: Tensor,
    bias_table: Tensor,
    head_scale: Tensor | None,
    scale: float,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    height: int,
    width: int,
    window: int,
    shift: int,
) -> tuple[Tensor, Tensor]:
    """Return output [R, C] and log-sum-exp [R, heads] float32. Positions are trusted: they ascend in each frame."""
    with torch.cuda.device_of(qkv):
        qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
        rows, channels = qkv.shape[0], qkv.shape[1] // 3
        layout = (positions, cu_seqlens, heads, height, width, window, shift)
        call = Windows(rows, channels, qkv.dtype, bias_table, head_scale, *layout)
        out = qkv.new_empty((rows, channels))
        lse = qkv.new_empty((rows, heads), dtype=torch.float32)
        call.zero_tail(out, lse)
        if not call.windows:
            return out, lse
        given = (qkv, qkv.stride(0), call.bias_by_heads(), call.head_scale, call.map, out, lse, scale)
        sizes = (heads, height, width, shift)
        options = {**call.constants, "num_warps": call.warps, "num_stages": call.stages}
        if call.blocks == 1:
            chunks = min(call.windows, triton.cdiv(_ATTENDING_PROGRAMS, heads))
            _forward_tile_kernel[(chunks * heads,)](*given, call.windows, chunks, *sizes, **options)
        else:
            _forward_kernel[(call.windows * call.blocks * heads,)](*given, *sizes, **options)
        return out, lse


def window_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_table: Tensor,
    head_scale: Tensor | None,
    scale: float,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    height: int,
    width: int,
    window: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of qkv [R, 3C], bias_table [(2w - 1)², heads] and head_scale [heads] (zeros without it)."""
    with torch.cuda.device_of(qkv):
        qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
        rows, channels = qkv.shape[0], qkv.shape[1] // 3
        layout = (positions, cu_seqlens, heads, height, width, window, shift)
        call = Windows(rows, channels, qkv.dtype, bias_table, head_scale, *layout)
        grad_qkv = qkv.new_empty((rows, 3 * channels))
        call.zero_tail(grad_qkv)
        if not call.windows:
            return grad_qkv, torch.zeros_like(bias_table), bias_table.new_zeros(heads)
        programs = heads * call.blocks * call.blocks
        chunks = min(call.windows, triton.cdiv(_SUMMING_PROGRAMS, programs))
        grad_logits = bias_table.new_empty((chunks, heads * call.padded * call.padded))
        shared = (grad_out.contiguous(), qkv, qkv.stride(0), call.bias_by_heads(), call.head_scale, call.map)
        sizes = (heads, height, width, shift)
        options = {**call.constants, "num_warps": call.warps, "num_stages": call.stages}
        if call.blocks == 1:
            grad_scale = bias_table.new_empty((chunks, heads))
            _backward_tile_kernel[(chunks * heads,)](
                *shared, grad_qkv, grad_logits, grad_scale, scale, call.windows, chunks, *sizes, **options
            )
        else:
            state = bias_table.new_empty((rows, heads, 3))
            grad_scale = bias_table.new_empty((call.windows * call.blocks, heads))
            grid = (call.windows * call.blocks * heads,)
            _backward_queries_kernel[grid](*shared, grad_qkv, state, grad_scale, scale, *sizes, **options)
            _backward_keys_kernel[grid](*shared, grad_qkv, state, scale, *sizes, **options)
            _backward_logits_kernel[(chunks * programs,)](
                *shared, grad_logits, state, scale, call.windows, chunks, *sizes, **options
            )
        grad_bias = torch.empty_like(bias_table, memory_format=torch.contiguous_format)
        _fold_kernel[(2 * window - 1, heads)](
            grad_logits.sum(0),
            grad_bias,
            heads,
            WINDOW=window,
            PADDED=call.padded,
            BLOCK_ENTRIES=triton.next_power_of_2(2 * window - 1),
            BLOCK_SLOTS=min(_FOLDED_SLOTS, triton.next_power_of_2(window * window)),
        )
        return grad_qkv, grad_bias, grad_scale.sum(0) if head_scale is not None else bias_table.new_zeros(heads)
