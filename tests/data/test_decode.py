"""Frames by presentation time, sound cut by presentation time, and one sentence for every bad file."""

import contextlib
import re
import struct
import sys
from fractions import Fraction
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import pytest

from deepmsi.data import geometry, media
from deepmsi.data.decode import decode_audio, decode_frames, try_decoding
from deepmsi.data.face import FaceDetector, shared_detector
from deepmsi.data.geometry import fit
from deepmsi.data.media import EmptyCutError, NoStreamError, probe
from deepmsi.errors import UserError


def expected(times, count):
    """t_k = t_first + (k + ½)(t_last - t_first)/T, each the last frame at or before it."""
    first, last = times[0], times[-1]
    at = [Fraction(first) + (k + Fraction(1, 2)) * Fraction(last - first, count) for k in range(count)]
    return [max(i for i, time in enumerate(times) if time <= t) for t in at]


CASES = {
    "even": list(range(0, 2000, 100)),
    "variable": [0, 20, 40, 400, 900, 910, 1300, 1990],
    "begins-late": [700, 800, 900, 1500],
    "one-frame": [0],
    "two-frames": [0, 1000],
}


@pytest.mark.parametrize("count", [1, 2, 7, 15, 40])
@pytest.mark.parametrize("times", CASES.values(), ids=CASES)
def test_frames_by_presentation_time(tmp_path, clip_writer, frame_numbers, times, count):
    clip = clip_writer(tmp_path / "a.mp4", times)
    frames = decode_frames(clip, count, size=16)
    assert frames.shape == (count, 3, 16, 16)
    assert frames.dtype == np.uint8
    assert frame_numbers(frames) == expected(times, count)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mpg"])
def test_containers(tmp_path, clip_writer, frame_numbers, suffix):
    if suffix == ".mpg":  # stands for containers in which not every packet has a time
        path = tmp_path / "a.mpg"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg1video", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for k in range(20):
                picture = np.full((48, 64, 3), 10 * (k + 1), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    else:
        codec = "mpeg4" if suffix == ".avi" else "libx264"
        path = clip_writer(tmp_path / f"a{suffix}", list(range(0, 2000, 100)), codec=codec)
    assert frame_numbers(decode_frames(path, 7, size=16)) == expected(list(range(20)), 7)


@pytest.mark.parametrize(("start", "end"), [(None, None), (0, 0.2), (2.4, 2.76), (2.8, None)])
def test_b_frames_in_avi(tmp_path, frame_numbers, start, end):
    """AVI stores no presentation times, and FFmpeg's guesses at them fall: a third of the frames was passed over."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4", "bf": "3", "b-adapt": "0", "g": "20"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(75):
            picture = np.full((48, 64, 3), 10 * (k % 24 + 1), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    low, high = round((start or 0) * 25), round((end or 4) * 25)
    there = [k for k in range(75) if low <= k + 1 < high]  # FFmpeg shows the first frame of such a file one step late
    shown = frame_numbers(decode_frames(path, len(there), start=start, end=end, size=16))
    assert shown == [there[i] % 24 for i in expected(there, len(there))]


@pytest.mark.parametrize(
    ("start", "end", "kept"),
    [
        (None, None, range(0, 90)),
        (0.5, None, range(5, 90)),
        (None, 1.0, range(0, 10)),
        (4.2, 7.1, range(42, 71)),  # far enough in for a seek
        (6.1, 6.2, range(61, 62)),
        (6.12, 6.18, range(61, 62)),  # between two frames: the one on screen
        (8.9, 20.0, range(89, 90)),
    ],
)
@pytest.mark.parametrize("gop", [5, 500])
def test_cut(tmp_path, clip_writer, start, end, kept, gop):
    times = list(range(0, 9000, 100))

    def paint(k):  # two digits, one in each half
        image = np.zeros((48, 64, 3), np.uint8)
        image[:, :32], image[:, 32:] = 20 * (k // 10) + 20, 20 * (k % 10) + 20
        return image

    clip = clip_writer(tmp_path / "a.mp4", times, paint=paint, gop=gop)
    tens = decode_frames(clip, 5, start=start, end=end, side="left", size=16)[:, :, 4:12, 4:12]
    ones = decode_frames(clip, 5, start=start, end=end, side="right", size=16)[:, :, 4:12, 4:12]
    got = [10 * (round(t.mean() / 20) - 1) + round(o.mean() / 20) - 1 for t, o in zip(tens, ones, strict=True)]
    assert got == [kept[i] for i in expected([times[k] for k in kept], 5)]


def rotated(path, matrix):
    """Write a display matrix into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and ids, layer to reserved
    old = struct.unpack(">9i", data[at : at + 36])
    assert old == (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    a, b, c, d = matrix
    one = 0x10000
    data[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 0x40000000)
    path.write_bytes(data)
    return path


# (a, b, c, d): the pixel at (x, y) is shown at (a·x + c·y, b·x + d·y). A bright quarter begins at top left.
ORIENTATIONS = {
    "upright": ((1, 0, 0, 1), (0, 0), (64, 48)),
    "clockwise": ((0, 1, -1, 0), (0, 1), (48, 64)),
    "upside-down": ((-1, 0, 0, -1), (1, 1), (64, 48)),
    "anticlockwise": ((0, -1, 1, 0), (1, 0), (48, 64)),
    "mirrored": ((-1, 0, 0, 1), (0, 1), (64, 48)),
    "transposed": ((0, 1, 1, 0), (0, 0), (48, 64)),
}


@pytest.mark.parametrize(("matrix", "corner", "shape"), ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_rotation_is_applied(tmp_path, clip_writer, matrix, corner, shape):
    def paint(k):
        image = np.full((48, 64, 3), 30, np.uint8)
        image[:24, :32] = 220
        image[:24, 32:, 0] = 130  # and a mark beside it, so that mirroring shows
        return image

    clip = clip_writer(tmp_path / "a.mp4", paint=paint)
    if matrix != (1, 0, 0, 1):
        rotated(clip, matrix)
    frame = decode_frames(clip, 1, size=64, resize="squash")[0].astype(int)
    quarters = frame[1].reshape(2, 32, 2, 32)[:, 8:24, :, 8:24].mean((1, 3))  # green: the mark is dark in it
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner
    red = frame[0].reshape(2, 32, 2, 32)[:, 8:24, :, 8:24].mean((1, 3))
    mark = np.unravel_index(np.abs(red - 130).argmin(), (2, 2))
    a, b, _, _ = matrix
    assert (mark[1] - corner[1], mark[0] - corner[0]) == (a, b), "the mark lies where x points to"
    padded = decode_frames(clip, 1, size=64, resize="pad")[0]
    rows, columns = (padded.max(0) > 12).any(1).sum(), (padded.max(0) > 12).any(0).sum()
    assert (columns, rows) == tuple(round(n * 64 / 64) for n in shape)


def discs(path, aspect, turned=False):
    """Two bright discs of 24 shown pixels, in the halves of a picture of 96 x 48, as pixels of ``aspect`` store it."""
    width = round(96 / aspect)
    y, x = np.mgrid[:48, :width]
    x = (x + 0.5) * float(aspect)
    bright = np.minimum(np.hypot(x - 24, y - 23.5), np.hypot(x - 72, y - 23.5)) < 12
    picture = np.where(bright, 220, 30).astype(np.uint8)[..., None].repeat(3, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuv444p"
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return rotated(path, (0, 1, -1, 0)) if turned else path


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(16, 15), Fraction(3, 4), Fraction(1)], ids=str)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_pixels_are_made_square(tmp_path, aspect, suffix):
    def shape(frame):
        bright = frame[1] > 125
        return bright.any(1).sum(), bright.any(0).sum()

    clip = discs(tmp_path / f"a{suffix}", aspect)
    left = shape(decode_frames(clip, 1, size=48, side="left")[0])
    assert np.abs(np.subtract(left, 24)).max() <= 1, left
    padded = shape(decode_frames(clip, 1, size=96, resize="pad")[0])
    assert np.abs(np.subtract(padded, (24, 48))).max() <= 1, padded
    if suffix == ".mp4":
        turned = shape(decode_frames(discs(tmp_path / "b.mp4", aspect, turned=True), 1, size=96, resize="pad")[0])
        assert np.abs(np.subtract(turned, (48, 24))).max() <= 1, "the width that is stored is what is scaled"


@pytest.mark.parametrize("aspect", [Fraction(1, 200), Fraction(200)], ids=str)
def test_pixels_that_cannot_be_count_as_square(tmp_path, aspect):
    clip = discs(tmp_path / "a.mp4", Fraction(1))
    data = clip.read_bytes()
    at = data.index(b"pasp") + 4
    assert struct.unpack(">2I", data[at : at + 8]) == (1, 1)
    clip.write_bytes(data[:at] + struct.pack(">2I", aspect.numerator, aspect.denominator) + data[at + 8 :])
    frame = decode_frames(clip, 1, size=96, resize="pad")[0]
    assert (frame.max(0) > 12).any(1).sum() == 48


def test_a_face_is_looked_for_in_square_pixels(tmp_path):
    class Detector:
        def box(self, pictures):
            assert [picture.shape for picture in pictures] == [(48, 96, 3)] * 2
            return 12, 12, 24, 24

    frames = decode_frames(discs(tmp_path / "a.mp4", Fraction(2)), 2, size=24, face=Detector())
    assert (frames[:, 1] > 125).mean() > 0.7, "the disc fills the box: π/4 of it"


def test_fit_agrees_with_pillow():
    image = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    pillow = pytest.importorskip("PIL.Image")
    want = np.asarray(pillow.fromarray(image).resize((57, 32), pillow.Resampling.BILINEAR)).transpose(2, 0, 1)
    got = fit(image, 32, "crop").astype(int)
    assert got.shape == (3, 32, 32)
    assert np.abs(got - want[:, :, 12:44]).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 5), (480, 640)])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_fit_always_gives_the_square(shape, resize):
    image = np.full((*shape, 3), 200, np.uint8)
    square = fit(image, 24, resize)
    assert square.shape == (3, 24, 24)
    assert square.max() == 200
    assert resize == "pad" or square.min() == 200


@pytest.mark.parametrize("suffix", [".mp4", ".flac", ".wav", ".mkv"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_sound_is_mono_at_the_rate_asked_for(tmp_path, clip_writer, suffix, rate):
    clip = clip_writer(tmp_path / f"a{suffix}", [], sound=3.0, rate=rate)
    sound = decode_audio(clip)
    assert sound.dtype == np.float32
    assert abs(len(sound) - 48000) < 1500  # AAC pads its last block
    for second in range(3):  # the channels are equal, so their mean has the tone's own loudness
        part = sound[16000 * second + 2000 : 16000 * second + 14000]
        assert np.sqrt((part**2).mean()) == pytest.approx(0.1 * (second + 1) / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mkv"])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1", "7.1"])
def test_every_channel_counts_the_same(tmp_path, layout, suffix):
    waves = np.random.default_rng(0).integers(-9000, 9000, (4096, av.AudioLayout(layout).nb_channels), np.int16)
    with av.open(str(tmp_path / f"a{suffix}"), "w") as container:
        stream = container.add_stream("pcm_s16le" if suffix == ".wav" else "flac", rate=16000, layout=layout)
        frame = av.AudioFrame.from_ndarray(waves.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate, frame.pts = 16000, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    np.testing.assert_allclose(decode_audio(tmp_path / f"a{suffix}"), waves.mean(1) / 32768, atol=1e-7)


@pytest.mark.parametrize("suffix", [".mp4", ".flac", ".wav"])
def test_sound_is_cut_by_presentation_time(tmp_path, clip_writer, suffix):
    clip = clip_writer(tmp_path / f"a{suffix}", [], sound=9.0)
    whole = decode_audio(clip)
    for start, end in [(0.5, 1.5), (2.25, 2.5), (5.0, 7.0), (8.5, None)]:
        part = decode_audio(clip, start=start, end=end)
        stop = len(whole) if end is None else round(end * 16000)
        want = whole[round(start * 16000) : stop]
        assert abs(len(part) - len(want)) <= 1
        part, want = part[: len(want)], want[: len(part)]
        # A seek can land between two samples of the whole file's grid: half a sample at most.
        slope = np.abs(np.diff(want)).max()
        assert np.abs(part - want).max() < 0.55 * slope
    with pytest.raises(UserError, match=r"no sound from 20 s to 21 s"):
        decode_audio(clip, start=20, end=21)


def test_encoder_priming_is_left_out(tmp_path, clip_writer):
    sound = decode_audio(clip_writer(tmp_path / "a.mp4", [], sound=1.0, rate=16000, channels=1))
    t = np.arange(2000, 14000) / 16000
    want = 0.1 * np.sin(2 * np.pi * 440 * t)
    assert np.abs(sound[2000:14000] - want).max() < 0.01, "a shift by a block of AAC would show"


def test_video_without_sound_and_sound_without_video(tmp_path, clip_writer):
    silent, sound = clip_writer(tmp_path / "v.mp4"), clip_writer(tmp_path / "a.mp4", [], sound=0.5)
    assert decode_frames(silent, 3, size=16).shape == (3, 3, 16, 16)
    with pytest.raises(NoStreamError, match=r"v\.mp4: the file has no audio stream"):
        decode_audio(silent)
    with pytest.raises(NoStreamError, match=r"a\.mp4: the file has no video stream"):
        decode_frames(sound, 3)
    info = probe(silent)
    assert (info.has_video, info.has_audio, info.width, info.height) == (True, False, 64, 48)
    assert info.duration == pytest.approx(2.0, abs=0.15)
    assert (probe(sound).has_video, probe(sound).sample_rate, probe(sound).channels) == (False, 44100, 2)


def bad_files(tmp_path, clip_writer):
    good = clip_writer(tmp_path / "good.mp4", sound=2.0).read_bytes()
    faststart = tmp_path / "fast.mp4"
    with (
        av.open(str(tmp_path / "good.mp4")) as source,
        av.open(str(faststart), "w", options={"movflags": "faststart"}) as target,
    ):
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    fast = faststart.read_bytes()
    assert fast.index(b"moov") < fast.index(b"mdat")
    return {
        "missing": (None, "there is no such file"),
        "empty": (b"", "the file is empty"),
        "truncated": (good[: len(good) // 2], "truncated"),
        "truncated-behind-its-index": (fast[: len(fast) * 3 // 4], "truncated"),
        "text": (b"Dear diary, today I named this a film.\n" * 20, "cannot read this as a media file"),
        "noise": (np.random.default_rng(1).bytes(5000), "cannot read this as a media file"),
        "no-streams": (b"RIFF\x04\x00\x00\x00AVI ", "FFmpeg cannot read|has no streams|no video stream"),
        "page": (b"<html><body>404 not found</body></html>", "cannot read this as a media file"),
        "playlist": (b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n", "cannot read this|no streams"),
    }


NAMES = ["missing", "empty", "truncated", "truncated-behind-its-index", "text", "noise", "no-streams", "page"]


@pytest.mark.parametrize("name", [*NAMES, "playlist"])
def test_bad_file_gets_one_sentence(tmp_path, clip_writer, name):
    data, sentence = bad_files(tmp_path, clip_writer)[name]
    path = tmp_path / "bad.mp4"
    if data is not None:
        path.write_bytes(data)
    for read in (probe, lambda p: decode_frames(p, 3), decode_audio, lambda p: try_decoding(p, "video")):
        with pytest.raises(UserError, match=sentence) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert "bad.mp4" in str(caught.value)


def test_a_cut_matroska_file_is_refused(tmp_path, clip_writer):
    """FFmpeg reads what is there, and tells of the length that the whole had; only an open length allows that."""
    clip = clip_writer(tmp_path / "a.mkv", sound=2.0)
    data = clip.read_bytes()
    whole = probe(clip).duration
    clip.write_bytes(data[: len(data) // 2])
    for read in (probe, lambda p: decode_frames(p, 3), decode_audio):
        with pytest.raises(UserError, match=r"a\.mkv: the file is truncated, it ends inside its 'Segment' part"):
            read(clip)
    at = data.index(b"\x18\x53\x80\x67") + 4
    streamed = data[:at] + b"\x01" + 7 * b"\xff" + data[at + 8 :]
    clip.write_bytes(streamed[: len(data) // 2])
    assert len(decode_audio(clip)) < 16000 * whole - 4000
    clip.write_bytes(data[: at + 3])
    with pytest.raises(UserError, match=r"a\.mkv"):
        probe(clip)


@pytest.mark.parametrize(("kind", "part"), [("audio", b"data"), ("video", b"movi")])
def test_a_cut_wav_or_avi_file_is_refused(tmp_path, clip_writer, kind, part):
    """A content that is longer than the file was cut; one whose length its writer left open, or took too large, not."""
    if kind == "audio":
        clip = clip_writer(tmp_path / "a.wav", (), sound=1.0)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        clip = clip_writer(tmp_path / "a.avi", codec="mpeg4", gop=1, paint=lambda k: noise)
    data = clip.read_bytes()
    half = data[: len(data) // 2]
    clip.write_bytes(half)
    for read in (probe, lambda p: decode_frames(p, 3), decode_audio):
        with pytest.raises(UserError, match=f"the file is truncated, it ends inside its '{part.decode()}' part"):
            read(clip)
    at = data.index(part) + (4 if kind == "audio" else -4)
    for length in (0, 0x7FFFF000, 0xFFFFFFFF, len(half) - (at + 4) + 44):
        clip.write_bytes(half[:at] + length.to_bytes(4, "little") + half[at + 4 :])
        try_decoding(clip, kind)


@pytest.mark.parametrize("suffix", [".flac", ".au"])
def test_a_file_that_ends_before_its_stated_length_is_refused(tmp_path, clip_writer, suffix):
    whole = clip_writer(tmp_path / f"whole{suffix}", [], sound=3.0, channels=1)
    assert len(decode_audio(whole)) == 3 * 16000
    data, cut = whole.read_bytes(), tmp_path / f"cut{suffix}"
    for share in (0.9, 0.5, 0.2):
        cut.write_bytes(data[: int(share * len(data))])
        for read in (probe, decode_audio, lambda p: decode_audio(p, start=0.1, end=0.3)):
            with pytest.raises(UserError, match=r"truncated, it ends before the 3\.00 s"):
                read(cut)


def test_a_piece_of_a_flac_file_that_states_the_length_of_the_whole_is_told_what_to_do(tmp_path, clip_writer):
    """FFmpeg copies the header of the whole, and such a piece cannot be told from a truncated file."""
    whole, piece = clip_writer(tmp_path / "whole.flac", [], sound=3.0, channels=1), tmp_path / "piece.flac"
    with av.open(str(whole)) as source, av.open(str(piece), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.pts is not None and packet.pts * packet.time_base < 1:
                packet.stream = stream
                target.mux(packet)
    with pytest.raises(UserError, match=r"ends before the 3\.00 s .* without being encoded anew, encode it"):
        decode_audio(piece)


def test_a_flac_file_of_unstated_length_is_read(tmp_path, clip_writer):
    """As a program writes it that cannot go back to its header."""
    clip = clip_writer(tmp_path / "a.flac", [], sound=2.0, channels=1)
    data = bytearray(clip.read_bytes())
    data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])  # the 36 bits of the number of samples
    clip.write_bytes(data)
    assert len(decode_audio(clip)) == 2 * 16000


def noise(k):
    return np.random.default_rng(k).integers(0, 256, (48, 64, 3), np.uint8)


def read_in_part(clip, start=None, end=None):
    """What is told of a clip that is read in part: the kind, the seconds that are there, and those that are stated."""
    said = []
    for read in (partial(decode_frames, count=3, size=16), decode_audio):
        with contextlib.suppress(NoStreamError, EmptyCutError):
            read(clip, start=start, end=end, tell=said.append)
    pattern = r"there are ([\d.]+) s of (\w+) .*, and the header states ([\d.]+) s; the file is damaged or has gaps"
    found = [re.fullmatch(f"{re.escape(str(clip))}: {pattern}, copy it again", sentence) for sentence in said]
    return {match[2]: (float(match[1]), float(match[3])) for match in found}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_clip_that_is_read_in_part_is_told(tmp_path, clip_writer, content_zeroer, suffix):
    """FFmpeg passes over what it cannot read: of a film that was zeroed, seconds remain, and nothing else says so."""
    times = range(0, 4000, 100)
    clip = clip_writer(tmp_path / f"a{suffix}", times, sound=4.0, gop=1, paint=noise, codec="mpeg4")
    assert read_in_part(clip) == {}
    content_zeroer(clip, 0.4, 1)
    found = read_in_part(clip)
    # How long sound is, AVI states with the silence before it.
    kinds = {"video"} if suffix == ".avi" else {"video", "sound"}
    assert found.keys() == kinds
    for there, stated in found.values():
        assert 0.8 < there < 2.4
        assert stated == pytest.approx(4.0, abs=0.15)
    assert read_in_part(clip, 0.1, 0.7) == {}, "this cut is whole"
    assert read_in_part(clip, 0, 3).keys() == kinds
    with pytest.warns(UserWarning, match="s of video in it, and the header states"):
        decode_frames(clip, 3, size=16)


@pytest.mark.parametrize("begin", [0, 0.35])
def test_what_is_missing_at_the_beginning_or_inside_is_told(tmp_path, clip_writer, content_zeroer, begin):
    clip = clip_writer(tmp_path / "a.mp4", range(0, 4000, 100), sound=4.0, gop=5, paint=noise)
    content_zeroer(clip, begin, begin + 0.4)
    found = read_in_part(clip)
    assert found.keys() == {"video", "sound"}
    for there, stated in found.values():
        assert there < 3.2
        assert stated == pytest.approx(4.0, abs=0.15)


def test_half_an_mp3_file_is_told(tmp_path):
    """Its header states the length; without one the length is reckoned by the bit rate, which tells nothing."""
    clip, plain = tmp_path / "a.mp3", tmp_path / "plain.mp3"
    for path, options in ((clip, {}), (plain, {"write_xing": "0"})):
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream("mp3", rate=16000, layout="mono")
            wave = np.random.default_rng(0).normal(0, 0.1, 48000).astype(np.float32)
            wave[:24000] = 0
            for at in range(0, len(wave), 1152):
                block = av.AudioFrame.from_ndarray(wave[None, at : at + 1152], format="fltp", layout="mono")
                block.sample_rate, block.pts = 16000, at
                container.mux(stream.encode(block))
            container.mux(stream.encode(None))
        assert read_in_part(path) == {}
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_in_part(clip) == {"sound": (pytest.approx(1.5, abs=0.15), pytest.approx(3.0, abs=0.1))}
    assert read_in_part(plain) == {}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_of_clips_that_are_whole_nothing_is_told(tmp_path, clip_writer, suffix):
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    slow = clip_writer(tmp_path / f"slow{suffix}", [0, 40, 80, 3000, 3040, 4400], sound=4.5, codec=codec)
    long = clip_writer(tmp_path / f"long{suffix}", range(0, 4000, 100), sound=1.0, codec=codec, paint=noise)
    short = clip_writer(tmp_path / f"short{suffix}", range(0, 1000, 100), sound=4.0, codec=codec)
    still = clip_writer(tmp_path / f"still{suffix}", [0], sound=4.0, codec=codec)
    for clip in (slow, long, short, still):
        for cut in ((None, None), (0.2, 0.9), (0.5, 3.0), (0.1, 60.0)):
            assert read_in_part(clip, *cut) == {}, (clip.name, cut)


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_what_an_edit_list_hides_is_not_missing(tmp_path, clip_writer, suffix):
    """A film that was cut without being encoded anew holds frames from before its beginning."""
    whole = clip_writer(tmp_path / "whole.mp4", range(0, 4000, 100), sound=4.0, paint=noise)
    cut = tmp_path / f"cut{suffix}"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None and packet.pts * packet.time_base >= Fraction(6, 5):
                shift = int(2 / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    assert probe(cut).duration == pytest.approx(2.0, abs=0.1)
    assert read_in_part(cut) == {}


def test_of_real_clips_nothing_is_told(shared_data):
    clips = [path for path in shared_data.rglob("*.*") if path.suffix in (".mp4", ".mpg", ".flac")]
    assert len(clips) > 200
    for clip in clips:
        assert read_in_part(clip) == {}


def test_an_avi_file_that_is_cut_in_a_later_part_is_refused(tmp_path):
    """An AVI file goes on in another RIFF at every GiB, which has its own content."""

    def chunk(kind, content):
        return kind + len(content).to_bytes(4, "little") + content

    first = chunk(b"RIFF", b"AVI " + chunk(b"LIST", b"hdrl" + bytes(20)) + chunk(b"LIST", b"movi" + bytes(100)))
    clip = tmp_path / "a.avi"
    for kept, part in ((400, None), (250, "movi"), (len(first), None), (100, "movi")):
        whole = first + chunk(b"RIFF", b"AVIX" + chunk(b"LIST", b"movi" + bytes(200)))
        clip.write_bytes(whole[:kept])
        assert media._broken_part(clip, clip.stat().st_size) == part


def test_a_file_filled_up_with_zeros_is_not_gone_through(tmp_path, monkeypatch):
    """As downloads leave it: eight bytes at a time, gigabytes take minutes."""
    reads = []

    class Counted(BytesIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    content = b"RIFF\0\0\0\0WAVE" + bytes(8000)
    clip = tmp_path / "a.wav"
    clip.write_bytes(content)
    monkeypatch.setattr(type(clip), "open", lambda *_: Counted(content))
    assert media._broken_part(clip, len(content)) is None
    assert len(reads) < 4


def test_tags_in_another_code_page(tmp_path, clip_writer):
    """A title in Latin-1, as old AVI files have it, is no reason to refuse the clip."""
    clip = clip_writer(tmp_path / "a.avi", codec="mpeg4")
    data = clip.read_bytes()
    assert b"Lavf" in data
    clip.write_bytes(data.replace(b"Lavf", b"Caf\xe9", 1))
    assert probe(clip).has_video
    assert decode_frames(clip, 2, size=16).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_flipped_bytes_end_in_frames_or_in_a_sentence(tmp_path, clip_writer, suffix):
    clip = clip_writer(tmp_path / f"a{suffix}", codec="mpeg4", sound=1.0 if suffix != ".avi" else None)
    good = clip.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(25):
        data = np.frombuffer(good, np.uint8).copy()
        at = rng.integers(0, len(data), int(rng.choice([1, 10, 100])))
        data[at] = rng.integers(0, 256, len(at))
        clip.write_bytes(data.tobytes())
        for read in (probe, lambda p: decode_frames(p, 3, start=0.3, end=1.2, size=16), decode_audio):
            with contextlib.suppress(UserError):
                read(clip)


def test_folder_is_no_clip(tmp_path):
    with pytest.raises(UserError, match="a folder, not a media file"):
        decode_frames(tmp_path, 3)


def test_zero_frames(tmp_path, clip_writer):
    """The headers of a film, and payloads that decode to nothing."""
    clip = clip_writer(tmp_path / "a.mkv", [0, 100, 200], codec="mpeg4")
    data = bytearray(clip.read_bytes())
    packets = []
    with av.open(str(clip)) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    for payload in packets:
        at = data.index(payload)
        data[at : at + len(payload)] = bytes(len(payload))
    clip.write_bytes(data)
    with pytest.raises(UserError, match="not one video frame can be decoded"):
        decode_frames(clip, 3)
    with pytest.raises(UserError, match="not one video frame can be decoded"):
        try_decoding(clip, "video")


def test_cut_behind_the_end(tmp_path, clip_writer):
    clip = clip_writer(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"no frames from 5 s to its end"):
        decode_frames(clip, 3, start=5)


def test_several_streams_take_the_default(shared_data: Path):
    clip = shared_data / "decode" / "nasa_13013.mp4"
    info = probe(clip)
    assert (info.video_streams, info.audio_streams) == (2, 2)
    assert decode_frames(clip, 4, size=32).shape == (4, 3, 32, 32)
    first, second = decode_audio(clip), decode_audio(clip, stream=4)
    assert abs(len(first) - 13.056 * 16000) < 2000
    assert len(second) > 0
    assert not np.array_equal(decode_audio(clip, stream=1)[:1000], second[:1000])
    with pytest.raises(NoStreamError, match=r"stream 2 is no audio stream"):
        decode_audio(clip, stream=2)


def test_a_file_is_opened_no_more_often_than_it_is_read(tmp_path, clip_writer, monkeypatch):
    """The headers of a recording of hours take longer than a window of it."""
    clip, opened = clip_writer(tmp_path / "a.mp4", sound=2.0), []
    original = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(args) or original(*args, **options))
    reads = (
        (2, lambda: decode_frames(clip, 4, start=0.5, end=1.5, size=16)),  # its packets, then its frames
        (1, lambda: decode_audio(clip, start=0.5, end=1.5)),
        (1, lambda: try_decoding(clip, "video")),
    )
    for times, read in reads:
        opened.clear()
        read()
        assert len(opened) == times


@pytest.mark.parametrize("name", ["bbaf2n.mpg", "id2_vcd_swwp2s.mpg", "lrwp9a.mpg", "swiz3n.mpg"])
def test_grid_clips(shared_data: Path, name):
    clip = shared_data / "decode" / name
    with av.open(str(clip)) as container:
        decoded = [(f.pts, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    frames = decode_frames(clip, 15, size=64)
    chosen = expected([pts for pts, _ in decoded], 15)
    want = np.stack([fit(decoded[i][1], 64, "crop") for i in chosen])
    assert np.array_equal(frames, want)
    assert 2.8 < len(decode_audio(clip)) / 16000 < 3.1


def test_original_takes(shared_data: Path):
    for clip in sorted((shared_data / "ravdess" / "original").glob("*.mp4")):
        frames = decode_frames(clip, 15, size=96)
        assert frames.shape == (15, 3, 96, 96)
        assert len({frame.tobytes() for frame in frames}) == 15
        assert len(decode_audio(clip)) / 16000 == pytest.approx(probe(clip).duration, abs=0.03)
    assert len(decode_audio(shared_data / "decode" / "jfk.flac")) == 11 * 16000


def test_long_file_is_not_held(tmp_path, clip_writer, monkeypatch):
    """Frames are converted when they are chosen, and no other frame is kept alive."""
    import gc

    clip = clip_writer(
        tmp_path / "a.mp4", list(range(0, 30000, 100)), paint=lambda k: np.full((48, 64, 3), k % 250, np.uint8)
    )
    converted, alive = [], []

    original = geometry.to_rgb

    def counting(frame, aspect):
        gc.collect()
        alive.append(sum(type(o) is av.VideoFrame for o in gc.get_objects()))
        converted.append(frame.pts)
        return original(frame, aspect)

    monkeypatch.setattr(geometry, "to_rgb", counting)
    decode_frames(clip, 4, size=16)
    assert len(converted) == 4
    assert 1 <= max(alive) <= 40, "a decoder's few frames in flight, not the film's 300"


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 17, reason="PyAV below 17 starts no threads")
def test_a_picture_is_converted_on_one_thread():
    """Clips are decoded in parallel processes: threads for each picture would only compete."""

    class Frame:
        side_data: ClassVar = {}

        def to_ndarray(self, **options):
            asked.append(options)
            return np.zeros((4, 4, 3), np.uint8)

    asked: list[dict] = []
    geometry.to_rgb(Frame())
    assert asked == [{"format": "rgb24", "threads": 1}]


def test_face_crop(shared_data: Path):
    pytest.importorskip("cv2", reason="OpenCV, the extra deepmsi[face], is not installed")
    clip = sorted((shared_data / "ravdess" / "original").glob("*.mp4"))[0]
    face, whole = decode_frames(clip, 3, size=64, face=True), decode_frames(clip, 3, size=64)
    assert face.shape == whole.shape
    # The actor wears black in front of white: a crop to the face leaves the shirt out.
    # In the lower corners, that is.
    assert (whole[:, :, -6:, :6] < 60).mean() > 0.5
    assert (face[:, :, -6:, :6] < 60).mean() < 0.1
    picture = np.zeros((100, 160, 3), np.uint8)
    detector = FaceDetector()
    assert detector.box([picture]) is None
    assert detector.misses == 1


def test_face_crop_without_opencv(tmp_path, clip_writer, monkeypatch):
    shared_detector.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"install deepmsi\[face\]"):
        decode_frames(clip_writer(tmp_path / "a.mp4"), 3, face=True)
