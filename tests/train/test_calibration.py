"""Temperatures against a search, and the worth of probabilities against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn import metrics as sk

from deepmsi.train.calibration import fit_temperature, measure_calibration
from deepmsi.train.inference import softmax


def _drawn(n: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, 4], and classes drawn from their softmax at a temperature."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (n, 4)).astype(np.float32)
    return logits, (softmax(logits / temperature).cumsum(1) < rng.random((n, 1))).sum(1).clip(max=3)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_rows_were_drawn_at_is_found(temperature: float) -> None:
    logits, classes = _drawn(4000, temperature)
    assert fit_temperature(logits, classes) == pytest.approx(temperature, rel=0.1)


def test_the_temperature_is_the_best_of_all() -> None:
    logits, classes = _drawn(50, 2.0)
    grid = np.exp(np.linspace(-3, 3, 6001))
    rows = np.arange(50)
    cost = [-np.log(softmax(logits / t)[rows, classes]).sum() + np.log(t) ** 2 / 2 for t in grid]
    assert fit_temperature(logits, classes) == pytest.approx(grid[np.argmin(cost)], rel=2e-3)


@pytest.mark.parametrize("gap", [10.0, 40.0, 60.0, 300.0])
def test_however_sure_the_errors_are_they_count(gap: float) -> None:
    """One row in ten is wrong: confidence falls to nine tenths, by whatever factor that takes."""
    logits = np.zeros((1000, 2), np.float32)
    logits[:, 0] = gap
    classes = (np.arange(1000) % 10 == 0).astype(np.int64)
    temperature = fit_temperature(logits, classes)
    assert temperature == pytest.approx(gap / np.log(9), rel=0.05)


def test_rows_that_are_all_right_or_few_move_it_within_bounds() -> None:
    right = np.array([[1, 0, 0]] * 6, dtype=np.float32)
    assert 0.2 < fit_temperature(right, np.zeros(6, np.int64)) < 1
    assert 1 < fit_temperature(40 * right, np.ones(6, np.int64)) < 60
    assert fit_temperature(0 * right, np.zeros(6, np.int64)) == pytest.approx(1, abs=1e-3)


def test_scores_of_probabilities_equal_scikit_learn() -> None:
    logits, classes = _drawn(300, 1.0)
    p = softmax(logits)
    found = measure_calibration(classes, p)
    assert found["log_loss"] == pytest.approx(sk.log_loss(classes, p, labels=range(4)))
    assert found["brier"] == pytest.approx(sum(sk.brier_score_loss(classes == k, p[:, k]) for k in range(4)))


def test_calibration_error_by_hand() -> None:
    p = np.array([[0.95, 0.05], [0.91, 0.09], [0.35, 0.65], [1.0, 0.0], [0.5, 0.5]])
    found = measure_calibration(np.array([0, 1, 1, 0, 1]), p)
    assert found["reliability"] == [
        {"n": 1, "confidence": 0.5, "accuracy": 0.0},
        {"n": 1, "confidence": 0.65, "accuracy": 1.0},
        {"n": 3, "confidence": pytest.approx(2.86 / 3), "accuracy": pytest.approx(2 / 3)},
    ]
    assert found["ece"] == pytest.approx((0.5 + 0.35 + 0.86) / 5)


def test_a_class_that_was_ruled_out_has_a_finite_loss() -> None:
    assert np.isfinite(measure_calibration(np.array([1]), np.array([[1.0, 0.0]]))["log_loss"])


def test_what_a_temperature_mends_it_mends_on_other_rows() -> None:
    logits, classes = _drawn(4000, 3.0)
    temperature = fit_temperature(logits[:2000], classes[:2000])
    before, after = (measure_calibration(classes[2000:], softmax(logits[2000:] / t)) for t in (1.0, temperature))
    assert after["ece"] < 0.05 < before["ece"]
    assert after["log_loss"] < before["log_loss"]
    assert after["brier"] < before["brier"]
