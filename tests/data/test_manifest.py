"""Manifests: own tables in every encoding, MELD's own files, and one sentence for each mistake."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from deepmsi.data.check import check
from deepmsi.data.manifest import MELD_LABELS, count_labels, read_manifest, scan_manifest
from deepmsi.errors import UserError

HEADER = "id,video,audio,text,label,speaker,dialogue,split,start,end,side,mood\n"


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_every_column(tmp_path, encoding, delimiter):
    table = HEADER + 'a,v/a.mp4,,"It’s fine – really",joy,Zoë,d1,train,0.5,2,LEFT,x\n\nb,,b.wav,,,,,,,,,\n'
    table = table.replace(",", delimiter)
    rows = read_manifest(write(tmp_path / "m.csv", table, encoding)).rows
    assert rows[0].video == tmp_path / "v/a.mp4"
    assert (rows[0].text, rows[0].label, rows[0].speaker) == ("It’s fine – really", "joy", "Zoë")
    assert (rows[0].start, rows[0].end, rows[0].side) == (0.5, 2.0, "left")
    assert (rows[0].dialogue, rows[0].split, rows[0].extra) == ("d1", "train", {"mood": "x"})
    assert (rows[1].audio, rows[1].video, rows[1].text, rows[1].label) == (tmp_path / "b.wav", None, None, None)
    assert len(rows) == 2


@pytest.mark.parametrize("first", ["sep=;\n", '"sep=;"\r\n', "SEP=|\n"])
def test_a_separator_that_excel_was_told(tmp_path, first):
    text = first + "id;text;label\na;so, or so;joy\nb;;joy\n"
    path = write(tmp_path / "m.csv", text.replace(";", "|") if "|" in first else text)
    with pytest.raises(UserError, match=r"m\.csv:4: the row 'b' has no video"):
        read_manifest(path)
    (row,) = scan_manifest(path)[0].rows
    assert (row.id, row.text, row.label) == ("a", "so, or so", "joy")


@pytest.mark.parametrize("first", ["", "sep=;\n"])
def test_decimal_commas_where_cells_are_separated_otherwise(tmp_path, first):
    table = "id;video;text;start;end;audio;audio_start;audio_end\na;a.mp4;3,5;0,5;12,25;a.wav;,25;1.5\n"
    (row,) = read_manifest(write(tmp_path / "m.csv", first + table)).rows
    assert (row.start, row.end, row.audio_start, row.audio_end, row.text) == (0.5, 12.25, 0.25, 1.5, "3,5")
    with pytest.raises(UserError, match=r"start is '1\.234,5'; give seconds"):
        read_manifest(write(tmp_path / "m.csv", first + table.replace("0,5", "1.234,5")))
    for delimiter in (",", "\t"):
        cells = ["id", "text", "start"], ["a", "so", '"0,5"']
        with pytest.raises(UserError, match="start is '0,5'; give seconds"):
            read_manifest(write(tmp_path / "m.csv", "\n".join(map(delimiter.join, cells))))


def test_one_form_of_a_letter(tmp_path):
    rows = read_manifest(
        write(tmp_path / "m.csv", "id,text,label,video\na,x,ge\u0302ne,e\u0302.mp4\nb,x,g\u00eane,\n")
    ).rows
    assert rows[0].label == rows[1].label == "g\u00eane"
    assert rows[0].video == tmp_path / "e\u0302.mp4", "a file's name is what it is"


def test_jsonl(tmp_path):
    lines = [
        {"id": 7, "text": "so", "label": 3, "start": 1.5, "audio": "a.wav", "take": 2},
        {"id": "b", "text_features": "b.npy", "label": None},
        {"id": "c", "text": "so", "label": float("nan"), "end": float("inf")},
    ]
    path = write(tmp_path / "m.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n")
    rows = read_manifest(path).rows
    assert (rows[0].id, rows[0].label, rows[0].start, rows[0].extra) == ("7", "3", 1.5, {"take": "2"})
    assert (rows[1].text_features, rows[1].label) == (tmp_path / "b.npy", None)
    assert (rows[2].text, rows[2].label, rows[2].end) == ("so", None, None)


def test_json_lines_under_other_names(tmp_path):
    row = read_manifest(write(tmp_path / "m.json", '{"ID": "a", "Text": "so", "LABEL": "joy", "Take": 2}\n')).rows[0]
    assert (row.id, row.text, row.label, row.extra) == ("a", "so", "joy", {"Take": "2"})
    lines = ['{"id": "a", "text": "so"}', '{"id": "b", "Text": "no"}']
    assert [row.text for row in read_manifest(write(tmp_path / "manifest.json", "\n".join(lines))).rows] == ["so", "no"]
    assert len(read_manifest(tmp_path).rows) == 2
    with pytest.raises(UserError, match=r"m\.json:3: the row has the column 'text' twice"):
        read_manifest(write(tmp_path / "m.json", "\n".join([*lines, '{"id": "c", "text": "so", "Text": "no"}'])))
    with pytest.raises(UserError, match="the label cannot be read"):
        read_manifest(write(tmp_path / "m.json", '{"id": "a", "text": "so", "Label": [1]}'))


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_rows_in_json(tmp_path, indent):
    """As pandas writes it with orient="records"."""
    items = [
        {"id": 1, "text": "so", "label": None, "start": 0.5},
        {"id": 2, "text": "no", "label": "joy", "start": None},
    ]
    path = write(tmp_path / "m.json", json.dumps(items, indent=indent))
    rows = read_manifest(path).rows
    assert [(row.id, row.text, row.label, row.start) for row in rows] == [
        ("1", "so", None, 0.5),
        ("2", "no", "joy", None),
    ]
    items += [[1], "{}", {"id": "a/b", "text": "x"}, {"id": 3, "text": []}, {"id": 4, "text": "x", "Text": "y"}]
    text = json.dumps(items, indent=indent)[:-1] + ', {"id": 5, "id": 6}]'
    manifest, problems = scan_manifest(write(path, text))
    assert len(manifest.rows) == 2
    assert [(p.where.rpartition(":")[2], p.sentence) for p in problems] == [
        ("3", "the row is not a JSON object of column and value"),
        ("4", "the row is not a JSON object of column and value"),
        ("5", "the id 'a/b' holds a path separator; ids name files, so use other characters"),
        ("6", "the value of 'text' cannot be read: give text or a number, not a list or object"),
        ("7", "the row has the column 'text' twice"),
        ("8", "the row has the column 'id' twice"),
    ]


@pytest.mark.parametrize("text", ['[{"id": "a"}, {"id"', '[{"id": "a"}]\n[]', 99999 * "["])
def test_a_broken_array_gets_one_sentence(tmp_path, text):
    with pytest.raises(UserError, match=r"m\.json: the array of rows cannot be read as JSON \(.*\)$"):
        scan_manifest(write(tmp_path / "m.json", text))
    with pytest.raises(UserError, match=r"m\.json: the manifest has no rows"):
        scan_manifest(write(tmp_path / "m.json", "[]"))


def test_melds_columns_in_json_lines(tmp_path):
    line = {"Utterance": "so", "Speaker": "Joey", "Emotion": "joy", "Dialogue_ID": 1, "Utterance_ID": 2}
    lines = [{**line, "Utterance_ID": k} for k in range(3)]
    del lines[1]["Speaker"], lines[2]["Emotion"]
    manifest, (problem,) = scan_manifest(write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, lines))))
    assert [(row.id, row.speaker) for row in manifest.rows] == [("dia1_utt0", "Joey"), ("dia1_utt1", None)]
    assert "the emotion '' is none of MELD's" in problem.sentence


def test_absolute_paths_and_upper_case_names(tmp_path):
    row = read_manifest(write(tmp_path / "m.csv", "ID,Video,Label\na,/clips/a.mp4,joy\n")).rows[0]
    assert (row.id, row.video, row.label) == ("a", Path("/clips/a.mp4"), "joy")


BAD = {
    "duplicate-id": ("id,text\na,x\nb,y\na,z\n", r"m\.csv:4: the id 'a' is already taken at .*m\.csv:2"),
    "separator": ("id,text\nd/a,x\n", r"m\.csv:2: the id 'd/a' holds a path separator"),
    "backslash": ("id,text\nd\\a,x\n", r"m\.csv:2: .* path separator"),
    "dots": ("id,text\n..,x\n", r"m\.csv:2: .* path separator"),
    "no-id": ("id,text\n,x\n", r"m\.csv:2: the id is empty"),
    "no-id-column": ("name,text\na,x\n", r"no column 'id' .* rename the column 'name'"),
    "header-twice": ("id,text,Text\na,x,y\n", r"m\.csv:1: the column 'text' stands in the header twice"),
    "cells": ("id,text\na,x\nb,y,z\n", r"m\.csv:3: the line has 3 cells and the header has 2"),
    "quote": ('id,text\na,"x\n', r"m\.csv:2: .* CSV: a quote is opened and never closed"),
    "quote-inside": ('id,text\na,x\nb,"x" y\n', r"m\.csv:3: .* behind its closing quote; write a quote inside of it"),
    "long": (f"id,text\na,x\nb,{'y' * 131_073}\n", r"m\.csv:3: .* a cell is longer than 131,072 characters"),
    "start": ("id,text,start\na,x,soon\n", r"m\.csv:2: start is 'soon'; give seconds"),
    "negative": ("id,text,start\na,x,-1\n", r"m\.csv:2: start is '-1'"),
    "nan": ("id,text,end\na,x,nan\n", r"m\.csv:2: end is 'nan'"),
    "order": ("id,text,start,end\na,x,2,1\n", r"m\.csv:2: the end 1 s does not lie after the start 2 s"),
    "side": ("id,text,side\na,x,top\n", r"m\.csv:2: side is 'top'"),
    "label": ("id,text,label\na,x,j\x07y\n", r"m\.csv:2: the label .* cannot be read"),
    "nothing": ("id,text,label\na,,joy\n", r"m\.csv:2: the row 'a' has no video, no audio and no text"),
    "empty": ("  \n", r"m\.csv: the manifest is empty"),
    "only-a-mark": ("\ufeff", r"m\.csv: the manifest is empty"),
    "header-only": ("id,text\n", r"m\.csv: the manifest has no rows"),
    "binary": ("id,text\n\0", r"m\.csv: this is a binary file"),
    "two": ("id,text\nd/a,x\n..,x\n", r"m\.csv:2: .*and 1 more: see deepmsi check"),
    "multi-line": ('id,text\na,"x\ny"\nd/b,z\n', r"m\.csv:4: the id 'd/b'"),
}


def test_a_wide_table_that_is_cut_is_not_read_as_a_narrow_one(tmp_path):
    (tmp_path / "m.csv").write_bytes("id,text\na,x\n".encode("utf-16")[:-1])
    with pytest.raises(UserError, match=r"m\.csv: the manifest is neither UTF-8 nor cp1252; save it as UTF-8"):
        read_manifest(tmp_path / "m.csv")


@pytest.mark.parametrize("name", BAD)
def test_bad_table_gets_one_sentence(tmp_path, name):
    text, sentence = BAD[name]
    with pytest.raises(UserError, match=sentence) as caught:
        read_manifest(write(tmp_path / "m.csv", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"id": "a"', r"m\.jsonl:2: the line is not JSON"),
        ("[1]", r"m\.jsonl:2: the row is not a JSON object"),
        (9999 * '{"id":', r"m\.jsonl:2: the line is not JSON \("),
        (r'{"id": "a", "text": "so \ud83d"}', r"m\.jsonl:2: the value of 'text' holds '\\ud83d', one half"),
        ('{"id": "a", "text": "x", "label": ["joy"]}', r"m\.jsonl:2: the label cannot be read"),
        ('{"id": "a", "text": "x", "text": "y"}', r"m\.jsonl:2: the row has the column 'text' twice"),
        ('{"id": "a", "text": {}}', r"m\.jsonl:2: the value of 'text' cannot be read"),
    ],
)
def test_bad_jsonl(tmp_path, line, sentence):
    with pytest.raises(UserError, match=sentence):
        read_manifest(write(tmp_path / "m.jsonl", '{"id": "ok", "text": "x"}\n' + line))


def test_missing_manifest_and_folder(tmp_path):
    with pytest.raises(UserError, match="there is no such manifest"):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(UserError, match=r"no manifest\.csv, no \*_sent_emo\.csv"):
        read_manifest(tmp_path)


MELD_HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID\n"


def test_meld_layout(tmp_path):
    write(tmp_path / "test_sent_emo.csv", MELD_HEADER + "1,Why\x92d you?,Ross,Anger,negative,3,4\n")
    write(tmp_path / "train_sent_emo.csv", MELD_HEADER + "1,Oh’s,Joey,joy,positive,3,4\n", "cp1252")
    (row,) = read_manifest(tmp_path / "test_sent_emo.csv").rows
    assert (row.id, row.dialogue, row.split, row.label) == ("test_dia3_utt4", "test_dia3", "test", "anger")
    assert (row.text, row.speaker, row.video) == ("Why’d you?", "Ross", None)
    both = read_manifest(tmp_path)
    assert [r.id for r in both.rows] == ["train_dia3_utt4", "test_dia3_utt4"]
    assert both.rows[0].text == "Oh’s"
    assert both.kind == "meld"


def test_meld_clips_are_found_at_any_nesting(tmp_path):
    write(tmp_path / "dev_sent_emo.csv", MELD_HEADER + "1,a,A,joy,p,1,2\n2,b,B,fear,n,1,3\n")
    clips = tmp_path / "raw" / "dev_splits_complete" / "dev_splits_complete"
    clips.mkdir(parents=True)
    (clips / "dia1_utt2.mp4").touch()
    (clips / "._dia1_utt3.mp4").touch()
    rows = read_manifest(tmp_path / "dev_sent_emo.csv").rows
    assert rows[0].video == clips / "dia1_utt2.mp4"
    assert rows[1].video is not None
    assert not rows[1].video.exists(), "an absent clip is named, so that it is reported"


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [("1,a,A,bored,p,1,2", "'bored' is none of MELD's"), ("1,a,A,joy,p,x,2", "Dialogue_ID is 'x'")],
)
def test_bad_meld(tmp_path, cells, sentence):
    with pytest.raises(UserError, match=sentence):
        read_manifest(write(tmp_path / "dev_sent_emo.csv", MELD_HEADER + cells + "\n"))


@pytest.mark.parametrize(
    ("split", "counts", "dialogues"),
    [("train", (4710, 1205, 268, 683, 1743, 271, 1109), 1038), ("dev", (470, 150, 40, 111, 163, 22, 153), 114)],
)
def test_meld_counts(shared_data, split, counts, dialogues):
    manifest = read_manifest(shared_data / "meld" / f"{split}_sent_emo.csv")
    assert count_labels(manifest.rows) == {split: dict(sorted(zip(MELD_LABELS, counts, strict=True)))}
    assert len(manifest.rows) == sum(counts)
    assert len({row.dialogue for row in manifest.rows}) == dialogues
    assert all(row.text and row.text.isprintable() for row in manifest.rows)


def test_ravdess_manifest(shared_data):
    rows = read_manifest(shared_data / "ravdess" / "manifest.csv").rows
    assert len(rows) == 210
    assert sum(row.video is not None for row in rows) == 26
    assert all(path.is_file() for row in rows for path in (row.video, row.audio) if path)


def test_check(tmp_path, clip_writer):
    good = clip_writer(tmp_path / "good.mp4", sound=2.0)
    (tmp_path / "copy.mp4").write_bytes(good.read_bytes())
    (tmp_path / "half.mp4").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "empty.mp4").touch()
    clip_writer(tmp_path / "short.wav", [], sound=0.1)
    table = (
        "id,video,audio,label,split,dialogue,start,end\n"
        "good,good.mp4,,joy,train,d,,\n"
        "copy,copy.mp4,,joy,test,d,,\n"
        "cut,good.mp4,,Joy,train,,1,1.5\n"
        "half,half.mp4,,fear,train,,,\n"
        "empty,empty.mp4,,fear,train,,,\n"
        "gone,gone.mp4,,fear,train,,,\n"
        "short,,short.wav,,train,,,\n"
        "late,good.mp4,,fear,train,,7,9\n"
        "a/b,good.mp4,,fear,train,,,\n"
    )
    report = check(write(tmp_path / "m.csv", table))
    problems = {p.id: p.sentence for p in report.problems}
    assert set(problems) == {"half", "empty", "gone", "late", "a/b"}
    assert "truncated" in problems["half"]
    assert "no such file" in problems["gone"]
    assert "the file is empty" in problems["empty"]
    assert "behind the end" in problems["late"]
    warnings = " | ".join(w.sentence for w in report.warnings)
    assert "copy: its clip has the same content as good" in warnings
    assert "in another split (train and test)" in warnings
    assert "short: its audio lasts 0.10 s" in warnings
    assert "the label 'Joy' has one row" in warnings
    assert "'Joy' and 'joy' differ in spelling alone" in warnings
    assert "1 row has no label" in warnings
    assert "1 dialogue(s) stand in more than one split: d" in warnings
    assert "cut:" not in warnings, "another cut of a file is no duplicate"
    assert report.counts["train"] == {"": 1, "Joy": 1, "fear": 4, "joy": 1}
    text = report.render()
    assert "5 problems:" in text
    assert all(problem.sentence in text for problem in report.problems)
    assert json.loads(json.dumps(report.to_dict()))["rows"] == 8


def test_check_finds_texts_that_stand_in_several_splits(tmp_path):
    same = "we will never ever go back there"
    rows = [
        f"a,{same},,joy,train",
        f"b,{same},,joy,train",
        f"c,{same},,fear,test",
        f"d,{same},d.npy,joy,test",
        f"e,{same},,joy,",
        "f,Okay.,,joy,val",
        "g,Okay.,,joy,dev",
        "h,What are you doing here?,,joy,train",
        "i,What are you doing here?,,joy,test",
    ]
    path = write(tmp_path / "m.csv", "\n".join(["id,text,audio_features,label,split", *rows]) + "\n")
    assert not [w for w in check(path, workers=1).warnings if "of text alone" in w.sentence]
    write(path, path.read_text() + f"j,{same},,joy,test\nk,{same},,joy,dev\n")
    assert [w.sentence for w in check(path, workers=1).warnings if "of text alone" in w.sentence] == [
        f"2 rows of text alone have the text and the label of a row in another split (the first: j at {path}:11, "
        f"as a at {path}:2)"
    ]


@pytest.mark.parametrize("layout", ["mono", "7.1"])
def test_check_finds_sound_that_is_no_numbers(tmp_path, layout):
    for name, value in (("good", 0.1), ("bad", np.nan)):
        with av.open(str(tmp_path / f"{name}.wav"), "w") as container:
            stream = container.add_stream("pcm_f32le", rate=16000, layout=layout)
            samples = np.full((1, 16000 * stream.codec_context.channels), value, np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    report = check(write(tmp_path / "m.csv", "id,audio\ngood,good.wav\nbad,bad.wav\n"), workers=1)
    assert [p.sentence for p in report.problems] == [
        f"bad: {tmp_path / 'bad.wav'}: the sound holds samples that are not numbers"
    ]


def test_check_shows_how_far_it_is(tmp_path, monkeypatch):
    """Of thousands of clips it is silent for minutes."""
    shown = []
    monkeypatch.setattr("deepmsi.data.check.progress_bar", lambda found, **options: shown.append(options) or found)
    manifest = write(tmp_path / "m.csv", "id,video,audio\na,a.mp4,a.wav\nb,a.mp4,b.wav\n")
    for progress in (True, False):
        assert len(check(manifest, progress=progress).problems) == 4
    assert [(options["total"], options["shown"]) for options in shown] == [(3, True), (3, False)]


def test_check_tells_of_splits_that_training_refuses(tmp_path):
    table = "id,text,label,split,dialogue\n" + "".join(
        f"{i},word {i},{'ab'[i % 2]},{split},d{split.lower()[:1]}\n"
        for i, split in enumerate(["Train", "train", "val", "Validation", "TEST", "trian", ""])
    )
    table += "7,a row without a label trains nothing,,,d\n"
    warnings = [w.sentence for w in check(write(tmp_path / "m.csv", table)).warnings]
    assert [w for w in warnings if "split" in w and "trian" in w] == [
        "2 rows have a split other than train, dev and test, which training on the split refuses: 'trian', none"
    ]
    assert not [w for w in warnings if "dv" in w], "val and Validation are one part"


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("id,text,Labels", "m.csv: nothing reads the column 'Labels'; did you mean 'label'?"),
        ("id,text,video_path", "m.csv: nothing reads the column 'video_path'; did you mean 'video'?"),
        ("id,text,text_2", None),
        ("id,text,session", None),
    ],
)
def test_check_points_out_a_column_that_is_misspelt(tmp_path, header, told):
    report = check(write(tmp_path / "m.csv", f"{header}\na,well,x\n"), workers=1)
    assert [w.where.rpartition("/")[2] + ": " + w.sentence for w in report.warnings if "reads" in w.sentence] == (
        [told] if told else []
    )


def test_check_points_out_a_single_label(tmp_path):
    report = check(write(tmp_path / "m.csv", "id,text,label\na,well,joy\nb,so,joy\n"), workers=1)
    assert [w.sentence for w in report.warnings] == ["every label is 'joy', and a classifier needs two or more"]


def test_check_finds_nothing_wrong_with_real_data(shared_data):
    report = check(shared_data / "ravdess" / "manifest.csv")
    assert report.problems == ()
    assert report.warnings == ()
    assert report.modalities == {"video": 26, "sound": 210, "text": 210}
    assert "nothing wrong was found" in report.render()
    assert not [w for w in check(shared_data / "meld").warnings if "of text alone" in w.sentence]
