"""A run says what its step takes, and finds the batch that fits."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_corpus import make_recipe

from deepmsi.cli import main
from deepmsi.errors import UserError
from deepmsi.models.config import DeepMSIConfig
from deepmsi.models.deepmsi import DeepMSI
from deepmsi.train import memory
from deepmsi.train import run as run_module
from deepmsi.train import trainer as trainer_module
from deepmsi.train.memory import estimate, fit_batch, largest, room
from deepmsi.train.recipe import Recipe, load_recipe
from deepmsi.train.run import train

VIDEO: dict[str, Any] = {
    "preset": "small",
    "vision": {"backbone": "small", "image_size": 64, "frames": 2, "tcn_channels": [16], "mean": (0.5,) * 3},
}


def recipe(batch: int = 12, accumulation: int = 1, **vision: Any) -> Recipe:
    settings = {"epochs": 1, "batch_size": batch, "accumulation": accumulation, "selection": "last", "device": "cpu"}
    return make_recipe(
        **{**VIDEO, "vision": {**VIDEO["vision"], **vision}, "train": settings},
        protocol={"name": "stratified-kfold", "folds": 2, "final_fit": False},
        text={"encoder": "features", "dim": 6},
        audio={"encoder": "features", "dim": 6},
    )


def built(wanted: Recipe) -> DeepMSI:
    sections = {name: value for name, value in wanted.sections().items() if name != "preset"}
    return DeepMSI(DeepMSIConfig(num_labels=3, **sections))


@pytest.mark.parametrize("largest_fitting", range(9))
def test_the_largest_size_that_fits(largest_fitting: int) -> None:
    sizes = [1, 2, 3, 4, 6, 8]
    found = largest(sizes, lambda size: size <= largest_fitting)
    assert found == max((size for size in sizes if size <= largest_fitting), default=None)


def test_a_batch_that_fits_stays() -> None:
    wanted = recipe()
    assert fit_batch(built(wanted), wanted, (10**12, "there")) == (
        wanted,
        "--auto-batch: 12 utterances fit, as the recipe has it.",
    )


def test_accumulation_keeps_the_effective_batch() -> None:
    wanted = recipe(batch=12, accumulation=2)
    model = built(wanted)
    four = estimate(model, wanted, 4)
    assert four is not None
    found, told = fit_batch(model, wanted, (round(four.total / memory.SHARE) + 1, "there"))
    assert (found.train.batch_size, found.train.accumulation) == (4, 6)
    assert "train.batch_size=4 and train.accumulation=6 in place of 12 and 2, the same 24 utterances" in told
    assert "the contrastive term sees 4 at a time" in told
    same = {key: value for key, value in found.train if key not in ("batch_size", "accumulation")}
    assert same == {key: value for key, value in wanted.train if key not in ("batch_size", "accumulation")}


def test_what_does_not_fit_at_all_is_told_with_a_way_out() -> None:
    wanted = recipe(frames=8, recompute="none")
    model = built(wanted)
    model.video.backbone.recompute = "block"
    block = estimate(model, wanted, 1)
    model.video.backbone.recompute = "none"
    assert block is not None
    there = (round(block.total / memory.SHARE) + 1, "there")
    with pytest.raises(UserError, match=r"one utterance takes .* GB are there, .*: vision\.recompute=block takes"):
        fit_batch(model, wanted, there)
    assert model.video.backbone.recompute == "none"
    with pytest.raises(UserError, match="choose a smaller model"):
        fit_batch(model, wanted, (1000, "there"))


def test_the_limit_goes_before_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe().train
    assert room(settings.model_copy(update={"memory_limit": 1.5})) == (1_500_000_000, "of train.memory_limit")
    free, whose = room(settings)
    assert whose == "available in RAM"
    assert free > 10**8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room(settings)[0] < 0.5 * free


def test_a_run_takes_what_fits_and_keeps_it(
    video_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = recipe(batch=4)
    two = estimate(built(wanted), wanted, 2)
    assert two is not None
    limit = 1.01 * two.total / memory.SHARE / 1e9
    wanted = wanted.model_copy(update={"train": wanted.train.model_copy(update={"memory_limit": limit})})
    run = tmp_path / "run"
    train(wanted, video_corpus, run, folds=["1"], auto_batch=True)
    told = capsys.readouterr().err
    assert "train.batch_size=2 and train.accumulation=2 in place of 4 and 1" in told
    assert "Memory of a step of 2 utterances, at most: weights " in told
    kept = load_recipe(run / "recipe.yaml").train
    assert (kept.batch_size, kept.accumulation) == (2, 2)
    facts = json.loads((run / "run.json").read_text())["memory"]
    assert facts["saved"] > 0
    # What goes on keeps its batch, whatever is free by then.
    free = wanted.model_copy(update={"train": wanted.train.model_copy(update={"memory_limit": None})})
    assert train(free, video_corpus, run, resume=True, auto_batch=True)["complete"]
    with pytest.raises(UserError, match=r"begun with train\.batch_size=2"):
        train(free, video_corpus, run, resume=True)


def test_a_call_that_is_overtaken_takes_the_batch_of_the_run(
    video_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = recipe(batch=4)
    two = estimate(built(wanted), wanted, 2)
    assert two is not None
    limit = 1.01 * two.total / memory.SHARE / 1e9
    scarce = wanted.model_copy(update={"train": wanted.train.model_copy(update={"memory_limit": limit})})
    describe = run_module._Run._describe
    begun: list[Path] = []
    batches: list[int] = []
    run_fit = trainer_module.run_fit

    def recorded(model: DeepMSI, fit: trainer_module.Fit) -> trainer_module.FitResult:
        batches.append(fit.recipe.train.batch_size)
        return run_fit(model, fit)

    def overtaken(self: Any, data: Path) -> dict[str, Any]:
        """Let another call, which finds more memory, begin after the batch of this one is chosen."""
        if not begun:
            begun.append(self.out)
            train(wanted, video_corpus, self.out, folds=["2"], auto_batch=True)
        return describe(self, data)

    monkeypatch.setattr(run_module._Run, "_describe", overtaken)
    monkeypatch.setattr(trainer_module, "run_fit", recorded)
    run = tmp_path / "run"
    assert train(scarce, video_corpus, run, folds=["1"], auto_batch=True)["complete"]
    kept = load_recipe(run / "recipe.yaml").train
    assert (kept.batch_size, kept.accumulation) == (4, 1)
    told = capsys.readouterr().err
    assert "another call has begun this run with train.batch_size=4 and train.accumulation=1, which are kept" in told
    assert batches == [4, 4]


def test_the_model_that_is_planned_with_is_the_first_that_is_trained(
    video_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[DeepMSIConfig] = []
    original = DeepMSI.__init__

    def counted(self: DeepMSI, config: DeepMSIConfig, **options: Any) -> None:
        built.append(config)
        original(self, config, **options)

    monkeypatch.setattr(DeepMSI, "__init__", counted)
    train(recipe(batch=4), video_corpus, tmp_path / "whole")
    assert len(built) == 2, "one for each fold"
    for fold in ("2", "1"):
        train(recipe(batch=4), video_corpus, tmp_path / "apart", folds=[fold])
    assert len(built) == 4
    for path in sorted((tmp_path / "whole").glob("folds/*/predictions.csv")):
        other = tmp_path / "apart" / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes(), "which fold is the first changes no number"


def test_what_may_not_fit_is_told(video_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = recipe(batch=4).model_dump(mode="json")
    plain["train"]["memory_limit"] = 0.001
    train(Recipe.model_validate(plain), video_corpus, tmp_path / "run", folds=["1"])
    assert "It may not fit: --auto-batch takes a smaller batch" in capsys.readouterr().err


def test_the_command_line_refuses_in_one_line(
    video_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    recipe().save(path)
    words = ["train", str(path), "--data", str(video_corpus), "--out", str(tmp_path / "run"), "--auto-batch"]
    assert main([*words, "--set", "train.memory_limit=0.0001"]) == 2
    assert "A step of one utterance takes" in capsys.readouterr().err.splitlines()[-1]
