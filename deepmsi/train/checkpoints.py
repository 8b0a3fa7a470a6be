"""Checkpoints of a running fit: written beside their place and renamed, validated before they are resumed from.

checkpoint-STEP/
  model.safetensors       the model's weights (frozen encoders excepted)
  average.safetensors     the average of the weights, where `train.average` keeps one
  compression.json        kept counts or the capacity found, where `train.capacity_quantile` asks for one
  optimizer.pt scheduler.pt scaler.pt    loaded with weights_only=True
  trainer_state.json      step, epoch, log history
  files.json              size and SHA-256 of the files above; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepmsi.errors import UserError
from deepmsi.models.checkpoint import flush, stored_state, writing

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI

FILES = "files.json"
STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
BEST = "best.safetensors"  # beside the checkpoints: the weights of the epoch that scored best
COMPRESSION = "compression.json"
REQUIRED = (WEIGHTS, "optimizer.pt", "scheduler.pt", STATE)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"checkpoint-{step}"


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`, which becomes `target` when the block ends well.

    Sizes and digests are recorded and everything is flushed before the rename, so that a checkpoint either is
    whole or does not exist; what a full or failing disk damages later is found by `problem_of`.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            yield part
            paths = sorted(part.iterdir())
            files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in paths}
            (part / FILES).write_text(json.dumps(files, indent=1), encoding="utf-8")
            flush(*part.iterdir(), part)
            if target.exists():
                shutil.rmtree(target)
            os.replace(part, target)
            flush(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def problem_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None: files, sizes, digests, and that the formats parse."""
    from safetensors import SafetensorError, safe_open

    try:
        listed: dict[str, Any] = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
        for name in REQUIRED:
            if name not in listed:
                return f"{name} is not listed in {FILES}"
        for name, facts in listed.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes in place of {facts['bytes']}"
            if _digest(path) != facts["sha256"]:
                return f"the contents of {name} changed after they were written"
        with safe_open(checkpoint / WEIGHTS, "pt") as weights:
            if not list(weights.keys()):
                return f"{WEIGHTS} is empty"
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not isinstance(state.get("global_step"), int) or not isinstance(state.get("log_history"), list):
            return f"{STATE} lacks the step or the history"
    except SafetensorError as error:
        return f"{WEIGHTS} is damaged ({error})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it is not whole ({error})"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a fit, the newest first."""
    if not folder.is_dir():
        return []
    numbered = [
        (int(match.group(1)), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that validates, and a sentence for each newer one that does not."""
    skipped: list[str] = []
    for path in list_checkpoints(folder):
        problem = problem_of(path)
        if problem is None:
            return path, skipped
        skipped.append(f"Checkpoint {path} is skipped: {problem}.")
    return None, skipped


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints."""
    for path in list_checkpoints(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


def save_weights(model: DeepMSI, path: Path, epoch: float | None = None) -> None:
    """Write a model's weights as safetensors, to a temporary name first, with the epoch that they are of."""
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in stored_state(model).items()}
    temporary = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
            save_file(weights, temporary, None if epoch is None else {"epoch": str(round(epoch))})
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(model: DeepMSI, path: Path, epoch: int | None = None) -> None:
    """Read weights that `save_weights` wrote, of an epoch where it is given.

    Raises:
        UserError: the file is damaged, or of another architecture or epoch.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    stale = path.parent if epoch is None else path.parent / "checkpoints"
    again = f"delete {stale} to train this part again"
    try:
        weights = load_file(path)
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("epoch")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): {again}.") from None
    if epoch is not None and found not in (None, str(epoch)):
        raise UserError(f"{path} is of epoch {found}, and epoch {epoch} scored best: {again}.")
    expected = {name: tensor.shape for name, tensor in stored_state(model).items()}
    if expected != {name: tensor.shape for name, tensor in weights.items()}:
        raise UserError(f"{path} is of another architecture than the recipe: resume with the recipe it began with.")
    model.load_state_dict(weights, strict=False)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
