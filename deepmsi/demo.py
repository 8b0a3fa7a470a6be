"""`deepmsi demo`: the whole way from clips to a report on synthetic data, without data, network or GPU."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepmsi.errors import UserError
from deepmsi.progress import progress_bar

MARK = "SYNTHETIC.txt"


@dataclass(frozen=True)
class DemoSummary:
    """What the demo measured, and where it put things.

    Attributes:
        accuracy: on the held-out clips, whose speakers training never saw.
        interval: its 95% interval (Wilson).
        chance: accuracy of guessing evenly.
        clips: held-out clips scored.
        example: the prediction on one held-out clip, with its true label.
        report: the page.
        seconds: wall time of each step.
    """

    accuracy: float
    interval: tuple[float, float]
    chance: float
    clips: int
    example: Mapping[str, Any]
    report: Path
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"synthetic": True, **asdict(self)}

    def render(self) -> str:
        """The closing lines of the demo."""
        low, high = self.interval
        return (
            f"accuracy {self.accuracy:.3f} (95% interval {low:.3f} to {high:.3f}) on {self.clips} synthetic clips "
            f"of speakers that training never saw; chance is {self.chance:.3f}\n"
            f"{self.example['clip']}: {self.example['label']}, truly {self.example['truth']}\n"
            f"took {sum(self.seconds.values()):.0f} s\n"
            f"report: {self.report}"
        )


class _Steps:
    """Says on standard error which step runs, and keeps the time each takes."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}
        self._name: str | None = None
        self._begun = 0.0

    def begin(self, name: str, sentence: str) -> None:
        self.end()
        self._name, self._begun = name, time.monotonic()
        print(f"[{len(self.seconds) + 1}/{self.total}] {sentence}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._name is not None:
            self.seconds[self._name] = round(time.monotonic() - self._begun, 1)
            self._name = None


def run_demo(
    out: Path, *, seed: int = 0, speakers: int = 40, takes: int = 1, overrides: Sequence[str] = ()
) -> DemoSummary:
    """Make clips, prepare, train, evaluate, predict, report.

    Args:
        out: folder of everything; new, empty, or of an earlier demo, which is replaced.
        seed: of clips and training.
        speakers: drawn identities; a quarter of them are held out.
        takes: clips per speaker and label.
        overrides: `key=value` settings over the recipe `demo`.

    Raises:
        UserError: `out` holds something else, or a setting is wrong.
    """
    from deepmsi.data.prepare import prepare
    from deepmsi.data.synthetic import LABELS, NOTICE, write_synthetic_set
    from deepmsi.models.predict import load_run
    from deepmsi.report import report
    from deepmsi.report.text import chance_of, interval_of
    from deepmsi.train.ablate import ABLATION, ablate
    from deepmsi.train.recipe import load_recipe
    from deepmsi.train.record import METRICS
    from deepmsi.train.run import train

    recipe = load_recipe("demo", [f"seed={seed}", *overrides])
    source, prepared, held_out_folder, run = _folders(out)
    steps = _Steps(6)

    count = speakers * takes * len(LABELS)
    steps.begin("clips", f"making {count} synthetic clips of {speakers} drawn speakers")
    print(NOTICE, end="", file=sys.stderr)
    with progress_bar(total=count, description="clips", unit="clip") as bar:
        for done in write_synthetic_set(source, seed=seed, speakers=speakers, takes=takes):
            bar.update(done - bar.n)

    steps.begin("prepare", "preparing: decoding frames and sound of every clip once")
    prepare(source / "manifest.csv", prepared, recipe.prepare)
    held_out = prepare(source / "held-out.csv", held_out_folder, recipe.prepare)

    steps.begin("train", "training on three quarters of the speakers")
    train(recipe, prepared, run)

    steps.begin("evaluate", "evaluating on the other speakers, with all modalities and without some")
    whole = ablate(run, held_out.path)[-1]
    metrics = json.loads((run / ABLATION / whole["name"] / METRICS).read_text(encoding="utf-8"))

    row = held_out.rows[0]
    clip = source / "clips" / f"{row.id}.mp4"
    steps.begin("predict", f"predicting one held-out clip, {clip.name}")
    (prediction,) = load_run(run).predict([clip], texts=[row.text])

    steps.begin("report", "writing the report")
    page = report(run)
    steps.end()
    summary = DemoSummary(
        accuracy=metrics["accuracy"],
        interval=interval_of(metrics, "accuracy") or (0.0, 1.0),
        chance=chance_of(metrics)[0],
        clips=metrics["n"],
        example={**prediction.to_dict(), "truth": row.label},
        report=page,
        seconds=steps.seconds,
    )
    (out / "demo.json").write_text(json.dumps(summary.to_dict(), indent=2, default=str) + "\n", encoding="utf-8")
    return summary


def _folders(out: Path) -> tuple[Path, Path, Path, Path]:
    """Return the folders of clips, prepared data, prepared held-out data and run, empty."""
    folders = out / "data", out / "prepared", out / "held-out", out / "run"
    if out.exists():
        if not out.is_dir():
            raise UserError(f"--out {out} is a file; name a folder for the demo")
        ours = (out / MARK).is_file()
        if not ours and any(out.iterdir()):
            raise UserError(f"--out {out} holds files that are not a demo's; name a new or empty folder")
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("Everything in this folder was made by `deepmsi demo`.\n", encoding="utf-8")
    return folders
