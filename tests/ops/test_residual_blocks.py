"""residual_mlp and residual_window_attention: every backend against the references, in numbers and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import backend as backends
from deepmsi.ops import residual_mlp, residual_window_attention
from deepmsi.testing import assert_within_budget, offsets, poisoned_memory, randn

EPS = 1e-5


def need(op: str) -> None:
    reason = backends.why_not(op, "cpp", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)


def cut(x: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """Return whole frames dropped or magnified, as stochastic depth does."""
    return (randn(x.shape[0], *[1] * (x.dim() - 2), seed=seed) > 0).to(dtype).mul(1.25).expand(x.shape[:-1])


def mlp(
    rows: tuple[int, ...],
    channels: int,
    hidden: int,
    scaled: bool,
    backend: str,
    dtype: torch.dtype,
    lengths: tuple[int, ...] | None = None,
) -> Any:
    def draw(*size: int, seed: int, scale: float = 1.0) -> Tensor:
        return randn(*size, seed=seed, scale=scale, dtype=torch.float32).to(dtype).requires_grad_()

    inputs = {
        "x": draw(*rows, channels, seed=1),
        "fc1_weight": draw(hidden, channels, seed=2, scale=channels**-0.5),
        "fc1_bias": draw(hidden, seed=3),
        "fc2_weight": draw(channels, hidden, seed=4, scale=hidden**-0.5),
        "fc2_bias": draw(channels, seed=5),
        "norm_weight": draw(channels, seed=6),
        "norm_bias": draw(channels, seed=7),
    }
    scale = cut(inputs["x"], 8, dtype) if scaled else None
    cu_seqlens = None if lengths is None else offsets(lengths)
    y = residual_mlp(**inputs, row_scale=scale, cu_seqlens=cu_seqlens, eps=EPS, backend=backend)
    return results(y, inputs)


def results(y: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    grad = randn(*y.shape, seed=20).to(y.dtype)
    grads = torch.autograd.grad(y, tuple(inputs.values()), grad)
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def assert_budget(run: Any) -> None:
    with poisoned_memory():
        got = run("cpp", torch.float32)
    low, exact = run("reference", torch.float32), run("reference", torch.float64)
    for name, wanted in exact.items():
        assert_within_budget(got[name], low[name], wanted, name, roundings=8)


# One row; an odd number below and above a tile; channels that fill no vector; several chunks of a wide layer.
MLP_CASES = {
    "one_row": ((1,), 32, 64, False),
    "grid": ((2, 5, 7), 96, 384, True),
    "odd": ((13,), 7, 19, True),
    "chunks": ((3000,), 36, 1030, False),
    "deep": ((50,), 768, 1536, False),
    "empty": ((0,), 32, 64, True),
}


@pytest.mark.parametrize("name", MLP_CASES)
def test_mlp_keeps_the_error_budget(name: str) -> None:
    need("residual_mlp")
    assert_budget(lambda backend, dtype: mlp(*MLP_CASES[name], backend, dtype))


@pytest.mark.parametrize("lengths", [(30, 0, 11), (0, 0), (77,)], ids=["some", "none", "all"])
def test_mlp_passes_the_rows_behind_the_frames_on(lengths: tuple[int, ...]) -> None:
    need("residual_mlp")
    assert_budget(lambda backend, dtype: mlp((77,), 40, 200, True, backend, dtype, lengths))


LAYOUTS: dict[str, dict[str, Any]] = {
    "shifted": {"frames": 3, "grid": (8, 8), "window": 4, "shift": 2},
    "window_8": {"frames": 2, "grid": (16, 8), "window": 8, "shift": 0, "channels": 64},
    "v1": {"frames": 2, "grid": (6, 6), "window": 3, "shift": 1, "cosine": False, "channels": 10},
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
    cosine: bool = True,
    scaled: bool = True,
) -> dict[str, Tensor]:
    heads = 2
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

    def draw(*size: int, seed: int, scale: float = 1.0) -> Tensor:
        return randn(*size, seed=seed, scale=scale, dtype=torch.float32).to(dtype).requires_grad_()

    inputs = {
        "x": draw(*size, channels, seed=1),
        "qkv_weight": draw(3 * channels, channels, seed=2, scale=channels**-0.5),
        "qkv_bias": draw(3 * channels, seed=3),
        "proj_weight": draw(channels, channels, seed=4, scale=channels**-0.5),
        "proj_bias": draw(channels, seed=5),
        "norm_weight": draw(channels, seed=6),
        "norm_bias": draw(channels, seed=7),
        "bias_table": draw((2 * window - 1) ** 2, heads, seed=9),
    }
    if cosine:
        inputs["logit_scale"] = torch.tensor([1.5, 2.0], dtype=dtype).requires_grad_()
    scale = cut(inputs["x"], 8, dtype) if scaled and inputs["x"].numel() else None
    y = residual_window_attention(
        heads=heads,
        grid=grid,
        window=window,
        shift=shift,
        **inputs,
        **layout,
        row_scale=scale,
        eps=EPS,
        backend=backend,
    )
    if tail:
        assert torch.equal(y[-tail:], inputs["x"][-tail:])
    return results(y, inputs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_keeps_the_error_budget(name: str) -> None:
    need("residual_window_attention")
    assert_budget(lambda backend, dtype: attention(backend, dtype, **LAYOUTS[name]))


@pytest.mark.parametrize("op", ["mlp", "attention"])
def test_any_thread_count_gives_the_same_bits(op: str) -> None:
    need("residual_window_attention")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            if op == "mlp":
                found.append(mlp((500,), 40, 200, True, "cpp", torch.float32))
            else:
                found.append(attention("cpp", torch.float32, **LAYOUTS["shifted"]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name


def test_gelu_is_exact_in_both_tails() -> None:
    """fc1 and fc2 pass one channel v on; under a large eps the norm is linear: y = x + gelu(x) / 2."""
    need("residual_mlp")
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-10, -40.0, 40.0, 1e4, -1e4])))
    rows = torch.stack((x, torch.zeros_like(x)), 1)
    pick = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    zeros, steep = torch.zeros(2), torch.full((2,), 1e10)
    y = residual_mlp(rows, pick, zeros, pick, zeros, steep, zeros, eps=1e20, backend="cpp")[:, 0]
    exact = x.double() + torch.nn.functional.gelu(x.double()) / 2
    assert ((y.double() - exact).abs() <= 4e-7 * x.double().abs()).all()


def operator_arguments(op: str, empty: bool) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Return the arguments of the forward operator, and which outputs the backward one reads."""
    rows, channels, hidden = (0 if empty else 8), 6, 10
    x = randn(rows, channels, seed=1)
    if op == "residual_mlp":
        sizes: tuple[tuple[int, ...], ...] = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
        weights = [randn(*size, seed=i + 2) for i, size in enumerate((*sizes, (channels,), (channels,)))]
        return (x, *weights, torch.ones(rows), None if empty else offsets((2, 3)), EPS), (1,)
    sizes = ((3 * channels, channels), (3 * channels,), (channels, channels), (channels,), (channels,), (channels,))
    weights = [randn(*size, seed=i + 2) for i, size in enumerate(sizes)]
    table, scale = randn(9, 2, seed=9), torch.tensor([1.5, 10.0])
    return (x, *weights, None, EPS, table, scale, 1.0, None, None, 2, 2, 4, 2, 1), (1, 2)


@pytest.mark.parametrize("empty", [False, True], ids=["rows", "empty"])
@pytest.mark.parametrize("op", ["residual_mlp", "residual_window_attention"])
def test_opcheck(op: str, empty: bool) -> None:
    need(op)
    arguments, read = operator_arguments(op, empty)
    forward = getattr(torch.ops.deepmsi, f"{op}_cpp_fwd").default
    backward = getattr(torch.ops.deepmsi, f"{op}_cpp_bwd").default
    floating = [isinstance(a, Tensor) and a.is_floating_point() and a.shape != (8,) for a in arguments]
    leaves = [a.clone().requires_grad_() if is_leaf else a for a, is_leaf in zip(arguments, floating, strict=True)]
    torch.library.opcheck(forward, (*leaves, True))
    torch.library.opcheck(forward, (*arguments, False))
    outputs = forward(*arguments, True)
    grad = randn(arguments[0].shape[1], arguments[0].shape[0], seed=30).t()
    torch.library.opcheck(backward, (grad, arguments[0], *(outputs[i] for i in read), *arguments[1:]))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("op", ["residual_mlp", "residual_window_attention"])
def test_compiles_whole_at_any_size(op: str) -> None:
    need(op)
    torch._dynamo.reset()
    arguments, _ = operator_arguments(op, False)
    weights = arguments[1:7]

    def block(x: Tensor) -> Tensor:
        if op == "residual_mlp":
            return residual_mlp(x, *weights, backend="cpp") * 2
        options = {"bias_table": arguments[9], "logit_scale": arguments[10].log()}
        return residual_window_attention(x, *weights, 2, (2, 4), 2, 1, **options, backend="cpp") * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for frames in (3, 5):
        x = randn(frames, 2, 4, 6, seed=frames).requires_grad_()
        y, expected = compiled(x), block(x)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fc1_weight": torch.zeros(10, 5)}, r"x must be \[\.\.\., C\] and fc1_weight \[H, C\]"),
        ({"fc2_weight": torch.zeros(10, 6)}, r"fc2_weight must be \[6, 10\]"),
        ({"fc1_bias": torch.zeros(6)}, r"fc1_bias must be \[10\]"),
        ({"row_scale": torch.zeros(3)}, r"row_scale must be \[8\]"),
        ({"cu_seqlens": torch.tensor([0, 8])}, r"cu_seqlens must be \[F \+ 1\] int32 .* not \[2\] torch.int64"),
        ({"x": torch.zeros(8, 6, dtype=torch.int64)}, "floa"),
    ],
    ids=["fc1", "fc2", "bias", "scale", "offsets", "type"],
)
def test_bad_arguments_of_the_mlp_are_named(change: dict[str, Tensor], words: str) -> None:
    names = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "norm_weight", "norm_bias")
    arguments = dict(zip(names, operator_arguments("residual_mlp", False)[0][:7], strict=True))
    with pytest.raises(ValueError, match=words):
        residual_mlp(**(arguments | change))


def test_bad_arguments_of_the_attention_are_named() -> None:
    x, *weights = operator_arguments("residual_window_attention", False)[0][:7]
    table = torch.zeros(9, 2)
    with pytest.raises(ValueError, match=r"x must be \[B, 2, 4, C\]"):
        residual_window_attention(x, *weights, 2, (2, 4), 2, 1, bias_table=table)
    grid = x.view(1, 2, 4, 6)
    with pytest.raises(ValueError, match=r"proj_bias must be \[6\], not \[5\]"):
        residual_window_attention(grid, *weights[:3], torch.zeros(5), *weights[4:], 2, (2, 4), 2, 1, bias_table=table)
    doubles = [w.double() for w in weights]
    with pytest.raises(RuntimeError, match="takes float32, not float64"):
        residual_window_attention(grid.double(), *doubles, 2, (2, 4), 2, 1, bias_table=table.double(), backend="cpp")
