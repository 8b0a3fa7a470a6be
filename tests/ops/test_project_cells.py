"""project_cells: every backend against the reference, in numbers and gradients, on views of every kind."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deepmsi import backend as backends
from deepmsi import testing
from deepmsi.ops import project_cells
from deepmsi.testing import REFERENCES, assert_within_budget, offsets, poisoned_memory, randn, roundings_of

EPS = 1e-5
OP = "project_cells"
PLACES = testing.places(OP)
TYPED = testing.typed_places(OP, (torch.float32, torch.bfloat16, torch.float16))
TYPES = [f"{b}-{d}-{t}" for b, d, t in TYPED]


def own_type(backend: str) -> torch.dtype:
    """Return the widest type that a backend takes."""
    return torch.float16 if backend == "triton" else torch.float32


def patches(frames: Tensor, side: int) -> Tensor:
    """Return the patches of frames [F, 3, S, S] as a view [F, S/p, S/p, 3, p, p]."""
    return frames.unflatten(2, (-1, side)).unflatten(4, (-1, side)).permute(0, 2, 4, 1, 3, 5)


def merged(x: Tensor) -> Tensor:
    """Return the 2x2 cells of tokens [F, H, W, C] as a view [F, H/2, W/2, 2, 2, C]."""
    return x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 4, 2, 5)


# The shape of what is drawn, the view of it, and the channels that come out.
CASES: dict[str, tuple[tuple[int, ...], Any, int]] = {
    "patches": ((2, 3, 24, 24), lambda x: patches(x, 4), 48),
    "odd_patches": ((1, 3, 15, 15), lambda x: patches(x, 3), 7),
    "tokens": ((3, 8, 6, 32), merged, 64),
    "odd_tokens": ((2, 6, 4, 5), merged, 9),
    "rows": ((50, 96), lambda x: x.view(1, 1, 50, 1, 1, 96), 33),
    "one_cell": ((1, 2, 2, 16), merged, 8),
    "several_chunks": ((2, 64, 64, 96), merged, 40),
    "a_part": ((2, 9, 8, 12), lambda x: merged(x[:, 1:, :, 2:10]), 16),
    "every_other": ((2, 4, 4, 12), lambda x: merged(x[..., ::2]), 16),
    "repeated": ((1, 4, 4, 6), lambda x: merged(x.expand(3, 4, 4, 6)), 8),
    "overlapping": ((3, 17), lambda x: x.unfold(1, 16, 1)[:, None, :, None, None, :], 5),
    "no_frames": ((0, 4, 4, 8), merged, 16),
    "no_frames_apart": ((0, 2, 2, 2, 2, 16), lambda x: x[..., ::2], 16),
}


def results(
    name: str,
    bias: bool,
    backend: str,
    device: str,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    exact: bool = False,
    norms: torch.dtype | None = None,
    norm_first: bool = False,
    stream: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return y and every gradient; the inputs are rounded to the types before they are made `exact`.

    x is in `stream`, where that is another type than the weight's.
    """
    size, view, channels = CASES[name]

    def draw(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        rounded = randn(*shape, seed=seed, scale=scale, dtype=dtype, device=device)
        return (rounded.double() if exact else rounded).requires_grad_()

    x = draw(*size, seed=1, dtype=stream or dtype)
    cells = view(x)
    depth = cells.shape[3] * cells.shape[4] * cells.shape[5]
    inputs = {"x": x, "weight": draw(channels, depth, seed=2, scale=depth**-0.5)}
    if bias:
        inputs["bias"] = draw(channels, seed=3)
    normed = depth if norm_first else channels
    inputs["norm_weight"] = draw(normed, seed=4, dtype=norms or dtype)
    inputs["norm_bias"] = draw(normed, seed=5, dtype=norms or dtype)
    arguments = [inputs.get(key) for key in ("weight", "bias", "norm_weight", "norm_bias")]
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "eps": EPS, "norm_first": norm_first, "backend": backend}
    y = project_cells(cells, *arguments, **options)
    assert y.shape == (*cells.shape[:3], channels)
    grad = randn(*y.shape, seed=20, dtype=dtype, device=device).to(y.dtype)
    grads = torch.autograd.grad(y, tuple(inputs.values()), grad)
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def assert_budget(
    name: str, bias: bool, backend: str, device: str, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    testing.need(OP, backend, device, dtype)
    norm_first = options.get("norm_first", False)
    with poisoned_memory():
        got = results(name, bias, backend, device, dtype, **options)
    low = results(name, bias, "reference", device, dtype, **options)
    exact = results(name, bias, "reference", device, dtype, exact=True, **options)
    for key, wanted in exact.items():
        assert got[key].dtype == low[key].dtype
        roundings = 8 if dtype == torch.float32 else roundings_of(dtype, got[key])
        if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16) and norm_first:
            roundings *= 2  # the interpreter cuts numbers off where GPUs round
        assert_within_budget(got[key], low[key], wanted, key, roundings=roundings)
    return got


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_keeps_the_error_budget(backend: str, device: str, dtype: torch.dtype, name: str, bias: bool) -> None:
    assert_budget(name, bias, backend, device, dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_a_norm_that_comes_first_keeps_the_error_budget(
    backend: str, device: str, dtype: torch.dtype, name: str, bias: bool
) -> None:
    assert_budget(name, bias, backend, device, dtype, norm_first=True)


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_a_norm_that_comes_first_is_that_of_the_cells(backend: str, device: str) -> None:
    """In words of torch's own layers."""
    own: dict[str, Any] = {"dtype": own_type(backend), "device": device}
    testing.need(OP, backend, device, own["dtype"])
    x, weight, bias = (
        randn(2, 4, 6, 8, seed=1, **own),
        randn(12, 32, seed=2, scale=0.2, **own),
        randn(12, seed=3, **own),
    )
    norm = [randn(32, seed=n, **own) for n in (4, 5)]
    rows = torch.cat([x[:, down::2, across::2] for across in (0, 1) for down in (0, 1)], -1)
    wanted = torch.nn.functional.linear(torch.nn.functional.layer_norm(rows, (32,), *norm), weight, bias)
    y = project_cells(merged(x), weight, bias, *norm, norm_first=True, backend=backend)
    close = 8 * torch.finfo(own["dtype"]).eps
    torch.testing.assert_close(y, wanted, rtol=close, atol=close)


@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_a_norm_that_comes_first_reads_a_stream_in_float32(backend: str, device: str) -> None:
    assert_budget("tokens", False, backend, device, torch.float16, norm_first=True, stream=torch.float32)


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("name", ["patches", "odd_tokens"])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_a_norm_in_float32_keeps_the_error_budget(backend: str, device: str, name: str, norm_first: bool) -> None:
    assert_budget(name, True, backend, device, torch.bfloat16, norms=torch.float32, norm_first=norm_first)


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_a_frozen_layer_gets_no_gradient(
    backend: str, device: str, dtype: torch.dtype, packed: bool, norm_first: bool
) -> None:
    """And all others are the same, bit for bit; a bias that is not frozen beside its weight gets its own."""
    testing.need(OP, backend, device, dtype)
    normed = 32 if norm_first else 24
    sizes = ((1, 1, 30, 2, 2, 8), (24, 32), (24,), (normed,), (normed,))
    cu = offsets((7, 20), device) if packed else None
    inputs = [randn(*size, seed=n, dtype=dtype, device=device) for n, size in enumerate(sizes)]

    def gradients(frozen: tuple[int, ...]) -> dict[int, Tensor]:
        leaves = [tensor.clone().requires_grad_(n not in frozen) for n, tensor in enumerate(inputs)]
        y = project_cells(*leaves, cu_seqlens=cu, norm_first=norm_first, backend=backend)
        y.backward(randn(*y.shape, seed=9, dtype=dtype, device=device).to(y.dtype))
        assert all((leaf.grad is None) == (n in frozen) for n, leaf in enumerate(leaves))
        return {n: leaf.grad for n, leaf in enumerate(leaves) if leaf.grad is not None}

    every = gradients(())
    for frozen in ((1, 2), (1,), (0, 1, 2)):
        for n, grad in gradients(frozen).items():
            assert torch.equal(grad, every[n]), n


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_autocast_takes_all_but_the_norm_in_its_type(backend: str, device: str) -> None:
    testing.need(OP, backend, device, torch.bfloat16)
    narrow, wide = [], []
    for found, chosen in ((narrow, backend), (wide, "reference")):
        leaves = [randn(2, 4, 4, 8, seed=1), randn(6, 32, seed=2, scale=0.2), *(randn(6, seed=i) for i in (3, 4, 5))]
        x, *weights = (leaf.to(device).requires_grad_() for leaf in leaves)
        with torch.autocast(device, torch.bfloat16, enabled=found is narrow):
            y = project_cells(merged(x), *weights, backend=chosen)
        found += [y, *torch.autograd.grad(y.float().square().sum(), (x, *weights))]
    assert [t.dtype for t in narrow] == [torch.bfloat16, *[torch.float32] * 5]
    for value, wanted in zip(narrow, wide, strict=True):
        torch.testing.assert_close(value.float(), wanted, rtol=0.05, atol=0.03 * wanted.abs().max().item())


@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_x_is_rounded_once_under_autocast(backend: str, device: str) -> None:
    """Where a gradient is wanted; without one Triton's kernel rounds it while it reads it."""
    testing.need(OP, backend, device, torch.bfloat16)
    x = merged(randn(2, 4, 4, 8, seed=1, device=device))
    weights = [randn(6, 32, seed=2, device=device), *(randn(6, seed=i, device=device) for i in (3, 4, 5))]
    copies: list[torch.Size] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                copies.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    for wanted in (True, False):
        copies.clear()
        with Copies(), torch.autocast(device, torch.bfloat16):
            project_cells(x.detach().requires_grad_(wanted), *weights, backend=backend)
        assert copies.count(x.shape) == (0 if backend == "triton" and not wanted else 1)


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("lengths", [(20, 0, 17), (50,), (0, 0)], ids=["some", "all", "none"])
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_rows_behind_the_frames_give_zeros(
    backend: str, device: str, dtype: torch.dtype, lengths: tuple[int, ...], norm_first: bool
) -> None:
    valid, options = sum(lengths), {"cu_seqlens": offsets(lengths, device), "norm_first": norm_first}
    got = assert_budget("rows", True, backend, device, dtype, **options)
    assert (got["y"][0, 0, valid:] == 0).all()
    assert (got["x"][valid:] == 0).all()


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize(("backend", "device"), [*PLACES, *REFERENCES])
def test_what_rows_behind_the_frames_hold_reaches_no_weight(backend: str, device: str, norm_first: bool) -> None:
    own: dict[str, Any] = {"dtype": own_type(backend), "device": device}
    testing.need(OP, backend, device, own["dtype"])
    weight, norm = (randn(*n, seed=len(n), **own).requires_grad_() for n in ((5, 12), (12 if norm_first else 5,)))
    options: dict[str, Any] = {"cu_seqlens": offsets((1, 3), device), "norm_first": norm_first, "backend": backend}
    grads = []
    for behind in (0.0, torch.nan):
        x = torch.cat((randn(4, 12, seed=3, **own), torch.full((3, 12), behind, **own))).view(1, 1, 7, 2, 2, 3)
        y = project_cells(x, weight, None, norm, norm, **options)
        assert (y[0, 0, 4:] == 0).all()
        grads.append(torch.autograd.grad(y.square().sum(), (weight, norm)))
    for found, wanted in zip(*grads, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_thread_count_gives_the_same_bits(dtype: torch.dtype, norm_first: bool) -> None:
    testing.need(OP, "cpp", "cpu", dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results("several_chunks", True, "cpp", "cpu", dtype, norm_first=norm_first))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("name", ["patches", "tokens", "rows", "a_part", "repeated", "no_frames"])
@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_opcheck(backend: str, device: str, dtype: torch.dtype, name: str, norm_first: bool) -> None:
    testing.need(OP, backend, device, dtype)
    size, view, channels = CASES[name]
    forward = getattr(torch.ops.deepmsi, f"{OP}_{backend}_fwd").default
    backward = getattr(torch.ops.deepmsi, f"{OP}_{backend}_bwd").default
    own: dict[str, Any] = {"dtype": dtype, "device": device}
    x = view(randn(*size, seed=1, **own))
    depth = x.shape[3] * x.shape[4] * x.shape[5]
    weight, bias = randn(channels, depth, seed=2, **own), randn(channels, seed=3, **own)
    vectors = [bias, *(randn(depth if norm_first else channels, seed=i, device=device) for i in (4, 5))]
    rest, norm = (None, EPS, norm_first), vectors[1:]
    leaves = [t.clone().requires_grad_() for t in (weight, *vectors)]
    torch.library.opcheck(forward, (x, *leaves, *rest, channels, True))
    torch.library.opcheck(forward, (x, weight, None, *norm, *rest, channels, False))
    # The CPU's kernel rounds the weights while it reads them, Triton's x.
    wide = (weight.float(), bias.float(), *vectors[1:])
    mixed = (x.float(), weight, *vectors) if backend == "triton" else (x, *wide)
    torch.library.opcheck(forward, (*mixed, *rest, channels, True))
    y, branch = forward(x, weight, *vectors, *rest, channels, True)
    held = weight if backend == "triton" else wide[0]
    torch.library.opcheck(backward, (y, x, branch, held, *norm, *rest, True, True))
    grad = randn(channels, y.shape[0], seed=6, **own).t()
    for wants in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward, (grad, x, branch, weight, *norm, *rest, *wants))
    if name == "rows":
        rest = (offsets((20, 17), device), EPS, norm_first)
        torch.library.opcheck(forward, (x, *leaves, *rest, channels, True))
        torch.library.opcheck(backward, (grad, x, branch, weight, *norm, *rest, True, True))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_compiles_whole_at_any_size(backend: str, device: str) -> None:
    own: dict[str, Any] = {"dtype": own_type(backend), "device": device}
    testing.need(OP, backend, device, own["dtype"])
    torch._dynamo.reset()
    weight, vectors = randn(12, 16, seed=2, **own), [randn(12, seed=i, **own) for i in (3, 4, 5)]

    def block(x: Tensor) -> Tensor:
        return project_cells(merged(x), weight, *vectors, backend=backend) * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for frames in (3, 5):
        x = randn(frames, 6, 4, 4, seed=frames, **own).requires_grad_()
        y, expected = compiled(x), block(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)))


@pytest.mark.parametrize(("backend", "device", "dtype"), TYPED, ids=TYPES)
def test_repeats_give_the_same_bits(backend: str, device: str, dtype: torch.dtype) -> None:
    testing.need(OP, backend, device, dtype)
    first, second = (results("tokens", True, backend, device, dtype) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_rows_that_no_program_holds_are_refused(backend: str, device: str) -> None:
    testing.need(OP, backend, device, torch.float16)
    for facts, words in (({"outputs": 257}, "256 channels"), ({"depth": 4097, "norm_first": 1}, "4096 channels")):
        assert f"{words} at most" in str(backends.why_not(OP, backend, device, torch.float16, **facts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \[F, H, W, A, B, c\]"),
        ({"weight": torch.zeros(5, 7)}, r"weight must be \[C, 16\]"),
        ({"norm_bias": torch.zeros(4)}, r"norm_bias must be \[5\]"),
        ({"cu_seqlens": torch.tensor([0, 1])}, r"cu_seqlens must be \[F \+ 1\] int32 .* not \[2\] torch.int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens must be \[F \+ 1\] int32 .* not \[0\]"),
        ({"x": torch.zeros(1, 1, 1, 2, 2, 4, dtype=torch.int64)}, "floa"),
        ({"x": torch.zeros(1, 1, 1, 2, 2, 4).half()}, "x and weight must be of one type, not torch.float16 and "),
        ({"bias": torch.zeros(5).half()}, "weight, bias must be of one type"),
    ],
    ids=["rank", "weight", "norm", "offsets", "no offset", "type", "mixed", "bias"],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], words: str) -> None:
    good = {"x": torch.zeros(1, 1, 1, 2, 2, 4), "weight": torch.zeros(5, 16), "bias": None}
    good |= {"norm_weight": torch.ones(5), "norm_bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=words):
        project_cells(**(good | change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks tensors of a GPU that is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_under_a_gpus_autocast_it_has_the_product_s_type(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode(), torch.autocast("cuda", torch.float16):
        x = torch.empty(1, 1, 7, 2, 2, 3, dtype=dtype, device="cuda")
        weight, norm = torch.empty(5, 12, device="cuda"), torch.empty(5, device="cuda")
        assert project_cells(x, weight, None, norm, norm).dtype == torch.float16
