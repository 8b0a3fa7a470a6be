"""Seeds that depend on what is drawn and never on who draws it, so that a resumed run repeats itself."""

from __future__ import annotations

from hashlib import blake2b

import torch


def derive_seed(*parts: int | str) -> int:
    """Hash parts such as (seed, epoch, row id) to a seed in [0, 2^63)."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_torch(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's generators of the CPU and of a CUDA device.

    `torch.manual_seed` also queues a call for every device type that is not running yet, which a call in every
    step would pile up.
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
