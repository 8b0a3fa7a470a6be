"""Typed configuration of the model: its sections, its presets, and the sentence a mistake in a file earns.

A configuration is plain data (numbers, strings, lists): it goes to JSON and back unchanged.
`ModelSections` is what a model configuration and a training recipe share.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deepmsi.errors import UserError

MODALITIES = ("video", "text", "audio")
Resize = Literal["crop", "squash", "pad"]
"""How a picture becomes a square."""
Precision = Literal["fp32", "bf16", "fp16"]
OFFLINE_TEXT = "hashing"
OFFLINE_AUDIO = "logmel"
OWN_ENCODERS = ("none", "features", OFFLINE_TEXT, OFFLINE_AUDIO)
COMPRESSION = (
    *("guide_weight", "temperature", "standardize", "threshold", "keep", "capacity", "min_keep"),
    *("fuse_threshold", "fuse_alpha"),
)
"""Fields of the vision section that take the place of the schedule's own."""


def _known_modalities(names: list[str]) -> list[str]:
    for name in names:
        if name not in MODALITIES:
            raise ValueError(f"{name!r} is no modality; there are {', '.join(MODALITIES)}")
    return names


Modalities = Annotated[list[str], AfterValidator(_known_modalities)]

# A wider layer than this is a slip of the hand, and what the allocator says of it helps nobody.
Width = Annotated[int, Field(ge=1, le=2**20)]


def fixed_place(name: str | None) -> str | None:
    """A folder that is there by its absolute path, which leads to it from everywhere; a hub name as it is."""
    path = os.path.expanduser(name or "")
    return os.path.abspath(path) if os.path.isdir(path) else name


class Section(BaseModel):
    """Base of every configuration section: unknown keys are refused, assignments are validated, numbers are finite.

    A number is not written as yes or true, which Python counts as 1.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = cls.model_fields[str(info.field_name)].annotation
        if _holds_boolean(value) and _admits(wanted, int, float) and not _admits(wanted, bool, Any):
            say = "a number or null" if _admits(wanted, NoneType) else "a number"
            raise ValueError(f"write {say}: YAML reads yes, no, on and off as booleans (found {value})")
        return value


def _holds_boolean(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, bool | np.bool_) or any(map(_holds_boolean, parts))


def _admits(annotation: Any, *kinds: Any) -> bool:
    return annotation in kinds or any(_admits(part, *kinds) for part in get_args(annotation))


class VisionConfig(Section):
    """Frames, VSC-Swin and TCN, and the preprocessing that the frames went through."""

    backbone: str = Field(
        "swinv2_tiny_window8_256",
        min_length=1,
        description="any swinv2_* name of timm but swinv2_cr_*, 'small' (deepmsi's own, 64 px), or 'none'",
    )
    pretrained: bool | str = Field(
        False,
        description="start from timm's weights: true fetches them from the model hub once, a path names a .safetensors "
        "file of them",
    )
    freeze: bool | Literal["stem"] = Field(
        False,
        description="true keeps the backbone's weights, and its compression still learns; stem keeps those before the "
        "first compression, which neither text nor sound reaches (train.cache_stem computes that part once)",
    )
    frames: int = Field(15, ge=1, description="frames per utterance, T")
    image_size: int = Field(256, ge=8, description="side of the square frame in pixels")
    resize: Resize = Field(
        "crop",
        description="how a frame becomes a square: crop takes its middle, squash changes its proportions, pad adds "
        "black",
    )
    stored_size: int | None = Field(
        None,
        ge=8,
        description="side at which frames are cut before they are scaled to image_size, as training data of that size "
        "were; null cuts them at image_size",
    )
    face: bool = Field(False, description="frames are cropped to the largest face before resizing")
    face_model: str | None = Field(
        None,
        description="path of the YuNet .onnx file that finds the face, null for OpenCV's Haar cascade; prediction "
        "reads it, too",
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="mean of red, green and blue, from 0 to 1"
    )
    std: tuple[float, float, float] = Field((0.229, 0.224, 0.225), description="deviation of the three, likewise")
    pixel_statistics: bool = Field(
        False,
        description="in place of mean and std, standardise each position of the frame by its own mean and deviation "
        "over the training part: with few clips of aligned faces it leaves what changes and not the face itself",
    )
    options: dict[
        Literal["patch_size", "embed_dim", "depths", "heads", "window", "mlp_ratio"], int | float | list[int]
    ] = Field(default_factory=dict, description="sizes of the 'small' backbone, by the names of VSCSwin's constructor")

    schedule: Literal["paper", "released"] | dict[str, Any] | None = Field(
        "paper", description="where and how tokens are compressed; null runs the backbone uncompressed"
    )
    # Each of these takes the place of the schedule's own value; null leaves that as it is.
    guide_weight: float | None = Field(None, gt=0, lt=1, description="λ of Eq. 1 at the start; it is learned")
    temperature: float | None = Field(None, gt=0, description="τ of the relevance softmax")
    standardize: bool | None = Field(
        None, description="standardise similarities over the frame before the softmax; false is the plain Eq. 2"
    )
    threshold: float | None = Field(None, ge=0, description="θ, relative relevance from which a token stays")
    keep: int | tuple[int, ...] | None = Field(None, description="tokens kept per compressing block, in place of θ")
    capacity: int | tuple[int, ...] | None = Field(None, description="rows reserved per frame: static shapes")
    min_keep: int | None = Field(None, ge=1, description="tokens that stay at least in each frame, by θ")
    fuse_threshold: float | None = Field(None, ge=-1, le=1, description="φ, cosine from which tokens are fused")
    fuse_alpha: float | None = Field(None, ge=0, le=1, description="α, share of the kept token in a fusion")
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="chance that training drops a branch (attention, MLP) of the last block for a frame; it rises from "
        "0 at the first block",
    )
    recompute: Literal["none", "light", "block", "chunk"] = Field(
        "none",
        description="what backward computes again in place of keeping it: no product; q, k, v and the MLPs' hidden "
        "layers; whole blocks; or everything, 15 frames at a time. Gradients are exact in all four, memory falls and "
        "time rises from one to the next",
    )

    tcn_channels: tuple[Width, ...] = Field(
        (1024, 1024, 1024), min_length=1, description="channels of the TCN's blocks, whose dilations are 1, 2, 4, ..."
    )
    tcn_kernel: int = Field(3, ge=1, le=64, description="taps of the TCN's convolutions")
    tcn_dropout: float = Field(0.3, ge=0, lt=1, description="chance, behind each convolution of the TCN")

    @property
    def compression(self) -> dict[str, Any]:
        """The fields that take the place of the schedule's."""
        said = {name: getattr(self, name) for name in COMPRESSION}
        return {name: value for name, value in said.items() if value is not None}

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.stored_size is not None and self.stored_size < self.image_size:
            raise ValueError(f"stored_size is {self.stored_size}, smaller than image_size, {self.image_size}")
        if self.freeze == "stem" and self.schedule is None:
            raise ValueError("without a schedule there is no first compression, where the stem ends: set freeze=true")
        if self.options and self.backbone not in ("small", "none"):
            raise ValueError(f"options belong to the backbone 'small', not to {self.backbone!r}")
        for name, value in self.options.items():
            sizes = value if isinstance(value, list) else [value]
            kind, words = ((int, float), "numbers") if name == "mlp_ratio" else (int, "whole numbers")
            if not all(isinstance(size, kind) and 1 <= size <= 4096 for size in sizes):
                raise ValueError(f"options: {name} takes {words} from 1 to 4096, not {value}")
            if name != "window" and isinstance(value, list) != (name in ("depths", "heads")):
                many = "one number for each stage" if name in ("depths", "heads") else "one number"
                raise ValueError(f"options: {name} takes {many}, not {value}")
        return self

    @field_validator("pretrained", mode="before")
    @classmethod
    def _a_file_by_its_absolute_path(cls, named: Any) -> bool | str:
        if isinstance(named, bool):
            return named
        if not isinstance(named, str | Path) or Path(named).suffix != ".safetensors":
            raise ValueError(f"write true, false or the path of a .safetensors file (found {named!r})")
        return os.path.abspath(os.path.expanduser(named))

    @field_validator("std")
    @classmethod
    def _positive_std(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError("std must be positive")
        return std


class _EncoderConfig(Section):
    """What the text and the audio branch have in common."""

    encoder: str = Field(
        "features",
        min_length=1,
        description="features (computed beforehand), a hub name or local folder of transformers, deepmsi's own "
        "(hashing of text, logmel of audio: nothing to download), or none: no such branch",
    )
    dim: Width | None = Field(
        None,
        description="length of the utterance vector, which follows from the encoder, or the data, unless it is said",
    )
    finetune: bool = Field(True, description="train the encoder with the model; false keeps it frozen")
    features_from: str | None = Field(
        None,
        min_length=1,
        description="hub name or folder that computed the features; prediction on files runs it",
    )
    options: dict[str, int | float | str | list[int] | None] = Field(
        default_factory=dict, description="sizes of an offline encoder, by the names of its constructor"
    )

    @field_validator("encoder", "features_from")
    @classmethod
    def _fixed(cls, name: str | None) -> str | None:
        return name if name in OWN_ENCODERS else fixed_place(name)

    @property
    def present(self) -> bool:
        """Whether the model has this modality at all."""
        return self.encoder != "none"

    @property
    def encoded(self) -> bool:
        """Whether an encoder is part of the model (as opposed to features computed beforehand)."""
        return self.encoder not in ("none", "features")


class TextConfig(_EncoderConfig):
    """Text branch."""

    pooling: Literal["mean", "cls"] = Field(
        "mean", description="what the utterance vector is of the encoder's output: the mean, or cls, its first token"
    )
    max_length: int | None = Field(None, ge=2, description="tokens; null takes the encoder's own, at most 512")
    context: int = Field(0, ge=0, description="previous utterances of the dialogue, with speakers, that are read too")

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        return _check_encoder(self, OFFLINE_TEXT, features_dim=1024)


class AudioConfig(_EncoderConfig):
    """Audio branch."""

    sample_rate: int = Field(16000, ge=4000, le=192000, description="Hz")
    max_seconds: float = Field(20.0, ge=0.025, le=86400, description="longer recordings are cut there")

    @model_validator(mode="after")
    def _check(self) -> AudioConfig:
        return _check_encoder(self, OFFLINE_AUDIO, features_dim=768)


_Encoder = TypeVar("_Encoder", bound=_EncoderConfig)


def _check_encoder(config: _Encoder, offline: str, features_dim: int) -> _Encoder:
    if config.encoder == offline and not config.finetune:
        raise ValueError(f"the encoder {offline!r} has no pretrained weights to freeze: leave finetune on")
    if config.options and config.encoder != offline:
        raise ValueError(f"options belong to the offline encoder {offline!r}, not to {config.encoder!r}")
    if config.features_from is not None and config.encoder != "features":
        raise ValueError("features_from goes with encoder: features")
    if config.features_from == offline:
        raise ValueError(f"{offline!r} has no pretrained weights to compute features with: name it as the encoder")
    if config.encoder == "features" and config.dim is None:
        # Not through setattr: validation on assignment would run this validator again.
        config.__dict__["dim"] = features_dim
    return config


class FusionConfig(Section):
    """Semantic guide, missing modalities, late fusion and classifier."""

    guide_hidden: Width = Field(768, description="width of the semantic guide's hidden layer")
    projection: Width = Field(256, description="channels of each modality's projection")
    hidden: tuple[Width, ...] = Field((512, 256, 128), description="widths of the classifier's hidden layers")
    dropout: float = Field(0.3, ge=0, lt=1, description="in the guide, the projections and the classifier")
    modality_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="chance that training hides a modality that a row has (never all of them)",
    )


class LossConfig(Section):
    """Total loss (Eq. 7): `cross_entropy`·CE + `contrastive`·L, the paper's β and α."""

    cross_entropy: float = Field(1.0, ge=0, description="its weight in the total loss, β")
    contrastive: float = Field(0.5, ge=0, description="its weight in the total loss, α")
    temperature: float = Field(0.5, gt=0, description="τ_c, which similarities are divided by in the contrastive term")
    include_matched: bool = Field(False, description="count two modalities of one utterance as a positive pair, too")
    normalize: Literal["batch", "positives"] = Field(
        "batch",
        description="what a row's sum over its positives is divided by: batch, the other rows, or positives, their own "
        "number",
    )
    text_audio_pair: bool = Field(False, description="contrast text with audio, too, beside video with either")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the target that goes to all classes: alike, or by their shares where these adjust logits",
    )
    class_weights: Literal["balanced"] | list[float] | None = Field(
        None,
        description="one of each class, in their order, or balanced: by the training part's counts; null weighs all "
        "alike",
    )

    @field_validator("class_weights")
    @classmethod
    def _positive_weights(cls, weights: Any) -> Any:
        if isinstance(weights, list) and min(weights, default=0) <= 0:
            raise ValueError(f"weights must be positive, not {weights}")
        return weights

    @model_validator(mode="after")
    def _some_loss(self) -> LossConfig:
        if self.cross_entropy == self.contrastive == 0:
            raise ValueError("cross_entropy and contrastive are both 0, so that nothing is learned: raise one of them")
        return self


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "released": {"vision": {"schedule": "released"}},
    "small": {
        "vision": {
            "backbone": "small",
            "image_size": 64,
            "frames": 8,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "tcn_channels": (128, 128, 128),
        },
        "text": {"encoder": OFFLINE_TEXT},
        "audio": {"encoder": OFFLINE_AUDIO},
        "fusion": {"guide_hidden": 128, "projection": 64, "hidden": (128, 64)},
    },
}


class ModelSections(Section):
    """The sections that a model configuration and a recipe share; `preset` fills what is not said."""

    preset: Literal["paper", "released", "small"] | None = Field(
        None,
        description="what the model's sections start from: paper, released (the schedule of the authors' code), or "
        "small (a backbone for 64 pixels and encoders without weights to download, for a CPU)",
    )
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    audio: AudioConfig = AudioConfig()
    fusion: FusionConfig = FusionConfig()
    loss: LossConfig = LossConfig()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("preset"), str):
            return data
        merged = dict(data)
        for name, preset in PRESETS.get(data["preset"], {}).items():
            said = data.get(name, {})
            if isinstance(said, Section):
                said = said.model_dump(exclude_unset=True)
            if isinstance(said, Mapping):
                # Sizes of the preset's encoder mean nothing to another encoder that was asked for.
                merged[name] = {**preset, **said}
        return merged

    @property
    def modalities(self) -> tuple[str, ...]:
        """The configured modalities, in the order of `MODALITIES`."""
        present = {
            "video": self.vision.backbone != "none",
            "text": self.text.present,
            "audio": self.audio.present,
        }
        return tuple(name for name in MODALITIES if present[name])

    @model_validator(mode="after")
    def _some_modality(self) -> ModelSections:
        if not self.modalities:
            raise ValueError("vision.backbone, text.encoder and audio.encoder are all 'none': keep at least one")
        return self


class DeepMSIConfig(ModelSections):
    """Everything that determines a `deepmsi.DeepMSI`, its labels and its preprocessing.

    Args:
        num_labels: K; taken from `label_names` where that is given.
        label_names: K names, in the order of the logits.
        preset: "paper" (the defaults), "released" or "small"; explicit keys win over it.
        vision, text, audio, fusion, loss: the sections, as objects or as dictionaries.

    Raises:
        pydantic.ValidationError: on an unknown key or a value out of range; `validated` turns it
            into a `UserError` sentence that names the nearest known key.
    """

    num_labels: int = Field(ge=1)
    label_names: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _count_labels(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("num_labels") is None and data.get("label_names"):
            return {**data, "num_labels": len(data["label_names"])}
        return data

    @model_validator(mode="after")
    def _labels_agree(self) -> DeepMSIConfig:
        if self.label_names is not None:
            if len(self.label_names) != self.num_labels:
                raise ValueError(f"label_names has {len(self.label_names)} names for num_labels = {self.num_labels}")
            if len(set(self.label_names)) != len(self.label_names):
                raise ValueError("label_names has a name twice")
        weights = self.loss.class_weights
        if isinstance(weights, list) and len(weights) != self.num_labels:
            raise ValueError(f"loss.class_weights has {len(weights)} weights for num_labels = {self.num_labels}")
        return self

    @property
    def names(self) -> list[str]:
        """The label names, or "0", "1", ... where the configuration has none."""
        return self.label_names or [str(k) for k in range(self.num_labels)]


_Model = TypeVar("_Model", bound=BaseModel)


def validated(cls: type[_Model], data: Any, where: str) -> _Model:
    """Build a configuration from untrusted plain data.

    Args:
        cls: the pydantic model to build.
        data: a mapping, as read from YAML, JSON or the command line.
        where: where the data came from, for the sentence.

    Raises:
        UserError: one sentence with the place, the reason, and for an unknown key the nearest known one.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected keys and values at the top level, found {type(data).__name__}.")
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise UserError(f"{where}: {explain_validation(cls, error)}") from None


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn what torch says of sizes that a configuration allows and no layer or memory can have into one sentence.

    A decorator, too. For nothing but building a model: elsewhere these errors may be mistakes of deepmsi.

    Args:
        what: what is built, for the sentence.

    Raises:
        UserError: in place of a ValueError or RuntimeError, which is its cause.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} cannot be built as it is configured ({reason}).") from error


def explain_validation(cls: type[BaseModel], error: ValidationError) -> str:
    """One sentence for the first problem of a validation error (and how many more there are)."""
    # An unknown key is most often the cause of the others, so it goes first.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    path = _key_of(first["loc"])
    if first["type"] == "extra_forbidden":
        sentence = f"unknown key '{path}'{_nearest(cls, first['loc'])}"
    else:
        # One for each branch of a union, none of which took the value.
        branches = [one["msg"].removeprefix("Value error, ") for one in problems if _key_of(one["loc"]) == path]
        message = ", or ".join(dict.fromkeys(message[:1].lower() + message[1:] for message in branches))
        sentence = f"{path}: {message}" if path else message
        if first["type"] not in ("missing", "value_error"):
            sentence += f" (found {first['input']!r:.60})"
    more = len({problem["loc"][:2] for problem in problems}) - 1
    return sentence + (f" (and {more} more problem{'s' * (more > 1)})." if more else ".")


_BRANCHES = ("bool", "int", "float", "str")


def _key_of(loc: tuple[int | str, ...]) -> str:
    """The dotted key of a problem, without the names of a union's branches ("literal[...]", "bool") behind it."""
    return ".".join(str(part) for part in loc if "[" not in str(part) and part not in _BRANCHES)


def known_keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every leaf field, sections included."""
    keys = []
    for name, field in cls.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _nearest(cls: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Name the nearest key: first among those of the same section, then anywhere by its last part."""
    keys = known_keys(cls)
    section, name = ".".join(str(part) for part in loc[:-1]), str(loc[-1])
    siblings = [key for key in keys if key.rpartition(".")[0] == section]
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys)}
    for candidates in ({key.rpartition(".")[2]: key for key in siblings}, by_leaf):
        close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
        if close:
            return f": did you mean '{candidates[close[0]]}'"
    return f": known here are {', '.join(key.rpartition('.')[2] for key in siblings)}" if siblings else ""
