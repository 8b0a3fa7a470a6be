"""The seven subsets of the modalities, and the model without its parts: one table of scores.

"evaluate" hides modalities from one trained model (trained with modality dropout, it knows missing ones).
"retrain" trains a model for each line, as the paper's Table 3 does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from deepmsi.errors import UserError
from deepmsi.models.config import MODALITIES
from deepmsi.train.console import note
from deepmsi.train.evaluate import RECIPE, evaluate, read_run, write_json
from deepmsi.train.metrics import SUMMARY
from deepmsi.train.recipe import load_recipe
from deepmsi.train.run import train

TABLE = "ablation.json"
PARTS = {
    "without VSC": {"vision.schedule": "null"},
    "without the contrastive term": {"loss.contrastive": "0"},
}


def subsets(modalities: Sequence[str]) -> dict[str, list[str]]:
    """The non-empty subsets of the modalities by name, the smallest first: {"text+audio": ["text", "audio"]}."""
    order = [name for name in ("text", "audio", "video") if name in modalities]
    return {"+".join(chosen): list(chosen) for size in range(1, len(order) + 1) for chosen in combinations(order, size)}


def ablate(
    run: Path,
    data: Path,
    out: Path | None = None,
    mode: Literal["evaluate", "retrain"] = "evaluate",
    variants: Mapping[str, Mapping[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """Score a run with every subset of its modalities, and with parts of the model left out.

    Args:
        run: a run directory of `train`.
        data: "evaluate": labelled data to score on. "retrain": the data the run was trained on; each line is
            measured by the run's own protocol.
        out: takes `ablation.json` and a folder per line; None means RUN/ablation, where reports look.
        mode: whether modalities are hidden from the one model, or a model is trained for each line.
        variants: with "retrain", further lines as settings over the recipe, such as
            `{"keep 100": {"vision.keep": "100"}}`; None takes `PARTS` where the recipe has a video branch.

    Returns:
        One dictionary per line: `name`, `mode`, `n`, the scores of `SUMMARY` and their `intervals`, and with
        "retrain" the `protocol`.

    Raises:
        UserError: no such run, or data that it cannot read.
    """
    run = Path(run)
    read_run(run)
    recipe = load_recipe(run / RECIPE)
    out = run / "ablation" if out is None else Path(out)
    if mode == "evaluate" and variants:
        raise UserError("Variants of the model need mode='retrain': one trained model has its parts or has not.")
    lines = []
    for name, chosen in subsets(recipe.modalities).items():
        drop = [modality for modality in MODALITIES if modality not in chosen]
        note(f"Ablation: {name}.")
        if mode == "evaluate":
            scores = evaluate(run, data, out / name, [modality for modality in drop if modality in recipe.modalities])
        else:
            scores = _retrain(run, data, out / name, {"drop": f"[{', '.join(drop)}]"})
        lines.append(_line(name, mode, scores))
    if mode == "retrain":
        extra = variants if variants is not None else PARTS if "video" in recipe.modalities else {}
        for name, settings in extra.items():
            note(f"Ablation: {name}.")
            lines.append(_line(name, mode, _retrain(run, data, out / name.replace(" ", "-"), settings)))
    write_json(out / TABLE, {"mode": mode, "lines": lines})
    return lines


def ablation_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines as a Markdown table, scores in percent with the 95% interval of the accuracy."""
    rows = ["| modalities | n | accuracy (95%) | UAR | weighted F1 | macro F1 |", "|---|---|---|---|---|---|"]
    for line in lines:
        low, high = line["intervals"]["accuracy_wilson"]
        scores = [f"{100 * line[name]:.1f}" for name in SUMMARY]
        scores[0] += f" ({100 * low:.1f} to {100 * high:.1f})"
        rows.append(f"| {line['name']} | {line['n']} | {' | '.join(scores)} |")
    return "\n".join(rows)


def _retrain(run: Path, data: Path, out: Path, settings: Mapping[str, str]) -> dict[str, Any]:
    overrides = [f"{key}={value}" for key, value in settings.items()]
    recipe = load_recipe(run / RECIPE, [*overrides, "protocol.final_fit=false"])
    return train(recipe, data, out, resume=(out / "run.json").exists())


def _line(name: str, mode: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("n", *SUMMARY, "intervals", "protocol", "leaks", "context", "left_out")
    return {"name": name, "mode": mode, **{key: scores[key] for key in kept if key in scores}}
