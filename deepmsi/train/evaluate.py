"""Score a trained run on labelled data, with all modalities or with some hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepmsi.data.files import leaving_no_empty
from deepmsi.errors import UserError
from deepmsi.models.config import MODALITIES, Precision
from deepmsi.models.precision import check_precision
from deepmsi.train.console import note, progress
from deepmsi.train.dataset import UtteranceDataset, check_data, context_read, unread
from deepmsi.train.inference import predict_logits, softmax
from deepmsi.train.memory import check_device, training_device
from deepmsi.train.metrics import compute_metrics
from deepmsi.train.processes import process_rank, start_processes
from deepmsi.train.recipe import Recipe, load_recipe
from deepmsi.train.record import (
    GROUPS,
    METRICS,
    PREDICTIONS,
    RECIPE,
    RUN,
    groups_of,
    groups_told,
    read_run,
    write_groups,
    write_json,
    write_predictions,
)
from deepmsi.train.rows import Selection, in_words, open_shared, readable, select_rows

if TYPE_CHECKING:
    from deepmsi.data.options import PrepareOptions
    from deepmsi.data.store import PreparedData, PreparedRow
    from deepmsi.models.config import DeepMSIConfig
    from deepmsi.models.deepmsi import DeepMSI


def evaluate(
    run: Path,
    data: Path,
    out: Path | None = None,
    drop: Sequence[str] = (),
    split: str | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Evaluate a run's model on every labelled row of the data, or of one part of it.

    Where a launcher such as torchrun started several processes they share the rows, each of which is scored once; all
    of them get the result, and the first writes it.

    Args:
        run: a run directory of `train`.
        data: a manifest (prepared with the run's own options) or a prepared folder.
        out: takes `metrics.json` and `predictions.csv`; None writes nothing.
        drop: modalities to hide: "text", "audio", "video", one by one or joined by commas.
        split: "train", "dev" or "test": only the rows of that part by the column `split`.
        device: "auto", "cpu" or "cuda"; None is the recipe's `train.device`.
        precision: "fp32", "bf16" or "fp16", whatever the run trained and scored its folds in.

    Returns:
        What `metrics.json` holds: `compute_metrics`, the rows left out and why, the modalities that were read, the
        `split` where one is given, the `precision` where it is not fp32, and as `rows_seen_in_training` how many rows
        have the id of one that trained the model or its encoders, or chose their epoch.

    Raises:
        UserError: no such run, a label that the run does not know, data that its model cannot read, no modality
            left, no such device or precision on it, or `out` is a run itself.
    """
    drop = _check_drop(drop)
    run, data = Path(run), Path(data)
    if out is not None and (Path(out) / RUN).exists():
        raise UserError(f"{out} is a run, whose own scores would be lost: give another folder, such as {out}/scores.")
    facts = read_run(run)
    recipe, model = load_trained(run, device, precision)
    _check_left(model.config.modalities, drop)
    with TemporaryDirectory() as temporary, leaving_no_empty(Path(out or temporary)):
        if out is not None:
            _make_folder(Path(out))
        folder = Path(out or temporary) / "prepared"
        prepared = open_shared(
            data,
            options_of(model.config, recipe),
            folder,
            lambda rows: _select(rows, model.config, recipe, drop, split=split),
        )
        result, predictions = evaluate_model(model, recipe, prepared, drop, split, precision)
    trained = set(facts.get("trained_ids", ()))
    for name in result["modalities"]:
        if name in prepared.encoders and getattr(model.config, name).encoder == "features":
            trained |= set(prepared.encoders[name]["seen"])
    seen = sum(row[0] in trained for row in predictions)
    result["rows_seen_in_training"] = seen
    if seen:
        note(
            f"{seen} of {len(predictions)} rows have the id of a row that this run or its encoders trained on or chose "
            "their epoch by."
        )
    if out is not None and process_rank()[0] == 0:
        write_predictions(Path(out) / PREDICTIONS, predictions, model.config.names)
        scored = {row[0] for row in predictions}
        write_groups(Path(out) / GROUPS, (row for row in prepared.rows if row.id in scored))
        write_json(Path(out) / METRICS, result)
    return result


def evaluate_model(
    model: DeepMSI,
    recipe: Recipe,
    data: PreparedData,
    drop: Sequence[str] = (),
    split: str | None = None,
    precision: Precision = "fp32",
) -> tuple[dict[str, Any], list[list[str]]]:
    """Evaluate a model in memory.

    Returns:
        The metrics, and the rows of `predictions.csv`.
    """
    config = model.config
    _check_left(config.modalities, drop)
    check_data(data, config)
    selection = _select(data.rows, config, recipe, drop, data.failures, split)
    for sentence in (*selection.notes(), *unread(data, selection.indices, config, drop)):
        note(sentence)
    dataset = UtteranceDataset(data, selection.indices, selection.classes, config, hidden=drop)
    there = readable([data.rows[i] for i in selection.indices], config)
    if absent := [name for name in config.modalities if name not in there and name not in drop]:
        note(f"No row has {' or '.join(in_words(config, absent))}: the model reads what it learned for rows without.")
    with progress(len(dataset), "evaluate", "row") as bar:
        logits = predict_logits(model, dataset, recipe.train, precision=precision, on_batch=bar.update)
    rows = [data.rows[i] for i in selection.indices]
    ids = [row.id for row in rows]
    groups = groups_of(ids, groups_told(rows))
    result = compute_metrics(
        selection.classes, logits.argmax(1), config.names, probabilities=softmax(logits), groups=groups
    )
    result["modalities"] = [name for name in config.modalities if name in there and name not in drop]
    result["context"] = context_read(data.rows, config) if "text" in result["modalities"] else 0
    result["left_out"] = selection.left_out
    if split is not None:
        result["split"] = split
    if precision != "fp32":
        result["precision"] = precision
    return result, prediction_rows(ids, selection.classes, logits, config.names)


def _select(
    rows: Sequence[PreparedRow],
    config: DeepMSIConfig,
    recipe: Recipe,
    drop: Sequence[str],
    failures: Sequence[Mapping[str, str]] = (),
    split: str | None = None,
) -> Selection:
    return select_rows(rows, config, config.names, recipe.exclude_labels, drop, failures, split=split)


def options_of(config: DeepMSIConfig, recipe: Recipe) -> PrepareOptions:
    """How a manifest is prepared for the model of a run."""
    # Each fold may have had features of its own encoder: these are of the one that the kept model reads.
    encoders = {
        f"{name}_encoder": section.features_from
        for name in ("text", "audio")
        if (section := getattr(config, name)).encoder == "features"
    }
    return recipe.prepare.model_copy(update=encoders)


def prediction_rows(
    ids: Sequence[str], classes: NDArray[np.int64], logits: NDArray[np.float32], names: Sequence[str]
) -> list[list[str]]:
    """Rows of `predictions.csv`: id, label, predicted, and the probability of every label."""
    probabilities = softmax(logits)
    return [
        [row_id, names[label], names[int(p.argmax())], *(f"{value:.6f}" for value in p)]
        for row_id, label, p in zip(ids, classes, probabilities, strict=True)
    ]


def load_trained(run: Path, device: str | None, precision: Precision) -> tuple[Recipe, DeepMSI]:
    """Load what a run trained to the device on which it is to be scored, and start the processes of a launcher.

    Raises:
        UserError: no such run, no such device or precision on it.
    """
    recipe = load_recipe(run / RECIPE)
    if device is not None:
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device is {device!r}: give auto, cpu or cuda.")
        there = recipe.train.model_copy(update={"device": device, "precision": "fp32"})
        check_device(there)
        recipe = recipe.model_copy(update={"train": there})
    where = training_device(recipe.train)
    check_precision(precision, where)
    start_processes(where)
    return recipe, _load_model(run).to(where)


def _load_model(run: Path) -> DeepMSI:
    from deepmsi.models.deepmsi import DeepMSI

    folder = run / "model"
    if not folder.is_dir():
        raise UserError(f"{run} has no model: its training has not ended; run deepmsi train with --resume.")
    return DeepMSI.from_pretrained(folder)


def _check_drop(drop: Sequence[str]) -> list[str]:
    names = [name.strip() for item in drop for name in item.split(",") if name.strip()]
    for name in names:
        if name not in MODALITIES:
            raise UserError(f"--drop {name!r}: the modalities are {', '.join(MODALITIES)}.")
    return [name for name in MODALITIES if name in names]


def _check_left(modalities: Sequence[str], drop: Sequence[str]) -> None:
    if not set(modalities) - set(drop):
        raise UserError(
            f"The run reads {', '.join(modalities)} and --drop hides {', '.join(drop)}: nothing is left to read."
        )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another folder.") from None
