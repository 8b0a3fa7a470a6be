"""The residual layer norm in Triton: y = x + s · LN(branch), a few whole rows per program, forward and backward.

And its parts, LN(x), x + s · branch and s · x, of which blocks are made whose norm comes before their layers.

Sums over rows are partial sums of a fixed number of chunks, added up in fixed order: no atomics. The statistics are
made again in the backward pass, which reads the rows anyway.
"""

import torch
from deepmsi._triton.operands import chunk_of, vector, write_rows
from torch import Tensor

import triton
import triton.language as tl

# Elements that a program holds of one tensor, where it sums over rows too, and programs that do; none depends on the
# device, so that bits do not either.
_BLOCK_ELEMENTS = 4096
_SUMMED_ELEMENTS = 2048
_SUMMING_PROGRAMS = 1024
# Channels of whose sums a program adds up the chunks: a sector of memory or two.
_SUMMED_CHANNELS = 16


@triton.jit
def unit_rows(branch, column, channels, eps):
    """Return (branch - mean) / deviation of each row in float32, 0 past the channels, and 1 / deviation."""
    mean = tl.sum(branch, 1) / channels
    centred = tl.where((column < channels)[None, :], branch - mean[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(centred * centred, 1) / channels + eps)
    inverse = tl.div_rn(tl.full(deviation.shape, 1.0, tl.float32), deviation)
    return centred * inverse[:, None], inverse


@triton.jit
def counted(offset_ptr, frames, rows, PACKED: tl.constexpr):
    """Return how many rows count: those before the last offset."""
    if PACKED:
        rows = tl.minimum(tl.load(offset_ptr + frames), rows)
    return rows


@triton.jit
def row_scale_of(scale_ptr, row, mask, SCALED: tl.constexpr):
    if SCALED:
        return tl.load(scale_ptr + row, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.full(row.shape, 1.0, tl.float32)


@triton.jit
def statistics(branch, more, column, beyond, channels, eps):
    """Return mean and 1 / deviation of rows in two parts of columns, whose entries past the channels are 0."""
    mean = (tl.sum(branch, 1) + tl.sum(more, 1)) / channels
    centred = tl.where((column < channels)[None, :], branch - mean[:, None], 0.0)
    centred_more = tl.where((beyond < channels)[None, :], more - mean[:, None], 0.0)
    variance = (tl.sum(centred * centred, 1) + tl.sum(centred_more * centred_more, 1)) / channels
    return mean, tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))


@triton.jit
def add_projected(
    x_ptr,
    y_ptr,
    branch_ptr,
    parts,
    vectors,
    scale,
    row,
    rows,
    counts,
    eps,
    CHANNELS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Write y = x + s · LN(branch + b) for what a last product gave, and what the norm reads where it is KEPT.

    Or y = x + s · (branch + b), where the norm came first.
    """
    branch, more, column, beyond = parts
    layer_bias_ptr, weight_ptr, bias_ptr = vectors
    branch += vector(layer_bias_ptr, column, CHANNELS)[None, :]
    more += vector(layer_bias_ptr, beyond, CHANNELS)[None, :]
    if KEPT:
        write_rows(branch_ptr, branch, None, row, rows, counts, column, CHANNELS)
        write_rows(branch_ptr, more, None, row, rows, counts, beyond, CHANNELS)
    # A part is done with before the other is begun, which takes fewer registers.
    if not NORM_FIRST:
        mean, inverse = statistics(branch, more, column, beyond, CHANNELS, eps)
        branch = normed(branch, mean, inverse, weight_ptr, bias_ptr, column, CHANNELS)
    write_rows(y_ptr, branch * scale[:, None], x_ptr, row, rows, counts, column, CHANNELS)
    if not NORM_FIRST:
        more = normed(more, mean, inverse, weight_ptr, bias_ptr, beyond, CHANNELS)
    write_rows(y_ptr, more * scale[:, None], x_ptr, row, rows, counts, beyond, CHANNELS)


@triton.jit
def normed(x, mean, inverse, weight_ptr, bias_ptr, column, CHANNELS: tl.constexpr):
    """Return w · unit(x) + b of a part of the columns of rows, 0 past the channels."""
    weight, bias = vector(weight_ptr, column, CHANNELS), vector(bias_ptr, column, CHANNELS)
    return (x - mean[:, None]) * inverse[:, None] * weight[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["frames"])
def _forward_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    offset_ptr,
    y_ptr,
    rows,
    frames,
    channels,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCALED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """y = x + s · (w · unit(branch) + b), without x or the norm where there is none; rows that do not count stay x.

    Or, without x, become 0.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_C)
    inside = column < channels
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    counts = row < counted(offset_ptr, frames, rows, PACKED)
    y = tl.load(branch_ptr + at, mask=counts[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if weight_ptr is not None:
        unit, _ = unit_rows(y, column, channels, eps)
        y = unit * vector(weight_ptr, column, channels)[None, :] + vector(bias_ptr, column, channels)[None, :]
    y *= row_scale_of(scale_ptr, row, counts, SCALED)[:, None]
    write_rows(y_ptr, y, x_ptr, row, rows, counts, column, channels)


@triton.jit(do_not_specialize=["frames", "blocks", "chunks"])
def _backward_kernel(
    grad_y_ptr,
    branch_ptr,
    weight_ptr,
    scale_ptr,
    offset_ptr,
    skip_ptr,
    grad_branch_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_layer_ptr,
    rows,
    frames,
    channels,
    eps,
    blocks,
    chunks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCALED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradient of branch for a chunk of blocks of rows, and the chunk's sums [chunks, C] for weight and bias.

    And, where there is a place for them, those of the gradient itself, for the bias of the layer before. Where there is
    something to be added to the gradient, rows that do not count get that alone.
    """
    column = tl.arange(0, BLOCK_C)
    inside = column < channels
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    valid = counted(offset_ptr, frames, rows, PACKED)
    # Block on block, and over the rows of one at the end alone: that sum goes through shared memory.
    grad_weight = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    grad_layer = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    chunk = tl.program_id(0).to(tl.int64)
    begin, end = chunk_of(blocks, chunk, chunks)
    for block in range(begin, end):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        counts = row < valid
        mask = counts[:, None] & inside[None, :]
        branch = tl.load(branch_ptr + at, mask=mask, other=0.0).to(tl.float32)
        unit, inverse = unit_rows(branch, column, channels, eps)
        unit = tl.where(counts[:, None], unit, 0.0)  # not a number where a row is all zeros and eps is 0
        grad = tl.load(grad_y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad *= row_scale_of(scale_ptr, row, counts, SCALED)[:, None]
        grad_weight += grad * unit
        grad_bias += grad
        grad *= weight[None, :]
        along = tl.sum(grad * unit, 1) / channels
        grad = (grad - (tl.sum(grad, 1) / channels)[:, None] - unit * along[:, None]) * inverse[:, None]
        grad = tl.where(counts[:, None], grad, 0.0)
        if grad_layer_ptr is not None:
            grad_layer += grad
        written = (row < rows)[:, None] & inside[None, :]
        if skip_ptr is not None:
            grad += tl.load(skip_ptr + at, mask=written, other=0.0).to(tl.float32)
        tl.store(grad_branch_ptr + at, grad.to(grad_branch_ptr.dtype.element_ty), mask=written)
    at = chunk * channels + column
    tl.store(grad_weight_ptr + at, tl.sum(grad_weight, 0), mask=inside)
    tl.store(grad_bias_ptr + at, tl.sum(grad_bias, 0), mask=inside)
    if grad_layer_ptr is not None:
        tl.store(grad_layer_ptr + at, tl.sum(grad_layer, 0), mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def _sum_chunks_kernel(
    sums_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    chunks,
    channels,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add up the chunks of each of two or three vectors [2 or 3, chunks, C], in fixed order."""
    vector = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    total = tl.zeros([BLOCK_CHUNKS, BLOCK_C], tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        at = (vector.to(tl.int64) * chunks + chunk)[:, None] * channels + column[None, :]
        total += tl.load(sums_ptr + at, mask=(chunk < chunks)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, 0)
    if vector == 0:
        tl.store(first_ptr + column, result.to(first_ptr.dtype.element_ty), mask=inside)
    elif vector == 1:
        tl.store(second_ptr + column, result.to(second_ptr.dtype.element_ty), mask=inside)
    elif third_ptr is not None:
        tl.store(third_ptr + column, result.to(third_ptr.dtype.element_ty), mask=inside)


def _blocks(channels: int, elements: int, warps: int) -> dict[str, int]:
    """Return the rows and columns of a program, and its warps."""
    width = max(16, triton.next_power_of_2(channels))
    return {"BLOCK_ROWS": max(1, elements // width), "BLOCK_C": width, "num_warps": warps}


def add_normed(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_scale: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
) -> Tensor:
    """Return y [R, C] in the type of x; x and branch are contiguous. Rows past the last offset stay x."""
    return _filled(torch.empty_like(x), x, branch, (norm_weight, norm_bias), row_scale, cu_seqlens, eps)


def add_scaled(x: Tensor, branch: Tensor, row_scale: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return x + s · branch [R, C] in the type of x; both are contiguous. Rows past the last offset stay x."""
    return _filled(torch.empty_like(x), x, branch, (None, None), row_scale, cu_seqlens)


def norm_rows(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, cu_seqlens: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Return LN(x) [R, C] in a type, 0 in rows past the last offset; x is contiguous."""
    return _filled(torch.empty_like(x, dtype=dtype), None, x, (norm_weight, norm_bias), None, cu_seqlens, eps)


def scale_rows(x: Tensor, row_scale: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return s · x [R, C] in a type, 0 in rows past the last offset: x itself where it is that; x is contiguous."""
    if row_scale is None and cu_seqlens is None and x.dtype == dtype:
        return x
    return _filled(torch.empty_like(x, dtype=dtype), None, x, (None, None), row_scale, cu_seqlens)


def _filled(
    y: Tensor,
    x: Tensor | None,
    branch: Tensor,
    norm: tuple[Tensor | None, Tensor | None],
    row_scale: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float = 0.0,
) -> Tensor:
    """Fill y [R, C] with x + s · LN(branch), without x or the norm where there is none, and return it."""
    rows, channels = y.shape
    if y.numel():
        options = _blocks(channels, _BLOCK_ELEMENTS, 4)
        _forward_kernel[(triton.cdiv(rows, options["BLOCK_ROWS"]),)](
            x,
            branch,
            *norm,
            row_scale,
            cu_seqlens,
            y,
            rows,
            0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            channels,
            eps,
            SCALED=row_scale is not None,
            PACKED=cu_seqlens is not None,
            **options,
        )
    return y


def gradient_through_norm(
    grad_y: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    row_scale: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    *types: torch.dtype,
    skip: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of branch [R, C], norm_weight and norm_bias [C], these in the first two of the types.

    And, where a third type is given, that of the bias [C] of the layer that gave the branch: the sum over rows. grad_y
    and branch are contiguous, and so is skip [R, C], which is added to the gradient of branch in the end.
    """
    rows, channels = branch.shape
    grad_branch = torch.empty_like(branch)
    # A tensor for each, since an operator's outputs share no memory.
    new = branch.new_empty if branch.numel() else branch.new_zeros
    vectors = [new(channels, dtype=kind) for kind in types]
    if not branch.numel():
        return grad_branch, *vectors
    options = _blocks(channels, _SUMMED_ELEMENTS, 8)
    blocks = triton.cdiv(rows, options["BLOCK_ROWS"])
    chunks = min(blocks, _SUMMING_PROGRAMS)
    sums = branch.new_empty((len(types), chunks, channels), dtype=torch.float32)
    _backward_kernel[(chunks,)](
        grad_y,
        branch,
        norm_weight,
        row_scale,
        cu_seqlens,
        skip,
        grad_branch,
        sums[0],
        sums[1],
        sums[2] if len(types) == 3 else None,
        rows,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        channels,
        eps,
        blocks,
        chunks,
        SCALED=row_scale is not None,
        PACKED=cu_seqlens is not None,
        **options,
    )
    _sum_chunks_kernel[(triton.cdiv(channels, _SUMMED_CHANNELS), len(types))](
        sums, *vectors, *[None] * (3 - len(types)), chunks, channels, BLOCK_CHUNKS=128, BLOCK_C=_SUMMED_CHANNELS
    )
    return grad_branch, *vectors


class ResidualBackward:
    """The sum and the norm of half a block on the way back: what comes before its layers, and what after them.

    Attributes:
        grad_branch: The gradient of what the layers gave [R, C], in their type.
        read: The rows that they read [R, C]: x, or with norm_first LN(x), which is in their type.
        skip: What the gradient of these rows is added to: that of y, or with norm_first nothing, until :meth:`finish`.
    """

    def __init__(
        self,
        *,
        grad_y: Tensor,
        x: Tensor,
        branch: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        layer_bias: Tensor,
        row_scale: Tensor | None,
        cu_seqlens: Tensor | None,
        eps: float,
        norm_first: bool,
        wants_layers: bool,
    ) -> None:
        """Go as far as the layers, whose last bias is layer_bias [C] and whose type that of branch is."""
        self._grad_y, self._x = grad_y.contiguous(), x.contiguous()
        self._weight, self._eps, self._norm_first = norm_weight.contiguous(), eps, norm_first
        self._cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self._types, self._of_layer = (norm_weight.dtype, norm_bias.dtype), [layer_bias.dtype] * wants_layers
        scale = None if row_scale is None else row_scale.contiguous()
        self.read, self.skip = self._x, None if norm_first else self._grad_y
        if norm_first:
            norm = (self._weight, norm_bias.contiguous())
            self.read = norm_rows(self._x, *norm, self._cu_seqlens, eps, branch.dtype)
            self.grad_branch = scale_rows(self._grad_y, scale, self._cu_seqlens, branch.dtype)
        else:
            through = (self._grad_y, branch.contiguous(), self._weight, scale, self._cu_seqlens, eps)
            self.grad_branch, *self._found = gradient_through_norm(*through, *self._types, *self._of_layer)

    def finish(self, grad_read: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of x, norm_weight, norm_bias and, where the layers' are wanted, layer_bias.

        grad_read is that of the rows that the layers read, added to what it is to be.
        """
        if not self._norm_first:
            return grad_read, *self._found
        through = (grad_read, self._x, self._weight, None, self._cu_seqlens, self._eps, *self._types)
        of_layer = (self.grad_branch.sum(0, dtype=torch.float32).to(dtype) for dtype in self._of_layer)
        return *gradient_through_norm(*through, skip=self._grad_y), *of_layer


def residual_norm_fwd(
    x: Tensor, branch: Tensor, norm_weight: Tensor, norm_bias: Tensor, row_scale: Tensor | None, eps: float
) -> Tensor:
    """Return y [R, C] in the type of x."""
    with torch.cuda.device_of(x):
        scale = None if row_scale is None else row_scale.contiguous()
        weight, bias = norm_weight.contiguous(), norm_bias.contiguous()
        return add_normed(x.contiguous(), branch.contiguous(), weight, bias, scale, None, eps)


def residual_norm_bwd(
    grad_y: Tensor, branch: Tensor, norm_weight: Tensor, row_scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of branch [R, C], norm_weight and norm_bias [C], both in the type of norm_weight."""
    with torch.cuda.device_of(branch):
        scale = None if row_scale is None else row_scale.contiguous()
        types = (norm_weight.dtype, norm_weight.dtype)
        grad_branch, grad_weight, grad_bias = gradient_through_norm(
            grad_y.contiguous(), branch.contiguous(), norm_weight.contiguous(), scale, None, eps, *types
        )
        return grad_branch, grad_weight, grad_bias
