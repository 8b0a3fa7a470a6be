"""cross_modal_contrastive: against SPEC 6 in loops, gradients, cases of exactly zero, overflow, slices, masks."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from deepmsi.ops import cross_modal_contrastive
from deepmsi.testing import randn

LABELS = [0, 1, 0, 2, 1, 0, 0, 3]


def naive(
    a: Tensor,
    b: Tensor,
    labels: list[int],
    temperature: float = 0.5,
    include_matched: bool = False,
    normalize: str = "batch",
    valid: list[bool] | None = None,
) -> Tensor:
    """Eq. 5 row by row, with its exponentials and its logarithm as they are printed."""
    rows = [i for i in range(len(labels)) if valid is None or valid[i]]
    total = a.new_zeros(())
    if len(rows) < 2:
        return total
    s = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T / temperature
    for i in rows:
        positives = [j for j in rows if labels[j] == labels[i] and (include_matched or j != i)]
        z = sum((s[i, k].exp() for k in rows if labels[k] != labels[i]), a.new_zeros(()))
        terms = [-(s[i, j].exp() / (s[i, j].exp() + z)).log() for j in positives]
        if terms:
            share = len(rows) - 1 if normalize == "batch" else len(terms)
            total = total + torch.stack(terms).sum() / share
    return total / len(rows)


def features(count: int = 3, rows: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [randn(rows, 5, seed=seed, dtype=dtype) for seed in range(count)]


@pytest.mark.parametrize("temperature", [0.5, 0.07, 3.0])
@pytest.mark.parametrize("include_matched", [False, True], ids=["", "matched"])
@pytest.mark.parametrize("normalize", ["batch", "positives"])
def test_equals_the_equation(temperature: float, include_matched: bool, normalize: str) -> None:
    a, b, c = features()
    options = {"temperature": temperature, "include_matched": include_matched, "normalize": normalize}
    got = cross_modal_contrastive(a, b, torch.tensor(LABELS), **options)
    torch.testing.assert_close(got, naive(a, b, LABELS, **options), rtol=1e-12, atol=1e-14)
    pair = cross_modal_contrastive(a, (b, c), torch.tensor(LABELS), **options)
    both = (naive(a, b, LABELS, **options) + naive(a, c, LABELS, **options)) / 2
    torch.testing.assert_close(pair, both, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", ["batch", "positives"])
def test_absent_rows_take_no_part(normalize: str) -> None:
    a, b, c = features()
    has_a = [True, True, False, True, True, True, True, False]
    has_b = [True, False, True, True, True, True, True, True]
    has_c = [False] * 7 + [True]
    got = cross_modal_contrastive(
        a,
        (b, c),
        torch.tensor(LABELS),
        valid_a=torch.tensor(has_a),
        valid_b=(torch.tensor(has_b), torch.tensor(has_c)),
        normalize=normalize,
    )
    both = [one and other for one, other in zip(has_a, has_b, strict=True)]
    # The second pair has no row with both sides, and gives 0.
    torch.testing.assert_close(got, naive(a, b, LABELS, valid=both, normalize=normalize) / 2)


def test_what_an_absent_row_holds_does_not_matter() -> None:
    a, b, _ = features()
    valid = torch.tensor([True] * 6 + [False] * 2)
    expected = cross_modal_contrastive(a[:6], b[:6], torch.tensor(LABELS[:6]))
    a[6:], b[7] = torch.nan, torch.inf
    a.requires_grad_()
    b.requires_grad_()
    got = cross_modal_contrastive(a, b, torch.tensor(LABELS), valid_a=valid)
    torch.testing.assert_close(got, expected)
    got.backward()
    for x in (a, b):
        assert torch.isfinite(x.grad).all()
        assert (x.grad[6:] == 0).all()


@pytest.mark.parametrize("include_matched", [False, True], ids=["", "matched"])
def test_gradients(include_matched: bool) -> None:
    inputs = [x.requires_grad_() for x in features()]
    valid = torch.tensor([True] * 7 + [False])

    def run(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return cross_modal_contrastive(
            a,
            (b, c),
            torch.tensor(LABELS),
            valid_b=(valid, None),
            include_matched=include_matched,
            normalize="positives" if include_matched else "batch",
        )

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    "labels", [[4], [1, 1, 1], [0, 1, 2], []], ids=["one row", "one class", "no positive", "no row"]
)
def test_exactly_zero_with_zero_gradients(labels: list[int]) -> None:
    a, b = (randn(len(labels), 5, seed=s).requires_grad_() for s in (1, 2))
    loss = cross_modal_contrastive(a, b, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert (a.grad == 0).all()
    assert (b.grad == 0).all()


def test_no_overflow_at_any_temperature() -> None:
    a, b, _ = features(dtype=torch.float32)
    a, b = a.requires_grad_(), b.requires_grad_()
    loss = cross_modal_contrastive(a, b, torch.tensor(LABELS), temperature=1e-4)
    loss.backward()
    exact = cross_modal_contrastive(a.double(), b.double(), torch.tensor(LABELS), temperature=1e-4)
    # Scores of 10^4 overflow an exponential; the loss is their differences.
    assert math.isclose(loss.item(), exact.item(), rel_tol=1e-4)
    assert loss.item() > 1000
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()


def test_opposite_pairs_have_an_exact_tail() -> None:
    # Positives at +1/τ against negatives at -1/τ: softplus(-x) is e^-x there, far below the rounding of 1 + e^-x.
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    got = cross_modal_contrastive(a, a, torch.tensor([0, 0, 1, 1]), temperature=0.05)
    exact = math.log1p(math.exp(math.log(2) - 40)) / 3
    assert math.isclose(got.item(), exact, rel_tol=1e-12)


@pytest.mark.parametrize("normalize", ["batch", "positives"])
def test_parts_of_slices_add_up(normalize: str) -> None:
    a, b, c = features()
    labels = torch.tensor(LABELS)
    has_a = torch.tensor([True] * 3 + [False] + [True] * 4)
    has_b = torch.tensor([True, False] + [True] * 6)
    options = {"normalize": normalize, "include_matched": True}
    whole = cross_modal_contrastive(a, (b, c), labels, valid_a=has_a, valid_b=(has_b, None), **options)
    edges = [0, 3, 5, 8]
    parts = [
        cross_modal_contrastive(
            a[start:stop],
            (b, c),
            labels[start:stop],
            labels_b=labels,
            row_offset=start,
            valid_a=mask[start:stop] if sliced else mask,
            valid_b=(has_b & has_a, has_a) if sliced else (has_b, None),
            **options,
        )
        for sliced, mask in [(False, has_a), (True, has_a)]
        for start, stop in pairwise(edges)
    ]
    torch.testing.assert_close(sum(parts[:3]), whole)
    torch.testing.assert_close(sum(parts[3:]), whole)


def test_autocast_computes_in_float32() -> None:
    a, b, _ = features(dtype=torch.float32)
    labels = torch.tensor(LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cross_modal_contrastive(a, b, labels)
        low = cross_modal_contrastive(a.bfloat16(), b.bfloat16(), labels)
    assert inside.dtype == low.dtype == torch.float32
    assert torch.equal(inside, cross_modal_contrastive(a, b, labels))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_whole_and_for_changing_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(cross_modal_contrastive, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 8):
        a, b, c = (x[:rows] for x in features(dtype=torch.float32))
        labels = torch.tensor(LABELS[:rows])
        one, other = a.clone().requires_grad_(), a.clone().requires_grad_()
        out, exact = compiled(one, (b, c), labels), cross_modal_contrastive(other, (b, c), labels)
        torch.testing.assert_close(out, exact)
        out.backward()
        exact.backward()
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"normalize": "rows"}, "normalize must be"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be"),
        ({"labels": torch.zeros(8)}, "labels must be integers"),
        ({"row_offset": 1}, "needs labels_b"),
        ({"valid_a": torch.ones(8)}, "valid_a must be"),
        ({"b": torch.zeros(8, 4)}, "b must be"),
        ({"b": (torch.zeros(8, 5),) * 2, "valid_b": torch.ones(8, dtype=torch.bool)}, "give one for each"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_told(change: dict[str, object], words: str) -> None:
    arguments = {"a": torch.ones(8, 5), "b": torch.ones(8, 5), "labels": torch.tensor(LABELS), **change}
    with pytest.raises(ValueError, match=words):
        cross_modal_contrastive(**arguments)
