"""Writes files so that a reader sees the whole file or none: a temporary name, fsync, then a rename."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from deepmsi.errors import DISK_FULL, DiskFullError, UserError

TEMPORARY = ".tmp-"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` when the block ends without an error.

    Raises:
        DiskFullError: no room is left; nothing of the new file stays.
        UserError: the folder cannot be written.
    """
    # Two containers on one disk may have processes of the same number.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{uuid4().hex[:8]}-{path.name}")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(f"{path.parent}: the disk is full, {path.name} was not written") from error
        raise UserError(f"{path}: the file cannot be written ({error.strerror})") from error


def write_sorted_json(path: Path, value: Any) -> None:
    """Write JSON that is the same for equal values."""
    write_text(path, json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, and what is no character as an escape, as JSON and YAML read it.

    Such are the bytes of a path that is not UTF-8.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, or leave it untouched where it holds these bytes already."""
    try:
        if path.read_bytes() == data:
            return
    except OSError:
        pass
    with replacing(path) as file:
        file.write(data)


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def leaving_no_empty(folder: Path) -> Iterator[None]:
    """Take a folder that was not there before away again where the block fails and nothing came into it."""
    fresh = not folder.exists()
    try:
        yield
    except BaseException:
        if fresh:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether no other process works in the folder; it is this one's for the block, however the process ends."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        try:
            yield True
        finally:
            # Processes forked in the meantime hold the handle too: closing it here would not be enough.
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what interrupted writers left."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


class ArrayWriter:
    """Appends rows to a ``.npy`` file whose length is known only at the end; counts and hashes them.

    Args:
        file: opened for writing, at its beginning.
        dtype: numpy's code of the elements.
        shape: shape of one row; () for a flat array.
    """

    def __init__(self, file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> None:
        self.file, self.dtype, self.shape = file, np.dtype(dtype), shape
        self.length = 0
        self._hash = hashlib.sha256()
        self._write_header()

    def append(self, rows: np.ndarray) -> int:
        """Append ``rows`` [n, *shape] and return the position of the first."""
        if rows.shape[1:] != self.shape:
            raise ValueError(f"rows of shape {rows.shape[1:]} do not belong into {self.shape}")
        data = np.ascontiguousarray(rows, self.dtype).tobytes()
        self.file.write(data)
        self._hash.update(data)
        position = self.length
        self.length += len(rows)
        return position

    def finish(self) -> Mapping[str, Any]:
        """Complete the header; return bytes, shape and digest for the index."""
        size = self.file.tell()
        self.file.seek(0)
        self._write_header()
        return {"bytes": size, "shape": [self.length, *self.shape], "sha256": self._hash.hexdigest()}

    def _write_header(self) -> None:
        # numpy leaves room in the header for the first axis to grow, so the second one fits over the first.
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length, *self.shape),
        }
        np.lib.format.write_array_header_1_0(self.file, header)
