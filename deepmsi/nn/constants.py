"""What follows from weights alone, kept for inference while they stay."""

from collections.abc import Callable
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from deepmsi import backend
from deepmsi.errors import UserError
from deepmsi.nn.fusing import fuses
from deepmsi.ops import pack_weight
from deepmsi.ops._arguments import autocast_type, needs_grad

Value = TypeVar("Value")
Model = TypeVar("Model", bound=nn.Module)
Content = tuple[tuple[int, int, torch.dtype], ...]


def content_of(*parameters: Tensor) -> Content | None:
    """Return what tells whether parameters hold what they held before, or None where nothing does.

    A change in place shows in the version and one of storage in the address; only what is done to ``parameter.data``
    stays unseen. Nothing tells of weights that are computed, of those made in inference mode, and under transforms.
    """
    own = all(type(parameter) is nn.Parameter and not parameter.is_inference() for parameter in parameters)
    if not own or backend.transforms():
        return None
    return tuple((p.data_ptr(), p._version, p.dtype) for p in parameters)


def stands(content: Content | None, *parameters: Tensor) -> bool:
    """Whether what was computed from parameters of this content may stand for them: no gradient of them is wanted."""
    held = torch.compiler.is_compiling() or (content is not None and content == content_of(*parameters))
    return held and not needs_grad(*parameters)


class Fixed(Generic[Value]):
    """What follows from parameters alone, for as long as they stay and no gradient of them is wanted.

    It holds under the autocast, or without one, under which it was computed. It belongs to the parameters at hand: a
    copy of a module, or what is loaded of one, holds nothing.
    """

    def __init__(self) -> None:
        self._value: Value | None = None
        self._content: Content | None = None
        self._dtype: torch.dtype | None = None

    def __reduce__(self) -> tuple[type["Fixed[Value]"], tuple[()]]:
        return type(self), ()

    def fix(self, compute: Callable[[], Value | None], *parameters: Tensor) -> None:
        """Keep what is computed of the parameters of now, where anything tells when they change."""
        self._content, self._dtype = content_of(*parameters), autocast_type(parameters[0])
        self._value = compute() if self._content is not None else None

    def forget(self) -> None:
        """Keep nothing."""
        self._value = None

    def of(self, *parameters: Tensor) -> Value | None:
        """Return what stands for these parameters, or None where they have changed since."""
        # A compiled graph would not see them change.
        if self._value is None or torch.compiler.is_compiling() or self._dtype != autocast_type(parameters[0]):
            return None
        return self._value if stands(self._content, *parameters) else None


def packed(op: str, *weights: Tensor) -> tuple[Tensor, ...] | None:
    """Lay weights out where a kernel of the CPU is to compute ``op`` from them; elsewhere nothing reads them so."""
    runs = all(weight.device.type == "cpu" and fuses(op, weight, casts=True) for weight in weights)
    return tuple(pack_weight(weight, autocast_type(weight)) for weight in weights) if runs else None


class HoldsConstants(nn.Module):
    """A module that may hold, for inference, what follows from its weights alone."""

    def fix(self) -> None:
        """Compute that from the weights of now; it is read while these stay and no gradient is wanted."""

    def forget(self) -> None:
        """Undo :meth:`fix`."""

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.forget()
        return super().train(mode)


def fix_constants(model: Model) -> Model:
    """Compute once, for inference, what follows from the weights of a Swin alone, and return the model.

    Those are the tables of the position bias and, on the CPU, the layers' weights as its kernels read them, which take
    the memory of these weights again. The fewer images a call has, the more it saves. Call it under the autocast that
    the model will run under. ``train()`` undoes it; where weights have changed otherwise, in place or by another tensor
    in their place, both are computed in every call again. Only what is done to ``parameter.data`` stays unseen.

    Args:
        model: A :class:`VSCSwin`, a model that :func:`deepmsi.fuse` fused, or a module that contains such; it is put in
            evaluation mode.

    Raises:
        UserError: There is no such model in it.
    """
    parts = [module for module in model.modules() if isinstance(module, HoldsConstants)]
    if not parts:
        raise UserError(
            f"fix_constants: {type(model).__name__} has no block of VSCSwin, and no fused one of timm's swinv2_*: "
            "give deepmsi.fuse the model first"
        )
    model.eval()
    for part in parts:
        part.fix()
    return model
