"""What a user would write instead: VSC-Swin in plain batched PyTorch with timm's blocks, at static shapes.

The regrid layout only: in the packed layout the tokens that are left are no grid, on which timm's blocks could run.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepmsi.nn import VSCSwin
from deepmsi.nn.vsc_swin import regrid_window


def compress(
    x: Tensor, guide: Tensor, guide_weight: Tensor, keep: int, fuse_threshold: float = 0.6, fuse_alpha: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Keep the `keep` best tokens of every frame, tuned: only the pairs (lost, kept) are compared.

    Args:
        x: Tokens [F, N, C].
        guide: Semantic feature of each frame [F, C].
        guide_weight: λ, a 0-dim tensor.
        keep: Tokens that stay, below N.
        fuse_threshold: φ.
        fuse_alpha: α.

    Returns:
        Tokens [F, keep, C] in their order, and the gate [F, keep].
    """
    channels = x.shape[2]
    fused = guide_weight * guide + (1 - guide_weight) * x.mean(1)
    unit = F.normalize(x, dim=-1, eps=1e-6)
    score = (unit @ F.normalize(fused, dim=-1, eps=1e-6).unsqueeze(-1)).squeeze(-1)
    order = score.detach().argsort(dim=1, descending=True, stable=True)
    kept, lost = order[:, :keep].sort(1).values, order[:, keep:].sort(1).values

    def rows(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index.unsqueeze(-1).expand(-1, -1, channels))

    tokens, others = rows(x, kept), rows(x, lost)
    similarity = rows(unit, lost) @ rows(unit, kept).transpose(1, 2)
    closeness, nearest = similarity.max(2)
    weight = torch.where(closeness.detach() >= fuse_threshold, closeness.exp(), 0.0)
    spread = torch.zeros_like(similarity).scatter(2, nearest.unsqueeze(-1), weight.unsqueeze(-1)).transpose(1, 2)
    total = spread.sum(2, keepdim=True)
    average = (spread @ others) / torch.where(total > 0, total, 1.0)
    output = torch.where(total > 0, fuse_alpha * tokens + (1 - fuse_alpha) * average, tokens)
    scores = score.gather(1, kept)
    return output, 1 + scores - scores.detach()


class TimmVSCSwin(nn.Module):
    """The released schedule over timm's Swin V2: its blocks, with the compressions between their halves.

    Args:
        backbone: timm's model, which is copied.
        model: Ours, whose compressions are copied: guide weight, norm, guide projection.
    """

    def __init__(self, backbone: Any, model: VSCSwin) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.compressions = nn.ModuleDict()
        side = 0
        for i, (stage, ours) in enumerate(zip(self.backbone.layers, model.stages(), strict=True)):
            side = (side + 1) // 2 if side else 0
            for j, (block, our_block) in enumerate(zip(stage.blocks, ours.each(), strict=True)):
                if side:
                    reference = block.attn.window_size if not any(block.attn.pretrained_window_size) else None
                    if reference is not None:
                        block.attn.pretrained_window_size = tuple(reference)
                    window = regrid_window(side)
                    block.set_input_size((side, side), (window, window))
                if our_block.compress is not None:
                    assert our_block.compress.vsc.keep is not None
                    self.compressions[f"{i}-{j}"] = copy.deepcopy(our_block.compress)
                    side = math.isqrt(our_block.compress.vsc.keep)

    def forward(self, frames: Tensor, guide: Tensor) -> Tensor:
        """Map frames [F, 3, S, S] under guides [F, G] to features [F, C]."""
        x = self.backbone.patch_embed(frames)
        for i, stage in enumerate(self.backbone.layers):
            x = stage.downsample(x)
            for j, block in enumerate(stage.blocks):
                x = x + block.drop_path1(block.norm1(block._attn(x)))
                if f"{i}-{j}" in self.compressions:
                    x = self._compressed(self.compressions[f"{i}-{j}"], x, guide)
                rows = x.flatten(1, 2)
                x = (rows + block.drop_path2(block.norm2(block.mlp(rows)))).view(x.shape)
        return self.backbone.norm(x).mean((1, 2))

    def _compressed(self, own: Any, x: Tensor, guide: Tensor) -> Tensor:
        keep = own.vsc.keep
        side = math.isqrt(keep)
        if own.guide is not None:
            guide = own.guide(guide)
        y, gate = compress(x.flatten(1, 2), guide, own.vsc.guide_weight, keep)
        return (gate.unsqueeze(-1) * own.norm(y)).unflatten(1, (side, side))


class FrameByFrame(nn.Module):
    """One frame at a time through a model, as the released code runs."""

    def __init__(self, model: TimmVSCSwin) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, guide: Tensor) -> Tensor:
        """As the model's own."""
        return torch.cat([self.model(frames[i : i + 1], guide[i : i + 1]) for i in range(frames.shape[0])])
