"""The cross-modal contrastive loss in Triton: tiles of scores, never the matrix; the gradients come with the loss.

Up to 128 rows and columns take one launch: every program makes all scores and its own channels of the gradients.
Above that, rows and columns are sorted by label, so that nearly every tile holds positives alone or negatives alone:

1. `_unit_kernel` writes unit rows in sorted order.
2. `_rows_kernel` passes over the negatives for log Z, by a running maximum, and over the positives for the loss; it
   multiplies each tile of weights with the columns at once, so that the gradient of a is done with the loss.
3. `_columns_kernel` makes each tile again, from what the second left of each row, for the gradient of b.

Nothing is added up by atomics: a result's bits depend on its inputs alone.
"""

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl

NORM_FLOOR = tl.constexpr(1e-12)  # the reference's
_ONE_LAUNCH = 128
# Of a tile above that. A float32 product keeps its operands in registers: larger blocks spill, so that wider gradients
# are made 128 channels at a time.
_BLOCK_ROWS = 32
_BLOCK_COLUMNS = 32
_BLOCK_DIM = 16
_BLOCK_CHANNELS = 128
# By the edge of the one tile: warps, and channels at a time.
_ONE_TILE = {16: (2, 32), 32: (4, 32), 64: (8, 16), 128: (16, 16)}


@triton.jit
def _log1p(t):
    """Return log(1 + t) for t in [0, 1] as 2 artanh(t / (2 + t)), exact to rounding down to the smallest t."""
    z = t / (t + 2.0)
    w = z * z
    p = w * (1.0 / 15.0) + 1.0 / 13.0
    p = p * w + 1.0 / 11.0
    p = p * w + 1.0 / 9.0
    p = p * w + 1.0 / 7.0
    p = p * w + 1.0 / 5.0
    p = p * w + 1.0 / 3.0
    return 2.0 * (z + z * w * p)


@triton.jit
def _softplus(x):
    """Return softplus(x) and its derivative, the logistic function."""
    t = tl.exp(-tl.abs(x))
    rest = 1.0 / (1.0 + t)
    return tl.maximum(x, 0.0) + _log1p(t), tl.where(x < 0.0, t * rest, rest)


@triton.jit
def _inverse_norm(squares):
    norm = tl.maximum(tl.sqrt_rn(squares), NORM_FLOOR)
    return tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)


@triton.jit
def _through_norm(gradient, unit, along, inverse):
    """Take the gradient of x / |x| to that of x; `along` is its product with the unit rows."""
    # At the floor the norm is a constant, so nothing is taken away along x.
    inward = tl.where(inverse < 0.9999 / NORM_FLOOR, along, 0.0)
    return (gradient - unit * inward[:, None]) * inverse[:, None]


@triton.jit
def _load(x_ptr, row, column, mask, dim):
    """Load x [rows, dim] at the given rows and columns, 0 where a row is masked and past dim."""
    return tl.load(
        x_ptr + row.to(tl.int64)[:, None] * dim + column[None, :],
        mask=mask[:, None] & (column < dim)[None, :],
        other=0.0,
    )


@triton.jit
def _kinds(order_ptr, labels_ptr, valid_ptr, place, size, MASKED: tl.constexpr, SORTED: tl.constexpr):
    """Return original index, label, and whether it takes part, of the given places."""
    present = place < size
    index = place.to(tl.int64)
    if SORTED:
        index = tl.load(order_ptr + place, mask=present, other=0)
    label = tl.load(labels_ptr + index, mask=present, other=0)
    if MASKED:
        present = tl.load(valid_ptr + index, mask=present, other=0) != 0
    return index, label, present


@triton.jit
def _signs(row, label, present, column, label_b, present_b, MATCHED: tl.constexpr):
    """Return which pairs of rows and columns are positive and which are negative."""
    both = present[:, None] & present_b[None, :]
    same = label[:, None] == label_b[None, :]
    positive = both & same
    if not MATCHED:
        positive = positive & (row[:, None] != column[None, :])
    return positive, both & (same == 0)


@triton.jit
def _share(pairs, count, positives, PER_POSITIVE: tl.constexpr):
    """Return what one positive's term weighs: 1 / (pairs · count · (count - 1 or the row's positives))."""
    among = tl.zeros(positives.shape, tl.float32) + (count - 1).to(tl.float32)
    if PER_POSITIVE:
        among = positives.to(tl.float32)
    weight = pairs * count.to(tl.float32) * among
    return tl.where(weight > 0, 1.0 / tl.where(weight > 0, weight, 1.0), 0.0)


@triton.jit
def _one_launch_kernel(
    a_ptr,
    b_ptr,
    labels_ptr,
    labels_b_ptr,
    valid_ptr,
    valid_b_ptr,
    loss_ptr,
    grad_a_ptr,
    grad_b_ptr,
    rows,
    columns,
    dim,
    pairs,
    row_offset,
    per_temperature,
    MASKED: tl.constexpr,
    MASKED_B: tl.constexpr,
    MATCHED: tl.constexpr,
    PER_POSITIVE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """L(a, b_p) of all pairs, with BLOCK_K channels of the gradients; program 0 writes the loss."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    own = tl.program_id(0) * BLOCK_K + k
    loss = 0.0
    grad_a = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for _ in range(pairs):
        row, label, present = _kinds(labels_ptr, labels_ptr, valid_ptr, m, rows, MASKED, False)
        column, label_b, present_b = _kinds(labels_b_ptr, labels_b_ptr, valid_b_ptr, n, columns, MASKED_B, False)
        squares, squares_b = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, dim, BLOCK_K):
            x = _load(a_ptr, m, first + k, present, dim)
            y = _load(b_ptr, n, first + k, present_b, dim)
            squares += tl.sum(x * x, 1)
            squares_b += tl.sum(y * y, 1)
        inverse, inverse_b = _inverse_norm(squares), _inverse_norm(squares_b)
        score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, dim, BLOCK_K):
            x = _load(a_ptr, m, first + k, present, dim) * inverse[:, None]
            y = _load(b_ptr, n, first + k, present_b, dim) * inverse_b[:, None]
            score += tl.dot(x, tl.trans(y), input_precision="ieee")
        score *= per_temperature

        positive, negative = _signs(row + row_offset, label, present, column, label_b, present_b, MATCHED)
        top = tl.max(tl.where(negative, score, float("-inf")), 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.where(negative, tl.exp(tl.where(negative, score - top[:, None], 0.0)), 0.0)
        total = tl.sum(weight, 1)
        opposed = total != 0.0  # a NaN must show
        total = tl.where(opposed, total, 1.0)
        positive = positive & opposed[:, None]
        positives = tl.sum(positive.to(tl.int32), 1)
        share = _share(pairs, tl.sum(present_b.to(tl.int32)), positives, PER_POSITIVE)
        term, logistic = _softplus((top + tl.log(total))[:, None] - score)
        logistic = tl.where(positive, logistic, 0.0)
        loss += tl.sum(share * tl.sum(tl.where(positive, term, 0.0), 1))
        if WITH_GRAD:
            pull = tl.sum(logistic, 1)
            gradient = (weight * (pull / total)[:, None] - logistic) * share[:, None]
            along = gradient * score
            x = _load(a_ptr, m, own, present, dim) * inverse[:, None]
            y = _load(b_ptr, n, own, present_b, dim) * inverse_b[:, None]
            left = tl.dot(gradient, y, input_precision="ieee") * per_temperature
            right = tl.dot(tl.trans(gradient), x, input_precision="ieee") * per_temperature
            grad_a += _through_norm(left, x, tl.sum(along, 1), inverse)
            right = _through_norm(right, y, tl.sum(along, 0), inverse_b)
            tl.store(
                grad_b_ptr + n[:, None] * dim + own[None, :],
                right,
                mask=(n < columns)[:, None] & (own < dim)[None, :],
            )
            grad_b_ptr += columns * dim
        b_ptr += columns * dim
        valid_ptr += rows
        valid_b_ptr += columns
    if WITH_GRAD:
        tl.store(grad_a_ptr + m[:, None] * dim + own[None, :], grad_a, mask=(m < rows)[:, None] & (own < dim)[None, :])
    if tl.program_id(0) == 0:
        tl.store(loss_ptr, loss)


@triton.jit
def _unit_kernel(
    x_ptr,
    order_ptr,
    valid_ptr,
    unit_ptr,
    inverse_ptr,
    rows,
    dim,
    masks,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write x / |x| of each set of rows in sorted order, and 1 / |x|; 0 for a row that none of its masks holds."""
    of = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    inside = place < rows
    row = tl.load(order_ptr + place, mask=inside, other=0)
    present = inside
    if MASKED:
        held = tl.zeros([BLOCK_M], tl.int32)
        for mask in range(masks):
            held |= tl.load(valid_ptr + (of * masks + mask) * rows + row, mask=inside, other=0).to(tl.int32)
        present = held != 0
    x_ptr += of * rows * dim
    unit_ptr += of * rows * dim
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, dim, BLOCK_K):
        x = _load(x_ptr, row, first + k, present, dim)
        squares += tl.sum(x * x, 1)
    inverse = _inverse_norm(squares)
    tl.store(inverse_ptr + of * rows + place, inverse, mask=inside)
    for first in range(0, dim, BLOCK_K):
        x = _load(x_ptr, row, first + k, present, dim) * inverse[:, None]
        tl.store(
            unit_ptr + place.to(tl.int64)[:, None] * dim + (first + k)[None, :],
            x,
            mask=inside[:, None] & ((first + k) < dim)[None, :],
        )


@triton.jit
def _scores(x_ptr, y_ptr, m, n, mask_m, mask_n, dim, per_temperature, BLOCK_K: tl.constexpr):
    """Return ⟨x_m, y_n⟩ / τ of unit rows."""
    score = tl.zeros([m.shape[0], n.shape[0]], tl.float32)
    for first in range(0, dim, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x, y = _load(x_ptr, m, k, mask_m, dim), _load(y_ptr, n, k, mask_n, dim)
        score += tl.dot(x, tl.trans(y), input_precision="ieee")
    return score * per_temperature


@triton.jit
def _rows_kernel(
    unit_a_ptr,
    unit_b_ptr,
    inverse_a_ptr,
    order_ptr,
    order_b_ptr,
    labels_ptr,
    labels_b_ptr,
    valid_ptr,
    valid_b_ptr,
    count_ptr,
    loss_ptr,
    state_ptr,
    grad_a_ptr,
    rows,
    columns,
    dim,
    pairs,
    row_offset,
    per_temperature,
    MASKED: tl.constexpr,
    MASKED_B: tl.constexpr,
    MATCHED: tl.constexpr,
    PER_POSITIVE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Loss of a block of rows in one pair, and BLOCK_C channels of its part of a's gradient [P, B, D].

    `state` [P, 4, B], by sorted row: maximum of the negatives, log Z, a positive's share, a negative's share over Z.
    """
    p, chunk = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    unit_b_ptr += p.to(tl.int64) * columns * dim
    row, label, present = _kinds(order_ptr, labels_ptr, valid_ptr + p * rows, m, rows, MASKED, True)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    positives = tl.zeros([BLOCK_M], tl.int32)
    gradient = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, columns, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        column, label_b, present_b = _kinds(
            order_b_ptr, labels_b_ptr, valid_b_ptr + p * columns, n, columns, MASKED_B, True
        )
        positive, negative = _signs(row + row_offset, label, present, column, label_b, present_b, MATCHED)
        positives += tl.sum(positive.to(tl.int32), 1)
        if tl.max(negative.to(tl.int32)) > 0:
            score = _scores(unit_a_ptr, unit_b_ptr, m, n, m < rows, n < columns, dim, per_temperature, BLOCK_K)
            higher = tl.maximum(top, tl.max(tl.where(negative, score, float("-inf")), 1))
            shown = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.where(negative, tl.exp(tl.where(negative, score - shown[:, None], 0.0)), 0.0)
            shrink = tl.exp(top - shown)
            total = total * shrink + tl.sum(weight, 1)
            top = higher
            if WITH_GRAD:
                along = along * shrink + tl.sum(weight * score, 1)
                y = _load(unit_b_ptr, n, own, n < columns, dim)
                gradient = gradient * shrink[:, None] + tl.dot(weight, y, input_precision="ieee")

    count = tl.load(count_ptr + p)
    active = (total != 0.0) & (positives > 0)  # a NaN must show
    total = tl.where(active, total, 1.0)
    top = tl.where(top == float("-inf"), 0.0, top)
    log_z = top + tl.log(total)
    share = tl.where(active, _share(pairs, count, positives, PER_POSITIVE), 0.0)

    loss = tl.zeros([BLOCK_M], tl.float32)
    pull = tl.zeros([BLOCK_M], tl.float32)
    along_positive = tl.zeros([BLOCK_M], tl.float32)
    attracted = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, columns, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        column, label_b, present_b = _kinds(
            order_b_ptr, labels_b_ptr, valid_b_ptr + p * columns, n, columns, MASKED_B, True
        )
        positive, _ = _signs(row + row_offset, label, present & active, column, label_b, present_b, MATCHED)
        if tl.max(positive.to(tl.int32)) > 0:
            score = _scores(unit_a_ptr, unit_b_ptr, m, n, m < rows, n < columns, dim, per_temperature, BLOCK_K)
            term, logistic = _softplus(log_z[:, None] - score)
            logistic = tl.where(positive, logistic, 0.0)
            loss += tl.sum(tl.where(positive, term, 0.0), 1)
            pull += tl.sum(logistic, 1)
            if WITH_GRAD:
                along_positive += tl.sum(logistic * score, 1)
                y = _load(unit_b_ptr, n, own, n < columns, dim)
                attracted += tl.dot(logistic, y, input_precision="ieee")
    push = share * pull / total
    at = p.to(tl.int64) * rows + m
    if chunk == 0:
        tl.store(loss_ptr + at, loss * share, mask=m < rows)
    if WITH_GRAD:
        if chunk == 0:
            left_ptr = state_ptr + p.to(tl.int64) * 4 * rows + m
            tl.store(left_ptr, top, mask=m < rows)
            tl.store(left_ptr + rows, log_z, mask=m < rows)
            tl.store(left_ptr + 2 * rows, share, mask=m < rows)
            tl.store(left_ptr + 3 * rows, push, mask=m < rows)
        gradient = tl.where(active[:, None], gradient * push[:, None] - attracted * share[:, None], 0.0)
        along = tl.where(active, along * push - along_positive * share, 0.0)
        x = _load(unit_a_ptr, m, own, m < rows, dim)
        inverse = tl.load(inverse_a_ptr + m, mask=m < rows, other=0.0)
        tl.store(
            grad_a_ptr + (p.to(tl.int64) * rows + row)[:, None] * dim + own[None, :],
            _through_norm(gradient * per_temperature, x, along, inverse),
            mask=(m < rows)[:, None] & (own < dim)[None, :],
        )


@triton.jit
def _columns_kernel(
    unit_a_ptr,
    unit_b_ptr,
    inverse_b_ptr,
    order_ptr,
    order_b_ptr,
    labels_ptr,
    labels_b_ptr,
    valid_ptr,
    valid_b_ptr,
    state_ptr,
    grad_b_ptr,
    rows,
    columns,
    dim,
    row_offset,
    per_temperature,
    MASKED: tl.constexpr,
    MASKED_B: tl.constexpr,
    MATCHED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_C channels of the gradient of a block of b's rows in one pair, from the state of each row of a."""
    p, chunk = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    unit_b_ptr += p.to(tl.int64) * columns * dim
    state_ptr += p.to(tl.int64) * 4 * rows
    column, label_b, present_b = _kinds(
        order_b_ptr, labels_b_ptr, valid_b_ptr + p * columns, n, columns, MASKED_B, True
    )
    along = tl.zeros([BLOCK_N], tl.float32)
    gradient = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        row, label, present = _kinds(order_ptr, labels_ptr, valid_ptr + p * rows, m, rows, MASKED, True)
        top = tl.load(state_ptr + m, mask=m < rows, other=0.0)
        log_z = tl.load(state_ptr + rows + m, mask=m < rows, other=0.0)
        share = tl.load(state_ptr + 2 * rows + m, mask=m < rows, other=0.0)
        push = tl.load(state_ptr + 3 * rows + m, mask=m < rows, other=0.0)
        positive, negative = _signs(
            column, label_b, present_b, row + row_offset, label, present & (share > 0.0), MATCHED
        )
        score = _scores(unit_b_ptr, unit_a_ptr, n, m, n < columns, m < rows, dim, per_temperature, BLOCK_K)
        _, logistic = _softplus(log_z[None, :] - score)
        weight = tl.exp(tl.where(negative, score - top[None, :], 0.0)) * push[None, :]
        weight = tl.where(negative, weight, tl.where(positive, -logistic * share[None, :], 0.0))
        along += tl.sum(weight * score, 1)
        x = _load(unit_a_ptr, m, own, m < rows, dim)
        gradient += tl.dot(weight, x, input_precision="ieee")
    y = _load(unit_b_ptr, n, own, n < columns, dim)
    inverse = tl.load(inverse_b_ptr + p.to(tl.int64) * columns + n, mask=n < columns, other=0.0)
    tl.store(
        grad_b_ptr + (p.to(tl.int64) * columns + column)[:, None] * dim + own[None, :],
        _through_norm(gradient * per_temperature, y, along, inverse),
        mask=(n < columns)[:, None] & (own < dim)[None, :],
    )


def cross_modal_contrastive_fwd(
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    labels_b: Tensor,
    row_offset: int,
    valid: Tensor | None,
    valid_b: Tensor | None,
    temperature: float,
    include_matched: bool,
    per_positive: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss [] and, `with_grad`, its gradients by a [B, D] and b [P, J, D], all float32; else empty ones."""
    rows, dim = a.shape
    pairs, columns, _ = b.shape
    grad_a = a.new_empty((rows if with_grad else 0, dim))
    grad_b = b.new_empty((pairs, columns if with_grad else 0, dim))
    if rows == 0 or dim == 0:
        return a.new_zeros(()), grad_a.zero_(), grad_b.zero_()
    a, b, labels, labels_b = a.contiguous(), b.contiguous(), labels.contiguous(), labels_b.contiguous()
    masks = [None if mask is None else mask.contiguous().view(torch.uint8) for mask in (valid, valid_b)]
    flags: dict[str, Any] = {
        "MASKED": valid is not None,
        "MASKED_B": valid_b is not None,
        "MATCHED": include_matched,
    }
    # A mask that is not there is not read: any pointer will do in its place.
    sources = (
        labels,
        labels_b,
        *(x if mask is None else mask for x, mask in zip((labels, labels_b), masks, strict=True)),
    )
    with torch.cuda.device_of(a):
        if columns <= _ONE_LAUNCH:
            loss = a.new_empty(())
            tile = max(16, triton.next_power_of_2(columns))
            warps, block_k = _ONE_TILE[tile]
            _one_launch_kernel[(triton.cdiv(dim, block_k) if with_grad else 1,)](
                a,
                b,
                *sources,
                loss,
                grad_a,
                grad_b,
                rows,
                columns,
                dim,
                pairs,
                row_offset,
                1.0 / temperature,
                **flags,
                PER_POSITIVE=per_positive,
                WITH_GRAD=with_grad,
                BLOCK_M=max(16, triton.next_power_of_2(rows)),
                BLOCK_N=tile,
                BLOCK_K=block_k,
                num_warps=warps,
                num_stages=1,
            )
            return loss, grad_a, grad_b

        order, order_b = labels.argsort(stable=True), labels_b.argsort(stable=True)
        unit_a, unit_b = torch.empty_like(a), torch.empty_like(b)
        inverse_a, inverse_b = a.new_empty((rows,)), a.new_empty((pairs, columns))
        for x, by, mask, unit, inverse, per_set in (
            (a, order, masks[0], unit_a, inverse_a, pairs),
            (b, order_b, masks[1], unit_b, inverse_b, 1),
        ):
            count = x.shape[-2]
            _unit_kernel[(triton.cdiv(count, _BLOCK_ROWS), x.numel() // (count * dim))](
                x,
                by,
                by if mask is None else mask,
                unit,
                inverse,
                count,
                dim,
                per_set,
                MASKED=mask is not None,
                BLOCK_M=_BLOCK_ROWS,
                BLOCK_K=_BLOCK_CHANNELS,
                num_warps=4,
            )
        if valid_b is None:
            present = torch.full((pairs,), columns, dtype=torch.int32, device=a.device)
        else:
            present = valid_b.sum(1, dtype=torch.int32)
        block_c = min(_BLOCK_CHANNELS, max(16, triton.next_power_of_2(dim))) if with_grad else 16
        chunks = triton.cdiv(dim, block_c) if with_grad else 1
        parts = a.new_empty((pairs, rows))
        state = a.new_empty((pairs if with_grad else 0, 4, rows))
        parts_a = a.new_empty((pairs if with_grad else 0, rows, dim))
        blocks = {"BLOCK_M": _BLOCK_ROWS, "BLOCK_N": _BLOCK_COLUMNS, "BLOCK_K": _BLOCK_DIM, "BLOCK_C": block_c}
        options: dict[str, Any] = {**flags, "num_warps": 8, "num_stages": 1}
        _rows_kernel[(triton.cdiv(rows, _BLOCK_ROWS), pairs, chunks)](
            unit_a,
            unit_b,
            inverse_a,
            order,
            order_b,
            *sources,
            present,
            parts,
            state,
            parts_a,
            rows,
            columns,
            dim,
            pairs,
            row_offset,
            1.0 / temperature,
            **blocks,
            **options,
            PER_POSITIVE=per_positive,
            WITH_GRAD=with_grad,
        )
        loss = parts.sum(dtype=torch.float64).float()
        if with_grad:
            torch.sum(parts_a, 0, out=grad_a)
            _columns_kernel[(triton.cdiv(columns, _BLOCK_COLUMNS), pairs, chunks)](
                unit_a,
                unit_b,
                inverse_b,
                order,
                order_b,
                *sources,
                state,
                grad_b,
                rows,
                columns,
                dim,
                row_offset,
                1.0 / temperature,
                **blocks,
                **options,
            )
    return loss, grad_a, grad_b


def cross_modal_contrastive_bwd(grad_loss: Tensor, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients that the forward made, times the gradient of the loss []."""
    return grad_a * grad_loss, grad_b * grad_loss
