"""residual_mlp: the second half of Swin V2 tiny's blocks, by stage, against the chain of PyTorch's layers."""

from typing import Any

import pytest
import torch

from deepmsi.ops import residual_mlp

# name: side of the grid, channels
CASES = {"stage 1": (64, 96), "stage 2": (32, 192), "stage 3": (16, 384), "stage 4": (8, 768)}
SMALLEST = "stage 4"
FRAMES = {"cpu": 15, "cuda": 240}


class Sides:
    """Both sides on the same rows and weights."""

    def __init__(self, place: Any, rows: int, channels: int) -> None:
        hidden = 4 * channels
        self.place = place
        sizes = ((rows, channels), (hidden, channels), (hidden,), (channels, hidden), *((channels,),) * 3)
        scales = (1.0, channels**-0.5, 1.0, hidden**-0.5, 1.0, 1.0, 1.0)
        drawn = (place.randn(*size, seed=n) * scale for n, (size, scale) in enumerate(zip(sizes, scales, strict=True)))
        self.inputs = [x.requires_grad_() for x in drawn]
        self.grad = place.randn(rows, channels, seed=9)
        self.compiled = torch.compile(lambda: residual_mlp(*self.inputs, backend="reference"))
        # What must be moved: rows in, rows out; backward reads them, a gradient and what was normed, and writes one.
        self.traffic = {"forward": 2 * self.grad.nbytes, "forward_backward": 7 * self.grad.nbytes}

    def run(self, name: str, direction: str) -> Any:
        """Return the output, or the gradients."""
        with torch.set_grad_enabled(direction != "forward"):
            if name == "compile":
                y = self.compiled()
            else:
                y = residual_mlp(*self.inputs, backend="reference" if name == "pytorch" else self.place.backend)
        return y if direction == "forward" else torch.autograd.grad(y, self.inputs, self.grad)

    def check(self, name: str) -> None:
        """Ours and a baseline give the same numbers before either is timed."""
        self.place.close(self.run("ours", "forward"), self.run(name, "forward"))
        both = (self.run(side, "forward_backward") for side in ("ours", name))
        for ours, theirs in zip(*both, strict=True):
            self.place.close(ours, theirs)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", CASES)
def bench_residual_mlp(compare: Any, smallest: bool, ceilings: Any, place: Any, name: str, direction: str) -> None:
    place.need("residual_mlp")
    if smallest and name != SMALLEST:
        pytest.skip("only the smallest size was asked for")
    side, channels = CASES[name]
    frames = 1 if smallest else FRAMES[place.device]
    rows = frames * side * side
    sides = Sides(place, rows, channels)
    baselines = {"pytorch": lambda: sides.run("pytorch", direction)}
    baselines |= compare.compiled(lambda: sides.run("compile", direction))
    for baseline in baselines:
        sides.check(baseline)
    # Two products of a row with a layer forward, four more backward.
    operations = 16.0 * rows * channels * channels * (1 if direction == "forward" else 3)
    compare(
        lambda: sides.run("ours", direction),
        baselines,
        dtype=place.dtype,
        floor=ceilings.floor(operations, sides.traffic[direction], place.dtype),
        op="residual_mlp",
        case=f"{name}: {rows} rows x {channels}{place.suffix}",
        direction=direction,
    )
