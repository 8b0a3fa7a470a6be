"""MELD's raw release: miniature trees in the published layouts, with the traps that the real ones hold."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from deepmsi.data.check import check
from deepmsi.data.manifest import read_manifest
from deepmsi.data.meld import COUNTS, DIALOGUES, read_meld
from deepmsi.data.release import count_differences, read_release, write_manifest
from deepmsi.errors import UserError

COLUMNS = ["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"]
COLUMNS += ["Season", "Episode", "StartTime", "EndTime"]
FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}


def table(path: Path, keys: list[tuple[int, int]], encoding: str = "utf-8", **cells: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, (dialogue, utterance) in enumerate(keys):
            row = {
                "Sr No.": number + 1,
                "Utterance": f"You’ve said “{dialogue}, {utterance}” — haven’t you…",
                "Speaker": "Richard’s Date",
                "Emotion": "neutral",
                "Sentiment": "neutral",
                "Dialogue_ID": dialogue,
                "Utterance_ID": utterance,
                "Season": 8,
                "Episode": 21,
                "StartTime": "00:16:16,059",
                "EndTime": "0:16:21,731",
            }
            writer.writerow(row | cells)


def clips(folder: Path, keys: list[tuple[int, int]], prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for dialogue, utterance in keys:
        (folder / f"{prefix}dia{dialogue}_utt{utterance}.mp4").write_bytes(b"clip")


KEYS = {
    "train": [(0, 0), (0, 1), (1, 0), (1, 1), (125, 3)],
    "dev": [(0, 0), (0, 1), (110, 7)],
    "test": [(0, 0), (0, 1), (1, 0), (110, 7), (125, 3)],
}


def release(raw: Path, nesting: str = "{split}/{folder}", csv_folder: str = ".", **kwargs: str) -> Path:
    """Write a whole miniature release; the absent dev clip is absent, as in the real one."""
    for split, keys in KEYS.items():
        table(raw / csv_folder / f"{split}_sent_emo.csv", keys, **kwargs)
        present = [key for key in keys if (split, *key) != ("dev", 110, 7)]
        clips(raw / nesting.format(split=split, folder=FOLDERS[split]), present)
    return raw


@pytest.mark.parametrize(
    ("nesting", "csv_folder"),
    [
        ("{folder}", "."),
        ("{split}/{folder}", "."),
        ("MELD.Raw/{split}/{folder}", "MELD.Raw"),
        ("MELD-RAW/MELD.Raw/{split}/{folder}", "data/MELD"),
        ("clips/{split}", "labels"),
        ("clips/{split}_videos", "."),
        ("{split}_part/a/b", "."),
    ],
)
def test_every_nesting_gives_the_same_rows(tmp_path: Path, nesting: str, csv_folder: str) -> None:
    rows = read_meld(release(tmp_path, nesting, csv_folder)).rows
    assert [row.id for row in rows] == [f"{split}_dia{d}_utt{u}" for split, keys in KEYS.items() for d, u in keys]
    for row in rows:
        split, name = row.id.split("_", 1)
        assert row.split == split
        assert row.dialogue == f"{split}_{name.split('_')[0]}"
        if row.video is not None:
            # The same name exists in other splits: the path must be this split's.
            assert row.video.name == f"{name}.mp4"
            assert split in str(row.video.relative_to(tmp_path))
    assert len({row.video for row in rows if row.video}) == sum(row.video is not None for row in rows)


def test_known_bad_clips_are_left_out_in_their_split_alone(tmp_path: Path) -> None:
    result = read_meld(release(tmp_path))
    without = {row.id: row for row in result.rows if row.video is None}
    assert set(without) == {"train_dia125_utt3", "dev_dia110_utt7"}
    assert "cannot be decoded" in without["train_dia125_utt3"].extra["excluded"]
    assert all(row.text for row in without.values())
    assert any("train dia125_utt3, dev dia110_utt7" in note for note in result.notes)
    more = tmp_path / "more.csv"
    more.write_text("split,dialogue,utterance,reason\ntrain,9999,0,not in this copy\n")
    assert not any("9999" in note for note in read_meld(tmp_path, exclusions=more).notes)


def test_own_exclusions_come_on_top(tmp_path: Path) -> None:
    more = tmp_path / "more.csv"
    more.write_text("split,dialogue,utterance,reason\ntest,1,0,a black screen\n")
    rows = read_meld(release(tmp_path / "raw"), exclusions=more).rows
    assert {row.id for row in rows if row.video is None} == {
        "train_dia125_utt3",
        "dev_dia110_utt7",
        "test_dia1_utt0",
    }


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "split,dialogue,utterance,reason\ntrain,x,3,bad\n"])
def test_a_wrong_exclusion_list_is_named(tmp_path: Path, content: str) -> None:
    more = tmp_path / "more.csv"
    more.write_text(content)
    if content:
        with pytest.raises(UserError, match=r"more\.csv is no exclusion list"):
            read_meld(release(tmp_path / "raw"), exclusions=more)
    else:
        assert read_meld(release(tmp_path / "raw"), exclusions=more)
    with pytest.raises(UserError, match=r"absent\.csv cannot be read"):
        read_meld(tmp_path / "raw", exclusions=tmp_path / "absent.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_encodings_give_one_text(tmp_path: Path, encoding: str) -> None:
    row = read_meld(release(tmp_path, encoding=encoding)).rows[0]
    assert row.text == "You’ve said “0, 0” — haven’t you…"
    assert row.speaker == "Richard’s Date"


def test_text_that_was_encoded_twice_is_mended(tmp_path: Path) -> None:
    once = "It’s Rosé’s café… déjà vu"
    # Python's cp1252 has no character for some bytes, so the curly apostrophe stands for them all.
    twice = "".join(c if ord(c) < 128 else c.encode().decode("cp1252") for c in once if c != "à")
    raw = release(tmp_path)
    table(raw / "train_sent_emo.csv", KEYS["train"], Utterance=twice, Speaker="José")
    row = read_meld(raw).rows[0]
    assert row.text == once.replace("à", "")
    assert row.speaker == "José"  # a sound one stays as it is


def test_times_of_the_episode_do_not_cut_the_clip(tmp_path: Path) -> None:
    row = read_meld(release(tmp_path)).rows[0]
    assert (row.start, row.end) == (None, None)
    assert float(row.extra["episode_start"]) == pytest.approx(976.059)
    assert float(row.extra["episode_end"]) == pytest.approx(981.731)


def test_leavings_of_archives_and_extras_are_ignored(tmp_path: Path) -> None:
    raw = release(tmp_path)
    train, test = raw / "train" / FOLDERS["train"], raw / "test" / FOLDERS["test"]
    clips(train, [(0, 0), (0, 1)], prefix="._")
    clips(raw / "__MACOSX" / "train" / FOLDERS["train"], [(1, 0)])
    (raw / "._train_sent_emo.csv").write_bytes(b"\x00\x05\x16\x07")
    table(raw / "train_sent_emo_dya.csv", [(0, 0)], Emotion="anger")
    table(raw / "MELD_Dyadic" / "train_sent_emo_dya.csv", [(0, 0)], Emotion="anger")
    clips(train, [(0, 99), (2000, 0)])
    clips(test, [(0, 0), (93, 6)], prefix="final_videos_test")
    (train / "dia0_utt0.wav").write_bytes(b"sound")
    result = read_meld(raw)
    assert [row.id for row in result.rows] == [row.id for row in read_meld(release(tmp_path / "plain")).rows]
    videos = {row.id: row.video for row in result.rows}
    assert videos["train_dia0_utt0"] == train / "dia0_utt0.mp4"
    assert videos["test_dia0_utt0"] == test / "dia0_utt0.mp4"
    assert "3 clips have no label and are ignored." in result.notes


def test_a_test_clip_may_bear_its_other_name(tmp_path: Path) -> None:
    raw = release(tmp_path)
    folder = raw / "test" / FOLDERS["test"]
    (folder / "dia1_utt0.mp4").rename(folder / "final_videos_testdia1_utt0.mp4")
    videos = {row.id: row.video for row in read_meld(raw).rows}
    assert videos["test_dia1_utt0"] == folder / "final_videos_testdia1_utt0.mp4"


def test_a_folder_without_a_telling_name_is_known_by_its_clips(tmp_path: Path) -> None:
    raw = tmp_path
    keys = {"train": [(0, n) for n in range(20)], "dev": [(1, n) for n in range(20)]}
    for number, (split, names) in enumerate(keys.items()):
        table(raw / f"{split}_sent_emo.csv", names)
        clips(raw / f"part {number}", names)
    result = read_meld(raw)
    videos = {row.id: row.video for row in result.rows}
    assert videos["dev_dia1_utt3"] == raw / "part 1" / "dia1_utt3.mp4"
    assert any("taken to be the dev part" in note for note in result.notes)
    clips(raw / "part 2", [(7, 7)])
    with pytest.raises(UserError, match="part 2 holds MELD clips, but neither its name"):
        read_meld(raw)


def test_a_table_in_the_encoding_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    expected = read_meld(release(tmp_path / "utf-8"))
    found = read_meld(release(tmp_path / "utf-16", encoding="utf-16"))
    assert [row.text for row in found.rows] == [row.text for row in expected.rows]


def test_the_whole_copy_of_a_table_wins(tmp_path: Path) -> None:
    raw = release(tmp_path, csv_folder="b")
    table(raw / "a" / "train_sent_emo.csv", KEYS["train"][:2], encoding="cp1252")
    result = read_meld(raw)
    assert sum(row.split == "train" for row in result.rows) == len(KEYS["train"])
    assert any("has 2 of the 5 rows" in note for note in result.notes)
    table(raw / "a" / "train_sent_emo.csv", KEYS["train"][:2], Emotion="joy")
    with pytest.raises(UserError, match="give train_dia0_utt0 different emotions"):
        read_meld(raw)


def test_transcripts_alone_make_rows_of_text(tmp_path: Path) -> None:
    for split, keys in KEYS.items():
        table(tmp_path / f"{split}_sent_emo.csv", keys)
    result = read_meld(tmp_path)
    assert all(row.video is None and row.text for row in result.rows)
    assert not any("excluded" in row.extra for row in result.rows)


def test_wrong_and_incomplete_folders_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_meld(tmp_path / "nowhere")
    packed = tmp_path / "MELD.Raw.tar.gz"
    packed.write_bytes(b"")
    with pytest.raises(UserError, match=r"is a file: unpack it"):
        read_meld(packed)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"is no MELD release: there is no train_sent_emo\.csv"):
        read_meld(tmp_path / "other")
    raw = tmp_path / "half"
    for split, keys in KEYS.items():
        table(raw / f"{split}_sent_emo.csv", keys)
    (raw / "train.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"still packed: unpack .*train\.tar\.gz first"):
        read_meld(raw)


def test_a_half_copied_release_needs_consent(tmp_path: Path) -> None:
    raw = release(tmp_path)
    folder = raw / "dev" / FOLDERS["dev"]
    for clip in folder.iterdir():
        clip.unlink()
    with pytest.raises(UserError, match=r"none of the 3 clips of the dev part.*complete the copy"):
        read_meld(raw)
    (raw / "dev.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"unpack .*dev\.tar\.gz"):
        read_meld(raw)
    result = read_meld(raw, partial=True)
    assert sum(row.video is None for row in result.rows) == 1 + 3
    for path in (raw / "test" / FOLDERS["test"]).iterdir():
        path.unlink()
    clips(folder, KEYS["dev"])
    with pytest.raises(UserError, match=r"none of the 5 clips of the test part is there \(output_repeated"):
        read_meld(raw)
    clips(raw / "test" / FOLDERS["test"], KEYS["test"])
    # A copy that broke off leaves files without content.
    (raw / "train" / FOLDERS["train"] / "dia1_utt1.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 5 clips of the train part are absent: dia1_utt1\.mp4"):
        read_meld(raw)


def test_bad_tables_are_named(tmp_path: Path) -> None:
    raw = release(tmp_path)
    path = raw / "dev_sent_emo.csv"
    table(path, KEYS["dev"], Emotion="bored")
    with pytest.raises(UserError, match=r"dev_sent_emo\.csv:2: .*'bored'"):
        read_meld(raw)
    path.write_text("id,Utterance\n1,hello\n")
    with pytest.raises(UserError, match=r"needs the columns Speaker, Emotion, Dialogue_ID, Utterance_ID"):
        read_meld(raw)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"dev_sent_emo\.csv.* empty"):
        read_meld(raw)
    path.unlink()
    assert any("no labels of dev" in note for note in read_meld(raw).notes)
    (raw / "train_sent_emo.csv").unlink()
    with pytest.raises(UserError, match=r"no train_sent_emo\.csv: complete the copy"):
        read_meld(raw)
    assert {row.split for row in read_meld(raw, partial=True).rows} == {"test"}


def test_the_manifest_is_read_back(tmp_path: Path) -> None:
    rows = read_release("meld", release(tmp_path / "raw")).rows
    back = read_manifest(write_manifest(rows, tmp_path / "out" / "manifest.csv")).rows
    assert [(r.id, r.text, r.label, r.speaker, r.dialogue, r.split) for r in back] == [
        (r.id, r.text, r.label, r.speaker, r.dialogue, r.split) for r in rows
    ]
    assert [r.video.resolve() if r.video else None for r in back] == [r.video for r in rows]
    assert back[0].extra["release"] == "meld"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.csv"]


def test_tables_as_published_are_held_against_the_counts_too(tmp_path: Path) -> None:
    for path in (release(tmp_path) / "train_sent_emo.csv", tmp_path):
        sentences = [warning.sentence for warning in check(path).warnings]
        assert any("MELD train differs from the published counts: neutral 5" in sentence for sentence in sentences)
    own = tmp_path / "own.csv"
    own.write_text("id,text,label\ntrain_dia0_utt0,hello,joy\n2,no,anger\n")
    assert not any("published" in warning.sentence for warning in check(own).warnings)


def test_counts_are_held_against_the_published_ones(tmp_path: Path) -> None:
    differences = read_meld(release(tmp_path)).differences
    assert any("MELD train differs" in d and "neutral 5 instead of 4710" in d for d in differences)
    assert any("MELD test differs" in d and "dialogues 4 instead of 280" in d for d in differences)
    assert {split: sum(labels.values()) for split, labels in COUNTS.items()} == {
        "train": 9989,
        "dev": 1109,
        "test": 2610,
    }


def test_the_published_tables(shared_data: Path) -> None:
    result = read_meld(shared_data / "meld")
    assert result.differences == []
    for split in ("train", "dev"):
        part = [row for row in result.rows if row.split == split]
        assert Counter(row.label for row in part) == COUNTS[split]
        assert len({row.dialogue for row in part}) == DIALOGUES[split]
    assert len({row.id for row in result.rows}) == len(result.rows) == 9989 + 1109
    assert count_differences(read_manifest(shared_data / "meld").rows) == []
    fewer = [row for row in result.rows if row.id != "dev_dia0_utt0"]
    assert count_differences(fewer)[0] == "MELD dev differs from the published counts: sadness 110 instead of 111."
