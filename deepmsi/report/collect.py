"""Gather what a run directory holds, and say what it lacks: a report is made of whatever is there."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from deepmsi.errors import UserError
from deepmsi.models.config import explain_validation
from deepmsi.report.paper import SUBSETS
from deepmsi.train.ablate import ABLATION, RETRAINED, TABLE
from deepmsi.train.intervals import SUMMARY
from deepmsi.train.metrics import Scores
from deepmsi.train.record import HISTORY, METRICS, PREDICTIONS, RECIPE, RUN, check_format, label_of_column

if TYPE_CHECKING:
    from deepmsi.data.store import PreparedData

MODALITY_LETTERS = {"text": "T", "audio": "A", "video": "V"}


@dataclass(frozen=True)
class ScoredRow:
    """One line of predictions.csv."""

    id: str
    label: str
    predicted: str
    probabilities: Mapping[str, float]

    @property
    def right(self) -> bool:
        return self.label == self.predicted

    @property
    def confidence(self) -> float:
        """Probability of the predicted label; 0 where the file does not tell."""
        return self.probabilities.get(self.predicted, 0.0)


@dataclass(frozen=True)
class Ablation:
    """One table of `deepmsi ablate`.

    Attributes:
        retrained: whether a model was trained for each line.
        lines: what the model had ("T+A", "without VSC") and the metrics measured with it, in the order of Table 3.
    """

    retrained: bool
    lines: list[tuple[str, dict[str, Any]]]


@dataclass
class RunFacts:
    """What a run directory told.

    Attributes:
        path: the run directory.
        made: run.json.
        recipe: recipe.yaml.
        history: the events of history.jsonl, and those of the folds with their name as `fold`.
        metrics: metrics.json, or None.
        predictions: the labelled rows of predictions.csv.
        ablations: the tables that are there, of each kind one at most, the retrained one first.
        data: the prepared data of the run, where it is still there.
        missing: one sentence per part that is not there.
    """

    path: Path
    made: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] | None = None
    predictions: list[ScoredRow] = field(default_factory=list)
    ablations: list[Ablation] = field(default_factory=list)
    data: "PreparedData | None" = None
    missing: list[str] = field(default_factory=list)

    def series(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """Arrange the history as {quantity: {split: [(epoch or step, value), ...]}}."""
        table: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for event in self.history:
            split = str(event.get("split", "train"))
            fold = event.get("fold")
            name = split if fold is None else f"{split}, fold {fold}"
            at = event.get("epoch", event.get("step"))
            if at is None or not _is_number(at):
                continue
            for key, value in event.items():
                if key not in ("step", "epoch", "split", "fold", "time", "seconds") and _is_number(value):
                    table.setdefault(key, {}).setdefault(name, []).append((float(at), float(value)))
        return table


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def collect(run: Path) -> RunFacts:
    """Read a run directory.

    Raises:
        UserError: there is no such directory, nothing in it is a run's, or another version of deepmsi wrote it.
    """
    if not run.is_dir():
        raise UserError(f"there is no run folder at {run}; `deepmsi train` writes one")
    facts = RunFacts(run)
    facts.made = _read_json(run / RUN, facts.missing) or {}
    if facts.made:
        check_format(run / RUN, facts.made)
    facts.recipe = _read_yaml(run / RECIPE, facts.missing)
    facts.history = _read_history(run, facts.missing)
    facts.metrics = read_metrics(run / METRICS, facts.missing)
    facts.predictions = _read_predictions(run / PREDICTIONS, facts.missing)
    if not (facts.made or facts.recipe or facts.history or facts.metrics or facts.predictions):
        raise UserError(f"{run} holds no run: neither {RUN} nor {METRICS} nor a history is in it")
    facts.ablations = _read_ablations(run)
    facts.data = _open_data(facts)
    return facts


def _read_text(path: Path, missing: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing.append(f"{path.name} is not in the run folder")
    except (OSError, UnicodeDecodeError) as error:
        missing.append(f"{path.name} cannot be read ({error})")
    return None


def _read_json(path: Path, missing: list[str]) -> dict[str, Any] | None:
    text = _read_text(path, missing)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        missing.append(f"{path.name} is not JSON ({error})")
        return None
    if not isinstance(value, dict):
        missing.append(f"{path.name} holds no JSON object")
        return None
    return value


def read_metrics(path: Path, missing: list[str]) -> dict[str, Any] | None:
    """Read a `metrics.json`; None of one that is absent or damaged, with a sentence in `missing`."""
    value = _read_json(path, missing)
    if value is not None and (problem := _problem_of(value)):
        missing.append(f"{path.name} is damaged ({problem})")
        return None
    return value


def _problem_of(metrics: Mapping[str, Any]) -> str | None:
    try:
        # Before the first fold is done there are no scores yet.
        Scores.model_validate({**dict.fromkeys(SUMMARY, 0.0), **metrics})
    except ValidationError as error:
        return explain_validation(Scores, error).rstrip(".")
    return None


def _read_yaml(path: Path, missing: list[str]) -> dict[str, Any]:
    import yaml

    text = _read_text(path, missing)
    try:
        value = yaml.safe_load(text) if text is not None else {}
    except yaml.YAMLError:
        missing.append(f"{path.name} is not YAML")
        return {}
    return value if isinstance(value, dict) else {}


def _read_history(run: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Read the events of every fold, and those of the kept model's fit where it was watched or there are no folds."""
    folds = sorted(run.glob(f"folds/*/{HISTORY}"))
    events = [event | {"fold": path.parent.name} for path in folds for event in _read_lines(path, missing)]
    if not folds or (run / HISTORY).is_file():
        events += _read_lines(run / HISTORY, missing)
    return events


def _read_lines(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    events = []
    for line in (_read_text(path, missing) or "").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _read_predictions(path: Path, missing: list[str]) -> list[ScoredRow]:
    text = _read_text(path, missing)
    if text is None:
        return []
    reader = csv.DictReader(text.splitlines())
    fixed = {"id", "label", "predicted"}
    if not fixed <= set(reader.fieldnames or ()):
        missing.append(f"{path.name} lacks one of the columns id, label, predicted")
        return []
    rows = []
    for cells in reader:
        if cells["label"] and cells["predicted"]:
            probabilities = {
                label_of_column(name): value
                for name, cell in cells.items()
                if name is not None and name not in fixed and (value := _probability(cell)) is not None
            }
            rows.append(ScoredRow(cells["id"], cells["label"], cells["predicted"], probabilities))
    return rows


def _probability(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if 0 <= value <= 1 else None


def _read_ablations(run: Path) -> list[Ablation]:
    """Read the tables of `deepmsi ablate`; without one of the kept model, its evaluations in RUN/ablation."""
    tables: dict[bool, Ablation] = {}
    for folder in (run / ABLATION, run / ABLATION / RETRAINED):  # the first held the table of either kind once
        table = _read_json(folder / TABLE, []) or {}
        lines = table.get("lines")
        named = [
            (_letters(str(line["name"]).split("+")) or str(line["name"]), line)
            for line in (lines if isinstance(lines, list) else ())
            if isinstance(line, dict) and "name" in line and _problem_of(line) is None
        ]
        if named:
            retrained = table.get("mode") == "retrain"
            tables[retrained] = Ablation(retrained, _in_order(named))
    if False not in tables:
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(run.glob(f"{ABLATION}/*/{METRICS}")):
            metrics = read_metrics(path, [])
            used = (metrics or {}).get("modalities")
            if metrics is not None and isinstance(used, list) and used:
                found[_letters(used)] = metrics
        if found:
            tables[False] = Ablation(False, _in_order(found.items()))
    return [tables[retrained] for retrained in (True, False) if retrained in tables]


def _in_order(lines: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The subsets of the modalities as Table 3 has them, then the lines that leave out parts of the model."""
    return sorted(lines, key=lambda line: SUBSETS.index(line[0]) if line[0] in SUBSETS else len(SUBSETS))


def _letters(modalities: Sequence[str]) -> str:
    """`T+A` of text and audio; empty where a name is no modality."""
    if not set(modalities) <= set(MODALITY_LETTERS):
        return ""
    return "+".join(letter for name, letter in MODALITY_LETTERS.items() if name in modalities)


def _open_data(facts: RunFacts) -> "PreparedData | None":
    from deepmsi.data.store import INDEX, PreparedData

    said = facts.made.get("data")
    said = said if isinstance(said, dict) else {}
    # A manifest is prepared inside the run; a prepared folder stays where it was.
    places = [facts.path / "prepared", *([Path(said["path"])] if isinstance(said.get("path"), str) else [])]
    place = next((place for place in places if (place / INDEX).is_file()), None)
    if place is None:
        gone = "the data of the run is no longer where it was" if said else "the folder does not say where its data is"
        facts.missing.append(f"{gone}, so that no frame can be shown")
        return None
    try:
        data = PreparedData.open(place)
    except UserError as error:
        facts.missing.append(f"the prepared data cannot be opened: {error}")
        return None
    if data.fingerprint != said.get("fingerprint"):
        facts.missing.append("the prepared data has changed since the run, so that no frame of it is shown")
        return None
    return data


def speakers_table(facts: RunFacts, most: int = 30) -> list[tuple[str, int, float]]:
    """Count rows and accuracy by speaker, the commonest first; beyond `most` they are summed as "others"."""
    if facts.data is None:
        return []
    speaker = {row.id: row.speaker for row in facts.data.rows}
    groups: dict[str, list[bool]] = {}
    for scored in facts.predictions:
        name = speaker.get(scored.id)
        if name:
            groups.setdefault(name, []).append(scored.right)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    table = [(name, len(hits), sum(hits) / len(hits)) for name, hits in ordered[:most]]
    rest = [hit for _, hits in ordered[most:] for hit in hits]
    if rest:
        table.append((f"{len(ordered) - most} others", len(rest), sum(rest) / len(rest)))
    return table


def worst_errors(predictions: Sequence[ScoredRow], most: int = 8) -> list[ScoredRow]:
    """The wrong predictions that were made with the greatest confidence, one per row."""
    wrong = sorted((row for row in predictions if not row.right), key=lambda row: (-row.confidence, row.id))
    return list({row.id: row for row in reversed(wrong)}.values())[::-1][:most]
