"""Which tokens of a frame the model kept, block by block (the paper's Figure 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepmsi.errors import UserError
from deepmsi.report.collect import RunFacts, ScoredRow

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI

MOST_CLIPS = 4


@dataclass(frozen=True)
class ClipTokens:
    """One clip's middle frame and what each compressing block left of it.

    Attributes:
        frame: [3, S, S] uint8, as the model reads it.
        blocks: (name of the block, kept [h, w] bool over its stage's grid), in the order of the network.
    """

    id: str
    label: str
    predicted: str
    frame: NDArray[np.uint8]
    blocks: list[tuple[str, NDArray[np.bool_]]]


def kept_tokens(facts: RunFacts) -> tuple[list[ClipTokens], str | None]:
    """Run the model of a run over `MOST_CLIPS` of its scored clips and read what its compressing blocks kept.

    The most confident right one of each class comes first.

    Returns:
        the clips, and the reason where there are none; without prepared data, which the page names once, no reason.
    """
    if facts.data is None:
        return [], None
    from deepmsi.models.predict import load_run
    from deepmsi.train.dataset import UtteranceDataset

    place = {row.id: i for i, row in enumerate(facts.data.rows) if row.has_video}
    chosen = choose_clips([row for row in facts.predictions if row.id in place])
    if not chosen:
        return [], "kept tokens need scored clips with a video, and the run has none"
    try:
        model = load_run(facts.path)
        if model.video is None or model.video.guide_dim is None:
            return [], "the model of the run compresses no tokens, so that there are none to draw"
        dataset = UtteranceDataset(facts.data, [place[row.id] for row in chosen], [-1] * len(chosen), model.config)
        examples = [dataset[i] for i in range(len(chosen))]
        kept = _run(model, examples)
    except UserError as error:
        return [], f"kept tokens cannot be drawn: {error}"
    clips = []
    for row, example, blocks in zip(chosen, examples, kept, strict=True):
        assert example.frames is not None  # only rows with video were chosen
        frame = example.frames[len(example.frames) // 2].numpy()
        clips.append(ClipTokens(row.id, row.label, row.predicted, frame, blocks))
    return clips, None


def choose_clips(predictions: Sequence[ScoredRow]) -> list[ScoredRow]:
    """Pick the most confident right row of each class, classes in the order of that confidence, then others."""
    ordered = sorted(predictions, key=lambda row: (not row.right, -row.confidence, row.id))
    firsts = list({row.label: row for row in reversed(ordered) if row.right}.values())
    firsts.sort(key=ordered.index)
    return [*firsts, *(row for row in ordered if row not in firsts)][:MOST_CLIPS]


def _run(model: "DeepMSI", examples: Sequence[Any]) -> list[list[tuple[str, NDArray[np.bool_]]]]:
    """Return, for the middle frame of each example, (block, kept [h, w] bool) of every compressing block.

    The model is in eval mode.
    """
    import torch

    from deepmsi.train.dataset import Collator

    device = next(model.parameters()).device
    batch = Collator(model.config, model.text_processor, model.audio_processor, with_labels=False)(examples)
    with torch.inference_mode():
        out = model(**{name: tensor.to(device) for name, tensor in batch.items()}, return_kept=True)
    steps = batch["pixel_values"].shape[1]
    result = []
    for clip in range(len(examples)):
        frame = clip * steps + steps // 2
        masks = []
        for block in out.kept or ():
            begin, end = block.cu_seqlens[frame].item(), block.cu_seqlens[frame + 1].item()
            mask = np.zeros(block.grid, bool)
            mask.reshape(-1)[block.positions[begin:end].cpu().numpy()] = True
            masks.append((_spoken(block.block), mask))
        result.append(masks)
    return result


def _spoken(block: str) -> str:
    """`layers.2.blocks.0` is block 1 of stage 3 to a reader."""
    _, stage, _, number = block.split(".")
    return f"stage {int(stage) + 1}, block {int(number) + 1}"
