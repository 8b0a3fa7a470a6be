"""Makes one shard of a prepared folder from a few consecutive rows: decode, convert, write, record.

A shard is the unit of work and of resuming. Its bytes depend on its rows and the options alone, so neither
the number of workers nor an interruption shows in the result.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepmsi.data import arrays, geometry, released
from deepmsi.data.face import shared_detector
from deepmsi.data.files import ArrayWriter, replacing, write_sorted_json
from deepmsi.data.manifest import Side
from deepmsi.data.options import PrepareOptions
from deepmsi.data.store import DTYPES, Kind, shard_name
from deepmsi.errors import UserError


@dataclass(frozen=True)
class Source:
    """The files of one row, and how they are cut. Paths are text, for the way to a worker and back."""

    id: str
    video: str | None = None
    audio: str | None = None
    frames: str | None = None
    text_features: str | None = None
    audio_features: str | None = None
    start: float | None = None
    end: float | None = None
    side: Side | None = None
    audio_cut: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Task:
    """One shard to make. ``crashed`` names rows, by position, at which a decoder ended its process."""

    folder: str
    shard: int
    key: str
    options: dict[str, Any]
    sources: list[Source]
    released: bool = False
    crashed: dict[int, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        data = json.loads(text)
        data["sources"] = [Source(**source) for source in data["sources"]]
        data["crashed"] = {int(i): reason for i, reason in data["crashed"].items()}
        return cls(**data)


@dataclass
class Outcome:
    """What became of one row: where each array lies, and what failed (modality, reason)."""

    slots: dict[str, list[int]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)


def record_name(shard: int, stage: str) -> str:
    """Return the file that says what a shard holds; ``stage`` is "media", "text" or "audio"."""
    return f"shards/{shard:05d}.{stage}.json"


def make_shard(task: Task, started: Callable[[int], None] = lambda i: None) -> None:
    """Decode the rows of a task and write its shard; ``started(i)`` is called before row ``i``.

    A row that cannot be decoded is recorded with its reason; only a failure to write is raised.

    Raises:
        DiskFullError: no room is left. Nothing of the shard stays.
    """
    options = PrepareOptions(**task.options)
    folder = Path(task.folder)
    with ShardFiles(folder, task.shard) as files:
        outcomes = []
        for i, source in enumerate(task.sources):
            started(i)
            if i in task.crashed:
                outcomes.append(Outcome(failures=[("clip", task.crashed[i])]))
            else:
                outcomes.append(_RowDecoder(source, options, files, task.released).run())
        entries = files.finish()
    write_record(folder, task.shard, "media", task.key, outcomes, entries)


def write_record(
    folder: Path,
    shard: int,
    stage: str,
    key: str,
    outcomes: Sequence[Outcome],
    entries: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a shard's record, after its arrays: a record that is there vouches for them."""
    rows = [{"slots": outcome.slots, "failures": outcome.failures} for outcome in outcomes]
    write_sorted_json(folder / record_name(shard, stage), {"key": key, "rows": rows, "files": entries})


def read_record(folder: Path, shard: int, stage: str, key: str, *, check: bool = False) -> dict[str, Any] | None:
    """Return a shard's record where it was made from what ``key`` says and its files are whole, else None.

    A file is whole when it has its size and, with ``check``, which reads all of it, its dtype, shape and digest.
    """
    try:
        record = json.loads((folder / record_name(shard, stage)).read_text(encoding="utf-8"))
        if record["key"] != key:
            return None
        whole = all(_is_whole(folder / name, entry, check) for name, entry in record["files"].items())
        return record if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_whole(path: Path, entry: Mapping[str, Any], check: bool) -> bool:
    if path.stat().st_size != entry["bytes"]:
        return False
    if not check:
        return True
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
        fits = (list(shape), transposed, dtype.str) == (entry["shape"], False, DTYPES[path.name.split(".")[1]])
        return fits and hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]


class ShardFiles:
    """The array files of one shard, each begun when its first row comes and renamed together at the end."""

    def __init__(self, folder: Path, shard: int) -> None:
        self.folder, self.shard = folder, shard
        self._stack = ExitStack()
        self._writers: dict[Kind, ArrayWriter] = {}

    def __enter__(self) -> "ShardFiles":
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, kind: Kind, array: np.ndarray) -> list[int]:
        """Append one row's array; return its slot: shard, position, and length where the array is flat."""
        if kind not in self._writers:
            file = self._stack.enter_context(replacing(self.folder / shard_name(self.shard, kind)))
            row = array.shape if kind == "frames" else ()
            self._writers[kind] = ArrayWriter(file, DTYPES[kind], row)
        position = self._writers[kind].append(array[None] if kind == "frames" else array)
        return [self.shard, position] if kind == "frames" else [self.shard, position, len(array)]

    def finish(self) -> dict[str, Mapping[str, Any]]:
        """Complete the files and return their entries of the index by name."""
        entries = {shard_name(self.shard, kind): writer.finish() for kind, writer in sorted(self._writers.items())}
        self._stack.close()
        return entries


class _RowDecoder:
    """Decodes the files of one row into a shard; what fails is noted, once for each reason."""

    def __init__(self, source: Source, options: PrepareOptions, files: ShardFiles, from_release: bool) -> None:
        self.source, self.options, self.files, self.from_release = source, options, files, from_release
        self.outcome = Outcome()

    def run(self) -> Outcome:
        source = self.source
        if source.frames is not None:
            self._attempt("video", "frames", self._stored_frames)
        elif source.video is not None:
            self._attempt("video", "frames", self._video)
        if source.audio is not None or source.video is not None:
            self._attempt("audio", "audio", self._sound)
        if source.text_features is not None:
            self._attempt("text", "text_features", self._text_feature)
        if source.audio_features is not None:
            self._attempt("audio", "audio_features", self._audio_feature)
        return self.outcome

    def _attempt(self, modality: str, kind: Kind, make: Callable[[], np.ndarray | None]) -> None:
        try:
            array = make()
        except UserError as error:
            self._fail(modality, str(error))
        except MemoryError:
            self._fail(modality, f"{self.source.id}: the clip needs more memory than there is")
        else:
            if array is not None:
                self.outcome.slots[kind] = self.files.add(kind, array)

    def _fail(self, modality: str, reason: str) -> None:
        # A video that cannot be opened fails its own sound for the same reason.
        if all(reason != known for _, known in self.outcome.failures):
            self.outcome.failures.append((modality, reason))

    def _video(self) -> np.ndarray:
        from deepmsi.data.decode import decode_frames

        source, options = self.source, self.options
        detector = shared_detector(options.face_model) if options.face else None
        misses = detector.misses if detector else 0
        assert source.video is not None
        frames = decode_frames(
            source.video,
            options.frames,
            start=source.start,
            end=source.end,
            side=source.side,
            size=options.size,
            resize=options.resize,
            face=detector or False,
            tell=partial(self._fail, "part of video"),
        )
        if detector and detector.misses > misses:
            self._fail("face", f"{source.video}: no face was found, so the whole picture is used")
        return frames

    def _sound(self) -> np.ndarray | None:
        from deepmsi.data.decode import decode_pcm
        from deepmsi.data.media import NoStreamError

        source = self.source
        path = source.audio or source.video
        assert path is not None
        try:
            start, end = (source.start, source.end) if source.audio is None else source.audio_cut
            rate, tell = self.options.sample_rate, partial(self._fail, "part of audio")
            return decode_pcm(path, start=start, end=end, sample_rate=rate, tell=tell)
        except NoStreamError:
            if source.audio is not None:
                raise
            return None

    def _stored_frames(self) -> np.ndarray:
        path, options = Path(self.source.frames or ""), self.options
        pictures = arrays.as_pictures(self._load("frames", path), path)
        # The rule for clips, with the frame's number as its time.
        last, count = len(pictures) - 1, options.frames
        chosen = [(2 * k + 1) * last // (2 * count) for k in range(count)]
        if last + 1 == count:
            chosen = list(range(count))
        fitted = {
            i: geometry.fit(geometry.half(pictures[i], self.source.side), options.size, options.resize)
            for i in set(chosen)
        }
        return np.stack([fitted[i] for i in chosen])

    def _text_feature(self) -> np.ndarray:
        path = Path(self.source.text_features or "")
        return arrays.as_feature(self._load("text_features", path), path)

    def _audio_feature(self) -> np.ndarray:
        path = Path(self.source.audio_features or "")
        return arrays.as_feature(self._load("audio_features", path), path)

    def _load(self, kind: Kind, path: Path) -> np.ndarray:
        return released.read_released(path, kind) if self.from_release else arrays.load_array(path)
