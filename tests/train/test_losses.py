"""The classification loss against torch and closed forms."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from deepmsi.errors import UserError
from deepmsi.models.losses import classification_loss
from deepmsi.train.losses import class_weights, log_prior

torch.manual_seed(0)
LOGITS, LABELS = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_it_is_cross_entropy(weights: torch.Tensor | None, smoothing: float) -> None:
    got = classification_loss(LOGITS, LABELS, weights=weights, label_smoothing=smoothing)
    alike = F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing, reduction="none")
    share = torch.ones(9, dtype=torch.float64) if weights is None else weights[LABELS]
    torch.testing.assert_close(got, (share * alike).sum() / share.sum())
    if weights is None or not smoothing:
        torch.testing.assert_close(got, F.cross_entropy(LOGITS, LABELS, weights, label_smoothing=smoothing))


@pytest.mark.parametrize("options", [{}, {"weights": WEIGHTS}, {"log_prior": WEIGHTS.log(), "focal_gamma": 1.0}])
def test_rows_of_no_known_label_do_not_count(options: dict[str, Any]) -> None:
    labels = torch.where(torch.arange(9) % 3 == 0, -100, LABELS)
    options = {**options, "label_smoothing": 0.1}
    logits = LOGITS.clone().requires_grad_()
    got = classification_loss(logits, labels, **options)
    torch.testing.assert_close(got, classification_loss(LOGITS[labels >= 0], labels[labels >= 0], **options))
    got.backward()
    assert logits.grad is not None
    assert not logits.grad[labels < 0].any()


def test_a_batch_of_no_known_label_has_a_loss_of_zero() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = classification_loss(logits, torch.full_like(LABELS, -100), weights=WEIGHTS)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_prior_is_that_of_what_the_loss_sees() -> None:
    counts, names = [900, 90, 10], ["a", "b", "c"]
    plain = torch.tensor(log_prior(counts, names, 1.0), dtype=torch.float64)
    torch.testing.assert_close(plain.exp(), torch.tensor([900.5, 90.5, 10.5], dtype=torch.float64) / 1001.5)
    alike = log_prior(counts, names, 0.7, class_weights(counts, names))
    assert max(alike) - min(alike) < 1e-9, "balanced weights leave nothing to adjust to"
    half = torch.tensor(log_prior(counts, names, 1.0, [3.0, 6.0, 6.0]), dtype=torch.float64)
    assert (half[0] - half[1]).item() == pytest.approx(np.log(900 / 180), abs=0.01)


@pytest.mark.parametrize("imbalance", ["weights", "log_prior"])
def test_smoothing_draws_nothing_to_the_rare_class(imbalance: str) -> None:
    """Logits that know the row's class best leave a row of the common class there, whatever is smoothed."""
    counts, names = [1500, 25], ["common", "rare"]
    made = {"weights": class_weights(counts, names), "log_prior": log_prior(counts, names, 1.0)}[imbalance]
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    labels, options = torch.tensor([0, 1]), {imbalance: torch.tensor(made, dtype=torch.float64)}
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = classification_loss(logits, labels, label_smoothing=0.1, **options)
        value.backward()
        return value

    optimizer.step(loss)
    assert logits[0, 0] - logits[0, 1] > 1
    assert logits[1, 1] - logits[1, 0] > 1


def test_focal_loss() -> None:
    p = LOGITS.softmax(1).gather(1, LABELS[:, None]).squeeze(1)
    expected = -((1 - p) ** 2 * p.log()).mean()
    torch.testing.assert_close(classification_loss(LOGITS, LABELS, focal_gamma=2.0), expected)
    share = WEIGHTS[LABELS]
    expected = -(share * (1 - p) ** 2 * p.log()).sum() / share.sum()
    torch.testing.assert_close(classification_loss(LOGITS, LABELS, weights=WEIGHTS, focal_gamma=2.0), expected)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_gradient_is_finite_at_certainty(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    classification_loss(logits, torch.tensor([0]), focal_gamma=gamma).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.autograd.gradcheck(
        lambda x: classification_loss(x, LABELS, focal_gamma=gamma), LOGITS.clone().requires_grad_()
    )


def test_logit_adjustment_adds_the_prior() -> None:
    names = ["a", "b", "c", "d"]
    prior = torch.tensor(log_prior([80, 15, 4, 1], names, 1.0), dtype=torch.float64)
    assert prior.exp().sum() == pytest.approx(1.0)
    assert prior.exp()[0] == pytest.approx(80.5 / 102)
    got = classification_loss(LOGITS, LABELS, log_prior=prior)
    torch.testing.assert_close(got, F.cross_entropy(LOGITS + prior, LABELS))
    assert log_prior([3, 1], names[:2], 0.0) == [0.0, 0.0]
    with pytest.raises(UserError, match="'b' has no row in the training part, so the logits cannot be adjusted"):
        log_prior([5, 0], names[:2], 1.0)


def test_half_precision_logits_are_summed_in_float32() -> None:
    assert classification_loss(LOGITS.bfloat16(), LABELS).dtype == torch.float32


def test_balanced_class_weights() -> None:
    labels = [0] * 5 + [1] * 3 + [2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights([5, 3, 1], ["a", "b", "c"]) == pytest.approx(expected.tolist())
    with pytest.raises(UserError, match="'b' has no row in the training part"):
        class_weights([5, 0], ["a", "b"])
