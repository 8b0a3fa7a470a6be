"""A map of the fused embeddings of scored utterances, in two dimensions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepmsi.errors import UserError
from deepmsi.report.collect import RunFacts

MOST_ROWS = 800
FEWEST_ROWS = 8


@dataclass(frozen=True)
class EmbeddingMap:
    """Where t-SNE puts each utterance.

    Attributes:
        points: [n, 2].
        labels: the true class of each.
        right: [n] bool, whether the run's prediction was right.
        of: rows that were scored, of which these are an even choice.
        trained: whether the model that was asked had trained on them.
    """

    points: NDArray[np.float64]
    labels: list[str]
    right: NDArray[np.bool_]
    of: int
    trained: bool


def embedding_map(facts: RunFacts) -> tuple[EmbeddingMap | None, str | None]:
    """Run the kept model over scored rows and lay its fused embeddings out by t-SNE.

    The fused embedding is what the classifier reads: the projections of video, text and audio, side by side.

    Of more rows than `MOST_ROWS` as many are chosen, evenly.

    Returns:
        the map, or None and the reason why there is none; without prepared data, which the page names once, no reason.
    """
    if facts.data is None:
        return None, None
    from sklearn.manifold import TSNE

    from deepmsi.models.predict import load_run

    place = {row.id: i for i, row in enumerate(facts.data.rows)}
    scored = list({row.id: row for row in facts.predictions if row.id in place}.values())
    if len(scored) < FEWEST_ROWS:
        return None, f"a map of the embeddings needs {FEWEST_ROWS} scored rows, and {len(scored)} are there"
    chosen = [scored[i] for i in np.unique(np.linspace(0, len(scored) - 1, min(MOST_ROWS, len(scored))).astype(int))]
    try:
        model = load_run(facts.path)
        fused = _fused(model, facts.data, [place[row.id] for row in chosen])
    except UserError as error:
        return None, f"the map of the embeddings cannot be drawn: {error}"
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(fused)
    trained = set(facts.made.get("trained_ids") or ())
    return EmbeddingMap(
        points.astype(np.float64),
        [row.label for row in chosen],
        np.array([row.right for row in chosen]),
        len(scored),
        any(row.id in trained for row in chosen),
    ), None


def _fused(model: Any, data: Any, rows: list[int]) -> NDArray[np.float32]:
    """The projections that the classifier reads, [n, D] float32."""
    import torch
    from torch.utils.data import DataLoader

    from deepmsi.models.precision import inferring
    from deepmsi.train.dataset import Collator, UtteranceDataset, check_data

    check_data(data, model.config)
    dataset = UtteranceDataset(data, rows, [-1] * len(rows), model.config)
    collate = Collator(model.config, model.text_processor, model.audio_processor, with_labels=False)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=16, collate_fn=collate)
    device = next(model.parameters()).device
    parts = []
    with inferring(model):
        for batch in loader:
            out = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            there = [part.float() for part in (out.video, out.text, out.audio) if part is not None]
            parts.append(torch.cat(there, 1).cpu())
    fused: NDArray[np.float32] = torch.cat(parts).numpy()
    return fused
