"""residual_window_attention: every backend against the reference, in numbers and gradients."""

import importlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import backend as backends
from deepmsi import testing
from deepmsi.ops import residual_window_attention
from deepmsi.testing import REFERENCES, assert_within_budget, offsets, poisoned_memory, randn, roundings_of

EPS = 1e-5
OP = "residual_window_attention"
PLACES = testing.places(OP)
TYPED = testing.typed_places(OP, (torch.float32, torch.bfloat16, torch.float16))
TYPES = [f"{b}-{d}-{t}" for b, d, t in TYPED]
ON_THE_CPU = [place for place in TYPED if place[:2] == ("cpp", "cpu")]
IDS_ON_THE_CPU = [f"cpp-cpu-{t}" for *_, t in ON_THE_CPU]


def need(dtype: torch.dtype = torch.float32) -> None:
    testing.need(OP, "cpp", "cpu", dtype)


def cut(x: Tensor, seed: int) -> Tensor:
    """Return whole frames dropped or magnified, as stochastic depth does."""
    drawn = randn(x.shape[0], *[1] * (x.dim() - 2), seed=seed, device=x.device) > 0
    return drawn.to(x.dtype).mul(1.25).expand(x.shape[:-1])


def assert_budget(backend: str, device: str, dtype: torch.dtype, **case: Any) -> None:
    facts = {"channels": case.get("channels", 32), "window": case["window"]}
    testing.need(OP, backend, device, dtype, **facts)
    with poisoned_memory():
        got = attention(backend, device, dtype, **case)
    low = attention("reference", device, dtype, **case)
    exact = attention("reference", device, dtype, exact=True, **case)
    for name, wanted in exact.items():
        assert got[name].dtype == low[name].dtype
        roundings = 8 if dtype == torch.float32 else roundings_of(dtype, got[name])
        if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16) and case.get("norm_first"):
            # The interpreter cuts numbers off where GPUs round; a norm at the end makes up for most of that.
            roundings *= 2
        # The scale's gradient is a sum that nearly cancels, of terms as large as the bias' gradient tells.
        scale = exact["bias_table"].abs().sum().item() if name == "logit_scale" and wanted.any() else None
        assert_within_budget(got[name], low[name], wanted, name, roundings, scale)


LAYOUTS: dict[str, dict[str, Any]] = {
    "shifted": {"frames": 3, "grid": (8, 8), "window": 4, "shift": 2},
    "window_8": {"frames": 2, "grid": (16, 8), "window": 8, "shift": 0, "channels": 64},
    "stage_1": {"frames": 1, "grid": (16, 16), "window": 8, "shift": 4, "channels": 96, "heads": 3},
    "unbiased": {"frames": 1, "grid": (8, 8), "window": 8, "shift": 0, "channels": 48, "heads": 3, "biased": False},
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
    device: str,
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
    biased: bool = True,
    scaled: bool = True,
    exact: bool = False,
    norms: torch.dtype | None = None,
    kept: torch.dtype | None = None,
    norm_first: bool = False,
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
        layout = {"positions": positions.to(device), "cu_seqlens": offsets(lengths, device)}
        size = (sum(lengths) + tail,)

    def draw(*size: int, seed: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        rounded = randn(*size, seed=seed, scale=scale, dtype=dtype, device=device)
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
        scales = torch.linspace(1.5, 2.0, heads, dtype=dtype, device=device)
        inputs["logit_scale"] = (scales.double() if exact else scales).requires_grad_()
    scale = cut(inputs["x"], 8) if scaled and inputs["x"].numel() else None
    where = {"heads": heads, "grid": grid, "window": window, "shift": shift, "row_scale": scale, **layout}
    if not biased:
        inputs["qkv_bias"] = None
    with torch.autocast(device, dtype) if kept is not None and not exact else nullcontext():
        y = residual_window_attention(**inputs, **where, eps=EPS, norm_first=norm_first, backend=backend)
    if tail:
        assert torch.equal(y[-tail:], inputs["x"][-tail:])
    grad = randn(*y.shape, seed=20, dtype=dtype, device=device).to(y.dtype)
    leaves = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    grads = torch.autograd.grad(y, tuple(leaves.values()), grad)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_it_keeps_the_error_budget(backend: str, device: str, dtype: torch.dtype, name: str) -> None:
    assert_budget(backend, device, dtype, **LAYOUTS[name])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_a_norm_that_comes_first_keeps_the_error_budget(
    backend: str, device: str, dtype: torch.dtype, name: str
) -> None:
    assert_budget(backend, device, dtype, norm_first=True, **LAYOUTS[name])


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["v1", "odd", "packed"])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_a_norm_that_comes_first_keeps_the_error_budget_under_autocast(
    backend: str, device: str, name: str, norms: torch.dtype
) -> None:
    options: dict[str, Any] = {"norms": norms, "kept": torch.float32, "norm_first": True}
    assert_budget(backend, device, torch.bfloat16, **options, **LAYOUTS[name])


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_a_norm_that_comes_first_is_that_of_the_rows(backend: str, device: str) -> None:
    """In words of torch's own layers, where a window of one slot attends to itself alone: its v is what it gives."""
    dtype = torch.float16 if backend == "triton" else torch.float32
    testing.need(OP, backend, device, dtype)
    x, qkv, q, proj, p, weight, bias = operator_arguments(False, dtype, device)[:7]
    scale = torch.tensor([0.0, 1.25] * 4, dtype=dtype, device=device)
    linear = torch.nn.functional.linear
    normed = torch.nn.functional.layer_norm(x, (6,), weight, bias, EPS)
    wanted = x + scale[:, None] * linear(linear(normed, qkv, q)[:, 12:], proj, p)
    options: dict[str, Any] = {"bias_table": torch.zeros(1, 2, device=device), "row_scale": scale.view(1, 2, 4)}
    grid, weights = x.view(1, 2, 4, 6), (qkv, q, proj, p, weight, bias)
    options |= {"eps": EPS, "norm_first": True, "backend": backend}
    y = residual_window_attention(grid, *weights, 2, (2, 4), 1, 0, **options)
    torch.testing.assert_close(y.view(8, 6), wanted, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["shifted", "packed"])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_a_norm_in_float32_keeps_the_error_budget(backend: str, device: str, name: str) -> None:
    assert_budget(backend, device, torch.bfloat16, norms=torch.float32, **LAYOUTS[name])


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["shifted", "odd", "packed", "odd_packed"])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_autocast_over_rows_in_16_bits_keeps_the_error_budget(
    backend: str, device: str, name: str, norms: torch.dtype
) -> None:
    """The layers' gradients have their own type, float32, as torch's have."""
    assert_budget(backend, device, torch.bfloat16, norms=norms, kept=torch.float32, **LAYOUTS[name])


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_autocast_keeps_the_type_of_rows_in_float32(backend: str, device: str, norm_first: bool) -> None:
    """x and weights in float32: products in 16 bits, the sum in float32. A kernel without such a mixture says so."""
    testing.need(OP, backend, device, torch.bfloat16)
    x, *weights = (tensor.requires_grad_() for tensor in operator_arguments(False, device=device)[:7])
    table = operator_arguments(False, device=device)[10]
    reason = backends.why_not(OP, backend, device, torch.bfloat16, mixed=1)

    def half(backend: str) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"bias_table": table, "norm_first": norm_first, "backend": backend}
        y = residual_window_attention(x.view(1, 2, 4, 6), *weights, 2, (2, 4), 2, 1, **options)
        return (y, *torch.autograd.grad(y, (x, *weights), randn(*y.shape, seed=30, device=device)))

    with (
        torch.autocast(device, torch.bfloat16),
        nullcontext() if reason is None else pytest.raises(RuntimeError, match=reason),
    ):
        got = half(backend)
    if reason is None:
        for value, wanted in zip(got, half("reference"), strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


def test_opcheck_of_rows_in_16_bits_beside_float32() -> None:
    need(torch.bfloat16)
    x, *others = operator_arguments(False)
    operators, x = torch.ops.deepmsi, x.bfloat16()
    torch.library.opcheck(operators.residual_window_attention_cpp_fwd.default, (x, *others, True))
    y, *held = operators.residual_window_attention_cpp_fwd(x, *others, True)
    assert [tensor.dtype for tensor in held] == [torch.bfloat16] * 2
    torch.library.opcheck(operators.residual_window_attention_cpp_bwd.default, (y, x, *held, *others, True))


@pytest.mark.parametrize(
    "layout",
    [LAYOUTS["shifted"], {**LAYOUTS["stage_1"], "frames": 3}, {**LAYOUTS["v1"], "norm_first": True}],
    ids=["few", "many", "norm first"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_thread_count_gives_the_same_bits(dtype: torch.dtype, layout: dict[str, Any]) -> None:
    need(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attention("cpp", "cpu", dtype, **layout))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name


def operator_arguments(
    empty: bool, dtype: torch.dtype = torch.float32, device: str = "cpu", norm_first: bool = False
) -> tuple[Any, ...]:
    """Return the arguments of the forward operator."""
    rows, channels = (0 if empty else 8), 6
    x = randn(rows, channels, seed=1, dtype=dtype, device=device)
    sizes: tuple[tuple[int, ...], ...] = ((3 * channels, channels), (3 * channels,), (channels, channels))
    sizes = (*sizes, (channels,), (channels,), (channels,))
    weights = [randn(*size, seed=i + 2, dtype=dtype, device=device) for i, size in enumerate(sizes)]
    table, scale = randn(9, 2, seed=9, device=device), torch.tensor([1.5, 10.0], device=device)
    return (x, *weights, None, EPS, norm_first, table, scale, 1.0, None, None, 2, 2, 4, 2, 1)


@pytest.mark.parametrize("empty", [False, True], ids=["rows", "empty"])
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "norm_first"),
    [(*place, first) for first in (False, True) for place in TYPED],
    ids=[*TYPES, *(f"{name}-norm first" for name in TYPES)],
)
def test_opcheck(backend: str, device: str, dtype: torch.dtype, norm_first: bool, empty: bool) -> None:
    testing.need(OP, backend, device, dtype)
    arguments = operator_arguments(empty, dtype, device, norm_first)
    forward = getattr(torch.ops.deepmsi, f"{OP}_{backend}_fwd").default
    backward = getattr(torch.ops.deepmsi, f"{OP}_{backend}_bwd").default
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    torch.library.opcheck(forward, (*leaves, True))
    torch.library.opcheck(forward, (*arguments, False))
    outputs = forward(*arguments, True)
    grad = randn(arguments[0].shape[1], arguments[0].shape[0], seed=30, dtype=dtype, device=device).t()
    read = (grad, arguments[0], *outputs[1:], *arguments[1:])
    torch.library.opcheck(backward, (*read, True))
    torch.library.opcheck(backward, (*read, False))
    every, few = backward(*read, True), backward(*read, False)
    assert not any(layer.numel() for layer in few[1:5])
    for value, wanted in zip((few[0], *few[5:]), (every[0], *every[5:]), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_frozen_layers_get_no_gradient(backend: str, device: str, dtype: torch.dtype, norm_first: bool) -> None:
    """And all others get the same, bit for bit."""
    testing.need(OP, backend, device, dtype)
    arguments = operator_arguments(False, dtype, device)
    x, layers, norm = arguments[0].view(1, 2, 4, 6), arguments[1:5], arguments[5:7]
    options = {"bias_table": arguments[10], "logit_scale": arguments[11].log(), "backend": backend}
    options["norm_first"] = norm_first
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
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_compiles_whole_at_any_size(backend: str, device: str) -> None:
    dtype = torch.float32 if backend == "cpp" else torch.float16
    testing.need(OP, backend, device, dtype)
    torch._dynamo.reset()
    arguments = operator_arguments(False, dtype, device)
    options = {"bias_table": arguments[10], "logit_scale": arguments[11].log()}

    def block(x: Tensor) -> Tensor:
        return residual_window_attention(x, *arguments[1:7], 2, (2, 4), 2, 1, **options, backend=backend) * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for frames in (3, 5):
        x = randn(frames, 2, 4, 6, seed=frames, dtype=dtype, device=device).requires_grad_()
        y, expected = compiled(x), block(x)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_repeats_give_the_same_bits(backend: str, device: str, dtype: torch.dtype) -> None:
    testing.need(OP, backend, device, dtype)
    first, second = (attention(backend, device, dtype, **LAYOUTS["packed"]) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_parts_of_the_frames_give_the_gradients_of_all(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, norm_first: bool
) -> None:
    testing.need(OP, backend, device, torch.float16)
    kernels = importlib.import_module("deepmsi._triton.residual_window_attention")
    case = {**LAYOUTS["shifted"], "frames": 5, "norm_first": norm_first}
    whole = attention(backend, device, torch.float16, **case)
    monkeypatch.setattr(kernels, "_QKV_ELEMENTS", 2 * 64 * 96)
    assert [part.stop - part.start for part in kernels._parts(5 * 64, 96, 64)] == [128, 128, 64]
    for name, value in attention(backend, device, torch.float16, **case).items():
        torch.testing.assert_close(value, whole[name], rtol=2e-3, atol=2e-3 * whole[name].abs().max().item())


@pytest.mark.parametrize("name", ["shifted", "packed"])
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_a_program_of_many_windows_keeps_the_error_budget(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, name: str
) -> None:
    testing.need(OP, backend, device, torch.float16)
    monkeypatch.setattr("deepmsi._triton.residual_window_attention._PROGRAMS", 4)
    assert_budget(backend, device, torch.float16, **LAYOUTS[name])


@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_what_the_kernels_do_not_hold_is_refused(backend: str, device: str) -> None:
    testing.need(OP, backend, device, torch.float16)
    for facts, reason in (
        ({"channels": 288}, "rows may have 256 channels at most"),
        ({"window": 9}, "windows may have 8 x 8 slots at most"),
        ({"head_dim": 40}, "heads may have 32 channels at most"),
    ):
        assert backends.why_not(OP, backend, device, torch.float16, **facts) == reason


def test_bad_arguments_are_named() -> None:
    x, *weights = operator_arguments(False)[:7]
    table = torch.zeros(9, 2)
    with pytest.raises(ValueError, match=r"x must be \[B, 2, 4, C\]"):
        residual_window_attention(x, *weights, 2, (2, 4), 2, 1, bias_table=table)
    grid = x.view(1, 2, 4, 6)
    with pytest.raises(ValueError, match=r"proj_bias must be \[6\], not \[5\]"):
        residual_window_attention(grid, *weights[:3], torch.zeros(5), *weights[4:], 2, (2, 4), 2, 1, bias_table=table)
    positions, offset = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2**32 + 7]), offsets([8], "cpu")
    layout: dict[str, Any] = {"bias_table": table, "positions": positions, "cu_seqlens": offset, "backend": "cpp"}
    with pytest.raises(RuntimeError, match="lie on the grid"):
        residual_window_attention(grid.view(8, 6), *weights, 2, (2, 4), 2, 1, **layout)
    doubles = [w.double() for w in weights]
    with pytest.raises(RuntimeError, match="takes float32, bfloat16, not float64"):
        residual_window_attention(grid.double(), *doubles, 2, (2, 4), 2, 1, bias_table=table.double(), backend="cpp")


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_what_rows_behind_the_frames_hold_reaches_no_weight(backend: str, device: str, norm_first: bool) -> None:
    dtype = torch.float16 if backend == "triton" else torch.float32
    testing.need(OP, backend, device, dtype)
    channels, positions = 16, torch.tensor([0, 3, 5, 1, 2, 9, 15, 0, 0], dtype=torch.int32, device=device)
    shapes = ((3 * channels, channels), (3 * channels,), (channels, channels), (channels,), (channels,), (channels,))
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    weights = [randn(*shape, seed=i, scale=0.2, **options).requires_grad_() for i, shape in enumerate(shapes)]
    table, logit_scale = (randn(*n, seed=7, device=device).requires_grad_() for n in ((9, 2), (2,)))
    layout: dict[str, Any] = {"positions": positions, "cu_seqlens": offsets([3, 4], device)}
    rows, found = randn(9, channels, seed=9, **options), []
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
            norm_first=norm_first,
            backend=backend,
            **layout,
        )
        found.append([y[:7], *torch.autograd.grad(y, (x, *weights, table, logit_scale), torch.ones_like(y))])
    for zeros, nans in zip(*found, strict=True):
        assert torch.equal(zeros, nans)
