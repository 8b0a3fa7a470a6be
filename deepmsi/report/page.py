"""Turn what a run directory told into one HTML page and its Markdown twin."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepmsi.report import figures
from deepmsi.report.collect import Ablation, RunFacts, ScoredRow, collect, speakers_table, worst_errors
from deepmsi.report.paper import PROTOCOL, SUBSETS, canonical_label, published_for
from deepmsi.report.render import write_both
from deepmsi.report.text import NAMES, PROBABILITIES, chance_of, context_of, grouped_of, interval_of, leak_of, rare_of
from deepmsi.train.ablate import caveats

# The quantities that get a curve, in this order, by the names that a history may use for them.
CURVES = (
    ("loss", ("loss",)),
    ("calibrated loss", ("calibrated_loss",)),
    ("cross-entropy", ("cross_entropy",)),
    ("contrastive loss", ("contrastive",)),
    ("accuracy", ("accuracy",)),
    ("UAR", ("uar",)),
    ("weighted F1", ("weighted_f1",)),
    ("learning rate", ("learning_rate", "lr")),
)


def report(run: str | os.PathLike[str]) -> Path:
    """Write `report.html`, one self-contained page, and `report.md` into a run directory.

    Folds that ran apart are joined first. A part that the run lacks is left out and named at the end of the page.

    Args:
        run: the folder that `deepmsi train` wrote.

    Returns:
        the path of the page.

    Raises:
        UserError: `run` is no run directory.
    """
    folder = Path(run)
    if (folder / "folds").is_dir():
        from deepmsi.train.join import SPLITS, join_folds

        if (folder / SPLITS).is_file():
            join_folds(folder)
    context = build_context(collect(folder))
    return write_both(folder / "report.html", "report", context)


def build_context(facts: RunFacts) -> dict[str, Any]:
    """Compute everything that the templates show."""
    tokens, missing = _tokens(facts)
    embeddings, reason = _embeddings(facts)
    missing += [reason] if reason else []
    recipe = facts.recipe
    name = str(recipe.get("name") or facts.made.get("recipe") or facts.path.name)
    if not facts.ablations:
        missing.append(
            "the ablation has not been run; `deepmsi ablate RUN --data HELD_OUT` adds it, with --retrain in the "
            "manner of the paper's Table 3"
        )
    return {
        "title": name,
        "protocol": str((facts.metrics or {}).get("protocol") or facts.made.get("protocol") or "a protocol not told"),
        "made": _made(facts),
        "scores": _scores(facts.metrics),
        "context": context_of(facts.metrics or facts.made),
        "chance": _chance(facts.metrics),
        "rare": rare_of(facts.metrics or {}),
        "grouped": grouped_of(facts.metrics or {}),
        "leaks": leak_of(facts.metrics or facts.made),
        "complete": (facts.metrics or {}).get("complete", True),
        "folds": _folds(facts.metrics),
        "over_folds": _over_folds(facts.metrics),
        "curves": _curves(facts),
        "confusion": _confusion(facts.metrics),
        "per_class": _per_class(facts.metrics),
        "calibration": _calibration(facts.metrics),
        "ablations": [
            {
                "retrained": each.retrained,
                "lines": [
                    {"name": name, **{key: metrics.get(key) for key in (*NAMES, "n", "context")}}
                    for name, metrics in each.lines
                ],
                "caveats": caveats([metrics for _, metrics in each.lines]),
            }
            for each in facts.ablations
        ],
        "tokens": tokens,
        "embeddings": embeddings,
        "errors": _errors(facts),
        "n_errors": sum(not row.right for row in facts.predictions),
        "speakers": [{"name": speaker, "n": n, "accuracy": accuracy} for speaker, n, accuracy in speakers_table(facts)],
        "paper": _paper(facts),
        "missing": [*facts.missing, *missing],
        "names": NAMES,
    }


def _made(facts: RunFacts) -> list[tuple[str, str]]:
    """What made the run, as pairs of a name and a text."""
    made, recipe, metrics = facts.made, facts.recipe, facts.metrics or {}
    words = recipe.get("description")
    data = made.get("data") if isinstance(made.get("data"), Mapping) else {}
    assert isinstance(data, Mapping)
    protocol = metrics.get("protocol") or made.get("protocol") or recipe.get("protocol")
    versions = {name: made[name] for name in ("deepmsi", "torch", "transformers", "python") if name in made}
    pairs: list[tuple[str, Any]] = [
        ("recipe", recipe.get("name")),
        ("the recipe's own words", f"{words} (this run may be set otherwise)" if words else None),
        ("protocol", protocol),
        ("rows scored", metrics.get("n")),
        ("kept model", _kept(made.get("final_fit"))),
        ("rows known to training", made.get("both_sides")),
        ("rows with the id of one that training knows", metrics.get("rows_seen_in_training") or None),
        ("modalities read", metrics.get("modalities")),
        ("rows left out", data.get("left_out")),
        ("text context", context_of(made) if "context" in made else None),
        ("seed", made.get("seed", recipe.get("seed"))),
        ("data", data.get("path")),
        ("data fingerprint", data.get("fingerprint")),
        ("command", made.get("command")),
        ("versions", versions),
        ("device", made.get("device")),
        ("speed", _speed(made.get("speed"))),
        ("started", made.get("started")),
        ("took", f"{made['seconds']:.0f} s" if isinstance(made.get("seconds"), int | float) else None),
    ]
    return [(name, _phrase(value)) for name, value in pairs if value is not None and value != "" and value != {}]


def _kept(final_fit: Any) -> str | None:
    """What the kept model is, where it is none of those that were scored."""
    if not isinstance(final_fit, Mapping):
        return None
    return (
        f"fitted on all {final_fit.get('rows')} rows after the folds' models, whose scores these are; not scored itself"
    )


def _speed(speed: Any) -> str | None:
    """What training did per second, and what it took of the memory."""
    if not isinstance(speed, Mapping) or "utterances_per_second" not in speed:
        return None
    words = f"{speed['utterances_per_second']:g} utterances a second in training (its evaluations included)"
    words += f", peak memory {speed['peak_memory_mib']:.0f} MiB"
    gpu = speed.get("peak_gpu_memory_mib")
    return f"{words}, on the GPU {gpu:.0f} MiB" if gpu else words


def _phrase(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_phrase(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        separator = " " if all(isinstance(item, str) for item in value) else ", "
        return separator.join(_phrase(item) for item in value)
    return str(value)


def _scores(metrics: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "value": metrics[key],
            "interval": interval_of(metrics, key),
            "grouped": [(words, by.get(key)) for words, by in grouped_of(metrics)],
        }
        for key, name in NAMES.items()
        if metrics is not None and key in metrics
    ]


def _chance(metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
    if metrics is None or "confusion_matrix" not in metrics:
        return None
    even, commonest = chance_of(metrics)
    return {"even": even, "commonest": commonest}


def _folds(metrics: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Mean and standard deviation over folds or seeds, where the metrics carry them."""
    summary = (metrics or {}).get("over_folds") or {}
    return [{"name": NAMES[key], **summary[key]} for key in NAMES if key in summary]


def _over_folds(metrics: Mapping[str, Any] | None) -> str:
    """How the scores over folds differ from those above."""
    repeats = (metrics or {}).get("repeats")
    above = "of all rows together"
    if repeats:
        above = f"means over {repeats} repeats, each {above}, and what is counted below is counted over all of them"
    return f"Here each fold counts once, whatever its rows; the scores above are {above}."


def _curves(facts: RunFacts) -> list[dict[str, str]]:
    series = facts.series()
    curves = []
    for title, keys in CURVES:
        found = next((series[key] for key in keys if key in series), None)
        if found is not None:
            curves.append({"title": title, "uri": figures.curve_uri(found)})
    return curves


def _confusion(metrics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if metrics is None or "confusion_matrix" not in metrics:
        return None
    rows = []
    for label, counts in zip(metrics["labels"], metrics["confusion_matrix"], strict=True):
        total = sum(counts)
        rows.append({"label": label, "cells": [(n, n / total if total else 0.0) for n in counts], "total": total})
    return {"labels": metrics["labels"], "rows": rows}


def _per_class(metrics: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [{"label": label, **row} for label, row in ((metrics or {}).get("per_class") or {}).items()]


def _calibration(metrics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the probabilities are worth, where the metrics tell it."""
    bins = (metrics or {}).get("reliability")
    if metrics is None or not bins:
        return None
    values = [{"name": name, "value": metrics[key]} for key, name in PROBABILITIES.items() if key in metrics]
    per_class: Mapping[str, Mapping[str, Any]] = metrics.get("per_class") or {}
    told = {label: row for label, row in per_class.items() if row.get("mean_probability") is not None}
    rows = sum(row["support"] for row in told.values())
    shares = [(label, row["support"] / max(rows, 1), row["mean_probability"]) for label, row in told.items()]
    return {"values": values, "bins": bins, "shares": shares, "uri": figures.reliability_uri(bins)}


def _tokens(facts: RunFacts) -> tuple[list[dict[str, Any]], list[str]]:
    """Kept tokens over frames of a few clips that were read rightly, with the sentences for what is missing."""
    from deepmsi.report.tokens import kept_tokens

    stages, reason = kept_tokens(facts)
    strips = []
    for clip in stages:
        pictures = [{"caption": "frame", "uri": figures.image_uri(figures.frame_pixels(clip.frame))}]
        for block, kept in clip.blocks:
            share = f"{int(kept.sum())} of {kept.size} tokens"
            pictures.append(
                {
                    "caption": f"{block}: {share}",
                    "uri": figures.image_uri(figures.tokens_over_frame(clip.frame, kept)),
                }
            )
        strips.append({"id": clip.id, "label": clip.label, "predicted": clip.predicted, "pictures": pictures})
    return strips, [reason] if reason else []


def _embeddings(facts: RunFacts) -> tuple[dict[str, Any] | None, str | None]:
    from deepmsi.report.embeddings import embedding_map

    found, reason = embedding_map(facts)
    if found is None:
        return None, reason
    known = (facts.metrics or {}).get("labels") or ()
    marks = figures.class_marks([name for name in dict.fromkeys([*known, *found.labels]) if name in found.labels])
    uri = figures.scatter_uri(found.points, found.labels, found.right, marks)
    return {"uri": uri, "marks": marks, "n": len(found.labels), "of": found.of, "trained": found.trained}, None


def _errors(facts: RunFacts) -> list[dict[str, Any]]:
    rows = {row.id: i for i, row in enumerate(facts.data.rows)} if facts.data is not None else {}
    return [_error(facts, scored, rows.get(scored.id)) for scored in worst_errors(facts.predictions)]


def _error(facts: RunFacts, scored: ScoredRow, i: int | None) -> dict[str, Any]:
    uri, text = None, None
    if facts.data is not None and i is not None:
        text = facts.data.rows[i].text
        frames = facts.data.frames(i)
        if frames is not None:
            uri = figures.image_uri(figures.frame_pixels(frames[len(frames) // 2]))
    return {
        "id": scored.id,
        "label": scored.label,
        "predicted": scored.predicted,
        "confidence": scored.probabilities.get(scored.predicted),
        "truth": scored.probabilities.get(scored.label),
        "text": text,
        "uri": uri,
    }


def _paper(facts: RunFacts) -> dict[str, Any] | None:
    """The paper's tables beside this run's figures, where the label set is MELD's or IEMOCAP's."""
    metrics = facts.metrics
    published = published_for(metrics["labels"]) if metrics and "labels" in metrics else None
    if metrics is None or published is None:
        return None
    per_class: Mapping[str, Mapping[str, float]] = metrics.get("per_class") or {}
    mine = {canonical_label(published.dataset, label): row for label, row in per_class.items()}
    own: list[Sequence[float]] = [
        (100 * mine[label]["recall"], 100 * mine[label]["f1"]) for label in published.table.labels if label in mine
    ]
    own.append((100 * metrics["accuracy"], 100 * metrics["weighted_f1"]))
    beside = facts.ablations[0] if facts.ablations else Ablation(False, [])
    return {
        "dataset": published.dataset,
        "title": published.table.title,
        "columns": published.table.columns,
        "rows": published.table.rows,
        "own": own,
        "ablation": _table_3(beside, published.ablation),
        "retrained": beside.retrained,
        "note": published.table.note,
        "protocol": PROTOCOL,
    }


def _table_3(ablation: Ablation, published: Sequence[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """The rows of Table 3, and those that the paper leaves out, with an ablation of this run beside them."""
    printed = {name: (accuracy, f1) for name, accuracy, f1 in published}
    own = {name: (100 * line["accuracy"], 100 * line["weighted_f1"]) for name, line in ablation.lines}
    none = (None, None)
    return [{"name": name, "published": printed.get(name, none), "own": own.get(name, none)} for name in SUBSETS]
