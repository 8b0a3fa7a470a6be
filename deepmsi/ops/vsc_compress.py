"""The public function of visual sequence compression: check, resolve, call."""

from typing import NamedTuple

import torch
from torch import Tensor

from deepmsi.backend import resolve
from deepmsi.ops import _schemas
from deepmsi.ops._arguments import are_offsets, autocast, check_devices, check_floating, shape, without_autocast
from deepmsi.reference.vsc_compress import vsc_compress as reference

_OP = "vsc_compress"


class CompressedTokens(NamedTuple):
    """What :func:`vsc_compress` returns.

    Attributes:
        tokens: Kept and fused tokens [R', C], packed frame after frame, in x's type. Differentiable.
        cu_seqlens: Offsets of the frames' rows in ``tokens`` [B + 1] int32.
        index: Input row of each output row [R'] int64, ascending inside a frame, -1 past the last valid row.
        gate: [R'], exactly 1 (0 past the last valid row, NaN where the score s of the row is not finite); its
            gradient reaches s, hence x, guide and λ. Multiply it in after the norm that follows, for a norm cancels
            a scale.
        relevance: r of every input row [R] float32 (float64 for float64 inputs); mean 1 over a frame.
        assignment: Output row that an input row went to [R] int32, -1 where it was dropped.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on this
    gate: Tensor
    relevance: Tensor
    assignment: Tensor


def vsc_compress(
    x: Tensor,
    cu_seqlens: Tensor | None,
    guide: Tensor,
    guide_weight: float | Tensor = 0.5,
    temperature: float = 1.0,
    standardize: bool = True,
    threshold: float = 0.3,
    keep: int | None = None,
    capacity: int | None = None,
    min_keep: int = 1,
    fuse_threshold: float = 0.6,
    fuse_alpha: float = 0.9,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> CompressedTokens:
    """Keep the tokens of each frame that the guide finds relevant, and fuse the others into their nearest
    kept one.

    For one frame x_1..x_N with guide g (Eq. 1 to 3 of the paper): v = mean x; m = λ g + (1 - λ) v; s_n =
    cos(m, x_n); ŝ = (s - mean s) / max(std s, 1e-3); r = N softmax(ŝ / τ). Token n stays when r_n ≥ θ. Every
    other token i finds its nearest kept one j by cosine c_i, and where c_i ≥ φ joins it: y_j = α x_j + (1 -
    α) Σ ω_i x_i / Σ ω_i with ω_i = exp(c_i). Gradients of ``tokens`` are exact with the sets and the argmax
    held fixed; guide and λ get theirs through ``gate``. Two runs give the same bits, forward and backward, at
    any number of threads.

    Output rows R': ``B * capacity`` with a capacity; ``B * min(keep, N)`` for dense x with keep; otherwise as
    many as are kept, for which one integer is read on the host (``torch.compile`` then needs
    ``capture_dynamic_output_shape_ops``).

    Args:
        x: Tokens [B, N, C] with ``cu_seqlens=None``, or packed [R, C]; rows past the last offset are ignored
            and get zero gradients. Under autocast x takes the autocast type.
        cu_seqlens: Offsets of the frames' rows [B + 1] int32, ascending from 0, on x's device.
        guide: Semantic feature of each frame [B, C].
        guide_weight: λ in [0, 1], a number or a 0-dim tensor, on the device of x so that no call waits for a copy.
        temperature: τ > 0.
        standardize: Whether to standardise the scores over the frame.
        threshold: θ, in units of the frame's mean relevance; not used with ``keep``.
        keep: Keep exactly this many of the highest (all, where a frame has fewer).
        capacity: Rows reserved for each frame; at most this many of the highest stay.
        min_keep: At least this many of the highest stay.
        fuse_threshold: φ, the cosine from which an irrelevant token is fused rather than dropped.
        fuse_alpha: α, the share of the kept token in a fusion.
        max_seqlen: A bound on the tokens of a packed frame, which saves the reference reading it on the host.
        backend: ``reference``, ``triton``, ``cpp`` or ``auto``; None leaves the choice to
            ``deepmsi.use_backend``.

    Returns:
        A :class:`CompressedTokens`.

    Raises:
        ValueError: An argument has the wrong shape, type or range.
        RuntimeError: The backend that was asked for cannot run this call.
    """
    x = autocast(x)
    check_floating(x, _OP, "x")
    check_floating(guide, _OP, "guide")
    if cu_seqlens is None:
        if x.dim() != 3:
            raise ValueError(f"{_OP}: x must be [B, N, C] where cu_seqlens is None, not {shape(x)}")
        frames = x.shape[0]
    else:
        if x.dim() != 2:
            raise ValueError(f"{_OP}: x must be packed [R, C] where cu_seqlens is given, not {shape(x)}")
        if not are_offsets(cu_seqlens):
            raise ValueError(f"{_OP}: cu_seqlens must be [B + 1] int32, not {shape(cu_seqlens)} {cu_seqlens.dtype}")
        frames = cu_seqlens.shape[0] - 1
    if not (guide.dim() == 2 and guide.shape[0] == frames and guide.shape[1] == x.shape[-1]):
        raise ValueError(f"{_OP}: guide must be [B, C] = [{frames}, {x.shape[-1]}], not {shape(guide)}")
    if x.shape[-1] < 1:
        raise ValueError(f"{_OP}: x must have at least one channel")
    check_devices(x, _OP, "x", cu_seqlens=cu_seqlens, guide=guide)
    if not temperature > 0:
        raise ValueError(f"{_OP}: temperature must be above 0, not {temperature}")
    if threshold != threshold or fuse_threshold != fuse_threshold:
        raise ValueError(f"{_OP}: threshold and fuse_threshold must be numbers, not {threshold} and {fuse_threshold}")
    if keep is not None and keep < 1:
        raise ValueError(f"{_OP}: keep must be at least 1, not {keep}")
    if min_keep < 1:
        raise ValueError(f"{_OP}: min_keep must be at least 1, not {min_keep}")
    if capacity is not None and capacity < (keep or min_keep):
        raise ValueError(f"{_OP}: capacity {capacity} is below {'keep' if keep else 'min_keep'} {keep or min_keep}")
    if not 0 <= fuse_alpha <= 1:
        raise ValueError(f"{_OP}: fuse_alpha must lie in [0, 1], not {fuse_alpha}")
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"{_OP}: max_seqlen must not be negative, not {max_seqlen}")

    wide = _schemas.accumulate_dtype(x.dtype)
    if isinstance(guide_weight, Tensor):
        if guide_weight.dim() != 0:
            raise ValueError(f"{_OP}: guide_weight must be 0-dim, not {shape(guide_weight)}")
        weight = guide_weight.to(device=x.device, dtype=wide)
    else:
        if not 0 <= guide_weight <= 1:
            raise ValueError(f"{_OP}: guide_weight must lie in [0, 1], not {guide_weight}")
        weight = torch.full((), guide_weight, device=x.device, dtype=wide)
    guide = guide.to(wide)
    options = (
        float(temperature),
        standardize,
        float(threshold),
        keep,
        capacity,
        min_keep,
        float(fuse_threshold),
        float(fuse_alpha),
    )
    chosen = resolve(_OP, backend, x.device.type, x.dtype)
    if chosen == "reference":
        with without_autocast(x.device.type):
            return CompressedTokens(*reference(x, cu_seqlens, guide, weight, *options, max_seqlen))
    forward = getattr(torch.ops.deepmsi, f"{_OP}_{chosen}_fwd")
    return CompressedTokens(*forward(x, cu_seqlens, guide, weight, *options)[:6])
