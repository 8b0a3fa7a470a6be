"""The full model and its video branch, one utterance: our kernels against the same model in plain PyTorch and timm's.

Sides: `timm` is timm's eager Swin V2, uncompressed; `pytorch` is the model itself on the reference backend, all frames
in one batch. Same weights and inputs on every side, dropout off for the check of the numbers and on for training steps.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepmsi
from deepmsi import testing
from deepmsi.nn import VSCSwin

BACKBONE = "swinv2_tiny_window8_256"
# GFLOP of the linear layers and products of one 256x256 frame: uncompressed, and kept 196/144/100 with regrid.
GFLOP = {None: 11.84, "released": 8.43}


def randomise(module: nn.Module) -> None:
    """Move every parameter off its start: Swin V2's post-norms begin at zero and would hide the blocks."""
    for i, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.add_(testing.randn(*parameter.shape, seed=i, scale=0.02))


def step_of(module: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a function that runs forward and backward and leaves no gradient behind."""

    def step() -> None:
        forward().square().mean().backward()
        module.zero_grad(set_to_none=True)

    return step


def quiet(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the forward pass as inference runs it."""

    def run() -> Tensor:
        with torch.inference_mode():
            return forward()

    return run


def on_reference(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the same pass in plain PyTorch."""

    def run() -> Tensor:
        with deepmsi.use_backend("reference"):
            return forward()

    return run


@pytest.mark.parametrize("direction", ["forward", "training_step"])
@pytest.mark.parametrize("schedule", [None, "released", "paper"], ids=lambda s: s or "uncompressed")
def bench_video_branch(compare: Any, smallest: bool, gemm_rate: float, schedule: str | None, direction: str) -> None:
    timm = pytest.importorskip("timm")
    frames = 1 if smallest else 15
    torch.manual_seed(0)
    theirs = timm.create_model(BACKBONE, num_classes=0)
    randomise(theirs)
    ours = VSCSwin.from_timm(BACKBONE, schedule=schedule)
    ours.load_state_dict(theirs.state_dict(), strict=schedule is None)
    x = testing.randn(frames, 3, 256, 256, seed=1)
    guide = testing.randn(frames, ours.guide_dim, seed=2) if ours.guide_dim else None

    def forward() -> Tensor:
        return ours(x, guide)

    ours.eval()
    theirs.eval()
    with torch.no_grad():
        expected = theirs(x) if schedule is None else on_reference(forward)()
        torch.testing.assert_close(forward(), expected, rtol=1e-3, atol=1e-3)
    floor = GFLOP[schedule] * 1e9 * frames / gemm_rate if schedule in GFLOP and direction == "forward" else None
    if direction == "forward":
        run: Callable[[], Any] = quiet(forward)
        baselines: dict[str, Callable[[], Any]] = {
            "timm": quiet(lambda: theirs(x)),
            "pytorch": quiet(on_reference(forward)),
        }
    else:
        ours.train()
        theirs.train()
        run = step_of(ours, forward)
        baselines = {"timm": step_of(theirs, lambda: theirs(x)), "pytorch": step_of(ours, on_reference(forward))}
    compare(
        run,
        baselines,
        rounds=5,
        floor=floor,
        op="VSCSwin",
        case=f"{frames} frames, {schedule or 'uncompressed'}",
        direction=direction,
    )


@pytest.mark.parametrize("direction", ["forward", "training_step"])
@pytest.mark.parametrize("preset", ["small", "released"])
def bench_deepmsi(compare: Any, smallest: bool, preset: str, direction: str) -> None:
    if smallest and preset != "small":
        pytest.skip("only the smallest size was asked for")
    torch.manual_seed(0)
    features: dict[str, Any] = {"text": {"encoder": "features"}, "audio": {"encoder": "features"}}
    config = deepmsi.DeepMSIConfig(num_labels=6, preset=preset, **features)
    model = deepmsi.DeepMSI(config)
    utterances = 1 if preset == "released" else 2 if smallest else 16
    side, count = config.vision.image_size, config.vision.frames
    batch = {
        "pixel_values": torch.randint(256, (utterances, count, 3, side, side), dtype=torch.uint8),
        "text_features": testing.randn(utterances, config.text.dim, seed=1),
        "audio_features": testing.randn(utterances, config.audio.dim, seed=2),
        "labels": torch.arange(utterances) % 6,
    }

    def forward() -> Tensor:
        out = model(**batch)
        return out.loss if model.training else out.logits

    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(forward(), on_reference(forward)(), rtol=1e-3, atol=1e-3)
    if direction == "forward":
        run: Callable[[], Any] = quiet(forward)
        baseline: Callable[[], Any] = quiet(on_reference(forward))
    else:
        model.train()
        run, baseline = step_of(model, forward), step_of(model, on_reference(forward))
    compare(
        run,
        {"pytorch": baseline},
        rounds=5,
        op="DeepMSI",
        case=f"{utterances} utterance{'s' * (utterances > 1)} of {count} frames, {side} px, {preset}",
        direction=direction,
    )
