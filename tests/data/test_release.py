"""`deepmsi prepare meld|iemocap RAW` and what `deepmsi check` says of a release's counts."""

from pathlib import Path

import pytest

from deepmsi.cli import main
from deepmsi.data.check import check
from deepmsi.data.manifest import read_manifest


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
    lines = [f'{i},Hello there,Joey,joy,positive,0,{i},1,1,"00:00:01,000","00:00:02,000"' for i in range(3)]
    folder = tmp_path / "raw" / "MELD.Raw"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"{split}_sent_emo.csv").write_text("\n".join([header, *lines]) + "\n")
    return tmp_path / "raw"


def test_prepare_a_release(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["prepare", "meld", str(raw), "--out", str(out), "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert "prepared 6 rows" in said.out
    assert "joy 3 instead of 1743" in said.err
    assert "no labels of test" in said.err
    assert len(read_manifest(out / "manifest.csv").rows) == 6


def test_check_holds_counts_against_the_published_ones(raw: Path, tmp_path: Path) -> None:
    for manifest in (raw / "MELD.Raw" / "train_sent_emo.csv", raw / "MELD.Raw"):
        sentences = [warning.sentence for warning in check(manifest).warnings]
        assert any("MELD train differs from the published counts" in sentence for sentence in sentences)
    own = tmp_path / "own.csv"
    own.write_text("id,text,label\n1,hello,joy\n2,no,anger\n")
    assert not any("published" in warning.sentence for warning in check(own).warnings)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["meld"], "prepare meld needs the folder of the release: deepmsi prepare meld RAW --out DIR"),
        (["melt", "RAW"], "'melt' is no release that deepmsi reads: there are meld and iemocap"),
        (["meld", "RAW", "--label-set", "four5531"], "--label-set goes with: deepmsi prepare iemocap RAW"),
        (["iemocap", "RAW", "--exclude", "x.csv"], "--exclude goes with: deepmsi prepare meld RAW"),
        (["manifest.csv", "--partial"], "--partial goes with: deepmsi prepare meld and iemocap RAW"),
        (["iemocap", "RAW"], "is no IEMOCAP release"),
    ],
)
def test_mistakes_get_one_line(
    words: list[str], sentence: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(raw) if word == "RAW" else word for word in words]
    assert main(["prepare", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
