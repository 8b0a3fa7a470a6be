"""Dilated causal convolution in plain PyTorch: the oracle of every kernel."""

import torch
from torch import Tensor


def dilated_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Compute :func:`deepmsi.ops.dilated_causal_conv1d` with its arguments already checked."""
    past, length = (weight.shape[2] - 1) * dilation, x.shape[2]
    # One place more, for torch has no convolution of an empty sequence.
    padded = torch.nn.functional.pad(x, (past, 0 if length else 1))
    return torch.nn.functional.conv1d(padded, weight, bias, dilation=dilation)[..., :length]


def causal_conv_rows(
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
) -> Tensor:
    """Compute :func:`deepmsi.ops.dilated_causal_conv1d.causal_conv_rows`: one product of the gathered taps."""
    taps, length = weight.shape[0], x.shape[1]
    past = (taps - 1) * dilation
    count = length if count is None else count
    first = length - 1 - (count - 1) * step  # the first output's time, and where its oldest tap lies after padding
    padded = torch.nn.functional.pad(x, (0, 0, past, 0))
    read = [padded[:, first + i * dilation : first + i * dilation + (count - 1) * step + 1 : step] for i in range(taps)]
    y = torch.cat(read, 2) @ weight.flatten(0, 1)
    if bias is not None:
        y = y + bias
    if relu:
        y = torch.relu(y)
        if seed is not None and dropout > 0:
            y = torch.where(keep_mask(seed, y.shape, dropout), y * (1 / (1 - dropout)), 0)
    return y if residual is None else torch.relu(y + residual)


def keep_mask(seed: Tensor, size: torch.Size, dropout: float) -> Tensor:
    """Return which elements [size] bool a dropout keeps: the same on every backend.

    Element e is kept where word e mod 4 of Philox4x32-10 (Salmon et al. 2011) with counter e div 4 and the seed's 64
    bits as key is at least dropout · 2^32.
    """
    low = 0xFFFFFFFF
    count = size.numel()
    index = torch.arange((count + 3) // 4, device=seed.device)
    c0, c1 = index & low, index >> 32
    c2, c3 = torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        # Products of two 32-bit numbers wrap in int64 as in uint64; the mask drops the sign that the shift brings.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack([c0, c1, c2, c3], 1).flatten()[:count]
    return (words >= keep_threshold(dropout)).view(size)


def keep_threshold(dropout: float) -> int:
    """Return dropout · 2^32, the words below which are dropped."""
    return int(dropout * 2.0**32)
