"""The parts between the encoders and the logits: semantic guide, projection heads, classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SemanticGuide(nn.Module):
    """High-level semantic feature, the early fusion of text and audio: `g = MLP([h_t ; h_a])`.

    Linear, LayerNorm, LeakyReLU, Dropout, Linear. It guides every frame of its utterance.

    Args:
        inputs: width of the joined utterance vectors.
        hidden: width of the hidden layer.
        outputs: G, the channels of the stage that compresses.
        dropout: probability.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, outputs),
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the utterance vectors `[U, Dt]`, `[U, Da]` (those that are configured) to `[U, G]`."""
        return self.layers(torch.cat(list(features), 1))


class ProjectionHead(nn.Module):
    """Project one modality: `z = Linear(h)`, `z' = LayerNorm(z + Dropout(Linear(GELU(z))))`."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, outputs)
        self.mix = nn.Linear(outputs, outputs)
        self.norm = nn.LayerNorm(outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[U, D]` to `[U, P]`."""
        z = self.project(features)
        return self.norm(z + self.dropout(self.mix(nn.functional.gelu(z))))


class Classifier(nn.Module):
    """Classify the joined projections: Linear, LayerNorm, LeakyReLU, Dropout per hidden width, then Linear."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.LeakyReLU(), nn.Dropout(dropout)]
            inputs = width
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(inputs, outputs)

    def forward(self, projections: Sequence[Tensor]) -> Tensor:
        """Map the modalities' projections, each `[U, P]`, to logits `[U, K]`."""
        return self.output(self.hidden(torch.cat(list(projections), 1)))
