"""How products are made: in 16 bits under autocast, or in float32 with or without TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from deepmsi.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device, name: str = "precision") -> None:
    """Refuse a precision that there is not, or not on a device.

    Args:
        precision: what was asked for.
        device: where the model runs.
        name: how the setting is called.

    Raises:
        UserError: it is none of the three, or fp16 on a CPU.
    """
    if precision not in ("fp32", *AUTOCAST):
        raise UserError(f"{name} is {precision!r}: give fp32, bf16 or fp16.")
    if precision == "fp16" and device.type == "cpu":
        raise UserError(f"{name}=fp16 needs a GPU: use bf16 or fp32 on the CPU.")


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast that a precision means on a device: "bf16" or "fp16"; none of "fp32"."""
    return torch.autocast(device.type, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


@contextmanager
def inferring(model: nn.Module, precision: str = "fp32", tf32: bool = False) -> Iterator[None]:
    """Run a model in eval mode, without gradients and in a precision; afterwards it is in the mode it was in."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast_for(precision, device), float32_products(device, tf32):
            yield
    finally:
        model.train(training)


@contextmanager
def float32_products(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Make float32 products and convolutions of a GPU all with TF32, or all without.

    torch left to itself has TF32 in its convolutions alone. It has two ways to say so, and refuses to tell in the older
    one, which `torch.compile` reads, what was said in the newer.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    parts: tuple[Any, ...] = torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
    before = [part.fp32_precision for part in parts]
    try:
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        older = None
    if older is None:
        for part in parts:
            part.fp32_precision = "tf32" if tf32 else "ieee"
    else:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
