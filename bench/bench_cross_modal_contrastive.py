"""cross_modal_contrastive: a small and a large batch, with balanced and with lopsided labels, against dense PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import backend, testing
from deepmsi.ops import cross_modal_contrastive

CHANNELS = 256
CLASSES = 7
LARGEST_CLASS = {"balanced": 1 / CLASSES, "MELD-like": 0.47}


class Pair:
    """One modality against two others on fixed inputs."""

    def __init__(self, rows: int, kind: str, device: str) -> None:
        share = LARGEST_CLASS[kind]
        shares = torch.tensor([share] + [(1 - share) / (CLASSES - 1)] * (CLASSES - 1))
        self.labels = torch.multinomial(shares, rows, replacement=True, generator=testing.generator(1)).to(device)
        self.features = [testing.tokens(rows, CHANNELS, seed=s, device=device).requires_grad_() for s in (2, 5, 8)]
        # Two pairs, each with three products: the scores and the gradient of either side.
        self.operations = 2 * 3 * 2.0 * rows * rows * CHANNELS

    def step(self, name: str) -> tuple[Tensor, ...]:
        a, *b = self.features
        loss = cross_modal_contrastive(a, b, self.labels, backend=name)
        return (loss, *torch.autograd.grad(loss, self.features))

    def check(self, name: str) -> None:
        """Both sides give the same numbers before either is timed."""
        for ours, theirs in zip(self.step(name), self.step("reference"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def peak_bytes(run: Any) -> int:
    """Return the largest amount of a GPU's memory that a run holds above what was held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


CASES = [("cpp", "cpu"), ("cpp", "cuda"), ("triton", "cuda")]


@pytest.mark.parametrize("kind", LARGEST_CLASS)
@pytest.mark.parametrize("rows", [16, 4096])
@pytest.mark.parametrize(("name", "device"), CASES, ids=["-".join(c) for c in CASES])
def bench_pair(compare: Any, smallest: bool, gemm_rate: float, name: str, device: str, rows: int, kind: str) -> None:
    reason = backend.why_not("cross_modal_contrastive", name, device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    if smallest and (rows, kind) != (16, "balanced"):
        pytest.skip("only the smallest size was asked for")
    pair = Pair(rows, kind, device)
    pair.check(name)
    sides = {side: (lambda side=side: pair.step(side)) for side in (name, "reference")}
    memory = {}
    if device == "cuda":
        memory = {f"peak_bytes_{side}": peak_bytes(run) for side, run in sides.items()}
    compare(
        sides[name],
        {"pytorch": sides["reference"]},
        device=device,
        floor=pair.operations / gemm_rate if device == "cpu" else None,
        rounds=101 if rows == 16 else 3,
        op="cross_modal_contrastive",
        case=f"{rows} rows x {CHANNELS}, two pairs, {kind} labels" + (f", {name}" if device == "cuda" else ""),
        direction="forward_backward",
        **memory,
    )
