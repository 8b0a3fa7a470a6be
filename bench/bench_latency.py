"""Live use: what the next frame of every stream costs, and one image by a fused model.

Sides: `timm` is timm's eager Swin V2 alone, uncompressed, on that frame or image; `anew` our side with what follows
from the weights computed in every call (position bias, the layout of weights; a stream normalises its pixels, too), as
training has it; `clip` the whole model on the last 15 frames, as one that cannot stream would have to run.
"""

import copy
from typing import Any

import pytest
import torch
from bench_model import BACKBONE, agree, backbones, quiet, randomise

import deepmsi
from deepmsi import testing

FRAMES = 15


@pytest.mark.parametrize("streams", [1, 4])
def bench_next_frame(compare: Any, smallest: bool, device: str, streams: int) -> None:
    if smallest and streams > 1:
        pytest.skip("only the smallest size was asked for")
    timm = pytest.importorskip("timm")
    pytest.importorskip("pydantic")  # the model's configuration
    from deepmsi.models.streaming import EmotionStream

    torch.manual_seed(0)
    features: dict[str, Any] = {name: {"encoder": "features"} for name in ("text", "audio")}
    config = deepmsi.DeepMSIConfig(num_labels=6, preset="released", **features)
    model = deepmsi.DeepMSI(config).to(device).eval()
    assert model.video is not None
    randomise(model.video.backbone)
    theirs = timm.create_model(BACKBONE, num_classes=0).to(device).eval()
    said = {
        "text_features": testing.randn(streams, config.text.dim, seed=1, device=device),
        "audio_features": testing.randn(streams, config.audio.dim, seed=2, device=device),
    }
    side = config.vision.image_size
    pixels = torch.randint(256, (streams, FRAMES, 3, side, side), dtype=torch.uint8, device=device)

    other = copy.deepcopy(model)
    ours, anew = EmotionStream(model, streams), EmotionStream(other, streams)
    other.train().eval()
    for stream in (ours, anew):
        stream.hear(**said)
        for t in range(FRAMES):
            out = stream.step(pixels[:, t])
        with torch.no_grad():
            agree(out.logits, model(pixel_values=pixels, **said).logits)
    normalised = model.video.normalize(pixels[:, 0])
    compare(
        lambda: ours.step(pixels[:, 0]),
        {
            "timm": quiet(lambda: theirs(normalised)),
            "anew": lambda: anew.step(pixels[:, 0]),
            "clip": quiet(lambda: model(pixel_values=pixels, **said).logits),
        },
        rounds=15,
        op="EmotionStream.step",
        case=f"{streams} stream{'s' * (streams > 1)}, a frame of each, {side} px, released",
        direction="forward",
    )


def bench_one_image(compare: Any, device: str) -> None:
    theirs, _ = backbones(None, device)
    x = testing.randn(1, 3, 256, 256, seed=1, device=device)
    anew = deepmsi.fuse(copy.deepcopy(theirs.eval()))
    ours = deepmsi.fix_constants(copy.deepcopy(anew))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
    compare(
        quiet(lambda: ours(x)),
        {"timm": quiet(lambda: theirs(x)), "anew": quiet(lambda: anew(x))},
        rounds=15,
        op="fuse",
        case=f"{BACKBONE}, 1 image, constants fixed",
        direction="forward",
    )
