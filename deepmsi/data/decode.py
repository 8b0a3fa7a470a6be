"""Decodes clips: frames at even times by presentation time, sound to mono; no file is held whole."""

import heapq
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from deepmsi.data import geometry
from deepmsi.data.face import FaceDetector, shared_detector
from deepmsi.data.manifest import Side
from deepmsi.data.media import (
    EmptyCutError,
    NoStreamError,
    StreamType,
    as_seconds,
    check_end,
    open_media,
    origin_of,
    pixel_aspect_of,
    stated_span,
    streams_of,
)
from deepmsi.errors import UserError
from deepmsi.models.config import Resize

# Decoders need to run in: Opus 80 ms, MP3 its bit reservoir, AAC one block. Seeks land this much before.
_RUN_IN = Fraction(1)
# Stamps of sound jitter by a few ms in many files; only a larger step is a gap.
_GAP = 0.05
# Frames that H.264 and HEVC may hold back at most.
_REORDERED = 16
# The share of what a header states that is enough, and the seconds that may be missing of a short one.
_ENOUGH, _FEW = Fraction(4, 5), Fraction(1, 2)

Tell = Callable[[str], object]


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


class _Span(NamedTuple):
    """The first and the last presentation time of a cut, in the stream's time base."""

    first: int
    last: int


def decode_frames(
    path: str | os.PathLike[str],
    count: int,
    *,
    start: float | None = None,
    end: float | None = None,
    side: Side | None = None,
    size: int = 256,
    resize: Resize = "crop",
    face: FaceDetector | bool = False,
    tell: Tell = _warn,
) -> np.ndarray:
    """Decode ``count`` frames spread evenly over a clip or a cut of it.

    t_k = t_first + (k + ½)(t_last - t_first)/count for k = 0..count-1, each the frame with the greatest
    presentation time ≤ t_k; t_first and t_last are the presentation times of the first and the last
    frame in [start, end). A clip with fewer frames repeats them; a cut that lies between two frames shows the
    one on screen. Pixels are made square and rotation is applied, then ``side``, then the face crop, then ``resize``.

    Args:
        path: the media file; of several video streams the default one, or the first that decodes.
        count: frames wanted, at least 1.
        start, end: seconds from the beginning of the file; None is its beginning, its end.
        side: keep the left or the right half of the picture.
        size: edge of the result in pixels.
        resize: "crop" (short edge to size, centre), "squash" or "pad".
        face: True, or a detector, to crop to the face; a clip in which no face is found keeps its picture.
        tell: is given a sentence where much of what the file states does not decode; the frames are of the rest.

    Returns:
        ``[count, 3, size, size]`` uint8, RGB.

    Raises:
        NoStreamError: the file has no video.
        EmptyCutError: nothing is left in the cut.
        UserError: the file cannot be read.
    """
    if count < 1:
        raise ValueError(f"count is {count}; at least one frame must be asked for")
    path = Path(path)
    detector = shared_detector() if face is True else face or None
    if detector is None:

        def convert(aspect: Fraction, frame: Any) -> np.ndarray:
            return geometry.fit(geometry.half(geometry.to_rgb(frame, aspect), side), size, resize)

        return np.stack(_pick_frames(path, count, start, end, convert, tell))

    def prepare(aspect: Fraction, frame: Any) -> np.ndarray:
        return geometry.half(geometry.to_rgb(frame, aspect), side)

    pictures = _pick_frames(path, count, start, end, prepare, tell)
    box = detector.box(pictures)
    return np.stack([geometry.fit(geometry.crop(picture, box), size, resize) for picture in pictures])


def decode_audio(
    path: str | os.PathLike[str],
    *,
    start: float | None = None,
    end: float | None = None,
    sample_rate: int = 16000,
    stream: int | None = None,
    tell: Tell = _warn,
) -> np.ndarray:
    """Decode sound to mono at ``sample_rate``, cut by presentation time.

    Channels are averaged. Encoder priming (samples before the file's beginning) is left out, gaps between
    stamps are closed.

    Args:
        path: the media file.
        start, end: seconds from the beginning of the file; None is its beginning, its end.
        sample_rate: samples per second of the result.
        stream: index of the stream in its file; None is the default audio stream, or the first that decodes.
        tell: is given a sentence where much of what the file states does not decode; the sound is the rest.

    Returns:
        ``[n]`` float32, full scale ±1.

    Raises:
        NoStreamError: the file has no audio, or ``stream`` is none.
        EmptyCutError: nothing is left in the cut.
        UserError: the file cannot be read.
    """
    path = Path(path)

    def decode(container: Any, chosen: Any) -> np.ndarray:
        check_end(path, container)
        try:
            sound = _sound(container, chosen, path, start, end, sample_rate, start)
        except _SeekTooFarError:
            with open_media(path) as again:
                sound = _sound(again, again.streams[chosen.index], path, start, end, sample_rate, None)
        if len(sound):
            _tell_of_less(tell, path, container, chosen, start, end, Fraction(len(sound), sample_rate))
        return sound

    sound = _first_success(path, "audio", decode, stream)
    if len(sound) == 0:
        raise EmptyCutError(f"{path}: there is no sound {_between(start, end)}")
    return sound


def decode_pcm(
    path: str | os.PathLike[str],
    *,
    start: float | None = None,
    end: float | None = None,
    sample_rate: int = 16000,
    tell: Tell = _warn,
) -> np.ndarray:
    """Decode sound by ``decode_audio`` as prepared folders store it: clipped to full scale and rounded.

    Returns:
        ``[n]`` int16; ``store.as_waveform`` makes a waveform of it.

    Raises:
        UserError: as ``decode_audio``, and where a sample is NaN or infinite.
    """
    sound = decode_audio(path, start=start, end=end, sample_rate=sample_rate, tell=tell)
    _check_finite(path, sound)
    return np.rint(np.clip(sound, -1, 32767 / 32768) * 32768).astype(np.int16)


def try_decoding(path: str | os.PathLike[str], kind: StreamType) -> None:
    """Decode the first frame of ``kind`` ("video" or "audio") and drop it.

    Raises:
        NoStreamError: the file has no such stream.
        UserError: the file cannot be read, nothing in it decodes, or the first samples are not numbers.
    """
    path = Path(path)

    def decode(container: Any, stream: Any) -> None:
        frame = next(_decoded(container, stream), None)
        if frame is None:
            raise UserError(f"{path}: not one {kind} frame can be decoded")
        # Samples that were never encoded can be such, and are packed; PyAV crashes on the eight planes of encoded 7.1.
        if kind == "audio" and frame.format.is_packed:
            _check_finite(path, frame.to_ndarray())

    _first_success(path, kind, decode)


def _check_finite(path: str | os.PathLike[str], sound: np.ndarray) -> None:
    if not np.isfinite(sound).all():
        raise UserError(f"{path}: the sound holds samples that are not numbers")


def _first_success(path: Path, kind: StreamType, attempt: Callable[[Any, Any], Any], only: int | None = None) -> Any:
    """What ``attempt(container, stream)`` gives for the first stream of a kind for which it raises no UserError.

    Each attempt has a container of its own, at its beginning, which also lists the streams: the headers of a
    recording of hours take longer to read than a window of it.

    Args:
        path: the media file.
        kind: of the streams.
        attempt: given an open container and one of its streams.
        only: index of the one stream to try; None tries all.

    Raises:
        NoStreamError: there is none.
        UserError: all raise; the first one's error.
    """
    errors: list[UserError] = []
    count = 1
    while len(errors) < count:
        try:
            with open_media(path) as container:
                there = streams_of(container, kind)
                streams = [s for s in there if only in (None, s.index)]
                count = len(streams)
                if not streams and only is not None:
                    those = [s.index for s in there] or "none"
                    raise NoStreamError(f"{path}: stream {only} is no {kind} stream (those are {those})")
                if not streams:
                    raise NoStreamError(f"{path}: the file has no {kind} stream")
                return attempt(container, streams[len(errors)])
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _between(start: float | None, end: float | None) -> str:
    if start is None and end is None:
        return "in it"
    return f"from {start or 0:g} s to {'its end' if end is None else f'{end:g} s'}"


def _tell_of_less(
    tell: Tell, path: Path, container: Any, stream: Any, start: float | None, end: float | None, there: Fraction
) -> None:
    """Tell where much less of a cut decoded than the headers state: FFmpeg passes over what it cannot read."""
    stated = stated_span(container, stream)
    if stated is None:
        return
    until = stated[1] if end is None else min(stated[1], as_seconds(end))
    wanted = until - max(stated[0], as_seconds(start or 0))
    if there < _ENOUGH * wanted and there < wanted - _FEW:
        what = "sound" if stream.type == "audio" else "video"
        tell(
            f"{path}: there are {float(there):.2f} s of {what} {_between(start, end)}, and the header states "
            f"{float(wanted):.2f} s; the file is damaged or has gaps, copy it again"
        )


def _pick_frames(
    path: Path,
    count: int,
    start: float | None,
    end: float | None,
    convert: Callable[[Fraction, Any], np.ndarray],
    tell: Tell,
) -> list[np.ndarray]:
    def pick(container: Any, stream: Any) -> list[np.ndarray]:
        shown = partial(convert, pixel_aspect_of(stream))
        return _FramePicker(path, stream.index, count, start, end, shown, tell).pick(container)

    return _first_success(path, "video", pick)


class _SeekTooFarError(Exception):
    """A seek landed after the place it was meant to reach."""


class _FramePicker:
    """Finds the frames of t_0..t_{T-1} in one stream without holding the others.

    The times depend on the last frame's stamp, which is known only after decoding. So the stamps of the
    packets serve as a guess, which the decoding pass confirms; where it does not (frames that do not decode,
    containers without stamps), the pass is repeated with what it saw.
    """

    def __init__(
        self,
        path: Path,
        index: int,
        count: int,
        start: float | None,
        end: float | None,
        convert: Callable[[Any], np.ndarray],
        tell: Tell,
    ) -> None:
        self.path, self.index, self.count, self.convert, self.tell = path, index, count, convert, tell
        self.start, self.end = start, end
        self.around = False, False  # whether there are frames before the cut, and after it
        self.packets: tuple[int, _Span] | None = None  # how many the cut has, and from where to where, if stamps tell

    def pick(self, container: Any) -> list[np.ndarray]:
        guess = self._span_of_packets(container)
        for _ in range(3):
            try:
                span, pictures = self._pass(guess, self.start)
            except _SeekTooFarError:
                span, pictures = self._pass(guess, None)
            if span == guess:
                return pictures
            guess = span
        raise UserError(f"{self.path}: each pass over the video sees other frames; the file is damaged")

    def _span_of_packets(self, container: Any) -> _Span | None:
        """Guess the span from the stamps of packets alone; None where they do not tell."""
        stream = container.streams[self.index]
        low, high = _window(container, stream, self.start, self.end)
        try:
            _seek(container, stream, self.start)
        except _SeekTooFarError:
            return None
        first = last = None
        count = 0
        for packet in _packets(container, stream):
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None:
                return None
            if low <= packet.pts < high:
                count += 1
                first = packet.pts if first is None else min(first, packet.pts)
                last = packet.pts if last is None else max(last, packet.pts)
            if packet.dts is not None and packet.dts >= high:
                break
        if first is None or last is None:
            return None
        self.packets = count, _Span(first, last)
        return self.packets[1]

    def _pass(self, span: _Span | None, seek_to: float | None) -> tuple[_Span, list[np.ndarray]]:
        """Decode the cut once: the span that was seen, and the pictures for the span that was given."""
        pictures: list[np.ndarray] = []
        with open_media(self.path) as container:
            stream = container.streams[self.index]
            low, high = _window(container, stream, self.start, self.end)
            jumped = _seek(container, stream, seek_to)
            first, shown_at, shown_for, shown, decoded = None, 0, 0, None, 0
            for stamp, frame in self._cut(_stamped(container, stream), low, high, jumped):
                if first is None:
                    first = stamp
                elif span is not None:
                    self._show(shown, stamp, span, pictures)
                shown_at, shown_for, shown, decoded = stamp, frame.duration or 0, frame, decoded + 1
            if first is None:
                raise EmptyCutError(f"{self.path}: there are no frames {_between(self.start, self.end)}")
            if span is not None:
                self._show(shown, math.inf, span, pictures)
            if span == (first, shown_at):  # the last pass
                earlier, later = self.around
                until = high if later else shown_at + max(shown_for, _step(stream))
                seconds = Fraction(until - (low if earlier else first)) * stream.time_base
                count, packed = self.packets or (0, span)
                if decoded < count:  # between the first and the last, too, some may not decode
                    held = Fraction(packed.last - packed.first + _step(stream)) * stream.time_base
                    seconds = min(seconds, held * Fraction(decoded, count))
                _tell_of_less(self.tell, self.path, container, stream, self.start, self.end, seconds)
            return _Span(first, shown_at), pictures

    def _cut(self, frames: Iterator[tuple[int, Any]], low: int, high: float, jumped: bool) -> Iterator[tuple[int, Any]]:
        """Frames with low ≤ stamp < high; where there is none, the one on screen at ``low``."""
        before: tuple[int, Any] | None = None
        some = ended = False
        for stamp, frame in frames:
            if stamp > low and jumped and before is None and not some:
                raise _SeekTooFarError
            if stamp >= high:
                ended = True
                break
            if stamp >= low:
                some = True
                yield stamp, frame
            else:
                before = stamp, frame
        self.around = before is not None, ended
        if before is None and not some and not ended:
            if jumped:
                raise _SeekTooFarError
            raise UserError(f"{self.path}: not one video frame can be decoded")
        if before is not None and not some and (ended or before[0] + (before[1].duration or 0) > low):
            yield before

    def _show(self, frame: Any, until: float, span: _Span, pictures: list[np.ndarray]) -> None:
        """Append ``frame`` once for each next t_k < ``until``."""
        picture = None
        while len(pictures) < self.count:
            # In integers: 2T·t_k = 2T·first + (2k + 1)(last - first).
            k, scale = len(pictures), 2 * self.count
            if scale * span.first + (2 * k + 1) * (span.last - span.first) >= scale * until:
                return
            if picture is None:
                picture = self.convert(frame)
            pictures.append(picture)


def _window(container: Any, stream: Any, start: float | None, end: float | None) -> tuple[int, float]:
    """First stamp inside the cut and first stamp after it, in the stream's time base."""
    origin, base = origin_of(container), stream.time_base
    low = -(1 << 62) if start is None else math.ceil((as_seconds(start) + origin) / base)
    high = math.inf if end is None else math.ceil((as_seconds(end) + origin) / base)
    return low, high


def _seek(container: Any, stream: Any, start: float | None) -> bool:
    """Go to a point from which decoding reaches ``start``; False where the beginning is near enough."""
    if start is None or start <= 2 * _RUN_IN:
        return False
    target = as_seconds(start) + origin_of(container) - _RUN_IN
    try:
        container.seek(int(target / stream.time_base), stream=stream)
    except av.error.FFmpegError as error:
        raise _SeekTooFarError from error
    return True


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets of a stream, and the empty one that flushes its decoder, up to the first unreadable byte."""
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        return


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames in presentation order; packets that do not decode are passed over."""
    # Clips are decoded in parallel processes; threads inside one would only compete.
    stream.codec_context.thread_count = 1
    for packet in _packets(container, stream):
        try:
            frames = packet.decode()
        except (av.error.FFmpegError, ValueError):  # ValueError: no decoder knows the codec (PyAV 19)
            continue
        yield from frames


def _in_order(container: Any, stream: Any) -> Iterator[tuple[int | None, Any]]:
    """Frames in presentation order, and their stamps in rising order.

    AVI stores no presentation times, and FFmpeg gives packets those of their order in the file. For codecs whose
    reordering it does not know, frames that are shown later then carry the stamps of earlier ones.
    """
    guessed = container.format.name == "avi" and stream.codec_context.name in ("h264", "hevc")
    depth = _REORDERED if guessed else 0
    waiting: deque[Any] = deque()
    stamps: list[int] = []

    def first() -> tuple[int | None, Any]:
        frame = waiting.popleft()
        return None if frame.pts is None else heapq.heappop(stamps), frame

    for frame in _decoded(container, stream):
        waiting.append(frame)
        if frame.pts is not None:
            heapq.heappush(stamps, frame.pts)
        if len(waiting) > depth:
            yield first()
    while waiting:
        yield first()


def _stamped(container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """Frames with stamps that never fall; a frame without one follows its neighbour at the mean rate."""
    step = _step(stream)
    previous: int | None = None
    for stamp, frame in _in_order(container, stream):
        if stamp is None:
            stamp = 0 if previous is None else previous + step
        if previous is None or stamp >= previous:
            previous = stamp
            yield stamp, frame


def _step(stream: Any) -> int:
    """From one frame to the next at the mean rate, in the stream's time base."""
    return max(1, round(1 / (stream.average_rate or 25) / stream.time_base))


def _sound(
    container: Any,
    stream: Any,
    path: Path,
    start: float | None,
    end: float | None,
    sample_rate: int,
    seek_to: float | None,
) -> np.ndarray:
    """Decode one stream run by run; a run is sound without a gap or a change of format."""
    jumped = _seek(container, stream, seek_to)
    origin = origin_of(container)
    low = origin + as_seconds(start or 0)
    high = None if end is None else origin + as_seconds(end)
    pieces: list[np.ndarray] = []
    run: _Run | None = None
    for frame in _decoded(container, stream):
        if frame.samples == 0:
            continue
        base = frame.time_base or stream.time_base
        at = None if frame.pts is None else frame.pts * base
        if run is None and jumped and (at is None or at > low):
            raise _SeekTooFarError
        if run is None or not run.continues(frame, at):
            if run is not None:
                pieces += run.finish()
            begin = at if at is not None else (run.until if run is not None else origin)
            run = _Run(frame, begin, low, high, sample_rate)
        pieces += run.feed(frame)
        if high is not None and run.until >= high:
            break
    if run is None:
        if jumped:
            raise _SeekTooFarError
        raise UserError(f"{path}: not one audio frame can be decoded")
    pieces += run.finish()
    return np.concatenate(pieces) if pieces else np.empty(0, np.float32)


class _Run:
    """Resamples consecutive frames and keeps what lies in [low, high)."""

    def __init__(self, frame: Any, begin: Fraction, low: Fraction, high: Fraction | None, sample_rate: int) -> None:
        self.format = _audio_format(frame)
        self.until = begin
        self.rate = frame.sample_rate
        # The channels are averaged afterwards: FFmpeg's own mixing to mono lifts equal channels by √2.
        # Packed, for PyAV crashes where it makes an array of the eight planes of 7.1.
        self.resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=sample_rate)
        self.position = 0  # output samples so far
        self.low = max(0, round((low - begin) * sample_rate))
        self.high = None if high is None else max(0, round((high - begin) * sample_rate))

    def continues(self, frame: Any, at: Fraction | None) -> bool:
        return _audio_format(frame) == self.format and (at is None or abs(float(at - self.until)) <= _GAP)

    def feed(self, frame: Any) -> list[np.ndarray]:
        self.until += Fraction(frame.samples, self.rate)
        frame.pts = None
        return self._keep(self.resampler.resample(frame))

    def finish(self) -> list[np.ndarray]:
        return self._keep(self.resampler.resample(None))

    def _keep(self, frames: Sequence[Any]) -> list[np.ndarray]:
        kept = []
        for frame in frames:
            samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels).mean(axis=1, dtype=np.float32)
            begin = max(0, self.low - self.position)
            stop = len(samples) if self.high is None else max(0, self.high - self.position)
            self.position += len(samples)
            if begin < min(stop, len(samples)):
                kept.append(samples[begin:stop])
        return kept


def _audio_format(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate
