"""Visual sequence compression in plain PyTorch: the oracle of every kernel, and what a user would write by hand.

All frames run at once, dense or packed, in any floating type and on any device. Every gradient is autograd's. Nothing
accumulates through atomics: merges are products with a matrix of weights, and gathers read a row at most once.
"""

import torch
from torch import Tensor

NORM_FLOOR = 1e-6
DEVIATION_FLOOR = 1e-3


def vsc_compress(
    x: Tensor,
    cu_seqlens: Tensor | None,
    guide: Tensor,
    guide_weight: Tensor,
    temperature: float,
    standardize: bool,
    threshold: float,
    keep: int | None,
    capacity: int | None,
    min_keep: int,
    fuse_threshold: float,
    fuse_alpha: float,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute :func:`deepmsi.ops.vsc_compress` with its arguments already checked.

    Args:
        x: Tokens [B, N, C], or packed [R, C] with ``cu_seqlens``.
        cu_seqlens: Row offsets [B + 1] int32, or None where x is dense.
        guide: High-level semantic feature of each frame [B, C].
        guide_weight: λ, a 0-dim tensor.
        temperature, standardize, threshold, keep, capacity, min_keep, fuse_threshold, fuse_alpha: As there.
        max_seqlen: A bound on a packed frame's tokens; None reads the longest on the host.

    Returns:
        tokens [R', C], cu_seqlens [B + 1], index [R'], gate [R'], relevance [R], assignment [R].
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    device = x.device
    frames, channels = guide.shape
    if cu_seqlens is None:
        padded = x.to(dtype)
        longest, rows = x.shape[1], x.shape[0] * x.shape[1]
        lengths = torch.full((frames,), longest, device=device, dtype=torch.int64)
        source = torch.arange(rows, device=device).view(frames, longest)
        present = torch.ones((frames, longest), device=device, dtype=torch.bool)
    else:
        rows = x.shape[0]
        starts = cu_seqlens[:-1].long()
        lengths = cu_seqlens[1:].long() - starts
        longest = max_seqlen if max_seqlen is not None else int(lengths.max()) if frames else 0
        slot = torch.arange(longest, device=device)
        present = slot < lengths[:, None]
        source = torch.where(present, starts[:, None] + slot, rows)
        # A row of zeros stands in for every empty slot: an absent token neither reads nor receives anything.
        padded = torch.cat([x.to(dtype), x.new_zeros(1, channels, dtype=dtype)])[source]

    # 1. visual semantic feature and fused semantic feature (Eq. 1)
    divisor = lengths.clamp(min=1).to(dtype)
    mean = padded.sum(1) / divisor[:, None]
    fused = guide_weight.to(dtype) * guide.to(dtype) + (1 - guide_weight.to(dtype)) * mean

    # 2. similarity (Eq. 2), standardised over the frame, and relative relevance
    unit = padded / torch.linalg.vector_norm(padded, dim=-1, keepdim=True).clamp(min=NORM_FLOOR)
    fused_unit = fused / torch.linalg.vector_norm(fused, dim=-1, keepdim=True).clamp(min=NORM_FLOOR)
    score = (unit * fused_unit[:, None]).sum(-1)
    relevance = _relevance(score.detach(), present, divisor, temperature, standardize)

    # 3. partition: the `count` highest stay; among equals the lower row
    if keep is not None:
        count = torch.full_like(lengths, keep)
    else:
        count = (present & (relevance >= threshold)).sum(1).clamp(min=min_keep)
    if capacity is not None:
        count = count.clamp(max=capacity)
    count = torch.minimum(count, lengths)
    order = torch.where(present, score.detach(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(present).scatter(1, order, torch.arange(longest, device=device) < count[:, None])
    lost = present & ~kept

    # 4. nearest relevant token of every irrelevant one; argmax gives the lower row among equals
    similarity = unit @ unit.transpose(1, 2)
    if longest:
        nearest = similarity.detach().masked_fill(~kept[:, None, :], -torch.inf).argmax(2)
    else:
        nearest = torch.empty_like(source)
    closeness = similarity.gather(2, nearest[..., None]).squeeze(2)

    # 5. fusion (Eq. 3): row j of `weight` holds ω_i of the tokens that j receives
    merged = lost & (closeness.detach() >= fuse_threshold)
    target = torch.arange(longest, device=device)[:, None] == nearest[:, None, :]
    weight = torch.where(target & merged[:, None, :], closeness.exp()[:, None, :], 0.0)
    total = weight.sum(2, keepdim=True)
    received = total > 0
    average = (weight @ padded) / torch.where(received, total, 1.0)
    output = torch.where(received, fuse_alpha * padded + (1 - fuse_alpha) * average, padded)

    # 6. packing: kept tokens in their order, frame after frame
    cu_out = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    if capacity is not None:
        packed = frames * capacity
    elif keep is not None and cu_seqlens is None:
        packed = frames * min(keep, longest)
    else:
        packed = int(cu_out[-1])
    row = cu_out[:-1, None] + kept.cumsum(1) - 1
    # One slot past the end takes what is not kept, and is cut off.
    slots = torch.where(kept, row, packed).view(-1)
    flat = torch.full((packed + 1,), -1, device=device, dtype=torch.int64)
    flat = flat.scatter(0, slots, torch.arange(frames * longest, device=device))[:packed]
    valid = torch.arange(packed, device=device) < cu_out[-1]
    flat = torch.where(valid, flat, frames * longest)

    filler = padded.new_zeros(1, channels)
    tokens = torch.cat([output.reshape(-1, channels), filler])[flat].to(x.dtype)
    scores = torch.cat([score.reshape(-1), filler[0, :1]])[flat]
    gate = (valid.to(dtype) + (scores - scores.detach())).to(x.dtype)
    index = torch.cat([source.reshape(-1), source.new_full((1,), -1)])[flat]
    destination = torch.where(kept, row, torch.where(merged, row.gather(1, nearest), -1)).to(torch.int32)
    if cu_seqlens is None:
        return tokens, cu_out.to(torch.int32), index, gate, relevance.view(-1), destination.view(-1)
    scatter = source.reshape(-1)
    assignment = destination.new_full((rows + 1,), -1).scatter(0, scatter, destination.view(-1))[:rows]
    looked = relevance.new_zeros(rows + 1).scatter(0, scatter, relevance.view(-1))[:rows]
    return tokens, cu_out.to(torch.int32), index, gate, looked, assignment


def _relevance(score: Tensor, present: Tensor, count: Tensor, temperature: float, standardize: bool) -> Tensor:
    """Return r = N softmax(ŝ / τ) [B, N] of one frame a row; absent slots give 0."""
    count = count[:, None]
    if standardize:
        centred = torch.where(present, score - (score * present).sum(1, keepdim=True) / count, 0.0)
        deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
        score = centred / deviation.clamp(min=DEVIATION_FLOOR)
    if not score.shape[1]:
        return score
    scaled = torch.where(present, score / temperature, -torch.inf)
    exponent = torch.where(present, (scaled - scaled.amax(1, keepdim=True)).exp(), 0.0)
    return count * exponent / exponent.sum(1, keepdim=True).clamp(min=1e-30)
