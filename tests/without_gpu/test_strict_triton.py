"""The strict interpreter finds what the usual one lets pass. The Triton kernels run in it in `.ci/strict_triton`."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(name: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(HERE / "triton_programs.py"), name]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("order", False),
        ("poison", False),
        ("masked", True),
        ("rounded", True),
        ("exact", False),
        ("quotient", False),
        ("precise_quotient", True),
    ],
)
def test_what_a_gpu_does_not_promise_does_not_hold(name: str, holds: bool) -> None:
    done = run(name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(holds)


@pytest.mark.parametrize(("name", "what"), [("load_outside", "load"), ("store_outside", "store")])
def test_no_byte_outside_of_the_tensors_is_touched(name: str, what: str) -> None:
    done = run(name)
    assert done.returncode != 0
    assert f"a {what} lies outside of every tensor of the launch" in done.stderr
