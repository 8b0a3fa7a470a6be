"""How products are made: in 16 bits under autocast, or in float32 with or without TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast that a precision means on a device: "bf16" or "fp16"; none of "fp32"."""
    return torch.autocast(device.type, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


@contextmanager
def float32_products(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Make float32 products and convolutions of a GPU all with TF32, or all without.

    torch left to itself has TF32 in its convolutions alone.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
