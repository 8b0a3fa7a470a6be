"""dilated_causal_conv1d: against Eq. 4 in loops, and every backend's fused rows against the float64 reference."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepmsi import backend as backends
from deepmsi import testing
from deepmsi.ops import dilated_causal_conv1d
from deepmsi.ops.dilated_causal_conv1d import causal_conv_rows, pack
from deepmsi.reference.dilated_causal_conv1d import keep_mask
from deepmsi.testing import (
    INSTRUCTION_SETS,
    PLACES,
    REFERENCES,
    assert_within_budget,
    poisoned_memory,
    randn,
    run_in_instruction_set,
)

OP = "dilated_causal_conv1d"
EXACT = [place for place in (*REFERENCES, *PLACES) if place[0] != "triton"]  # those that take float64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def need(backend: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    testing.need(OP, backend, device, dtype)


def naive(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    taps = weight.shape[2]
    out = []
    for t in range(x.shape[2]):
        y = bias.expand(x.shape[0], -1)
        for i in range(taps):
            if t - i * dilation >= 0:
                y = y + x[:, :, t - i * dilation] @ weight[:, :, taps - 1 - i].T
        out.append(y)
    return torch.stack(out, 2)


@dataclass(frozen=True)
class Case:
    """One layer over rows; `count` None is every row. `normed`: its weight is that of a weight norm."""

    batch: int = 2
    rows: int = 9
    inputs: int = 5
    outputs: int = 6
    taps: int = 3
    dilation: int = 1
    count: int | None = None
    step: int = 1
    bias: bool = True
    relu: bool = True
    residual: bool = False
    dropout: float = 0.0
    normed: bool = False

    def run(
        self, backend: str, device: str, dtype: torch.dtype, compute: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """Return the output and every gradient, from inputs that are rounded to dtype and computed in `compute`."""
        scale = (self.taps * self.inputs) ** -0.5
        size = (self.batch, self.rows if self.count is None else self.count, self.outputs)
        shape = (self.taps, self.inputs, self.outputs)
        drawn = {
            "x": randn(self.batch, self.rows, self.inputs, seed=1, dtype=dtype, device=device),
            "weight": randn(*(shape[::-1] if self.normed else shape), seed=2, dtype=dtype, device=device, scale=scale),
            "g": randn(self.outputs, 1, 1, seed=6, dtype=dtype, device=device) if self.normed else None,
            "bias": randn(self.outputs, seed=3, dtype=dtype, device=device) if self.bias else None,
            "residual": randn(*size, seed=4, dtype=dtype, device=device) if self.residual else None,
        }
        leaves = {k: v.to(compute or dtype).requires_grad_() for k, v in drawn.items() if v is not None}
        with poisoned_memory():
            y = causal_conv_rows(
                **{**drawn, **leaves},
                dilation=self.dilation,
                count=self.count,
                step=self.step,
                relu=self.relu,
                seed=torch.tensor(-1234567890123456789, device=device),
                dropout=self.dropout,
                backend=backend,
            )
            weights = randn(*size, seed=5, dtype=dtype, device=device).to(y.dtype)
            return (y, *torch.autograd.grad(y, list(leaves.values()), weights))


CASES = {
    "plain": Case(relu=False, bias=False),
    "one_step": Case(rows=1, dilation=2, residual=True),
    "fused": Case(batch=3, rows=15, inputs=17, outputs=35, dilation=4, residual=True, dropout=0.3),
    "dropout": Case(rows=15, outputs=7, dropout=0.5),
    "cone": Case(rows=15, inputs=19, outputs=66, count=8, step=2, residual=True, dropout=0.1),
    "last": Case(batch=5, rows=5, count=1, dilation=2),
    "deep_step": Case(batch=3, rows=4, inputs=530, outputs=20, count=1),
    "shortcut": Case(rows=15, taps=1, count=4, step=4, relu=False),
    "residual_alone": Case(relu=False, residual=True),
    "long_taps": Case(rows=12, taps=5, dilation=7),
    "above_a_block": Case(batch=1, rows=70, inputs=130, outputs=33, dilation=2, residual=True),
    "empty": Case(batch=0, residual=True),
    "no_row": Case(rows=0),
}
LARGE = {
    "many_rows": Case(batch=2, rows=300, inputs=140, outputs=260, dilation=3, residual=True, dropout=0.3),
    "network": Case(batch=2, rows=15, inputs=256, outputs=256, count=8, step=2, residual=True),
    "many_positions": Case(batch=4, rows=300, inputs=20, outputs=20),
    "deep": Case(batch=1, rows=20, inputs=1536, outputs=20, taps=1),
}


def assert_budget(case: Case, backend: str, device: str, dtype: torch.dtype, roundings: float = 1.0) -> None:
    found, low, exact = (
        case.run(backend, device, dtype),
        case.run("reference", device, dtype),
        case.run("reference", device, dtype, torch.float64),
    )
    given = {"x": True, "weight": True, "g": case.normed, "bias": case.bias, "residual": case.residual}
    names = ["y", *(name for name, there in given.items() if there)]
    for name, x, l, e in zip(names, found, low, exact, strict=True):
        assert x.dtype == dtype
        scale = None
        if name == "weight" and case.normed:
            # What is along the weight is taken away from its gradient, and of a single entry nothing is left.
            scale = max(e.abs().max().item(), exact[names.index("g")].abs().max().item())
        assert_within_budget(x, l, e, name, roundings, scale)


@pytest.mark.parametrize("steps", [1, 2, 15])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (3, 4), (2, 7)])
@pytest.mark.parametrize(("backend", "device"), EXACT)
def test_equals_the_equation(backend: str, device: str, steps: int, taps: int, dilation: int) -> None:
    need(backend, device, torch.float64)
    x = randn(2, 3, steps, seed=1, dtype=torch.float64, device=device)
    weight, bias = (
        randn(4, 3, taps, seed=2, dtype=torch.float64, device=device),
        randn(4, seed=3, dtype=torch.float64, device=device),
    )
    for b in (bias, None):
        exact = naive(x, weight, torch.zeros_like(bias) if b is None else b, dilation)
        torch.testing.assert_close(dilated_causal_conv1d(x, weight, b, dilation, backend=backend), exact)
        rows = causal_conv_rows(x.transpose(1, 2), pack(weight), b, dilation=dilation, backend=backend)
        torch.testing.assert_close(rows.transpose(1, 2), exact)


@pytest.mark.parametrize(("backend", "device"), EXACT)
def test_gradients(backend: str, device: str) -> None:
    need(backend, device, torch.float64)
    x = randn(2, 3, 6, seed=1, dtype=torch.float64, device=device).requires_grad_()
    weight = randn(4, 3, 3, seed=2, dtype=torch.float64, device=device).requires_grad_()
    bias = randn(4, seed=3, dtype=torch.float64, device=device).requires_grad_()
    residual = randn(2, 2, 4, seed=4, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: dilated_causal_conv1d(*a, 2, backend=backend), (x, weight, bias))

    def layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return causal_conv_rows(
            x.transpose(1, 2),
            pack(weight),
            bias,
            residual=residual,
            count=2,
            step=3,
            relu=True,
            seed=torch.tensor(3, device=device),
            dropout=0.25,
            backend=backend,
        )

    assert torch.autograd.gradcheck(layer, (x, weight, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_kernels_keep_the_error_budget(backend: str, device: str, case: str, dtype: str) -> None:
    need(backend, device, DTYPES[dtype])
    if (backend, device) == ("triton", "cpu") and dtype == "float16" and case not in ("fused", "cone"):
        pytest.skip("under the interpreter two cases tell of float16")
    assert_budget(CASES[case], backend, device, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_large_cases_keep_the_error_budget(backend: str, device: str, case: str, dtype: str) -> None:
    need(backend, device, DTYPES[dtype])
    if (backend, device) == ("triton", "cpu") and dtype != "float32":
        pytest.skip("long sums tell of float32, and the interpreter takes its time")
    assert_budget(LARGE[case], backend, device, DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["float64", *DTYPES])
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize(("backend", "device"), [("cpp", "cpu")])
def test_a_weight_norm_keeps_the_error_budget(backend: str, device: str, case: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    need(backend, device, kind)
    normed = replace((CASES | LARGE)[case], normed=True)
    if kind != torch.float64:
        assert_budget(normed, backend, device, kind)
        return
    for found, exact in zip(normed.run(backend, device, kind), normed.run("reference", device, kind), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(0, 4),
    rows=st.integers(1, 20),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    taps=st.integers(1, 5),
    dilation=st.integers(1, 9),
    count=st.none() | st.integers(1, 8),
    step=st.integers(1, 3),
    bias=st.booleans(),
    relu=st.booleans(),
    residual=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    normed=st.booleans(),
)
def test_properties(rows: int, count: int | None, step: int, relu: bool, dropout: float, **others: Any) -> None:
    """Whatever the sizes, every kernel keeps the error budget."""
    if count is None or (count - 1) * step + 1 > rows:
        count, step = None, 1
    case = Case(rows=rows, count=count, step=step, relu=relu, dropout=dropout if relu else 0.0, **others)
    for backend, device in PLACES:
        if backends.why_not(OP, backend, device, torch.float32) is None:
            assert_budget(case, backend, device, torch.float32, roundings=4.0)


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_the_public_function_in_low_precision(backend: str, device: str) -> None:
    need(backend, device, torch.bfloat16)
    x, weight = (
        randn(2, 8, 9, seed=1, dtype=torch.bfloat16, device=device),
        randn(8, 8, 3, seed=2, dtype=torch.bfloat16, device=device),
    )
    got = dilated_causal_conv1d(x, weight, None, 2, backend=backend)
    low = dilated_causal_conv1d(x, weight, None, 2, backend="reference")
    assert_within_budget(got, low, dilated_causal_conv1d(x.double(), weight.double(), None, 2, backend="reference"))


def philox(seed: int, counter: int) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_dropout_draws_from_philox() -> None:
    # Random123's known answer for a counter and a key of zeros.
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seed = -987654321987654321
    words = [w for c in range(5) for w in philox(seed & 0xFFFFFFFFFFFFFFFF, c)][:18]
    expected = torch.tensor([w >= int(0.4 * 2**32) for w in words])
    assert torch.equal(keep_mask(torch.tensor(seed), torch.Size([18]), 0.4), expected)


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_dropout_drops_its_share_and_scales_the_rest(backend: str, device: str) -> None:
    need(backend, device)
    x, weight = torch.ones(3, 20, 1, device=device), torch.ones(1, 1, 101, device=device)
    dropped = []
    for seed in (1, 2, 2**62 + 5):
        y = causal_conv_rows(
            x, weight, None, relu=True, seed=torch.tensor(seed, device=device), dropout=0.3, backend=backend
        )
        kept = y != 0
        torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))
        assert torch.equal(kept, keep_mask(torch.tensor(seed, device=device), y.shape, 0.3))
        # 6060 draws: four deviations of 0.0059.
        assert abs(kept.float().mean().item() - 0.7) < 0.024
        dropped.append(kept)
    assert abs((dropped[0] == dropped[1]).float().mean().item() - 0.58) < 0.03


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_the_gradient_passes_where_dropout_kept(backend: str, device: str, residual: bool) -> None:
    need(backend, device)
    x = torch.ones(2, 6, 1, requires_grad=True, device=device)
    weight, bias = torch.ones(1, 1, 37, device=device), torch.zeros(37, requires_grad=True, device=device)
    shortcut = torch.full((2, 6, 37), 5.0, device=device) if residual else None
    seed = torch.tensor(11, device=device)
    y = causal_conv_rows(x, weight, bias, relu=True, residual=shortcut, seed=seed, dropout=0.4, backend=backend)
    kept = keep_mask(seed, y.shape, 0.4).float() / 0.6
    grads = torch.autograd.grad(y.sum(), (x, bias))
    torch.testing.assert_close(grads[0], kept.sum(2, keepdim=True))
    torch.testing.assert_close(grads[1], kept.sum((0, 1)))


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_an_empty_sequence_has_an_empty_result(backend: str, device: str) -> None:
    need(backend, device)
    x = torch.zeros(2, 5, 0, requires_grad=True, device=device)
    weight = torch.ones(6, 5, 3, requires_grad=True, device=device)
    y = dilated_causal_conv1d(x, weight, torch.ones(6, device=device), 2, backend=backend)
    assert y.shape == (2, 6, 0)
    grads = torch.autograd.grad(y.sum(), (x, weight))
    assert [tuple(grad.shape) for grad in grads] == [(2, 5, 0), (6, 5, 3)]
    assert not grads[1].any()


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_only_what_is_wanted_is_computed(backend: str, device: str) -> None:
    need(backend, device)
    x, weight, residual = (
        randn(2, 7, 5, seed=1, device=device),
        randn(3, 5, 6, seed=2, device=device),
        randn(2, 7, 6, seed=3, device=device),
    )
    forward, backward = (getattr(torch.ops.deepmsi, f"{OP}_{backend}_{way}") for way in ("fwd", "bwd"))
    facts = (None, residual, None, 2, None, 1, True, 0.0)
    y, active = forward(x, weight, *facts, False)
    assert active.numel() == 0
    again, active = forward(x, weight, *facts, True)
    assert torch.equal(y, again)
    assert active.shape == y.shape
    whole = backward(y, x, weight, y, active, 2, 1, True, True, 0.0, True, True)
    none = backward(y, x, weight, y, active, 2, 1, True, True, 0.0, False, False)
    assert [t.numel() for t in none[:2]] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(none[2:], whole[2:], strict=True))
    # One leaf alone wants its gradient.
    weight.requires_grad_()
    (alone,) = torch.autograd.grad(causal_conv_rows(x, weight, None, backend=backend).sum(), weight)
    (exact,) = torch.autograd.grad(causal_conv_rows(x, weight, None, backend="reference").sum(), weight)
    torch.testing.assert_close(alone, exact)


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_a_nan_shows(backend: str, device: str) -> None:
    need(backend, device)
    x, weight = randn(1, 9, 5, seed=1, device=device), randn(3, 5, 6, seed=2, device=device)
    x[0, 4, 2] = torch.nan
    y = causal_conv_rows(
        x, weight, None, relu=True, residual=torch.zeros(1, 9, 6, device=device), dilation=2, backend=backend
    )
    assert y.isnan().all(2)[0].tolist() == [t in (4, 6, 8) for t in range(9)]


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_dropout_drops_what_is_not_finite(backend: str, device: str) -> None:
    need(backend, device)
    seed = torch.tensor(3, device=device)
    x = torch.full((1, 8, 4), torch.nan, device=device)
    y = causal_conv_rows(x, x[0, :4].view(1, 4, 4), None, relu=True, seed=seed, dropout=0.5, backend=backend)
    assert torch.equal(y.isnan(), keep_mask(seed, y.shape, 0.5))
    assert not y.nan_to_num().any()


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("case", ["fused", "cone"])
def test_two_runs_and_any_thread_count_give_the_same_bits(backend: str, device: str, case: str) -> None:
    need(backend, device)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(CASES[case].run(backend, device, torch.float32))
            if backend == "cpp":
                for normed in (False, True):
                    results[-1] += replace(LARGE["many_rows"], normed=normed).run(backend, device, torch.float32)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_strided_inputs_give_the_same(backend: str, device: str) -> None:
    need(backend, device)
    x, weight, residual = (
        randn(2, 8, 5, seed=1, device=device),
        randn(3, 5, 6, seed=2, device=device),
        randn(2, 8, 6, seed=3, device=device),
    )
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for t in (x, weight, residual)]
    dense = [t.requires_grad_() for t in (x, weight, residual)]
    results = []
    for leaves in (strided, dense):
        y = causal_conv_rows(*leaves[:2], None, residual=leaves[2], relu=True, backend=backend)
        # The gradient of a sum is expanded, so it has no strides of its own.
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("form", ["plain", "fused", "cone", "inference", "empty", "permuted"])
def test_opcheck(backend: str, device: str, form: str) -> None:
    need(backend, device)
    batch = 0 if form == "empty" else 2
    count = 2 if form == "cone" else None
    x, weight, bias = (
        randn(batch, 5, 3, seed=1, device=device),
        randn(2, 3, 4, seed=2, device=device),
        randn(4, seed=3, device=device),
    )
    residual = None if form == "plain" else randn(batch, count or 5, 4, seed=4, device=device)
    if form == "permuted":
        x, weight, residual = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, weight, residual))
    with_grad = form != "inference"
    for t in (x, weight, bias, residual):
        if t is not None:
            t.requires_grad_(with_grad)
    relu = form != "plain"
    seed, dropout = (torch.tensor(5, device=device), 0.3) if relu else (None, 0.0)
    step = 1 if count is None else 3
    args = (x, weight, bias, residual, seed, 2, count, step, relu, dropout, with_grad)
    forward = getattr(torch.ops.deepmsi, f"{OP}_{backend}_fwd").default
    torch.library.opcheck(forward, args)
    if not with_grad:
        return
    with torch.no_grad():
        y, active = forward(*args)
    backward = getattr(torch.ops.deepmsi, f"{OP}_{backend}_bwd").default
    facts = (2, step, relu, residual is not None, dropout)
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(backward, (torch.ones_like(y), x.detach(), weight.detach(), y, active, *facts, *wanted))


@pytest.mark.parametrize("form", ["plain", "fused", "cone", "inference", "empty", "no_output", "permuted"])
def test_opcheck_of_a_weight_norm(form: str) -> None:
    need("cpp", "cpu")
    batch, outputs, count = 0 if form == "empty" else 2, 0 if form == "no_output" else 4, 2 if form == "cone" else None
    x, v, g, bias = (
        randn(batch, 5, 3, seed=1),
        randn(outputs, 3, 2, seed=2),
        randn(outputs, 1, 1, seed=5),
        randn(outputs, seed=3),
    )
    residual = None if form == "plain" else randn(batch, count or 5, outputs, seed=4)
    if form == "permuted":
        x, v, residual = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, v, residual))
    for t in (x, v, g, bias, residual):
        if t is not None:
            t.requires_grad_(form != "inference")
    args = (x, v, g, bias, residual, torch.tensor(5), 2, count, 1, True, 0.3, form != "inference")
    torch.library.opcheck(torch.ops.deepmsi.weight_normed_conv1d_cpp_fwd.default, args)
    if form == "inference":
        return
    with torch.no_grad():
        y, active, norms = torch.ops.deepmsi.weight_normed_conv1d_cpp_fwd(*args)
    read = (torch.ones_like(y), x.detach(), v.detach(), g.detach(), norms, y, active)
    backward = torch.ops.deepmsi.weight_normed_conv1d_cpp_bwd.default
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(backward, (*read, 2, 1, True, residual is not None, 0.3, *wanted))


def test_only_what_a_weight_norm_wants_is_computed() -> None:
    need("cpp", "cpu")
    drawn = [randn(2, 7, 5, seed=1), randn(6, 5, 3, seed=2), randn(6, 1, 1, seed=3)]

    def gradients(wanted: set[int]) -> list[Tensor]:
        x, v, g = (t.clone().requires_grad_(i in wanted) for i, t in enumerate(drawn))
        y = causal_conv_rows(x, v, None, g=g, backend="cpp")
        return list(torch.autograd.grad(y.square().sum(), [t for t in (x, v, g) if t.requires_grad]))

    whole = gradients({0, 1, 2})
    for i in range(3):
        assert torch.equal(gradients({i})[0], whole[i])


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_autocast_takes_x_and_weights(backend: str, device: str) -> None:
    need(backend, device, torch.bfloat16)
    x, weight, bias = randn(1, 3, 5, seed=1).to(device), randn(4, 3, 3, seed=2).to(device), randn(4, seed=3).to(device)
    weight.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = dilated_causal_conv1d(x, weight, bias, 1, backend=backend)
    assert y.dtype == torch.bfloat16
    narrow = (x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert torch.equal(y, dilated_causal_conv1d(*narrow, 1, backend=backend))
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_whole_and_for_changing_sizes(backend: str, device: str) -> None:
    need(backend, device)
    weight, bias = randn(4, 3, 3, seed=2, device=device), randn(4, seed=3, device=device)
    torch._dynamo.reset()

    def step(x: Tensor) -> Tensor:
        y = dilated_causal_conv1d(x, weight, bias, 2, backend=backend).transpose(1, 2)
        return causal_conv_rows(y, y.new_ones(1, 4, 4), bias, relu=True, residual=y, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in ((2, 7), (3, 15)):
        x = randn(batch, 3, steps, seed=steps, device=device)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, exact = compiled(one), step(other)
        torch.testing.assert_close(out, exact)
        out.square().sum().backward()
        exact.square().sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


_PROBE = """
import sys, torch
from deepmsi import _host
from deepmsi.ops.dilated_causal_conv1d import causal_conv_rows
from deepmsi.testing import randn
assert _host.instruction_set() == sys.argv[1], _host.instruction_set()
for dtype in (torch.float32, torch.float64):
    results = []
    for backend in ("cpp", "reference"):
        leaves = [randn(2, 31, 40, seed=1, dtype=dtype), randn(3, 40, 37, seed=2, dtype=dtype),
                  randn(37, seed=3, dtype=dtype), randn(2, 15, 37, seed=4, dtype=dtype)]
        x, weight, bias, residual = (t.requires_grad_() for t in leaves)
        normed = {"weight": randn(37, 40, 3, seed=5, dtype=dtype).requires_grad_(),
                  "g": randn(37, 1, 1, seed=6, dtype=dtype).requires_grad_()}
        found = []
        for weights in ({"weight": weight}, normed):
            y = causal_conv_rows(x, bias=bias, residual=residual, count=15, step=2, dilation=3, relu=True,
                                 seed=torch.tensor(7), dropout=0.2, backend=backend, **weights)
            leaves = (x, bias, residual, *weights.values())
            found += [y, *torch.autograd.grad(y.square().sum(), leaves)]
        results.append(found)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())
"""


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_that_this_cpu_runs(isa: str) -> None:
    need("cpp", "cpu")
    run_in_instruction_set(isa, _PROBE)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "dilation", "words"),
    [
        ((2, 3), (4, 3, 3), None, 1, r"x must be \[B, Cin, T\]"),
        ((2, 3, 5), (4, 2, 3), None, 1, "weight must be"),
        ((2, 0, 5), (4, 0, 3), None, 1, "weight must be .* none of them 0"),
        ((2, 3, 5), (0, 3, 3), None, 1, "weight must be .* none of them 0"),
        ((2, 3, 5), (4, 3, 3), (3,), 1, "bias must be"),
        ((2, 3, 5), (4, 3, 3), None, 0, "dilation must be at least 1"),
    ],
)
def test_mistakes_are_told(
    x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, dilation: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        dilated_causal_conv1d(
            torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias), dilation
        )


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_lies_elsewhere_is_told(name: str) -> None:
    given = {"x": torch.zeros(2, 3, 5), "weight": torch.zeros(4, 3, 3), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=f"{name} is on meta, x on cpu: move it"):
        dilated_causal_conv1d(**{**given, name: given[name].to("meta")})
