"""When modules may run as one kernel."""

import torch
from torch import Tensor, nn

from deepmsi import backend


def fuses(op: str, x: Tensor) -> bool:
    """Whether an operation that does the work of several modules is to compute it for x."""
    return not torch.is_autocast_enabled(x.device.type) and backend.fuses(op, x.device.type, x.dtype)


def plain(*layers: nn.Module) -> bool:
    """Whether calling layers does what torch's own do: no hooks, no other class, weights in float32.

    An adapter, a quantised layer or a parametrised weight makes another class of a layer. A module whose call is passed
    over, too, has to be :func:`unhooked`.
    """
    return (
        unhooked(*layers)
        and all(type(layer) in (nn.Linear, nn.Conv2d, nn.LayerNorm) for layer in layers)
        and all(layer.weight.dtype == torch.float32 for layer in layers)
    )


def unhooked(*modules: nn.Module) -> bool:
    """Whether no hook watches or changes what modules compute."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )
