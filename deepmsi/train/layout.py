"""What a run is made of, before anything is trained: its rows and folds, and what it takes from the data.

Whatever the recipe, the data or an earlier start of the run do not allow is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepmsi.data.options import PrepareOptions
from deepmsi.data.store import PreparedData, PreparedRow
from deepmsi.errors import UserError
from deepmsi.models.config import MODALITIES, OWN_ENCODERS
from deepmsi.models.finetuned import EncoderNotes, read_notes
from deepmsi.train.console import note
from deepmsi.train.join import read_splits
from deepmsi.train.protocols import Fold, inner_folds, make_folds, restrict_folds
from deepmsi.train.recipe import Recipe
from deepmsi.train.rows import Selection, in_words, readable, select_rows

# How frames were cut, which the data know and prediction has to do again.
CUT = ("resize", "face", "face_model")
# What may differ between a run and its continuation: it changes no number.
FREE = {"name", "description"}
FREE_IN_TRAIN = {
    "workers",
    "device",
    "cache_stem",
    "memory_limit",
    "log_every",
    "checkpoint_every",
    "checkpoint_steps",
    "keep_checkpoints",
}


class Layout(NamedTuple):
    """The rows of a run and its folds.

    Attributes:
        selection: which rows of the data take part, and with which class.
        rows: these rows.
        folds: of the protocol, over positions in `rows`.
        chosen: those of them to run.
    """

    selection: Selection
    rows: list[PreparedRow]
    folds: list[Fold]
    chosen: list[Fold]


def lay_out(
    recipe: Recipe,
    plan: Recipe | None,
    there: Sequence[PreparedRow],
    wanted: Sequence[str | int] | None,
    failures: Sequence[Mapping[str, str]] = (),
) -> Layout:
    """Choose the rows that take part and the folds over them.

    Args:
        recipe: the recipe.
        plan: the recipe whose folds are taken, where this one reads fewer modalities and thus fewer rows.
        there: the rows of the data.
        wanted: names or numbers (from 1) of the folds to run; None means all.
        failures: what could not be prepared, as `PreparedData.failures` lists it.

    Raises:
        UserError: the rows do not allow it, down to the parts that choose the number of epochs.
    """
    selection = select_rows(there, recipe, recipe.labels, recipe.exclude_labels, failures=failures)
    weights, names = recipe.loss.class_weights, selection.names
    if isinstance(weights, list) and len(weights) != len(names):
        raise UserError(f"loss.class_weights has {len(weights)} weights for {len(names)} classes: {', '.join(names)}.")
    rows = [there[i] for i in selection.indices]
    if plan is None:
        folds = make_folds(recipe.protocol, rows, recipe.shuffle_seed)
    else:
        whole = select_rows(there, plan, plan.labels, plan.exclude_labels)
        folds = make_folds(plan.protocol, [there[i] for i in whole.indices], plan.shuffle_seed)
        folds = restrict_folds(folds, whole.indices, selection.indices)
    if recipe.train.selection == "dev" and any(fold.dev is None for fold in folds):
        raise UserError(
            "train.selection is dev, and there is no dev part beside the reported one: set it to "
            "inner-validation, inner-folds or last."
        )
    chosen = _choose_folds(folds, wanted)
    for fold in chosen:
        inner_parts(recipe, rows, fold.train, fold.dev)
    if recipe.protocol.name != "split-column" and recipe.protocol.final_fit:
        inner_parts(recipe, rows, np.arange(len(rows)), None)
    return Layout(selection, rows, folds, chosen)


def dev_chooses(recipe: Recipe, dev: NDArray[np.int64] | None) -> bool:
    """Whether a dev part chooses the number of epochs."""
    return dev is not None and recipe.train.selection in ("auto", "dev")


def inner_parts(
    recipe: Recipe, rows: Sequence[PreparedRow], train: NDArray[np.int64], dev: NDArray[np.int64] | None
) -> list[Fold]:
    """The parts of a training part that choose its number of epochs; none where the recipe or a dev part does."""
    settings = recipe.train
    if settings.selection == "last" or dev_chooses(recipe, dev):
        return []
    all_parts = settings.selection == "inner-folds"
    repeats = settings.inner_repeats if all_parts else 1
    parts = inner_folds(rows, train, recipe.protocol, settings.inner_folds, repeats, recipe.shuffle_seed)
    return parts if all_parts else parts[:1]


def _choose_folds(folds: Sequence[Fold], wanted: Sequence[str | int] | None) -> list[Fold]:
    if wanted is None:
        return list(folds)
    by_name = {fold.name: fold for fold in folds}
    chosen = []
    for item in wanted:
        text = str(item).strip()
        if text in by_name:
            chosen.append(by_name[text])
        elif text.isdecimal() and 1 <= int(text) <= len(folds):
            chosen.append(folds[int(text) - 1])
        else:
            known = ", ".join(by_name) if len(by_name) <= 12 else f"1 to {len(folds)}"
            raise UserError(f"There is no fold {text!r}: the folds are {known}.")
    return chosen


def fit_to_data(recipe: Recipe, data: PreparedData) -> Recipe:
    """Take from the data what only they know: feature lengths, their encoders, how frames were cut."""
    plain = recipe.model_dump(mode="json")
    unsaid = PrepareOptions(**recipe.own_preparation())
    for key in PrepareOptions.model_fields:
        asked, found = getattr(recipe.prepare, key), getattr(data.options, key)
        if key not in CUT and asked not in (found, getattr(unsaid, key)):
            note(f"The data were prepared with {key}={found}: prepare.{key}={asked} changes nothing.")
    there = readable(data.rows, recipe)
    absent = [name for name in MODALITIES if name not in there and name in recipe.modalities]
    if absent and there:
        note(f"No row has {' or '.join(in_words(recipe, absent))}: the model is built without.")
        plain["drop"] = [*recipe.drop, *absent]
    for name in ("text", "audio"):
        section = getattr(recipe, name)
        if section.encoder == "features":
            said = section.model_fields_set
            if name in data.feature_dims and "dim" not in said:
                plain[name]["dim"] = data.feature_dims[name]
            if section.features_from is None:
                plain[name]["features_from"] = getattr(data.options, f"{name}_encoder")
            if name == "text" and name in data.encoders:
                plain[name]["context"] = data.encoders[name]["reads"].get("context", 0)
    if any("frames" in row.slots for row in data.rows) and recipe.vision.backbone != "none":
        for key in CUT:
            found = getattr(data.options, key)
            if found != getattr(recipe.vision, key):
                note(f"The frames were prepared with {key}={found}: the model keeps that in place of the recipe's.")
            plain["vision"][key] = found
        stored, read = data.options.size, recipe.vision.image_size
        if stored >= read:  # smaller ones are refused
            plain["prepare"]["size"] = stored
            plain["vision"]["stored_size"] = stored if stored > read else None
    plain["prepare"] = {
        **plain["prepare"],
        **{key: plain["vision"][key] for key in CUT},
        **{
            f"{name}_encoder": plain[name]["features_from"]
            for name in ("text", "audio")
            if plain[name]["encoder"] == "features"
        },
    }
    return Recipe.model_validate(plain)


def check_encoders(
    recipe: Recipe, encoders: Mapping[str, Mapping[str, Any]], data: Path, reported: Mapping[str, Sequence[str]]
) -> None:
    """Refuse encoders that saw rows which are to be reported: those of features, with these notes, and the model's.

    Args:
        recipe: the recipe.
        encoders: the notes of the encoders that features come from, by modality.
        data: where the features are, for the sentence.
        reported: ids of the rows that each fold reports.

    Raises:
        UserError: one did.
    """
    if recipe.protocol.seen_features:
        return
    for name, own in starting_notes(recipe).items():
        for fold, ids in reported.items():
            if known := sorted(set(ids) & set(own.seen)):
                raise UserError(
                    f"{name}.encoder {getattr(recipe, name).encoder} was trained on {len(known)} of the {len(ids)} "
                    f"rows that fold {fold!r} reports ({known[0]!r}): start from the encoder that it was fine-tuned "
                    "from, or set protocol.seen_features=true, and the figures are marked as leaking."
                )
    for name in ("text", "audio"):
        if getattr(recipe, name).encoder != "features" or name not in encoders:
            continue
        notes = encoders[name]
        seen = set(notes["seen"])
        for fold, ids in reported.items():
            if known := [row_id for row_id in ids if row_id in seen]:
                raise UserError(
                    f"The {name} features of {data} come from an encoder that was trained on {len(known)} of the "
                    f"{len(ids)} rows that fold {fold!r} reports ({known[0]!r}): take the encoder that deepmsi "
                    f"finetune made for that fold (this one is of {notes['fold']!r}), or set "
                    "protocol.seen_features=true, and the figures are marked as leaking."
                )


def learned_by_encoders(recipe: Recipe, encoders: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The ids of the rows that trained an encoder of the features, with these notes, or one that the model starts with.

    Rows that only chose the epoch of one are not among them.
    """
    learned: set[str] = set()
    for own in starting_notes(recipe).values():
        learned |= set(own.seen) - set(own.chose)
    for name, notes in encoders.items():
        if getattr(recipe, name).encoder == "features" and name in recipe.modalities:
            learned |= set(notes["seen"]) - set(notes.get("chose", ()))
    return learned


def starting_notes(recipe: Recipe) -> dict[str, EncoderNotes]:
    """The notes of those encoders of the model that `deepmsi finetune` made, by modality."""
    names = {name: getattr(recipe, name).encoder for name in ("text", "audio")}
    own = {name: read_notes(encoder) for name, encoder in names.items() if encoder not in OWN_ENCODERS}
    return {name: notes for name, notes in own.items() if notes is not None}


def check_same(
    facts: dict[str, Any],
    recipe: Recipe,
    started: Recipe,
    data: PreparedData,
    splits: dict[str, dict[str, list[str]]],
    out: Path,
) -> None:
    """Refuse to continue a run with another recipe, other data or other folds.

    Raises:
        UserError: one of them is another; what differs is named.
    """
    same = facts["data"]["fingerprint"] == data.fingerprint
    # Every fold has features of its own where the encoders were fine-tuned on its training part.
    if not same and not (data.encoders and facts["data"].get("content") == data.content):
        raise UserError(f"{out} was begun with other data: resume it with the same, or give another directory.")
    differing = _first_difference(_identity(started), _identity(recipe))
    if differing:
        key, before, now = differing
        raise UserError(
            f"{out} was begun with {key}={before!r} and is resumed with {now!r}: use the same recipe, or another "
            "directory."
        )
    # The recipe does not say all: versions, and a plan that the folds come from, may split the same rows otherwise.
    if read_splits(out) != splits:
        raise UserError(f"{out} was begun with other folds: delete it to measure it anew, or give another directory.")


def _identity(recipe: Recipe) -> dict[str, Any]:
    plain = recipe.model_dump(mode="json")
    for name in ("text", "audio"):  # the data's fingerprint says which encoder their features are of
        plain[name].pop("features_from")
        plain["prepare"].pop(f"{name}_encoder")
    return {key: value for key, value in plain.items() if key not in FREE} | {
        "train": {key: value for key, value in plain["train"].items() if key not in FREE_IN_TRAIN}
    }


def _first_difference(a: Any, b: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            found = _first_difference(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
            if found:
                return found
        return None
    return None if a == b else (prefix, a, b)


def with_batch_of(recipe: Recipe, started: Recipe) -> Recipe:
    """The recipe with the batch that another run of it chose."""
    return recipe.with_batch(started.train.batch_size, started.train.accumulation)
