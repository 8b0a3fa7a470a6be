"""What every benchmark shares: where it runs, alternation of two sides in one run, and facts for the JSON.

On a GPU a time is the distance of two events, with the L2 cache overwritten before each run. Small sizes are captured
in a CUDA graph on both sides, and their eager times, launches included, are recorded apart. Peak memory is what a call
holds above what was held before it: of a GPU by torch's allocator, on the CPU of a Linux by the resident memory.
"""

import contextlib
import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deepmsi
from deepmsi import backend as backends
from deepmsi import testing

Function = Callable[[], Any]

FLUSHED_BYTES = 2**28  # several times the L2 cache of any GPU so far


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smallest",
        action="store_true",
        default=os.environ.get("DEEPMSI_BENCH_SMALLEST", "") == "1",
        help="run each benchmark once at its smallest size (also DEEPMSI_BENCH_SMALLEST=1)",
    )
    parser.addoption("--threads", type=int, default=None, help="threads of torch; default: torch's own")
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to run; default: a GPU where there is one",
    )
    parser.addoption("--compile", action="store_true", help="also time the PyTorch form under torch.compile")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keep what explains a time, and leave out what names a machine or its folders."""
    for key in ("node", "python_build", "python_compiler", "release"):
        machine_info.pop(key, None)
    if "cpu" in machine_info:
        machine_info["cpu"] = {k: machine_info["cpu"].get(k) for k in ("brand_raw", "count", "arch")}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Drop the samples of every round and the state of the checkout: the percentiles stay."""
    output_json.pop("commit_info", None)
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        (entry["params"] or {}).pop("place", None)  # no type of JSON's; `param` names it


@dataclass(frozen=True)
class Place:
    """One backend on one device with one storage type."""

    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{name_of(self.dtype)}"

    @property
    def suffix(self) -> str:
        """What sets this place's cases apart from those of the others on the same device."""
        return f", {self.backend}, {name_of(self.dtype)}" if self.device == "cuda" else ""

    def need(self, op: str, **facts: int) -> None:
        """Skip the benchmark that runs, with the reason, where the backend cannot run the operation."""
        testing.need(op, self.backend, self.device, self.dtype, **facts)

    def randn(self, *size: int, seed: int) -> Tensor:
        """Return normal numbers; a GPU draws its own, for a CPU takes seconds over the largest."""
        if self.device == "cpu":
            return testing.randn(*size, seed=seed, dtype=self.dtype)
        draw = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*size, generator=draw, device=self.device).to(self.dtype)

    def tokens(self, rows: int, channels: int, *, seed: int) -> Tensor:
        """Return rows that lie about a few centres, as :func:`deepmsi.testing.tokens` draws them."""
        if self.device == "cpu":
            return testing.tokens(rows, channels, seed=seed, dtype=self.dtype)
        draw = torch.Generator(self.device).manual_seed(seed)
        centres = torch.randn(7, channels, generator=draw, device=self.device)
        choice = torch.randint(7, (rows,), generator=draw, device=self.device)
        noise = torch.randn(rows, channels, generator=draw, device=self.device)
        return (centres[choice] + 0.6 * noise).to(self.dtype)

    def close(self, actual: Tensor, wanted: Tensor, rtol: float = 1e-3, atol: float | None = None) -> None:
        """Assert that both sides give the same numbers: to the tolerance in float32, to some roundings in less.

        On a GPU one row in two hundred may differ: among millions of scores some lie within a rounding of each other,
        and the sides may choose differently between them. ``atol`` is 1e-4 of the largest number where none is given.
        """
        largest = wanted.abs().max().item()
        atol = 1e-4 * largest if atol is None else atol
        if self.device == "cpu":
            torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)
            return
        assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
        rtol, atol = (10 * rtol, 10 * atol) if self.dtype == torch.float32 else (5e-2, max(atol, 5e-2 * largest))
        if wanted.numel() == 1:  # a sum over everything, those rows among it
            rtol = 5e-2
        near = torch.isclose(actual.double(), wanted.double(), rtol=rtol, atol=atol)
        rows = near.reshape(-1, near.shape[-1] if near.dim() > 1 else 1).all(1)
        differ = rows.numel() - rows.sum().item()
        assert differ <= rows.numel() // 200, f"{differ} of {rows.numel()} rows differ"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a benchmark that asks for a place every one of the chosen device. The interpreter's time is no speed."""
    if "place" not in metafunc.fixturenames:
        return
    places = [Place("cpp", "cpu", torch.float32)]
    if metafunc.config.getoption("--device") == "cuda":
        types = (torch.float32, torch.bfloat16)
        places = [Place(backend, "cuda", dtype) for backend in ("triton", "cpp") for dtype in types]
    metafunc.parametrize("place", places, ids=str)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Type of the device that benchmarks run on."""
    name = str(request.config.getoption("--device"))
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: no CUDA device is visible", returncode=2)
    return name


@pytest.fixture(scope="session", autouse=True)
def _settings(request: pytest.FixtureRequest, device: str) -> Iterator[None]:
    """Set the threads, and true float32 on both sides: no float32 kernel of ours takes TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_num_threads(), matmul.allow_tf32, cudnn.allow_tf32
    if request.config.getoption("--threads"):
        torch.set_num_threads(request.config.getoption("--threads"))
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    torch.set_num_threads(before[0])
    matmul.allow_tf32, cudnn.allow_tf32 = before[1:]


@pytest.fixture(autouse=True)
def _memory(device: str) -> Iterator[None]:
    """Give the GPU's memory back after each benchmark: graphs hold pools of their own."""
    yield
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def smallest(request: pytest.FixtureRequest) -> bool:
    """Whether only the smallest size is to run, as CI does to see that benchmarks work."""
    return bool(request.config.getoption("--smallest"))


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> bool:
    """Whether baselines run under torch.compile, too."""
    return bool(request.config.getoption("--compile"))


def facts(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return device, versions, threads and arithmetic settings, which hold for both sides of a comparison.

    `load` is what else the machine is doing: above the number of its CPUs, wall time says little, and a run with
    `--threads 1 --benchmark-timer=time.process_time` counts the work itself.
    """
    name = platform.processor() or platform.machine()
    instructions = backends.host_info().get("instruction set in use", "none")
    if device == "cuda":
        name = torch.cuda.get_device_name()
        instructions = "sm_{}{}".format(*torch.cuda.get_device_capability())
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")), name)
    return {
        "device": name,
        "torch": torch.__version__,
        "deepmsi": deepmsi.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "instruction_set": instructions,
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32 if device == "cuda" else False,
        "dtype": name_of(dtype),
    }


def percentile(samples: list[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Moment:
    """A point in the GPU's work. The difference of two is in seconds, as that of a host clock's readings."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@cache
def flushed() -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")


def resident(what: str) -> int:
    """Return a figure of this process's memory, in bytes, from what Linux tells of it."""
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak_bytes(function: Function, device: str) -> int | None:
    """Return the most memory that a call holds above what was held before it; None where the system does not tell."""
    if device == "cpu":
        try:
            # What earlier calls gave back goes to the system first; the peak begins anew.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            return None
        before = resident("VmRSS")
        function()
        return max(resident("VmHWM") - before, 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Comparison:
    """Times one function with pytest-benchmark, and its baselines in turn with it, round by round."""

    def __init__(self, benchmark: Any, smallest: bool, timer: Callable[[], Any], device: str, compiles: bool) -> None:
        self.benchmark = benchmark
        self.smallest = smallest
        self.timer = timer
        self.device = device
        self.compiles = compiles
        self.first: dict[str, float] = {}

    def compiled(self, function: Function) -> dict[str, Function]:
        """Return the baseline `compile`, a call of the PyTorch form under torch.compile, where it was asked for.

        Its first call, which compiles, is made and timed here; check its numbers before it is timed.
        """
        if not self.compiles:
            return {}
        self.first["compile"] = self._time(function)
        return {"compile": function}

    def __call__(
        self,
        ours: Function,
        baselines: dict[str, Function],
        *,
        dtype: torch.dtype = torch.float32,
        floor: float | None = None,
        rounds: int = 15,
        graph: bool = False,
        **extra: Any,
    ) -> None:
        """Time `ours` against each baseline.

        Args:
            ours: The function that is measured; its numbers were checked before.
            baselines: What a user would take instead, by name.
            dtype: Storage type on both sides.
            floor: Seconds below which the work cannot be done here, or None where it is not known.
            rounds: Rounds of each side.
            graph: Whether a GPU replays every side from a CUDA graph; eager times are then recorded apart.
            **extra: Facts of the case, such as sizes.
        """
        rounds = 1 if self.smallest else rounds
        if name := os.environ.get("DEEPMSI_BENCH_NAME"):  # of a record beside others, as mkl.py makes or another CPU
            extra["case"] += f", {name}"
        sides = {**baselines, "ours": ours}
        info = self.benchmark.extra_info
        first = {name: self._time(function) for name, function in sides.items()} | self.first
        info.update(facts(self.device, dtype), **extra, first_call_s=first)
        peaks = {name: peak_bytes(function, self.device) for name, function in sides.items()}
        if None not in peaks.values():
            info["peak_bytes"] = peaks
        if self.device == "cuda":
            info["graph"] = False
            if graph:
                sides = self._captured(sides, rounds, info)
        samples: dict[str, list[float]] = {name: [] for name in baselines}

        def turn() -> None:
            for name in baselines:
                samples[name].append(self._time(sides[name], info.get("graph", False)))
            self._prepare(info.get("graph", False))

        # `setup` runs before each round, untimed: the sides alternate, so that a busy machine slows all alike.
        self.benchmark.pedantic(sides["ours"], setup=turn, rounds=rounds, iterations=1)
        if self.benchmark.stats is None:
            return
        median = self.benchmark.stats.stats.median
        data = list(self.benchmark.stats.stats.data)
        info["p20_s"], info["p80_s"] = percentile(data, 0.2), percentile(data, 0.8)
        for name, times in samples.items():
            info[f"{name}_s"] = statistics.median(times)
            info[f"{name}_p20_s"], info[f"{name}_p80_s"] = percentile(times, 0.2), percentile(times, 0.8)
            info[f"ratio_to_{name}"] = statistics.median(times) / median
        if floor is not None:
            info["floor_s"], info["share_of_floor"] = floor, floor / median

    def _captured(self, sides: dict[str, Function], rounds: int, info: dict[str, Any]) -> dict[str, Function]:
        """Return every side's graph, with the eager times noted; all stay eager where one cannot be captured."""
        eager: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, function in sides.items():
                eager[name].append(self._time(function))
        graphs = {}
        stream = torch.cuda.current_stream()
        for name, function in sides.items():
            try:
                graphs[name] = testing.captured(function)[0].replay
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # torch leaves that of a capture that failed
                info["no_graph"] = f"{name}: {str(error).splitlines()[0]}"
                return sides
        info["graph"], info["eager_s"] = True, {name: statistics.median(times) for name, times in eager.items()}
        return graphs

    def _prepare(self, graph: bool = False) -> None:
        """Bring a GPU to the state that a run starts from: its cache overwritten and, for eager runs, nothing queued.

        A graph is launched while the cache is still being overwritten: what is timed is the device's work alone.
        """
        if self.device == "cuda":
            flushed().zero_()
            if not graph:
                torch.cuda.synchronize()

    def _time(self, function: Function, graph: bool = False) -> float:
        self._prepare(graph)
        start = self.timer()
        function()
        return self.timer() - start


@pytest.fixture
def compare(benchmark: Any, smallest: bool, device: str, compiled: bool) -> Iterator[Comparison]:
    """Yield the function that times one side against the others, all by the clock of `--benchmark-timer`.

    On a GPU the clock is the GPU's: pytest-benchmark takes differences of whatever its timer returns.
    """
    if device == "cuda":
        benchmark._timer = Moment
        benchmark.extra_info["clock"] = "GPU events, cold cache"
    else:
        benchmark.extra_info["clock"] = "CPU time" if benchmark._timer is time.process_time else "wall time"
    with contextlib.ExitStack() as stack:
        if compiled:
            # Nothing compiled before is found again: the first call is what a user's first call costs.
            from torch._inductor.utils import fresh_cache

            torch._dynamo.reset()
            stack.enter_context(fresh_cache())
        yield Comparison(benchmark, smallest, benchmark._timer, device, compiled)


def products(a: Tensor, b: Tensor) -> list[Function]:
    """Return what torch has to multiply matrices by, b square.

    MKL, behind torch.mm, has its fast float32 kernels for Intel's CPUs alone; oneDNN asks what the CPU can do.
    """
    found: list[Function] = [lambda: torch.mm(a, b)]
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        x, w = a.to_mkldnn(), b.to_mkldnn()
        found.append(lambda: torch.nn.functional.linear(x, w))
    return found


class Ceilings:
    """What this device reaches at plain products and, a GPU, at copying: what floors are counted from."""

    def __init__(self, device: str, timer: Callable[[], Any]) -> None:
        self.device = device
        self.timer = timer
        self.measure = cache(self._measure)

    def floor(self, operations: float, traffic: float, dtype: torch.dtype) -> float:
        """Return seconds below which the work cannot be done.

        Args:
            operations: Floating-point operations of its products.
            traffic: Bytes that a GPU must read and write; a CPU's caches hold too much for this to be a floor.
            dtype: Storage type of the products' operands.
        """
        rate, bandwidth = self.measure(dtype)
        return max(operations / rate, traffic / bandwidth)

    def _measure(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return operations a second of a product, and bytes a second, infinite on a CPU."""
        side = 768 if self.device == "cpu" else 8192
        # Not torch's own generator, which no longer draws after a capture that failed.
        draw = torch.Generator(self.device).manual_seed(0)
        a, b = (torch.randn(side, side, generator=draw, device=self.device).to(dtype) for _ in range(2))
        rate = 2 * side**3 / min(map(self._least, products(a, b)))
        if self.device == "cpu":
            return rate, float("inf")
        source = torch.randn(2**28, generator=draw, device=self.device)
        target = torch.empty_like(source)
        return rate, 2 * source.nbytes / self._least(lambda: target.copy_(source))

    def _least(self, function: Function) -> float:
        times = []
        for _ in range(8):
            start = self.timer()
            function()
            times.append(self.timer() - start)
        return min(times)


@pytest.fixture
def ceilings(compare: Comparison) -> Ceilings:
    """Return what this device reaches, measured when it is first asked for."""
    return Ceilings(compare.device, compare.timer)
