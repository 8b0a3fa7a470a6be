"""What the video branch does around its backbone: the small one's sizes, statistics of each pixel position."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepmsi import DeepMSI, DeepMSIConfig
from deepmsi.errors import UserError
from deepmsi.models.config import VisionConfig
from deepmsi.models.vision import VideoBranch, check_vision
from deepmsi.testing import assert_within_budget, randn

TINY = {"patch_size": 8, "embed_dim": 8, "depths": [1, 1, 1], "heads": [1, 1, 1], "window": 4}


def branch(**changes: object) -> VideoBranch:
    torch.manual_seed(0)
    config = {"backbone": "small", "image_size": 32, "frames": 3, "tcn_channels": (8,), "schedule": None}
    return VideoBranch(VisionConfig(**{**config, "options": TINY, **changes})).eval()  # type: ignore[arg-type]


def videos(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(count)]


def test_options_size_the_small_backbone() -> None:
    video = branch()
    assert video.backbone.num_features == 32
    assert [len(stage.blocks) for stage in video.backbone.stages()] == [1, 1, 1]
    with pytest.raises(ValueError, match="backbone 'small'"):
        VisionConfig(options={"embed_dim": 8})
    with pytest.raises(ValueError, match="embed_dims"):
        VisionConfig(backbone="small", options={"embed_dims": 8})  # type: ignore[dict-item]


@pytest.mark.parametrize("mirrored", [False, True])
def test_pixel_statistics_standardise_every_position(mirrored: bool) -> None:
    video = branch(pixel_statistics=True)
    clips = videos()
    video.fit_pixel_statistics(iter(clips), mirrored)
    frames = torch.cat(clips)
    seen = torch.cat([frames, frames.flip(-1)]) if mirrored else frames
    expected = (seen.double() / 255).std(0, correction=0) + 0.025
    torch.testing.assert_close(video.std.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(video.normalize(seen).mean(0), torch.zeros(3, 32, 32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("statistics", [False, True], ids=["of channels", "of positions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_normalising_is_one_operation_on_the_pixels_and_one_to_cast(statistics: bool, dtype: torch.dtype) -> None:
    video = branch(pixel_statistics=statistics).to(dtype)
    pixels = torch.stack(videos()).flatten(0, 1)
    expected = (pixels.double() / 255 - video.mean.double()) / video.std.double()
    with Passes(pixels.numel()) as passes:
        found = video.normalize(pixels)
    assert found.dtype == dtype
    assert passes.count == (2 if dtype == torch.bfloat16 else 1)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


class Passes(TorchDispatchMode):
    """Counts the operations that write so many elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += isinstance(out, Tensor) and out.numel() == self.size
        return out


def test_a_still_background_stays_still() -> None:
    video = branch(pixel_statistics=True)
    clips = videos()
    for clip in clips:
        clip[..., :8] = 200
    video.fit_pixel_statistics(clips)
    assert video.normalize(clips[0])[..., :8].abs().max() < 1e-4
    noisy = clips[0].clone()
    noisy[..., :8] += 3
    assert video.normalize(noisy)[..., :8].abs().max() < 0.5


def test_without_videos_the_configured_mean_stays() -> None:
    video = branch(pixel_statistics=True, mean=(0.1, 0.2, 0.3))
    video.fit_pixel_statistics([])
    assert video.mean[:, 5, 5].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_pixel_statistics_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"image_size": 32, "frames": 3, "pixel_statistics": True, "options": TINY, "schedule": None}
    config = {"preset": "small", "num_labels": 2, "vision": vision, "text": {"encoder": "none"}}
    model = DeepMSI(DeepMSIConfig(**config, audio={"encoder": "none"})).eval()  # type: ignore[arg-type]
    assert model.video is not None
    clips = videos()
    model.video.fit_pixel_statistics(clips)
    model.save_pretrained(tmp_path / "model")
    again = DeepMSI.from_pretrained(tmp_path / "model").eval()
    pixels = torch.stack(clips)
    assert torch.equal(again(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
def test_folding_keeps_the_error_budget(dtype: torch.dtype, autocast: bool) -> None:
    """White, black and noise: the embedding of pixels against that of normalised frames, both against float64."""
    video = branch()
    frames = torch.cat(
        [torch.stack(videos()).flatten(0, 1), torch.full((1, 3, 32, 32), 255), torch.zeros(1, 3, 32, 32)]
    )
    frames = frames.to(torch.uint8)
    with torch.no_grad():
        video.backbone.patch_embed.proj.bias.normal_()
        wide = branch().double()
        if not autocast:
            video.to(dtype)
        wide.load_state_dict(video.state_dict())
        mean, std = (value.double().view(3, 1, 1) for value in (video.mean, video.std))
        exact = wide.backbone.patch_embed.proj((frames.double() / 255 - mean) / std)
        conv = video.backbone.patch_embed.proj
        with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
            plain = conv(video.normalize(frames))
            video.fold()
            embed = video.backbone.patch_embed
            folded = torch.nn.functional.conv2d(
                frames.to(embed.pixel_weight.dtype), embed.pixel_weight, embed.pixel_bias, conv.stride
            )
    assert folded.dtype == plain.dtype
    assert_within_budget(folded, plain, exact, "embedding")


def test_rounding_the_folded_weights_shifts_no_colour() -> None:
    """A frame of the mean colour is embedded as the bias, whatever its weights are rounded to; and float32 stays so."""
    video = branch()
    embed, pixels = video.backbone.patch_embed, torch.stack(videos()).flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        video.fold()
    read = embed.pixel_weight.bfloat16().double()
    mean_colour = (read * (255 * video.mean.double().view(3, 1, 1))).sum((1, 2, 3)) + embed.pixel_bias
    torch.testing.assert_close(mean_colour, embed.proj.bias.double(), rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(embed(pixels), embed(video.normalize(pixels)), rtol=1e-5, atol=1e-5)


def test_folding_changes_no_feature_and_goes_in_training() -> None:
    video = branch(schedule="paper")
    pixels = torch.stack(videos())
    guide = torch.randn(4, video.guide_dim)
    names = set(video.state_dict())
    calls: list[int] = []
    normalize = video.normalize
    video.normalize = lambda frames: calls.append(1) or normalize(frames)  # type: ignore[method-assign]
    with torch.no_grad():
        expected = video(pixels, guide)[0]
        given = video.normalize(pixels.flatten(0, 1)).view(4, 3, 3, 32, 32)
        video.fold()
        calls.clear()
        torch.testing.assert_close(video(pixels, guide)[0], expected)
        assert not calls
        torch.testing.assert_close(video(given, guide)[0], expected)  # what is normalised already stays so
    assert set(video.state_dict()) == names
    video.load_state_dict(video.state_dict())
    assert video.backbone.patch_embed.pixel_weight is None
    video.fold()
    video.train()(pixels, guide)[0].sum().backward()
    assert video.backbone.patch_embed.proj.weight.grad.abs().max() > 0


def test_gradients_in_evaluation_are_those_without_folding() -> None:
    """Whoever trains or explains a model that has predicted before: no weight may be taken for a constant."""
    video, pixels = branch(schedule=None).eval(), torch.stack(videos())
    grads = []
    for fold in (False, True):
        if fold:
            video.fold()
        video.zero_grad()
        video(pixels, None)[0].sum().backward()
        grads.append({name: p.grad for name, p in video.named_parameters()})
    assert grads[0].keys() == {name for name, grad in grads[1].items() if grad is not None}
    torch.testing.assert_close(grads[1], grads[0])


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("computed", [False, True], ids=["own", "parametrised"])
@torch.no_grad()
def test_weights_that_change_in_place_are_read_again(computed: bool) -> None:
    """As an average of the weights is written into a model that has predicted."""

    def build() -> VideoBranch:
        video = branch(schedule=None)
        if computed:
            mlp = video.backbone.stages()[0].each()[0].attn.cpb_mlp
            for layer in (mlp[0], mlp[2], video.backbone.patch_embed.proj):
                torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
        return video

    video, pixels = build(), torch.stack(videos())
    video.fold()
    video(pixels, None)
    for parameter in video.parameters():
        parameter.mul_(1.1).add_(0.01)
    fresh = build()
    fresh.load_state_dict(video.state_dict())
    torch.testing.assert_close(video(pixels, None)[0], fresh(pixels, None)[0])


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_of_shards_nothing_is_folded(tmp_path: Path) -> None:
    """FSDP has whole weights during calls alone: frames are normalised in each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    video, pixels = branch(schedule=None), torch.stack(videos())
    with torch.no_grad():
        expected = video(pixels, None)[0]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(video, mesh=init_device_mesh("cpu", (1,)))
        video.fold()
        assert video.backbone.patch_embed.pixel_weight is None
        with torch.no_grad():
            torch.testing.assert_close(video(pixels, None)[0], expected)
    finally:
        dist.destroy_process_group()


def test_statistics_of_each_position_are_not_folded() -> None:
    video = branch(pixel_statistics=True)
    video.fit_pixel_statistics(videos())
    pixels = torch.stack(videos())
    with torch.no_grad():
        expected = video(pixels, None)[0]
        video.fold()
        torch.testing.assert_close(video(pixels, None)[0], expected)
    assert video.backbone.patch_embed.pixel_weight is None


@pytest.mark.parametrize("recompute", ["none", "light", "block", "chunk"])
def test_a_frozen_stem_s_output_stands_for_the_frames(recompute: str) -> None:
    """The features, the gradients and what is kept of the tokens, from it and from the frames."""
    video, pixels = branch(schedule="paper", freeze="stem", recompute=recompute).double(), torch.stack(videos(6))
    with torch.no_grad():
        for i, parameter in enumerate(video.parameters()):
            parameter += 0.1 * randn(*parameter.shape, seed=i, dtype=torch.float64)  # post-norms begin at zero
    guide = randn(6, video.guide_dim or 0, seed=9, dtype=torch.float64)
    with torch.no_grad():
        stem = video.stem(pixels)
    assert stem.shape == (6, 3, *video.stem_shape)
    found = []
    for given in (pixels, stem):
        video.zero_grad()
        leaf = guide.clone().requires_grad_()
        features, _ = video(given, leaf)
        features.square().sum().backward()
        _, kept = video(given, guide, return_kept=True)
        grads = {name: p.grad for name, p in video.named_parameters() if p.requires_grad}
        found.append((features, leaf.grad, grads, [part.positions for part in kept]))
    torch.testing.assert_close(found[1], found[0])
    assert found[0][3]


def test_the_output_of_a_stem_that_learns_is_refused_in_training() -> None:
    video, pixels = branch(schedule=None), torch.stack(videos())
    with torch.no_grad():
        stem = video.stem(pixels)
        torch.testing.assert_close(video(stem, None)[0], video(pixels, None)[0])
    with pytest.raises(UserError, match="a stem that learns: give frames, freeze it"):
        video(stem, None)
    with pytest.raises(ValueError, match="without a schedule there is no first compression"):
        branch(schedule=None, freeze="stem")
    with pytest.raises(UserError, match=r"the stem's output and is torch\.int32: give float"):
        video(stem.int(), None)
    for reads in (lambda x: video(x, None), video.stem):
        with pytest.raises(
            UserError, match=r"reads \[videos, frames, 3, 32, 32\], .* stem, \[videos, frames, 1, 1, 32\]"
        ):
            reads(stem[..., :-1])


@pytest.mark.parametrize("schedule", [None, "paper", "released"])
def test_the_stem_of_a_backbone_of_timm(schedule: str | None) -> None:
    """Of the size of the frames as bytes, in 16 bits, where the third stage compresses."""
    pytest.importorskip("timm")
    config = VisionConfig(schedule=schedule, freeze="stem" if schedule else False)
    with torch.device("meta"):
        video = VideoBranch(config)
        if schedule is None:
            video.backbone.freeze_stem()
        stem = video.stem(torch.empty(1, 1, 3, 256, 256, dtype=torch.uint8))
    assert stem.shape == (1, 1, *video.stem_shape) == (1, 1, *((16, 16, 384) if schedule else (8, 8, 768)))
    assert schedule is None or stem[0, 0].numel() * 2 == 3 * 256 * 256
    assert video.backbone.stem_frozen
    learning = [name for name, p in video.backbone.named_parameters() if p.requires_grad]
    first = [name for name in learning if name.startswith("layers.2.blocks.0.")]
    assert schedule is None or {name.split(".")[4] for name in first} == {"compress", "mlp", "norm2"}
    assert not any(name.startswith(("patch_embed", "layers.0", "layers.1", "layers.2.downsample")) for name in learning)
    assert learning if schedule else learning == ["norm.weight", "norm.bias"]


def test_pretrained_weights_come_from_the_file_that_is_named(tmp_path: Path) -> None:
    timm, name = pytest.importorskip("timm"), "swinv2_tiny_window8_256"
    source = timm.create_model(name, img_size=64)
    save_file(source.state_dict(), file := tmp_path / "swin.safetensors")
    config = VisionConfig(backbone=name, pretrained=str(file), image_size=64, frames=2)
    check_vision(config)
    found = VideoBranch(config).backbone.state_dict()
    for key, value in source.state_dict().items():
        if key in found and key.startswith("layers.3"):
            assert torch.equal(found[key], value), key
    file.unlink()
    VideoBranch(config, weights=False)  # as where a checkpoint's weights follow
    with pytest.raises(UserError, match="there is no such file of weights"):
        check_vision(config)
