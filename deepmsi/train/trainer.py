"""One fit: the transformers Trainer with deepmsi's batches, loss, seeds, checkpoints and records.

Whatever is random in a step is seeded from (seed, step, micro-step, process), and the order and augmentation of
an epoch from (seed, epoch, row id). Nothing depends on what ran before, so that a resumed fit takes the same
steps as an uninterrupted one: bit for bit on one CPU process.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from deepmsi.errors import UserError
from deepmsi.models.graphs import VideoGraphs, why_not_training
from deepmsi.models.losses import classification_loss
from deepmsi.models.precision import float32_products
from deepmsi.train import checkpoints
from deepmsi.train.augment import to_device
from deepmsi.train.average import WeightAverage
from deepmsi.train.compression import CompressionLog
from deepmsi.train.console import note
from deepmsi.train.curve import Point, best_point, curve_of, watched_scores
from deepmsi.train.dataset import Collator, EpochBatches, UtteranceDataset, partial_rows
from deepmsi.train.history import Records, truncate_history
from deepmsi.train.inference import predict_logits
from deepmsi.train.losses import log_prior
from deepmsi.train.memory import check_device, training_device
from deepmsi.train.optimizer import build_optimizer
from deepmsi.train.processes import barrier, from_main, process_rank
from deepmsi.train.recipe import Recipe, TrainSettings
from deepmsi.train.record import HISTORY
from deepmsi.train.seeding import derive_seed, seed_torch
from deepmsi.train.stems import keep_stems
from deepmsi.train.workers import loader_workers

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI


@dataclass
class FitResult:
    """What a fit leaves: the epochs it trained, the one whose weights the model has, the watched scores."""

    epochs: int
    kept_epoch: int
    utterances: float = 0.0
    """Utterances trained on by this process group, every epoch counted; none of those before a resume."""
    seconds: float = 0.0
    """What that took, with the evaluations between epochs."""
    curve: list[Point] = field(default_factory=list)
    """The watched scores of each epoch that was scored."""


@dataclass
class Fit:
    """A fit to run.

    Attributes:
        name: shown in progress bars.
        folder: takes `history.jsonl`, `checkpoints/`, `logs/` and the best weights.
        recipe: the recipe, class weights resolved in the model's configuration.
        train: training rows.
        watch: rows scored after every epoch; None for none.
        keep_best: give the model the weights of the epoch that scored best on `watch`, and stop after
            `train.patience` epochs without improvement. Otherwise the last weights stay.
        stop_epoch: stop there, on the schedule of `train.epochs`; None trains all of them.
        seed: of this fit.
        resume: continue from the newest checkpoint that validates.
        checkpoints: write checkpoints.
    """

    name: str
    folder: Path
    recipe: Recipe
    train: UtteranceDataset
    watch: UtteranceDataset | None
    keep_best: bool
    stop_epoch: int | None
    seed: int
    resume: bool
    checkpoints: bool = True

    @property
    def last_epoch(self) -> int:
        """The epoch after which the fit ends unless patience ends it before."""
        return min(self.stop_epoch or self.recipe.train.epochs, self.recipe.train.epochs)


def run_fit(model: DeepMSI, fit: Fit) -> FitResult:
    """Train a model as a fit says; the model has the kept weights afterwards, in eval mode.

    Raises:
        UserError: the loss is no longer finite; no CUDA device where one is asked for.
    """
    settings = fit.recipe.train
    with _collected_quickly(), float32_products(training_device(settings), settings.tf32):
        return _run_fit(model, fit)


def _run_fit(model: DeepMSI, fit: Fit) -> FitResult:
    fit.folder.mkdir(parents=True, exist_ok=True)
    arguments = _arguments(fit)
    folder = fit.folder / "checkpoints"
    start: Path | None = None
    skipped: list[str] = []
    if fit.resume:
        start, skipped = from_main(lambda: checkpoints.newest_valid(folder))
        for sentence in skipped:
            note(sentence)
    if start is None:
        _forget(fit.folder, aside=bool(skipped))
    state: dict[str, Any] = json.loads((start / checkpoints.STATE).read_text(encoding="utf-8")) if start else {}
    truncate_history(fit.folder / HISTORY, state.get("global_step", 0))
    trainer = UtteranceTrainer(model, fit, arguments)
    steps = arguments.num_train_epochs * trainer.steps_per_epoch
    if start is not None and state.get("max_steps") != steps:
        raise UserError(
            f"{start} is of a training of {state.get('max_steps')} steps in all, and this one takes {steps}: continue "
            "it with as many processes as it was begun with."
        )
    curve = curve_of(state.get("log_history", []))
    utterances = seconds = 0.0
    epochs_done = state.get("epoch") or 0.0
    if start is not None and _is_over(fit, curve, epochs_done):
        trainer._load_from_checkpoint(str(start))
        epochs = round(epochs_done)
    else:
        if model.video is not None and fit.recipe.train.cache_stem:
            if start is not None:  # the stem that it began with, whatever a new model would begin with today
                checkpoints.load_weights(model, start / checkpoints.WEIGHTS)
            keep_stems(model, [rows for rows in (fit.train, fit.watch) if rows is not None], fit.recipe.train)
        begun = time.perf_counter()
        with warnings_of_transformers_off():
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        curve = curve_of(trainer.state.log_history)
        epochs = round(trainer.state.epoch or 0)
        seconds = time.perf_counter() - begun
        utterances = ((trainer.state.epoch or 0) - epochs_done) * trainer.batches.size
    trainer.compression.remove()
    if model.video is not None:
        model.video.graphs = None
    model.to(trainer.args.device)
    if trainer.average is not None:
        trainer.average.apply()
    kept = epochs
    if fit.keep_best and curve:
        kept = int(best_point(curve, fit.recipe.train.metric)["epoch"])
        if kept != epochs:
            barrier()
            checkpoints.load_weights(model, fit.folder / checkpoints.BEST, kept)
    model.eval()
    return FitResult(epochs, kept, utterances, seconds, curve)


class _Step(nn.Module):
    """The model and its loss as one module, so that DDP sees them in one forward pass.

    The model itself is held one level below because its `config` is not one of transformers.
    """

    accepts_loss_kwargs = False
    log_prior: Tensor | None

    def __init__(self, core: DeepMSI, settings: TrainSettings, prior: list[float] | None) -> None:
        super().__init__()
        self.core = core
        self.focal_gamma = settings.focal_gamma
        self.register_buffer("log_prior", None if prior is None else torch.tensor(prior), persistent=False)

    def forward(self, share: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a micro-batch, its classification part times `share` where that is given."""
        output = self.core(**batch)
        cross_entropy, loss = output.cross_entropy, output.loss
        if self.focal_gamma or self.log_prior is not None:
            cross_entropy = classification_loss(
                output.logits,
                batch["labels"],
                weights=self.core.class_weights,
                focal_gamma=self.focal_gamma,
                log_prior=self.log_prior,
                label_smoothing=self.core.config.loss.label_smoothing,
                joined=True,
            )
        if share is not None:
            cross_entropy = cross_entropy * share
        if cross_entropy is not output.cross_entropy:
            weights = self.core.config.loss
            loss = weights.cross_entropy * cross_entropy + weights.contrastive * output.contrastive
        return {"loss": loss, "cross_entropy": cross_entropy, "contrastive": output.contrastive}


class UtteranceTrainer(Trainer):
    """The transformers Trainer over `Fit`: batches by key, seeded steps, exact evaluation, whole checkpoints."""

    def __init__(self, model: DeepMSI, fit: Fit, arguments: TrainingArguments) -> None:
        settings = fit.recipe.train
        counts = np.bincount(fit.train.labels, minlength=len(model.config.names)).tolist()
        names, tau = model.config.names, settings.logit_adjustment
        alike = settings.sampler == "balanced" and all(counts)
        seen = [sum(counts) / len(counts)] * len(counts) if alike else counts
        weights = None if model.class_weights is None else model.class_weights.tolist()
        prior = log_prior(seen, names, tau, weights) if tau else None
        self.fit = fit
        self.core = model
        self.rank, self.world = arguments.process_index, arguments.world_size
        self.batches = EpochBatches(
            fit.train.labels,
            settings.batch_size,
            fit.seed,
            balanced=settings.sampler == "balanced",
            partial=partial_rows(fit.train, settings.partial_rows),
            lengths=fit.train.text_lengths if settings.group_by_length else None,
            rank=self.rank,
            world=self.world,
        )
        model.contrast.batch_size = settings.batch_size if self.world > 1 else None
        self.compression = CompressionLog(model, measure=settings.capacity_quantile is not None)
        self._micro = (-1, -1)
        self._shares: list[Tensor] = []
        self._parts: dict[str, Tensor] = {}
        self._parts_count = 0
        super().__init__(
            _Step(model, settings, prior),
            arguments,
            data_collator=Collator(model.config, model.text_processor, model.audio_processor),
            train_dataset=fit.train,
        )
        # Behind the Trainer, which puts the model on its device.
        self.average = WeightAverage(model, settings.average) if settings.average is not None else None
        self.use_graphs()
        self.remove_callback(PrinterCallback)
        self.add_callback(_Flow(self))
        if self.is_world_process_zero():
            self.add_callback(Records(fit))

    def get_train_dataloader(self) -> DataLoader:
        """Loader of this process's share; the keys carry the epoch, so workers may outlive it."""
        settings = self.fit.recipe.train
        workers = loader_workers(settings, self.fit.train, self.args.device, settings.batch_size)
        return DataLoader(
            self.fit.train,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.args.dataloader_pin_memory,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimizer in an epoch."""
        return math.ceil(len(self.batches) / self.args.gradient_accumulation_steps)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return to_device(inputs, self.args.device)

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """The micro-batches of a step; how much each of them counts is noted on the way."""
        samples, items = super().get_batch_samples(*arguments, **options)
        self._shares = []
        if len(samples) > 1:
            # Each micro-batch's loss is a mean, and the Trainer takes the mean of those: a smaller one, or one of
            # lighter classes, would count as much as the others, and of a single row class weights would cancel out.
            weights = torch.tensor(self.core.config.loss.class_weights or [1.0] * self.core.config.num_labels)
            sums = torch.stack([weights[batch["labels"]].sum() for batch in samples])
            sums = sums.to(self.args.device, non_blocking=True)
            if self.world > 1:
                dist.all_reduce(sums)
            self._shares = list((len(samples) * sums / sums.sum()).unbind())
        return samples, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch, forward and backward, seeded by its place in the fit."""
        step, micro = self.state.global_step, 0
        if self._micro[0] == step:
            micro = self._micro[1] + 1
        self._micro = (step, micro)
        seed_torch(derive_seed(self.fit.seed, "step", step, micro, self.rank), self.args.device)
        if self._shares:
            inputs = {**inputs, "share": self._shares[micro]}
        loss = super().training_step(model, inputs, num_items_in_batch)
        if loss.device.type == "cpu":
            self._require_finite(float(loss))
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch; its parts are summed on the device until the next log, each step counting once."""
        outputs = model(**inputs)
        for name in ("cross_entropy", "contrastive"):
            value = outputs[name].detach().float() / max(1, len(self._shares))
            self._parts[name] = self._parts[name] + value if name in self._parts else value
        self._parts_count += self._micro[1] == 0
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the parts of the loss and what the video branch kept beside the loss itself."""
        if "loss" in logs:
            self._require_finite(logs["loss"])
            if self._parts_count:
                means = torch.stack(list(self._parts.values())) / self._parts_count
                if self.world > 1:  # each process has its rows' part, times their number, as of the loss itself
                    dist.all_reduce(means)
                    means /= self.world
                logs.update(zip(self._parts, means.tolist(), strict=True))
            self._parts, self._parts_count = {}, 0
            logs.update(self.compression.take())
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the watched rows, every row exactly once whatever the number of processes."""
        with self.average.applied() if self.average is not None else nullcontext():
            return self._score_watched(metric_key_prefix)

    def _score_watched(self, metric_key_prefix: str) -> dict[str, float]:
        watch = self.fit.watch
        assert watch is not None
        settings = self.fit.recipe.train
        logits = predict_logits(self.core, watch, settings, precision=settings.precision)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in watched_scores(logits, watch.labels).items()}
        if not math.isfinite(metrics[f"{metric_key_prefix}_loss"]):
            raise UserError(
                f"{self.fit.name}: the loss on the watched rows is not finite after step "
                f"{self.state.global_step}: lower train.lr."
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        curve = curve_of(self.state.log_history)
        if self.fit.keep_best and best_point(curve, settings.metric) is curve[-1] and self.args.should_save:
            checkpoints.save_weights(self.core, self.fit.folder / checkpoints.BEST, curve[-1]["epoch"])
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.core, self.fit.recipe.train, self.args.device)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear warm-up, then constant, linear or cosine to zero at the last step of `train.epochs`."""
        if self.lr_scheduler is None:
            settings = self.fit.recipe.train
            warmup = settings.warmup * num_training_steps

            def factor(step: int) -> float:
                if step < warmup:
                    return (step + 1) / (warmup + 1)
                left = (num_training_steps - step) / max(1.0, num_training_steps - warmup)
                if settings.schedule == "linear":
                    return max(0.0, left)
                return 0.5 - 0.5 * math.cos(math.pi * left) if settings.schedule == "cosine" else 1.0

            assert self.optimizer is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.args.should_save:
            return
        folder = self.fit.folder / "checkpoints"
        with checkpoints.written_whole(checkpoints.checkpoint_path(folder, self.state.global_step)) as part:
            checkpoints.save_weights(self.core, part / checkpoints.WEIGHTS)
            if self.average is not None:
                self.average.save(part)
            if self.fit.recipe.train.capacity_quantile is not None:
                (part / checkpoints.COMPRESSION).write_text(json.dumps(self.compression.state()), encoding="utf-8")
            self._save_optimizer_and_scheduler(str(part))
            self._save_scaler(str(part))
            self.state.save_to_json(str(part / checkpoints.STATE))
        checkpoints.rotate(folder, self.fit.recipe.train.keep_checkpoints)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_weights(self.core, Path(resume_from_checkpoint) / checkpoints.WEIGHTS)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))
        if self.fit.recipe.train.capacity_quantile is not None:
            measured = (Path(resume_from_checkpoint) / checkpoints.COMPRESSION).read_text(encoding="utf-8")
            self.compression.load(json.loads(measured), self.args.device)
            self.use_graphs()

    def reserve_capacity(self) -> None:
        """Reserve the rows that the share `train.capacity_quantile` of the frames got by with so far."""
        quantile = self.fit.recipe.train.capacity_quantile
        assert quantile is not None
        rows = self.compression.reserve(quantile)
        note(
            f"{self.fit.name}: vision.capacity={list(rows)} from here on: the tokens of a frame that {quantile:.4g} of "
            "the frames of the first epoch got by with."
        )
        self.use_graphs()

    def use_graphs(self) -> None:
        """Let the video branch be captured where `train.cuda_graphs` asks for it, or say why it is not."""
        settings = self.fit.recipe.train
        if not settings.cuda_graphs or self.compression.measuring:  # the first epoch finds the shapes; asked again then
            return
        reason = why_not_training(self.core, self.args.device, settings.accumulation, self.world)
        if reason is not None:
            note(f"{self.fit.name}: the video branch is not captured as a CUDA graph: {reason}.")
        elif self.core.video is not None:
            self.core.video.graphs = VideoGraphs(self.core.video, self.compression.unchanged)
            note(f"{self.fit.name}: the video branch is captured as CUDA graphs, one for each number of videos.")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise UserError(
                f"{checkpoint} has an optimizer with other groups of parameters than this version of deepmsi makes "
                f"({error}): resume with the version that began it, or delete {self.fit.folder / 'checkpoints'} to "
                "train this part again."
            ) from None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: every step seeds itself."""

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            hint = "use bf16 in place of fp16, or " if self.fit.recipe.train.precision == "fp16" else ""
            raise UserError(
                f"{self.fit.name}: the loss is {loss} at step {self.state.global_step + 1}, so training stopped: "
                f"{hint}lower train.lr (now {self.fit.recipe.train.lr:g}) or check the features for outliers; the "
                "checkpoints before it are whole."
            )


class _Flow(TrainerCallback):
    """When to evaluate, checkpoint and stop; sets the epoch of the sampler."""

    def __init__(self, trainer: UtteranceTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.batches.set_epoch(state.global_step // self.trainer.steps_per_epoch)

    def _saves_step(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, wherever in an epoch it lies."""
        fit = self.trainer.fit
        every = fit.recipe.train.checkpoint_steps
        return every is not None and step % every == 0 and fit.checkpoints

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update(state.global_step)
        # The checkpoint at an epoch's end follows its evaluation: a fit that goes on from there has to know the scores.
        if self._saves_step(state.global_step) and state.global_step % self.trainer.steps_per_epoch:
            # The running means start anew after a log, so that a resumed history reads like an uninterrupted one.
            control.should_log = control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        fit = self.trainer.fit
        epoch = round(state.epoch or 0)
        if self.trainer.compression.measuring:
            self.trainer.reserve_capacity()
        last = epoch >= fit.last_epoch
        control.should_log = True
        control.should_evaluate = fit.watch is not None
        due = last or epoch % fit.recipe.train.checkpoint_every == 0
        control.should_save = (fit.checkpoints and due) or self._saves_step(state.global_step)
        if last:
            control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        fit = self.trainer.fit
        if _is_over(fit, curve_of(state.log_history), state.epoch or 0.0):
            control.should_training_stop = True
            control.should_save = fit.checkpoints


@contextmanager
def warnings_of_transformers_off() -> Iterator[None]:
    """Keep the Trainer's remarks about what deepmsi does itself (tokenizers, saved arguments) off the terminal."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _collected_quickly() -> Iterator[None]:
    """Keep what exists out of the garbage collections that accelerate asks for before every fit; collect what came.

    Walking all imported modules takes most of the time of a small fit, and protocols run hundreds of them. A trainer
    refers to itself, so that its moments and gradients would otherwise wait for a collection of everything.
    """
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()


def _arguments(fit: Fit) -> TrainingArguments:
    settings = fit.recipe.train
    check_device(settings)
    cpu = training_device(settings).type == "cpu"
    with warnings_of_transformers_off():
        arguments = TrainingArguments(
            output_dir=str(fit.folder / "checkpoints"),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.lr,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
            use_cpu=cpu,
            ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
            ddp_find_unused_parameters=False,
            logging_steps=settings.log_every,
            logging_nan_inf_filter=False,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=not cpu,
            seed=fit.seed % 2**32,
            log_level="error",
        )
        _ = arguments.device  # decides about processes and devices
    # One GPU unless torchrun says otherwise: several visible ones would become DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _is_over(fit: Fit, curve: list[Point], epoch: float) -> bool:
    """Whether the last epoch is reached, or patience is at its end."""
    if epoch >= fit.last_epoch:
        return True
    patience = fit.recipe.train.patience
    if patience is None or not fit.keep_best or not curve or epoch != curve[-1]["epoch"]:
        return False
    return epoch - best_point(curve, fit.recipe.train.metric)["epoch"] >= patience


def _forget(folder: Path, aside: bool) -> None:
    """Take away what an earlier try of a fit left: a later resume would mix it with what comes now.

    Checkpoints that could not be read are put aside, for they may be readable another day.
    """
    if process_rank()[0] == 0:
        if aside:
            damaged = folder / "checkpoints-damaged"
            shutil.rmtree(damaged, ignore_errors=True)
            (folder / "checkpoints").rename(damaged)
            note(f"The checkpoints that cannot be read are kept in {damaged}.")
        for name in ("checkpoints", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / checkpoints.BEST).unlink(missing_ok=True)
