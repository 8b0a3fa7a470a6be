"""What training says to the person at the terminal: sentences and progress bars on standard error, one process."""

from __future__ import annotations

import sys

from tqdm import tqdm

from deepmsi.train.processes import process_rank


def note(sentence: str) -> None:
    """Print a sentence on standard error, above a running progress bar, from the first process only."""
    if process_rank()[0] == 0:
        tqdm.write(sentence, file=sys.stderr)


def progress(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar on standard error; silent in other processes and where standard error is no terminal."""
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
        disable=True if process_rank()[0] else None,
    )
