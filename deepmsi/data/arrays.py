"""Reads array files that others made: .npy and .safetensors, never a pickle."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deepmsi.errors import UserError

_IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)[:, None, None]
_IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)[:, None, None]


def load_array(path: Path) -> np.ndarray:
    """Read the one array of a ``.npy`` or ``.safetensors`` file, of numbers.

    Raises:
        UserError: missing, empty, damaged, of another kind, or a pickle, which is not loaded.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error.strerror})") from error
    if not head:
        raise UserError(f"{path}: the file is empty")
    if head.startswith(b"\x93NUMPY"):
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            if "allow_pickle" in str(error):
                raise UserError(_pickle(path)) from error
            raise UserError(f"{path}: the .npy file is damaged ({error})") from error
    elif path.suffix == ".safetensors":
        array = _load_safetensors(path)
    elif head[:1] == b"\x80" or head.startswith(b"PK") or path.suffix in (".pkl", ".pickle", ".pt", ".pth"):
        raise UserError(_pickle(path))
    else:
        raise UserError(f"{path}: this is neither a .npy nor a .safetensors file")
    if array.dtype.kind not in "buif":
        raise UserError(f"{path}: the array holds {array.dtype}, not real numbers")
    return array


def as_feature(array: np.ndarray, path: Path) -> np.ndarray:
    """Return a feature vector ``[D]`` float32; ``[1, D]`` is taken too.

    Raises:
        UserError: another shape, no numbers, or a NaN or infinity.
    """
    flat = array.reshape(-1)
    if flat.size == 0 or flat.size != max(array.shape, default=0):
        raise UserError(f"{path}: the array has shape {list(array.shape)}; a feature is one vector [D]")
    with np.errstate(over="ignore"):
        vector = flat.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise UserError(
            f"{path}: the feature holds {flat[bad[0]]} at position {bad[0]} ({bad.size} of {vector.size} are not "
            "finite in float32); compute it again"
        )
    return vector


def commonest_length(lengths: Iterable[int]) -> int:
    """The length that most features have; of several the one that comes first."""
    return Counter(lengths).most_common(1)[0][0]


def as_pictures(array: np.ndarray, path: Path) -> np.ndarray:
    """Return pictures ``[n, H, W, 3]`` uint8 from ``[n, 3, H, W]`` or ``[n, H, W, 3]``.

    uint8 is taken as it is; real numbers as 0 to 1, as 0 to 255, or as normalised with ImageNet's mean and
    standard deviation, whichever their range fits.

    Raises:
        UserError: another shape or range, or a NaN.
    """
    if array.ndim != 4 or 3 not in (array.shape[1], array.shape[3]) or 0 in array.shape:
        raise UserError(f"{path}: the array has shape {list(array.shape)}; frames are [T, 3, H, W]")
    planes = array if array.shape[1] == 3 else array.transpose(0, 3, 1, 2)
    if planes.dtype != np.uint8:
        planes = planes.astype(np.float32)
        low, high = float(planes.min()), float(planes.max())
        if low < 0:
            planes = planes * _IMAGENET_STD + _IMAGENET_MEAN
            low, high = float(planes.min()), float(planes.max())
            fits = low > -1e-2 and high < 1 + 1e-2
        else:
            fits = high <= 255
        if not fits:
            raise UserError(f"{path}: the values of the frames fit neither 0 to 1 nor 0 to 255; store uint8")
        planes = np.clip(np.rint(planes * (255 if high < 1 + 1e-2 else 1)), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _load_safetensors(path: Path) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Any] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: the .safetensors file is damaged ({error})") from error
    if len(tensors) != 1:
        raise UserError(f"{path}: the file holds {len(tensors)} tensors; store one per file")
    (tensor,) = tensors.values()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _pickle(path: Path) -> str:
    return f"{path}: this is a pickle, which may run code when loaded, so it is refused; store .npy instead"
