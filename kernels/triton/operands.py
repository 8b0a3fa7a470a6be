"""Matrices and vectors as operands of products, rounded to the type that these are in.

Kernels that hold whole rows take their columns in two parts, each a power of two wide: 96 and 192 channels are none,
and one part of 128 or 256 would multiply a third more.
"""

import os

import torch
from torch import Tensor

import triton
import triton.language as tl
from triton.runtime import driver

_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


@triton.jit
def tile(x_ptr, row, counts, column, width, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Read rows and columns of a matrix of `width` columns, 0 where they do not count."""
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask=counts[:, None] & (column < width)[None, :], other=0.0)
    return narrowed(x, DTYPE, UPCAST)


@triton.jit
def vector(x_ptr, column, width):
    """Read entries in float32, 0 past the `width`."""
    return tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Round to the type of the operands; UPCAST where the interpreter would multiply bfloat16 as integers."""
    x = x.to(DTYPE)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def write_rows(out_ptr, values, skip_ptr, row, rows, counts, column, channels):
    """Write skip + values, or these alone, for a part of the columns; rows that do not count get skip, or 0."""
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    written = (row < rows)[:, None] & (column < channels)[None, :]
    if skip_ptr is not None:
        skip = tl.load(skip_ptr + at, mask=written, other=0.0)
        values = tl.where(counts[:, None], (skip.to(tl.float32) + values).to(skip.dtype), skip)
    else:
        values = tl.where(counts[:, None], values, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, values, mask=written)


@triton.jit
def chunk_of(items, chunk, chunks):
    """Return where one of so many chunks of consecutive items begins and ends; they differ by one item at most."""
    begin = (chunk.to(tl.int64) * items // chunks).to(tl.int32)
    end = ((chunk + 1).to(tl.int64) * items // chunks).to(tl.int32)
    return begin, end


def added(total: Tensor | None, part: Tensor) -> Tensor:
    """Return a sum with one more part: the first as it is, from the second on in float32 and in place."""
    return part if total is None else total.float().add_(part)


def in_two(channels: int) -> dict[str, int]:
    """Return the widths of the two parts that cover so many columns."""
    first = max(16, triton.next_power_of_2(channels) // 2)
    return {"BLOCK_C": first, "BLOCK_MORE": max(16, triton.next_power_of_2(channels - first))}


def upcasts(dtype: torch.dtype) -> bool:
    """Whether products are to be taken in float32: the interpreter multiplies bfloat16 as if it were integers."""
    return _INTERPRET and dtype == torch.bfloat16


def operands_in_registers() -> bool:
    """Whether the current GPU multiplies what lies in registers, warp by warp: Ampere, Ada, Blackwell's GeForce.

    Hopper's tensor cores and those of large Blackwells read operands from shared memory.
    """
    return _generation() in (8, 12)


def on_hopper() -> bool:
    """Whether the current GPU is of Hopper's kind."""
    return _generation() == 9


def _generation() -> int | None:
    return None if _INTERPRET else driver.active.get_current_target().arch // 10


def stages(channels: int, size: int = 2) -> int:
    """Return how many turns' operands of so many columns lie in shared memory at once, by what smaller cards have.

    They are of ``size`` bytes each. Cards of Hopper's kind have room for two turns of 192 columns in float32.
    """
    return 2 if channels * size <= 384 or (channels <= 192 and not operands_in_registers()) else 1
