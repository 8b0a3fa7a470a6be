"""IEMOCAP's raw release: miniature trees in the true layout, with the traps that the real one holds."""

import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepmsi.data.contact import draw_sheet
from deepmsi.data.decode import decode_frames
from deepmsi.data.iemocap import (
    COUNTS,
    LABEL_SETS,
    SESSION_COUNTS,
    Turn,
    read_evaluation,
    read_iemocap,
    read_transcript,
    write_contact_sheets,
)
from deepmsi.data.manifest import Row, read_manifest
from deepmsi.data.options import PrepareOptions
from deepmsi.data.release import count_differences, prepare_release, read_release, write_manifest
from deepmsi.errors import UserError

HEAD = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"


def block(
    turn: str,
    label: str,
    external: tuple[str, ...] = ("Neutral;", "Neutral;", "Sadness;"),
    own: tuple[str, ...] = ("C-F1:\tNeutral;\t()",),
    start: float = 6.2901,
) -> str:
    """Write one turn as the release does, remarks and dimensional lines included."""
    lines = [f"[{start:.4f} - {start + 2:.4f}]\t{turn}\t{label}\t[2.5000, 2.5000, 2.5000]"]
    lines += [f"C-E{number}:\t{named}\t()" for number, named in enumerate(external, 2)]
    lines += own
    lines += ["A-E3:\tval 3; act 2; dom  2;\t()", "A-F1:\tval 3; act 2; dom  1;\t(happiness; really)"]
    return "\n".join(lines) + "\n\n"


OWN_HAPPY = ("C-F1:\tHappiness;\t()",)
SOME_HAPPY = ("Happiness;", "Neutral;", "Surprise;")

XXX = {
    # what it is: (external annotators, own annotations, whether it counts as happy)
    "one own happiness, one external": (SOME_HAPPY, OWN_HAPPY, True),
    "the man's own happiness": (SOME_HAPPY, ("C-M1:\tHappiness;\t(smiles)",), True),
    "external happiness among others": (("Excited; Happiness;", "Neutral;"), OWN_HAPPY, True),
    "no external happiness": (("Excited;", "Neutral;", "Surprise;"), OWN_HAPPY, False),
    "happiness in an external remark alone": (("Neutral;\t(Happiness;)",), OWN_HAPPY, False),
    "own happiness and more": (SOME_HAPPY, ("C-F1:\tHappiness; Excited;\t()",), False),
    "two own annotations": (SOME_HAPPY, ("C-F1:\tHappiness;\t()", "C-M1:\tHappiness;\t()"), False),
    "two that differ": (SOME_HAPPY, ("C-F1:\tHappiness;\t()", "C-M1:\tNeutral;\t()"), False),
    "no own annotation": (SOME_HAPPY, (), False),
    "own excitement": (SOME_HAPPY, ("C-F1:\tExcited;\t(happiness)",), False),
}


def one_turn(tmp_path: Path, text: str) -> Turn:
    path = tmp_path / "Ses01F_impro01.txt"
    path.write_text(HEAD + text)
    (turn,) = read_evaluation(path)
    return turn


@pytest.mark.parametrize("case", XXX)
def test_which_turns_without_consensus_are_happy(tmp_path: Path, case: str) -> None:
    external, own, happy = XXX[case]
    turn = one_turn(tmp_path, block("Ses01F_impro01_F000", "xxx", external, own))
    assert turn.label("erc7433") == ("hap" if happy else None)
    assert turn.label("consensus7380") is None
    assert turn.label("four5531") is None


@pytest.mark.parametrize("consensus", ["neu", "exc", "oth", "sur", "fea", "dis"])
def test_the_rule_touches_no_turn_with_a_consensus(tmp_path: Path, consensus: str) -> None:
    turn = one_turn(tmp_path, block("Ses01F_impro01_F000", consensus, SOME_HAPPY, OWN_HAPPY))
    assert turn.label("erc7433") == LABEL_SETS["erc7433"].get(consensus)
    assert turn.label("four5531") == {"neu": "neu", "exc": "hap"}.get(consensus)


def test_every_row_of_a_turn_is_read(tmp_path: Path) -> None:
    own = ("C-F1:\tNeutral; Anger;\t(curious)", "C-M1: Other; ()")
    turn = one_turn(tmp_path, block("Ses01F_impro01_M003", "ang", ("Anger;", "Anger; Frustration;\t(x (y)"), own))
    assert turn.external == (frozenset({"anger"}), frozenset({"anger", "frustration"}))
    assert turn.own == (frozenset({"neutral", "anger"}), frozenset({"other"}))
    assert (turn.start, turn.end) == (6.2901, 8.2901)
    assert turn.dimensions == ("2.5000", "2.5000", "2.5000")
    assert (turn.dialogue, turn.session, turn.gender) == ("Ses01F_impro01", 1, "M")


def test_rows_stay_with_their_turn(tmp_path: Path) -> None:
    path = tmp_path / "Ses04M_script01_1b.txt"
    path.write_bytes(
        (
            HEAD
            + block("Ses04M_script01_1b_M000", "xxx", SOME_HAPPY, ())
            + block("Ses04M_script01_1b_F001", "xxx", ("Neutral;\t(don’t know)",), OWN_HAPPY)
        )
        .replace("\n", "\r\n")
        .encode("cp1252")
    )
    first, second = read_evaluation(path)
    assert (first.dialogue, first.own, second.own) == ("Ses04M_script01_1b", (), (frozenset({"happiness"}),))
    assert first.label("erc7433") is None
    assert second.label("erc7433") is None


@pytest.mark.parametrize(
    ("turn", "side"),
    [
        ("Ses01F_impro01_F000", "left"),
        ("Ses01F_impro01_M000", "right"),
        ("Ses03M_script02_1_M004", "left"),
        ("Ses03M_script02_1_F004", "right"),
    ],
)
def test_the_wearer_of_the_markers_is_on_the_left(turn: str, side: str) -> None:
    assert Turn(turn, 0, 1, "neu").side() == side
    assert Turn(turn, 0, 1, "neu").side("right") != side


def test_transcript_lines_that_are_no_turn_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "Ses01F_impro01.txt"
    path.write_bytes(
        b"Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.\r\n"
        b"M: no turn at all\n"
        b"Ses01F_impro01_M000 [007.5712-010.4750]: Do you have your forms: yes? [LAUGHTER]\n"
        b"Ses01F_impro01_FXX0 [010.0-011.0]: \n"
        b"[11.0-12.0] Ses01F_impro01_M001: order\n"
        b"\n"
        b"Ses01F_impro01_M002 [12.5-13.5]: It\x92s fine\n"
    )
    assert read_transcript(path) == {
        "Ses01F_impro01_F000": "Excuse me.",
        "Ses01F_impro01_M000": "Do you have your forms: yes? [LAUGHTER]",
        "Ses01F_impro01_M002": "It’s fine",
    }


DIALOGUES = {
    1: "Ses01F_impro01",
    2: "Ses02M_script01_1",
    3: "Ses03F_impro02",
    4: "Ses04M_impro03",
    5: "Ses05F_script03_2",
}


def release(raw: Path, nesting: str = "Session{n}") -> Path:
    """Write a miniature release: one dialogue a session with three turns that count and two that do not."""
    for number, dialogue in DIALOGUES.items():
        base = raw / nesting.format(n=number)
        turns = {
            f"{dialogue}_F000": block(f"{dialogue}_F000", "neu", start=1.5),
            f"{dialogue}_M000": block(f"{dialogue}_M000", "exc", start=4.25),
            f"{dialogue}_F001": block(f"{dialogue}_F001", "xxx", SOME_HAPPY, OWN_HAPPY, start=7),
            f"{dialogue}_M001": block(f"{dialogue}_M001", "xxx", SOME_HAPPY, start=9.5),
            f"{dialogue}_F002": block(f"{dialogue}_F002", "oth", start=12),
        }
        files = {
            f"dialog/EmoEvaluation/{dialogue}.txt": HEAD + "".join(turns.values()),
            f"dialog/EmoEvaluation/._{dialogue}.txt": "\0\5\x16\7",
            f"dialog/EmoEvaluation/Categorical/{dialogue}_e1_cat.txt": f"{dialogue}_F000 :Anger; ()\n",
            f"dialog/EmoEvaluation/Attribute/{dialogue}.txt": "nonsense",
            f"dialog/transcriptions/{dialogue}.txt": "".join(
                f"{turn} [001.5-003.5]: This is {turn}.\n" for turn in turns
            )
            + "F: a stray line\n",
            f"dialog/transcriptions/._{dialogue}.txt": "\0",
            f"dialog/avi/DivX/{dialogue}.avi": "video",
            f"dialog/avi/DivX/._{dialogue}.avi": "\0",
            f"dialog/wav/{dialogue}.wav": "the whole dialogue",
            f"dialog/MOCAP_head/{dialogue}/x.txt": "",
            f"sentences/ForcedAlignment/{dialogue}/{dialogue}_F000.wdseg": "",
        }
        files |= {f"sentences/wav/{dialogue}/{turn}.wav": "sound" for turn in turns}
        files |= {f"sentences/wav/{dialogue}/._{turn}.wav": "\0" for turn in turns}
        for name, content in files.items():
            path = base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return raw


@pytest.mark.parametrize(
    "nesting",
    [
        "Session{n}",
        "IEMOCAP_full_release/Session{n}",
        "IEMOCAP/IEMOCAP_full_release/IEMOCAP_full_release/Session{n}",
        "session {n} (copy)",
        "s0{n}",
    ],
)
def test_every_nesting_gives_the_same_rows(tmp_path: Path, nesting: str) -> None:
    result = read_iemocap(release(tmp_path, nesting))
    assert [row.id for row in result.rows] == [
        f"{dialogue}_{turn}" for dialogue in DIALOGUES.values() for turn in ("F000", "M000", "F001")
    ]
    assert [row.label for row in result.rows[:3]] == ["neu", "exc", "hap"]
    base = tmp_path / nesting.format(n=2)
    row = result.rows[4]
    assert row.video == base / "dialog/avi/DivX/Ses02M_script01_1.avi"
    assert row.audio == base / "sentences/wav/Ses02M_script01_1/Ses02M_script01_1_M000.wav"
    assert row.text == "This is Ses02M_script01_1_M000."
    assert (row.start, row.end, row.side) == (4.25, 6.25, "left")
    assert (row.speaker, row.dialogue, row.split) == ("Ses02_M", "Ses02M_script01_1", "train")
    assert row.extra["session"] == "2"
    assert result.rows[-1].split == "test"
    assert result.notes == []


@pytest.mark.parametrize(("label_set", "labels"), [("consensus7380", ["neu", "exc"]), ("four5531", ["neu", "hap"])])
def test_label_sets(tmp_path: Path, label_set: str, labels: list[str]) -> None:
    rows = read_iemocap(release(tmp_path), label_set=label_set).rows
    assert [row.label for row in rows[:2]] == labels
    assert len(rows) == 10
    with pytest.raises(UserError, match=r"no label set 'erc' .*erc7433, consensus7380, four5531"):
        read_iemocap(tmp_path, label_set="erc")


def test_the_offset_moves_the_video_alone(tmp_path: Path) -> None:
    raw = release(tmp_path)
    assert (read_iemocap(raw, offset=0.5).rows[0].start, read_iemocap(raw, offset=0.5).rows[0].end) == (2.0, 4.0)
    row = read_iemocap(raw, offset=-2.0).rows[0]
    assert (row.start, row.end) == (0.0, 1.5)
    assert row.cut("video") == (0.0, 1.5)
    assert row.cut("audio") == (0.0, None)


def test_sides_can_be_overridden(tmp_path: Path) -> None:
    sides = tmp_path / "sides.csv"
    sides.write_text("dialogue,wearer\nSes01F_impro01,right\n")
    rows = read_iemocap(release(tmp_path / "raw"), sides=sides).rows
    assert [row.side for row in rows[:6]] == ["right", "left", "right", "right", "left", "right"]
    sides.write_text("dialogue,wearer\nSes01F_impro01,above\n")
    with pytest.raises(UserError, match=r"sides\.csv is no list of sides"):
        read_iemocap(tmp_path / "raw", sides=sides)


def remove(*patterns: str) -> Callable[[Path], None]:
    def do(raw: Path) -> None:
        for pattern in patterns:
            for path in sorted(raw.glob(pattern)):
                path.unlink()

    return do


def empty(pattern: str) -> Callable[[Path], None]:
    def do(raw: Path) -> None:
        (path,) = raw.glob(pattern)
        path.write_bytes(b"")

    return do


HALF_COPIES = {
    "session": (remove("Session3/**/*.*"), r"lacks the labels of Session 3 \(Session3/dialog/EmoEvaluation\)"),
    "labels of one dialogue": (
        remove("Session1/dialog/EmoEvaluation/Ses*.txt"),
        r"lacks the labels of Session 1",
    ),
    "a video": (remove("Session2/dialog/avi/DivX/*.avi"), r"1 of 5 videos are absent .*Ses02M_script01_1:"),
    "sounds": (remove("Session5/sentences/wav/*/*.wav"), r"3 of 15 sounds are absent .*Ses05F_script03_2_F000"),
    "an empty video": (empty("Session4/dialog/avi/DivX/Ses*.avi"), r"holds empty files, .*Ses04M_impro03\.avi"),
    "an empty table": (empty("Session4/dialog/EmoEvaluation/Ses*.txt"), r"lacks the labels of Session 4"),
}


@pytest.mark.parametrize("case", HALF_COPIES)
def test_a_half_copied_release_needs_consent(tmp_path: Path, case: str) -> None:
    spoil, sentence = HALF_COPIES[case]
    raw = release(tmp_path)
    spoil(raw)
    with pytest.raises(UserError, match=sentence):
        read_iemocap(raw)
    result = read_iemocap(raw, partial=True)
    assert 12 <= len(result.rows) <= 15
    # A row without its video is not cut: the times speak of the video alone.
    assert all((row.start is None) == (row.video is None) == (row.side is None) for row in result.rows)


def test_labels_of_one_dialogue_of_several(tmp_path: Path) -> None:
    raw = release(tmp_path)
    other = raw / "Session1/dialog/avi/DivX/Ses01M_impro07.avi"
    other.write_text("video")
    with pytest.raises(UserError, match=r"lacks EmoEvaluation files .*Ses01M_impro07"):
        read_iemocap(raw)


def test_wrong_folders_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_iemocap(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no IEMOCAP release: there is no Session\*/dialog"):
        read_iemocap(tmp_path)
    (tmp_path / "IEMOCAP_full_release.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"unpack .*IEMOCAP_full_release\.tar\.gz first"):
        read_iemocap(tmp_path)
    raw = release(tmp_path / "raw")
    table = raw / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    table.write_text(HEAD)
    with pytest.raises(UserError, match=r"Ses01F_impro01\.txt holds no turn"):
        read_iemocap(raw)
    table.write_text(block("Ses01F_impro01_F000", "neu") + block("Ses01F_impro01_F000", "ang"))
    with pytest.raises(UserError, match=r"gives Ses01F_impro01_F000 two labels, neu and ang"):
        read_iemocap(raw)
    with pytest.raises(UserError, match=r"no loader for a release named 'iemocap2'"):
        read_release("iemocap2", raw)


def test_labels_alone_are_written_and_no_more(tmp_path: Path) -> None:
    raw = release(tmp_path / "raw")
    remove("*/dialog/transcriptions/*.txt", "*/dialog/avi/*/*.avi", "*/sentences/wav/*/*.wav")(raw)
    result = read_iemocap(raw)
    assert len(result.rows) == 15
    assert len(result.notes) == 3
    said: list[str] = []
    with pytest.raises(UserError, match=r"holds labels alone \(15 are in .*manifest\.csv\)"):
        prepare_release("iemocap", raw, tmp_path / "out", note=said.append)
    assert any("hap 5 instead of 648" in sentence for sentence in said)


def test_the_manifest_is_read_back(tmp_path: Path) -> None:
    rows = read_iemocap(release(tmp_path / "raw")).rows
    back = read_manifest(write_manifest(rows, tmp_path / "out" / "manifest.csv")).rows
    assert [(r.id, r.text, r.label, r.speaker, r.dialogue, r.split, r.start, r.end, r.side, r.extra) for r in back] == [
        (r.id, r.text, r.label, r.speaker, r.dialogue, r.split, r.start, r.end, r.side, r.extra) for r in rows
    ]
    assert [r.audio.resolve() if r.audio else None for r in back] == [r.audio for r in rows]


def test_counts_are_held_against_the_published_ones(tmp_path: Path) -> None:
    assert {name: sum(counts.values()) for name, counts in COUNTS.items()} == {
        "erc7433": 7433,
        "consensus7380": 7380,
        "four5531": 5531,
    }
    assert sum(SESSION_COUNTS["erc7433"].values()) == 7433
    result = read_iemocap(release(tmp_path))
    labels, sessions = result.differences
    assert labels.startswith("IEMOCAP erc7433 differs from the published counts: hap 5 instead of 648, sad 0")
    assert "Session 1 3 instead of 1373" in sessions


def test_agreeing_counts_are_silent() -> None:
    kinds = [label for label, count in COUNTS["erc7433"].items() for _ in range(count)]
    sessions = [session for session, count in SESSION_COUNTS["erc7433"].items() for _ in range(count)]
    rows = [
        Row(str(i), label=label, extra={"release": "iemocap:erc7433", "session": str(session)})
        for i, (label, session) in enumerate(zip(kinds, sessions, strict=True))
    ]
    assert count_differences(rows) == []
    assert count_differences(rows[1:]) == [
        "IEMOCAP erc7433 differs from the published counts: hap 647 instead of 648.",
        "IEMOCAP erc7433 differs from the published counts: Session 1 1372 instead of 1373.",
    ]
    assert count_differences([Row("own", label="joy")]) == []


def write_dialogue(path: Path, seconds: float, fps: int = 10) -> None:
    """Write an AVI whose left half grows brighter by ten a second, and whose right half stays black."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 32, "yuv420p", 2_000_000
        for number in range(round(seconds * fps)):
            picture = np.zeros((32, 64, 3), np.uint8)
            picture[:, :32] = 10 * number // fps
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def write_sound(path: Path, seconds: float, level: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.full(round(16000 * seconds), level, "<i2").tobytes())


def test_the_way_from_the_release_to_prepared_data(tmp_path: Path) -> None:
    raw = release(tmp_path / "raw")
    for video in raw.glob("*/dialog/avi/DivX/Ses*.avi"):
        write_dialogue(video, 12)
    for level, sound in enumerate(sorted(raw.glob("*/sentences/wav/*/Ses*.wav")), 1):
        write_sound(sound, 2, 100 * level)
    levels = {path.stem: 100 * i for i, path in enumerate(sorted(raw.glob("*/sentences/wav/*/Ses*.wav")), 1)}
    options = PrepareOptions(frames=3, size=32)
    data = prepare_release("iemocap", raw, tmp_path / "out", options, workers=0, progress=False)
    assert len(data.rows) == 15
    assert len(list((tmp_path / "out" / "contact_sheets").glob("*.png"))) == 5
    for i, row in enumerate(data.rows):
        # The sound is the turn's own file, whole, although the video is cut.
        sound = data.waveform(i)
        assert sound is not None
        assert len(sound) == pytest.approx(32000, abs=64)
        assert np.median(sound) == pytest.approx(levels[row.id] / 32768, rel=0.05)
        frames = data.frames(i)
        assert frames is not None
        if row.side == "right":
            assert frames.mean() < 3
        else:
            assert row.start is not None
            assert frames.mean() == pytest.approx(10 * (row.start + 1), abs=6)


def test_a_contact_sheet_outlines_the_half_that_is_taken(tmp_path: Path, shared_data: Path) -> None:
    from PIL import Image

    clip = next((shared_data / "ravdess" / "original").glob("*.mp4"))
    rows = [
        replace(row, video=clip, start=0.5, end=1.0) if row.dialogue == "Ses01F_impro01" else row
        for row in read_iemocap(release(tmp_path / "raw")).rows[:4]
    ]
    (path,) = write_contact_sheets(rows, tmp_path / "sheets")  # the other dialogue's video is no video
    assert path.name == "Ses01F_impro01.png"
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert sheet.shape == (256 + 18, 3 * 256, 3)
    whole = decode_frames(clip, 1, start=0.5, end=1, resize="pad")[0].transpose(1, 2, 0).astype(int)
    yellow = np.array([255, 210, 0])
    for place, left in ((0, 0), (1, 128), (2, 0)):  # F000 left, M000 right, F001 left
        tile = sheet[:256, place * 256 : place * 256 + 256]
        assert (tile[100, left] == yellow).all()
        assert (tile[100, left + 127] == yellow).all()
        other = slice(128, 256) if left == 0 else slice(0, 128)
        assert (tile[:, other] == whole[:, other]).all()
    assert not draw_sheet(rows[3:], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
