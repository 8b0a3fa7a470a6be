"""The model as one file that runs without this package: `torch.export` on the reference operations.

There is no ONNX: torch's exporter has no conversion of the stable sort by which kept tokens' ties are broken.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from deepmsi import backend as backends
from deepmsi.errors import UserError
from deepmsi.models.deepmsi import DeepMSI
from deepmsi.nn.constants import for_good

SUFFIX = ".pt2"


class _Inference(nn.Module):
    """The arguments that are left for inference, by place: those of the configured modalities, in their order."""

    def __init__(self, model: DeepMSI) -> None:
        super().__init__()
        self.model = model
        self.names = [argument_of(name) for name in model.modalities]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def argument_of(modality: str) -> str:
    """Name of a modality's argument of `DeepMSI.forward` in an exported program."""
    return "pixel_values" if modality == "video" else f"{modality}_features"


def export_model(model: DeepMSI, path: str | Path, *, backend: str = "reference") -> float:
    """Write the inference of a model as a `torch.export` program for any number of utterances.

    The program takes, in the order of `model.modalities`, `pixel_values [U, T, 3, S, S]` uint8 and the utterance
    vectors `text_features [U, Dt]` and `audio_features [U, Da]` float32, and returns the logits `[U, K]`. Encoders stay
    outside. A schedule that keeps tokens by a threshold gets rows for every token, which changes no number.

    Equivalent to: `torch.export.load(path).module()(pixel_values, text_features, audio_features)`.

    Args:
        model: the model, which stays as it is.
        path: a `.pt2` file.
        backend: `reference` makes a program of torch's own operators, which runs without deepmsi; `cpp` and `auto` one
            that calls deepmsi's kernels and needs the package to be imported first.

    Returns:
        The largest difference between the model's logits and those of the program as it is read back, on another
        batch size than it was traced at.

    Raises:
        UserError: the path is none of a `.pt2` file in a folder that exists, and of an `.onnx` file it says why not; or
            the file cannot be written, and nothing of it stays.
    """
    from deepmsi.data.files import write_bytes

    path = Path(path)
    if path.suffix == ".onnx":
        raise UserError(
            f"{path}: there is no ONNX, for torch's exporter has no conversion of the stable sort by which ties of "
            f"kept tokens are broken: give a file that ends in {SUFFIX}, in a folder that exists."
        )
    if path.suffix != SUFFIX or not path.parent.is_dir():
        raise UserError(f"{path}: give a file that ends in {SUFFIX}, in a folder that exists.")
    # The copy computes in float32 on the CPU, whatever the model is used for meanwhile.
    program = _Inference(copy.deepcopy(model).float().cpu().eval())
    video = program.model.video
    if video is not None:
        if video.backbone.schedule is not None and not video.backbone.schedule.static:
            video.backbone.reserve()
        video.fold()
    batch = {0: torch.export.Dim("utterances")}
    with backends.use_backend(backend), torch.no_grad(), for_good():
        inputs = _example(program.model, 2)
        exported = torch.export.export(program, inputs, dynamic_shapes=(tuple(batch for _ in inputs),))
    # In memory first: where the disk is full, torch's writer ends the process.
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    stream.seek(0)
    inputs = _example(program.model, 3)
    with torch.no_grad():
        found = torch.export.load(stream).module()(*inputs)
        difference = float((found - program(*inputs)).abs().max())
    write_bytes(path, stream.getvalue())
    return difference


def _example(model: DeepMSI, utterances: int) -> tuple[Tensor, ...]:
    """Random inputs of so many utterances."""
    draw = torch.Generator().manual_seed(utterances)
    vision, inputs = model.config.vision, []
    for name in model.modalities:
        if name == "video":
            shape = (utterances, vision.frames, 3, vision.image_size, vision.image_size)
            inputs.append(torch.randint(256, shape, generator=draw, dtype=torch.uint8))
        else:
            inputs.append(torch.randn(utterances, model.missing[name].shape[0], generator=draw))
    return tuple(inputs)
