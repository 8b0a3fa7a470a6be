"""A fine-tuned encoder's folder: what transformers reads, and beside it which rows it saw and how it reads.

`deepmsi prepare` copies these notes into the index of the features that it extracts, so that training can refuse
features whose encoder has seen the rows that are to be reported; a model that starts from the encoder is held against
the notes themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepmsi.errors import UserError

NOTES = "deepmsi.json"
FORMAT = 1


@dataclass(frozen=True)
class EncoderNotes:
    """What `deepmsi finetune` notes beside an encoder.

    Attributes:
        modality: "text" or "audio".
        fold: the fold whose training part it was trained on.
        protocol: the protocol of that fold, in words.
        seen: ids of the rows that trained it or that its epoch was chosen on, and of those that the encoder which it
            started from had seen.
        reads: settings of the modality's section that extraction must repeat: pooling, max_length, context;
            or max_seconds.
        chose: those of `seen` that its epoch was chosen on and that trained nothing.
    """

    modality: str
    fold: str
    protocol: str
    seen: Sequence[str]
    reads: dict[str, Any]
    chose: Sequence[str] = ()


def write_notes(folder: Path, notes: EncoderNotes) -> None:
    """Write an encoder's notes into its folder."""
    text = json.dumps({"format": FORMAT, **asdict(notes)}, indent=2, ensure_ascii=False)
    (folder / NOTES).write_text(text + "\n", encoding="utf-8")


def read_notes(encoder: str) -> EncoderNotes | None:
    """Read the notes of an encoder; None of one that was not fine-tuned here (a hub name, another folder).

    Raises:
        UserError: the notes are damaged or of another version.
    """
    path = Path(encoder).expanduser() / NOTES
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("format") != FORMAT:
            raise ValueError("another format")
        return EncoderNotes(**value)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): without it nothing says which rows the encoder saw; fine-tune it again."
        ) from None
