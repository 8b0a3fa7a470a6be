"""When modules may run as one kernel."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deepmsi import backend
from deepmsi.ops import position_bias
from deepmsi.ops._arguments import autocast_type, autocasts


def fuses(op: str, x: Tensor, casts: bool = False, **facts: int) -> bool:
    """Whether an operation that does the work of several modules is to compute it for x.

    It keeps the type of x, or ``casts`` x to the type that it is computed in. ``facts`` are those of the call, beside
    its channels.
    """
    dtype = autocast_type(x)
    mixed = int(not casts and x.dtype != dtype)
    return backend.fuses(op, x.device.type, dtype, channels=x.shape[-1], mixed=mixed, **facts)


def fuses_attention(x: Tensor, heads: int, window: int) -> bool:
    """Whether the attention half of a block is to be computed as one operation for x."""
    head_dim = x.shape[-1] // heads
    return fuses("residual_window_attention", x, head_dim=head_dim, window=window)


def plain(x: Tensor, *layers: nn.Module, bare: tuple[nn.Module, ...] = ()) -> bool:
    """Whether calling layers on x does what torch's own do: no hooks, no other class, weights in the type of x.

    Layers have a weight and a bias; ``bare`` ones may lack the bias.

    An adapter, a quantised layer or a parametrised weight makes another class of a layer, or of its weight. A module
    whose call is passed over, too, has to be :func:`unhooked`. Autocast takes weights of any type.
    """
    casts = x.dtype != torch.float64 and autocasts(x.device.type)
    every = (*layers, *bare)
    if not unhooked(*every):
        return False
    for layer in every:
        if type(layer) not in (nn.Linear, nn.Conv2d, nn.LayerNorm):
            return False
        # FSDP and DataParallel lend a layer weights that are no parameters, for a call.
        held = layer._parameters if "weight" in layer._parameters else layer.__dict__
        weight, bias = held.get("weight"), held.get("bias")
        if weight is None or (bias is None and layer not in bare) or is_traceable_wrapper_subclass(weight):
            return False
        if not casts and weight.dtype != x.dtype:
            return False
    return True


def unhooked(*modules: nn.Module) -> bool:
    """Whether no hook watches or changes what modules compute, on one of them or on all, and no ``forward`` of its own.

    Tools that bring weights from elsewhere for a call put another ``forward`` on the module.
    """
    if _has_any_global_hook():
        return False
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return False
    return True


def bias_weights(network: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return what the bias of a Swin V2's positions follows from alone, or None of a network not as it was built."""
    if type(network) is not nn.Sequential or [type(part) for part in network] != [nn.Linear, nn.ReLU, nn.Linear]:
        return None
    hidden, out = cast(nn.Linear, network[0]), cast(nn.Linear, network[2])
    weights = (hidden.weight, hidden.bias, out.weight)
    own = hidden.bias is not None and out.bias is None and not any(map(is_traceable_wrapper_subclass, weights))
    return weights if own and unhooked(network, *network) else None


def bias_table(coordinates: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the position bias of every offset [P, heads]: on the reference where a backend that is set has no kernel.

    Of coordinates [P, 2] and the :func:`bias_weights` of a network.
    """
    hidden, _, out = weights
    runs = backend.fuses("position_bias", hidden.device.type, hidden.dtype, heads=out.shape[0])
    return position_bias(coordinates, *weights, backend=None if runs else "reference")
