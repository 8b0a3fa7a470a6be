"""Reads the pickles of the released code: ``{train,valid,test}/{video,text,audio}/<name>.pkl``.

A pickle is a program. This reader runs none of it: every name that a pickle may call is replaced by a function
of this module that makes plain records, every other name is refused, and arrays are built from those records
afterwards, by bounds that are checked. So a hostile file can give wrong numbers and nothing else.
"""

import io
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deepmsi.data.manifest import Manifest, Problem, Row, check_id
from deepmsi.errors import UserError

SPLITS = {"train": "train", "valid": "dev", "test": "test"}
"""Folder of the released data to the split's name here."""

FILES = {"frames": ("video", "images"), "text_features": ("text", "text_feature")} | {
    "audio_features": ("audio", "audio_feature")
}
"""What a row's array is: its folder, and its key in the pickle."""

_MAX_DEPTH = 32


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Read a pickle that holds numpy or torch arrays, numbers and text in dicts, lists, tuples and sets.

    Returns:
        The object; every array, numpy's or torch's, is a numpy array of real numbers.

    Raises:
        UserError: the file is missing or damaged, or names anything else, of which nothing is run.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error.strerror})") from error
    try:
        return _resolve(_Reader(io.BytesIO(data)).load(), 0, {})
    except _RefusedError as error:
        raise UserError(f"{path}: the pickle is refused: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: the pickle is damaged ({type(error).__name__}: {error})") from error


def read_released(path: Path, kind: str) -> np.ndarray:
    """Return the array of one released pickle; ``kind`` is a key of FILES."""
    value = read_pickle(path)
    key = FILES[kind][1]
    array = value.get(key) if isinstance(value, dict) else None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: the pickle has no array {key!r}")
    return array


def is_released(folder: Path) -> bool:
    """Say whether a folder has the layout of the released data."""
    return any((folder / split / part).is_dir() for split in SPLITS for part, _ in FILES.values())


def scan_released(folder: Path) -> tuple[Manifest, list[Problem]]:
    """List the released data as a manifest of array files; labels are read from the text pickles."""
    rows, origins, problems = [], [], []
    for source, split in SPLITS.items():
        names = {
            file.stem
            for part, _ in FILES.values()
            for file in (folder / source / part).glob("*.pkl")
            if not file.name.startswith("._")
        }
        for name in sorted(names):
            paths = {kind: folder / source / part / f"{name}.pkl" for kind, (part, _) in FILES.items()}
            where = f"{folder / source}:{name}"
            try:
                text = paths["text_features"]
                label = _label(read_pickle(text), text) if text.is_file() else None
                present = {kind: path for kind, path in paths.items() if path.is_file()}
                rows.append(Row(check_id(f"{split}_{name}"), label=label, split=split, **present))  # type: ignore[arg-type]
                origins.append(where)
            except UserError as error:
                problems.append(Problem("error", where, str(error), name))
    if not rows and not problems:
        raise UserError(f"{folder}: the folders of the released data hold no .pkl file")
    columns = ("id", "label", "split", *FILES)
    return Manifest(folder, tuple(rows), tuple(origins), columns, "released"), problems


def _label(value: Any, path: Path) -> str | None:
    label = value.get("label") if isinstance(value, dict) else None
    if isinstance(label, np.ndarray) and label.size == 1:
        label = label.reshape(()).item()
    if label is None:
        return None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool | float) or not isinstance(label, int | str) or not str(label).strip():
        raise UserError(f"{path}: the label {label!r} cannot be read as a name or a number")
    return str(label).strip()


class _RefusedError(Exception):
    """The pickle asks for something that it may not have."""


class _Name:
    """A name that a pickle may use; without attributes, so that a pickle cannot change it."""

    __slots__ = ()


class _Function(_Name):
    __slots__ = ("_run",)
    _run: Callable[..., Any]

    def __init__(self, run: Callable[..., Any]) -> None:
        object.__setattr__(self, "_run", run)

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _RefusedError("it tries to change what loads it")


class _Dtype:
    """A dtype on its way: kind and size, then its byte order by the state that follows."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248])", code):
            raise _RefusedError(f"it holds an array of {code!r}, not of real numbers")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 3 or any(part is not None for part in state[2:5]):
            raise _RefusedError("it holds an array of records")
        if state[1] not in ("<", ">", "|", "="):
            raise _RefusedError("it holds an array of an unknown byte order")
        self.code = state[1] + self.code.lstrip("<>|=")

    def build(self) -> np.dtype:
        return np.dtype(self.code)


class _Array:
    """A numpy array on its way: shape, dtype, order and bytes come as its state."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_bytes(data, dtype, shape, "F" if fortran else "C")


class _Storage:
    """The numbers of a torch storage, as a flat numpy array."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it tries to change a storage")


_NDARRAY = _Name()


def _from_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _Dtype) or order not in ("C", "F"):
        raise _RefusedError("it holds an array in no known form")
    if isinstance(shape, int):
        shape = (shape,)
    return np.frombuffer(bytes(data), dtype.build()).reshape(_sizes(shape), order=order).copy()


def _sizes(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _RefusedError("it holds an array of no known shape")
    return tuple(shape)


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _RefusedError("it holds a subclass of numpy's array")
    return _Array()


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_bytes(data, dtype, (), "C").item()


def _encode(text: Any, encoding: Any) -> bytes:
    # Protocols below 3 write bytes so.
    if not isinstance(text, str) or encoding != "latin1":
        raise _RefusedError("it calls a codec")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    # Protocols below 3 write no bytes so.
    return b""


def _load_storage(data: Any) -> _Storage:
    import torch

    if not isinstance(data, bytes):
        raise _RefusedError("it holds a storage in no known form")
    try:
        with warnings.catch_warnings(action="ignore"):
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _RefusedError("it holds a torch storage that is not plain numbers") from error
    flat = torch.tensor([], dtype=storage.dtype).set_(storage)
    if flat.is_complex() or flat.is_quantized:
        raise _RefusedError(f"it holds an array of {flat.dtype}, not of real numbers")
    return _Storage((flat.float() if flat.dtype == torch.bfloat16 else flat).numpy().copy())


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    size, stride = _sizes(size), _sizes(stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride) or type(offset) is not int or offset < 0:
        raise _RefusedError("it holds a tensor in no known form")
    values = storage.values
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size:
        return np.zeros(size, values.dtype)
    if last >= values.size:
        raise _RefusedError("it holds a tensor that reaches beyond its storage")
    strides = tuple(step * values.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False).copy()


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    return dict(items)


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Function(_Dtype),
    ("_codecs", "encode"): _Function(_encode),
    ("__builtin__", "bytes"): _Function(_empty_bytes),
    ("collections", "OrderedDict"): _Function(_ordered_dict),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch.storage", "_load_from_bytes"): _Function(_load_storage),
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _Function(_reconstruct)
    _NAMES[f"{_core}.multiarray", "scalar"] = _Function(_scalar)
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _Function(_from_bytes)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise _RefusedError(f"it names {module}.{name}, and only arrays and plain containers are read") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("it refers to data outside itself")


def _resolve(value: Any, depth: int, done: dict[int, Any]) -> Any:
    """Replace records by arrays; ``done`` holds what was resolved, so that shared parts are visited once."""
    if depth > _MAX_DEPTH:
        raise _RefusedError(f"it is nested more than {_MAX_DEPTH} deep")
    if id(value) in done:
        return done[id(value)]
    result: Any
    match value:
        case _Array():
            if value.value is None:
                raise _RefusedError("it holds an array without contents")
            result = value.value
        case dict():
            result = {_resolve(k, depth + 1, done): _resolve(v, depth + 1, done) for k, v in value.items()}
        case list() | tuple() | set() | frozenset():
            result = type(value)(_resolve(v, depth + 1, done) for v in value)
        case None | bool() | int() | float() | str() | bytes() | np.ndarray():
            result = value
        case _:
            raise _RefusedError("it holds something that is neither an array nor a plain value")
    done[id(value)] = result
    return result
