"""The position bias of Swin V2 in Triton: t = 16 · σ(W₂ · relu(W₁ · coordinates + b)), one launch each way.

Forward, a program takes some offsets and goes through the hidden units; backward, it takes some hidden units, goes
through the offsets and makes its units again, so that no sum is of several programs. Weights are read in their own
types, and all else is float32.
"""

import torch
from deepmsi._triton.operands import tile, vector
from torch import Tensor

import triton
import triton.language as tl


@triton.jit
def _place(coordinates_ptr, offset, offsets):
    """Return both coordinates of offsets, 0 past the last one."""
    return vector(coordinates_ptr, 2 * offset, 2 * offsets), vector(coordinates_ptr, 2 * offset + 1, 2 * offsets)


@triton.jit
def _unit(weight_ptr, bias_ptr, unit, units):
    """Return both weights of hidden units and their bias, 0 past the last one."""
    return (
        vector(weight_ptr, 2 * unit, 2 * units),
        vector(weight_ptr, 2 * unit + 1, 2 * units),
        vector(bias_ptr, unit, units),
    )


@triton.jit
def _raw(place, weights):
    """Return W₁ · coordinates + b of offsets and hidden units, which relu has still to be taken of."""
    return place[0][:, None] * weights[0][None, :] + place[1][:, None] * weights[1][None, :] + weights[2][None, :]


@triton.jit
def _forward_kernel(
    coordinates_ptr,
    hidden_weight_ptr,
    hidden_bias_ptr,
    out_weight_ptr,
    table_ptr,
    offsets,
    units,
    heads,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """t of some offsets [BLOCK_P, heads]."""
    offset = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    head = tl.arange(0, BLOCK_H)
    place = _place(coordinates_ptr, offset, offsets)
    logits = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for first in range(0, units, BLOCK_D):
        unit = first + tl.arange(0, BLOCK_D)
        raw = _raw(place, _unit(hidden_weight_ptr, hidden_bias_ptr, unit, units))
        out = tile(out_weight_ptr, head, head < heads, unit, units, tl.float32, False)
        # Not by the larger of two numbers, which would hide what is none.
        logits = tl.dot(tl.where(raw < 0, 0.0, raw), tl.trans(out), logits, input_precision="ieee")
    at = offset[:, None] * heads + head[None, :]
    tl.store(table_ptr + at, 16 * tl.sigmoid(logits), mask=(offset < offsets)[:, None] & (head < heads)[None, :])


@triton.jit
def _backward_kernel(
    grad_table_ptr,
    coordinates_ptr,
    hidden_weight_ptr,
    hidden_bias_ptr,
    out_weight_ptr,
    table_ptr,
    grad_hidden_weight_ptr,
    grad_hidden_bias_ptr,
    grad_out_weight_ptr,
    offsets,
    units,
    heads,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradients of the weights of some hidden units; that of a logit is that of t times t · (1 - t / 16)."""
    unit = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    head = tl.arange(0, BLOCK_H)
    weights = _unit(hidden_weight_ptr, hidden_bias_ptr, unit, units)
    out = tile(out_weight_ptr, head, head < heads, unit, units, tl.float32, False)
    grad_out = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    grad_first = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    grad_second = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for begin in range(0, offsets, BLOCK_P):
        offset = begin + tl.arange(0, BLOCK_P)
        place = _place(coordinates_ptr, offset, offsets)
        raw = _raw(place, weights)
        table = tile(table_ptr, offset, offset < offsets, head, heads, tl.float32, False)
        grad = tile(grad_table_ptr, offset, offset < offsets, head, heads, tl.float32, False)
        grad *= table * (1 - table / 16)
        grad_out = tl.dot(tl.trans(grad), tl.where(raw < 0, 0.0, raw), grad_out, input_precision="ieee")
        grad_raw = tl.where(raw <= 0, 0.0, tl.dot(grad, out, input_precision="ieee"))
        grad_first += grad_raw * place[0][:, None]
        grad_second += grad_raw * place[1][:, None]
        grad_bias += grad_raw
    counts = unit < units
    kind = grad_hidden_weight_ptr.dtype.element_ty
    tl.store(grad_hidden_weight_ptr + 2 * unit, tl.sum(grad_first, 0).to(kind), mask=counts)
    tl.store(grad_hidden_weight_ptr + 2 * unit + 1, tl.sum(grad_second, 0).to(kind), mask=counts)
    kind = grad_hidden_bias_ptr.dtype.element_ty
    tl.store(grad_hidden_bias_ptr + unit, tl.sum(grad_bias, 0).to(kind), mask=counts)
    at = head[:, None] * units + unit[None, :]
    grad_out = grad_out.to(grad_out_weight_ptr.dtype.element_ty)
    tl.store(grad_out_weight_ptr + at, grad_out, mask=(head < heads)[:, None] & counts[None, :])


def _blocks(offsets: int, units: int, heads: int) -> dict[str, int]:
    """Return how many offsets, hidden units and heads (all of them) a program takes at a time."""
    return {"BLOCK_P": offsets, "BLOCK_D": units, "BLOCK_H": max(16, triton.next_power_of_2(heads))}


def position_bias_fwd(coordinates: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, out_weight: Tensor) -> Tensor:
    """Return t [P, heads] in float32."""
    heads, units = out_weight.shape
    offsets = coordinates.shape[0]
    table = out_weight.new_empty((offsets, heads), dtype=torch.float32)
    if table.numel():
        options = _blocks(16, 128, heads)
        with torch.cuda.device_of(out_weight):
            _forward_kernel[(triton.cdiv(offsets, options["BLOCK_P"]),)](
                coordinates.contiguous(),
                hidden_weight.contiguous(),
                hidden_bias.contiguous(),
                out_weight.contiguous(),
                table,
                offsets,
                units,
                heads,
                **options,
            )
    return table


def position_bias_bwd(
    grad_table: Tensor,
    coordinates: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    table: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of hidden_weight [D, 2], hidden_bias [D] and out_weight [heads, D], each in its type."""
    heads, units = out_weight.shape
    weights = (hidden_weight, hidden_bias, out_weight)
    grads = tuple(weight.new_empty(weight.shape) for weight in weights)
    if units:
        options = _blocks(16, 32, heads)
        with torch.cuda.device_of(out_weight):
            _backward_kernel[(triton.cdiv(units, options["BLOCK_D"]),)](
                grad_table.contiguous(),
                coordinates.contiguous(),
                *(weight.contiguous() for weight in weights),
                table.contiguous(),
                *grads,
                coordinates.shape[0],
                units,
                heads,
                **options,
            )
    return grads
