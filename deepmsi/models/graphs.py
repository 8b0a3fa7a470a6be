"""CUDA graphs: what a launch costs on the host is paid once, where every shape is known beforehand.

In training the video branch (backbone and TCN) is captured, forward and backward; in inference the whole model. All of
this is written against torch's documentation and checked on a CPU as far as that goes (what is captured and what not,
that shapes and operators do not depend on the input): it has not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from deepmsi.nn.constants import HoldsConstants

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI
    from deepmsi.models.vision import VideoBranch

WARMUP = 3
"""Runs before a capture: libraries choose their algorithms in them and allocate what they keep."""

LIMIT = 8
"""Shapes that are captured at most; each holds its inputs, outputs and gradients in GPU memory."""


def why_not_training(
    model: DeepMSI, device: torch.device | None = None, accumulation: int = 1, processes: int = 1
) -> str | None:
    """Return the sentence that says why a training step's video branch is not captured, or None where it can be.

    Args:
        model: the model.
        device: where it trains; None takes the model's.
        accumulation: micro-batches per step.
        processes: over how many a batch is spread.
    """
    if model.video is None:
        return "there is no video branch, and what is left is small"
    reason = _no_device(model, device) or _shapes_vary(model)
    if reason is not None:
        return reason
    recompute, draws = model.video.backbone.recompute, model.config.vision.drop_path > 0
    if recompute == "chunk":
        return "recompute=chunk computes any number of frames piece by piece, for memory and not for speed"
    if recompute == "block" and draws:
        return "recompute=block with drop_path reads the state of the random generator, which a capture forbids"
    if accumulation > 1:
        return "gradients are accumulated, and a captured backward writes them into the same buffers every time"
    if processes > 1:
        return "several processes exchange gradients while backward runs, which a captured one does not let them"
    return None


def why_not_inference(model: DeepMSI, device: torch.device | None = None) -> str | None:
    """Return the sentence that says why the model's inference is not captured, or None where it can be."""
    reason = _no_device(model, device)
    if reason is not None:
        return reason
    for name in ("text", "audio"):
        if getattr(model, f"{name}_encoder") is not None:
            return f"the {name} encoder is part of the model, and its inputs differ in length: give it features"
    return _shapes_vary(model)


def _no_device(model: DeepMSI, device: torch.device | None) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    where = device or next(model.parameters()).device
    return None if where.type == "cuda" else f"the model runs on {where.type}, and only CUDA has graphs"


def _shapes_vary(model: DeepMSI) -> str | None:
    schedule = None if model.video is None else model.video.backbone.schedule
    if schedule is None or schedule.static:
        return None
    return (
        "a threshold without a capacity leaves a number of tokens that only the device knows: set vision.keep or "
        "vision.capacity, or train.capacity_quantile"
    )


class _Capture(torch.cuda.graph):
    """A capture that minds no other thread: a loader's may pin memory meanwhile, which would end any other one.

    All of a device are on one stream, for graphs of one pool share memory there alone: `make_graphed_callables` of
    torch 2.14 would take a new one at each call.
    """

    streams: ClassVar[dict[int, torch.cuda.Stream]] = {}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        device = torch.cuda.current_device()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        given = {"stream": self.streams[device], "capture_error_mode": "thread_local"}
        super().__init__(*arguments, **{**options, **given})


@contextmanager
def _minding_no_other_thread() -> Iterator[None]:
    """Let `torch.cuda.make_graphed_callables` capture so: it takes no stream, and in torch 2.11 no error mode."""
    ordinary = torch.cuda.graph
    torch.cuda.graph = _Capture  # type: ignore[misc]
    try:
        yield
    finally:
        torch.cuda.graph = ordinary  # type: ignore[misc]


class _Branch(nn.Module):
    """A video branch with nothing but tensors in and out, which runs under an autocast of its own."""

    def __init__(self, branch: VideoBranch, autocast: torch.autocast) -> None:
        super().__init__()
        self.branch, self.autocast = branch, autocast

    def forward(self, pixel_values: Tensor, guide: Tensor | None = None) -> Tensor:
        with self.autocast:
            return self.branch.encode(pixel_values, guide)[0]


class VideoGraphs:
    """Forward and backward of a video branch, a graph for each number of videos that comes, and for each autocast.

    One is captured when its shape is first seen; `LIMIT` of them at most, all others run as they are. The graphs share
    one pool of memory, so that no second forward may come between a forward and its backward. Parameters may change in
    place, as an optimizer does; gradients have to be dropped before the next step, not set to zero.

    Args:
        branch: in training mode; `why_not_training` has nothing against it.
        around: entered for each capture, which runs the branch before it records it.
    """

    def __init__(self, branch: VideoBranch, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.branch, self.around = branch, around
        self.graphs: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self.pool: Any = None

    def __call__(self, pixel_values: Tensor, guide: Tensor | None) -> Tensor | None:
        """Features `[V, dim]` of `[V, T, 3, S, S]` under `[V, G]`; None where this shape has no graph and gets none."""
        given = (pixel_values,) if guide is None else (pixel_values, guide)
        shapes = tuple((tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for tensor in given)
        key = (_autocast_of(pixel_values.device), shapes)
        if key not in self.graphs:
            if len(self.graphs) == LIMIT:
                return None
            self.graphs[key] = self._capture(given)
        return self.graphs[key](*given)

    def _capture(self, given: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        # The graph keeps these as its inputs, and later ones are copied there.
        samples = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in given)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        options: dict[str, Any] = {"num_warmup_iters": WARMUP, "allow_unused_input": True, "pool": self.pool}
        device = given[0].device
        # A module, for only a module's parameters get gradients from a graph. Autocast is on in its forward alone, as
        # it is outside of a graph: backward would multiply in fewer bits what forward multiplied in float32.
        module = _Branch(self.branch, _autocast_without_cache(device)).train()
        # The branch need not be on the current device, whose streams are captured.
        with (
            torch.cuda.device_of(given[0]),
            torch.random.fork_rng([device]),
            torch.autocast(device.type, enabled=False),
            _minding_no_other_thread(),
            self.around(),
        ):
            return cast(Callable[..., Tensor], torch.cuda.make_graphed_callables(module, samples, **options))


class CapturedInference:
    """The inference of a model, replayed: a graph for each combination of its inputs' shapes, and of autocast.

    Equivalent to: `model(**inputs).logits` under `torch.inference_mode()`. The weights are read as they are at the
    capture: make a new one after they have changed. Where the model cannot be captured (`why_not`), it runs as it is.

    Args:
        model: put in eval mode, with what is constant computed once.

    Attributes:
        why_not: the sentence that says why nothing is captured, or None.
    """

    def __init__(self, model: DeepMSI) -> None:
        self.model = model.eval()
        if model.video is not None:
            model.video.fold()
        self.weight = next(model.parameters())
        self.why_not = why_not_inference(model)
        self.graphs: dict[tuple[Any, ...], tuple[Any, dict[str, Tensor], Tensor]] = {}
        self.constants: list[list[Tensor]] = []
        self.pool: Any = None

    @torch.inference_mode()
    def __call__(self, **inputs: Tensor) -> Tensor:
        """Logits `[U, K]` for the arguments of `DeepMSI.forward`, all on the model's device; a tensor of its own."""
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items()))
        key = (_autocast_of(self.weight.device), shapes)
        if self.why_not is not None or (key not in self.graphs and len(self.graphs) == LIMIT):
            return self.model(**inputs).logits
        if key not in self.graphs:
            if self.model.video is not None:
                self.model.video.fold()  # what is constant holds under the autocast that it was computed under
            # The model need not be on the current device, whose streams are captured.
            with torch.cuda.device_of(self.weight):
                self.graphs[key] = self._capture(inputs)
        graph, held, logits = self.graphs[key]
        for name, tensor in inputs.items():
            held[name].copy_(tensor)
        graph.replay()
        return logits.clone()

    def _capture(self, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], Tensor]:
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with _autocast_without_cache(self.weight.device):
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    self.model(**held)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with _Capture(graph, pool=self.pool):
                logits = self.model(**held).logits
        # The model lets go of them in training mode, and the graph would read what comes to lie there.
        self.constants.append(constants_of(self.model))
        return graph, held, logits


def constants_of(model: nn.Module) -> list[Tensor]:
    """What a model reads beside its inputs: weights, buffers, and what evaluation keeps of weights."""
    kept = [held for module in model.modules() if isinstance(module, HoldsConstants) for held in module.kept()]
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers(), *kept)]


def _autocast_of(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for a device, and in which type."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _autocast_without_cache(device: torch.device) -> torch.autocast:
    """The autocast that is on, without copies of weights, which a graph would go on reading after they have changed."""
    enabled, dtype = _autocast_of(device)
    return torch.autocast(device.type, dtype, enabled, cache_enabled=False)
