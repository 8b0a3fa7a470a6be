"""Fixtures that every part of the suite shares."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton and deepmsi are imported: without a GPU the Triton kernels run under the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real clips and transcripts that stands beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real clips and transcripts are not at {SHARED_DATA}")
    return SHARED_DATA
