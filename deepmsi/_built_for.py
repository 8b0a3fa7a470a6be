"""What an extension is built for: torch's stable ABI, and in short the operators' schemas, compared when it is loaded.

An extension from before a schema changed has operators of the same names that take other arguments: torch would find
fault with their number in words of its own, and read them wrongly where only their types changed. ``setup.py`` loads
this file by itself, so it imports nothing of the package and reads the schemas in their source.
"""

import ast
import ctypes
import hashlib
from pathlib import Path
from typing import Any

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # that of torch 2.11
SYMBOL = "deepmsi_built_for"
_SCHEMAS = Path(__file__).parent / "ops" / "_schemas.py"


def schemas() -> dict[str, str]:
    """Return a digest of both schemas of every operation that ``_register`` is called with; none without a source."""
    if not _SCHEMAS.is_file():
        return {}
    texts: dict[str, Any] = {}
    found: dict[str, str] = {}
    for statement in ast.parse(_SCHEMAS.read_text(encoding="utf-8")).body:
        value = getattr(statement, "value", None)
        if isinstance(statement, ast.Assign) and isinstance(value, (ast.Constant, ast.JoinedStr)):
            name = ast.unparse(statement.targets[0])
            texts[name] = eval(compile(ast.Expression(value), _SCHEMAS.name, "eval"), {}, texts)
        elif isinstance(value, ast.Call) and ast.unparse(value.func) == "_register":
            op, forward, backward = (ast.unparse(argument) for argument in value.args[:3])
            both = f"{texts[forward]}\n{texts[backward]}"
            found[ast.literal_eval(op)] = hashlib.sha256(both.encode()).hexdigest()[:16]
    return found


def source() -> str:
    """Return the C++ that tells of an extension what it was built for."""
    told = " ".join(f"{op}={digest}" for op, digest in schemas().items())
    return f'extern "C" __attribute__((visibility("default"))) const char* {SYMBOL}() {{ return "{told}"; }}\n'


def of(extension: Path) -> dict[str, str] | None:
    """Return what :func:`schemas` was when an extension was built; None where it does not tell."""
    try:
        tell = getattr(ctypes.CDLL(str(extension)), SYMBOL)
    except (OSError, AttributeError):
        return None
    tell.restype = ctypes.c_char_p
    return dict(entry.split("=") for entry in tell().decode().split())
