"""Small configurations that the model's tests share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepmsi import DeepMSI, DeepMSIConfig

TINY: dict[str, dict[str, Any]] = {
    "vision": {"backbone": "small", "image_size": 32, "frames": 2, "tcn_channels": [16, 16], "tcn_dropout": 0.0},
    "text": {"dim": 12},
    "audio": {"dim": 10},
    "fusion": {"guide_hidden": 16, "projection": 16, "hidden": [16], "dropout": 0.0},
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., DeepMSI]:
    """Build a small model of given sections; the same arguments give the same weights, none of them at zero."""

    def build(seed: int = 0, **sections: Any) -> DeepMSI:
        merged: dict[str, Any] = {"num_labels": 3, **TINY}
        for name, section in sections.items():
            merged[name] = {**merged.get(name, {}), **section} if isinstance(section, dict) else section
        torch.manual_seed(seed)
        model = DeepMSI(DeepMSIConfig(**merged))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    # Fresh post-norms are zero, which would hide whole blocks.
                    parameter += 0.05 * torch.randn_like(parameter)
        return model

    return build


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four utterances with everything: uint8 frames, text and audio features."""
    torch.manual_seed(1)
    return {
        "pixel_values": torch.randint(0, 256, (4, 2, 3, 32, 32), dtype=torch.uint8),
        "text_features": torch.randn(4, 12),
        "audio_features": torch.randn(4, 10),
    }
