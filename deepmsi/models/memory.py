"""How much memory a training step takes: what autograd keeps, and the largest sum of what lives at once.

Counted on a copy of the model whose tensors have shapes and no content (torch's fake tensors): it takes neither the
memory nor the time of a step.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepmsi.models.precision import AUTOCAST, autocast_for

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class SavedBytes:
    """Bytes that autograd keeps for backward, each storage counted once, parameters and buffers not counted."""

    total: int = 0


@contextmanager
def saved_bytes(*modules: nn.Module) -> Iterator[SavedBytes]:
    """Count what the operations inside keep for backward, apart from the parameters and buffers of some modules.

    What checkpointing keeps (the inputs of what it will compute again) counts; what it computes again does not.
    """
    known = {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            # The graph holds the tensor, so that no later storage can take this address while it counts.
            known.add(storage._cdata)
            saved.total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step.

    Attributes:
        weights: Parameters and buffers, with the average of the weights where there is one.
        gradients: Of the trainable parameters, with the buckets in which several processes exchange them.
        optimizer: The two moments of Adam.
        saved: What autograd keeps for backward of one micro-batch.
        temporary: The most that lives at once beside all that, the batch itself among it.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int
    temporary: int

    @property
    def total(self) -> int:
        """The sum. What kernels allocate inside and what an allocator loses between blocks comes on top."""
        return self.weights + self.gradients + self.optimizer + self.saved + self.temporary

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "Adam": self.optimizer,
            "saved activations": self.saved,
            "largest temporary": self.temporary,
        }
        return f"{', '.join(f'{name} {gigabytes(size)}' for name, size in parts.items())}: {gigabytes(self.total)} GB"


def gigabytes(size: float) -> str:
    """Bytes as GB (10^9), to two digits behind the point and at least two that are not zero."""
    return f"{size / 1e9:.2f}" if size >= 1e7 else f"{size / 1e9:.2g}"


class _Live(TorchDispatchMode):
    """Sums the storages that operations make and that still live; remembers the largest sum."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.known = {t.untyped_storage()._cdata for t in (*known.parameters(), *known.buffers())}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self.sizes and address not in self.known:
            self.sizes[address] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._leave, address)

    def _leave(self, address: int) -> None:
        self.now -= self.sizes.pop(address, 0)

    def settle(self, gradient: Tensor) -> None:
        """Stop counting a parameter's gradient, which stays until the step's end."""
        address = gradient.untyped_storage()._cdata
        self.now -= self.sizes.get(address, 0)
        if address in self.sizes:
            self.sizes[address] = 0


def step_memory(
    model: DeepMSI,
    utterances: int,
    *,
    precision: str = "fp32",
    device: torch.device | str | None = None,
    averaged: bool = False,
    processes: int = 1,
    stems: bool = False,
) -> StepMemory | None:
    """Count the memory of a training step with AdamW, without taking it.

    Of the most that a batch can be: every video present, texts and recordings as long as the configuration lets them
    be, and every token kept where a threshold decides without a capacity.

    Args:
        model: the model, which stays as it is, wherever it lies.
        utterances: U of one micro-batch.
        precision: "fp32", or "bf16" or "fp16" for autocast.
        device: where the step runs; None takes the model's. Counted for the kernels that run there.
        averaged: whether an average of the weights is kept, too.
        processes: over how many the batch is spread, of which each has `utterances`.
        stems: whether the batch holds what the stem made of the frames in place of them (`VideoBranch.stem`).

    Returns:
        The bytes of one process; None where something reads values on the host, so that the sizes are not known
        before a step is taken.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    where = torch.device(device or next(model.parameters()).device)
    mode = FakeTensorMode()
    twin = _hollow(model, mode, where)
    trained = [p for p in twin.parameters() if p.requires_grad]
    learned = sum(p.nbytes for p in trained)
    try:
        with mode, _Live(twin) as live:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: live.settle(p.grad))
            batch = _largest_batch(twin, utterances, where)
            if stems and twin.video is not None:
                shape = (utterances, model.config.vision.frames, *twin.video.stem_shape)
                batch["pixel_values"] = torch.empty(shape, dtype=AUTOCAST.get(precision, torch.float32), device=where)
            with autocast_for(precision, where), saved_bytes(twin) as saved:
                loss = twin(**batch).loss
            kept = saved.total
            loss.backward()
    except RuntimeError:
        # Tensors without content refuse what reads a value; what else is wrong, the step itself will say.
        return None
    stored = sum(t.nbytes for t in (*twin.parameters(), *twin.buffers()))
    return StepMemory(
        weights=stored + (learned if averaged else 0),
        gradients=learned * (2 if processes > 1 else 1),
        optimizer=2 * learned,
        saved=kept,
        temporary=max(live.peak - kept, 0),
    )


def without_content(model: Model, mode: Any, device: torch.device | str, *shared: Any) -> Model:
    """Return a copy whose tensors have no content and lie on a device; what is ``shared`` is not copied."""
    copies: dict[int, Any] = {id(one): one for one in shared}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = mode.from_tensor(tensor.detach())
        with mode:
            fake = fake.to(device)
        copies[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, copies)


def _hollow(model: DeepMSI, mode: Any, device: torch.device) -> DeepMSI:
    """A copy in training mode whose tensors have no content and lie on a device."""
    # The processors hold no tensors, and copying a vocabulary takes long.
    twin = without_content(model, mode, device, model.text_processor, model.audio_processor).train()
    # The model itself, not its parts, would join its loss with other processes' in training.
    twin.training = twin.contrast.gather = False
    if twin.video is not None:
        schedule = twin.video.backbone.schedule
        if schedule is not None and not schedule.static:
            twin.video.backbone.reserve()
    return twin


def _largest_batch(model: DeepMSI, utterances: int, device: torch.device) -> dict[str, Tensor]:
    """The longest batch of so many utterances, as `DeepMSI.forward` takes it; no masks, for all of it is there."""
    config = model.config
    batch = {"labels": torch.zeros(utterances, dtype=torch.long, device=device)}
    for name in model.modalities:
        if name == "video":
            shape = (utterances, config.vision.frames, 3, config.vision.image_size, config.vision.image_size)
            batch["pixel_values"] = torch.empty(shape, dtype=torch.uint8, device=device)
        elif getattr(model, f"{name}_encoder") is None:
            batch[f"{name}_features"] = torch.empty(utterances, model.missing[name].shape[0], device=device)
        elif name == "text":
            length: int = model.text_processor.max_length  # type: ignore[union-attr]
            batch["input_ids"] = torch.zeros(utterances, length, dtype=torch.long, device=device)
        else:
            samples = round(config.audio.max_seconds * config.audio.sample_rate)
            batch["input_values"] = torch.empty(utterances, samples, device=device)
    return batch
