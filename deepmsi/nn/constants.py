"""What follows from weights alone, kept for inference while they stay."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from deepmsi import backend
from deepmsi.errors import UserError
from deepmsi.nn.fusing import fuses
from deepmsi.ops import pack_weight
from deepmsi.ops._arguments import autocast_type, exporting, needs_grad

Value = TypeVar("Value")
Model = TypeVar("Model", bound=nn.Module)


class Content:
    """What tells whether parameters hold what they held before.

    A change in place shows in the version, another tensor in their place in the storage (while this refers to one, no
    other can lie where it lay) or in how it lies there, and an optimizer's step that leaves no version is counted
    (:func:`_count_steps`). What torch does not count as a change stays unseen: what is done to ``parameter.data``, by
    numpy, by a collective, by another process, and by the replay of a CUDA graph. A copy is of no parameters, and holds
    for none.
    """

    def __init__(self, *parameters: Tensor) -> None:
        _watch_steps()
        self._storages = [StorageWeakRef(p.untyped_storage()) for p in parameters]
        self._facts = [_facts(p) for p in parameters]

    def holds(self, *parameters: Tensor) -> bool:
        """Whether it is that of these."""
        return [_facts(p) for p in parameters] == self._facts != []

    def __reduce__(self) -> tuple[type["Content"], tuple[()]]:
        return Content, ()


def _facts(p: Tensor) -> tuple[Any, ...]:
    storage = p.untyped_storage()._cdata
    return storage, p.data_ptr(), p._version, _steps[storage], p.dtype, p.shape, p.stride()


_steps: Counter[int] = Counter()
"""How often a step that leaves no version has changed what lies in a storage."""


def _count_steps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Count a step of a fused optimizer, or of one that is not torch's, which may be fused, too."""
    own = type(optimizer).__module__.startswith("torch.optim.")
    for group in optimizer.param_groups:
        if group.get("fused") or not own:
            # Torch's own step leaves the gradients where they were; another may let go of them.
            _steps.update({p.untyped_storage()._cdata for p in group["params"] if p.grad is not None or not own})


@cache
def _watch_steps() -> None:
    """Count the steps of all optimizers from now on."""
    register_optimizer_step_post_hook(_count_steps)


def shows_changes(*parameters: Tensor) -> bool:
    """Whether anything tells when these parameters change.

    Nothing does of weights that are computed, of sparse ones, of those made in inference mode, under transforms, and of
    those whose gradient waits for a step: that of a fused optimizer leaves no new version.
    """
    if backend.transforms():
        return False
    for p in parameters:
        if type(p) is not nn.Parameter or p.layout is not torch.strided or p.is_inference() or p.grad is not None:
            return False
    return True


def content_of(*parameters: Tensor) -> Content | None:
    """Return the content of parameters, or None where nothing tells when they change (:func:`shows_changes`)."""
    return Content(*parameters) if shows_changes(*parameters) else None


def recorded() -> bool:
    """Whether a graph is being made of this call, which would not see weights change."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


_for_good = False


@contextmanager
def for_good() -> Iterator[None]:
    """Let an export within keep as constants what was just computed of a model's weights."""
    global _for_good
    before, _for_good = _for_good, True
    try:
        yield
    finally:
        _for_good = before


def stands(content: Content | None, *parameters: Tensor) -> bool:
    """Whether what was computed from parameters of this content may stand for them: no gradient of them is wanted.

    An export cannot tell, as it has others in their place.
    """
    if needs_grad(*parameters):
        return False
    if exporting():
        return _for_good and content is not None
    return not recorded() and content is not None and shows_changes(*parameters) and content.holds(*parameters)


class Fixed(Generic[Value]):
    """What follows from parameters alone, for as long as they stay and no gradient of them is wanted.

    It holds under the autocast, or without one, under which it was computed, and is kept for each apart: threads may
    call a module under unlike ones. It belongs to the parameters at hand: a copy of a module, or what is loaded of one,
    holds nothing.
    """

    def __init__(self) -> None:
        self._held: dict[torch.dtype, tuple[Content, Value]] = {}

    def __reduce__(self) -> tuple[type["Fixed[Value]"], tuple[()]]:
        return type(self), ()

    def fix(self, compute: Callable[[], Value | None], *parameters: Tensor) -> None:
        """Keep what is computed of the parameters of now, where anything tells when they change."""
        content, dtype = content_of(*parameters), autocast_type(parameters[0])
        value = compute() if content is not None else None
        if content is None or value is None:
            self._held.pop(dtype, None)
        else:
            self._held[dtype] = content, value

    def forget(self) -> None:
        """Keep nothing."""
        self._held = {}

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are kept."""
        values = [value for _, value in self._held.values()]
        return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

    def of(self, *parameters: Tensor) -> Value | None:
        """Return what stands for these parameters, or None where nothing does.

        It is dropped when they change, and when a gradient of them is wanted: what follows may change them unseen.
        """
        if not self._held or recorded():
            return None
        held = self._held.get(autocast_type(parameters[0]))
        if held is None or not shows_changes(*parameters):
            return None
        content, value = held
        if not content.holds(*parameters) or needs_grad(*parameters):
            self.forget()
            return None
        return value


class LaidOut(Fixed[tuple[Tensor, ...]]):
    """Weights of linear layers as the CPU's kernels read them."""

    def fix_layers(self, op: str, *layers: nn.Module) -> None:
        """Lay the weights of now out, where a kernel of the CPU is to compute ``op`` from layers as torch has them."""
        self.forget()
        weights = [layer.weight for layer in layers if type(layer) is nn.Linear]
        read = [w for w in weights if w.device.type == "cpu" and w.dtype in (torch.float32, autocast_type(w))]
        if len(read) == len(layers) and all(_by_cpp(op, w) for w in read):
            self.fix(lambda: tuple(pack_weight(w, autocast_type(w)) for w in weights), *weights)

    def of_layers(self, *layers: Any) -> tuple[Tensor, ...] | None:
        """Return what stands for the weights of these layers, as :meth:`of` does."""
        return self.of(*(layer.weight for layer in layers)) if self._held else None


def _by_cpp(op: str, weight: Tensor) -> bool:
    """Whether the C++ kernel is to compute ``op`` from a weight on the CPU."""
    return fuses(op, weight, casts=True) and backend.resolve(op, None, "cpu", autocast_type(weight)) == "cpp"


_TORCHS = frozenset(vars(nn.Module()))


class HoldsConstants(nn.Module):
    """A module that may hold, for inference, what follows from its weights alone."""

    def fix(self) -> None:
        """Compute that from the weights of now; it is read while these stay and no gradient is wanted."""

    def forget(self) -> None:
        """Undo :meth:`fix`."""
        for held in self._fixed():
            held.forget()

    def kept(self) -> list[Tensor]:
        """Return the tensors that :meth:`fix` computed."""
        return [tensor for held in self._fixed() for tensor in held.tensors()]

    def _fixed(self) -> list[Fixed[Any]]:
        # Trainers call train() before each step: what torch keeps in a module is not searched.
        own = [value for name, value in vars(self).items() if name not in _TORCHS]
        return [held for held in tree_leaves(own) if isinstance(held, Fixed)]

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.forget()
        return super().train(mode)


def fix_constants(model: Model) -> Model:
    """Compute once, for inference, what follows from the weights of a Swin or a TCN alone, and return the model.

    Those are the tables of the position bias, the joined bias of q, k and v, the scale of each head and, on the CPU,
    the layers' weights as its kernels read them, which take the memory of these weights again; and the weights of a TCN
    with their norms folded in. The fewer images a call has, the more it saves. Call it under the autocast that the
    model will run under. ``train()`` undoes it, and so does a call that wants gradients of the weights; where they have
    changed otherwise, by an optimizer, in place or by another tensor in their place, these are computed in every call
    again. What torch does not count as a change stays unseen (``parameter.data``, numpy's views, collectives, the
    replay of a CUDA graph): call it again then. Of weights that still have gradients nothing is kept, since a step may
    follow: ``zero_grad()`` first. Nor is anything of shards (FSDP). In a graph of ``torch.compile`` everything is
    computed in every call.

    Args:
        model: A :class:`VSCSwin`, a :class:`TCN`, a model that :func:`deepmsi.fuse` fused, or a module that contains
            such; it is put in evaluation mode.

    Raises:
        UserError: There is no such model in it.
    """
    parts = [module for module in model.modules() if isinstance(module, HoldsConstants)]
    if not parts:
        raise UserError(
            f"fix_constants: {type(model).__name__} has nothing to fix: give it a VSCSwin, a TCN, or a model of timm "
            "that deepmsi.fuse fused"
        )
    model.eval()
    # A tensor that was made in inference mode could not be saved for the gradient of x.
    with torch.inference_mode(False), torch.no_grad():
        for part in parts:
            part.fix()
    return model
