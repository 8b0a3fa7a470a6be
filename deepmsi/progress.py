"""Shows on standard error how far long work is: a bar on a terminal, and in a log a line a minute."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_BETWEEN_LINES = 60
"""Seconds: a log of days stays short, and work of less than that leaves no line in it."""


class _Lines:
    """Takes what a bar draws over itself, and writes lines."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    description: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    shown: bool = True,
) -> tqdm:
    """A bar that goes away at its end.

    Args:
        items: what is iterated over; None where ``update`` is called.
        description: of the work.
        unit: what is counted.
        total: how many; None is the length of the items.
        initial: how many were done before.
        shown: False shows nothing, as where there is no standard error.
    """
    shown = shown and sys.stderr is not None
    if shown and sys.stderr.isatty():
        where: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
    else:
        # At position 0 no bar moves the cursor, whatever others there are.
        times = dict.fromkeys(("mininterval", "maxinterval", "delay"), _BETWEEN_LINES)
        where = {"file": _Lines(), "position": 0, **times}
    return tqdm(
        items, desc=description, unit=unit, total=total, initial=initial, leave=False, disable=not shown, **where
    )
