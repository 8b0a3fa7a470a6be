"""vsc_compress: the released schedule's three calls, and each threshold, against vectorised PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import backend, testing
from deepmsi.ops import vsc_compress

CHANNELS = 384
SCHEDULE = ((256, 196), (196, 144), (144, 100))


class Calls:
    """Three calls of the released schedule, or one call at a threshold, on fixed inputs."""

    def __init__(self, frames: int, channels: int, steps: list[tuple[int, dict[str, Any]]]) -> None:
        self.options = [options for _, options in steps]
        self.x = [
            testing.tokens(frames * n, channels, seed=n).view(frames, n, channels).requires_grad_() for n, _ in steps
        ]
        self.guide = testing.randn(frames, channels, seed=1).requires_grad_()
        self.weight = torch.tensor(0.5, requires_grad=True)
        with torch.no_grad():
            outs = self.forward("reference")
        self.grads = [(testing.randn(*o.tokens.shape, seed=2), testing.randn(*o.gate.shape, seed=3)) for o in outs]
        # Operations of the similarity that must be computed: irrelevant times relevant rows.
        self.operations = sum(
            2.0 * channels * (n * frames - len(o.tokens)) * len(o.tokens) / frames
            for (n, _), o in zip(steps, outs, strict=True)
        )

    def forward(self, name: str) -> list[Any]:
        return [
            vsc_compress(x, None, self.guide, self.weight, backend=name, **options)
            for x, options in zip(self.x, self.options, strict=True)
        ]

    def inference(self, name: str) -> list[Any]:
        with torch.no_grad():
            return self.forward(name)

    def step(self, name: str) -> list[tuple[Tensor, ...]]:
        return [
            torch.autograd.grad((o.tokens, o.gate), (x, self.guide, self.weight), grads)
            for o, x, grads in zip(self.forward(name), self.x, self.grads, strict=True)
        ]

    def check(self) -> None:
        """Both sides give the same numbers before either is timed."""
        for ours, theirs in zip(self.inference("cpp"), self.inference("reference"), strict=True):
            assert torch.equal(ours.index, theirs.index)
            torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(self.step("cpp"), self.step("reference"), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def need_cpp() -> None:
    reason = backend.why_not("vsc_compress", "cpp", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def bench_released_schedule(compare: Any, smallest: bool, gemm_rate: float, direction: str) -> None:
    need_cpp()
    frames = 1 if smallest else 15
    calls = Calls(frames, CHANNELS, [(n, {"keep": k}) for n, k in SCHEDULE])
    calls.check()
    run = calls.inference if direction == "forward" else calls.step
    compare(
        lambda: run("cpp"),
        {"pytorch": lambda: run("reference")},
        floor=calls.operations / gemm_rate if direction == "forward" else None,
        op="vsc_compress",
        case=f"256 to 100 tokens x {CHANNELS}, {frames} frames",
        direction=direction,
    )


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [64, 256, 1024])
def bench_threshold(compare: Any, smallest: bool, gemm_rate: float, tokens: int, threshold: float) -> None:
    need_cpp()
    if smallest and (tokens, threshold) != (64, 0.3):
        pytest.skip("only the smallest size was asked for")
    frames = 1 if smallest else 4
    calls = Calls(frames, CHANNELS, [(tokens, {"threshold": threshold})])
    calls.check()
    compare(
        lambda: calls.step("cpp"),
        {"pytorch": lambda: calls.step("reference")},
        rounds=7,
        op="vsc_compress",
        case=f"{tokens} tokens x {CHANNELS}, {frames} frames, threshold {threshold}",
        direction="forward_backward",
    )
