"""What a Swin computes once for inference: nothing changes by it, and it goes when the weights do."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepmsi import backend
from deepmsi.errors import UserError
from deepmsi.nn import VSCSwin, fix_constants, fuse
from deepmsi.nn.constants import Content, Fixed
from deepmsi.testing import randn

timm = pytest.importorskip("timm")
Made = tuple[Any, tuple[Tensor, ...]]

needs_kernels = pytest.mark.skipif(
    not backend.fuses("residual_mlp", "cpu", torch.bfloat16, channels=32),
    reason="the blocks run layer by layer here: another backend is set, or this CPU lacks AVX2 or multiplies tiles",
)


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """Move every parameter off its start: post-norms begin at zero and would hide the blocks."""
    for n, parameter in enumerate(model.parameters()):
        parameter.add_(randn(*parameter.shape, seed=n, scale=0.1, dtype=parameter.dtype))
    return model.eval()


def fused(dtype: torch.dtype = torch.float32, name: str = "swinv2_tiny_window8_256") -> Made:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
    model = moved(fuse(timm.create_model(name, window_size=8, **sizes)).to(dtype))
    return model, (randn(2, 3, 64, 64, seed=1, dtype=dtype),)


def fused_v1(dtype: torch.dtype = torch.float32) -> Made:
    return fused(dtype, "swin_tiny_patch4_window7_224")


def compressing(dtype: torch.dtype = torch.float32) -> Made:
    model = moved(VSCSwin.small("released").to(dtype))
    return model, (randn(2, 3, 64, 64, seed=5, dtype=dtype), randn(2, 64, seed=6, dtype=dtype))


MODELS = pytest.mark.parametrize("make", [compressing, fused, fused_v1])


def bias_of(model: nn.Module, block: str) -> nn.Parameter:
    """Return a weight that the position bias of a block is made of."""
    names = (f"{block}.attn.cpb_mlp.0.weight", f"{block}.attn.relative_position_bias_table")
    return next(p for name, p in model.named_parameters() if name in names)


def held(model: nn.Module) -> list[Fixed[Any]]:
    """Return what is kept of weights, but for the tables of a VSCSwin."""
    found: list[Fixed[Any]] = []
    for part in model.modules():
        constants = vars(part).get("constants")
        every = (*vars(part).values(), *(constants if isinstance(constants, tuple) else ()))
        found += [value for value in every if isinstance(value, Fixed) and value.tensors()]
    return found


def unfixed(model: nn.Module) -> Any:
    """Return a copy, which holds nothing."""
    other = copy.deepcopy(model)
    assert not held(other)
    return other.train().eval()


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_they_change_nothing_and_go_in_training(make: Callable[..., Made], dtype: torch.dtype) -> None:
    model, inputs = make(dtype)
    names = set(model.state_dict())
    with torch.no_grad():
        expected = model(*inputs)
        assert fix_constants(model)(*inputs).equal(expected)
    assert set(model.state_dict()) == names
    model.train()
    assert not held(model)
    model(*inputs).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "cpb_mlp" in name or "fc1" in name)


@needs_kernels
@MODELS
@torch.no_grad()
def test_each_is_read(make: Callable[[], Made], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make()
    expected = fix_constants(model)(*inputs)
    every = held(model)
    # Of eight blocks and two reductions, of four blocks with their tables, or two halves of four, and one reduction.
    assert len(every) == {compressing: 8 * 4 + 2, fused: 4 * 5 + 1, fused_v1: 4 * 2 + 1}[make]
    for fixed in every:
        ((kind, (content, value)),) = fixed._held.items()
        changed = 2 * value if isinstance(value, Tensor) else tuple(torch.zeros_like(weight) for weight in value)
        with monkeypatch.context() as patched:
            patched.setitem(fixed._held, kind, (content, changed))
            assert not model(*inputs).equal(expected)
    tables = [part for part in model.modules() if isinstance(getattr(part, "fixed_table", None), Tensor)]
    assert len(tables) == (8 if isinstance(model, VSCSwin) else 0)
    for part in tables:
        part.fixed_table.mul_(2)
        assert not model(*inputs).equal(expected)
        part.fixed_table.div_(2)
    assert model(*inputs).equal(expected)


@MODELS
@torch.no_grad()
def test_a_weight_that_changes_is_seen(make: Callable[[], Made]) -> None:
    model, inputs = make()
    expected = fix_constants(model)(*inputs)
    before = len(held(model))
    block = "layers.1.blocks.0"
    names = (f"{block}.attn.qkv", f"{block}.mlp.fc2", "layers.1.downsample.reduction")
    for weight in (*(model.get_parameter(f"{name}.weight") for name in names), bias_of(model, block)):
        weight.mul_(2)
        changed = model(*inputs)
        assert not changed.equal(expected)
        assert changed.equal(unfixed(model)(*inputs))
        weight.div_(2)
    assert model(*inputs).equal(expected)
    assert len(held(model)) < before or before == 0  # what changed is dropped


def test_weights_that_lie_where_others_lay_are_others() -> None:
    memory = np.zeros(1000, np.float32)
    parameter = nn.Parameter(torch.from_numpy(memory))
    content = Content(parameter)
    assert content.holds(parameter)
    parameter.data = torch.from_numpy(memory)
    assert (parameter.data_ptr(), parameter._version) == (memory.ctypes.data, 0)
    assert not content.holds(parameter)
    assert not copy.deepcopy(Content(parameter)).holds(parameter)


@MODELS
@torch.no_grad()
def test_weights_of_another_type_in_between_are_seen(make: Callable[[], Made]) -> None:
    model, inputs = make()
    fix_constants(model).bfloat16().float()
    assert model(*inputs).equal(unfixed(model)(*inputs))
    # A table that waits for its coordinates.
    assert all(isinstance(value, Tensor) for fixed in held(model) for _, value in fixed._held.values())


@MODELS
@torch.no_grad()
def test_a_view_in_the_place_of_a_weight_is_seen(make: Callable[[], Made]) -> None:
    model, inputs = make()
    block = fix_constants(model).layers[1].blocks[0]
    block.attn.proj.weight = nn.Parameter(block.attn.proj.weight.detach().t())
    assert model(*inputs).equal(unfixed(model)(*inputs))
    fix_constants(model)
    mlp, some = block.mlp, block.mlp.fc1.out_features // 2
    mlp.fc1.weight, mlp.fc1.bias = (nn.Parameter(p.detach()[:some]) for p in (mlp.fc1.weight, mlp.fc1.bias))
    mlp.fc2.weight = nn.Parameter(mlp.fc2.weight.detach()[:, :some])
    assert model(*inputs).equal(unfixed(model)(*inputs))


class Foreign(torch.optim.Optimizer):
    """One that is not torch's and changes weights so that nothing counts it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(0.1 * p.grad.sign())


@MODELS
@pytest.mark.parametrize("kind", [lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), Foreign], ids=["fused", "other"])
def test_a_step_is_seen_whatever_gave_the_gradients(make: Callable[[], Made], kind: Callable[[Any], Any]) -> None:
    """Those of a transform or of a compiled call want no gradient of the module's own parameters here."""
    model, inputs = make()
    optimizer = kind(model.parameters())
    with torch.no_grad():
        fix_constants(model)(*inputs)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        assert model(*inputs).equal(unfixed(model)(*inputs))


@MODELS
@torch.no_grad()
def test_buffers_stay_what_they_were(make: Callable[[], Made]) -> None:
    """What averages a model with its buffers pairs them by their order."""
    model, inputs = make()
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, p, n: 0.9 * a + 0.1 * p, use_buffers=True)
    average.update_parameters(model)
    names = [name for name, _ in model.named_buffers()]
    for each in (model, average):
        fix_constants(each)(*inputs)
    assert [name for name, _ in model.named_buffers()] == names
    average.update_parameters(model)
    torch.testing.assert_close(average(*inputs), model(*inputs))


@MODELS
def test_the_step_of_a_fused_optimizer_is_seen(make: Callable[[], Made]) -> None:
    """It changes weights without a new version; their gradients were asked for before."""
    model, inputs = make()
    fix_constants(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(*inputs).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert model(*inputs).equal(unfixed(model)(*inputs))


@MODELS
def test_a_step_that_waits_is_seen(make: Callable[[], Made]) -> None:
    """Its gradients are there already when the constants are asked for."""
    model, inputs = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(*inputs).square().sum().backward()
    fix_constants(model)
    optimizer.step()
    with torch.no_grad():
        assert model(*inputs).equal(unfixed(model)(*inputs))
    optimizer.zero_grad()
    with torch.no_grad():
        expected = unfixed(model)(*inputs)
        assert fix_constants(model)(*inputs).equal(expected)
    assert held(model) or not backend.fuses("residual_mlp", "cpu", torch.float32, channels=32)


@MODELS
@torch.no_grad()
def test_a_graph_reads_the_weights_themselves(make: Callable[[], Made]) -> None:
    model, inputs = make()
    fix_constants(model)
    compiled = torch.compile(model, backend="eager")
    compiled(*inputs)
    bias_of(model, "layers.0.blocks.0").mul_(3)
    model.get_parameter("layers.0.blocks.0.mlp.fc1.weight").mul_(2)
    torch.testing.assert_close(compiled(*inputs), unfixed(model)(*inputs), rtol=1e-5, atol=1e-5)


@MODELS
@torch.no_grad()
def test_an_export_reads_the_weights_themselves(make: Callable[[], Made]) -> None:
    model, inputs = make()
    fix_constants(model)
    bias_of(model, "layers.0.blocks.0").mul_(3)
    model.get_parameter("layers.0.blocks.0.mlp.fc1.weight").mul_(2)
    exported = torch.export.export(model, inputs).module()
    torch.testing.assert_close(exported(*inputs), unfixed(model)(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_a_trace_reads_the_weights_themselves() -> None:
    model, inputs = fused()
    traced = torch.jit.trace(fix_constants(model), inputs, check_trace=False)
    model.get_parameter("layers.0.blocks.0.mlp.fc1.weight").mul_(2)
    torch.testing.assert_close(traced(*inputs), unfixed(model)(*inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_layer_in_a_type_of_its_own_is_left_alone() -> None:
    model, inputs = fused()
    model.layers[0].blocks[0].mlp.half()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs)
        assert fix_constants(model)(*inputs).equal(expected)


@MODELS
@torch.no_grad()
def test_a_copy_holds_none(make: Callable[[], Made]) -> None:
    model, inputs = make()
    expected = fix_constants(model)(*inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not held(other)
        assert other(*inputs).equal(expected)
        other.get_parameter("layers.0.blocks.0.mlp.fc1.weight").mul_(2)
        assert not other(*inputs).equal(expected)
    assert model(*inputs).equal(expected)


@MODELS
def test_they_are_not_read_where_a_gradient_is_wanted(make: Callable[[], Made]) -> None:
    model, inputs = make()
    # Made in inference mode, they could not be saved for the gradient of an input.
    with torch.inference_mode():
        expected = fix_constants(model)(*inputs).clone()
    for fixed in held(model):
        for kind, (content, value) in fixed._held.items():
            if isinstance(value, tuple):
                fixed._held[kind] = content, tuple(torch.zeros_like(weight) for weight in value)
    out = model(*inputs)
    assert out.equal(expected)
    out.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "compress" not in name)
    model.requires_grad_(False)
    x = inputs[0].clone().requires_grad_()
    model(x, *inputs[1:]).square().sum().backward()
    assert x.grad is not None


@needs_kernels
@MODELS
@torch.no_grad()
def test_they_hold_under_the_autocast_that_they_were_computed_under(make: Callable[[], Made]) -> None:
    model, inputs = make()
    plain = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(*inputs)
        assert fix_constants(model)(*inputs).equal(rounded)
        assert held(model)
    assert not rounded.float().equal(plain)
    assert model(*inputs).equal(plain)
    fix_constants(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*inputs).equal(rounded)
    assert model(*inputs).equal(plain)


class Wrapped(nn.Module):
    """A layer in the place of another, as adapters and quantisers put it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    @property
    def bias(self) -> Tensor:
        return self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 1.5


@MODELS
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_a_replaced_layer_is_called(make: Callable[[], Made], when: str) -> None:
    model, inputs = make()
    for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        if when == "after":
            fix_constants(model)
        owner = model.get_submodule(f"layers.1.blocks.0.{name.split('.')[0]}")
        layer = name.split(".")[1]
        setattr(owner, layer, Wrapped(getattr(owner, layer)))
        expected = unfixed(model)(*inputs)
        if when == "before":
            fix_constants(model)
        assert model(*inputs).equal(expected)
    merging = model.layers[1].downsample
    merging.reduction = Wrapped(merging.reduction)
    expected = unfixed(model)(*inputs)
    assert model(*inputs).equal(expected)
    assert fix_constants(model)(*inputs).equal(expected)


@torch.no_grad()
def test_a_bias_network_that_is_not_timms_own_is_called() -> None:
    model, inputs = fused()
    fix_constants(model)
    attn = model.layers[0].blocks[0].attn
    attn.cpb_mlp[1] = nn.Tanh()
    assert model(*inputs).equal(unfixed(model)(*inputs))
    attn.cpb_mlp[1] = nn.ReLU()
    calls: list[int] = []
    attn.cpb_mlp[0].register_forward_hook(lambda *_: calls.append(1))
    model(*inputs)
    assert calls


@torch.no_grad()
def test_a_bias_network_whose_last_layer_has_a_bias_is_called() -> None:
    model, inputs = compressing()
    expected = fix_constants(model)(*inputs)
    network = model.layers[0].blocks[0].attn.cpb_mlp
    network[2].bias = nn.Parameter(torch.zeros(network[2].out_features))
    torch.testing.assert_close(model(*inputs), expected)
    network[2].bias += torch.arange(network[2].out_features)
    assert not torch.allclose(model(*inputs), expected, rtol=1e-3)


@torch.no_grad()
def test_another_input_size_has_other_tables() -> None:
    model, _ = fused()
    fix_constants(model)
    model.set_input_size(img_size=(32, 32), window_size=(4, 4))
    x = randn(2, 3, 32, 32, seed=3)
    assert model(x).equal(unfixed(model)(x))
    assert fix_constants(model)(x).equal(unfixed(model)(x))


def test_what_has_no_constants_gets_a_sentence() -> None:
    for model in (nn.Linear(3, 3), timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))):
        with pytest.raises(UserError, match="has nothing to fix: give it a VSCSwin, a TCN, or a model of timm that"):
            fix_constants(model)


class Shifted(nn.Module):
    """An adapter that shows the weights of the layer it stands for."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.inner, self.shift = layer, nn.Parameter(torch.ones(1))

    weight = property(lambda self: self.inner.weight)
    bias = property(lambda self: self.inner.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shift


def test_an_adapter_on_the_bias_network_is_called_and_learns() -> None:
    model, inputs = compressing()
    with torch.no_grad():
        before = fix_constants(model)(*inputs)
    network = model.layers[0].blocks[0].attn.cpb_mlp
    network[0] = Shifted(network[0])
    changed = model(*inputs)
    assert not torch.allclose(changed, before, rtol=1e-3)
    changed.square().sum().backward()
    assert network[0].shift.grad.abs() > 0
    with torch.no_grad():
        model.zero_grad()
        torch.testing.assert_close(fix_constants(model)(*inputs), changed)
        calls: list[int] = []
        network.register_forward_hook(lambda *_: calls.append(1))
        model(*inputs)
    assert calls == [1]


def change_weight(embed: Any) -> None:
    embed.proj.weight.detach().neg_()


def load_another(embed: Any) -> None:
    embed.load_state_dict({name: value * 1.5 for name, value in embed.state_dict().items()})


def put_adapter(embed: Any) -> None:
    embed.proj = Shifted(embed.proj)


@pytest.mark.parametrize("change", [change_weight, load_another, put_adapter])
@pytest.mark.parametrize("prepares", [False, True])
def test_folded_pixels_follow_the_embedding(change: Callable[[Any], None], prepares: bool) -> None:
    model = moved(VSCSwin.small(schedule=None))
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.2)

    def prepare(frames: Tensor) -> Tensor:
        return (frames.float() / 255 - mean) / std

    model.fold_pixels(mean, std)
    given = {"prepare": prepare} if prepares else {}
    with torch.no_grad():
        torch.testing.assert_close(model(pixels, **given), model(prepare(pixels)), rtol=1e-4, atol=1e-4)
        change(model.patch_embed)
        torch.testing.assert_close(model(pixels, **given), model(prepare(pixels)), rtol=1e-4, atol=1e-4)
    model(pixels, **given).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.patch_embed.parameters())
    with pytest.raises(ValueError, match=r"frames must be normalised, or prepare must do it, not torch\.int64"):
        model(pixels.long())
