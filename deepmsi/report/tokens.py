"""Which tokens of a frame the model kept, block by block (the paper's Figure 4)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepmsi.report.collect import RunFacts


@dataclass(frozen=True)
class ClipTokens:
    """One clip's middle frame and what each compressing block left of it.

    Attributes:
        frame: [3, S, S] uint8.
        blocks: (name of the block, kept [h, w] bool over the stage's grid), in the order of the network.
    """

    id: str
    label: str
    predicted: str
    frame: NDArray[np.uint8]
    blocks: list[tuple[str, NDArray[np.bool_]]]


def kept_tokens(facts: RunFacts) -> tuple[list[ClipTokens], str | None]:
    return [], "kept"
