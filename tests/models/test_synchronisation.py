"""A training step with static shapes waits for the device nowhere: counted, operator by operator."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deepmsi
from deepmsi import DeepMSI

# Operators whose result a host has to read before it can go on: a value, or how large an output is.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
}


class Waits(TorchDispatchMode):
    """Counts the operators that a device would be waited for at."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func._schema.name}.{func._overloadname}".removesuffix(".default")
        self.operators += 1
        by_mask = func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or by_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def step(model: DeepMSI, batch: dict[str, torch.Tensor], backend: str) -> Counter[str]:
    """Count the waits of one forward and backward."""
    model.train()
    with deepmsi.use_backend(backend), Waits() as waits:
        model(**batch, labels=torch.tensor([0, 1, 0, 2])).loss.backward()
    assert waits.operators > 300
    return waits.counts


STATIC: dict[str, dict[str, Any]] = {
    "keep": {"schedule": {"keep": [40, 21]}},
    "regrid": {"schedule": {"layout": "regrid", "keep": [49, 25]}},
    "capacity": {"schedule": "paper", "capacity": [50, 40]},
    "uncompressed": {"schedule": None},
}


@pytest.mark.parametrize("recompute", ["none", "light", "block", "chunk"])
@pytest.mark.parametrize("case", STATIC)
def test_static_shapes_wait_for_nothing(
    case: str, recompute: str, tiny: Callable[..., DeepMSI], batch: dict[str, torch.Tensor]
) -> None:
    model = tiny(vision={**STATIC[case], "recompute": recompute, "drop_path": 0.1}, fusion={"dropout": 0.1})
    assert not step(model, batch, "auto")


def test_the_reference_waits_for_nothing_either(tiny: Callable[..., DeepMSI], batch: dict[str, torch.Tensor]) -> None:
    assert not step(tiny(vision=STATIC["capacity"]), batch, "reference")


def test_what_does_wait_is_counted(tiny: Callable[..., DeepMSI], batch: dict[str, torch.Tensor]) -> None:
    """A threshold reads how many rows are left behind the merging, beside what its kernels read inside; a mask on the
    CPU is read for nothing, once for each modality."""
    assert step(tiny(vision={"schedule": "paper"}), batch, "auto") == {"aten::_local_scalar_dense": 1}
    mask = torch.ones(4, 3, dtype=torch.bool)
    counts = step(tiny(vision=STATIC["keep"]), {**batch, "modality_mask": mask}, "auto")
    assert counts == {"aten::_local_scalar_dense": 3}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("backend", ["triton", "cpp"])
@pytest.mark.parametrize("case", STATIC)
def test_a_cuda_device_is_waited_for_nowhere(
    case: str, backend: str, tiny: Callable[..., DeepMSI], batch: dict[str, torch.Tensor]
) -> None:
    """The same, told by the device's own calls rather than by the operators."""
    model = tiny(vision={**STATIC[case], "drop_path": 0.1}, fusion={"dropout": 0.1}).cuda().train()
    placed = {name: value.cuda() for name, value in {**batch, "labels": torch.tensor([0, 1, 0, 2])}.items()}
    with deepmsi.use_backend(backend):
        model(**placed).loss.backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**placed).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
