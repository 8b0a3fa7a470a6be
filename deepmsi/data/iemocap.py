"""IEMOCAP from its raw release: labels of three usual sets, half-frame crops, times, sounds, transcripts.

Labels come from `EmoEvaluation/<dialogue>.txt`: a line per turn with the consensus label, then one line per
annotator. `C-E*` lines are external annotators, `C-F*` and `C-M*` lines are the actors' own annotations.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deepmsi.data.manifest import Row, Side
from deepmsi.data.release import MARK, Release, archives, compare_counts, some, walk
from deepmsi.errors import UserError

NAME = "iemocap"
SESSIONS = (1, 2, 3, 4, 5)
TEST_SESSION = 5

LABEL_SETS: dict[str, dict[str, str]] = {
    "erc7433": {name: name for name in ("hap", "sad", "neu", "ang", "exc", "fru")},
    "consensus7380": {name: name for name in ("hap", "sad", "neu", "ang", "exc", "fru")},
    "four5531": {"hap": "hap", "exc": "hap", "sad": "sad", "neu": "neu", "ang": "ang"},
}
"""Class by consensus label; other turns are left out, but `erc7433` takes some without consensus too."""

COUNTS: dict[str, dict[str, int]] = {
    "erc7433": {"hap": 648, "sad": 1084, "neu": 1708, "ang": 1103, "exc": 1041, "fru": 1849},
    "consensus7380": {"hap": 595, "sad": 1084, "neu": 1708, "ang": 1103, "exc": 1041, "fru": 1849},
    "four5531": {"hap": 1636, "sad": 1084, "neu": 1708, "ang": 1103},
}
"""Turns of each class, as published."""

SESSION_COUNTS = {"erc7433": dict(zip(SESSIONS, (1373, 1356, 1569, 1512, 1623), strict=True))}
"""Turns of each session, where published."""

CONSENSUS = frozenset(("ang", "dis", "exc", "fea", "fru", "hap", "neu", "oth", "sad", "sur", "xxx"))
"""Every label that the release gives a turn."""

_DIALOGUE = r"Ses0([1-5])([FM])_(?:impro|script)\w*"
_DIALOGUE_NAME = re.compile(_DIALOGUE)
_TURN_LINE = re.compile(rf"\[\s*([\d.]+)\s*-\s*([\d.]+)\s*\]\s+({_DIALOGUE}_([FM])\w*)\s+(\w+)(?:\s+\[([^\]]*)\])?")
_ANNOTATOR_LINE = re.compile(r"C-([EFM])\w*\s*:\s*([^(]*)")
_TRANSCRIPT_LINE = re.compile(rf"({_DIALOGUE}_[FM]\w*)(\s*\[[^\]]*\])?\s*:\s*(.*)")
_TURN_NAME = re.compile(rf"{_DIALOGUE}_[FM](?:XX)?\d+")
# Motion capture and alignments: tens of thousands of files that a search need not visit.
_SKIP = re.compile(r"MOCAP_\w+|ForcedAlignment", re.IGNORECASE)
_SHEET_TURNS = 8


@dataclass(frozen=True)
class Turn:
    """One turn of `EmoEvaluation`.

    Attributes:
        id: such as Ses01F_impro01_F000.
        start, end: seconds from the start of the dialogue.
        consensus: the published label, "xxx" where the external annotators do not agree.
        external: the emotions, in small letters, that each external annotator named.
        own: the same for the actors' own annotations.
        dimensions: mean valence, activation and dominance, as printed.
    """

    id: str
    start: float
    end: float
    consensus: str
    external: tuple[frozenset[str], ...] = ()
    own: tuple[frozenset[str], ...] = ()
    dimensions: tuple[str, ...] = ()

    @property
    def dialogue(self) -> str:
        """Name of the dialogue, such as Ses01F_impro01."""
        return self.id.rpartition("_")[0]

    @property
    def session(self) -> int:
        """1 to 5."""
        return int(self.id[4])

    @property
    def gender(self) -> str:
        """F or M: who speaks this turn."""
        return self.id.rpartition("_")[2][0]

    def label(self, label_set: str) -> str | None:
        """The class under a label set, or None where the set leaves the turn out.

        `erc7433`, the literature's set, also counts as happy the turns without consensus whose one own
        annotation is happiness alone, if an external annotator names happiness too.
        """
        if label := LABEL_SETS[label_set].get(self.consensus):
            return label
        if label_set == "erc7433" and self.consensus == "xxx":
            own_is_happy = self.own == (frozenset({"happiness"}),)
            return "hap" if own_is_happy and any("happiness" in named for named in self.external) else None
        return None

    def side(self, wearer: Side = "left") -> Side:
        """The half of the frame that shows the speaker.

        The dialogue's name says in its sixth character who wears the markers; `wearer` is that actor's half.
        """
        if self.id[5] == self.gender:
            return wearer
        return "right" if wearer == "left" else "left"


@dataclass
class _Files:
    """What a walk over the release finds, by dialogue; `sounds` by turn."""

    evaluations: dict[str, Path] = field(default_factory=dict)
    transcripts: dict[str, Path] = field(default_factory=dict)
    videos: dict[str, Path] = field(default_factory=dict)
    sounds: dict[str, Path] = field(default_factory=dict)
    empty: list[Path] = field(default_factory=list)


def read_iemocap(
    raw: Path,
    *,
    label_set: str = "erc7433",
    offset: float = 0.0,
    sides: Path | None = None,
    partial: bool = False,
) -> Release:
    """Rows of an IEMOCAP release.

    Args:
        raw: the folder of the release (the one with Session1 to Session5), or any folder above it.
        label_set: one of `LABEL_SETS`.
        offset: seconds added to the times at which the video is cut; the sounds are cut already.
        sides: a CSV with the columns dialogue and wearer (left or right), for dialogues where the wearer of
            the markers is not on the left.
        partial: accept a release with sessions, videos or sounds missing.

    Returns:
        One row per labelled turn, in the order of the dialogues. `split` is train for Sessions 1 to 4 and
        test for Session 5; the extra columns hold the session, the consensus label and the dimensions.

    Raises:
        UserError: no release, an unknown label set, a session or files missing, a file that cannot be read.
    """
    if label_set not in LABEL_SETS:
        raise UserError(f"no label set {label_set!r} for IEMOCAP: there are {', '.join(LABEL_SETS)}.")
    files = _find(raw)
    turns = _each_once((path, turn) for path in files.evaluations.values() for turn in read_evaluation(path))
    _check_sessions(raw, files, turns, partial)
    texts = {turn: text for path in files.transcripts.values() for turn, text in read_transcript(path).items()}
    wearers = _read_sides(sides) if sides else {}

    labelled = [(turn, label) for turn in turns if (label := turn.label(label_set))]
    notes = _missing(raw, files, [turn for turn, _ in labelled], partial)
    rows = []
    for turn, label in labelled:
        video = files.videos.get(turn.dialogue)
        cut = video is not None
        extra = {
            MARK: f"{NAME}:{label_set}",
            "session": str(turn.session),
            "consensus": turn.consensus,
            "dimensions": " ".join(turn.dimensions),
        }
        sound = files.sounds.get(turn.id)
        rows.append(
            Row(
                id=turn.id,
                video=video,
                audio=sound,
                text=texts.get(turn.id),
                label=label,
                speaker=f"Ses0{turn.session}_{turn.gender}",
                dialogue=turn.dialogue,
                split="test" if turn.session == TEST_SESSION else "train",
                start=max(0.0, round(turn.start + offset, 4)) if cut else None,
                end=round(turn.end + offset, 4) if cut else None,
                side=turn.side(wearers.get(turn.dialogue, "left")) if cut else None,
                audio_start=0.0 if cut and sound else None,
                extra=extra,
            )
        )
    if files.transcripts and (silent := [row.id for row in rows if row.text is None]):
        notes.append(f"{len(silent)} turns have no line in the transcripts: {some(silent)}.")
    return Release(f"{NAME}:{label_set}", rows, notes)


def count_differences(rows: Sequence[Row], label_set: str) -> list[str]:
    """Hold the turns of each class and session against the published counts."""
    if label_set not in COUNTS:
        raise UserError(f"no label set {label_set!r} for IEMOCAP: there are {', '.join(COUNTS)}.")
    where = f"IEMOCAP {label_set}"
    sentences = compare_counts(where, Counter(row.label for row in rows if row.label), COUNTS[label_set])
    if label_set in SESSION_COUNTS:
        sessions = Counter(f"Session {row.extra.get('session')}" for row in rows)
        published = {f"Session {number}": count for number, count in SESSION_COUNTS[label_set].items()}
        sentences += compare_counts(where, sessions, published)
    return sentences


def read_evaluation(path: Path) -> list[Turn]:
    """Turns of one `EmoEvaluation/<dialogue>.txt`, in the order of the file.

    Raises:
        UserError: the file has no turn, gives one turn two labels, or a label that the release does not have.
    """
    turns: list[Turn] = []
    external: list[frozenset[str]] = []
    own: list[frozenset[str]] = []
    head: re.Match[str] | None = None

    def finish() -> None:
        if head is not None:
            turns.append(
                Turn(
                    id=head[3],
                    start=float(head[1]),
                    end=float(head[2]),
                    consensus=head[7].lower(),
                    external=tuple(external),
                    own=tuple(own),
                    dimensions=tuple(part.strip() for part in (head[8] or "").split(",") if part.strip()),
                )
            )

    for line in _read_text(path).splitlines():
        if match := _TURN_LINE.match(line.strip()):
            finish()
            head, external, own = match, [], []
        elif head is not None and (match := _ANNOTATOR_LINE.match(line.strip())):
            # "Neutral; Anger;<TAB>(a remark)": the remark may name emotions, and is cut off by the pattern.
            named = frozenset(part.strip().lower() for part in match[2].split(";")) - {""}
            (external if match[1] == "E" else own).append(named)
    finish()
    if not turns:
        raise UserError(f"{path} holds no turn of IEMOCAP: the copy of the release is incomplete.")
    for turn in turns:
        if turn.consensus not in CONSENSUS:
            raise UserError(f"{path} gives {turn.id} the label {turn.consensus!r}, which IEMOCAP does not have.")
    return _each_once((path, turn) for turn in turns)


def _each_once(turns: Iterable[tuple[Path, Turn]]) -> list[Turn]:
    """Turns without repetitions; refuses one with two labels."""
    first: dict[str, Turn] = {}
    for path, turn in turns:
        if (other := first.setdefault(turn.id, turn)).consensus != turn.consensus:
            raise UserError(f"{path} gives {turn.id} two labels, {other.consensus} and {turn.consensus}.")
    return list(first.values())


def read_transcript(path: Path) -> dict[str, str]:
    """Text by turn of one `transcriptions/<dialogue>.txt`; lines that are no turn with text are skipped."""
    matches = (_TRANSCRIPT_LINE.match(line.strip()) for line in _read_text(path).splitlines())
    return {match[1]: text for match in matches if match and (text := match[5].strip())}


def write_contact_sheets(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw one picture per dialogue to check `side` by eye: whole frames, the half that is taken outlined.

    Args:
        rows: of `read_iemocap`; those without a video or a side are left out.
        folder: where `<dialogue>.png` go.

    Returns:
        The pictures written. A dialogue whose video cannot be decoded has none: the preparation names it.
    """
    from deepmsi.data.contact import draw_sheet

    dialogues: dict[str, list[Row]] = {}
    for row in rows:
        if row.video is not None and row.side is not None and row.dialogue is not None:
            dialogues.setdefault(row.dialogue, []).append(row)
    sheets = []
    for dialogue, turns in dialogues.items():
        step = max(1, len(turns) // _SHEET_TURNS)
        path = folder / f"{dialogue}.png"
        if draw_sheet(turns[::step][:_SHEET_TURNS], path):
            sheets.append(path)
    return sheets


def _find(raw: Path) -> _Files:
    files = _Files()
    elsewhere = []
    for folder, names in walk(raw, _SKIP):
        kind = folder.name.lower()
        for name in names:
            path = folder / name
            suffix = path.suffix.lower()
            if suffix not in (".txt", ".avi", ".mp4", ".wav") or not _DIALOGUE_NAME.fullmatch(path.stem):
                continue
            if suffix == ".txt" and kind == "emoevaluation":
                target = files.evaluations
            elif suffix == ".txt" and kind.startswith("transcription"):
                target = files.transcripts
            elif suffix == ".txt":
                elsewhere.append(path)
                continue
            elif suffix in (".avi", ".mp4"):
                target = files.videos
            elif _TURN_NAME.fullmatch(path.stem):
                target = files.sounds  # dialog/wav holds whole dialogues, whose names are no turn's
            else:
                continue
            if not path.stat().st_size:
                files.empty.append(path)
            else:
                target.setdefault(path.stem, path)
    for path in elsewhere:  # folders that were renamed are known by what their files hold
        if (kin := _kind_of(files, path)) is not None:
            kin.setdefault(path.stem, path)
    if not files.evaluations:
        cure = f": unpack {some(found)} first" if (found := archives(raw)) else ""
        raise UserError(f"{raw} is no IEMOCAP release: there is no Session*/dialog/EmoEvaluation/Ses*.txt in it{cure}.")
    return files


def _kind_of(files: _Files, path: Path) -> dict[str, Path] | None:
    """Where a text file belongs by its first line of a known kind; None for annotators' own files and others."""
    for line in _read_text(path).splitlines():
        if _TURN_LINE.match(line.strip()):
            return files.evaluations
        if (match := _TRANSCRIPT_LINE.match(line.strip())) and match[4]:
            return files.transcripts
    return None


def _check_sessions(raw: Path, files: _Files, turns: Sequence[Turn], partial: bool) -> None:
    """Refuse a copy that lacks a whole session, or a dialogue's labels, unless that is wanted."""
    if partial:
        return
    present = {turn.session for turn in turns}
    if missing := [str(number) for number in SESSIONS if number not in present]:
        raise UserError(
            f"{raw} lacks the labels of Session {' and '.join(missing)} "
            f"(Session{missing[0]}/dialog/EmoEvaluation): complete the copy, or say that it is partial (--partial)."
        )
    if files.empty:
        raise UserError(
            f"{raw} holds empty files, {some(files.empty)}: the copy is incomplete, copy them again, "
            "or say that it is partial (--partial)."
        )
    media = files.transcripts.keys() | files.videos.keys()
    if unlabelled := sorted(media - files.evaluations.keys()):
        raise UserError(
            f"{raw} lacks EmoEvaluation files of dialogues whose other files are there, {some(unlabelled)}: "
            "complete the copy, or say that it is partial (--partial)."
        )


def _missing(raw: Path, files: _Files, turns: Sequence[Turn], partial: bool) -> list[str]:
    """Notes on modalities that the whole release lacks; refuses those that only a part lacks."""
    dialogues = list(dict.fromkeys(turn.dialogue for turn in turns))
    kinds: tuple[tuple[str, str, Mapping[str, Path], Sequence[str]], ...] = (
        ("videos", "dialog/avi/DivX", files.videos, dialogues),
        ("transcripts", "dialog/transcriptions", files.transcripts, dialogues),
        ("sounds", "sentences/wav", files.sounds, [turn.id for turn in turns]),
    )
    notes = []
    for what, place, found, wanted in kinds:
        absent = [name for name in wanted if name not in found]
        if absent and len(absent) == len(wanted):
            notes.append(f"The release holds no {what} ({place}).")
        elif absent:
            sentence = f"{len(absent)} of {len(wanted)} {what} are absent from {place}, {some(absent)}"
            if not partial:
                raise UserError(f"{raw}: {sentence}: complete the copy, or say that it is partial (--partial).")
            notes.append(f"{sentence}; these rows do without.")
    return notes


def _read_sides(path: Path) -> dict[str, Side]:
    wearers: dict[str, Side] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line in csv.DictReader(file):
                wearer = line["wearer"].strip().lower()
                if wearer not in ("left", "right"):
                    raise ValueError
                wearers[line["dialogue"].strip()] = "left" if wearer == "left" else "right"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except (KeyError, ValueError, AttributeError):
        raise UserError(
            f"{path} is no list of sides: it needs the columns dialogue and wearer, left or right."
        ) from None
    return wearers


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")
