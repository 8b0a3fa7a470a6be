"""Compile every Triton kernel as its operator launches it, for GPUs that need not be here, and read what it takes.

The operators themselves run on tensors of the CPU with the launches taken down instead of made, in one type and as
autocast mixes two; each launch is then compiled for every target, a process for each core. It fails where a kernel
needs more shared memory than the GPU has, where a spill is not in `aot_budget.json` or exceeds it, where warps that
have no rows of a product left compute it once more, where TensorFloat-32 stands in the PTX of a float32 call, and where
an operation with a Triton kernel has no case here. `python bench/aot.py` writes `results/aot.json` and
`results/aot.md`; `--quick` is for every push, and fails where the record lacks a kernel.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import budget
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from deepmsi import backend, ops
from deepmsi.ops.dilated_causal_conv1d import causal_conv_rows

RESULTS = Path(__file__).parent / "results"
# Shared memory that one block may take, in bytes.
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Kernels whose warps may compute a product more than once: four of them read weights for a tile of 16 x 16.
REPEATS = {("dilated_causal_conv1d", "_forward_kernel"): 2, ("dilated_causal_conv1d", "_grad_x_kernel"): 2}


@dataclass(frozen=True)
class Types:
    """The type of products, and that of the rows and norms beside them, which a GPU's autocast leaves in float32."""

    products: torch.dtype
    rows: torch.dtype

    @property
    def mixed(self) -> bool:
        return self.products != self.rows


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as its operator made it."""

    op: str
    case: str
    dtype: str
    direction: str
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one target: registers of a thread, bytes of spills a thread, shared bytes of a block.

    And how many times its warps compute the same product, at most.
    """

    op: str
    kernel: str
    direction: str
    case: str
    dtype: str
    target: str
    warps: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    repeats: int
    tf32: bool

    @property
    def key(self) -> str:
        return f"{self.op}.{self.kernel} {self.case} {self.dtype} {self.target}"


class _Target:
    """Stands in for a GPU's driver as far as compiling asks it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def _vsc(types: Types, packed: bool, rows: int, channels: int) -> Tensor:
    x = torch.zeros(2 * rows, channels, dtype=types.products, requires_grad=True)
    guide = torch.zeros(2, channels, requires_grad=True)
    if packed:
        cu = torch.tensor([0, rows, 2 * rows], dtype=torch.int32)
        out = ops.vsc_compress(x, cu, guide, capacity=rows // 2, backend="triton")
    else:
        out = ops.vsc_compress(x.view(2, rows, channels), None, guide, keep=rows // 2, backend="triton")
    return out.tokens.float().sum() + out.gate.float().sum()


def _window(types: Types, packed: bool, side: int, window: int, depth: int, shift: int | None = None) -> Tensor:
    shift = window // 2 if shift is None else shift
    heads = 3
    shape = (2 * side * side,) if packed else (2, side, side)
    qkv = torch.zeros(*shape, 3 * heads * depth, dtype=types.products, requires_grad=True)
    table = torch.zeros((2 * window - 1) ** 2, heads, requires_grad=True)
    scale = torch.zeros(heads, requires_grad=True)
    where: dict[str, Tensor] = {}
    if packed:
        where["positions"] = torch.arange(side * side, dtype=torch.int32).repeat(2)
        where["cu_seqlens"] = torch.tensor([0, side * side, 2 * side * side], dtype=torch.int32)
    out = ops.window_attention(
        qkv, heads, (side, side), window, shift, bias_table=table, logit_scale=scale, backend="triton", **where
    )
    return out.float().sum()


def _contrastive(types: Types, size: int, dim: int) -> Tensor:
    a = torch.zeros(size, dim, dtype=types.products, requires_grad=True)
    b = torch.zeros(size, dim, dtype=types.products, requires_grad=True)
    return ops.cross_modal_contrastive(a, b, torch.zeros(size, dtype=torch.int64), backend="triton")


def _conv(types: Types, batch: int, count: int | None) -> Tensor:
    """Two convolutions of a block, at the last positions that the next one reads or at all of them."""
    channels = 1024
    x = torch.zeros(batch, 15, channels, dtype=types.products, requires_grad=True)
    weight = torch.zeros(3, channels, channels, dtype=types.products, requires_grad=True)
    residual = torch.zeros(batch, 15 if count is None else count, channels, dtype=types.products, requires_grad=True)
    seed = torch.zeros((), dtype=torch.int64)
    out = causal_conv_rows(
        x, weight, weight[0, 0], count=count, relu=True, residual=residual, seed=seed, dropout=0.3, backend="triton"
    )
    return out.float().sum()


def _row_scale(types: Types, x: Tensor, trained: bool) -> Tensor | None:
    """Return what stochastic depth multiplies the rows of a training step by; the others train without it."""
    return torch.zeros_like(x[..., 0]) if types.mixed and trained else None


def _mlp(types: Types, packed: bool, channels: int, trained: bool = True, norm_first: bool = False) -> Tensor:
    rows, hidden = 256, 4 * channels
    shapes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    layers = [torch.zeros(*shape, dtype=types.products, requires_grad=trained) for shape in shapes]
    norm = [torch.zeros(channels, dtype=types.rows, requires_grad=trained) for _ in range(2)]
    x = torch.zeros(rows, channels, dtype=types.rows, requires_grad=trained)
    cu = torch.tensor([0, rows], dtype=torch.int32) if packed else None
    scale = _row_scale(types, x, trained)
    options: dict[str, Any] = {"row_scale": scale, "norm_first": norm_first, "backend": "triton"}
    return ops.residual_mlp(x, *layers, *norm, cu_seqlens=cu, **options).float().sum()


def _attention(
    types: Types, packed: bool, channels: int, shift: int, trained: bool = True, norm_first: bool = False
) -> Tensor:
    """In windows of 8 x 8 as Swin V2 has them, or of 7 x 7 as V1, whose norm comes first."""
    side, window, heads = (14, 7, channels // 32) if norm_first else (16, 8, channels // 32)
    shapes = ((3 * channels, channels), (3 * channels,), (channels, channels), (channels,))
    layers = [torch.zeros(*shape, dtype=types.products, requires_grad=trained) for shape in shapes]
    norm = [torch.zeros(channels, dtype=types.rows, requires_grad=trained) for _ in range(2)]
    x = torch.zeros(2, side, side, channels, dtype=types.rows, requires_grad=trained)
    table, scale = (torch.zeros(*n, requires_grad=trained) for n in (((2 * window - 1) ** 2, heads), (heads,)))
    where: dict[str, Any] = {"bias_table": table, "norm_first": norm_first, "backend": "triton"}
    if not norm_first:
        where["logit_scale"] = scale
    if packed:
        x = x.flatten(0, 2)
        where["positions"] = torch.arange(side * side, dtype=torch.int32).repeat(2)
        where["cu_seqlens"] = torch.tensor([0, side * side, 2 * side * side], dtype=torch.int32)
    where["row_scale"] = _row_scale(types, x, trained)
    y = ops.residual_window_attention(x, *layers, *norm, heads, (side, side), window, shift, **where)
    return y.float().sum()


def _cells(types: Types, kind: str, channels: int, trained: bool = True) -> Tensor:
    """Patches of a frame, the 2 x 2 cells of tokens of half as many channels, or packed rows of them; a norm first.

    In training a copy of tokens in the type of products is read, for backward keeps it.
    """
    cu, tokens = None, types.products if trained else types.rows
    if kind == "packed":
        x = torch.zeros(1, 1, 100, 1, 1, 2 * channels, dtype=tokens, requires_grad=trained)
        cu = torch.tensor([0, 90], dtype=torch.int32)
    elif kind == "patches":
        x = torch.zeros(1, 3, 8, 4, 8, 4, dtype=types.products).permute(0, 2, 4, 1, 3, 5)
    else:
        x = torch.zeros(1, 8, 2, 8, 2, channels // 2, dtype=tokens, requires_grad=trained).permute(0, 1, 3, 4, 2, 5)
    depth = x.shape[3] * x.shape[4] * x.shape[5]
    weight = torch.zeros(channels, depth, dtype=types.products, requires_grad=trained)
    norm_first = kind == "norm first"
    size = depth if norm_first else channels
    norm = [torch.zeros(size, dtype=types.rows, requires_grad=trained) for _ in range(2)]
    operator, bias = torch.ops.deepmsi.project_cells_triton_fwd, weight[:, 0] if kind == "patches" else None
    return operator(x, weight, bias, *norm, cu, 1e-5, norm_first, channels, trained)[0].sum()


def _norm(types: Types, channels: int) -> Tensor:
    x = torch.zeros(256, channels, dtype=types.rows, requires_grad=True)
    branch = torch.zeros(256, channels, dtype=types.products, requires_grad=True)
    weight, bias = (torch.zeros(channels, dtype=types.rows, requires_grad=True) for _ in range(2))
    scale = torch.zeros(256, dtype=types.rows)
    return ops.residual_norm(x, branch, weight, bias, row_scale=scale, backend="triton").float().sum()


def _bias(types: Types, window: int, heads: int) -> Tensor:
    coordinates, sizes = torch.zeros((2 * window - 1) ** 2, 2), ((512, 2), (512,), (heads, 512))
    weights = [torch.zeros(*size, dtype=types.products, requires_grad=True) for size in sizes]
    return ops.position_bias(coordinates, *weights, backend="triton").sum()


# op, case, the call, and whether every push compiles it
CASES: tuple[tuple[str, str, Callable[[Types], Tensor], bool], ...] = (
    ("vsc_compress", "dense 256 x 384", lambda d: _vsc(d, False, 256, 384), True),
    ("vsc_compress", "packed 256 x 384", lambda d: _vsc(d, True, 256, 384), False),
    ("vsc_compress", "packed 4096 x 1024", lambda d: _vsc(d, True, 4096, 1024), False),
    ("window_attention", "dense 16, window 8, head 32", lambda d: _window(d, False, 16, 8, 32), True),
    ("window_attention", "unshifted", lambda d: _window(d, False, 16, 8, 32, 0), True),
    ("window_attention", "packed 16, window 8, head 32", lambda d: _window(d, True, 16, 8, 32), False),
    ("window_attention", "dense 10, window 5, head 32", lambda d: _window(d, False, 10, 5, 32), False),
    ("window_attention", "dense 14, window 7, head 32", lambda d: _window(d, False, 14, 7, 32), False),
    ("window_attention", "dense 16, window 8, head 64", lambda d: _window(d, False, 16, 8, 64), False),
    ("window_attention", "dense 16, window 8, head 128", lambda d: _window(d, False, 16, 8, 128), False),
    ("window_attention", "dense 16, window 16, head 64", lambda d: _window(d, False, 16, 16, 64), False),
    ("dilated_causal_conv1d", "last step, 1 x 1 of 1024", lambda d: _conv(d, 1, 1), True),
    ("dilated_causal_conv1d", "last step, 8 x 8 of 1024", lambda d: _conv(d, 8, 8), False),
    ("dilated_causal_conv1d", "16 x 15 of 1024", lambda d: _conv(d, 16, None), True),
    ("cross_modal_contrastive", "16 x 256", lambda d: _contrastive(d, 16, 256), True),
    ("cross_modal_contrastive", "4096 x 256", lambda d: _contrastive(d, 4096, 256), True),
    ("position_bias", "window 8, 12 heads", lambda d: _bias(d, 8, 12), True),
    ("position_bias", "window 16, 24 heads", lambda d: _bias(d, 16, 24), False),
    ("position_bias", "window 8, 48 heads", lambda d: _bias(d, 8, 48), False),
    ("residual_norm", "384 channels", lambda d: _norm(d, 384), True),
    ("residual_norm", "4096 channels", lambda d: _norm(d, 4096), False),
    ("residual_mlp", "96 channels", lambda d: _mlp(d, False, 96), True),
    ("residual_mlp", "packed, 192 channels", lambda d: _mlp(d, True, 192), True),
    ("residual_mlp", "packed, 192 channels, inference", lambda d: _mlp(d, True, 192, False), False),
    ("residual_mlp", "96 channels, inference", lambda d: _mlp(d, False, 96, False), False),
    ("residual_mlp", "64 channels", lambda d: _mlp(d, False, 64), False),
    ("residual_mlp", "128 channels", lambda d: _mlp(d, False, 128), False),
    ("residual_mlp", "256 channels", lambda d: _mlp(d, False, 256), False),
    ("residual_mlp", "packed, 384 channels", lambda d: _mlp(d, True, 384), True),
    ("residual_mlp", "norm first, 96 channels", lambda d: _mlp(d, False, 96, norm_first=True), True),
    ("residual_mlp", "norm first, 192 channels", lambda d: _mlp(d, False, 192, norm_first=True), True),
    ("residual_mlp", "norm first, 192 channels, inference", lambda d: _mlp(d, False, 192, False, True), False),
    ("residual_mlp", "norm first, 384 channels", lambda d: _mlp(d, False, 384, norm_first=True), True),
    ("residual_window_attention", "96 channels", lambda d: _attention(d, False, 96, 0), True),
    ("residual_window_attention", "shifted, 192 channels", lambda d: _attention(d, False, 192, 4), True),
    ("residual_window_attention", "96 channels, inference", lambda d: _attention(d, False, 96, 0, False), False),
    ("residual_window_attention", "128 channels", lambda d: _attention(d, False, 128, 0), False),
    ("residual_window_attention", "packed, 256 channels", lambda d: _attention(d, True, 256, 4), False),
    ("residual_window_attention", "norm first, 96 channels", lambda d: _attention(d, False, 96, 0, True, True), True),
    ("residual_window_attention", "norm first, 192 channels", lambda d: _attention(d, False, 192, 3, True, True), True),
    ("project_cells", "patches of 4 x 4, 96 channels", lambda d: _cells(d, "patches", 96), True),
    ("project_cells", "2 x 2 tokens, 192 channels", lambda d: _cells(d, "tokens", 192), True),
    ("project_cells", "2 x 2 tokens, 192 channels, inference", lambda d: _cells(d, "tokens", 192, False), True),
    ("project_cells", "2 x 2 tokens, 256 channels", lambda d: _cells(d, "tokens", 256), False),
    ("project_cells", "packed, 192 channels", lambda d: _cells(d, "packed", 192), False),
    ("project_cells", "norm first, 2 x 2 tokens, 192 channels", lambda d: _cells(d, "norm first", 192), True),
)
DTYPES = {
    "float32": Types(torch.float32, torch.float32),
    "bfloat16": Types(torch.bfloat16, torch.bfloat16),
    "float16": Types(torch.float16, torch.float16),
    "bfloat16 autocast": Types(torch.bfloat16, torch.float32),
}
# Under autocast the others are of one type, too.
MIXING = ("project_cells", "residual_norm", "residual_mlp", "residual_window_attention")
# What ptxas said of each kernel that this process compiled, by its hash.
_REPORTS: dict[str, str] = {}


@contextlib.contextmanager
def _taking_down(launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> Iterator[None]:
    """Put every launch into the list instead of making it, and let the operators take tensors of the CPU."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    real, interpreted = JITFunction.run, backend._INTERPRET
    JITFunction.run, backend._INTERPRET = run, True
    try:
        yield
    finally:
        JITFunction.run, backend._INTERPRET = real, interpreted


def launches(number: int, dtypes: tuple[str, ...]) -> list[Launch]:
    """Return every launch of one case, forward and backward."""
    op, case, call, _ = CASES[number]
    made = []
    for name in dtypes:
        types = DTYPES[name]
        if types.products not in backend.KERNELS[op, "triton"].dtypes or (types.mixed and op not in MIXING):
            continue
        taken: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        with _taking_down(taken):
            loss = call(types)
            forward = len(taken)
            if loss.requires_grad:
                loss.backward()
        for n, (kernel, args, kwargs) in enumerate(taken):
            direction = "forward" if n < forward else "backward"
            made.append(Launch(op, case, name, direction, kernel, args, kwargs))
    return made


def resources(launch: Launch, capability: int) -> tuple[str, Resources]:
    """Compile a launch and read ptxas's report. The string is equal for equal kernels, in any process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        kernel = launch.kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)
    # Nothing is said of a kernel that this process holds already; which one it holds hangs on which jobs it was given.
    report = _REPORTS.setdefault(kernel.hash, said.getvalue())

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        if found is None:
            raise SystemExit(f"ptxas did not report {pattern!r} for {launch.kernel.__name__}:\n{report}")
        return int(found.group(1))

    return kernel.hash, Resources(
        launch.op,
        launch.kernel.__name__,
        launch.direction,
        launch.case,
        launch.dtype,
        f"sm_{capability}",
        int(kernel.metadata.num_warps),
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
        int(kernel.metadata.shared),
        repeats(kernel.asm["ttgir"]),
        ".tf32" in kernel.asm["ptx"],
    )


def repeats(ir: str) -> int:
    """Return how many times warps compute the same product on tensor cores, at most, from a kernel's Triton GPU IR.

    Where one product reads another the compiler lays all warps along its rows, and those past the last row start anew.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.nvidia_mma<\{(.*)\}>", ir, re.MULTILINE))
    most = 1
    for shape, name in re.findall(r"dot .*-> tensor<(\d+x\d+)x\w+, (#\w+)>", ir):
        if name in layouts:
            warps, instruction = (
                [int(n) for n in re.findall(r"\d+", found)]
                for found in re.findall(r"(?:warpsPerCTA|instrShape) = \[([\d, ]+)\]", layouts[name])
            )
            times = 1
            for size, count, step in zip(map(int, shape.split("x")), warps, instruction, strict=False):
                times *= max(1, count * step // size)
            most = max(most, times)
    return most


def identity(row: Resources) -> tuple[str, str, str, str]:
    """Return what tells a kernel apart from the others of the table, whatever case launches it."""
    return row.op, row.kernel, row.dtype, row.target


def compiled(number: int, dtypes: tuple[str, ...], capability: int) -> list[tuple[str, Resources]]:
    """Compile one case for one target, in a process of its own."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    driver.set_active(_Target(capability))  # what is launched may depend on it, too
    return [resources(launch, capability) for launch in launches(number, dtypes)]


def faults(found: Resources, allowed: budget.Budget) -> list[str]:
    """Return what is wrong with a kernel, a sentence each."""
    wrong = []
    limit = SHARED[int(found.target.removeprefix("sm_"))]
    if found.shared > limit:
        wrong.append(f"{found.key}: takes {found.shared} bytes of shared memory of {limit}")
    wrong += allowed.faults(found.key, found.spill_stores + found.spill_loads)
    if found.repeats > REPEATS.get((found.op, found.kernel), 1):
        wrong.append(f"{found.key}: computes a product {found.repeats} times: take fewer warps or more rows")
    if found.tf32 and found.dtype == "float32":
        wrong.append(f"{found.key}: multiplies float32 in TensorFloat-32")
    return wrong


def table(rows: list[Resources]) -> str:
    """Return a Markdown table."""
    lines = [
        f"Compiled ahead of time with Triton {triton.__version__}, not run: registers and spilled bytes of a thread,",
        "shared bytes of a block, and how many times warps compute the same product. Equal kernels of an operation are",
        "listed once, under the first case that launches them.",
        "",
        "| op | kernel | direction | case | dtype | target | warps | registers | spills | shared | repeats |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.op} | {r.kernel} | {r.direction} | {r.case} | {r.dtype} | {r.target} | {r.warps} | {r.registers} "
            f"| {r.spill_stores + r.spill_loads} | {r.shared} | {r.repeats} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and check what they take.")
    parser.add_argument("--op", choices=backend.OPS, help="one operation only; writes nothing")
    every = ",".join(map(str, SHARED))
    parser.add_argument("--targets", default=every, help="compute capabilities, by commas; 90 with --quick")
    parser.add_argument("--quick", action="store_true", help="main cases, without float16; writes nothing")
    options = parser.parse_args()
    targets = [90] if options.quick else [int(t) for t in options.targets.split(",")]
    if unknown := [t for t in targets if t not in SHARED]:
        parser.error(f"--targets knows {sorted(SHARED)}, not {unknown}")
    dtypes = ("float32", "bfloat16", "bfloat16 autocast") if options.quick else tuple(DTYPES)
    jobs = [
        (number, dtypes, target)
        for number, (op, _, _, always) in enumerate(CASES)
        for target in targets
        if (always or not options.quick) and options.op in (None, op)
    ]
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(compiled, *zip(*jobs, strict=True)))
    distinct: dict[tuple[str, str, str], Resources] = {}
    for part in parts:
        for name, row in part:
            distinct.setdefault((name, row.op, row.target), row)
    rows = list(distinct.values())

    recording = not (options.quick or options.op) and targets == sorted(SHARED)
    allowed = budget.Budget("triton", triton.__version__, recording)
    wrong = [sentence for row in rows for sentence in faults(row, allowed)]
    tried = {op for op, *_ in CASES}
    wrong += [f"{op} has a Triton kernel and no case" for op, b in backend.KERNELS if b == "triton" and op not in tried]
    record = RESULTS / "aot.json"
    if not recording:
        print(table(rows))
        # Not by the case: equal kernels are listed under the first one, and fewer cases have another first one.
        known = {identity(Resources(**row)) for row in json.loads(record.read_text())["kernels"]}
        wrong += [f"{row.key}: not in results/aot.json; run bench/aot.py" for row in rows if identity(row) not in known]
    else:
        wrong += allowed.unused()
        document = {"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}
        record.write_text(json.dumps(document, indent=1) + "\n")
        (RESULTS / "aot.md").write_text(table(rows))
    print(*allowed.told, f"{len(rows)} kernels compiled, {len(wrong)} faults", sep="\n")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
