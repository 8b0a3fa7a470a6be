"""deepmsi: multimodal emotion recognition in the manner of DeepMSI-MER, an engine and a tool."""

import importlib
from typing import Any

from deepmsi._version import __version__
from deepmsi.backend import explain, use_backend

__all__ = ["DeepMSI", "DeepMSIConfig", "__version__", "explain", "fuse", "use_backend"]

# Names that need more than torch are imported when they are first asked for.
_LAZY = {"DeepMSI": "deepmsi.models", "DeepMSIConfig": "deepmsi.models", "fuse": "deepmsi.nn"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'deepmsi' has no attribute {name!r}")
