"""``fuse``: timm's Swin models on deepmsi's operations, in place."""

import importlib
import warnings
from typing import Any, TypeVar

from torch import nn

from deepmsi.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Run the blocks of timm's ``swin_*``, ``swin_s3_*`` or ``swinv2_*`` on deepmsi's operations, in place.

    Weights, state dict and outputs stay. Shift, partition, bias, softmax and reversal become one operation, and where a
    kernel does so, the whole half of a block, from its norm to its sum. Training and inference alike: drop path and the
    dropout of projections stay timm's; in training with dropout on the attention's weights (``attn_drop_rate``), which
    the operation has not, a block attends as timm's does, and so does one whose parts are replaced, patched or watched,
    or whose windows or shift are not square, as the last ones of an oblong image can be. Grids that are no multiple of
    the window are padded as timm pads them. Places that the mask parts are left out, where timm takes 100 from their
    logits: the same unless logits within a window lie about as far apart. Works on any module that contains such
    blocks, and again on one that is fused.

    Args:
        model: The model, or a module that contains it.

    Returns:
        The same object.

    Raises:
        UserError: It is no model, or none of its blocks can be fused; the model is then unchanged.

    Warns:
        UserWarning: The attention of none of its blocks can be fused, as windows or shifts are not square.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"fuse takes a model, such as timm.create_model gives, not {model!r}")
    try:
        blocks = importlib.import_module("deepmsi.nn._timm_blocks")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"fuse needs timm, which does not import ({str(error).splitlines()[0]}): install timm, and a torchvision "
            "that fits the installed torch"
        ) from error
    chosen: list[tuple[Any, type]] = []
    for name, module in model.named_modules():
        if type(module).__name__ == "SwinTransformerV2CrBlock":
            raise UserError(
                f"fuse: {name or 'the model'} is a block of swinv2_cr_*, whose attention is another than Swin V2's: "
                "take a swin_*, swin_s3_* or swinv2_* model"
            )
        if type(module) in blocks.FUSED or type(module) in blocks.FUSED.values():
            chosen.append((module, blocks.FUSED.get(type(module), type(module))))
    if not chosen:
        raise UserError(f"fuse: {type(model).__name__} has no block of timm's swin_*, swin_s3_* or swinv2_* to fuse")
    attending = [module for module, _ in chosen if hasattr(module, "window_size")]
    if attending and not any(map(blocks.square, attending)):
        warnings.warn(
            f"fuse: no block of {type(model).__name__} has windows and a shift that are square (the first has windows "
            f"{tuple(attending[0].window_size)}), so its attention stays timm's; the other layers are fused",
            stacklevel=2,
        )
    for module, fused in chosen:
        module.__class__ = fused
    return model
