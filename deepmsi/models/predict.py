"""Prediction from media files: decode as the checkpoint's preprocessing says, batch, name the labels."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepmsi.errors import UserError
from deepmsi.models.config import MODALITIES, Precision
from deepmsi.models.deepmsi import DeepMSI
from deepmsi.models.encoders import build_feature_encoder
from deepmsi.models.precision import autocast_for, check_precision, inferring
from deepmsi.progress import progress_bar

SHORTEST_WINDOW = 0.25
"""Part of a window's length that the rest of a recording must have to be a window of its own."""


@dataclass(frozen=True)
class Prediction:
    """What a clip, a window of it, or a text alone expresses.

    Attributes:
        clip: path, as it was given; None where a text stands alone.
        label: the likeliest label; None for a window of a timeline in which the model finds nothing to read.
        probabilities: of every label, in the order of the logits; they sum to 1. Empty where there is no label.
        start, end: seconds from the beginning of the file; end is None where a file does not say how long it is.
        modalities: what the prediction rests on.
        text: what was said, where it was given and the model reads it.
    """

    clip: str | None
    label: str | None
    probabilities: dict[str, float]
    start: float
    end: float | None
    modalities: tuple[str, ...]
    text: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Window:
    clip: str | None
    start: float | None
    end: float | None
    text: str | None
    has_video: bool = False
    has_audio: bool = False

    @property
    def name(self) -> str:
        """What a sentence calls it."""
        return f"the text {textwrap.shorten(self.text or '', 60)!r}" if self.clip is None else self.clip


@dataclass(frozen=True)
class _Item:
    """One utterance, decoded."""

    window: _Window
    frames: np.ndarray | None
    waveform: np.ndarray | None

    @property
    def present(self) -> tuple[bool, bool, bool]:
        return self.frames is not None, self.window.text is not None, self.waveform is not None


def load_run(run: str | Path, device: str | torch.device = "cpu", precision: Precision = "fp32") -> DeepMSI:
    """Load the model of a run directory or a checkpoint folder, and compute its constants for prediction.

    Args:
        run: the folder.
        device: where the model goes, before its constants are computed.
        precision: what it will predict in; the constants hold for that.

    Raises:
        UserError: there is neither in it, or the device has no such precision.
    """
    device = torch.device(device)
    check_precision(precision, device)
    folder = Path(run)
    inner = folder / "model"
    if not folder.is_dir():
        raise UserError(f"there is no run directory {folder}.")
    if not (folder / "model.safetensors").exists() and not inner.is_dir():
        raise UserError(f"{folder} holds no model: give a directory that deepmsi train has finished.")
    model = DeepMSI.from_pretrained(inner.resolve() if inner.is_dir() else folder.resolve()).to(device)
    if model.video is not None:
        with autocast_for(precision, device):
            model.video.fold()
    return model


def predict(
    model: DeepMSI,
    clips: Sequence[str | Path | None] | str | Path,
    texts: Sequence[str | None] | str | None = None,
    *,
    timeline: float | None = None,
    batch_size: int = 8,
    progress: bool = False,
    precision: Precision = "fp32",
) -> list[Prediction]:
    """Predict from media files, clip by clip or window by window, or from texts.

    The preprocessing is the one that the model's configuration records. A modality that a file lacks is treated
    as missing; where much less of a file can be read than its header states, a warning says so.

    Args:
        model: the model; it is put in eval mode for the time.
        clips: video or sound files, or one; None for a text that stands alone.
        texts: what is said in each clip, or in the one; None or blank where that is not known. With `text.context = n`
            the string holds the previous utterances too, as `deepmsi.models.encoders.context_strings` joins them.
        timeline: length in seconds of the windows to go over each recording with; None takes a clip as a whole.
        batch_size: utterances per forward pass; no more than that are decoded at a time.
        progress: show on standard error how far it is.
        precision: "fp32", or "bf16" or "fp16" for autocast.

    Returns:
        One `Prediction` per clip, or per window in order of time; a window that has nothing to read gets no label.

    Raises:
        UserError: the device has no such precision, or a file cannot be read, or has nothing that the model reads, in
            none of its windows. What the headers of the files tell is looked at before the first one is decoded.
    """
    device = _device(model)
    check_precision(precision, device)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: give at least 1.")
    if isinstance(clips, str | Path):
        clips = [clips]
    if isinstance(texts, str):
        texts = [texts]
    if texts is not None and len(texts) != len(clips):
        raise UserError(
            f"{len(texts)} texts were given for {len(clips)} clips: give one for each, or none, and None for the clip "
            "of a text that stands alone."
        )
    if timeline is not None and not (math.isfinite(timeline) and timeline >= 0.01):
        raise UserError(f"timeline is {timeline}: give the length of a window in seconds, at least 0.01.")
    texts = [(text or "").strip() or None for text in texts or [None] * len(clips)]  # as a manifest's cells
    if timeline is not None and any(texts):
        raise UserError("a text belongs to a whole clip: leave it out of a timeline, whose windows it would not fit.")
    encoders = _Encoders(model, any(texts), any(clip is not None for clip in clips))
    pairs = list(zip(clips, texts, strict=True))
    named = progress_bar(pairs, description="headers", unit="clip", shown=progress)
    windows = [window for clip, text in named for window in _windows(model, clip, text, timeline)]
    _tell_what_is_cut(windows, model.config.audio.max_seconds)
    unit = "clip" if timeline is None else "window"
    shown = progress_bar(windows, description="predict", unit=unit, shown=progress)
    items = (_decode(model, window, tolerant=timeline is not None) for window in shown)
    predictions: list[Prediction] = []
    with inferring(model, precision):
        while batch := list(islice(items, batch_size)):
            predictions += _run(model, encoders, batch)
    labelled = {window.name for window, found in zip(windows, predictions, strict=True) if found.label is not None}
    for window in windows:
        if window.name not in labelled:
            raise UserError(f"{window.name}: nothing in it can be read by this model.")
    return predictions


def _windows(model: DeepMSI, file: str | Path | None, text: str | None, length: float | None) -> Iterator[_Window]:
    from deepmsi.data.media import probe

    if file is None:
        if length is not None:
            raise UserError("a timeline goes over the windows of a recording: give a clip.")
        if text is None or "text" not in model.modalities:
            need = "give a clip" if "text" not in model.modalities else "give a clip or a text that is not blank"
            raise UserError(f"this model reads {', '.join(model.modalities)}: {need}.")
        yield _Window(None, None, None, text)
        return
    clip = str(file)
    info = probe(clip)
    has_video = info.has_video and "video" in model.modalities
    has_audio = info.audio_streams > 0 and "audio" in model.modalities
    if text is not None and "text" not in model.modalities:
        text = None
    if not (has_video or has_audio or text is not None):
        raise UserError(f"{clip}: this model reads {', '.join(model.modalities)}, and the clip gives none of that.")
    if length is None:
        yield _Window(clip, None, info.duration, text, has_video, has_audio)
        return
    if info.duration is None:
        raise UserError(f"{clip}: the file does not say how long it is; remux it to go over it in windows.")
    heard, longest = model.config.audio.max_seconds, min(length, info.duration)
    if has_audio and longest > heard:
        raise UserError(
            f"{clip}: of a window of {longest:g} s this model would hear the first {heard:g} (audio.max_seconds): give "
            "shorter windows."
        )
    count = max(1, math.ceil(info.duration / length - SHORTEST_WINDOW))
    for k in range(count):
        # The last window takes a rest that is too short to stand alone.
        end = (k + 1) * length if k + 1 < count else info.duration
        yield _Window(clip, k * length, end, None, has_video, has_audio)


def _tell_what_is_cut(windows: Sequence[_Window], heard: float) -> None:
    """Warn of clips whose sound goes on after what the model hears of it; no window of a timeline does."""
    longer = [window for window in windows if window.has_audio and window.start is None and (window.end or 0) > heard]
    if longer:
        others = f" and {len(longer) - 1} more" if len(longer) > 1 else ""
        warnings.warn(
            f"{longer[0].clip}{others}: this model hears the first {heard:g} s of the sound (audio.max_seconds); "
            "timeline goes over long clips in windows.",
            stacklevel=3,
        )


def _decode(model: DeepMSI, window: _Window, tolerant: bool) -> _Item:
    """Decode one window. In a timeline a stream may end before the recording: what is left decides."""
    from deepmsi.data.decode import decode_frames, decode_pcm
    from deepmsi.data.face import shared_detector
    from deepmsi.data.geometry import scale
    from deepmsi.data.media import EmptyCutError
    from deepmsi.data.store import as_waveform

    vision, audio = model.config.vision, model.config.audio
    # The end of a whole clip is left to the decoder: a duration in a header is not always the last frame's.
    cut = (None, None) if window.start is None else (window.start, window.end)
    errors: list[UserError] = []

    def attempt(decode: Callable[[], np.ndarray]) -> np.ndarray | None:
        try:
            return decode()
        except UserError as error:
            errors.append(error)
            return None

    frames = waveform = None
    clip = window.clip
    if clip is None:
        return _Item(window, None, None)
    if window.has_video:
        face = vision.face and shared_detector(vision.face_model)  # missing for one, missing for all

        def cut_frames() -> np.ndarray:
            size = vision.stored_size or vision.image_size
            start, end = cut
            frames = decode_frames(
                clip, vision.frames, start=start, end=end, size=size, resize=vision.resize, face=face
            )
            return scale(frames, vision.image_size)

        frames = attempt(cut_frames)
    if window.has_audio:
        waveform = attempt(
            lambda: as_waveform(decode_pcm(clip, start=cut[0], end=cut[1], sample_rate=audio.sample_rate))
        )
    damaged = [error for error in errors if not isinstance(error, EmptyCutError)]
    if (errors and not tolerant) or (damaged and frames is None and waveform is None):
        raise (damaged or errors)[0]
    return _Item(window, frames, waveform)


class _Encoders:
    """Turns texts and waveforms into the model's inputs: its own encoders, or those its features came from."""

    def __init__(self, model: DeepMSI, has_text: bool, has_clip: bool) -> None:
        self.model = model
        self.features: dict[str, tuple[nn.Module, Any]] = {}
        for name, given in (("text", has_text), ("audio", has_clip)):
            section = getattr(model.config, name)
            if section.encoder != "features" or not given:
                continue
            if section.features_from is not None:
                module, processor = build_feature_encoder(name, section.features_from, model.config.audio.sample_rate)
                self.features[name] = module.to(_device(model)), processor
            elif name == "text":
                raise UserError(
                    "this model reads text features, and its configuration does not say which encoder computed "
                    "them (text.features_from): it cannot read a text, so leave it out."
                )
            else:
                warnings.warn(
                    "this model reads audio features, and its configuration does not say which encoder computed "
                    "them (audio.features_from): sound is treated as missing.",
                    stacklevel=3,
                )

    def inputs(self, name: str, contents: list[Any]) -> dict[str, Tensor] | None:
        """The model's arguments for one modality; None where it cannot be read."""
        device = _device(self.model)
        if name in self.features:
            module, processor = self.features[name]
            batch = {key: value.to(device) for key, value in processor(contents).items()}
            return {f"{name}_features": module(**batch)}
        processor = getattr(self.model, f"{name}_processor")
        if processor is None:
            return None
        return {key: value.to(device) for key, value in processor(contents).items()}


def _device(model: DeepMSI) -> torch.device:
    return next(model.parameters()).device


def _run(model: DeepMSI, encoders: _Encoders, items: Sequence[_Item]) -> list[Prediction]:
    """One forward pass."""
    mask = torch.tensor([item.present for item in items])
    inputs: dict[str, Tensor] = {}
    frames = [item.frames for item in items if item.frames is not None]
    if frames:
        inputs["pixel_values"] = torch.from_numpy(np.stack(frames)).to(_device(model))
    silence = np.zeros(1, dtype=np.float32)
    for column, name, contents in (
        (1, "text", [item.window.text or "" for item in items]),
        (2, "audio", [silence if item.waveform is None else item.waveform for item in items]),
    ):
        batch = encoders.inputs(name, contents) if mask[:, column].any() else None
        if batch is None:
            mask[:, column] = False
        else:
            inputs |= batch
    logits = model(modality_mask=mask, **inputs).logits.cpu()
    for item, row in zip(items, logits, strict=True):
        if not row.isfinite().all():
            raise UserError(f"{item.window.name}: the model's logits are not finite, so there is no prediction.")
    predictions = []
    for item, row, p in zip(items, mask.tolist(), logits.double().softmax(1).tolist(), strict=True):
        probabilities = dict(zip(model.config.names, p, strict=True)) if any(row) else {}
        label = max(probabilities, key=probabilities.__getitem__, default=None)
        present = tuple(name for name, there in zip(MODALITIES, row, strict=True) if there)
        window = item.window
        place = (window.start or 0.0, window.end)
        predictions.append(Prediction(window.clip, label, probabilities, *place, present, window.text))
    return predictions
