"""Mean and mean square of training data, which what has to be standardised is fitted to."""

from collections.abc import Iterable

import torch
from torch import Tensor


def moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the mean square over the first axis of all parts, in float64; None where there is no row.

    Args:
        parts: ``[N, ...]`` of any N, one at a time.
    """
    count = 0
    total = squares = torch.zeros((), dtype=torch.float64)
    for part in parts:
        rows = part.double()
        count += len(rows)
        total = total + rows.sum(0)
        squares = squares + rows.square().sum(0)
    return (total / count, squares / count) if count else None
