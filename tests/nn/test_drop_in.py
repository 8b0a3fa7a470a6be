"""fuse: timm's Swin models keep their weights, outputs and gradients; padding, dropout and refusals."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deepmsi
from deepmsi.errors import UserError
from deepmsi.models.memory import without_content
from deepmsi.testing import PLACES, assert_within_budget, generator, need, randn, relative_error

timm = pytest.importorskip("timm")

BOTH = pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
SHALLOW: dict[str, Any] = {"num_classes": 3, "depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4)}


def build(name: str, **options: Any) -> nn.Module:
    """A shallow model of timm in float64, every parameter random."""
    model = timm.create_model(name, **{**SHALLOW, **options}).double()
    draw = generator(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * value if "logit_scale" in key else 0.3 * value)
    return model.eval()


def gradients(model: nn.Module, frames: Tensor, seed: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = frames.clone().requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)
    out = model(x)
    (out * randn(*out.shape, seed=3, dtype=out.dtype, device=out.device)).sum().backward()
    return out.detach(), {"input": x.grad, **{n: p.grad for n, p in model.named_parameters()}}


def assert_fused_equal(model: nn.Module, frames: Tensor, seed: int | None = None) -> None:
    exact, wanted = gradients(model, frames, seed)
    names = list(model.state_dict())
    fused = copy.deepcopy(model)
    assert deepmsi.fuse(fused) is fused
    assert list(fused.state_dict()) == names
    assert type(next(m for m in fused.modules() if hasattr(m, "shift_size"))).__name__.startswith("Fused")
    out, found = gradients(fused, frames, seed)
    assert relative_error(out, exact) < 1e-9
    for name, grad in wanted.items():
        assert relative_error(found[name], grad) < 1e-9, name


def operations(profile: torch.profiler.profile) -> set[str]:
    """Return the operators of deepmsi that ran."""
    return {event.key.split("::")[1] for event in profile.key_averages() if event.key.startswith("deepmsi::")}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56}),
    "swin, padded": ("swin_tiny_patch4_window7_224", {"img_size": 48}),
    "swin, heads of another width": ("swin_tiny_patch4_window7_224", {"img_size": 56, "head_dim": 6}),
    "swin, 384 px": ("swin_base_patch4_window12_384", {"img_size": 384, "depths": (1, 1), "num_heads": (1, 2)}),
    "swinv2, 384 px": ("swinv2_base_window12to24_192to384", {"img_size": 384, "depths": (1, 1), "num_heads": (1, 2)}),
    "swin_s3": ("swin_s3_tiny_224", {"img_size": 56, "window_size": ((7, 7), (14, 14))}),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 64}),
    "swinv2, padded": ("swinv2_tiny_window8_256", {"img_size": 56}),
    "swinv2, padded beyond the grid": ("swinv2_tiny_window8_256", {"img_size": 24, "always_partition": True}),
    "swinv2, pretrained on another window": ("swinv2_base_window12to16_192to256", {"img_size": 64}),
    "swinv2, any size": ("swinv2_tiny_window8_256", {"img_size": 64, "strict_img_size": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_inference_and_gradients_are_timms(case: str) -> None:
    name, options = CASES[case]
    if "12to" in name:
        options = {**options, "pretrained_window_sizes": (12, 6)}
    model = build(name, **options)
    size = options["img_size"]
    assert_fused_equal(model, randn(2, 3, size, size, seed=2, dtype=torch.float64))


PADDED = {"window_attention", "residual_mlp"}
HALVES = {"residual_window_attention", "residual_mlp"}
# Which operations compute each case on the CPU, with the merging: halves of blocks, but for the attention of grids that
# are padded.
COMPUTED = dict.fromkeys(CASES, HALVES) | {
    "swin, padded": PADDED,
    "swin, heads of another width": PADDED,
    "swinv2, padded": PADDED,
    "swinv2, padded beyond the grid": PADDED,
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_of_the_cpu_give_what_timm_gives(case: str) -> None:
    """In float32; the cases above are in float64, which is computed layer by layer."""
    need("residual_mlp", "cpp", "cpu")
    name, options = CASES[case]
    exact = build(name, **options, **({"pretrained_window_sizes": (12, 6)} if "12to" in name else {}))
    fused, low = deepmsi.fuse(copy.deepcopy(exact).float()), copy.deepcopy(exact).float()
    frames = randn(2, 3, options["img_size"], options["img_size"], seed=2)
    with deepmsi.use_backend("cpp"), torch.profiler.profile() as profile:
        out, found = gradients(fused, frames)
    ran = operations(profile)
    assert {f"{op}_cpp_{way}" for op in (*COMPUTED[case], "project_cells") for way in ("fwd", "bwd")} <= ran
    wanted, grads = gradients(exact, frames.double())
    plain, own = gradients(low, frames)
    for key, value in {"output": wanted, **grads}.items():
        # The gradient of a logit scale is a sum that nearly cancels.
        roundings = 128 if "logit_scale" in key else 32
        assert_within_budget({"output": out, **found}[key], {"output": plain, **own}[key], value, key, roundings)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256"])
@pytest.mark.parametrize("size", [64, 56], ids=["whole", "padded"])
@pytest.mark.parametrize("stream", [torch.float32, torch.float64], ids=str)
def test_the_bias_network_runs_once(name: str, size: int, stream: torch.dtype) -> None:
    model = deepmsi.fuse(build(name, img_size=size).to(stream))
    block, calls = model.layers[0].blocks[1], []
    block.attn.cpb_mlp.register_forward_hook(lambda *_: calls.append(1))
    model(randn(1, 3, size, size, seed=2, dtype=stream))
    assert calls == [1]


@BOTH
@pytest.mark.parametrize("part", ["norm1", "norm2", "mlp.fc1", "attn.proj"])
def test_what_stands_for_a_layer_is_called(name: str, part: str) -> None:
    """A norm of other shape, or another kind of layer, of torch's own."""
    stock = build(name, img_size=32, window_size=4).float()
    block = stock.layers[0].blocks[0]
    owner, key = part.rsplit(".", 1) if "." in part else ("", part)
    others: dict[str, nn.Module] = {
        "norm1": nn.LayerNorm((8, 8, 16)),  # of a grid
        "norm2": nn.LayerNorm((64, 16)),  # of its rows
        "mlp.fc1": nn.Sequential(nn.Linear(16, 64)),
        "attn.proj": nn.Sequential(nn.Linear(16, 16)),
    }
    setattr(block.get_submodule(owner), key, others[part])
    frames = randn(1, 3, 32, 32, seed=2)
    fused = deepmsi.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        torch.testing.assert_close(fused(frames), stock(frames), rtol=1e-4, atol=1e-4)


@BOTH
def test_an_attention_of_the_block_s_own_is_called(name: str) -> None:
    models = [build(name, img_size=32, window_size=4).float() for _ in range(2)]
    deepmsi.fuse(models[1])
    for model in models:
        model.layers[0].blocks[0]._attn = torch.zeros_like
    frames = randn(1, 3, 32, 32, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(*(model(frames) for model in models), rtol=1e-4, atol=1e-4)


@BOTH
def test_oblong_windows_stay_timms_beside_fused_ones(name: str) -> None:
    """The second stage's grid has four rows: its windows are of 4 x 8 places, the shift is one of columns alone."""
    model = build(name, img_size=(32, 128), window_size=8)
    assert {tuple(m.window_size) for m in model.modules() if hasattr(m, "shift_size")} == {(8, 8), (4, 8)}
    assert_fused_equal(model, randn(2, 3, 32, 128, seed=2, dtype=torch.float64))


def test_channels_last_is_timms() -> None:
    """It permutes buffers of four dimensions, too: the coordinates of the position bias are one."""
    model = build("swinv2_tiny_window8_256", img_size=64).to(memory_format=torch.channels_last)
    assert_fused_equal(model, randn(1, 3, 64, 64, seed=2, dtype=torch.float64))


@BOTH
@pytest.mark.parametrize(
    "rates", [{"drop_path_rate": 0.4}, {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2}], ids=["path", "attention"]
)
def test_training_drops_what_timm_drops(name: str, rates: dict[str, float]) -> None:
    model = build(name, img_size=56, **rates).train()
    assert_fused_equal(model, randn(2, 3, 56, 56, seed=2, dtype=torch.float64), seed=11)


def test_dropout_of_the_projection_stays() -> None:
    model = deepmsi.fuse(build("swinv2_tiny_window8_256", img_size=32, proj_drop_rate=0.5)).train()
    frames = randn(1, 3, 32, 32, seed=2, dtype=torch.float64)
    block = model.layers[0].blocks[0]
    zeros = []
    block.attn.proj_drop.register_forward_hook(lambda _, __, out: zeros.append((out == 0).double().mean().item()))
    assert not torch.equal(model(frames), model(frames))
    assert all(0.4 < share < 0.6 for share in zeros)


@BOTH
def test_survives_checkpointing_copies_and_a_second_fuse(name: str) -> None:
    model = build(name, img_size=64, window_size=8, drop_path_rate=0.0)
    frames = randn(1, 3, 64, 64, seed=2, dtype=torch.float64)
    exact, wanted = gradients(model, frames)
    fused = copy.deepcopy(deepmsi.fuse(deepmsi.fuse(model)))
    fused.set_grad_checkpointing(True)
    out, found = gradients(fused.train(), frames)
    assert relative_error(out, exact) < 1e-9
    for key, grad in wanted.items():
        assert relative_error(found[key], grad) < 1e-9, key
    fused.eval().set_input_size(img_size=32)
    plain = build(name, img_size=64, window_size=8)
    plain.set_input_size(img_size=32)
    small = randn(1, 3, 32, 32, seed=3, dtype=torch.float64)
    torch.testing.assert_close(fused(small), plain(small))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@BOTH
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_float32_keeps_the_error_budget(backend: str, device: str, name: str, training: bool) -> None:
    """Where the fused operations compute, in the numbers of the draws that timm makes.

    The gradient of a bias table nearly cancels: from input to input its error varies tenfold, in PyTorch's own numbers
    as in a kernel's. What is compared is therefore the root mean square over several inputs.
    """
    need("window_attention", backend, device, torch.float32)
    if training and device == "cuda":
        pytest.skip("a GPU draws other numbers in float64 than in float32")
    inputs = 2 if backend == "triton" and device == "cpu" else 8  # the interpreter takes its time
    size = 56 if "window7" in name else 64
    exact = build(name, img_size=size, drop_path_rate=0.4 if training else 0.0).train(training).to(device)
    low, fused = copy.deepcopy(exact).float(), deepmsi.fuse(copy.deepcopy(exact).float())
    squares: dict[str, list[Tensor]] = {}
    with deepmsi.use_backend(backend):
        for seed in range(2, 2 + inputs):
            frames = randn(3, 3, size, size, seed=seed, device=device)
            wanted, own, found = (
                {"output": out, **grads}
                for out, grads in (
                    gradients(exact, frames.double(), seed=11),
                    gradients(low, frames, seed=11),
                    gradients(fused, frames, seed=11),
                )
            )
            for key, value in wanted.items():
                errors = [relative_error(found[key], value), relative_error(own[key], value)]
                squares.setdefault(key, []).append(torch.tensor(errors).square())
    for key, of_inputs in squares.items():
        error, own_error = torch.stack(of_inputs).mean(0).sqrt().tolist()
        # The gradient of a logit scale cancels further.
        budget = 2 * own_error + (128 if "logit_scale" in key else 16) * torch.finfo(torch.float32).eps
        assert error <= budget, f"{key}: error {error:.3e} over the budget {budget:.3e} (PyTorch's own {own_error:.3e})"


@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
@BOTH
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place[0] == "triton"])
def test_halves_in_16_bits_keep_the_error_budget(backend: str, device: str, name: str, autocast: bool) -> None:
    """Where a GPU's kernels compute whole halves, in timm's order of norm and layers."""
    need("residual_window_attention", backend, device, torch.float16)
    size = 56 if "window7" in name else 64
    exact = build(name, img_size=size, drop_path_rate=0.4).train().to(device)
    dtype = torch.float32 if autocast else torch.float16
    frames = randn(2, 3, size, size, seed=2, device=device)
    low, fused = copy.deepcopy(exact).to(dtype), deepmsi.fuse(copy.deepcopy(exact).to(dtype))
    exact = exact.eval() if device == "cuda" else exact  # a GPU draws other numbers in float64
    for model in (low, fused):
        model.train(exact.training)
    wanted = gradients(exact, frames.double(), seed=11)
    with deepmsi.use_backend(backend), torch.autocast(device, torch.float16, enabled=autocast):
        plain = gradients(low, frames.to(dtype), seed=11)
        with torch.profiler.profile() as profile:
            found = gradients(fused, frames.to(dtype), seed=11)
    assert {f"{op}_triton_{way}" for op in HALVES for way in ("fwd", "bwd")} <= operations(profile)
    for key, value in {"output": wanted[0], **wanted[1]}.items():
        got, own = ({"output": out, **grads}[key] for out, grads in (found, plain))
        roundings = (128 if "logit_scale" in key else 16) * torch.finfo(torch.float16).eps / torch.finfo(dtype).eps
        assert_within_budget(got, own, value, key, roundings)


@BOTH
def test_layers_that_are_replaced_or_watched_are_called(name: str) -> None:
    """An adapter in place of a layer, or a hook on it, must not be passed over."""
    model = deepmsi.fuse(build(name, img_size=64, window_size=8).float())
    frames = randn(1, 3, 64, 64, seed=2)
    plain_block = model.layers[0].blocks[0]
    before = model(frames)
    seen: list[int] = []
    plain_block.mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(frames), before, rtol=1e-4, atol=1e-4)
    assert seen == [1]

    class Flipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(-1)

    proj = plain_block.attn.proj
    other = Flipped(proj.in_features, proj.out_features)
    other.load_state_dict(proj.state_dict())
    plain_block.attn.proj = other
    assert not torch.allclose(model(frames), before, rtol=1e-3)


@BOTH
@pytest.mark.parametrize(
    "part", ["attn", "attn.softmax", "attn.attn_drop", "attn.proj_drop", "mlp", "mlp.act", "mlp.drop2"]
)
def test_whatever_is_watched_is_called(name: str, part: str) -> None:
    model = deepmsi.fuse(build(name, img_size=64 if "v2" in name else 56).float())
    frames = randn(1, 3, *([64, 64] if "v2" in name else [56, 56]), seed=2)
    with torch.no_grad():
        before = model(frames)
        seen: list[int] = []
        model.layers[0].blocks[1].get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(frames), before, rtol=1e-4, atol=1e-4)
    assert seen == [1]


@pytest.mark.parametrize("part", ["norm1", "norm2", "mlp.fc1", "mlp.fc2", "attn.proj"])
@BOTH
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_a_layer_without_bias_or_weight_computes(backend: str, device: str, name: str, part: str) -> None:
    need("window_attention", backend, device, torch.float32)
    stock = build(name, img_size=32, window_size=4).float()
    block = stock.layers[0].blocks[0]
    layer = block.get_submodule(part)
    others = [nn.LayerNorm(16, elementwise_affine=False), nn.LayerNorm(16, bias=False)]
    if "norm" not in part:
        others = [nn.Linear(layer.in_features, layer.out_features, bias=False)]
    frames = randn(1, 3, 32, 32, seed=2, device=device)
    for other in others:
        block.set_submodule(part, other)
        stock.to(device)
        with torch.no_grad(), deepmsi.use_backend(backend):
            torch.testing.assert_close(deepmsi.fuse(copy.deepcopy(stock))(frames), stock(frames), rtol=1e-4, atol=1e-4)


@BOTH
def test_an_attention_of_another_class_is_called(name: str) -> None:
    model = deepmsi.fuse(build(name, img_size=64, window_size=8).float())
    frames = randn(1, 3, 64, 64, seed=2)
    attn = model.layers[0].blocks[0].attn
    kind = type(attn)
    attn.__class__ = type("Silent", (kind,), {"forward": lambda self, x, mask=None: 0 * kind.forward(self, x, mask)})
    with torch.no_grad():
        silent = model(frames)
        attn.__class__ = kind
        assert not torch.allclose(silent, model(frames), rtol=1e-3)


@BOTH
def test_autocast_and_compile(name: str) -> None:
    model = build(name, img_size=32, window_size=8).float()
    frames = randn(1, 3, 32, 32, seed=2)
    with torch.no_grad():
        expected = model(frames)
        deepmsi.fuse(model)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(frames)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(frames), expected, rtol=1e-4, atol=1e-4)
    assert relative_error(low, expected) < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks tensors of a GPU that is not there")
@pytest.mark.parametrize("fused", [False, True], ids=["timm", "fused"])
def test_under_a_gpu_s_autocast_tokens_are_in_timm_s_type(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: fused)  # to deepmsi, which has kernels there
    model = build("swinv2_tiny_window8_256", img_size=64).float()
    mode, seen = FakeTensorMode(), []
    twin = without_content(deepmsi.fuse(model) if fused else model, mode, "cuda")
    for block in (*twin.layers[0].blocks, *twin.layers[1].blocks):
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    with mode, torch.autocast("cuda", torch.float16):
        twin(torch.empty(2, 3, 64, 64, device="cuda"))
    assert seen == [torch.float32] * 4


@BOTH
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_a_block_runs_on_the_kernels_of_its_stream(stream: torch.dtype, name: str) -> None:
    """Whole halves where the stream is in autocast's type, else the attention alone; it keeps its type, as timm's."""
    need("residual_window_attention", "cpp", "cpu", torch.bfloat16)
    model = build(name, img_size=64, window_size=8).float()
    block = deepmsi.fuse(model).layers[0].blocks[1]
    x = randn(2, 16, 16, 16, seed=2).to(stream)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with deepmsi.use_backend("cpp"), torch.profiler.profile() as profile:
            y = block(x)
        with deepmsi.use_backend("reference"):
            plain = block(x)
    halves = {f"{op}_cpp_fwd" for op in HALVES}
    assert operations(profile) == (halves if stream == torch.bfloat16 else {"window_attention_cpp_fwd"})
    assert y.dtype == plain.dtype == stream
    assert relative_error(y, plain) < 0.05


@BOTH
@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
def test_in_bfloat16_it_is_as_near_as_timm_is(autocast: bool, name: str) -> None:
    exact = build(name, img_size=64, window_size=8)
    kept = torch.float32 if autocast else torch.bfloat16
    models = copy.deepcopy(exact).to(kept), deepmsi.fuse(copy.deepcopy(exact).to(kept))
    timms, ours = Counter[str](), Counter[str]()
    # Of several batches, for a gradient that nearly cancels, as a logit scale's may, is off by chance.
    for seed in (2, 3, 4):
        frames = randn(2, 3, 64, 64, seed=seed)
        wanted, grads = gradients(exact, frames.double())
        for model, errors in zip(models, (timms, ours), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out, found = gradients(model, frames.to(kept))
            assert all(grad.dtype == kept for grad in found.values())
            found["output"] = out
            for key, value in {"output": wanted, **grads}.items():
                errors[key] += float((found[key].double() - value).norm() / value.norm()) / 3
    for key, error in ours.items():
        assert error < 2 * timms[key] + 2**-8, (key, error, timms[key])


@BOTH
def test_shapes_are_found_without_content(name: str) -> None:
    """As tools that count operations and parameters do."""
    size = 56 if "window7" in name else 64
    fused = deepmsi.fuse(build(name, img_size=size).float()).to("meta")
    assert fused(torch.empty(2, 3, size, size, device="meta")).shape == (2, 3)


def test_refusals_leave_the_model_as_it_is() -> None:
    with pytest.raises(UserError, match="swinv2_cr"):
        deepmsi.fuse(
            timm.create_model("swinv2_cr_tiny_224", img_size=56, depths=(1, 1), embed_dim=16, num_heads=(2, 4))
        )
    with pytest.raises(UserError, match="takes a model"):
        deepmsi.fuse("swinv2_tiny_window8_256")  # type: ignore[type-var]
    with pytest.raises(UserError, match="no block"):
        deepmsi.fuse(nn.Linear(2, 2))


def test_that_no_windows_are_square_is_told() -> None:
    oblong = build("swin_tiny_patch4_window7_224", img_size=(56, 16), window_size=7)
    frames = randn(2, 3, 56, 16, seed=1, dtype=torch.float64)
    expected = oblong(frames)
    with pytest.warns(UserWarning, match=r"no block .*the first has windows \(7, 4\)\), so its attention stays"):
        deepmsi.fuse(oblong)
    torch.testing.assert_close(oblong(frames), expected)


@pytest.mark.parametrize("size", [64, 56], ids=["whole", "padded"])
@BOTH
def test_dropout_of_the_projection_is_drawn_in_timms_order(name: str, size: int) -> None:
    model = build(name, img_size=size, window_size=4, proj_drop_rate=0.3).train()
    assert_fused_equal(model, randn(2, 3, size, size, seed=2, dtype=torch.float64), seed=11)


class Doubled(nn.Module):
    """In place of a layer that passes things on: what it does must not be passed over."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("other", [Doubled, nn.Identity])
@BOTH
@pytest.mark.parametrize(
    "part",
    ["attn.softmax", "attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2", "drop_path1", "drop_path2"],
)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_replaced_part_is_called(training: bool, part: str, name: str, other: type[nn.Module]) -> None:
    stock = build(name, img_size=32, window_size=4).float().train(training)
    stock.layers[0].blocks[1].set_submodule(part, other())
    frames, found = randn(1, 3, 32, 32, seed=2), []
    with torch.no_grad():
        for model in (deepmsi.fuse(copy.deepcopy(stock)), stock):
            torch.manual_seed(11)
            found.append(model(frames))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("part", ["attn", "attn.proj", "norm1", "mlp", "mlp.fc2", "norm2", "drop_path2"])
def test_a_forward_of_its_own_is_called(part: str, name: str) -> None:
    """As tools have it that bring a layer's weights to the device for a call."""
    model = deepmsi.fuse(build(name, img_size=32, window_size=4).float())
    frames = randn(1, 3, 32, 32, seed=2)
    with torch.no_grad():
        before = model(frames)
        layer = model.layers[0].blocks[0].get_submodule(part)
        forward, seen = layer.forward, []

        def brought(*inputs: Any, **options: Any) -> Any:
            seen.append(1)
            return forward(*inputs, **options)

        layer.forward = brought
        torch.testing.assert_close(model(frames), before, rtol=1e-4, atol=1e-4)
    assert seen == [1]


class Adapter(nn.Module):
    """What stands for a layer, mixes the tokens that it is given and draws."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner, self.drop = layer, nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.drop(x)) + self.inner(x.mean(1, keepdim=True))


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 48}),
        ("swinv2_tiny_window8_256", {"img_size": 56}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "qkv_bias": False}),
    ],
)
def test_what_stands_for_a_layer_is_given_timms_windows(name: str, options: dict[str, Any], part: str) -> None:
    stock = build(name, **options).float()
    for block in stock.layers[0].blocks:
        # With a bias of q and v timm's V2 reads the weight of qkv alone.
        if part != "attn.qkv" or getattr(block.attn, "q_bias", None) is None:
            block.set_submodule(part, Adapter(block.get_submodule(part)))
    frames, found, shapes = randn(2, 3, options["img_size"], options["img_size"], seed=2), [], []
    for model in (deepmsi.fuse(copy.deepcopy(stock)), stock):
        seen: list[torch.Size] = []
        model.layers[0].blocks[1].get_submodule(part).register_forward_hook(
            lambda _, given, out, seen=seen: seen.extend((given[0].shape, out.shape))
        )
        torch.manual_seed(11)
        found.append(model.train()(frames))
        shapes.append(seen)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert shapes[0] == shapes[1]


@BOTH
def test_hooks_on_all_modules_see_timms(name: str) -> None:
    stock = build(name, img_size=32, window_size=4).float()
    fused = deepmsi.fuse(copy.deepcopy(stock))
    frames = randn(1, 3, 32, 32, seed=2)
    seen: list[str] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module._get_name()))
    try:
        stock(frames)
        wanted, seen[:] = list(seen), []
        fused(frames)
    finally:
        hook.remove()
    names = {"FusedSwin": "SwinTransformer", "FusedPatchMergingV2": "PatchMerging", "FusedPatch": "Patch"}
    for ours, theirs in names.items():
        seen = [kind.replace(ours, theirs) for kind in seen]
    assert seen == wanted


@BOTH
def test_transforms_of_torch_func_are_timms(name: str) -> None:
    """A tangent that a kernel cannot carry must not be lost."""
    stock = build(name, img_size=32, window_size=4).float()
    fused = deepmsi.fuse(copy.deepcopy(stock))
    frames, tangent = randn(2, 3, 32, 32, seed=2), randn(2, 3, 32, 32, seed=4)

    def of_each_frame(model: nn.Module) -> dict[str, Tensor]:
        def loss(weights: dict[str, Tensor], frame: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (frame[None],)).square().sum()

        weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, frames)

    found = [(torch.func.jvp(model, (frames,), (tangent,))[1], of_each_frame(model)) for model in (fused, stock)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(frames, tangent)
        with torch.no_grad():
            torch.testing.assert_close(
                *(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent for model in (fused, stock)),
                rtol=1e-3,
                atol=1e-3,
            )


@BOTH
def test_a_graph_of_modules_is_timms(name: str) -> None:
    stock = build(name, img_size=32, window_size=4)
    frames = randn(1, 3, 32, 32, seed=2, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(deepmsi.fuse(copy.deepcopy(stock)))(frames), stock(frames))
