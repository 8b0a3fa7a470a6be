"""vsc_compress: the reference against a naive loop, every backend against the reference, and torch's own machinery."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepmsi import backend as backends
from deepmsi import testing
from deepmsi.ops import vsc_compress
from deepmsi.testing import INSTRUCTION_SETS, PLACES, REFERENCES, run_in_instruction_set

OP = "vsc_compress"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# name: (lengths of the frames, channels, options). A kernel's block edges are multiples of 3, 4, 6, 8, 16 and 64.
CASES: dict[str, tuple[list[int], int, dict[str, Any]]] = {
    "one_token": ([1, 1, 1], 16, {}),
    "edge_plus_one": ([65, 65], 33, {}),
    "odd": ([17, 17, 17], 19, {"keep": 5}),
    "all_kept": ([12, 12], 24, {"keep": 40}),
    "one_kept": ([31, 31], 24, {"keep": 1, "fuse_threshold": -1.0}),
    "keep": ([64, 64], 96, {"keep": 49}),
    "threshold": ([64, 64, 64], 32, {}),
    "capacity": ([40, 40], 32, {"capacity": 12}),
    "capacity_spare": ([10, 10], 8, {"capacity": 16}),
    "min_keep": ([30, 30], 8, {"threshold": 1e9, "min_keep": 4}),
    "plain_score": ([50, 50], 40, {"standardize": False, "threshold": 1.0}),
    "temperature": ([50, 50], 40, {"temperature": 0.3, "threshold": 0.5}),
    "nothing_fused": ([30, 30], 16, {"fuse_threshold": 1.1}),
    "skewed": ([1, 130, 0, 7, 64], 20, {}),
    "many_frames": ([5, 0, 33, 1, 64, 12, 7, 20, 3, 40, 9, 2, 31], 20, {}),
    "skewed_keep": ([1, 70, 0, 7], 20, {"keep": 6}),
    "skewed_capacity": ([3, 70, 0, 7], 20, {"keep": 6, "capacity": 9}),
    "empty_frames": ([0, 0], 8, {}),
    "no_frames": ([], 8, {}),
    "alpha_zero": ([20, 20], 8, {"fuse_alpha": 0.0, "keep": 6}),
}


def naive(
    x: Tensor,
    lengths: list[int],
    guide: Tensor,
    weight: Tensor,
    *,
    temperature: float = 1.0,
    standardize: bool = True,
    threshold: float = 0.3,
    keep: int | None = None,
    capacity: int | None = None,
    min_keep: int = 1,
    fuse_threshold: float = 0.6,
    fuse_alpha: float = 0.9,
) -> dict[str, Any]:
    """Compute the compression frame by frame and token by token; gradients are autograd's."""
    tokens, gates, index, cu, scores = [], [], [], [0], []
    relevance = torch.zeros(len(x), dtype=x.dtype)
    assignment = torch.full((len(x),), -1, dtype=torch.int32)
    start = 0
    for b, rows in enumerate(lengths):
        frame = [x[start + n] for n in range(rows)]
        kept: list[int] = []
        if rows:
            m = weight * guide[b] + (1 - weight) * sum(frame) / rows
            norm = [t.norm().clamp(min=1e-6) for t in frame]
            s = torch.stack([(m @ t) / (m.norm().clamp(min=1e-6) * n) for t, n in zip(frame, norm, strict=True)])
            plain = s.detach()
            scores += plain.tolist()
            if standardize:
                plain = (plain - plain.mean()) / plain.std(correction=0).clamp(min=1e-3)
            r = rows * torch.softmax(plain / temperature, 0)
            relevance[start : start + rows] = r
            ranked = sorted(range(rows), key=lambda n: (-s[n].item(), n))
            count = keep if keep is not None else max(min_keep, int((r >= threshold).sum()))
            kept = sorted(ranked[: min(count, rows, capacity or rows)])
            received: dict[int, list[tuple[Tensor, Tensor]]] = {}
            for i in set(range(rows)) - set(kept):
                cosine = [(frame[i] @ frame[j]) / (norm[i] * norm[j]) for j in kept]
                best = max(range(len(kept)), key=lambda k: (cosine[k].item(), -k))
                if cosine[best].item() >= fuse_threshold:
                    received.setdefault(best, []).append((cosine[best].exp(), frame[i]))
                    assignment[start + i] = cu[-1] + best
            for k, j in enumerate(kept):
                y = frame[j]
                if k in received:
                    total = sum(w for w, _ in received[k])
                    y = fuse_alpha * y + (1 - fuse_alpha) * sum(w * t for w, t in received[k]) / total
                tokens.append(y)
                gates.append(1 + s[j] - s[j].detach())
                index.append(start + j)
                assignment[start + j] = cu[-1] + k
        cu.append(cu[-1] + len(kept))
        start += rows
    return {
        "tokens": torch.stack(tokens) if tokens else x.new_zeros(0, x.shape[1]),
        "gate": torch.stack(gates) if gates else x.new_zeros(0),
        "index": torch.tensor(index, dtype=torch.int64),
        "cu_seqlens": torch.tensor(cu, dtype=torch.int32),
        "relevance": relevance,
        "assignment": assignment,
        "score": torch.tensor(scores, dtype=torch.float64),
    }


class Inputs:
    """Inputs of a case, rounded to a type once and then held in another, with fixed incoming gradients."""

    def __init__(self, lengths: list[int], channels: int, rounded: torch.dtype, held: torch.dtype, device: str) -> None:
        rows, wide = sum(lengths), torch.float64 if held == torch.float64 else torch.float32
        self.x = testing.tokens(rows, channels, seed=3, dtype=rounded, device=device).to(held).requires_grad_()
        guide = testing.randn(len(lengths), channels, seed=4, dtype=torch.float32, device=device)
        self.guide = guide.to(wide).requires_grad_()
        self.weight = torch.tensor(0.375, dtype=wide, device=device, requires_grad=True)
        self.cu = testing.offsets(lengths, device)
        self.rounded = rounded

    def gradients(self, tokens: Tensor, gate: Tensor, valid: int) -> tuple[Tensor, ...]:
        grad = testing.randn(valid, tokens.shape[1], seed=8, dtype=self.rounded).to(tokens)
        grad_gate = testing.randn(valid, seed=9, dtype=self.rounded).to(gate)
        grads = torch.autograd.grad(
            (tokens[:valid], gate[:valid]), (self.x, self.guide, self.weight), (grad, grad_gate)
        )
        return grads


def run(
    case: str, backend: str, device: str, rounded: torch.dtype, held: torch.dtype, dense: bool = False
) -> tuple[Any, tuple[Tensor, ...], Inputs]:
    lengths, channels, options = CASES[case]
    inputs = Inputs(lengths, channels, rounded, held, device)
    if dense:
        x: Tensor = inputs.x.view(len(lengths), lengths[0] if lengths else 0, channels)
        out = vsc_compress(x, None, inputs.guide, inputs.weight, backend=backend, **options)
    else:
        out = vsc_compress(inputs.x, inputs.cu, inputs.guide, inputs.weight, backend=backend, **options)
    return out, inputs.gradients(out.tokens, out.gate, int(out.cu_seqlens[-1])), inputs


def need(backend: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    testing.need(OP, backend, device, dtype)


# Frames of unequal length are packed only.
LAYOUTS = [
    pytest.param(name, dense, id=f"{name}-{'dense' if dense else 'packed'}")
    for name, (lengths, _, _) in CASES.items()
    for dense in (False, True)
    if not dense or len(set(lengths)) <= 1
]


def assert_same_rows(out: Any, exact: Any, score: Tensor, eps: float) -> bool:
    """Assert equal partitions; where they differ, two scores must be closer than rounding. Returns equality."""
    valid = int(exact.cu_seqlens[-1])
    if out.index.shape == exact.index.shape and torch.equal(out.index, exact.index):
        return torch.equal(out.assignment, exact.assignment)
    ours, theirs = set(out.index.tolist()), set(exact.index[:valid].tolist())
    differ = sorted(ours ^ theirs)
    near = [(score - score[n]).abs().sort().values[1].item() for n in differ if n >= 0]
    assert max(near, default=1.0) < 32 * eps, f"rows {differ} differ though their scores are apart by {near}"
    return False


@pytest.mark.parametrize(("case", "dense"), LAYOUTS)
def test_reference_equals_naive_loop(case: str, dense: bool) -> None:
    lengths, _, options = CASES[case]
    out, grads, inputs = run(case, "reference", "cpu", torch.float64, torch.float64, dense)
    expected = naive(inputs.x, lengths, inputs.guide, inputs.weight, **options)
    valid = int(expected["cu_seqlens"][-1])
    for name in ("cu_seqlens", "assignment"):
        assert torch.equal(getattr(out, name), expected[name]), name
    assert torch.equal(out.index[:valid], expected["index"])
    for name in ("tokens", "gate"):
        torch.testing.assert_close(getattr(out, name)[:valid], expected[name], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.relevance, expected["relevance"], rtol=1e-11, atol=1e-12)
    assert bool((out.index[valid:] == -1).all())
    assert not out.tokens[valid:].any()
    assert not out.gate[valid:].any()
    assert bool((out.gate[:valid] == 1).all())
    if options.get("capacity"):
        assert len(out.tokens) == len(lengths) * options["capacity"]
    for actual, wanted in zip(
        grads, inputs.gradients(expected["tokens"], expected["gate"], valid) if valid else grads, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


# The interpreter takes seconds where a kernel takes microseconds: of the types that it runs like float32, a few.
INTERPRETED = ("one_token", "odd", "threshold", "skewed_capacity", "no_frames")
BUDGETED = [
    pytest.param(*place, *layout.values, dtype, id="-".join([*place, layout.id, str(dtype)[6:]]))
    for place in PLACES
    for layout in LAYOUTS
    for dtype in DTYPES
    if place != ("triton", "cpu") or dtype == torch.float32 or layout.values[0] in INTERPRETED
]


@pytest.mark.parametrize(("backend", "device", "case", "dense", "dtype"), BUDGETED)
def test_kernel_keeps_the_error_budget(backend: str, device: str, case: str, dense: bool, dtype: torch.dtype) -> None:
    need(backend, device, dtype)
    lengths, _, options = CASES[case]
    with testing.poisoned_memory():
        out, grads, _ = run(case, backend, device, dtype, dtype, dense)
    low, low_grads, _ = run(case, "reference", device, dtype, dtype, dense)
    exact, exact_grads, held = run(case, "reference", device, dtype, torch.float64, dense)
    score = naive(held.x.detach().cpu(), lengths, held.guide.detach().cpu(), held.weight.detach().cpu(), **options)[
        "score"
    ]
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name, actual, wanted in zip(out._fields, out, low, strict=True):
        assert actual.dtype == wanted.dtype, name
        assert name in ("tokens", "gate", "index") or actual.shape == wanted.shape, name
    if not assert_same_rows(out, exact, score, eps) or not torch.equal(low.assignment, exact.assignment):
        return
    slack = 16.0 if dtype == torch.float64 else 1.0  # in float64 the exact side rounds as the kernel does
    testing.assert_within_budget(out.tokens, low.tokens, exact.tokens, "tokens", slack)
    testing.assert_within_budget(out.relevance, low.relevance, exact.relevance, "relevance", 16.0)
    assert torch.equal(out.gate, low.gate)
    for name, actual, rounded, wanted in zip(("x", "guide"), grads, low_grads, exact_grads, strict=False):
        testing.assert_within_budget(actual, rounded, wanted, f"gradient of {name}", 4 * slack)
    # λ's gradient is one number, a sum over channels and frames that nearly cancels: its terms give the scale.
    scale = (exact_grads[1].abs().sum() * 8 + 1e-12).item()
    testing.assert_within_budget(grads[2], low_grads[2], exact_grads[2], "gradient of λ", 4 * slack, scale)


@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place != ("triton", "cpu")])
@pytest.mark.parametrize("lengths", [[4096], [1, 2000]], ids=str)
def test_the_largest_frames_and_widest_rows(backend: str, device: str, lengths: list[int]) -> None:
    need(backend, device)
    sides = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        inputs = Inputs(lengths, 1024, torch.float32, dtype, device)
        out = vsc_compress(
            inputs.x, inputs.cu, inputs.guide, inputs.weight, keep=1500, fuse_threshold=0.3, backend=name
        )
        sides.append((inputs.x.detach(), out, inputs.gradients(out.tokens, out.gate, len(out.tokens))))
    (_, out, grads), (x, exact, exact_grads) = sides
    assert torch.equal(out.cu_seqlens, exact.cu_seqlens)
    assert torch.equal(out.index, exact.index)
    # Among millions of pairs some cosines lie within a rounding of each other: there, either target is right.
    differ = (out.assignment != exact.assignment).nonzero().flatten()
    assert len(differ) < 0.005 * len(x)
    unit = x / x.norm(dim=1, keepdim=True)
    for i in differ.tolist():
        cosines = [unit[i] @ unit[exact.index[int(o.assignment[i])]] for o in (out, exact)]
        assert abs(cosines[0] - cosines[1]) < 1e-6
    touched = torch.cat((out.assignment[differ], exact.assignment[differ])).long().unique()
    rows = torch.ones(len(exact.index), dtype=torch.bool, device=device).index_fill(0, touched, False)
    torch.testing.assert_close(out.tokens[rows], exact.tokens[rows].float(), rtol=1e-5, atol=1e-5)
    # What a fusion gives back goes to all of its tokens.
    others = ~torch.isin(exact.assignment, touched.to(torch.int32)) & ~torch.isin(
        out.assignment, touched.to(torch.int32)
    )
    close = torch.isclose(grads[0][others], exact_grads[0][others].float(), rtol=1e-3, atol=1e-4).all(1)
    assert close.all()
    if not len(differ):
        for actual, wanted in zip(grads[1:], exact_grads[1:], strict=True):
            torch.testing.assert_close(actual, wanted.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_gate_gradient_is_the_scores_gradient(backend: str, device: str) -> None:
    need(backend, device)
    dtype = torch.float64 if backends.why_not(OP, backend, device, torch.float64) is None else torch.float32
    x = testing.tokens(40, 12, seed=5, dtype=dtype, device=device).view(2, 20, 12).requires_grad_()
    guide = testing.randn(2, 12, seed=6, dtype=dtype, device=device).requires_grad_()
    weight = torch.tensor(0.3, dtype=dtype, device=device, requires_grad=True)
    out = vsc_compress(x, None, guide, weight, keep=7, backend=backend)
    incoming = testing.randn(14, seed=7, dtype=dtype, device=device)
    actual = torch.autograd.grad(out.gate, (x, guide, weight), incoming)
    m = weight * guide + (1 - weight) * x.mean(1)
    score = torch.nn.functional.cosine_similarity(m[:, None], x, dim=-1).view(-1)
    wanted = torch.autograd.grad((score[out.index] * incoming).sum(), (x, guide, weight))
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_guide_learns_through_the_gate_alone(backend: str, device: str) -> None:
    need(backend, device)
    x = testing.tokens(40, 12, seed=5, device=device).view(2, 20, 12).requires_grad_()
    guide = testing.randn(2, 12, seed=6, device=device).requires_grad_()
    out = vsc_compress(x, None, guide, keep=7, backend=backend)
    (silent,) = torch.autograd.grad(out.tokens.sum(), guide, retain_graph=True, allow_unused=True)
    assert silent is None or not silent.any()
    (heard,) = torch.autograd.grad(out.gate.square().sum(), guide)
    assert heard.abs().max() > 1e-3


@pytest.mark.parametrize(("backend", "device"), [p for p in [*REFERENCES, *PLACES] if p[0] != "triton"])
@pytest.mark.parametrize("options", [{"keep": 4}, {"fuse_threshold": -1.0}, {"capacity": 5}], ids=str)
def test_gradcheck_away_from_ties(backend: str, device: str, options: dict[str, Any]) -> None:
    need(backend, device, torch.float64)
    x = testing.tokens(18, 5, seed=11, dtype=torch.float64, device=device).view(2, 9, 5).requires_grad_()
    guide = testing.randn(2, 5, seed=12, dtype=torch.float64, device=device)

    def tokens(x: Tensor) -> Tensor:
        return vsc_compress(x, None, guide, backend=backend, **options).tokens

    assert torch.autograd.gradcheck(tokens, (x,))


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_ties_go_to_the_lower_row(backend: str, device: str) -> None:
    need(backend, device)
    row = testing.randn(1, 8, seed=1, device=device)
    x = torch.cat([row, row, -row, row, row])  # four equal tokens and one that lies opposite
    out = vsc_compress(x, testing.offsets([5], device), row, keep=2, backend=backend)
    assert out.index.tolist() == [0, 1]
    assert out.assignment.tolist() == [0, 1, -1, 0, 0]


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_equal_tokens_are_all_as_relevant_as_the_mean(backend: str, device: str) -> None:
    """Their relevance is 1, exactly: as a threshold it keeps them all, as of a black frame."""
    need(backend, device)
    for tokens in (41, 47, 61, 64):
        x, guide = (torch.ones(1, *size, 8, device=device) for size in ((tokens,), ()))
        out = vsc_compress(x, None, guide, threshold=1.0, backend=backend)
        assert out.index.tolist() == list(range(tokens))


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_zero_tokens_stay_finite(backend: str, device: str) -> None:
    need(backend, device)
    x = torch.zeros(2, 6, 8, device=device, requires_grad=True)
    guide = torch.zeros(2, 8, device=device, requires_grad=True)
    out = vsc_compress(x, None, guide, keep=3, fuse_threshold=-1.0, backend=backend)
    grads = torch.autograd.grad(out.tokens.sum() + out.gate.sum(), (x, guide))
    assert out.index.tolist() == [0, 1, 2, 6, 7, 8]
    assert all(bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_a_score_that_is_not_finite_shows_in_the_gate(backend: str, device: str, dtype: torch.dtype) -> None:
    """That of a frame with a bad guide, or all of them with a bad λ; the others stay exactly 1."""
    need(backend, device, dtype)
    x = testing.randn(4, 12, 8, seed=1, dtype=dtype, device=device)
    guide = testing.randn(4, 8, seed=2, device=device)
    guide[1, 3], guide[2, 5] = torch.nan, torch.inf
    for weight, gates in ((0.5, [1, torch.nan, torch.nan, 1]), (torch.tensor(torch.nan), [torch.nan] * 4)):
        out = vsc_compress(x, None, guide, weight, keep=5, capacity=6, backend=backend)
        expected = torch.tensor(gates, dtype=dtype, device=device).repeat_interleave(5)
        torch.testing.assert_close(
            out.gate, torch.cat([expected, expected.new_zeros(4)]), rtol=0, atol=0, equal_nan=True
        )
        exact = vsc_compress(x.double(), None, guide.double(), weight, keep=5, capacity=6, backend="reference")
        assert torch.equal(out.index, exact.index)


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_rows_past_the_last_offset_are_ignored(backend: str, device: str) -> None:
    need(backend, device)
    x = testing.tokens(30, 8, seed=2, device=device)
    x[20:] = torch.nan
    x.requires_grad_()
    guide, cu = testing.randn(2, 8, seed=3, device=device), testing.offsets([12, 8], device)
    out = vsc_compress(x, cu, guide, capacity=6, backend=backend)
    (grad,) = torch.autograd.grad(out.tokens.sum() + out.gate.sum(), x)
    alone = vsc_compress(x.detach()[:20], cu, guide, capacity=6, backend=backend)
    assert torch.equal(out.tokens, alone.tokens)
    assert bool((out.assignment[20:] == -1).all())
    assert not grad[20:].any()
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_strided_input_gives_the_same(backend: str, device: str) -> None:
    need(backend, device)
    base = testing.tokens(48, 16, seed=2, device=device).view(2, 24, 16)
    guide = testing.randn(2, 16, seed=3, device=device)
    strided = base.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    plain = base.clone().requires_grad_()
    outs = [vsc_compress(x, None, guide.t().contiguous().t(), keep=9, backend=backend) for x in (strided, plain)]
    grads = [
        torch.autograd.grad(o.tokens.sum() + (o.gate * o.gate).sum(), x)[0]
        for o, x in zip(outs, (strided, plain), strict=True)
    ]
    assert torch.equal(outs[0].index, outs[1].index)
    # Only a kernel promises the bits: a sum of torch's own may take another order for other strides.
    tolerance = 1e-5 if backend == "reference" else 0.0
    torch.testing.assert_close(outs[0].tokens, outs[1].tokens, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
@pytest.mark.parametrize("case", ["keep", "skewed", "many_frames"])
def test_two_runs_and_any_thread_count_give_the_same_bits(backend: str, device: str, case: str) -> None:
    need(backend, device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            out, grads, _ = run(case, backend, device, torch.float32, torch.float32)
            results.append([t.detach().clone() for t in (*out, *grads)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    channels=st.integers(1, 40),
    keep=st.none() | st.integers(1, 20),
    capacity=st.none() | st.integers(20, 50),
    fuse_threshold=st.sampled_from([-1.0, 0.3, 0.6, 2.0]),
    seed=st.integers(0, 10_000),
)
def test_properties(
    lengths: list[int],
    channels: int,
    keep: int | None,
    capacity: int | None,
    fuse_threshold: float,
    seed: int,
) -> None:
    for backend, device in (*REFERENCES, *PLACES):
        if backends.why_not(OP, backend, device, torch.float32) is not None:
            continue
        x = testing.tokens(sum(lengths), channels, seed=seed, device=device)
        guide = testing.randn(len(lengths), channels, seed=seed + 3, device=device)
        cu = testing.offsets(lengths, device)
        out = vsc_compress(x, cu, guide, keep=keep, capacity=capacity, fuse_threshold=fuse_threshold, backend=backend)
        valid = int(out.cu_seqlens[-1])
        counts = out.cu_seqlens.diff().tolist()
        for n, count in zip(lengths, counts, strict=True):
            assert count == min(n, keep) if keep else min(n, 1) <= count <= min(n, capacity or n)
        for b in range(len(lengths)):
            rows = out.index[out.cu_seqlens[b] : out.cu_seqlens[b + 1]]
            assert bool((rows.diff() > 0).all())
            assert bool(((rows >= cu[b]) & (rows < cu[b + 1])).all())
            relevance = out.relevance[cu[b] : cu[b + 1]]
            if lengths[b]:
                assert abs(relevance.mean().item() - 1) < 1e-4
                dropped = torch.ones(lengths[b], dtype=torch.bool, device=device)
                dropped[rows - cu[b]] = False
                if dropped.any():
                    assert relevance[dropped].max() <= relevance[~dropped].min() * (1 + 1e-5)
        assert torch.equal(out.assignment[out.index[:valid]], torch.arange(valid, dtype=torch.int32, device=device))
        received = torch.bincount(out.assignment[out.assignment >= 0].long(), minlength=valid)
        alone = received == 1
        assert torch.equal(out.tokens[:valid][alone], x[out.index[:valid]][alone])
        assert bool((out.gate[:valid] == 1).all())


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *(("dense_keep", dtype) for dtype in DTYPES),
        *(
            (form, torch.float32)
            for form in ("packed_threshold", "packed_capacity", "no_frames", "permuted", "no_gate")
        ),
        ("permuted", torch.bfloat16),
    ],
    ids=str,
)
def test_opcheck(backend: str, device: str, dtype: torch.dtype, form: str) -> None:
    need(backend, device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frames = 0 if form == "no_frames" else 2
    x = testing.tokens(frames * 9, 8, seed=1, dtype=dtype, device=device)
    cu = testing.offsets([9] * frames, device)
    if form in ("dense_keep", "permuted"):
        x, cu = x.view(frames, 9, 8), None
    if form == "permuted":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    guide = testing.randn(frames, 8, seed=2, dtype=wide, device=device)
    weight = torch.tensor(0.5, dtype=wide, device=device)
    keep = 4 if cu is None else None
    capacity = 5 if form == "packed_capacity" else None
    args = (
        x.requires_grad_(),
        cu,
        guide.requires_grad_(),
        weight.requires_grad_(),
        1.0,
        True,
        0.3,
        keep,
        capacity,
        1,
        0.2,
        0.9,
    )
    forward = getattr(torch.ops.deepmsi, f"vsc_compress_{backend}_fwd").default
    torch.library.opcheck(forward, args)
    with torch.no_grad():
        tokens, cu_out, index, gate, _, assignment, state, mean = forward(*args)
    backward = getattr(torch.ops.deepmsi, f"vsc_compress_{backend}_bwd").default
    grad_gate = None if form == "no_gate" else torch.ones_like(gate)
    saved = [t.detach() if t is not None else None for t in (x, cu, guide, weight)]
    torch.library.opcheck(
        backward, (torch.ones_like(tokens), grad_gate, *saved, cu_out, index, assignment, state, mean, 0.9)
    )


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
@pytest.mark.parametrize("mode", ["keep", "capacity", "threshold"])
def test_compiles_whole_at_two_sizes(backend: str, device: str, mode: str) -> None:
    need(backend, device)
    if backend == "reference" and mode != "keep":
        pytest.skip("the reference reads the longest frame on the host")
    options: dict[str, Any] = {"keep": {"keep": 5}, "capacity": {"capacity": 6}, "threshold": {}}[mode]
    torch._dynamo.reset()

    def loss(x: Tensor, cu: Tensor | None, guide: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out = vsc_compress(x, cu, guide, weight, backend=backend, **options)
        return out.tokens.square().sum() + (out.gate * out.tokens[:, 0]).sum(), out.index

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True, capture_dynamic_output_shape_ops=True):
        for frames, rows in ((2, 11), (3, 14)):
            x = testing.tokens(frames * rows, 8, seed=rows, device=device)
            cu = testing.offsets([rows] * frames, device)
            if mode == "keep":
                x, cu = x.view(frames, rows, 8), None
            x.requires_grad_()
            guide = testing.randn(frames, 8, seed=1, device=device).requires_grad_()
            weight = torch.tensor(0.4, device=device, requires_grad=True)
            results = []
            for function in (compiled, loss):
                value, index = function(x, cu, guide, weight)
                results.append((value, index, *torch.autograd.grad(value, (x, guide, weight))))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_autocast_casts_tokens_and_leaves_guide_and_weight(backend: str, device: str) -> None:
    need(backend, device, torch.bfloat16)
    x = testing.tokens(24, 8, seed=1, device=device).view(2, 12, 8).requires_grad_()
    guide = testing.randn(2, 8, seed=2, device=device).requires_grad_()
    weight = torch.tensor(0.25, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = vsc_compress(x, None, guide, weight, keep=5, backend=backend)
    assert out.tokens.dtype == out.gate.dtype == torch.bfloat16
    assert out.relevance.dtype == torch.float32
    direct = vsc_compress(x.bfloat16(), None, guide, weight, keep=5, backend=backend)
    assert torch.equal(out.tokens, direct.tokens)
    grads = torch.autograd.grad(out.tokens.sum() + out.gate.sum(), (x, guide, weight))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(6, 4)}, r"x must be \[B, N, C\]"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "x must be float16"),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, "x must be packed"),
        ({"x": torch.zeros(6, 4), "cu_seqlens": torch.tensor([0, 3, 6])}, r"cu_seqlens must be \[B \+ 1\] int32"),
        ({"guide": torch.zeros(2, 5)}, r"guide must be \[B, C\] = \[2, 4\]"),
        ({"guide_weight": 1.5}, r"guide_weight must lie in \[0, 1\]"),
        ({"guide_weight": torch.zeros(1)}, "guide_weight must be 0-dim"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"threshold": float("nan")}, "threshold and fuse_threshold must be numbers"),
        ({"fuse_threshold": float("nan")}, "threshold and fuse_threshold must be numbers"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"min_keep": 0}, "min_keep must be at least 1"),
        ({"keep": 5, "capacity": 4}, "capacity 4 is below keep 5"),
        ({"fuse_alpha": 2.0}, r"fuse_alpha must lie in \[0, 1\]"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_arguments_get_a_sentence(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 4), "cu_seqlens": None, "guide": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=sentence):
        vsc_compress(**{**arguments, **change})


def test_offsets_outside_the_rows_are_refused_by_the_kernel() -> None:
    need("cpp", "cpu")
    for cu in ([0, 4, 9], [1, 4, 6], [0, 5, 4]):
        with pytest.raises(RuntimeError, match="cu_seqlens must"):
            vsc_compress(torch.zeros(6, 4), torch.tensor(cu, dtype=torch.int32), torch.zeros(2, 4), backend="cpp")


_PROBE = """
import sys, torch
from deepmsi import testing, _host
from deepmsi.ops import vsc_compress
assert _host.instruction_set() == sys.argv[1], _host.instruction_set()
x = testing.tokens(260, 50, seed=1).view(2, 130, 50).requires_grad_()
guide = testing.randn(2, 50, seed=2).requires_grad_()
results = []
for backend in ("cpp", "reference"):
    out = vsc_compress(x, None, guide, keep=90, backend=backend)
    results.append((*out, *torch.autograd.grad((out.tokens * out.gate[:, None]).square().sum(), (x, guide))))
for a, b in zip(*results, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

# Equal rows tie in every place, in whole tiles and in what is left of them.
for rows, channels in ((7, 200), (9, 7), (147, 3), (66, 100)):
    x = testing.randn(1, channels, seed=rows).expand(rows, channels)
    out = vsc_compress(x, testing.offsets([rows]), testing.randn(1, channels, seed=3), keep=2, backend="cpp")
    assert out.index.tolist() == [0, 1], (rows, channels)
    assert (out.relevance == out.relevance[0]).all(), (rows, channels)
"""


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_that_this_cpu_runs(isa: str) -> None:
    need("cpp", "cpu")
    run_in_instruction_set(isa, _PROBE)
