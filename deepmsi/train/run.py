"""A training run: data, protocol, folds, the choice of epochs, the kept model, and the record of all of it.

RUN/
  run.json            versions, seed, data fingerprint, command, protocol, rows left out, ids that trained the kept
                      model, chose its epoch or were seen by encoders that it starts from
  recipe.yaml         the resolved recipe
  splits.json         ids of every fold's parts;  groups.csv  the speaker and dialogue of each row
  metrics.json        scores of the protocol's held-out part;  predictions.csv  the rows behind them
  history.jsonl       one event a line: step, epoch, split, values;  logs/  the same for TensorBoard
  checkpoints/        of the kept model's fit;  model/  the kept model (`DeepMSI.from_pretrained`)
  best.safetensors    of the epoch that scored best, until its fit is scored;  checkpoints-damaged/  what no resume read
  inner.json          what the inner parts are that chose the epochs
  folds/NAME/         the same per fold, with fold.json when it is done
"""

from __future__ import annotations

import json
import platform
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepmsi._version import __version__
from deepmsi.data.files import TEMPORARY, claimed, digest, leaving_no_empty, sweep
from deepmsi.data.prepare import encoder_notes
from deepmsi.data.store import PreparedRow
from deepmsi.errors import UserError
from deepmsi.models.checkpoint import remove_staged
from deepmsi.models.config import MODALITIES, OFFLINE_TEXT, DeepMSIConfig, validated
from deepmsi.models.encoders import check_encoder
from deepmsi.models.offline import LogMelEncoder
from deepmsi.models.vision import check_vision
from deepmsi.train.calibration import apply_temperature
from deepmsi.train.checkpoints import BEST
from deepmsi.train.compression import check_measurable
from deepmsi.train.console import note
from deepmsi.train.curve import Point, best_epoch, read_curve, temperature_at
from deepmsi.train.dataset import UtteranceDataset, check_data, context_read, present_modalities, unread
from deepmsi.train.evaluate import prediction_rows
from deepmsi.train.inference import predict_logits, softmax
from deepmsi.train.join import FOLD, SPLITS, fold_folder, join_folds, read_begun
from deepmsi.train.layout import (
    check_encoders,
    check_same,
    dev_chooses,
    fit_to_data,
    inner_parts,
    lay_out,
    learned_by_encoders,
    starting_notes,
    with_batch_of,
)
from deepmsi.train.losses import class_weights
from deepmsi.train.memory import check_device, estimate, fit_batch, memory_sentence, room, training_device
from deepmsi.train.metrics import compute_metrics
from deepmsi.train.optimizer import pretrained_parts
from deepmsi.train.processes import barrier, claimed_by_all, from_main, process_rank, start_processes
from deepmsi.train.protocols import Fold, both_sides
from deepmsi.train.recipe import Recipe, load_recipe
from deepmsi.train.record import (
    GROUPS,
    PREDICTIONS,
    RECIPE,
    RUN,
    RUN_FORMAT,
    write_groups,
    write_json,
    write_predictions,
)
from deepmsi.train.rows import open_shared, readable
from deepmsi.train.seeding import derive_seed, seed_torch

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI
    from deepmsi.models.memory import StepMemory
    from deepmsi.train.trainer import FitResult

OnFold = Callable[["DeepMSI", Path, str, Sequence[str], Sequence[str]], None]

INNER = "inner.json"
_FEW = 0.1
"""Share of the rows that choose the epochs that may have trained an encoder without misleading the temperature."""


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    resume: bool = False,
    folds: Sequence[str | int] | None = None,
    *,
    auto_batch: bool = False,
    plan: Recipe | None = None,
    on_fold: OnFold | None = None,
) -> dict[str, Any]:
    """Train as a recipe says, and measure by its protocol.

    With the protocol `split-column` one model is trained and scored on the manifest's test part (its dev part
    where there is no test). Every other protocol measures by folds, and then fits the kept model on all rows by
    the same procedure (`protocol.final_fit`). The number of epochs never comes from a reported part.

    Args:
        recipe: from `load_recipe`.
        data: a manifest or a prepared folder.
        out: the run directory.
        resume: continue a run that was interrupted: finished folds are kept, the unfinished fit goes on from its
            newest checkpoint that validates.
        folds: names or numbers (from 1) of the folds to run; the others may run elsewhere or later into the same
            directory. Scores and the final fit follow when all are there.
        auto_batch: where the recipe's batch does not fit into the memory, take the largest that does and accumulate
            gradients to the same effective batch; a run that is continued keeps what it began with.
        plan: the recipe whose folds are taken, where this one reads fewer modalities and thus fewer rows.
        on_fold: called in the first process with the model of each fold and of the final fit, its folder, its name,
            the ids of the rows that trained it, chose its epoch or were seen by encoders that it starts from, and of
            these the ones that only chose.

    Returns:
        What `metrics.json` holds.

    Raises:
        UserError: anything that the recipe, the data or the directory do not allow, in one sentence.
    """
    data, out = Path(data), Path(out)
    start_processes(training_device(recipe.train))
    try:
        with leaving_no_empty(out):
            result = _Run(recipe, data, out, resume, folds, auto_batch, plan, on_fold).go()
    except UserError:  # of all processes, as a rule; what else there may be ends this one, and so the others
        barrier(patient=False)
        raise
    barrier()
    return result


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        out: Path,
        resume: bool,
        folds: Sequence[str | int] | None,
        auto_batch: bool,
        plan: Recipe | None,
        on_fold: OnFold | None,
    ) -> None:
        self.out, self.resume, self.on_fold = out, resume, on_fold
        self.trained: list[tuple[float, float]] = []
        self.planned: tuple[DeepMSIConfig, int, DeepMSI] | None = None
        self.main = process_rank()[0] == 0
        started = from_main(lambda: _check_directory(out, resume or folds is not None))
        if started is None:  # a run that only has to be joined needs no GPU
            check_device(recipe.train)
        if "video" in recipe.modalities:
            check_vision(recipe.vision)  # before anything is decoded
        begun = None if started is None else started["data"]["fingerprint"]
        self.single = recipe.protocol.name == "split-column"

        def check(there: Sequence[PreparedRow]) -> None:
            layout = lay_out(recipe, plan, there, folds)
            check_encoders(recipe, encoder_notes(recipe.prepare), data, self._left(layout.chosen, layout.rows))
            for name in readable(layout.rows, recipe):
                if name != "video":
                    check_encoder(name, getattr(recipe, name).encoder)

        self.data = open_shared(data, recipe.prepare, out / "prepared", check, begun)
        self.recipe = recipe = fit_to_data(recipe, self.data)
        if auto_batch and started is not None:
            self.recipe = recipe = with_batch_of(recipe, load_recipe(out / RECIPE))
        check_data(self.data, recipe)
        self.selection, self.rows, self.folds, self.chosen = lay_out(
            recipe, plan, self.data.rows, folds, self.data.failures
        )
        for sentence in (*self.selection.notes(), *unread(self.data, self.selection.indices, recipe)):
            note(sentence)
        if recipe.train.encoder_lr is not None and not pretrained_parts(recipe):
            note("train.encoder_lr changes nothing: no part that is trained starts from pretrained weights.")
        if recipe.text.encoder == OFFLINE_TEXT and recipe.text.pooling != "mean":
            note(f"text.pooling changes nothing: the encoder {OFFLINE_TEXT!r} weighs the words by itself.")
        drawn_alike, weights = recipe.train.sampler == "balanced", recipe.loss.class_weights
        if recipe.train.logit_adjustment and weights == (None if drawn_alike else "balanced"):
            which = "train.sampler" if drawn_alike else "loss.class_weights"
            note(f"train.logit_adjustment changes nothing: with {which}=balanced the classes weigh alike.")
        if drawn_alike and weights == "balanced":
            note("loss.class_weights=balanced beside train.sampler=balanced makes up for rare classes twice.")
        if recipe.loss.contrastive and recipe.modalities == ("text", "audio") and not recipe.loss.text_audio_pair:
            note(
                "loss.contrastive changes nothing: it pairs the video with the others, and text with audio where "
                "loss.text_audio_pair is set."
            )
        self._say_what_is_not_learned()
        check_encoders(recipe, self.data.encoders, self.data.path, self._left(self.chosen, self.rows))
        if started is not None:
            check_same(started, recipe, load_recipe(out / RECIPE), self.data, self._splits(), out)
        self.protocol = recipe.protocol.title_of(fold.name for fold in self.folds)
        note(f"Protocol: {self.protocol}; {len(self.rows)} rows, {len(self.selection.names)} classes.")
        self.both_sides = both_sides(self.rows, self.folds)
        if self.both_sides is not None:
            note(f"Reported rows that training knows: {self.both_sides}.")
        self.memory = self._plan_memory(auto_batch and started is None)
        recipe = self.recipe
        self.seen_before = sorted({row_id for notes in starting_notes(recipe).values() for row_id in notes.seen})
        self.taught = learned_by_encoders(recipe, self.data.encoders)
        self.facts = started or from_main(lambda: self._begin(data, resume or folds is not None, auto_batch))
        if auto_batch and started is None:  # another call may have begun the run since, with a batch of its own
            self.recipe = with_batch_of(recipe, load_recipe(out / RECIPE))
        barrier()

    def _begin(self, data: Path, may_exist: bool, auto_batch: bool) -> dict[str, Any]:
        """Write down what begins; where another call has begun the same run meanwhile, take part in that one."""
        facts = self._describe(data)
        while not (self.out / RUN).exists():
            with claimed(self.out) as free:
                if free and not (self.out / RUN).exists():
                    sweep(self.out)
                    self.recipe.save(self.out / RECIPE)
                    write_json(self.out / SPLITS, self._splits())
                    write_json(self.out / RUN, facts)
                    return facts
            time.sleep(0.1)
        if not may_exist:
            raise UserError(f"Another call has begun a run in {self.out}: give another directory.")
        facts, begun = read_begun(self.out), load_recipe(self.out / RECIPE)
        recipe = with_batch_of(self.recipe, begun) if auto_batch else self.recipe
        check_same(facts, recipe, begun, self.data, self._splits(), self.out)
        if recipe != self.recipe:
            taken = f"train.batch_size={recipe.train.batch_size} and train.accumulation={recipe.train.accumulation}"
            note(f"--auto-batch: another call has begun this run with {taken}, which are kept.")
        return facts

    def go(self) -> dict[str, Any]:
        begun = time.time()
        if self.main:
            write_groups(self.out / GROUPS, self.rows)
        for fold in self.chosen:
            self._run_fold(fold)
        result = join_folds(self.out, write=self.main)
        self._say_what_is_never_predicted(result)
        if result["complete"]:
            if not self.single and self.recipe.protocol.final_fit:
                if {notes["fold"] for notes in self.data.encoders.values()} & {fold.name for fold in self.folds}:
                    note("The final fit waits for features of the encoder that was fine-tuned on all rows.")
                else:
                    self._final_fit()
        else:
            done = [fold["name"] for fold in result["folds"]]
            missing = [fold.name for fold in self.folds if fold.name not in done]
            note(f"Folds still to run: {', '.join(missing)}; the figures cover the others, the final fit waits.")
        if self.main:
            facts = self._facts_now()
            facts["seconds"] = round(facts.get("seconds", 0.0) + time.time() - begun, 1)
            facts["speed"] = self._speed() or facts.get("speed")
            facts["finished"] = _now() if result["complete"] else facts.get("finished")
            write_json(self.out / RUN, facts)
        return result

    def _facts_now(self) -> dict[str, Any]:
        """The record as other calls left it that take part in the run; as it began where it is gone or damaged."""
        try:
            return read_begun(self.out)
        except UserError:
            return dict(self.facts)

    def _plan_memory(self, choose: bool) -> StepMemory | None:
        """Say what a step takes of the memory; on request choose the batch size that fits."""
        # With the model of the first fit, where that is of a fold's whole training part: weights are read once.
        fold = next((fold for fold in self.chosen if not (self._folder(fold) / FOLD).is_file()), None)
        if fold is None and (self.out / "model").is_dir():
            return None  # nothing is left to fit
        fold = fold or self.folds[0]
        config, seed = self._config(fold.train), derive_seed(self.recipe.seed, fold.name)
        model = self._new_model(config, seed)
        if self.recipe.train.capacity_quantile is not None:
            check_measurable(model)
        self.planned = config, seed, model
        there = room(self.recipe.train)
        if choose:
            self.recipe, told = fit_batch(model, self.recipe, there)
            note(told)
        utterances = self.recipe.train.batch_size
        found = estimate(model, self.recipe, utterances)
        note(memory_sentence(found, utterances, there))
        return found

    def _new_model(self, config: DeepMSIConfig, seed: int) -> DeepMSI:
        """The model that a fit begins with; the planned one goes to the first fit, where it is that one's, or away."""
        from deepmsi.models.deepmsi import DeepMSI

        planned, self.planned = self.planned, None
        if planned is not None and planned[:2] == (config, seed):
            return planned[2]
        del planned  # before there is another
        seed_torch(derive_seed(seed, "weights"))
        return DeepMSI(config)

    def _folder(self, fold: Fold) -> Path:
        return fold_folder(self.out, fold.name, self.single)

    def _left(self, chosen: Sequence[Fold], rows: Sequence[PreparedRow]) -> dict[str, list[str]]:
        """The ids of the rows that each fold still to run will report."""
        left = [fold for fold in chosen if not (self._folder(fold) / FOLD).is_file()]
        return {fold.name: [rows[i].id for i in fold.test] for fold in left}

    def _speed(self) -> dict[str, float] | None:
        """Utterances trained on per second, and the peaks of this process's memory."""
        utterances, seconds = (sum(column) for column in zip((0.0, 0.0), *self.trained, strict=True))
        if not utterances:
            return None
        # Linux counts ru_maxrss in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        speed = {
            "utterances_per_second": round(utterances / seconds, 2),
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20),
        }
        if training_device(self.recipe.train).type == "cuda":
            speed["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        return speed

    def _say_what_is_not_learned(self) -> None:
        there = np.array([present_modalities(row, self.recipe) for row in self.rows])
        for fold in self.chosen:
            learned, read = (np.any(there[part], axis=0).tolist() for part in (fold.train, fold.test))
            unseen = [name for name, a, b in zip(MODALITIES, learned, read, strict=True) if b and not a]
            if unseen:
                note(
                    f"Fold {fold.name!r}: rows of its test part have {' and '.join(unseen)} and none of its training "
                    "part has, so that the model does not learn to read that."
                )

    @staticmethod
    def _say_what_is_never_predicted(result: dict[str, Any]) -> None:
        names = [repr(name) for name in result.get("never_predicted", ()) if result["per_class"][name]["support"]]
        if not names:
            return
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        which = f"class {names[0]} is" if len(names) == 1 else f"classes {', '.join(names[:5])}{more} are"
        note(
            f"The {which} never predicted: try loss.class_weights=balanced, train.sampler=balanced or "
            "train.logit_adjustment=1."
        )

    def _run_fold(self, fold: Fold) -> None:
        folder = self._folder(fold)
        if (folder / FOLD).is_file():
            self._forget_weights(folder)  # of a call that was killed before it came to that
            return
        with claimed_by_all(folder) as free:
            if not free:
                note(f"Fold {fold.name} is being run by another call: it is left to that one.")
            elif not (folder / FOLD).is_file():
                self._measure(fold, folder)

    def _measure(self, fold: Fold, folder: Path) -> None:
        """Fit a fold, score its reported part, and write both down."""
        if not self.single:
            note(f"Fold {fold.name} ({self.folds.index(fold) + 1} of {len(self.folds)}).")
        begun = time.time()
        seed = derive_seed(self.recipe.seed, fold.name)
        model, result, epochs_from, temperature = self._fit(fold.name, folder, fold.train, fold.dev, seed)
        test = self._dataset(fold.test, model.config)
        logits = predict_logits(model, test, self.recipe.train, precision=self.recipe.train.precision)
        if self.single:
            _save_model(model, self.out / "model")
        if self.main:
            if self.on_fold is not None:
                parts = self._ids(fold)
                chosen_on = parts["dev"] if dev_chooses(self.recipe, fold.dev) else []
                seen = self._seen([*parts["train"], *chosen_on])
                self.on_fold(model, folder, fold.name, seen, sorted(set(chosen_on) - self.taught))
            names = self.selection.names
            rows = prediction_rows([self.rows[i].id for i in fold.test], self._classes(fold.test), logits, names)
            write_predictions(folder / PREDICTIONS, rows, names)
            facts = {
                "name": fold.name,
                "train": len(fold.train),
                "test": len(fold.test),
                "content": self.data.content,
                "epochs": result.epochs,
                "kept_epoch": result.kept_epoch,
                "epochs_from": epochs_from,
                "temperature": temperature,
                "seconds": round(time.time() - begun, 1),
                "metrics": compute_metrics(
                    self._classes(fold.test), logits.argmax(1), names, probabilities=softmax(logits)
                ),
            }
            write_json(folder / FOLD, facts)
            self._forget_weights(folder)  # until here a call that is interrupted goes on from them
        barrier()

    def _forget_weights(self, folder: Path) -> None:
        """Take away what only a fold that is not done needs."""
        if self.main:
            (folder / BEST).unlink(missing_ok=True)
            if not self.single:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _final_fit(self) -> None:
        with claimed_by_all(self.out) as free:
            if not free:
                note("The final fit is being run by another call: it is left to that one.")
            elif not (self.out / "model").is_dir():
                self._fit_everything()

    def _fit_everything(self) -> None:
        note("Final fit on all rows.")
        everything = np.arange(len(self.rows))
        seed = derive_seed(self.recipe.seed, "final")
        model, result, epochs_from, temperature = self._fit("final fit", self.out, everything, None, seed, whole=True)
        facts = {
            "rows": len(everything),
            "epochs": result.epochs,
            "epochs_from": epochs_from,
            "temperature": temperature,
        }
        if self.main:
            if self.on_fold is not None:
                self.on_fold(model, self.out, "all rows", self._seen([row.id for row in self.rows]), [])
            write_json(self.out / RUN, self._facts_now() | {"final_fit": facts})
        _save_model(model, self.out / "model")  # last: with it there, a resumed call takes this fit for done

    def _fit(
        self,
        name: str,
        folder: Path,
        train: NDArray[np.int64],
        dev: NDArray[np.int64] | None,
        seed: int,
        whole: bool = False,
    ) -> tuple[DeepMSI, FitResult, str, float | None]:
        """Train on a part, with the number of epochs found as the recipe says; `whole` leaves no row out.

        Returns:
            The model, what its fit left, what chose the epochs, and the temperature that the same rows gave its logits.
        """
        settings = self.recipe.train
        parts = inner_parts(self.recipe, self.rows, train, dev)
        self._forget_other_parts(name, folder, parts)
        choosing = [part.test for part in parts] or ([dev] if dev is not None and dev_chooses(self.recipe, dev) else [])
        chosen_by = [self.rows[i].id for i in np.unique(np.concatenate(choosing))] if choosing else []
        known = sum(row_id in self.taught for row_id in chosen_by)
        misled = known > _FEW * len(chosen_by)
        if known:
            note(
                f"{name}: {known} of the {len(chosen_by)} rows that choose its number of epochs trained an encoder, "
                "which tells them better than new rows: the number may be off"
                f"{', and the logits stay as they are' if misled and settings.calibrate else ''}. Give a dev part that "
                "trained no encoder, or set train.selection=last and a number of epochs."
            )
        curves: list[list[Point]]
        if parts and (settings.selection == "inner-folds" or whole):
            curves = [self._inner_curve(name, folder, part, derive_seed(seed, part.name)) for part in parts]
            sizes = [len(part.test) for part in parts]
            best = best_epoch(curves, sizes, settings.metric)
            note(f"{name}: {best} epochs, from {len(parts)} inner fit{'s' * (len(parts) > 1)}.")
            model, result = self._fit_part(name, folder, train, None, seed, stop_epoch=best)
            epochs_from = f"{len(parts)} inner fits"
        else:
            part, watch = (parts[0].train, parts[0].test) if parts else (train, dev)
            last = settings.selection == "last"
            model, result = self._fit_part(name, folder, part, watch, seed, keep_best=watch is not None and not last)
            epochs_from = "an inner validation part" if parts else "the recipe" if last else "the dev part"
            curves, sizes = [] if last else [result.curve], [1]
        if known:
            epochs_from += f", {known} of whose rows trained an encoder"
        temperature = None
        if settings.calibrate and any(curves) and not misled:
            temperature = temperature_at(curves, sizes, result.kept_epoch)
            if temperature is None:
                note(f"{name}: an older deepmsi scored its epochs, so that its logits stay as they are.")
            else:
                apply_temperature(model, temperature)
        return model, result, epochs_from, temperature

    def _forget_other_parts(self, name: str, folder: Path, parts: Sequence[Fold]) -> None:
        """Begin a fit anew that was begun with other inner parts, as another version of deepmsi may have made them."""
        if self.main and parts:
            ids = [[[self.rows[i].id for i in side] for side in (part.train, part.test)] for part in parts]
            path, made = folder / INNER, {"rows": digest(ids)}
            if _read(path) != made:
                left = [each for each in (folder / "inner", folder / "checkpoints") if each.is_dir()]
                if left:
                    note(f"{name} was begun with other inner parts, and is begun anew.")
                for each in left:
                    shutil.rmtree(each, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, made)
        barrier()

    def _inner_curve(self, name: str, folder: Path, part: Fold, seed: int) -> list[Point]:
        """Scores by epoch on an inner part; a finished one is read back when a run resumes."""
        inner = folder / "inner" / part.name
        done = inner / "done.json"
        if not done.is_file():
            fit = f"{name} {part.name}"
            _, result = self._fit_part(fit, inner, part.train, part.test, seed, checkpoints=False)
            if self.main:
                write_json(done, {"epochs": result.epochs})
            barrier()
            return result.curve
        return read_curve(inner)

    def _fit_part(
        self,
        name: str,
        folder: Path,
        part: NDArray[np.int64],
        watch: NDArray[np.int64] | None,
        seed: int,
        *,
        keep_best: bool = False,
        stop_epoch: int | None = None,
        checkpoints: bool = True,
    ) -> tuple[DeepMSI, FitResult]:
        """Train on a part of the rows, and watch the scores on another one where it is given."""
        from deepmsi.train.trainer import Fit, run_fit

        model = self._new_model(self._config(part), seed)
        config = model.config
        train = self._dataset(part, config, seed)
        if model.video is not None and config.vision.pixel_statistics:
            model.video.fit_pixel_statistics(train.videos(), mirrored=self.recipe.augment.flip > 0)
        encoder, processor = model.audio_encoder, model.audio_processor
        if isinstance(encoder, LogMelEncoder) and processor is not None:
            encoder.fit_statistics(processor([sound]) for sound in train.sounds())
        fit = Fit(
            name=name,
            folder=folder,
            recipe=self.recipe,
            train=train,
            watch=None if watch is None else self._dataset(watch, config),
            keep_best=keep_best,
            stop_epoch=stop_epoch,
            seed=seed,
            resume=self.resume,
            checkpoints=checkpoints,
        )
        result = run_fit(model, fit)
        self.trained.append((result.utterances, result.seconds))
        return model, result

    def _config(self, train: NDArray[np.int64]) -> DeepMSIConfig:
        sections, names = self.recipe.sections(), self.selection.names
        sections.pop("preset")
        if sections["loss"]["class_weights"] == "balanced":
            counts = np.bincount(self._classes(train), minlength=len(names)).tolist()
            sections["loss"]["class_weights"] = class_weights(counts, names)
        said = {"label_names": names, "num_labels": len(names), **sections}
        return validated(DeepMSIConfig, said, f"recipe {self.recipe.name}")

    def _classes(self, part: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.selection.classes[part]

    def _dataset(self, part: NDArray[np.int64], config: DeepMSIConfig, seed: int | None = None) -> UtteranceDataset:
        augment = self.recipe.augment if seed is not None else None
        indices = self.selection.indices[part]
        return UtteranceDataset(self.data, indices, self._classes(part), config, augment=augment, seed=seed or 0)

    def _seen(self, ids: Sequence[str]) -> list[str]:
        """Add to ids, each once, those that the encoders had seen which the model starts from."""
        return list(dict.fromkeys([*ids, *self.seen_before]))

    def _splits(self) -> dict[str, dict[str, list[str]]]:
        return {fold.name: self._ids(fold) for fold in self.folds}

    def _ids(self, fold: Fold) -> dict[str, list[str]]:
        parts = {"train": fold.train, "test": fold.test}
        if fold.dev is not None:
            parts["dev"] = fold.dev
        return {name: [self.rows[i].id for i in part] for name, part in parts.items()}

    def _describe(self, data: Path) -> dict[str, Any]:
        import transformers

        recipe = self.recipe
        on_gpu = training_device(recipe.train).type == "cuda"
        seen = self._ids(self.folds[0]) if self.single else {"train": [row.id for row in self.rows]}
        chose = seen["dev"] if self.single and dev_chooses(recipe, self.folds[0].dev) else []
        return {
            "format": RUN_FORMAT,
            "deepmsi": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
            "processes": process_rank()[1],
            "threads": torch.get_num_threads(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "recipe": recipe.name,
            "seed": recipe.seed,
            "protocol": self.protocol,
            "leaks": recipe.protocol.leaks,
            "both_sides": self.both_sides,
            "context": context_read(self.data.rows, recipe),
            "data": {
                "path": str(data),
                "fingerprint": self.data.fingerprint,
                "content": self.data.content,
                "rows": len(self.data.rows),
                "used": len(self.rows),
                "left_out": self.selection.left_out,
            },
            "memory": None if self.memory is None else asdict(self.memory),
            "labels": self.selection.names,
            "trained_ids": self._seen([*seen["train"], *chose]),
            "started": _now(),
        }


def _check_directory(out: Path, may_exist: bool) -> dict[str, Any] | None:
    """Make the run directory, or read what began in it."""
    if (out / RUN).exists():
        if not may_exist:
            raise UserError(f"{out} holds a run already: continue it with --resume, or give another directory.")
        return read_begun(out)
    if str(out.absolute()).encode(errors="ignore").decode() != str(out.absolute()):
        raise UserError(f"{out} is a path that is not UTF-8, where no weights can be written: give another directory.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a directory for the run.")
    if out.is_dir():
        begun = ("prepared", RECIPE, SPLITS)
        others = [path.name for path in out.iterdir() if path.name not in begun and not path.name.startswith(TEMPORARY)]
        if others:
            raise UserError(f"{out} is not empty ({min(others)}) and holds no run: give another directory.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): give another directory.") from None
    return None


def _save_model(model: DeepMSI, folder: Path) -> None:
    if process_rank()[0] == 0:
        remove_staged(folder)
        model.save_pretrained(folder)
    barrier()


def _read(path: Path) -> Any:
    """A JSON file; None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
