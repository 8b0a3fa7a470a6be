"""Several runs side by side: their scores with the protocols, seeds summed up, and differences in pairs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepmsi.errors import UserError
from deepmsi.report.collect import RunFacts, collect, read_metrics
from deepmsi.report.render import write_both
from deepmsi.report.text import NAMES, grouped_sentences, interval_of, leak_of
from deepmsi.train.metrics import compare_predictions, summarize_folds
from deepmsi.train.record import METRICS


def report_comparison(runs: Sequence[str | os.PathLike[str]]) -> Path:
    """Write `comparison.html` and `comparison.md` of several runs into the folder of the first.

    Args:
        runs: run directories; the first is what the others are compared with.

    Returns:
        the path of the page.

    Raises:
        UserError: fewer than two runs, or one that has no scores.
    """
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise UserError("a comparison needs two runs or more")
    facts = [collect(folder) for folder in folders]
    for each in facts:
        if each.metrics is None or "accuracy" not in each.metrics:
            raise UserError(f"{each.path} has no scores to compare: its training has not ended")
    return write_both(folders[0] / "comparison.html", "comparison", _context(facts))


def measured(scored: Path) -> dict[str, Any]:
    """How `metrics.json` beside the predictions says that they were made; empty where there is none."""
    metrics = read_metrics((scored if scored.is_dir() else scored.parent) / METRICS, []) or {}
    return {key: metrics[key] for key in ("protocol", "context", "modalities", "split") if key in metrics}


def _context(facts: Sequence[RunFacts]) -> dict[str, Any]:
    rows = [_row(each) for each in facts]
    seeds = {each.made.get("seed") for each in facts}
    alike = all(_bare(each) == _bare(facts[0]) for each in facts)
    metrics = [each.metrics for each in facts if each.metrics is not None]
    over_seeds = summarize_folds(metrics) if alike and len(seeds) == len(facts) else {}
    pairs = []
    for each in facts[1:]:
        try:
            pairs.append(_pair(facts[0].path, each.path))
        except UserError as error:
            pairs.append({"name": str(each.path), "problem": str(error)})
    found = [pair for pair in pairs if not pair["problem"]]
    for pair, p in zip(found, _holm([pair["mcnemar_p"] for pair in found]), strict=True):
        pair["holm_p"] = p
    return {
        "rows": rows,
        "several": len(found) > 1,
        "first": str(facts[0].path),
        "names": NAMES,
        "over_seeds": [{"name": NAMES[key], **over_seeds[key]} for key in NAMES if key in over_seeds],
        "pairs": pairs,
        "mixed": len({(row["protocol"], row["n"]) for row in rows}) > 1,
        "leaks": [(row["name"], row["leaks"]) for row in rows if row["leaks"]],
    }


def _holm(p_values: Sequence[float]) -> list[float]:
    """P-values that hold for all of several tests together (Holm, 1979)."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def _row(facts: RunFacts) -> dict[str, Any]:
    metrics = facts.metrics or {}
    return {
        "name": str(facts.path),
        "recipe": facts.recipe.get("name") or "",
        "seed": facts.made.get("seed"),
        "protocol": metrics.get("protocol") or facts.made.get("protocol") or "not told",
        "leaks": leak_of(metrics),
        "context": metrics.get("context") or 0,
        "complete": metrics.get("complete", True),
        "n": metrics.get("n"),
        "scores": [{"value": metrics.get(key), "interval": interval_of(metrics, key)} for key in NAMES],
        "over_folds": [(metrics.get("over_folds") or {}).get(key) for key in NAMES],
        "seconds": facts.made.get("seconds"),
    }


def _bare(facts: RunFacts) -> dict[str, Any]:
    """A recipe and its data without the seed and the words."""
    data = facts.made.get("data") or {}
    plain = {key: value for key, value in facts.recipe.items() if key not in ("seed", "name", "description")}
    return {**plain, "fingerprint": data.get("fingerprint")}


def _pair(a: Path, b: Path) -> dict[str, Any]:
    found = compare_predictions(a, b)
    scores = [found[key] for key in NAMES]
    return {
        "name": str(b),
        "problem": None,
        "scores": scores,
        "grouped": grouped_sentences(found, signed=True),
        **{key: found[key] for key in ("n", "only_a", "only_b", "mcnemar_p")},
    }
