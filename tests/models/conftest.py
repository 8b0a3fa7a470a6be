"""Small configurations and encoder folders that the model's tests share."""

from collections.abc import Callable
from pathlib import Path
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


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a word vocabulary, saved as transformers saves it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "i", "am", "so", "happy", "sad", "you", ":", ".", "!"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wav2vec2_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Random encoders of the wav2vec 2.0 family, by model type and the norm of their feature extractor."""
    from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

    made: dict[tuple[str, str, bool], Path] = {}

    def build(model_type: str = "wav2vec2", norm: str = "layer", stable: bool = False) -> Path:
        key = (model_type, norm, stable)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                model_type,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                conv_dim=(8, 8, 8),
                conv_stride=(5, 4, 4),
                conv_kernel=(10, 8, 4),
                num_feat_extract_layers=3,
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
                feat_extract_norm=norm,
                do_stable_layer_norm=stable,
            )
            AutoModel.from_config(config).save_pretrained(folder)
            Wav2Vec2FeatureExtractor().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return build
