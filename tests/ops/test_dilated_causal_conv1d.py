"""dilated_causal_conv1d: against Eq. 4 in loops, gradients, types, compilation."""

import pytest
import torch
from torch import Tensor

from deepmsi.ops import dilated_causal_conv1d
from deepmsi.testing import assert_within_budget, randn


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


@pytest.mark.parametrize("steps", [1, 2, 15])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (3, 4), (2, 7)])
def test_equals_the_equation(steps: int, taps: int, dilation: int) -> None:
    x = randn(2, 3, steps, seed=1, dtype=torch.float64)
    weight, bias = randn(4, 3, taps, seed=2, dtype=torch.float64), randn(4, seed=3, dtype=torch.float64)
    torch.testing.assert_close(dilated_causal_conv1d(x, weight, bias, dilation), naive(x, weight, bias, dilation))
    without = naive(x, weight, torch.zeros_like(bias), dilation)
    torch.testing.assert_close(dilated_causal_conv1d(x, weight, dilation=dilation), without)


def test_gradients() -> None:
    x = randn(2, 3, 6, seed=1, dtype=torch.float64).requires_grad_()
    weight = randn(4, 3, 3, seed=2, dtype=torch.float64).requires_grad_()
    bias = randn(4, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: dilated_causal_conv1d(*a, 2), (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_keeps_the_budget(dtype: torch.dtype) -> None:
    x, weight, bias = randn(2, 8, 9, seed=1, dtype=dtype), randn(8, 8, 3, seed=2, dtype=dtype), None
    got = dilated_causal_conv1d(x, weight, bias, 2)
    low = dilated_causal_conv1d(x, weight, bias, 2, backend="reference")
    assert_within_budget(got, low, dilated_causal_conv1d(x.double(), weight.double(), bias, 2))


def test_autocast_takes_x_and_weights() -> None:
    x, weight, bias = randn(1, 3, 5, seed=1), randn(4, 3, 3, seed=2).requires_grad_(), randn(4, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        y = dilated_causal_conv1d(x, weight, bias, 1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, dilated_causal_conv1d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 1))
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_whole_and_for_changing_sizes() -> None:
    weight, bias = randn(4, 3, 3, seed=2), randn(4, seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(dilated_causal_conv1d, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (7, 15):
        x = randn(2, 3, steps, seed=steps)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, exact = compiled(one, weight, bias, 2), dilated_causal_conv1d(other, weight, bias, 2)
        torch.testing.assert_close(out, exact)
        out.square().sum().backward()
        exact.square().sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "dilation", "words"),
    [
        ((2, 3), (4, 3, 3), None, 1, r"x must be \[B, Cin, T\]"),
        ((2, 3, 5), (4, 2, 3), None, 1, "weight must be"),
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
