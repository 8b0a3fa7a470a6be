"""Training from what a frozen stem made of the frames: the steps of training from frames, and files that runs share."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_corpus import FEATURES, make_recipe, prepared_corpus
from test_two_processes import torchrun

from deepmsi.data.store import PreparedData
from deepmsi.errors import UserError
from deepmsi.models.config import VisionConfig, validated
from deepmsi.models.vision import VideoBranch
from deepmsi.train import stems as module
from deepmsi.train.ablate import ablate
from deepmsi.train.dataset import augment_frames
from deepmsi.train.recipe import AugmentSettings, Recipe
from deepmsi.train.run import train

VISION: dict[str, Any] = {
    "backbone": "small",
    "image_size": 64,
    "frames": 2,
    "tcn_channels": [16],
    "mean": (0.5,) * 3,
    "freeze": "stem",
    "options": {"patch_size": 8, "embed_dim": 8, "heads": [1, 2, 2], "depths": [1, 2, 1]},
    "schedule": {"blocks": [[1, 0]], "keep": [9]},
}
TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 4, "log_every": 1, "selection": "last", "eval_batch_size": 3}


def sections(cached: bool = True, **changes: Any) -> dict[str, Any]:
    plain = {
        "vision": VISION,
        "train": {**TRAIN, "cache_stem": cached},
        "augment": AugmentSettings.none().model_dump(),
        "protocol": {"name": "stratified-kfold", "folds": 2, "final_fit": False},
        **{name: {"encoder": "features", "dim": 6} for name in ("text", "audio")},
    }
    return {key: {**value, **changes.get(key, {})} for key, value in plain.items()}


def recipe(cached: bool = True, **changes: Any) -> Recipe:
    return make_recipe(**sections(cached, **changes))


def losses(run: Path) -> list[float]:
    histories = sorted(run.glob("folds/*/history.jsonl"))
    events = [json.loads(line) for path in histories for line in path.read_text().splitlines()]
    return [event["loss"] for event in events if event["split"] == "train"]


def files(data: Path) -> list[Path]:
    return sorted(data.glob("stems/*/*"))


@pytest.fixture
def data(video_corpus: Path, tmp_path: Path) -> Path:
    """A folder of its own, for what it will hold."""
    return Path(shutil.copytree(video_corpus, tmp_path / "data"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("freeze", ["stem", True], ids=["stem", "backbone"])
def test_the_steps_are_those_of_frames(freeze: Any, precision: str, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"vision": {"freeze": freeze}, "train": {"precision": precision}}
    scores = [train(recipe(cached, **changes), data, tmp_path / str(cached)) for cached in (False, True)]
    plain, cached = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert len(plain) == len(cached) > 4
    assert cached == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 2e-3)
    assert scores[0]["n"] == scores[1]["n"]
    if precision == "fp32":
        assert scores[0]["confusion_matrix"] == scores[1]["confusion_matrix"]
    stored = load_file(files(data)[0])["stem"]
    assert stored.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    assert stored.shape == (2, 4, 4, 16)


def test_what_is_not_augmented_draws_as_many_numbers() -> None:
    """So that sound is augmented as it is beside frames."""
    stem, drawn = torch.rand(2, 4, 4, 16), np.random.default_rng(0)
    assert augment_frames(stem, AugmentSettings.none(), drawn) is stem
    beside = np.random.default_rng(0)
    augment_frames(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), AugmentSettings.none(), beside)
    assert drawn.random() == beside.random()


def test_what_is_there_is_not_computed_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    computed = VideoBranch.stem

    def counted(self: VideoBranch, pixel_values: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixel_values))
        return computed(self, pixel_values)

    monkeypatch.setattr(VideoBranch, "stem", counted)
    weights = VideoBranch(VisionConfig(**VISION)).backbone.state_dict()

    def begin(self: VideoBranch, *words: Any, **options: Any) -> None:
        build(self, *words, **options)
        self.backbone.load_state_dict(weights)  # as pretrained ones, each fold has the same

    build = VideoBranch.__init__
    monkeypatch.setattr(VideoBranch, "__init__", begin)
    watched = {"vision": {"freeze": "stem"}, "train": {"selection": "inner-validation", "inner_folds": 2}}
    train(recipe(**watched), data, tmp_path / "one")
    there = files(data)
    rows = {i for i, row in enumerate(PreparedData.open(data).rows) if row.has_video}
    assert {int(path.stem) for path in there} == rows  # training parts and those that choose the epoch
    assert sum(calls) == len(rows) == 8
    assert max(calls) == TRAIN["eval_batch_size"]
    assert "makes of " in capsys.readouterr().err
    train(recipe(**watched), data, tmp_path / "two")
    assert sum(calls) == 8
    assert "makes of " not in capsys.readouterr().err
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    # One that a kill of the machine cut short, and one that is gone.
    there[0].write_bytes(there[0].read_bytes()[:100])
    there[1].unlink()
    train(recipe(**watched), data, tmp_path / "three")
    assert sum(calls) == 10
    assert losses(tmp_path / "three") == losses(tmp_path / "one")
    assert files(data) == there
    # Other weights, and another precision, have files of their own.
    weights["patch_embed.proj.bias"] += 1
    train(recipe(**watched), data, tmp_path / "four")
    assert len(files(data)) == 2 * len(there)
    train(recipe(train=watched["train"] | {"precision": "bf16"}), data, tmp_path / "five")
    assert len(files(data)) == 3 * len(there)


def test_the_reported_rows_are_scored_from_their_frames(data: Path, tmp_path: Path) -> None:
    """So that `evaluate` gives the same: nothing of what is reported depends on files that nobody else reads."""
    single = {"protocol": {"name": "split-column", "folds": 5, "final_fit": True}}
    manifest = json.loads((data / "index.json").read_text())
    for i, row in enumerate(manifest["rows"]):
        row["split"] = "test" if i in (1, 2, 4) else "train"
    (data / "index.json").write_text(json.dumps(manifest))
    train(recipe(**single), data, tmp_path / "run")
    assert not {1, 2, 4} & {int(path.stem) for path in files(data)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vision": {"freeze": False}}, r"set vision\.freeze=stem,"),
        ({"vision": {"drop_path": 0.1}}, r"set vision\.drop_path=0,"),
        ({"vision": {"pixel_statistics": True}}, r"set vision\.pixel_statistics=false,"),
        ({"augment": {"flip": 0.5, "grey": 0.1}}, r"always give: set augment\.flip=0, augment\.grey=0, or leave it"),
        ({"vision": {"freeze": "stems"}}, r"vision\.freeze"),
    ],
    ids=["learns", "drops", "statistics of a part", "augments", "no such thing"],
)
def test_what_changes_from_epoch_to_epoch_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe(**changes)


def test_sound_may_be_augmented_and_video_left_out(data: Path, tmp_path: Path) -> None:
    assert recipe(augment={"noise": 0.5, "gain": 6.0}).train.cache_stem
    run = tmp_path / "run"
    train(recipe(), data, run)
    lines = ablate(run, data, mode="retrain", variants={"keep 4": {"vision.keep": "4"}})
    assert {"text+audio+video", "text+audio", "keep 4"} <= {line["name"] for line in lines}


def test_no_room_is_told_before_anything_is_computed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(data)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"takes .* GB, and 1e-06 GB are free on its disk: make room, or set"):
        train(recipe(), data, tmp_path / "run")
    assert files(data) == []


def test_a_folder_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (data / "stems").write_text("")
    with pytest.raises(UserError, match=r"stems/\w+ cannot be made .*: let train\.cache_stem write beside"):
        train(recipe(), data, tmp_path / "run")


@pytest.mark.parametrize("damage", ["noise", "other shape", "other name"])
def test_a_damaged_file_is_told(damage: str, data: Path, tmp_path: Path) -> None:
    train(recipe(), data, tmp_path / "one")
    for path in files(data):
        if damage == "noise":
            path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
        elif damage == "other shape":
            save_file({"stem": torch.zeros(4, 4, 4, 16)}, path)
        else:
            save_file({"stems": torch.zeros(2, 4, 4, 16)}, path)
    with pytest.raises(UserError, match=r"safetensors (cannot be read|holds \[4, 4, 4, 16\]).*: delete it, and train"):
        train(recipe(), data, tmp_path / "two")


def test_two_processes_share_the_rows(tmp_path: Path) -> None:
    still = {"dropout": 0.0, "modality_dropout": 0.0}
    plain = FEATURES | sections(vision={"tcn_dropout": 0.0}) | {"fusion": FEATURES["fusion"] | still}
    plain["train"] = FEATURES["train"] | plain["train"]
    expected = None
    for name in ("one", "two"):
        run, path = tmp_path / name, tmp_path / f"{name}.yaml"
        data = prepared_corpus(tmp_path / f"{name}-data", rows=12, video=True)
        plain["train"]["batch_size"] = 4 if name == "one" else 2
        path.write_text(yaml.safe_dump(json.loads(json.dumps(plain))))
        words = ("-m", "deepmsi", "train", path, "--data", data, "--out", run, "--folds", "1")
        if name == "one":
            train(validated(Recipe, plain, "recipe"), data, run, folds=["1"])
            expected = [load_file(path)["stem"] for path in files(data)]
        else:
            torchrun(*words)
    assert expected
    found = [load_file(path)["stem"] for path in files(data)]
    torch.testing.assert_close(found, expected)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
