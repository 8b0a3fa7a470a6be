"""window_attention: the reference against loops over pairs of tokens, every backend against the reference, torch."""

import importlib
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepmsi import backend as backends
from deepmsi import testing
from deepmsi.ops import window_attention
from deepmsi.testing import PLACES, REFERENCES, assert_within_budget, generator, offsets, poisoned_memory, randn

OP = "window_attention"
HEADS, DEPTH = 2, 3


def naive(
    qkv: Tensor, window: int, shift: int, table: Tensor, logit_scale: Tensor | None, places: list[tuple[int, int]]
) -> Tensor:
    """Attend token by token: qkv [N, 3C] of one frame whose tokens lie at ``places``."""
    q, k, v = (part.unflatten(1, (HEADS, DEPTH)) for part in qkv.chunk(3, 1))
    out = []
    for i, (yi, xi) in enumerate(places):
        seen = [
            j
            for j, (yj, xj) in enumerate(places)
            if ((yi - shift) // window, (xi - shift) // window) == ((yj - shift) // window, (xj - shift) // window)
        ]
        heads = []
        for h in range(HEADS):
            logits = []
            for j in seen:
                yj, xj = places[j]
                bias = table[(yi - yj + window - 1) * (2 * window - 1) + xi - xj + window - 1, h]
                score = q[i, h] @ k[j, h]
                if logit_scale is None:
                    score = score / math.sqrt(DEPTH)
                else:
                    score = score / (q[i, h].norm() * k[j, h].norm()) * logit_scale[h].clamp(max=math.log(100)).exp()
                logits.append(score + bias)
            weight = torch.stack(logits).softmax(0)
            heads.append(sum(weight[n] * v[j, h] for n, j in enumerate(seen)))
        out.append(torch.cat(heads))
    return torch.stack(out)


def table_of(window: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return randn((2 * window - 1) ** 2, HEADS, seed=7, dtype=dtype, device=device)


def scale_of(cosine: bool, dtype: torch.dtype = torch.float64) -> Tensor | None:
    # The second head's scale is above the clamp.
    return torch.tensor([1.0, 5.0], dtype=dtype) if cosine else None


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((4, 4), 2, 0), ((4, 4), 2, 1), ((6, 3), 3, 1), ((5, 7), 3, 2), ((5, 3), 4, 0), ((3, 3), 3, 0), ((1, 1), 1, 0)],
    ids=str,
)
def test_dense_equals_loops(grid: tuple[int, int], window: int, shift: int, cosine: bool) -> None:
    qkv = randn(2, *grid, 3 * HEADS * DEPTH, seed=1, dtype=torch.float64)
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    got = window_attention(
        qkv, HEADS, grid, window, shift, bias_table=table_of(window), logit_scale=scale_of(cosine), backend="reference"
    )
    expected = [naive(frame.flatten(0, 1), window, shift, table_of(window), scale_of(cosine), places) for frame in qkv]
    torch.testing.assert_close(got.flatten(1, 2), torch.stack(expected), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(("window", "shift"), [(2, 0), (2, 1), (4, 2), (3, 1)])
def test_packed_equals_loops(window: int, shift: int, cosine: bool) -> None:
    grid = (5, 6)
    frames = [[0, 1, 7, 12, 13, 29], [], [4], list(range(30))]
    rows = sum(map(len, frames))
    qkv = randn(rows, 3 * HEADS * DEPTH, seed=2, dtype=torch.float64)
    got = window_attention(
        qkv,
        HEADS,
        grid,
        window,
        shift,
        bias_table=table_of(window),
        logit_scale=scale_of(cosine),
        positions=torch.tensor([place for frame in frames for place in frame], dtype=torch.int32),
        cu_seqlens=offsets([len(frame) for frame in frames]),
        backend="reference",
    )
    start = 0
    for frame in frames:
        if frame:
            part = slice(start, start + len(frame))
            places = [(p // grid[1], p % grid[1]) for p in frame]
            expected = naive(qkv[part], window, shift, table_of(window), scale_of(cosine), places)
            torch.testing.assert_close(got[part], expected, rtol=1e-11, atol=1e-12)
        start += len(frame)


def packed_arguments(rows: list[int], tail: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "positions": torch.tensor([*rows, *[0] * tail], dtype=torch.int32),
        "cu_seqlens": offsets([len(rows) // 2, len(rows) - len(rows) // 2]),
        "bias_table": table_of(2, dtype),
    }


def test_tail_is_ignored_and_gets_no_gradient() -> None:
    rows = [0, 3, 5, 2, 9, 10, 11]
    arguments = packed_arguments(rows, 3, torch.float64)
    qkv = randn(10, 3 * HEADS * DEPTH, seed=3, dtype=torch.float64)
    clean = qkv.clone().requires_grad_()
    qkv[7:] = torch.nan
    qkv.requires_grad_()
    scale = scale_of(True)
    out = window_attention(qkv, HEADS, (3, 4), 2, 1, logit_scale=scale, **arguments)
    assert (out[7:] == 0).all()
    weight = randn(10, HEADS * DEPTH, seed=4, dtype=torch.float64)
    (out * weight).sum().backward()
    assert (qkv.grad[7:] == 0).all()
    arguments["positions"] = arguments["positions"][:7]
    exact = window_attention(clean[:7], HEADS, (3, 4), 2, 1, logit_scale=scale, **arguments)
    (exact * weight[:7]).sum().backward()
    torch.testing.assert_close(out[:7], exact)
    torch.testing.assert_close(qkv.grad[:7], clean.grad[:7])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
def test_gradients(packed: bool, cosine: bool) -> None:
    grid = (3, 4)
    rows = [0, 3, 5, 2, 9, 10, 11]
    extra = packed_arguments(rows, 0, torch.float64)
    table = extra.pop("bias_table").requires_grad_()
    size = (7,) if packed else (1, *grid)
    qkv = randn(*size, 3 * HEADS * DEPTH, seed=5, dtype=torch.float64).requires_grad_()
    scale = torch.tensor([0.5, 1.5], dtype=torch.float64).requires_grad_() if cosine else None

    def run(qkv: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
        return window_attention(
            qkv, HEADS, grid, 2, 1, bias_table=table, logit_scale=scale, **(extra if packed else {})
        )

    assert torch.autograd.gradcheck(run, (qkv, table, scale))


def test_a_token_of_zeros_gives_no_nan() -> None:
    qkv = torch.zeros(1, 2, 2, 3 * HEADS * DEPTH, requires_grad=True)
    out = window_attention(qkv, HEADS, (2, 2), 2, 0, bias_table=table_of(2).float(), logit_scale=torch.zeros(HEADS))
    out.sum().backward()
    assert torch.isfinite(qkv.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_keeps_the_budget(dtype: torch.dtype) -> None:
    qkv = randn(2, 4, 4, 3 * HEADS * DEPTH, seed=6, dtype=dtype)
    table, scale = table_of(2, torch.float32), scale_of(True, torch.float32)
    got = window_attention(qkv, HEADS, (4, 4), 2, 1, bias_table=table, logit_scale=scale)
    low = window_attention(qkv, HEADS, (4, 4), 2, 1, bias_table=table, logit_scale=scale, backend="reference")
    exact = window_attention(qkv.double(), HEADS, (4, 4), 2, 1, bias_table=table.double(), logit_scale=scale.double())
    assert got.dtype == dtype
    assert_within_budget(got, low, exact)


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_autocast_takes_qkv_alone(backend: str, device: str) -> None:
    need(backend, device, torch.bfloat16)
    qkv = randn(1, 4, 4, 3 * HEADS * DEPTH, seed=8, device=device).requires_grad_()
    table = table_of(2, torch.float32, device).requires_grad_()
    scale = torch.ones(HEADS, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        out = window_attention(qkv, HEADS, (4, 4), 2, 1, bias_table=table, logit_scale=scale, backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    same = window_attention(qkv.bfloat16(), HEADS, (4, 4), 2, 1, bias_table=table, logit_scale=scale, backend=backend)
    assert torch.equal(out, same)
    assert table.grad.dtype == scale.grad.dtype == qkv.grad.dtype == torch.float32


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("layout", ["dense", "rows", "packed"])
@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_compiles_whole_and_for_changing_sizes(backend: str, device: str, layout: str) -> None:
    need(backend, device)
    table, scale = table_of(2, torch.float32, device), torch.ones(HEADS, device=device)

    def run(qkv: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return window_attention(
            qkv,
            HEADS,
            (4, 4),
            2,
            1,
            bias_table=table,
            logit_scale=scale,
            positions=positions,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 5):
        if layout == "packed":
            places = torch.arange(count, dtype=torch.int32, device=device)
            arguments = (places.repeat(2), offsets([count, count], device))
            qkv = randn(2 * count, 3 * HEADS * DEPTH, seed=count, device=device)
        else:
            arguments = (None, None)
            qkv = randn(count, 4, 4, 3 * HEADS * DEPTH, seed=count, device=device)
            qkv = qkv.flatten(0, 2) if layout == "rows" else qkv
        one, other = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
        out, exact = compiled(one, *arguments), run(other, *arguments)
        torch.testing.assert_close(out, exact)
        out.square().sum().backward()
        exact.square().sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_of_whole_frames_need_no_positions(shift: int) -> None:
    qkv = randn(2, 4, 6, 3 * HEADS * DEPTH, seed=1)
    options = {"bias_table": table_of(2, torch.float32), "logit_scale": scale_of(True, torch.float32)}
    rows = window_attention(qkv.flatten(0, 2), HEADS, (4, 6), 2, shift, **options)
    grid = window_attention(qkv, HEADS, (4, 6), 2, shift, **options)
    assert torch.equal(rows, grid.flatten(0, 2))
    with pytest.raises(ValueError, match="for the grid 4x6"):
        window_attention(qkv.flatten(0, 2)[1:], HEADS, (4, 6), 2, shift, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"shift": 2}, "shift must lie in"),
        ({"heads": 4}, "not 3 times a multiple of 4 heads"),
        ({"grid": (2, 8)}, "for the grid 2x8"),
        ({"bias_table": torch.zeros(4, HEADS)}, "bias_table must be"),
        ({"bias_table": torch.zeros(9, HEADS, device="meta")}, "bias_table is on meta, qkv on cpu: move it"),
        ({"logit_scale": torch.zeros(2, device="meta")}, "logit_scale is on meta, qkv on cpu: move it"),
        ({"logit_scale": torch.zeros(3)}, "must have 2 elements"),
        ({"logit_scale": torch.zeros(2), "scale": 1.0}, "not both"),
        ({"positions": torch.zeros(1, dtype=torch.int32)}, "both positions and cu_seqlens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_told(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "heads": HEADS,
        "grid": (4, 4),
        "window": 2,
        "shift": 0,
        "bias_table": torch.zeros(9, HEADS),
    }
    with pytest.raises(ValueError, match=words):
        window_attention(torch.zeros(1, 4, 4, 3 * HEADS * DEPTH), **{**arguments, **change})


# Every backend against the float64 reference.

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A call's sizes: ``frames`` counts dense grids, ``lengths`` lists the tokens left in each packed frame."""

    grid: tuple[int, int]
    window: int
    shift: int
    heads: int = 2
    depth: int = 16
    frames: int | None = None
    lengths: tuple[int, ...] = ()
    tail: int = 0
    stretch: int = 0  # channels between the rows of qkv

    @property
    def rows(self) -> int:
        if self.frames is not None:
            return self.frames * self.grid[0] * self.grid[1]
        return sum(self.lengths) + self.tail

    def layout(self, device: str) -> tuple[Tensor, Tensor] | None:
        """Return positions [R] and cu_seqlens [F + 1]; None for dense grids. The tail's positions are nonsense."""
        if self.frames is not None:
            return None
        places = self.grid[0] * self.grid[1]
        positions = [
            torch.randperm(places, generator=generator(31 + f))[:length].sort().values
            for f, length in enumerate(self.lengths)
        ]
        positions.append(torch.full((self.tail,), 10**6))
        return torch.cat(positions).to(device, torch.int32), offsets(self.lengths, device)


CASES = {
    "window_1": Case((3, 2), 1, 0, frames=2),
    "window_4": Case((8, 8), 4, 2, heads=3, frames=1),
    "window_7": Case((14, 7), 7, 3, depth=24, frames=1),
    "window_8": Case((16, 8), 8, 4, depth=32, frames=1),
    "window_8_unshifted": Case((8, 8), 8, 0, heads=1, depth=64, frames=1),
    "window_8_wide": Case((8, 8), 8, 4, heads=1, depth=72, frames=1),
    "window_9": Case((9, 9), 9, 0, heads=1, frames=2),
    "window_16": Case((16, 16), 16, 5, heads=1, frames=1),
    "ragged_4": Case((9, 6), 4, 1, frames=1),
    "ragged_8": Case((10, 12), 8, 3, frames=1, depth=48),
    "ragged_narrow": Case((5, 2), 4, 3, heads=1, depth=5, frames=2),
    "strided": Case((8, 4), 4, 2, frames=2, stretch=16),
    "no_frames": Case((4, 4), 4, 0, frames=0),
    "one_token": Case((6, 6), 4, 2, lengths=(1, 1, 1)),
    "all_left": Case((8, 8), 4, 2, heads=1, lengths=(64, 64)),
    "skewed": Case((8, 4), 4, 2, lengths=(1, 30, 0, 7)),
    "skewed_8": Case((16, 16), 8, 4, lengths=(3, 200, 0), depth=32, tail=5),
    "packed_ragged": Case((7, 5), 4, 1, lengths=(20, 35), depth=24, tail=1, stretch=8),
    "window_17": Case((17, 17), 17, 0, heads=1, frames=1),
    "packed_16": Case((16, 16), 16, 0, heads=1, lengths=(130, 9)),
    "empty_frames": Case((4, 4), 2, 1, lengths=(0, 0), tail=3),
    "no_rows": Case((4, 4), 2, 1, lengths=(0, 0)),
    "no_packed_frames": Case((4, 4), 2, 1, lengths=(), tail=2),
    "nothing": Case((4, 4), 2, 1, lengths=()),
}


def need(backend: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    testing.need(OP, backend, device, dtype)


def run(
    case: Case, cosine: bool, backend: str, device: str, rounded: torch.dtype, held: torch.dtype
) -> dict[str, Tensor]:
    """Return the output and the gradients of inputs that are rounded to one type and held in another."""
    wide = torch.float64 if held == torch.float64 else torch.float32
    channels = case.heads * case.depth
    stored = randn(case.rows, 3 * channels + case.stretch, seed=21, dtype=rounded, device=device).to(held)
    stored.requires_grad_()
    qkv = stored[:, : 3 * channels]
    if case.frames is not None:
        qkv = qkv.unflatten(0, (case.frames, *case.grid))
    table = randn((2 * case.window - 1) ** 2, case.heads, seed=22, dtype=torch.float32, device=device).to(wide)
    table.requires_grad_()
    logit_scale = None
    if cosine:
        # The last head's scale is above the clamp, where there are several.
        scales = [2.3, 1.0, 5.0][-case.heads :] if case.heads > 1 else [1.5]
        logit_scale = torch.tensor(scales, device=device).to(wide).requires_grad_()
    layout = case.layout(device)
    extra = {} if layout is None else {"positions": layout[0], "cu_seqlens": layout[1]}
    out = window_attention(
        qkv,
        case.heads,
        case.grid,
        case.window,
        case.shift,
        bias_table=table,
        logit_scale=logit_scale,
        backend=backend,
        **extra,
    )
    grad = randn(case.rows, channels, seed=23, dtype=rounded, device=device).to(held)
    inputs = {"qkv": stored, "bias_table": table} | ({} if logit_scale is None else {"logit_scale": logit_scale})
    grads = torch.autograd.grad(out, tuple(inputs.values()), grad.view(out.shape))
    return {"out": out.detach(), **dict(zip(inputs, grads, strict=True))}


def assert_kernel_keeps_the_budget(case: Case, cosine: bool, backend: str, device: str, dtype: torch.dtype) -> None:
    with poisoned_memory():
        got = run(case, cosine, backend, device, dtype, dtype)
    low = run(case, cosine, "reference", device, dtype, dtype)
    exact = run(case, cosine, "reference", device, dtype, torch.float64)
    for name, wanted in exact.items():
        assert got[name].dtype == low[name].dtype
        scale = None
        if name == "bias_table":
            # Sums of terms of about one, which cancel to nothing where no window has a second token.
            scale = max(1.0, wanted.abs().max().item())
        elif name == "logit_scale":
            # A sum that nearly cancels; its terms are at least as large as the bias' gradient tells.
            scale = 100 * max(1.0, exact["bias_table"].abs().sum().item())
        roundings = 1.0 if name == "out" else 4.0
        if cosine and got[name].dtype == torch.float32:
            roundings *= 16  # a logit of 100 carries its own rounding, a hundred times as large, into the softmax
        assert_within_budget(got[name], low[name], wanted, name, roundings, scale)
    if case.tail:
        assert not got["out"][-case.tail :].any()
        assert not got["qkv"][-case.tail :].any()


# The interpreter takes seconds where a kernel takes microseconds: of the types that it runs like float32, a few.
INTERPRETED = ("ragged_narrow", "skewed", "one_token", "window_9")
BUDGETED = [
    pytest.param(*place, name, cosine, dtype, id="-".join([*place, name, "v2" if cosine else "v1", str(dtype)[6:]]))
    for place in PLACES
    for name in CASES
    for cosine in (True, False)
    for dtype in DTYPES
    if place != ("triton", "cpu") or (cosine and dtype == torch.float32) or name in INTERPRETED
]


@pytest.mark.parametrize(("backend", "device", "name", "cosine", "dtype"), BUDGETED)
def test_kernel_keeps_the_error_budget(backend: str, device: str, name: str, cosine: bool, dtype: torch.dtype) -> None:
    need(backend, device, dtype)
    assert_kernel_keeps_the_budget(CASES[name], cosine, backend, device, dtype)


@settings(max_examples=10, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 10), st.integers(1, 7)),
    window=st.integers(2, 9),
    shift=st.integers(0, 8),
    depth=st.integers(2, 20),  # a head of one channel has no direction, and its exact gradient is 0
    share=st.none() | st.lists(st.floats(0, 1), min_size=1, max_size=2),
    tail=st.integers(0, 2),
    cosine=st.booleans(),
)
@example(grid=(1, 1), window=9, shift=0, depth=8, share=None, tail=0, cosine=False)  # the bias' exact gradient is 0
def test_any_sizes_keep_the_error_budget(
    grid: tuple[int, int],
    window: int,
    shift: int,
    depth: int,
    share: list[float] | None,
    tail: int,
    cosine: bool,
) -> None:
    places = grid[0] * grid[1]
    layout: dict[str, Any] = {"frames": 1}
    if share is not None:
        layout = {"lengths": tuple(int(s * places) for s in share), "tail": tail}
    case = Case(grid, window, shift % window, heads=1, depth=depth, **layout)
    for backend, device in PLACES:
        if backends.why_not(OP, backend, device, torch.float32) is None:
            assert_kernel_keeps_the_budget(case, cosine, backend, device, torch.float32)


CHUNKED = {
    "dense": Case((8, 12), 4, 2, frames=3),
    "packed": Case((8, 8), 4, 1, lengths=(9, 0, 50, 31), tail=3),
    "ragged": Case((7, 9), 5, 2, frames=2),
}


@pytest.mark.parametrize("cosine", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_a_program_of_many_windows_keeps_the_error_budget(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, name: str, cosine: bool
) -> None:
    need(backend, device)
    kernels = importlib.import_module("deepmsi._triton.window_attention")
    alone = run(CHUNKED[name], cosine, backend, device, torch.float32, torch.float32)
    monkeypatch.setattr(kernels, "_ATTENDING_PROGRAMS", 5)
    monkeypatch.setattr(kernels, "_SUMMING_PROGRAMS", 5)
    assert_kernel_keeps_the_budget(CHUNKED[name], cosine, backend, device, torch.float32)
    together = run(CHUNKED[name], cosine, backend, device, torch.float32, torch.float32)
    assert torch.equal(together["out"], alone["out"])
    assert torch.equal(together["qkv"], alone["qkv"])


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("name", ["window_8", "skewed", "window_9"])
def test_two_runs_and_any_thread_count_give_the_same_bits(name: str, backend: str, device: str) -> None:
    need(backend, device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(CASES[name], True, backend, device, torch.float32, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, value in other.items():
            assert torch.equal(value, results[0][key]), key


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_scale_above_the_clamp_gets_no_gradient(backend: str, device: str) -> None:
    need(backend, device)
    grads = run(CASES["window_4"], True, backend, device, torch.float32, torch.float32)
    assert grads["logit_scale"][2] == 0
    assert (grads["logit_scale"][:2] != 0).all()


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_rows_of_zeros_stay_finite(backend: str, device: str, cosine: bool) -> None:
    need(backend, device)
    qkv = randn(1, 4, 4, 3 * HEADS * 8, seed=1, device=device)
    qkv[0, :2] = 0
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        one = qkv.to(dtype).requires_grad_()
        scale = torch.zeros(HEADS, dtype=dtype, device=device) if cosine else None
        table = table_of(4, dtype, device)
        out = window_attention(one, HEADS, (4, 4), 4, 0, bias_table=table, logit_scale=scale, backend=name)
        (grad,) = torch.autograd.grad(out.square().sum(), one)
        assert torch.isfinite(grad).all()
        results.append((out.double(), grad.double()[0, 2:]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_rows_past_the_last_offset_are_not_read(backend: str, device: str) -> None:
    need(backend, device)
    positions = torch.tensor([0, 3, 5, 9, 10, -7, 99], dtype=torch.int32, device=device)
    layout = {"positions": positions, "cu_seqlens": offsets([3, 2], device)}
    qkv = randn(7, 3 * HEADS * DEPTH, seed=3, device=device)
    qkv[5:] = torch.nan
    qkv.requires_grad_()
    table = table_of(2, torch.float32, device).requires_grad_()
    out = window_attention(qkv, HEADS, (3, 4), 2, 1, bias_table=table, backend=backend, **layout)
    grads = torch.autograd.grad(out.square().sum(), (qkv, table))
    assert not out[5:].any()
    assert not grads[0][5:].any()
    assert all(bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize(
    ("positions", "cu", "words"),
    [
        ([0, 5, 5, 7], [0, 4], "positions must ascend"),
        ([0, 5, 4, 7], [0, 4], "positions must ascend"),
        ([0, 1, 2, 16], [0, 4], "lie on the grid"),
        ([0, 1, 2, 2**32 + 3], [0, 4], "lie on the grid"),
        ([-(2**32), 1, 2, 3], [0, 4], "positions must ascend"),
        ([-1, 1, 2, 3], [0, 4], "positions must ascend"),
        ([0, 1, 2, 3], [0, 5], "end within the rows"),
        ([0, 1, 2, 3], [1, 4], "start at 0"),
        ([0, 1, 0, 1], [0, 3, 2], "must not descend|ascend"),
    ],
    ids=str,
)
def test_bad_positions_are_refused_on_the_cpu(positions: list[int], cu: list[int], words: str) -> None:
    need("cpp", "cpu")
    with pytest.raises(RuntimeError, match=words):
        window_attention(
            randn(4, 3 * HEADS * DEPTH, seed=1),
            HEADS,
            (4, 4),
            2,
            0,
            bias_table=table_of(2, torch.float32),
            positions=torch.tensor(positions),
            cu_seqlens=torch.tensor(cu, dtype=torch.int32),
            backend="cpp",
        )


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("dense_v2", torch.float32),
        ("dense_v2", torch.bfloat16),
        ("dense_v2", torch.float16),
        ("dense_v1", torch.float32),
        ("packed", torch.float32),
        ("strided", torch.float32),
        ("empty", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_opcheck(backend: str, device: str, form: str, dtype: torch.dtype) -> None:
    need(backend, device, dtype)
    rows = 0 if form == "empty" else 8
    width = 3 * HEADS * DEPTH
    qkv = randn(rows, width, seed=1, dtype=dtype, device=device)
    if form == "strided":
        qkv = randn(width, rows, seed=1, dtype=dtype, device=device).t()
    table = table_of(2, torch.float32, device)
    scale = None if form == "dense_v1" else torch.tensor([1.5, 10.0], device=device)
    positions = cu_seqlens = None
    if form == "packed":
        positions = torch.tensor([0, 1, 3, 5, 2, 4, 7, 0], dtype=torch.int32, device=device)
        cu_seqlens = offsets([4, 3], device)
    sizes = (HEADS, 2, 4, 2, 1)
    forward = getattr(torch.ops.deepmsi, f"window_attention_{backend}_fwd").default
    backward = getattr(torch.ops.deepmsi, f"window_attention_{backend}_bwd").default
    leaves = [x if x is None else x.detach().requires_grad_() for x in (qkv, table, scale)]
    torch.library.opcheck(forward, (*leaves, DEPTH**-0.5, positions, cu_seqlens, *sizes))
    out, lse = forward(qkv, table, scale, DEPTH**-0.5, positions, cu_seqlens, *sizes)
    grad = randn(*out.shape, seed=2, dtype=dtype, device=device)
    if form == "strided":
        grad = grad.t().contiguous().t()
    torch.library.opcheck(backward, (grad, qkv, out, lse, table, scale, DEPTH**-0.5, positions, cu_seqlens, *sizes))


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_the_scale_of_heads_at_hand_is_that_of_their_logarithms(backend: str, device: str) -> None:
    """It changes nothing, takes no gradient from the logarithms and has none."""
    testing.need("window_attention", backend, device)
    qkv, table = randn(2, 4, 4, 3 * 32, seed=1, device=device), randn(49, 2, seed=2, device=device)
    logit_scale = torch.tensor([1.5, 9.0], device=device)  # the other is above the most
    at_hand = logit_scale.clamp(max=math.log(100)).exp()

    def run(**options: Any) -> Tensor:
        return window_attention(qkv, 2, (4, 4), 4, 0, bias_table=table, backend=backend, **options)

    expected = run(logit_scale=logit_scale)
    assert run(logit_scale=logit_scale, head_scale=at_hand).equal(expected)
    if backend != "reference":
        assert not run(logit_scale=logit_scale, head_scale=2 * at_hand).equal(expected)
    assert not run(logit_scale=logit_scale, head_scale=at_hand.requires_grad_()).requires_grad
    logit_scale.requires_grad_()
    run(logit_scale=logit_scale, head_scale=at_hand).sum().backward()
    assert logit_scale.grad is not None
    assert at_hand.grad is None
    with pytest.raises(ValueError, match="head_scale is that of a logit_scale: give that, too"):
        run(head_scale=at_hand)
    with pytest.raises(ValueError, match=r"head_scale must be \[2\] float32, not \[3\]"):
        run(logit_scale=logit_scale, head_scale=at_hand.new_ones(3))


@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_heads_that_triton_does_not_hold_are_refused(backend: str, device: str) -> None:
    need(backend, device)
    qkv, table = torch.zeros(1, 2, 2, 3 * 144, device=device), torch.zeros(9, 1, device=device)
    with pytest.raises(RuntimeError, match="heads may have 128 channels at most"):
        window_attention(qkv, 1, (2, 2), 2, 0, bias_table=table, backend=backend)
