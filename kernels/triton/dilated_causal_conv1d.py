"""The dilated causal convolution of rows in Triton: a product that gathers its rows tap by tap, forward and backward.

One launch is one layer with bias, ReLU, dropout and residual in it. At a few positions (the last step of a network, a
streaming step) a layer is bound by reading its weights once: all positions are then one block of rows, and the columns
are cut narrow so that enough programs read at a time. Splitting the sum as well would take a second launch or a grid
that waits for itself, so a network's last step is one launch for each of its products. Sums have a fixed order.
"""

from typing import Any

import torch
from deepmsi._triton.operands import upcasts
from torch import Tensor

import triton
import triton.language as tl

_BLOCK_ELEMENTS = 1024
# Products of float32 that are added up by themselves: the error of a sum grows with its length.
_STRETCH = 256


@triton.jit
def _relu(x):
    # Not a maximum, which would take 0 for a NaN.
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _keep(seed_ptr, index, threshold):
    """Say which elements dropout keeps: word e mod 4 of Philox4x32-10 at counter e div 4, as the reference has it."""
    counter = index >> 2
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    lane = index & 3
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word.to(tl.int64) >= threshold


@triton.jit
def _tile(pointer, mask, UPCAST: tl.constexpr):
    x = tl.load(pointer, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _forward_products(
    total,
    x_rows,
    weight_ptr,
    tap,
    reached,
    column,
    begin,
    end,
    inputs,
    outputs,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the products of a tap's rows and weights over channels begin to end."""
    for k in range(begin, end, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)
        inside = channel < inputs
        a = _tile(x_rows + channel[None, :], reached[:, None] & inside[None, :], UPCAST)
        w_rows = weight_ptr + (tap * inputs + channel).to(tl.int64)[:, None] * outputs
        w = _tile(w_rows + column[None, :], inside[:, None] & (column < outputs)[None, :], UPCAST)
        total = tl.dot(a, w, total, input_precision="ieee")
    return total


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    seed_ptr,
    y_ptr,
    active_ptr,
    rows,
    count,
    length,
    inputs,
    outputs,
    dilation,
    step,
    first,
    threshold,
    scale,
    TAPS: tl.constexpr,
    RELU: tl.constexpr,
    UPCAST: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = relu(h + residual), h = dropout(relu(b + Σ_i x(t - (k - 1 - i)·d) w_i)) for a block of rows and columns."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    time = first + row % count * step
    start = row // count * length
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(TAPS):
        at = time - (TAPS - 1 - tap) * dilation
        reached = (row < rows) & (at >= 0)
        x_rows = x_ptr + (start + at)[:, None] * inputs
        if STRETCH is None:
            total = _forward_products(
                total, x_rows, weight_ptr, tap, reached, column, 0, inputs, inputs, outputs, UPCAST, BLOCK_K
            )
        else:
            for begin in range(0, inputs, STRETCH):
                end = tl.minimum(begin + STRETCH, inputs)
                part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                total += _forward_products(
                    part, x_rows, weight_ptr, tap, reached, column, begin, end, inputs, outputs, UPCAST, BLOCK_K
                )
    mask = (row < rows)[:, None] & (column < outputs)[None, :]
    index = row[:, None] * outputs + column[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = _relu(total)
    if seed_ptr is not None:
        total = tl.where(_keep(seed_ptr, index, threshold), total * scale, 0.0)
    if active_ptr is not None:
        tl.store(active_ptr + index, (total <= 0.0) == 0, mask=mask)
    if residual_ptr is not None:
        total = _relu(total + tl.load(residual_ptr + index, mask=mask, other=0.0).to(tl.float32))
    tl.store(y_ptr + index, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_kernel(
    grad_y_ptr,
    y_ptr,
    active_ptr,
    gradient_ptr,
    grad_residual_ptr,
    size,
    scale,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the gradient of y back to that of the convolution, and to that of the residual where there was one."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    g = tl.load(grad_y_ptr + index, mask=mask, other=0.0).to(tl.float32)
    if grad_residual_ptr is not None:
        y = tl.load(y_ptr + index, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(y <= 0.0, 0.0, g)
        tl.store(grad_residual_ptr + index, g.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        if RELU:
            g = tl.where(tl.load(active_ptr + index, mask=mask, other=0) != 0, g * scale, 0.0)
    elif RELU:
        y = tl.load(y_ptr + index, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(y <= 0.0, 0.0, g * scale)
    tl.store(gradient_ptr + index, g.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_bias_kernel(gradient_ptr, grad_bias_ptr, rows, outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # In double: a column may be a sum of thousands, and their number is small beside that of the products.
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float64)
    for begin in range(0, rows, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (row < rows)[:, None] & (column < outputs)[None, :]
        part = tl.load(gradient_ptr + row[:, None] * outputs + column[None, :], mask=mask, other=0.0)
        total += tl.sum(part.to(tl.float64), 0)
    tl.store(grad_bias_ptr + column, total.to(tl.float32).to(grad_bias_ptr.dtype.element_ty), mask=column < outputs)


@triton.jit
def _grad_x_products(
    total,
    g_rows,
    w_rows,
    reached,
    there,
    begin,
    end,
    outputs,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the products of a tap's gradients and weights over outputs begin to end."""
    for k in range(begin, end, BLOCK_K):
        output = k + tl.arange(0, BLOCK_K)
        inside = output < outputs
        g = _tile(g_rows + output[None, :], reached[:, None] & inside[None, :], UPCAST)
        w = _tile(w_rows + output[:, None], inside[:, None] & there[None, :], UPCAST)
        total = tl.dot(g, w, total, input_precision="ieee")
    return total


@triton.jit
def _grad_x_kernel(
    gradient_ptr,
    weight_ptr,
    grad_x_ptr,
    rows,
    count,
    length,
    inputs,
    outputs,
    dilation,
    step,
    first,
    TAPS: tl.constexpr,
    UPCAST: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gather for a row of x what the positions that read it hand back: Σ_i g(t + (k - 1 - i)·d) w_iᵀ."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = row // length * count
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(TAPS):
        past = row % length + (TAPS - 1 - tap) * dilation - first
        reached = (row < rows) & (past >= 0) & (past % step == 0) & (past // step < count)
        g_rows = gradient_ptr + (start + past // step)[:, None] * outputs
        w_rows = weight_ptr + (tap * inputs + column).to(tl.int64)[None, :] * outputs
        there = column < inputs
        if STRETCH is None:
            total = _grad_x_products(total, g_rows, w_rows, reached, there, 0, outputs, outputs, UPCAST, BLOCK_K)
        else:
            for begin in range(0, outputs, STRETCH):
                end = tl.minimum(begin + STRETCH, outputs)
                part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                total += _grad_x_products(part, g_rows, w_rows, reached, there, begin, end, outputs, UPCAST, BLOCK_K)
    mask = (row < rows)[:, None] & (column < inputs)[None, :]
    tl.store(grad_x_ptr + row[:, None] * inputs + column[None, :], total.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_weight_products(
    total,
    x_ptr,
    gradient_ptr,
    entry,
    column,
    begin,
    end,
    rows,
    count,
    length,
    inputs,
    outputs,
    step,
    ahead,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the products of inputs and gradients over positions begin to end; the first one reads row `ahead` of x."""
    for k in range(begin, end, BLOCK_K):
        row = k + tl.arange(0, BLOCK_K).to(tl.int64)
        at = ahead + row % count * step
        x_rows = x_ptr + (row // count * length + at)[None, :] * inputs
        a = _tile(x_rows + entry[:, None], ((row < rows) & (at >= 0))[None, :] & (entry < inputs)[:, None], UPCAST)
        g_rows = gradient_ptr + row[:, None] * outputs
        g = _tile(g_rows + column[None, :], (row < rows)[:, None] & (column < outputs)[None, :], UPCAST)
        total = tl.dot(a, g, total, input_precision="ieee")
    return total


@triton.jit
def _grad_weight_kernel(
    x_ptr,
    gradient_ptr,
    grad_weight_ptr,
    rows,
    count,
    length,
    inputs,
    outputs,
    dilation,
    step,
    first,
    TAPS: tl.constexpr,
    UPCAST: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum over all positions: x(t - (k - 1 - i)·d)ᵀ g(t) for a block of inputs and outputs of one tap."""
    entry = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tl.program_id(2)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ahead = first - (TAPS - 1 - tap) * dilation
    if STRETCH is None:
        total = _grad_weight_products(
            total,
            x_ptr,
            gradient_ptr,
            entry,
            column,
            0,
            rows,
            rows,
            count,
            length,
            inputs,
            outputs,
            step,
            ahead,
            UPCAST,
            BLOCK_K,
        )
    else:
        for begin in range(0, rows, STRETCH):
            end = tl.minimum(begin + STRETCH, rows)
            part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            total += _grad_weight_products(
                part,
                x_ptr,
                gradient_ptr,
                entry,
                column,
                begin,
                end,
                rows,
                count,
                length,
                inputs,
                outputs,
                step,
                ahead,
                UPCAST,
                BLOCK_K,
            )
    mask = (entry < inputs)[:, None] & (column < outputs)[None, :]
    to = grad_weight_ptr + (tap * inputs + entry).to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(to, total.to(grad_weight_ptr.dtype.element_ty), mask=mask)


class _Call:
    """Sizes and launch options of one layer."""

    def __init__(self, x: Tensor, weight: Tensor, dilation: int, count: int, step: int) -> None:
        self.x, self.weight = x.contiguous(), weight.contiguous()
        self.batch, length, inputs = x.shape
        taps, _, self.outputs = weight.shape
        self.rows = self.batch * count
        self.first = length - 1 - (count - 1) * step
        if self.first < 0 and count > 0:
            raise ValueError(f"dilated_causal_conv1d: {count} positions, {step} apart, do not lie in {length} rows")
        self.sizes = (count, length, inputs, self.outputs, dilation, step, self.first)
        self.constants: dict[str, Any] = {
            "TAPS": taps,
            "UPCAST": upcasts(x.dtype),
            "STRETCH": _STRETCH if x.dtype == torch.float32 else None,
        }

    def tiles(self, rows: int, columns: int) -> tuple[tuple[int, int], dict[str, Any]]:
        """Return grid and options of a product: few rows get narrow columns and deep steps, to keep memory busy."""
        block_m, block_n, block_k = (16, 16, 128) if rows <= 16 else (32, 32, 64) if rows <= 64 else (64, 64, 32)
        return (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)), self.options(block_m, block_n, block_k)

    def options(self, block_m: int, block_n: int, block_k: int) -> dict[str, Any]:
        """Return constants and launch options: float32 products hold their operands and two sums in registers."""
        options = {**self.constants, "BLOCK_M": block_m, "BLOCK_N": block_n}
        if self.x.dtype != torch.float32:
            return {**options, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
        wide = block_m > 16
        return {
            **options,
            "BLOCK_K": block_k // 2,
            "num_warps": 8 if wide else 4,
            "num_stages": 2 if wide else 4,
        }


def dilated_causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    dilation: int,
    count: int | None,
    step: int,
    relu: bool,
    dropout: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return y [B, count, Cout] and where h is above 0, if the backward will ask (see ``_schemas``)."""
    with torch.cuda.device_of(x):
        count = x.shape[1] if count is None else count
        call = _Call(x, weight, dilation, count, step)
        size = (call.batch, count, call.outputs)
        y = x.new_empty(size)
        kept = relu and residual is not None and with_grad
        active = x.new_empty(size if kept else (0,), dtype=torch.bool)
        if y.numel():
            grid, options = call.tiles(call.rows, call.outputs)
            _forward_kernel[grid](
                call.x,
                call.weight,
                bias.contiguous() if bias is not None else None,
                residual.contiguous() if residual is not None else None,
                seed if dropout > 0 else None,
                y,
                active if kept else None,
                call.rows,
                *call.sizes,
                int(dropout * 2.0**32),
                1 / (1 - dropout),
                RELU=relu,
                **options,
            )
    return y, active


def dilated_causal_conv1d_bwd(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    active: Tensor,
    dilation: int,
    step: int,
    relu: bool,
    residual: bool,
    dropout: float,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and residual; empty where one is not wanted or was not there."""
    with torch.cuda.device_of(x):
        call = _Call(x, weight, dilation, grad_y.shape[1], step)
        grad_y, y = grad_y.contiguous(), y.contiguous()
        gradient = torch.empty_like(grad_y)
        grad_residual = x.new_empty(grad_y.shape if residual else (0,))
        grad_x = x.new_empty(x.shape if want_x else (0,))
        grad_weight = x.new_empty(weight.shape if want_weight else (0,))
        grad_bias = x.new_empty((call.outputs,))
        if not grad_y.numel():
            return grad_x.zero_(), grad_weight.zero_(), grad_bias.zero_(), grad_residual
        _gradient_kernel[(triton.cdiv(grad_y.numel(), _BLOCK_ELEMENTS),)](
            grad_y,
            y,
            active.contiguous() if relu and residual else None,
            gradient,
            grad_residual if residual else None,
            grad_y.numel(),
            1 / (1 - dropout),
            RELU=relu,
            BLOCK=_BLOCK_ELEMENTS,
        )
        _grad_bias_kernel[(triton.cdiv(call.outputs, 32),)](
            gradient, grad_bias, call.rows, call.outputs, BLOCK_M=32, BLOCK_N=32
        )
        if want_x:
            rows = call.batch * x.shape[1]
            grid, options = call.tiles(rows, x.shape[2])
            _grad_x_kernel[grid](gradient, call.weight, grad_x, rows, *call.sizes, **options)
        if want_weight:
            grid = (triton.cdiv(x.shape[2], 64), triton.cdiv(call.outputs, 64), weight.shape[0])
            _grad_weight_kernel[grid](call.x, gradient, grad_weight, call.rows, *call.sizes, **call.options(64, 64, 32))
    return grad_x, grad_weight, grad_bias, grad_residual
