"""The residual MLP in Triton: y = x + s · LN(W2 gelu(W1 x + b1) + b2), whose hidden rows are never kept.

Up to 256 channels in 16 bits, where a GPU's memory bounds the products, the whole forward pass is one kernel: a program
takes a block of rows through the hidden layer, some hidden channels at a time. Backward goes through the norm (the
kernel of `residual_norm`), then makes the hidden layer again twice: by rows for the gradient of x, and by hidden
channels for those of the weights, which are partial sums of a fixed number of chunks of rows, added up in fixed order.

A norm that comes first is taken in that kernel, too. Backward makes the normed rows again, goes through the layers as
above, with nothing to add, and through the norm at last.

Above that, and in float32, arithmetic bounds the products. The first is a kernel with bias and GELU in it, the others
are torch's, and backward makes the hidden rows again by torch's product, some rows at a time.
"""

from typing import Any

import torch
from deepmsi._triton.operands import (
    added,
    chunk_of,
    in_two,
    narrowed,
    operands_in_registers,
    stages,
    tile,
    upcasts,
    vector,
    write_rows,
)
from deepmsi._triton.residual_norm import (
    ResidualBackward,
    add_normed,
    add_projected,
    add_scaled,
    counted,
    norm_rows,
    normed,
    row_scale_of,
    statistics,
)
from torch import Tensor

import triton
import triton.language as tl

_MOST_FUSED = 256
# Hidden channels at a time, and rows where a program holds sums over them.
_UNITS = 32
_SUMMED_ROWS = 32
# Programs that sum over rows; it depends on nothing of the device, so that bits do not either.
_SUMMING_PROGRAMS = 1024
# Elements of the hidden rows that live at once in a wide layer.
_HIDDEN_ELEMENTS = 2**27
# Rows and hidden channels of these that a program passes through GELU at once, and programs that do: short ones, for
# memory bounds them, and several times as many as run at once waste little of the last turn.
_GELU_ROWS, _GELU_UNITS = 16, 128
_GELU_PROGRAMS = 4096

HALF_ROOT = tl.constexpr(0.7071067811865476)  # sqrt(1/2)
DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0
HALF_LOG2_E = tl.constexpr(0.7213475204444817)


@triton.jit
def _gelu(x, DTYPE: tl.constexpr):
    """Return gelu(x) in float32, exact enough to be rounded to DTYPE."""
    if DTYPE == tl.float32:  # noqa: SIM300
        return 0.5 * x * (1.0 + tl.erf(x * HALF_ROOT))
    tail, size, _ = _tail(x)
    return tl.maximum(x, 0.0) - size * tail


@triton.jit
def _gelu_and_slope(x, DTYPE: tl.constexpr):
    """Return gelu(x) and its derivative in float32, exact enough to be rounded to DTYPE."""
    if DTYPE == tl.float32:  # noqa: SIM300
        below = 0.5 * (1.0 + tl.erf(x * HALF_ROOT))
        return x * below, below + x * DENSITY * tl.exp(-0.5 * x * x)
    tail, _, bell = _tail(x)
    below = tl.where(x > 0.0, 1.0 - tail, tail)
    return x * below, below + x * DENSITY * bell


@triton.jit
def _tail(x):
    """Return the normal distribution's mass below -|x|, |x| up to 6, and exp(-x²/2), its density's shape.

    Their ratio is smooth: a polynomial of it is off by 1e-4 of it up to |x| = 5, a fifth of a rounding to float16, and
    by 2.5e-4 at 6, in half the instructions of erf. From there on, where gelu is below 1e-8 or x itself, it is held.
    """
    bell = tl.exp2(x * x * -HALF_LOG2_E)
    size = tl.minimum(tl.abs(x), 6.0)
    ratio = 1.8358622e-05 - 5.601584e-07 * size
    ratio = ratio * size - 0.0002632126
    ratio = ratio * size + 0.002182631
    ratio = ratio * size - 0.011712532
    ratio = ratio * size + 0.04343954
    ratio = ratio * size - 0.117399715
    ratio = ratio * size + 0.24298333
    ratio = ratio * size - 0.39762118
    ratio = ratio * size + 0.49995506
    return ratio * bell, size, bell


@triton.jit
def _hidden(rows, more, fc1, fc1_more, fc1_bias_ptr, unit, HIDDEN: tl.constexpr):
    """Return W1 x + b1 of some hidden channels in float32."""
    hidden = tl.dot(rows, tl.trans(fc1), input_precision="ieee")
    hidden = tl.dot(more, tl.trans(fc1_more), hidden, input_precision="ieee")
    return hidden + vector(fc1_bias_ptr, unit, HIDDEN)[None, :]


@triton.jit(do_not_specialize=["frames"])
def _fused_forward_kernel(
    x_ptr,
    fc1_ptr,
    fc1_bias_ptr,
    fc2_ptr,
    fc2_bias_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    offset_ptr,
    y_ptr,
    branch_ptr,
    rows,
    frames,
    eps,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_MORE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCALED: tl.constexpr,
    PACKED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    KEPT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The whole of it for a block of rows; what the norm reads is written where it is KEPT."""
    DTYPE: tl.constexpr = fc1_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column, beyond = tl.arange(0, BLOCK_C), BLOCK_C + tl.arange(0, BLOCK_MORE)
    counts = row < counted(offset_ptr, frames, rows, PACKED)
    if NORM_FIRST:
        x = tile(x_ptr, row, counts, column, CHANNELS, tl.float32, False)
        more = tile(x_ptr, row, counts, beyond, CHANNELS, tl.float32, False)
        mean, inverse = statistics(x, more, column, beyond, CHANNELS, eps)
        x = narrowed(normed(x, mean, inverse, weight_ptr, bias_ptr, column, CHANNELS), DTYPE, UPCAST)
        more = narrowed(normed(more, mean, inverse, weight_ptr, bias_ptr, beyond, CHANNELS), DTYPE, UPCAST)
    else:
        x = tile(x_ptr, row, counts, column, CHANNELS, DTYPE, UPCAST)
        more = tile(x_ptr, row, counts, beyond, CHANNELS, DTYPE, UPCAST)
    branch = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    branch_more = tl.zeros([BLOCK_ROWS, BLOCK_MORE], tl.float32)
    for first in range(0, HIDDEN, BLOCK_H):
        unit = first + tl.arange(0, BLOCK_H)
        fc1 = tile(fc1_ptr, unit, unit < HIDDEN, column, CHANNELS, DTYPE, UPCAST)
        fc1_more = tile(fc1_ptr, unit, unit < HIDDEN, beyond, CHANNELS, DTYPE, UPCAST)
        hidden = _hidden(x, more, fc1, fc1_more, fc1_bias_ptr, unit, HIDDEN)
        active = narrowed(_gelu(hidden, DTYPE), DTYPE, UPCAST)
        fc2 = tile(fc2_ptr, column, column < CHANNELS, unit, HIDDEN, DTYPE, UPCAST)
        fc2_more = tile(fc2_ptr, beyond, beyond < CHANNELS, unit, HIDDEN, DTYPE, UPCAST)
        branch = tl.dot(active, tl.trans(fc2), branch, input_precision="ieee")
        branch_more = tl.dot(active, tl.trans(fc2_more), branch_more, input_precision="ieee")
    parts = (branch, branch_more, column, beyond)
    vectors = (fc2_bias_ptr, weight_ptr, bias_ptr)
    scale = row_scale_of(scale_ptr, row, counts, SCALED)
    add_projected(x_ptr, y_ptr, branch_ptr, parts, vectors, scale, row, rows, counts, eps, CHANNELS, NORM_FIRST, KEPT)


@triton.jit(do_not_specialize=["frames"])
def _fused_grad_x_kernel(
    grad_y_ptr,
    grad_branch_ptr,
    x_ptr,
    fc1_ptr,
    fc1_bias_ptr,
    fc2_ptr,
    offset_ptr,
    grad_x_ptr,
    rows,
    frames,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_MORE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grad x = grad y, where there is one, + (gelu'(W1 x + b1) · (grad branch W2)) W1 for a block of rows."""
    DTYPE: tl.constexpr = fc1_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column, beyond = tl.arange(0, BLOCK_C), BLOCK_C + tl.arange(0, BLOCK_MORE)
    counts = row < counted(offset_ptr, frames, rows, PACKED)
    x = tile(x_ptr, row, counts, column, CHANNELS, DTYPE, UPCAST)
    more = tile(x_ptr, row, counts, beyond, CHANNELS, DTYPE, UPCAST)
    grad_branch = tile(grad_branch_ptr, row, counts, column, CHANNELS, DTYPE, UPCAST)
    grad_more = tile(grad_branch_ptr, row, counts, beyond, CHANNELS, DTYPE, UPCAST)
    grad_x = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    grad_x_more = tl.zeros([BLOCK_ROWS, BLOCK_MORE], tl.float32)
    for first in range(0, HIDDEN, BLOCK_H):
        unit = first + tl.arange(0, BLOCK_H)
        fc1 = tile(fc1_ptr, unit, unit < HIDDEN, column, CHANNELS, DTYPE, UPCAST)
        fc1_more = tile(fc1_ptr, unit, unit < HIDDEN, beyond, CHANNELS, DTYPE, UPCAST)
        fc2 = tile(fc2_ptr, column, column < CHANNELS, unit, HIDDEN, DTYPE, UPCAST)
        fc2_more = tile(fc2_ptr, beyond, beyond < CHANNELS, unit, HIDDEN, DTYPE, UPCAST)
        _, slope = _gelu_and_slope(_hidden(x, more, fc1, fc1_more, fc1_bias_ptr, unit, HIDDEN), DTYPE)
        grad_hidden = tl.dot(grad_branch, fc2, input_precision="ieee")
        grad_hidden = tl.dot(grad_more, fc2_more, grad_hidden, input_precision="ieee")
        grad_hidden = narrowed(grad_hidden * slope, DTYPE, UPCAST)
        grad_x = tl.dot(grad_hidden, fc1, grad_x, input_precision="ieee")
        grad_x_more = tl.dot(grad_hidden, fc1_more, grad_x_more, input_precision="ieee")
    write_rows(grad_x_ptr, grad_x, grad_y_ptr, row, rows, counts, column, CHANNELS)
    write_rows(grad_x_ptr, grad_x_more, grad_y_ptr, row, rows, counts, beyond, CHANNELS)


@triton.jit(do_not_specialize=["frames", "blocks", "chunks"])
def _fused_grad_weights_kernel(
    grad_branch_ptr,
    x_ptr,
    fc1_ptr,
    fc1_bias_ptr,
    fc2_ptr,
    offset_ptr,
    grad_fc1_ptr,
    grad_fc1_bias_ptr,
    grad_fc2_ptr,
    rows,
    frames,
    blocks,
    chunks,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_MORE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A chunk's sums for some hidden channels: fc1 and, transposed, fc2 [chunks, H, C], fc1's bias [chunks, H]."""
    DTYPE: tl.constexpr = fc1_ptr.dtype.element_ty
    PARTS: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    chunk = (tl.program_id(0) // PARTS).to(tl.int64)
    unit = tl.program_id(0) % PARTS * BLOCK_H + tl.arange(0, BLOCK_H)
    column, beyond = tl.arange(0, BLOCK_C), BLOCK_C + tl.arange(0, BLOCK_MORE)
    fc1 = tile(fc1_ptr, unit, unit < HIDDEN, column, CHANNELS, DTYPE, UPCAST)
    fc1_more = tile(fc1_ptr, unit, unit < HIDDEN, beyond, CHANNELS, DTYPE, UPCAST)
    fc2 = tile(fc2_ptr, column, column < CHANNELS, unit, HIDDEN, DTYPE, UPCAST)
    fc2_more = tile(fc2_ptr, beyond, beyond < CHANNELS, unit, HIDDEN, DTYPE, UPCAST)
    fc1_bias = vector(fc1_bias_ptr, unit, HIDDEN)
    valid = counted(offset_ptr, frames, rows, PACKED)
    grad_fc1 = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    grad_fc1_more = tl.zeros([BLOCK_H, BLOCK_MORE], tl.float32)
    grad_fc2 = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    grad_fc2_more = tl.zeros([BLOCK_H, BLOCK_MORE], tl.float32)
    grad_bias = tl.zeros([BLOCK_H], tl.float32)
    begin, end = chunk_of(blocks, chunk, chunks)
    for block in range(begin, end):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        counts = row < valid
        x = tile(x_ptr, row, counts, column, CHANNELS, DTYPE, UPCAST)
        more = tile(x_ptr, row, counts, beyond, CHANNELS, DTYPE, UPCAST)
        grad_branch = tile(grad_branch_ptr, row, counts, column, CHANNELS, DTYPE, UPCAST)
        grad_more = tile(grad_branch_ptr, row, counts, beyond, CHANNELS, DTYPE, UPCAST)
        # By hidden channels and rows, so that the sums over rows need no transposes of what was made here.
        hidden = tl.dot(fc1, tl.trans(x), input_precision="ieee")
        hidden = tl.dot(fc1_more, tl.trans(more), hidden, input_precision="ieee") + fc1_bias[:, None]
        active, slope = _gelu_and_slope(hidden, DTYPE)
        active = narrowed(active, DTYPE, UPCAST)
        grad_fc2 = tl.dot(active, grad_branch, grad_fc2, input_precision="ieee")
        grad_fc2_more = tl.dot(active, grad_more, grad_fc2_more, input_precision="ieee")
        grad_hidden = tl.dot(tl.trans(fc2), tl.trans(grad_branch), input_precision="ieee")
        grad_hidden = tl.dot(tl.trans(fc2_more), tl.trans(grad_more), grad_hidden, input_precision="ieee") * slope
        grad_bias += tl.sum(grad_hidden, 1)
        grad_hidden = narrowed(grad_hidden, DTYPE, UPCAST)
        grad_fc1 = tl.dot(grad_hidden, x, grad_fc1, input_precision="ieee")
        grad_fc1_more = tl.dot(grad_hidden, more, grad_fc1_more, input_precision="ieee")
    _write_sums(grad_fc1_ptr, grad_fc1, chunk, unit, column, HIDDEN, CHANNELS)
    _write_sums(grad_fc1_ptr, grad_fc1_more, chunk, unit, beyond, HIDDEN, CHANNELS)
    _write_sums(grad_fc2_ptr, grad_fc2, chunk, unit, column, HIDDEN, CHANNELS)
    _write_sums(grad_fc2_ptr, grad_fc2_more, chunk, unit, beyond, HIDDEN, CHANNELS)
    tl.store(grad_fc1_bias_ptr + chunk * HIDDEN + unit, grad_bias, mask=unit < HIDDEN)


@triton.jit
def _write_sums(sums_ptr, sums, chunk, unit, column, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr):
    at = (chunk * HIDDEN + unit)[:, None] * CHANNELS + column[None, :]
    tl.store(sums_ptr + at, sums, mask=(unit < HIDDEN)[:, None] & (column < CHANNELS)[None, :])


@triton.jit
def _linear_gelu_kernel(
    x_ptr,
    fc1_ptr,
    fc1_bias_ptr,
    hidden_ptr,
    rows,
    channels,
    HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """gelu(W1 x + b1) for a tile of rows and hidden channels."""
    DTYPE: tl.constexpr = fc1_ptr.dtype.element_ty
    PARTS: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    # Programs that run at once share rows and weights in the cache: GROUP blocks of rows for every hidden tile.
    group = tl.program_id(0) // (GROUP * PARTS)
    held = tl.minimum(tl.cdiv(rows, BLOCK_ROWS) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * PARTS)
    row = (group * GROUP + within % held) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    unit = within // held * BLOCK_H + tl.arange(0, BLOCK_H)
    hidden = tl.zeros([BLOCK_ROWS, BLOCK_H], tl.float32)
    for first in range(0, channels, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        x = tile(x_ptr, row, row < rows, column, channels, DTYPE, UPCAST)
        fc1 = tile(fc1_ptr, unit, unit < HIDDEN, column, channels, DTYPE, UPCAST)
        hidden = tl.dot(x, tl.trans(fc1), hidden, input_precision="ieee")
    hidden = _gelu(hidden + vector(fc1_bias_ptr, unit, HIDDEN)[None, :], DTYPE).to(DTYPE)
    at = row.to(tl.int64)[:, None] * HIDDEN + unit[None, :]
    tl.store(hidden_ptr + at, hidden, mask=(row < rows)[:, None] & (unit < HIDDEN)[None, :])


@triton.jit(do_not_specialize=["blocks", "chunks"])
def _gelu_backward_kernel(
    hidden_ptr,
    grad_ptr,
    grad_bias_ptr,
    rows,
    blocks,
    chunks,
    HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """In place: what fc1 gave becomes its GELU, and the gradient of that the gradient of what fc1 gave.

    For some hidden channels and a chunk of blocks of rows. The chunk's sum of that gradient goes to [chunks, H], where
    there is a place for it.
    """
    unit = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    chunk = tl.program_id(1)
    # Block on block, and over the rows of one at the end alone: that sum goes through shared memory.
    grad_bias = tl.zeros([BLOCK_ROWS, BLOCK_H], tl.float32)
    begin, end = chunk_of(blocks, chunk, chunks)
    for block in range(begin, end):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        at = row.to(tl.int64)[:, None] * HIDDEN + unit[None, :]
        inside = (row < rows)[:, None] & (unit < HIDDEN)[None, :]
        hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        active, slope = _gelu_and_slope(hidden.to(tl.float32), hidden.dtype)
        grad = (grad.to(tl.float32) * slope).to(grad.dtype)
        if grad_bias_ptr is not None:
            grad_bias += grad.to(tl.float32)
        tl.store(hidden_ptr + at, active.to(hidden.dtype), mask=inside)
        tl.store(grad_ptr + at, grad, mask=inside)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + chunk * HIDDEN + unit, tl.sum(grad_bias, 0), mask=unit < HIDDEN)


class _Layer:
    """The weights of a call, and the compile-time constants of the fused kernels."""

    def __init__(self, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, cu_seqlens: Tensor | None) -> None:
        self.fc1, self.fc1_bias, self.fc2 = fc1_weight.contiguous(), fc1_bias.contiguous(), fc2_weight.contiguous()
        self.dtype = fc1_weight.dtype
        self.hidden, self.channels = fc1_weight.shape
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.frames = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.upcast = upcasts(self.dtype)

    @property
    def fused(self) -> bool:
        return self.channels <= _MOST_FUSED and self.dtype != torch.float32

    @property
    def rows(self) -> int:
        """Return the rows that a program takes through the layers, each of which it reads for them.

        128 read them half as often as 64; what they hold of more than 128 channels would fill all registers.
        """
        return 128 if self.channels <= 128 else 64

    @property
    def summed_units(self) -> int:
        """Return the hidden channels whose sums over rows a program holds; they are the rows of its products.

        64 are those of a tensor core of Hopper; of the sums of two parts of 64 or 128 channels they would fill all
        registers.
        """
        widths = in_two(self.channels)
        return 32 if widths["BLOCK_C"] == widths["BLOCK_MORE"] >= 64 else 64

    def constants(self, rows: int, units: int) -> dict[str, Any]:
        """Return the constants of a fused kernel that takes so many rows and hidden channels at a time."""
        return {
            "CHANNELS": self.channels,
            "HIDDEN": self.hidden,
            "BLOCK_ROWS": rows,
            **in_two(self.channels),
            "BLOCK_H": units,
            "PACKED": self.cu_seqlens is not None,
            "UPCAST": self.upcast,
            # One for each 16 rows: more would repeat the products, whose second reads whole rows of the first.
            "num_warps": max(4, rows // 16),
            # Two programs of eight warps share the registers of a multiprocessor.
            "maxnreg": 128 if rows == 128 else None,
            "num_stages": stages(self.channels),
        }

    def parts(self, rows: int) -> list[slice]:
        """Return the rows of a wide layer, in as few equal parts as keep the hidden rows in bounds."""
        count = max(1, triton.cdiv(rows * self.hidden, _HIDDEN_ELEMENTS))
        size = max(1, triton.cdiv(rows, count))
        return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]

    def linear_gelu(self, x: Tensor) -> Tensor:
        """Return gelu(W1 x + b1) [R, H]."""
        rows = x.shape[0]
        out = x.new_empty((rows, self.hidden), dtype=self.dtype)
        wide = self.dtype == torch.float32
        block_rows, block_hidden, block_channels = (64, 64, 32) if wide else (128, 128, 64)
        grid = (triton.cdiv(rows, block_rows) * triton.cdiv(self.hidden, block_hidden),)
        _linear_gelu_kernel[grid](
            x,
            self.fc1,
            self.fc1_bias,
            out,
            rows,
            self.channels,
            HIDDEN=self.hidden,
            BLOCK_ROWS=block_rows,
            BLOCK_H=block_hidden,
            BLOCK_C=block_channels,
            GROUP=8,
            UPCAST=self.upcast,
            num_warps=8,
            num_stages=2 if wide else 3,
        )
        return out

    def gelu_backward(self, hidden: Tensor, grad: Tensor, wants_bias: bool) -> Tensor | None:
        """Pass both [R, H] through GELU in place, the gradient backward; return its sum over rows [H], where wanted."""
        rows = hidden.shape[0]
        blocks, parts = triton.cdiv(rows, _GELU_ROWS), triton.cdiv(self.hidden, _GELU_UNITS)
        chunks = min(blocks, triton.cdiv(_GELU_PROGRAMS, parts))
        sums = hidden.new_empty((chunks, self.hidden), dtype=torch.float32) if wants_bias else None
        _gelu_backward_kernel[(parts, chunks)](
            hidden,
            grad,
            sums,
            rows,
            blocks,
            chunks,
            HIDDEN=self.hidden,
            BLOCK_ROWS=_GELU_ROWS,
            BLOCK_H=_GELU_UNITS,
            num_warps=8,
        )
        return None if sums is None else sums.sum(0)


def residual_mlp_fwd(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_scale: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    norm_first: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return y [R, C] in the type of x, and in that of the weights what a norm that comes last reads, or [0, C]."""
    with torch.cuda.device_of(x):
        x = x.contiguous()
        rows, channels = x.shape
        layer = _Layer(fc1_weight, fc1_bias, fc2_weight, cu_seqlens)
        norm_weight, norm_bias, fc2_bias = norm_weight.contiguous(), norm_bias.contiguous(), fc2_bias.contiguous()
        row_scale = None if row_scale is None else row_scale.contiguous()
        kept = with_grad and not norm_first
        branch = x.new_empty((rows if kept else 0, channels), dtype=layer.dtype)
        if not layer.fused:
            whole = branch if kept else x.new_empty((rows, channels), dtype=layer.dtype)
            norm, offsets = (norm_weight, norm_bias), layer.cu_seqlens
            read = norm_rows(x, *norm, offsets, eps, layer.dtype) if norm_first else x
            for part in layer.parts(rows):
                torch.addmm(fc2_bias, layer.linear_gelu(read[part]), layer.fc2.t(), out=whole[part])
            if norm_first:
                return add_scaled(x, whole, row_scale, offsets), branch
            return add_normed(x, whole, *norm, row_scale, offsets, eps), branch
        y = torch.empty_like(x)
        if rows:
            _fused_forward_kernel[(triton.cdiv(rows, layer.rows),)](
                x,
                layer.fc1,
                layer.fc1_bias,
                layer.fc2,
                fc2_bias,
                norm_weight,
                norm_bias,
                row_scale,
                layer.cu_seqlens,
                y,
                branch,
                rows,
                layer.frames,
                eps,
                SCALED=row_scale is not None,
                NORM_FIRST=norm_first,
                KEPT=kept,
                **layer.constants(layer.rows, _UNITS),
            )
        return y, branch


def residual_mlp_bwd(
    grad_y: Tensor,
    x: Tensor,
    branch: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_scale: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    norm_first: bool,
    wants_layers: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x [R, C], both layers' weights and biases, and the norm's.

    x is in the weights' type, or with norm_first in that of y. Those of the layers are empty where they are not wanted.
    """
    with torch.cuda.device_of(x):
        half = ResidualBackward(
            grad_y=grad_y,
            x=x,
            branch=branch,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            layer_bias=fc2_bias,
            row_scale=row_scale,
            cu_seqlens=cu_seqlens,
            eps=eps,
            norm_first=norm_first,
            wants_layers=wants_layers,
        )
        layer = _Layer(fc1_weight, fc1_bias, fc2_weight, cu_seqlens)
        grad_read = torch.empty_like(half.grad_branch if half.skip is None else half.skip)
        layers = [torch.zeros_like(weight) for weight in (layer.fc1, layer.fc1_bias, layer.fc2)]
        if x.shape[0]:
            through = _fused_gradients if layer.fused else _wide_gradients
            layers = through(layer, half.skip, half.grad_branch, half.read, grad_read, wants_layers)
        grad_x, grad_weight, grad_bias, *of_layer = half.finish(grad_read)
        if not wants_layers:
            layers = [weight.new_empty((0,)) for weight in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
        return grad_x, *layers, *of_layer, grad_weight, grad_bias


def _fused_gradients(
    layer: _Layer, skip: Tensor | None, grad_branch: Tensor, read: Tensor, grad_read: Tensor, wants_layers: bool
) -> list[Tensor]:
    """Write the gradient of the rows read, and add skip where there is one.

    Return those of fc1's weight and bias and of fc2's weight, where they are wanted.
    """
    rows, channels = read.shape
    operands = (read, layer.fc1, layer.fc1_bias, layer.fc2, layer.cu_seqlens)
    constants = layer.constants(layer.rows, _UNITS)
    programs = (triton.cdiv(rows, layer.rows),)
    _fused_grad_x_kernel[programs](skip, grad_branch, *operands, grad_read, rows, layer.frames, **constants)
    if not wants_layers:
        return []
    blocks, units = triton.cdiv(rows, _SUMMED_ROWS), layer.summed_units
    chunks = min(blocks, triton.cdiv(_SUMMING_PROGRAMS, triton.cdiv(layer.hidden, units)))
    if channels > 128 and operands_in_registers():
        units = 32  # the sums of 64 would not fit beside them; the chunks stay as they are
    sums = read.new_empty((2, chunks, layer.hidden, channels), dtype=torch.float32)
    bias_sums = read.new_empty((chunks, layer.hidden), dtype=torch.float32)
    _fused_grad_weights_kernel[(chunks * triton.cdiv(layer.hidden, units),)](
        grad_branch,
        *operands,
        sums[0],
        bias_sums,
        sums[1],
        rows,
        layer.frames,
        blocks,
        chunks,
        **layer.constants(_SUMMED_ROWS, units),
    )
    grad_fc1, grad_fc2 = (part.sum(0).to(layer.dtype) for part in sums)
    return [grad_fc1, bias_sums.sum(0).to(layer.dtype), grad_fc2.t().contiguous()]


def _wide_gradients(
    layer: _Layer, skip: Tensor | None, grad_branch: Tensor, read: Tensor, grad_read: Tensor, wants_layers: bool
) -> list[Tensor]:
    """Write the gradient of the rows read, and add skip where there is one.

    Return those of fc1's weight and bias and of fc2's weight, where they are wanted.
    """
    grad_fc1 = grad_bias = grad_fc2 = None
    if layer.cu_seqlens is not None:
        # Else rows past the last offset that are not finite, times their gradient of 0, would reach the weights, and
        # spoil the gradient that they pass on.
        counts = torch.arange(read.shape[0], device=read.device) < layer.cu_seqlens[-1]
        read = torch.where(counts[:, None], read, 0)
    for part in layer.parts(read.shape[0]):
        rows, grad = read[part], grad_branch[part]
        hidden = torch.addmm(layer.fc1_bias, rows, layer.fc1.t())
        grad_hidden = grad @ layer.fc2
        of_bias = layer.gelu_backward(hidden, grad_hidden, wants_layers)
        if wants_layers:
            grad_fc1 = added(grad_fc1, grad_hidden.t() @ rows)
            grad_bias = added(grad_bias, of_bias)
            grad_fc2 = added(grad_fc2, grad.t() @ hidden)
        if skip is None:
            torch.mm(grad_hidden, layer.fc1, out=grad_read[part])
        else:
            torch.add(skip[part], grad_hidden @ layer.fc1, out=grad_read[part])
    return [total.to(layer.dtype) for total in (grad_fc1, grad_bias, grad_fc2) if total is not None]
