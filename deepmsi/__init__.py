"""deepmsi: multimodal emotion recognition in the manner of DeepMSI-MER, as a performance engine and a tool."""

from typing import TYPE_CHECKING, Any

from deepmsi._version import __version__

if TYPE_CHECKING:
    from deepmsi.backend import explain, use_backend
    from deepmsi.models.config import DeepMSIConfig
    from deepmsi.models.deepmsi import DeepMSI
    from deepmsi.nn import fix_constants, fuse

__all__ = ["DeepMSI", "DeepMSIConfig", "__version__", "explain", "fix_constants", "fuse", "use_backend"]

# Importing deepmsi costs nothing, so that the command line answers, and can be interrupted, before torch is there.
_LAZY = {
    "DeepMSI": "deepmsi.models.deepmsi",
    "DeepMSIConfig": "deepmsi.models.config",
    "explain": "deepmsi.backend",
    "fix_constants": "deepmsi.nn",
    "fuse": "deepmsi.nn",
    "use_backend": "deepmsi.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'deepmsi' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
