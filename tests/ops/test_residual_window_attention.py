"""residual_window_attention: the CPU kernel against the reference, in numbers and gradients."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import testing
from deepmsi.ops import residual_window_attention
from deepmsi.testing import assert_within_budget, offsets, poisoned_memory, randn, roundings_of

EPS = 1e-5
TYPED = testing.typed_places("residual_window_attention", (torch.float32, torch.bfloat16))
TYPES = [f"{b}-{d}-{t}" for b, d, t in TYPED]


def need(dtype: torch.dtype = torch.float32) -> None:
    testing.need("residual_window_attention", "cpp", "cpu", dtype)


def cut(x: Tensor, seed: int) -> Tensor:
    """Return whole frames dropped or magnified, as stochastic depth does."""
    return (randn(x.shape[0], *[1] * (x.dim() - 2), seed=seed) > 0).to(x.dtype).mul(1.25).expand(x.shape[:-1])


def assert_budget(backend: str, dtype: torch.dtype, **case: Any) -> None:
    need(dtype)
    with poisoned_memory():
        got = attention(backend, dtype, **case)
    low, exact = attention("reference", dtype, **case), attention("reference", dtype, exact=True, **case)
    for name, wanted in exact.items():
        assert got[name].dtype == low[name].dtype
        roundings = 8 if dtype == torch.float32 else roundings_of(dtype, got[name])
        assert_within_budget(got[name], low[name], wanted, name, roundings=roundings)


LAYOUTS: dict[str, dict[str, Any]] = {
    "shifted": {"frames": 3, "grid": (8, 8), "window": 4, "shift": 2},
    "window_8": {"frames": 2, "grid": (16, 8), "window": 8, "shift": 0, "channels": 64},
    "v1": {"frames": 2, "grid": (6, 6), "window": 3, "shift": 1, "cosine": False, "channels": 10},
    "odd": {"frames": 3, "grid": (5, 7), "window": 3, "shift": 1, "cosine": False, "channels": 15, "heads": 3},
    "odd_packed": {"lengths": (7, 0, 3), "grid": (4, 4), "window": 2, "shift": 1, "channels": 7, "heads": 1, "tail": 2},
    "packed": {"lengths": (7, 0, 20, 36), "grid": (6, 6), "window": 3, "shift": 1, "tail": 5},
    "packed_chunks": {"lengths": (250, 3, 256, 90, 256, 1), "grid": (16, 16), "window": 8, "shift": 4, "channels": 768},
    "no_rows": {"frames": 0, "grid": (4, 4), "window": 4, "shift": 0},
    "only_tail": {"lengths": (0, 0), "grid": (4, 4), "window": 2, "shift": 1, "tail": 3},
}


def attention(
    backend: str,
    dtype: torch.dtype,
    grid: tuple[int, int],
    window: int,
    shift: int,
    frames: int = 0,
    lengths: tuple[int, ...] | None = None,
    tail: int = 0,
    channels: int = 32,
    heads: int = 2,
    cosine: bool = True,
    scaled: bool = True,
    exact: bool = False,
    norms: torch.dtype | None = None,
    kept: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return y and every gradient; the inputs are rounded to the types before they are made `exact`.

    The layers are rounded to `dtype` and given in the type that they are `kept` in, which autocast takes in `dtype`.
    """
    layout: dict[str, Any] = {}
    size: tuple[int, ...] = (frames, *grid)
    if lengths is not None:
        places = [
            torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(i))[:n].sort().values
            for i, n in enumerate(lengths)
        ]
        positions = torch.cat([*places, torch.zeros(tail, dtype=torch.int64)]).int()
        layout = {"positions": positions, "cu_seqlens": offsets(lengths)}
        size = (sum(lengths) + tail,)

    def draw(*size: int, seed: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        rounded = randn(*size, seed=seed, scale=scale, dtype=dtype)
        if kept is not None and seed in (2, 3, 4, 5):
            rounded = rounded.to(kept)
        return (rounded.double() if exact else rounded).requires_grad_()

    inputs = {
        "x": draw(*size, channels, seed=1),
        "qkv_weight": draw(3 * channels, channels, seed=2, scale=channels**-0.5),
        "qkv_bias": draw(3 * channels, seed=3),
        "proj_weight": draw(channels, channels, seed=4, scale=channels**-0.5),
        "proj_bias": draw(channels, seed=5),
        "norm_weight": draw(channels, seed=6, dtype=norms or dtype),
        "norm_bias": draw(channels, seed=7, dtype=norms or dtype),
        "bias_table": draw((2 * window - 1) ** 2, heads, seed=9, dtype=torch.float32),
    }
    if cosine:
        scales = torch.linspace(1.5, 2.0, heads, dtype=dtype)
        inputs["logit_scale"] = (scales.double() if exact else scales).requires_grad_()
    scale = cut(inputs["x"], 8) if scaled and inputs["x"].numel() else None
    where = {"heads": heads, "grid": grid, "window": window, "shift": shift, "row_scale": scale, **layout}
    with torch.autocast("cpu", dtype) if kept is not None and not exact else nullcontext():
        y = residual_window_attention(**inputs, **where, eps=EPS, backend=backend)
    if tail:
        assert torch.equal(y[-tail:], inputs["x"][-tail:])
    grad = randn(*y.shape, seed=20, dtype=dtype).to(y.dtype)
    grads = torch.autograd.grad(y, tuple(inputs.values()), grad)
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_it_keeps_the_error_budget(backend: str, device: str, dtype: torch.dtype, name: str) -> None:
    assert_budget(backend, dtype, **LAYOUTS[name])


@pytest.mark.parametrize("name", ["shifted", "packed"])
def test_a_norm_in_float32_keeps_the_error_budget(name: str) -> None:
    assert_budget("cpp", torch.bfloat16, norms=torch.float32, **LAYOUTS[name])


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["shifted", "odd", "packed", "odd_packed"])
def test_autocast_over_rows_in_16_bits_keeps_the_error_budget(name: str, norms: torch.dtype) -> None:
    """The layers' gradients have their own type, float32, as torch's have."""
    assert_budget("cpp", torch.bfloat16, norms=norms, kept=torch.float32, **LAYOUTS[name])


def test_autocast_keeps_the_type_of_rows_in_float32() -> None:
    x, *weights = operator_arguments(False)[:7]
    table = operator_arguments(False)[9]
    with torch.autocast("cpu", torch.bfloat16):
        y = residual_window_attention(x.view(1, 2, 4, 6), *weights, 2, (2, 4), 2, 1, bias_table=table)
        with pytest.raises(RuntimeError, match="x and the weights must be of one type"):
            residual_window_attention(x.view(1, 2, 4, 6), *weights, 2, (2, 4), 2, 1, bias_table=table, backend="cpp")
    exact = residual_window_attention(x.view(1, 2, 4, 6), *weights, 2, (2, 4), 2, 1, bias_table=table)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, exact, rtol=0.05, atol=0.05)


def test_opcheck_of_rows_in_16_bits_beside_float32() -> None:
    need(torch.bfloat16)
    x, *others = operator_arguments(False)
    operators, x = torch.ops.deepmsi, x.bfloat16()
    torch.library.opcheck(operators.residual_window_attention_cpp_fwd.default, (x, *others, True))
    y, *held = operators.residual_window_attention_cpp_fwd(x, *others, True)
    assert [tensor.dtype for tensor in held] == [torch.bfloat16] * 2
    torch.library.opcheck(operators.residual_window_attention_cpp_bwd.default, (y, x, *held, *others, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_thread_count_gives_the_same_bits(dtype: torch.dtype) -> None:
    need(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attention("cpp", dtype, **LAYOUTS["shifted"]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name


def operator_arguments(empty: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Return the arguments of the forward operator."""
    rows, channels = (0 if empty else 8), 6
    x = randn(rows, channels, seed=1, dtype=dtype)
    sizes: tuple[tuple[int, ...], ...] = ((3 * channels, channels), (3 * channels,), (channels, channels))
    sizes = (*sizes, (channels,), (channels,), (channels,))
    weights = [randn(*size, seed=i + 2, dtype=dtype) for i, size in enumerate(sizes)]
    table, scale = randn(9, 2, seed=9), torch.tensor([1.5, 10.0])
    return (x, *weights, None, EPS, table, scale, 1.0, None, None, 2, 2, 4, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("empty", [False, True], ids=["rows", "empty"])
def test_opcheck(empty: bool, dtype: torch.dtype) -> None:
    need(dtype)
    arguments = operator_arguments(empty, dtype)
    forward = torch.ops.deepmsi.residual_window_attention_cpp_fwd.default
    backward = torch.ops.deepmsi.residual_window_attention_cpp_bwd.default
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(forward, (*leaves, True))
    torch.library.opcheck(forward, (*arguments, False))
    outputs = forward(*arguments, True)
    grad = randn(arguments[0].shape[1], arguments[0].shape[0], seed=30, dtype=dtype).t()
    read = (grad, arguments[0], *outputs[1:], *arguments[1:])
    torch.library.opcheck(backward, (*read, True))
    torch.library.opcheck(backward, (*read, False))
    every, few = backward(*read, True), backward(*read, False)
    assert not any(layer.numel() for layer in few[1:5])
    for value, wanted in zip((few[0], *few[5:]), (every[0], *every[5:]), strict=True):
        assert torch.equal(value, wanted)


def test_frozen_layers_get_no_gradient() -> None:
    """And all others get the same, bit for bit."""
    need()
    arguments = operator_arguments(False)
    x, layers, norm = arguments[0].view(1, 2, 4, 6), arguments[1:5], arguments[5:7]
    options = {"bias_table": arguments[9], "logit_scale": arguments[10].log(), "backend": "cpp"}
    found = []
    for frozen in (False, True):
        leaves = [x.clone().requires_grad_(), *(t.clone().requires_grad_(not frozen) for t in layers)]
        leaves += [t.clone().requires_grad_() for t in norm]
        residual_window_attention(*leaves, 2, (2, 4), 2, 1, **options).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert found[1][1:5] == [None] * 4
    for value, wanted in zip(found[1][:1] + found[1][5:], found[0][:1] + found[0][5:], strict=True):
        assert torch.equal(value, wanted)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_whole_at_any_size() -> None:
    need()
    torch._dynamo.reset()
    arguments = operator_arguments(False)
    options = {"bias_table": arguments[9], "logit_scale": arguments[10].log()}

    def block(x: Tensor) -> Tensor:
        return residual_window_attention(x, *arguments[1:7], 2, (2, 4), 2, 1, **options, backend="cpp") * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for frames in (3, 5):
        x = randn(frames, 2, 4, 6, seed=frames).requires_grad_()
        y, expected = compiled(x), block(x)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads)


def test_bad_arguments_are_named() -> None:
    x, *weights = operator_arguments(False)[:7]
    table = torch.zeros(9, 2)
    with pytest.raises(ValueError, match=r"x must be \[B, 2, 4, C\]"):
        residual_window_attention(x, *weights, 2, (2, 4), 2, 1, bias_table=table)
    grid = x.view(1, 2, 4, 6)
    with pytest.raises(ValueError, match=r"proj_bias must be \[6\], not \[5\]"):
        residual_window_attention(grid, *weights[:3], torch.zeros(5), *weights[4:], 2, (2, 4), 2, 1, bias_table=table)
    doubles = [w.double() for w in weights]
    with pytest.raises(RuntimeError, match="takes float32, bfloat16, not float64"):
        residual_window_attention(grid.double(), *doubles, 2, (2, 4), 2, 1, bias_table=table.double(), backend="cpp")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_rows_behind_the_frames_hold_reaches_no_weight(backend: str) -> None:
    testing.need("residual_window_attention", backend, "cpu", torch.float32)
    channels, positions = 16, torch.tensor([0, 3, 5, 1, 2, 9, 15, 0, 0], dtype=torch.int32)
    shapes = ((3 * channels, channels), (3 * channels,), (channels, channels), (channels,), (channels,), (channels,))
    weights = [randn(*shape, seed=i, scale=0.2).requires_grad_() for i, shape in enumerate(shapes)]
    table, logit_scale = randn(9, 2, seed=7).requires_grad_(), randn(2, seed=8).requires_grad_()
    layout: dict[str, Any] = {"positions": positions, "cu_seqlens": offsets([3, 4])}
    rows, found = randn(9, channels, seed=9), []
    for held in (0.0, torch.nan):
        x = rows.clone()
        x[7:] = held
        y = residual_window_attention(
            x.requires_grad_(),
            *weights,
            2,
            (4, 4),
            2,
            1,
            bias_table=table,
            logit_scale=logit_scale,
            backend=backend,
            **layout,
        )
        found.append([y[:7], *torch.autograd.grad(y, (x, *weights, table, logit_scale), torch.ones_like(y))])
    for zeros, nans in zip(*found, strict=True):
        assert torch.equal(zeros, nans)
