"""The residual window attention in Triton: y = x + s · LN(P attention(Q x + q) + p), in two kernels forward.

The first goes from x to what the projection reads, a window of one head at a time: q, k and v are made, used and
forgotten, and weights and position bias are read once for a chunk of windows. The second projects whole rows, norms
them and adds x. Of thirteen passes over rows of C channels that a layer after the other takes, five are left. That
pays where memory bounds the products, up to 256 channels in 16 bits. Backward goes through the norm (the kernel of
`residual_norm`), makes q, k and v again by torch's product, some frames at a time, goes through the attention (the
kernels of `window_attention`), and adds the gradient of y in the product that takes that of q, k and v to x.

A norm that comes first is a kernel before these, forward and again backward, whose rows the first reads in place of x,
for it would read and norm them for every head; backward goes through it at last.
"""

import torch
from deepmsi._triton.operands import added, chunk_of, in_two, narrowed, stages, tile, upcasts, write_rows
from deepmsi._triton.residual_norm import (
    ResidualBackward,
    add_projected,
    counted,
    norm_rows,
    row_scale_of,
)
from deepmsi._triton.window_attention import (
    EMPTY_QUERY,
    LOG2_E,
    Windows,
    entries,
    factor_of,
    slots,
    tile_logits,
    window_attention_bwd,
)
from torch import Tensor

import triton
import triton.language as tl

_ROWS = 64
# Programs of the first kernel: enough to fill any device several times, few enough that each reads its weights once
# for many windows. No sum goes over windows, so bits do not depend on it.
_PROGRAMS = 1024
# Elements of q, k and v that backward makes again at once.
_QKV_ELEMENTS = 2**27


@triton.jit(do_not_specialize=["windows", "chunks"])
def _attend_kernel(
    x_ptr,
    qkv_ptr,
    qkv_bias_ptr,
    table_ptr,
    head_scale_ptr,
    map_ptr,
    attended_ptr,
    scale,
    windows,
    chunks,
    height,
    width,
    shift,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_MORE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BIASED: tl.constexpr,
    COSINE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend for one head of a chunk of windows, from x to before the projection."""
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    HEADS: tl.constexpr = CHANNELS // DEPTH
    head, chunk = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    column, beyond = tl.arange(0, BLOCK_C), BLOCK_C + tl.arange(0, BLOCK_MORE)
    depth = tl.arange(0, BLOCK_D)
    mine = depth < DEPTH
    unit = head * DEPTH + depth
    to_q = tile(qkv_ptr, unit, mine, column, CHANNELS, DTYPE, UPCAST)
    to_k = tile(qkv_ptr, unit + CHANNELS, mine, column, CHANNELS, DTYPE, UPCAST)
    to_v = tile(qkv_ptr, unit + 2 * CHANNELS, mine, column, CHANNELS, DTYPE, UPCAST)
    to_q_more = tile(qkv_ptr, unit, mine, beyond, CHANNELS, DTYPE, UPCAST)
    to_k_more = tile(qkv_ptr, unit + CHANNELS, mine, beyond, CHANNELS, DTYPE, UPCAST)
    to_v_more = tile(qkv_ptr, unit + 2 * CHANNELS, mine, beyond, CHANNELS, DTYPE, UPCAST)
    q_bias = tl.zeros([BLOCK_D], tl.float32)
    k_bias, v_bias = q_bias, q_bias
    if BIASED:
        q_bias = tl.load(qkv_bias_ptr + unit, mask=mine, other=0.0).to(tl.float32)
        k_bias = tl.load(qkv_bias_ptr + CHANNELS + unit, mask=mine, other=0.0).to(tl.float32)
        v_bias = tl.load(qkv_bias_ptr + 2 * CHANNELS + unit, mask=mine, other=0.0).to(tl.float32)
    factor = factor_of(head_scale_ptr, scale, head, COSINE) * LOG2_E
    entry, within = entries(WINDOW, BLOCK)
    bias = tl.load(table_ptr + entry * HEADS + head, mask=within, other=0.0) * LOG2_E
    begin, end = chunk_of(windows, chunk, chunks)
    for window in range(begin, end):
        row, kind, _ = slots(map_ptr, window, 0, height, width, shift, EMPTY_QUERY, WINDOW, BLOCK, PACKED)
        held = kind >= 0 if MASKED else tl.arange(0, BLOCK) >= 0
        x = tile(x_ptr, row, held, column, CHANNELS, DTYPE, UPCAST)
        more = tile(x_ptr, row, held, beyond, CHANNELS, DTYPE, UPCAST)
        q = tl.dot(x, tl.trans(to_q), input_precision="ieee")
        q = tl.dot(more, tl.trans(to_q_more), q, input_precision="ieee") + q_bias[None, :]
        k = tl.dot(x, tl.trans(to_k), input_precision="ieee")
        k = tl.dot(more, tl.trans(to_k_more), k, input_precision="ieee") + k_bias[None, :]
        q, k = narrowed(q, DTYPE, UPCAST), narrowed(k, DTYPE, UPCAST)
        logits = tile_logits(q, k, factor, bias, kind, COSINE, MASKED)
        top = tl.where(held, tl.max(logits, 1), 0.0)
        p = tl.exp2(logits - top[:, None])
        inverse = 1.0 / tl.where(held, tl.sum(p, 1), 1.0)
        v = tl.dot(x, tl.trans(to_v), input_precision="ieee")
        v = tl.dot(more, tl.trans(to_v_more), v, input_precision="ieee") + v_bias[None, :]
        out = tl.dot(narrowed(p, DTYPE, UPCAST), narrowed(v, DTYPE, UPCAST), input_precision="ieee")
        at = row[:, None] * CHANNELS + unit[None, :]
        tl.store(attended_ptr + at, (out * inverse[:, None]).to(DTYPE), mask=held[:, None] & mine[None, :])


@triton.jit(do_not_specialize=["frames"])
def _project_kernel(
    x_ptr,
    attended_ptr,
    proj_ptr,
    proj_bias_ptr,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_MORE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
    PACKED: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    KEPT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y = x + s · LN(P attended + p) for a block of rows; what the norm reads is written where it is KEPT.

    Or y = x + s · (P attended + p), where the norm came first.
    """
    DTYPE: tl.constexpr = proj_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column, beyond = tl.arange(0, BLOCK_C), BLOCK_C + tl.arange(0, BLOCK_MORE)
    counts = row < counted(offset_ptr, frames, rows, PACKED)
    branch = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    branch_more = tl.zeros([BLOCK_ROWS, BLOCK_MORE], tl.float32)
    for first in range(0, CHANNELS, BLOCK_K):
        unit = first + tl.arange(0, BLOCK_K)
        attended = tile(attended_ptr, row, counts, unit, CHANNELS, DTYPE, UPCAST)
        proj = tile(proj_ptr, column, column < CHANNELS, unit, CHANNELS, DTYPE, UPCAST)
        proj_more = tile(proj_ptr, beyond, beyond < CHANNELS, unit, CHANNELS, DTYPE, UPCAST)
        branch = tl.dot(attended, tl.trans(proj), branch, input_precision="ieee")
        branch_more = tl.dot(attended, tl.trans(proj_more), branch_more, input_precision="ieee")
    parts = (branch, branch_more, column, beyond)
    vectors = (proj_bias_ptr, weight_ptr, bias_ptr)
    scale = row_scale_of(scale_ptr, row, counts, SCALED)
    add_projected(x_ptr, y_ptr, branch_ptr, parts, vectors, scale, row, rows, counts, eps, CHANNELS, NORM_FIRST, KEPT)


@triton.jit
def _grad_x_kernel(
    grad_y_ptr,
    grad_qkv_ptr,
    qkv_ptr,
    grad_x_ptr,
    grad_bias_ptr,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_MORE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """grad x = grad y, where there is one, + grad qkv Q for a block of rows.

    And, where there is a place for it, the block's sum of grad qkv, which passes by anyway: [blocks, 3C].
    """
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column, beyond = tl.arange(0, BLOCK_C), BLOCK_C + tl.arange(0, BLOCK_MORE)
    counts = row < rows
    grad_x = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    grad_x_more = tl.zeros([BLOCK_ROWS, BLOCK_MORE], tl.float32)
    for first in range(0, 3 * CHANNELS, BLOCK_K):
        unit = first + tl.arange(0, BLOCK_K)
        grad_qkv = tile(grad_qkv_ptr, row, counts, unit, 3 * CHANNELS, DTYPE, UPCAST)
        qkv = tile(qkv_ptr, unit, unit < 3 * CHANNELS, column, CHANNELS, DTYPE, UPCAST)
        qkv_more = tile(qkv_ptr, unit, unit < 3 * CHANNELS, beyond, CHANNELS, DTYPE, UPCAST)
        grad_x = tl.dot(grad_qkv, qkv, grad_x, input_precision="ieee")
        grad_x_more = tl.dot(grad_qkv, qkv_more, grad_x_more, input_precision="ieee")
        if grad_bias_ptr is not None:
            at = tl.program_id(0) * 3 * CHANNELS + unit
            tl.store(grad_bias_ptr + at, tl.sum(grad_qkv.to(tl.float32), 0), mask=unit < 3 * CHANNELS)
    write_rows(grad_x_ptr, grad_x, grad_y_ptr, row, rows, counts, column, CHANNELS)
    write_rows(grad_x_ptr, grad_x_more, grad_y_ptr, row, rows, counts, beyond, CHANNELS)


def residual_window_attention_fwd(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_scale: Tensor | None,
    eps: float,
    norm_first: bool,
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
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [R, C] in the type of x, and in that of the weights what the norm and the projection read, or [0, C].

    A norm that comes first reads x, and there is nothing to be returned.
    """
    with torch.cuda.device_of(x):
        x = x.contiguous()
        rows, channels = x.shape
        dtype = qkv_weight.dtype
        layout = (positions, cu_seqlens, heads, height, width, window, shift)
        call = Windows(rows, channels, dtype, bias_table, head_scale, *layout)
        norm = (norm_weight.contiguous(), norm_bias.contiguous())
        read = norm_rows(x, *norm, call.cu_seqlens, eps, dtype) if norm_first else x
        attended = x.new_empty((rows, channels), dtype=dtype)
        call.zero_tail(attended)
        if call.windows:
            chunks = min(call.windows, triton.cdiv(_PROGRAMS, heads))
            _attend_kernel[(chunks * heads,)](
                read,
                qkv_weight.contiguous(),
                None if qkv_bias is None else qkv_bias.contiguous(),
                bias_table.contiguous(),
                call.head_scale,
                call.map,
                attended,
                scale,
                call.windows,
                chunks,
                height,
                width,
                shift,
                CHANNELS=channels,
                BIASED=qkv_bias is not None,
                **in_two(channels),
                **call.constants,
                num_warps=call.warps,
                num_stages=stages(channels, read.element_size()),
            )
        y = torch.empty_like(x)
        kept = with_grad and not norm_first
        branch = attended.new_empty((rows if kept else 0, channels))
        if rows:
            _project_kernel[(triton.cdiv(rows, _ROWS),)](
                x,
                attended,
                proj_weight.contiguous(),
                proj_bias.contiguous(),
                *norm,
                None if row_scale is None else row_scale.contiguous(),
                call.cu_seqlens,
                y,
                branch,
                rows,
                call.frames,
                eps,
                CHANNELS=channels,
                BLOCK_ROWS=_ROWS,
                **in_two(channels),
                BLOCK_K=32,
                SCALED=row_scale is not None,
                PACKED=cu_seqlens is not None,
                NORM_FIRST=norm_first,
                KEPT=kept,
                UPCAST=call.constants["UPCAST"],
                num_warps=4,
                num_stages=3,
            )
        return y, branch, attended if with_grad else attended.new_empty((0, channels))


def residual_window_attention_bwd(
    grad_y: Tensor,
    x: Tensor,
    branch: Tensor,
    attended: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    row_scale: Tensor | None,
    eps: float,
    norm_first: bool,
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
    wants_layers: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of x [R, C], both layers' weights and biases, the norm's, bias_table and head_scale.

    x is in the weights' type, or with norm_first in that of y. Those of the layers are empty where they are not wanted;
    without a qkv_bias or head_scale theirs mean nothing.
    """
    with torch.cuda.device_of(x):
        half = ResidualBackward(
            grad_y=grad_y,
            x=x,
            branch=branch,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            layer_bias=proj_bias,
            row_scale=row_scale,
            cu_seqlens=cu_seqlens,
            eps=eps,
            norm_first=norm_first,
            wants_layers=wants_layers,
        )
        rows, channels = x.shape
        grad_branch, read = half.grad_branch, half.read
        if cu_seqlens is not None:
            # Else rows past the last offset that are not finite, times their gradient of 0, would reach the weights.
            read = torch.where((torch.arange(rows, device=x.device) < cu_seqlens[-1])[:, None], read, 0)
        grad_read = torch.empty_like(grad_branch if half.skip is None else half.skip)
        grad_table = grad_scale = grad_qkv_weight = grad_qkv_bias = grad_proj = None
        for part in _parts(rows, 3 * channels, None if cu_seqlens is not None else height * width):
            q_k_v = torch.nn.functional.linear(read[part], qkv_weight, qkv_bias)
            # Windows of one tile are gone through without their log-sum-exp.
            through = (grad_branch[part] @ proj_weight, q_k_v, attended[part], attended[:0])
            layout = (positions, cu_seqlens, heads, height, width, window, shift)
            grad_qkv, of_table, of_scale = window_attention_bwd(*through, bias_table, head_scale, scale, *layout)
            grad_table, grad_scale = added(grad_table, of_table), added(grad_scale, of_scale)
            skip = None if half.skip is None else half.skip[part]
            of_bias = _pass_to_rows(skip, grad_qkv, qkv_weight, grad_read[part], wants_layers)
            if wants_layers:
                grad_qkv_weight = added(grad_qkv_weight, grad_qkv.t() @ read[part])
                grad_qkv_bias = added(grad_qkv_bias, of_bias)
                grad_proj = added(grad_proj, grad_branch[part].t() @ attended[part])
        grad_x, grad_weight, grad_bias, *of_layer = half.finish(grad_read)
        layers = [weight.new_empty((0,)) for weight in (qkv_weight, qkv_weight, proj_weight, proj_bias)]
        if wants_layers:
            sums = (grad_qkv_weight, grad_qkv_bias, grad_proj)
            layers = [*(total.to(qkv_weight.dtype) for total in sums if total is not None), *of_layer]
        return grad_x, *layers, grad_weight, grad_bias, grad_table, grad_scale


def _pass_to_rows(
    skip: Tensor | None, grad_qkv: Tensor, qkv_weight: Tensor, grad_read: Tensor, wants_bias: bool
) -> Tensor | None:
    """Write the gradient of the rows read [R, C]: skip, where there is one, + grad qkv Q.

    Return the sum of grad qkv over rows [3C] in float32, where wanted.
    """
    rows, channels = grad_read.shape
    blocks = triton.cdiv(rows, 2 * _ROWS)
    sums = grad_qkv.new_empty((blocks, 3 * channels), dtype=torch.float32) if wants_bias else None
    if rows:
        _grad_x_kernel[(blocks,)](
            skip,
            grad_qkv,
            qkv_weight.contiguous(),
            grad_read,
            sums,
            rows,
            CHANNELS=channels,
            BLOCK_ROWS=2 * _ROWS,
            **in_two(channels),
            BLOCK_K=32,
            UPCAST=upcasts(grad_qkv.dtype),
            num_warps=8,
            num_stages=3,
        )
    return None if sums is None else sums.sum(0)


def _parts(rows: int, width: int, of_frame: int | None) -> list[slice]:
    """Return the rows in as few parts of about as many whole frames as keep what is made again in bounds.

    All of them where frames differ in length, which only the device knows.
    """
    if of_frame is None or not rows:
        return [slice(0, rows)]
    frames = rows // of_frame
    count = min(frames, triton.cdiv(rows * width, _QKV_ELEMENTS))
    size = triton.cdiv(frames, count) * of_frame
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
