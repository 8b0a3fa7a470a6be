"""What the vision backbone keeps for backward, and what it computes again there: one switch of four positions."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepmsi.errors import UserError

Recompute = Literal["none", "light", "block", "chunk"]
CHUNK_FRAMES = 15


def checked(recompute: str) -> Recompute:
    """Return the position, or say which there are.

    Raises:
        UserError: There is no such position.
    """
    for position in get_args(Recompute):
        if recompute == position:
            return position
    raise UserError(f"recompute must be one of {', '.join(get_args(Recompute))}, not {recompute!r}")


def again(function: Callable[..., Any], *tensors: Tensor | None, owners: tuple[nn.Module, ...], draws: bool) -> Any:
    """Compute ``function(*tensors)``, keep only the tensors for backward, and compute it again there.

    One backward over the whole graph, so hooks on gradients fire once; a backward under another backend than the
    forward raises. Where nothing learns, nothing is kept.

    Args:
        function: Of the tensors alone; what else it reads must not change before backward.
        tensors: Its arguments, and all that is kept.
        owners: The modules whose parameters it uses.
        draws: Whether it draws random numbers, which backward then draws again.
    """
    learns = any(tensor is not None and tensor.requires_grad for tensor in tensors) or any(
        parameter.requires_grad for owner in owners for parameter in owner.parameters()
    )
    if not (torch.is_grad_enabled() and learns):
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=draws)
