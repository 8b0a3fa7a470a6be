"""Which rows train and which are reported: the splits of every protocol, and the parts that choose epochs.

A protocol yields `Fold`s of row indices. Whatever picks the number of epochs sees the fold's training part
(`inner_folds`) or the manifest's dev part (`Fold.dev`), never the part that is reported (`Fold.test`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from deepmsi.data.manifest import part_of
from deepmsi.errors import UserError
from deepmsi.models.config import Modalities, Section
from deepmsi.train.seeding import derive_seed

if TYPE_CHECKING:
    from deepmsi.data.store import PreparedRow

ProtocolName = Literal[
    "split-column",
    "stratified-kfold",
    "leave-one-out",
    "group-kfold",
    "leave-one-speaker-out",
    "leave-one-session-out",
    "iemocap-session5",
    "paper-kfold10",
]
ALIASES = {
    "meld": "split-column",
    "iemocap-loso": "leave-one-session-out",
    "iemocap-speaker": "leave-one-speaker-out",
}
LEAKS = "leaks: utterances of one dialogue and one speaker stand on both sides of the split"
SEEN = "leaks: encoders that were trained on reported rows are accepted"

# Columns with a meaning whose cells are names that rows may share.
_COLUMNS = ("id", "video", "audio", "text", "label", "speaker", "dialogue", "split", "side")

Indices = NDArray[np.int64]


class ProtocolSettings(Section):
    """How the reported numbers are taken; in a recipe `protocol: {name: ...}` or `protocol: NAME`."""

    name: ProtocolName = "split-column"
    folds: int = Field(5, ge=2, description="of stratified-kfold and group-kfold")
    repeats: int = Field(1, ge=1, description="of stratified-kfold and group-kfold, each shuffled anew")
    seed: int | None = Field(
        None, ge=0, description="of the shuffles, so that runs of several seeds have the same folds; null takes seed"
    )
    group: str = Field(
        "dialogue", min_length=1, description="column that group-kfold keeps together: dialogue, speaker, video, ..."
    )
    held_out: Modalities = Field(
        default_factory=list,
        description="modalities a row needs to be held out and reported; rows without them always train",
    )
    seen_features: bool = Field(
        False,
        description="accept encoders, and features of those, that were trained on rows that are reported: the figures "
        "then leak",
    )
    final_fit: bool = Field(True, description="after folds were measured, fit the model that is kept on all rows")

    @field_validator("name", mode="before")
    @classmethod
    def _alias(cls, name: Any) -> Any:
        return ALIASES.get(name, name) if isinstance(name, str) else name

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @property
    def leaks(self) -> bool:
        """Whether the protocol is known to leak (said wherever its numbers are printed)."""
        return self.name == "paper-kfold10" or self.seen_features

    @property
    def title(self) -> str:
        """The protocol in words, with its folds, and its leak where it has one."""
        return self.title_of(())

    def title_of(self, folds: Iterable[str]) -> str:
        """The title for folds of these names: the one of a manifest's own split is called by the part it reports."""
        words = {
            "split-column": "the manifest's own split" + ", scored on its dev part" * ("dev" in folds),
            "stratified-kfold": f"{self.folds}-fold cross-validation, stratified by label",
            "leave-one-out": "leave one utterance out",
            "group-kfold": f"{self.folds}-fold cross-validation grouped by {self.group}",
            "leave-one-speaker-out": "leave one speaker out",
            "leave-one-session-out": "leave one session out",
            "iemocap-session5": "Session 5 held out",
            "paper-kfold10": "10-fold cross-validation over shuffled utterances, as the paper's authors ran it",
        }[self.name]
        if self.name in ("stratified-kfold", "group-kfold") and self.repeats > 1:
            words += f", repeated {self.repeats} times"
        if self.held_out:
            words += f", of the utterances with {' and '.join(self.held_out)}"
        reasons = [LEAKS] if self.name == "paper-kfold10" else []
        reasons += [SEEN] if self.seen_features else []
        return f"{words} ({'; '.join(reasons)})" if reasons else words


@dataclass(frozen=True)
class Fold:
    """Row indices of one fit: `train`, the reported `test`, and `dev` where the manifest gives one."""

    name: str
    train: Indices
    test: Indices
    dev: Indices | None = None


def make_folds(settings: ProtocolSettings, rows: Sequence[PreparedRow], seed: int) -> list[Fold]:
    """Split rows by a protocol.

    Args:
        settings: the protocol.
        rows: the rows that take part, every one with a label.
        seed: of the shuffles.

    Returns:
        Folds over positions in `rows`. The tests of one repeat are disjoint and together cover every row that
        may be held out; a fold's train, dev and test are disjoint.

    Raises:
        UserError: the rows do not allow the protocol (a column without values, one speaker only, too few rows of a
            label, a fold whose training part lacks a class).
    """
    if settings.name == "split-column":
        folds = _split_column(rows)
    else:
        may_test = np.array([_has(row, settings.held_out) for row in rows], dtype=bool)
        if not may_test.any():
            raise UserError(
                f"No row has {' and '.join(settings.held_out)} (protocol.held_out): there is nothing to report."
            )
        candidates = np.flatnonzero(may_test)
        labels = [row.label for row in rows]
        folds = _PLANS[settings.name](settings, rows, candidates, labels, seed)
    for fold in folds:
        _require_classes(fold, rows)
    return folds


def restrict_folds(folds: Sequence[Fold], whole: Indices, part: Indices) -> list[Fold]:
    """Take the folds of one selection of rows over to a smaller one, leaving out the rows that it lacks.

    Args:
        folds: over positions in `whole`.
        whole, part: [n] rows of both selections, as numbers of one table, ascending.

    Returns:
        The same folds over positions in `part`; those that lose their training or test part are left out, and a dev
        part without rows is None.

    Raises:
        UserError: no fold is left.
    """
    position = {int(row): i for i, row in enumerate(part)}

    def kept(indices: Indices) -> Indices:
        return np.array([position[row] for i in indices if (row := int(whole[i])) in position], dtype=np.int64)

    result = []
    for fold in folds:
        train, test, dev = kept(fold.train), kept(fold.test), None if fold.dev is None else kept(fold.dev)
        if len(train) and len(test):
            result.append(Fold(fold.name, train, test, dev if dev is not None and len(dev) else None))
    if not result:
        raise UserError(
            "No fold has rows to train on and rows to report that have the modalities which are read: give rows of "
            "both, or read other modalities."
        )
    return result


def inner_folds(
    rows: Sequence[PreparedRow],
    train: Indices,
    settings: ProtocolSettings,
    folds: int,
    repeats: int,
    seed: int,
) -> list[Fold]:
    """Split a training part again, to choose the number of epochs inside it.

    Rows that the protocol keeps together stay together, those that are never held out among them; of the column `split`
    speakers do where its parts share none and no dialogue has several, or else dialogues. Otherwise the split is
    stratified by label.

    Args:
        rows: all rows.
        train: the training part, positions in `rows`.
        settings: the outer protocol.
        folds: number of inner folds.
        repeats: number of times, each shuffled anew.
        seed: of the shuffles.

    Returns:
        Folds over positions in `rows`; each inner train holds every class of the training part.
    """
    candidates = train
    if settings.held_out:
        candidates = np.array([i for i in train if _has(rows[i], settings.held_out)], dtype=np.int64)
    found: list[list[Fold]] = []
    for column in _inner_columns(settings, rows, train, candidates, folds):
        found.append(_inner_by(column, rows, train, candidates, folds, repeats, seed))
        if len(found[-1]) == folds * repeats:
            return found[-1]
    if result := max(found, key=len):
        return result
    raise UserError(
        f"The training part of {len(train)} rows cannot be split into {folds} inner folds that keep "
        "every class: set train.selection=last and a number of epochs."
    )


def _inner_by(
    column: str | None,
    rows: Sequence[PreparedRow],
    train: Indices,
    candidates: Indices,
    folds: int,
    repeats: int,
    seed: int,
) -> list[Fold]:
    """Inner folds that keep the groups of a column together; stratified by label without one."""
    labels = [row.label for row in rows]
    # Rows that cannot be held out stay with their groups, too, so that a group does not choose by what it taught.
    groups = None if column is None else {int(i): column_of(rows[i], column) for i in train}
    result = []
    for repeat in range(repeats):
        if groups is None:
            parts = _stratified_parts([labels[i] for i in candidates], folds, _reshuffled(seed, repeat))
        else:
            own = [str(groups[int(i)]) for i in candidates]
            parts = _grouped_parts(own, [labels[i] for i in candidates], folds, _reshuffled(seed, repeat))
        for k, part in enumerate(parts):
            test = np.sort(candidates[part])
            rest = np.sort(np.setdiff1d(train, test, assume_unique=True))
            if groups is not None:
                held = {groups[int(i)] for i in test}
                rest = np.array([i for i in rest if groups[int(i)] not in held], dtype=np.int64)
            if len(test) and {labels[i] for i in rest} == {labels[i] for i in train}:
                result.append(Fold(f"inner-{repeat * folds + k + 1:02d}", rest, test))
    return result


def both_sides(rows: Sequence[PreparedRow], folds: Sequence[Fold]) -> str | None:
    """Say how many reported rows have a speaker, a dialogue or a recording that their fold trains on, too.

    A recording is a file that rows are cut from: their video, else their sound. Empty cells tell nothing.

    Returns:
        Such as "20 by their speaker, 4 by their dialogue, of 26"; None where there is no such row.
    """
    parts = []
    for name in ("speaker", "dialogue", "recording"):
        of = [row.video or row.audio if name == "recording" else column_of(row, name) for row in rows]
        known = [{of[i] for i in fold.train} - {None} for fold in folds]
        if count := sum(of[i] in there for fold, there in zip(folds, known, strict=True) for i in fold.test):
            parts.append(f"{count} by their {name}")
    return f"{', '.join(parts)}, of {sum(len(fold.test) for fold in folds)}" if parts else None


def session_of(row: PreparedRow) -> str | None:
    """The recording session: the column `session`, else the digits of an IEMOCAP name (Ses01F_...)."""
    if named := _extra(row, "session"):
        digits = re.search(r"\d+", named)
        return str(int(digits.group())) if digits else named
    for text in (row.dialogue, row.id, row.speaker):
        found = re.search(r"Ses(?:sion)?_?0*(\d+)", text or "", re.IGNORECASE)
        if found:
            return found.group(1)
    return None


def column_of(row: PreparedRow, column: str) -> str | None:
    """The cell of a column, one with a meaning or another, named in any case; None where it is empty."""
    if column.lower() == "session":
        return session_of(row)
    own = getattr(row, column.lower()) if column.lower() in _COLUMNS else None
    return own or _extra(row, column) or None


def _extra(row: PreparedRow, column: str) -> str | None:
    """The cell of a column without a meaning: the one of that very name, else of the same in another case."""
    if column in row.extra:
        return row.extra[column]
    return next((cell for name, cell in row.extra.items() if name.lower() == column.lower()), None)


def _has(row: PreparedRow, modalities: Sequence[str]) -> bool:
    return all(getattr(row, f"has_{name}") for name in modalities)


def _split_column(rows: Sequence[PreparedRow]) -> list[Fold]:
    parts: dict[str, list[int]] = {"train": [], "dev": [], "test": []}
    for i, row in enumerate(rows):
        part = part_of(row.split)
        if part is None:
            said = f"the split {row.split!r}" if row.split else "no split"
            raise UserError(
                f"Row {row.id!r} has {said}: fill the column split with train, dev or test, or set protocol "
                "to one that makes its own folds (such as group-kfold)."
            )
        parts[part].append(i)
    train, dev, test = (np.array(parts[name], dtype=np.int64) for name in ("train", "dev", "test"))
    if not len(train):
        raise UserError("No row has the split 'train': fill the column split, or choose another protocol.")
    if len(test):
        return [Fold("test", train, test, dev if len(dev) else None)]
    if len(dev):
        return [Fold("dev", train, dev)]
    raise UserError(
        "Every row has the split 'train', so there is nothing to report: give dev or test rows, or set "
        "protocol to one that makes its own folds (such as stratified-kfold)."
    )


def _require_classes(fold: Fold, rows: Sequence[PreparedRow]) -> None:
    known = {rows[i].label for i in fold.train}
    for name, part in (("test", fold.test), ("dev", fold.dev)):
        for i in part if part is not None else ():
            if rows[i].label not in known:
                raise UserError(
                    f"Fold {fold.name!r}: the class {rows[i].label!r} is in its {name} part and not in its "
                    "training part; give more rows of it, leave it out (exclude_labels), or use fewer folds."
                )


def _stratified(
    settings: ProtocolSettings, rows: Sequence[PreparedRow], candidates: Indices, labels: list, seed: int
) -> list[Fold]:
    counts = Counter(labels[i] for i in candidates)
    label, least = min(counts.items(), key=lambda item: item[1])
    if len(candidates) < settings.folds:
        raise UserError(f"{len(candidates)} rows cannot make {settings.folds} folds: set protocol.folds lower.")
    if least < 2 and Counter(labels)[label] < 2:
        raise UserError(
            f"The class {label!r} has one row, so no fold could both train on it and report it: give more "
            "rows of it or leave it out (exclude_labels)."
        )
    return [
        _fold(f"{repeat * settings.folds + k + 1:02d}", len(rows), candidates[part])
        for repeat in range(settings.repeats)
        for k, part in enumerate(
            _stratified_parts([labels[i] for i in candidates], settings.folds, _reshuffled(seed, repeat))
        )
    ]


def _reshuffled(seed: int, repeat: int) -> int:
    """The seed of a repeat's shuffle, which no other seed's repeat has."""
    return derive_seed(seed, "repeat", repeat) if repeat else seed


def _stratified_parts(labels: Sequence[Hashable], folds: int, seed: int) -> list[Indices]:
    """Deal shuffled rows of each label to the folds in turn, continuing where the last label stopped.

    Fold sizes and each label's counts differ by at most one, also where a label has fewer rows than folds.
    """
    rng = np.random.default_rng([seed, 0x5F01D])
    folds = min(folds, len(labels))
    places: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        places.setdefault(label, []).append(i)
    order = np.concatenate([rng.permutation(np.array(places[label])) for label in sorted(places, key=str)])
    return [np.sort(order[k::folds]) for k in range(folds)]


def _leave_one_out(
    settings: ProtocolSettings, rows: Sequence[PreparedRow], candidates: Indices, labels: list, seed: int
) -> list[Fold]:
    return [_fold(f"{k + 1:03d}", len(rows), np.array([i])) for k, i in enumerate(candidates)]


def _grouped(
    settings: ProtocolSettings, rows: Sequence[PreparedRow], candidates: Indices, labels: list, seed: int
) -> list[Fold]:
    groups = _groups(rows, settings.group)
    held = [groups[i] for i in candidates]
    if len(set(held)) == 1:
        raise UserError(
            f"All rows to report have the same {settings.group} ({held[0]!r:.60}), which no number of folds can part: "
            "set protocol.group to another column, or choose another protocol."
        )
    if len(set(held)) < settings.folds:
        raise UserError(
            f"The column {settings.group!r} has {len(set(held))} groups, too few for {settings.folds} "
            "folds: set protocol.folds lower."
        )
    return [
        _group_fold(f"{repeat * settings.folds + k + 1:02d}", groups, candidates[part])
        for repeat in range(settings.repeats)
        for k, part in enumerate(
            _grouped_parts(held, [labels[i] for i in candidates], settings.folds, _reshuffled(seed, repeat))
        )
    ]


def _grouped_parts(groups: Sequence[Hashable], labels: Sequence[Hashable], folds: int, seed: int) -> list[Indices]:
    """Give whole groups to folds, the largest first, each to the fold that it balances best by label."""
    rng = np.random.default_rng([seed, 0x6F01D])
    names = sorted(set(groups), key=str)
    kinds = {label: k for k, label in enumerate(sorted(set(labels), key=str))}
    counts = np.zeros((len(names), len(kinds)))
    position = {name: g for g, name in enumerate(names)}
    for group, label in zip(groups, labels, strict=True):
        counts[position[group], kinds[label]] += 1
    folds = min(folds, len(names))
    target = counts.sum(0) / folds
    filled = np.zeros((folds, len(kinds)))
    assigned = np.empty(len(names), dtype=np.int64)
    shuffled = rng.permutation(len(names))
    for g in shuffled[np.argsort(-counts[shuffled].sum(1), kind="stable")]:
        cost = (((filled + counts[g] - target) ** 2 - (filled - target) ** 2) / np.maximum(target, 1)).sum(1)
        empty = ~filled.any(1)
        if empty.any():
            cost[~empty] = np.inf
        best = int(np.argmin(cost))
        filled[best] += counts[g]
        assigned[g] = best
    fold_of = np.array([assigned[position[group]] for group in groups])
    return [np.flatnonzero(fold_of == k) for k in range(folds)]


def _leave_group_out(column: str) -> Callable[..., list[Fold]]:
    def plan(
        settings: ProtocolSettings, rows: Sequence[PreparedRow], candidates: Indices, labels: list, seed: int
    ) -> list[Fold]:
        groups = _groups(rows, column)
        held = sorted({groups[i] for i in candidates}, key=lambda name: (_natural(name), name))
        if len(set(groups)) < 2:
            raise UserError(
                f"All rows are of one {column} ({held[0]!r}), so leaving one {column} out leaves nothing to "
                "train on: choose another protocol."
            )
        return [
            _group_fold(f"{column}-{name}", groups, np.array([i for i in candidates if groups[i] == name]))
            for name in held
        ]

    return plan


def _session5(
    settings: ProtocolSettings, rows: Sequence[PreparedRow], candidates: Indices, labels: list, seed: int
) -> list[Fold]:
    groups = _groups(rows, "session")
    present = sorted(set(groups))
    if "5" not in present or len(present) < 2:
        raise UserError(f"iemocap-session5 needs Session 5 and others; the rows are of session {', '.join(present)}.")
    test = np.array([i for i in candidates if groups[i] == "5"], dtype=np.int64)
    return [_group_fold("session-5", groups, test)]


def _paper(
    settings: ProtocolSettings, rows: Sequence[PreparedRow], candidates: Indices, labels: list, seed: int
) -> list[Fold]:
    if len(candidates) < 10:
        raise UserError(f"paper-kfold10 needs 10 rows or more; there are {len(candidates)}.")
    order = np.random.default_rng([seed, 0x9A9E4]).permutation(candidates)
    return [_fold(f"{k + 1:02d}", len(rows), part) for k, part in enumerate(np.array_split(order, 10))]


_PLANS: dict[str, Callable[..., list[Fold]]] = {
    "stratified-kfold": _stratified,
    "leave-one-out": _leave_one_out,
    "group-kfold": _grouped,
    "leave-one-speaker-out": _leave_group_out("speaker"),
    "leave-one-session-out": _leave_group_out("session"),
    "iemocap-session5": _session5,
    "paper-kfold10": _paper,
}


def _groups(rows: Sequence[PreparedRow], column: str) -> list[str]:
    groups = []
    for row in rows:
        value = column_of(row, column)
        if value is None:
            others = dict.fromkeys(name for each in rows for name in each.extra)
            if column.lower() not in {"session", *_COLUMNS, *map(str.lower, others)}:
                filled = [name for name in _COLUMNS if any(getattr(each, name) for each in rows)]
                raise UserError(
                    f"There is no column {column!r} to group by (protocol.group): the rows have "
                    f"{', '.join([*filled, *others])}."
                )
            hint = " (or IEMOCAP's own ids)" if column.lower() == "session" else ""
            raise UserError(f"Row {row.id!r} has no {column}: the protocol needs the column {column!r}{hint} filled.")
        groups.append(value)
    return groups


def _inner_columns(
    settings: ProtocolSettings, rows: Sequence[PreparedRow], train: Indices, candidates: Indices, folds: int
) -> list[str | None]:
    """The columns whose groups inner folds may keep together, the best first; None where they go by label alone."""

    def told(column: str, part: Indices) -> set[str]:
        groups = {column_of(rows[i], column) for i in part}
        return set() if None in groups else {str(group) for group in groups}

    column = {
        "group-kfold": settings.group,
        "leave-one-speaker-out": "speaker",
        "leave-one-session-out": "session",
        "iemocap-session5": "session",
        "split-column": "dialogue",
    }.get(settings.name)
    columns = [column if column is not None and len(told(column, candidates)) > 1 else None]
    if settings.name == "split-column":
        # Where the reported speakers are other ones, what is good for speakers that the model knows is not asked. A
        # dialogue of several speakers would lie on both sides, and with it what its rows have in common.
        own, others = ({rows[i].speaker for i in part} for part in (train, np.setdiff1d(np.arange(len(rows)), train)))
        pairs = {(rows[i].dialogue, rows[i].speaker) for i in train if rows[i].dialogue}
        nested = len(pairs) == len({dialogue for dialogue, _ in pairs})
        if nested and None not in own | others and own.isdisjoint(others) and len(told("speaker", candidates)) >= folds:
            columns.insert(0, "speaker")
    return columns


def _fold(name: str, rows: int, test: Indices) -> Fold:
    return Fold(name, np.delete(np.arange(rows), test), np.sort(test))


def _group_fold(name: str, groups: Sequence[str], test: Indices) -> Fold:
    """A fold that trains on no row of a held-out group, not even on those that cannot be reported."""
    out = {groups[i] for i in test}
    train = np.array([i for i, group in enumerate(groups) if group not in out], dtype=np.int64)
    if not len(train):
        raise UserError(f"Fold {name!r} has nothing to train on: every row belongs to a held-out group.")
    return Fold(name, train, np.sort(test))


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]
