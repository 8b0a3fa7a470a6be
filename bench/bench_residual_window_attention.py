"""residual_window_attention: the first half of Swin V2 tiny's blocks, by stage, against its layers one by one.

`layers` has the attention and the norm as kernels of their own between torch's products, as the half runs where it is
not one operation; `pytorch` has the reference of the whole.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi.backend import fuses
from deepmsi.ops import residual_norm, residual_window_attention, window_attention

WINDOW = 8
# name: side of the grid, channels, shift
CASES = {
    "stage 1": (64, 96, 0),
    "stage 1, shifted": (64, 96, 4),
    "stage 2": (32, 192, 0),
    "stage 2, shifted": (32, 192, 4),
    "stage 3": (16, 384, 0),
    "stage 4": (8, 768, 0),
}
SMALLEST = "stage 4"
SMALLEST_ON_GPU = "stage 2"
FRAMES = {"cpu": 15, "cuda": 240}


class Sides:
    """All sides on the same rows and weights."""

    def __init__(self, place: Any, frames: int, side: int, channels: int, shift: int) -> None:
        self.place, self.heads, self.grid, self.shift = place, channels // 32, (side, side), shift
        sizes = ((3 * channels, channels), (3 * channels,), (channels, channels), *((channels,),) * 3)
        scales = (channels**-0.5, 1.0, channels**-0.5, 1.0, 1.0, 1.0)
        drawn = [place.randn(*size, seed=n) * scale for n, (size, scale) in enumerate(zip(sizes, scales, strict=True))]
        x = place.randn(frames, side, side, channels, seed=9)
        self.inputs = [tensor.requires_grad_() for tensor in (x, *drawn)]
        self.table = place.randn((2 * WINDOW - 1) ** 2, self.heads, seed=10).float()
        self.scale = torch.full((self.heads,), 2.0, device=x.device)
        self.grad = place.randn(frames, side, side, channels, seed=11)
        self.compiled = torch.compile(lambda: self.whole("reference"))
        # What must be moved: rows in, rows out; for backward what the norm and the projection read is written, and read
        # with the rows and a gradient, and one is written.
        self.traffic = {"forward": 2 * self.grad.nbytes, "forward_backward": 9 * self.grad.nbytes}

    def whole(self, backend: str) -> Tensor:
        where = {"bias_table": self.table, "logit_scale": self.scale, "backend": backend}
        return residual_window_attention(*self.inputs, self.heads, self.grid, WINDOW, self.shift, **where)

    def layers(self) -> Tensor:
        x, qkv, qkv_bias, proj, proj_bias, *norm = self.inputs
        where = {"bias_table": self.table, "logit_scale": self.scale, "backend": self.place.backend}
        q_k_v = torch.nn.functional.linear(x, qkv, qkv_bias)
        attended = window_attention(q_k_v, self.heads, self.grid, WINDOW, self.shift, **where)
        branch = torch.nn.functional.linear(attended, proj, proj_bias)
        if fuses("residual_norm", x.device.type, x.dtype, channels=x.shape[-1]):
            return residual_norm(x, branch, *norm)
        return x + torch.nn.functional.layer_norm(branch, branch.shape[-1:], *norm)

    def run(self, name: str, direction: str) -> Any:
        """Return the output, or the gradients."""
        sides = {
            "ours": lambda: self.whole(self.place.backend),
            "pytorch": lambda: self.whole("reference"),
            "layers": self.layers,
            "compile": self.compiled,
        }
        with torch.set_grad_enabled(direction != "forward"):
            y = sides[name]()
        return y if direction == "forward" else torch.autograd.grad(y, self.inputs, self.grad)

    def check(self, name: str) -> None:
        """Ours and a baseline give the same numbers before either is timed."""
        self.place.close(self.run("ours", "forward"), self.run(name, "forward"))
        both = (self.run(side, "forward_backward") for side in ("ours", name))
        for ours, theirs in zip(*both, strict=True):
            self.place.close(ours, theirs)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", CASES)
def bench_residual_window_attention(
    compare: Any, smallest: bool, ceilings: Any, place: Any, name: str, direction: str
) -> None:
    side, channels, shift = CASES[name]
    place.need("residual_window_attention", channels=channels, window=WINDOW)
    if smallest and name != (SMALLEST if place.device == "cpu" else SMALLEST_ON_GPU):
        pytest.skip("only the smallest size was asked for")
    frames = 1 if smallest else FRAMES[place.device]
    rows = frames * side * side
    sides = Sides(place, frames, side, channels, shift)
    baselines = {name: lambda name=name: sides.run(name, direction) for name in ("layers", "pytorch")}
    baselines |= compare.compiled(lambda: sides.run("compile", direction))
    for baseline in baselines:
        sides.check(baseline)
    # Four products with a row's channels and two with its window forward; backward two for each, and q, k and v again.
    linear, attention = (8.0, 4.0) if direction == "forward" else (30.0, 14.0)
    compare(
        lambda: sides.run("ours", direction),
        baselines,
        dtype=place.dtype,
        floor=ceilings.floor(
            rows * channels * (linear * channels + attention * WINDOW**2), sides.traffic[direction], place.dtype
        ),
        op="residual_window_attention",
        case=f"{name}: {rows} rows x {channels}{place.suffix}",
        direction=direction,
    )
