"""What a command has of its process: signals, standard output for the result alone, sentences on standard error."""

import contextlib
import io
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO


class Terminated(BaseException):
    """SIGTERM came."""


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # where something swallows the exception, the next one ends the process
    # Who ends a whole group ends the loader's workers, too, which torch's handler would make an error of.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise Terminated


@contextlib.contextmanager
def on_signals(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Handle signals in the block, but those that are ignored.

    Not among the processes of a launcher, which would wait for one that is gone as they unwind.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handlers[number])
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def working() -> Iterator[IO[str]]:
    """Do a command's work: what interrupts it unwinds it, so that temporary folders and half-written files go.

    Before, nothing has been written, and an interruption ends the process at once: the import of torch swallows some
    exceptions, and goes on without numpy.

    Yields where the result goes, see `_reserved_stdout`.
    """
    import torch  # noqa: F401

    unwinding = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    with on_signals(unwinding), _own_warnings_as_sentences(), _reserved_stdout() as result:
        yield result


@contextlib.contextmanager
def _own_warnings_as_sentences() -> Iterator[None]:
    """Say deepmsi's own warnings without the place in its code that Python puts before them."""
    own = str(Path(__file__).parent)
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if filename.startswith(own):
                say(str(message))
            else:
                shown(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def is_first() -> bool:
    """Whether this process alone, or the first of a launcher's, is to write results."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _reserved_stdout() -> Iterator[IO[str]]:
    """Send everything written to standard output, by any library or child process, to standard error.

    Yields the real standard output, for the result alone; of several processes of a launcher that of the first.
    """
    if not is_first():
        with contextlib.redirect_stdout(sys.stderr):
            yield io.StringIO()
        return
    real = sys.stdout
    real.flush()
    try:
        saved = os.dup(1)
    except OSError:  # there is no standard output on the level of the process
        with contextlib.redirect_stdout(sys.stderr):
            yield real
        return
    try:
        owns = real.fileno() == 1
    except (OSError, ValueError, AttributeError):  # a stream in memory stands in its place
        owns = False
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
            own = os.fdopen(os.dup(saved), "w", encoding="utf-8", errors="backslashreplace") if owns else None
            yield stack.enter_context(own) if own else real
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def plain(value: Any) -> Any:
    """Reduce numpy scalars, paths and tuples to what JSON has; not-a-number and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    raise TypeError(f"no JSON for {type(value).__name__}")


def json_text(value: Any) -> str:
    """Write a value as a JSON document, with what :func:`plain` makes of it."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def say(message: str) -> None:
    """Print a sentence on standard error, on a line of its own also where an error left a bar behind."""
    if "tqdm" not in sys.modules:
        print(message, file=sys.stderr)
        return
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)
