"""position_bias: every backend against the reference, in numbers and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import testing
from deepmsi.ops import position_bias
from deepmsi.testing import REFERENCES, assert_within_budget, poisoned_memory, randn

PLACES = testing.places("position_bias")
TYPED = testing.typed_places("position_bias", (torch.float32, torch.bfloat16, torch.float16))
TYPES = [f"{b}-{d}-{t}" for b, d, t in TYPED]
NAMES = ("hidden_weight", "hidden_bias", "out_weight")
# Offsets, hidden units, heads. A window of 4; numbers that fill no block and more than one; the most heads; next to
# nothing; nothing.
CASES: dict[str, tuple[int, int, int]] = {
    "window_4": (49, 96, 3),
    "odd": (37, 131, 33),
    "most_heads": (19, 20, 64),
    "one_of_each": (1, 1, 1),
    "no_offsets": (0, 20, 3),
    "no_units": (5, 0, 3),
}


def drawn(
    name: str, device: str, dtype: torch.dtype, exact: bool = False, types: tuple[torch.dtype, ...] = ()
) -> list[Tensor]:
    """Return coordinates and weights, which are rounded before they are made `exact`."""
    offsets, units, heads = CASES[name]
    sizes = ((units, 2), (units,), (heads, units))
    scales = (1.0, 1.0, max(units, 1) ** -0.5)
    kinds = types or (dtype,) * 3
    weights = [
        randn(*size, seed=seed, dtype=kind, device=device, scale=scale)
        for seed, (size, scale, kind) in enumerate(zip(sizes, scales, kinds, strict=True))
    ]
    coordinates = randn(offsets, 2, seed=9, device=device)
    return [coordinates, *((weight.double() if exact else weight).requires_grad_() for weight in weights)]


def run(
    name: str, backend: str, device: str, dtype: torch.dtype, narrow: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Return the table, `narrow` under autocast, and the gradient of every weight."""
    coordinates, *weights = drawn(name, device, dtype, **options)
    with torch.autocast(device, torch.bfloat16, enabled=narrow):
        table = position_bias(coordinates, *weights, backend=backend)
    grad = randn(*table.shape, seed=20, device=device).to(table.dtype)
    return {"table": table.detach(), **dict(zip(NAMES, torch.autograd.grad(table, weights, grad), strict=True))}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_it_keeps_the_error_budget(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    testing.need("position_bias", backend, device, dtype, heads=CASES[name][2])
    with poisoned_memory():
        got = run(name, backend, device, dtype)
    low, exact = run(name, "reference", device, dtype), run(name, "reference", device, dtype, exact=True)
    for what, wanted in exact.items():
        assert got[what].dtype == (torch.float32 if what == "table" else dtype)
        # Weights are widened before they are used, so that the table's error is float32's whatever their type.
        assert_within_budget(got[what], low[what], wanted, what, roundings=8 if got[what].dtype == torch.float32 else 1)


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_weights_may_be_of_several_types(backend: str, device: str) -> None:
    testing.need("position_bias", backend, device, torch.float32)
    types = (torch.bfloat16, torch.float32, torch.float16)
    got, wanted = (run("window_4", b, device, torch.float32, types=types) for b in (backend, "reference"))
    for what, value in wanted.items():
        assert got[what].dtype == value.dtype
        torch.testing.assert_close(got[what], value, rtol=1e-2, atol=1e-2 if what != "table" else 1e-5)


def test_float64_is_the_references() -> None:
    """Wherever one weight is in it; and its gradients are those of differences."""
    coordinates, *weights = drawn("one_of_each", "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda *w: position_bias(coordinates, *w), weights)
    single, *others = drawn("window_4", "cpu", torch.float32)
    others[2] = others[2].detach().double()
    assert position_bias(single, *others).dtype == torch.float64
    with pytest.raises(RuntimeError, match="position_bias"):
        position_bias(single, *others, backend="triton")


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_autocast_changes_nothing(backend: str, device: str) -> None:
    testing.need("position_bias", backend, device, torch.float32)
    narrow, wanted = (run("window_4", backend, device, torch.float32, narrow=on) for on in (True, False))
    for what, value in wanted.items():
        assert torch.equal(narrow[what], value), what


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_it_is_what_the_layers_give(backend: str, device: str) -> None:
    """From strided tensors, too; and what is no number stays one behind relu, which the larger of two would hide."""
    testing.need("position_bias", backend, device, torch.float32)
    coordinates, hidden_weight, hidden_bias, out_weight = (t.detach() for t in drawn("odd", device, torch.float32))
    layers = torch.nn.functional.linear(coordinates, hidden_weight, hidden_bias).relu()
    wanted = 16 * torch.nn.functional.linear(layers, out_weight).sigmoid()
    strided = (coordinates.t().contiguous().t(), hidden_weight.t().contiguous().t(), hidden_bias)
    table = position_bias(*strided, out_weight.t().contiguous().t(), backend=backend)
    torch.testing.assert_close(table, wanted)
    hidden_bias[5] = torch.nan
    assert position_bias(*strided, out_weight, backend=backend).isnan().all()


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_a_unit_that_is_not_raised_gets_no_gradient(backend: str, device: str) -> None:
    """At 0, too, where the middle of a window lies while the biases are still zero."""
    testing.need("position_bias", backend, device, torch.float32)
    found = []
    for chosen in (backend, "reference"):
        coordinates, *weights = drawn("window_4", device, torch.float32)
        with torch.no_grad():
            coordinates[7], weights[1][:50] = 0.0, 0.0
        rows = torch.zeros(49, 3, device=device)
        rows[7] = 1.0
        table = position_bias(coordinates, *weights, backend=chosen)
        found.append(torch.autograd.grad(table, weights, rows))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)
    assert found[0][1][:50].count_nonzero() == 0
    assert found[0][1].count_nonzero() > 0


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_repeats_give_the_same_bits(backend: str, device: str) -> None:
    testing.need("position_bias", backend, device, torch.float32)
    first, second = (run("odd", backend, device, torch.float32) for _ in range(2))
    for what, value in first.items():
        assert torch.equal(second[what], value), what


@pytest.mark.parametrize("empty", [False, True], ids=["offsets", "empty"])
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_opcheck(backend: str, device: str, dtype: torch.dtype, empty: bool) -> None:
    testing.need("position_bias", backend, device, dtype)
    inputs = drawn("no_offsets" if empty else "window_4", device, dtype)
    inputs[0], inputs[1] = (tensor.detach().mT.contiguous().mT for tensor in inputs[:2])
    forward = getattr(torch.ops.deepmsi, f"position_bias_{backend}_fwd").default
    backward = getattr(torch.ops.deepmsi, f"position_bias_{backend}_bwd").default
    torch.library.opcheck(forward, (inputs[0], inputs[1].requires_grad_(), *inputs[2:]))
    inputs = [tensor.detach() for tensor in inputs]
    table = forward(*inputs)
    grad = randn(*table.mT.shape, seed=6, device=device).mT
    torch.library.opcheck(backward, (grad, *inputs, table))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_compiles_whole_at_any_size(backend: str, device: str) -> None:
    testing.need("position_bias", backend, device, torch.float32)
    torch._dynamo.reset()
    _, *weights = drawn("window_4", device, torch.float32)

    def doubled(coordinates: Tensor) -> Tensor:
        return position_bias(coordinates * 3, *weights, backend=backend) * 2

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True)
    for offsets in (9, 25):
        coordinates = randn(offsets, 2, seed=offsets, device=device)
        table, expected = compiled(coordinates), doubled(coordinates)
        torch.testing.assert_close(table, expected)
        for got, wanted in zip(
            *(torch.autograd.grad(t.square().sum(), weights) for t in (table, expected)), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_coordinates_get_no_gradient(backend: str, device: str) -> None:
    testing.need("position_bias", backend, device, torch.float32)
    coordinates, *weights = drawn("window_4", device, torch.float32)
    coordinates.requires_grad_()
    assert not position_bias(coordinates, *(w.detach() for w in weights), backend=backend).requires_grad
    position_bias(coordinates, *weights, backend=backend).sum().backward()
    assert coordinates.grad is None
    assert all(weight.grad is not None for weight in weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coordinates": torch.zeros(9, 3)}, r"coordinates must be \[P, 2\], not \[9, 3\]"),
        ({"hidden_weight": torch.zeros(2, 6)}, r"hidden_weight must be \[D, 2\], not \[2, 6\]"),
        ({"hidden_bias": torch.zeros(5)}, r"hidden_bias must be \[6\], not \[5\]"),
        ({"out_weight": torch.zeros(6, 3)}, r"out_weight must be \[heads, 6\], not \[6, 3\]"),
        ({"hidden_bias": torch.zeros(6, dtype=torch.int64)}, "hidden_bias must be float16, .* not torch.int64"),
        ({"out_weight": torch.zeros(3, 6, device="meta")}, "out_weight is on meta, hidden_weight on cpu: move it"),
    ],
    ids=["coordinates", "weight", "bias", "out", "type", "device"],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    arguments = {"coordinates": torch.zeros(9, 2), "hidden_weight": torch.zeros(6, 2), "hidden_bias": torch.zeros(6)}
    with pytest.raises(ValueError, match=words):
        position_bias(**({**arguments, "out_weight": torch.zeros(3, 6)} | change))


def test_more_heads_than_a_kernel_holds_are_the_references() -> None:
    testing.need("position_bias", "triton", "cpu", torch.float32)
    arguments = (torch.zeros(9, 2), torch.zeros(6, 2), torch.zeros(6), torch.zeros(65, 6))
    assert position_bias(*arguments).shape == (9, 65)
    with pytest.raises(RuntimeError, match="rows of the table may have 64 channels at most"):
        position_bias(*arguments, backend="triton")
