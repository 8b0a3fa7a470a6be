"""What a trained run says of many rows: of a manifest or a prepared folder, whose labels need not be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from deepmsi.errors import UserError
from deepmsi.models.config import Precision
from deepmsi.train.console import note, progress
from deepmsi.train.dataset import UtteranceDataset, check_data, unread
from deepmsi.train.evaluate import load_trained, options_of
from deepmsi.train.inference import predict_logits, softmax
from deepmsi.train.record import read_run
from deepmsi.train.rows import Selection, open_shared, select_rows

if TYPE_CHECKING:
    from deepmsi.data.store import PreparedData, PreparedRow


@dataclass(frozen=True)
class RowPrediction:
    """What a row expresses.

    Attributes:
        id: the row's.
        label: the row's own, which need not be one that the run knows; None where it has none.
        predicted: the likeliest label.
        probabilities: of every label that the run knows; they sum to 1.
    """

    id: str
    label: str | None
    predicted: str
    probabilities: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def predict_rows(
    run: str | Path,
    data: str | Path,
    split: str | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
) -> list[RowPrediction]:
    """Predict every row of the data that the run's model can read, or of one part of them, in their order.

    As `deepmsi.train.evaluate.evaluate` reads the data, with the previous utterances of a dialogue where the model
    takes them; it says how many rows were left out, and why. Where a launcher such as torchrun started several
    processes they share the rows, and all of them get the result.

    Args:
        run: a run directory of `train`.
        data: a manifest (prepared with the run's own options, in a temporary folder) or a prepared folder.
        split: "train", "dev" or "test": only the rows of that part by the column `split`.
        device: "auto", "cpu" or "cuda"; None is the recipe's `train.device`.
        precision: "fp32", "bf16" or "fp16".

    Raises:
        UserError: no such run, data that its model cannot read, no such device or precision on it, or logits that are
            not finite.
    """
    run = Path(run)
    read_run(run)
    recipe, model = load_trained(run, device, precision)
    config = model.config

    def chosen(rows: Sequence[PreparedRow], failures: Sequence[dict[str, str]] = ()) -> Selection:
        return select_rows(rows, config, config.names, (), failures=failures, labelled=False, split=split)

    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "prepared"
        prepared: PreparedData = open_shared(Path(data), options_of(config, recipe), folder, chosen, labelled=False)
        check_data(prepared, config)
        selection = chosen(prepared.rows, prepared.failures)
        for sentence in (*selection.notes(), *unread(prepared, selection.indices, config)):
            note(sentence)
        dataset = UtteranceDataset(prepared, selection.indices, selection.classes, config)
        with progress(len(dataset), "predict", "row") as bar:
            logits = predict_logits(model, dataset, recipe.train, precision=precision, on_batch=bar.update)
    rows = [prepared.rows[i] for i in selection.indices]
    if (wrong := np.flatnonzero(~np.isfinite(logits).all(1))).size:
        raise UserError(
            f"row {rows[wrong[0]].id!r}: the model's logits are not finite, so there is no prediction of it."
        )
    return [
        RowPrediction(
            row.id, row.label, config.names[int(p.argmax())], dict(zip(config.names, p.tolist(), strict=True))
        )
        for row, p in zip(rows, softmax(logits), strict=True)
    ]
