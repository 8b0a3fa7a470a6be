"""What the loaders of published releases share: finding files, mending text, the manifest, the counts.

`prepare_release` is the way from a raw release to prepared data: the release's loader (`meld`, `iemocap`) makes
rows, the rows become `OUT/manifest.csv`, and the plain prepare does the rest.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepmsi.data.files import write_text
from deepmsi.data.manifest import Row
from deepmsi.errors import UserError

if TYPE_CHECKING:
    from deepmsi.data.options import PrepareOptions
    from deepmsi.data.store import PreparedData

RELEASES = ("meld", "iemocap")
MARK = "release"  # the extra column that says which published counts a manifest is held against

_FIELDS = (
    *("id", "video", "audio", "text", "label", "speaker", "dialogue", "split"),
    *("start", "end", "side", "audio_start", "audio_end"),
)
_SHOWN = 3


@dataclass(frozen=True)
class Release:
    """Rows of a published release.

    Attributes:
        name: "meld", or "iemocap:" and the label set.
        rows: one per labelled utterance, in the release's order.
        notes: one sentence for each thing that a reader of the manifest should know.
    """

    name: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def differences(self) -> list[str]:
        """Where the counts differ from the published ones, a sentence each; empty when they agree."""
        return count_differences(self.rows)


def prepare_release(
    name: str,
    raw: Path,
    out: Path,
    options: PrepareOptions | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    note: Callable[[str], None] = lambda sentence: None,
    **settings: Any,
) -> PreparedData:
    """Read a raw release, write `out/manifest.csv` from it, and prepare that.

    Args:
        name: one of `RELEASES`.
        raw: the folder of the release, at any nesting.
        out: where the manifest and the prepared data go.
        options, workers, progress: as for `deepmsi.data.prepare.prepare`.
        note: takes each of the release's notes and differences, before the long work starts.
        settings: keyword arguments of `read_meld` or `read_iemocap`.

    Raises:
        UserError: the folder is not this release, or is incomplete.
    """
    from deepmsi.data.prepare import prepare

    release = read_release(name, raw, **settings)
    if not release.rows:
        raise UserError(f"{raw} holds no utterance whose label is one of the set: it is not this release, or a sample.")
    for sentence in (*release.notes, *release.differences):
        note(sentence)
    manifest = write_manifest(release.rows, Path(out) / "manifest.csv")
    if not any(row.video or row.audio or row.text for row in release.rows):
        raise UserError(
            f"{raw} holds labels alone ({len(release.rows)} are in {manifest}), with no clip, sound or transcript"
            " to prepare: give the whole release."
        )
    if name == "iemocap" and any(row.video for row in release.rows):
        from deepmsi.data.iemocap import write_contact_sheets

        write_contact_sheets(release.rows, Path(out) / "contact_sheets")
    return prepare(manifest, Path(out), options, workers=workers, progress=progress)


def read_release(name: str, raw: Path, **settings: Any) -> Release:
    """Rows of the release `name` (one of `RELEASES`) under `raw`."""
    from deepmsi.data.iemocap import read_iemocap
    from deepmsi.data.meld import read_meld

    readers = {"meld": read_meld, "iemocap": read_iemocap}
    if name not in readers:
        raise UserError(f"no loader for a release named {name!r}: there are {' and '.join(RELEASES)}.")
    return readers[name](Path(raw), **settings)  # type: ignore[operator]


def count_differences(rows: Sequence[Row]) -> list[str]:
    """Hold the counts of a release's rows against the published ones.

    Args:
        rows: of a manifest that a loader wrote, where the column `release` says what to hold them against, or of
            MELD's own tables.

    Returns:
        One sentence for each count that differs; empty for rows of no known release.
    """
    from deepmsi.data import iemocap, meld

    names = {row.extra.get(MARK, "") for row in rows}
    if names == {meld.NAME} or (names == {""} and all(meld.is_key(row.id) for row in rows)):
        return meld.count_differences(rows)
    if len(names) == 1 and (name := names.pop()).startswith(f"{iemocap.NAME}:"):
        return iemocap.count_differences(rows, name.partition(":")[2])
    return []


def compare_counts(where: str, found: Mapping[str, int], published: Mapping[str, int]) -> list[str]:
    """One sentence if any count differs from the published one, naming each that does."""
    differing = [
        f"{key} {found.get(key, 0)} instead of {count}"
        for key, count in published.items()
        if found.get(key, 0) != count
    ]
    return [f"{where} differs from the published counts: {', '.join(differing)}."] if differing else []


def write_manifest(rows: Sequence[Row], path: Path) -> Path:
    """Write rows as a CSV manifest, media paths relative to it; replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = path.parent.resolve()
    extras = list(dict.fromkeys(key for row in rows for key in row.extra))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*_FIELDS, *extras], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(getattr(row, name), base) for name in _FIELDS} | dict(row.extra))
    write_text(path, text.getvalue())
    return path


def _cell(value: str | float | Path | None, base: Path) -> str:
    if value is None:
        return ""
    if isinstance(value, Path):
        return Path(os.path.relpath(value.resolve(), base)).as_posix()
    return format(value, ".10g") if isinstance(value, float) else value


def walk(raw: Path, skip: re.Pattern[str] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Folders under `raw` with their files' names, both in sorted order.

    Leaves out what archives made on a Mac carry along (`._*`, `__MACOSX`), other hidden names, and folders
    whose name `skip` matches entirely. Links to folders are followed, each real folder once.

    Raises:
        UserError: `raw` is not a folder.
    """
    if not raw.is_dir():
        what = "is a file: unpack it and give the folder" if raw.exists() else "does not exist"
        raise UserError(f"{raw} {what}.")
    seen = set()
    for folder, folders, names in os.walk(raw, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name for name in folders if not name.startswith((".", "__MACOSX")) and not (skip and skip.fullmatch(name))
        )
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def archives(raw: Path) -> list[Path]:
    """Archives under `raw` that may be the unpacked part that is missed."""
    ending = re.compile(r".*\.(tar|tar\.gz|tgz|tar\.xz|zip)(\.part|\.\d+)?", re.IGNORECASE)
    return [folder / name for folder, names in walk(raw) for name in names if ending.fullmatch(name)]


def mend(text: str) -> str:
    """Undo a second encoding: UTF-8 that was read as Windows' code page and saved as UTF-8 again."""
    return re.sub("[^\x00-\x7f]{2,}", _mend_run, text)


def _mend_run(run: re.Match[str]) -> str:
    try:
        return run[0].encode("cp1252").decode("utf-8")
    except UnicodeError:
        return run[0]


def some(names: Sequence[object]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
