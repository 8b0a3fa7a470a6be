"""Kernels that rely on what a GPU does not promise, for test_strict_triton.py: `python triton_programs.py NAME`."""

import sys
from collections.abc import Callable

import strict_triton  # noqa: F401  (before triton)
import torch
import triton
import triton.language as tl


@triton.jit
def _after_the_last(y_ptr):
    program = tl.program_id(0)
    tl.store(y_ptr + program + 1, tl.load(y_ptr + program) + 1)


@triton.jit
def _copy(x_ptr, y_ptr, size, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0) if OTHER else tl.load(x_ptr + at, mask=at < size)
    tl.store(y_ptr + at, x)


@triton.jit
def _product(x_ptr, y_ptr, DEPTH: tl.constexpr):
    row, depth = tl.arange(0, 16), tl.arange(0, DEPTH)
    x = tl.load(x_ptr + row[:, None] * DEPTH + depth[None, :])
    y = tl.dot(x, tl.trans(x), input_precision="ieee")
    tl.store(y_ptr + row[:, None] * 16 + row[None, :], y)


@triton.jit
def _exp(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.exp(tl.load(x_ptr + at)))


@triton.jit
def _divide(x_ptr, y_ptr, BLOCK: tl.constexpr, PRECISE: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.div_rn(x, x) if PRECISE else x / x)


def order() -> bool:
    """Whether each program found what the one before it had written."""
    y = torch.zeros(17)
    _after_the_last[(16,)](y)
    return torch.equal(y, torch.arange(17.0))


def poison() -> bool:
    """Whether the lanes that a mask leaves out are zero."""
    y = torch.empty(8)
    _copy[(1,)](torch.ones(5), y, 5, BLOCK=8, OTHER=False)
    return bool(torch.isfinite(y).all())


def masked() -> bool:
    """Whether they are what `other` says."""
    y = torch.empty(8)
    _copy[(1,)](torch.ones(5), y, 5, BLOCK=8, OTHER=True)
    return y.tolist() == [1] * 5 + [0] * 3


def load_outside() -> bool:
    _copy[(1,)](torch.ones(5), torch.empty(8), 6, BLOCK=8, OTHER=True)
    return True


def store_outside() -> bool:
    _copy[(1,)](torch.ones(5), torch.empty(7), 5, BLOCK=8, OTHER=True)
    return True


def rounded() -> bool:
    """Whether float32 is rounded to the nearest bfloat16."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x[:4] = torch.tensor([torch.nan, torch.inf, 0.0, 1 + 2**-8])
    y = torch.empty(1024, dtype=torch.bfloat16)
    _copy[(1,)](x, y, 1024, BLOCK=1024, OTHER=True)
    return torch.equal(y.view(torch.int16)[1:], x.bfloat16().view(torch.int16)[1:]) and bool(y[0].isnan())


def exact() -> bool:
    """Whether a long sum and exp are as exact as a CPU's."""
    x = torch.rand(16, 1024, generator=torch.Generator().manual_seed(0))
    y, wanted = torch.empty(16, 16), (x.double() @ x.double().T)
    _product[(1,)](x, y, DEPTH=1024)
    sums = (y - wanted).abs().max() / wanted.abs().max()
    arguments = torch.linspace(-30, 0, 64)
    z = torch.empty(64)
    _exp[(1,)](arguments, z, BLOCK=64)
    exps = (z / arguments.double().exp() - 1).abs().max()
    assert max(sums, exps) < 1e-5, (sums, exps)  # an error of a GPU's size, not a mistake
    return bool(sums < 2e-7 or exps < 2e-7)


def quotient(precise: bool = False) -> bool:
    """Whether a number over itself is 1."""
    x, y = torch.arange(1.0, 65.0), torch.empty(64)
    _divide[(1,)](x, y, BLOCK=64, PRECISE=precise)
    return bool((y == 1).all())


def precise_quotient() -> bool:
    """Whether it is where the division says so."""
    return quotient(precise=True)


if __name__ == "__main__":
    programs: dict[str, Callable[[], bool]] = {
        f.__name__: f
        for f in (
            order,
            poison,
            masked,
            load_outside,
            store_outside,
            rounded,
            exact,
            quotient,
            precise_quotient,
        )
    }
    print(programs[sys.argv[1]]())
