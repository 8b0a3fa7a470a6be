"""Scores against scikit-learn, intervals against closed forms, and the paired comparison."""

import csv
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from deepmsi.errors import UserError
from deepmsi.train.intervals import SUMMARY, grouped_intervals, wilson_interval
from deepmsi.train.metrics import compare_predictions, compute_metrics, legacy_f1, summarize_folds
from deepmsi.train.record import read_predictions

LABELS = ["neutral", "joy", "anger", "fear"]


def _random_predictions(seed: int, classes: int, n: int = 97) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, n)
    return true, np.where(rng.random(n) < 0.6, true, rng.integers(0, classes, n))


@pytest.mark.parametrize("classes", [4, 3, 2], ids=["all classes", "one absent", "two absent"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_scikit_learn(seed: int, classes: int) -> None:
    true, pred = _random_predictions(seed, classes)
    got = compute_metrics(true, pred, LABELS)
    assert got["n"] == 97
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(true, pred), abs=1e-12)
    assert got["uar"] == pytest.approx(sk.balanced_accuracy_score(true, pred), abs=1e-12)
    assert got["weighted_f1"] == pytest.approx(sk.f1_score(true, pred, average="weighted"), abs=1e-12)
    assert got["macro_f1"] == pytest.approx(sk.f1_score(true, pred, average="macro"), abs=1e-12)
    np.testing.assert_array_equal(got["confusion_matrix"], sk.confusion_matrix(true, pred, labels=range(4)))
    f1 = sk.f1_score(true, pred, labels=range(4), average=None, zero_division=0)
    assert [got["per_class"][name]["f1"] for name in LABELS] == pytest.approx(f1.tolist())
    assert got["never_predicted"] == LABELS[classes:]


def test_macro_f1_counts_a_class_that_is_only_predicted() -> None:
    true, pred = [0, 0, 1, 1], [0, 2, 1, 1]
    expected = sk.f1_score(true, pred, average="macro", zero_division=0)
    assert compute_metrics(true, pred, LABELS)["macro_f1"] == pytest.approx(expected)


def test_the_mean_probability_stands_beside_the_share_of_a_class() -> None:
    told = np.array([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]])
    got = compute_metrics([0, 1], [0, 0], LABELS, probabilities=told)["per_class"]
    assert [row["mean_probability"] for row in got.values()] == pytest.approx([0.55, 0.2, 0.15, 0.1])
    assert "mean_probability" not in compute_metrics([0, 1], [0, 0], LABELS)["per_class"]["joy"]


def test_names_and_ids_score_alike() -> None:
    true, pred = _random_predictions(5, 4)
    named = compute_metrics([LABELS[k] for k in true], [LABELS[k] for k in pred], LABELS)
    assert named == compute_metrics(true, pred, LABELS)


def test_legacy_f1_is_the_f1_over_a_class_alone() -> None:
    true, pred = _random_predictions(2, 4)
    got = compute_metrics(true, pred, LABELS)["per_class"]
    for k, name in enumerate(LABELS):
        own = true == k
        alone = sk.f1_score(own[own], (pred == k)[own])
        assert got[name]["legacy_f1"] == pytest.approx(alone)
    assert legacy_f1(0.0) == 0.0


def test_wilson_interval() -> None:
    assert wilson_interval(21, 26) == pytest.approx((0.62124, 0.91493), abs=1e-5)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_bootstrap_interval_is_repeatable_and_holds_the_point() -> None:
    true, pred = _random_predictions(1, 4, n=400)
    first = compute_metrics(true, pred, LABELS, seed=3)
    assert first["intervals"] == compute_metrics(true, pred, LABELS, seed=3)["intervals"]
    for name in ("accuracy", "uar", "weighted_f1", "macro_f1"):
        low, high = first["intervals"][name]
        assert low < first[name] < high
    deviation = np.sqrt(first["accuracy"] * (1 - first["accuracy"]) / 400)
    low, high = first["intervals"]["accuracy"]
    assert (high - low) == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_intervals_over_groups_leave_out_one_at_a_time() -> None:
    """Against scikit-learn's scores of the rows without each group."""
    from scipy.stats import t as student

    true, pred = _random_predictions(4, 4, n=120)
    names = np.random.default_rng(0).choice(["ann", "bob", "eve", "kim", "lee", "zoe"], 120)
    whole = compute_metrics(true, pred, LABELS, groups={"speaker": names, "dialogue": [""] * 120})
    got = whole["intervals_by"]
    assert got.keys() == {"speaker"}
    assert got["speaker"]["groups"] == 6
    scores = {
        "accuracy": sk.accuracy_score,
        "uar": sk.balanced_accuracy_score,
        "weighted_f1": lambda y, p: sk.f1_score(y, p, average="weighted"),
        "macro_f1": lambda y, p: sk.f1_score(y, p, average="macro"),
    }
    sizes = np.unique(names, return_counts=True)[1]
    degrees = 120**2 / np.square(sizes).sum() - 1
    assert 3 < degrees < 5
    for name in SUMMARY:
        point = scores[name](true, pred)
        left = np.array([scores[name](true[names != one], pred[names != one]) for one in np.unique(names)])
        half = student.ppf(0.975, degrees) * np.sqrt(5 / 6 * np.square(left - point).sum())
        low, high = whole["intervals"]["accuracy_wilson" if name == "accuracy" else name]
        assert got["speaker"][name] == pytest.approx([min(low, point - half), max(high, point + half)]), name


def test_intervals_over_equal_groups_are_students() -> None:
    rng = np.random.default_rng(1)
    hits = rng.random((8, 25)) < rng.uniform(0.3, 0.9, (8, 1))
    true = np.zeros(200, dtype=np.int64)
    (got,) = grouped_intervals(true, [1 - hits.ravel()], 2, {"speaker": np.repeat(list("abcdefgh"), 25)}).values()
    from scipy.stats import t as student

    shares = hits.mean(1)
    assert got["accuracy"] == pytest.approx(student.interval(0.95, 7, shares.mean(), shares.std(ddof=1) / np.sqrt(8)))


def test_intervals_over_speakers_hold_for_other_speakers() -> None:
    """95 of 100 cover what speakers score on average, and of intervals over the rows of ten speakers far fewer."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(300):
        share = 1 / (1 + np.exp(-rng.normal(0, 0.6, 10)))
        hits = (rng.random((10, 60)) < share[:, None]).ravel()
        (by,) = grouped_intervals(
            np.zeros(600, int), [1 - hits], 2, {"speaker": np.repeat(list("abcdefghij"), 60)}
        ).values()
        for k, (low, high) in enumerate((by["accuracy"], wilson_interval(int(hits.sum()), 600))):
            covered[k] += low <= 0.5 <= high
    over_speakers, over_rows = covered / 300
    assert 0.92 < over_speakers < 0.98
    assert over_rows < 0.75


def test_two_speakers_that_are_alike_by_chance_do_not_make_a_score_sure() -> None:
    pred = np.tile([0] * 5 + [1] * 5, 2)
    got = compute_metrics([0] * 20, pred, LABELS, groups={"speaker": ["ann"] * 10 + ["bob"] * 10})
    assert got["intervals_by"]["speaker"]["accuracy"] == got["intervals"]["accuracy_wilson"]


@pytest.mark.parametrize("sizes", [[40] * 6 + [2] * 30, [120, 12, 12, 12, 12, 12]], ids=["many small", "one large"])
def test_few_large_groups_count_as_few(sizes: list[int]) -> None:
    """With the degrees of freedom of all groups they would cover 0.91 and 0.90."""
    rng = np.random.default_rng(0)
    names = np.repeat([str(k) for k in range(len(sizes))], sizes)
    covered = 0
    for _ in range(300):
        share = 1 / (1 + np.exp(-rng.normal(0, 0.6, len(sizes))))
        hits = rng.random(len(names)) < np.repeat(share, sizes)
        (by,) = grouped_intervals(np.zeros(len(names), int), [1 - hits], 2, {"speaker": names}).values()
        covered += by["accuracy"][0] <= 0.5 <= by["accuracy"][1]
    assert covered / 300 > 0.93


def test_scores_that_do_not_vary_have_no_bootstrap_interval() -> None:
    true = np.arange(21) % 3
    got = compute_metrics(true, true, LABELS, groups={"speaker": ["ann", "bob", "eve"] * 7})
    assert got["intervals"].keys() == {"accuracy_wilson"}
    assert got["intervals_by"]["speaker"] == {
        "groups": 3,
        "unnamed": 0,
        "accuracy": got["intervals"]["accuracy_wilson"],
    }


def test_groups_of_which_there_are_none_or_one() -> None:
    true, pred = _random_predictions(4, 4, n=6)
    rows = {"speaker": ["ann"] * 6, "dialogue": [str(k) for k in range(6)], "scene": ["a", "a", "", "b", "", "a"]}
    got = compute_metrics(true, pred, LABELS, groups=rows)["intervals_by"]
    assert got["speaker"] == {"groups": 1, "unnamed": 0}
    assert got.keys() == {"speaker", "scene"}, "each row a dialogue: an interval over rows tells it"
    assert got["scene"] == {"groups": 2, "unnamed": 2}, "rows of no scene are neither a scene together nor one each"


def test_the_memory_of_the_intervals_grows_with_the_rows_and_not_with_the_square_of_the_classes(tmp_path: Path) -> None:
    names = [f"w{k}" for k in range(400)]
    true, pred = _random_predictions(0, 400)
    files = [
        _write(
            tmp_path / f"{i}.csv",
            [(str(j), names[t], names[p]) for j, (t, p) in enumerate(zip(true, pred, strict=True))],
        )
        for i in range(2)
    ]
    tracemalloc.start()
    try:
        compute_metrics(true, pred, names)
        compare_predictions(*files, resamples=1000)
        assert tracemalloc.get_traced_memory()[1] < 100e6  # 1000 confusion matrices are 1.3 GB
    finally:
        tracemalloc.stop()


def test_fold_summary() -> None:
    folds = [compute_metrics(*_random_predictions(seed, 4), LABELS, resamples=0) for seed in range(4)]
    summary = summarize_folds(folds)
    values = [fold["uar"] for fold in folds]
    assert summary["uar"]["mean"] == pytest.approx(np.mean(values))
    assert summary["uar"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert summarize_folds(folds[:1])["uar"]["std"] == 0.0


@pytest.mark.parametrize(
    ("true", "pred", "sentence"),
    [
        ([], [], "no labelled rows"),
        ([0, 1], [0], "2 true labels do not go with 1"),
        ([0, 9], [0, 0], "Class 9 is outside"),
        (["joy", "bliss"], ["joy", "joy"], "'bliss' is not among"),
    ],
)
def test_bad_input_gets_its_sentence(true: list, pred: list, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compute_metrics(true, pred, LABELS)


def _write(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "label", "predicted"])
        writer.writerows(rows)
    return path


def test_paired_comparison(tmp_path: Path) -> None:
    from scipy.stats import binomtest

    rows = [(f"r{k}", "joy" if k % 2 else "anger") for k in range(60)]
    a = _write(tmp_path / "a.csv", [(key, y, "joy" if k < 40 else y) for k, (key, y) in enumerate(rows)])
    b = _write(tmp_path / "b.csv", [(key, y, "joy" if k < 10 else y) for k, (key, y) in enumerate(rows)])
    got = compare_predictions(a, b)
    assert (got["n"], got["only_a"], got["only_b"]) == (60, 0, 15)
    assert got["mcnemar_p"] == pytest.approx(binomtest(0, 15).pvalue)
    accuracy = got["accuracy"]
    assert accuracy["difference"] == pytest.approx(15 / 60)
    assert 0 < accuracy["interval"][0] < accuracy["difference"] < accuracy["interval"][1]
    same = compare_predictions(a, a)
    assert same["mcnemar_p"] == 1.0
    assert same["accuracy"]["interval"] == [0.0, 0.0]


def test_a_comparison_over_groups_pairs_them(tmp_path: Path) -> None:
    """Two runs of which one is better by the same rows in each dialogue differ by that without a doubt."""
    rng = np.random.default_rng(0)
    share = rng.uniform(0.1, 0.9, 12)
    rows = [(f"r{k}", f"d{k // 20}", rng.random() < share[k // 20]) for k in range(240)]
    a = _write(tmp_path / "a.csv", [(key, "joy", "joy" if hit else "fear") for key, _, hit in rows])
    better = {key for k, (key, _, _) in enumerate(rows) if k % 20 < 2}
    b = _write(tmp_path / "b.csv", [(key, "joy", "joy" if hit or key in better else "fear") for key, _, hit in rows])
    assert compare_predictions(a, b)["intervals_by"] == {}
    (tmp_path / "groups.csv").write_text(
        "id,speaker,dialogue\n" + "".join(f"{key},,{dialogue}\n" for key, dialogue, _ in rows)
    )
    got = compare_predictions(a, b)
    assert got["intervals_by"].keys() == {"dialogue"}
    low, high = got["intervals_by"]["dialogue"]["accuracy"]
    assert 0 < low < got["accuracy"]["difference"] < high < 0.1
    assert got["intervals_by"]["dialogue"]["groups"] == 12
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(b, other / "b.csv")
    (other / "groups.csv").write_text("\ufeffid,speaker,dialogue\n" + "".join(f"{key},,\n" for key, *_ in rows))
    assert compare_predictions(a, other / "b.csv") == got, "what either tells counts"
    back = compare_predictions(other / "b.csv", a)["intervals_by"]["dialogue"]
    assert back["accuracy"] == pytest.approx([-high, -low])
    (other / "groups.csv").write_text("id;speaker;dialogue\n")
    with pytest.raises(UserError, match="it lacks the column 'dialogue'"):
        compare_predictions(a, other / "b.csv")
    (tmp_path / "groups.csv").write_bytes(b"id,speaker,dialogue\n\xff,a,b\n")
    with pytest.raises(UserError, match="delete it, and intervals are over rows alone"):
        compare_predictions(a, b)


def test_comparison_refuses_what_does_not_pair(tmp_path: Path) -> None:
    a = _write(tmp_path / "a.csv", [("r1", "joy", "joy")])
    with pytest.raises(UserError, match="no row in common"):
        compare_predictions(a, _write(tmp_path / "b.csv", [("r2", "joy", "joy")]))
    with pytest.raises(UserError, match="disagree on the true label of 'r1'"):
        compare_predictions(a, _write(tmp_path / "c.csv", [("r1", "fear", "joy")]))
    with pytest.raises(UserError, match="cannot be read"):
        compare_predictions(a, tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"name,label\n", "lacks the column 'id'"),
        (b"id,label,predicted\nr1,joy\n", "row 'r1' has no prediction"),
        (b"id,label,predicted\nr1,joy,joy\nr1,joy,fear\n", "a row more than once"),
        (b"id,label,predicted\nr1,joy,\xff\n", "cannot be read"),
        ("id,label,predicted\nr1,joy,joy\n".encode("utf-16"), "cannot be read"),
    ],
    ids=["columns", "short", "repeated", "bytes", "encoding"],
)
def test_no_predictions_file(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_predictions(tmp_path / "a.csv")


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,label,predicted\nr1,joy,fear\n", encoding="utf-8-sig")
    assert read_predictions(tmp_path / "a.csv") == {"r1": ("joy", "fear")}
