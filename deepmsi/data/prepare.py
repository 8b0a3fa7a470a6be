"""``deepmsi prepare``: decode every clip of a manifest once, into a folder that training maps into memory.

The work is cut into shards of consecutive rows (``shards.py``), made in worker processes (``pool.py``), and
joined into ``index.json`` at the end (``store.py`` tells the layout). A run that was stopped at any point is
continued by the same command; equal input and options give equal bytes, whatever the number of workers (features of
encoders on the same device).
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepmsi.data import features
from deepmsi.data.arrays import commonest_length
from deepmsi.data.files import claimed, digest, sweep, write_sorted_json, write_text
from deepmsi.data.manifest import Manifest, Row, read_manifest
from deepmsi.data.options import PrepareOptions
from deepmsi.data.pool import run_tasks, usable_cpus
from deepmsi.data.shards import Source, Task, read_record
from deepmsi.data.store import FORMAT, INDEX, STARTED, VERSION, PreparedData, PreparedRow
from deepmsi.errors import DiskFullError, UserError
from deepmsi.progress import progress_bar

FAILURES = "failures.csv"
DECODED = 2
"""Rises where clips are decoded to other arrays than before: shards from before are made anew, as their keys differ."""
_ROWS_PER_SHARD = 16  # a kill loses at most this many clips per worker
_MEDIA = ("video", "audio", "frames", "text_features", "audio_features")


def prepare(
    manifest_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PrepareOptions | None = None,
    workers: int | None = None,
    progress: bool = True,
    replace: bool = False,
) -> PreparedData:
    """Prepare the clips of a manifest into the folder ``out``, or continue where an earlier run stopped.

    A clip that fails is listed in ``out/failures.csv`` with its reason and stops no other; its row stays with the
    modalities that it has left, and is left out where it has none. A clip of which much less can be read than its
    header states is listed, too, and used. Where every clip fails, nothing is prepared.
    Shards that an earlier run made are read to their ends and held against their digests (about a second for a GB);
    those that do not fit are made again.

    Args:
        manifest_path: what ``read_manifest`` takes.
        out: the folder; it is made.
        options: how; an existing folder must have been prepared with the same ones.
        workers: processes that decode; None is one per usable core, 0 decodes in this process.
        progress: show on standard error how far it is.
        replace: whether a folder that was prepared from another manifest may lose rows that this one lacks.

    Returns:
        The prepared folder, opened.

    Raises:
        UserError: a bad manifest, other options than the folder's, rows of another manifest that would be lost, a full
            disk (what is done is kept), not one file of a manifest that names files could be read.
    """
    options = options or PrepareOptions()
    manifest = read_manifest(manifest_path)
    folder = Path(out)
    _check_options(manifest, options, finished=(folder / INDEX).exists())
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be made ({error.strerror})") from error
    with claimed(folder) as free:
        if not free:
            raise UserError(f"{folder}: another deepmsi prepare is at work here; wait for it")
        _start(folder, options)
        if not replace:
            _check_kept(manifest, folder)
        try:
            media = _decode(manifest, folder, options, workers, progress)
            texts = features.text_stage(manifest.rows, folder, options, progress)
            sounds = features.audio_stage(media, manifest.rows, folder, options, progress)
        except DiskFullError as error:
            raise DiskFullError(f"{error}; what is done is kept") from error
        finally:
            sweep(folder / "shards")  # of workers that were stopped
        _finish(manifest, folder, options, [media, texts, sounds])
    return PreparedData.open(folder)


def expected_rows(manifest: Manifest, options: PrepareOptions) -> list[PreparedRow]:
    """Rows as ``prepare`` leaves them where all that they name can be read; no file is opened.

    A video counts as sound, too: whether it has some, its file alone tells.
    """
    rows = []
    for row in manifest.rows:
        sound = row.audio or row.video
        there = {
            "frames": row.frames or row.video,
            "audio": sound,
            "text_features": row.text_features or (options.text_encoder and row.text),
            "audio_features": row.audio_features or (options.audio_encoder and sound),
        }
        rows.append(PreparedRow(**_index_row(row, {kind: () for kind, has in there.items() if has}, Path())))
    return rows


def encoder_notes(options: PrepareOptions) -> dict[str, dict[str, Any]]:
    """The notes of those encoders of the options that `deepmsi finetune` made, by modality."""
    from deepmsi.models.finetuned import read_notes

    named = {"text": options.text_encoder, "audio": options.audio_encoder}
    return {modality: asdict(found) for modality, name in named.items() if name and (found := read_notes(name))}


def _check_options(manifest: Manifest, options: PrepareOptions, finished: bool) -> None:
    for name, encoder in (("text", options.text_encoder), ("audio", options.audio_encoder)):
        if encoder and any(getattr(row, f"{name}_features") for row in manifest.rows):
            raise UserError(f"{manifest.path}: the manifest brings {name}_features, so {name}_encoder must be left out")
        if encoder and not finished:  # it is read when all clips are decoded
            from deepmsi.models.encoders import check_encoder

            check_encoder(name, encoder)
    if options.face:
        from deepmsi.data.face import shared_detector

        shared_detector(options.face_model)  # says now, and not once per clip, what is missing


def _start(folder: Path, options: PrepareOptions) -> None:
    """Claim the folder for these options, or refuse it."""
    sweep(folder)
    sweep(folder / "shards")
    file = folder / STARTED
    mine: dict[str, Any] = {"format": FORMAT, "version": VERSION, "options": options.model_dump()}
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / INDEX).exists() or any((folder / "shards").iterdir()):
            raise UserError(f"{folder}: the folder holds other data; choose another one, or empty it") from None
        write_sorted_json(file, mine)
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: the file is damaged; remove {folder} and prepare again") from error
    if not isinstance(theirs, dict) or theirs.get("format") != FORMAT or theirs.get("version") != VERSION:
        raise UserError(f"{folder}: the folder was prepared by another version; choose another one")
    before = _told(theirs.get("options", {}))
    changed = [f"{name}={before.get(name)!r}" for name, value in mine["options"].items() if before.get(name) != value]
    if changed:
        raise UserError(
            f"{folder}: the folder was prepared with {', '.join(changed)}; choose another folder, or remove it"
        )


def _check_kept(manifest: Manifest, folder: Path) -> None:
    """Refuse to lose rows of another manifest, which may have taken hours; one that changed is what it is now."""
    here = Path(os.path.realpath(manifest.path))
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        before = Path(os.path.realpath(here.parent / index["manifest"]))
        lost = sorted({row["id"] for row in index["rows"]} - {row.id for row in manifest.rows})
    except (OSError, ValueError, KeyError, TypeError):  # unfinished, or damaged, which preparing mends
        return
    if before != here and lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"{folder}: the folder was prepared from {before}, and {manifest.path} lacks its row {lost[0]!r}{more}, "
            "which would be lost; choose another folder, or remove it"
        )


def _told(options: dict[str, Any]) -> dict[str, Any]:
    """Options as they were recorded, by the rules of now: a relative path of an encoder is absolute."""
    try:
        return PrepareOptions(**options).model_dump()
    except (TypeError, ValueError, UserError):
        return options


def _decode(
    manifest: Manifest, folder: Path, options: PrepareOptions, workers: int | None, progress: bool
) -> features.Stage:
    """Make the shards that are missing, and return what all of them hold by row."""
    numbered = [(i, _source(row)) for i, row in enumerate(manifest.rows) if _has_media(row)]
    chunks = [numbered[k : k + _ROWS_PER_SHARD] for k in range(0, len(numbered), _ROWS_PER_SHARD)]
    settings = options.model_dump()
    tasks = []
    for shard, chunk in enumerate(chunks):
        sources = [source for _, source in chunk]
        key = digest([VERSION, DECODED, settings, [_identity(source) for source in sources]])
        tasks.append(Task(str(folder), shard, key, settings, sources, manifest.kind == "released"))
    found = progress_bar(tasks, description="checking shards", unit="shard", shown=progress)
    missing = [task for task in found if read_record(folder, task.shard, "media", task.key, check=True) is None]
    if missing:
        with contextlib.suppress(FileNotFoundError):
            (folder / INDEX).unlink()  # an index must not vouch for shards that change
        if workers is None:
            workers = usable_cpus()
        with progress_bar(
            total=len(numbered),
            initial=len(numbered) - sum(len(task.sources) for task in missing),
            description="decoding",
            unit="clip",
            shown=progress,
        ) as bar:
            run_tasks(missing, workers, bar.update)
    features.remove_beyond(folder, "media", len(tasks))
    return features.collect(folder, "media", [(task.key, [i for i, _ in chunks[task.shard]]) for task in tasks])


def _has_media(row: Row) -> bool:
    return any(getattr(row, name) is not None for name in _MEDIA)


def _source(row: Row) -> Source:
    paths = {name: str(path) for name in _MEDIA if (path := getattr(row, name)) is not None}
    return Source(id=row.id, start=row.start, end=row.end, side=row.side, audio_cut=row.cut("audio"), **paths)


def _identity(source: Source) -> list[Any]:
    """What a row's arrays depend on: its cut, and each file's size and time of change (None: not there)."""
    stamps: list[Any] = [source.id, source.start, source.end, source.side, source.audio_cut]
    for name in _MEDIA:
        path = getattr(source, name)
        stamp: list[Any] | None = None
        if path is not None:
            place = os.path.abspath(path)  # the same wherever the command is given
            try:
                stat = os.stat(path)
                stamp = [place, stat.st_size, stat.st_mtime_ns]
            except OSError:
                stamp = [place, None, None]
        stamps.append(stamp)
    return stamps


def _finish(manifest: Manifest, folder: Path, options: PrepareOptions, stages: Sequence[features.Stage]) -> None:
    """Join what the stages made into failures.csv and index.json."""
    slots: dict[int, dict[str, list[int]]] = {}
    failures: dict[int, list[tuple[str, str]]] = {}
    shards: dict[str, Mapping[str, Any]] = {}
    for stage in stages:
        shards.update(stage.files)
        for i, outcome in stage.outcomes.items():
            slots.setdefault(i, {}).update(outcome.slots)
            failures.setdefault(i, []).extend(outcome.failures)
    features.remove_unlisted(folder, shards)
    dims = _settle_dims(manifest.rows, slots, failures)
    base = manifest.path if manifest.path.is_dir() else manifest.path.parent
    rows = []
    for i, row in enumerate(manifest.rows):
        if slots.get(i) or row.text is not None:
            rows.append(_index_row(row, slots.get(i, {}), base))
    listed = [
        {"id": manifest.rows[i].id, "modality": modality, "reason": reason}
        for i in sorted(failures)
        for modality, reason in failures[i]
    ]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ("id", "modality", "reason"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    write_text(folder / FAILURES, table.getvalue())
    clips = stages[0].outcomes
    if clips and not any(outcome.slots for outcome in clips.values()):  # whatever their texts: these are wrong paths
        raise UserError(
            f"{manifest.path}: none of the {len(clips)} clips could be prepared; the first reason: "
            f"{listed[0]['reason']} (deepmsi check lists them)"
        )
    notes = encoder_notes(options)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "options": options.model_dump(),
        **({"encoders": notes} if notes else {}),
        "feature_dims": dims,
        "rows": rows,
        "shards": shards,
    }
    # Where the files lay does not matter to what was made of them.
    bare = [{name: value for name, value in row.items() if name not in ("video", "audio")} for row in rows]
    fingerprint = digest({**content, "rows": bare})
    write_sorted_json(
        folder / INDEX,
        {**content, "failures": listed, "fingerprint": fingerprint, "manifest": os.path.abspath(manifest.path)},
    )


def _settle_dims(
    rows: Sequence[Row],
    slots: Mapping[int, dict[str, list[int]]],
    failures: dict[int, list[tuple[str, str]]],
) -> dict[str, int]:
    """The length of each modality's features: that of most rows; rows of another length lose theirs."""
    dims: dict[str, int] = {}
    for modality in ("text", "audio"):
        kind = f"{modality}_features"
        lengths = {i: slots[i][kind][2] for i in sorted(slots) if kind in slots[i]}
        if not lengths:
            continue
        dims[modality] = commonest_length(lengths.values())
        for i, length in lengths.items():
            if length != dims[modality]:
                del slots[i][kind]
                reason = f"{rows[i].id}: the feature has {length} numbers and most rows' have {dims[modality]}"
                failures.setdefault(i, []).append((modality, reason))
    return dims


def _index_row(row: Row, slots: Mapping[str, Sequence[int]], base: Path) -> dict[str, Any]:
    def relative(path: Path | None) -> str | None:
        return None if path is None else Path(os.path.relpath(path, base)).as_posix()

    return {
        **{name: getattr(row, name) for name in ("id", "text", "label", "speaker", "dialogue", "split")},
        **{name: getattr(row, name) for name in ("start", "end", "side", "extra")},
        "video": relative(row.video),
        "audio": relative(row.audio),
        "slots": dict(sorted(slots.items())),
    }
