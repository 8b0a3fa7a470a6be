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
from small_corpus import FEATURES, make_recipe
from test_two_processes import torchrun

from deepmsi.data.store import PreparedData
from deepmsi.errors import UserError
from deepmsi.models import vision as vision_module
from deepmsi.models.config import VisionConfig
from deepmsi.models.vision import VideoBranch
from deepmsi.nn import VSCSwin
from deepmsi.train import stems as module
from deepmsi.train import trainer as trainer_module
from deepmsi.train.ablate import ablate, variants_of
from deepmsi.train.augment import draw_change, reorder
from deepmsi.train.recipe import AugmentSettings, Recipe, load_recipe
from deepmsi.train.run import train
from deepmsi.train.workers import utterance_bytes

VISION: dict[str, Any] = {
    "backbone": "swinv2_tiny_window8_256",
    "pretrained": True,
    "image_size": 64,
    "frames": 2,
    "tcn_channels": [16],
    "mean": (0.5,) * 3,
    "freeze": "stem",
    "schedule": {"blocks": [[1, 0]], "keep": [9]},
}
TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 4, "log_every": 1, "selection": "last", "eval_batch_size": 3}

OF_FRAMES = ("flip", "crop", "shift", "brightness", "contrast", "shuffle", "grey")

# In place of the weights of timm, which nothing here may fetch: small ones that are the same for every fit.
WEIGHTS = """
import torch
from deepmsi.models import vision
from deepmsi.nn import VSCSwin

def backbone(config, weights):
    sizes = {"patch_size": 8, "embed_dim": 8, "heads": (1, 2, 2), "depths": (1, 2, 1)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = VSCSwin.small(
            config.schedule, img_size=64, compression=config.compression, recompute=config.recompute, **sizes
        )
        for block in (block for stage in model.stages() for block in stage.each()):
            torch.nn.init.ones_(block.norm1.weight)  # zero at a fresh start, which hides the attention
    return model

vision._build_backbone = backbone
"""


@pytest.fixture(autouse=True)
def pretrained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The weights of every backbone; `SEED` changes them."""
    monkeypatch.setattr(vision_module, "_build_backbone", vision_module._build_backbone)  # put back at the end
    namespace: dict[str, Any] = {"SEED": 0}
    exec(WEIGHTS, namespace)
    return namespace


def sections(cached: bool = True, **changes: Any) -> dict[str, Any]:
    plain = {
        "vision": VISION,
        "train": {**TRAIN, "cache_stem": cached},
        "augment": {} if cached else dict.fromkeys(OF_FRAMES, 0),
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
    return sorted(data.glob("stems/*/*.safetensors"))


@pytest.fixture
def data(video_corpus: Path, tmp_path: Path) -> Path:
    """A folder of its own, for what it will hold."""
    return Path(shutil.copytree(video_corpus, tmp_path / "data"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many videos each call of a stem computes."""
    calls: list[int] = []
    stem = VideoBranch.stem

    def counted(self: VideoBranch, pixel_values: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixel_values))
        return stem(self, pixel_values)

    monkeypatch.setattr(VideoBranch, "stem", counted)
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"precision": "fp32"}},
        {"train": {"precision": "bf16"}},
        {"vision": {"freeze": True}, "train": {"workers": 1, "average": 0.9}},
        {"vision": {"schedule": "paper", "recompute": "chunk"}, "train": {"capacity_quantile": 0.9}},
    ],
    ids=["fp32", "bf16", "whole backbone, a worker", "capacity, chunks"],
)
def test_the_steps_are_those_of_frames(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    narrow = changes["train"].get("precision") == "bf16"
    scores = [train(recipe(cached, **changes), data, tmp_path / str(cached)) for cached in (False, True)]
    plain, cached = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert len(plain) == len(cached) > 4
    assert cached == pytest.approx(plain, rel=2e-3 if narrow else 1e-5)
    assert scores[0]["n"] == scores[1]["n"]
    if not narrow:
        assert scores[0]["confusion_matrix"] == scores[1]["confusion_matrix"]
    stored = load_file(files(data)[0])["stem"]
    assert stored.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert stored.shape == (2, 4, 4, 16)


def test_processes_that_load_are_counted_for_what_they_load(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stems, where these take the frames' place."""
    sizes: list[int] = []

    def counted(settings: Any, dataset: Any, *_: Any) -> int:
        sizes.append(utterance_bytes(dataset))
        return 0

    monkeypatch.setattr(trainer_module, "loader_workers", counted)
    train(recipe(), data, tmp_path / "run")
    assert set(sizes) == {2 * 4 * 4 * 16 * 4}


def test_what_is_not_augmented_draws_as_many_numbers() -> None:
    """So that sound is augmented as it is beside frames."""
    stem, drawn, beside = torch.rand(2, 4, 4, 16), np.random.default_rng(0), np.random.default_rng(0)
    for settings, rng in ((recipe().augment, drawn), (AugmentSettings.none(), beside)):
        draw_change(settings, rng)
        assert reorder(stem, settings, rng) is stem
    assert drawn.random() == beside.random()


def test_what_is_there_is_not_computed_again(
    data: Path,
    tmp_path: Path,
    computed: list[int],
    pretrained: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched = {"selection": "inner-validation", "inner_folds": 2}
    train(recipe(train=watched), data, tmp_path / "one")
    there = files(data)
    rows = {i for i, row in enumerate(PreparedData.open(data).rows) if row.has_video}
    assert {int(path.stem) for path in there} == rows  # training parts and those that choose the epoch
    assert sum(computed) == len(rows) == 8
    assert max(computed) == TRAIN["eval_batch_size"]
    assert "makes of " in capsys.readouterr().err
    train(recipe(train=watched), data, tmp_path / "two")
    assert sum(computed) == 8
    assert "makes of " not in capsys.readouterr().err
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    # One that the end of the machine cut short, and one that is gone.
    there[0].write_bytes(there[0].read_bytes()[:100])
    there[1].unlink()
    train(recipe(train=watched), data, tmp_path / "three")
    assert sum(computed) == 10
    assert losses(tmp_path / "three") == losses(tmp_path / "one")
    assert files(data) == there
    # What would give other numbers has files of its own, and what would not has not.
    train(recipe(train=watched, vision={"keep": 4}), data, tmp_path / "four")
    assert files(data) == there
    for n, change in enumerate(({"precision": "bf16"}, {"tf32": True}), start=2):
        train(recipe(train=watched | change), data, tmp_path / str(n))
        assert len(files(data)) == n * len(there)
    pretrained["SEED"] = 1
    train(recipe(train=watched), data, tmp_path / "five")
    assert len(files(data)) == 4 * len(there)


class Killed(BaseException):
    """As a signal would end it."""


def test_a_run_goes_on_with_the_stem_that_it_began_with(
    data: Path, tmp_path: Path, pretrained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever weights the hub has by then."""
    wanted = recipe(train={"checkpoint_steps": 1})
    train(wanted, data, tmp_path / "whole", folds=["1"])
    step = trainer_module.UtteranceTrainer.training_step

    def killed(self: Any, *words: Any, **options: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            raise Killed
        return step(self, *words, **options)

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module.UtteranceTrainer, "training_step", killed)
        with pytest.raises(Killed):
            train(wanted, data, tmp_path / "run", folds=["1"])
    pretrained["SEED"] = 1
    train(wanted, data, tmp_path / "run", folds=["1"], resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len({path.parent for path in files(data)}) == 1


def test_a_run_goes_on_without(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it has to where the disk is full."""
    usage = shutil.disk_usage(data)._replace(free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"takes .* GB, and 1e-06 GB are free on"):
            train(recipe(), data, tmp_path / "run")
    assert files(data) == []
    assert train(recipe(cached=False), data, tmp_path / "run", resume=True)["complete"]


def test_the_reported_rows_are_scored_from_their_frames(data: Path, tmp_path: Path) -> None:
    """So that `evaluate` gives the same: nothing of what is reported depends on files that nobody else reads."""
    single = {"protocol": {"name": "split-column", "folds": 5, "final_fit": True}}
    index = json.loads((data / "index.json").read_text())
    for i, row in enumerate(index["rows"]):
        row["split"] = "test" if i in (1, 2, 4) else "train"
    (data / "index.json").write_text(json.dumps(index))
    train(recipe(**single), data, tmp_path / "run")
    assert not {1, 2, 4} & {int(path.stem) for path in files(data)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vision": {"freeze": False}}, r"set vision\.freeze=stem,"),
        ({"vision": {"pretrained": False}}, r"start at random: set vision\.pretrained=true"),
        ({"vision": {"drop_path": 0.1}}, r"set vision\.drop_path=0,"),
        ({"vision": {"pixel_statistics": True}}, r"set vision\.pixel_statistics=false,"),
        ({"augment": {"flip": 0.5, "grey": 0.1}}, r"always give: set augment\.flip=0, augment\.grey=0, or leave it"),
        ({"vision": {"freeze": "stems"}}, r"vision\.freeze"),
        ({"vision": {"schedule": None}}, r"without a schedule there is no first compression"),
    ],
    ids=["learns", "of each fit", "drops", "statistics of a part", "augments", "no such thing", "no compression"],
)
def test_what_changes_from_epoch_to_epoch_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        recipe(**changes)


def test_sound_is_augmented_as_ever_and_frames_are_not() -> None:
    found, usual = recipe(augment={"noise": 0.25}).augment, AugmentSettings()
    assert (found.noise, found.gain, found.speed) == (0.25, usual.gain, usual.speed)
    assert {getattr(found, name) for name in OF_FRAMES} == {0.0}


def test_an_ablation_reads_the_same_files(
    data: Path, tmp_path: Path, computed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(recipe(), data, run)
    assert load_recipe(run / "recipe.yaml").augment == recipe().augment
    before = sum(computed)
    lines = ablate(run, data, mode="retrain", variants={"keep 4": {"vision.keep": "4"}})
    assert {"text+audio+video", "text+audio", "keep 4"} <= {line["name"] for line in lines}
    assert sum(computed) == before
    assert "without VSC" not in variants_of(run)
    assert "The line without VSC is left out" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (data / "stems").write_text("")
    with pytest.raises(UserError, match=r"stems/\w+ cannot be made .*: make .* writable, or train without"):
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


# Trains as a user's call does; of each process, which rows it computed, and how it ended.
SCRIPT = (
    """
import os, sys
from pathlib import Path
SEED = 0
"""
    + WEIGHTS
    + """
from deepmsi.errors import UserError
from deepmsi.train import stems
from deepmsi.train.recipe import load_recipe
from deepmsi.train.run import train

recipe, data, out, full = sys.argv[1:]
rank, write, written = os.environ["RANK"], stems.Stems.write, []

def noted(self, i, stem):
    if rank == full:
        raise UserError("the disk is full")
    write(self, i, stem)
    written.append(str(i))
stems.Stems.write = noted
told = "trained"
try:
    train(load_recipe(recipe), Path(data), Path(out), folds=["1"])
except UserError as error:
    told = str(error)
Path(f"{out}-{rank}.txt").write_text("\\n".join([told, *written]))
"""
)


@pytest.mark.parametrize("full", ["none", "1"], ids=["room", "no room for one of them"])
def test_two_processes_share_the_rows(full: str, data: Path, tmp_path: Path) -> None:
    still = {"dropout": 0.0, "modality_dropout": 0.0}
    plain = FEATURES | sections(vision={"tcn_dropout": 0.0}) | {"fusion": FEATURES["fusion"] | still}
    plain["train"] = FEATURES["train"] | plain["train"] | {"batch_size": 2}
    path, script, out = tmp_path / "small.yaml", tmp_path / "script.py", tmp_path / "two"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(plain))))
    script.write_text(SCRIPT)
    torchrun(script, path, data, out, full)
    ended = [(tmp_path / f"two-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    if full == "1":
        assert [lines[0] for lines in ended] == ["the disk is full"] * 2
        return
    assert [lines[0] for lines in ended] == ["trained"] * 2
    assert min(map(len, ended)) > 1
    assert sorted(int(i) for lines in ended for i in lines[1:]) == [int(path.stem) for path in files(data)]
    plain["train"]["batch_size"] = 4
    train(make_recipe(**plain), data, tmp_path / "one", folds=["1"])
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_processes_that_see_no_common_disk_compute_all_that_they_read(
    data: Path, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two machines, with a process on each."""
    monkeypatch.setattr(module, "process_rank", lambda: (1, 2))
    train(recipe(), data, tmp_path / "run", folds=["1"])
    there = PreparedData.open(data).rows
    assert sum(computed) == len(files(data)) == sum(there[int(path.stem)].has_video for path in files(data)) > 2


def test_weights_of_the_fixture_are_those_of_a_fit() -> None:
    first, second = (VideoBranch(VisionConfig(**VISION)).backbone for _ in range(2))
    assert isinstance(first, VSCSwin)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
