"""What every benchmark shares: sizes, alternation of two sides in one run, and the facts that go into the JSON."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import deepmsi
from deepmsi import backend

Function = Callable[[], Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smallest",
        action="store_true",
        default=os.environ.get("DEEPMSI_BENCH_SMALLEST", "") == "1",
        help="run each benchmark once at its smallest size (also DEEPMSI_BENCH_SMALLEST=1)",
    )
    parser.addoption("--compile", action="store_true", help="also time baselines under torch.compile; minutes each")
    parser.addoption("--threads", type=int, default=None, help="threads of torch; default: torch's own")


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


@pytest.fixture(scope="session", autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    if request.config.getoption("--threads"):
        torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


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
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")), name)
    return {
        "device": name,
        "torch": torch.__version__,
        "deepmsi": deepmsi.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "instruction_set": backend.host_info().get("instruction set in use", "none"),
        "tf32": torch.backends.cuda.matmul.allow_tf32 if device == "cuda" else False,
        "dtype": str(dtype).removeprefix("torch."),
    }


def percentile(samples: list[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Comparison:
    """Times one function with pytest-benchmark, and its baselines in turn with it, round by round."""

    def __init__(self, benchmark: Any, smallest: bool, timer: Callable[[], float]) -> None:
        self.benchmark = benchmark
        self.smallest = smallest
        self.timer = timer

    def __call__(
        self,
        ours: Function,
        baselines: dict[str, Function],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        floor: float | None = None,
        rounds: int = 15,
        **extra: Any,
    ) -> None:
        """Time `ours` against each baseline.

        Args:
            ours: The function that is measured; its numbers were checked before.
            baselines: What a user would take instead, by name.
            device: Type of the device that the work runs on; a GPU is waited for.
            dtype: Storage type on both sides.
            floor: Seconds below which the work cannot be done here, or None where it is not known.
            rounds: Rounds of each side.
            **extra: Facts of the case, such as sizes.
        """
        rounds = 1 if self.smallest else rounds
        samples: dict[str, list[float]] = {name: [] for name in baselines}
        first: dict[str, float] = {name: self._time(f, device) for name, f in {**baselines, "ours": ours}.items()}

        def turn() -> None:
            for name, function in baselines.items():
                samples[name].append(self._time(function, device))

        def once() -> None:
            ours()
            if device == "cuda":
                torch.cuda.synchronize()

        # `setup` runs before each round, untimed: the sides alternate, so that a busy machine slows all alike.
        self.benchmark.pedantic(once, setup=turn, rounds=rounds, iterations=1)
        median = self.benchmark.stats.stats.median if self.benchmark.stats else None
        info = self.benchmark.extra_info
        info.update(facts(device, dtype), **extra, first_call_s=first)
        if median is None:
            return
        data = list(self.benchmark.stats.stats.data)
        info["p20_s"], info["p80_s"] = percentile(data, 0.2), percentile(data, 0.8)
        for name, times in samples.items():
            info[f"{name}_s"] = statistics.median(times)
            info[f"{name}_p20_s"], info[f"{name}_p80_s"] = percentile(times, 0.2), percentile(times, 0.8)
            info[f"ratio_to_{name}"] = statistics.median(times) / median
        if floor is not None:
            info["floor_s"], info["share_of_floor"] = floor, floor / median

    def _time(self, function: Function, device: str) -> float:
        start = self.timer()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return self.timer() - start


@pytest.fixture
def compare(benchmark: Any, smallest: bool) -> Comparison:
    """Return the function that times one side against the others, all by the clock of `--benchmark-timer`."""
    timer = benchmark._timer
    benchmark.extra_info["clock"] = "CPU time" if timer is time.process_time else "wall time"
    return Comparison(benchmark, smallest, timer)


@pytest.fixture
def gemm_rate(benchmark: Any) -> float:
    """Return this CPU's float32 rate of a plain product, in operations a second, for floors."""
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    times = []
    for _ in range(8):
        start = benchmark._timer()
        torch.mm(a, b)
        times.append(benchmark._timer() - start)
    return 2 * 768**3 / min(times)
