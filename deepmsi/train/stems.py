"""Computes once what a frozen stem makes of each row's frames, and keeps it beside the prepared clips.

PREPARED/stems/KEY/NNNNNN.safetensors    `stem [T, H, W, C]` of one row, by its place in the prepared folder

The key tells the frames, the stem's weights and sizes, and the precision, so that runs, folds and ablations which share
these share the files, too. Nothing else reads them: they may be deleted whenever no training runs.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from deepmsi.data.files import digest, replacing
from deepmsi.errors import UserError
from deepmsi.models.checkpoint import weights_digest
from deepmsi.models.memory import gigabytes
from deepmsi.models.precision import AUTOCAST, autocast_for, float32_products
from deepmsi.train.console import note, progress
from deepmsi.train.dataset import UtteranceDataset
from deepmsi.train.memory import training_device
from deepmsi.train.processes import barrier, process_rank
from deepmsi.train.recipe import TrainSettings

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI

_FOLDER = "stems"
_VERSION = 1


class Stems:
    """The files of one key.

    Args:
        folder: where they lie.
        shape: (T, H, W, C).
        dtype: of their elements.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.bytes = math.prod(shape) * dtype.itemsize

    def path(self, i: int) -> Path:
        """The file of row `i` of the prepared folder."""
        return self.folder / f"{i:06d}.safetensors"

    def has(self, i: int) -> bool:
        """Whether row `i` has its file, of the size that it should have."""
        try:
            return self.path(i).stat().st_size > self.bytes
        except OSError:
            return False

    def read(self, i: int) -> Tensor:
        """What the stem made of row `i`, `[T, H, W, C]`.

        Raises:
            UserError: its file is gone or damaged.
        """
        path = self.path(i)
        try:
            stem = load_file(path)["stem"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}): delete it, and train again with --resume.") from None
        if stem.shape != self.shape or stem.dtype != self.dtype:
            raise UserError(f"{path} holds {list(stem.shape)} {stem.dtype}: delete it, and train again with --resume.")
        return stem

    def write(self, i: int, stem: Tensor) -> None:
        """Keep what the stem made of row `i`.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        with replacing(self.path(i)) as file:
            file.write(save({"stem": stem.contiguous()}))


def keep_stems(model: DeepMSI, datasets: Sequence[UtteranceDataset], settings: TrainSettings) -> Stems:
    """Compute what is not there yet of the rows of some datasets, and let them read it in place of the frames.

    The model moves to the device of training. Several processes share the rows, and each computes what it does not see
    afterwards.

    Args:
        model: whose stem is frozen.
        datasets: of one prepared folder.
        settings: the precision, and how many utterances are computed at a time.

    Raises:
        UserError: there is no room on the disk, or the prepared folder cannot be written.
    """
    assert model.video is not None
    data, vision = datasets[0].data, model.config.vision
    sizes = [vision.backbone, vision.options, vision.image_size, vision.mean, vision.std]
    weights = [weights_digest(module) for module in model.video.backbone.stem_modules()]
    key = digest([_VERSION, data.content, settings.precision, sizes, weights])[:16]
    shape = (vision.frames, *model.video.stem_shape)
    stems = Stems(data.path / _FOLDER / key, shape, AUTOCAST.get(settings.precision, torch.float32))
    rows = {i: dataset for dataset in datasets for i in dataset.with_video()}
    missing = [i for i in sorted(rows) if not stems.has(i)]
    _make_room(stems, len(rows), len(missing))
    rank, world = process_rank()
    barrier()  # all have seen what is missing
    for own in (missing[rank::world], missing):
        _compute(model, [(i, rows[i]) for i in own if not stems.has(i)], stems, settings)
        barrier()
    for dataset in datasets:
        dataset.stems = stems
    return stems


def _make_room(stems: Stems, rows: int, missing: int) -> None:
    """Make the folder, and say what it will take."""
    try:
        stems.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{stems.folder} cannot be made ({error.strerror}): let train.cache_stem write beside the prepared clips, "
            "or set it to false."
        ) from None
    free, wanted = shutil.disk_usage(stems.folder).free, missing * stems.bytes
    if wanted > free:
        raise UserError(
            f"{stems.folder}: what the stem makes of {missing} rows takes {gigabytes(wanted)} GB, and "
            f"{gigabytes(free)} GB are free on its disk: make room, or set train.cache_stem=false."
        )
    if missing:
        note(
            f"Computing what the frozen stem makes of {missing} of {rows} rows: {gigabytes(rows * stems.bytes)} GB in "
            f"{stems.folder}, for this and later fits."
        )


def _compute(
    model: DeepMSI, rows: Sequence[tuple[int, UtteranceDataset]], stems: Stems, settings: TrainSettings
) -> None:
    if not rows:
        return
    device = training_device(settings)
    branch, training, batch = model.to(device).video, model.training, settings.eval_batch_size or settings.batch_size
    assert branch is not None
    model.eval()
    with (
        torch.inference_mode(),
        autocast_for(settings.precision, device),
        float32_products(device, settings.tf32),
        progress(len(rows), "stem", "row") as bar,
    ):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            frames = torch.stack([dataset.frames(i) for i, dataset in part])
            for (i, _), stem in zip(part, branch.stem(frames.to(device)).to(stems.dtype).cpu(), strict=True):
                stems.write(i, stem)
            bar.update(len(part))
    model.train(training)
