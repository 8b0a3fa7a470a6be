"""What a training step takes of the memory, said before it starts, and the batch size that fits."""

from __future__ import annotations

import os
from bisect import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

import psutil
import torch
import torch.distributed as dist

from deepmsi.errors import UserError
from deepmsi.models.memory import StepMemory, gigabytes, step_memory
from deepmsi.models.precision import check_precision
from deepmsi.nn.recompute import Recompute
from deepmsi.train.processes import process_rank
from deepmsi.train.recipe import Recipe, TrainSettings

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI

# What kernels allocate inside and allocators lose between blocks is not in the estimate.
SHARE = 0.9


def training_device(settings: TrainSettings) -> torch.device:
    """Where a recipe trains: the GPU where there is one, unless it says the CPU."""
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def check_device(settings: TrainSettings) -> None:
    """Refuse settings of a GPU where there is none.

    Raises:
        UserError: `device` or `precision` needs one.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, and torch finds no CUDA device: set train.device=cpu or auto.")
    check_precision(settings.precision, training_device(settings), "train.precision")


def estimate(model: DeepMSI, recipe: Recipe, utterances: int) -> StepMemory | None:
    """The memory of one micro-batch as a recipe trains it; None where it cannot be known (`step_memory`)."""
    settings = recipe.train
    return step_memory(
        model,
        utterances,
        precision=settings.precision,
        device=training_device(settings),
        averaged=settings.average is not None,
        processes=process_rank()[1],
        stems=settings.cache_stem,
    )


def room(settings: TrainSettings) -> tuple[int, str]:
    """Bytes that this process may take, and whose they are; the least that any process has, where there are several.

    `train.memory_limit` goes first; then the free memory of the GPU, or its share of what is available of the RAM.
    """
    if settings.memory_limit is not None:
        return round(settings.memory_limit * 1e9), "of train.memory_limit"
    if training_device(settings).type == "cuda":
        # What the allocator holds and nothing uses is free for a step: encoders may just have computed features.
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free, whose = torch.cuda.mem_get_info()[0] + idle, "free on the GPU"
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        whose = "available in RAM"
    world = process_rank()[1]
    if world > 1:
        everywhere: list[int] = [0] * world
        dist.all_gather_object(everywhere, free)
        free = min(everywhere)
    return free, whose


def memory_sentence(found: StepMemory | None, utterances: int, there: tuple[int, str]) -> str:
    """What a step takes, as `deepmsi train` says it."""
    step = f"a step of {utterances} utterance{'s' * (utterances > 1)}"
    if found is None:
        return f"The memory of {step} is not known beforehand: its sizes depend on what is read."
    text = f"Memory of {step}, at most: {found}; {gigabytes(there[0])} GB are {there[1]}."
    if found.total > SHARE * there[0]:
        text += (
            " It may not fit: --auto-batch takes a smaller batch, vision.recompute=light, block or chunk keeps less."
        )
    return text


def fit_batch(model: DeepMSI, recipe: Recipe, there: tuple[int, str]) -> tuple[Recipe, str]:
    """Take the largest micro-batch that divides the recipe's and fits, and accumulate to the same effective batch.

    Args:
        model: as the recipe builds it.
        recipe: whose `train.batch_size` and `train.accumulation` are wanted.
        there: from `room`.

    Returns:
        The recipe that fits, and the sentence that says what was chosen.

    Raises:
        UserError: one utterance does not fit, or the memory cannot be known beforehand.
    """
    settings, budget = recipe.train, SHARE * there[0]
    wanted = settings.batch_size
    sizes = [size for size in range(1, wanted + 1) if wanted % size == 0]

    def total(utterances: int) -> float:
        found = estimate(model, recipe, utterances)
        if found is None:
            raise UserError(
                "--auto-batch cannot tell what a step takes, for its sizes depend on what is read: set "
                "train.batch_size yourself."
            )
        return found.total

    batch = largest(sizes, lambda size: total(size) <= budget)
    if batch is None:
        raise UserError(
            f"A step of one utterance takes {gigabytes(total(1))} GB, and {gigabytes(there[0])} GB are {there[1]}, a "
            f"tenth of which stays free: {_way_out(model, recipe, budget)}."
        )
    if batch == wanted:
        return recipe, f"--auto-batch: {wanted} utterances fit, as the recipe has it."
    steps = settings.accumulation * (wanted // batch)
    told = (
        f"--auto-batch: train.batch_size={batch} and train.accumulation={steps} in place of {wanted} and "
        f"{settings.accumulation}, the same {batch * steps} utterances a step"
    )
    if recipe.loss.contrastive:
        told += f"; the contrastive term sees {batch} at a time" + (", which leaves it 0" if batch == 1 else "")
    return recipe.with_batch(batch, steps), f"{told}."


def largest(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending sizes that fits, where all below a fitting one fit; None: not even the first."""
    count = bisect(sizes, False, key=lambda size: not fits(size))
    return sizes[count - 1] if count else None


def _way_out(model: DeepMSI, recipe: Recipe, budget: float) -> str:
    """The first position of the recompute switch that makes one utterance fit."""
    if model.video is not None:
        backbone, positions = model.video.backbone, get_args(Recompute)
        now = backbone.recompute
        try:
            for position in positions[positions.index(now) + 1 :]:
                backbone.recompute = position
                found = estimate(model, recipe, 1)
                if found is not None and found.total <= budget:
                    return f"vision.recompute={position} takes {gigabytes(found.total)} GB"
        finally:
            backbone.recompute = now
    return "choose a smaller model, fewer frames or shorter texts and recordings"
