"""position_bias on a GPU, at the windows and heads of Swin V2's stage 3, against PyTorch's layers.

On a CPU it has no kernel of its own.
"""

from typing import Any

import pytest
import torch

from deepmsi.ops import position_bias

# name: side of a window, heads
CASES = {"window 8": (8, 12), "window 16": (16, 24)}
SMALLEST = "window 8"


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", CASES)
def bench_position_bias(compare: Any, smallest: bool, ceilings: Any, place: Any, name: str, direction: str) -> None:
    place.need("position_bias")
    if smallest and name != SMALLEST:
        pytest.skip("only the smallest size was asked for")
    window, heads = CASES[name]
    offsets, units = (2 * window - 1) ** 2, 512
    coordinates = place.randn(offsets, 2, seed=1).float()
    sizes = ((units, 2), (units,), (heads, units))
    weights = [place.randn(*size, seed=n).mul_(size[-1] ** -0.5).requires_grad_() for n, size in enumerate(sizes)]
    grad = place.randn(offsets, heads, seed=9).float()

    def run(backend: str) -> Any:
        with torch.set_grad_enabled(direction != "forward"):
            table = position_bias(coordinates, *weights, backend=backend)
        return (table,) if direction == "forward" else torch.autograd.grad(table, weights, grad)

    for ours, theirs in zip(run(place.backend), run("reference"), strict=True):
        place.close(ours, theirs)
    # Backward makes the hidden units again, and has two products where forward has one.
    products = 1 if direction == "forward" else 3
    moved = grad.nbytes * (1 if direction == "forward" else 3)
    compare(
        lambda: run(place.backend),
        {"pytorch": lambda: run("reference")},
        dtype=place.dtype,
        floor=ceilings.floor(products * 2.0 * offsets * units * heads, moved, torch.float32),
        op="position_bias",
        case=f"{name}: {offsets} offsets, {heads} heads{place.suffix}",
        direction=direction,
    )
