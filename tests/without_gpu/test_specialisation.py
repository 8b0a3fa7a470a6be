"""Triton compiles a kernel anew for integers that are 1 and for multiples of 16: not for counts of packed tokens.

But for the rows of a Swin's kernels, which are multiples of 16 in whole frames: that saves registers.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

PROGRAM = """
import importlib, pkgutil
import deepmsi._triton as kernels
from triton.runtime import JITFunction

counts = {"packed", "frames", "windows", "blocks", "chunks", "parts"}
for module in pkgutil.iter_modules(kernels.__path__):
    for name, kernel in vars(importlib.import_module(f"deepmsi._triton.{module.name}")).items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
            of_packed = counts | {"rows"} if module.name == "vsc_compress" else counts
            found = {p.name: p.do_not_specialize for p in kernel.params if p.name in of_packed}
            print(module.name, name, *(f"{count}={ignored}" for count, ignored in found.items()))
"""


def test_what_changes_with_every_call_compiles_nothing_anew() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = done.stdout.splitlines()
    assert len(kernels) > 30
    assert [line for line in kernels if line.endswith("=False") or "=False " in line] == []
