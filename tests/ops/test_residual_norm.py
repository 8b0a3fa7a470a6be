"""residual_norm: every backend against the reference, in numbers and gradients."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import testing
from deepmsi.ops import residual_norm
from deepmsi.testing import DEVICES, REFERENCES, assert_within_budget, poisoned_memory, randn

EPS = 1e-5
PLACES = testing.places("residual_norm")
TYPED = testing.typed_places("residual_norm", (torch.float32, torch.bfloat16, torch.float16))
TYPES = [f"{b}-{d}-{t}" for b, d, t in TYPED]
# Rows' shape, channels, whether rows have a factor. One row; an odd number; channels that fill no block; wide rows.
CASES: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "one_row": ((1,), 32, False),
    "grid": ((2, 5, 7), 96, True),
    "odd": ((131,), 7, True),
    "one_channel": ((5,), 1, False),
    "wide": ((5,), 1536, True),
    "wide_for_a_block": ((3,), 2048, True),
    "widest": ((2,), 4096, False),
    "empty": ((0,), 32, True),
}


def run(
    name: str, backend: str, device: str, dtype: torch.dtype, exact: bool = False, stream: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return y and every gradient; x and y are in `stream`, and the inputs are rounded before they are made `exact`."""
    rows, channels, scaled = CASES[name]

    def draw(*size: int, seed: int, dtype: torch.dtype = dtype) -> Tensor:
        rounded = randn(*size, seed=seed, dtype=dtype, device=device)
        return (rounded.double() if exact else rounded).requires_grad_()

    inputs = {
        "x": draw(*rows, channels, seed=1, dtype=stream or dtype),
        "branch": draw(*rows, channels, seed=2),
        "norm_weight": draw(channels, seed=3),
        "norm_bias": draw(channels, seed=4),
    }
    scale = (randn(*rows, seed=5, device=device) > 0).to(inputs["x"].dtype) * 1.25 if scaled else None
    y = residual_norm(**inputs, row_scale=scale, eps=EPS, backend=backend)
    grad = randn(*y.shape, seed=20, dtype=stream or dtype, device=device).to(y.dtype)
    return {"y": y.detach(), **dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_it_keeps_the_error_budget(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    testing.need("residual_norm", backend, device, dtype, channels=CASES[name][1])
    with poisoned_memory():
        got = run(name, backend, device, dtype)
    low, exact = run(name, "reference", device, dtype), run(name, "reference", device, dtype, exact=True)
    for what, wanted in exact.items():
        assert got[what].dtype == dtype
        assert_within_budget(got[what], low[what], wanted, what, roundings=8 if dtype == torch.float32 else 1)


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_rows_of_no_block_add_nothing_without_an_eps(backend: str, device: str) -> None:
    """Past the last row a block holds zeros, whose deviation is 0."""
    testing.need("residual_norm", backend, device, torch.float32)
    rows, vectors = ([randn(*size, seed=s, device=device) for s in (1, 2)] for size in ((33, 64), (64,)))
    vectors = [vector.requires_grad_() for vector in vectors]
    got, wanted = (
        torch.autograd.grad(residual_norm(*rows, *vectors, eps=0.0, backend=b).sum(), vectors)
        for b in (backend, "reference")
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_float64_is_summed_in_float64(backend: str, device: str) -> None:
    testing.need("residual_norm", backend, device, torch.float64)
    got, wanted = (run("grid", b, device, torch.float64) for b in (backend, "reference"))
    for what, value in wanted.items():
        torch.testing.assert_close(got[what], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_the_stream_keeps_its_type_under_autocast(backend: str, device: str) -> None:
    """x in float32 and a branch in 16 bits, as autocast leaves them: the sum is in float32, and a kernel's norm."""
    testing.need("residual_norm", backend, device, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        got = run("grid", backend, device, torch.bfloat16, stream=torch.float32)
    exact = run("grid", "reference", device, torch.bfloat16, exact=True, stream=torch.float32)
    assert got["y"].dtype == got["x"].dtype == torch.float32
    assert torch.equal(got["x"].double(), exact["x"])
    within = 3e-2 if backend == "reference" else 1e-5
    torch.testing.assert_close(got["y"].double(), exact["y"], rtol=within, atol=within)
    for what in ("branch", "norm_weight", "norm_bias"):
        assert got[what].dtype == torch.bfloat16
        largest = exact[what].abs().max().item()
        torch.testing.assert_close(got[what].double(), exact[what], rtol=1e-2, atol=max(within, 1e-2) * largest)


@pytest.mark.parametrize("wide", ["norm_weight", "norm_bias"])
@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_a_gradient_is_not_rounded_to_the_type_of_another(backend: str, device: str, wide: str) -> None:
    testing.need("residual_norm", backend, device, torch.float32)
    x, branch = (randn(30, 20, seed=seed, device=device) for seed in (1, 2))
    norm = {name: randn(20, seed=9, dtype=torch.bfloat16, device=device) for name in ("norm_weight", "norm_bias")}
    norm[wide] = norm[wide].float()
    gradients = []
    for dtype in (None, torch.float64):
        leaves = {name: vector.to(dtype or vector.dtype).requires_grad_() for name, vector in norm.items()}
        own = (branch.to(dtype or branch.dtype), x.to(dtype or x.dtype))
        y = residual_norm(own[1], own[0], **leaves, backend="reference" if dtype else backend)
        gradients.append(torch.autograd.grad(y.sin().sum(), leaves[wide])[0])
    assert gradients[0].dtype == torch.float32
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_it_adds_what_layer_norm_gives(backend: str, device: str) -> None:
    testing.need("residual_norm", backend, device, torch.float32)
    x, branch = (randn(4, 6, 20, seed=seed, device=device) for seed in (1, 2))
    weight, bias, scale = (randn(*size, seed=9, device=device) for size in ((20,), (20,), (4, 6)))
    strided = branch.transpose(0, 1).contiguous().transpose(0, 1)
    y = residual_norm(x, strided, weight, bias, row_scale=scale, eps=0.1, backend=backend)
    wanted = x + scale.unsqueeze(-1) * torch.nn.functional.layer_norm(branch, (20,), weight, bias, 0.1)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_repeats_give_the_same_bits(backend: str, device: str) -> None:
    testing.need("residual_norm", backend, device, torch.float32)
    first, second = (run("odd", backend, device, torch.float32) for _ in range(2))
    for what, value in first.items():
        assert torch.equal(second[what], value), what


@pytest.mark.parametrize("device", DEVICES)
def test_the_bias_before_is_summed_from_what_was_not_rounded(device: str) -> None:
    """Of the layer that gives the branch, over more rows than programs; two bytes a number would cost three digits."""
    testing.need("residual_norm", "triton", device, torch.bfloat16)
    gradient_through_norm = importlib.import_module("deepmsi._triton.residual_norm").gradient_through_norm
    branch, grad = (randn(300, 96, seed=seed, dtype=torch.bfloat16, device=device) for seed in (1, 2))
    weight, offsets = randn(96, seed=3, device=device), torch.tensor([0, 290], dtype=torch.int32, device=device)
    with poisoned_memory():
        *found, of_layer = gradient_through_norm(grad, branch, weight, None, offsets, EPS, *[torch.float32] * 3)
    types = (torch.float32, torch.bfloat16)
    without = gradient_through_norm(grad, branch, weight, None, offsets, EPS, *types)
    for one, other in zip(found, without, strict=True):
        # The interpreter cuts numbers off where a GPU rounds them.
        torch.testing.assert_close(one, other.to(one.dtype), rtol=2**-7 * (other.dtype != one.dtype), atol=0.0)
    assert [vector.dtype for vector in without[1:]] == [*types]
    exact = branch[:290].double().requires_grad_()
    normed = torch.nn.functional.layer_norm(exact, (96,), weight.double(), eps=EPS)
    wanted = torch.autograd.grad(normed, exact, grad[:290].double())[0].sum(0)
    torch.testing.assert_close(of_layer.double(), wanted, rtol=0.0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("empty", [False, True], ids=["rows", "empty"])
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_opcheck(backend: str, device: str, dtype: torch.dtype, empty: bool) -> None:
    testing.need("residual_norm", backend, device, dtype)
    rows, channels = (0 if empty else 5), 6

    def draw(*size: int, seed: int) -> Tensor:
        return randn(*size, seed=seed, dtype=dtype, device=device)

    x, branch = draw(rows, channels, seed=1), draw(channels, rows, seed=2).t()
    weight, bias = draw(channels, seed=3), draw(channels, seed=4)
    forward = getattr(torch.ops.deepmsi, f"residual_norm_{backend}_fwd").default
    backward = getattr(torch.ops.deepmsi, f"residual_norm_{backend}_bwd").default
    leaves = [t.clone().requires_grad_() for t in (x, branch, weight, bias)]
    for scale in (None, draw(rows, seed=5)):
        torch.library.opcheck(forward, (*leaves, scale, EPS))
        grad = draw(channels, rows, seed=6).t()
        torch.library.opcheck(backward, (grad, branch, weight, scale, EPS))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_compiles_whole_at_any_size(backend: str, device: str) -> None:
    testing.need("residual_norm", backend, device, torch.float32)
    torch._dynamo.reset()
    weight, bias = (randn(6, seed=seed, device=device) for seed in (1, 2))

    def half(x: Tensor) -> Tensor:
        return residual_norm(x, x * 3, weight, bias, backend=backend) * 2

    compiled = torch.compile(half, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = randn(rows, 4, 6, seed=rows, device=device).requires_grad_()
        y, expected = compiled(x), half(x)
        torch.testing.assert_close(y, expected)
        grads = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"branch": torch.zeros(3, 5)}, r"x and branch must be \[\.\.\., C\], both"),
        ({"norm_bias": torch.zeros(5)}, r"norm_bias must be \[6\], not \[5\]"),
        ({"row_scale": torch.zeros(4)}, r"row_scale must be \[3\], not \[4\]"),
        ({"x": torch.zeros(3, 6, dtype=torch.int64)}, "x must be float16, .* not torch.int64"),
        ({"x": torch.zeros(3, 6).double()}, "float64 goes with float64 alone"),
        ({"norm_weight": torch.zeros(6, device="meta")}, "norm_weight is on meta, x on cpu: move it"),
    ],
    ids=["branch", "bias", "scale", "type", "float64", "device"],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {name: torch.zeros(3, 6) for name in ("x", "branch")}
    arguments |= {name: torch.zeros(6) for name in ("norm_weight", "norm_bias")}
    with pytest.raises(ValueError, match=words):
        residual_norm(**(arguments | change))


@pytest.mark.skipif("cuda" in DEVICES, reason="the sentence names what a machine without a GPU lacks")
def test_a_cpu_has_no_kernel_of_its_own() -> None:
    x, weight = torch.zeros(3, 6), torch.zeros(6)
    with pytest.raises(RuntimeError, match="cpp residual_norm runs on cuda, not on cpu"):
        residual_norm(x, x, weight, weight, backend="cpp")
