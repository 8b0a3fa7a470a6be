"""What training tells of the compressions, and the capacity that follows from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_corpus import make_recipe
from transformers import TrainerCallback

from deepmsi.errors import UserError
from deepmsi.models.config import DeepMSIConfig
from deepmsi.models.deepmsi import DeepMSI
from deepmsi.train import trainer as trainer_module
from deepmsi.train.compression import CompressionLog
from deepmsi.train.recipe import Recipe
from deepmsi.train.run import train

VISION: dict[str, Any] = {"backbone": "small", "image_size": 64, "frames": 2, "tcn_channels": [16], "mean": (0.5,) * 3}
TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 2, "lr": 0.003, "checkpoint_steps": 1, "log_every": 1}


def recipe(vision: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    return make_recipe(
        preset="small",
        vision={**VISION, **(vision or {})},
        train={**TRAIN, **settings},
        protocol={"name": "stratified-kfold", "folds": 2, "final_fit": False},
        text={"encoder": "features", "dim": 6},
        audio={"encoder": "features", "dim": 6},
    )


def model_of(**vision: Any) -> DeepMSI:
    torch.manual_seed(0)
    sections: dict[str, Any] = {"preset": "small", "text": {"encoder": "features", "dim": 6}}
    sections["audio"] = {"encoder": "features", "dim": 6}
    return DeepMSI(DeepMSIConfig(num_labels=3, vision={**VISION, **vision}, **sections)).train()


def run(model: DeepMSI, seed: int, utterances: int = 3) -> list[Any]:
    """One pass; return what each compression kept."""
    torch.manual_seed(seed)
    pixels = torch.randint(256, (utterances, 2, 3, 64, 64), dtype=torch.uint8)
    text, audio = torch.randn(utterances, 6), torch.randn(utterances, 6)
    return model(pixel_values=pixels, text_features=text, audio_features=audio, return_kept=True).kept


def test_what_warms_a_graph_up_is_not_counted() -> None:
    model = model_of()
    log = CompressionLog(model)
    with log.unchanged():
        run(model, 7)
    assert log.take() == {}
    run(model, 1)
    held, before = dict(log.sums), {name: pair.tolist() for name, pair in log.sums.items()}
    with log.unchanged():
        run(model, 7)
    assert all(log.sums[name] is pair for name, pair in held.items())  # a graph adds to these
    assert {name: pair.tolist() for name, pair in log.sums.items()} == before


def test_shares_and_cells_are_those_of_the_frames() -> None:
    model = model_of()
    log = CompressionLog(model)
    cells: list[int] = []
    last = model.video.backbone.stages()[-1].downsample
    last.register_forward_hook(lambda module, args, out: cells.extend(out.cu_seqlens.diff().tolist()))
    kept = [run(model, seed) for seed in (1, 2)]
    told = log.take()
    assert told.keys() == {"keep/0", "keep/1", "cells/stage3"}
    came = [2 * 6 * 64, sum(int(step[0].cu_seqlens[-1]) for step in kept)]
    for number in (0, 1):
        left = sum(int(step[number].cu_seqlens[-1]) for step in kept)
        assert told[f"keep/{number}"] == pytest.approx(left / came[number])
    assert told["cells/stage3"] == pytest.approx(np.mean(cells))
    assert log.take() == {}
    model.eval()
    run(model, 3)
    assert log.take() == {}


def test_overflow_is_what_the_capacity_dropped() -> None:
    free, tight = model_of(threshold=0.9), model_of(threshold=0.9)
    lengths = [kept.cu_seqlens.diff() for kept in run(free, 1)]
    rows = int(lengths[0].median())
    tight.video.backbone.reserve([rows, 64])
    log = CompressionLog(tight)
    run(tight, 1)
    told = log.take()
    assert told["overflow/0"] == pytest.approx(float((lengths[0] - rows).clamp_min(0).sum() / lengths[0].sum()))
    assert told["overflow/0"] > 0
    assert told["overflow/1"] == 0


def test_the_capacity_is_the_quantile_of_what_was_kept() -> None:
    model = model_of()
    log = CompressionLog(model, measure=True)
    lengths: list[list[int]] = [[], []]
    for seed in range(4):
        for number, kept in enumerate(run(model, seed)):
            lengths[number] += kept.cu_seqlens.diff().tolist()
    state = json.loads(json.dumps(log.state()))
    rows = log.reserve(0.9)
    assert rows == tuple(int(np.quantile(each, 0.9, method="inverted_cdf")) for each in lengths)
    assert max(lengths[0]) > rows[0]
    assert model.config.vision.capacity == rows
    assert model.video.backbone.schedule.static
    out = run(model, 9)
    assert [len(kept.positions) for kept in out] == [6 * each for each in rows]
    other = model_of()
    again = CompressionLog(other, measure=True)
    again.load(state, torch.device("cpu"))
    assert again.reserve(0.9) == rows
    third = CompressionLog(model_of(), measure=True)
    third.load(json.loads(json.dumps(log.state())), torch.device("cpu"))
    assert third.model.config.vision.capacity == rows


@pytest.mark.parametrize("vision", [{"schedule": None}, {"keep": 16}, {"capacity": 40}])
def test_a_capacity_is_for_thresholds(vision: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="keeps tokens by a threshold"):
        CompressionLog(model_of(**vision), measure=True)


def test_a_run_without_a_capacity_to_find_leaves_nothing_behind(video_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keeps tokens by a threshold"):
        train(recipe({"keep": 16}, capacity_quantile=0.9), video_corpus, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


class Killed(BaseException):
    """Stands for a kill."""


def test_a_run_reserves_after_its_first_epoch_and_resumes_bit_for_bit(
    video_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = recipe(capacity_quantile=0.9)
    train(wanted, video_corpus, tmp_path / "whole", folds=["1"])
    assert "vision.capacity=[" in capsys.readouterr().err
    history = [json.loads(line) for line in (tmp_path / "whole/folds/01/history.jsonl").read_text().splitlines()]
    steps = [event for event in history if "keep/0" in event]  # a batch may be without any video
    assert {event["split"] for event in steps} == {"train"}
    assert all(1 <= event["cells/stage3"] <= 16 for event in steps)
    assert {event["epoch"] > 1 for event in steps if "overflow/0" in event} == {True}
    assert all("overflow/0" in event for event in steps if event["epoch"] > 1)

    init = trainer_module.UtteranceTrainer.__init__
    for step in (1, 4):  # within the measuring, and behind it

        class Killer(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, last: int = step, **kwargs: Any) -> None:
                if state.global_step == last:
                    raise Killed

        def patched(self: Any, *args: Any, killer: Any = Killer, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.add_callback(killer())

        monkeypatch.setattr(trainer_module.UtteranceTrainer, "__init__", patched)
        with pytest.raises(Killed):
            train(wanted, video_corpus, tmp_path / f"cut{step}", folds=["1"])
        monkeypatch.undo()
        train(wanted, video_corpus, tmp_path / f"cut{step}", folds=["1"], resume=True)
        found = (tmp_path / f"cut{step}/folds/01/predictions.csv").read_bytes()
        assert found == (tmp_path / "whole/folds/01/predictions.csv").read_bytes()


def test_the_kept_model_has_its_capacity(video_corpus: Path, tmp_path: Path) -> None:
    wanted = recipe(capacity_quantile=0.9, epochs=2)
    plain = wanted.model_dump(mode="json")
    plain["protocol"] |= {"final_fit": True}
    plain["train"] |= {"selection": "last"}
    train(Recipe.model_validate(plain), video_corpus, tmp_path / "run")
    model = DeepMSI.from_pretrained(tmp_path / "run/model")
    assert isinstance(model.config.vision.capacity, tuple)
    assert model.video.backbone.schedule.capacity == model.config.vision.capacity
    assert load_file(tmp_path / "run/model/model.safetensors")


def test_what_is_not_captured_is_told_with_the_reason(
    video_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(recipe(cuda_graphs=True, epochs=1), video_corpus, tmp_path / "run", folds=["1"])
    assert "the video branch is not captured as a CUDA graph: no CUDA device is visible." in capsys.readouterr().err


def test_no_reason_is_given_while_the_capacity_is_not_yet_found(
    video_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU it was to set train.capacity_quantile, which is set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(recipe(cuda_graphs=True, capacity_quantile=0.9, epochs=1), video_corpus, tmp_path / "run", folds=["1"])
    found, *after = capsys.readouterr().err.split("vision.capacity=[")
    assert "CUDA graph" not in found
    assert [text.count("not captured as a CUDA graph") for text in after] == [1]
