"""Small labelled sets that a model can learn, prepared through the real writer, and recipes to train on them."""

import csv
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepmsi.data.options import PrepareOptions
from deepmsi.data.prepare import prepare
from deepmsi.models.config import validated
from deepmsi.train.recipe import Recipe

LABELS = ("anger", "joy", "sadness")
FEATURES: dict[str, Any] = {
    "vision": {"backbone": "none"},
    "text": {"encoder": "features"},
    "audio": {"encoder": "features"},
    "fusion": {"guide_hidden": 8, "projection": 8, "hidden": [8], "dropout": 0.1},
    "train": {"epochs": 3, "batch_size": 8, "lr": 0.02, "selection": "last", "device": "cpu", "log_every": 2},
}


def write_corpus(
    folder: Path,
    rows: int = 36,
    *,
    labels: Sequence[str] = LABELS,
    splits: Sequence[str] = (),
    noise: float = 0.3,
    video: bool = False,
    edit: Callable[[list[dict[str, str]]], None] | None = None,
) -> Path:
    """Write a manifest whose feature vectors (and, on request, frames) tell the label; every fifth row lacks text."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    directions = {name: {label: rng.normal(size=6) for label in labels} for name in ("text", "audio")}
    table = []
    for i in range(rows):
        label = labels[i % len(labels)]
        row = {"id": f"r{i:03d}", "label": label, "speaker": f"s{i % 4}", "dialogue": f"d{i // 6}", "text": "well"}
        row["split"] = splits[i % len(splits)] if splits else ""
        for name in ("text", "audio"):
            row[f"{name}_features"] = ""
            if name == "audio" or i % 5:
                vector = directions[name][label] + noise * rng.normal(size=6)
                np.save(folder / f"{i}_{name}.npy", vector.astype(np.float32))
                row[f"{name}_features"] = f"{i}_{name}.npy"
        if video:
            frames = rng.integers(0, 60, (2, 3, 64, 64)) + 60 * labels.index(label)
            np.save(folder / f"{i}_frames.npy", frames.astype(np.uint8))
            row["frames"] = f"{i}_frames.npy" if i % 3 else ""
        table.append(row)
    if edit is not None:
        edit(table)
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def prepared_corpus(folder: Path, **options: Any) -> Path:
    """A corpus, prepared; returns the prepared folder."""
    manifest = write_corpus(folder / "raw", **options)
    prepare(manifest, folder / "prepared", PrepareOptions(frames=2, size=64), workers=0, progress=False)
    return folder / "prepared"


def sound_manifest(folder: Path, rows: int = 9) -> Path:
    """A manifest of a tenth of a second of noise a row; the last third is the test."""
    rng = np.random.default_rng(0)
    lines = ["id,audio,text,label,split"]
    for i in range(rows):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes((rng.standard_normal(1600) * 1000 * (1 + i % 3)).astype("<i2").tobytes())
        lines.append(f"{i},{i}.wav,well,{LABELS[i % 3]},{'test' if 3 * i >= 2 * rows else 'train'}")
    path = folder / "manifest.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_recipe(**changes: Any) -> Recipe:
    """The small feature recipe, sections updated by `changes`."""
    data = {key: dict(value) for key, value in FEATURES.items()}
    for key, value in changes.items():
        if isinstance(value, dict) and key in data:
            data[key].update(value)
        else:
            data[key] = value
    return validated(Recipe, data, "test recipe")
