"""How far long work is: a bar on a terminal, a line a minute in a log."""

import io
import sys
import time

import pytest
from tqdm import tqdm

from deepmsi.progress import progress_bar
from deepmsi.train.console import note


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [time.time()]  # a clock ahead of that of tqdm's thread, which draws overdue bars
    above = tqdm(total=1, file=io.StringIO())  # one that was never closed, below which tqdm would draw
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress_bar(total=600, description="decoding", unit="clip") as bar:
        for _ in range(500):
            now[0] += 0.5
            bar.update()
        note("A sentence in between.")
    above.close()
    *lines, sentence = log.getvalue().splitlines()
    assert [line.split("|")[0] for line in lines] == [f"decoding: {20 * minute:3d}%" for minute in (1, 2, 3, 4)]
    assert [line.split("|")[2].split()[0] for line in lines] == ["120/600", "240/600", "360/600", "480/600"]
    assert sentence == "A sentence in between."
    assert "\r" not in log.getvalue()


def test_what_ends_within_a_minute_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    assert list(progress_bar([1, 2], description="checking", unit="file")) == [1, 2]
    assert log.getvalue() == ""


@pytest.mark.parametrize("shown", [True, False])
def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, shown: bool) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(progress_bar([1, 2], description="checking", unit="file", shown=shown)) == [1, 2]
    assert ("\rchecking:" in terminal.getvalue()) == shown


def test_where_there_is_no_standard_error_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it was closed before the process began, and under pythonw."""
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress_bar([1, 2], description="checking", unit="file")) == [1, 2]
