"""Runs from end to end: learning, resuming bit for bit, protocols, several processes, records, refusals."""

import csv
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import wave
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_corpus import LABELS, make_recipe, prepared_corpus, sound_manifest, write_corpus
from transformers import TrainerCallback

from deepmsi.data.files import TEMPORARY, claimed
from deepmsi.data.options import PrepareOptions
from deepmsi.data.prepare import prepare
from deepmsi.data.store import PreparedData
from deepmsi.errors import UserError
from deepmsi.models.config import DeepMSIConfig, validated
from deepmsi.models.deepmsi import DeepMSI
from deepmsi.models.offline import LogMelEncoder, WaveformProcessor
from deepmsi.report import report
from deepmsi.train import checkpoints as checkpoints_module
from deepmsi.train import optimizer as optimizer_module
from deepmsi.train import rows as rows_module
from deepmsi.train import run as run_module
from deepmsi.train import trainer as trainer_module
from deepmsi.train.curve import best_epoch, best_point, temperature_at, watched_scores
from deepmsi.train.evaluate import evaluate
from deepmsi.train.join import fold_folder, join_folds
from deepmsi.train.layout import fit_to_data, lay_out
from deepmsi.train.metrics import compare_predictions
from deepmsi.train.optimizer import parameter_groups, pretrained_parts, stepping
from deepmsi.train.predict import predict_rows
from deepmsi.train.recipe import AugmentSettings, load_recipe
from deepmsi.train.record import read_predictions
from deepmsi.train.rows import select_rows
from deepmsi.train.run import _save_model, train

VIDEO: dict[str, Any] = {
    "preset": "small",
    "vision": {"backbone": "small", "image_size": 64, "frames": 2, "tcn_channels": [16], "mean": (0.5,) * 3},
    "train": {"epochs": 2, "batch_size": 2, "lr": 0.003, "accumulation": 2, "checkpoint_steps": 1},
}


def weights(run: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(run / "model" / "model.safetensors").items()}


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].tobytes() == right[name].tobytes(), name


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Stands for a kill: nothing in the trainer catches it."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch):
    """Make the next run die as soon as it has taken so many steps (after the checkpoint, if that step has one)."""

    def arm(step: int) -> None:
        class Killer(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise Killed

        init = trainer_module.UtteranceTrainer.__init__

        def patched(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.add_callback(Killer())

        monkeypatch.setattr(trainer_module.UtteranceTrainer, "__init__", patched)

    yield arm
    monkeypatch.undo()


def test_a_run_learns_and_records_what_made_it(split_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    metrics = train(make_recipe(), split_corpus, run)
    assert metrics["accuracy"] == 1.0
    assert metrics["complete"]
    assert json.loads((run / "metrics.json").read_text())["confusion_matrix"] == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]
    facts = json.loads((run / "run.json").read_text())
    assert facts["labels"] == list(LABELS)
    assert len(facts["data"]["fingerprint"]) >= 32
    for key in ("deepmsi", "torch", "seed", "command", "protocol", "finished"):
        assert facts[key] is not None
    splits = json.loads((run / "splits.json").read_text())["test"]
    assert set(facts["trained_ids"]) == set(splits["train"])
    assert not set(splits["train"]) & set(splits["test"])
    assert set(read_predictions(run)) == set(splits["test"])
    assert load_recipe(run / "recipe.yaml").text.dim == 6
    events = history(run)
    assert {event["split"] for event in events} == {"train", "dev"}
    assert all({"step", "epoch", "loss"} <= event.keys() for event in events)
    assert list((run / "logs").glob("events.*"))
    assert DeepMSI.from_pretrained(run / "model").config.label_names == list(LABELS)


@pytest.mark.parametrize(("selection", "seen"), [("auto", 48), ("inner-validation", 36), ("last", 36)])
def test_rows_that_chose_the_epoch_are_told_as_seen(
    selection: str, seen: int, split_corpus: Path, tmp_path: Path
) -> None:
    train(make_recipe(train={"epochs": 1, "selection": selection}), split_corpus, tmp_path / "run")
    assert evaluate(tmp_path / "run", split_corpus)["rows_seen_in_training"] == seen


def test_accumulated_gradients_are_those_of_the_whole_batch(split_corpus: Path, tmp_path: Path) -> None:
    settings = {"loss": {"class_weights": [1.0, 5.0, 0.2]}, "fusion": {"dropout": 0.0, "modality_dropout": 0.0}}
    losses = []
    # 36 rows: the last step has 6 of them, one by one or as 5 and 1.
    for size, accumulation in ((10, 1), (1, 10), (5, 2)):
        run = tmp_path / str(size)
        taken = {"batch_size": size, "accumulation": accumulation, "epochs": 2}
        train(make_recipe(**settings, train=taken), split_corpus, run)
        events = [event for event in history(run) if event["split"] == "train"]
        losses.append([event[name] for event in events for name in ("loss", "cross_entropy")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_a_checkpoint_of_other_groups_of_parameters_is_refused(
    split_corpus: Path, tmp_path: Path, kill_at, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions of deepmsi may group them otherwise, and moments go by their place in the groups."""
    recipe = make_recipe(train={"checkpoint_steps": 1})
    kill_at(2)
    with pytest.raises(Killed):
        train(recipe, split_corpus, tmp_path / "run")
    monkeypatch.undo()

    def otherwise(model: DeepMSI, settings: object) -> list[dict[str, Any]]:
        first, *others = model.parameters()
        return [{"params": [first]}, {"params": others}]

    monkeypatch.setattr(optimizer_module, "parameter_groups", otherwise)
    with pytest.raises(UserError, match=r"checkpoint-2 has an optimizer with other groups .* delete .*checkpoints"):
        train(recipe, split_corpus, tmp_path / "run", resume=True)


@pytest.mark.parametrize(("stored", "fused"), [(True, None), (None, True)])
def test_a_run_that_goes_on_elsewhere_steps_as_it_would_there(stored: bool | None, fused: bool | None) -> None:
    """A checkpoint says whether its steps were fused, which gives other bits."""
    weight = torch.ones(3, requires_grad=True)
    states = []
    for choice in (stored, fused):
        optimizer = torch.optim.AdamW([weight], fused=choice)
        weight.grad = torch.ones(3)
        optimizer.step()
        states.append(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(partial(stepping, fused=fused))
    optimizer.load_state_dict(states[0])
    assert [group["fused"] for group in optimizer.param_groups] == [fused]
    assert states[0]["param_groups"][0]["fused"] is stored, "what was read is not changed"
    optimizer.step()


def test_steps_are_fused(split_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Recorded(torch.optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self.defaults["fused"])

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    train(make_recipe(train={"epochs": 1}), split_corpus, tmp_path / "run")
    assert made == [True]


def test_the_small_model_overfits_a_small_set(video_corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        **VIDEO | {"train": {"epochs": 20, "batch_size": 4, "lr": 0.003, "checkpoint_every": 99}},
        protocol={"name": "stratified-kfold", "folds": 2},
        augment=AugmentSettings.none().model_dump(),
        drop=["text", "audio"],
    )
    run = tmp_path / "run"
    train(recipe, video_corpus, run)
    scores = evaluate(run, video_corpus)
    assert scores["n"] == 8  # the rows that have frames
    assert scores["accuracy"] == 1.0
    assert scores["rows_seen_in_training"] == 8


def test_the_model_keeps_how_its_frames_were_cut(video_corpus: Path) -> None:
    cut = {"resize": "pad", "face": True, "face_model": "yunet.onnx"}
    data = PreparedData.open(video_corpus)
    data.options = data.options.model_copy(update=cut)
    recipe = fit_to_data(make_recipe(**VIDEO), data)
    for section in (recipe.vision, recipe.prepare):
        assert section.model_dump(include=set(cut)) == cut


def test_options_that_prepared_data_do_not_have_are_told(
    video_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = PreparedData.open(video_corpus)
    fit_to_data(make_recipe(**VIDEO), data)
    fit_to_data(make_recipe(**VIDEO, prepare={"size": 64, "sample_rate": 16000, "text_encoder": None}), data)
    assert capsys.readouterr().err == ""
    asked = {"size": 128, "text_encoder": "some/bert"}
    recipe = fit_to_data(make_recipe(**VIDEO, prepare=asked), data)
    assert capsys.readouterr().err == (
        "The data were prepared with size=64: prepare.size=128 changes nothing.\n"
        "The data were prepared with text_encoder=None: prepare.text_encoder=some/bert changes nothing.\n"
    )
    recipe.save(tmp_path / "recipe.yaml")
    fit_to_data(load_recipe(tmp_path / "recipe.yaml"), data)
    assert capsys.readouterr().err == "", "what a run made of it is told no more"


@pytest.mark.parametrize(("stored", "kept"), [(64, None), (96, 96)])
def test_frames_are_cut_for_prediction_as_they_were_stored(
    stored: int, kept: int | None, video_corpus: Path, tmp_path: Path
) -> None:
    data = PreparedData.open(video_corpus)
    data.options = data.options.model_copy(update={"size": stored})
    recipe = fit_to_data(make_recipe(**VIDEO), data)
    assert (recipe.vision.stored_size, recipe.prepare.size) == (kept, stored)
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("workers", "kill", "corrupt", "average"),
    [(0, 2, False, None), (2, 3, True, 0.9)],
    ids=["at an epoch's end", "inside an epoch, with loader processes, averaged weights and a damaged checkpoint"],
)
def test_resume_is_bit_for_bit(
    workers: int,
    kill: int,
    corrupt: bool,
    average: float | None,
    video_corpus: Path,
    tmp_path: Path,
    kill_at,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    described = VIDEO | {"train": VIDEO["train"] | {"average": average}}
    recipe = make_recipe(**described, protocol={"name": "stratified-kfold", "folds": 3})
    settings = recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": workers})})
    # One fold only, and no final fit: what is killed and what is compared is the fit of that fold.
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    keep_models(monkeypatch)
    train(recipe, video_corpus, whole, folds=[1])
    kill_at(kill)
    with pytest.raises(Killed):
        train(settings, video_corpus, killed, folds=[1])
    monkeypatch.undo()
    keep_models(monkeypatch)
    checkpoints = killed / "folds" / "01" / "checkpoints"
    newest = max(checkpoints.iterdir(), key=lambda path: int(path.name.split("-")[1]))
    if corrupt:
        damaged = newest / "model.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-100])
    train(settings, video_corpus, killed, resume=True, folds=[1])
    said = capsys.readouterr().err
    assert (f"{newest} is skipped: model.safetensors has" in said) == corrupt
    assert_same_bits(whole / "folds" / "01", killed / "folds" / "01")
    assert history(whole / "folds" / "01") == history(killed / "folds" / "01")
    assert (whole / "folds/01/predictions.csv").read_text() == (killed / "folds/01/predictions.csv").read_text()


@pytest.mark.parametrize("kill", ["step", "score"])
def test_a_checkpoint_at_the_end_of_an_epoch_knows_its_scores(
    kill: str, split_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 36 rows in batches of 16 are 3 steps an epoch, and every third step has a checkpoint.
    settings = {"selection": "dev", "epochs": 3, "batch_size": 16, "checkpoint_steps": 3, "checkpoint_every": 9}
    recipe = make_recipe(train=settings)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(recipe, split_corpus, whole)
    places = {
        "step": (trainer_module.UtteranceTrainer, "_save_checkpoint"),
        "score": (trainer_module, "watched_scores"),
    }
    place, calls = places[kill], []
    then = getattr(*place)

    def dies(*arguments, **options):
        result = then(*arguments, **options)
        calls.append(place)
        if len(calls) == 2:
            raise Killed
        return result

    with monkeypatch.context() as patched:
        patched.setattr(*place, dies)
        with pytest.raises(Killed):
            train(recipe, split_corpus, killed)
    train(recipe, split_corpus, killed, resume=True)
    assert history(whole) == history(killed)
    assert_same_bits(whole, killed)
    facts = [json.loads((run / "fold.json").read_text()) for run in (whole, killed)]
    assert facts[0]["kept_epoch"] == facts[1]["kept_epoch"]
    assert facts[0]["temperature"] == facts[1]["temperature"]


def test_a_fit_is_not_resumed_by_another_number_of_processes(
    split_corpus: Path, tmp_path: Path, kill_at, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train={"epochs": 4, "checkpoint_steps": 2})
    kill_at(3)
    with pytest.raises(Killed):
        train(recipe, split_corpus, tmp_path / "run")
    monkeypatch.undo()

    class OfTwo(trainer_module.EpochBatches):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **{**options, "world": 2})

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "EpochBatches", OfTwo)
        with pytest.raises(UserError, match="checkpoint-2 is of a training of"):
            train(recipe, split_corpus, tmp_path / "run", resume=True)
    assert train(recipe, split_corpus, tmp_path / "run", resume=True)["complete"]


def test_a_fit_keeps_no_memory_after_its_end(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainer holds gradients and moments: kept ones would add up over the folds of a run."""
    trainers: list[weakref.ref] = []
    init = trainer_module.UtteranceTrainer.__init__

    def noted(self, *args, **kwargs):
        trainers.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.UtteranceTrainer, "__init__", noted)
    gc.disable()  # a collection that happens to come would hide it
    try:
        train(make_recipe(protocol="group-kfold", train={"epochs": 1}), corpus, tmp_path / "run", folds=[1, 2])
    finally:
        gc.enable()
    assert [trainer() for trainer in trainers] == [None, None]


def keep_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save each fit's model beside its history, which a run does for the kept model only."""
    fit = trainer_module.run_fit

    def run_fit(model, description):
        result = fit(model, description)
        model.save_pretrained(description.folder / "model")
        return result

    monkeypatch.setattr(trainer_module, "run_fit", run_fit)


def test_a_second_seed_differs_and_the_same_does_not(split_corpus: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(make_recipe(seed=seed, train={"epochs": 1}), split_corpus, tmp_path / name)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_bits(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    ("protocol", "folds"),
    [
        ({"name": "stratified-kfold", "folds": 2, "repeats": 2}, 4),
        ({"name": "group-kfold", "folds": 2}, 2),
        ({"name": "leave-one-speaker-out"}, 4),
        ({"name": "paper-kfold10", "final_fit": False}, 10),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_protocols_run_to_their_end(
    protocol: dict, folds: int, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(protocol=protocol, train={"epochs": 1, "checkpoint_every": 9})
    metrics = train(recipe, corpus, tmp_path / "run")
    assert len(metrics["folds"]) == folds
    assert metrics["n"] == 36
    assert set(metrics["over_folds"]) == {"accuracy", "uar", "weighted_f1", "macro_f1"}
    with (tmp_path / "run" / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        ids = [row["id"] for row in csv.DictReader(stream)]
    assert len(set(ids)) == 36
    assert len(ids) == 36 * protocol.get("repeats", 1)
    by = metrics["intervals_by"]
    wilson = metrics["intervals"]["accuracy_wilson"]
    assert all(found["accuracy"][0] <= wilson[0] and wilson[1] <= found["accuracy"][1] for found in by.values())
    assert {grouping: found["groups"] for grouping, found in by.items()} == {"speaker": 4, "dialogue": 6}
    assert all(by["speaker"][name][0] <= metrics[name] <= by["speaker"][name][1] for name in metrics["over_folds"])
    assert (tmp_path / "run" / "model").is_dir() == recipe.protocol.final_fit
    leaks = protocol["name"] == "paper-kfold10"
    assert metrics["leaks"] == leaks
    assert ("leaks" in metrics["protocol"]) == leaks
    assert ("leaks" in capsys.readouterr().err) == leaks


def test_inner_fits_of_other_parts_do_not_choose(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run has them that another version began, which parted the rows otherwise."""
    settings = {"selection": "inner-folds", "inner_folds": 2, "epochs": 2}
    recipe = make_recipe(protocol={"name": "group-kfold", "folds": 2, "final_fit": False}, train=settings)
    run, told = tmp_path / "run", "01 was begun with other inner parts, and is begun anew.\n"
    before = train(recipe, corpus, run)
    fold = run / "folds" / "01"

    def resumed() -> list[str]:
        (fold / "fold.json").unlink()
        wrong = [path for path in fold.glob("inner/*/history.jsonl") if path.write_text("damaged")]
        after = train(recipe, corpus, run, resume=True)
        assert len(wrong) == 2
        assert {**after, "folds": 0} == {**before, "folds": 0}
        return [json.loads(path.read_text()) for path in fold.glob("inner/*/done.json")]

    assert told not in capsys.readouterr().err
    for damaged in ('{"rows": "of another version"}', None):
        (fold / "inner.json").unlink() if damaged is None else (fold / "inner.json").write_text(damaged)
        assert resumed() == [{"epochs": 2}, {"epochs": 2}]
        assert told in capsys.readouterr().err
    with pytest.raises(json.JSONDecodeError):  # what is of these parts is read, not fitted again
        resumed()


def test_folds_of_one_row_have_no_mean_of_their_scores(tmp_path: Path) -> None:
    recipe = make_recipe(protocol={"name": "leave-one-out", "final_fit": False}, train={"epochs": 1})
    metrics = train(recipe, prepared_corpus(tmp_path / "data", rows=9), tmp_path / "run")
    assert len(metrics["folds"]) == metrics["n"] == 9
    assert "over_folds" not in metrics


def test_epochs_come_from_inner_folds_and_the_final_fit_takes_all_rows(corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        protocol={"name": "stratified-kfold", "folds": 2},
        train={"selection": "inner-folds", "inner_folds": 2, "epochs": 3, "metric": "loss"},
    )
    run = tmp_path / "run"
    metrics = train(recipe, corpus, run)
    for fold in metrics["folds"]:
        assert fold["epochs_from"] == "2 inner fits"
        assert 1 <= fold["epochs"] == fold["kept_epoch"] <= 3
        inner = list((run / "folds" / fold["name"] / "inner").iterdir())
        assert len(inner) == 2
    facts = json.loads((run / "run.json").read_text())
    assert facts["final_fit"]["rows"] == len(facts["trained_ids"]) == 36


def test_best_epoch() -> None:
    a = [
        {"epoch": 1, "loss": 3.0, "uar": 0.5},
        {"epoch": 2, "loss": 1.0, "uar": 0.5},
        {"epoch": 3, "loss": 2, "uar": 0},
    ]
    b = [
        {"epoch": 1, "loss": 1.0, "uar": 0.5},
        {"epoch": 2, "loss": 2.5, "uar": 0.5},
        {"epoch": 3, "loss": 1, "uar": 1},
    ]
    assert best_epoch([a, b], [3, 1], "loss") == 2
    assert best_epoch([a, b], [1, 1], "loss") == 3
    assert best_epoch([a, b], [3, 1], "uar") == 2  # 0.5, 0.5, 0.25: the tie goes to the lower loss
    assert best_epoch([a, b], [1, 9], "uar") == 3


@pytest.mark.parametrize("selection", ["auto", "inner-validation", "inner-folds", "last"])
def test_calibration_divides_the_logits_by_one_temperature(selection: str, corpus: Path, tmp_path: Path) -> None:
    logits, weights, temperatures = {}, {}, {}
    for calibrate in (True, False):
        settings = {"selection": selection, "inner_folds": 2, "epochs": 2, "calibrate": calibrate}
        recipe = make_recipe(protocol={"name": "stratified-kfold", "folds": 2}, train=settings)
        run = tmp_path / str(calibrate)
        metrics = train(recipe, corpus, run)
        facts = json.loads((run / "run.json").read_text())
        temperatures[calibrate] = [fold["temperature"] for fold in (*metrics["folds"], facts["final_fit"])]
        with (run / "predictions.csv").open(newline="", encoding="utf-8") as stream:
            told = np.log([[float(row[name]) for name in LABELS] for row in csv.DictReader(stream)])
        logits[calibrate] = told - told.mean(1, keepdims=True)
        weights[calibrate] = DeepMSI.from_pretrained(run / "model").classifier.output.weight.detach().numpy()
        assert metrics["log_loss"] > 0
        assert sum(b["n"] for b in metrics["reliability"]) == 36
    assert temperatures[False] == [None] * 3
    if selection == "last":
        assert temperatures[True] == [None] * 3
        np.testing.assert_array_equal(weights[True], weights[False])
        return
    first, second, final = temperatures[True]
    assert len({1.0, first, second, final}) == 4
    divided = np.concatenate([logits[False][:18] / first, logits[False][18:] / second])
    np.testing.assert_allclose(logits[True], divided, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(weights[True], weights[False] / final, rtol=1e-5)


def test_overconfidence_does_not_choose_the_epoch_by_the_calibrated_loss() -> None:
    # The first epoch guesses; the second is right in four of five rows, and as sure of the fifth.
    labels, sharp = [0, 1, 0, 1, 1], np.array([[9, 0], [0, 9], [9, 0], [0, 9], [9, 0]], dtype=np.float32)
    curve = [{"epoch": k, **watched_scores(scale * sharp, labels)} for k, scale in enumerate((0.0, 1.0), 1)]
    assert best_point(curve, "loss")["epoch"] == best_epoch([curve], [5], "loss") == 1
    assert best_point(curve, "calibrated_loss")["epoch"] == best_epoch([curve], [5], "calibrated_loss") == 2
    assert temperature_at([curve], [5], 2) == pytest.approx(curve[1]["temperature"])
    assert temperature_at([curve, curve], [5, 3], 2) == pytest.approx(curve[1]["temperature"])
    recorded_before = [{"epoch": 2, "loss": 1.0}]
    assert temperature_at([recorded_before, curve], [1, 1], 2) is None
    assert temperature_at([curve], [5], 3) is None


def test_selection_keeps_the_best_epoch_and_patience_stops(split_corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(train={"selection": "dev", "epochs": 12, "patience": 2, "metric": "loss", "lr": 0.2})
    run = tmp_path / "run"
    (fold,) = train(recipe, split_corpus, run)["folds"]
    curve = [event for event in history(run) if event["split"] == "dev"]
    assert fold["epochs"] == len(curve) < 12
    assert fold["epochs"] - fold["kept_epoch"] == 2
    assert curve[fold["kept_epoch"] - 1]["loss"] == min(event["loss"] for event in curve)
    # A finished run that is resumed trains no further, and so needs no GPU.
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    for device in ("cpu", "cuda"):
        settings = recipe.train.model_copy(update={"device": device})
        train(recipe.model_copy(update={"train": settings}), split_corpus, run, resume=True)
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first epoch score best, so that its weights are read back."""
    scores = trainer_module.watched_scores

    def falling(logits, labels):
        falling.calls += 1
        return scores(logits, labels) | {"loss": float(falling.calls)}

    falling.calls = 0
    monkeypatch.setattr(trainer_module, "watched_scores", falling)


KEEPS_BEST: dict[str, Any] = {
    "selection": "inner-validation",
    "inner_folds": 3,
    "epochs": 3,
    "metric": "loss",
    "calibrate": False,
}


def test_a_fit_that_was_not_scored_yet_resumes(
    split_corpus: Path, tmp_path: Path, best_first: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = make_recipe(train=KEEPS_BEST), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("deepmsi.train.run.predict_logits", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(recipe, split_corpus, run)
    kept = load_file(run / "best.safetensors")
    (fold,) = train(recipe, split_corpus, run, resume=True)["folds"]
    assert (fold["epochs"], fold["kept_epoch"]) == (3, 1)
    assert all(np.array_equal(kept[name], value) for name, value in weights(run).items())
    assert not (run / "best.safetensors").exists()


def test_a_fit_that_begins_anew_leaves_nothing_of_the_try_before(
    corpus: Path, tmp_path: Path, best_first: None, kill_at
) -> None:
    recipe, run = make_recipe(protocol="group-kfold", train=KEEPS_BEST | {"checkpoint_every": 9}), tmp_path / "run"
    train(recipe, corpus, run, folds=[2])
    fold = run / "folds" / "01"
    (fold / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (fold / "best.safetensors").write_bytes(b"of the try before")
    kill_at(0)
    with pytest.raises(Killed):
        train(recipe, corpus, run, folds=[1])
    assert not list((fold / "checkpoints").glob("*"))
    assert not (fold / "best.safetensors").exists()


def test_best_weights_of_another_epoch_are_refused(
    split_corpus: Path, tmp_path: Path, best_first: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoints_module.save_weights
    monkeypatch.setattr(checkpoints_module, "save_weights", lambda model, path, epoch=None: save(model, path, 2))
    with pytest.raises(UserError, match=r"is of epoch 2, and epoch 1 scored best: delete .*checkpoints"):
        train(make_recipe(train=KEEPS_BEST), split_corpus, tmp_path / "run")


def test_checkpoints_that_cannot_be_read_are_put_aside(
    corpus: Path, tmp_path: Path, kill_at, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = make_recipe(protocol="group-kfold", train={"checkpoint_steps": 1}), tmp_path / "run"
    kill_at(1)
    with pytest.raises(Killed):
        train(recipe, corpus, run, folds=[1])
    monkeypatch.undo()
    (checkpoint,) = (run / "folds" / "01" / "checkpoints").iterdir()
    (checkpoint / "files.json").unlink()
    train(recipe, corpus, run, folds=[1], resume=True)
    aside = run / "folds" / "01" / "checkpoints-damaged"
    assert [path.name for path in aside.iterdir()] == [checkpoint.name]
    assert f"The checkpoints that cannot be read are kept in {aside}." in capsys.readouterr().err


def test_of_two_calls_that_begin_one_run_the_second_takes_part_or_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, other = (make_recipe(protocol="group-kfold", train={"epochs": 1, "lr": lr}) for lr in (0.02, 0.01))
    describe = run_module._Run._describe
    begun: list[Path] = []

    def overtaken(self, data):
        """Let another call begin between the look into the directory and what is written there."""
        if not begun:
            begun.append(self.out)
            train(recipe, corpus, self.out, folds=[2])
        return describe(self, data)

    monkeypatch.setattr(run_module._Run, "_describe", overtaken)
    with pytest.raises(UserError, match=r"Another call has begun a run in .*: give another directory"):
        train(recipe, corpus, tmp_path / "a")
    begun.clear()
    with pytest.raises(UserError, match=r"was begun with train\.lr=0\.02 and is resumed with 0\.01"):
        train(other, corpus, tmp_path / "b", resume=True)
    begun.clear()
    result = train(recipe, corpus, tmp_path / "c", folds=[1])
    assert [fold["name"] for fold in result["folds"]] == ["01", "02"]
    assert load_recipe(tmp_path / "c" / "recipe.yaml").train.lr == 0.02


def test_folds_run_apart_and_join(corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(protocol={"name": "stratified-kfold", "folds": 3}, train={"epochs": 1})
    apart, whole = tmp_path / "apart", tmp_path / "whole"
    first = train(recipe, corpus, apart, folds=[3])
    assert not first["complete"]
    assert first["n"] == 12
    assert not (apart / "model").exists()
    joined = train(recipe, corpus, apart, folds=["1", "02"])
    expected = train(recipe, corpus, whole)
    for result in (joined, expected):
        for fold in result["folds"]:
            fold.pop("seconds")
    assert joined == expected
    assert_same_bits(apart, whole)
    for other in ("9", "²"):
        with pytest.raises(UserError, match=f"There is no fold '{other}': the folds are 01, 02, 03"):
            train(recipe, corpus, apart, folds=[other])
    predictions = apart / "folds" / "02" / "predictions.csv"
    whole_table = predictions.read_text().splitlines()
    for cells in ("nan,nan,nan", "7,-3,-3", "0.5,0.5,0.5", "0.5,0.5", "x,y,z"):
        start = ",".join(whole_table[1].split(",")[:3])
        predictions.write_text("\n".join([whole_table[0], f"{start},{cells}", *whole_table[2:]]) + "\n")
        with pytest.raises(UserError, match=r"predictions.csv (is damaged|cannot be read).*to run that fold again"):
            join_folds(apart)


@pytest.mark.parametrize("speaker", ["../../../elsewhere/x", "Anna/Bob", "Änne", "x" * 300])
def test_a_folds_folder_lies_in_the_run_whatever_its_name(speaker: str, tmp_path: Path) -> None:
    names = [f"speaker-{speaker}", f"speaker-{speaker}2", f"speaker-{speaker}/2"]
    folders = [fold_folder(tmp_path, name, single=False) for name in names]
    assert len(set(folders)) == 3
    for folder in folders:
        folder.mkdir(parents=True)
        assert folder.resolve().parent == (tmp_path / "folds").resolve()
    assert folders[0].name == names[0] or "/" in speaker or len(speaker) > 200


def test_calls_at_the_same_time_share_the_folds(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What another call is at work on is left to it: here this test stands for that call."""
    recipe, run = make_recipe(protocol={"name": "stratified-kfold", "folds": 3}, train={"epochs": 1}), tmp_path / "run"
    other = run / "folds" / "02"
    train(recipe, corpus, run, folds=[1])
    other.mkdir()
    with claimed(other) as free:
        assert free
        assert not train(recipe, corpus, run, resume=True)["complete"]
    assert "Fold 02 is being run by another call: it is left to that one." in capsys.readouterr().err
    assert not (run / "model").exists()
    with claimed(run):
        assert train(recipe, corpus, run, resume=True)["complete"]
    assert "The final fit is being run by another call" in capsys.readouterr().err
    assert not (run / "model").exists()
    train(recipe, corpus, run, resume=True)
    assert (run / "model").is_dir()


@pytest.mark.parametrize(
    "options",
    [
        {"train": {"sampler": "balanced", "focal_gamma": 2.0}},
        {"train": {"logit_adjustment": 1.0}, "loss": {"class_weights": "balanced"}},
    ],
    ids=["balanced sampler and focal loss", "logit adjustment and class weights"],
)
def test_options_for_imbalance(options: dict, split_corpus: Path, tmp_path: Path) -> None:
    assert train(make_recipe(**options), split_corpus, tmp_path / "run")["accuracy"] > 0.9


def test_classes_that_are_never_predicted_are_told_in_one_sentence(
    split_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_recipe(train={"epochs": 1, "lr": 1e-9}), split_corpus, tmp_path / "run")
    told = [line for line in capsys.readouterr().err.splitlines() if "never predicted" in line]
    assert len(told) == 1
    assert " are never predicted: try loss.class_weights=balanced" in told[0]


def test_excluded_labels_are_left_out_and_told(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(exclude_labels=["joy"], protocol={"name": "group-kfold", "folds": 2}, train={"epochs": 1})
    assert train(recipe, corpus, tmp_path / "run")["labels"] == ["anger", "sadness"]
    assert "12 rows left out: the label 'joy' is excluded by the recipe." in capsys.readouterr().err
    assert evaluate(tmp_path / "run", corpus)["n"] == 24


def test_excluded_labels_that_no_row_has_are_told(
    split_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_recipe(exclude_labels=["Joy"], train={"epochs": 1}), split_corpus, tmp_path / "run")
    assert "No row has 'Joy', which exclude_labels leaves out." in capsys.readouterr().err


def _text_in_the_test_part_alone(table: list[dict[str, str]]) -> None:
    for row in table:
        if row["split"] == "train":
            row["text_features"] = ""


def test_a_modality_that_only_the_test_part_has_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared_corpus(tmp_path, rows=24, splits=("train",) * 3 + ("test",), edit=_text_in_the_test_part_alone)
    train(make_recipe(train={"epochs": 1}), data, tmp_path / "run")
    told = capsys.readouterr().err
    assert "Fold 'test': rows of its test part have text and none of its training part has" in told


def test_class_weights_of_another_number_of_classes(split_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="class_weights has 2 weights for 3 classes: anger, joy, sadness"):
        train(make_recipe(loss={"class_weights": [1, 2]}), split_corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_with_a_sentence(split_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+, so training stopped: lower train\.lr"):
        train(
            make_recipe(train={"lr": 10, "weight_decay": 100, "max_grad_norm": 0, "epochs": 9}),
            split_corpus,
            tmp_path / "run",
        )
    assert not (tmp_path / "run" / "model").exists()


def test_encoders_have_their_own_rate() -> None:
    recipe = make_recipe(train={"encoder_lr": 1e-5})

    class Pretrained:
        """A model's parameters by name, with a text encoder that starts from pretrained weights."""

        config = recipe.model_copy(update={"text": recipe.text.model_copy(update={"encoder": "some/bert"})})

        def named_parameters(self):
            import torch

            for name in ("text_encoder.w", "classifier.w"):
                yield name, torch.nn.Parameter(torch.zeros(2, 2))
                yield name + "b", torch.nn.Parameter(torch.zeros(2))
            yield "spared", torch.nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self):
            return {"spared"}

    groups = parameter_groups(Pretrained(), recipe.train)  # type: ignore[arg-type]
    assert sorted((g["lr"], g["weight_decay"]) for g in groups) == [
        (1e-5, 0.0),
        (1e-5, 0.01),
        (0.02, 0.0),
        (0.02, 0.01),
    ]
    (still,) = (g for g in groups if (g["lr"], g["weight_decay"]) == (0.02, 0.0))
    assert sorted(parameter.ndim for parameter in still["params"]) == [1, 2]


def test_a_rate_of_encoders_that_nothing_takes_is_told(
    split_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "train.encoder_lr changes nothing: no part that is trained starts from pretrained weights."
    for rate in (None, 1e-5):
        train(make_recipe(train={"epochs": 1, "encoder_lr": rate}), split_corpus, tmp_path / str(rate))
        assert (told in capsys.readouterr().err) == (rate is not None)
    takes = {
        "text": {"encoder": "some/bert"},
        "audio": {"encoder": "some/wav2vec2"},
        "vision": {"pretrained": True, "freeze": "stem", "backbone": "swinv2_tiny_window8_256"},
    }
    for name, section in takes.items():
        assert len(pretrained_parts(make_recipe(**{name: section}))) == 1
    for name, still in (("text", {"finetune": False}), ("vision", {"freeze": True}), ("vision", {"backbone": "none"})):
        assert pretrained_parts(make_recipe(**{name: takes[name] | still})) == []


def test_settings_that_another_one_leaves_without_effect_are_told(
    split_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adjusted, paired = "train.logit_adjustment changes nothing", "loss.contrastive changes nothing"
    cases: list[tuple[dict[str, Any], bool, bool]] = [
        ({"train": {"logit_adjustment": 1.0}}, False, True),
        ({"train": {"logit_adjustment": 1.0, "sampler": "balanced"}, "loss": {"contrastive": 0.0}}, True, False),
        (
            {"train": {"logit_adjustment": 1.0}, "loss": {"class_weights": "balanced", "text_audio_pair": True}},
            True,
            False,
        ),
        (
            {
                "train": {"logit_adjustment": 1.0, "sampler": "balanced"},
                "loss": {"class_weights": "balanced", "contrastive": 0.0},
            },
            False,
            False,
        ),
    ]
    for number, (settings, of_adjustment, of_contrast) in enumerate(cases):
        settings["train"]["epochs"] = 1
        train(make_recipe(**settings), split_corpus, tmp_path / str(number))
        told = capsys.readouterr().err
        assert (adjusted in told, paired in told) == (of_adjustment, of_contrast)


def test_runs_of_several_seeds_can_have_the_same_folds(corpus: Path) -> None:
    rows = PreparedData.open(corpus).rows

    def folds(seed: int, of_folds: int | None = None) -> list[list[int]]:
        recipe = make_recipe(seed=seed, protocol={"name": "stratified-kfold", "folds": 3, "seed": of_folds})
        return [fold.test.tolist() for fold in lay_out(recipe, None, rows, None).folds]

    assert folds(0) != folds(1)
    assert folds(0, 5) == folds(1, 5) == folds(5)


def test_decay_spares_what_timm_spares_and_the_lengths_of_weight_norms() -> None:
    recipe = make_recipe(**VIDEO)
    model = DeepMSI(validated(DeepMSIConfig, {"num_labels": 3, **recipe.sections()}, "test"))
    groups = parameter_groups(model, recipe.train)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    still = {name for name, p in model.named_parameters() if id(p) not in decayed}
    assert still == model.no_weight_decay() | {name for name, p in model.named_parameters() if p.ndim < 2}
    for part in ("logit_scale", "cpb_mlp", "original0"):
        assert any(part in name for name in still)
    assert not any("qkv" in name or "original1" in name for name in still)


def test_what_compresses_a_pretrained_backbone_takes_the_rate_of_new_layers() -> None:
    recipe = make_recipe(**VIDEO)
    recipe.train.encoder_lr = 1e-5
    model = DeepMSI(validated(DeepMSIConfig, {"num_labels": 3, **recipe.sections()}, "test"))
    model.config.vision.pretrained = True
    rates = {id(p): g["lr"] for g in parameter_groups(model, recipe.train) for p in g["params"]}
    of = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    backbone = [name for name in of if name.startswith("video.backbone.")]
    new = [name for name in backbone if ".compress." in name]
    assert any(name.endswith("guide_logit") for name in new)
    assert {of[name] for name in new} == {of[name] for name in of if name not in backbone} == {0.003}
    assert {of[name] for name in backbone if name not in new} == {1e-5}


def test_the_kept_share_of_tokens_is_logged(video_corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(**VIDEO, protocol={"name": "stratified-kfold", "folds": 2, "final_fit": False})
    train(recipe, video_corpus, tmp_path / "run", folds=[1])
    kept = [v for e in history(tmp_path / "run/folds/01") for k, v in e.items() if k.startswith("keep/")]
    assert kept
    assert all(0 < value <= 1 for value in kept)


JOINT: dict[str, Any] = {
    "fusion": {"dropout": 0.0, "modality_dropout": 0.0},
    "loss": {"text_audio_pair": True, "class_weights": "balanced"},
    "train": {"batch_size": 14, "epochs": 1, "lr": 0.01, "betas": [0.0, 0.0], "max_grad_norm": 0},
}
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small_corpus import make_recipe
from deepmsi.train.run import train
train(make_recipe(**json.loads(sys.argv[2])), Path(sys.argv[3]), Path(sys.argv[4]))
"""


def test_two_processes_take_the_steps_of_one(split_corpus: Path, tmp_path: Path) -> None:
    """36 rows in batches of 14: the last one has 8 rows, and the 12 dev and test rows split without duplicates."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(make_recipe(**JOINT), split_corpus, one)
    halved = JOINT | {"train": JOINT["train"] | {"batch_size": 7}}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    arguments = [str(Path(__file__).parent), json.dumps(halved), str(split_corpus), str(two)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, *arguments], env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = weights(one), weights(two)
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-4, atol=2e-6, err_msg=name)
    scores = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert scores[0]["n"] == scores[1]["n"] == 12
    assert scores[0]["confusion_matrix"] == scores[1]["confusion_matrix"]
    tables = [list(csv.reader((run / "predictions.csv").open(newline=""))) for run in (one, two)]
    assert [row[:3] for row in tables[0]] == [row[:3] for row in tables[1]]
    shares = [np.array([row[3:] for row in table[1:]], float) for table in tables]
    np.testing.assert_allclose(shares[0], shares[1], rtol=0, atol=1e-4)
    dev = [next(e["loss"] for e in history(run) if e["split"] == "dev") for run in (one, two)]
    assert dev[0] == pytest.approx(dev[1], rel=1e-4)


@pytest.fixture(scope="module")
def finished(split_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(make_recipe(train={"epochs": 2}), split_corpus, run)
    return run


def test_evaluate_writes_what_the_interface_promises(finished: Path, split_corpus: Path, tmp_path: Path) -> None:
    result = evaluate(finished, split_corpus, tmp_path / "scores")
    written = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert written == json.loads(json.dumps(result))
    for key in ("accuracy", "uar", "weighted_f1", "macro_f1", "per_class", "confusion_matrix", "labels"):
        assert key in written
    header, *rows = (tmp_path / "scores" / "predictions.csv").read_text().splitlines()
    assert header.split(",") == ["id", "label", "predicted", *LABELS]
    assert len(rows) == 60
    groups = (tmp_path / "scores" / "groups.csv").read_text().splitlines()
    assert groups[:2] == ["id,speaker,dialogue", "r000,s0,d0"]
    assert [line.split(",")[0] for line in groups[1:]] == [row.split(",")[0] for row in rows]
    paired = compare_predictions(tmp_path / "scores", tmp_path / "scores" / "predictions.csv")["intervals_by"]
    assert paired["dialogue"]["accuracy"] == [0.0, 0.0]
    assert all(sum(map(float, row.split(",")[3:])) == pytest.approx(1, abs=1e-5) for row in rows)


def test_evaluate_stays_on_the_cpu_where_the_recipe_does(
    finished: Path, split_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "  device: cpu\n" in (finished / "recipe.yaml").read_text()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert evaluate(finished, split_corpus)["n"] == 60


def test_a_device_that_there_is_not_is_refused(finished: Path, split_corpus: Path) -> None:
    for score in (evaluate, predict_rows):
        with pytest.raises(UserError, match="device is 'gpu': give auto, cpu or cuda"):
            score(finished, split_corpus, device="gpu")


def test_evaluate_with_modalities_hidden(finished: Path, split_corpus: Path) -> None:
    without = evaluate(finished, split_corpus, drop=["text"])
    assert without["n"] == 60
    assert without["modalities"] == ["audio"]
    only_text = evaluate(finished, split_corpus, drop=["audio,video"])
    assert only_text["n"] == 48  # every fifth row has no text
    assert sum(only_text["left_out"].values()) == 12
    with pytest.raises(UserError, match="nothing is left to read"):
        evaluate(finished, split_corpus, drop=["text", "audio"])
    with pytest.raises(UserError, match="--drop 'smell': the modalities are video, text, audio"):
        evaluate(finished, split_corpus, drop=["smell"])


def test_evaluate_takes_one_part(finished: Path, split_corpus: Path) -> None:
    part = evaluate(finished, split_corpus, split="test")
    assert part["n"] == 12
    assert part["rows_seen_in_training"] == 0
    assert part["left_out"] == {"they are not of the part 'test'": 48}
    with pytest.raises(UserError, match="No row is of the part 'tset': the column split holds dev, test, train"):
        evaluate(finished, split_corpus, split="tset")


def test_what_other_parts_lost_is_not_told_of_one(finished: Path, split_corpus: Path) -> None:
    data = PreparedData.open(split_corpus)
    config = DeepMSI.from_pretrained(finished / "model").config
    lost = [row for row in data.rows if row.split == "train"]
    rows = [dataclasses.replace(row, slots={"text_features": 0}) if row in lost else row for row in data.rows]
    failures = [{"id": row.id, "modality": "audio", "reason": f"{row.id} is gone"} for row in lost]
    whole = rows_module.select_rows(rows, config, config.names, (), failures=failures)
    part = rows_module.select_rows(rows, config, config.names, (), failures=failures, split="test")
    assert len(whole.poorer) == 36
    assert part.poorer == []
    assert [rows[i].split for i in part.indices] == ["test"] * 12


def test_figures_of_the_dev_part_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = prepared_corpus(tmp_path, rows=12, splits=("train", "train", "train", "valid")), tmp_path / "run"
    recipe = make_recipe(protocol={"name": "split-column", "seen_features": True}, train={"epochs": 1})
    protocol = train(recipe, data, run)["protocol"]
    assert protocol.startswith("the manifest's own split, scored on its dev part (leaks: ")
    assert f"Protocol: {protocol}; 12 rows" in capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["protocol"] == protocol
    assert protocol in report(run).read_text(encoding="utf-8").replace("&#39;", "'")


def test_evaluate_tells_what_no_row_has(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts are there, and the features that the model reads of them are not."""

    def without_features(table: list[dict[str, str]]) -> None:
        for row in table:
            row["text_features"] = ""

    data = prepared_corpus(tmp_path / "data", rows=12, edit=without_features)
    assert evaluate(finished, data)["modalities"] == ["audio"]
    assert "No row has text features: the model reads what it learned for rows without." in capsys.readouterr().err
    train(make_recipe(train={"epochs": 1}, protocol="stratified-kfold"), data, tmp_path / "run", folds=["1"])
    assert "No row has text features: the model is built without." in capsys.readouterr().err


def test_no_context_is_told_of_where_no_row_has_a_dialogue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def without_dialogues(table: list[dict[str, str]]) -> None:
        for row in table:
            row["dialogue"] = ""

    run, splits = tmp_path / "run", ("train", "train", "train", "test")
    recipe = make_recipe(text={"encoder": "hashing", "context": 3}, train={"epochs": 1})
    alone = prepared_corpus(tmp_path / "alone", rows=12, splits=splits, edit=without_dialogues)
    told = "No row has a dialogue: text.context=3 reads no previous utterances.\n"
    assert train(recipe, alone, run)["context"] == json.loads((run / "run.json").read_text())["context"] == 0
    assert told in capsys.readouterr().err
    assert evaluate(run, alone)["context"] == 0
    assert told in capsys.readouterr().err
    predict_rows(run, alone)
    assert told in capsys.readouterr().err
    together = prepared_corpus(tmp_path / "together", rows=9)
    assert evaluate(run, together)["context"] == 3
    assert evaluate(run, alone, drop=["text"])["context"] == 0
    assert told not in capsys.readouterr().err
    assert train(recipe, alone, run, resume=True)["context"] == 0


def test_texts_without_features_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def without_some(table: list[dict[str, str]]) -> None:
        table[1]["text"] = table[2]["text_features"] = ""  # the first has no text, with or without features

    data = prepared_corpus(tmp_path / "data", rows=12, splits=("train", "train", "train", "test"), edit=without_some)
    run, told = (
        tmp_path / "run",
        "4 rows have a text that is not read, for want of text features (the first: 'r000').\n",
    )
    train(make_recipe(train={"epochs": 1}), data, run)
    assert told in capsys.readouterr().err, "of rows 0, 2, 5 and 10"
    evaluate(run, data, split="test")
    assert "that is not read" not in capsys.readouterr().err, "of rows 3, 7 and 11 none"
    evaluate(run, data, drop=["text"])
    assert "that is not read" not in capsys.readouterr().err


def test_what_a_feature_encoder_does_not_hear_is_told_to_a_model_of_its_features(tmp_path: Path) -> None:
    rows = prepared_corpus(tmp_path / "data", rows=6)
    data = PreparedData.open(rows)
    reason = "r001: the audio encoder hears the first 20 s of 25.00 s of sound"
    failures = [{"id": "r001", "modality": "part of audio features", "reason": reason}]

    def told(encoder: str) -> list[str]:
        config = make_recipe(audio={"encoder": encoder})
        return select_rows(data.rows, config, None, (), failures=failures).partial

    assert told("features") == [reason]
    assert told("logmel") == []


def test_sounds_that_are_cut_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, run = sound_manifest(tmp_path), tmp_path / "run"
    for i, seconds in ((1, 0.25), (7, 0.5)):
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(np.arange(int(16000 * seconds), dtype="<i2").tobytes())
    data = prepare(manifest, tmp_path / "prepared", PrepareOptions(), workers=0, progress=False).path
    audio = {"encoder": "logmel", "max_seconds": 0.2}
    recipe = make_recipe(audio=audio, text={"encoder": "hashing"}, protocol="split-column", train={"epochs": 1})
    told = (
        "2 rows have sound that goes on after 0.2 s, where it is cut (audio.max_seconds); the longest takes 0.50 s.\n"
    )
    train(recipe, data, run)
    assert told in capsys.readouterr().err
    evaluate(run, data)
    assert told in capsys.readouterr().err
    predict_rows(run, data)
    assert told in capsys.readouterr().err
    evaluate(run, data, drop=["audio"])
    assert "sound" not in capsys.readouterr().err
    evaluate(run, data, split="test")
    assert "1 row has sound that goes on after 0.2 s" in capsys.readouterr().err


def test_evaluate_takes_a_manifest(finished: Path, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "raw", rows=9)
    assert evaluate(finished, manifest)["n"] == 9


def _relabel(table: list[dict[str, str]]) -> None:
    table[4]["label"] = "joyy"


def test_an_unknown_label_at_evaluation(finished: Path, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "raw", rows=9, edit=_relabel)
    with pytest.raises(UserError, match=r"Row 'r004' has the unknown label 'joyy': known are .*did you mean 'joy'"):
        evaluate(finished, manifest)


def test_runs_that_cannot_be_evaluated(finished: Path, split_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run of deepmsi train: it has no run\.json"):
        evaluate(tmp_path, split_corpus)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "model")
    with pytest.raises(UserError, match="has no model: its training has not ended"):
        evaluate(copy, split_corpus)
    (copy / "run.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="has format 99 and this deepmsi reads 1"):
        evaluate(copy, split_corpus)
    (copy / "run.json").write_text("{")
    with pytest.raises(UserError, match="the run is damaged"):
        evaluate(copy, split_corpus)
    with pytest.raises(UserError, match="There is no data at"):
        evaluate(finished, tmp_path / "absent")
    before = (finished / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="is a run, whose own scores would be lost: give another folder, such as"):
        evaluate(finished, split_corpus, finished)
    assert (finished / "metrics.json").read_bytes() == before


def _one_label(table: list[dict[str, str]]) -> None:
    for row in table:
        row["label"] = "joy"


def _rare_label(table: list[dict[str, str]]) -> None:
    table[0]["label"] = "awe"


def _no_labels(table: list[dict[str, str]]) -> None:
    for row in table:
        row["label"] = ""


@pytest.mark.parametrize(
    ("edit", "changes", "sentence"),
    [
        (_one_label, {}, "one class only"),
        (_rare_label, {"protocol": "stratified-kfold"}, "The class 'awe' has one row"),
        (_no_labels, {}, "No row is left to work with: 12 because they have no label"),
        (None, {}, "has no split"),
        (None, {"labels": ["anger", "joy"]}, "unknown label 'sadness'"),
        (None, {"text": {"dim": 9}, "protocol": "group-kfold"}, "features of length 6 and the model reads 9"),
        (None, {"protocol": "leave-one-out", "train": {"selection": "dev"}}, "there is no dev part"),
        (None, {"protocol": "leave-one-out", "train": {"device": "cuda"}}, "finds no CUDA device"),
        (None, {"protocol": "leave-one-out", "train": {"precision": "fp16"}}, "needs a GPU"),
        (
            None,
            {"protocol": {"name": "group-kfold", "held_out": ["video"]}},
            "No row has video",
        ),
    ],
)
def test_data_that_do_not_allow_the_recipe(edit, changes: dict, sentence: str, tmp_path: Path) -> None:
    import torch

    if sentence in ("finds no CUDA device", "needs a GPU") and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    data = prepared_corpus(tmp_path, rows=12, edit=edit)
    with pytest.raises(UserError, match=sentence) as caught:
        train(make_recipe(**changes), data, tmp_path / "run")
    assert "\n" not in str(caught.value)


def _no_speaker(table: list[dict[str, str]]) -> None:
    table[5]["speaker"] = ""


def _no_features(table: list[dict[str, str]]) -> None:
    for row in table:
        row["text_features"] = row["audio_features"] = ""


@pytest.mark.parametrize(
    ("edit", "changes", "sentence"),
    [
        (None, {}, "has no split"),
        (_one_label, {"protocol": "group-kfold"}, "one class only"),
        (_rare_label, {"protocol": "leave-one-out"}, "the class 'awe' is in its test part"),
        (_no_speaker, {"protocol": "leave-one-speaker-out"}, "Row 'r005' has no speaker"),
        (None, {"protocol": {"name": "group-kfold", "folds": 9}}, "2 groups, too few for 9 folds"),
        (None, {"protocol": {"name": "group-kfold", "folds": 2, "held_out": ["video"]}}, "No row has video"),
        (None, {"protocol": {"name": "group-kfold", "folds": 2}}, "There is no fold '7'"),
        (None, {"protocol": "leave-one-out", "train": {"selection": "dev"}}, "there is no dev part"),
        (None, {"protocol": "leave-one-out", "drop": "text,audio", "vision": {"backbone": "small"}}, "none of video"),
        (_no_features, {}, "they have none of text features, audio features"),
        (None, {"protocol": "leave-one-out", "text": {"encoder": "./absent"}}, r"there is no folder \./absent"),
        (None, {"protocol": "leave-one-out", "loss": {"class_weights": [1, 2, 3, 4, 5]}}, "has 5 weights for"),
        (None, {"protocol": "leave-one-out", "train": {"device": "cpu", "precision": "fp16"}}, "fp16 needs a GPU"),
    ],
)
def test_what_a_manifest_tells_is_refused_before_its_clips_are_decoded(
    edit, changes: dict, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepmsi.data.prepare.prepare", lambda *_: pytest.fail("the clips were decoded"))
    manifest = write_corpus(tmp_path / "raw", rows=12, edit=edit)
    with pytest.raises(UserError, match=sentence):
        train(make_recipe(**changes), manifest, tmp_path / "run", folds=[7] if "fold '7'" in sentence else None)
    assert not (tmp_path / "run").exists()


def test_parts_that_choose_the_epochs_are_made_before_the_first_fold(tmp_path: Path) -> None:
    """Of three rows of three classes no part can be spared: that showed at the first fit, in a run begun."""
    data = prepared_corpus(tmp_path, rows=6)
    recipe = make_recipe(protocol={"name": "stratified-kfold", "folds": 2}, train={"selection": "inner-folds"})
    with pytest.raises(UserError, match="training part of 3 rows cannot be split into 4 inner folds"):
        train(recipe, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_directories_that_are_refused(finished: Path, split_corpus: Path, corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(train={"epochs": 2})
    with pytest.raises(UserError, match="holds a run already: continue it with --resume"):
        train(recipe, split_corpus, finished)
    with pytest.raises(UserError, match=r"was begun with train\.lr=0\.02 and is resumed with 0\.5"):
        train(make_recipe(train={"epochs": 2, "lr": 0.5}), split_corpus, finished, resume=True)
    with pytest.raises(UserError, match="was begun with other data"):
        train(make_recipe(train={"epochs": 2}, protocol="group-kfold"), corpus, finished, resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match=r"is not empty \(diary\.txt\) and holds no run"):
        train(recipe, split_corpus, tmp_path / "notes")
    with pytest.raises(UserError, match="is a file: give a directory"):
        train(recipe, split_corpus, tmp_path / "notes" / "diary.txt")


def _another_text(table: list[dict[str, str]]) -> None:
    table[3]["text"] = "never"


def _another_row(table: list[dict[str, str]]) -> None:
    table.append(table[7] | {"id": "r900"})


def _a_row_less(table: list[dict[str, str]]) -> None:
    del table[7]


@pytest.mark.parametrize(
    ("edit", "change"),
    [
        (_another_text, "row 'r003' has another text in"),
        (_another_row, "row 'r900' is new in"),
        (_a_row_less, "row 'r007' is missing in"),
        (list.reverse, "the rows have another order in"),
    ],
)
def test_a_run_is_not_resumed_with_another_manifest(edit, change: str, tmp_path: Path) -> None:
    recipe, run = make_recipe(train={"epochs": 1}, protocol={"name": "group-kfold", "folds": 2}), tmp_path / "run"
    manifest = write_corpus(tmp_path / "raw", rows=12)
    train(recipe, manifest, run)
    prepared = {path: path.stat().st_mtime_ns for path in (run / "prepared").rglob("*")}
    edited = write_corpus(tmp_path / "raw", rows=12, edit=edit)
    with pytest.raises(UserError, match=rf"was begun with other data \({change} .*manifest\.csv\)"):
        train(recipe, edited, run, resume=True)
    assert {path: path.stat().st_mtime_ns for path in (run / "prepared").rglob("*")} == prepared
    # The rows as they were are taken again.
    assert train(recipe, write_corpus(tmp_path / "raw", rows=12), run, resume=True)["complete"]


@pytest.mark.parametrize("same", [True, False])
def test_another_process_takes_no_other_data_for_the_first_ones(same: bool, tmp_path: Path, monkeypatch) -> None:
    """What lies at the first process's path may be of another manifest, where each has a disk of its own."""
    other, manifest = prepared_corpus(tmp_path / "other", rows=8), write_corpus(tmp_path / "raw", rows=12)
    first = PreparedData.open(other).fingerprint if same else "of the first process"
    monkeypatch.setattr(rows_module, "from_main", lambda action: (other, first))
    opened = rows_module.open_shared(manifest, make_recipe().prepare, tmp_path / "own", list)
    assert len(opened) == (8 if same else 12)
    assert (tmp_path / "own").exists() is not same


def test_frames_of_another_shape_are_refused(video_corpus: Path, tmp_path: Path) -> None:
    changes = VIDEO | {"protocol": "stratified-kfold"}
    with pytest.raises(UserError, match="holds 2 frames per utterance and the model reads 4"):
        train(make_recipe(**changes | {"vision": VIDEO["vision"] | {"frames": 4}}), video_corpus, tmp_path / "a")
    with pytest.raises(UserError, match="frames of 64 pixels and the model reads 128"):
        train(make_recipe(**changes | {"vision": VIDEO["vision"] | {"image_size": 128}}), video_corpus, tmp_path / "b")


def test_what_a_kill_left_of_the_saved_model_goes(tmp_path):
    class Model:
        def save_pretrained(self, folder):
            folder.mkdir()

    (tmp_path / ".model.0a1b2c3d.part").mkdir()
    _save_model(Model(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_kill_left_as_the_run_began_does_not_stand_in_its_way(split_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{TEMPORARY}7-splits.json").write_text("{")
    train(make_recipe(train={"epochs": 1}), split_corpus, tmp_path / "run", resume=True)
    assert not list((tmp_path / "run").glob(f"{TEMPORARY}*"))


def test_what_another_call_has_written_into_the_record_meanwhile_stays(corpus: Path, tmp_path: Path) -> None:
    record, final_fit = tmp_path / "run" / "run.json", {"rows": 36, "epochs": 1, "epochs_from": "the recipe"}

    def meanwhile(*_: object) -> None:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"final_fit": final_fit}))

    recipe = make_recipe(protocol={"name": "group-kfold", "folds": 2}, train={"epochs": 1})
    train(recipe, corpus, tmp_path / "run", folds=[1], on_fold=meanwhile)
    assert json.loads(record.read_text())["final_fit"] == final_fit


def test_a_record_that_goes_meanwhile_costs_no_model(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = make_recipe(protocol={"name": "group-kfold", "folds": 2}, train={"epochs": 1})
    train(recipe, corpus, run, on_fold=lambda _, folder, *__: folder == run and (run / "run.json").unlink())
    assert (run / "model").is_dir()
    assert json.loads((run / "run.json").read_text())["final_fit"]["epochs"] == 1


def test_what_a_kill_left_of_a_fold_that_is_done_goes(corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(protocol={"name": "group-kfold", "folds": 2, "final_fit": False}, train={"epochs": 1})
    train(recipe, corpus, tmp_path / "run")
    fold = tmp_path / "run" / "folds" / "01"
    (fold / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (fold / "best.safetensors").write_bytes(b"of the epoch that was kept")
    train(recipe, corpus, tmp_path / "run", resume=True)
    assert {path.name for path in fold.iterdir()} == {"fold.json", "history.jsonl", "logs", "predictions.csv"}


def test_what_voices_have_in_common_is_taken_from_the_training_rows_alone(tmp_path: Path) -> None:
    sections = {"text": {"encoder": "none"}, "audio": {"encoder": "logmel"}, "loss": {"contrastive": 0}}
    data = prepare(sound_manifest(tmp_path), tmp_path / "prepared", PrepareOptions(), workers=0, progress=False)
    train(make_recipe(**sections, protocol="split-column", train={"epochs": 1}), data.path, tmp_path / "run")
    trained = DeepMSI.from_pretrained(tmp_path / "run" / "model").audio_encoder
    for rows, equal in (range(6), True), (range(9), False):
        fitted = LogMelEncoder()
        fitted.fit_statistics(WaveformProcessor()([data.waveform(i)]) for i in rows)
        assert torch.equal(trained.mean, fitted.mean) == equal
        assert torch.equal(trained.std, fitted.std) == equal
