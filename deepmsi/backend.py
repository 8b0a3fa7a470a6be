"""Which implementation of an operation runs, and why: the choice, its predicates, and ``explain()``.

A name is one of ``reference`` (plain PyTorch), ``cpp`` (the compiled extension: CPU and CUDA) and ``triton``;
``auto`` takes the best that can run. The argument of a call goes before ``use_backend()``, that before the
environment variable ``DEEPMSI_BACKEND`` (read once, at import), and that before ``auto``. An implementation
that was asked for by name runs or raises; it is never replaced in silence.

Adding a kernel takes one line: put its :class:`Kernel` into ``KERNELS`` below, and its schema into
``deepmsi/ops/_schemas.py``. Everything here is plain Python over module constants, so that ``torch.compile``
traces through a choice without a break and without reading a tensor.
"""

import contextlib
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from deepmsi import _built_for
from deepmsi._version import __version__
from deepmsi.errors import UserError

BACKENDS = ("reference", "triton", "cpp")

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Kernel:
    """What one compiled implementation of one operation can run.

    Attributes:
        dtypes: Storage types that it takes.
        devices: Device types that it takes (``triton`` takes ``cpu`` only under its interpreter).
        limit: Reads the facts of a call (keyword integers such as ``channels=384``) and returns why it cannot
            run, or None where it can.
        faster: Reads the device and storage type of a call and its facts, and says whether ``auto`` should take this
            kernel over the reference: from measurement, not from hope. None means always.
    """

    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...]
    limit: Callable[[dict[str, int]], str | None] | None = None
    faster: Callable[[str, torch.dtype, dict[str, int]], bool] | None = None


def host_info() -> dict[str, str]:
    """Return what the host module says of the build and of this CPU, or why there is none."""
    try:
        host: Any = importlib.import_module("deepmsi._host")
    except ImportError as error:
        return {"host module": f"not built ({error})"}
    try:
        return dict(host.info())
    except RuntimeError as error:  # what DEEPMSI_ISA asks for
        raise UserError(str(error)) from None


_ISA = host_info().get("instruction set in use")
_HAS_TILES = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def _has_vectors(device: str, dtype: torch.dtype, facts: dict[str, int]) -> bool:
    """Whether the blocks' own products beat torch's: measured with AVX-512 and with AVX2, not with less.

    A CPU that multiplies tiles of bfloat16 (AMX) does so in torch's products alone; not measured on one.
    """
    return _ISA in ("avx512_bf16", "avx512", "avx2") and not (dtype == torch.bfloat16 and _HAS_TILES)


def _has_tensor_cores(device: str, dtype: torch.dtype, facts: dict[str, int]) -> bool:
    """Whether products within a kernel run on tensor cores, as torch's do: exact float32 has none.

    From the counts of bytes and operations; not measured on a GPU yet.
    """
    return dtype in (torch.bfloat16, torch.float16)


def _one_type(facts: dict[str, int]) -> str | None:
    """Refuse rows of another type than the weights'; a norm may be in float32 beside them."""
    return "x and the weights must be of one type" if facts.get("mixed") else None


def _at_most(channels: int, fact: str = "channels", rows: str = "rows") -> Callable[[dict[str, int]], str | None]:
    """Refuse rows that are too wide for a kernel that holds whole ones."""

    def limit(facts: dict[str, int]) -> str | None:
        return f"{rows} may have {channels} channels at most" if facts.get(fact, 0) > channels else None

    return limit


def _narrow_cells(facts: dict[str, int]) -> str | None:
    """Refuse what the projection of cells does not hold: whole rows of what the norm reads, and one type of them.

    A norm that comes first is a kernel of its own, which reads any type.
    """
    if facts.get("norm_first"):
        return _at_most(4096, "depth", "cells")(facts)
    return _one_type(facts) or _at_most(256, "outputs", "rows of what comes out")(facts)


def _narrow_windows(facts: dict[str, int]) -> str | None:
    """Refuse what the attention half's kernels do not hold: whole rows, and windows and heads of one tile."""
    if facts.get("window", 0) > 8:
        return "windows may have 8 x 8 slots at most"
    return _at_most(256)(facts) or _at_most(32, "head_dim", "heads")(facts)


def _has_large_windows(device: str, dtype: torch.dtype, facts: dict[str, int]) -> bool:
    """Whether windows hold more than 16 slots, which are few for the weights read; from counts, not measured."""
    return facts.get("window", 8) > 4


# Storage types up to 16, 32 and 64 bits, and those that the CPU's blocks multiply.
_HALVES = (torch.bfloat16, torch.float16)
_SINGLES = (torch.float32, *_HALVES)
_DOUBLES = (*_SINGLES, torch.float64)
_BLOCKS = (torch.float32, torch.bfloat16)

# One line per operation and backend. A sibling kernel registers here.
KERNELS: dict[tuple[str, str], Kernel] = {
    ("vsc_compress", "cpp"): Kernel(_DOUBLES, ("cpu", "cuda")),
    ("vsc_compress", "triton"): Kernel(_SINGLES, ("cuda", "cpu")),
    ("window_attention", "cpp"): Kernel(_SINGLES, ("cpu", "cuda")),
    ("window_attention", "triton"): Kernel(_SINGLES, ("cuda", "cpu"), _at_most(128, "head_dim", "heads")),
    ("dilated_causal_conv1d", "cpp"): Kernel(_DOUBLES, ("cpu", "cuda")),
    ("dilated_causal_conv1d", "triton"): Kernel(_SINGLES, ("cuda", "cpu")),
    ("cross_modal_contrastive", "cpp"): Kernel(_SINGLES, ("cpu", "cuda")),
    ("cross_modal_contrastive", "triton"): Kernel(_SINGLES, ("cuda", "cpu")),
    ("project_cells", "cpp"): Kernel(_BLOCKS, ("cpu",), _one_type, _has_vectors),
    ("project_cells", "triton"): Kernel(_HALVES, ("cuda", "cpu"), _narrow_cells),
    ("position_bias", "triton"): Kernel(_SINGLES, ("cuda", "cpu"), _at_most(64, "heads", "rows of the table")),
    ("residual_norm", "cpp"): Kernel(_DOUBLES, ("cuda",), _at_most(2048)),
    ("residual_norm", "triton"): Kernel(_SINGLES, ("cuda", "cpu"), _at_most(4096)),
    ("residual_mlp", "cpp"): Kernel(_BLOCKS, ("cpu",), _one_type, _has_vectors),
    ("residual_mlp", "triton"): Kernel(_SINGLES, ("cuda", "cpu"), _at_most(4096), _has_tensor_cores),
    ("residual_window_attention", "cpp"): Kernel(_BLOCKS, ("cpu",), _one_type, _has_vectors),
    ("residual_window_attention", "triton"): Kernel(_HALVES, ("cuda", "cpu"), _narrow_windows, _has_large_windows),
}
OPS = tuple(dict.fromkeys(op for op, _ in KERNELS))


def _file_of(name: str) -> Path | None:
    return min(_PACKAGE.glob(f"{name}*.so"), default=None)


def _load_extension(name: str) -> str | None:
    """Load ``_C_cpu`` or ``_C_cuda``; return why it is absent, or None where its operators are registered."""
    file = _file_of(name)
    if file is None:
        return f"the extension {name} is not built: run `pip install -e .` with a C++ compiler" + (
            " and nvcc" if name == "_C_cuda" else ""
        )
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError, ImportError) as error:
        return f"the extension {file.name} does not load: {str(error).splitlines()[0]}"
    return None


_EXTENSIONS: dict[str, str | None] = {
    "cpu": _load_extension("_C_cpu"),
    "cuda": _load_extension("_C_cuda") if torch.version.cuda else "this torch is built without CUDA",
}
# Operators that an operation calls beside its own, by device: the extension there has these too.
BESIDE = {
    ("dilated_causal_conv1d", "cpu"): ("weight_normed_conv1d_cpp_fwd", "weight_normed_conv1d_cpp_bwd"),
    **{(op, "cpu"): ("pack_weight_cpp",) for op in ("project_cells", "residual_mlp", "residual_window_attention")},
}
_SCHEMAS = _built_for.schemas()
# None of an extension that does not tell, which is then taken at its word.
_BUILT_FOR = {
    device: _built_for.of(file)
    for device, absent in _EXTENSIONS.items()
    if absent is None and (file := _file_of(f"_C_{device}")) is not None
}


def _outdated(op: str, device: str) -> str | None:
    """Return that the extension is not what an operation calls: it lacks it, or takes other arguments; else None."""
    name = f"_C_{device}"
    if _EXTENSIONS[device] is not None:
        return None
    told = _BUILT_FOR.get(device)
    for operator in (f"{op}_cpp_fwd", f"{op}_cpp_bwd", *BESIDE.get((op, device), ())):
        name_of = operator.split("_cpp")[0]
        try:
            found = torch._C._dispatch_has_kernel_for_dispatch_key(f"deepmsi::{operator}", device.upper())
        except RuntimeError:  # nothing ever registered that name
            found = False
        if not found:
            return f"the extension {name} is older than this deepmsi and lacks {name_of}: run `pip install -e .`"
        if told is not None and name_of in _SCHEMAS and told.get(name_of) != _SCHEMAS[name_of]:
            return (
                f"the extension {name} is of another deepmsi than this one, and its {name_of} takes other arguments: "
                "run `pip install -e .`"
            )
    return None


# Asked once: what is registered does not change, and a lookup inside a compiled graph would break it.
_OUTDATED: dict[tuple[str, str], str | None] = {
    (op, device): _outdated(op, device)
    for (op, backend), kernel in KERNELS.items()
    if backend == "cpp"
    for device in kernel.devices
}
_TRITON: str | None = None if importlib.util.find_spec("triton") else "triton is not installed"
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _checked(name: str, where: str, wrong: type[Exception] = ValueError) -> str:
    if name not in (*BACKENDS, "auto"):
        raise wrong(f"{where} must be one of reference, triton, cpp, auto, not {name!r}")
    return name


_environment: str = _checked(os.environ.get("DEEPMSI_BACKEND", "auto") or "auto", "DEEPMSI_BACKEND", UserError)
_override: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside on one backend: ``reference``, ``triton``, ``cpp`` or ``auto``.

    The setting belongs to the process, so enter it outside of threads. A compiled model sees a change and
    compiles again.

    Raises:
        ValueError: The name is none of the four.
    """
    global _override
    before, _override = _override, _checked(name, "use_backend()'s name")
    try:
        yield
    finally:
        _override = before


def why_not(
    op: str, backend: str, device: str | None = None, dtype: torch.dtype | None = None, **facts: int
) -> str | None:
    """Return the sentence that says why a backend cannot run an operation, or None where it can.

    Args:
        op: One of ``OPS``.
        backend: ``reference``, ``triton`` or ``cpp``.
        device: Type of the tensors' device, such as ``cpu``; None asks about any device of this machine.
        dtype: Storage type of the tensors; None asks about any.
        **facts: Integers that the kernel's limits read, such as ``channels=384``.
    """
    if backend == "reference":
        return None
    kernel = KERNELS.get((op, backend))
    if kernel is None:
        return f"{op} has no {backend} implementation"
    if device is not None and transforms():
        return "kernels have gradients alone: transforms of torch.func and forward mode run on the reference"
    if backend == "triton" and _TRITON is not None:
        return _TRITON
    if device is None:
        reasons = [why_not(op, backend, d, dtype, **facts) for d in ("cuda", "cpu")]
        on_gpu = torch.cuda.is_available() or (backend == "triton" and torch.version.cuda)
        return None if None in reasons else reasons[0 if on_gpu else 1]
    if device not in kernel.devices:
        return f"{backend} {op} runs on {' and '.join(kernel.devices)}, not on {device}"
    if backend == "triton" and device == "cpu" and not _INTERPRET:
        return "triton runs on the CPU only under its interpreter: set TRITON_INTERPRET=1 before the start"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    if backend == "cpp" and (absent := _EXTENSIONS[device] or _OUTDATED[(op, device)]) is not None:
        return absent
    if dtype is not None and dtype not in kernel.dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in kernel.dtypes)
        return f"{backend} {op} takes {names}, not {str(dtype).removeprefix('torch.')}"
    return kernel.limit(facts) if kernel.limit is not None else None


def transforms() -> bool:
    """Whether ``torch.func`` or a level of forward mode is around the call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def require(op: str, backend: str, device: str, dtype: torch.dtype, **facts: int) -> None:
    """Raise the sentence of :func:`why_not` where the backend cannot run the call.

    Raises:
        RuntimeError: The backend cannot run it.
    """
    reason = why_not(op, backend, device, dtype, **facts)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")


def resolve(op: str, backend: str | None, device: str, dtype: torch.dtype, **facts: int) -> str:
    """Return the backend that a call runs on: ``reference``, ``triton`` or ``cpp``.

    Args:
        op: One of ``OPS``.
        backend: The call's argument; None leaves the choice to ``use_backend()`` and what comes after it.
        device: Type of the tensors' device.
        dtype: Storage type of the tensors.
        **facts: Integers that the kernel's limits read.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: A backend was asked for by name and cannot run this call; the message says why.
    """
    name = _checked(backend, "backend") if backend is not None else (_override or _environment)
    if name != "auto":
        require(op, name, device, dtype, **facts)
        return name
    for candidate in ("triton", "cpp") if device == "cuda" else ("cpp",):
        if why_not(op, candidate, device, dtype, **facts) is None:
            faster = KERNELS[(op, candidate)].faster
            if faster is None or faster(device, dtype, facts):
                return candidate
    return "reference"


def fuses(op: str, device: str, dtype: torch.dtype, **facts: int) -> bool:
    """Whether a module runs a block as one kernel, rather than as a chain of modules that do the same.

    It does where that kernel is what ``auto`` takes, or the backend that is set by name has it.
    """
    name = _override or _environment
    if name == "auto":
        return resolve(op, None, device, dtype, **facts) != "reference"
    return name != "reference" and why_not(op, name, device, dtype, **facts) is None


def explain() -> str:
    """Return a page that says which backend runs which operation here, or why not, with versions."""
    lines = [f"deepmsi {__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    lines.append(f"triton: {_triton_version()}")
    if torch.cuda.is_available():
        lines += [
            f"device {i}: {torch.cuda.get_device_name(i)}, sm_%d%d" % torch.cuda.get_device_capability(i)
            for i in range(torch.cuda.device_count())
        ]
    else:
        lines.append("device: CPU only (no CUDA device is visible)")
    lines.append(f"threads: {torch.get_num_threads()}")
    lines += [f"{key}: {value}" for key, value in host_info().items()]
    lines += [f"extension _C_{kind}: {reason or 'loaded'}" for kind, reason in _EXTENSIONS.items()]
    asked = "use_backend()" if _override else "DEEPMSI_BACKEND" if _environment != "auto" else "default"
    lines += [f"backend: {_override or _environment} ({asked})", ""]
    width = max(map(len, OPS))
    for op in OPS:
        for backend in BACKENDS:
            lines.append(f"{op:<{width}}  {backend:<9}  {why_not(op, backend) or 'available'}")
    return "\n".join(lines)


def _triton_version() -> str:
    if _TRITON is not None:
        return _TRITON
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "pytorch-triton"):
        try:
            return version(name) + (" (interpreter)" if _INTERPRET else "")
        except PackageNotFoundError:
            continue
    return "installed, version unknown"
