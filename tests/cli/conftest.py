"""A tiny synthetic set, a run trained on it, and a way to call the command line as a user does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepmsi.cli import main
from deepmsi.data.synthetic import write_synthetic_set

# The smallest training that goes through every part: one epoch of the recipe `demo`.
QUICK = ("--set", "train.epochs=1", "--set", "train.batch_size=8")


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line gave."""

    code: int
    out: str
    err: str


Deepmsi = Callable[..., Outcome]


@pytest.fixture
def deepmsi(capfd: pytest.CaptureFixture[str]) -> Deepmsi:
    """Call `deepmsi WORDS...` in this process."""

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def mistake(deepmsi: Deepmsi) -> Callable[..., str]:
    """Call `deepmsi WORDS...`, assert that it is refused as a user's mistake should be, and give the sentence."""

    def call(*words: object) -> str:
        outcome = deepmsi(*words)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        lines = outcome.err.strip().splitlines()
        # progress may stand before it; the sentence is the last line, and the only one of its kind
        assert lines[-1].startswith("deepmsi: ")
        assert sum(line.startswith("deepmsi: ") for line in lines) == 1
        return lines[-1]

    return call


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with manifest.csv and 24 synthetic clips of 4 speakers; the last one is the split `test`."""
    folder = tmp_path_factory.mktemp("synthetic")
    assert list(write_synthetic_set(folder, seed=1, speakers=4, takes=1, workers=1))[-1] == 24
    return folder


@pytest.fixture(scope="session")
def prepared(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set, prepared with the options of the recipe `demo`."""
    from deepmsi.data.prepare import prepare
    from deepmsi.train.recipe import load_recipe

    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(clips / "manifest.csv", out, load_recipe("demo").prepare, workers=1, progress=False)
    return out


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe `demo`, one epoch."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "demo", "--data", str(prepared), "--out", str(run), *QUICK]) == 0
    return run
