"""Opens media files: which stream is meant, what the file says of itself, one sentence for each failure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av

from deepmsi.errors import UserError

StreamType = Literal["video", "audio"]

# How Matroska and WebM begin, and the part that holds all their content.
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
# The parts of WAV and AVI that hold the content, and the lengths of it that tell nothing: writers that could not go
# back to fill it in left 0, 2 GiB less a few, or the most there is.
_CONTENT = {b"data": b"", b"LIST": b"movi"}
_OPEN = (range(1), range(0x7FFF0000, 0x80000000), range(0xFFFF0000, 0x100000000))
# Containers whose header states the exact length of their sound or none, and the seconds at its end that are no loss.
# AIFF is none of them: who writes it into a pipe states 2 GiB less a few.
_EXACT, _TAIL = ("flac", "au"), Fraction(1, 10)
# Containers whose headers state how long each stream is; of others FFmpeg takes it from the last stamps or reckons it.
_STATED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flac", "mp3")
# Pixels further from a square are a damaged header's: lenses and formats squeeze by 2 at most.
_NARROWEST, _WIDEST = Fraction(1, 4), Fraction(4)


class NoStreamError(UserError):
    """The file can be read and has no stream of the kind asked for."""


class EmptyCutError(UserError):
    """The stream can be read, and nothing of it lies in the cut."""


@dataclass(frozen=True)
class MediaInfo:
    """What a media file says of itself; nothing is decoded.

    Attributes:
        format: FFmpeg's name of the container.
        duration: seconds, or None where the file does not say.
        width, height: pixels as stored (not made square, not rotated) of the chosen video stream, or None.
        frame_rate: mean frames per second of it, or None.
        sample_rate, channels: of the chosen audio stream, or None.
        video_streams, audio_streams: how many there are; cover pictures do not count.
    """

    path: Path
    format: str
    duration: float | None
    width: int | None
    height: int | None
    frame_rate: float | None
    sample_rate: int | None
    channels: int | None
    video_streams: int
    audio_streams: int

    @property
    def has_video(self) -> bool:
        """Whether a video stream is there."""
        return self.video_streams > 0

    @property
    def has_audio(self) -> bool:
        """Whether an audio stream is there."""
        return self.audio_streams > 0


def probe(path: str | os.PathLike[str]) -> MediaInfo:
    """Read a file's headers.

    Raises:
        UserError: missing, empty, truncated, or not a media file.
    """
    path = Path(path)
    with open_media(path) as container:
        video, audio = streams_of(container, "video"), streams_of(container, "audio")
        duration = None if container.duration is None else container.duration / 1e6
        check_end(path, container)
        if duration is None and (video or audio):
            chosen = (video or audio)[0]
            duration = float(chosen.duration * chosen.time_base) if chosen.duration else None
        return MediaInfo(
            path=path,
            format=container.format.name,
            duration=duration,
            width=video[0].codec_context.width if video else None,
            height=video[0].codec_context.height if video else None,
            frame_rate=float(video[0].average_rate) if video and video[0].average_rate else None,
            sample_rate=audio[0].codec_context.sample_rate if audio else None,
            channels=audio[0].codec_context.channels if audio else None,
            video_streams=len(video),
            audio_streams=len(audio),
        )


_PYAV = int(av.__version__.split(".")[0])
# Titles in another code page are no reason to refuse a clip; from version 19 on PyAV thinks so, too.
_ANY_TITLE: dict[str, Any] = {"metadata_errors": "replace"} if _PYAV < 19 else {}
# From version 17 on PyAV starts a thread for every core to convert a picture, which takes longer than a small one does.
ONE_THREAD: dict[str, Any] = {"threads": 1} if _PYAV >= 17 else {}


@contextmanager
def open_media(path: Path) -> Iterator[Any]:
    """Open a local file for demuxing; FFmpeg's errors inside the block leave as UserError."""
    check_file(path)
    try:
        # A playlist in a media file's clothes must not reach the network: local files only.
        with av.open(
            f"file:{path.absolute()}",
            # Not `options`, which are for the streams, too: before PyAV 17.1 that crashes where these show up late.
            container_options={"protocol_whitelist": "file"},
            **_ANY_TITLE,
        ) as container:
            if not len(container.streams):
                raise UserError(f"{path}: the file has no streams, neither video nor audio")
            yield container
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: FFmpeg cannot read this as a media file ({error.strerror or error})") from error


def check_file(path: Path) -> None:
    """Raise UserError where ``path`` is missing, empty, unreadable or visibly truncated."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: this is a folder, not a media file")
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{path}: the file is empty")
        part = _broken_part(path, size)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error.strerror})") from error
    if part:
        raise UserError(f"{path}: the file is truncated, it ends inside its {part!r} part; copy it again")


def check_end(path: Path, container: Any) -> None:
    """Raise UserError where the sound ends before the length that the file states: FFmpeg reads as far as it goes.

    A piece of a FLAC file that FFmpeg copied (``-c copy``) states the length of the whole, and nothing else tells it
    from a truncated file. The container stays where it is: the file is opened anew, where its format states an exact
    length.
    """
    if container.format.name not in _EXACT:
        return
    with open_media(path) as own:
        stream = own.streams.audio[0]
        if not stream.duration:  # written in one go, when the length was not known
            return
        second = int(1 / stream.time_base)
        with suppress(av.error.FFmpegError):  # then all of it is gone through
            own.seek(max(0, stream.duration - second), stream=stream)
        end = 0
        with suppress(av.error.FFmpegError):
            for packet in own.demux(stream):
                if packet.size and packet.pts is not None:
                    end = max(end, packet.pts + (packet.duration or 0))
        if end < stream.duration - _TAIL * second:
            stated = float(stream.duration * stream.time_base)
            raise UserError(
                f"{path}: the file is truncated, it ends before the {stated:.2f} s that it states; copy it again, or, "
                "where it was cut out of another one without being encoded anew, encode it"
            )


def stated_span(container: Any, stream: Any) -> tuple[Fraction, Fraction] | None:
    """Seconds from the file's beginning at which a stream begins and ends by the headers; None where none states it."""
    form, origin = container.format.name, origin_of(container)
    if form == "avi" and stream.type == "audio":  # FFmpeg's writer counts the silence before it, too
        return None
    # The header that states the length of MP3 states the encoder's delay, too; without it FFmpeg goes by the bit rate.
    if form not in _STATED or (form == "mp3" and not stream.start_time):
        return None
    begin = (stream.start_time or 0) * stream.time_base - origin
    if form != "matroska,webm":
        return (begin, begin + stream.duration * stream.time_base) if stream.duration else None
    # Matroska states the length of the whole; writers add that of each stream as a tag, and some copy an older one.
    clocks = [text.split(":") for name, text in stream.metadata.items() if name.startswith("DURATION")]
    try:
        ends = [int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds) for hours, minutes, seconds in clocks]
    except (ValueError, ZeroDivisionError):
        return None
    if not ends or not container.duration:
        return None
    return begin, min(*ends, Fraction(container.duration, 1_000_000)) - origin


def streams_of(container: Any, kind: StreamType) -> list[Any]:
    """Streams of one kind that have a decoder: those flagged default first, cover pictures left out."""
    streams = [s for s in container.streams if s.type == kind and s.codec_context is not None]
    if kind == "video":
        streams = [s for s in streams if not s.disposition & av.stream.Disposition.attached_pic]
    return sorted(streams, key=lambda s: not s.disposition & av.stream.Disposition.default)


def pixel_aspect_of(stream: Any) -> Fraction:
    """Width over height of a video stream's pixels; 1 where it tells nothing that can be."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if _NARROWEST <= aspect <= _WIDEST else Fraction(1)


def origin_of(container: Any) -> Fraction:
    """Seconds on the container's clock at which the file begins; priming before zero is no beginning."""
    return max(Fraction(container.start_time or 0, 1_000_000), Fraction(0))


def as_seconds(value: float) -> Fraction:
    """A time as the decimal that was meant: 0.2 is 1/5, so that it meets the stamp of a frame at 1/5."""
    return Fraction(value).limit_denominator(1_000_000)


def _broken_part(path: Path, size: int) -> str | None:
    """Name the part of an MP4, QuickTime, Matroska, WAV or AVI file that runs past the end, if one does."""
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(_EBML):
            return _broken_segment(file, size)
        if head.startswith(b"RIFF"):
            return _broken_chunk(file, size)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"styp", b"wide", b"skip", b"free"):
            return _broken_box(file, size)
    return None


def _broken_box(file: BinaryIO, size: int) -> str | None:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length == 0:  # "to the end of the file"
            return None
        if length < 8 or not kind.isascii():  # bytes after the last box, which players ignore
            return None
        if at + length > size:
            return kind.decode("ascii", "replace")
        at += length
    return None


def _broken_segment(file: BinaryIO, size: int) -> str | None:
    """FFmpeg reads a Matroska file as far as it goes, and takes its length from a header that tells of the whole."""
    file.seek(len(_EBML))
    header = _ebml_length(file)
    if header is None:
        return None
    file.seek(header, os.SEEK_CUR)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return None
    length = _ebml_length(file)
    return "Segment" if length is not None and file.tell() + length > size else None


def _broken_chunk(file: BinaryIO, size: int) -> str | None:
    """FFmpeg reads WAV and AVI as far as they go; a length that counts the 44 bytes of WAV's header in is no cut."""
    at = 12
    while at + 8 <= size:
        file.seek(at)
        head = file.read(12)
        kind, length = head[:4], int.from_bytes(head[4:8], "little")
        at += 8
        if min(kind) < 32:
            return None  # no name, as where a file is filled up with zeros: that is FFmpeg's to tell
        if kind == b"RIFF":  # an AVI file goes on in another one, GiB by GiB
            at += 4
            continue
        if kind in _CONTENT and head[8:].startswith(_CONTENT[kind]):
            if any(length in lengths for lengths in _OPEN):
                return None
            if at + length > size + 44:
                return (_CONTENT[kind] or kind).decode()
        at += length + length % 2
    return None


def _ebml_length(file: BinaryIO) -> int | None:
    """Read the length of a part, whose first byte tells how many it has; None where a stream left it open."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    width = 9 - first[0].bit_length()
    most = (1 << 7 * width) - 1
    length = int.from_bytes(first + file.read(width - 1), "big") & most
    return None if length == most else length
