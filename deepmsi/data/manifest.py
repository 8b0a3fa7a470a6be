"""Reads the tables that name clips: an own CSV, JSONL or JSON manifest, or MELD's CSV files as published.

A manifest's columns are id, video, audio, text, label, speaker, dialogue, split, start, end, side,
audio_start and audio_end for sound files that are cut elsewhere than the videos,
and for data without media text_features, audio_features and frames (array files). Every other column is kept
in ``Row.extra``. Paths are relative to the manifest. Reading opens none of the files that a row names.
"""

import codecs
import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

from deepmsi.errors import UserError

Side = Literal["left", "right"]
"""The half of a picture that shows who speaks."""

MELD_LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
"""MELD's emotions in the order of their ids, 0 to 6."""

MELD_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
MELD_VIDEO_FOLDERS = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}
PATH_COLUMNS = ("video", "audio", "text_features", "audio_features", "frames")
NAME_COLUMNS = ("label", "speaker", "dialogue", "split")
_TIME_COLUMNS = ("start", "end", "audio_start", "audio_end")
DEV_NAMES = ("dev", "val", "valid", "validation")
COLUMNS = ("id", *PATH_COLUMNS, "text", *NAME_COLUMNS, "start", "end", "side", "audio_start", "audio_end")
"""Every column that has a meaning; a row needs an id and at least one modality."""

_SEPARATORS = ",;\t"
_DECIMAL_COMMA = re.compile(r"^(\d*),(\d+)$")
# A line of Excel's above the header.
_EXCEL_SEPARATOR = re.compile(r'\s*"?sep=([^"\r\n])"?[ \t]*\r?\n', re.IGNORECASE)
_CSV_ERRORS = {
    "field limit": f"a cell is longer than {csv.field_size_limit():,} characters; is its closing quote missing?",
    "unexpected end": "a quote is opened and never closed",
    "expected after": "a quoted cell goes on behind its closing quote; write a quote inside of it twice",
}
# MELD went through cp1252 once: its UTF-8 copies hold C1 controls where cp1252 has quotes and dashes.
_C1_TO_CP1252 = {c: bytes([c]).decode("cp1252") for c in range(0x80, 0xA0) if c not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}


@dataclass(frozen=True)
class Row:
    """One utterance. An absent modality is None; ``start`` and ``end`` are seconds from the file's beginning.

    ``start`` and ``end`` cut the video and the audio alike, whether the sound comes from the video or from
    a file of its own; ``audio_start`` and ``audio_end`` cut a sound file of its own in their place where one of
    them is given (``audio_start`` 0 alone takes the whole file). ``text_features``, ``audio_features`` and
    ``frames`` name array files (.npy, .safetensors).
    """

    id: str
    video: Path | None = None
    audio: Path | None = None
    text: str | None = None
    label: str | None = None
    speaker: str | None = None
    dialogue: str | None = None
    split: str | None = None
    start: float | None = None
    end: float | None = None
    side: Side | None = None
    extra: dict[str, str] = field(default_factory=dict)
    text_features: Path | None = None
    audio_features: Path | None = None
    frames: Path | None = None
    audio_start: float | None = None
    audio_end: float | None = None

    def cut(self, column: str) -> tuple[float | None, float | None]:
        """Return the start and the end, in seconds, at which the file in a column is cut."""
        own = (self.audio_start, self.audio_end)
        return own if column == "audio" and own != (None, None) else (self.start, self.end)


@dataclass(frozen=True)
class Problem:
    """One finding about a manifest: ``where`` is ``file:line``, ``sentence`` says what and what to do."""

    severity: Literal["error", "warning"]
    where: str
    sentence: str
    id: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The rows of a manifest in their order; ``origins[i]`` is the ``file:line`` of ``rows[i]``."""

    path: Path
    rows: tuple[Row, ...]
    origins: tuple[str, ...]
    columns: tuple[str, ...]
    kind: Literal["table", "meld", "released"] = "table"


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read a manifest: a CSV, JSONL or JSON file, MELD's CSV, or a folder of MELD's CSVs or of released pickles.

    A CSV with MELD's own columns becomes rows ``{split}_dia{D}_utt{U}`` with the split from the file's name;
    of a single file its siblings are not read. Where a JSON file holds an array its items count as lines.

    Args:
        path: the file or folder.

    Returns:
        The manifest, every row checked: unique ids, numbers that are numbers, at least one modality.

    Raises:
        UserError: at the first thing that is wrong, with file and line, and how many more there are.
    """
    manifest, problems = scan_manifest(path)
    if problems:
        first = problems[0]
        more = len(problems) - 1
        tail = f" (and {more} more: see deepmsi check)" if more else ""
        raise UserError(f"{first.where}: {first.sentence}{tail}")
    return manifest


def scan_manifest(path: str | os.PathLike[str]) -> tuple[Manifest, list[Problem]]:
    """Read what can be read and list what cannot, row by row.

    Raises:
        UserError: where nothing can be read at all.
    """
    path = Path(path)
    if path.is_dir():
        return _scan_folder(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such manifest; give a CSV, JSONL or JSON file")
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        records, columns, problems = _read_json(path)
    else:
        records, columns, problems = _read_csv(path)
    if not records and not problems:
        raise UserError(f"{path}: the manifest has no rows")
    if set(MELD_COLUMNS) <= set(columns):
        parse: Callable[[dict[str, str]], Row] = _MeldParser(path)
        kind: Literal["table", "meld"] = "meld"
    else:
        if "id" not in columns and records:
            near = next((c for c in columns if c.strip().lower() in ("id", "ids", "name", "clip")), None)
            hint = f"; rename the column {near!r}" if near else ""
            raise UserError(f"{path}: the manifest has no column 'id' (its columns: {', '.join(columns)}){hint}")
        parse, kind = partial(_table_row, path.parent), "table"
    rows: list[Row] = []
    origins: list[str] = []
    for line, record in records:
        where = f"{path}:{line}"
        try:
            rows.append(parse(record))
            origins.append(where)
        except UserError as error:
            problems.append(Problem("error", where, str(error), record.get("id")))
    problems += duplicate_ids(rows, origins)
    problems.sort(key=lambda p: int(p.where.rpartition(":")[2]))
    return Manifest(path, tuple(rows), tuple(origins), tuple(columns), kind), problems


def duplicate_ids(rows: Sequence[Row], origins: Sequence[str]) -> list[Problem]:
    """Name every row whose id an earlier row has."""
    first: dict[str, str] = {}
    problems = []
    for row, where in zip(rows, origins, strict=True):
        if row.id in first:
            sentence = f"the id {row.id!r} is already taken at {first[row.id]}; make ids unique"
            problems.append(Problem("error", where, sentence, row.id))
        else:
            first[row.id] = where
    return problems


def part_of(split: str | None) -> str | None:
    """Which part a split's name means, in any case: "train", "dev" or "test"; None where it is none of them."""
    name = (split or "").strip().lower()
    return "dev" if name in DEV_NAMES else name if name in ("train", "test") else None


def part_or_name(split: str | None) -> str | None:
    """The part that a split's name means, or the name itself where it means none."""
    return part_of(split) or split


def count_labels(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Count rows per split and label: ``{split or "": {label or "": rows}}``, keys sorted."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.split or "", Counter())[row.label or ""] += 1
    return {split: dict(sorted(counts[split].items())) for split in sorted(counts)}


def _scan_folder(folder: Path) -> tuple[Manifest, list[Problem]]:
    found = {p.name: p for p in folder.glob("*_sent_emo.csv") if not p.name.startswith("._")}
    ordered = [found.pop(f"{s}_sent_emo.csv") for s in MELD_VIDEO_FOLDERS if f"{s}_sent_emo.csv" in found]
    files = ordered + [found[name] for name in sorted(found)]
    if files:
        parts = [scan_manifest(f) for f in files]
        rows = tuple(row for part, _ in parts for row in part.rows)
        origins = tuple(origin for part, _ in parts for origin in part.origins)
        problems = [problem for _, listed in parts for problem in listed]
        seen = {(p.where, p.id) for p in problems}
        problems += [p for p in duplicate_ids(rows, origins) if (p.where, p.id) not in seen]
        return Manifest(folder, rows, origins, parts[0][0].columns, parts[0][0].kind), problems
    from deepmsi.data import released

    if released.is_released(folder):
        return released.scan_released(folder)
    for name in ("manifest.csv", "manifest.jsonl", "manifest.json"):
        if (folder / name).is_file():
            return scan_manifest(folder / name)
    raise UserError(
        f"{folder}: the folder holds no manifest.csv, no *_sent_emo.csv of MELD and no released pickles; "
        "name a CSV, JSONL or JSON file"
    )


def decode_text(path: Path) -> str:
    """Read a table in whatever encoding spreadsheets write.

    Raises:
        UserError: it cannot be read, is empty, or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the manifest cannot be read ({error.strerror})") from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in data and not wide:
        raise UserError(f"{path}: this is a binary file, not a CSV, JSONL or JSON manifest")
    for encoding in ("utf-16",) if wide else ("utf-8-sig", "cp1252"):
        with suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            break
    else:
        raise UserError(f"{path}: the manifest is neither UTF-8 nor cp1252; save it as UTF-8")
    if not text.strip():
        raise UserError(f"{path}: the manifest is empty")
    return text


_Records = list[tuple[int, dict[str, str]]]


def _read_csv(path: Path) -> tuple[_Records, list[str], list[Problem]]:
    text = decode_text(path)
    told = _EXCEL_SEPARATOR.match(text)
    text, above = (text[told.end() :], told[0].count("\n")) if told else (text, 0)
    delimiter = told[1] if told else max(_SEPARATORS, key=text.lstrip().splitlines()[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: _Records = []
    problems: list[Problem] = []
    header: list[str] = []
    line = above + 1
    try:
        for cells in reader:
            at, line = line, above + reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _clean_header(path, cells)
            elif len(cells) != len(header):
                sentence = f"the line has {len(cells)} cells and the header has {len(header)}; quote commas"
                problems.append(Problem("error", f"{path}:{at}", sentence))
            else:
                record = dict(zip(header, (cell.strip() for cell in cells), strict=True))
                if delimiter == ";":  # as spreadsheets write where numbers have a decimal comma
                    for name in record.keys() & _TIME_COLUMNS:
                        record[name] = _DECIMAL_COMMA.sub(r"\1.\2", record[name])
                records.append((at, record))
    except csv.Error as error:
        said = next((ours for theirs, ours in _CSV_ERRORS.items() if theirs in str(error)), str(error))
        raise UserError(f"{path}:{line}: the line cannot be read as CSV: {said}") from error
    return records, header, problems


def _column_names(cells: Sequence[str]) -> list[str]:
    """The columns' names, which are taken in any case; MELD's own spelling stays as it is."""
    known = {name.lower(): name for name in COLUMNS}
    stripped = [cell.strip() for cell in cells]
    meld = set(MELD_COLUMNS) <= set(stripped)
    names = stripped if meld else [known.get(cell.lower(), cell) for cell in stripped]
    return [name or f"column {i + 1}" for i, name in enumerate(names)]


def _clean_header(path: Path, cells: Sequence[str]) -> list[str]:
    header = _column_names(cells)
    twice = [name for name, n in Counter(header).items() if n > 1]
    if twice:
        raise UserError(f"{path}:1: the column {twice[0]!r} stands in the header twice")
    return header


def _read_json(path: Path) -> tuple[_Records, list[str], list[Problem]]:
    """Read an object on each line, or the array of objects that a file named .json may hold."""
    text = decode_text(path)
    read: Callable[[Any], dict[str, str]]
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        items, read = _json_items(path, text), _json_record
    else:
        items, read = [(line, raw) for line, raw in enumerate(text.split("\n"), start=1) if raw.strip()], _json_line
    records: _Records = []
    problems: list[Problem] = []
    columns: dict[str, None] = {}
    for line, item in items:
        try:
            record = read(item)
        except UserError as error:
            problems.append(Problem("error", f"{path}:{line}", str(error)))
        else:
            columns.update(dict.fromkeys(record))
            records.append((line, record))
    names = dict(zip(columns, _column_names(list(columns)), strict=True))
    named: _Records = []
    for line, record in records:
        twice = [name for name, n in Counter(names[key] for key in record).items() if n > 1]
        if twice:
            problems.append(Problem("error", f"{path}:{line}", f"the row has the column {twice[0]!r} twice"))
        else:
            named.append((line, {names[key]: value for key, value in record.items()}))
    return named, list(dict.fromkeys(names.values())), problems


def _json_items(path: Path, text: str) -> list[tuple[int, Any]]:
    try:
        return list(enumerate(_json_value(text), start=1))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the array of rows cannot be read as JSON ({error})") from None


def _json_line(raw: str) -> dict[str, str]:
    try:
        value = _json_value(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not JSON ({error})") from None
    return _json_record(value)


def _json_value(text: str) -> Any:
    """Parse JSON; an object is a tuple of its pairs, of which a dictionary would keep the last with a name."""
    return json.loads(text, object_pairs_hook=tuple)


def _json_record(pairs: Any) -> dict[str, str]:
    if not isinstance(pairs, tuple):
        raise UserError("the row is not a JSON object of column and value")
    if twice := [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]:
        raise UserError(f"the row has the column {twice[0]!r} twice")
    value = dict(pairs)
    bad = next((k for k, v in value.items() if isinstance(v, tuple | list)), None)
    if bad is not None:
        what = "the label cannot be read" if bad.strip().lower() == "label" else f"the value of {bad!r} cannot be read"
        raise UserError(f"{what}: give text or a number, not a list or object")
    record = {k: _json_cell(v) for k, v in value.items()}
    for k, v in record.items():
        try:
            f"{k}{v}".encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(f"the value of {k!a} holds {half!a}, one half of a character; give both or none") from None
    return record


def _json_cell(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):  # how tables write what is missing
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _table_row(folder: Path, record: dict[str, str]) -> Row:
    cells = {name: value for name, value in record.items() if value}
    row = Row(
        id=check_id(cells.get("id", "")),
        start=_seconds(cells, "start"),
        end=_seconds(cells, "end"),
        side=_side(cells),
        audio_start=_seconds(cells, "audio_start"),
        audio_end=_seconds(cells, "audio_end"),
        extra={name: value for name, value in record.items() if name not in COLUMNS},
        **{name: folder / cells[name] for name in PATH_COLUMNS if name in cells},  # type: ignore[arg-type]
        text=cells.get("text"),
        # Names are compared, and look the same in both forms of an accent.
        **{name: normalize("NFC", cells[name]) for name in NAME_COLUMNS if name in cells},  # type: ignore[arg-type]
    )
    if row.label is not None and not row.label.isprintable():
        raise UserError(f"the label {row.label!r} cannot be read: it holds control characters")
    for name in PATH_COLUMNS:
        if "\0" in cells.get(name, "") or "\n" in cells.get(name, ""):
            raise UserError(f"the path in {name!r} holds a line break or a null character")
    for start, end in (row.cut("video"), row.cut("audio")):
        if start is not None and end is not None and end <= start:
            raise UserError(f"the end {end:g} s does not lie after the start {start:g} s")
    if not any((row.video, row.audio, row.text, row.text_features, row.audio_features, row.frames)):
        raise UserError(f"the row {row.id!r} has no video, no audio and no text; fill one or drop the row")
    return row


class _MeldParser:
    """Makes rows of one of MELD's tables, with the clips that lie beside it."""

    def __init__(self, path: Path) -> None:
        name = re.match(r"(train|dev|test)_", path.name)
        self.split = name.group(1) if name else None
        self.clips = _meld_clips(path.parent, self.split) if self.split else None

    def __call__(self, record: dict[str, str]) -> Row:
        record = dict.fromkeys(MELD_COLUMNS, "") | record  # a line of JSON may leave some out
        numbers = []
        for column in ("Dialogue_ID", "Utterance_ID"):
            if not record[column].isdecimal():
                raise UserError(f"{column} is {record[column]!r}, not a whole number")
            numbers.append(int(record[column]))
        dialogue, utterance = numbers
        label = record["Emotion"].lower()
        if label not in MELD_LABELS:
            raise UserError(f"the emotion {record['Emotion']!r} is none of MELD's: {', '.join(MELD_LABELS)}")
        prefix = f"{self.split}_" if self.split else ""
        name = f"dia{dialogue}_utt{utterance}"
        return Row(
            id=prefix + name,
            video=self.clips.get(name, self.clips[""] / f"{name}.mp4") if self.clips else None,
            text=record["Utterance"].translate(_C1_TO_CP1252) or None,
            label=label,
            speaker=record["Speaker"].translate(_C1_TO_CP1252) or None,
            dialogue=f"{prefix}dia{dialogue}",
            split=self.split,
            extra={key: value for key, value in record.items() if key not in MELD_COLUMNS},
        )


def _meld_clips(folder: Path, split: str) -> dict[str, Path] | None:
    """Clips of one split by name, at any nesting below its folder; the key "" holds the folder itself."""
    roots = [p for p in sorted(folder.rglob(MELD_VIDEO_FOLDERS[split])) if p.is_dir()]
    if not roots:
        return None
    clips = {"": roots[0]}
    for root in roots:
        for clip in sorted(root.rglob("dia*_utt*.mp4")):
            if not clip.name.startswith("._"):
                clips.setdefault(clip.stem, clip)
    return clips


def check_id(value: str) -> str:
    """Return the id, or raise UserError where it could not name a file on its own."""
    if not value:
        raise UserError("the id is empty; every row needs one")
    if any(c in value for c in "/\\") or value in (".", ".."):
        raise UserError(f"the id {value!r} holds a path separator; ids name files, so use other characters")
    if not value.isprintable():
        raise UserError(f"the id {value!r} holds control characters")
    return value


def _seconds(cells: dict[str, str], name: str) -> float | None:
    if name not in cells:
        return None
    try:
        value = float(cells[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{name} is {cells[name]!r}; give seconds from the file's beginning, such as 12.5")
    return value


def _side(cells: dict[str, str]) -> Side | None:
    match cells.get("side", "").lower():
        case "":
            return None
        case "left":
            return "left"
        case "right":
            return "right"
        case _:
            raise UserError(f"side is {cells['side']!r}; it must be left, right or empty")
