"""residual_mlp: every backend against the reference, in numbers and gradients."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import backend as backends
from deepmsi import testing
from deepmsi.ops import residual_mlp
from deepmsi.testing import REFERENCES, assert_within_budget, offsets, poisoned_memory, randn, roundings_of

EPS = 1e-5
PLACES = testing.places("residual_mlp")
TYPED = testing.typed_places("residual_mlp", (torch.float32, torch.bfloat16, torch.float16))
TYPES = [f"{b}-{d}-{t}" for b, d, t in TYPED]
ON_THE_CPU = [place for place in TYPED if place[:2] == ("cpp", "cpu")]
IDS_ON_THE_CPU = [f"cpp-cpu-{t}" for *_, t in ON_THE_CPU]
NAMES = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "norm_weight", "norm_bias")


def run(
    rows: tuple[int, ...],
    channels: int,
    hidden: int,
    scaled: bool,
    backend: str,
    device: str,
    dtype: torch.dtype,
    exact: bool = False,
    stream: torch.dtype | None = None,
    norms: torch.dtype | None = None,
    kept: torch.dtype | None = None,
    lengths: tuple[int, ...] | None = None,
    norm_first: bool = False,
) -> dict[str, Tensor]:
    """Return y and every gradient; x and y are in `stream`, and the inputs are rounded before they are made `exact`.

    The layers are rounded to `dtype` and given in the type that they are `kept` in, which autocast takes in `dtype`.
    """

    def draw(*size: int, seed: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        rounded = randn(*size, seed=seed, scale=scale, dtype=dtype, device=device)
        if kept is not None and seed in (2, 3, 4, 5):
            rounded = rounded.to(kept)
        return (rounded.double() if exact else rounded).requires_grad_()

    inputs = {
        "x": draw(*rows, channels, seed=1, dtype=stream or dtype),
        "fc1_weight": draw(hidden, channels, seed=2, scale=channels**-0.5),
        "fc1_bias": draw(hidden, seed=3),
        "fc2_weight": draw(channels, hidden, seed=4, scale=hidden**-0.5),
        "fc2_bias": draw(channels, seed=5),
        "norm_weight": draw(channels, seed=6, dtype=norms or dtype),
        "norm_bias": draw(channels, seed=7, dtype=norms or dtype),
    }
    # Whole frames dropped or magnified, as stochastic depth does.
    drawn = randn(rows[0], *[1] * (len(rows) - 1), seed=8, device=device) > 0
    scale = drawn.to(inputs["x"].dtype).mul(1.25).expand(rows) if scaled else None
    cu_seqlens = None if lengths is None else offsets(lengths, device)
    with torch.autocast(device, dtype) if kept is not None and not exact else nullcontext():
        options: dict[str, Any] = {"eps": EPS, "norm_first": norm_first, "backend": backend}
        y = residual_mlp(**inputs, row_scale=scale, cu_seqlens=cu_seqlens, **options)
    grad = randn(*y.shape, seed=20, dtype=stream or dtype, device=device).to(y.dtype)
    return {"y": y.detach(), **dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))}


def assert_budget(backend: str, device: str, dtype: torch.dtype, *case: Any, **options: Any) -> None:
    testing.need("residual_mlp", backend, device, dtype)
    with poisoned_memory():
        got = run(*case, backend, device, dtype, **options)
    low = run(*case, "reference", device, dtype, **options)
    exact = run(*case, "reference", device, dtype, exact=True, **options)
    for name, wanted in exact.items():
        assert got[name].dtype == low[name].dtype
        roundings = 8 if dtype == torch.float32 else roundings_of(dtype, got[name])
        if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16) and options.get("norm_first"):
            # The interpreter cuts numbers off where GPUs round; a norm at the end makes up for most of that.
            roundings *= 2
        assert_within_budget(got[name], low[name], wanted, name, roundings=roundings)


# Rows' shape, channels, hidden channels, whether rows have a factor. One row; an odd number below and above a tile;
# channels that fill no vector; a wide layer, whose hidden rows some kernels make in parts; the edge of what is fused.
CASES = {
    "one_row": ((1,), 32, 64, False),
    "grid": ((2, 5, 7), 96, 384, True),
    "odd": ((13,), 7, 19, True),
    "parts": ((300,), 36, 1030, False),
    "stage_2": ((70,), 192, 100, True),
    "edge": ((65,), 257, 65, False),
    "deep": ((50,), 768, 1536, False),
    "empty": ((0,), 32, 64, True),
    "empty_and_wide": ((0,), 300, 64, True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_it_keeps_the_error_budget(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    assert_budget(backend, device, dtype, *CASES[name])


@pytest.mark.parametrize(("backend", "device"), [("triton", "cpu")])
def test_fewer_hidden_channels_at_a_time_keep_the_error_budget(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str
) -> None:
    """As GPUs take them whose products read registers."""
    testing.need("residual_mlp", backend, device, torch.float16)
    monkeypatch.setattr("deepmsi._triton.residual_mlp.operands_in_registers", lambda: True)
    assert_budget(backend, device, torch.float16, *CASES["stage_2"])


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_parts_of_the_rows_keep_the_error_budget(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, dtype: torch.dtype, norm_first: bool
) -> None:
    monkeypatch.setattr("deepmsi._triton.residual_mlp._HIDDEN_ELEMENTS", 20 * 65)
    assert_budget(backend, device, dtype, *CASES["edge"], norm_first=norm_first)


@pytest.mark.parametrize("lengths", [None, (70, 0, 21)], ids=["all", "some"])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(300, torch.float16), (40, torch.float32), (40, torch.float16)], ids=str
)
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_a_program_of_many_blocks_of_rows_keeps_the_error_budget(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    device: str,
    channels: int,
    dtype: torch.dtype,
    lengths: tuple[int, ...] | None,
) -> None:
    testing.need("residual_mlp", backend, device, dtype)
    monkeypatch.setattr("deepmsi._triton.residual_mlp._GELU_PROGRAMS", 5)
    monkeypatch.setattr("deepmsi._triton.residual_mlp._SUMMING_PROGRAMS", 7)
    assert_budget(backend, device, dtype, (101,), channels, 200, True, lengths=lengths)


@pytest.mark.parametrize("case", [((3000,), 36, 1030, False), ((22000,), 96, 520, False)], ids=["parts", "many"])
@pytest.mark.parametrize(("backend", "device", "dtype"), ON_THE_CPU, ids=IDS_ON_THE_CPU)
def test_it_keeps_the_error_budget_over_many_blocks(backend: str, device: str, dtype: torch.dtype, case: Any) -> None:
    """Weights that are packed in groups and, for more rows than stay in cache, at once."""
    assert_budget(backend, device, dtype, *case)


@pytest.mark.parametrize("name", [*CASES, "some", "none", "wide_some"])
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_a_norm_that_comes_first_keeps_the_error_budget(
    backend: str, device: str, name: str, dtype: torch.dtype
) -> None:
    lengths = {"some": (30, 0, 11), "none": (0, 0), "wide_some": (30, 0, 11)}.get(name)
    case = CASES[name] if lengths is None else ((77,), 300 if "wide" in name else 40, 200, True)
    assert_budget(backend, device, dtype, *case, lengths=lengths, norm_first=True)


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grid", "odd", "parts", "edge"])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_a_norm_that_comes_first_keeps_the_error_budget_under_autocast(
    backend: str, device: str, name: str, norms: torch.dtype
) -> None:
    options: dict[str, Any] = {"norms": norms, "kept": torch.float32, "norm_first": True}
    assert_budget(backend, device, torch.bfloat16, *CASES[name], **options)


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_a_norm_that_comes_first_is_that_of_the_rows(backend: str, device: str) -> None:
    """In words of torch's own layers."""
    testing.need("residual_mlp", backend, device)
    x, fc1, b1, fc2, b2, weight, bias, scale, _, eps = operator_arguments(False, device)
    scale = torch.tensor([0.0, 1.25] * 4, device=device)
    linear, gelu = torch.nn.functional.linear, torch.nn.functional.gelu
    normed = torch.nn.functional.layer_norm(x, (6,), weight, bias, eps)
    wanted = x + scale[:, None] * linear(gelu(linear(normed, fc1, b1)), fc2, b2)
    options: dict[str, Any] = {"row_scale": scale, "eps": eps, "norm_first": True, "backend": backend}
    torch.testing.assert_close(residual_mlp(x, fc1, b1, fc2, b2, weight, bias, **options), wanted)


@pytest.mark.parametrize("name", ["grid", "odd", "parts"])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_a_norm_in_float32_keeps_the_error_budget(backend: str, device: str, name: str) -> None:
    assert_budget(backend, device, torch.bfloat16, *CASES[name], norms=torch.float32)


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grid", "odd", "parts", "deep"])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_autocast_over_rows_in_16_bits_keeps_the_error_budget(
    backend: str, device: str, name: str, norms: torch.dtype
) -> None:
    """The layers' gradients have their own type, float32, as torch's have."""
    assert_budget(backend, device, torch.bfloat16, *CASES[name], norms=norms, kept=torch.float32)


@pytest.mark.parametrize("lengths", [(30, 0, 11), (0, 0), (77,)], ids=["some", "none", "all"])
@pytest.mark.parametrize("channels", [40, 300])
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_rows_behind_the_frames_are_passed_on(
    backend: str, device: str, dtype: torch.dtype, channels: int, lengths: tuple[int, ...]
) -> None:
    assert_budget(backend, device, dtype, (77,), channels, 200, True, lengths=lengths)


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("channels", [40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_what_lies_behind_the_frames_reaches_nothing_else(
    backend: str, device: str, dtype: torch.dtype, channels: int, norm_first: bool
) -> None:
    testing.need("residual_mlp", backend, device, dtype)
    found = []
    for tail in (0.0, torch.nan, torch.inf):
        sizes = ((9, channels), (20, channels), (20,), (channels, 20), *((channels,),) * 3)
        inputs = [randn(*size, seed=n, dtype=dtype, device=device) for n, size in enumerate(sizes)]
        inputs[0][5:] = tail
        leaves = [tensor.requires_grad_() for tensor in inputs]
        y = residual_mlp(*leaves, cu_seqlens=offsets((2, 3), device), norm_first=norm_first, backend=backend)
        grads = torch.autograd.grad(y, leaves, randn(*y.shape, seed=9, dtype=dtype, device=device))
        assert torch.equal(y[5:].nan_to_num(), leaves[0][5:].nan_to_num())
        found.append((y[:5].detach(), *grads))
    for other in found[1:]:
        for value, wanted in zip(other, found[0], strict=True):
            assert torch.equal(value, wanted)


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("channels", [40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_frozen_layers_cost_no_gradient(
    backend: str, device: str, dtype: torch.dtype, channels: int, norm_first: bool
) -> None:
    """And all others are the same, bit for bit; one bias that is not frozen gets its own, as do both layers."""
    testing.need("residual_mlp", backend, device, dtype)
    sizes = ((20, channels), (30, channels), (30,), (channels, 30), *((channels,),) * 3)
    inputs = [randn(*size, seed=n, dtype=dtype, device=device) for n, size in enumerate(sizes)]

    def gradients(frozen: tuple[int, ...]) -> dict[int, Tensor]:
        leaves = [tensor.clone().requires_grad_(n not in frozen) for n, tensor in enumerate(inputs)]
        y = residual_mlp(*leaves, cu_seqlens=offsets((7, 9), device), norm_first=norm_first, backend=backend)
        y.backward(randn(*y.shape, seed=9, dtype=dtype, device=device))
        assert all((leaf.grad is None) == (n in frozen) for n, leaf in enumerate(leaves))
        return {n: leaf.grad for n, leaf in enumerate(leaves) if leaf.grad is not None}

    every = gradients(())
    for frozen in ((1, 2, 3, 4), (1, 2, 3)):
        for n, grad in gradients(frozen).items():
            assert torch.equal(grad, every[n]), n


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("channels", [40, 300])
@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_the_stream_keeps_its_type_under_autocast(backend: str, device: str, channels: int, norm_first: bool) -> None:
    """x and weights in float32: products in 16 bits, the sum in float32. A kernel without such a mixture says so."""
    testing.need("residual_mlp", backend, device)
    case = ((20,), channels, 80, True)
    reason = backends.why_not("residual_mlp", backend, device, torch.bfloat16, mixed=1)
    refused = nullcontext() if reason is None else pytest.raises(RuntimeError, match=reason)
    with torch.autocast(device, torch.bfloat16), refused:
        got = run(*case, backend, device, torch.float32, norm_first=norm_first)
    if reason is not None:
        return
    exact = run(*case, "reference", device, torch.float32, exact=True, norm_first=norm_first)
    for what, wanted in exact.items():
        assert got[what].dtype == torch.float32
        torch.testing.assert_close(got[what].double(), wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item())
    options: dict[str, Any] = {"stream": torch.float32, "norm_first": norm_first}
    narrow = [run(*case, b, device, torch.bfloat16, **options)["y"] for b in (backend, "reference")]
    assert narrow[0].dtype == narrow[1].dtype == torch.float32


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize(("channels", "dtype"), [(300, torch.float16), (40, torch.float32)], ids=str)
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_autocast_around_backward_changes_no_bit_of_wide_layers(
    backend: str, device: str, channels: int, dtype: torch.dtype, norm_first: bool
) -> None:
    testing.need("residual_mlp", backend, device, dtype)
    sizes = ((9, channels), (20, channels), (20,), (channels, 20), *((channels,),) * 3)
    leaves = [randn(*n, seed=i, dtype=dtype, device=device).requires_grad_() for i, n in enumerate(sizes)]
    y = residual_mlp(*leaves, norm_first=norm_first, backend=backend)
    wanted = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        found = torch.autograd.grad(y.sum(), leaves)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_repeats_give_the_same_bits(backend: str, device: str) -> None:
    testing.need("residual_mlp", backend, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if backends.why_not("residual_mlp", backend, device, dtype) is None:
            first, second = (run((200,), 40, 200, True, backend, device, dtype) for _ in range(2))
            for what, value in first.items():
                assert torch.equal(second[what], value), what


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_thread_count_gives_the_same_bits(dtype: torch.dtype, norm_first: bool) -> None:
    testing.need("residual_mlp", "cpp", "cpu", dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run((700,), 40, 200, True, "cpp", "cpu", dtype, norm_first=norm_first))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_gelu_is_exact_in_both_tails(backend: str, device: str) -> None:
    """fc1 and fc2 pass one channel v on; under a large eps the norm is linear: y = x + gelu(x) / 2."""
    testing.need("residual_mlp", backend, device, torch.float32)
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-10, -40.0, 40.0, 1e4, -1e4]))).to(device)
    rows = torch.stack((x, torch.zeros_like(x)), 1)
    pick = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device)
    zeros, steep = torch.zeros(2, device=device), torch.full((2,), 1e10, device=device)
    y = residual_mlp(rows, pick, zeros, pick, zeros, steep, zeros, eps=1e20, backend=backend)[:, 0]
    exact = x.double() + torch.nn.functional.gelu(x.double()) / 2
    assert ((y.double() - exact).abs() <= 4e-7 * x.double().abs()).all()


@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "cpp"])
def test_gelu_and_its_slope_have_their_limits(backend: str, device: str) -> None:
    """Rows of zeros and layers of one channel: what fc1's bias holds goes through GELU to y."""
    testing.need("residual_mlp", backend, device, torch.float32)
    zero, one = torch.zeros(1, device=device), torch.ones(1, 1, device=device)
    for value, wanted in ((-3e38, (0, 0)), (-20, (0, 0)), (20, (20, 1)), (3e38, (3e38, 1)), (-torch.inf, (0, 0))):
        bias = (zero + value).requires_grad_()
        y = residual_mlp(one * 0, one, bias, one, zero, zero, zero, norm_first=True, backend=backend)
        (slope,) = torch.autograd.grad(y, bias)
        assert (y.item(), slope.item()) == pytest.approx(wanted)
    assert residual_mlp(one * 0, one, zero + torch.nan, one, zero, zero, zero, backend=backend).isnan()


@pytest.mark.parametrize("channels", [2, 300], ids=["fused", "wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_gelu_is_as_exact_as_16_bits_in_both_tails(
    backend: str, device: str, dtype: torch.dtype, channels: int
) -> None:
    """And so is its slope. fc1 and fc2 pass the first channel on to the second, where the stream is 0."""
    testing.need("residual_mlp", backend, device, dtype)
    # GELU is the same in both: the interpreter takes its time over wide rows.
    x = torch.linspace(-6, 6, 4001 if channels == 2 else 401, device=device).to(dtype)
    rows = torch.nn.functional.pad(x[:, None], (0, channels - 1)).requires_grad_()
    fc1, fc2 = (torch.zeros(channels, channels, device=device, dtype=dtype) for _ in range(2))
    fc1[0, 0] = fc2[1, 0] = 1
    zeros, steep = torch.zeros(channels, device=device, dtype=dtype), torch.full((channels,), 1e10, device=device)
    # Under a large eps the norm is linear: it takes away the mean alone.
    y = residual_mlp(rows, fc1, zeros, fc2, zeros, steep, steep * 0, eps=1e20, backend=backend)[:, 1]
    share = 1 - 1 / channels
    wide = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(wide) * share
    smallest = torch.finfo(dtype).smallest_normal
    off = (y.double() - exact).abs() / exact.abs().clamp(min=smallest)
    assert off.max() < 2 * torch.finfo(dtype).eps
    (slope,) = torch.autograd.grad(y.sum(), rows)
    (wanted,) = torch.autograd.grad(exact.sum(), wide)
    assert (slope[:, 0].double() - wanted).abs().max() < 2 * torch.finfo(dtype).eps


def operator_arguments(empty: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Return the arguments of the forward operator."""
    rows, channels, hidden = (0 if empty else 8), 6, 10
    sizes: tuple[tuple[int, ...], ...] = ((rows, channels), (hidden, channels), (hidden,), (channels, hidden))
    sizes += ((channels,), (channels,), (channels,))
    tensors = [randn(*size, seed=i, device=device, dtype=dtype) for i, size in enumerate(sizes)]
    scale = torch.ones(rows, device=device, dtype=dtype)
    return (*tensors, scale, None if empty else offsets((2, 3), device), EPS)


@pytest.mark.parametrize("empty", [False, True], ids=["rows", "empty"])
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "norm_first"),
    [(*place, first) for first in (False, True) for place in TYPED],
    ids=[*TYPES, *(f"{name}-norm first" for name in TYPES)],
)
def test_opcheck(backend: str, device: str, dtype: torch.dtype, norm_first: bool, empty: bool) -> None:
    testing.need("residual_mlp", backend, device, dtype)
    arguments = (*operator_arguments(empty, device, dtype), norm_first)
    forward = getattr(torch.ops.deepmsi, f"residual_mlp_{backend}_fwd").default
    backward = getattr(torch.ops.deepmsi, f"residual_mlp_{backend}_bwd").default
    leaves = [tensor.clone().requires_grad_() for tensor in arguments[:7]]
    torch.library.opcheck(forward, (*leaves, *arguments[7:], True))
    torch.library.opcheck(forward, (*arguments, False))
    branch = forward(*arguments, True)[1]
    grad = randn(*arguments[0].shape[::-1], seed=30, device=device, dtype=dtype).t()
    dense = (grad, arguments[0], branch, *arguments[1:], True)
    torch.library.opcheck(backward, dense)
    torch.library.opcheck(backward, (*dense[:-1], False))
    assert not any(layer.numel() for layer in backward(*dense[:-1], False)[1:5])
    columns = [t.t().contiguous().t() if isinstance(t, Tensor) and t.dim() == 2 else t for t in dense]
    for value, wanted in zip(backward(*columns), backward(*dense), strict=True):
        assert torch.equal(value, wanted)


def test_opcheck_of_rows_in_16_bits_beside_float32() -> None:
    testing.need("residual_mlp", "cpp", "cpu", torch.bfloat16)
    x, *others = (*operator_arguments(False), False)
    operators, x = torch.ops.deepmsi, x.bfloat16()
    torch.library.opcheck(operators.residual_mlp_cpp_fwd.default, (x, *others, True))
    y, branch = operators.residual_mlp_cpp_fwd(x, *others, True)
    assert branch.dtype == torch.bfloat16
    torch.library.opcheck(operators.residual_mlp_cpp_bwd.default, (y, x, branch, *others, True))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_compiles_whole_at_any_size(backend: str, device: str) -> None:
    testing.need("residual_mlp", backend, device, torch.float32)
    torch._dynamo.reset()
    weights = operator_arguments(False, device)[1:7]

    def half(x: Tensor) -> Tensor:
        return residual_mlp(x, *weights, backend=backend) * 2

    compiled = torch.compile(half, fullgraph=True, dynamic=True)
    for frames in (3, 5):
        x = randn(frames, 2, 4, 6, seed=frames, device=device).requires_grad_()
        y, expected = compiled(x), half(x)
        torch.testing.assert_close(y, expected)
        grads = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fc1_weight": torch.zeros(10, 5)}, r"x must be \[\.\.\., C\] and fc1_weight \[H, C\]"),
        ({"fc1_weight": torch.zeros(0, 6)}, r"fc1_weight must have an element at least, not \[0, 6\]"),
        ({"fc2_weight": torch.zeros(10, 6)}, r"fc2_weight must be \[6, 10\]"),
        ({"fc1_bias": torch.zeros(6)}, r"fc1_bias must be \[10\]"),
        ({"row_scale": torch.zeros(3)}, r"row_scale must be \[8\]"),
        ({"cu_seqlens": torch.tensor([0, 8])}, r"cu_seqlens must be \[F \+ 1\] int32 .* not \[2\] torch.int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens must be \[F \+ 1\] int32 .* not \[0\]"),
        ({"x": torch.zeros(8, 6, dtype=torch.int64)}, "floa"),
        ({"fc2_bias": torch.zeros(6).half()}, "fc1_weight, fc1_bias, fc2_weight, fc2_bias must be of one type"),
        ({"x": torch.zeros(8, 6).double()}, "float64 goes with float64 alone"),
        ({"fc2_weight": torch.zeros(6, 10, device="meta")}, "fc2_weight is on meta, x on cpu: move it"),
        ({"fc2_bias": None}, r"fc2_bias must be \[6\], not None"),
    ],
    ids=[
        "fc1",
        "no hidden",
        "fc2",
        "bias",
        "scale",
        "offsets",
        "no offset",
        "type",
        "types",
        "float64",
        "device",
        "none",
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor | None], words: str) -> None:
    arguments = dict(zip(NAMES, operator_arguments(False)[:7], strict=True))
    with pytest.raises(ValueError, match=words):
        residual_mlp(**(arguments | change))


def test_the_cpu_kernel_refuses_mixed_types() -> None:
    testing.need("residual_mlp", "cpp", "cpu", torch.float32)
    x, *weights = operator_arguments(False)[:7]
    with pytest.raises(RuntimeError, match="x and the weights must be of one type"):
        residual_mlp(x.half(), *weights, backend="cpp")


@pytest.mark.parametrize("kept", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_layers_and_factors_of_other_types(backend: str, scale: torch.dtype, kept: torch.dtype) -> None:
    testing.need("residual_mlp", backend, "cpu", torch.bfloat16)
    x, *weights = operator_arguments(False)[:7]
    layers, norm = [w.to(kept).requires_grad_() for w in weights[:4]], weights[4:]
    with torch.autocast("cpu", torch.bfloat16):
        y = residual_mlp(x.bfloat16(), *layers, *norm, row_scale=torch.ones(8, dtype=scale), backend=backend)
    assert y.dtype == torch.bfloat16
    exact = residual_mlp(x, *weights, backend="reference")
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    assert all(grad.dtype == kept for grad in torch.autograd.grad(y.sum(), layers))


def test_tiles_of_bfloat16_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    testing.need("residual_mlp", "cpp", "cpu")
    for tiles, chosen in ((True, "reference"), (False, "cpp")):
        monkeypatch.setattr(backends, "_HAS_TILES", tiles)
        monkeypatch.setattr(backends, "_ISA", "avx512_bf16")
        assert backends.resolve("residual_mlp", None, "cpu", torch.bfloat16, channels=96) == chosen
        assert backends.resolve("residual_mlp", None, "cpu", torch.float32, channels=96) == "cpp"
