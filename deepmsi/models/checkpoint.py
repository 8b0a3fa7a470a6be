"""Checkpoints on disk: config.json, model.safetensors, and what rebuilds trained encoders.

A checkpoint folder holds
- `config.json`: the whole configuration, with label names and preprocessing, the architecture's name, and a
  digest of each frozen encoder;
- `model.safetensors`: every weight except those of frozen encoders, which the configuration names;
- `text_encoder/`, `audio_encoder/`: architecture and tokenizer files of encoders that were trained.

Nothing in it is a pickle, and nothing else than these formats is ever read.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepmsi.errors import DISK_FULL, DiskFullError, UserError
from deepmsi.models.config import DeepMSIConfig, validated
from deepmsi.models.encoders import PretrainedEncoder, save_encoder

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI

ARCHITECTURE = "DeepMSI"
FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
ENCODERS = ("text_encoder", "audio_encoder")
OWN_FILES = {CONFIG, WEIGHTS, CARD, *ENCODERS}


def write(model: DeepMSI, folder: Path) -> None:
    """Write a model's files into an existing folder; `staged` is what makes that atomic."""
    from safetensors.torch import save_file

    config = {
        "architecture": ARCHITECTURE,
        "format": FORMAT,
        "frozen": {name: weights_digest(encoder) for name, encoder in _frozen(model).items()},
        **model.config.model_dump(mode="json"),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8", errors="backslashreplace")  # of a path that is not UTF-8
    (folder / CARD).write_text(_card(model), encoding="utf-8", errors="backslashreplace")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in stored_state(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    for name in ENCODERS:
        encoder = getattr(model, name)
        if encoder is not None:
            save_encoder(encoder, getattr(model, name.replace("encoder", "processor")), folder / name)


def _card(model: DeepMSI) -> str:
    """A model card that says what is known here: not whose data trained the model, nor under which licence it is."""
    reads, labels = ", ".join(model.modalities), ", ".join(model.config.names)
    return f"""---
{model._hub_mixin_info.model_card_data.to_yaml()}
---

# Emotion recognition from {reads}

Made with deepmsi; the labels are {labels}.

```python
from deepmsi import DeepMSI

model = DeepMSI.from_pretrained("FOLDER OR REPOSITORY")
print(model.predict(["clip.mp4"], texts=["what is said in it"]))
```

Before you share it, say here which data trained it, under which terms these allow that, and how it was measured.
"""


def stored_state(model: DeepMSI) -> dict[str, Tensor]:
    """The part of the state dict that a checkpoint holds: all but frozen encoders."""
    frozen = tuple(f"{name}." for name in _frozen(model))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(frozen)}


def _frozen(model: DeepMSI) -> dict[str, PretrainedEncoder]:
    """The encoders that a checkpoint names without holding their weights."""
    encoders = {name: getattr(model, name) for name in ENCODERS}
    return {
        name: encoder
        for name, encoder in encoders.items()
        if isinstance(encoder, PretrainedEncoder) and not encoder.finetune
    }


def weights_digest(module: nn.Module) -> str:
    """A name for a module's weights, so that other weights in their place are noticed."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read(cls: type[DeepMSI], folder: Path) -> DeepMSI:
    """Build the model of a checkpoint folder, in eval mode on the CPU.

    Raises:
        UserError: the folder holds no checkpoint of this architecture, or a damaged one.
    """
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}.")
    config, frozen = _read_config(folder / CONFIG)
    weights = _read_weights(folder)
    # Initial values are about to be overwritten: they must not move the caller's random state.
    with torch.random.fork_rng(devices=[]):
        model = cls(config, saved=folder)
    _load(model, weights, folder)
    for name, encoder in _frozen(model).items():
        if frozen.get(name) != weights_digest(encoder):
            section = name.removesuffix("_encoder")
            source = getattr(config, section).encoder
            raise UserError(
                f"{folder} was trained with a frozen {section} encoder whose weights are no longer those of {source}: "
                "give it the encoder it was trained with."
            )
    return model.eval()


def locate(name: str, **download: Any) -> Path:
    """The folder of a checkpoint: `name` itself, or a snapshot of that repository of the model hub.

    Raises:
        UserError: it is neither a folder nor a repository that can be reached.
    """
    folder = Path(name).expanduser()
    if folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, WEIGHTS, *(f"{encoder}/*" for encoder in ENCODERS)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **download))
    except Exception as error:
        # The hub's client raises errors of several families: HTTP, offline, cache, names.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} is no folder, and the model hub gave no such checkpoint ({reason:.200}).") from None


def _read_config(path: Path) -> tuple[DeepMSIConfig, dict[str, str]]:
    """Read config.json: the configuration, and the digest of each frozen encoder by its name."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no deepmsi checkpoint: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): the checkpoint is damaged.") from None
    if not isinstance(data, dict) or data.get("architecture") != ARCHITECTURE:
        named = data.get("architecture") or data.get("architectures") if isinstance(data, dict) else None
        found = f"it names {named!r}" if named else "it names no deepmsi architecture"
        raise UserError(f"{path} belongs to another architecture ({found}): give a folder saved by deepmsi.")
    version = data.get("format")
    if version != FORMAT:
        raise UserError(f"{path} has checkpoint format {version!r}, this deepmsi reads {FORMAT}: update deepmsi.")
    config = {key: value for key, value in data.items() if key not in ("architecture", "format", "frozen")}
    return validated(DeepMSIConfig, config, str(path)), data.get("frozen") or {}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickles:
            raise UserError(
                f"{folder} has {pickles[0]} where {WEIGHTS} is expected: pickled weights can run code and are "
                "never loaded; save the model again with save_pretrained."
            )
        raise UserError(f"{folder} has no {WEIGHTS}: the checkpoint was not written to its end.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        # The first eight bytes of safetensors are any number; its header's brace comes behind them.
        with path.open("rb") as file:
            head = file.read(9)
        if head.startswith((b"PK", b"\x80")) and head[8:] != b"{":
            raise UserError(
                f"{path} is a pickle under another name: pickled weights can run code and are never loaded."
            ) from None
        raise UserError(f"{path} is damaged or not written to its end ({error}).") from None


def _load(model: DeepMSI, weights: dict[str, Tensor], folder: Path) -> None:
    """Load strictly, and say in one sentence what does not fit."""
    expected = stored_state(model)
    problems = [f"it lacks {name}" for name in expected.keys() - weights.keys()]
    problems += [f"it has {name}, which this model has not" for name in weights.keys() - expected.keys()]
    problems += [
        f"{name} is {list(weights[name].shape)} where the configuration makes it {list(tensor.shape)}"
        for name, tensor in expected.items()
        # λ was a scalar before, and its module reads one.
        if name in weights and (weights[name].shape or (1,)) != (tensor.shape or (1,))
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such tensors)" if len(problems) > 1 else ""
        raise UserError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {min(problems)}{more}.")
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{folder / WEIGHTS} holds NaN or infinity in {broken[0]}: the training diverged.")
    model.load_state_dict(weights, strict=False)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the system, safetensors and `torch.save` raise where a file cannot be written into one sentence.

    Raises:
        DiskFullError: no room is left.
        UserError: `target` cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # Neither library has an errno: the one has it in words, torch.save only that its writer's check failed.
        torch_save = isinstance(error, RuntimeError) and "inline_container" in str(error)
        if isinstance(error, RuntimeError) and not torch_save:
            raise
        said = any(getattr(error, "errno", None) == code or os.strerror(code) in str(error) for code in DISK_FULL)
        full = said or torch_save
        reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        raise (DiskFullError if full else UserError)(f"{target} could not be written ({reason})") from error


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`; when the block ends well, put it in target's place.

    A folder that exists already and holds nothing but a checkpoint is exchanged as a whole. In a folder that
    holds other files, too, those stay, and the checkpoint's files are replaced one by one.

    Raises:
        UserError: `target` is a file, or cannot be written.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give a folder to save the model in.")
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        staging.mkdir()
    except OSError as error:
        place = f"{target} cannot be written, as {target.parent} takes no new folder"
        raise UserError(f"{place} ({error.strerror}): save elsewhere.") from None
    if target.is_dir():
        with suppress(OSError):  # a file system may have one set of rights for all
            staging.chmod(target.stat().st_mode & 0o7777)
    try:
        with writing(target):
            yield staging
            _open_to_all(staging)
            flush(*staging.rglob("*"), staging)
            _put(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_staged(target: Path) -> None:
    """Remove what `staged` left beside `target` in processes that were killed; none may be writing there."""
    for ending in ("part", "old"):
        for leftover in target.parent.glob(f".{target.name}.*.{ending}"):
            shutil.rmtree(leftover, ignore_errors=True)


def _put(staging: Path, target: Path) -> None:
    if target.is_dir() and {path.name for path in target.iterdir()} - OWN_FILES:
        for name in ENCODERS:
            shutil.rmtree(target / name, ignore_errors=True)
        for path in sorted(staging.iterdir()):
            os.replace(path, target / path.name)
    elif target.is_dir():
        old = staging.with_suffix(".old")
        os.replace(target, old)
        os.replace(staging, target)
        shutil.rmtree(old)
    else:
        os.replace(staging, target)


def _open_to_all(folder: Path) -> None:
    """Give the files the rights of others that their folder has: safetensors makes its own for one user alone.

    A file system that has one set of rights for all refuses; a model is worth more than its rights.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):
                path.chmod(path.parent.stat().st_mode & 0o666)


def flush(*paths: Path) -> None:
    """Flush files and folders to the disk, so that a rename cannot be seen before what it names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
