"""A synthetic labelled set of short audio-visual clips: drawn faces, synthesised voices, phrases; no person.

Every clip is drawn from (seed, speaker, label, take) alone and written as a real mp4 file with sound. Each
modality is silent about the label in part of the clips (a blank face, a flat voice, a phrase that fits
several labels), independently of the others, so that none of them is sufficient and joining them helps. A
score on this set says that the software works from end to end; it says nothing about people.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepmsi.data.files import write_bytes, write_text
from deepmsi.data.pool import usable_cpus
from deepmsi.errors import UserError

LABELS = ("neutral", "joy", "sadness", "anger", "surprise", "fear")
WIDTH, HEIGHT = 192, 144  # pixels; the face stands in the middle square
FPS = 15
SAMPLE_RATE = 32000
CONTROL = 160  # samples per step of the slowly changing amplitudes
NOTICE = (
    "These clips are synthetic: a program drew the faces and made the voices, for trying the software out.\n"
    "No person was recorded, and a score on them says nothing about the recognition of human emotion.\n"
)

Array = NDArray[Any]  # floating


@dataclass(frozen=True)
class Expression:
    """A face at full intensity, in units of the face's half height where a length is meant."""

    mouth_curve: float = 0.0  # corners up
    mouth_open: float = 0.0
    mouth_width: float = 0.30
    brow_raise: float = 0.0
    brow_tilt: float = 0.0  # inner ends down
    eye_open: float = 0.085
    tremble: float = 0.0
    nod: float = 0.0
    shake: float = 0.0


@dataclass(frozen=True)
class Prosody:
    """A voice: multiples of the speaker's own pitch, and rates in hertz."""

    pitch: float = 1.0
    slope: float = -0.05  # octaves from the first to the last moment
    swing: float = 0.05  # octaves, one arc per syllable
    syllables: float = 4.0  # per second
    energy: float = 0.30
    tremor: float = 0.0  # octaves at about 7 Hz
    tilt: float = 1.4  # harmonic k has amplitude k ** -tilt
    breath: float = 0.02


FACES = {
    "neutral": Expression(),
    "joy": Expression(mouth_curve=0.16, mouth_open=0.06, mouth_width=0.40, brow_raise=0.03, eye_open=0.07, nod=0.03),
    "sadness": Expression(mouth_curve=-0.12, mouth_width=0.27, brow_tilt=-0.09, eye_open=0.055, nod=0.02),
    "anger": Expression(
        mouth_curve=-0.06, mouth_width=0.33, brow_raise=-0.05, brow_tilt=0.11, eye_open=0.075, shake=0.03
    ),
    "surprise": Expression(mouth_open=0.20, mouth_width=0.22, brow_raise=0.14, eye_open=0.13),
    "fear": Expression(
        mouth_curve=-0.07,
        mouth_open=0.09,
        mouth_width=0.35,
        brow_raise=0.09,
        brow_tilt=-0.07,
        eye_open=0.12,
        tremble=0.02,
    ),
}

VOICES = {
    "neutral": Prosody(),
    "joy": Prosody(pitch=1.30, slope=0.05, swing=0.30, syllables=5.0, energy=0.42, tilt=1.1),
    "sadness": Prosody(pitch=0.86, slope=-0.25, swing=0.06, syllables=2.8, energy=0.16, tilt=1.9, breath=0.05),
    "anger": Prosody(pitch=1.15, slope=-0.15, swing=0.16, syllables=5.5, energy=0.60, tilt=0.7),
    "surprise": Prosody(pitch=1.35, slope=0.55, swing=0.12, syllables=3.2, energy=0.40, tilt=1.2),
    "fear": Prosody(pitch=1.45, slope=0.10, swing=0.06, syllables=5.2, energy=0.28, tremor=0.10, tilt=1.5, breath=0.12),
}

PHRASES = {
    "neutral": (
        "the meeting is at ten", "put the keys on the table", "the train leaves from platform two",
        "it is about the same as yesterday", "the report has four pages", "we need milk and bread",
    ),
    "joy": (
        "this is the best day of the year", "we won, we really won", "thank you so much, it is lovely",
        "I got the job and I love it", "what a wonderful party", "she laughed and hugged me",
    ),
    "sadness": (
        "I miss her every day", "he left and nothing is the same", "we lost the house",
        "I feel so alone tonight", "it hurts and I am tired", "nobody came to say goodbye",
    ),
    "anger": (
        "get out of my room right now", "you lied to me again", "stop it, I have had enough",
        "how dare you touch my things", "this is your fault and you know it", "I hate when you do that",
    ),
    "surprise": (
        "wow, where did you come from", "I never expected to see you here", "oh my, is that really for me",
        "wait, you two are married", "look at that, it is huge", "you did all of this yourself",
    ),
    "fear": (
        "there is someone in the house", "please do not leave me here", "I heard a noise behind the door",
        "run, it is coming closer", "I am afraid of the dark water", "what if they find us",
    ),
}  # fmt: skip

# Phrases that fit several labels: the text of a clip comes from here in part of the cases.
SHARED_PHRASES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("joy", "surprise"), "I cannot believe it"),
    (("joy", "surprise"), "is this really happening"),
    (("anger", "fear"), "do not come any closer"),
    (("anger", "fear"), "leave me alone"),
    (("anger", "sadness"), "you promised me"),
    (("anger", "sadness"), "it is over"),
    (("sadness", "fear"), "I do not know what to do"),
    (("sadness", "neutral"), "I will stay at home today"),
    (("neutral", "joy"), "they are coming on sunday"),
    (("neutral", "surprise"), "so that is the new one"),
    (("surprise", "fear"), "what was that"),
    (LABELS, "well, here we are"),
    (LABELS, "I have to tell you something"),
)

P_BLANK_FACE, P_FLAT_VOICE, P_SHARED_PHRASE = 0.15, 0.20, 0.45


@dataclass(frozen=True)
class Identity:
    """What a speaker keeps from clip to clip: colours and proportions of the face, pitch and formants."""

    skin: Array
    hair: Array
    lips: Array
    iris: Array
    face_width: float
    eye_gap: float
    brow_width: float
    long_hair: bool
    pitch: float  # Hz
    formants: tuple[float, float, float]  # Hz


def make_identity(seed: int, speaker: int) -> Identity:
    rng = np.random.default_rng([seed, speaker])
    tone = rng.uniform(0.0, 1.0)
    skin = (1 - tone) * np.array([236, 196, 168]) + tone * np.array([112, 74, 50]) + rng.normal(0, 6, 3)
    hairs = np.array([[40, 28, 24], [92, 58, 32], [190, 150, 84], [120, 116, 116], [150, 66, 30]])
    high = rng.random() < 0.5
    return Identity(
        skin=np.clip(skin, 0, 255).astype(np.float32),
        hair=np.clip(hairs[rng.integers(len(hairs))] + rng.normal(0, 8, 3), 0, 255).astype(np.float32),
        lips=np.clip(skin * np.array([0.78, 0.48, 0.50]), 0, 255).astype(np.float32),
        iris=np.array([[70, 50, 34], [70, 100, 130], [70, 104, 62]])[rng.integers(3)].astype(np.float32),
        face_width=float(rng.uniform(0.70, 0.86)),
        eye_gap=float(rng.uniform(0.30, 0.38)),
        brow_width=float(rng.uniform(0.035, 0.065)),
        long_hair=bool(rng.random() < 0.5),
        pitch=float(rng.uniform(165, 230) if high else rng.uniform(95, 150)),
        formants=(
            float(rng.uniform(500, 800)),
            float(rng.uniform(1100, 1700)),
            float(rng.uniform(2300, 2900)),
        ),
    )


class Canvas:
    """Anti-aliased shapes over one float32 frame [H, W, 3]; each touches only the pixels of its own box."""

    def __init__(self, pixels: Array) -> None:
        self.pixels = pixels

    def _blend(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        coverage: Callable[[Array, Array], Array],
        colour: Array,
    ) -> None:
        height, width = self.pixels.shape[:2]
        left, right = max(int(x0) - 2, 0), min(int(x1) + 3, width)
        top, bottom = max(int(y0) - 2, 0), min(int(y1) + 3, height)
        if left >= right or top >= bottom:
            return
        y, x = np.arange(top, bottom, dtype=np.float32)[:, None], np.arange(left, right, dtype=np.float32)[None]
        alpha = np.clip(coverage(x, y), 0, 1)[..., None]
        box = self.pixels[top:bottom, left:right]
        box += alpha * (colour - box)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, colour: Array) -> None:
        rx, ry = max(rx, 0.3), max(ry, 0.3)

        def coverage(x: Array, y: Array) -> Array:
            radius = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)
            return 0.5 + (1 - radius) * min(rx, ry)

        self._blend(cx - rx, cy - ry, cx + rx, cy + ry, coverage, colour)

    def stroke(self, xs: Array, ys: Array, width: float, colour: Array) -> None:
        """A line of the given width through the points (xs, ys)."""

        def coverage(x: Array, y: Array) -> Array:
            distance: Array = np.full((1, 1), np.inf, np.float32)
            for ax, ay, bx, by in zip(xs[:-1], ys[:-1], xs[1:], ys[1:], strict=True):
                dx, dy = bx - ax, by - ay
                t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
                distance = np.minimum(distance, np.hypot(x - ax - t * dx, y - ay - t * dy))
            return 0.5 + width / 2 - distance

        pad = width / 2
        self._blend(xs.min() - pad, ys.min() - pad, xs.max() + pad, ys.max() + pad, coverage, colour)

    def between(self, xs: Array, upper: Array, lower: Array, colour: Array) -> None:
        """The area between two curves over the same ascending xs."""

        def coverage(x: Array, y: Array) -> Array:
            column = x[0]
            inside = (column >= xs[0]) & (column <= xs[-1])
            edge = np.minimum(y - np.interp(column, xs, upper), np.interp(column, xs, lower) - y)
            return np.where(inside, 0.5 + edge, 0).astype(np.float32)

        self._blend(xs[0], upper.min(), xs[-1], lower.max(), coverage, colour)


def _draw_face(canvas: Canvas, who: Identity, face: Expression, cx: float, cy: float, half: float) -> None:
    """Draw one face whose half height is `half` pixels around (cx, cy)."""
    wide = who.face_width * half
    shade, dark = who.skin * 0.86, np.array([38, 18, 20], np.float32)
    white = np.array([240, 238, 232], np.float32)
    if who.long_hair:
        canvas.ellipse(cx, cy + 0.10 * half, 1.24 * wide, 1.18 * half, who.hair)
    canvas.ellipse(cx, cy + 1.35 * half, 1.5 * wide, 0.62 * half, who.hair * 0.4 + 60)  # shoulders
    canvas.ellipse(cx, cy + 0.85 * half, 0.36 * wide, 0.45 * half, shade)
    canvas.ellipse(cx, cy - 0.22 * half, 1.08 * wide, 0.92 * half, who.hair)
    canvas.ellipse(cx, cy + 0.06 * half, wide, 0.96 * half, who.skin)
    for side in (-1, 1):
        ex, ey = cx + side * who.eye_gap * half, cy - 0.12 * half
        canvas.ellipse(ex, ey, 0.135 * half, face.eye_open * half, white)
        iris = min(0.075, face.eye_open) * half
        canvas.ellipse(ex, ey, iris, iris, who.iris)
        canvas.ellipse(ex, ey, 0.45 * iris, 0.45 * iris, dark)
        t = np.linspace(-1, 1, 5, dtype=np.float32)  # -1 is the inner end
        xs = ex + side * t * 0.17 * half
        arch = 0.03 * (1 - t * t)
        ys = ey - (0.20 + face.brow_raise + arch + face.brow_tilt * t) * half
        canvas.stroke(xs, ys, who.brow_width * half, who.hair * 0.7)
    nose_x = cx + np.array([0.0, 0.05, 0.0], np.float32) * half
    canvas.stroke(nose_x, cy + np.array([-0.05, 0.20, 0.22], np.float32) * half, 0.035 * half, shade)
    t = np.linspace(-1, 1, 11, dtype=np.float32)
    xs = cx + t * face.mouth_width * half
    middle = cy + (0.52 + face.mouth_curve * (0.5 - t * t)) * half
    gap = np.sqrt(np.clip(1 - t * t, 0, 1)) * face.mouth_open * half
    canvas.between(xs, middle - 0.6 * gap, middle + gap, dark)
    canvas.stroke(xs, middle - 0.6 * gap, 0.05 * half, who.lips)
    canvas.stroke(xs, middle + gap, 0.06 * half, who.lips)


def _mix(a: Any, b: Any, weight: float) -> Any:
    """The field by field blend of two dataclass instances of one type."""
    return replace(a, **{name: (1 - weight) * va + weight * getattr(b, name) for name, va in vars(a).items()})


def _perturb(rng: np.random.Generator, value: Any, scale: dict[str, float]) -> Any:
    return replace(value, **{name: getattr(value, name) + rng.normal(0, s) for name, s in scale.items()})


def render_frames(rng: np.random.Generator, who: Identity, label: str, talk: Array) -> NDArray[np.uint8]:
    """Draw a face that moves from rest into the label's expression.

    Args:
        rng: source of the clip's nuisance: framing, light, noise, intensity, blinks.
        who: the speaker.
        label: one of LABELS.
        talk: [T] float32, the voice's loudness in 0..1 at each frame, which opens the mouth.

    Returns:
        frames [T, 144, 192, 3] uint8.
    """
    steps = len(talk)
    target = (
        FACES["neutral"] if rng.random() < P_BLANK_FACE else _mix(FACES["neutral"], FACES[label], rng.uniform(0.9, 1.5))
    )
    target = _perturb(rng, target, {"mouth_curve": 0.025, "brow_raise": 0.02, "brow_tilt": 0.02, "mouth_width": 0.02})
    rest = _perturb(rng, FACES["neutral"], {"mouth_curve": 0.01, "brow_raise": 0.01})
    onset, blink = rng.uniform(0.0, 0.3) * steps, rng.integers(steps)
    half = rng.uniform(50, 55)
    centre = np.array([WIDTH / 2, HEIGHT / 2 - 4]) + rng.normal(0, 1.5, 2)
    phase = rng.uniform(0, 2 * np.pi, 3)

    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    wall = (rng.uniform(90, 180) + rng.normal(0, 14, 3)).astype(np.float32)
    light = 1 + rng.normal(0, 0.12) * (x / WIDTH - 0.5) + rng.normal(0, 0.12) * (y / HEIGHT - 0.5)
    backdrop = np.repeat(np.repeat(wall[None, None], HEIGHT, 0), WIDTH, 1)
    for _ in range(5):  # furniture
        blob = (wall + rng.normal(0, 25, 3)).astype(np.float32)
        Canvas(backdrop).ellipse(
            rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(8, 40), rng.uniform(8, 40), blob
        )
    gain, noise = rng.uniform(0.85, 1.12), rng.uniform(2, 6)
    frames = np.empty((steps, HEIGHT, WIDTH, 3), np.uint8)
    for i in range(steps):
        weight = float(np.clip((i - onset) / (0.25 * steps), 0, 1))
        face: Expression = _mix(rest, target, weight)
        open_eyes = 0.012 if abs(i - blink) < 1 else max(face.eye_open, 0.03)
        face = replace(face, mouth_open=max(face.mouth_open, 0.0) + 0.07 * float(talk[i]), eye_open=open_eyes)
        seconds = i / FPS
        dx = face.shake * np.sin(2 * np.pi * 3.0 * seconds + phase[0]) + rng.normal(0, max(face.tremble, 0) + 0.004)
        dy = face.nod * np.sin(2 * np.pi * 1.5 * seconds + phase[1]) + rng.normal(0, max(face.tremble, 0) + 0.004)
        canvas = Canvas(backdrop.copy())
        _draw_face(canvas, who, face, float(centre[0] + dx * half), float(centre[1] + dy * half), float(half))
        grain = rng.standard_normal((HEIGHT, WIDTH, 1), np.float32) * np.float32(noise)
        frames[i] = np.clip(canvas.pixels * (gain * light)[..., None] + grain, 0, 255)
    return frames


def render_voice(rng: np.random.Generator, who: Identity, label: str, seconds: float) -> Array:
    """Synthesise a babble with the label's prosody.

    Args:
        rng: source of the clip's nuisance: loudness, noise, vowels, rate.
        who: the speaker.
        label: one of LABELS.
        seconds: length.

    Returns:
        waveform [round(seconds * 32000)] float32 in -1..1.
    """
    style = (
        VOICES["neutral"]
        if rng.random() < P_FLAT_VOICE
        else _mix(VOICES["neutral"], VOICES[label], rng.uniform(0.6, 1.15))
    )
    style = _perturb(rng, style, {"pitch": 0.05, "slope": 0.06, "syllables": 0.35, "tilt": 0.08})
    n = round(seconds * SAMPLE_RATE)
    t = np.arange(n, dtype=np.float64) / SAMPLE_RATE
    lead = rng.uniform(0.03, 0.15)
    beat = (t - lead) * max(style.syllables, 1.5)
    arc = np.clip(np.sin(np.pi * (beat % 1.0)), 0, 1)
    voiced = (t > lead) & (t < seconds - 0.08)
    octaves = (
        style.slope * (t / seconds - 0.5)
        + style.swing * (arc - 0.5)
        + style.tremor * np.sin(2 * np.pi * 7.0 * t + rng.uniform(0, 6.28))
    )
    pitch = who.pitch * max(style.pitch, 0.5) * np.exp2(octaves)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    syllable = np.clip(beat, 0, None).astype(int)
    vowels = rng.uniform(0.85, 1.15, (int(syllable.max()) + 1, 3))
    coarse, slow_pitch, vowel = t[::CONTROL], pitch[::CONTROL], vowels[syllable[::CONTROL]]
    formants, strengths = np.array(who.formants), np.array([1.0, 0.7, 0.4])
    wave = np.zeros(n)
    for k in range(1, 21):
        distance = (k * slow_pitch[:, None] - formants * vowel) / (0.16 * formants + 60)
        amplitude = k**-style.tilt * (0.15 + np.exp(-(distance**2)) @ strengths)
        wave += np.interp(t, coarse, amplitude) * np.sin(k * phase)
    envelope = np.sqrt(arc) * voiced
    breath = rng.standard_normal(n) * max(style.breath, 0.0) * 4
    wave = envelope * (wave + breath)
    wave *= max(style.energy, 0.08) * rng.uniform(0.8, 1.25) / (np.sqrt(np.mean(wave**2)) + 1e-6) * 0.35
    wave += rng.standard_normal(n) * 10 ** rng.uniform(-3.2, -2.2)  # the room
    return np.clip(wave, -0.99, 0.99).astype(np.float32)


def make_phrase(rng: np.random.Generator, label: str) -> str:
    """Draw what is said: a phrase of the label, or one that it shares with others."""
    if rng.random() < P_SHARED_PHRASE:
        options = [phrase for labels, phrase in SHARED_PHRASES if label in labels]
    else:
        options = list(PHRASES[label])
    opener = ("", "", "", "oh, ", "you know, ", "listen, ")[rng.integers(6)]
    return opener + options[rng.integers(len(options))]


def encode_clip(path: Path, frames: NDArray[np.uint8], waveform: Array) -> None:
    """Write frames [T, H, W, 3] uint8 and a mono waveform [n] float32 as one mp4, H.264 and AAC."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video: Any = container.add_stream(codec, rate=FPS)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.codec_context.thread_count = 1  # the same bytes at any number of cores
        video.options = {"preset": "ultrafast", "crf": "23"} if codec == "libx264" else {"qscale": "4"}
        audio: Any = container.add_stream("aac", rate=SAMPLE_RATE)
        audio.layout = "mono"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[None]), format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    write_bytes(path, buffer.getvalue())


@dataclass(frozen=True)
class ClipPlan:
    """One clip to make; everything in it follows from these numbers."""

    seed: int
    speaker: int
    label: str
    take: int
    split: str

    @property
    def id(self) -> str:
        return f"s{self.speaker:02d}-{self.label}-{self.take}"

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.speaker, LABELS.index(self.label), self.take])


def make_clip(plan: ClipPlan) -> tuple[NDArray[np.uint8], Array, str]:
    """Return frames [T, 144, 192, 3] uint8, waveform [n] float32 at 32 kHz, and the text of one clip."""
    rng = plan.rng()
    who = make_identity(plan.seed, plan.speaker)
    text = make_phrase(rng, plan.label)
    steps = int(rng.integers(16, 25))
    waveform = render_voice(rng, who, plan.label, steps / FPS)
    loudness = np.abs(waveform[: steps * (SAMPLE_RATE // FPS)]).reshape(steps, -1).mean(axis=1)
    frames = render_frames(rng, who, plan.label, (loudness / (loudness.max() + 1e-6)).astype(np.float32))
    return frames, waveform, text


def _write_clip(job: tuple[ClipPlan, Path]) -> str:
    plan, folder = job
    frames, waveform, text = make_clip(plan)
    encode_clip(folder / f"{plan.id}.mp4", frames, waveform)
    return text


def plan_clips(seed: int, speakers: int, takes: int) -> list[ClipPlan]:
    """Lay out the set: `takes` clips per speaker and label; the last quarter of the speakers is held out."""
    held_out = max(1, speakers // 4)
    return [
        ClipPlan(seed, speaker, label, take, "test" if speaker >= speakers - held_out else "train")
        for speaker in range(speakers)
        for label in LABELS
        for take in range(takes)
    ]


def write_synthetic_set(
    folder: Path, *, seed: int = 0, speakers: int = 40, takes: int = 1, workers: int | None = None
) -> Iterator[int]:
    """Write `manifest.csv`, its test part alone as `held-out.csv`, `clips/*.mp4` and a notice that it is synthetic.

    Args:
        folder: created where it is missing; clips of an earlier call are written over.
        seed: fixes every clip.
        speakers: identities; the last quarter of them is the split `test`, which shares nobody with `train`.
        takes: clips per speaker and label.
        workers: processes; the CPU count at most 4 by default. One means this process.

    Yields:
        the number of clips written so far, after each; the manifest is written after the last.

    Raises:
        UserError: fewer than 2 speakers or no take.
    """
    if speakers < 2 or takes < 1:
        raise UserError(f"a synthetic set needs at least 2 speakers and 1 take, not {speakers} and {takes}")
    clips = folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    plans = plan_clips(seed, speakers, takes)
    jobs = [(plan, clips) for plan in plans]
    texts: list[str] = []
    workers = min(workers or usable_cpus(), 4)
    if workers == 1:
        for job in jobs:
            texts.append(_write_clip(job))
            yield len(texts)
    else:
        # spawn: a forked child of a process that has already run torch's thread pool can hang
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for text in pool.map(_write_clip, jobs, chunksize=4):
                texts.append(text)
                yield len(texts)
    (folder / "SYNTHETIC.txt").write_text(NOTICE, encoding="utf-8")
    rows = list(zip(plans, texts, strict=True))
    _write_manifest(folder / "manifest.csv", rows)
    _write_manifest(folder / "held-out.csv", [(plan, text) for plan, text in rows if plan.split == "test"])


def _write_manifest(path: Path, rows: Sequence[tuple[ClipPlan, str]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "video", "audio", "text", "label", "speaker", "split"])
    for plan, text in rows:
        writer.writerow([plan.id, f"clips/{plan.id}.mp4", "", text, plan.label, f"s{plan.speaker:02d}", plan.split])
    write_text(path, table.getvalue())
