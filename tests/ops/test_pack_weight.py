"""Weights that are laid out beforehand: the same bits, and only where they may be read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import ops
from deepmsi.testing import need, randn

CHANNELS = 40


def layers(hidden: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = ((hidden, CHANNELS), (hidden,), (CHANNELS, hidden), *[(CHANNELS,)] * 3)
    return [randn(*size, seed=n, scale=0.2, dtype=dtype) for n, size in enumerate(sizes)]


def packed(weights: list[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return ops.pack_weight(weights[0], dtype), ops.pack_weight(weights[2], dtype)


@pytest.fixture(autouse=True)
def _needs_the_extension() -> None:
    need("residual_mlp", "cpp", "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 30, 53_000], ids=["one", "few", "many"])
@pytest.mark.parametrize("hidden", [72, 1100])
def test_the_mlp_reads_parts_of_them(rows: int, hidden: int, dtype: torch.dtype) -> None:
    """In groups of 512 hidden columns, with a rest that fills no panel; rows of more than 8 MiB take another way."""
    x, weights = randn(rows, CHANNELS, seed=9, dtype=dtype), layers(hidden, dtype)
    assert rows < 53_000 or rows * CHANNELS * 4 > 8 << 20
    given = ops.residual_mlp(x, *weights, packed=packed(weights), backend="cpp")
    assert given.equal(ops.residual_mlp(x, *weights, backend="cpp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("frames", [1, 200], ids=["few", "many"])
def test_the_attention_reads_them(frames: int, biased: bool, dtype: torch.dtype) -> None:
    """On rows of which the last three frames' worth are nobody's; few ones share the columns of a product."""
    channels, kept, places = 15, 26, 35
    qkv, proj = (randn(n, channels, seed=n, scale=0.3, dtype=dtype) for n in (3 * channels, channels))
    vectors = [randn(channels, seed=n, dtype=dtype) for n in range(3)]
    bias = randn(3 * channels, seed=4, dtype=dtype) if biased else None
    x = randn((frames + 3) * kept, channels, seed=9, dtype=dtype)
    which = torch.stack([torch.randperm(places)[:kept].sort().values for _ in range(frames + 3)])

    def run(**options: Any) -> Tensor:
        return ops.residual_window_attention(
            *(x, qkv, bias, proj, *vectors),
            *(3, (5, 7), 3, 1),
            bias_table=randn(25, 3, seed=5, dtype=dtype),
            positions=which.flatten().to(torch.int32),
            cu_seqlens=torch.arange(0, (frames + 1) * kept, kept, dtype=torch.int32),
            row_scale=randn(len(x), seed=6, dtype=dtype),
            backend="cpp",
            **options,
        )

    assert run(packed=(ops.pack_weight(qkv), ops.pack_weight(proj))).equal(run())
    others = (ops.pack_weight(-qkv), ops.pack_weight(proj))
    assert not run(packed=others).equal(run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("rows", [1, 25, 2500], ids=["one", "few", "many"])
def test_project_cells_reads_them(rows: int, norm_first: bool, dtype: torch.dtype) -> None:
    x, weight = randn(1, 1, rows + 5, 3, 3, 15, seed=1, dtype=dtype), randn(37, 135, seed=2, scale=0.1, dtype=dtype)
    norm = weight[:2] if norm_first else weight.T[:2]
    others = [weight[:, 0], norm[0] + 1, norm[1]]
    offsets = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    cells = x.transpose(3, 4)

    def run(**options: Any) -> Tensor:
        options |= {"cu_seqlens": offsets, "norm_first": norm_first, "backend": "cpp"}
        return ops.project_cells(cells, weight, *others, **options)

    assert run(packed=ops.pack_weight(weight)).equal(run())
    assert not run(packed=ops.pack_weight(-weight)).equal(run())


def test_what_is_packed_is_what_is_read() -> None:
    """Else the tests above would compare a call with itself."""
    x, weights, others = randn(30, CHANNELS, seed=9), layers(72), layers(72)
    others[0], others[2] = others[0] + 1, others[2] * 2
    given = ops.residual_mlp(x, *weights, packed=packed(others), backend="cpp")
    assert given.equal(ops.residual_mlp(x, *others, backend="cpp"))


def test_a_gradient_reads_the_weights_themselves() -> None:
    weights = layers(72)
    for trained in (0, 4):
        x = randn(30, CHANNELS, seed=9)
        results = []
        for given in (None, packed(layers(60))):
            leaves = [w.clone().requires_grad_(n == trained) for n, w in enumerate(weights)]
            y = ops.residual_mlp(x, *leaves, packed=given, backend="cpp")
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves[trained])))
        assert all(map(torch.equal, *results))
    x = randn(30, CHANNELS, seed=9).requires_grad_()
    ops.residual_mlp(x, *weights, packed=packed(weights), backend="cpp").sum().backward()
    assert x.grad is not None


def test_under_autocast_they_are_for_its_type() -> None:
    x, weights = randn(30, CHANNELS, seed=9, dtype=torch.bfloat16), layers(72)
    with torch.autocast("cpu", torch.bfloat16):
        given = ops.residual_mlp(x, *weights, packed=packed(weights, torch.bfloat16), backend="cpp")
        assert given.equal(ops.residual_mlp(x, *weights, backend="cpp"))


def test_the_reference_reads_the_weights_themselves() -> None:
    x, weights = randn(30, CHANNELS, seed=9), layers(72)
    given = ops.residual_mlp(x, *weights, packed=packed(layers(60)), backend="reference")
    assert given.equal(ops.residual_mlp(x, *weights, backend="reference"))


def test_what_was_packed_for_another_layer_or_type_is_refused() -> None:
    x, weights = randn(30, CHANNELS, seed=9), layers(72)
    first, second = packed(weights)
    for wrong in ((second, first), (first, packed(layers(60))[1]), (first[:, :-1].contiguous(), second)):
        with pytest.raises(RuntimeError, match="is packed for another layer, other rows or another CPU"):
            ops.residual_mlp(x, *weights, packed=wrong, backend="cpp")
    with pytest.raises(RuntimeError, match="is packed for another layer, other rows or another CPU"):
        ops.residual_mlp(x, *weights, packed=(first.double(), second), backend="cpp")


def test_what_is_not_packed_gets_a_sentence() -> None:
    x, weights = randn(30, CHANNELS, seed=9), layers(72)
    sentence = "residual_mlp: packed must be what pack_weight gives, one for each weight"
    for wrong in ((weights[0], weights[2]), packed(weights)[:1], (*packed(weights), packed(weights)[1]), ()):
        with pytest.raises(ValueError, match=sentence):
            ops.residual_mlp(x, *weights, packed=wrong, backend="cpp")
    cells, weight = randn(1, 1, 4, 1, 1, 40, seed=1), randn(40, 40, seed=2)
    with pytest.raises(ValueError, match="project_cells: packed must be what pack_weight gives"):
        ops.project_cells(cells, weight, *weights[3:], packed=weight, backend="cpp")


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (torch.zeros(3), None),
        (torch.zeros(3, 4).to_sparse(), None),
        (torch.zeros(3, 4, device="meta"), None),
        (torch.zeros(3, 4, dtype=torch.float64), None),
        (torch.zeros(3, 4, dtype=torch.bfloat16), torch.float32),
        (torch.zeros(3, 4, dtype=torch.float64), torch.float32),
    ],
    ids=["vector", "sparse", "meta", "float64", "narrower", "wider"],
)
def test_weights_that_cannot_be_packed_get_a_sentence(weight: Tensor, dtype: torch.dtype | None) -> None:
    with pytest.raises(ValueError, match=r"pack_weight: (weight must be|products are in)"):
        ops.pack_weight(weight, dtype)


def test_a_weight_that_is_a_view_and_one_that_wants_a_gradient() -> None:
    weight = randn(72, CHANNELS, seed=1)
    for other in (weight.t().contiguous().t(), weight.clone().requires_grad_()):
        laid_out = ops.pack_weight(other)
        assert laid_out.equal(ops.pack_weight(weight))
        assert not laid_out.requires_grad


def test_operator() -> None:
    checks: Any = ("test_schema", "test_autograd_registration", "test_faketensor")
    for dtype, halves in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        weight = randn(72, 39, seed=1, dtype=dtype)
        torch.library.opcheck(torch.ops.deepmsi.pack_weight_cpp.default, (weight, halves), test_utils=checks)


def test_the_operators_take_them_without_content() -> None:
    """As a graph is traced: shapes follow from what is not packed."""
    x, weights = randn(30, CHANNELS, seed=9), layers(72)
    first, second = packed(weights)
    operators = torch.ops.deepmsi
    mlp = (x, first, weights[1], second, *weights[3:], None, None, 1e-5, False, False)
    torch.library.opcheck(operators.residual_mlp_cpp_fwd.default, mlp)
    cells = (randn(1, 2, 3, 2, 2, 10, seed=1), ops.pack_weight(randn(72, 40, seed=2)), None, *layers(72)[1:2] * 2)
    torch.library.opcheck(operators.project_cells_cpp_fwd.default, (*cells, None, 1e-5, False, 72, False))
    qkv, proj = (ops.pack_weight(randn(n, CHANNELS, seed=n)) for n in (3 * CHANNELS, CHANNELS))
    vectors, table = [weights[3]] * 3, randn(9, 2, seed=3)
    attention = (x, qkv, None, proj, *vectors, None, 1e-5, False, table, None, 1.0, None, None, 2, 5, 6, 2, 0, False)
    torch.library.opcheck(operators.residual_window_attention_cpp_fwd.default, attention)
