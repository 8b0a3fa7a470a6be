"""The paper's tables as data."""

import pytest

from deepmsi.report.paper import TABLE_1_IEMOCAP, TABLE_2_MELD, TABLE_3_ABLATION, published_for


@pytest.mark.parametrize("table", [TABLE_1_IEMOCAP, TABLE_2_MELD], ids=["iemocap", "meld"])
def test_every_row_fills_every_column(table) -> None:
    assert len(table.columns) == len(table.labels) + 1
    assert len({name for name, _ in table.rows}) == len(table.rows)
    for _, pairs in table.rows:
        assert len(pairs) == len(table.columns)
        assert all(0 <= value <= 100 for pair in pairs for value in pair)


@pytest.mark.parametrize("table", [TABLE_1_IEMOCAP, TABLE_2_MELD], ids=["iemocap", "meld"])
def test_the_papers_f1_follows_recall(table) -> None:
    """Its F1 is 2r/(1+r), averaged over folds, which a concave function makes a little smaller."""
    *classes, _ = dict(table.rows)["DeepMSI-MER"]
    for recall, f1 in classes:
        closed_form = 200 * recall / (100 + recall)
        assert closed_form - 2.5 < f1 < closed_form + 0.2


def test_full_model_of_the_ablation_is_the_tables_average() -> None:
    for name, table in (("IEMOCAP", TABLE_1_IEMOCAP), ("MELD", TABLE_2_MELD)):
        accuracy, f1 = dict(table.rows)["DeepMSI-MER"][-1]
        last = TABLE_3_ABLATION[name][-1]
        assert last[0] == "T+A+V"
        assert last[1:] == pytest.approx((accuracy, f1), abs=0.0501)


@pytest.mark.parametrize(
    ("labels", "dataset"),
    [
        (["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"], "MELD"),
        (["Happy", "Sad", "Neutral", "Angry", "Excited", "Frustrated"], "IEMOCAP"),
        (["neutral", "joy", "sadness", "anger", "surprise", "fear"], None),
        (["hap", "happy", "sad", "neu", "ang", "exc", "fru"], None),
        ([], None),
    ],
)
def test_published_for(labels, dataset) -> None:
    found = published_for(labels)
    assert (found.dataset if found else None) == dataset
