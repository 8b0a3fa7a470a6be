"""Stores the features of frozen encoders beside the clips, and collects what every stage has made."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deepmsi.data.files import digest
from deepmsi.data.manifest import Row
from deepmsi.data.options import PrepareOptions
from deepmsi.data.shards import Outcome, ShardFiles, read_record, record_name, write_record
from deepmsi.data.store import DTYPES, VERSION, Kind, as_waveform, shard_name
from deepmsi.errors import UserError
from deepmsi.progress import progress_bar

_ROWS_PER_SHARD = 128
_BATCH = 8


@dataclass
class Stage:
    """What one stage made: the outcome of each row by its number, and the files' entries by name."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    files: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def collect(folder: Path, stage: str, shards: Sequence[tuple[str, Sequence[int]]]) -> Stage:
    """Read the records of a stage; ``shards`` holds the key and the rows of each.

    Raises:
        UserError: a record has gone since it was made.
    """
    result = Stage()
    for shard, (key, rows) in enumerate(shards):
        record = read_record(folder, shard, stage, key)
        if record is None:
            raise UserError(f"{folder / record_name(shard, stage)}: the file changed meanwhile; prepare again")
        result.files.update(record["files"])
        for i, row in zip(rows, record["rows"], strict=True):
            failures = [(modality, reason) for modality, reason in row["failures"]]
            result.outcomes[i] = Outcome(row["slots"], failures)
    return result


def remove_beyond(folder: Path, stage: str, count: int) -> None:
    """Remove a stage's shards from number ``count`` on: an earlier, longer manifest left them."""
    for file in (folder / "shards").glob(f"*.{stage}.json"):
        number = re.fullmatch(r"(\d{5,})\..*", file.name)
        if number and int(number.group(1)) >= count:
            file.unlink()


def remove_unlisted(folder: Path, files: Mapping[str, Any]) -> None:
    """Remove arrays that no record names any more."""
    for file in (folder / "shards").glob("*.npy"):
        if f"shards/{file.name}" not in files:
            file.unlink()


def text_stage(rows: Sequence[Row], folder: Path, options: PrepareOptions, progress: bool) -> Stage:
    """Compute the text features of all rows with text, where the options name an encoder."""
    if options.text_encoder is None:
        remove_beyond(folder, "text", 0)
        return Stage()
    from deepmsi.models.encoders import build_feature_encoder, context_strings
    from deepmsi.models.finetuned import read_notes

    encoder = options.text_encoder
    notes = read_notes(encoder)
    strings = context_strings(rows, notes.reads.get("context", 0) if notes else 0)
    texts = {i: text for i, text in enumerate(strings) if text is not None}

    def build() -> tuple[Any, Any]:
        return build_feature_encoder("text", encoder)

    inputs = {i: digest(text) for i, text in texts.items()}
    return _stage("text", options.text_encoder, inputs, texts.__getitem__, build, rows, folder, progress)


def audio_stage(media: Stage, rows: Sequence[Row], folder: Path, options: PrepareOptions, progress: bool) -> Stage:
    """Compute the audio features of all rows with a stored waveform, where the options name an encoder."""
    if options.audio_encoder is None:
        remove_beyond(folder, "audio", 0)
        return Stage()
    from deepmsi.models.encoders import heard_seconds

    slots = {i: outcome.slots["audio"] for i, outcome in media.outcomes.items() if "audio" in outcome.slots}
    inputs = {}
    for i, (shard, position, length) in slots.items():
        inputs[i] = f"{media.files[shard_name(shard, 'audio')]['sha256']}:{position}:{length}"

    def waveform(i: int) -> np.ndarray:
        shard, position, length = slots[i]
        stored = np.load(folder / shard_name(shard, "audio"), mmap_mode="r", allow_pickle=False)
        return as_waveform(stored[position : position + length])

    def build() -> tuple[Any, Any]:
        from deepmsi.models.encoders import build_feature_encoder

        return build_feature_encoder("audio", options.audio_encoder or "", options.sample_rate)

    stage = _stage("audio", options.audio_encoder, inputs, waveform, build, rows, folder, progress)
    heard = heard_seconds(options.audio_encoder)
    for i, (_, _, length) in slots.items():
        if (seconds := length / options.sample_rate) > heard:
            reason = f"{rows[i].id}: the audio encoder hears the first {heard:g} s of {seconds:.2f} s of sound"
            stage.outcomes[i].failures.append(("part of audio features", reason))
    return stage


def _stage(
    modality: str,
    encoder: str,
    inputs: Mapping[int, str],
    load: Callable[[int], Any],
    build: Callable[[], tuple[Any, Any]],
    rows: Sequence[Row],
    folder: Path,
    progress: bool,
) -> Stage:
    numbers = sorted(inputs)
    chunks = [numbers[k : k + _ROWS_PER_SHARD] for k in range(0, len(numbers), _ROWS_PER_SHARD)]
    identity = _identity(encoder)
    shards = [(digest([VERSION, identity, [inputs[i] for i in chunk]]), chunk) for chunk in chunks]
    missing = [i for i, (key, _) in enumerate(shards) if read_record(folder, i, modality, key, check=True) is None]
    if missing:
        encode = _encoder(build, load)
        kind: Kind = "text_features" if modality == "text" else "audio_features"
        done = len(numbers) - sum(len(chunks[shard]) for shard in missing)
        with progress_bar(
            total=len(numbers), initial=done, description=f"{modality} features", unit="row", shown=progress
        ) as bar:
            for shard in missing:
                key, chunk = shards[shard]
                outcomes = []
                with ShardFiles(folder, shard) as files:
                    for k in range(0, len(chunk), _BATCH):
                        batch = chunk[k : k + _BATCH]
                        for i, feature in zip(batch, encode(batch).astype(DTYPES[kind]), strict=True):
                            outcomes.append(outcome := Outcome())
                            if np.isfinite(feature).all():
                                outcome.slots[kind] = files.add(kind, feature)
                            else:
                                reason = f"{rows[i].id}: the {modality} encoder {encoder} gives features that are not"
                                outcome.failures.append((modality, f"{reason} finite"))
                        bar.update(len(batch))
                    entries = files.finish()
                write_record(folder, shard, modality, key, outcomes, entries)
    remove_beyond(folder, modality, len(shards))
    return collect(folder, modality, shards)


def _encoder(build: Callable[[], tuple[Any, Any]], load: Callable[[int], Any]) -> Callable[[Sequence[int]], np.ndarray]:
    """Features in float32 of what is loaded of rows, by an encoder on the GPU where there is one."""
    import torch

    from deepmsi.models.precision import float32_products

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, processor = build()
    module.eval().to(device)

    def encode(numbers: Sequence[int]) -> np.ndarray:
        inputs = {name: tensor.to(device) for name, tensor in processor([load(i) for i in numbers]).items()}
        with torch.inference_mode(), float32_products(device):
            return module(**inputs).float().cpu().numpy()

    return encode


def _identity(encoder: str) -> list[Any]:
    """What the features depend on: the encoder's name, and the files of a local one."""
    folder = Path(encoder)
    if not folder.is_dir():
        return [encoder]
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [encoder, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]]
