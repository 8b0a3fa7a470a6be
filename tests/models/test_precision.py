"""Precision: what multiplies in TF32 is what was asked for, and what was set before comes back."""

import subprocess
import sys

import pytest

# What a process may have said before, in torch's older way and in its newer one.
BEFORE = {
    "nothing": "",
    "older, products": "torch.set_float32_matmul_precision('high')",
    "older, products in 16 bits": "torch.set_float32_matmul_precision('medium')",
    "older, both": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False",
    "newer, products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "newer, convolutions": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "newer, all": "torch.backends.fp32_precision = 'tf32'",
}

# A process of its own: what is said in the newer way stays in torch.
SCRIPT = """
import sys, torch
from deepmsi.models.precision import float32_products

def told(*names):
    found = []
    for name in names:
        try:
            found.append(eval(f"torch.{name}"))
        except RuntimeError:
            found.append("refused")
    return found

PRODUCTS, CONVOLUTIONS = "backends.cuda.matmul.fp32_precision", "backends.cudnn.conv.fp32_precision"
ALL = PRODUCTS, CONVOLUTIONS, "backends.cudnn.rnn.fp32_precision", "backends.fp32_precision"
ALL += "get_float32_matmul_precision()", "backends.cudnn.allow_tf32", "backends.cuda.matmul.allow_tf32"
exec(sys.argv[1])
before = told(*ALL)
for tf32 in (False, True):
    with float32_products(torch.device("cpu"), tf32):
        assert told(*ALL) == before
    try:
        with float32_products(torch.device("cuda"), tf32):
            products, convolutions = told(PRODUCTS, CONVOLUTIONS)
            assert (products == "tf32", convolutions == "tf32") == (tf32, tf32), (products, convolutions)
            raise KeyError
    except KeyError:
        pass
    assert told(*ALL) == before, (told(*ALL), before)
"""


@pytest.mark.parametrize("said", BEFORE.values(), ids=list(BEFORE))
def test_products_and_convolutions_of_a_gpu_are_alike(said: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, said], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
