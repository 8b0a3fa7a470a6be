"""Everything that a GPU can tell of the kernels, in one call, on a machine without a network.

`python bench/gpu.py --out FOLDER` builds into `build/gpu` (nothing is installed), measures the whole model, runs the
tests of the operations and modules on the GPU, measures the operations, also against torch.compile, and runs
compute-sanitizer on small cases. Each part has a time limit and each step a log, so that one failure does not lose the
rest; what no longer fits into `--budget` is dropped, and said. `--steps build,test,bench` takes some steps, in the
order given; without `build` the package is imported as it is installed. The folder gets `results.json` (versions, every
part, pytest-benchmark's records), `results.md` and one log a step. The exit code is 0 where every part passed or cannot
exist on this machine, and 1 otherwise.

The step `model` measures, in this order: the whole model at 16 x 15 frames in bfloat16 (training step and inference, as
they are and as CUDA graphs, also of one utterance; the memory of a step with Adam for each `recompute`), the video
branch at 16 x 15 frames against timm's and the batched one under torch.compile, the video branch and the model against
what else a user would take instead, the next frame of a stream and one image. The whole model needs pydantic. It goes
before the tests, since every benchmark checks its numbers before it times them. `bench` measures every operation,
`compile` the same against the PyTorch form under torch.compile.

`--device cpu --smallest` goes the same way with everything small, on a machine without a GPU.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from table import render

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("build", "model", "test", "bench", "compile", "sanitize")
LEAST = 20.0  # seconds under which no part is begun
GRACE = 15.0  # seconds that an interrupted part gets: pytest-xdist waits for its processes before it writes
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
# Of the whole model: name, file, limit in seconds, and what is added to the command.
MODEL: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("step", "step", 200, ()),
    ("against torch.compile", "model", 280, ("--compile", "-k", "video and released-16")),
    ("model", "model", 200, ()),
    ("latency", "latency", 60, ()),
    ("frozen stem", "frozen_stem", 60, ()),
)
# What the parts import beside torch: those that need one which is not there are refused, or skip.
PACKAGES = ("timm", "pydantic", "pytest-benchmark", "pytest-timeout", "pytest-xdist", "hypothesis", "setuptools")
BENCHES = (
    "vsc_compress",
    "window_attention",
    "dilated_causal_conv1d",
    "cross_modal_contrastive",
    "residual_mlp",
    "residual_window_attention",
    "residual_norm",
    "position_bias",
)


@dataclass
class Part:
    """One command of a step, and what came of it."""

    step: str
    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    # A program that has to be there, and what is said where the machine lacks what the part needs.
    tool: str | None = None
    refusal: str | None = None
    result: str = "not run"
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether it passed, or cannot exist on this machine."""
        return self.result == "passed" or self.result.startswith("cannot run here")

    def kept(self) -> dict[str, Any]:
        """Return what goes into the results: nothing that names the machine's folders."""
        names = ("step", "name", "result", "seconds", "counts", "failures")
        return {name: value for name, value in asdict(self).items() if name in names}


def pytest_of(chosen: str, *paths: str, processes: int = 0) -> list[str]:
    """Return the command that runs the tests that an expression chooses.

    In several processes a test that hangs on the device costs its own process alone, and the log names each test.
    """
    together = ["-n", str(processes), "--dist", "worksteal", "-vv", "--timeout=60", "--timeout-method=thread"]
    return [*PYTEST, *(together if processes else ()), "-k", chosen, *paths]


def building(options: argparse.Namespace, arch: str) -> list[Part]:
    # The extensions at the same time: each alone leaves most of many cores idle.
    command = [sys.executable, "setup.py", "-q", "build", "--parallel", "3", "--build-base", str(options.build)]
    native = {"DEEPMSI_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch} if arch else {}
    return [Part("build", "extensions", command, 300, native)]


def testing(options: argparse.Namespace) -> list[Part]:
    """Tests by the device in their names. The processes are for the compilers: Triton's, and torch.compile's.

    How many is a question of the GPU's memory, too: some tests take 5 GB for a tensor that ends past 2^31 elements.
    """
    on = options.device
    if options.smallest:
        return [
            Part("test", "operations", pytest_of(f"{on} and cpp and same_bits", "tests/ops"), 60),
            Part("test", "modules", pytest_of(f"{on} and cpp and every_backend", "tests/nn/test_tcn.py"), 60),
        ]
    processes = min(12, os.cpu_count() or 1)
    few = min(4, processes)
    graphs = pytest_of("cuda_graph or waited_for_nowhere", "tests/ops", processes=few)
    operations = pytest_of(f"{on} and not cuda_graph and not nowhere", "tests/ops", processes=processes)
    modules = pytest_of(on, "tests/nn", processes=few)
    files = [f"tests/models/test_{name}.py" for name in ("synchronisation", "graphs")]
    model = pytest_of("waited_for_nowhere or on_a_gpu", *files, processes=few)
    alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return [
        Part("test", "CUDA graphs, waiting", graphs, 90, alone),
        Part("test", "operations", operations, 220, alone),
        Part("test", "modules", modules, 90, alone),
        Part("test", "the model's graphs, waiting", model, 120, alone, refusal="No module named 'pydantic'"),
    ]


def sanitizing(options: argparse.Namespace) -> list[Part]:
    """Forward and backward of every kernel, small. Each allocation is the driver's own, so that its end is seen."""
    parts = []
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        # A call that fails is the libraries' own probing, or an error in Python anyway.
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command += pytest_of(f"{options.device} and same_bits and not reference", "tests/ops")
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        parts.append(Part("sanitize", tool, command, 120, own, command[0], "Device not supported"))
    return parts


def measuring(options: argparse.Namespace) -> list[str]:
    """Return the command that measures, to which files are added."""
    # Older versions of pytest take what follows "--device" for a path, and do not find bench's options then.
    command = [*PYTEST, "--benchmark-only", f"--device={options.device}"]
    return [*command, "--smallest"] if options.smallest else command


def modelling(options: argparse.Namespace) -> list[Part]:
    """The whole model, what most depends on first, should the time run out; nothing of it is small."""
    if options.smallest:
        return []
    command, refusal = measuring(options), "could not import 'pydantic'"
    return [
        Part("model", name, [*command, *more, f"bench/bench_{file}.py"], limit, refusal=refusal)
        for name, file, limit, more in MODEL
    ]


def benching(options: argparse.Namespace, compiled: bool) -> list[Part]:
    """Every operation; a compiled baseline is the same beside each backend."""
    command = measuring(options)
    if compiled:
        command += ["--compile", *(["-k", "triton"] if options.device == "cuda" else [])]
    step, limit = ("compile", 150) if compiled else ("bench", 120)
    names = BENCHES[:1] if options.smallest else BENCHES
    return [Part(step, name, [*command, f"bench/bench_{name}.py"], limit) for name in names]


def parts(options: argparse.Namespace, arch: str) -> Iterator[Part]:
    """Yield the parts of the chosen steps, in their order."""
    explain = Part("build", "explain", [sys.executable, "-c", "import deepmsi; print(deepmsi.explain())"], 60)
    if "build" in options.steps:
        yield from building(options, arch)
    yield explain
    for step in options.steps:
        if step == "model":
            yield from modelling(options)
        elif step == "test":
            yield from testing(options)
        elif step == "sanitize":
            yield from sanitizing(options)
        elif step in ("bench", "compile"):
            yield from benching(options, step == "compile")


def run(part: Part, limit: float, log: Path, environment: dict[str, str]) -> None:
    """Run a part within a limit, its output appended to a log, and note its result."""
    start = time.monotonic()
    with log.open("a") as output:
        output.write(f"=== {part.name}\n")
        output.flush()
        before = output.tell()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**environment, **part.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            part.result = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            stop(process)
            part.result = f"stopped after {limit:.3g} s"
    part.seconds = round(time.monotonic() - start, 1)
    with log.open("r+", errors="replace") as output:
        output.seek(before)
        said = output.read()
        if part.refusal is not None and not part.good and part.refusal in said:
            part.result = f"cannot run here: {part.refusal}"
        output.write(f"=== {part.name}: {part.result}\n\n")
    if part.name == "explain":
        print(said)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a part, which lets pytest write what it has, and then end all that it started."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_tests(part: Part, report: Path) -> None:
    """Note how many tests ran, and those that failed, from pytest's report."""
    if not report.is_file():
        return
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        return
    part.counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    part.failures = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if part.result == "passed" and part.counts["tests"] == part.counts["skipped"]:
        part.result = "failed: every test was skipped"


def versions(device: str) -> dict[str, Any]:
    """Return what the results depend on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in ("triton", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        if shutil.which(query[0]):
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def page(document: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [", ".join(f"{key} {value}" for key, value in document["versions"].items() if value), ""]
    lines += ["| step | part | result | seconds | tests | failed | skipped |", "|---|---|---|---|---|---|---|"]
    for part in document["parts"]:
        counts = part["counts"]
        failed = counts["failures"] + counts["errors"] if counts else ""
        cells = [part["step"], part["name"], part["result"], part["seconds"], counts.get("tests", ""), failed]
        lines.append("| " + " | ".join(map(str, [*cells, counts.get("skipped", "")])) + " |")
    for part in document["parts"]:
        lines += [f"- {part['name']}: {name}" for name in part["failures"][:40]]
    return "\n".join([*lines, "", render(document), ""])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", default=",".join(STEPS), help="which, in which order; default: %(default)s")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything; default: %(default)s")
    parser.add_argument("--smallest", action="store_true", help="the fewest tests and the smallest sizes")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="folder to build in")
    options = parser.parse_args()
    options.steps = options.steps.split(",")
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"--steps: {', '.join(sorted(unknown))} is none of {', '.join(STEPS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible (--device cpu --smallest goes the same way without one)")
    return options


def main() -> int:
    start = time.monotonic()
    options = arguments()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        (out / f"{step}.log").unlink(missing_ok=True)
    arch = "{}.{}".format(*torch.cuda.get_device_capability()) if options.device == "cuda" else ""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    # Options of a pytest that this may run under are not for those that it starts.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"PYTHONUNBUFFERED": "1", "PATH": f"{os.environ.get('PATH', '')}:{toolkit}"}
    document: dict[str, Any] = {
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(options.device),
        "parts": [],
        "benchmarks": [],
    }
    print(", ".join(f"{key} {value or 'is not installed'}" for key, value in document["versions"].items()), flush=True)
    done: list[Part] = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts(options, arch):
            built = (
                sorted(options.build.glob(f"lib*{sys.implementation.cache_tag}/deepmsi"))
                if "build" in options.steps
                else []
            )
            if built and part.name != "extensions":
                # What was built is what is imported, not the checkout that lies beside it.
                paths = [str(built[0].parent), *filter(None, [os.environ.get("PYTHONPATH")])]
                environment |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}
            report, records = Path(scratch) / f"{len(done)}.xml", Path(scratch) / f"{len(done)}.json"
            if "pytest" in part.command:
                part.command += [f"--junitxml={report}"]
            if "--benchmark-only" in part.command:
                part.command += [f"--benchmark-json={records}"]
            left = options.budget - (time.monotonic() - start)
            if part.tool is not None and shutil.which(part.tool, path=environment["PATH"]) is None:
                part.result = f"cannot run here: {part.tool} is not on this machine"
            elif left < LEAST:
                part.result = f"dropped: {max(left, 0):.0f} s of {options.budget:.0f} s were left"
            else:
                run(part, min(part.limit, left - GRACE), out / f"{part.step}.log", environment)
            read_tests(part, report)
            if records.is_file() and records.stat().st_size:
                document["benchmarks"] += json.loads(records.read_text())["benchmarks"]
            done.append(part)
            document["parts"] = [one.kept() for one in done]
            (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
            (out / "results.md").write_text(page(document))
            print(f"{part.step}, {part.name}: {part.result} ({part.seconds} s)", flush=True)
    print("", page(document), sep="\n")
    return 0 if all(part.good for part in done) else 1


if __name__ == "__main__":
    sys.exit(main())
