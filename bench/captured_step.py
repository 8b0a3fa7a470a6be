"""A whole training step as one CUDA graph, beside the same step as it is: what `bench_step.py` times.

A captured whole step is here and not in the trainer: it wants an optimizer that keeps its step count on the device,
every batch of one size, and nothing read on the host, so no clipping that looks at a norm, no accumulation and no
second process. It has not run on a GPU yet.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from deepmsi import DeepMSI, DeepMSIConfig
from deepmsi.models.graphs import WARMUP

Batch = dict[str, Tensor]


class Step:
    """Forward, loss, backward and optimizer of a model, as they are."""

    def __init__(self, model: DeepMSI) -> None:
        self.model = model.train()
        device = next(model.parameters()).device
        self.kind = device.type
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=self.kind == "cuda")

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
