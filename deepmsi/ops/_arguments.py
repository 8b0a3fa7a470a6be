"""What the public operations share before a kernel runs: autocast, and sentences for bad arguments."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

NARROWED = (torch.float16, torch.bfloat16, torch.float32)  # by autocast
FLOATING = (*NARROWED, torch.float64)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device type; tensors without content have none to ask for."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_type(x: Tensor) -> torch.dtype:
    """Return the type that x is computed in: autocast's where that is on for its device, of what it narrows."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if x.dtype in NARROWED and autocasts(device) else x.dtype


def autocast(x: Tensor) -> Tensor:
    """Return x in its :func:`autocast_type`."""
    dtype = autocast_type(x)
    return x if x.dtype == dtype else x.to(dtype)


def type_of_layers(
    op: str, x_dtype: torch.dtype, norms: tuple[Tensor, ...], **layers: Tensor | None
) -> tuple[torch.dtype, int]:
    """Return the :func:`autocast_type` of the weights and biases of layers, and the fact ``mixed``.

    It is 1 where x, which is of ``x_dtype``, is of another type, or a norm is of another one than that or float32.

    Raises:
        ValueError: The layers are not of one type, or some are in float64 and x is not, or the other way round.
    """
    dtypes = {autocast_type(tensor) for tensor in layers.values() if tensor is not None}
    if len(dtypes) != 1:
        raise ValueError(f"{op}: {', '.join(layers)} must be of one type")
    (dtype,) = dtypes
    if (dtype == torch.float64) != (x_dtype == torch.float64):
        raise ValueError(f"{op}: float64 goes with float64 alone, not x in {x_dtype} with weights in {dtype}")
    allowed = (dtype, torch.float32)
    return dtype, int(x_dtype != dtype or any(norm.dtype not in allowed for norm in norms))


def autocast_layers(layers: Iterable[Tensor | None], backend: str) -> list[Any]:
    """Return the layers in their autocast type, but float32 as it came for ``cpp``, which rounds while it reads.

    What is None stays None.
    """
    stays = torch.float32 if backend == "cpp" else None
    return [layer if layer is None or layer.dtype == stays else autocast(layer) for layer in layers]


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which autocast leaves types alone; one that is off already costs nothing."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def check_floating(x: Tensor, op: str, name: str) -> None:
    """Raise unless x holds floating-point numbers."""
    if x.dtype not in FLOATING:
        raise ValueError(f"{op}: {name} must be float16, bfloat16, float32 or float64, not {x.dtype}")


def are_offsets(cu_seqlens: Tensor) -> bool:
    """Whether these can be the offsets of frames' rows, [F + 1] int32; what they hold is not read."""
    return cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1 and cu_seqlens.dtype == torch.int32


def check_devices(x: Tensor, op: str, name: str, **others: Tensor | None) -> None:
    """Raise unless the others lie where x does: a kernel reads their addresses."""
    device = x.device
    for other, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {other} is on {tensor.device}, {name} on {device}: move it")


def check_shape(op: str, name: str, x: Tensor | None, *size: int) -> None:
    """Raise unless x is there and of this size."""
    if x is None or x.shape != size:
        raise ValueError(f"{op}: {name} must be {list(size)}, not {None if x is None else shape(x)}")


def check_packed(op: str, packed: Sequence[Tensor], count: int) -> None:
    """Raise unless these are so many weights that ``pack_weight`` gave."""
    if len(packed) != count or not all(isinstance(weight, Tensor) and weight.dim() == 3 for weight in packed):
        raise ValueError(f"{op}: packed must be what pack_weight gives, one for each weight")


def shape(x: Tensor) -> str:
    """Return a shape as text, such as ``[3, 4]``."""
    return str(list(x.shape))


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def exporting() -> bool:
    """Whether ``torch.export`` runs; torch 2.11 has ``is_exporting()`` true of every compilation, too."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def keeps_for_backward(*tensors: Tensor | None) -> bool:
    """Whether a call keeps what backward reads: a graph that is traced or exported may be trained, frozen or not."""
    return torch.jit.is_tracing() or exporting() or needs_grad(*tensors)
