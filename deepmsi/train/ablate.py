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
from deepmsi.models.config import COMPRESSION, MODALITIES, Precision
from deepmsi.train.console import note
from deepmsi.train.evaluate import evaluate
from deepmsi.train.intervals import SUMMARY
from deepmsi.train.recipe import load_recipe
from deepmsi.train.record import RECIPE, RUN, read_run, write_json
from deepmsi.train.rows import is_prepared
from deepmsi.train.run import train

ABLATION, RETRAINED, TABLE = "ablation", "retrained", "ablation.json"
# There is a capacity to find only where tokens are kept by a threshold.
NO_CAPACITY = {"train.capacity_quantile": "null"}
PARTS = {
    # Without a schedule nothing may say how it compresses.
    "without VSC": {f"vision.{key}": "null" for key in ("schedule", *COMPRESSION)} | NO_CAPACITY,
    "without the contrastive term": {"loss.contrastive": "0"},
}


def variants_of(run: Path, keep: Sequence[float] = (), frames: Sequence[int] = ()) -> dict[str, dict[str, str]]:
    """Settings of the lines that need a model of their own: `PARTS`, shares of tokens kept, numbers of frames.

    Args:
        run: a run directory of `train`.
        keep: shares, above 0 and at most 1, of its stage's grid that every compressing block keeps; a square number
            of tokens where the schedule lays the kept ones on a grid anew.
        frames: frames per clip; the data must then be a manifest, which each line prepares for itself.

    Raises:
        UserError: a share or a number out of range, or the run has no video branch or no compression.
    """
    recipe = load_recipe(run / RECIPE)
    parts = dict(PARTS)
    if "video" not in recipe.modalities or recipe.vision.schedule is None:
        del parts["without VSC"]
    elif recipe.vision.freeze == "stem":
        del parts["without VSC"]
        note("The line without VSC is left out: where the frozen stem ends, the first compression says.")
    if len(recipe.modalities) == 1 or "video" not in recipe.modalities or not recipe.loss.contrastive:
        del parts["without the contrastive term"]  # its pairs are of the video
    for share in keep:
        if not 0 < share <= 1:
            raise UserError(f"A share of tokens to keep lies above 0 and is at most 1, not {share:g}.")
    for count in frames:
        if count < 1:
            raise UserError(f"A clip has 1 frame or more, not {count}.")
    if (keep or frames) and "video" not in recipe.modalities:
        raise UserError(f"{run} has no video branch, so that there are no tokens and frames to vary.")
    tokens = _tokens(run, keep) if keep else []
    lines = {
        f"keep {share:.0%}": {"vision.keep": str(kept)} | NO_CAPACITY for share, kept in zip(keep, tokens, strict=True)
    }
    lines |= {f"{count} frames": {"vision.frames": str(count), "prepare.frames": str(count)} for count in frames}
    return parts | lines


def _tokens(run: Path, shares: Sequence[float]) -> list[list[int]]:
    """Tokens that each share of its stage's grid is, for each compressing block."""
    from deepmsi.models.predict import load_run

    video = load_run(run).video
    schedule = None if video is None else video.backbone.schedule
    if video is None or schedule is None or schedule.blocks is None:
        raise UserError(f"{run} compresses no tokens, so that there is no share to vary.")
    side = video.backbone.img_size // video.backbone.patch_size
    areas = [(-(-side // 2**stage)) ** 2 for stage, _ in schedule.blocks]
    kept = [[max(1, round(share * area)) for area in areas] for share in shares]
    if schedule.layout == "regrid":
        return [[max(1, round(tokens**0.5)) ** 2 for tokens in each] for each in kept]
    return kept


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
    split: str | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
) -> list[dict[str, Any]]:
    """Score a run with every subset of its modalities, and with parts of the model left out.

    Args:
        run: a run directory of `train`.
        data: "evaluate": labelled data to score on. "retrain": the data the run was trained on; each line is
            measured on the run's own folds. A manifest is prepared once for all lines that prepare it alike.
        out: takes `ablation.json` and a folder per line, in "retrain" below `retrained`, so that neither mode
            replaces what the other has measured; None means RUN/ablation, where reports look.
        mode: whether modalities are hidden from the one model, or a model is trained for each line.
        variants: with "retrain", further lines as settings over the recipe, such as
            `{"keep 100": {"vision.keep": "100"}}`; None takes those of `variants_of`.
        split, device, precision: with "evaluate", as in `deepmsi.train.evaluate.evaluate`.

    Returns:
        One dictionary per line: `name`, `mode`, `n`, the scores of `SUMMARY` and their `intervals`, and with
        "retrain" the `protocol`.

    Raises:
        UserError: no such run, or data that it cannot read.
    """
    run, data = Path(run), Path(data)
    read_run(run)
    recipe = load_recipe(run / RECIPE)
    out = run / ABLATION if out is None else Path(out)
    if mode == "evaluate" and variants:
        raise UserError("Variants of the model need mode='retrain': one trained model has its parts or has not.")
    if mode == "retrain" and (split, device, precision) != (None, None, "fp32"):
        raise UserError("A model that is trained for a line is measured on the run's own folds, where its recipe says.")
    out = out / RETRAINED if mode == "retrain" else out
    named = subsets(recipe.modalities)
    lines = []
    if mode == "evaluate":
        for name, chosen in named.items():
            note(f"Ablation: {name}.")
            hidden = [other for other in recipe.modalities if other not in chosen]
            scores = evaluate(run, data, out / name, hidden, split, device, precision)
            data = _prepared(data, out / name)
            lines.append(_line(name, mode, scores))
    else:
        further = variants_of(run) if variants is None else variants
        if taken := sorted(further.keys() & named.keys()):
            raise UserError(f"A variant cannot be named {taken[0]!r}, as a line of its own is.")
        changes = {name: _reads(chosen) for name, chosen in named.items()} | dict(further)
        shared = data
        for name, settings in changes.items():
            note(f"Ablation: {name}.")
            folder = out / name.replace("%", "-percent").replace(" ", "-")
            overrides = [f"{key}={value}" for key, value in settings.items()]
            line = load_recipe(run / RECIPE, [*overrides, "protocol.final_fit=false"])
            alike = line.prepare == recipe.prepare
            # The run's own folds, so that a line of fewer rows leaves out rows of these and is no other split.
            scores = train(line, shared if alike else data, folder, resume=(folder / RUN).exists(), plan=recipe)
            shared = _prepared(shared, folder) if alike else shared
            lines.append(_line(name, mode, scores))
    write_json(out / TABLE, {"mode": mode, "lines": lines})
    return lines


def _prepared(data: Path, folder: Path) -> Path:
    """What the lines to come read: data that are prepared, or what a line has made of a manifest in its folder."""
    return data if is_prepared(data) else folder / "prepared"


def _reads(chosen: Sequence[str]) -> dict[str, str]:
    """Settings of a model that reads the chosen modalities alone."""
    drop = [name for name in MODALITIES if name not in chosen]
    return {"drop": f"[{', '.join(drop)}]"} | (NO_CAPACITY if "video" in drop else {})


def ablation_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines as a Markdown table, scores in percent with the 95% interval of the accuracy, protocol below."""
    head = ("modalities", "n", "accuracy % (95%)", "UAR", "weighted F1", "macro F1", "text context")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines:
        low, high = line["intervals"]["accuracy_wilson"]
        scores = [f"{100 * line[name]:.1f}" for name in SUMMARY]
        scores[0] += f" ({100 * low:.1f} to {100 * high:.1f})"
        rows.append(f"| {line['name']} | {line['n']} | {' | '.join(scores)} | {line.get('context') or 'none'} |")
    rows += [line for sentence in caveats(lines) for line in ("", sentence)]
    if protocols := dict.fromkeys(line["protocol"] for line in lines if "protocol" in line):
        rows += ["", f"Protocol: {'; '.join(protocols)}."]
    return "\n".join(rows)


def caveats(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the lines must know of their rows: which they are, and whether training knows their ids."""
    sentences = []
    if len({line.get("n") for line in lines}) > 1:
        sentences.append(
            "Lines of different n were scored on different rows: a row with none of a line's modalities is left out."
        )
    if parts := dict.fromkeys(line["split"] for line in lines if "split" in line):
        sentences.append(f"Scored on the rows of the part {' and '.join(parts)} alone.")
    if seen := max((line.get("rows_seen_in_training") or 0 for line in lines), default=0):
        sentences.append(
            f"Up to {seen} rows of a line have the id of a row that trained the model or its encoders or chose their "
            "epoch: where they are the same rows, its figures do not hold for new data."
        )
    return sentences


def _line(name: str, mode: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    rows = ("left_out", "split", "rows_seen_in_training")
    kept = ("n", *SUMMARY, "intervals", "protocol", "leaks", "context", "precision", *rows)
    return {"name": name, "mode": mode, **{key: scores[key] for key in kept if key in scores}}
