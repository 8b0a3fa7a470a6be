"""VSC: the operation with a λ that learns behind a sigmoid."""

import pytest
import torch

from deepmsi.nn import VSC
from deepmsi.ops import vsc_compress
from deepmsi.testing import randn, tokens


def test_is_the_operation_with_its_options() -> None:
    options = {
        "temperature": 0.7,
        "standardize": False,
        "threshold": 0.9,
        "min_keep": 3,
        "fuse_threshold": 0.2,
        "fuse_alpha": 0.6,
        "capacity": 20,
    }
    module = VSC(guide_weight=0.2, **options).double()
    x = tokens(60, 8, seed=1, dtype=torch.float64).view(2, 30, 8)
    guide = randn(2, 8, seed=2, dtype=torch.float64)
    got = module(x, None, guide)
    expected = vsc_compress(x, None, guide, 0.2, **options)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_weight_of_the_guide_learns() -> None:
    module = VSC(keep=5)
    torch.testing.assert_close(module.guide_weight, torch.tensor(0.5))
    assert list(module.state_dict()) == ["guide_logit"]
    x = tokens(30, 8, seed=1).view(2, 15, 8)
    guide = randn(2, 8, seed=2).requires_grad_()
    out = module(x, None, guide)
    (out.gate * randn(10, seed=3)).sum().backward()
    assert module.guide_logit.grad.abs() > 0
    assert guide.grad.abs().max() > 0
    module.load_state_dict({"guide_logit": torch.tensor(1.5)})  # as it was stored before
    assert module.guide_logit.tolist() == [1.5]
    for weight in (0.0, 1.0):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            VSC(guide_weight=weight)
