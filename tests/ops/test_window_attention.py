"""window_attention: against loops over pairs of tokens, dense against packed, tails, types, compilation."""

import math

import pytest
import torch
from torch import Tensor

from deepmsi.ops import window_attention
from deepmsi.testing import assert_within_budget, offsets, randn

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


def table_of(window: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn((2 * window - 1) ** 2, HEADS, seed=7, dtype=dtype)


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


def test_autocast_takes_qkv_alone() -> None:
    qkv = randn(1, 4, 4, 3 * HEADS * DEPTH, seed=8).requires_grad_()
    table = table_of(2, torch.float32).requires_grad_()
    scale = torch.ones(HEADS, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = window_attention(qkv, HEADS, (4, 4), 2, 1, bias_table=table, logit_scale=scale)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    same = window_attention(qkv.bfloat16(), HEADS, (4, 4), 2, 1, bias_table=table, logit_scale=scale)
    assert torch.equal(out, same)
    assert table.grad.dtype == scale.grad.dtype == qkv.grad.dtype == torch.float32


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiles_whole_and_for_changing_sizes(packed: bool) -> None:
    table, scale = table_of(2, torch.float32), torch.ones(HEADS)

    def run(qkv: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return window_attention(
            qkv, HEADS, (4, 4), 2, 1, bias_table=table, logit_scale=scale, positions=positions, cu_seqlens=cu_seqlens
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 5):
        if packed:
            places = torch.arange(count, dtype=torch.int32)
            arguments = (places.repeat(2), offsets([count, count]))
            qkv = randn(2 * count, 3 * HEADS * DEPTH, seed=count)
        else:
            arguments = (None, None)
            qkv = randn(count, 4, 4, 3 * HEADS * DEPTH, seed=count)
        one, other = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
        out, exact = compiled(one, *arguments), run(other, *arguments)
        torch.testing.assert_close(out, exact)
        out.square().sum().backward()
        exact.square().sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"shift": 2}, "shift must lie in"),
        ({"heads": 4}, "not 3 times a multiple of 4 heads"),
        ({"grid": (2, 8)}, "for the grid 2x8"),
        ({"bias_table": torch.zeros(4, HEADS)}, "bias_table must be"),
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
