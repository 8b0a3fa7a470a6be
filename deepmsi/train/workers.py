"""How many processes load the batches of a fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from deepmsi.data.pool import usable_cpus
from deepmsi.models.config import ModelSections
from deepmsi.train.recipe import TrainSettings

MOST = 8
"""Of processes: each holds the whole program once more."""
_HELD = 3  # batches of a process that lie in shared memory at once: two ahead, one being made
_SHARED = Path("/dev/shm")


def loader_workers(settings: TrainSettings, config: ModelSections, device: torch.device) -> int:
    """Return `train.workers`, or where it is null as many as serve the device.

    None where the CPU trains, whose cores the step needs. On a GPU one for each core of this process's share of them
    but one, 8 at most, and no more than whose batches the shared memory has room for, which containers have little of.
    """
    if settings.workers is not None:
        return settings.workers
    if device.type == "cpu":
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    most = min(MOST, usable_cpus() // processes - 1)
    if _SHARED.is_dir():
        batch = max(settings.batch_size, settings.eval_batch_size or 0) * utterance_bytes(config)
        most = min(most, shutil.disk_usage(_SHARED).free // (processes * _HELD * batch))
    return max(0, most)


def utterance_bytes(config: ModelSections) -> int:
    """Return how many bytes a loaded utterance has at most, as frames of uint8 and sound of float32."""
    vision, audio = config.vision, config.audio
    frames = 0 if vision.backbone == "none" else vision.frames * 3 * vision.image_size**2
    sound = 4 * round(audio.max_seconds * audio.sample_rate) if audio.encoded else 0
    return frames + sound + 2**14  # of a text, or of features
