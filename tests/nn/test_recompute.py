"""The recompute switch: the gradients of `none` in every position, random draws included, for fewer kept bytes."""

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deepmsi
from deepmsi import backend
from deepmsi.errors import UserError
from deepmsi.models.memory import _Live, saved_bytes, without_content
from deepmsi.nn import VSCSwin, recompute, swin_blocks
from deepmsi.nn.recompute import CHUNK_FRAMES
from deepmsi.nn.swin_blocks import Mlp
from deepmsi.testing import halves_apart, need, randn, relative_error

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (1, 4, 2),
    "heads": (1, 2, 2),
    "window": 4,
}
SCHEDULES: dict[str, Any] = {
    "none": None,
    "paper": "paper",
    "released": {"layout": "regrid", "keep": [49, 25]},
    "two stages": {"blocks": [[1, 0], [1, 2], [2, 0]], "keep": [40, 21, 6]},
}
POSITIONS = ("light", "block", "chunk")


def build(schedule: str, drop_path: float = 0.0, **options: Any) -> VSCSwin:
    torch.manual_seed(0)
    model = VSCSwin(**{**SMALL, **options}, schedule=SCHEDULES[schedule], drop_path_rate=drop_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # fresh post-norms are zero and hide the blocks
    return model.double()


def inputs(model: VSCSwin, frames: int) -> tuple[Tensor, Tensor | None]:
    pixels = randn(frames, 3, 32, 32, seed=1, dtype=torch.float64)
    return pixels, None if model.guide_dim is None else randn(frames, model.guide_dim, seed=2, dtype=torch.float64)


def gradients(model: VSCSwin, pixels: Tensor, guide: Tensor | None, size: int | None = None) -> dict[str, Tensor]:
    """Return output and gradients; with `size` so many frames are computed at a time."""
    model.zero_grad()
    leaves = [x.clone().requires_grad_() for x in (pixels, guide) if x is not None]
    torch.manual_seed(3)
    if size is None:
        out = model(*leaves)
    else:
        out = torch.cat([model(*parts) for parts in zip(*(leaf.split(size) for leaf in leaves), strict=True)])
    (out * randn(*out.shape, seed=4, dtype=out.dtype)).sum().backward()
    found = {"output": out.detach()} | {f"input {n}": leaf.grad for n, leaf in enumerate(leaves)}
    return found | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("position", POSITIONS)
def test_gradients_are_those_of_none(schedule: str, position: str) -> None:
    model = build(schedule, drop_path=0.4).train()
    pixels, guide = inputs(model, CHUNK_FRAMES + 2)
    # Drop path is drawn chunk by chunk there, so the same frames have to come in the same chunks on both sides.
    exact = gradients(model, pixels, guide, CHUNK_FRAMES if position == "chunk" else None)
    model.recompute = position
    found = gradients(model, pixels, guide)
    assert found.keys() == exact.keys()
    for name, grad in exact.items():
        if position == "chunk":
            assert relative_error(found[name], grad) < 1e-12, name
        else:
            assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("position", ["light", "block"])
def test_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch, schedule: str, position: str) -> None:
    """What is computed again a few frames at a time has the same gradients, summed in another order."""
    model = build(schedule)
    pixels, guide = inputs(model, 7)
    exact = gradients(model, pixels, guide)
    model.recompute = position
    cut: list[int] = []
    split = Tensor.split
    monkeypatch.setattr(recompute, "PART_ELEMENTS", 3 * 16 * 16 * 8 + 1)  # three frames of the first stage
    monkeypatch.setattr(Tensor, "split", lambda x, size: cut.append(size) or split(x, size))
    found = gradients(model, pixels, guide)
    assert cut
    for name, grad in exact.items():
        assert relative_error(found[name], grad) < 1e-12, name


def test_drop_path_is_on_in_that_test() -> None:
    model = build("paper", drop_path=0.4)
    pixels, guide = inputs(model, 4)
    assert not torch.equal(model.train()(pixels, guide), model.eval()(pixels, guide))


@pytest.mark.parametrize("position", POSITIONS)
def test_under_autocast(position: str) -> None:
    model = build("paper").float()
    pixels, guide = (x.float() for x in inputs(model, 3))
    found = []
    for choice in ("none", position):
        model.recompute = choice
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, pixels, guide))
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


@pytest.mark.parametrize(
    ("schedule", "position", "chosen"),
    [
        *(("released", p, "apart") for p in ("none", *POSITIONS)),
        ("two stages", "none", "apart"),
        *(("released", p, "auto") for p in ("none", *POSITIONS)),
        ("released", "none", "triton"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_what_is_made_again_is_what_was(
    monkeypatch: pytest.MonkeyPatch, schedule: str, position: str, autocast: bool, chosen: str
) -> None:
    """In 16 bits even `none` makes cheap tensors again: the gradients are those of keeping all, bit for bit."""
    if chosen == "triton":
        need("residual_mlp", chosen, "cpu", torch.bfloat16)
    if chosen == "apart":
        halves_apart(monkeypatch)
    else:
        monkeypatch.setattr(backend, "_override", chosen)
    model = build(schedule, drop_path=0.4).train().to(torch.float32 if autocast else torch.bfloat16)
    pixels, guide = inputs(model, 3)
    dtype = torch.float32 if autocast else torch.bfloat16
    given = pixels.to(dtype), None if guide is None else guide.to(dtype)
    found = []
    for keeps_all in (True, False):
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if keeps_all:
                patch.setattr(swin_blocks, "remade", lambda value, source: nullcontext())
            model.recompute = "none" if keeps_all else position
            with saved_bytes(model) as saved:
                found.append((gradients(model, *given), saved.total))
    (exact, all_kept), (grads, kept_bytes) = found
    # What is fused keeps less in any case.
    assert kept_bytes <= (0.95 if chosen == "apart" else 1.0) * all_kept
    for name, grad in exact.items():
        assert torch.equal(grads[name], grad), name


def test_backward_makes_it_again_on_the_backend_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    need("residual_norm", "triton", "cpu", torch.bfloat16)
    model = build("none").bfloat16()
    pixels = inputs(model, 2)[0].bfloat16()
    found = []
    for keeps_all in (True, False):
        model.zero_grad()
        with monkeypatch.context() as patch, backend.use_backend("triton"):
            if keeps_all:
                patch.setattr(swin_blocks, "remade", lambda value, source: nullcontext())
            out = model(pixels)
        out.float().square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for grad, exact in zip(*found, strict=True):
        assert torch.equal(grad, exact)


@pytest.mark.parametrize("position", ["none", *POSITIONS])
def test_nothing_lives_but_what_is_counted(position: str) -> None:
    """Between forward and backward, and after it: nothing waits for the garbage collector, either."""
    model = build("released", drop_path=0.4).train().bfloat16()
    model.recompute = position
    pixels, guide = inputs(model, CHUNK_FRAMES + 2)
    pixels, guide = pixels.bfloat16(), guide.bfloat16()
    with _Live(model), saved_bytes(model):  # what torch imports in a first call leaves frames behind
        model(pixels, guide).sum().backward()
    model.zero_grad()
    gc.collect()
    gc.disable()
    try:
        with _Live(model) as live, saved_bytes(model) as saved:
            out = model(pixels, guide)
            given = pixels.nbytes + guide.nbytes  # chunks are views of them
            assert live.now <= saved.total + given + 2 * out.nbytes + 4096  # the output, and scalars
            out.sum().backward()
            del out
            model.zero_grad()
            assert live.now in (0, pixels.nbytes, given)  # of which there are views
    finally:
        gc.enable()


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Triton's kernels count as what runs on tensors of a GPU that is not there."""
    takes = backend.why_not

    def why_not(op: str, name: str, device: str, dtype: torch.dtype, **facts: int) -> str | None:
        kernel = backend.KERNELS.get((op, name))
        if name != "triton" or kernel is None or dtype not in kernel.dtypes:
            return takes(op, name, device, dtype, **facts)
        return kernel.limit(facts) if kernel.limit is not None else None

    monkeypatch.setattr(backend, "why_not", why_not)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts on tensors of a GPU that is not there")


@no_gpu
@pytest.mark.parametrize("position", ["none", "light"])
def test_autocast_on_a_gpu_keeps_no_wide_copies(monkeypatch: pytest.MonkeyPatch, position: str) -> None:
    """CUDA's autocast norms in float32 by itself: what is kept of a block is in 16 bits."""
    as_on_a_gpu(monkeypatch)
    model = build("none", embed_dim=64).train().float()
    model.recompute = position
    mode = FakeTensorMode()
    twin = without_content(model, mode, "cuda")
    kept: dict[int, Tensor] = {p.untyped_storage()._cdata: p for p in (*twin.parameters(), *twin.buffers())}
    sizes = {torch.float16: 0, torch.float32: 0}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            sizes[tensor.dtype] += storage.nbytes()
        kept[storage._cdata] = tensor
        return tensor

    with mode, torch.autocast("cuda", torch.float16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        twin(torch.empty(64, 3, 32, 32, device="cuda"))
    assert sizes[torch.float16] > 30e6
    # Statistics of norms, sums of exponentials, the last norm's input and the tables of the biases.
    assert sizes[torch.float32] < 0.1 * sizes[torch.float16], sizes


@no_gpu
@pytest.mark.parametrize("kernels", [False, True], ids=["layers", "kernels"])
@pytest.mark.parametrize("schedule", ["none", "released", "two stages"])
def test_under_a_gpu_s_autocast_tokens_are_in_its_type(
    monkeypatch: pytest.MonkeyPatch, schedule: str, kernels: bool
) -> None:
    """In half the bytes of float32, which torch's norms give on CUDA, though not on a CPU."""
    as_on_a_gpu(monkeypatch)
    model = build(schedule, embed_dim=32).train().float()
    mode, seen = FakeTensorMode(), []
    twin = without_content(model, mode, "cuda")
    for block in (block for stage in twin.stages() for block in stage.each()):
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].x.dtype))
    with mode, torch.autocast("cuda", torch.float16), deepmsi.use_backend("auto" if kernels else "reference"):
        frames = torch.empty(3, 3, 32, 32, device="cuda")
        guide = None if model.guide_dim is None else torch.empty(3, model.guide_dim, device="cuda")
        out = twin(frames, guide)
    assert set(seen) == {torch.float16}
    assert out.dtype == torch.float32


@no_gpu
def test_the_kept_bytes_where_a_gpu_s_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 utterances of 15 frames in bfloat16: fused halves keep less than layers apart, and `light` less than they."""
    as_on_a_gpu(monkeypatch)
    pytest.importorskip("timm")
    model = VSCSwin.from_timm("swinv2_tiny_window8_256", schedule="released").bfloat16().train()
    found = {}
    for position in ("none", *POSITIONS):
        model.recompute = position
        mode = FakeTensorMode()
        twin = without_content(model, mode, "cuda")
        with mode, saved_bytes(twin) as saved:
            frames = torch.empty(240, 3, 256, 256, dtype=torch.uint8, device="cuda")
            guide = torch.empty(240, model.guide_dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            twin(frames, guide, prepare=lambda x: (x.float() / 255).bfloat16())
        found[position] = saved.total / 1e9
    assert found["none"] < 5.5
    assert found["light"] < 4.0
    assert found["block"] < 1.05
    assert found["chunk"] < 0.1


def test_hooks_are_called_once() -> None:
    model = build("none").bfloat16()
    pixels, _ = inputs(model, 2)
    calls: list[str] = []
    block = model.stages()[0].each()[0]
    block.norm1.register_forward_hook(lambda *_: calls.append("norm1"))
    block.mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    model(pixels.bfloat16()).sum().backward()
    assert calls == ["norm1", "mlp"]


def test_functional_transforms_still_work() -> None:
    """They have no hooks on what is saved."""
    mlp = Mlp(4, 8).bfloat16()
    x = randn(3, 4, seed=1, dtype=torch.bfloat16)
    weights = {name: parameter.detach() for name, parameter in mlp.named_parameters()}
    found = torch.func.grad(lambda w: torch.func.functional_call(mlp, w, (x,)).sum())(weights)
    mlp(x).sum().backward()
    for name, parameter in mlp.named_parameters():
        assert torch.equal(found[name], parameter.grad), name


@pytest.mark.parametrize("position", POSITIONS)
def test_a_gradient_is_handed_on_once(position: str) -> None:
    """So that data parallelism, which reduces a gradient when it is handed on, reduces it whole."""
    model = build("paper")
    model.recompute = position
    handed: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: handed.append(id(p)))
    model(*inputs(model, 2 * CHUNK_FRAMES)).sum().backward()
    assert sorted(handed) == sorted(id(p) for p in model.parameters())


def kept(model: VSCSwin, frames: int, prepare: Any = None, dtype: torch.dtype = torch.float64) -> int:
    size = model.img_size
    pixels = torch.zeros(frames, 3, size, size, dtype=torch.uint8 if prepare else dtype)
    guide = None if model.guide_dim is None else randn(frames, model.guide_dim, seed=2, dtype=dtype).requires_grad_()
    with saved_bytes(model) as saved:
        model(pixels, guide, prepare=prepare)
    return saved.total


def test_frozen_stages_are_not_kept() -> None:
    model = build("released")
    whole = kept(model, CHUNK_FRAMES)
    assert not model.stem_frozen
    assert model.freeze_stem().stem_frozen
    assert model.stem_shape == (8, 8, 16)
    stem = CHUNK_FRAMES * 8 * 8 * 16 * 8  # its output in float64
    guided = kept(model, CHUNK_FRAMES)
    assert guided < 0.6 * whole
    model.recompute = "chunk"
    guide = CHUNK_FRAMES * model.guide_dim * 8
    assert kept(model, CHUNK_FRAMES) == stem + guide
    model.requires_grad_(False)
    for position in ("none", *POSITIONS):
        model.recompute = position
        with saved_bytes(model) as saved:
            model(*inputs(model, 3))
        assert saved.total == 0


def per_frame(model: nn.Module, position: str) -> float:
    """Return the bytes kept for one frame more, in bfloat16, of uint8 frames."""
    model.recompute = position

    def prepare(frames: Tensor) -> Tensor:
        return (frames.float() / 255).bfloat16()

    return float(kept(model, 2, prepare, torch.bfloat16) - kept(model, 1, prepare, torch.bfloat16))


def test_the_kept_bytes_fall_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one utterance more costs on a small backbone, relative to keeping all."""
    halves_apart(monkeypatch)
    model = build("released", img_size=64, patch_size=4).bfloat16()
    sizes = {position: per_frame(model, position) for position in ("none", *POSITIONS)}
    assert sizes["light"] < 0.55 * sizes["none"]
    assert sizes["block"] < 0.2 * sizes["none"]
    assert sizes["chunk"] <= 3 * 64 * 64 + 2 * model.guide_dim


def test_the_kept_bytes_of_the_paper_s_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 utterances of 15 frames in bfloat16, the weights' type too."""
    halves_apart(monkeypatch)
    pytest.importorskip("timm")
    model = VSCSwin.from_timm("swinv2_tiny_window8_256", schedule="released").bfloat16()
    gigabytes = {position: 240e-9 * per_frame(model, position) for position in ("none", *POSITIONS)}
    assert gigabytes["none"] < 9.5
    assert gigabytes["light"] < 4.0
    assert gigabytes["block"] < 1.05
    assert gigabytes["chunk"] < 0.1


def test_a_wrong_position_is_told() -> None:
    with pytest.raises(UserError, match="recompute must be one of none, light, block, chunk, not 'all'"):
        build("paper", recompute="all")
    model = build("paper")
    with pytest.raises(UserError, match="recompute"):
        model.recompute = "blocks"
