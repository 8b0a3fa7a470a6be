"""What training says to the person at the terminal: sentences and progress bars on standard error, one process."""

from __future__ import annotations

import sys

from tqdm import tqdm

from deepmsi.progress import progress_bar
from deepmsi.train.processes import process_rank


def note(sentence: str) -> None:
    """Print a sentence on standard error, above a running progress bar, from the first process only."""
    if process_rank()[0] == 0:
        tqdm.write(sentence, file=sys.stderr)


def progress(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar on standard error; silent in other processes."""
    shown = process_rank()[0] == 0
    return progress_bar(total=total, description=description, unit=unit, initial=initial, shown=shown)
