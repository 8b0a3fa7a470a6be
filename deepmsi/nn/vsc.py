"""Visual sequence compression as a module: the operation with a learnable λ."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from deepmsi.ops import CompressedTokens, vsc_compress


class VSC(nn.Module):
    """Compress the tokens of each frame under a guide, with λ of Eq. 1 learned behind a sigmoid.

    See :func:`deepmsi.ops.vsc_compress` for the equations. Multiply ``gate`` into the tokens *after* the norm that
    follows: its gradient is the way by which λ and the guide learn.

    Args:
        guide_weight: λ at the start, in (0, 1).
        temperature: τ > 0 of the relevance softmax.
        standardize: Whether to standardise the scores over the frame.
        threshold: θ, relative relevance from which a token stays; not used with ``keep``.
        keep: Keep exactly this many.
        capacity: Rows reserved for each frame, at most so many stay; shapes are then static.
        min_keep: At least this many stay.
        fuse_threshold: φ, the cosine from which an irrelevant token is fused rather than dropped.
        fuse_alpha: α, the share of the kept token in a fusion.

    Raises:
        ValueError: ``guide_weight`` does not lie strictly between 0 and 1.
    """

    def __init__(
        self,
        guide_weight: float = 0.5,
        temperature: float = 1.0,
        standardize: bool = True,
        threshold: float = 0.3,
        keep: int | None = None,
        capacity: int | None = None,
        min_keep: int = 1,
        fuse_threshold: float = 0.6,
        fuse_alpha: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0 < guide_weight < 1:
            raise ValueError(f"VSC: guide_weight must lie strictly between 0 and 1, not {guide_weight}")
        # Of one element rather than 0-dim, which could not be sharded (FSDP).
        self.guide_logit = nn.Parameter(torch.tensor([math.log(guide_weight / (1 - guide_weight))]))
        self.temperature = temperature
        self.standardize = standardize
        self.threshold = threshold
        self.keep = keep
        self.capacity = capacity
        self.min_keep = min_keep
        self.fuse_threshold = fuse_threshold
        self.fuse_alpha = fuse_alpha

    @property
    def guide_weight(self) -> Tensor:
        """λ, a 0-dim tensor with its gradient."""
        return self.guide_logit.sigmoid().squeeze(0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        logit = state_dict.get(f"{prefix}guide_logit")
        if logit is not None and logit.dim() == 0:  # a scalar before
            state_dict[f"{prefix}guide_logit"] = logit.unsqueeze(0)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, guide: Tensor, max_seqlen: int | None = None
    ) -> CompressedTokens:
        """Compress x [R, C] packed, or [B, N, C] where ``cu_seqlens`` is None, under guide [B, C].

        ``max_seqlen`` bounds the tokens of a packed frame, where the caller knows it.
        """
        return vsc_compress(
            x,
            cu_seqlens,
            guide,
            guide_weight=self.guide_weight,
            temperature=self.temperature,
            standardize=self.standardize,
            threshold=self.threshold,
            keep=self.keep,
            capacity=self.capacity,
            min_keep=self.min_keep,
            fuse_threshold=self.fuse_threshold,
            fuse_alpha=self.fuse_alpha,
            max_seqlen=max_seqlen,
        )

    def extra_repr(self) -> str:
        kept = f"keep={self.keep}" if self.keep is not None else f"threshold={self.threshold}"
        return f"{kept}, temperature={self.temperature}, capacity={self.capacity}"
