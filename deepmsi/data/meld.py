"""MELD from its raw release: the three CSV files, and the clips wherever the archives were unpacked.

The key of an utterance is (split, dialogue, utterance): clip names repeat between splits. Clips known to be
bad are listed, with reasons, in `meld_exclusions.csv` beside this file; their rows keep the text.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from deepmsi.data.manifest import MELD_COLUMNS, MELD_LABELS, MELD_VIDEO_FOLDERS, Row, decode_text, read_manifest
from deepmsi.data.release import MARK, Release, archives, compare_counts, mend, some, walk
from deepmsi.errors import UserError

NAME = "meld"
SPLITS = tuple(MELD_VIDEO_FOLDERS)
COUNTS = {
    "train": dict(zip(MELD_LABELS, (4710, 1205, 268, 683, 1743, 271, 1109), strict=True)),
    "dev": dict(zip(MELD_LABELS, (470, 150, 40, 111, 163, 22, 153), strict=True)),
    "test": dict(zip(MELD_LABELS, (1256, 281, 50, 208, 402, 68, 345), strict=True)),
}
"""Utterances of each split and label, as published."""

DIALOGUES = {"train": 1038, "dev": 114, "test": 280}
"""Dialogues of each split, as published."""

EXCLUSIONS = Path(__file__).with_name("meld_exclusions.csv")

Key = tuple[str, int, int]

_CSV = re.compile(r"(train|dev|val|valid|validation|test)_sent_emo\.csv", re.IGNORECASE)
_CLIP = re.compile(r"(final_videos_test)?dia(\d+)_utt(\d+)\.mp4", re.IGNORECASE)
_SPLIT_WORDS = {"train": ("train",), "dev": ("dev", "val"), "test": ("test",)}
_ABSENT_SHARE = 0.05  # of a split's clips: more than this is an unfinished copy, not a gap in the release
_SAME_FOLDER = 0.8  # share of names in common from which a folder is taken to be a split's


def read_meld(raw: Path, *, exclusions: Path | None = None, partial: bool = False) -> Release:
    """Rows of a MELD release, with clips where it has them.

    Args:
        raw: the unpacked release, or any folder above or inside it that holds the `*_sent_emo.csv` files;
            transcripts without any clip give rows of text alone.
        exclusions: a CSV of further clips to leave out, with the columns split, dialogue, utterance, reason.
        partial: accept a release with splits or clips missing.

    Returns:
        Rows `{split}_dia{D}_utt{U}` in the order train, dev, test. The clip is the utterance already, so
        `start` and `end` are empty; its times in the episode are in the extra columns.

    Raises:
        UserError: no MELD CSV, a CSV that cannot be read or that contradicts its copy, a split without its
            clips, or too many clips absent.
    """
    csvs, clips = _find(raw)
    tables, notes = _read_tables(raw, csvs, partial)
    found = _assign(raw, clips, tables, notes)
    excluded = _read_exclusions(EXCLUSIONS) | (_read_exclusions(exclusions) if exclusions else {})
    with_media = bool(found)
    if not with_media and (packed := archives(raw)):
        raise UserError(f"{raw} holds no clip, but archives that are still packed: unpack {some(packed)} first.")
    if not with_media:
        notes.append("The release holds no clips: every row is text alone.")

    rows = []
    for split, table in tables.items():
        absent = []
        for key, row in table.items():
            clip, reason = found.get(key), excluded.get(key)
            if with_media and clip is None and reason is None:
                absent.append(f"dia{key[1]}_utt{key[2]}.mp4")
            extra = row.extra | ({"excluded": reason} if with_media and reason else {})
            rows.append(dataclasses.replace(row, video=None if reason else clip, extra=extra))
        if absent:
            notes.append(_absent(raw, split, absent, len(table), found.keys().isdisjoint(table), partial))
    if with_media:
        known = {key for table in tables.values() for key in table}
        if left_out := [f"{key[0]} dia{key[1]}_utt{key[2]}" for key in excluded if key in known]:
            notes.append(f"Clips left out by the exclusion list, their text kept: {', '.join(left_out)}.")
        if extras := len(found.keys() - known):
            notes.append(f"{extras} clips have no label and are ignored.")
    return Release(NAME, rows, notes)


def count_differences(rows: Sequence[Row]) -> list[str]:
    """Hold utterances per label and dialogues of each split that is there against the published counts."""
    sentences = []
    for split, published in COUNTS.items():
        part = [row for row in rows if row.split == split]
        if not part:
            continue
        labels = Counter(row.label for row in part if row.label)
        sentences += compare_counts(f"MELD {split}", labels, published)
        dialogues = {"dialogues": len({row.dialogue for row in part})}
        sentences += compare_counts(f"MELD {split}", dialogues, {"dialogues": DIALOGUES[split]})
    return sentences


def is_key(row_id: str) -> bool:
    """Whether an id is one of an utterance of MELD: split, dialogue, utterance."""
    return re.fullmatch(rf"({'|'.join(SPLITS)})_dia\d+_utt\d+", row_id) is not None


def _find(raw: Path) -> tuple[dict[str, list[Path]], dict[Path, dict[tuple[int, int], Path]]]:
    """CSV files by split, and clips by folder and (dialogue, utterance)."""
    csvs: dict[str, list[Path]] = {}
    clips: dict[Path, dict[tuple[int, int], Path]] = {}
    for folder, names in walk(raw):
        for name in names:
            if match := _CSV.fullmatch(name):
                csvs.setdefault(_split_of_word(match[1]) or "", []).append(folder / name)
            elif (match := _CLIP.fullmatch(name)) and (folder / name).stat().st_size:
                key = int(match[2]), int(match[3])
                # A few clips of the test part exist under both names; the plain one is the published one.
                if not (match[1] and key in clips.get(folder, {})):
                    clips.setdefault(folder, {})[key] = folder / name
    if not csvs:
        cure = f": unpack {some(packed)} first" if (packed := archives(raw)) else ""
        raise UserError(
            f"{raw} is no MELD release: there is no train_sent_emo.csv, dev_sent_emo.csv or test_sent_emo.csv"
            f" in it or below{cure}."
        )
    return csvs, clips


def _split_of_word(word: str) -> str | None:
    """The one split that a folder's or file's name speaks of."""
    named = [split for split, words in _SPLIT_WORDS.items() if any(w in word.lower() for w in words)]
    return named[0] if len(named) == 1 else None


def _read_tables(
    raw: Path, csvs: Mapping[str, Sequence[Path]], partial: bool
) -> tuple[dict[str, dict[Key, Row]], list[str]]:
    tables: dict[str, dict[Key, Row]] = {}
    notes = []
    for split in SPLITS:
        copies = [(path, _read_table(path, split)) for path in csvs.get(split, [])]
        if not copies:
            continue
        path, table = max(copies, key=lambda copy: len(copy[1]))
        for other, rows in copies:
            for key, row in rows.items():
                if key in table and row.label != table[key].label:
                    raise UserError(f"{other} and {path} give {row.id} different emotions: keep the one you trust.")
            if len(rows) < len(table):
                notes.append(f"{other} has {len(rows)} of the {len(table)} rows of {path}, which is taken.")
        tables[split] = table
    missing = [split for split in SPLITS if split not in tables]
    # The test labels are often kept apart; a training set is what nothing can be done without.
    if "train" in missing and not partial:
        raise UserError(
            f"{raw} holds {' and '.join(f'{s}_sent_emo.csv' for s in tables)} but no train_sent_emo.csv: "
            "complete the copy, or say that it is partial (--partial)."
        )
    if missing:
        notes.append(f"The release has no labels of {' and '.join(missing)}.")
    return tables, notes


def _read_table(path: Path, split: str) -> dict[Key, Row]:
    """Rows of one CSV by key; the file's name need not be the published one."""
    header = decode_text(path).lstrip().splitlines()[0]
    if lacking := [name for name in MELD_COLUMNS if name not in header]:
        raise UserError(f"{path}: a table of MELD needs the columns {', '.join(lacking)}, which this one lacks.")
    manifest = read_manifest(path)
    table = {}
    for row in manifest.rows:
        match = re.search(r"dia(\d+)_utt(\d+)$", row.id)
        assert match  # the manifest's own reader made the id
        dialogue, utterance = int(match[1]), int(match[2])
        table[split, dialogue, utterance] = dataclasses.replace(
            row,
            id=f"{split}_dia{dialogue}_utt{utterance}",
            video=None,
            text=mend(row.text) if row.text else None,
            speaker=mend(row.speaker) if row.speaker else None,
            dialogue=f"{split}_dia{dialogue}",
            split=split,
            extra=_extra(row.extra),
        )
    return table


def _extra(cells: Mapping[str, str]) -> dict[str, str]:
    """The columns worth keeping: sentiment, and the place in the series, in seconds of the episode."""
    kept = {name.lower(): cells[name] for name in ("Sentiment", "Season", "Episode") if name in cells}
    for name, column in (("episode_start", "StartTime"), ("episode_end", "EndTime")):
        match = re.fullmatch(r"(\d+):(\d+):(\d+)[,.](\d+)", cells.get(column, ""))
        if match:
            hours, minutes, seconds = (int(part) for part in match.groups()[:3])
            kept[name] = f"{3600 * hours + 60 * minutes + seconds + float(f'0.{match[4]}'):.3f}"
    return {MARK: NAME, **kept}


def _assign(
    raw: Path,
    clips: Mapping[Path, Mapping[tuple[int, int], Path]],
    tables: Mapping[str, Mapping[Key, Row]],
    notes: list[str],
) -> dict[Key, Path]:
    """Give every folder of clips its split: by its name, else its parents', else by the clips it holds."""
    wanted = {split: {key[1:] for key in table} for split, table in tables.items()}
    found: dict[Key, Path] = {}
    # The folder with most clips first, so that samples and copies only fill gaps.
    for folder in sorted(clips, key=lambda folder: (-len(clips[folder]), folder)):
        split = _split_of_folder(folder.relative_to(raw))
        if split is None:
            held = set(clips[folder])
            alike = {name: len(held & keys) / len(held | keys) for name, keys in wanted.items()}
            split = max(alike, key=lambda name: alike[name])
            if alike[split] < _SAME_FOLDER:
                raise UserError(
                    f"{folder} holds MELD clips, but neither its name nor what it holds says of which split: "
                    "rename it to train_splits, dev_splits_complete or output_repeated_splits_test."
                )
            notes.append(f"{folder} is taken to be the {split} part, by the clips that it holds.")
        for (dialogue, utterance), path in clips[folder].items():
            found.setdefault((split, dialogue, utterance), path)
    return found


def _split_of_folder(folder: PurePath) -> str | None:
    """The split that the innermost telling part of a path names."""
    for part in reversed(folder.parts):
        if split := _split_of_word(part):
            return split
    return None


def _absent(raw: Path, split: str, absent: Sequence[str], total: int, none_there: bool, partial: bool) -> str:
    if none_there:
        what = f"none of the {total} clips of the {split} part is there ({MELD_VIDEO_FOLDERS[split]})"
    else:
        what = f"{len(absent)} of {total} clips of the {split} part are absent: {some(absent)}"
    if len(absent) > _ABSENT_SHARE * total and not partial:
        packed = [path for path in archives(raw) if _split_of_word(path.name) == split]
        cure = f"unpack {packed[0]}" if packed else "complete the copy"
        raise UserError(f"{raw}: {what}; {cure}, or say that it is partial (--partial).")
    return f"{what[0].upper()}{what[1:]}; these rows keep their text."


def _read_exclusions(path: Path) -> dict[Key, str]:
    """Reasons by key.

    Raises:
        UserError: the file is no CSV with the columns split, dialogue, utterance and reason.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return {
                (line["split"].strip(), int(line["dialogue"]), int(line["utterance"])): line["reason"].strip()
                for line in csv.DictReader(file)
            }
    except OSError as error:
        raise UserError(f"the exclusion list {path} cannot be read ({error.strerror}).") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{path} is no exclusion list: it needs the columns split, dialogue, utterance and reason, "
            "dialogue and utterance as numbers."
        ) from None
