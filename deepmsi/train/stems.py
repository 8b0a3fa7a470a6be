"""Computes once what a frozen stem makes of each row's frames, and keeps it beside the prepared clips.

PREPARED/stems/KEY/NNNNNN.safetensors    `stem [T, H, W, C]` of one row, by its place in the prepared folder
PREPARED/stems/KEY/stem.json             what the key is made of

The key tells the frames, the stem's weights and sizes, and how it is computed, so that runs, folds and ablations which
share these share the files, too. Nothing else reads them: they may be deleted whenever no training runs.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from deepmsi.data.files import TEMPORARY, digest, replacing, write_sorted_json
from deepmsi.errors import UserError
from deepmsi.models.checkpoint import weights_digest
from deepmsi.models.memory import gigabytes
from deepmsi.models.precision import AUTOCAST, inferring
from deepmsi.train.console import note, progress
from deepmsi.train.dataset import UtteranceDataset
from deepmsi.train.memory import training_device
from deepmsi.train.processes import barrier, process_rank, together
from deepmsi.train.recipe import TrainSettings

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI

_FOLDER = "stems"
_VERSION = 1
"""Rises where the numbers of a stem change by more than roundings: files of earlier versions are then left alone."""

_ABANDONED = 3600
"""Seconds: no row takes so long to write."""


class Stems:
    """The files of one key.

    Args:
        folder: where they lie.
        shape: (T, H, W, C).
        dtype: of their elements.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.size = math.prod(shape) * dtype.itemsize
        """Bytes of a row."""

    def path(self, i: int) -> Path:
        """The file of row `i` of the prepared folder."""
        return self.folder / f"{i:06d}.safetensors"

    def has(self, i: int) -> bool:
        """Whether row `i` has its file, of the size that it should have."""
        try:
            return self.path(i).stat().st_size > self.size
        except OSError:
            return False

    def read(self, i: int) -> Tensor:
        """What the stem made of row `i`, `[T, H, W, C]`.

        Raises:
            UserError: its file is gone or damaged.
        """
        path, again = self.path(i), "delete it, and train again with --resume"
        try:
            stem = load_file(path)["stem"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}): {again}.") from None
        if stem.shape != self.shape or stem.dtype != self.dtype:
            raise UserError(f"{path} holds {list(stem.shape)} {stem.dtype}: {again}.")
        return stem

    def write(self, i: int, stem: Tensor) -> None:
        """Keep what the stem made of row `i`.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        with replacing(self.path(i)) as file:
            file.write(save({"stem": stem.contiguous()}))


def keep_stems(model: DeepMSI, datasets: Sequence[UtteranceDataset], settings: TrainSettings) -> None:
    """Compute what is not there yet of the rows of some datasets, and let them read it in place of the frames.

    The model moves to the device of training. Several processes share the rows; where they do not see each other's
    files, those of one machine share them.

    Args:
        model: whose stem is frozen.
        datasets: of one prepared folder.
        settings: how it is computed, and of how many utterances at a time.

    Raises:
        UserError: there is no room on the disk, or the prepared folder cannot be written.
    """
    rows = {i: dataset for dataset in datasets for i in dataset.with_video()}
    stems = together(lambda: _open(model, datasets[0], settings, sorted(rows)))
    missing = [i for i in sorted(rows) if not stems.has(i)]
    barrier()  # all have seen what is missing
    (rank, world), (local, beside) = process_rank(), _on_this_machine()
    for own in (missing[rank::world], missing[local::beside], missing):
        together(lambda own=own: _compute(model, {i: rows[i] for i in own}, stems, settings))  # type: ignore[misc]
    for dataset in datasets:
        dataset.stems = stems


def _on_this_machine() -> tuple[int, int]:
    """This process's number among those that a launcher has started on this machine, and how many these are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _open(model: DeepMSI, dataset: UtteranceDataset, settings: TrainSettings, rows: Sequence[int]) -> Stems:
    """Find the key and make its folder, where there is room for what is missing."""
    assert model.video is not None
    data, vision = dataset.data, model.config.vision
    made_of = {
        "version": _VERSION,
        "content": data.content,
        "backbone": [vision.backbone, vision.options, vision.image_size, vision.mean, vision.std],
        "weights": [weights_digest(module) for module in model.video.backbone.stem_modules()],
        "computed": [training_device(settings).type, settings.precision, settings.tf32],
    }
    shape = (vision.frames, *model.video.stem_shape)
    dtype = AUTOCAST.get(settings.precision, torch.float32)
    stems = Stems(data.path / _FOLDER / digest(made_of)[:16], shape, dtype)
    missing = [i for i in rows if not stems.has(i)]
    if not missing:
        return stems
    otherwise = "or train without train.cache_stem"
    try:
        stems.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{stems.folder} cannot be made ({error.strerror}): make {data.path} writable, {otherwise}."
        ) from None
    free, wanted = shutil.disk_usage(stems.folder).free, len(missing) * stems.size
    if wanted > free:
        raise UserError(
            f"{stems.folder}: what the stem makes of {len(missing)} rows takes {gigabytes(wanted)} GB, and "
            f"{gigabytes(free)} GB are free on its disk: make room, {otherwise}."
        )
    for leftover in stems.folder.glob(f"{TEMPORARY}*"):  # of a call that was killed; another may be at work
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _ABANDONED:
                leftover.unlink()
    write_sorted_json(stems.folder / "stem.json", made_of)
    note(
        f"Computing what the frozen stem makes of {len(missing)} of {len(rows)} rows: {gigabytes(wanted)} GB more in "
        f"{stems.folder}, for this and later fits."
    )
    return stems


def _compute(model: DeepMSI, rows: dict[int, UtteranceDataset], stems: Stems, settings: TrainSettings) -> None:
    missing = [i for i in rows if not stems.has(i)]
    if not missing:
        return
    device = training_device(settings)
    branch, batch = model.to(device).video, settings.eval_batch_size or settings.batch_size
    assert branch is not None
    with inferring(model, settings.precision, settings.tf32), progress(len(missing), "stem", "row") as bar:
        for start in range(0, len(missing), batch):
            part = [i for i in missing[start : start + batch] if not stems.has(i)]  # another call may be at it
            if part:
                frames = torch.stack([rows[i].frames(i) for i in part])
                for i, stem in zip(part, branch.stem(frames.to(device)).to(stems.dtype).cpu(), strict=True):
                    stems.write(i, stem)
            bar.update(len(missing[start : start + batch]))
