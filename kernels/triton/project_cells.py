"""The projection of cells in Triton: y = LN(W cell + b), whose cells are read where they lie, or W LN(cell) + b.

One kernel forward: a program takes a block of cells through the product, a part of their numbers at a time, and norms
whole rows. Backward goes through the norm (the kernel of `residual_norm`) and leaves the products to torch.

Cells whose norm comes first are laid out and normed by that module's kernel, again backward, and all products are
torch's.
"""

import torch
from deepmsi._triton.operands import in_two, narrowed, tile, upcasts, vector, write_rows
from deepmsi._triton.residual_norm import (
    counted,
    gradient_through_norm,
    norm_rows,
    normed,
    scale_rows,
    statistics,
)
from torch import Tensor

import triton
import triton.language as tl

_ROWS = 64


@triton.jit(do_not_specialize=["frames"])
def _forward_kernel(
    x_ptr,
    stride_frame,
    stride_row,
    stride_column,
    stride_down,
    stride_across,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    offset_ptr,
    y_ptr,
    branch_ptr,
    rows,
    frames,
    height,
    width,
    eps,
    CHANNELS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_MORE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr,
    PACKED: tl.constexpr,
    KEPT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The whole of it for a block of cells; what the norm reads is written where it is KEPT."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    DEPTH: tl.constexpr = DOWN * ACROSS * INNER
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    counts = row < counted(offset_ptr, frames, rows, PACKED)
    cell = (row // (height * width)).to(tl.int64) * stride_frame
    cell += (row // width % height).to(tl.int64) * stride_row + (row % width).to(tl.int64) * stride_column
    column, beyond = tl.arange(0, BLOCK_C), BLOCK_C + tl.arange(0, BLOCK_MORE)
    branch = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    more = tl.zeros([BLOCK_ROWS, BLOCK_MORE], tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        number = first + tl.arange(0, BLOCK_K)
        down, across = number // (ACROSS * INNER), number // INNER % ACROSS
        at = down.to(tl.int64) * stride_down + across.to(tl.int64) * stride_across + number % INNER
        mask = counts[:, None] & (number < DEPTH)[None, :]
        x = narrowed(tl.load(x_ptr + cell[:, None] + at[None, :], mask=mask, other=0.0), DTYPE, UPCAST)
        weight = tile(weight_ptr, column, column < CHANNELS, number, DEPTH, DTYPE, UPCAST)
        weight_more = tile(weight_ptr, beyond, beyond < CHANNELS, number, DEPTH, DTYPE, UPCAST)
        branch = tl.dot(x, tl.trans(weight), branch, input_precision="ieee")
        more = tl.dot(x, tl.trans(weight_more), more, input_precision="ieee")
    if BIASED:
        branch += vector(bias_ptr, column, CHANNELS)[None, :]
        more += vector(bias_ptr, beyond, CHANNELS)[None, :]
    if KEPT:
        write_rows(branch_ptr, branch, None, row, rows, counts, column, CHANNELS)
        write_rows(branch_ptr, more, None, row, rows, counts, beyond, CHANNELS)
    mean, inverse = statistics(branch, more, column, beyond, CHANNELS, eps)
    y = normed(branch, mean, inverse, norm_weight_ptr, norm_bias_ptr, column, CHANNELS)
    write_rows(y_ptr, y, None, row, rows, counts, column, CHANNELS)
    y = normed(more, mean, inverse, norm_weight_ptr, norm_bias_ptr, beyond, CHANNELS)
    write_rows(y_ptr, y, None, row, rows, counts, beyond, CHANNELS)


def project_cells_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    norm_first: bool,
    outputs: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return y [R, C] and what a norm that comes last reads [R, C], or [0, C], both in the type of the weight."""
    with torch.cuda.device_of(x):
        if norm_first:
            norm = (norm_weight.contiguous(), norm_bias.contiguous())
            offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
            y = torch.nn.functional.linear(norm_rows(_laid_out(x), *norm, offsets, eps, weight.dtype), weight, bias)
            return scale_rows(y, None, offsets, weight.dtype), weight.new_empty((0, outputs))
        x = x if x.stride(5) == 1 or x.shape[5] == 1 else x.contiguous()
        frames, height, width, down, across, inner = x.shape
        rows, channels = frames * height * width, outputs
        y = x.new_empty((rows, channels), dtype=weight.dtype)
        branch = x.new_empty((rows if with_grad else 0, channels), dtype=weight.dtype)
        if rows:
            _forward_kernel[(triton.cdiv(rows, _ROWS),)](
                x,
                *x.stride()[:5],
                weight.contiguous(),
                None if bias is None else bias.contiguous(),
                norm_weight.contiguous(),
                norm_bias.contiguous(),
                None if cu_seqlens is None else cu_seqlens.contiguous(),
                y,
                branch,
                rows,
                0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
                height,
                width,
                eps,
                CHANNELS=channels,
                DOWN=down,
                ACROSS=across,
                INNER=inner,
                BLOCK_ROWS=_ROWS,
                **in_two(channels),
                BLOCK_K=32 if down * across * inner > 16 else 16,
                BIASED=bias is not None,
                PACKED=cu_seqlens is not None,
                KEPT=with_grad,
                UPCAST=upcasts(weight.dtype),
                num_warps=4,
                num_stages=3,
            )
        return y, branch


def project_cells_bwd(
    grad_y: Tensor,
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    norm_first: bool,
    wants_x: bool,
    wants_layer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, as it lies, of the weight, and in float32 of the bias and the norm's vectors.

    x is in the weight's type, unless the norm comes first. What is not wanted is empty: that of x, those of weight and
    bias.
    """
    with torch.cuda.device_of(x):
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        if norm_first:
            norm = (norm_weight.contiguous(), norm_bias.contiguous())
            return _gradients_of_normed(grad_y, x, weight, *norm, offsets, eps, wants_x, wants_layer)
        types = [torch.float32] * (3 if wants_layer else 2)
        grad_branch, *vectors = gradient_through_norm(
            grad_y.contiguous(), branch.contiguous(), norm_weight.contiguous(), None, offsets, eps, *types
        )
        grad_weight, grad_bias = weight.new_empty((0,)), weight.new_empty((0,), dtype=torch.float32)
        if wants_layer:
            cells = x.reshape(grad_branch.shape[0], weight.shape[1])
            if offsets is not None:
                # Else rows past the last offset that are not finite, times their gradient of 0, would reach the weight.
                cells = torch.where((torch.arange(len(cells), device=x.device) < offsets[-1])[:, None], cells, 0)
            grad_weight = grad_branch.t() @ cells
            grad_bias = vectors[2]
        grad_x = x.new_empty((0,) * 6)
        if wants_x:
            grad_x = torch.empty_like(x)
            grad_x.copy_((grad_branch @ weight).view(x.shape))
        return grad_x, grad_weight, grad_bias, *vectors[:2]


def _laid_out(x: Tensor) -> Tensor:
    """Return the cells of x [F, H, W, A, B, c] as dense rows [R, A·B·c]."""
    return x.reshape(x.shape[:3].numel(), x.shape[3:].numel()).contiguous()


def _gradients_of_normed(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    wants_x: bool,
    wants_layer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what backward does where the norm comes first."""
    cells, grad = _laid_out(x), scale_rows(grad_y.contiguous(), None, cu_seqlens, weight.dtype)
    grad_weight, grad_bias = weight.new_empty((0,)), weight.new_empty((0,), dtype=torch.float32)
    if wants_layer:
        grad_weight = grad.t() @ norm_rows(cells, norm_weight, norm_bias, cu_seqlens, eps, weight.dtype)
        grad_bias = grad.sum(0, dtype=torch.float32)
    types = (torch.float32, torch.float32)
    grad_cells, *of_norm = gradient_through_norm(grad @ weight, cells, norm_weight, None, cu_seqlens, eps, *types)
    grad_x = x.new_empty((0,) * 6)
    if wants_x:
        grad_x = torch.empty_like(x)
        grad_x.copy_(grad_cells.view(x.shape))
    return grad_x, grad_weight, grad_bias, *of_norm
