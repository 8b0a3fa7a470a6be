"""Visual sequence compression in Triton: the forward and the backward of Eq. 1 to 3, dense and packed.

Forward: norms and column sums by parts of a frame; the fused guide; scores; then, a program a frame, relevance, the
k-th score by bisection on order-preserving bits and an order-preserving compaction by `cumsum`; the nearest relevant
row by tiles whose similarities are never stored; merges as products of a tile of weights with the rows. The backward
is six such passes. Sums have an order that depends on shapes alone, and nothing is added up by atomics. Steps that
read what another wrote are launches of their own: a program never reads back what it stored.

Products of 16-bit rows are exact in the float32 that sums them; float32 products are true float32.
"""

from typing import Any

import torch
from deepmsi._triton.operands import upcasts
from torch import Tensor

import triton
import triton.language as tl

_ROWS = 32  # rows of a tile
_MOST_PARTS = 64  # programs that share a frame

NORM_FLOOR = tl.constexpr(1e-6)
DEVIATION_FLOOR = tl.constexpr(1e-3)


@triton.jit
def _frame(cu_ptr, frame, length, rows):
    """Return the first row of a frame and the one past its last, kept within the rows."""
    if cu_ptr is None:
        first = frame * length
        last = first + length
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + frame), 0), rows)
        last = tl.minimum(tl.maximum(tl.load(cu_ptr + frame + 1), first), rows)
    return first, last


@triton.jit
def _share(first, last, part, parts):
    """Return the rows of one part of a frame."""
    each = (last - first + parts - 1) // parts
    start = first + part * each
    return start, tl.minimum(start + each, last)


@triton.jit
def _load(x_ptr, row, channel, valid, channels):
    """Load x[row, channel], zero where a row is not valid or a channel is past the end."""
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    return tl.load(x_ptr + place, mask=valid[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def _order_key(score):
    """Return unsigned integers in the order of the numbers; -0 and +0 are equal, NaN too has its place."""
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit(do_not_specialize=["rows", "parts"])
def _statistics_kernel(
    x_ptr, cu_ptr, norm_ptr, partial_ptr, length, rows, channels, parts, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Write floored norms, and the column sums of one part of a frame into partial [B, parts, C]."""
    pid = tl.program_id(0)
    first, last = _frame(cu_ptr, pid // parts, length, rows)
    start, stop = _share(first, last, pid % parts, parts)
    for r0 in range(start, stop, ROWS):
        row = r0 + tl.arange(0, ROWS)
        square = tl.zeros([ROWS], tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            x = _load(x_ptr, row, c0 + tl.arange(0, BLOCK_C), row < stop, channels).to(tl.float32)
            square += tl.sum(x * x, 1)
        tl.store(norm_ptr + row, tl.maximum(tl.sqrt_rn(square), NORM_FLOOR), mask=row < stop)
    for c0 in range(0, channels, BLOCK_C):
        channel = c0 + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_C], tl.float32)
        for r0 in range(start, stop, ROWS):
            row = r0 + tl.arange(0, ROWS)
            total += tl.sum(_load(x_ptr, row, channel, row < stop, channels).to(tl.float32), 0)
        tl.store(partial_ptr + pid.to(tl.int64) * channels + channel, total, mask=channel < channels)


@triton.jit(do_not_specialize=["rows", "parts"])
def _fuse_kernel(
    cu_ptr, guide_ptr, weight_ptr, partial_ptr, mean_ptr, fused_ptr, fused_norm_ptr, length, rows, channels, parts,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write v, m = λ g + (1 - λ) v and the floored norm of m, a program a frame."""
    b = tl.program_id(0)
    first, last = _frame(cu_ptr, b, length, rows)
    weight = tl.load(weight_ptr)
    square = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        channel = c0 + tl.arange(0, BLOCK_C)
        valid = channel < channels
        total = tl.zeros([BLOCK_C], tl.float32)
        for part in range(parts):
            total += tl.load(partial_ptr + (b.to(tl.int64) * parts + part) * channels + channel, mask=valid, other=0.0)
        mean = total / tl.maximum(last - first, 1).to(tl.float32)
        place = b.to(tl.int64) * channels + channel
        fused = weight * tl.load(guide_ptr + place, mask=valid, other=0.0) + (1.0 - weight) * mean
        tl.store(mean_ptr + place, mean, mask=valid)
        tl.store(fused_ptr + place, fused, mask=valid)
        square += tl.where(valid, fused * fused, 0.0)
    tl.store(fused_norm_ptr + b, tl.maximum(tl.sqrt_rn(tl.sum(square)), NORM_FLOOR))


@triton.jit(do_not_specialize=["rows", "parts"])
def _score_kernel(
    x_ptr, cu_ptr, fused_ptr, fused_norm_ptr, norm_ptr, score_ptr, length, rows, channels, parts,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write s_n = cos(m, x_n) of one part of a frame."""
    pid = tl.program_id(0)
    b = pid // parts
    first, last = _frame(cu_ptr, b, length, rows)
    start, stop = _share(first, last, pid % parts, parts)
    fused_norm = tl.load(fused_norm_ptr + b)
    for r0 in range(start, stop, ROWS):
        row = r0 + tl.arange(0, ROWS)
        product = tl.zeros([ROWS], tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            channel = c0 + tl.arange(0, BLOCK_C)
            fused = tl.load(fused_ptr + b.to(tl.int64) * channels + channel, mask=channel < channels, other=0.0)
            x = _load(x_ptr, row, channel, row < stop, channels).to(tl.float32)
            product += tl.sum(x * fused[None, :], 1)
        norm = tl.load(norm_ptr + row, mask=row < stop, other=1.0)
        tl.store(score_ptr + row, product / (fused_norm * norm), mask=row < stop)


@triton.jit
def _scores(score_ptr, row, last):
    return tl.load(score_ptr + row, mask=row < last, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def _select_kernel(
    cu_ptr, score_ptr, relevance_ptr, order_ptr, count_ptr, length, rows, temperature, threshold, keep, capacity,
    min_keep, STANDARDIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a frame's relevance, and its rows in `order`: first the kept ones, then the others, each ascending."""
    b = tl.program_id(0)
    first, last = _frame(cu_ptr, b, length, rows)
    size = last - first
    count = tl.maximum(size, 1).to(tl.float32)
    slot = tl.arange(0, BLOCK_N)
    centre = 0.0
    scale = 1.0
    if STANDARDIZE:
        total = tl.zeros([BLOCK_N], tl.float32)
        for n0 in range(first, last, BLOCK_N):
            total += _scores(score_ptr, n0 + slot, last)
        centre = tl.sum(total) / count
        total = tl.zeros([BLOCK_N], tl.float32)
        for n0 in range(first, last, BLOCK_N):
            away = tl.where(n0 + slot < last, _scores(score_ptr, n0 + slot, last) - centre, 0.0)
            total += away * away
        scale = tl.maximum(tl.sqrt_rn(tl.sum(total) / count), DEVIATION_FLOOR)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for n0 in range(first, last, BLOCK_N):
        value = (_scores(score_ptr, n0 + slot, last) - centre) / scale / temperature
        highest = tl.maximum(highest, tl.where(n0 + slot < last, value, float("-inf")))
    top = tl.max(highest)
    total = tl.zeros([BLOCK_N], tl.float32)
    for n0 in range(first, last, BLOCK_N):
        value = (_scores(score_ptr, n0 + slot, last) - centre) / scale / temperature
        total += tl.where(n0 + slot < last, tl.exp(value - top), 0.0)
    exponents = tl.sum(total)
    above = tl.zeros([BLOCK_N], tl.int32)
    for n0 in range(first, last, BLOCK_N):
        value = (_scores(score_ptr, n0 + slot, last) - centre) / scale / temperature
        # Equal scores make exactly 1, which may be the threshold.
        relevance = tl.div_rn(count * tl.exp(value - top), exponents)
        tl.store(relevance_ptr + n0 + slot, relevance, mask=n0 + slot < last)
        above += ((relevance >= threshold) & (n0 + slot < last)).to(tl.int32)

    kept = tl.maximum(tl.sum(above), min_keep)
    if keep is not None:
        kept = keep
    kept = tl.minimum(kept, size)
    if capacity is not None:
        kept = tl.minimum(kept, capacity)

    # The kept-th highest key is the largest one that at least `kept` keys reach: bit by bit from the top.
    limit = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = limit | bit
        reach = tl.zeros([BLOCK_N], tl.int32)
        for n0 in range(first, last, BLOCK_N):
            key = _order_key(_scores(score_ptr, n0 + slot, last))
            reach += ((key >= candidate) & (n0 + slot < last)).to(tl.int32)
        limit = tl.where(tl.sum(reach) >= kept, candidate, limit)
        bit = bit >> 1
    over = tl.zeros([BLOCK_N], tl.int32)
    for n0 in range(first, last, BLOCK_N):
        over += ((_order_key(_scores(score_ptr, n0 + slot, last)) > limit) & (n0 + slot < last)).to(tl.int32)
    spare = kept - tl.sum(over)

    # Of the rows equal to the limit the lowest stay. Ranks by prefix sums keep the order of the input.
    equal_before = 0
    kept_before = 0
    for n0 in range(first, last, BLOCK_N):
        key = _order_key(_scores(score_ptr, n0 + slot, last))
        valid = n0 + slot < last
        equal = ((key == limit) & valid).to(tl.int32)
        low = (equal == 1) & (equal_before + tl.cumsum(equal, 0) <= spare)
        stays = (((key > limit) & valid) | low).to(tl.int32)
        rank = kept_before + tl.cumsum(stays, 0) - stays
        local = n0 - first + slot
        tl.store(order_ptr + first + tl.where(stays == 1, rank, kept + local - rank), local, mask=valid)
        equal_before += tl.sum(equal)
        kept_before += tl.sum(stays)
    tl.store(count_ptr + b, kept)


@triton.jit(do_not_specialize=["rows", "parts"])
def _nearest_kernel(
    x_ptr, cu_ptr, cu_out_ptr, order_ptr, norm_ptr, assignment_ptr, closeness_ptr, length, rows, channels, parts,
    fuse_threshold, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write assignment and closeness of a frame's rows; similarities live in one tile of kept by lost rows."""
    pid = tl.program_id(0)
    b = pid // parts
    first, last = _frame(cu_ptr, b, length, rows)
    out = tl.load(cu_out_ptr + b)
    kept = tl.load(cu_out_ptr + b + 1) - out
    slot = tl.arange(0, ROWS)
    for k0 in range((pid % parts) * ROWS, kept, parts * ROWS):
        row = first + tl.load(order_ptr + first + k0 + slot, mask=k0 + slot < kept, other=0)
        tl.store(assignment_ptr + row, out + k0 + slot, mask=k0 + slot < kept)
        tl.store(closeness_ptr + row, tl.zeros([ROWS], tl.float32), mask=k0 + slot < kept)
    for i0 in range(kept + (pid % parts) * ROWS, last - first, parts * ROWS):
        valid = i0 + slot < last - first
        row = first + tl.load(order_ptr + first + i0 + slot, mask=valid, other=0)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        nearest = tl.zeros([ROWS], tl.int32)
        for k0 in range(0, kept, ROWS):
            held = k0 + slot < kept
            other = first + tl.load(order_ptr + first + k0 + slot, mask=held, other=0)
            cosine = tl.zeros([ROWS, ROWS], tl.float32)
            for c0 in range(0, channels, BLOCK_C):
                channel = c0 + tl.arange(0, BLOCK_C)
                left = _load(x_ptr, row, channel, valid, channels)
                right = _load(x_ptr, other, channel, held, channels)
                if UPCAST:
                    left = left.to(tl.float32)
                    right = right.to(tl.float32)
                cosine = tl.dot(left, tl.trans(right), cosine, input_precision="ieee")
            inverse = 1.0 / tl.load(norm_ptr + other, mask=held, other=1.0)
            cosine = cosine * inverse[None, :]
            cosine = tl.where(held[None, :] & (cosine == cosine), cosine, float("-inf"))
            value = tl.max(cosine, 1)
            at = k0 + tl.argmax(cosine, 1)
            nearest = tl.where(value > best, at, nearest)
            best = tl.maximum(value, best)
        best = best / tl.load(norm_ptr + row, mask=valid, other=1.0)
        tl.store(closeness_ptr + row, best, mask=valid)
        tl.store(assignment_ptr + row, tl.where(best >= fuse_threshold, out + nearest, -1), mask=valid)


@triton.jit
def _sources(assignment_ptr, closeness_ptr, index_ptr, row, last, target, held):
    """Return ω [target, row], zero where the row is not merged into the target, and closeness [row]."""
    goes = tl.load(assignment_ptr + row, mask=row < last, other=-1)
    itself = tl.load(index_ptr + goes, mask=goes >= 0, other=-1) == row
    closeness = tl.load(closeness_ptr + row, mask=row < last, other=0.0)
    match = (goes[None, :] == target[:, None]) & ((itself == 0) & (goes >= 0))[None, :] & held[:, None]
    return tl.where(match, tl.exp(closeness)[None, :], 0.0), closeness


@triton.jit(do_not_specialize=["rows", "packed", "frames"])
def _index_kernel(
    cu_ptr, cu_out_ptr, order_ptr, score_ptr, index_ptr, gate_ptr, length, rows, packed, frames, ROWS: tl.constexpr
):
    """Write index and gate of one frame's output rows; the program past the last frame clears the rest.

    The gate is 1, and NaN where the score is not finite.
    """
    b = tl.program_id(0)
    slot = tl.arange(0, ROWS)
    if b == frames:
        for j0 in range(tl.load(cu_out_ptr + b), packed, ROWS):
            tl.store(index_ptr + j0 + slot, tl.full([ROWS], -1, tl.int64), mask=j0 + slot < packed)
            tl.store(gate_ptr + j0 + slot, tl.zeros([ROWS], tl.float32), mask=j0 + slot < packed)
    else:
        first, _ = _frame(cu_ptr, b, length, rows)
        out = tl.load(cu_out_ptr + b)
        kept = tl.load(cu_out_ptr + b + 1) - out
        for j0 in range(0, kept, ROWS):
            held = j0 + slot < kept
            row = first + tl.load(order_ptr + first + j0 + slot, mask=held, other=0)
            tl.store(index_ptr + out + j0 + slot, row.to(tl.int64), mask=held)
            score = tl.load(score_ptr + row, mask=held, other=0.0)
            tl.store(gate_ptr + out + j0 + slot, 1.0 + (score - score), mask=held)


@triton.jit(do_not_specialize=["rows", "parts"])
def _merge_kernel(
    x_ptr, cu_ptr, cu_out_ptr, index_ptr, assignment_ptr, closeness_ptr, tokens_ptr, length, rows, channels, parts,
    fuse_alpha, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write y_j = α x_j + (1 - α) Σ ω x / Σ ω for tiles of a frame's output rows."""
    pid = tl.program_id(0)
    b = pid // parts
    first, last = _frame(cu_ptr, b, length, rows)
    out = tl.load(cu_out_ptr + b)
    end = tl.load(cu_out_ptr + b + 1)
    for j0 in range(out + (pid % parts) * ROWS, end, parts * ROWS):
        target = j0 + tl.arange(0, ROWS)
        held = target < end
        row = tl.load(index_ptr + target, mask=held, other=0)
        for c0 in range(0, channels, BLOCK_C):
            channel = c0 + tl.arange(0, BLOCK_C)
            total = tl.zeros([ROWS], tl.float32)
            sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
            for n0 in range(first, last, ROWS):
                source = n0 + tl.arange(0, ROWS)
                weight, _ = _sources(assignment_ptr, closeness_ptr, index_ptr, source, last, target, held)
                found = tl.sum(weight, 1)
                if tl.max(found) > 0:
                    x = _load(x_ptr, source, channel, source < last, channels).to(tl.float32)
                    sums = tl.dot(weight, x, sums, input_precision="ieee")
                    total += found
            own = _load(x_ptr, row, channel, held, channels).to(tl.float32)
            average = sums / tl.where(total > 0, total, 1.0)[:, None]
            y = tl.where((total > 0)[:, None], fuse_alpha * own + (1.0 - fuse_alpha) * average, own)
            place = target.to(tl.int64)[:, None] * channels + channel[None, :]
            tl.store(tokens_ptr + place, y, mask=held[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=["frames", "rows"])
def _clear_kernel(x_ptr, cu_ptr, frames, rows, width, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Zero the rows of x [R, width] past the last frame's end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    past = (row >= tl.load(cu_ptr + frames)) & (row < rows)
    for c0 in range(0, width, BLOCK_C):
        channel = c0 + tl.arange(0, BLOCK_C)
        place = row.to(tl.int64)[:, None] * width + channel[None, :]
        zero = tl.zeros([ROWS, BLOCK_C], tl.float32)
        tl.store(x_ptr + place, zero, mask=past[:, None] & (channel < width)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _pull_kernel(
    x_ptr, grad_gate_ptr, index_ptr, cu_out_ptr, norm_ptr, partial_ptr, channels, parts,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write Σ_j G_j x_j / n_j over one part of a frame's kept rows into partial [B, parts, C]."""
    pid = tl.program_id(0)
    b = pid // parts
    start, stop = _share(tl.load(cu_out_ptr + b), tl.load(cu_out_ptr + b + 1), pid % parts, parts)
    for c0 in range(0, channels, BLOCK_C):
        channel = c0 + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_C], tl.float32)
        for j0 in range(start, stop, ROWS):
            j = j0 + tl.arange(0, ROWS)
            row = tl.load(index_ptr + j, mask=j < stop, other=0)
            factor = tl.load(grad_gate_ptr + j, mask=j < stop, other=0.0).to(tl.float32)
            factor = factor / tl.load(norm_ptr + row, mask=j < stop, other=1.0)
            total += tl.sum(factor[:, None] * _load(x_ptr, row, channel, j < stop, channels).to(tl.float32), 0)
        tl.store(partial_ptr + pid.to(tl.int64) * channels + channel, total, mask=channel < channels)


@triton.jit(do_not_specialize=["rows", "parts"])
def _guide_kernel(
    cu_ptr, grad_gate_ptr, index_ptr, cu_out_ptr, score_ptr, guide_ptr, weight_ptr, mean_ptr, partial_ptr, fused_ptr,
    fused_norm_ptr, base_ptr, grad_guide_ptr, grad_weight_ptr, length, rows, channels, parts,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write dg, a frame's share of dλ, and `base`, the share of dv that every row of the frame gets."""
    b = tl.program_id(0)
    first, last = _frame(cu_ptr, b, length, rows)
    start = tl.load(cu_out_ptr + b)
    stop = tl.load(cu_out_ptr + b + 1)
    weight = tl.load(weight_ptr)
    square = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        channel = c0 + tl.arange(0, BLOCK_C)
        place = b.to(tl.int64) * channels + channel
        guide = tl.load(guide_ptr + place, mask=channel < channels, other=0.0)
        fused = weight * guide + (1.0 - weight) * tl.load(mean_ptr + place, mask=channel < channels, other=0.0)
        tl.store(fused_ptr + place, fused, mask=channel < channels)
        square += fused * fused
    norm = tl.maximum(tl.sqrt_rn(tl.sum(square)), NORM_FLOOR)
    tl.store(fused_norm_ptr + b, norm)
    along = tl.zeros([ROWS], tl.float64)
    for j0 in range(start, stop, ROWS):
        j = j0 + tl.arange(0, ROWS)
        row = tl.load(index_ptr + j, mask=j < stop, other=0)
        score = tl.load(score_ptr + row, mask=j < stop, other=0.0).to(tl.float64)
        along += tl.load(grad_gate_ptr + j, mask=j < stop, other=0.0).to(tl.float64) * score
    pull = tl.where(norm > NORM_FLOOR, tl.sum(along).to(tl.float32) / (norm * norm), 0.0)
    spread = (1.0 - weight) / tl.maximum(last - first, 1).to(tl.float32)
    slope = tl.zeros([BLOCK_C], tl.float64)
    for c0 in range(0, channels, BLOCK_C):
        channel = c0 + tl.arange(0, BLOCK_C)
        valid = channel < channels
        place = b.to(tl.int64) * channels + channel
        total = tl.zeros([BLOCK_C], tl.float32)
        for part in range(parts):
            total += tl.load(partial_ptr + (b.to(tl.int64) * parts + part) * channels + channel, mask=valid, other=0.0)
        guide = tl.load(guide_ptr + place, mask=valid, other=0.0)
        mean = tl.load(mean_ptr + place, mask=valid, other=0.0)
        dm = total / norm - pull * (weight * guide + (1.0 - weight) * mean)
        tl.store(grad_guide_ptr + place, weight * dm, mask=valid)
        tl.store(base_ptr + place, spread * dm, mask=valid)
        slope += dm.to(tl.float64) * (guide - mean).to(tl.float64)
    tl.store(grad_weight_ptr + b, tl.sum(slope))


@triton.jit(do_not_specialize=["rows", "parts"])
def _product_kernel(
    x_ptr, cu_ptr, grad_ptr, assignment_ptr, product_ptr, length, rows, channels, parts,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write ⟨Y_j, x_i⟩ of every row i of one part of a frame and the output row j that it went to."""
    pid = tl.program_id(0)
    first, last = _frame(cu_ptr, pid // parts, length, rows)
    start, stop = _share(first, last, pid % parts, parts)
    for r0 in range(start, stop, ROWS):
        row = r0 + tl.arange(0, ROWS)
        goes = tl.load(assignment_ptr + row, mask=row < stop, other=-1)
        product = tl.zeros([ROWS], tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            channel = c0 + tl.arange(0, BLOCK_C)
            x = _load(x_ptr, row, channel, row < stop, channels).to(tl.float32)
            product += tl.sum(x * _load(grad_ptr, goes, channel, goes >= 0, channels).to(tl.float32), 1)
        tl.store(product_ptr + row, product, mask=row < stop)


@triton.jit(do_not_specialize=["rows", "parts"])
def _kept_rows_kernel(
    x_ptr, cu_ptr, grad_ptr, grad_gate_ptr, cu_out_ptr, index_ptr, assignment_ptr, closeness_ptr, norm_ptr, score_ptr,
    product_ptr, base_ptr, fused_ptr, fused_norm_ptr, total_ptr, average_ptr, grad_x_ptr, length, rows, channels,
    parts, fuse_alpha, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a frame's kept rows, and Σ ω and the mean of ⟨Y_j, x_i⟩ of each."""
    pid = tl.program_id(0)
    b = pid // parts
    first, last = _frame(cu_ptr, b, length, rows)
    out = tl.load(cu_out_ptr + b)
    end = tl.load(cu_out_ptr + b + 1)
    for j0 in range(out + (pid % parts) * ROWS, end, parts * ROWS):
        target = j0 + tl.arange(0, ROWS)
        held = target < end
        self = tl.load(index_ptr + target, mask=held, other=0)
        norm = tl.load(norm_ptr + self, mask=held, other=1.0)
        total = tl.zeros([ROWS], tl.float32)
        average = tl.zeros([ROWS], tl.float32)
        own = tl.zeros([ROWS], tl.float32)
        if grad_ptr is not None:
            for n0 in range(first, last, ROWS):
                source = n0 + tl.arange(0, ROWS)
                weight, _ = _sources(assignment_ptr, closeness_ptr, index_ptr, source, last, target, held)
                product = tl.load(product_ptr + source, mask=source < last, other=0.0)
                total += tl.sum(weight, 1)
                average += tl.sum(weight * product[None, :], 1)
            average = average / tl.where(total > 0, total, 1.0)
            tl.store(total_ptr + target, total, mask=held)
            tl.store(average_ptr + target, average, mask=held)
            for n0 in range(first, last, ROWS):
                source = n0 + tl.arange(0, ROWS)
                weight, closeness = _sources(assignment_ptr, closeness_ptr, index_ptr, source, last, target, held)
                product = tl.load(product_ptr + source, mask=source < last, other=0.0)
                away = tl.where(weight > 0, product[None, :] - average[:, None], 0.0)
                own -= tl.sum(weight * away * tl.where(source < last, closeness, 0.0)[None, :], 1)
            own = own * (1.0 - fuse_alpha) / tl.where(total > 0, total, 1.0)
        receives = total > 0
        toward = tl.zeros([ROWS], tl.float32)
        if grad_gate_ptr is not None:
            gate = tl.load(grad_gate_ptr + target, mask=held, other=0.0).to(tl.float32)
            own -= gate * tl.load(score_ptr + self, mask=held, other=0.0)
            toward = gate / (tl.load(fused_norm_ptr + b) * norm)
        own = tl.where(norm > NORM_FLOOR, own / (norm * norm), 0.0)
        for c0 in range(0, channels, BLOCK_C):
            channel = c0 + tl.arange(0, BLOCK_C)
            valid = channel < channels
            sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
            grad = own[:, None] * _load(x_ptr, self, channel, held, channels).to(tl.float32)
            if grad_ptr is not None:
                for n0 in range(first, last, ROWS):
                    source = n0 + tl.arange(0, ROWS)
                    weight, _ = _sources(assignment_ptr, closeness_ptr, index_ptr, source, last, target, held)
                    if tl.max(weight) > 0:
                        product = tl.load(product_ptr + source, mask=source < last, other=0.0)
                        other = tl.load(norm_ptr + source, mask=source < last, other=1.0)
                        away = tl.where(weight > 0, product[None, :] - average[:, None], 0.0)
                        across = weight * away / other[None, :]
                        x = _load(x_ptr, source, channel, source < last, channels).to(tl.float32)
                        sums = tl.dot(across, x, sums, input_precision="ieee")
                factor = (1.0 - fuse_alpha) / (tl.where(receives, total, 1.0) * norm)
                incoming = _load(grad_ptr, target, channel, held, channels).to(tl.float32)
                grad += factor[:, None] * sums + tl.where(receives, fuse_alpha, 1.0)[:, None] * incoming
            if grad_gate_ptr is not None:
                place = b.to(tl.int64) * channels + channel
                grad += tl.load(base_ptr + place, mask=valid, other=0.0)[None, :]
                grad += toward[:, None] * tl.load(fused_ptr + place, mask=valid, other=0.0)[None, :]
            place = self.to(tl.int64)[:, None] * channels + channel[None, :]
            tl.store(grad_x_ptr + place, grad, mask=held[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["rows", "parts"])
def _other_rows_kernel(
    x_ptr, cu_ptr, grad_ptr, index_ptr, assignment_ptr, closeness_ptr, norm_ptr, product_ptr, base_ptr, total_ptr,
    average_ptr, grad_x_ptr, length, rows, channels, parts, fuse_alpha, HAS_BASE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the rows of one part of a frame that were merged or dropped."""
    pid = tl.program_id(0)
    b = pid // parts
    first, last = _frame(cu_ptr, b, length, rows)
    start, stop = _share(first, last, pid % parts, parts)
    for r0 in range(start, stop, ROWS):
        row = r0 + tl.arange(0, ROWS)
        goes = tl.load(assignment_ptr + row, mask=row < stop, other=-1)
        target = tl.load(index_ptr + goes, mask=goes >= 0, other=-1)
        other_row = (row < stop) & (target != row)
        merged = other_row & (goes >= 0)
        share = tl.zeros([ROWS], tl.float32)
        across = tl.zeros([ROWS], tl.float32)
        inward = tl.zeros([ROWS], tl.float32)
        if grad_ptr is not None:
            closeness = tl.load(closeness_ptr + row, mask=merged, other=0.0)
            norm = tl.load(norm_ptr + row, mask=merged, other=1.0)
            share = (1.0 - fuse_alpha) * tl.exp(closeness) / tl.load(total_ptr + goes, mask=merged, other=1.0)
            pull = tl.load(product_ptr + row, mask=merged, other=0.0)
            pull = share * (pull - tl.load(average_ptr + goes, mask=merged, other=0.0))
            across = pull / (norm * tl.load(norm_ptr + target, mask=merged, other=1.0))
            inward = tl.where(norm > NORM_FLOOR, -pull * closeness / (norm * norm), 0.0)
        for c0 in range(0, channels, BLOCK_C):
            channel = c0 + tl.arange(0, BLOCK_C)
            grad = tl.zeros([ROWS, BLOCK_C], tl.float32)
            if grad_ptr is not None:
                grad += share[:, None] * _load(grad_ptr, goes, channel, merged, channels).to(tl.float32)
                grad += across[:, None] * _load(x_ptr, target, channel, merged, channels).to(tl.float32)
                grad += inward[:, None] * _load(x_ptr, row, channel, merged, channels).to(tl.float32)
            if HAS_BASE:
                place = b.to(tl.int64) * channels + channel
                grad += tl.load(base_ptr + place, mask=channel < channels, other=0.0)[None, :]
            place = row.to(tl.int64)[:, None] * channels + channel[None, :]
            tl.store(grad_x_ptr + place, grad, mask=other_row[:, None] & (channel < channels)[None, :])


class _Call:
    """Sizes of a call, and how its launches are cut: from shapes alone, so that no sum depends on the device."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, guide: Tensor) -> None:
        self.frames, self.channels = guide.shape
        self.length = x.shape[1] if cu_seqlens is None else 0
        self.rows = x.shape[0] if cu_seqlens is not None else x.shape[0] * x.shape[1]
        if self.rows >= 2**31:
            raise RuntimeError("vsc_compress: 2^31 rows or more")
        wide = triton.next_power_of_2(self.channels)
        self.shape: dict[str, Any] = {"ROWS": _ROWS, "BLOCK_C": min(128, max(16, wide)), "num_warps": 4}
        # Products keep their operands and the next ones in shared memory and registers: narrower tiles.
        self.tile: dict[str, Any] = {"ROWS": _ROWS, "BLOCK_C": min(64, max(16, wide)), "num_warps": 4}
        # The widths at which the nearest kept row is found without a spill on sm_80, sm_90 and sm_100.
        warps = 8 if x.dtype == torch.float32 else 4
        self.search: dict[str, Any] = {"ROWS": _ROWS, "BLOCK_C": min(32, max(16, wide)), "num_warps": warps}
        self.parts = self.parts_of(self.rows)

    def parts_of(self, rows: int) -> int:
        """Return how many programs share a frame's part of so many rows."""
        return max(1, min(_MOST_PARTS, triton.cdiv(triton.cdiv(rows, max(1, self.frames)), _ROWS)))


def vsc_compress_fwd(
    x: Tensor,
    cu_seqlens: Tensor | None,
    guide: Tensor,
    guide_weight: Tensor,
    temperature: float,
    standardize: bool,
    threshold: float,
    keep: int | None,
    capacity: int | None,
    min_keep: int,
    fuse_threshold: float,
    fuse_alpha: float,
) -> tuple[Tensor, ...]:
    """Compute the forward of ``deepmsi::vsc_compress_triton_fwd``; shapes as in ``deepmsi/ops/_schemas.py``."""
    x, guide = x.contiguous(), guide.contiguous()
    cu = cu_seqlens.contiguous() if cu_seqlens is not None else None
    call = _Call(x, cu, guide)
    frames, rows, channels, parts = call.frames, call.rows, call.channels, call.parts
    wide = {"device": x.device, "dtype": torch.float32}
    whole = {"device": x.device, "dtype": torch.int32}
    relevance, assignment = torch.empty(rows, **wide), torch.empty(rows, **whole)
    state, mean = torch.empty(3, rows, **wide), torch.empty(frames, channels, **wide)
    cu_out = torch.zeros(frames + 1, **whole)
    score, norm, closeness = state.unbind(0)
    order, count = torch.empty(rows, **whole), torch.empty(frames, **whole)
    partial = torch.empty(frames, parts, channels, **wide)
    fused, fused_norm = torch.empty(frames, channels, **wide), torch.empty(frames, **wide)
    size = (call.length, rows)
    with torch.cuda.device_of(x):
        if cu is not None and rows:
            # What lies past the last frame is no kernel's business but must hold something.
            assignment.fill_(-1)
            relevance.zero_()
            state.zero_()
        if frames:
            _statistics_kernel[(frames * parts,)](x, cu, norm, partial, *size, channels, parts, **call.shape)
            _fuse_kernel[(frames,)](
                cu, guide, guide_weight, partial, mean, fused, fused_norm, *size, channels, parts, BLOCK_C=128
            )
            _score_kernel[(frames * parts,)](
                x, cu, fused, fused_norm, norm, score, *size, channels, parts, **call.shape
            )
            block = 1024 if cu is not None else min(1024, max(16, triton.next_power_of_2(call.length)))
            _select_kernel[(frames,)](
                cu, score, relevance, order, count, *size, temperature, threshold, keep, capacity, min_keep,
                STANDARDIZE=standardize, BLOCK_N=block, num_warps=8 if block > 256 else 4,
            )  # fmt: skip
            torch.cumsum(count, 0, dtype=torch.int32, out=cu_out[1:])
        if capacity is not None:
            packed = frames * capacity
        elif keep is not None and cu is None:
            packed = frames * min(keep, call.length)
        else:
            packed = int(cu_out[-1])  # the one integer that is read on the host
        tokens = torch.empty(packed, channels, device=x.device, dtype=x.dtype)
        index = torch.empty(packed, device=x.device, dtype=torch.int64)
        gate = torch.empty(packed, device=x.device, dtype=x.dtype)
        if frames:
            upcast = upcasts(x.dtype)
            _nearest_kernel[(frames * parts,)](
                x, cu, cu_out, order, norm, assignment, closeness, *size, channels, parts, fuse_threshold,
                UPCAST=upcast, **call.search,
            )  # fmt: skip
        if packed:
            _index_kernel[(frames + 1,)](cu, cu_out, order, score, index, gate, *size, packed, frames, ROWS=128)
            tiles = call.parts_of(packed)
            _merge_kernel[(frames * tiles,)](
                x, cu, cu_out, index, assignment, closeness, tokens, *size, channels, tiles, fuse_alpha, **call.tile
            )
            if capacity is not None:
                _clear_kernel[(triton.cdiv(packed, _ROWS),)](tokens, cu_out, frames, packed, channels, **call.shape)
    return tokens, cu_out, index, gate, relevance, assignment, state, mean


def vsc_compress_bwd(
    grad_tokens: Tensor | None,
    grad_gate: Tensor | None,
    x: Tensor,
    cu_seqlens: Tensor | None,
    guide: Tensor,
    guide_weight: Tensor,
    cu_out: Tensor,
    index: Tensor,
    assignment: Tensor,
    state: Tensor,
    mean: Tensor,
    fuse_alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward of ``deepmsi::vsc_compress_triton_fwd``: gradients of x, guide and λ."""
    x, guide = x.contiguous(), guide.contiguous()
    cu = cu_seqlens.contiguous() if cu_seqlens is not None else None
    grad_tokens = grad_tokens.contiguous() if grad_tokens is not None else None
    grad_gate = grad_gate.contiguous() if grad_gate is not None else None
    call = _Call(x, cu, guide)
    frames, rows, channels, parts = call.frames, call.rows, call.channels, call.parts
    packed = len(index)
    tiles = call.parts_of(packed)
    score, norm, closeness = state.unbind(0)
    wide = {"device": x.device, "dtype": torch.float32}
    grad_x = torch.empty_like(x)
    base, fused = torch.empty(frames, channels, **wide), torch.empty(frames, channels, **wide)
    fused_norm, product = torch.empty(frames, **wide), torch.empty(rows, **wide)
    total, average = torch.empty(packed, **wide), torch.empty(packed, **wide)
    size = (call.length, rows)
    with torch.cuda.device_of(x):
        if grad_gate is None or not frames:
            grad_guide, grad_weight = torch.zeros_like(guide), torch.zeros_like(guide_weight)
        else:
            grad_guide = torch.empty_like(guide)
            partial = torch.empty(frames, tiles, channels, **wide)
            slopes = torch.empty(frames, device=x.device, dtype=torch.float64)
            _pull_kernel[(frames * tiles,)](x, grad_gate, index, cu_out, norm, partial, channels, tiles, **call.shape)
            _guide_kernel[(frames,)](
                cu, grad_gate, index, cu_out, score, guide, guide_weight, mean, partial, fused, fused_norm, base,
                grad_guide, slopes, *size, channels, tiles, ROWS=128, BLOCK_C=128,
            )  # fmt: skip
            grad_weight = slopes.sum().to(guide_weight.dtype)
        if frames:
            if grad_tokens is not None:
                _product_kernel[(frames * parts,)](
                    x, cu, grad_tokens, assignment, product, *size, channels, parts, **call.shape
                )
            _kept_rows_kernel[(frames * tiles,)](
                x, cu, grad_tokens, grad_gate, cu_out, index, assignment, closeness, norm, score, product, base, fused,
                fused_norm, total, average, grad_x, *size, channels, tiles, fuse_alpha, **call.tile,
            )  # fmt: skip
            _other_rows_kernel[(frames * parts,)](
                x, cu, grad_tokens, index, assignment, closeness, norm, product, base, total, average, grad_x, *size,
                channels, parts, fuse_alpha, HAS_BASE=grad_gate is not None, **call.shape,
            )  # fmt: skip
        if cu is not None and rows:
            _clear_kernel[(triton.cdiv(rows, _ROWS),)](grad_x, cu, frames, rows, channels, **call.shape)
    return grad_x, grad_guide, grad_weight
