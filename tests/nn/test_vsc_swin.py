"""VSCSwin: equal to timm without a schedule, to a naive second writing with one; the guide learns; static shapes."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deepmsi
from deepmsi.errors import UserError
from deepmsi.nn import KeptTokens, Schedule, VSCSwin, fix_constants
from deepmsi.testing import PLACES, assert_within_budget, generator, need, randn, relative_error

timm = pytest.importorskip("timm")
NAME = "swinv2_tiny_window8_256"


def naive_class() -> Any:
    spec = importlib.util.spec_from_file_location("naive_swin", Path(__file__).with_name("naive_swin.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NaiveSwin


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value: Swin V2 starts with its post-norms at zero, which would hide the blocks."""
    draw = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            if "logit_scale" in name:
                value = 1 + 0.5 * value
            elif parameter.dim() > 1:
                value = value / parameter[0].numel() ** 0.5
            else:
                value = (1.0 if name.endswith("norm.weight") else 0.5) + 0.3 * value
            parameter.copy_(value)
    return model


def gradients(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradient of a random functional of it at the inputs and at every parameter."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    model.zero_grad()
    out = model(*leaves)
    (out * randn(*out.shape, seed=99, dtype=out.dtype, device=out.device)).sum().backward()
    found = {f"input {n}": leaf.grad for n, leaf in enumerate(leaves)}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, f"no gradient reached {missing}"
    return out.detach(), found


# The pretrained window is another than the one in use, as in swinv2_base_window12to16_192to256; one grid equals it.
CUSTOM: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (2, 2, 2),
    "num_heads": (1, 2, 4),
    "window_size": 8,
    "pretrained_window_sizes": (6, 6, 6),
}


def pair(case: str, dtype: torch.dtype) -> tuple[nn.Module, VSCSwin, Tensor]:
    """Return a model of timm and ours with the same random weights, and frames for both."""
    if case == "tiny":
        theirs = timm.create_model(NAME, num_classes=0, img_size=128, drop_path_rate=0.0)
        ours = VSCSwin.from_timm(NAME, schedule=None, img_size=128)
        frames = randn(1, 3, 128, 128, seed=1, dtype=torch.float64)
    else:
        theirs = timm.models.swin_transformer_v2.SwinTransformerV2(num_classes=0, drop_path_rate=0.0, **CUSTOM)
        ours = VSCSwin(
            img_size=64,
            embed_dim=16,
            depths=(2, 2, 2),
            heads=(1, 2, 4),
            window=8,
            pretrained_window=6,
            schedule=None,
        )
        frames = randn(2, 3, 64, 64, seed=1, dtype=torch.float64)
    randomised(theirs)
    result = ours.load_state_dict(theirs.state_dict())
    assert not result.missing_keys
    assert set(theirs.state_dict()) == set(ours.state_dict())
    return theirs.to(dtype), ours.to(dtype), frames.to(dtype)


@pytest.mark.parametrize("case", ["tiny", "custom"])
def test_equals_timm_in_float64(case: str) -> None:
    theirs, ours, frames = pair(case, torch.float64)
    exact, wanted = gradients(theirs, frames)
    out, found = gradients(ours, frames)
    assert relative_error(out, exact) < 1e-9
    for name, grad in wanted.items():
        assert grad.abs().max() > 0, f"{name} tests nothing"
        assert relative_error(found[name], grad) < 1e-9, name


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_equals_timm_in_float32_within_the_budget(backend: str) -> None:
    theirs, ours, frames = pair("custom", torch.float32)
    low, low_gradients = gradients(theirs, frames)
    with deepmsi.use_backend(backend):
        out, found = gradients(ours, frames)
    exact, wanted = gradients(theirs.double(), frames.double())
    assert_within_budget(out, low, exact)
    ratios = []
    for name, grad in wanted.items():
        error, own = relative_error(found[name], grad), relative_error(low_gradients[name], grad)
        ratios.append(math.log(max(error, 1e-9) / max(own, 1e-9)))
        assert error < 1e-4, f"{name}: {error:.1e} against {own:.1e}"
    # The errors of the one and the other order of summation differ by luck from tensor to tensor, not over all of them.
    assert math.exp(sum(ratios) / len(ratios)) < 2


@pytest.mark.parametrize("case", ["paper", "released"])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_every_backend_gives_the_model_of_the_reference(backend: str, device: str, case: str) -> None:
    """Packed by threshold, and regridded: every operation of one backend inside the model, with every gradient."""
    need("vsc_compress", backend, device, torch.float32)
    model = small(case).float().to(device)
    frames, guide = randn(2, 3, 32, 32, seed=1, device=device), randn(2, model.guide_dim, seed=2, device=device)
    results = []
    for name in ("reference", backend):
        with deepmsi.use_backend(name):
            out, found = gradients(model, frames, guide)
        results.append({"output": out, **{key: grad.clone() for key, grad in found.items()}})
    for name, exact in results[0].items():
        assert relative_error(results[1][name], exact) < 1e-3, name


def test_the_whole_model_at_its_own_size() -> None:
    theirs = randomised(timm.create_model(NAME, num_classes=0)).eval()
    ours = VSCSwin.from_timm(NAME, schedule=None).eval()
    ours.load_state_dict(theirs.state_dict())
    frames = randn(1, 3, 256, 256, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(ours(frames), theirs(frames), rtol=1e-4, atol=1e-4)


def test_training_draws_drop_path_as_timm_does() -> None:
    theirs = randomised(timm.models.swin_transformer_v2.SwinTransformerV2(num_classes=0, drop_path_rate=0.5, **CUSTOM))
    ours = VSCSwin(
        img_size=64,
        embed_dim=16,
        depths=(2, 2, 2),
        heads=(1, 2, 4),
        pretrained_window=6,
        drop_path_rate=0.5,
        schedule=None,
    )
    ours.load_state_dict(theirs.state_dict())
    frames = randn(4, 3, 64, 64, seed=3)
    torch.manual_seed(5)
    expected = theirs.train()(frames)
    torch.manual_seed(5)
    torch.testing.assert_close(ours.train()(frames), expected, rtol=1e-4, atol=1e-4)


SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (1, 4, 2),
    "heads": (1, 2, 2),
    "window": 4,
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "paper": {"schedule": "paper"},
    "paper in capacity": {"schedule": "paper", "compression": {"capacity": 64}},
    "released": {"schedule": {"layout": "regrid", "keep": [49, 25]}},
    "released, all stay at first": {"schedule": {"layout": "regrid", "keep": [81, 25]}},
    "keep": {"schedule": {"keep": [40, 21]}},
    "second stage": {"schedule": {"blocks": [[1, 0], [1, 2], [2, 0]], "keep": [40, 21, 6]}},
    "second stage by threshold": {"schedule": {"blocks": [[1, 1], [2, 0]], "threshold": 0.4}},
}


def small(case: str) -> VSCSwin:
    return randomised(VSCSwin(**SMALL, **SCHEDULES[case]), seed=4).double()


def naive_of(model: VSCSwin) -> Any:
    schedule = model.schedule
    assert schedule is not None
    assert schedule.blocks is not None
    keep = dict(zip(schedule.blocks, schedule.keep, strict=True)) if isinstance(schedule.keep, tuple) else None
    return naive_class()(
        dict(model.named_parameters()),
        grid=16,
        depths=SMALL["depths"],
        heads=SMALL["heads"],
        window=SMALL["window"],
        keep=keep,
        compress=schedule.blocks,
        regrid=schedule.layout == "regrid",
        threshold=schedule.threshold,
    )


@pytest.mark.parametrize("case", SCHEDULES)
def test_equals_a_naive_writing_frame_by_frame(case: str) -> None:
    model = small(case)
    frames = randn(2, 3, 32, 32, seed=5, dtype=torch.float64)
    guide = randn(2, 16, seed=6, dtype=torch.float64)
    out, found = gradients(model, frames, guide)
    naive = naive_of(model)
    model.zero_grad()
    leaves = [frames.clone().requires_grad_(), guide.clone().requires_grad_()]
    exact = torch.stack([naive(leaves[0][n], leaves[1][n]) for n in range(2)])
    assert relative_error(out, exact) < 1e-9
    (exact * randn(*out.shape, seed=99, dtype=out.dtype)).sum().backward()
    wanted = {"input 0": leaves[0].grad, "input 1": leaves[1].grad}
    wanted |= {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, grad in wanted.items():
        assert relative_error(found[name], grad) < 1e-9, name


@pytest.mark.parametrize("case", SCHEDULES)
def test_reports_the_kept_tokens(case: str) -> None:
    model = small(case)
    frames = randn(2, 3, 32, 32, seed=5, dtype=torch.float64)
    guide = randn(2, 16, seed=6, dtype=torch.float64)
    feature, kept = model(frames, guide, return_kept=True)
    torch.testing.assert_close(feature, model(frames, guide))
    assert [item.block for item in kept] == [f"layers.{i}.blocks.{j}" for i, j in model.schedule.blocks]
    if model.schedule.layout == "packed":
        naive = naive_of(model)
        for n in range(2):
            naive(frames[n], guide[n])
        wanted = [naive.positions[len(kept) * n : len(kept) * (n + 1)] for n in range(2)]
        for item, *frames_of in zip(kept, *wanted, strict=True):
            start = item.cu_seqlens.tolist()
            for n, places in enumerate(frames_of):
                found = item.positions[start[n] : start[n + 1]].tolist()
                assert found == [y * item.grid[1] + x for y, x in places]
    for item in kept:
        assert isinstance(item, KeptTokens)
        assert 0 < item.ratio <= 1
        valid = item.positions[: item.cu_seqlens[-1]]
        assert (valid >= 0).all()
        assert (valid < item.grid[0] * item.grid[1]).all()
        assert item.relevance.shape == item.positions.shape


def test_released_reports_places_on_the_grid_of_the_stage() -> None:
    kept = small("released")(torch.randn(1, 3, 32, 32).double(), torch.randn(1, 16).double(), return_kept=True)[1]
    first, second = (set(item.positions.tolist()) for item in kept)
    assert len(first) == 49
    assert len(second) == 25
    assert second < first


def test_places_are_computed_where_reports_ask_or_packed_rows_need_them() -> None:
    """On a GPU each operation on them is a launch, and the regrid layout reads none."""
    inputs = (randn(1, 3, 32, 32, seed=5, dtype=torch.float64), randn(1, 16, seed=6, dtype=torch.float64))
    names = {}
    for case in ("released", "paper"):
        for kept in (False, True):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                small(case)(*inputs, return_kept=kept)
            names[case, kept] = {event.key for event in profile.key_averages()}
    told = {key: "aten::remainder" in found for key, found in names.items()}
    assert told == {("released", False): False, ("released", True): True, ("paper", False): True, ("paper", True): True}


def test_presets_on_the_default_backbone() -> None:
    for schedule in ("paper", "released"):
        model = VSCSwin.from_timm(NAME, schedule=schedule)
        assert model.schedule.blocks == ((2, 0), (2, 2), (2, 4))
        assert model.guide_dim == 384
        windows = [block.attn.window for stage in model.stages()[2:] for block in stage.each()]
        shifts = [block.attn.shift for stage in model.stages()[2:] for block in stage.each()]
        if schedule == "released":
            assert windows == [8, 7, 7, 6, 6, 5, 5, 5]
            assert shifts == [0, 3, 0, 3, 0, 2, 0, 0]
        else:
            assert windows == [8] * 8
            assert shifts == [0, 4, 0, 4, 0, 4, 0, 0]


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "random weights"])
def test_the_guide_learns_in_the_default_model(trained: bool) -> None:
    """The gradients at g and λ are of a useful size against that at the tokens x.

    In a fresh model the post-norms are zero, so the norm of a later compression cancels the gates of the earlier ones:
    the last one alone teaches the guide until the blocks between them wake up. With weights in them, each does.
    """
    torch.manual_seed(0)
    model = VSCSwin.from_timm(NAME)
    if trained:
        randomised(model)
    seen: dict[str, list[Tensor]] = {"x": [], "g": []}

    def watch(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, cu_seqlens, guide = arguments
        x, guide = x * 1, guide * 1
        for name, value in (("x", x), ("g", guide)):
            value.retain_grad()
            seen[name].append(value)
        return x, cu_seqlens, guide

    blocks = [model.get_submodule(f"layers.2.blocks.{j}.compress.vsc") for j in (0, 2, 4)]
    for block in blocks:
        block.register_forward_pre_hook(watch)
    frames, guide = randn(1, 3, 256, 256, seed=7), randn(1, 384, seed=8).requires_grad_()
    out = model(frames, guide)
    (out * randn(*out.shape, seed=9)).sum().backward()
    assert guide.grad.norm() > 1e-3 * seen["x"][0].grad.norm()
    learning = list(zip(seen["x"], seen["g"], blocks, strict=True))
    for x, g, block in learning if trained else learning[-1:]:
        size = x.grad.norm()
        assert g.grad.norm() > 1e-3 * size
        assert block.guide_logit.grad.abs() > 1e-3 * size
    assert all(block.guide_logit.grad.abs() > 0 for block in blocks)


def test_stem_does_not_see_the_guide() -> None:
    model = small("paper")
    frames = randn(2, 3, 32, 32, seed=5, dtype=torch.float64)
    stem = model.stem(frames)
    for seed in (6, 7):
        guide = randn(2, 16, seed=seed, dtype=torch.float64)
        torch.testing.assert_close(model.guided(stem, guide), model(frames, guide), rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_norms_in_more_bits_than_the_weights(training: bool) -> None:
    """As transformers and timm keep them; tokens have the type of the products."""
    model = small("paper").bfloat16().train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    frames, guide = randn(2, 3, 32, 32, seed=5, dtype=torch.bfloat16), randn(2, 16, seed=6, dtype=torch.bfloat16)
    out = model(frames, guide)
    assert out.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(model.guided(model.stem(frames).float(), guide), out.detach(), rtol=0, atol=0)


def test_a_frame_does_not_depend_on_its_neighbours() -> None:
    model = small("paper")
    frames, guide = randn(3, 3, 32, 32, seed=5, dtype=torch.float64), randn(3, 16, seed=6, dtype=torch.float64)
    alone = torch.cat([model(frames[n : n + 1], guide[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(model(frames, guide), alone, rtol=1e-10, atol=1e-12)
    assert model(frames[:0], guide[:0]).shape == (0, 32)


@pytest.mark.parametrize("case", ["paper in capacity", "released", "keep", "second stage"])
def test_static_schedules_read_nothing_on_the_host(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(case).float()
    frames, guide = randn(2, 3, 32, 32, seed=5), randn(2, 16, seed=6)

    def refuse(*_: object) -> Any:
        raise AssertionError("a value was read on the host")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    model(frames, guide).sum().backward()


@pytest.mark.parametrize("case", ["keep", "released"])
def test_shapes_are_found_without_content(case: str) -> None:
    model = small(case).float().to("meta")
    features = model(torch.empty(2, 3, 32, 32, device="meta"), torch.empty(2, 16, device="meta"))
    assert features.shape == (2, 32)
    features.sum().backward()


def test_a_static_model_compiles_whole() -> None:
    model = small("keep").float()
    frames, guide = randn(2, 3, 32, 32, seed=5), randn(2, 16, seed=6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(frames, guide), model(frames, guide))


def test_with_a_threshold_it_compiles_whole_where_torch_may_capture_what_is_read() -> None:
    model = small("paper").float()
    frames, guide = randn(2, 3, 32, 32, seed=5), randn(2, 16, seed=6)

    def breaks(capture: bool) -> int:
        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_scalar_outputs=capture, capture_dynamic_output_shape_ops=capture):
            return torch._dynamo.explain(model)(frames, guide).graph_break_count

    assert breaks(capture=True) == 0
    assert breaks(capture=False) > 0


def test_with_a_threshold_it_is_compiled_to_kernels() -> None:
    model = small("paper").float()
    inputs = (randn(2, 3, 32, 32, seed=5), randn(2, 16, seed=6))
    exact, wanted = gradients(model, *inputs)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        out, found = gradients(torch.compile(model, fullgraph=True), *inputs)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(list(found.values()), list(wanted.values()))


@pytest.mark.parametrize("case", ["paper", "released"])
def test_autocast(case: str) -> None:
    model = small(case).float()
    frames, guide = randn(2, 3, 32, 32, seed=5), randn(2, 16, seed=6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(frames, guide)
    out.float().square().sum().backward()
    assert torch.isfinite(out).all()
    assert guide.grad.dtype == torch.float32
    assert guide.grad.abs().max() > 0


def test_small_preset() -> None:
    for schedule in ("paper", "released", None):
        model = VSCSwin.small(schedule)
        guide = torch.randn(2, 64) if schedule else None
        assert model(torch.randn(2, 3, 64, 64), guide).shape == (2, model.num_features)


def test_spares_from_weight_decay_what_timm_spares() -> None:
    theirs, ours, _ = pair("custom", torch.float32)
    assert ours.no_weight_decay() == theirs.no_weight_decay() != set()


def test_loading() -> None:
    theirs = timm.create_model(NAME, num_classes=7, img_size=64)
    model = VSCSwin.from_timm(NAME, img_size=64)
    result = model.load_state_dict(theirs.state_dict())
    assert set(result.unexpected_keys) == {"head.fc.weight", "head.fc.bias"}
    assert result.missing_keys
    assert all(".compress." in key for key in result.missing_keys)
    broken = theirs.state_dict()
    del broken["norm.weight"]
    with pytest.raises(RuntimeError, match=r"missing \['norm.weight'\]"):
        model.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="unexpected"):
        model.load_state_dict({**theirs.state_dict(), "other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "papr"}, "none of paper, released"),
        ({"schedule": {"keeep": 3}}, "did you mean 'keep'"),
        ({"schedule": {"layout": "regrid"}}, "needs keep"),
        ({"schedule": {"layout": "regrid", "keep": 12}}, "square numbers"),
        ({"schedule": {"blocks": [[5, 0]]}}, "no block 0 in stage 5"),
        ({"schedule": {"blocks": [3]}}, "must be pairs"),
        ({"schedule": {"blocks": [[1, 2], [1, 0]]}}, "in order"),
        ({"schedule": {"keep": [3]}}, "one number or one for each"),
        ({"compression": {"threshhold": 3}}, "did you mean 'threshold'"),
        ({"schedule": {"blocks": [[math.inf, 0]]}}, "must be pairs"),
        ({"schedule": {"blocks": [[True, 0]]}}, "must be pairs"),
        ({"schedule": {"blocks": [[1.5, 0]]}}, "must be pairs"),
        ({"schedule": {"keep": True}}, "keep must be from 1 to 65536"),
        ({"schedule": {"threshold": True}}, "threshold must be a number from 0"),
        ({"schedule": {"keep": 1.5}}, "keep must be from 1 to 65536"),
        ({"schedule": {"capacity": 10**12}}, "capacity must be from 1 to 65536"),
        ({"schedule": {"temperature": 0}}, "temperature must be a number above 0"),
        ({"schedule": {"threshold": math.nan}}, "threshold must be a number from 0"),
        ({"schedule": {"guide_weight": "much"}}, "guide_weight must be a number between 0 and 1"),
        ({"schedule": {"fuse_alpha": 2}}, "fuse_alpha must be a number from 0 to 1"),
        ({"schedule": {"norm": "layer"}}, "norm must be true or false"),
        ({"schedule": {"min_keep": 5, "keep": 2}}, "keep must be no less than min_keep"),
        ({"schedule": {"min_keep": 5, "capacity": 1}}, "capacity must be no less than min_keep"),
        ({"schedule": {"keep": 4, "capacity": 3}}, "capacity must be no less than keep"),
        ({"img_size": 33}, "no multiple of patch_size"),
        ({"img_size": 40}, "no multiple of its window"),
        ({"heads": (3, 2, 2)}, "do not divide"),
        ({"heads": (1, 2)}, "must match in number"),
        ({"drop_path_rate": 1.0}, "must lie in"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        VSCSwin(**{**SMALL, **options})


def test_wrong_inputs_are_told() -> None:
    model = small("paper").float()
    with pytest.raises(ValueError, match="frames must be"):
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 16))
    with pytest.raises(ValueError, match="must be normalised"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 16))
    with pytest.raises(ValueError, match="give one"):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="guide must be"):
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1, 8))
    with pytest.raises(UserError, match="no Swin V2 named"):
        VSCSwin.from_timm("swinv2_cr_tiny_224")
    with pytest.raises(UserError, match=r"no weights named .* such are: swinv2_tiny_window8_256\.ms_in1k"):
        VSCSwin.from_timm("swinv2_tiny_window8_256.ms_in2k")


def test_weights_are_read_from_a_file(tmp_path: Path) -> None:
    source = timm.create_model(NAME, img_size=64).eval()
    file = tmp_path / "swin.safetensors"
    save_file(source.state_dict(), file)
    frames = randn(1, 3, 64, 64, seed=1)
    with torch.no_grad():
        wanted = source.forward_head(source.forward_features(frames), pre_logits=True)
        for path in (file, str(file)):
            ours = VSCSwin.from_timm(NAME, path, None, img_size=64).eval()
            torch.testing.assert_close(ours(frames), wanted, rtol=1e-4, atol=1e-4)


EMBEDDING = "patch_embed.proj.weight"
# What a file holds in place of the weights, or beside them, and what is said of it.
OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "some": ({EMBEDDING: torch.zeros(96, 3, 4, 4)}, "it lacks "),
    "none": ({"model": torch.zeros(3)}, f"it lacks {EMBEDDING}"),
    "flat": ({EMBEDDING: torch.zeros(96, 48)}, f"it lacks {EMBEDDING}"),
    "wide": ({"norm.weight": torch.zeros(8)}, "size mismatch for norm.weight"),
    "deep": ({"layers.2.blocks.7.norm1.bias": torch.zeros(384)}, "nor has that layers.2.blocks.7.norm1.bias"),
    "whole": ({"norm.weight": torch.zeros(768, dtype=torch.int8)}, "norm.weight is torch.int8"),
    "lost": ({"norm.bias": torch.full((768,), torch.nan)}, "norm.bias is torch.float32, or not finite"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_of_other_weights_is_refused(tmp_path: Path, case: str) -> None:
    changes, words = OTHERS[case]
    held = {} if case in ("some", "none", "flat") else timm.create_model(NAME, num_classes=0).state_dict()
    save_file({**held, **changes}, file := tmp_path / "swin.safetensors")
    with pytest.raises(UserError) as told:
        VSCSwin.from_timm(NAME, file)
    assert str(told.value).startswith(f"{file}: the file does not hold weights of {NAME} ({words}")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("case", ["absent", "a folder", "pickle", "broken"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, case: str) -> None:
    file = tmp_path / ("swin.bin" if case == "pickle" else "swin.safetensors")
    if case == "a folder":
        file.mkdir()
    elif case != "absent":
        file.write_bytes(b"\x80\x04 not weights")
    words = {"absent": "there is no such file", "pickle": r"are read from \.safetensors files alone"}
    with pytest.raises(UserError, match=words.get(case, "the file cannot be read")) as told:
        VSCSwin.from_timm(NAME, file)
    assert str(told.value).startswith(f"{file}: ")
    assert "\n" not in str(told.value)


def test_a_schedule_round_trips_through_plain_data() -> None:
    first = Schedule.resolve({"blocks": [[1, 0], [1, 2]], "keep": [4, 2]}, (1, 4, 2))
    assert Schedule.resolve(vars(first), (1, 4, 2)) == first


def test_a_log_that_watches_the_merging_leaves_it_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training counts the cells behind the last merging by a hook; only a hook on its layers asks for them."""
    from deepmsi.nn import swin_blocks

    need("project_cells", "cpp", "cpu", torch.float32)
    calls: list[Tensor] = []
    fused = swin_blocks.project_cells

    def counting(cells: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(cells)
        return fused(cells, *rest, **options)

    monkeypatch.setattr(swin_blocks, "project_cells", counting)
    model = VSCSwin.small(schedule=None).eval()
    merging = model.stages()[-1].downsample
    assert merging is not None
    frames = randn(1, 3, 64, 64, seed=1)
    seen: list[int] = []
    with deepmsi.use_backend("cpp"):
        expected = model(frames)
        assert len(calls) == 3
        merging.register_forward_hook(lambda *_: None)
        assert torch.equal(model(frames), expected)
        assert len(calls) == 6
        merging.reduction.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(frames), expected, rtol=1e-4, atol=1e-4)
    assert seen == [1]
    assert len(calls) == 8


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1"])
def test_an_adapter_in_the_place_of_a_layer_is_called(part: str) -> None:
    class Flipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(-1)

    model = VSCSwin.small(schedule=None).eval()
    frames = randn(1, 3, 64, 64, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05
        block = model.stages()[0].each()[0]
        layer = block.get_submodule(part)
        before = model(frames)
        other = Flipped(layer.in_features, layer.out_features, bias=layer.bias is not None)
        other.load_state_dict({key: value.flip(0) for key, value in layer.state_dict().items()})
        block.set_submodule(part, other)
        torch.testing.assert_close(model(frames), before, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_a_weight_of_its_own_is_called() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down = base.requires_grad_(False), nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model = randomised(VSCSwin.small("released"))
    inputs = randn(1, 3, 64, 64, seed=1), randn(1, 64, seed=2)
    expected = model(*inputs)
    for name, module in list(model.named_modules()):
        if name.endswith("attn.qkv"):
            model.set_submodule(name, adapted := Adapted(module))
            nn.init.zeros_(adapted.up.weight)
    found = model(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "attn.qkv.up" in name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_called() -> None:
    model = randomised(VSCSwin.small("released")).eval()
    inputs = randn(1, 3, 64, 64, seed=1), randn(1, 64, seed=2)
    with torch.no_grad():
        expected = model(*inputs)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        found = fix_constants(quantised)(*inputs)
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9


def test_every_block_is_called_as_a_module() -> None:
    """The first one that compresses once for each half, between which the guide comes in."""
    model, seen = VSCSwin.small("released").eval(), []
    for name, module in model.named_modules():
        if type(module).__name__ == "Block":
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        model(randn(1, 3, 64, 64, seed=1), randn(1, 64, seed=2))
    blocks = [f"layers.{i}.blocks.{j}" for i, depth in enumerate((2, 4, 2)) for j in range(depth)]
    assert seen == sorted([*blocks, "layers.1.blocks.0"])


@pytest.mark.parametrize("assign", [False, True])
def test_what_was_built_on_no_device_is_whole_once_it_is_loaded(assign: bool) -> None:
    model = randomised(VSCSwin.small("released")).eval()
    with torch.device("meta"):
        other = VSCSwin.small("released")
    if not assign:
        other = other.to_empty(device="cpu")
    with torch.device("meta"):
        other.load_state_dict(model.state_dict(), assign=assign)
    inputs = randn(1, 3, 64, 64, seed=1), randn(1, 64, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(*inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:torch.searchsorted")
@pytest.mark.parametrize("compression", [{"keep": (40, 20, 6)}, {"capacity": (50, 40, 9)}], ids=str)
def test_gradients_of_each_utterance_by_torch_func(compression: dict[str, Any]) -> None:
    """Packed tokens of different utterances lie at different places."""
    plan = {"blocks": ((1, 0), (1, 2), (2, 0)), **compression}
    model = randomised(VSCSwin.small(plan, img_size=32, window=2).double())
    weights = dict(model.named_parameters())
    frames = randn(3, 2, 3, 32, 32, seed=1, dtype=torch.float64)
    guide = randn(3, 2, model.guide_dim, seed=2, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], frames: Tensor, guide: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (frames, guide)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, frames, guide)
    for i in range(3):
        wanted = torch.autograd.grad(loss(weights, frames[i], guide[i]), list(weights.values()))
        for name, grad in zip(weights, wanted, strict=True):
            torch.testing.assert_close(found[name][i], grad, rtol=1e-8, atol=1e-10, msg=name)
