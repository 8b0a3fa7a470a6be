"""What a Swin computes once for inference: nothing changes by it, and it goes when the weights do."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from deepmsi import backend
from deepmsi.errors import UserError
from deepmsi.nn import VSCSwin, fix_constants, fuse
from deepmsi.nn.swin_blocks import Mlp, PatchMerging, WindowAttention
from deepmsi.testing import randn

needs_kernels = pytest.mark.skipif(
    not backend.fuses("residual_mlp", "cpu", torch.bfloat16, channels=32),
    reason="the blocks run layer by layer here: another backend is set, or this CPU lacks AVX2 or multiplies tiles",
)


def made(case: str | None, dtype: torch.dtype = torch.float32) -> tuple[VSCSwin, tuple[Tensor, Tensor]]:
    """Return a small model whose blocks are seen (post-norms start at zero), frames and a guide."""
    model = VSCSwin.small(case).to(dtype).eval()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.add_(randn(*parameter.shape, seed=n, scale=0.1, dtype=dtype))
    return model, (randn(2, 3, 64, 64, seed=5, dtype=dtype), randn(2, 64, seed=6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_change_nothing_and_go_in_training(dtype: torch.dtype) -> None:
    model, inputs = made("paper", dtype)
    names = set(model.state_dict())
    expected = model.eval()(*inputs)
    torch.testing.assert_close(fix_constants(model)(*inputs), expected, rtol=0, atol=0)
    assert set(model.state_dict()) == names
    model.train()(*inputs).sum().backward()
    assert model.get_parameter("layers.0.blocks.0.attn.cpb_mlp.2.weight").grad is not None


def packed_of(model: VSCSwin) -> int:
    """Count the layers whose weights are laid out and hold."""
    parts = (part for part in model.modules() if isinstance(part, (WindowAttention, Mlp, PatchMerging)))
    return sum(len(part.laid_out() or ()) for part in parts)


@pytest.mark.parametrize("case", ["paper", "released", None])
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_fixed_weights_are_read_while_they_stay(case: str | None, dtype: torch.dtype) -> None:
    model, inputs = made(case, dtype)
    every = 4 * 8 + 2  # of eight blocks and two reductions
    expected = model(*inputs)
    assert packed_of(model) == 0
    assert fix_constants(model)(*inputs).equal(expected)
    assert packed_of(model) == every

    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert packed_of(again) == 0
        assert again(*inputs).equal(expected)

    weight = model.get_parameter("layers.0.blocks.0.mlp.fc1.weight")
    weight.mul_(2)
    assert packed_of(model) == every - 2
    changed = model(*inputs)
    assert not changed.equal(expected)
    weight.div_(2)
    model.load_state_dict(model.state_dict())
    assert packed_of(model) == 0
    fix_constants(model).float()
    assert packed_of(model) == (every if dtype == torch.float32 else 0)
    fix_constants(model).train()
    assert packed_of(model) == 0


@needs_kernels
def test_fixed_weights_are_not_read_where_a_gradient_is_wanted() -> None:
    model, (frames, guide) = made("paper")
    fix_constants(model)
    with torch.no_grad():
        expected = model(frames, guide)
    out = model(frames, guide)
    assert packed_of(model) == 0
    out.square().sum().backward()
    assert out.equal(expected)
    assert all(p.grad is not None for name, p in model.named_parameters() if "fc1" in name)
    # A frozen backbone hands the gradient of its guide on.
    model.requires_grad_(False)
    guide.requires_grad_()
    model(frames, guide).square().sum().backward()
    assert guide.grad is not None


def fused() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
    model = fuse(timm.create_model("swinv2_tiny_window8_256", **sizes)).eval()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.add_(randn(*parameter.shape, seed=n, scale=0.1))
    return model, randn(2, 3, 64, 64, seed=1)


@needs_kernels
@torch.no_grad()
def test_a_fused_model_reads_them_while_they_stay() -> None:
    model, x = fused()
    names, expected = set(model.state_dict()), model(x)
    for name in ("attn.qkv", "attn.cpb_mlp.0", "mlp.fc2"):
        assert fix_constants(model)(x).equal(expected)
        weight = model.get_parameter(f"layers.0.blocks.0.{name}.weight")
        weight.mul_(2)
        changed = model(x)
        assert not changed.equal(expected)
        assert changed.equal(fix_constants(model)(x))
        weight.div_(2)
    weight = model.get_parameter("layers.1.downsample.reduction.weight")
    weight.mul_(2)
    assert not model(x).equal(expected)
    weight.div_(2)
    assert set(model.state_dict()) == names
    fix_constants(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.layers[0].blocks[0].mlp.fc1.weight.mul_(2)
        assert not again(x).equal(expected)


@needs_kernels
def test_a_fused_model_reads_them_in_inference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = fused()
    fix_constants(model)
    block = model.layers[0].blocks[0]
    # Nothing but what is kept tells the layers' own weights from these.
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(
            block.constants.mlp, "_value", tuple(torch.zeros_like(w) for w in block.constants.mlp._value)
        )
        assert not model(x).equal(expected)
    out = model(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.train()
    assert block.constants is None
    with torch.no_grad():
        assert model.eval()(x).equal(expected)


@needs_kernels
@torch.no_grad()
def test_they_hold_under_the_autocast_that_they_were_computed_under() -> None:
    (model, x), (other, inputs) = fused(), made("released")
    for module, given in ((model, (x,)), (other, inputs)):
        plain = module(*given)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module(*given)
            assert fix_constants(module)(*given).equal(rounded)
            assert not rounded.float().equal(plain)
        assert module(*given).equal(plain)
        fix_constants(module)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(*given).equal(rounded)
    assert packed_of(other) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_of(other) == 0
        fix_constants(other)
        assert packed_of(other) > 0


def test_a_watched_bias_network_is_called() -> None:
    model, x = fused()
    fix_constants(model)
    calls: list[int] = []
    model.layers[0].blocks[0].attn.cpb_mlp[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(x)
    assert calls


def test_another_model_gets_a_sentence() -> None:
    with pytest.raises(UserError, match="fix_constants: Linear has no block of VSCSwin, and no fused one"):
        fix_constants(nn.Linear(3, 3))
