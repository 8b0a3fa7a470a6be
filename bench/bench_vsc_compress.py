"""vsc_compress: the released schedule's three calls, and each threshold, against vectorised PyTorch.

`pytorch` is the reference, which takes ragged frames and every option. `pytorch, tuned` has static shapes and compares
only the pairs (lost, kept), which is possible where the number of kept tokens is fixed; `compile` is what torch.compile
makes of the tuned form, or of the reference where the number is not fixed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from baselines import compress
from torch import Tensor

from deepmsi.ops import vsc_compress

CHANNELS = 384
SCHEDULE = ((256, 196), (196, 144), (144, 100))
FRAMES = {"cpu": 15, "cuda": 240}

Form = Callable[..., Any]  # vsc_compress on some backend


class Compressed(NamedTuple):
    """What the tuned form returns, in the operation's shapes."""

    tokens: Tensor
    gate: Tensor


def tuned(form: Callable[..., tuple[Tensor, Tensor]]) -> Form:
    """Return the tuned form as the operation is called; it selects by float32, as the operation does."""

    def call(x: Tensor, _: None, guide: Tensor, weight: Tensor, keep: int) -> Compressed:
        tokens, gate = form(x.float(), guide.float(), weight, keep)
        return Compressed(tokens.flatten(0, 1).to(x.dtype), gate.flatten().to(x.dtype))

    return call


class Calls:
    """Three calls of the released schedule, or one call at a threshold, on fixed inputs."""

    def __init__(self, place: Any, frames: int, channels: int, steps: list[tuple[int, dict[str, Any]]]) -> None:
        self.place = place
        self.frames = frames
        self.options = [options for _, options in steps]
        self.x = [
            place.tokens(frames * n, channels, seed=n).view(frames, n, channels).requires_grad_() for n, _ in steps
        ]
        self.guide = place.randn(frames, channels, seed=1).requires_grad_()
        self.weight = torch.tensor(0.5, device=place.device, requires_grad=True)
        self.ours = partial(vsc_compress, backend=place.backend)
        self.pytorch = partial(vsc_compress, backend="reference")
        outs = self.inference(self.pytorch)
        self.grads = [(place.randn(*o.tokens.shape, seed=2), place.randn(*o.gate.shape, seed=3)) for o in outs]
        # Operations of the similarity that must be computed: irrelevant times relevant rows.
        self.operations = sum(
            2.0 * channels * (n * frames - len(o.tokens)) * len(o.tokens) / frames
            for (n, _), o in zip(steps, outs, strict=True)
        )
        # Bytes that must be moved: tokens in and out, and for backward their gradients beside the tokens.
        read, written = sum(x.nbytes for x in self.x), sum(o.tokens.nbytes for o in outs)
        self.traffic = {"forward": read + written, "forward_backward": 3 * read + 2 * written}

    def forward(self, form: Form) -> list[Any]:
        return [
            form(x, None, self.guide, self.weight, **options) for x, options in zip(self.x, self.options, strict=True)
        ]

    def inference(self, form: Form) -> list[Any]:
        with torch.no_grad():
            return self.forward(form)

    def step(self, form: Form) -> list[tuple[Tensor, ...]]:
        return [
            torch.autograd.grad((o.tokens, o.gate), (x, self.guide, self.weight), grads)
            for o, x, grads in zip(self.forward(form), self.x, self.grads, strict=True)
        ]

    def check(self, form: Form) -> None:
        """A side gives the numbers of the PyTorch form before it is timed."""
        close = self.place.close
        for actual, wanted in zip(self.inference(form), self.inference(self.pytorch), strict=True):
            assert actual.tokens.shape == wanted.tokens.shape
            if "keep" in self.options[0] and not isinstance(actual, Compressed):
                same = (actual.index == wanted.index).view(self.frames, -1).all(1)
                assert (~same).sum() <= self.frames // 200, "the sides keep different tokens"
            close(actual.tokens, wanted.tokens, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(self.step(form), self.step(self.pytorch), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def bench_released_schedule(compare: Any, smallest: bool, ceilings: Any, place: Any, direction: str) -> None:
    place.need("vsc_compress")
    frames = 1 if smallest else FRAMES[place.device]
    calls = Calls(place, frames, CHANNELS, [(n, {"keep": k}) for n, k in SCHEDULE])
    calls.check(calls.ours)
    run = calls.inference if direction == "forward" else calls.step
    written, form = tuned(compress), tuned(torch.compile(compress))
    baselines = {"pytorch": lambda: run(calls.pytorch), "pytorch, tuned": lambda: run(written)}
    baselines |= compare.compiled(lambda: run(form))
    for checked in (written, form) if "compile" in baselines else (written,):
        calls.check(checked)
    operations = calls.operations if direction == "forward" else 0.0
    bounded = direction == "forward" or place.device == "cuda"
    compare(
        lambda: run(calls.ours),
        baselines,
        dtype=place.dtype,
        floor=ceilings.floor(operations, calls.traffic[direction], place.dtype) if bounded else None,
        graph=True,
        op="vsc_compress",
        case=f"256 to 100 tokens x {CHANNELS}, {frames} frames{place.suffix}",
        direction=direction,
    )


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [64, 256, 1024])
def bench_threshold(compare: Any, smallest: bool, place: Any, tokens: int, threshold: float) -> None:
    place.need("vsc_compress")
    if smallest and (tokens, threshold) != (64, 0.3):
        pytest.skip("only the smallest size was asked for")
    frames = 1 if smallest else 4
    calls = Calls(place, frames, CHANNELS, [(tokens, {"threshold": threshold})])
    calls.check(calls.ours)
    form = torch.compile(calls.pytorch)
    baselines = {"pytorch": lambda: calls.step(calls.pytorch), **compare.compiled(lambda: calls.step(form))}
    if "compile" in baselines:
        calls.check(form)
    compare(
        lambda: calls.step(calls.ours),
        baselines,
        dtype=place.dtype,
        rounds=7,
        op="vsc_compress",
        case=f"{tokens} tokens x {CHANNELS}, {frames} frames, threshold {threshold}{place.suffix}",
        direction="forward_backward",
    )
