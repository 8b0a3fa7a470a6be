"""Results as plain text: tables for a terminal, CSV and subtitles for a timeline."""

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from deepmsi.train.record import label_columns, predictions_table

if TYPE_CHECKING:
    from deepmsi.models.predict import Prediction
    from deepmsi.train.predict import RowPrediction

NAMES = {"accuracy": "accuracy", "uar": "UAR", "weighted_f1": "weighted F1", "macro_f1": "macro F1"}
PROBABILITIES = {"log_loss": "log loss", "brier": "Brier score", "ece": "ECE"}


def interval_of(metrics: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """The 95% interval of a score: Wilson's for the accuracy where it is there, else the bootstrap's."""
    intervals = metrics.get("intervals") or {}
    pair = (intervals.get("accuracy_wilson") if name == "accuracy" else None) or intervals.get(name)
    return (float(pair[0]), float(pair[1])) if pair else None


def grouped_of(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What `intervals_by` holds, each grouping in words: ("24 speakers", {"accuracy": [low, high], ...})."""
    found = metrics.get("intervals_by") or {}
    return [(f"{by['groups']} {name}{'s' * (by['groups'] > 1)}", by) for name, by in found.items()]


def grouped_sentences(metrics: Mapping[str, Any], signed: bool = False) -> list[str]:
    """The intervals over groups, a line for each grouping."""
    form = "{:+.3f} to {:+.3f}" if signed else "{:.3f} to {:.3f}"
    lines = []
    for words, by in grouped_of(metrics):
        told = ", ".join(f"{name} {form.format(*by[key])}" for key, name in NAMES.items() if by.get(key))
        unnamed = by.get("unnamed")
        why = "it takes two" if not unnamed else f"{unnamed} row{'s are' if unnamed > 1 else ' is'} of none"
        lines.append(f"over {words}: {told or f'none, {why}'}")
    return lines


def rare_of(metrics: Mapping[str, Any]) -> str:
    """The classes of so few rows that the intervals over rows do not tell how far scores may be off: "fear 4, joy 7".

    Simulated, the 95% interval of UAR holds in 0.67, 0.81 and 0.93 of cases where one class has 3, 5 and 10 rows.
    """
    if not any(interval_of(metrics, name) for name in NAMES if name != "accuracy"):
        return ""
    repeats = metrics.get("repeats") or 1  # what is counted is counted over all of them
    rows = {label: row["support"] // repeats for label, row in (metrics.get("per_class") or {}).items()}
    return ", ".join(f"{label} {count}" for label, count in rows.items() if 0 < count < 10)


def leak_of(metrics: Mapping[str, Any]) -> str | None:
    """What leaks, in the words of the protocol; None where nothing is known to leak."""
    if not metrics.get("leaks"):
        return None
    return str(metrics.get("protocol", "")).partition("(leaks: ")[2].rstrip(")") or "not told how"


def context_of(metrics: Mapping[str, Any]) -> str:
    """How many previous utterances the text encoder read with each, in words."""
    count = metrics.get("context") or 0
    return f"{count} previous utterance{'s' * (count > 1)}" if count else "none"


def chance_of(metrics: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy of guessing evenly over the classes of the model, and of always naming the commonest one."""
    support = [int(sum(row)) for row in metrics["confusion_matrix"]]
    return 1 / max(len(support), 1), max(support, default=0) / max(sum(support), 1)


def render_metrics(metrics: Mapping[str, Any]) -> str:
    """Lay out the scores with their intervals and the per-class table, below the protocol they were taken under."""
    lines = [f"{'protocol':<12} {metrics['protocol']}"] if "protocol" in metrics else []
    lines += [f"{'read':<12} {', '.join(metrics['modalities'])}"] if "modalities" in metrics else []
    lines += [f"{'text context':<12} {context_of(metrics)}"] if "context" in metrics else []
    for key, name in NAMES.items():
        if key in metrics:
            interval = interval_of(metrics, key)
            between = f"  (95% interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
            lines.append(f"{name:<12} {metrics[key]:.3f}{between}")
    lines += [f"{'95% interval':<12} {sentence}" for sentence in grouped_sentences(metrics)]
    if rare := rare_of(metrics):
        lines.append(f"{'few rows':<12} {rare}: intervals of UAR and F1 are too narrow")
    if "confusion_matrix" in metrics:
        even, commonest = chance_of(metrics)
        lines.append(f"{'chance':<12} accuracy {even:.3f}, and {commonest:.3f} by always naming the commonest class")
    for key, name in PROBABILITIES.items():
        if metrics.get(key) is not None:
            lines.append(f"{name:<12} {metrics[key]:.3f}")
    per_class: Mapping[str, Mapping[str, float]] = metrics.get("per_class") or {}
    if per_class:
        width = max(len(label) for label in [*per_class, "class"])
        lines += ["", f"{'class':<{width}}  precision  recall     f1      n"]
        for label, row in per_class.items():
            lines.append(
                f"{label:<{width}}  {row['precision']:9.3f}  {row['recall']:6.3f}  {row['f1']:5.3f}"
                f"  {row['support']:5d}"
            )
    return "\n".join(lines) + "\n"


def render_comparison(a: str, b: str, comparison: Mapping[str, Any]) -> str:
    """Lay out what `compare_predictions` found, B against A, and how each was measured where `measured` tells it."""
    lines = []
    for key, run in zip("AB", (a, b), strict=True):
        told = comparison.get("measured", {}).get(key.lower()) or {}
        lines.append(f"{key}: {run}" + (f", {told['protocol']}" if told.get("protocol") else ""))
        lines[-1] += f", part {told['split']}" if "split" in told else ""
        lines[-1] += f", read: {', '.join(told['modalities'])}" if "modalities" in told else ""
        lines[-1] += f", text context: {context_of(told)}" if "context" in told else ""
    lines += [f"{comparison['n']} rows that both predicted", ""]
    lines.append(f"{'':<12}     A      B   B - A  (95% interval, paired bootstrap)")
    for key, name in NAMES.items():
        row = comparison[key]
        low, high = row["interval"]
        lines.append(
            f"{name:<12} {row['a']:.3f}  {row['b']:.3f}  {row['difference']:+.3f}  ({low:+.3f} to {high:+.3f})"
        )
    lines += grouped_sentences(comparison, signed=True)
    lines += [
        "",
        f"right in A alone {comparison['only_a']}, in B alone {comparison['only_b']}; "
        f"McNemar's exact test p = {comparison['mcnemar_p']:.3g}",
        "It takes rows as independent, and neither it nor an interval covers the variation between trainings.",
    ]
    return "\n".join(lines) + "\n"


def render_predictions(predictions: Sequence["Prediction"]) -> str:
    """One line a clip, or a text that stands alone: the label, and the three likeliest with their probabilities."""
    lines = []
    for item in predictions:
        ranked = sorted(item.probabilities.items(), key=lambda pair: -pair[1])[:3]
        likeliest = ", ".join(f"{label} {value:.2f}" for label, value in ranked)
        name = " ".join((item.text or "").split()) if item.clip is None else item.clip
        lines.append(f"{name}: {item.label} ({likeliest})")
    return "\n".join(lines) + "\n"


def render_clips(predictions: Sequence["Prediction"]) -> str:
    """CSV: clip and text, of which one may be empty, label, and a probability column per label."""
    labels = list(predictions[0].probabilities) if predictions else []
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(label_columns(("clip", "text", "label"), labels))
    for item in predictions:
        probabilities = (f"{item.probabilities[label]:.6f}" for label in labels)
        writer.writerow([item.clip, item.text, item.label, *probabilities])
    return table.getvalue()


def render_rows(predictions: Sequence["RowPrediction"]) -> str:
    """CSV as `predictions.csv` has it: id, label, predicted, and a probability column per label."""
    labels = list(predictions[0].probabilities) if predictions else []
    table = [
        [row.id, row.label or "", row.predicted, *(f"{value:.6f}" for value in row.probabilities.values())]
        for row in predictions
    ]
    return predictions_table(table, labels)


def render_timeline(predictions: Sequence["Prediction"]) -> str:
    """CSV: the clip where there are several, start, end (seconds), label, and a probability column per label.

    The cells from the label on are empty in a window without one.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    labels = next((list(item.probabilities) for item in predictions if item.probabilities), [])
    several = len({item.clip for item in predictions}) > 1
    own = ("clip", "start", "end", "label")
    writer.writerow(label_columns(own if several else own[1:], labels))
    for item in predictions:
        writer.writerow(
            [
                *([item.clip] if several else []),
                f"{item.start:.3f}",
                f"{item.end or 0:.3f}",
                item.label,
                *(f"{item.probabilities[label]:.4f}" if item.probabilities else "" for label in labels),
            ]
        )
    return table.getvalue()


def _timestamp(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def render_subtitles(predictions: Sequence["Prediction"], web: bool = False) -> str:
    """SubRip subtitles, or WebVTT: the label and its probability, one cue a window that has a label."""
    point = "." if web else ","
    labelled = [(item, item.label) for item in predictions if item.label is not None]
    cues = [
        f"{number}\n{_timestamp(item.start, point)} --> {_timestamp(item.end or 0, point)}\n"
        f"{escape(label, quote=False) if web else label} {item.probabilities[label]:.0%}\n"
        for number, (item, label) in enumerate(labelled, 1)
    ]
    return "\n".join(["WEBVTT\n", *cues] if web else cues)
