"""Seeds that depend on what is drawn and never on who draws it, so that a resumed run repeats itself."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(*parts: int | str) -> int:
    """Hash parts such as (seed, epoch, row id) to a seed in [0, 2^63)."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
