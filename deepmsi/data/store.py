"""The prepared folder: what lies in it, and how it is opened for reading.

index.json            rows, shards, options, failures; written last, so a folder with it is complete
prepare.json          the options, written first
shards/NNNNN.*.npy    frames uint8 [n, T, 3, S, S]; waveforms int16 and features float32, laid end to end
shards/NNNNN.*.json   what each shard holds and what it was made from; lets an interrupted run continue
failures.csv          id, modality, reason
"""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deepmsi.data.files import digest
from deepmsi.data.options import PrepareOptions
from deepmsi.errors import UserError

FORMAT = "deepmsi-prepared"
VERSION = 1
INDEX = "index.json"
STARTED = "prepare.json"
# An open memory map holds a file descriptor; MELD has more shards than a process may have open files.
_OPEN_MAPS = 128

Kind = Literal["frames", "audio", "text_features", "audio_features"]
DTYPES: Mapping[str, str] = {
    "frames": "|u1",
    "audio": "<i2",
    "text_features": "<f4",
    "audio_features": "<f4",
}


@dataclass(frozen=True)
class PreparedRow:
    """One prepared utterance: the manifest's cells, and which modalities are there.

    ``has_audio`` and ``has_text`` are true where the waveform or the text is there, or features of it.
    """

    id: str
    text: str | None
    label: str | None
    speaker: str | None
    dialogue: str | None
    split: str | None
    start: float | None
    end: float | None
    side: str | None
    extra: dict[str, str]
    video: str | None
    audio: str | None
    slots: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def has_video(self) -> bool:
        """Whether frames are stored."""
        return "frames" in self.slots

    @property
    def has_audio(self) -> bool:
        """Whether a waveform or an audio feature is stored."""
        return "audio" in self.slots or "audio_features" in self.slots

    @property
    def has_text(self) -> bool:
        """Whether there is text or a text feature."""
        return self.text is not None or "text_features" in self.slots


class PreparedData:
    """A prepared folder, opened for reading; arrays stay on disk and are mapped when asked for.

    Attributes:
        path: the folder.
        rows: the utterances that have at least one modality, in the manifest's order.
        options: the PrepareOptions that made it.
        failures: ``{"id", "modality", "reason"}`` of each thing that could not be prepared, or only in part.
        feature_dims: ``{"text": D, "audio": D}`` of the stored features; a modality without is not a key.
        encoders: of the modalities whose features come from an encoder that `deepmsi finetune` made: its notes
            (`deepmsi.models.finetuned.EncoderNotes`), among them the ids of the rows that it saw.
        fingerprint: hexadecimal digest of rows, options and array contents.
        content: the same without the features and their encoders, equal for folders that differ in those alone.
    """

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        self.path = path
        self.options = PrepareOptions(**index["options"])
        self.fingerprint: str = index["fingerprint"]
        self.failures: list[dict[str, str]] = list(index["failures"])
        self.feature_dims: dict[str, int] = dict(index["feature_dims"])
        self.rows: list[PreparedRow] = [
            PreparedRow(**{**row, "slots": {kind: tuple(slot) for kind, slot in row["slots"].items()}})
            for row in index["rows"]
        ]
        self.encoders: dict[str, dict[str, Any]] = dict(index.get("encoders") or {})
        self._shards: Mapping[str, Mapping[str, Any]] = index["shards"]
        self.content = _content(index)
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "PreparedData":
        """Open a prepared folder.

        Names and sizes of the files are held against the index, and their contents are not, which would read all of
        them at each start: ``prepare`` given again does that, and mends what is damaged.

        Raises:
            UserError: the folder is absent, unfinished, of another version, or not what its index says.
        """
        folder = Path(path)
        again = "run deepmsi prepare again"
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such prepared folder; run deepmsi prepare first")
        file = folder / INDEX
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if (folder / STARTED).exists():
                raise UserError(f"{folder}: the preparation was not finished; {again} to continue it") from None
            raise UserError(f"{folder}: this is not a prepared folder (it has no {INDEX})") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: the index cannot be read ({error}); {again}") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise UserError(f"{file}: this is not the index of a prepared folder")
        if index.get("version") != VERSION:
            raise UserError(
                f"{file}: the index has version {index.get('version')!r} and this deepmsi reads {VERSION}; "
                "prepare the data again into another folder"
            )
        try:
            data = cls(folder, index)
            data._validate()
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            cause = str(error).partition("\n")[0]
            raise UserError(f"{file}: the index is damaged ({type(error).__name__}: {cause}); {again}") from error
        return data

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers map the files themselves; a map must not travel as its contents.
        return {**self.__dict__, "_maps": OrderedDict()}

    def frames(self, i: int) -> np.ndarray | None:
        """Return row ``i``'s frames ``[T, 3, S, S]`` uint8, a read-only view of the file, or None."""
        slot = self.rows[i].slots.get("frames")
        if slot is None:
            return None
        return self._map("frames", slot[0])[slot[1]]

    def waveform(self, i: int) -> np.ndarray | None:
        """Return row ``i``'s waveform ``[n]`` float32 in [-1, 1) at ``options.sample_rate``, or None."""
        part = self._flat("audio", i)
        return None if part is None else as_waveform(part)

    def features(self, modality: str, i: int) -> np.ndarray | None:
        """Return row ``i``'s feature vector ``[D]`` float32 of ``modality`` ("text" or "audio"), or None."""
        if modality not in ("text", "audio"):
            raise ValueError(f"features are stored of text and audio, not of {modality!r}")
        part = self._flat("text_features" if modality == "text" else "audio_features", i)
        return None if part is None else np.array(part)

    def _flat(self, kind: Kind, i: int) -> np.ndarray | None:
        slot = self.rows[i].slots.get(kind)
        if slot is None:
            return None
        shard, offset, length = slot
        return self._map(kind, shard)[offset : offset + length]

    def _map(self, kind: Kind, shard: int) -> np.ndarray:
        name = shard_name(shard, kind)
        array = self._maps.get(name)
        if array is None:
            try:
                array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{self.path / name}: the shard cannot be read ({error})") from error
            self._maps[name] = array
            while len(self._maps) > _OPEN_MAPS:
                self._maps.popitem(last=False)
        else:
            self._maps.move_to_end(name)
        return array

    def _validate(self) -> None:
        """Compare the files with the index: names, sizes, and that every slot lies inside its shard."""
        for name, entry in self._shards.items():
            try:
                size = (self.path / name).stat().st_size
            except OSError:
                raise UserError(f"{self.path / name}: the shard is missing; run deepmsi prepare again") from None
            if size != entry["bytes"]:
                raise UserError(
                    f"{self.path / name}: the shard has {size} bytes where the index says {entry['bytes']}; "
                    "run deepmsi prepare again"
                )
        for row in self.rows:
            for kind, slot in row.slots.items():
                length = self._shards[shard_name(slot[0], kind)]["shape"][0]
                end = slot[1] + (1 if kind == "frames" else slot[2])
                if min(slot) < 0 or end > length:
                    raise ValueError(f"row {row.id!r} lies outside its shard")


def _content(index: Mapping[str, Any]) -> str:
    options = {name: value for name, value in index["options"].items() if not name.endswith("_encoder")}
    rows = [
        {name: value for name, value in row.items() if name not in ("video", "audio")}
        | {"slots": {kind: slot for kind, slot in row["slots"].items() if not kind.endswith("_features")}}
        for row in index["rows"]
    ]
    shards = {name: entry for name, entry in index["shards"].items() if not name.endswith("_features.npy")}
    return digest([options, rows, shards])


def as_waveform(samples: np.ndarray) -> np.ndarray:
    """Return stored sound ``[n]`` int16 as the waveform ``[n]`` float32 in [-1, 1) that models read."""
    return samples.astype(np.float32) / np.float32(32768)


def shard_name(shard: int, kind: str) -> str:
    """Return the file of a shard's arrays, relative to the prepared folder."""
    return f"shards/{shard:05d}.{kind}.npy"
