"""Rows of a prepared folder as batches of the model: order, modality dropout, what augmentation draws, padding.

Every random draw comes from (seed, epoch, row id), and the sampler hands the epoch to the workers inside its
keys. So a batch is the same whichever process makes it, with any number of workers, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from deepmsi.data.geometry import scale
from deepmsi.data.store import PreparedData, PreparedRow
from deepmsi.errors import UserError
from deepmsi.models.config import MODALITIES, ModelSections
from deepmsi.models.encoders import context_strings
from deepmsi.train.augment import CHANGES, augment_audio, draw_change, reorder
from deepmsi.train.recipe import AugmentSettings
from deepmsi.train.seeding import derive_seed

if TYPE_CHECKING:
    from deepmsi.train.stems import Stems

Batch = dict[str, Tensor]
Key = tuple[int, int, int]
"""(epoch, how many times the epoch drew this row before, position in the dataset)."""

GROUPED_BATCHES = 50
"""Batches among which rows are sorted by length: enough to save the padding, and few to stay random."""


def present_modalities(row: PreparedRow, config: ModelSections) -> tuple[bool, bool, bool]:
    """Whether a row has what the model reads of (video, text, audio): a feature model needs the feature."""
    video = config.vision.backbone != "none" and "frames" in row.slots
    text = config.text.present and (
        "text_features" in row.slots if config.text.encoder == "features" else row.text is not None
    )
    audio = config.audio.present and (
        "audio_features" in row.slots if config.audio.encoder == "features" else "audio" in row.slots
    )
    return video, text, audio


def check_data(data: PreparedData, config: ModelSections) -> None:
    """Refuse a prepared folder that the model cannot read.

    Raises:
        UserError: frames of another number or smaller than the model's, another sample rate, or features of
            another length.
    """
    rows = data.rows
    if config.vision.backbone != "none" and any("frames" in row.slots for row in rows):
        if data.options.frames != config.vision.frames:
            raise UserError(
                f"{data.path} holds {data.options.frames} frames per utterance and the model reads "
                f"{config.vision.frames}: prepare it again with frames={config.vision.frames}, or set "
                "vision.frames."
            )
        if data.options.size < config.vision.image_size:
            raise UserError(
                f"{data.path} holds frames of {data.options.size} pixels and the model reads "
                f"{config.vision.image_size}: prepare it again with size={config.vision.image_size}, or set "
                "vision.image_size."
            )
    if (
        config.audio.encoded
        and any("audio" in row.slots for row in rows)
        and data.options.sample_rate != config.audio.sample_rate
    ):
        raise UserError(
            f"{data.path} holds sound at {data.options.sample_rate} Hz and the model reads "
            f"{config.audio.sample_rate} Hz: prepare it again with sample_rate={config.audio.sample_rate}."
        )
    for name in ("text", "audio"):
        section = getattr(config, name)
        if section.encoder == "features" and data.feature_dims.get(name, section.dim) != section.dim:
            raise UserError(
                f"{data.path} holds {name} features of length {data.feature_dims[name]} and the model "
                f"reads {section.dim}: they come from another encoder; set {name}.dim, or prepare them "
                "again."
            )
        source, found = section.features_from, getattr(data.options, f"{name}_encoder")
        if section.encoder == "features" and source and found and _place(source) != _place(found):
            raise UserError(
                f"{data.path} holds {name} features of {found} and the model reads those of {source}: prepare the "
                f"data with that encoder, or set {name}.features_from."
            )


def context_read(rows: Sequence[PreparedRow], config: ModelSections) -> int:
    """How many previous utterances are read with each text: `text.context`, but 0 where no row has a dialogue."""
    return config.text.context if any(row.dialogue is not None for row in rows) else 0


def unread(
    data: PreparedData, indices: NDArray[np.int64], config: ModelSections, hidden: Sequence[str] = ()
) -> list[str]:
    """Say what a model leaves unread of modalities not hidden: context, ends of sounds, texts without a feature.

    Args:
        data: the prepared folder.
        indices: its rows that take part.
        config: the model's sections.
        hidden: modalities that are left out.
    """
    rows, notes = [data.rows[i] for i in indices], []
    if context_read(data.rows, config) < config.text.context and "text" not in hidden:
        notes.append(f"No row has a dialogue: text.context={config.text.context} reads no previous utterances.")
    if config.audio.encoded and "audio" not in hidden:
        seconds = [row.slots["audio"][2] / data.options.sample_rate for row in rows if "audio" in row.slots]
        heard = config.audio.max_seconds
        if longer := [length for length in seconds if length > heard]:
            told = "1 row has" if len(longer) == 1 else f"{len(longer)} rows have"
            notes.append(
                f"{told} sound that goes on after {heard:g} s, where it is cut (audio.max_seconds); the longest takes "
                f"{max(longer):.2f} s."
            )
    failed = {(failure["id"], failure["modality"]) for failure in data.failures}  # which is told as such
    for name, given in (("text", "a text"), ("audio", "sound")):
        section = getattr(config, name)
        if not section.present or section.encoder != "features" or name in hidden:
            continue
        without = [row for row in rows if f"{name}_features" not in row.slots and (row.id, name) not in failed]
        bare = [row.id for row in without if (row.text is not None if name == "text" else "audio" in row.slots)]
        if bare and len(without) < len(rows):
            told = "1 row has" if len(bare) == 1 else f"{len(bare)} rows have"
            notes.append(f"{told} {given} that is not read, for want of {name} features (the first: {bare[0]!r}).")
    return notes


def _place(encoder: str) -> str:
    """A folder by its real path, a hub name as it is."""
    path = Path(encoder).expanduser()
    return str(path.resolve()) if path.is_dir() else encoder


@dataclass
class Example:
    """One row as the collator takes it; an absent or hidden modality is None.

    Attributes:
        change: what the frames become on the device (`augment.draw_change`); None where they stay.
    """

    frames: Tensor | None
    text: str | NDArray[np.float32] | None
    audio: NDArray[np.float32] | None
    label: int
    change: Tensor | None = None


class UtteranceDataset(Dataset[Example]):
    """Rows of a prepared folder, by position; a `Key` augments, a plain position does not.

    Args:
        data: the prepared folder.
        indices: rows of the folder that take part, in their order.
        labels: class of each of them; -1 where it is unknown.
        config: the model's sections.
        augment: augmentation of training clips; None for none.
        seed: of augmentation and modality dropout.
        hidden: modalities to leave out (`--drop`).

    Attributes:
        stems: read in place of frames, where set.
    """

    def __init__(
        self,
        data: PreparedData,
        indices: Sequence[int] | NDArray[np.int64],
        labels: Sequence[int] | NDArray[np.int64],
        config: ModelSections,
        *,
        augment: AugmentSettings | None = None,
        seed: int = 0,
        hidden: Sequence[str] = (),
    ) -> None:
        self.data = data
        self.indices = [int(i) for i in indices]
        self.labels = [int(label) for label in labels]
        self.config = config
        self.augment = augment
        self.seed = seed
        self.hidden = tuple(name in hidden for name in MODALITIES)
        self.stems: Stems | None = None
        encoded = config.text.encoded
        self.texts = context_strings(data.rows, config.text.context) if encoded else [None] * len(data.rows)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def text_lengths(self) -> list[int]:
        """Characters of each row's text as the encoder gets it."""
        return [len(self.texts[i] or "") for i in self.indices]

    def present(self, position: int) -> tuple[bool, ...]:
        """Whether (video, text, audio) of a row are there and not hidden."""
        there = present_modalities(self.data.rows[self.indices[position]], self.config)
        return tuple(has and not hide for has, hide in zip(there, self.hidden, strict=True))

    def __getitem__(self, key: Key | int) -> Example:
        if isinstance(key, tuple):
            epoch, draw, position = key
            row_id = self.data.rows[self.indices[position]].id
            rng = np.random.default_rng(derive_seed(self.seed, epoch, draw, row_id))
            return self._load(position, rng)
        return self._load(key, None)

    def videos(self) -> Iterator[Tensor]:
        """The frames of every row that has video, `[T, 3, S, S]` uint8, not augmented."""
        return map(self.frames, self.with_video())

    def with_video(self) -> list[int]:
        """The rows of the folder that take part and have video."""
        return [i for position, i in enumerate(self.indices) if self.present(position)[0]]

    def sounds(self) -> Iterator[NDArray[np.float32]]:
        """The waveform of every row that has audio, `[samples]`, not augmented; not of prepared features."""
        for position, i in enumerate(self.indices):
            if self.present(position)[2]:
                yield self._waveform(i)

    def _load(self, position: int, rng: np.random.Generator | None) -> Example:
        i, config = self.indices[position], self.config
        video, text, audio = self.present(position)
        if rng is not None:
            video, text, audio = hide_modalities((video, text, audio), config.fusion.modality_dropout, rng)
        frames = sound = change = None
        words: str | NDArray[np.float32] | None = None
        if video:
            frames = self.frames(i) if self.stems is None else self.stems.read(i)
            if rng is not None and self.augment is not None:
                change = draw_change(self.augment, rng)
                frames = reorder(frames, self.augment, rng)
            if self.stems is not None:  # of which nothing changes; as many numbers were drawn
                change = None
        if text:
            words = self._features("text", i) if config.text.encoder == "features" else self.texts[i]
        if audio and config.audio.encoder == "features":
            sound = self._features("audio", i)
        elif audio:
            sound = self._waveform(i)
            if rng is not None and self.augment is not None:
                sound = augment_audio(sound, self.augment, rng)
        return Example(frames, words, sound, self.labels[position], change)

    def frames(self, i: int) -> Tensor:
        """The frames of row `i` of the folder, `[T, 3, S, S]` uint8, not augmented."""
        stored = self.data.frames(i)
        if stored is None:
            raise UserError(f"{self.data.path}: the frames of row {self.data.rows[i].id!r} are gone.")
        return torch.from_numpy(scale(stored, self.config.vision.image_size))

    def _waveform(self, i: int) -> NDArray[np.float32]:
        sound = self.data.waveform(i)
        if sound is None:
            raise UserError(f"{self.data.path}: the sound of row {self.data.rows[i].id!r} is gone; prepare it again.")
        return sound

    def _features(self, modality: str, i: int) -> NDArray[np.float32]:
        features = self.data.features(modality, i)
        if features is None or not np.isfinite(features).all():
            raise UserError(
                f"{self.data.path}: the {modality} features of row {self.data.rows[i].id!r} hold NaN or "
                "infinity; extract them again."
            )
        return features


def hide_modalities(present: tuple[bool, ...], chance: float, rng: np.random.Generator) -> tuple[bool, bool, bool]:
    """Hide each present modality with a chance, never all: one of the hidden ones stays if none would."""
    draws, keep = rng.random(3), int(rng.integers(6))  # 6: every number of options divides it
    left = [has and draw >= chance for has, draw in zip(present, draws, strict=True)]
    if not any(left):
        options = [k for k, has in enumerate(present) if has]
        if options:
            left[options[keep % len(options)]] = True
    return left[0], left[1], left[2]


class Collator:
    """Turns examples into the keyword arguments of `DeepMSI.forward`.

    Args:
        config: the model's sections.
        text_processor: of the model's text encoder; None where it reads features.
        audio_processor: of the model's audio encoder; None where it reads features.
        with_labels: include `labels` (left out where only logits are wanted).
    """

    def __init__(
        self,
        config: ModelSections,
        text_processor: Callable[[Sequence[str]], dict[str, Tensor]] | None,
        audio_processor: Callable[[Sequence[np.ndarray]], dict[str, Tensor]] | None,
        with_labels: bool = True,
    ) -> None:
        self.config = config
        self.text_processor = text_processor
        self.audio_processor = audio_processor
        self.with_labels = with_labels

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Collate U examples.

        Returns:
            `modality_mask [U, 3]` bool; `pixel_values [U', T, 3, S, S]` uint8 of the rows that have video
            (absent where none has), or what a stem made of them, `[U', T, H, W, C]`; `frame_changes [U', 7]`
            where they are augmented, for `augment.to_device`; `text_features [U, D]` or the text processor's
            tensors; `audio_features [U, D]` or the audio processor's tensors (`audio_attention_mask [U, S]`);
            `labels [U]` int64. Rows without a modality hold zeros or the empty
            text there, and the mask says so.
        """
        batch: Batch = {
            "modality_mask": torch.tensor(
                [[e.frames is not None, e.text is not None, e.audio is not None] for e in examples]
            )
        }
        if self.with_labels:
            batch["labels"] = torch.tensor([e.label for e in examples])
        frames = [e.frames for e in examples if e.frames is not None]
        if frames:
            batch["pixel_values"] = torch.stack(frames)
        changes = [e.change for e in examples if e.change is not None]
        if changes:
            batch[CHANGES] = torch.stack(changes)
        text, audio = self.config.text, self.config.audio
        if text.encoder == "features":
            batch["text_features"] = _stack_features([e.text for e in examples], text.dim)
        elif self.text_processor is not None:
            batch.update(self.text_processor([e.text if isinstance(e.text, str) else "" for e in examples]))
        if audio.encoder == "features":
            batch["audio_features"] = _stack_features([e.audio for e in examples], audio.dim)
        elif self.audio_processor is not None:
            silence = np.zeros(1, dtype=np.float32)
            batch.update(self.audio_processor([silence if e.audio is None else e.audio for e in examples]))
        return batch


def _stack_features(features: Sequence[Any], dim: int | None) -> Tensor:
    stacked = np.zeros((len(features), dim or 0), dtype=np.float32)
    for row, feature in zip(stacked, features, strict=True):
        if feature is not None:
            row[:] = feature
    return torch.from_numpy(stacked)


class EpochBatches(Sampler[list[Key]]):
    """Batches of keys for one process; the order depends on (seed, epoch) alone.

    A global batch of `batch_size · world` keys is cut into one run of keys per process. The last one may be
    smaller: it is dealt out evenly, and where it has fewer keys than there are processes, the first keys of
    the epoch fill it up so that every process has at least one.

    Args:
        labels: class of each row of the dataset.
        batch_size: keys per process.
        seed: of the order.
        balanced: draw every class equally often; rows of rare classes come several times.
        partial: `[rows]` bool, and how many of the rows that it marks an epoch draws; None: all of them.
        lengths: of each row of the dataset; rows of like length then share a batch, which saves padding.
        rank, world: this process and the number of processes.
    """

    def __init__(
        self,
        labels: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        balanced: bool = False,
        partial: tuple[NDArray[np.bool_], int] | None = None,
        lengths: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.labels = np.asarray(labels)
        self.lengths = lengths
        self.batch_size, self.seed, self.balanced, self.partial = batch_size, seed, balanced, partial
        self.size = len(self.labels) if partial is None else int((~partial[0]).sum()) + partial[1]
        self.rank, self.world = rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.world))

    def keys(self) -> list[Key]:
        """The epoch's keys in order, all processes together."""
        rng = np.random.default_rng(derive_seed(self.seed, "order", self.epoch))
        keys = self._shuffled(rng)
        return keys if self.lengths is None else self._grouped(keys, self.lengths, rng)

    def _grouped(self, keys: list[Key], lengths: Sequence[int], rng: np.random.Generator) -> list[Key]:
        """Sort by length within windows of shuffled keys, and shuffle the batches; a smaller one stays last."""
        size = self.batch_size * self.world
        batches: list[list[Key]] = []
        for start in range(0, len(keys), size * GROUPED_BATCHES):
            window = sorted(keys[start : start + size * GROUPED_BATCHES], key=lambda key: lengths[key[2]])
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        full = len(keys) // size
        order = [*rng.permutation(full), *range(full, len(batches))]
        return [key for i in order for key in batches[i]]

    def _shuffled(self, rng: np.random.Generator) -> list[Key]:
        pool = np.arange(len(self.labels))
        if self.partial is not None:
            marked, count = self.partial
            pool = np.concatenate([pool[~marked], rng.choice(pool[marked], count, replace=False)])
        if not self.balanced:
            return [(self.epoch, 0, int(i)) for i in rng.permutation(pool)]
        classes = np.unique(self.labels[pool])
        share, extra = divmod(len(pool), len(classes))
        bonus = rng.permutation(len(classes))  # which classes get one more
        keys: list[Key] = []
        for k, label in enumerate(classes):
            rows = pool[self.labels[pool] == label]
            count = share + int(bonus[k] < extra)
            for draw in range(-(-count // len(rows))):
                order = rng.permutation(rows)[: count - draw * len(rows)]
                keys += [(self.epoch, draw, int(i)) for i in order]
        return [keys[i] for i in rng.permutation(len(keys))]

    def __iter__(self) -> Iterator[list[Key]]:
        keys, size = self.keys(), self.batch_size * self.world
        for start in range(0, len(keys), size):
            joined = keys[start : start + size]
            if len(joined) < self.world:
                joined = joined + (keys * self.world)[: self.world - len(joined)]
            base, extra = divmod(len(joined), self.world)
            begin = self.rank * base + min(self.rank, extra)
            yield joined[begin : begin + base + (self.rank < extra)]


def partial_rows(dataset: UtteranceDataset, share: float | None) -> tuple[NDArray[np.bool_], int] | None:
    """Which rows lack a modality of the model, and how many of them an epoch draws; None: all.

    Raises:
        UserError: no row is complete, so that a number per complete row means nothing.
    """
    if share is None:
        return None
    wanted = [name in dataset.config.modalities for name in MODALITIES]
    partial = np.array(
        [
            any(want and not has for want, has in zip(wanted, dataset.present(i), strict=True))
            for i in range(len(dataset))
        ]
    )
    complete = int((~partial).sum())
    if not complete:
        raise UserError("train.partial_rows counts rows per complete row, and no training row has every modality.")
    return partial, min(round(share * complete), int(partial.sum()))
