"""The files of a run directory that more than one part reads: their names, run.json, predictions.csv, groups.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepmsi.data.files import write_text
from deepmsi.errors import UserError

if TYPE_CHECKING:
    from deepmsi.data.store import PreparedRow

METRICS, PREDICTIONS, RECIPE, RUN = "metrics.json", "predictions.csv", "recipe.yaml", "run.json"
GROUPS = "groups.csv"
GROUPINGS = ("speaker", "dialogue")
HISTORY = "history.jsonl"
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
    """Write `predictions.csv`."""
    write_text(path, predictions_table(rows, names))


def predictions_table(rows: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """What `predictions.csv` holds, whose columns `label_columns` names."""
    header = label_columns(("id", "label", "predicted"), names)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def label_columns(own: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The header of a table with a column for each label behind its own: one of a name that is taken is p(label).

    A label that looks like that already is so, too: `label_of_column` finds every label again.
    """
    taken = [label in own or label_of_column(label) != label for label in labels]
    return [*own, *(f"p({label})" if known else label for label, known in zip(labels, taken, strict=True))]


def label_of_column(column: str) -> str:
    """The label whose probabilities a column of `label_columns` holds."""
    return column[2:-1] if column.startswith("p(") and column.endswith(")") else column


def read_predictions(path: Path) -> dict[str, tuple[str, str]]:
    """Read the scored rows of a `predictions.csv`: {id: (true label, predicted label)}.

    Raises:
        UserError: the file is missing or no UTF-8, it or a row lacks one of the columns id, label, predicted, or an id
            is there twice.
    """
    file = path / PREDICTIONS if path.is_dir() else path
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = {"id", "label", "predicted"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{file} is no predictions file: it lacks the column {min(missing)!r}.")
            listed = [(row["id"], (row["label"], row["predicted"])) for row in reader if row["label"]]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): evaluate the run first.") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}): write the predictions again.") from None
    rows = dict(listed)
    if len(rows) < len(listed):
        raise UserError(
            f"{file} has a row more than once, as folds that are repeated leave it: only runs that predicted each row "
            "once are compared row by row."
        )
    if short := [key for key, row in rows.items() if row[1] is None]:
        raise UserError(f"{file} is damaged: row {short[0]!r} has no prediction; write the predictions again.")
    return rows


def groups_told(rows: Iterable[PreparedRow]) -> dict[str, dict[str, str]]:
    """The speaker and the dialogue of each row: {id: {"speaker": ..., "dialogue": ...}}, "" where it has none."""
    return {row.id: {name: getattr(row, name) or "" for name in GROUPINGS} for row in rows}


def write_groups(path: Path, rows: Iterable[PreparedRow]) -> None:
    """Write `groups.csv`: what `groups_told` tells of the rows that take part."""
    text = io.StringIO()
    told = [[row_id, *cells.values()] for row_id, cells in groups_told(rows).items()]
    csv.writer(text, lineterminator="\n").writerows([("id", *GROUPINGS), *told])
    write_text(path, text.getvalue())


def read_groups(path: Path) -> dict[str, dict[str, str]]:
    """Read the `groups.csv` beside a file or in a folder, as `groups_told` has it; {} without one.

    Raises:
        UserError: it cannot be read.
    """
    file = (path if path.is_dir() else path.parent) / GROUPS
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if missing := {"id", *GROUPINGS} - set(reader.fieldnames or ()):
                raise ValueError(f"it lacks the column {min(missing)!r}")
            return {row["id"]: {name: row[name] or "" for name in GROUPINGS} for row in reader}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}): delete it, and intervals are over rows alone.") from None


def groups_of(ids: Sequence[str], *told: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Arrange what `groups_told` has by the rows: {"speaker": [...], "dialogue": [...]}, "" where nothing is told.

    Of several tables the first one counts that tells of a row.
    """

    def cell(row_id: str, name: str) -> str:
        return next((found for table in told if (found := table.get(row_id, {}).get(name))), "")

    return {name: [cell(row_id, name) for row_id in ids] for name in GROUPINGS}
