"""The processes of a launcher such as torchrun: which one this is, joining them, taking turns."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from deepmsi.data.files import claimed
from deepmsi.errors import UserError

T = TypeVar("T")

# One process may prepare data for hours, while a group's own collectives give the others up after minutes.
PATIENCE = timedelta(days=1)
_waiting: Any = None  # the group that waits so long; None is the group of all, which somebody else has started


def process_rank() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where no group runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def start_processes(device: torch.device) -> None:
    """Join the other processes where a launcher started several, to work on a kind of device."""
    global _waiting
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (dist.is_available() and dist.is_initialized()):
        from accelerate import PartialState

        cpu = device.type == "cpu"
        PartialState(cpu=cpu, **({"backend": "gloo"} if cpu else {}))
        if process_rank()[1] == 1:
            raise UserError("WORLD_SIZE says that there are several processes, which nothing joins: start by torchrun.")
        _waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
        atexit.register(leave_processes)


def leave_processes() -> None:
    """End the group, and with it its threads, before the interpreter ends.

    A thread that lets go of its last work after that asks for a lock that nobody gives any more, and aborts the
    process.
    """
    global _waiting
    if dist.is_available() and dist.is_initialized():
        _waiting = None
        gc.collect()  # the reducer of a model that is gone still holds the group
        dist.destroy_process_group()


def from_main(action: Callable[[], T]) -> T:
    """Run an action in the first process alone, and give its result to all.

    Raises:
        UserError: what it raised, in all of them.
    """
    rank, world = process_rank()
    if world == 1:
        return action()
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = action()
        except UserError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0, group=_waiting)
    if told[1] is not None:
        raise UserError(told[1])
    return cast(T, told[0])


def together(action: Callable[[], T]) -> T:
    """Run an action in every process, and wait until all of them have.

    Raises:
        UserError: what one of them raised, in all of them.
    """
    _, world = process_rank()
    if world == 1:
        return action()
    result, told = None, None
    try:
        result = action()
    except UserError as error:
        told = str(error)
    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, told, group=_waiting)
    for sentence in everywhere:
        if sentence is not None:
            raise UserError(sentence)
    return cast(T, result)


@contextmanager
def claimed_by_all(folder: Path) -> Iterator[bool]:
    """Whether no other call works in the folder (made where it is missing); it is this call's for the block."""
    rank, world = process_rank()
    with ExitStack() as stack:
        free = [True]
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            free = [stack.enter_context(claimed(folder))]
        if world > 1:
            dist.broadcast_object_list(free, src=0, group=_waiting)
        yield free[0]


def barrier(patient: bool = True) -> None:
    """Wait for the other processes, where there are any; as long as their group does where not patient."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier(group=_waiting if patient else None)
