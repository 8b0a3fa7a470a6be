"""``deepmsi check``: look through a manifest and its files before hours are spent on them."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from deepmsi.data import arrays, released
from deepmsi.data.decode import try_decoding
from deepmsi.data.manifest import (
    COLUMNS,
    PATH_COLUMNS,
    Manifest,
    Problem,
    Row,
    count_labels,
    part_of,
    part_or_name,
    scan_manifest,
)
from deepmsi.data.media import MediaInfo, probe
from deepmsi.data.pool import usable_cpus
from deepmsi.data.release import count_differences, read_release
from deepmsi.data.released import FILES
from deepmsi.errors import UserError
from deepmsi.progress import progress_bar

SHORTEST, LONGEST = 0.2, 60.0
"""Seconds outside of which an utterance is pointed out."""

_FEWEST_WORDS = 6  # "What are you doing here?" is said again without being a copy


@dataclass(frozen=True)
class CheckReport:
    """What a manifest holds and what is wrong with it.

    Attributes:
        path: the manifest.
        rows: how many rows could be read.
        problems: what keeps a row, or one of its modalities, from being used.
        warnings: what is usable and looks like a mistake.
        counts: rows per split and label; "" stands for none.
        modalities: rows that name a video, a sound (their own file's or the video's), a text.
    """

    path: Path
    rows: int
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    counts: dict[str, dict[str, int]]
    modalities: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "path": str(self.path),
            "rows": self.rows,
            "problems": [asdict(problem) for problem in self.problems],
            "warnings": [asdict(problem) for problem in self.warnings],
            "counts": self.counts,
            "modalities": self.modalities,
        }

    def render(self, shown: int | None = None) -> str:
        """Return the report as text: counts, then findings, each on a line; of each kind the first, where many are.

        Args:
            shown: problems to list, and warnings; None lists all.
        """
        held = ", ".join(f"{count} with {name}" for name, count in self.modalities.items())
        lines = [f"{self.path}: {self.rows} rows ({held})", "", *_table(self.counts)]
        for title, found in (("problem", self.problems), ("warning", self.warnings)):
            if found:
                lines += ["", f"{len(found)} {title}{'s' if len(found) > 1 else ''}:"]
                lines += [f"  {problem.where}: {problem.sentence}" for problem in found[:shown]]
                if shown is not None and len(found) > shown:
                    lines.append(f"  and {len(found) - shown} more: --json lists all")
        if not self.problems and not self.warnings:
            lines += ["", "nothing wrong was found"]
        return "\n".join(lines)


def check(manifest_path: str | os.PathLike[str], workers: int | None = None, progress: bool = True) -> CheckReport:
    """Look through a manifest: its rows, its files, its labels.

    Of each media file the headers are read and the first frame is decoded; array files are read whole.

    Args:
        manifest_path: what ``read_manifest`` takes.
        workers: threads; None is one per usable core.
        progress: show on standard error how far it is.

    Raises:
        UserError: the manifest cannot be read at all.
    """
    manifest, findings = scan_manifest(manifest_path)
    findings = list(findings)
    files = _files(manifest.rows)
    with ThreadPoolExecutor(workers or usable_cpus()) as pool:
        found = pool.map(lambda file: _look(file[0], file[1], manifest.kind), files)
        bar = progress_bar(found, total=len(files), description="checking", unit="file", shown=progress)
        looked = dict(zip(files, bar, strict=True))
    for row, where in zip(manifest.rows, manifest.origins, strict=True):
        findings += [replace(found, where=where, id=row.id) for found in _row_findings(row, looked)]
    findings += _length_findings(manifest, looked)
    findings += _duplicates(manifest)
    findings += _repeated_texts(manifest)
    findings += _column_findings(manifest)
    findings += _label_findings(manifest)
    for sentence in count_differences(manifest.rows):
        findings.append(Problem("warning", str(manifest.path), sentence))
    problems, warnings = [tuple(f for f in findings if f.severity == s) for s in ("error", "warning")]
    return CheckReport(
        path=Path(manifest_path),
        rows=len(manifest.rows),
        problems=problems,
        warnings=warnings,
        counts=count_labels(manifest.rows),
        modalities={
            "video": sum(row.video is not None or row.frames is not None for row in manifest.rows),
            "sound": sum(_has_sound(row, looked) for row in manifest.rows),
            "text": sum(row.text is not None or row.text_features is not None for row in manifest.rows),
        },
    )


def check_release(name: str, raw: str | os.PathLike[str], **settings: Any) -> CheckReport:
    """Hold a raw release's labels and files against the published counts, without decoding anything.

    Args:
        name: one of ``deepmsi.data.release.RELEASES``.
        raw: the folder of the release, at any nesting; parts of it may be missing, and are told.
        settings: keyword arguments of its reader, such as ``label_set``.

    Returns:
        The report: counts that differ are problems, the reader's notes are warnings.

    Raises:
        UserError: the folder holds no such release.
    """
    release = read_release(name, Path(raw), **{"partial": True, **settings})
    where = str(raw)
    return CheckReport(
        path=Path(raw),
        rows=len(release.rows),
        problems=tuple(Problem("error", where, sentence) for sentence in release.differences),
        warnings=tuple(Problem("warning", where, sentence) for sentence in release.notes),
        counts=count_labels(release.rows),
        modalities={
            "video": sum(row.video is not None for row in release.rows),
            "sound": sum(row.audio is not None or (name == "meld" and row.video is not None) for row in release.rows),
            "text": sum(row.text is not None for row in release.rows),
        },
    )


@dataclass(frozen=True)
class _Look:
    """What a file gave: its headers or the length of its feature, or the sentence why it gave nothing."""

    info: MediaInfo | None = None
    length: int | None = None
    error: str | None = None


_File = tuple[str, Path]  # the column that names it, and where it is


def _files(rows: Iterable[Row]) -> list[_File]:
    found: dict[_File, None] = {}
    for row in rows:
        for column in ("video", "audio", *FILES):
            path = getattr(row, column)
            if path is not None:
                found[column, path] = None
    return list(found)


def _look(column: str, path: Path, kind: str) -> _Look:
    try:
        if column in FILES:
            load = released.read_released(path, column) if kind == "released" else arrays.load_array(path)
            if column == "frames":
                arrays.as_pictures(load, path)
                return _Look()
            return _Look(length=len(arrays.as_feature(load, path)))
        info = probe(path)
        try_decoding(path, "audio" if column == "audio" else "video")
        if column == "video" and info.has_audio:
            try_decoding(path, "audio")
        return _Look(info=info)
    except UserError as error:
        return _Look(error=str(error))


def _has_sound(row: Row, looked: dict[_File, _Look]) -> bool:
    if row.audio is not None or row.audio_features is not None:
        return True
    info = looked["video", row.video].info if row.video is not None else None
    return info is not None and info.has_audio


def _row_findings(row: Row, looked: dict[_File, _Look]) -> Iterable[Problem]:
    for column in ("video", "audio", *FILES):
        path = getattr(row, column)
        if path is None:
            continue
        look = looked[column, path]
        if look.error is not None:
            yield Problem("error", "", f"{row.id}: {look.error}")
        elif look.info is not None and look.info.duration is not None:
            yield from _duration_findings(row, column, look.info.duration)


def _duration_findings(row: Row, column: str, duration: float) -> Iterable[Problem]:
    first, last = row.cut(column)
    start, end = first or 0.0, duration if last is None else last
    if start >= duration:
        sentence = f"the start {start:g} s lies behind the end of its {column} ({duration:.2f} s)"
        yield Problem("error", "", f"{row.id}: {sentence}")
        return
    if end > duration + SHORTEST:
        sentence = f"the end {end:g} s lies behind the end of its {column} ({duration:.2f} s)"
        yield Problem("warning", "", f"{row.id}: {sentence}")
    length = min(end, duration) - start
    if length < SHORTEST:
        yield Problem("warning", "", f"{row.id}: its {column} lasts {length:.2f} s, less than {SHORTEST:g} s")
    elif length > LONGEST:
        yield Problem("warning", "", f"{row.id}: its {column} lasts {length:.0f} s, more than {LONGEST:g} s")


def _length_findings(manifest: Manifest, looked: dict[_File, _Look]) -> Iterable[Problem]:
    for column in ("text_features", "audio_features"):
        paths = [getattr(row, column) for row in manifest.rows]
        lengths = [looked[column, path].length if path is not None else None for path in paths]
        found = [length for length in lengths if length is not None]
        expected = arrays.commonest_length(found) if found else None
        for row, where, length in zip(manifest.rows, manifest.origins, lengths, strict=True):
            if length not in (None, expected):
                sentence = f"{row.id}: its {column} have {length} numbers and most rows' have {expected}"
                yield Problem("error", where, sentence, row.id)


def _duplicates(manifest: Manifest) -> Iterable[Problem]:
    """Point out rows that use the same content: the same bytes, cut alike."""
    by_size: dict[int, set[Path]] = defaultdict(set)
    for column, path in _files(manifest.rows):
        if column in ("video", "audio") and path.is_file():
            by_size[path.stat().st_size].add(path)
    content = {path: str(path) for paths in by_size.values() for path in paths}
    for size, paths in by_size.items():
        if size and len(paths) > 1:
            content.update({path: _digest(path) for path in paths})
    first: dict[Any, tuple[Row, str]] = {}
    for row, where in zip(manifest.rows, manifest.origins, strict=True):
        files = tuple(content.get(path, "") if path else None for path in (row.video, row.audio))
        if not any(files):
            continue
        seen = first.setdefault((files, row.cut("video"), row.cut("audio"), row.side), (row, where))
        if seen[0] is row:
            continue
        sentence = f"{row.id}: its clip has the same content as {seen[0].id} at {seen[1]}"
        if row.split != seen[0].split:
            sentence += f", which is in another split ({seen[0].split or 'none'} and {row.split or 'none'})"
        yield Problem("warning", where, sentence, row.id)


def _repeated_texts(manifest: Manifest) -> Iterable[Problem]:
    """Point out texts that stand alone in one split and, with the same label, in another; short ones are everyday."""
    first: dict[tuple[str, str | None], tuple[Row, str]] = {}
    repeated: list[tuple[Row, str]] = []
    for row, where in zip(manifest.rows, manifest.origins, strict=True):
        alone = not any(getattr(row, column) for column in PATH_COLUMNS)
        if row.text is not None and row.split is not None and alone and len(row.text.split()) >= _FEWEST_WORDS:
            seen, _ = first.setdefault((row.text, row.label), (row, where))
            if part_or_name(row.split) != part_or_name(seen.split):
                repeated.append((row, where))
    if repeated:
        row, where = repeated[0]
        seen, place = first[row.text or "", row.label]
        rows = f"{len(repeated)} rows of text alone have" if len(repeated) > 1 else "1 row of text alone has"
        sentence = f"{rows} the text and the label of a row in another split (the first: {row.id} at {where}, as "
        yield Problem("warning", str(manifest.path), f"{sentence}{seen.id} at {place})")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return str(path)


def _column_findings(manifest: Manifest) -> Iterable[Problem]:
    """Point out columns that nothing reads and whose name is like that of one that is read and not there."""
    absent = [name for name in COLUMNS if name not in manifest.columns]
    for column in manifest.columns if manifest.kind == "table" else ():
        if column not in COLUMNS:
            names = (column.lower(), column.lower().partition("_")[0])
            near = [match for name in names for match in get_close_matches(name, absent, n=1, cutoff=0.7)]
            if near:
                sentence = f"nothing reads the column {column!r}; did you mean {near[0]!r}?"
                yield Problem("warning", str(manifest.path), sentence)


def _label_findings(manifest: Manifest) -> Iterable[Problem]:
    where = str(manifest.path)
    labels = Counter(row.label for row in manifest.rows if row.label is not None)
    unlabelled = sum(row.label is None for row in manifest.rows)
    if not labels and manifest.rows:
        yield Problem("warning", where, "no row has a label, so nothing can be trained or evaluated on it")
    elif unlabelled:
        rows = f"{unlabelled} row{'s have' if unlabelled > 1 else ' has'}"
        yield Problem("warning", where, f"{rows} no label and will be left out of training")
    if len(labels) == 1:
        yield Problem("warning", where, f"every label is {min(labels)!r}, and a classifier needs two or more")
    spelled: dict[str, str] = {}
    for label in sorted(labels):
        if labels[label] == 1:
            yield Problem("warning", where, f"the label {label!r} has one row, too few to split or to learn")
        other = spelled.setdefault(" ".join(label.casefold().split()), label)
        if other != label:
            yield Problem("warning", where, f"the labels {other!r} and {label!r} differ in spelling alone")
    labelled = [row for row in manifest.rows if row.label is not None]
    if any(row.split for row in labelled):
        astray = [row for row in labelled if part_of(row.split) is None]
        if astray:
            names = ", ".join(sorted({repr(row.split) if row.split else "none" for row in astray})[:3])
            rows = f"{len(astray)} row{'s have' if len(astray) > 1 else ' has'}"
            sentence = f"{rows} a split other than train, dev and test, which training on the split refuses: {names}"
            yield Problem("warning", where, sentence)
    splits: dict[str, set[str | None]] = defaultdict(set)
    for row in manifest.rows:
        if row.dialogue is not None and row.split is not None:
            splits[row.dialogue].add(part_or_name(row.split))
    shared = sorted(dialogue for dialogue, names in splits.items() if len(names) > 1)
    if shared:
        names = ", ".join(shared[:3]) + (" and more" if len(shared) > 3 else "")
        sentence = f"{len(shared)} dialogue(s) stand in more than one split: {names}"
        yield Problem("warning", where, sentence)


def _table(counts: dict[str, dict[str, int]]) -> Sequence[str]:
    """A line per label, a column per split."""
    splits = list(counts)
    labels = sorted({label for column in counts.values() for label in column})
    body = [[label or "(no label)", *(str(counts[s].get(label, 0)) for s in splits)] for label in labels]
    head = ["label", *(split or "rows" for split in splits)]
    foot = ["total", *(str(sum(counts[s].values())) for s in splits)]
    table = [head, *body, foot]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]
