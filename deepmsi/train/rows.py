"""Which rows of the data take part, with which class; opening data that may be a manifest or prepared already."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepmsi.data.manifest import part_or_name
from deepmsi.data.options import PrepareOptions
from deepmsi.data.store import INDEX, STARTED, PreparedData, PreparedRow
from deepmsi.errors import UserError
from deepmsi.models.config import MODALITIES, ModelSections
from deepmsi.train.dataset import present_modalities
from deepmsi.train.processes import barrier, from_main

if TYPE_CHECKING:
    from deepmsi.data.manifest import Row

# Cells of a manifest that a prepared folder keeps as they are.
_CELLS = ("text", "label", "speaker", "dialogue", "split", "start", "end", "side", "extra")
# What a failure costs a row. A video that cannot be opened is named once, for its sound too; without a face the frames
# are of the whole picture, and of what is read in part the rest is used.
_COSTS: dict[str, set[str]] = {
    "clip": {"video", "text", "audio"},
    "video": {"video", "audio"},
    "face": set(),
    "text": {"text"},
    "audio": {"audio"},
    "part of video": set(),
    "part of audio": set(),
    "part of audio features": set(),
}


@dataclass
class Selection:
    """Rows that take part: positions in the prepared folder and class ids, with what was left out and why."""

    names: list[str]
    indices: NDArray[np.int64]
    classes: NDArray[np.int64]
    left_out: dict[str, int] = field(default_factory=dict)
    poorer: list[str] = field(default_factory=list)  # for each row that takes part and lost a modality, how
    partial: list[str] = field(default_factory=list)  # and for each of which only a part could be read, why
    unused: list[str] = field(default_factory=list)  # labels to be left out that no row has

    def notes(self) -> list[str]:
        """One sentence per reason for which rows were left out, and one on those that lost a modality or a part."""
        notes = [f"{count} row{'s' * (count > 1)} left out: {reason}." for reason, count in self.left_out.items()]
        if self.poorer:
            count = len(self.poorer)
            notes.append(f"{count} row{'s' * (count > 1)} lost a modality (the first: {self.poorer[0]}).")
        if self.partial:
            count = len(self.partial)
            notes.append(f"{count} row{'s' * (count > 1)} could be read only in part (the first: {self.partial[0]}).")
        if self.unused:
            notes.append(f"No row has {' or '.join(map(repr, self.unused))}, which exclude_labels leaves out.")
        return notes


def is_prepared(path: Path) -> bool:
    """Whether a folder is a prepared one, finished or not."""
    return path.is_dir() and ((path / INDEX).exists() or (path / STARTED).exists())


def open_data(
    path: Path,
    options: PrepareOptions,
    prepared: Path,
    check: Callable[[Sequence[PreparedRow]], object],
    begun: str | None = None,
    labelled: bool = True,
) -> PreparedData:
    """Open a prepared folder, or prepare a manifest first.

    Args:
        path: a prepared folder, a manifest, or a release's folder that `read_manifest` knows.
        options: for a manifest.
        prepared: where a manifest is prepared; what lies there already is continued.
        check: given the rows of a manifest as they will be where all their files can be read, refuses before these are
            decoded what would be refused after.
        begun: fingerprint of the data of the run that is continued: a manifest whose rows differ from what was
            prepared for it is refused before its clips are decoded, too.
        labelled: whether a manifest has to have labels.

    Raises:
        UserError: neither, no label at all where there has to be one, other rows, what `check` refuses, or nothing in
            it could be prepared.
    """
    if not path.exists():
        raise UserError(f"There is no data at {path}: give a manifest or a prepared folder.")
    if is_prepared(path):
        return PreparedData.open(path)
    from deepmsi.data.manifest import read_manifest
    from deepmsi.data.prepare import expected_rows, prepare

    manifest = read_manifest(path)
    if labelled and all(row.label is None for row in manifest.rows):
        raise UserError(
            f"{path}: no row has a label: training and evaluation read them from the column 'label', and deepmsi "
            "predict RUN --data does without."
        )
    if begun is not None and (change := _first_change(manifest.rows, prepared, begun)):
        raise UserError(
            f"{prepared.parent} was begun with other data ({change} {path}): resume it with the same, or give another "
            "directory."
        )
    check(expected_rows(manifest, options))
    return prepare(path, prepared, options, replace=True)


def open_shared(
    path: Path,
    options: PrepareOptions,
    prepared: Path,
    check: Callable[[Sequence[PreparedRow]], object],
    begun: str | None = None,
    labelled: bool = True,
) -> PreparedData:
    """`open_data` for the processes of a group: what the first has prepared the others open, where they see it."""
    own: list[PreparedData] = []

    def opened() -> tuple[Path, str]:
        own.append(open_data(path, options, prepared, check, begun, labelled))
        return prepared, own[0].fingerprint

    folder, fingerprint = from_main(opened)
    if not own and not is_prepared(path) and is_prepared(folder):
        with suppress(UserError):
            found = PreparedData.open(folder)
            if found.fingerprint == fingerprint:  # on a disk of this process's own other data may lie there
                own.append(found)
    if not own:
        opened()
    barrier()  # it took hours, perhaps, which other collectives would not wait for
    return own[0]


def _first_change(rows: Sequence[Row], prepared: Path, begun: str) -> str | None:
    """What the rows of a manifest have other than those that were prepared for a run; None where it cannot be told.

    The contents of files are not looked at: whether a file that was written anew holds the same shows in its arrays.
    """
    try:
        before = PreparedData.open(prepared)
    except UserError:
        return None  # not there, or damaged, which preparing mends
    if before.fingerprint != begun:
        return None
    failed = {failure["id"] for failure in before.failures}
    known = {row.id: row for row in before.rows}
    there = [row for row in rows if row.id in known or row.id not in failed]  # of the others nothing could be read
    for row in there:
        if row.id not in known:
            return f"row {row.id!r} is new in"
        for cell in _CELLS:
            if getattr(row, cell) != getattr(known[row.id], cell):
                return f"row {row.id!r} has another {cell} in"
    if missing := known.keys() - {row.id for row in there}:
        return f"row {min(missing)!r} is missing in"
    return None if [row.id for row in there] == list(known) else "the rows have another order in"


def select_rows(
    rows: Sequence[PreparedRow],
    config: ModelSections,
    names: Sequence[str] | None,
    exclude: Sequence[str],
    hidden: Sequence[str] = (),
    failures: Sequence[Mapping[str, str]] = (),
    labelled: bool = True,
    split: str | None = None,
) -> Selection:
    """Choose the rows that a model can read, and of these the labelled ones.

    Args:
        rows: of the prepared folder.
        config: the model's sections.
        names: the classes, in order; None takes those of the rows, sorted.
        exclude: labels whose rows are left out.
        hidden: modalities that do not count as present.
        failures: what could not be prepared, as `PreparedData.failures` lists it, so that it is told.
        labelled: whether a row without a label is left out; else no label is looked at, and all classes are -1.
        split: the part by the column `split` that is chosen; None chooses all.

    Raises:
        UserError: no row is of the part or is left, fewer than two classes, or a row has a label that is not among
            the classes.
    """
    left_out: Counter[str] = Counter()
    if gone := {failure["id"] for failure in failures} - {row.id for row in rows}:
        first = next(failure["reason"] for failure in failures if failure["id"] in gone)
        left_out[f"nothing of them could be read (the first: {first})"] = len(gone)
    losses: dict[str, list[Mapping[str, str]]] = {}
    for failure in failures:
        losses.setdefault(failure["id"], []).append(failure)
    read = [name for name in config.modalities if name not in hidden]
    indices, labels, poorer, partial = [], [], [], []
    parts = {f"part of {name}" for name in (*read, *in_words(config, read))}
    wanted = None if split is None else part_or_name(split)
    if split is not None and all(part_or_name(row.split) != wanted for row in rows):
        held = ", ".join(sorted({row.split or "none" for row in rows}))
        raise UserError(f"No row is of the part {split!r}: the column split holds {held}.")
    for i, row in enumerate(rows):
        there = present_modalities(row, config)
        if split is not None and part_or_name(row.split) != wanted:
            left_out[f"they are not of the part {split!r}"] += 1
        elif row.label in exclude and row.label is not None:
            left_out[f"the label {row.label!r} is excluded by the recipe"] += 1
        elif row.label is None and labelled:
            left_out["they have no label"] += 1
        elif not any(has and name not in hidden for has, name in zip(there, MODALITIES, strict=True)):
            left_out[f"they have none of {', '.join(in_words(config, read))}"] += 1
        else:
            indices.append(i)
            labels.append(row.label or "")
            missing = {name for has, name in zip(there, MODALITIES, strict=True) if not has and name in read}
            poorer += [loss["reason"] for loss in losses.get(row.id, ()) if missing & _COSTS[loss["modality"]]][:1]
            partial += [loss["reason"] for loss in losses.get(row.id, ()) if loss["modality"] in parts][:1]
    if not indices:
        reasons = "; ".join(f"{count} because {reason}" for reason, count in left_out.items()) or "there are none"
        raise UserError(f"No row is left to work with: {reasons}.")
    classes = list(names) if names is not None else sorted(set(labels))
    if len(classes) < 2:
        raise UserError(f"The data have one class only ({classes[0]!r}): a classifier needs two or more.")
    position = {name: k for k, name in enumerate(classes)}
    if labelled:
        for i, label in zip(indices, labels, strict=True):
            check_label(rows[i].id, label, classes)
    return Selection(
        classes,
        np.array(indices, dtype=np.int64),
        np.array([position[label] if labelled else -1 for label in labels], dtype=np.int64),
        dict(left_out),
        poorer,
        partial,
        sorted(set(exclude) - {row.label for row in rows}),
    )


def readable(rows: Sequence[PreparedRow], config: ModelSections) -> list[str]:
    """The modalities that at least one row has for the model to read."""
    there = [present_modalities(row, config) for row in rows]
    return [name for k, name in enumerate(MODALITIES) if any(each[k] for each in there)]


def in_words(config: ModelSections, modalities: Sequence[str]) -> list[str]:
    """What a model reads of modalities: "text", or "text features" where it reads these."""
    given = [name for name in modalities if name != "video" and getattr(config, name).encoder == "features"]
    return [f"{name} features" if name in given else name for name in modalities]


def check_label(row_id: str, label: str, names: Sequence[str]) -> None:
    """Refuse a label that is not among the classes.

    Raises:
        UserError: it is not; the nearest class is named.
    """
    if label not in names:
        close = difflib.get_close_matches(label, names, n=1)
        hint = f"; did you mean {close[0]!r}" if close else ""
        raise UserError(f"Row {row_id!r} has the unknown label {label!r}: known are {', '.join(names)}{hint}.")
