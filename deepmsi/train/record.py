"""The files of a run directory that more than one part reads: their names, run.json, and how tables are written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepmsi.data.files import write_text
from deepmsi.errors import UserError
from deepmsi.train.metrics import label_columns

METRICS, PREDICTIONS, RECIPE, RUN = "metrics.json", "predictions.csv", "recipe.yaml", "run.json"
RUN_FORMAT = 1


def read_run(run: Path) -> dict[str, Any]:
    """Read and check `run.json` of a run directory.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    path = run / RUN
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run} is no run of deepmsi train: it has no {RUN}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): the run is damaged.") from None
    check_format(path, facts)
    return dict(facts)


def check_format(path: Path, facts: object) -> None:
    """Refuse what `run.json` holds where another version of deepmsi wrote it."""
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != RUN_FORMAT:
        raise UserError(
            f"{path} has format {found!r} and this deepmsi reads {RUN_FORMAT}: use the deepmsi that made the run."
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all, its keys in the order given.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_predictions(path: Path, rows: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    """Write `predictions.csv`, whose columns `label_columns` names."""
    header = label_columns(("id", "label", "predicted"), names)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())
