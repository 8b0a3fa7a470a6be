"""Batches of texts of like length, and models that are built for what the data have."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from deepmsi.train.dataset import GROUPED_BATCHES, EpochBatches
from deepmsi.train.recipe import load_recipe
from deepmsi.train.run import train

LENGTHS = np.random.default_rng(0).integers(1, 60, 1003).tolist()


def epoch(number: int, seed: int = 3, world: int = 1, rank: int = 0, balanced: bool = False) -> list[list[int]]:
    labels = [i % 3 for i in range(len(LENGTHS))]
    batches = EpochBatches(labels, 4, seed, lengths=LENGTHS, world=world, rank=rank, balanced=balanced)
    batches.set_epoch(number)
    return [[position for _, _, position in batch] for batch in batches]


def test_grouped_batches_hold_every_row_once_and_little_padding() -> None:
    batches = epoch(0)
    assert sorted(chain(*batches)) == list(range(len(LENGTHS)))
    assert [len(batch) for batch in batches] == [4] * 250 + [3]  # the smaller one last
    padded = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)
    plain = EpochBatches([0] * len(LENGTHS), 4, 3)
    shuffled = sum(len(batch) * max(LENGTHS[key[2]] for key in batch) for batch in plain)
    assert padded < 1.05 * sum(LENGTHS) < 1.3 * sum(LENGTHS) < shuffled
    longest = [max(LENGTHS[i] for i in batch) for batch in batches[: GROUPED_BATCHES // 2]]
    assert longest != sorted(longest)


def test_grouped_batches_depend_on_seed_and_epoch_alone() -> None:
    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    assert epoch(1) != epoch(1, seed=4)
    parts = [epoch(1, world=2, rank=rank) for rank in (0, 1)]
    assert sorted(chain(*parts[0], *parts[1])) == list(range(len(LENGTHS)))
    assert sum(map(len, epoch(1, balanced=True))) == len(LENGTHS)


def test_modalities_that_no_row_has_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["id,text,label,split"]
    lines += [
        f"{i},{('good day', 'bad night')[i % 2]},{('a', 'b')[i % 2]},{'test' if i > 19 else 'train'}" for i in range(24)
    ]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    words = ["labels=[a, b]", "preset=small", "text.encoder=hashing", "train.epochs=1", "train.selection=last"]
    result = train(load_recipe("meld", words), manifest, tmp_path / "run")
    assert result["n"] == 4
    assert "No row has video or audio: the model is built without." in capsys.readouterr().err
    assert load_recipe(tmp_path / "run" / "recipe.yaml").modalities == ("text",)
