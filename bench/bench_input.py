"""Whether the input keeps up: batches out of a prepared folder, alone and under a training step.

The utterances have 15 frames of 256 px as stored uint8, text and audio as features. `augmented` changes every frame
(crop, shift, mirror, light) on the device of the step; otherwise they come as they are stored.
"""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import deepmsi
from deepmsi.data.options import PrepareOptions
from deepmsi.data.prepare import prepare
from deepmsi.data.store import PreparedData
from deepmsi.train.augment import to_device
from deepmsi.train.dataset import Batch, Collator, EpochBatches, UtteranceDataset
from deepmsi.train.recipe import AugmentSettings

FRAMES, SIZE, LABELS = 15, 256, ("no", "yes")
DIMS = {"text": 768, "audio": 1024}


def written(folder: Path, rows: int) -> PreparedData:
    """Write utterances of noise and prepare them."""
    rng = np.random.default_rng(0)
    table = []
    for i in range(rows):
        np.save(folder / f"{i}_frames.npy", rng.integers(0, 256, (FRAMES, 3, SIZE, SIZE), dtype=np.uint8))
        row = {"id": f"r{i}", "label": LABELS[i % 2], "frames": f"{i}_frames.npy"}
        for name, dim in DIMS.items():
            np.save(folder / f"{i}_{name}.npy", rng.normal(size=dim).astype(np.float32))
            row[f"{name}_features"] = f"{i}_{name}.npy"
        table.append(row)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    options = PrepareOptions(frames=FRAMES, size=SIZE)
    return prepare(folder / "manifest.csv", folder / "prepared", options, workers=0, progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> PreparedData:
    return written(tmp_path_factory.mktemp("input"), 4 if request.config.getoption("--smallest") else 16)


def config_of(preset: str) -> deepmsi.DeepMSIConfig:
    features: dict[str, Any] = {name: {"encoder": "features", "dim": dim} for name, dim in DIMS.items()}
    return deepmsi.DeepMSIConfig(
        num_labels=2,
        preset=preset,
        fusion={"modality_dropout": 0.0},
        vision={"frames": FRAMES, "image_size": SIZE},
        **features,
    )


def loader(
    data: PreparedData, config: deepmsi.DeepMSIConfig, augment: bool, workers: int, batch: int, device: str = "cpu"
) -> DataLoader:
    """Return the loader of the trainer's making, for a step on a device."""
    count = len(data)
    settings = AugmentSettings(flip=0.5, crop=0.1, shift=0.05, brightness=0.2, contrast=0.2) if augment else None
    rows = UtteranceDataset(data, range(count), [i % 2 for i in range(count)], config, augment=settings)
    batches = EpochBatches(rows.labels, batch, seed=0)
    collate = Collator(config, None, None)
    pinned = device == "cuda"
    return DataLoader(rows, batch_sampler=batches, collate_fn=collate, num_workers=workers, pin_memory=pinned)


def endless(source: DataLoader) -> Iterator[Batch]:
    """Yield batches epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(source))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augment", [False, True], ids=["stored", "augmented"])
def bench_loader(compare: Any, device: str, data: PreparedData, augment: bool, workers: int) -> None:
    """An epoch of batches, as a step on the device gets them, and nothing else."""
    where = torch.device(device)
    source = loader(data, config_of("released"), augment, workers, batch=2, device=device)
    assert next(iter(source))["pixel_values"].shape == (2, FRAMES, 3, SIZE, SIZE)

    def run() -> None:
        for batch in source:
            to_device(batch, where)

    compare(
        run,
        {},
        rounds=5,
        op="input",
        case=f"{len(data)} utterances, {'augmented' if augment else 'as stored'}, {workers} workers",
        direction="batches",
        utterances=len(data),
    )
    if compare.benchmark.stats:
        rate = len(data) / compare.benchmark.stats.stats.median
        compare.benchmark.extra_info["note"] = (
            f"{'Augmented' if augment else 'As stored'}, {workers} workers: {rate:.0f} utterances a second."
        )


@pytest.mark.parametrize("workers", [0, 1])
def bench_step_with_loader(compare: Any, smallest: bool, device: str, data: PreparedData, workers: int) -> None:
    """A training step that takes its batch from the loader, against one whose batch is at hand."""
    config, where = config_of("small" if smallest else "released"), torch.device(device)
    torch.manual_seed(0)
    model = deepmsi.DeepMSI(config).to(where).train()
    batches = endless(loader(data, config, augment=True, workers=workers, batch=1, device=device))
    batch = to_device(next(batches), where)

    def step(batch: Batch) -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    compare(
        lambda: step(to_device(next(batches), where)),
        {"batch at hand": lambda: step(batch)},
        rounds=9,
        op="input",
        case=f"step of 1 utterance, augmented, {workers} workers",
        direction="training_step",
    )
