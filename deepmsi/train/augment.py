"""Augmentation of training clips: drawn for a clip where it is loaded, its frames changed on the device that trains."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepmsi.models.precision import float32_products
from deepmsi.train.recipe import AugmentSettings

CHANGES = "frame_changes"
"""What a batch calls the changes of its `pixel_values`, a `Change` each, `[U', 7]`; they stay on the CPU."""


class Change(NamedTuple):
    """What one clip's frames become; as they are where all is 0, and scale, factor and brightness are 1.

    Attributes:
        flip, grey: whether they are mirrored, and lose their colours: 0 or 1.
        scale, x, y: the part of the side that is seen, and where its middle is, the side being 2 long.
        factor, brightness: of what a number differs from the mean, and of the mean.
    """

    flip: float
    grey: float
    scale: float
    x: float
    y: float
    factor: float
    brightness: float


def draw_change(settings: AugmentSettings, rng: np.random.Generator) -> Tensor:
    """Draw one clip's `Change`, `[7]` float64."""
    flip, grey = rng.random() < settings.flip, rng.random() < settings.grey
    scale = 1.0 - settings.crop * rng.random()
    shift_y, shift_x = rng.uniform(-settings.shift, settings.shift, 2)
    centre_y, centre_x = rng.uniform(-(1 - scale), 1 - scale, 2)
    brightness = 1.0 + settings.brightness * rng.uniform(-1, 1)
    contrast = 1.0 + settings.contrast * rng.uniform(-1, 1)
    middle = (centre_x + 2 * shift_x, centre_y + 2 * shift_y)
    change = Change(flip, grey, scale, *middle, contrast * brightness, brightness)
    return torch.tensor(change, dtype=torch.float64)


def reorder(frames: Tensor, settings: AugmentSettings, rng: np.random.Generator) -> Tensor:
    """Return a clip `[T, ...]` in an order that is drawn, where it falls to it."""
    if settings.shuffle and rng.random() < settings.shuffle:
        return frames[torch.from_numpy(rng.permutation(len(frames)))]
    return frames


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device, its frames changed there; nothing waits for the device."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != CHANGES}
    if CHANGES in batch:
        moved["pixel_values"] = change_frames(moved["pixel_values"], batch[CHANGES])
    return moved


def change_frames(frames: Tensor, changes: Tensor) -> Tensor:
    """Make of clips `[U, T, 3, S, S]` uint8 what the rows of changes `[U, 7]` say, a `Change` each."""
    changed = torch.empty_like(frames)
    with float32_products(frames.device):  # of which the places of the pixels are some
        for out, clip, row in zip(changed, frames, changes.tolist(), strict=True):
            out.copy_(_changed(clip, Change(*row)))
    return changed


def _changed(frames: Tensor, change: Change) -> Tensor:
    """Crop and shift a clip `[T, 3, S, S]`, flip it, take its colours and change its light about the mean.

    What comes back is whole numbers from 0 to 255 of any type, and of one channel where colours are gone.
    """
    flip, grey, scale, x, y, factor, brightness = change
    moves, lit = (scale, x, y) != (1.0, 0.0, 0.0), (factor, brightness) != (1.0, 1.0)
    if not (moves or grey or lit):
        return frames.flip(-1) if flip else frames
    pixels = frames.float()
    if moves:
        # "border" repeats the edge, as a shift needs.
        across, size = -scale if flip else scale, frames.shape[-1]
        theta = torch.tensor([[[across, 0, x], [0, scale, y]]], dtype=torch.float32)
        theta = theta.to(frames.device, non_blocking=True)
        grid = torch.nn.functional.affine_grid(theta, [1, 3, size, size], align_corners=False)
        grids = grid.expand(len(frames), -1, -1, -1)
        pixels = torch.nn.functional.grid_sample(pixels, grids, padding_mode="border", align_corners=False)
    elif flip:
        pixels = pixels.flip(-1)
    if grey:
        red, green, blue = pixels.split(1, 1)
        pixels = (red * 0.299 + green * 0.587) + blue * 0.114
    if lit:
        mean = pixels.expand_as(frames).mean()
        pixels.sub_(mean).mul_(factor).add_(mean * brightness)
    return pixels.round_().clamp_(0, 255)


def augment_audio(
    waveform: NDArray[np.float32], settings: AugmentSettings, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Augment one waveform `[n]`: speed, crop, shift (silence moves in), gain, noise."""
    factor = 1.0 + settings.speed * rng.uniform(-1, 1)
    cut, start = settings.audio_crop * rng.random(), rng.random()
    shift = settings.time_shift * rng.uniform(-1, 1)
    gain = 10.0 ** (settings.gain * rng.uniform(-1, 1) / 20.0)
    noisy, depth = rng.random() < settings.noise, rng.uniform(15.0, 40.0)

    x = waveform
    if settings.speed and len(x) > 1:
        places = np.arange(0, len(x) - 1, factor)
        x = np.interp(places, np.arange(len(x)), x).astype(np.float32)
    length = max(1, round(len(x) * (1 - cut)))
    offset = round((len(x) - length) * start)
    x = x[offset : offset + length]
    move = round(len(x) * shift)
    if move > 0:
        x = np.concatenate([np.zeros(move, np.float32), x[:-move]])
    elif move < 0:
        x = np.concatenate([x[-move:], np.zeros(-move, np.float32)])
    x = x * np.float32(gain)
    if noisy and len(x):
        level = float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) * 10.0 ** (-depth / 20.0)
        x = x + rng.standard_normal(len(x), dtype=np.float32) * np.float32(level)
    return np.clip(x, -1.0, 1.0)
