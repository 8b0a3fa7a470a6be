"""The four operations: public functions that check their arguments, choose a backend and call it."""

from deepmsi.ops.vsc_compress import CompressedTokens, vsc_compress

__all__ = ["CompressedTokens", "vsc_compress"]
