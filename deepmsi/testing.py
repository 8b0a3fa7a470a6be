"""What tests and benchmarks share: places to run, reproducible inputs, poisoned memory, and the budget of an error.

The budget: a kernel's error against the float64 reference is at most twice the error that the reference itself makes
at the kernel's precision, plus one rounding of the storage type.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepmsi import backend as backends

Result = TypeVar("Result")

# Where the suite runs every operation: the devices of this machine, and each compiled backend on each of them.
DEVICES: tuple[str, ...] = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
PLACES: tuple[tuple[str, str], ...] = tuple((b, d) for d in DEVICES for b in backends.BACKENDS if b != "reference")
REFERENCES: tuple[tuple[str, str], ...] = tuple(("reference", d) for d in DEVICES)
# What DEEPMSI_ISA may name, each holding those before it.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")


def places(op: str) -> tuple[tuple[str, str], ...]:
    """Return the ones of ``PLACES`` for which an operation has a kernel at all; :func:`need` says if it runs here."""
    return tuple((b, d) for b, d in PLACES if (k := backends.KERNELS.get((op, b))) is not None and d in k.devices)


def typed_places(op: str, dtypes: Sequence[torch.dtype]) -> tuple[tuple[str, str, torch.dtype], ...]:
    """Return the :func:`places` of an operation with each of the types that the kernel there takes."""
    return tuple((b, d, t) for b, d in places(op) for t in dtypes if t in backends.KERNELS[op, b].dtypes)


def need(op: str, backend: str, device: str, dtype: torch.dtype | None = None, **facts: int) -> None:
    """Skip the test that runs, with the sentence of ``explain()``, where a backend cannot run an operation here.

    ``facts`` are those of the call, such as ``channels=384``.
    """
    reason = backends.why_not(op, backend, device, dtype, **facts)
    if reason is not None:
        import pytest

        pytest.skip(reason)


def halves_apart(monkeypatch: Any) -> None:
    """Have a block's halves computed layer by layer in 16 bits, for pytest's ``monkeypatch``: as on a GPU.

    Bytes of a GPU are counted so on a CPU, whose kernels of whole halves keep less.
    """
    for op in ("project_cells", "residual_mlp", "residual_window_attention"):
        kernel = dataclasses.replace(backends.KERNELS[op, "cpp"], dtypes=(torch.float32,))
        monkeypatch.setitem(backends.KERNELS, (op, "cpp"), kernel)


def run_in_instruction_set(isa: str, script: str) -> None:
    """Run a Python script in a process whose CPU kernels are of an instruction set, which ``sys.argv[1]`` names.

    Skips the test that runs where this CPU has no such instructions.

    Raises:
        AssertionError: The script ended in an error, with what it printed.
    """
    import pytest

    from deepmsi import _host

    if INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(_host.cpu_capability()):
        pytest.skip(f"this CPU runs {_host.cpu_capability()} at most")
    environment = {**os.environ, "DEEPMSI_ISA": isa}
    done = subprocess.run([sys.executable, "-c", script, isa], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def captured(function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Return a CUDA graph of one call and what that call returned, which each replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose and allocate in their first calls
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = function()
    return graph, held


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator, so that every device and type draws the same numbers."""
    return torch.Generator().manual_seed(seed)


def randn(
    *size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
) -> Tensor:
    """Return normal numbers that depend on seed and size alone: the float64 draw, rounded."""
    draw = torch.randn(size, generator=generator(seed), dtype=torch.float64)
    return (draw * scale).to(device=device, dtype=dtype)


def offsets(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return ``cu_seqlens`` [len(lengths) + 1] int32 of frames with these lengths."""
    counts = torch.tensor([0, *lengths], dtype=torch.int64)
    return counts.cumsum(0).to(device=device, dtype=torch.int32)


def tokens(
    rows: int,
    channels: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return rows [rows, channels] that lie about a few centres, as image tokens do: some are near others."""
    centres = torch.randn(7, channels, generator=generator(seed), dtype=torch.float64)
    choice = torch.randint(7, (rows,), generator=generator(seed + 1))
    noise = torch.randn(rows, channels, generator=generator(seed + 2), dtype=torch.float64)
    return (centres[choice] + 0.6 * noise).to(device=device, dtype=dtype)


def relative_error(actual: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """Return the largest absolute difference over ``scale``, by default the largest magnitude of ``exact``."""
    if exact.numel() == 0:
        return 0.0
    if scale is None:
        scale = exact.abs().max().item()
    return (actual.to(exact) - exact).abs().max().item() / max(scale, 1e-30)


def assert_within_budget(
    actual: Tensor,
    low: Tensor,
    exact: Tensor,
    what: str = "output",
    roundings: float = 1.0,
    scale: float | None = None,
) -> None:
    """Assert that a kernel's result keeps the error budget.

    Args:
        actual: The kernel's result.
        low: The reference's result at the kernel's precision.
        exact: The reference's result in float64, from the same (rounded) inputs.
        what: Name of the tensor, for the message.
        roundings: Roundings of the storage type that are allowed on top.
        scale: Magnitude that errors are relative to; by default the largest of ``exact``. Give the magnitude of
            the terms where the result is a sum that nearly cancels.

    Raises:
        AssertionError: A shape differs, a number is not finite, or the error is over the budget.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, not {list(exact.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{what}: not finite"
    error, own = relative_error(actual, exact, scale), relative_error(low, exact, scale)
    budget = 2 * own + roundings * torch.finfo(actual.dtype).eps
    assert error <= budget, f"{what}: error {error:.3e} over the budget {budget:.3e} (reference's own {own:.3e})"


def roundings_of(dtype: torch.dtype, result: Tensor) -> float:
    """Return how many of a result's own roundings make one of the type that it was computed in."""
    return torch.finfo(dtype).eps / torch.finfo(result.dtype).eps


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh allocation with NaN (integers: their largest), so that an unwritten output shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
