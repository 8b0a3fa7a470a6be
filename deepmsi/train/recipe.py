"""Recipes: everything that decides a training run, as typed plain data from YAML and `--set key=value`."""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from unicodedata import normalize

import yaml
from pydantic import BaseModel, Field, field_validator, model_validator

from deepmsi.data.files import write_text
from deepmsi.data.options import PrepareOptions
from deepmsi.errors import UserError
from deepmsi.models.config import Modalities, ModelSections, Precision, Section, validated
from deepmsi.train.protocols import ProtocolSettings

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(Section):
    """Optimisation, and how the number of epochs is found."""

    epochs: int = Field(
        20,
        ge=1,
        description="epochs to train, or the most to try where a selection chooses; sets the schedule",
    )
    selection: Literal["auto", "last", "dev", "inner-validation", "inner-folds"] = Field(
        "auto",
        description="last: train `epochs`; dev: best epoch on the manifest's dev part; inner-validation: "
        "best epoch on a held-out part of the training part; inner-folds: the number of epochs that is best "
        "over inner folds of the training part, which is then fitted whole; auto: dev where a test part is "
        "reported beside it, else inner-validation",
    )
    metric: Literal["accuracy", "uar", "weighted_f1", "macro_f1", "loss", "calibrated_loss"] = Field(
        "weighted_f1",
        description="what the selection looks at; calibrated_loss: the loss less what a temperature would mend of it, "
        "steadier than scores of few rows and not driven by overconfidence as loss is",
    )
    calibrate: bool = Field(
        True,
        description="divide the kept model's logits by the temperature at which the rows that chose its epoch are "
        "told best: no label changes, probabilities do; nothing with selection=last",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop where the watched metric has not improved for so many epochs; of dev and inner-validation",
    )
    inner_folds: int = Field(4, ge=2, description="of inner-folds; inner-validation holds out one part of so many")
    inner_repeats: int = Field(1, ge=1, description="of inner-folds, each shuffled anew")

    batch_size: int = Field(16, ge=1, description="utterances per process and micro-batch")
    eval_batch_size: int | None = Field(None, ge=1, description="null takes batch_size")
    accumulation: int = Field(
        1, ge=1, description="micro-batches per step; the contrastive term sees one micro-batch at a time"
    )
    lr: float = Field(3e-4, gt=0, le=10, description="learning rate of AdamW, at its highest")
    encoder_lr: float | None = Field(
        None,
        gt=0,
        le=10,
        description="for encoders and the vision backbone where they start from pretrained weights; null takes lr",
    )
    weight_decay: float = Field(
        0.01, ge=0, le=100, description="of matrices but those that DeepMSI.no_weight_decay names"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine",
        description="how the learning rate goes on after the warm-up: constant, or to 0 by a line (linear) or a cosine",
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    max_grad_norm: float = Field(1.0, ge=0, description="norm that gradients are clipped to; 0 does not clip")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")

    sampler: Literal["shuffle", "balanced"] = Field(
        "shuffle", description="balanced: every class is drawn equally often in an epoch"
    )
    partial_rows: float | None = Field(
        None,
        ge=0,
        description="rows that lack a modality of the model: an epoch draws so many of them per complete row, anew "
        "each time; null takes them all",
    )
    group_by_length: bool = Field(
        False, description="texts of like length share a batch: less padding where a text encoder is trained"
    )
    focal_gamma: float = Field(0.0, ge=0, description="focal loss (1 - p)^γ CE; 0 is cross-entropy")
    logit_adjustment: float = Field(
        0.0, ge=0, description="τ·log prior of the training part added to the logits in the loss (Menon 2021)"
    )

    average: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of an exponential moving average of the weights, which is what is scored and kept: steadier "
        "where rows are few; null keeps the weights of the last step",
    )

    capacity_quantile: float | None = Field(
        None,
        gt=0,
        le=1,
        description="with a schedule that keeps by a threshold: after the first epoch reserve as many rows as this "
        "share of its frames got by with (vision.capacity), so that shapes are static; beyond them the lowest scores "
        "are dropped, which is counted; null reserves nothing",
    )

    cache_stem: bool = Field(
        False,
        description="keep what the frozen stem (vision.freeze) makes of each row's frames beside the prepared clips, "
        "as float32 or in the type of precision, and train from that: a step then begins at the first compression. "
        "Frames are not augmented then",
    )

    precision: Precision = Field(
        "fp32",
        description="of training, and of the scores taken in it: fp32, or by autocast bf16, or fp16 on a GPU; "
        "evaluate and predict run in fp32, unless --precision says otherwise",
    )
    cuda_graphs: bool = Field(
        False,
        description="capture forward and backward of the video branch on a GPU, where shapes are static; what is not "
        "captured is told, with the reason. It has not run on a GPU yet",
    )
    tf32: bool = Field(False, description="allow TF32 in float32 products on the GPU")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto (the GPU where there is one), cpu or cuda; evaluate runs there, too. Features of frozen "
        "encoders are computed on the GPU where there is one",
    )
    memory_limit: float | None = Field(
        None, gt=0, description="GB that a process may take, for --auto-batch; null takes what is free"
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="processes that load; null: none where the CPU trains, and for a GPU one for each core but one, 8 "
        "at most; results do not depend on it",
    )
    log_every: int = Field(10, ge=1, description="steps")
    checkpoint_every: int = Field(1, ge=1, description="epochs")
    checkpoint_steps: int | None = Field(None, ge=1, description="steps, beside the epochs")
    keep_checkpoints: int = Field(2, ge=1, description="how many of a fit stay, the newest")


class AugmentSettings(Section):
    """Augmentation of training clips: one draw per clip, the same for all its frames."""

    flip: float = Field(0.5, ge=0, le=1, description="chance of a horizontal flip")
    crop: float = Field(0.0, ge=0, lt=1, description="largest share of the side cut away before resizing back")
    shift: float = Field(0.05, ge=0, lt=1, description="largest shift as a share of the side; edges repeat")
    brightness: float = Field(0.2, ge=0, lt=1, description="factor within 1 ± this")
    contrast: float = Field(0.2, ge=0, lt=1, description="factor within 1 ± this, about the clip's mean")
    shuffle: float = Field(
        0.0, ge=0, le=1, description="chance that the frames come in random order, so that none is learned by its time"
    )
    grey: float = Field(0.1, ge=0, le=1, description="chance of losing the colours")

    gain: float = Field(6.0, ge=0, le=60, description="loudness within ± so many dB")
    noise: float = Field(0.5, ge=0, le=1, description="chance of white noise, 15 to 40 dB below the utterance")
    time_shift: float = Field(0.1, ge=0, lt=1, description="largest shift as a share of the duration")
    audio_crop: float = Field(0.1, ge=0, lt=1, description="largest share of the duration cut away")
    speed: float = Field(0.0, ge=0, lt=1, description="tempo and pitch by a factor within 1 ± this")

    @classmethod
    def none(cls) -> AugmentSettings:
        """No augmentation at all."""
        return cls(**dict.fromkeys(cls.model_fields, 0.0))


# What changes frames.
_OF_FRAMES = ("flip", "crop", "shift", "brightness", "contrast", "shuffle", "grey")


class Recipe(ModelSections):
    """A training run: the model's sections, the data, the protocol, the optimisation.

    `prepare` takes frames, size, resize, face, its detector and the sample rate from the model's sections where it does
    not say its own; stored frames that are larger than `vision.image_size` are scaled down when they are read.
    """

    name: str = Field("unnamed", description="what run.json calls it: the file's name, where none is said")
    description: str = Field("", description="what it is for")
    seed: int = Field(
        0,
        ge=0,
        description="of the weights, the order of rows, dropout, augmentation and, without protocol.seed, folds",
    )
    labels: list[str] | None = Field(
        None,
        min_length=2,
        description="classes, in the order of the logits, as a list or by commas; null takes those of the data",
    )
    exclude_labels: list[str] = Field(
        default_factory=list, description="rows with these labels, a list or by commas, are left out, and this is said"
    )
    drop: Modalities = Field(
        default_factory=list, description="modalities that the model is built without: video, text, audio"
    )
    protocol: ProtocolSettings = ProtocolSettings()
    prepare: PrepareOptions = PrepareOptions()
    train: TrainSettings = TrainSettings()
    augment: AugmentSettings = AugmentSettings()

    @model_validator(mode="before")
    @classmethod
    def _drop_sections(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data, drop = dict(data), data.get("drop")
        if isinstance(drop, str):
            data["drop"] = drop = _words(drop)
        for name in drop if isinstance(drop, list) else ():
            if name == "video":
                vision = data.get("vision") or {}
                said = vision.model_dump(exclude_unset=True) if isinstance(vision, Section) else vision
                data["vision"] = {**said, "backbone": "none"}
            elif name in ("text", "audio"):
                data[name] = {"encoder": "none"}
        return data

    @property
    def shuffle_seed(self) -> int:
        """The seed of the folds."""
        return self.seed if self.protocol.seed is None else self.protocol.seed

    @field_validator("labels", "exclude_labels", mode="before")
    @classmethod
    def _names(cls, said: Any) -> Any:
        if said is None:
            return None
        names = _words(said) if isinstance(said, str) else said if isinstance(said, list | tuple) else [said]
        for name in names:
            if isinstance(name, bool) or not isinstance(name, str | int | list | dict):
                raise ValueError(
                    f"put names such as 'yes' and '1.5' in quotes: YAML reads them otherwise (found {name})"
                )
        return [str(name) if isinstance(name, int) else name for name in names]

    @field_validator("labels", "exclude_labels")
    @classmethod
    def _one_form(cls, names: list[str] | None) -> list[str] | None:
        return None if names is None else [normalize("NFC", name) for name in names]  # as manifests are read

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        said = self.prepare.model_fields_set
        if "face_model" in said and "face_model" not in self.vision.model_fields_set:
            self.vision.__dict__["face_model"] = self.prepare.face_model
        own = self.own_preparation()
        for key in ("frames", "resize", "face", "face_model", "sample_rate"):
            if key == "sample_rate" and self.audio.encoder == "none":
                continue  # no sound is read: data that hold some may have it at any rate
            if key in said and getattr(self.prepare, key) != own[key]:
                section = "audio" if key == "sample_rate" else "vision"
                raise ValueError(
                    f"prepare.{key} is {getattr(self.prepare, key)!r} and {section}.{key} is {own[key]!r}: "
                    "make them agree"
                )
        if self.prepare.size < self.vision.image_size and "size" in said:
            raise ValueError(
                f"prepare.size is {self.prepare.size} and vision.image_size is {self.vision.image_size}: "
                "frames cannot be stored smaller than the model reads them"
            )
        missing = {key: value for key, value in own.items() if key not in said}
        # Not through setattr: validation on assignment would run this validator again.
        self.__dict__["prepare"] = PrepareOptions(**{**self.prepare.model_dump(), **missing})
        if self.vision.backbone != "none":
            if self.train.cache_stem:
                self._keep_stem()
            if self.vision.freeze and not self.vision.pretrained:
                raise ValueError("vision.freeze keeps weights that start at random: set vision.pretrained=true")
        if self.labels is not None:
            if len(set(self.labels)) != len(self.labels):
                raise ValueError("labels has a name twice")
            both = set(self.labels) & set(self.exclude_labels)
            if both:
                raise ValueError(f"{min(both)!r} stands in labels and in exclude_labels")
        return self

    def own_preparation(self) -> dict[str, Any]:
        """What `prepare` takes from the model's sections where it does not say its own."""
        own: dict[str, Any] = {
            "frames": self.vision.frames,
            "size": self.vision.stored_size or self.vision.image_size,
            "resize": self.vision.resize,
            "face": self.vision.face,
            "face_model": self.vision.face_model,
            "sample_rate": self.audio.sample_rate,
        }
        for name in ("text", "audio"):
            section = getattr(self, name)
            if section.encoder == "features" and section.features_from:
                own[f"{name}_encoder"] = section.features_from
        return own

    def _keep_stem(self) -> None:
        """Leave frames as they are, and refuse what gives a row another stem at another time."""
        vision, said = self.vision, self.augment.model_fields_set
        changes = [f"augment.{name}=0" for name in _OF_FRAMES if name in said and getattr(self.augment, name)]
        if vision.drop_path:
            changes.append("vision.drop_path=0")
        if vision.pixel_statistics:
            changes.append("vision.pixel_statistics=false")
        if not vision.freeze:
            changes.append("vision.freeze=stem")
        if changes:
            raise ValueError(
                f"train.cache_stem keeps what the same frames always give: set {', '.join(changes)}, or leave it out"
            )
        plain = self.augment.model_dump() | dict.fromkeys(_OF_FRAMES, 0.0)
        self.__dict__["augment"] = AugmentSettings(**plain)

    def sections(self) -> dict[str, Any]:
        """The model's sections as plain data: what `DeepMSIConfig` takes beside the labels."""
        return self.model_dump(mode="json", include=set(ModelSections.model_fields))

    def with_batch(self, batch_size: int, accumulation: int) -> Recipe:
        """The same recipe with another micro-batch, and so many of them per step."""
        plain = self.model_dump(mode="json")
        plain["train"] |= {"batch_size": batch_size, "accumulation": accumulation}
        return Recipe.model_validate(plain)

    def save(self, path: Path) -> None:
        """Write the resolved recipe as YAML; `load_recipe` reads it back equal."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
        write_text(path, text)


def _words(text: str) -> list[str]:
    """The words that commas separate."""
    return [word.strip() for word in text.split(",") if word.strip()]


def explain_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> str:
    """Return a recipe in full, as YAML: each key with notes and its value, in a comment where the recipe leaves it out.

    So it resolves as the recipe does, with any further `--set`, too: presets and what follows from other keys stay
    free. Arguments and errors as of `load_recipe`.
    """
    said, where = _said(name_or_path, overrides)
    recipe = validated(Recipe, said, where)
    return "".join(f"{line}\n" for line in _explained(recipe, recipe.model_dump(mode="json"), said, ""))


def _explained(section: BaseModel, plain: dict[str, Any], said: Any, indent: str) -> Iterator[str]:
    if not isinstance(said, dict):  # a protocol by its name
        said = {"name": said} if isinstance(said, str) else {}
    for name, field in type(section).model_fields.items():
        below = getattr(section, name)
        notes = field.description or ""
        if isinstance(below, BaseModel):
            yield ""
            notes = notes or inspect.cleandoc(type(below).__doc__ or "").partition("\n\n")[0]
        elif get_origin(field.annotation) is Literal and not notes:
            notes = " | ".join(map(str, get_args(field.annotation)))
        start = f"{indent}# "
        notes = " ".join(notes.split())
        yield from textwrap.wrap(notes, 100, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)
        if isinstance(below, BaseModel):
            yield f"{indent}{name}:"
            yield from _explained(below, plain[name], said.get(name), f"{indent}  ")
        else:
            value = said.get(name, plain[name])
            style = '"' if isinstance(value, str) and len(value.splitlines()) > 1 else None  # on one line, too
            text = yaml.safe_dump(
                value, default_flow_style=True, default_style=style, sort_keys=False, allow_unicode=True, width=10**6
            )
            text = text.removesuffix("...\n").removesuffix("\n")  # the first stands behind a lone number or word
            yield f"{indent}{name if name in said else f'#{name}'}: {text}"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and apply `--set` overrides.

    Args:
        name_or_path: a shipped name (`shipped_recipes`) or a YAML file.
        overrides: `key=value`, dotted keys, YAML values; later ones win.

    Returns:
        The recipe, all defaults and presets filled in.

    Raises:
        UserError: no such recipe, no YAML, an unknown key (with the nearest known one), a value out of range.
    """
    return validated(Recipe, *_said(name_or_path, overrides))


def _said(name_or_path: str | os.PathLike[str], overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """What a recipe and its overrides say, and how to name them in a sentence."""
    path = _find(name_or_path)
    data = _read_yaml(path)
    if "name" not in data:
        data["name"] = path.stem
    for override in overrides:
        _apply(data, override)
    where = f"recipe {path.stem if path.parent == RECIPES else path}"
    return data, f"{where} with --set" if overrides else where


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    given = Path(name_or_path)
    if given.suffix in (".yaml", ".yml") or len(given.parts) > 1:
        if not given.is_file():
            raise UserError(f"There is no recipe file {given}.")
        return given
    shipped = RECIPES / f"{given}.yaml"
    if shipped.is_file():
        return shipped
    if given.is_file():
        return given
    raise UserError(
        f"There is no recipe {str(given)!r}: the package has {', '.join(shipped_recipes())}; else give a .yaml file."
    )


_INT = "tag:yaml.org,2002:int"


class _Loader(yaml.SafeLoader):
    """Plain YAML that refuses a key written twice, which would otherwise win in silence.

    Whole numbers are plain decimal ones: a label such as 010 is a word, which YAML 1.1 reads as 8.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the base has it)
        first: [(tag, re.compile(r"[-+]?(0|[1-9][0-9]*)$") if tag == _INT else form) for tag, form in known]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # as written: `<<` brings keys in later, which may be written anew
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} cannot be read ({error}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"The recipe {path}{line} is no YAML: {problem}.") from None
    if data is None:
        raise UserError(f"The recipe {path} is empty.")
    if not isinstance(data, dict):
        raise UserError(f"The recipe {path} holds {type(data).__name__} at its top level: write key: value.")
    return {str(key): value for key, value in data.items() if value is not None or key in ("labels", "preset")}


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"--set {override!r}: write key=value, such as train.lr=1e-4.")
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: the value is no YAML.") from None
    *sections, last = key.split(".")
    here = data
    for depth, section in enumerate(sections):
        below = here.get(section)
        if below is None:
            below = {}
        elif section == "protocol" and isinstance(below, str):
            below = {"name": below}
        elif not isinstance(below, dict):
            said = ".".join(sections[: depth + 1])
            raise UserError(f"--set {override!r}: {said} is {below!r} and has no keys of its own.")
        here[section] = here = dict(below)
    here[last] = value
