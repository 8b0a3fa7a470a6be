"""A whole training step as one CUDA graph, against the same step as it is and with the video branch alone captured.

`python bench/captured_step.py --utterances 16` times forward, loss, backward and AdamW at the released schedule under
bfloat16 autocast, checks first that all sides take the same step, and prints a JSON document; then one of
inference, of one utterance and of all, as it is and as one graph. It needs a GPU, and has not run on one yet. A
captured whole step is here and not in the trainer: it wants an optimizer that keeps its step count on the device,
every batch of one size, and nothing read on the host, so no clipping that looks at a norm, no accumulation and no
second process.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepmsi import DeepMSI, DeepMSIConfig
from deepmsi.models.graphs import WARMUP, CapturedInference, VideoGraphs, why_not_training

Batch = dict[str, Tensor]


class Step:
    """Forward, loss, backward and optimizer of a model, as they are."""

    def __init__(self, model: DeepMSI) -> None:
        self.model = model.train()
        device = next(model.parameters()).device
        self.kind = device.type
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True, capturable=self.kind == "cuda")

    def __call__(self, batch: Batch) -> Tensor:
        """Take a step; return its loss, which the next one may overwrite."""
        self.optimizer.zero_grad(set_to_none=True)
        return self.run(batch)

    def run(self, batch: Batch) -> Tensor:
        """The step behind the dropping of old gradients: what is captured."""
        # A captured copy of a weight in fewer bits would be read again after the weight has changed.
        with torch.autocast(self.kind, torch.bfloat16, cache_enabled=False):
            loss = self.model(**batch).loss
        assert loss is not None
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class CapturedStep(Step):
    """The same step, captured once and replayed.

    The warm-up takes steps, too; weights and moments are put back behind it, so that the first replay is the first
    step.
    """

    def __init__(self, model: DeepMSI, sample: Batch) -> None:
        super().__init__(model)
        self.held = {name: tensor.clone() for name, tensor in sample.items()}
        weights = copy.deepcopy(model.state_dict())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                super().__call__(self.held)
        torch.cuda.current_stream().wait_stream(side)
        # Gradients are made inside the capture, in its own memory.
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.run(self.held)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(weights[name])
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()

    def __call__(self, batch: Batch) -> Tensor:
        for name, tensor in batch.items():
            self.held[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.loss


def build(preset: str, recompute: str = "none") -> DeepMSI:
    """The model without dropout, so that all sides may take the same step."""
    features: dict[str, Any] = {"encoder": "features"}
    sections: dict[str, Any] = {"vision": {"schedule": "released", "recompute": recompute, "tcn_dropout": 0.0}}
    if preset == "small":
        sections["vision"]["schedule"] = {"keep": [40, 21]}
    torch.manual_seed(0)
    return DeepMSI(
        DeepMSIConfig(num_labels=6, preset=preset, text=features, audio=features, fusion={"dropout": 0.0}, **sections)
    )


def batch_of(model: DeepMSI, utterances: int, seed: int, device: str) -> Batch:
    """Random utterances with everything present."""
    draw = torch.Generator().manual_seed(seed)
    vision = model.config.vision
    shape = (utterances, vision.frames, 3, vision.image_size, vision.image_size)
    batch = {
        "pixel_values": torch.randint(256, shape, generator=draw, dtype=torch.uint8),
        "labels": torch.arange(utterances) % 6,
    }
    for name in ("text", "audio"):
        batch[f"{name}_features"] = torch.randn(utterances, model.missing[name].shape[0], generator=draw)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def inference(model: DeepMSI, utterances: int, turns: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a call on so many utterances, under autocast and with bfloat16 weights, eager and captured."""
    found = {}
    for narrow in (False, True):
        own = copy.deepcopy(model).to(torch.bfloat16 if narrow else torch.float32).eval()
        batch = batch_of(model, utterances, 4, "cuda")
        del batch["labels"]
        for name, tensor in batch.items():
            batch[name] = tensor.bfloat16() if narrow and tensor.is_floating_point() else tensor
        captured = CapturedInference(own)
        if captured.why_not is not None:
            raise RuntimeError(captured.why_not)
        # Neither side keeps copies of weights in fewer bits from one call to the next.
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=not narrow, cache_enabled=False)
        with autocast, torch.inference_mode():
            torch.testing.assert_close(captured(**batch), own(**batch).logits, rtol=2e-2, atol=2e-2)
            kind = "bfloat16 weights" if narrow else "autocast"
            found[f"{kind}, eager"] = milliseconds(lambda held, own=own: own(**held).logits, batch, turns)
            found[f"{kind}, graph"] = milliseconds(lambda held, captured=captured: captured(**held), batch, turns)
    return found


def milliseconds(step: Callable[[Batch], Tensor], batch: Batch, turns: int) -> dict[str, float]:
    """Median, 20th and 80th percentile of a step's time by events on the device."""
    times = []
    for _ in range(turns):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step(batch)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    cut = statistics.quantiles(times, n=5)
    return {"median": statistics.median(times), "p20": cut[0], "p80": cut[3]}


def main() -> int:
    """Check, time, print; 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=16)
    parser.add_argument("--preset", choices=("released", "small"), default="released")
    parser.add_argument("--recompute", choices=("none", "light", "block"), default="none")
    parser.add_argument("--turns", type=int, default=50)
    chosen = parser.parse_args()
    first = build(chosen.preset, chosen.recompute)
    reason = why_not_training(first, torch.device("cuda"))
    if reason is not None:
        print(f"captured_step: {reason}", file=sys.stderr)
        return 2
    models = {name: copy.deepcopy(first).cuda() for name in ("eager", "video branch", "whole step")}
    batches = [batch_of(first, chosen.utterances, seed, "cuda") for seed in (1, 2, 3)]
    branch = models["video branch"].video
    assert branch is not None
    branch.graphs = VideoGraphs(branch)
    steps: dict[str, Step] = {
        "eager": Step(models["eager"]),
        "video branch": Step(models["video branch"]),
        "whole step": CapturedStep(models["whole step"], batches[0]),
    }
    losses = {name: [float(step(batch)) for batch in batches] for name, step in steps.items()}
    for found in losses.values():
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses["eager"]), rtol=2e-2, atol=2e-2)
    found = {name: milliseconds(step, batches[0], chosen.turns) for name, step in steps.items()}
    document = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "utterances": chosen.utterances,
        "preset": chosen.preset,
        "recompute": chosen.recompute,
        "milliseconds": found,
    }
    print(json.dumps(document, indent=1), flush=True)
    del steps, models, branch
    torch.cuda.empty_cache()
    sizes = sorted({1, chosen.utterances})
    print(json.dumps({"inference": {str(n): inference(first.cuda(), n, chosen.turns) for n in sizes}}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
