"""A training step of the video branch that begins at the first compression, since a frozen stem's output was kept.

Sides: `frozen` computes the stem in every step, and `learning` trains it, too; both start from normalised frames. No
side reads a disk.
"""

import copy
from typing import Any

import pytest
import torch
from bench_model import agree, backbones, cast, step_of

from deepmsi import testing


@pytest.mark.parametrize(
    ("utterances", "narrow"), [(16, True), (1, False), (1, True)], ids=["16-bfloat16", "1", "1-bfloat16"]
)
def bench_frozen_stem(compare: Any, smallest: bool, device: str, utterances: int, narrow: bool) -> None:
    if smallest and utterances > 1:
        pytest.skip("only the smallest size was asked for")
    if device == "cpu" and utterances > 1:
        pytest.skip("a CPU is measured on one utterance: sixteen are for a GPU")
    frames = 1 if smallest else 15 * utterances
    _, learning = backbones("released", device)
    frozen = copy.deepcopy(learning).freeze_stem()
    x = testing.randn(frames, 3, 256, 256, seed=1, device=device)
    guide = testing.randn(frames, learning.guide_dim, seed=2, device=device)
    with torch.no_grad():
        kept = cast(narrow, device, lambda: frozen.stem(x))().to(torch.bfloat16 if narrow else torch.float32)
    sides = {
        "kept": (frozen, lambda: frozen.guided(kept, guide)),
        "frozen": (frozen, lambda: frozen(x, guide)),
        "learning": (learning, lambda: learning(x, guide)),
    }
    found = {name: cast(narrow, device, forward) for name, (_, forward) in sides.items()}
    with torch.no_grad():
        agree(found["kept"](), found["frozen"]())
    steps = {name: step_of(module, found[name]) for name, (module, _) in sides.items()}
    compare(
        steps.pop("kept"),
        steps,
        rounds=5,
        dtype=torch.bfloat16 if narrow else torch.float32,
        op="VSCSwin",
        case=f"{frames} frames, released, output of a frozen stem{', bfloat16 autocast' if narrow else ''}",
        direction="training_step",
    )
