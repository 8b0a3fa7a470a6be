"""Precision: what multiplies in TF32 is what was asked for, and what was set before comes back."""

from collections.abc import Iterator

import pytest
import torch

from deepmsi.models.precision import float32_products

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def allowed() -> tuple[bool, bool]:
    return MATMUL.allow_tf32, CUDNN.allow_tf32


@pytest.fixture
def as_torch_comes() -> Iterator[None]:
    before = allowed()
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True
    yield
    MATMUL.allow_tf32, CUDNN.allow_tf32 = before


@pytest.mark.usefixtures("as_torch_comes")
@pytest.mark.parametrize("tf32", [False, True])
def test_products_and_convolutions_of_a_gpu_are_alike(tf32: bool) -> None:
    with float32_products(torch.device("cuda"), tf32):
        assert allowed() == (tf32, tf32)
    assert allowed() == (False, True)
    with float32_products(torch.device("cpu"), tf32):
        assert allowed() == (False, True)
