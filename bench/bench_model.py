"""The full model and its video branch: our kernels against what a user would take instead.

Sides, each with the same weights and inputs: `timm` is timm's eager Swin V2, uncompressed; `batched` the same
compression in plain PyTorch with timm's blocks, all frames in one batch, and `frame_by_frame` one frame at a time, as
the released code runs it; `reference` is the model itself on the reference backend. With `--compile`, `timm` and
`batched` under torch.compile are a case of their own. Dropout is off for the check of the numbers and on for training
steps. Some cases run under bfloat16 autocast, on all sides.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from baselines import FrameByFrame, TimmVSCSwin
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


def cast(narrow: bool, device: str, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the same pass under bfloat16 autocast, where that is asked for."""
    if not narrow:
        return forward

    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return forward().float()

    return run


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


def of_timm(name: str, device: str = "cpu") -> nn.Module:
    """Return a model of timm with every parameter moved."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    randomise(model)
    return model.to(device)


def backbones(schedule: str | None, device: str = "cpu") -> tuple[nn.Module, VSCSwin]:
    """Return timm's model with every parameter moved, and ours with its weights."""
    theirs = of_timm(BACKBONE)
    ours = VSCSwin.from_timm(BACKBONE, schedule=schedule)
    ours.load_state_dict(theirs.state_dict(), strict=schedule is None)
    return theirs.to(device), ours.to(device)


def agree(actual: Tensor, wanted: Tensor) -> None:
    """Assert that both sides give the same rows; on a GPU one in ten may differ a little.

    The sides sum in different orders there: where a frame's last token hangs on a rounding, they may keep another one.
    """
    if actual.device.type == "cpu":
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)
        return
    near = torch.isclose(actual, wanted, rtol=1e-3, atol=1e-3).all(1)
    differ = len(near) - near.sum().item()
    assert differ <= max(1, len(near) // 10), f"{differ} of {len(near)} rows differ"
    torch.testing.assert_close(actual, wanted, rtol=0.0, atol=5e-2 * wanted.abs().max().item())


def as_near(actual: Tensor, other: Tensor, exact: Tensor) -> None:
    """Assert that a side in 16 bits is at most twice as far from float32, on average, as another one."""
    ours, theirs = ((side - exact).abs().mean().item() for side in (actual, other))
    assert ours <= 2 * theirs, f"{ours:.2e} from float32, the other side {theirs:.2e}"


@pytest.mark.parametrize("direction", ["forward", "training_step"])
@pytest.mark.parametrize(
    ("schedule", "utterances", "narrow"),
    [
        ("released", 16, True),
        (None, 1, False),
        ("released", 1, False),
        ("released", 2, False),
        ("paper", 1, False),
        ("released", 1, True),
    ],
    ids=["released-16-bfloat16", "uncompressed-1", "released-1", "released-2", "paper-1", "released-1-bfloat16"],
)
def bench_video_branch(
    compare: Any,
    smallest: bool,
    device: str,
    compiled: bool,
    ceilings: Any,
    schedule: str | None,
    utterances: int,
    narrow: bool,
    direction: str,
) -> None:
    if smallest and utterances > 1:
        pytest.skip("only the smallest size was asked for")
    if device == "cpu" and utterances > 2:
        pytest.skip("sixteen utterances are for a GPU: timm's step of one takes 2 GB in bfloat16")
    frames = 1 if smallest else 15 * utterances
    theirs, ours = backbones(schedule, device)
    x = testing.randn(frames, 3, 256, 256, seed=1, device=device)
    guide = testing.randn(frames, ours.guide_dim, seed=2, device=device) if ours.guide_dim else None

    forward = cast(narrow, device, lambda: ours(x, guide))
    # What is timed, by name: a module and its pass.
    sides: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {"timm": (theirs, lambda: theirs(x))}
    same = "timm" if schedule is None else "reference"
    if schedule == "released":
        batched = TimmVSCSwin(theirs, ours)
        loop = FrameByFrame(batched)
        sides["batched"] = (batched, lambda: batched(x, guide))
        if not narrow and (device == "cpu" or utterances == 1):
            sides["frame_by_frame"] = (batched, lambda: loop(x, guide))
        same = "batched"
        if compiled and (utterances, narrow) == ((1, False) if device == "cpu" else (16, True)):
            sides["timm_compiled"] = (theirs, partial(torch.compile(theirs), x))
            sides["batched_compiled"] = (batched, partial(torch.compile(batched), x, guide))
    if schedule == "paper":
        sides["reference"] = (ours, on_reference(forward))
    for module, _ in (*sides.values(), (ours, forward)):
        module.eval()
    with torch.no_grad():
        if narrow:
            # Up to where tokens are chosen: in 16 bits every side chooses some others. `bench_fuse` checks the rest.
            early = cast(narrow, device, lambda: ours.stem(x))
            as_near(early(), on_reference(early)(), ours.stem(x))
        else:
            agree(forward(), sides[same][1]())
    sides = {name: (module, cast(narrow, device, function)) for name, (module, function) in sides.items()}
    against = ", bfloat16 autocast" if narrow else ""
    if named := [name for name in sides if name.endswith("compiled")]:
        # Compared in a case of its own: the eager forms are in that of a run without `--compile`.
        sides, against = {name: sides[name] for name in named}, ", against torch.compile"
    dtype = torch.bfloat16 if narrow else torch.float32
    floor = None
    if schedule in GFLOP and direction == "forward":
        floor = ceilings.floor(GFLOP[schedule] * 1e9 * frames, 0.0, dtype)
    if direction == "forward":
        run: Callable[[], Any] = quiet(forward)
        baselines: dict[str, Callable[[], Any]] = {name: quiet(function) for name, (_, function) in sides.items()}
    else:
        for module, _ in (*sides.values(), (ours, forward)):
            module.train()
        run = step_of(ours, forward)
        baselines = {name: step_of(module, function) for name, (module, function) in sides.items()}
    compare(
        run,
        baselines,
        rounds=5,
        graph=direction == "forward" and schedule != "paper",  # its threshold is waited for on the host
        dtype=dtype,
        floor=floor,
        op="VSCSwin",
        case=f"{frames} frames, {schedule or 'uncompressed'}{against}",
        direction=direction,
    )


@pytest.mark.parametrize("direction", ["forward", "training_step"])
@pytest.mark.parametrize(
    ("backbone", "narrow"),
    [(BACKBONE, False), (BACKBONE, True), ("swin_tiny_patch4_window7_224", False), ("swin_s3_tiny_224", False)],
    ids=["v2-float32", "v2-bfloat16", "v1-float32", "s3-float32"],
)
def bench_fuse(compare: Any, smallest: bool, device: str, backbone: str, narrow: bool, direction: str) -> None:
    theirs = of_timm(backbone, device)
    fused = deepmsi.fuse(copy.deepcopy(theirs))
    frames = 1 if smallest else 15
    side = 256 if backbone == BACKBONE else 224
    x = testing.randn(frames, 3, side, side, seed=1, device=device)
    theirs.eval()
    fused.eval()
    ours, other = cast(narrow, device, lambda: fused(x)), cast(narrow, device, lambda: theirs(x))
    with torch.no_grad():
        exact = theirs(x)
        if narrow:
            as_near(ours(), other(), exact)
        else:
            torch.testing.assert_close(ours(), exact, rtol=1e-3, atol=1e-3)
    if direction == "forward":
        run: Callable[[], Any] = quiet(ours)
        baseline: Callable[[], Any] = quiet(other)
    else:
        theirs.train()
        fused.train()
        run, baseline = step_of(fused, ours), step_of(theirs, other)
    compare(
        run,
        {"timm": baseline},
        rounds=5,
        dtype=torch.bfloat16 if narrow else torch.float32,
        op="fuse",
        case=f"{backbone}, {frames} frames{', bfloat16 autocast' if narrow else ''}",
        direction=direction,
    )


@pytest.mark.parametrize("direction", ["forward", "training_step"])
@pytest.mark.parametrize(("preset", "utterances"), [("small", 16), ("released", 1), ("released", 2)])
def bench_deepmsi(compare: Any, smallest: bool, device: str, preset: str, utterances: int, direction: str) -> None:
    if smallest and preset != "small":
        pytest.skip("only the smallest size was asked for")
    pytest.importorskip("pydantic")  # the model's configuration
    torch.manual_seed(0)
    features: dict[str, Any] = {"text": {"encoder": "features"}, "audio": {"encoder": "features"}}
    config = deepmsi.DeepMSIConfig(num_labels=6, preset=preset, **features)
    model = deepmsi.DeepMSI(config).to(device)
    utterances = 2 if smallest else utterances
    side, count = config.vision.image_size, config.vision.frames
    batch = {
        "pixel_values": torch.randint(256, (utterances, count, 3, side, side), dtype=torch.uint8, device=device),
        "text_features": testing.randn(utterances, config.text.dim, seed=1, device=device),
        "audio_features": testing.randn(utterances, config.audio.dim, seed=2, device=device),
        "labels": torch.arange(utterances, device=device) % 6,
    }

    def forward() -> Tensor:
        out = model(**batch)
        return out.loss if model.training else out.logits

    model.eval()
    with torch.no_grad():
        agree(forward(), on_reference(forward)())
    if direction == "forward":
        run: Callable[[], Any] = quiet(forward)
        baseline: Callable[[], Any] = quiet(on_reference(forward))
    else:
        model.train()
        run, baseline = step_of(model, forward), step_of(model, on_reference(forward))
    compare(
        run,
        {"reference": baseline},
        rounds=5,
        op="DeepMSI",
        case=f"{utterances} utterance{'s' * (utterances > 1)} of {count} frames, {side} px, {preset}",
        direction=direction,
    )
