"""Small media files, made as the tests need them: every frame's grey level tells its number."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

LEVEL = 10
"""Grey levels from one frame to the next; frame k is as bright as LEVEL * (k + 1)."""


def write_clip(
    path: Path,
    times: Sequence[int] = tuple(range(0, 2000, 100)),
    *,
    size: tuple[int, int] = (64, 48),
    sound: float | None = None,
    rate: int = 44100,
    channels: int = 2,
    paint: Callable[[int], np.ndarray] | None = None,
    codec: str = "libx264",
    gop: int = 12,
) -> Path:
    """Write frames at ``times`` (milliseconds) and ``sound`` seconds of a tone that is 0.1 louder every second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w") as container:
        video = None
        if times:
            video = container.add_stream(codec, rate=1000)
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            video.codec_context.time_base = Fraction(1, 1000)
            video.codec_context.gop_size = gop
            if codec == "libx264":
                video.options = {"crf": "4", "preset": "ultrafast"}
        audio = None
        if sound is not None:
            name = {".flac": "flac", ".wav": "pcm_s16le", ".au": "pcm_s16be"}.get(path.suffix, "aac")
            audio = container.add_stream(name, rate=rate, layout="stereo" if channels == 2 else "mono")
        if video is not None:
            for k, time in enumerate(times):
                image = np.full((height, width, 3), LEVEL * (k + 1), np.uint8) if paint is None else paint(k)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio is not None and sound is not None:
            wave = tone(sound, rate)
            form = "s16" if audio.codec_context.format.name.startswith("s16") else "fltp"
            step = audio.codec_context.frame_size or 1024
            for at in range(0, len(wave), step):
                part = wave[at : at + step]
                if form == "s16":
                    data = np.repeat(np.rint(part * 32767).astype(np.int16), channels)[None]
                else:
                    data = np.repeat(part[None], channels, axis=0)
                block = av.AudioFrame.from_ndarray(data, format=form, layout="stereo" if channels == 2 else "mono")
                block.sample_rate, block.pts, block.time_base = rate, at, Fraction(1, rate)
                container.mux(audio.encode(block))
            container.mux(audio.encode(None))
    return path


def zero_content(clip: Path, begin: float, end: float) -> Path:
    """Zero what lies from one share of a file's content to another, as storage that fails leaves it."""
    data = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
    first, last = places[0][0], max(at + size for at, size in places)
    low, high = (first + round(share * (last - first)) for share in (begin, end))
    data[low:high] = bytes(high - low)
    clip.write_bytes(data)
    return clip


def tone(seconds: float, rate: int) -> np.ndarray:
    """A 440 Hz tone whose loudness tells the second: 0.1 in the first, 0.2 in the second, and so on."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.1 * (1 + np.floor(t)) * np.sin(2 * np.pi * 440 * t)).astype(np.float32)


def shown(frames: np.ndarray) -> list[int]:
    """The numbers of the frames in ``[T, 3, S, S]``, read from their grey."""
    return [round(float(frame.mean()) / LEVEL) - 1 for frame in frames]


@pytest.fixture
def clip_writer() -> Callable[..., Path]:
    return write_clip


@pytest.fixture
def content_zeroer() -> Callable[..., Path]:
    return zero_content


@pytest.fixture
def frame_numbers() -> Callable[[np.ndarray], list[int]]:
    return shown
