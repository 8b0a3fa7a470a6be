"""Logits of many rows: batches in order, shared between processes, without padded duplicates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Subset

from deepmsi.models.precision import inferring
from deepmsi.train.augment import to_device
from deepmsi.train.dataset import Collator, UtteranceDataset
from deepmsi.train.processes import process_rank
from deepmsi.train.recipe import TrainSettings
from deepmsi.train.workers import loader_workers

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI


def predict_logits(
    model: DeepMSI,
    dataset: UtteranceDataset,
    settings: TrainSettings,
    *,
    precision: str = "fp32",
    on_batch: Callable[[int], Any] | None = None,
) -> NDArray[np.float32]:
    """Run a model over a dataset, on the device that holds it.

    With several processes each runs every world-th row, and all of them get all logits.

    Args:
        model: the model; its mode is restored afterwards.
        dataset: the rows, none of which may be without a modality.
        settings: how many utterances at a time, and loader processes.
        precision: "fp32", or "bf16" or "fp16" for autocast.
        on_batch: called with the number of rows after each batch.

    Returns:
        [n, K] float32, in the order of the dataset.
    """
    rank, world = process_rank()
    part: Sequence[int] = range(rank, len(dataset), world)
    device = next(model.parameters()).device
    batch_size = settings.eval_batch_size or settings.batch_size
    loader: DataLoader[Any] = DataLoader(
        Subset(dataset, part),
        batch_size=batch_size,
        num_workers=loader_workers(settings, dataset, device, batch_size),
        collate_fn=Collator(model.config, model.text_processor, model.audio_processor, with_labels=False),
        pin_memory=device.type == "cuda",
    )
    parts = [torch.empty(0, len(model.config.names))]
    with inferring(model, precision, settings.tf32):
        for batch in loader:
            parts.append(model(**to_device(batch, device)).logits.float().cpu())
            if on_batch is not None:
                on_batch(len(batch["modality_mask"]))
    own = torch.cat(parts).numpy()
    if world == 1:
        return own
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, own)
    logits = np.empty((len(dataset), own.shape[1]), dtype=np.float32)
    for other, values in enumerate(gathered):
        logits[other::world] = values
    return logits


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probabilities [n, K] in float64."""
    wide = logits.astype(np.float64)
    wide = np.exp(wide - wide.max(1, keepdims=True))
    return wide / wide.sum(1, keepdims=True)
