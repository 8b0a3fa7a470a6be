"""cross_modal_contrastive: a small and a large batch, with balanced and with lopsided labels, against dense PyTorch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import testing
from deepmsi.ops import cross_modal_contrastive

CHANNELS = 256
CLASSES = 7
LARGEST_CLASS = {"balanced": 1 / CLASSES, "MELD-like": 0.47}

Form = Callable[..., Tensor]  # cross_modal_contrastive on some backend


class Pair:
    """One modality against two others on fixed inputs."""

    def __init__(self, place: Any, rows: int, kind: str) -> None:
        self.place = place
        share = LARGEST_CLASS[kind]
        shares = torch.tensor([share] + [(1 - share) / (CLASSES - 1)] * (CLASSES - 1))
        labels = torch.multinomial(shares, rows, replacement=True, generator=testing.generator(1))
        self.labels = labels.to(place.device)
        self.features = [place.tokens(rows, CHANNELS, seed=s).requires_grad_() for s in (2, 5, 8)]
        self.ours = partial(cross_modal_contrastive, backend=place.backend)
        self.pytorch = partial(cross_modal_contrastive, backend="reference")
        # Two pairs, each with three products: the scores and the gradient of either side.
        self.operations = 2 * 3 * 2.0 * rows * rows * CHANNELS
        # Features in for either direction, their gradients out.
        self.traffic = 3 * sum(x.nbytes for x in self.features)

    def step(self, form: Form) -> tuple[Tensor, ...]:
        a, *b = self.features
        loss = form(a, b, self.labels)
        return (loss, *torch.autograd.grad(loss, self.features))

    def check(self, form: Form) -> None:
        """A side gives the numbers of the PyTorch form before it is timed."""
        for actual, wanted in zip(self.step(form), self.step(self.pytorch), strict=True):
            self.place.close(actual, wanted, rtol=1e-4)


@pytest.mark.parametrize("kind", LARGEST_CLASS)
@pytest.mark.parametrize("rows", [16, 4096])
def bench_pair(compare: Any, smallest: bool, ceilings: Any, place: Any, rows: int, kind: str) -> None:
    place.need("cross_modal_contrastive")
    if smallest and (rows, kind) != (16, "balanced"):
        pytest.skip("only the smallest size was asked for")
    pair = Pair(place, rows, kind)
    pair.check(pair.ours)
    form = torch.compile(pair.pytorch)
    baselines = {"pytorch": lambda: pair.step(pair.pytorch), **compare.compiled(lambda: pair.step(form))}
    if "compile" in baselines:
        pair.check(form)
    compare(
        lambda: pair.step(pair.ours),
        baselines,
        dtype=place.dtype,
        floor=ceilings.floor(pair.operations, pair.traffic, place.dtype),
        rounds=101 if rows == 16 else 15 if place.device == "cuda" else 3,
        graph=rows == 16,
        op="cross_modal_contrastive",
        case=f"{rows} rows x {CHANNELS}, two pairs, {kind} labels{place.suffix}",
        direction="forward_backward",
    )
