"""The whole model at 16 utterances of 15 frames in bfloat16: its training step, its inference, and the step's memory.

Sides: `eager` is the same model as it is, `video branch` its step with the video branch alone captured; ours is one
CUDA graph. The memory is that of a step with AdamW, for each position of `recompute`. Features are given for text and
audio. Without a GPU only the memory runs, small.
"""

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("pydantic")  # the model's configuration

from captured_step import Batch, CapturedStep, Step, batch_of, build

from deepmsi.models.graphs import CapturedInference, VideoGraphs, why_not_inference, why_not_training
from deepmsi.nn.recompute import Recompute

NOTE = "A graph holds its memory between calls, too: its peak shows what comes on top alone."


def case_of(utterances: int, preset: str, kind: str) -> dict[str, str]:
    """Return what tells a measurement apart from others of the model."""
    return {"op": "DeepMSI", "case": f"{utterances} utterance{'s' * (utterances > 1)}, {preset}, {kind}"}


def bench_captured_step(compare: Any, smallest: bool, device: str) -> None:
    preset, utterances = ("small", 2) if smallest else ("released", 16)
    first = build(preset)
    if (reason := why_not_training(first, torch.device(device))) is not None:
        pytest.skip(reason)
    batches = [batch_of(first, utterances, seed, device) for seed in (1, 2, 3)]
    models = {name: copy.deepcopy(first).to(device) for name in ("eager", "video branch")}
    branch = models["video branch"].video
    assert branch is not None
    branch.graphs = VideoGraphs(branch)
    whole = CapturedStep(first.to(device), batches[0])
    steps = {name: Step(model) for name, model in models.items()}
    for batch in batches:
        loss = whole(batch).clone()
        for step in steps.values():
            torch.testing.assert_close(loss, step(batch), rtol=2e-2, atol=2e-2)
    compare(
        lambda: whole(batches[0]),
        {name.replace(" ", "_"): lambda step=step: step(batches[0]) for name, step in steps.items()},
        rounds=15,
        dtype=torch.bfloat16,
        direction="training_step",
        note=NOTE,
        **case_of(utterances, preset, "autocast, with AdamW, one graph"),
    )


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("utterances", [1, 16])
def bench_captured_inference(compare: Any, smallest: bool, device: str, utterances: int, narrow: bool) -> None:
    if smallest and utterances > 1:
        pytest.skip("only the smallest size was asked for")
    preset = "small" if smallest else "released"
    model = build(preset).to(device, torch.bfloat16 if narrow else torch.float32).eval()
    if (reason := why_not_inference(model, torch.device(device))) is not None:
        pytest.skip(reason)
    batch = batch_of(model, utterances, 4, device)
    del batch["labels"]
    if narrow:
        batch = {name: x.bfloat16() if x.is_floating_point() else x for name, x in batch.items()}
    captured = CapturedInference(model)

    def run(function: Any) -> Any:
        # Neither side keeps copies of weights in fewer bits from one call to the next.
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, not narrow, cache_enabled=False):
            return function(**batch)

    torch.testing.assert_close(run(captured), run(model).logits, rtol=2e-2, atol=2e-2)
    compare(
        lambda: run(captured),
        {"eager": lambda: run(model)},
        rounds=15,
        dtype=torch.bfloat16,
        direction="forward",
        note=NOTE,
        **case_of(utterances, preset, f"{'bfloat16 weights' if narrow else 'autocast'}, one graph"),
    )


@pytest.mark.parametrize("recompute", get_args(Recompute))
def bench_step_memory(compare: Any, smallest: bool, device: str, recompute: str) -> None:
    if device == "cpu" and not smallest:
        pytest.skip("sixteen utterances are for a GPU, whose memory they tell of")
    preset, utterances = ("small", 2) if smallest else ("released", 16)
    model = build(preset, recompute).to(device)
    step, batch = Step(model), batch_of(model, utterances, 1, device)
    with_gradients(step, batch)
    compare(
        lambda: with_gradients(step, batch),
        {},
        rounds=3,
        dtype=torch.bfloat16,
        direction="training_step",
        held_bytes=bytes_of(model.state_dict(), step.optimizer.state_dict()["state"], batch),
        **case_of(utterances, preset, f"autocast, with AdamW, recompute={recompute}"),
    )


def with_gradients(step: Step, batch: Batch) -> None:
    """Take a step and drop its gradients, so that what is held between two steps are weights, moments and the batch."""
    step(batch)
    step.optimizer.zero_grad(set_to_none=True)


def bytes_of(*held: Any) -> int:
    """Count tensors themselves: what is allocated holds those of the clock, too, which overwrites the cache."""
    return sum(leaf.nbytes for leaf in tree_leaves(held) if isinstance(leaf, Tensor))
