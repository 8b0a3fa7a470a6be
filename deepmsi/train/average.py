"""An exponential moving average of a model's weights: steadier than the last step where clips are few."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

AVERAGE = "average.safetensors"


class WeightAverage:
    """Average the trainable parameters: ``ā ← d ā + (1 - d) w`` after step n, ``d = min(decay, (1 + n) / (10 + n))``.

    The rate of the first steps is higher, so that the starting weights are soon forgotten. It depends on the step
    alone, so that a resumed fit averages as an uninterrupted one.

    Args:
        model: its parameters must lie on their device already.
        decay: d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.means.values()), list(self.weights.values()), 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averages."""
        for name, weight in self.weights.items():
            weight.copy_(self.means[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averages, and its own weights back afterwards."""
        own = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(own[name])

    def save(self, folder: Path) -> None:
        """Write the averages into the folder of a checkpoint that is being written."""
        from safetensors.torch import save_file

        save_file({name: mean.cpu().contiguous() for name, mean in self.means.items()}, folder / AVERAGE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; the checkpoint was validated before."""
        from safetensors.torch import load_file

        for name, mean in load_file(folder / AVERAGE).items():
            self.means[name].copy_(mean)
