"""The CPU kernels of a block in every instruction set: bfloat16 is multiplied as such in one and widened in others.

Weights are laid out in another way in each.
"""

import pytest
import torch

from deepmsi.testing import INSTRUCTION_SETS, need, run_in_instruction_set

_PROBE = """
import sys, torch
from deepmsi import _host
from deepmsi.ops import pack_weight, project_cells, residual_mlp, residual_window_attention
from deepmsi.testing import assert_within_budget, randn, roundings_of
assert _host.instruction_set() == sys.argv[1], _host.instruction_set()

def draw(*sizes, dtype):
    scales = [size[-1] ** -0.5 if len(size) == 2 else 1.0 for size in sizes]
    return [randn(*size, seed=n, scale=s, dtype=dtype) for n, (size, s) in enumerate(zip(sizes, scales))]

def mlp(inputs, **options):
    return residual_mlp(*inputs, **options)

def cells(inputs, **options):
    x, *weights = inputs
    return project_cells(x.view(1, 2, 5, 1, 3, 5), *weights, **options)

def attention(inputs, **options):
    x, *weights, table = inputs
    return residual_window_attention(x, *weights, 3, (5, 7), 3, 1, bias_table=table, **options)

def packed(run, inputs):
    layers = tuple(pack_weight(weight) for weight in inputs[1:-1] if weight.dim() == 2)
    return layers[0] if run is cells else layers

c = 15
cases = (
    (mlp, False, ((85, c), (77, c), (77,), (c, 77), (c,), (c,), (c,))),
    (mlp, True, ((85, c), (77, c), (77,), (c, 77), (c,), (c,), (c,))),
    (cells, False, ((10, c), (37, c), (37,), (37,), (37,))),
    (cells, True, ((10, c), (37, c), (37,), (c,), (c,))),
    (attention, False, ((3, 5, 7, c), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (25, 3))),
    (attention, True, ((3, 5, 7, c), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (25, 3))),
)
for dtype in (torch.float32, torch.bfloat16):
    for run, norm_first, sizes in cases:
        results = []
        for backend, exact in (("cpp", False), ("reference", False), ("reference", True)):
            inputs = [(t.double() if exact else t).requires_grad_() for t in draw(*sizes, dtype=dtype)]
            y = run(inputs, norm_first=norm_first, backend=backend)
            results.append((y, *torch.autograd.grad(y, inputs, randn(*y.shape, seed=9, dtype=dtype).to(y.dtype))))
        for n, (got, low, wanted) in enumerate(zip(*results, strict=True)):
            roundings = 8 if dtype == torch.float32 else roundings_of(dtype, got)
            assert_within_budget(got, low, wanted, f"{run.__name__} {norm_first} {dtype} {n}", roundings)
        inputs, options = draw(*sizes, dtype=dtype), {"norm_first": norm_first, "backend": "cpp"}
        assert run(inputs, packed=packed(run, inputs), **options).equal(run(inputs, **options))
"""


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_that_this_cpu_runs(isa: str) -> None:
    need("residual_mlp", "cpp", "cpu", torch.bfloat16)
    run_in_instruction_set(isa, _PROBE)
