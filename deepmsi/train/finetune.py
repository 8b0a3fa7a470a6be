"""Fine-tunes one modality's encoder on the training part of every fold, for features that leak nothing.

The encoder is trained by the ordinary trainer, in a model that has no other modality, and saved as a folder of
transformers with notes of the rows that it saw (`deepmsi.models.finetuned`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deepmsi.errors import UserError
from deepmsi.models.checkpoint import remove_staged, staged
from deepmsi.models.config import MODALITIES, OWN_ENCODERS, validated
from deepmsi.models.encoders import save_encoder
from deepmsi.models.finetuned import EncoderNotes, write_notes
from deepmsi.train.recipe import Recipe
from deepmsi.train.run import train

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI

ENCODER = "encoder"
_READS = {"text": ("pooling", "max_length", "context"), "audio": ("max_seconds",)}


def finetune(
    modality: Literal["text", "audio"],
    recipe: Recipe,
    data: Path,
    out: Path,
    resume: bool = False,
    folds: Sequence[str | int] | None = None,
    auto_batch: bool = False,
) -> dict[str, Any]:
    """Train an encoder on each fold's training part, and score what it does alone.

    Args:
        modality: which encoder.
        recipe: the recipe that the features are for: its protocol gives the folds, its section the encoder.
        data: a manifest or a prepared folder.
        out: the run directory; the encoder of fold NAME is OUT/folds/NAME/encoder, of a manifest's own split and of
            all rows OUT/encoder.
        resume, folds, auto_batch: as for `train`.

    Returns:
        What `metrics.json` of the run holds.

    Raises:
        UserError: the recipe names no encoder of transformers for the modality, or anything that `train` refuses.
    """
    section = getattr(recipe, modality)
    if section.encoder in OWN_ENCODERS:
        raise UserError(
            f"The recipe's {modality} encoder is {section.encoder!r}, which has no pretrained weights to fine-tune: "
            f"set {modality}.encoder to a hub name or a folder of transformers."
        )
    if not section.finetune:
        raise UserError(f"{modality}.finetune is off: nothing would be trained.")
    plain = recipe.model_dump(mode="json", exclude_unset=True)
    alone = validated(Recipe, {**plain, "drop": [name for name in MODALITIES if name != modality]}, "finetune")

    def keep(model: DeepMSI, folder: Path, fold: str, seen: Sequence[str], chose: Sequence[str]) -> None:
        reads = {key: getattr(section, key) for key in _READS[modality]}
        remove_staged(folder / ENCODER)
        with staged(folder / ENCODER) as part:
            processor = getattr(model, f"{modality}_processor")
            save_encoder(getattr(model, f"{modality}_encoder"), processor, part, weights=True)
            write_notes(part, EncoderNotes(modality, fold, recipe.protocol.title, seen, reads, chose))

    return train(alone, data, out, resume, folds, auto_batch=auto_batch, plan=recipe, on_fold=keep)
