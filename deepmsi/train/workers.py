"""How many processes load the batches of a fit."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch

from deepmsi.data.pool import usable_cpus
from deepmsi.train.dataset import UtteranceDataset
from deepmsi.train.recipe import TrainSettings

MOST = 8
"""Of processes: each holds the whole program once more."""
_HELD = 4  # batches of a process that lie in shared memory at once: two ahead, one in use, one being made
_SHARED = Path("/dev/shm")


def loader_workers(settings: TrainSettings, dataset: UtteranceDataset, device: torch.device, batch_size: int) -> int:
    """Return `train.workers`, or where it is null as many as serve the device.

    None where the CPU trains, whose cores the step needs, and where there are neither frames nor sound to load. On a
    GPU one for each core of this process's share of them but one, 8 at most; no more than there are batches, and than
    the shared memory has room for, of which containers have little.
    """
    if settings.workers is not None:
        return settings.workers
    size = utterance_bytes(dataset)
    if device.type == "cpu" or not size:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    most = min(MOST, usable_cpus() // processes - 1, math.ceil(len(dataset) / (processes * batch_size)))
    if _SHARED.is_dir():
        most = min(most, shutil.disk_usage(_SHARED).free // (processes * _HELD * batch_size * size))
    return max(0, most)


def utterance_bytes(dataset: UtteranceDataset) -> int:
    """Return how many bytes of frames, or of their stem, and of sound a loaded utterance has at most."""
    vision, audio = dataset.config.vision, dataset.config.audio
    frames = sound = 0
    if dataset.stems is not None:
        frames = dataset.stems.size
    elif vision.backbone != "none":
        frames = vision.frames * 3 * vision.image_size**2
    if audio.encoded:
        sound = 5 * round(audio.max_seconds * audio.sample_rate)  # samples and their mask
    return frames + sound
