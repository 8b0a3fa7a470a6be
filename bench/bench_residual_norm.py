"""residual_norm on a GPU, at the rows of Swin V2 tiny's stages 1 and 3, against PyTorch's norm and addition.

On a CPU it is a part of the fused halves of a block, and has no kernel of its own.
"""

from typing import Any

import pytest
import torch

from deepmsi.ops import residual_norm

# name: side of the grid, channels
CASES = {"stage 1": (64, 96), "stage 3": (16, 384)}
SMALLEST = "stage 3"
FRAMES = 240


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", CASES)
def bench_residual_norm(compare: Any, smallest: bool, ceilings: Any, place: Any, name: str, direction: str) -> None:
    place.need("residual_norm")
    if smallest and name != SMALLEST:
        pytest.skip("only the smallest size was asked for")
    side, channels = CASES[name]
    rows = (1 if smallest else FRAMES) * side * side
    sizes = ((rows, channels), (rows, channels), (channels,), (channels,))
    inputs = [place.randn(*size, seed=n).requires_grad_() for n, size in enumerate(sizes)]
    grad = place.randn(rows, channels, seed=9)

    def run(backend: str) -> Any:
        with torch.set_grad_enabled(direction != "forward"):
            y = residual_norm(*inputs, backend=backend)
        return (y,) if direction == "forward" else torch.autograd.grad(y, inputs, grad)

    for ours, theirs in zip(run(place.backend), run("reference"), strict=True):
        place.close(ours, theirs)
    tensors = 3 if direction == "forward" else 6
    compare(
        lambda: run(place.backend),
        {"pytorch": lambda: run("reference")},
        dtype=place.dtype,
        floor=ceilings.floor(0.0, tensors * grad.nbytes, place.dtype),
        op="residual_norm",
        case=f"{name}: {rows} rows x {channels}{place.suffix}",
        direction=direction,
    )
