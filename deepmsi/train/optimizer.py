"""AdamW over a model's parameters: which of them take which rate, and which decay."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deepmsi.models.config import OWN_ENCODERS, ModelSections
from deepmsi.train.recipe import TrainSettings

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI


def build_optimizer(model: DeepMSI, settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    # One pass over weights and moments. Not in fp16, whose scaler could not tell of a step it skipped.
    fused = True if device.type in ("cpu", "cuda") and settings.precision != "fp16" else None
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), lr=settings.lr, betas=settings.betas, fused=fused)
    optimizer.register_load_state_dict_pre_hook(partial(stepping, fused=fused))
    return optimizer


def pretrained_parts(config: ModelSections) -> list[str]:
    """Where the names of parameters begin that are trained from pretrained weights."""
    vision = config.vision
    parts = ["video.backbone."] if vision.backbone != "none" and vision.pretrained and vision.freeze is not True else []
    sections = {name: getattr(config, name) for name in ("text", "audio")}
    return parts + [
        f"{name}_encoder."
        for name, section in sections.items()
        if section.encoder not in OWN_ENCODERS and section.finetune
    ]


def stepping(optimizer: torch.optim.Optimizer, stored: dict[str, Any], fused: bool | None) -> dict[str, Any]:
    """A stored state for this device: how a step is computed is not taken over from where the state was stored."""
    return stored | {"param_groups": [group | {"fused": fused} for group in stored["param_groups"]]}


def parameter_groups(model: DeepMSI, settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameters by rate and decay: encoders that start from pretrained weights take `encoder_lr`.

    What compresses inside a pretrained backbone (λ among it) starts from nothing and takes `lr`.

    What has two dimensions or more decays, but for what the model's parts spare (`DeepMSI.no_weight_decay`): matrices.
    Biases, norms, λ and the learned vectors of missing modalities do not.
    """
    pretrained = pretrained_parts(model.config)
    spared = model.no_weight_decay()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            encoder = name.startswith(tuple(pretrained)) and ".compress." not in name
            groups.setdefault((encoder, parameter.ndim >= 2 and name not in spared), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": (settings.encoder_lr or settings.lr) if encoder else settings.lr,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (encoder, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
