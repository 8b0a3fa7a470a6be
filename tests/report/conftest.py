"""A run directory made by hand, for the parts of a report that need no model."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from deepmsi.train.metrics import compute_metrics

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run directory and gives its path."""

    def make(labels: Sequence[str] = ("joy", "sadness", "anger"), *, name: str = "by hand", n: int = 40) -> Path:
        run = tmp_path / "run"
        run.mkdir()
        rng = np.random.default_rng(3)
        true = rng.integers(0, len(labels), n)
        wrong = rng.random(n) < 0.3
        predicted = np.where(wrong, rng.integers(0, len(labels), n), true)
        shares = np.full((n, len(labels)), 0.4 / (len(labels) - 1))
        shares[np.arange(n), predicted] = 0.6
        groups = {"speaker": [f"s{i % 5}" for i in range(n)], "dialogue": ["d"] * n}
        metrics = compute_metrics(true, predicted, labels, probabilities=shares, groups=groups)
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / "run.json").write_text(
            json.dumps(
                {
                    "format": 1,
                    "seed": 7,
                    "both_sides": "9 by their speaker, of 40",
                    "deepmsi": "0.1.0",
                    "torch": "2.11",
                    "data": {"path": "/gone", "fingerprint": "abc123"},
                }
            )
        )
        (run / "recipe.yaml").write_text(f"name: {json.dumps(name)}\ndescription: a test\nprotocol: split-column\n")
        events = [
            {"step": 3 * epoch, "epoch": epoch, "split": split, "loss": 2.0 / (epoch + 1), "accuracy": 0.2 * epoch}
            for epoch in range(4)
            for split in ("train", "dev")
        ]
        (run / "history.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"step": 9, "los')
        with (run / "predictions.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["id", "label", "predicted", *labels])
            for i in range(n):
                writer.writerow([f"clip-{i:02d}", labels[true[i]], labels[predicted[i]], *shares[i]])
        return run

    return make
