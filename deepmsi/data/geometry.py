"""Turns a decoded picture into the square that the model sees: pixels, rotation, half, face, resize."""

import struct
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from deepmsi.data.manifest import Side
from deepmsi.models.config import Resize

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


def to_rgb(frame: Any, pixel_aspect: Fraction = Fraction(1)) -> np.ndarray:
    """Convert a PyAV frame to ``[H, W, 3]`` uint8 as wide and the way up that a player shows it.

    Pixels that are not square (``pixel_aspect`` is their width over their height) are made so, in the width that is
    stored; then the display matrix of phones (turns by quarter circles, mirroring) is applied.
    """
    from deepmsi.data.media import ONE_THREAD

    image = frame.to_ndarray(format="rgb24", **ONE_THREAD)
    height, width = image.shape[:2]
    if (shown := max(1, round(width * pixel_aspect))) != width:
        image = np.ascontiguousarray(_resample(image, height, shown).transpose(1, 2, 0))
    matrix = _display_matrix(frame)
    if matrix is None:
        return image
    a, b, c, d = matrix  # a pixel at (x, y) goes to (a·x + c·y, b·x + d·y)
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, flip_x, flip_y = image.transpose(1, 0, 2), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    if flip_x:
        image = image[:, ::-1]
    if flip_y:
        image = image[::-1]
    return np.ascontiguousarray(image)


def half(image: np.ndarray, side: Side | None) -> np.ndarray:
    """Keep the left or right half of ``[H, W, 3]``; the middle column of an odd width goes to neither."""
    width = image.shape[1] // 2
    if side is None or width == 0:
        return image
    return image[:, :width] if side == "left" else image[:, image.shape[1] - width :]


def crop(image: np.ndarray, box: Box | None) -> np.ndarray:
    """Cut a box out of ``[H, W, 3]``; None keeps the whole picture."""
    if box is None:
        return image
    x, y, width, height = box
    return image[y : y + height, x : x + width]


def fit(image: np.ndarray, size: int, resize: Resize) -> np.ndarray:
    """Resize ``[H, W, 3]`` uint8 to ``[3, size, size]`` uint8 with an antialiased triangle filter.

    ``crop``: the short edge to ``size``, then the centre. ``squash``: both edges to ``size``.
    ``pad``: the long edge to ``size``, black around it.
    """
    height, width = image.shape[:2]
    if resize == "squash":
        return _resample(image, size, size)
    edge = min(height, width) if resize == "crop" else max(height, width)
    # Integers, halves up: the same everywhere, and never below one pixel.
    new_height, new_width = (max(1, (2 * n * size + edge) // (2 * edge)) for n in (height, width))
    picture = _resample(image, new_height, new_width)
    if resize == "crop":
        y, x = (new_height - size) // 2, (new_width - size) // 2
        return np.ascontiguousarray(picture[:, y : y + size, x : x + size])
    canvas = np.zeros((3, size, size), np.uint8)
    y, x = (size - new_height) // 2, (size - new_width) // 2
    canvas[:, y : y + new_height, x : x + new_width] = picture
    return canvas


def scale(frames: np.ndarray, size: int) -> np.ndarray:
    """Scale frames ``[T, 3, S, S]`` uint8 that were stored larger to the side that a model reads."""
    return _interpolate(torch.from_numpy(np.array(frames)), size, size).numpy()


def _resample(image: np.ndarray, height: int, width: int) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return _interpolate(tensor[None], height, width)[0].contiguous().numpy()


def _interpolate(pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if pictures.shape[2:] == (height, width):
        return pictures
    # The uint8 kernel works in fixed point, so its bits depend on neither thread count nor vector width.
    return F.interpolate(pictures, (height, width), mode="bilinear", antialias=True)


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
    return a, b, c, d
