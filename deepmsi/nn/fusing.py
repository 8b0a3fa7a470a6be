"""When modules may run as one kernel."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deepmsi import backend
from deepmsi.ops import pack_weight
from deepmsi.ops._arguments import autocast_type, autocasts, needs_grad

Content = tuple[tuple[int, int, torch.dtype], ...]


def fuses(op: str, x: Tensor, casts: bool = False) -> bool:
    """Whether an operation that does the work of several modules is to compute it for x.

    It keeps the type of x, or ``casts`` x to the type that it is computed in.
    """
    dtype = autocast_type(x)
    mixed = int(not casts and x.dtype != dtype)
    return backend.fuses(op, x.device.type, dtype, channels=x.shape[-1], mixed=mixed)


def plain(x: Tensor, *layers: nn.Module, bare: tuple[nn.Module, ...] = ()) -> bool:
    """Whether calling layers on x does what torch's own do: no hooks, no other class, weights in the type of x.

    Layers have a weight and a bias; ``bare`` ones may lack the bias.

    An adapter, a quantised layer or a parametrised weight makes another class of a layer, or of its weight. A module
    whose call is passed over, too, has to be :func:`unhooked`. Autocast takes weights of any type.
    """
    casts = x.dtype != torch.float64 and autocasts(x.device.type)
    every = (*layers, *bare)
    return (
        unhooked(*every)
        and all(type(layer) in (nn.Linear, nn.Conv2d, nn.LayerNorm) for layer in every)
        and all(layer.bias is not None for layer in layers)
        and not any(is_traceable_wrapper_subclass(layer.weight) for layer in every)
        and (casts or all(layer.weight.dtype == x.dtype for layer in every))
    )


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


class PackedWeights:
    """Weights of layers as the CPU's kernels read them, for as long as they stay and no gradient of them is wanted.

    They belong to the weights at hand: a copy of a module, or what is loaded of one, holds none.
    """

    def __init__(self) -> None:
        self._packed: tuple[Tensor, ...] | None = None
        self._content: Content | None = None

    def __reduce__(self) -> tuple[type["PackedWeights"], tuple[()]]:
        return PackedWeights, ()

    def fix(self, op: str, *layers: nn.Linear) -> None:
        """Lay the weights of now out, where a kernel of the CPU is to compute ``op`` from them."""
        weights = [layer.weight for layer in layers]
        self._content = content_of(*weights)
        runs = all(weight.device.type == "cpu" and fuses(op, weight) for weight in weights)
        self._packed = tuple(map(pack_weight, weights)) if runs and self._content is not None else None

    def forget(self) -> None:
        self._packed = None

    def of(self, *layers: nn.Linear) -> tuple[Tensor, ...] | None:
        """Return what the weights of these layers were laid out as, or None where they have changed since."""
        if self._packed is None or torch.compiler.is_compiling():
            return None
        return self._packed if stands(self._content, *(layer.weight for layer in layers)) else None


def unhooked(*modules: nn.Module) -> bool:
    """Whether no hook watches or changes what modules compute, on one of them or on all, and no ``forward`` of its own.

    Tools that bring weights from elsewhere for a call put another ``forward`` on the module.
    """
    return not _has_any_global_hook() and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        for module in modules
    )
