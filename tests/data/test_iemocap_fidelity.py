"""IEMOCAP at its true size and in its true format: every published count, and the oddities of real copies."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from deepmsi.cli import main
from deepmsi.data.check import check_release
from deepmsi.data.iemocap import COUNTS, SESSION_COUNTS, read_evaluation, read_iemocap, read_transcript
from deepmsi.errors import UserError

HEAD = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
NAMED = {
    **{"ang": "Anger", "hap": "Happiness", "sad": "Sadness", "neu": "Neutral", "fru": "Frustration", "exc": "Excited"},
    **{"sur": "Surprise", "fea": "Fear", "dis": "Disgust", "oth": "Other"},
}
# What the release holds beside the six classes: 10,039 turns in all.
OTHERS = {"sur": 107, "fea": 40, "oth": 3, "dis": 2, "xxx": 2507 - 53}
EXTRA_HAPPY = 53
DIALOGUES = [
    f"Ses0{session}{wearer}_{name}"
    for session in range(1, 6)
    for wearer in "FM"
    for name in [*(f"impro0{k}" for k in range(1, 9)), "script01_1", "script01_1b", "script01_2", "script03_2"]
]


def annotators(consensus: str, rng: random.Random) -> list[str]:
    """Lines as annotators left them; without consensus they differ, and never make a turn happy by the rule."""
    named = NAMED.get(consensus)
    votes = [named, named, rng.choice(list(NAMED.values()))] if named else ["Anger", "Sadness; Frustration", "Other"]
    lines = [
        f"C-E{k}:\t{vote};\t({rng.choice(['', 'Happiness;', 'a little (tense)'])})" for k, vote in enumerate(votes, 1)
    ]
    if rng.random() < 0.6:  # six of the ten actors annotated themselves
        lines.append(f"C-{rng.choice('FM')}1:\t{rng.choice(['Happiness', 'Neutral', 'Happiness; Excited'])};\t()")
    return [*lines, "A-E3:\tval 3; act 2; dom  2;\t()", "A-F1:\tval 3; act 2; dom  1;\t(Happiness;)"]


HAPPY = ["C-E1:\tHappiness; Excited;\t()", "C-E2:\tNeutral;\t()", "C-E4:\tSurprise;\t()", "C-M1:\tHappiness;\t()"]


def turns_of_the_release() -> dict[int, list[tuple[str, list[str]]]]:
    """Label and annotators of each of the 10,039 turns, by session, with the published counts of both."""
    rng = random.Random(0)
    kept = [(label, annotators(label, rng)) for label, n in COUNTS["consensus7380"].items() for _ in range(n)]
    kept += [("xxx", HAPPY)] * EXTRA_HAPPY
    left_out = [(label, annotators(label, rng)) for label, n in OTHERS.items() for _ in range(n)]
    rng.shuffle(kept)
    rng.shuffle(left_out)
    sessions, begun = {}, 0
    for session, count in SESSION_COUNTS["erc7433"].items():
        sessions[session] = kept[begun : begun + count] + left_out[session - 1 :: 5]
        begun += count
        rng.shuffle(sessions[session])
    assert sum(map(len, sessions.values())) == 10039
    return sessions


def write_labels(raw: Path, newline: str) -> None:
    for session, turns in turns_of_the_release().items():
        names = [name for name in DIALOGUES if name.startswith(f"Ses0{session}")]
        for place, dialogue in enumerate(names):
            folder = raw / f"Session{session}" / "dialog" / "EmoEvaluation"
            folder.mkdir(parents=True, exist_ok=True)
            text = HEAD
            for number, (label, lines) in enumerate(turns[place :: len(names)]):
                turn = f"{dialogue}_{'FM'[number % 2]}{number:03d}"
                text += (
                    f"[{4 * number + 0.29:.4f} - {4 * number + 3.5:.4f}]\t{turn}\t{label}\t[2.5000, 2.0000, 3.5000]\n"
                )
                text += "\n".join(lines) + "\n\n"
            (folder / f"{dialogue}.txt").write_bytes(text.replace("\n", newline).encode())
            for part, ending in (("Categorical", "e1_cat"), ("Attribute", "e3_atr"), ("Self-evaluation", "f_cat")):
                (folder / part).mkdir(exist_ok=True)
                (folder / part / f"{dialogue}_{ending}.txt").write_text(f"{dialogue}_F000 :Anger; ()\n")
            (folder / f"._{dialogue}.txt").write_bytes(b"\0\5\x16\7")


@pytest.fixture(scope="module", params=["\n", "\r\n"], ids=["LF", "CRLF"])
def labels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("iemocap")
    write_labels(raw, request.param)
    return raw


@pytest.mark.parametrize("label_set", COUNTS)
def test_the_published_counts_come_out(labels: Path, label_set: str) -> None:
    result = read_iemocap(labels, label_set=label_set)
    assert Counter(row.label for row in result.rows) == COUNTS[label_set]
    assert result.differences == []
    report = check_release("iemocap", labels, label_set=label_set)
    assert not report.problems
    assert main(["check", "iemocap", str(labels), "--label-set", label_set]) == 0
    if label_set == "erc7433":
        assert Counter(row.split for row in result.rows) == {"train": 5810, "test": 1623}
        assert len({row.speaker for row in result.rows}) == 10


def test_one_label_more_or_less_is_told(labels: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(labels, raw)
    path = next(p for p in sorted(raw.rglob("Ses05*.txt")) if b"\tang\t" in p.read_bytes() and "_cat" not in p.name)
    path.write_bytes(path.read_bytes().replace(b"\tang\t", b"\tsur\t", 1))
    sentences = read_iemocap(raw).differences
    assert [s.partition(": ")[2] for s in sentences] == ["ang 1102 instead of 1103.", "Session 5 1622 instead of 1623."]


def small(raw: Path) -> Path:
    """Write labels, transcripts and sounds of five dialogues, as the release lays them out."""
    for session in range(1, 6):
        dialogue = "Ses05M_script01_1b" if session == 5 else f"Ses0{session}F_impro01"
        base = raw / f"Session{session}"
        files = {
            f"dialog/EmoEvaluation/{dialogue}.txt": HEAD
            + f"[6.2901 - 8.2357]\t{dialogue}_F000\tneu\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n"
            + f"[10 - 11.3925]\t{dialogue}_M000\tfru\t[2.5, 2, 2.5]\nC-E2:\tFrustration; Anger;\t()\n\n",
            f"dialog/EmoEvaluation/Categorical/{dialogue}_e1_cat.txt": f"{dialogue}_F000 :Neutral; ()\n",
            f"dialog/transcriptions/{dialogue}.txt": f"{dialogue}_F000 [006.2901-008.2357]: Excuse me.\n"
            f"{dialogue}_FXX0 [007.0000-007.2000]: Yeah.\nM: [BREATHING]\n{dialogue}_M000: Without a time.\n",
            f"dialog/wav/{dialogue}.wav": "the whole dialogue",
            f"sentences/wav/{dialogue}/{dialogue}_F000.wav": "sound",
            f"sentences/wav/{dialogue}/{dialogue}_M000.wav": "sound",
            f"sentences/MOCAP_head/{dialogue}/{dialogue}_F000.txt": "Frame# Time pitch roll\n",
            f"sentences/ForcedAlignment/{dialogue}/{dialogue}_F000.wdseg": "SFrm EFrm\n",
        }
        for name, content in files.items():
            path = base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return raw


RENAMED = {
    "as published": (),
    "labels and transcripts in folders of other names": (("EmoEvaluation", "labels"), ("transcriptions", "text")),
    "sounds in one folder": (("sentences/wav/*", "sentences/all"),),
}


@pytest.mark.parametrize("case", RENAMED)
def test_renamed_folders_are_known_by_what_they_hold(tmp_path: Path, case: str) -> None:
    raw = small(tmp_path)
    for old, new in RENAMED[case]:
        for base in raw.glob("Session*"):
            for folder in list(base.glob(f"dialog/{old}")) + list(base.glob(old)):
                target = base / new if "/" in new else folder.with_name(new)
                target.mkdir(exist_ok=True)
                for path in folder.iterdir():
                    path.rename(target / path.name)
    result = read_iemocap(raw)
    assert [row.label for row in result.rows] == ["neu", "fru"] * 5
    assert result.notes == ["The release holds no videos (dialog/avi/DivX)."]
    assert [row.text for row in result.rows[:2]] == ["Excuse me.", "Without a time."]
    for row in result.rows:
        assert row.audio is not None
        assert row.audio.stem == row.id
    assert result.rows[-1].id == "Ses05M_script01_1b_M000"
    assert result.rows[-1].dialogue == "Ses05M_script01_1b"


def test_transcript_lines_without_a_sound_time_keep_their_text(tmp_path: Path) -> None:
    path = tmp_path / "Ses02M_impro03.txt"
    path.write_text(
        "Ses02M_impro03_F000 [-]: One.\nSes02M_impro03_F001: Two: yes.\nSes02M_impro03_M000[1.0-2.0] : Three.\n"
        "Ses02M_impro03_M001 no colon\nF: a stray line\n"
    )
    assert list(read_transcript(path).values()) == ["One.", "Two: yes.", "Three."]


def test_a_label_that_the_release_does_not_have_is_named(tmp_path: Path) -> None:
    path = tmp_path / "Ses01F_impro01.txt"
    path.write_text(HEAD + "[6.2901 - 8.2357]\tSes01F_impro01_F000\tbored\t[2.5000, 2.5000, 2.5000]\n")
    with pytest.raises(UserError, match=r"Ses01F_impro01\.txt gives Ses01F_impro01_F000 the label 'bored', which"):
        read_evaluation(path)


def test_a_turn_in_two_files_is_taken_once(tmp_path: Path) -> None:
    raw = small(tmp_path)
    evaluation = raw / "Session1/dialog/EmoEvaluation"
    twin = evaluation / "Ses01F_impro02.txt"
    shutil.copy(evaluation / "Ses01F_impro01.txt", twin)
    assert len(read_iemocap(raw).rows) == 10
    twin.write_text(twin.read_text().replace("\tfru\t", "\tang\t"))
    with pytest.raises(UserError, match=r"impro02\.txt gives Ses01F_impro01_M000 two labels, fru and ang"):
        read_iemocap(raw)
