"""The classification loss against torch and closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from deepmsi.errors import UserError
from deepmsi.train.losses import class_weights, classification_loss, log_prior

torch.manual_seed(0)
LOGITS, LABELS = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_it_is_cross_entropy(weights: torch.Tensor | None, smoothing: float) -> None:
    got = classification_loss(LOGITS, LABELS, weights=weights, label_smoothing=smoothing)
    torch.testing.assert_close(got, F.cross_entropy(LOGITS, LABELS, weights, label_smoothing=smoothing))


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
    prior = torch.tensor(log_prior([80, 15, 4, 1], 1.0), dtype=torch.float64)
    assert prior.exp().sum() == pytest.approx(1.0)
    assert prior.exp()[0] == pytest.approx(80.5 / 102)
    got = classification_loss(LOGITS, LABELS, log_prior=prior)
    torch.testing.assert_close(got, F.cross_entropy(LOGITS + prior, LABELS))
    assert torch.isfinite(torch.tensor(log_prior([5, 0], 1.0))).all()
    assert log_prior([3, 1], 0.0) == [0.0, 0.0]


def test_half_precision_logits_are_summed_in_float32() -> None:
    assert classification_loss(LOGITS.bfloat16(), LABELS).dtype == torch.float32


def test_balanced_class_weights() -> None:
    labels = [0] * 5 + [1] * 3 + [2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights([5, 3, 1], ["a", "b", "c"]) == pytest.approx(expected.tolist())
    with pytest.raises(UserError, match="'b' has no row in the training part"):
        class_weights([5, 0], ["a", "b"])
