"""Splits: disjoint, complete, grouped, repeatable, refused in one sentence where rows do not allow them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from deepmsi.data.manifest import DEV_NAMES
from deepmsi.errors import UserError
from deepmsi.models.config import validated
from deepmsi.train.protocols import (
    LEAKS,
    Fold,
    ProtocolSettings,
    both_sides,
    inner_folds,
    make_folds,
    restrict_folds,
    session_of,
)

LABELS = ("joy", "anger", "fear")


@dataclass
class Row:
    id: str
    label: str | None = "joy"
    speaker: str | None = None
    dialogue: str | None = None
    split: str | None = None
    video: str | None = None
    audio: str | None = None
    text: str | None = None
    side: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    has_video: bool = True
    has_text: bool = True
    has_audio: bool = True


def corpus(n: int = 90) -> list[Row]:
    """Rows with every column: 18 dialogues of 5, 10 speakers two to a session, 3 labels, all by rule."""
    return [
        Row(
            id=f"Ses0{i // 18 + 1}F_{i:03d}",
            label=LABELS[(i * 7) % 3],
            speaker=f"s{i // 9}",
            dialogue=f"d{i // 5}",
            split=("train", "train", "train", "dev", "test")[i % 5],
        )
        for i in range(n)
    ]


PROTOCOLS = [
    {"name": "stratified-kfold", "folds": 4, "repeats": 2},
    {"name": "leave-one-out"},
    {"name": "group-kfold", "folds": 4, "repeats": 2},
    {"name": "group-kfold", "group": "speaker", "folds": 3},
    {"name": "leave-one-speaker-out"},
    {"name": "leave-one-session-out"},
    {"name": "paper-kfold10"},
]


@pytest.mark.parametrize("settings", PROTOCOLS, ids=lambda s: f"{s['name']}-{s.get('group', '')}")
def test_folds_are_disjoint_complete_and_repeatable(settings: dict) -> None:
    rows, protocol = corpus(), ProtocolSettings(**settings)
    folds = make_folds(protocol, rows, seed=1)
    reported = Counter(int(i) for fold in folds for i in fold.test)
    assert reported == dict.fromkeys(range(len(rows)), protocol.repeats)
    assert len({fold.name for fold in folds}) == len(folds)
    for fold in folds:
        assert not set(fold.train) & set(fold.test)
        assert len(fold.test)
    again = make_folds(protocol, rows, seed=1)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(folds, again, strict=True))


@pytest.mark.parametrize(
    ("settings", "column"),
    [
        ({"name": "group-kfold", "folds": 4}, "dialogue"),
        ({"name": "group-kfold", "group": "speaker", "folds": 3}, "speaker"),
        ({"name": "leave-one-speaker-out"}, "speaker"),
    ],
)
def test_groups_stay_on_one_side(settings: dict, column: str) -> None:
    rows = corpus()
    for fold in make_folds(ProtocolSettings(**settings), rows, seed=0):
        train, test = ({getattr(rows[i], column) for i in part} for part in (fold.train, fold.test))
        assert not train & test
        for inner in inner_folds(rows, fold.train, ProtocolSettings(**settings), 3, 1, seed=0):
            assert not {getattr(rows[i], column) for i in inner.train} & {getattr(rows[i], column) for i in inner.test}
            assert not set(inner.test) & set(fold.test)
            assert not set(inner.train) & set(fold.test)


def test_reported_rows_that_training_knows_are_told() -> None:
    rows = corpus(18)  # two speakers, four dialogues
    for i, row in enumerate(rows):
        row.video, row.audio = ("film.mp4", None) if i % 9 == 0 else (None, f"{i}.wav")
    told = {
        settings.name: both_sides(rows, make_folds(settings, rows, seed=0))
        for settings in (
            ProtocolSettings(name="leave-one-out"),
            ProtocolSettings(name="leave-one-speaker-out"),
            ProtocolSettings(name="group-kfold", folds=4),
        )
    }
    assert told == {
        "leave-one-out": "18 by their speaker, 18 by their dialogue, 2 by their recording, of 18",
        # The second dialogue has both speakers.
        "leave-one-speaker-out": "5 by their dialogue, 2 by their recording, of 18",
        "group-kfold": "18 by their speaker, 2 by their recording, of 18",
    }
    for row in rows:
        row.speaker = row.dialogue = row.video = None
    assert both_sides(rows, make_folds(ProtocolSettings(name="leave-one-out"), rows, seed=0)) is None


def test_rows_that_cannot_be_held_out_keep_to_their_group_in_inner_folds_too() -> None:
    rows, settings = corpus(), ProtocolSettings(name="leave-one-speaker-out", held_out=["video"])
    for row in rows[::4]:
        row.has_video = False
    for fold in make_folds(settings, rows, seed=0):
        for inner in inner_folds(rows, fold.train, settings, 3, 1, seed=0):
            assert all(rows[i].has_video for i in inner.test)
            assert not {rows[i].speaker for i in inner.train} & {rows[i].speaker for i in inner.test}


def test_folds_of_fewer_rows_lose_what_is_gone() -> None:
    whole = np.arange(6)
    fold = Fold("test", train=whole[:2], test=whole[2:4], dev=whole[4:])
    (cut,) = restrict_folds([fold], whole, np.array([1, 2, 3]))
    assert (cut.train.tolist(), cut.test.tolist(), cut.dev) == ([0], [1, 2], None)
    with pytest.raises(UserError, match="No fold has rows to train on and rows to report"):
        restrict_folds([fold], whole, np.array([0, 1, 4]))


def test_sessions_stay_on_one_side() -> None:
    rows = corpus()
    folds = make_folds(ProtocolSettings(name="leave-one-session-out"), rows, seed=0)
    assert [fold.name for fold in folds] == [f"session-{k}" for k in range(1, 6)]
    (only,) = make_folds(ProtocolSettings(name="iemocap-session5"), rows, seed=0)
    assert {session_of(rows[i]) for i in only.test} == {"5"}
    assert {session_of(rows[i]) for i in only.train} == {"1", "2", "3", "4"}
    assert len(only.train) + len(only.test) == len(rows)
    assert session_of(Row("a", extra={"Session": "take 07"})) == "7"


@pytest.mark.parametrize("column", ["DIALOGUE", "Video", "take", "Take"])
def test_a_group_is_named_in_any_case(column: str) -> None:
    rows = corpus()
    for row in rows:
        row.video, row.extra = f"{row.dialogue}.mp4", {"Take": row.dialogue or ""}
    by_dialogue, named = (
        make_folds(ProtocolSettings(name="group-kfold", group=group), rows, seed=0) for group in ("dialogue", column)
    )
    assert all(set(a.test) == set(b.test) for a, b in zip(by_dialogue, named, strict=True))


def test_speakers_of_any_name_come_in_one_order() -> None:
    for names in (["²", "10", "1", "01"], ["01", "1", "10", "²"]):
        rows = [Row(f"{name}-{label}", label, speaker=name) for name in names for label in LABELS]
        folds = make_folds(ProtocolSettings(name="leave-one-speaker-out"), rows, seed=0)
        assert [fold.name for fold in folds] == [f"speaker-{name}" for name in ("01", "1", "10", "²")]


def test_stratified_folds_balance_every_label() -> None:
    rows = corpus(88)
    for fold in make_folds(ProtocolSettings(name="stratified-kfold", folds=5), rows, seed=3):
        assert len(fold.test) in (17, 18)
        for label in LABELS:
            total = sum(row.label == label for row in rows)
            assert abs(sum(rows[i].label == label for i in fold.test) - total / 5) < 1


@pytest.mark.parametrize("name", ["stratified-kfold", "group-kfold"])
def test_no_two_seeds_share_a_repeat(name: str) -> None:
    settings = ProtocolSettings(name=name, folds=3, repeats=3)
    parts = [tuple(fold.test.tolist()) for seed in range(4) for fold in make_folds(settings, corpus(), seed)]
    assert len(set(parts)) == len(parts) == 4 * 9
    rows, everything = corpus(), np.arange(90)
    inner = [
        tuple(fold.test.tolist()) for seed in (0, 1) for fold in inner_folds(rows, everything, settings, 3, 3, seed)
    ]
    assert len(set(inner)) == len(inner) == 2 * 9


def test_repeats_shuffle_anew() -> None:
    folds = make_folds(ProtocolSettings(name="stratified-kfold", folds=3, repeats=2), corpus(), seed=0)
    assert not np.array_equal(folds[0].test, folds[3].test)


def test_folds_stay_what_they_were() -> None:
    """A run that was begun before has to find its folds again, and figures are told of these."""
    rows, settings = corpus(15), ProtocolSettings(name="stratified-kfold", folds=3, held_out=["video"])
    for row in rows[1::3]:
        row.has_video = False
    folds = make_folds(settings, rows, seed=4)
    assert [fold.test.tolist() for fold in folds] == [[2, 6, 9, 11], [3, 8, 14], [0, 5, 12]]
    inner = inner_folds(rows, folds[0].train, settings, 2, 1, seed=5)
    assert [fold.test.tolist() for fold in inner] == [[3, 8, 14], [0, 5, 12]]
    assert [fold.train.tolist() for fold in inner] == [[0, 1, 4, 5, 7, 10, 12, 13], [1, 3, 4, 7, 8, 10, 13, 14]]


def test_only_rows_with_the_asked_modalities_are_held_out() -> None:
    rows = corpus(60)
    for row in rows[20:]:
        row.has_video = False
    protocol = ProtocolSettings(name="leave-one-out", held_out=["video", "audio"])
    folds = make_folds(protocol, rows, seed=0)
    assert sorted(int(i) for fold in folds for i in fold.test) == list(range(20))
    assert all(len(fold.train) == 59 for fold in folds)
    for inner in inner_folds(rows, folds[0].train, protocol, 3, 1, seed=0):
        assert all(rows[i].has_video for i in inner.test)
        assert set(range(20, 60)) <= set(inner.train)


def test_a_held_out_speaker_does_not_train_by_its_other_rows() -> None:
    rows = corpus()
    for row in rows[::2]:
        row.has_video = False
    folds = make_folds(ProtocolSettings(name="leave-one-speaker-out", held_out=["video"]), rows, seed=0)
    for fold in folds:
        assert all(rows[i].has_video for i in fold.test)
        assert not {rows[i].speaker for i in fold.train} & {rows[i].speaker for i in fold.test}


@pytest.mark.parametrize("dev", DEV_NAMES)
def test_split_column(dev: str) -> None:
    rows = corpus()
    for row in rows:
        row.split = dev if row.split == "dev" else row.split
    (fold,) = make_folds(ProtocolSettings(), rows, seed=0)
    assert fold.name == "test"
    assert fold.dev is not None
    assert {rows[i].split for i in fold.dev} == {dev}
    assert {rows[i].split for i in fold.train} == {"train"}
    assert len(fold.train) + len(fold.dev) + len(fold.test) == len(rows)
    (without_test,) = make_folds(ProtocolSettings(), [row for row in rows if row.split != "test"], seed=0)
    assert (without_test.name, without_test.dev) == ("dev", None)
    inner = inner_folds(rows, fold.train, ProtocolSettings(), 3, 1, seed=0)
    assert sorted(int(i) for part in inner for i in part.test) == sorted(fold.train.tolist())
    for part in inner:
        assert not {rows[i].dialogue for i in part.train} & {rows[i].dialogue for i in part.test}


def _split_by_speaker() -> list[Row]:
    """A train part of the speakers s0 to s6, a test part of others, dialogues of one speaker each."""
    rows = corpus()
    for i, row in enumerate(rows):
        row.split, row.dialogue = "train" if i < 63 else "test", f"d{i // 3}"
    return rows


def _mixed_dialogues(rows: list[Row]) -> None:
    rows[3].dialogue = "d4"  # of another speaker


def _a_speaker_on_both_sides(rows: list[Row]) -> None:
    rows[80].speaker = "s0"


def _a_row_without_a_speaker(rows: list[Row]) -> None:
    rows[3].speaker = None


def _reported_rows_without_speakers(rows: list[Row]) -> None:
    for row in rows[63:]:
        row.speaker = None


def _two_speakers(rows: list[Row]) -> None:
    for i in range(63):
        rows[i].speaker = f"s{i // 33}"


def _a_class_of_one_speaker(rows: list[Row]) -> None:
    for i in range(63):
        rows[i].label = "fear" if i < 9 else LABELS[i % 2]


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (lambda rows: None, "speaker"),
        (_mixed_dialogues, "dialogue"),
        (_a_speaker_on_both_sides, "dialogue"),
        (_a_row_without_a_speaker, "dialogue"),
        (_reported_rows_without_speakers, "dialogue"),
        (_two_speakers, "dialogue"),
        (_a_class_of_one_speaker, "dialogue"),
    ],
)
def test_inner_folds_of_a_split_by_speaker_leave_speakers_out(change: Any, column: str) -> None:
    rows = _split_by_speaker()
    change(rows)
    (fold,) = make_folds(ProtocolSettings(), rows, seed=0)
    inner = inner_folds(rows, fold.train, ProtocolSettings(), 3, 1, seed=0)
    assert sorted(int(i) for part in inner for i in part.test) == sorted(fold.train.tolist())

    def shared(column: str) -> int:
        sides = [[{getattr(rows[i], column) for i in side} for side in (part.train, part.test)] for part in inner]
        return sum(len(known & held) for known, held in sides)

    assert shared(column) == 0
    assert column == "speaker" or shared("speaker")


def test_inner_folds_that_lose_a_part_are_the_last_resort() -> None:
    rows = _split_by_speaker()
    for i, row in enumerate(rows):
        row.dialogue, row.label = None, "fear" if i < 3 else LABELS[i % 2]
    (fold,) = make_folds(ProtocolSettings(), rows, seed=0)
    inner = inner_folds(rows, fold.train, ProtocolSettings(), 3, 1, seed=0)
    assert len(inner) == 3, "by label: the speaker of all that is fear would be in no part"
    rows[0].label, rows[1].label, rows[2].label = "fear", "joy", "joy"
    assert len(inner_folds(rows, fold.train, ProtocolSettings(), 3, 1, seed=0)) == 2


def test_the_paper_protocol_says_that_it_leaks() -> None:
    assert LEAKS in ProtocolSettings(name="paper-kfold10").title
    assert "leaks" not in ProtocolSettings(name="group-kfold").title


def test_aliases_and_short_form() -> None:
    assert validated(ProtocolSettings, {"name": "meld"}, "here").name == "split-column"
    assert ProtocolSettings.model_validate("iemocap-loso").name == "leave-one-session-out"


def _without(rows: list[Row], **cells: object) -> list[Row]:
    for row in rows:
        for name, value in cells.items():
            setattr(row, name, value)
    return rows


@pytest.mark.parametrize(
    ("settings", "rows", "sentence"),
    [
        ({}, _without(corpus(), split=None), "has no split: fill the column split"),
        ({}, _without(corpus(), split="holdout"), "the split 'holdout'"),
        ({}, _without(corpus(), split="train"), "nothing to report"),
        ({}, _without(corpus(), split="test"), "No row has the split 'train'"),
        ({"name": "leave-one-speaker-out"}, _without(corpus(), speaker="me"), "All rows are of one speaker"),
        ({"name": "leave-one-speaker-out"}, _without(corpus(), speaker=None), "has no speaker"),
        ({"name": "group-kfold"}, _without(corpus(), dialogue=None), "has no dialogue"),
        ({"name": "group-kfold", "folds": 30}, corpus(), "has 18 groups, too few for 30 folds"),
        (
            {"name": "group-kfold", "group": "speaker"},
            _without(corpus(), speaker="me"),
            r"All rows to report have the same speaker \('me'\), which no number of folds can part: set",
        ),
        ({"name": "group-kfold", "group": "video"}, corpus(), "has no video: the protocol needs the column 'video'"),
        (
            {"name": "group-kfold", "group": "start"},
            _without(corpus(), extra={"Take": "1"}),
            r"no column 'start' to group by \(protocol\.group\): the rows have id, label, .*, Take\.",
        ),
        ({"name": "iemocap-session5"}, corpus(60), "needs Session 5"),
        ({"name": "leave-one-session-out"}, _without(corpus(), id="x"), "has no session"),
        ({"name": "paper-kfold10"}, corpus(7), "needs 10 rows or more; there are 7"),
        ({"name": "stratified-kfold", "folds": 9}, corpus(6), "6 rows cannot make 9 folds"),
        ({"name": "stratified-kfold"}, [*corpus(), Row("a", "awe")], "'awe' has one row"),
        ({"name": "leave-one-out"}, [*corpus(), Row("a", "awe")], "'awe' is in its test part and not"),
        (
            {"name": "leave-one-out", "held_out": ["video"]},
            _without(corpus(), has_video=False),
            "nothing to report",
        ),
    ],
)
def test_rows_that_do_not_allow_the_protocol(settings: dict, rows: list[Row], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_folds(ProtocolSettings(**settings), rows, seed=0)


def test_inner_folds_of_too_few_rows() -> None:
    rows = [Row("a", "joy"), Row("b", "fear")]
    with pytest.raises(UserError, match=r"train\.selection=last"):
        inner_folds(rows, np.arange(2), ProtocolSettings(name="leave-one-out"), 2, 1, seed=0)


def test_unknown_protocol_and_modality() -> None:
    with pytest.raises(UserError, match="name: input should be"):
        validated(ProtocolSettings, {"name": "magic"}, "here")
    with pytest.raises(UserError, match="'smell' is no modality"):
        validated(ProtocolSettings, {"held_out": ["smell"]}, "here")


def test_fold_is_plain_data() -> None:
    fold = Fold("01", np.array([0]), np.array([1]))
    assert fold.dev is None
