"""Live use: the frames of many streams, one at a time, with every frame's features computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepmsi.errors import UserError
from deepmsi.models.deepmsi import DeepMSI


class StreamOutput(NamedTuple):
    """What is known of every stream after its latest frame.

    Attributes:
        logits: `[B, K]`.
        video: video feature `[B, D]`, the TCN's last time step.
    """

    logits: Tensor
    video: Tensor


class EmotionStream:
    """Classify B streams after each of their frames.

    After every frame the logits equal those of the model on all frames of the stream since its first, under the text
    and sound that hold now. (Up to 15 frames that is the clip of training; later the network sees the last 29.) Each
    frame costs one pass of the backbone and one step of the TCN. What does not depend on text and sound is kept for the
    frames in sight, so that other words need the second half of the backbone only.

    Args:
        model: the model, which is put in eval mode and has to stay in it. What follows from its weights is computed
            here, for steps under the autocast, or without one, of now.
        streams: B.

    Raises:
        UserError: the model reads no video.
    """

    def __init__(self, model: DeepMSI, streams: int) -> None:
        if model.video is None:
            raise UserError("this model is configured without video: there are no frames to stream.")
        if streams < 1:
            raise UserError(f"streams is {streams}: give at least 1.")
        self.model, self.branch, self.streams = model.eval(), model.video, streams
        self.branch.fold()
        self.state = self.branch.tcn.init_state(streams)
        self.sight = self.branch.tcn.receptive_field
        self.seen = torch.zeros(streams, dtype=torch.long, device=self.state[0].device)
        """Frames of each stream so far."""
        self._stems: list[Tensor] = []
        self._video: Tensor | None = None
        self.hear()

    @torch.inference_mode()
    def hear(
        self,
        text_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
        modality_mask: Tensor | None = None,
    ) -> StreamOutput | None:
        """Take what is said in every stream from here on, by the arguments of `DeepMSI.forward`; None: not known.

        Returns:
            What is known now: the frames in sight are read again under the new guide. None before the first frame; a
            stream that was begun anew and has no frame yet is told by its words and sound alone.

        Raises:
            UserError: an input does not fit the model, or is not for all streams; or the model trains.
        """
        self._check_mode()
        rows, features, guide = self.model.semantics(
            self.streams,
            text_features=text_features,
            audio_features=audio_features,
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_values=input_values,
            audio_attention_mask=audio_attention_mask,
            modality_mask=modality_mask,
        )
        if rows != self.streams:
            raise UserError(f"text and sound of {rows} utterances were given for {self.streams} streams.")
        self._features, self._guide = features, guide
        if not self._stems:
            return None
        if self.branch.guide_dim is not None:
            self._read_again()
        assert self._video is not None
        return self._output(torch.where((self.seen > 0)[:, None], self._video, self.model.missing["video"]))

    @torch.inference_mode()
    def step(self, frames: Tensor) -> StreamOutput:
        """Feed the next frame of every stream.

        Args:
            frames: `[B, 3, S, S]`, uint8 or normalised float.

        Raises:
            UserError: the frames have another shape or dtype than the model reads, or the model trains.
        """
        self._check_mode()
        size = self.branch.image_size
        if frames.shape != (self.streams, 3, size, size):
            raise UserError(f"frames is {list(frames.shape)}: these streams take [{self.streams}, 3, {size}, {size}].")
        stem = self.branch.backbone.stem(frames, self.branch.normalize)
        # Without a compression nothing depends on the guide, and one frame's worth is enough to say that there was one.
        kept = self.sight if self.branch.guide_dim is not None else 1
        self._stems = [*self._stems[max(0, len(self._stems) + 1 - kept) :], stem]
        self._advance(stem)
        self.seen = self.seen + 1
        assert self._video is not None
        return self._output(self._video)

    @torch.inference_mode()
    def restart(self, streams: Sequence[int] | Tensor | None = None) -> None:
        """Begin some streams anew (default: all): their next frame is their first.

        Args:
            streams: their numbers, or a mask `[B]` bool; none of them is fine.

        Raises:
            UserError: there is no such stream.
        """
        every = torch.arange(self.streams, device=self.seen.device)
        chosen = every if streams is None else torch.as_tensor(streams, device=every.device)
        if chosen.dtype == torch.bool:
            fresh, known = chosen, chosen.shape == every.shape
        else:  # no indexing: it counts negative numbers from the end, and a GPU stops at large ones
            fresh, known = torch.isin(every, chosen), bool(torch.isin(chosen, every).all())
        if not known:
            raise UserError(f"restart: there is no such stream: {streams} of {self.streams} streams.")
        self.seen = self.seen.masked_fill(fresh, 0)
        self._forget(fresh)

    def _check_mode(self) -> None:
        if self.model.training:
            raise UserError("the model was put in training mode: make its streams anew when it is trained.")

    def _advance(self, stem: Tensor) -> None:
        features = self.branch.backbone.guided(stem, self._guide)
        self._video, self.state = self.branch.tcn.step(features, self.state)

    def _read_again(self) -> None:
        """Compute the state anew from the stems in sight, which are all that it depends on."""
        self.state = tuple(torch.zeros_like(part) for part in self.state)
        for back, stem in zip(range(len(self._stems), 0, -1), self._stems, strict=True):
            self._advance(stem)
            # A stream that began later has seen nothing yet.
            self._forget(self.seen < back)

    def _forget(self, streams: Tensor) -> None:
        """Set the state of the marked streams to that before their first frame."""
        self.state = tuple(part.masked_fill(streams[:, None, None], 0) for part in self.state)

    def _output(self, video: Tensor) -> StreamOutput:
        logits, _ = self.model.classify({"video": video, **self._features})
        return StreamOutput(logits, video)
