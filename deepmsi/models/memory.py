"""How much memory a training step takes: what autograd keeps, and the largest sum of what lives at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
