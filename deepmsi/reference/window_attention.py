"""Window attention of Swin V1 and V2 in plain PyTorch: the oracle of every kernel, dense and packed.

Both layouts meet in the same place: windows [frames · tiles, slots], where a slot is a place in a window. A dense grid
is rolled, padded and cut into windows; packed rows are copied to their slots, and the empty ones are masked.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

NORM_FLOOR = 1e-12
MAX_LOGIT_SCALE = math.log(100.0)


class Windows(NamedTuple):
    """Who attends to whom, and how: the arguments of :func:`deepmsi.ops.window_attention` under their names."""

    heads: int
    grid: tuple[int, int]
    window: int
    shift: int
    bias_table: Tensor
    logit_scale: Tensor | None
    scale: float | None
    positions: Tensor | None
    cu_seqlens: Tensor | None


def window_attention(qkv: Tensor, windows: Windows) -> Tensor:
    """Compute :func:`deepmsi.ops.window_attention` with its arguments already checked."""
    return _dense(qkv, windows) if windows.positions is None else _packed(qkv, windows)


def _dense(qkv: Tensor, windows: Windows) -> Tensor:
    heads, window, shift = windows.heads, windows.window, windows.shift
    frames, height, width, channels = qkv.shape
    down, across = -(-height // window), -(-width // window)
    padded = (down * window, across * window)
    ragged = padded != (height, width)
    if ragged:
        qkv = torch.nn.functional.pad(qkv, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
    if shift:
        qkv = qkv.roll((-shift, -shift), (1, 2))
    depth = channels // (3 * heads)
    q, k, v = (
        qkv.reshape(frames, down, window, across, window, 3, heads, depth)
        .permute(5, 0, 1, 3, 6, 2, 4, 7)
        .reshape(3, frames * down * across, heads, window * window, depth)
        .unbind(0)
    )
    allowed = None
    if shift or ragged:
        kind = _grid_kind((height, width), window, shift, qkv.device)
        allowed = _same_kind(kind).unsqueeze(1)
    out = _attend(q, k, v, windows, allowed)
    out = (
        out.view(frames, down, across, heads, window, window, depth)
        .permute(0, 1, 4, 2, 5, 3, 6)
        .reshape(frames, *padded, heads * depth)
    )
    if shift:
        out = out.roll((shift, shift), (1, 2))
    return out[:, :height, :width].contiguous() if ragged else out


def _packed(qkv: Tensor, windows: Windows) -> Tensor:
    heads, grid, window, shift, *_, positions, cu_seqlens = windows
    assert positions is not None
    assert cu_seqlens is not None
    rows, frames = qkv.shape[0], cu_seqlens.shape[0] - 1
    depth = qkv.shape[1] // (3 * heads)
    slots = window * window
    kind = _grid_kind(grid, window, shift, qkv.device)
    tiles = kind.shape[0]

    # The slot of every row; rows past the last offset share one slot past the end, which is cut off.
    row = torch.arange(rows, device=qkv.device, dtype=cu_seqlens.dtype)
    frame = torch.searchsorted(cu_seqlens[1:], row, right=True)
    present = row < cu_seqlens[-1]
    place = _slot_of_position(grid, window, shift, qkv.device)[positions.long().clamp(0, grid[0] * grid[1] - 1)]
    total = frames * tiles * slots
    slot = torch.where(present, frame * (tiles * slots) + place, total)

    filled = qkv.new_zeros(total + 1, qkv.shape[1]).index_copy(0, slot, qkv)[:total]
    taken = slot.new_zeros(total + 1, dtype=torch.bool).index_fill(0, slot, True)[:total]
    q, k, v = filled.view(frames * tiles, slots, 3, heads, depth).permute(2, 0, 3, 1, 4).unbind(0)
    # An empty slot sees itself (its value is zero), so that no softmax runs over nothing.
    itself = torch.eye(slots, device=qkv.device, dtype=torch.bool)
    allowed = _same_kind(kind).repeat(frames, 1, 1) & taken.view(-1, 1, slots) | itself
    out = _attend(q, k, v, windows, allowed.unsqueeze(1))
    out = out.transpose(1, 2).reshape(total, heads * depth)
    out = torch.cat([out, out.new_zeros(1, heads * depth)]).index_select(0, slot)
    return torch.where(present.unsqueeze(1), out, 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, windows: Windows, allowed: Tensor | None) -> Tensor:
    """Attend inside each window: q, k, v [windows, heads, slots, depth].

    ``allowed`` [n, 1, slots, slots] says for n windows, repeated as often as they go into all of them, which query
    slot sees which key slot.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    storage = q.dtype
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if windows.logit_scale is None:
        assert windows.scale is not None
        logits = (q * windows.scale) @ k.transpose(-2, -1)
    else:
        q = torch.nn.functional.normalize(q, dim=-1, eps=NORM_FLOOR)
        k = torch.nn.functional.normalize(k, dim=-1, eps=NORM_FLOOR)
        # Not folded into q: the gradient of the scale is a sum that cancels, and loses digits that way.
        scale = windows.logit_scale.to(wide).view(-1, 1, 1).clamp(max=MAX_LOGIT_SCALE).exp()
        logits = q @ k.transpose(-2, -1) * scale
    # In place from here: no backward reads the sums.
    logits = logits.add_(windows.bias_table.to(wide)[_bias_index(windows.window, q.device)].permute(2, 0, 1))
    if allowed is not None and logits.shape[0]:
        logits = logits.unflatten(0, (-1, allowed.shape[0])).masked_fill_(~allowed, -torch.inf).flatten(0, 1)
    return (logits.softmax(-1) @ v).to(storage)


def _bias_index(window: int, device: torch.device) -> Tensor:
    """Return the row of the bias table for every query and key slot [slots, slots]."""
    place = torch.arange(window, device=device)
    y, x = place.repeat_interleave(window), place.repeat(window)
    down = y[:, None] - y[None, :] + window - 1
    across = x[:, None] - x[None, :] + window - 1
    return down * (2 * window - 1) + across


def _slot_of_position(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Return tile · slots + slot of every grid position [H · W], for cyclic windows on the padded grid."""
    height, width = grid
    down, across = -(-height // window), -(-width // window)
    y = (torch.arange(height, device=device) - shift) % (down * window)
    x = (torch.arange(width, device=device) - shift) % (across * window)
    tile = (y // window)[:, None] * across + (x // window)[None, :]
    slot = (y % window)[:, None] * window + (x % window)[None, :]
    return (tile * window * window + slot).reshape(-1)


def _grid_kind(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Return what a slot belongs to [tiles, slots]: a number per shifted window, -1 off the grid.

    A cyclic window holds pieces of up to four shifted windows; two tokens see each other where
    (⌊(y - s)/w⌋, ⌊(x - s)/w⌋) agree.
    """
    height, width = grid
    down, across = -(-height // window), -(-width // window)
    place_y = torch.arange(down * window, device=device) + shift
    place_x = torch.arange(across * window, device=device) + shift
    y, x = place_y % (down * window), place_x % (across * window)
    row = torch.div(y - shift, window, rounding_mode="floor") + 1
    column = torch.div(x - shift, window, rounding_mode="floor") + 1
    kind = row[:, None] * (across + 2) + column[None, :]
    kind = torch.where((y < height)[:, None] & (x < width)[None, :], kind, -1)
    return kind.view(down, window, across, window).transpose(1, 2).reshape(-1, window * window)


def _same_kind(kind: Tensor) -> Tensor:
    return kind[:, :, None] == kind[:, None, :]
