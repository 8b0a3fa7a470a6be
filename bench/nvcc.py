"""Compile every CUDA kernel for GPUs that need not be here, and read what ptxas says it takes.

It fails where a source does not compile, where a kernel takes more shared memory than a block is given without asking,
and where a spill is not in `aot_budget.json` or exceeds it. `--record` adds sm_100 and writes `results/nvcc.json` and
`results/nvcc.md`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from budget import Budget
from torch.utils.cpp_extension import include_paths

from deepmsi._built_for import STABLE_ABI

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
# Static shared memory of a block; what is asked for at the launch is checked there.
STATIC_SHARED = 49_152

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for '(?P<target>sm_\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one target: registers of a thread, bytes of spills a thread, static shared bytes."""

    op: str
    kernel: str
    target: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def key(self) -> str:
        return f"{self.op}.{self.kernel} {self.target}"


def readable(names: list[str]) -> dict[str, str]:
    """Return each kernel's name with its template arguments, without namespaces and parameters."""
    shown = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = {}
    for name, full in zip(names, shown, strict=True):
        text = re.sub(r"\((?:anonymous namespace|unnamed)\)::|\b(?:deepmsi|c10|torch|headeronly)::", "", full)
        short[name] = re.sub(r"^void |\(.*$", "", re.sub(r"\((?:int|long|bool)\)", "", text))
    return short


def compiled(nvcc: str, source: Path, targets: list[int], folder: Path) -> list[Resources]:
    """Compile one source for every target and return its kernels."""
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *(f"-I{path}" for path in include_paths())]
    command += [STABLE_ABI, "-DUSE_CUDA", "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
    command += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    command += ["-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{source.relative_to(ROOT)} does not compile:\n{done.stdout}{done.stderr}")
    found = list(ENTRY.finditer(done.stdout + done.stderr))
    names = readable([entry["name"] for entry in found])
    rows = []
    for entry in found:
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spills = int(entry["stores"]), int(entry["loads"])
        taken = int(shared.group(1)) if shared else 0
        rows.append(
            Resources(source.stem, names[entry["name"]], entry["target"], int(entry["registers"]), *spills, taken)
        )
    return sorted(rows, key=lambda row: (row.kernel, int(row.target[3:])))


def table(rows: list[Resources], version: str) -> str:
    """Return a Markdown table."""
    lines = [
        f"Compiled with nvcc ({version}), not run: registers and spilled bytes of a thread, static shared bytes of a",
        "block.",
        "",
        "| op | kernel | target | registers | spills | shared |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.op} | `{r.kernel}` | {r.target} | {r.registers} | {r.spill_stores + r.spill_loads} | {r.shared} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels and check what they take.")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler; default: the one on the PATH")
    parser.add_argument("--record", action="store_true", help="add sm_100 and write bench/results/nvcc.*")
    options = parser.parse_args()
    targets = [80, 90, 100] if options.record else [80, 90]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda source: -source.stat().st_size)
    version = subprocess.run([options.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = version.strip().splitlines()[-1]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = pool.map(lambda source: compiled(options.nvcc, source, targets, Path(folder)), sources)
        rows = sorted((row for part in parts for row in part), key=lambda row: row.op)

    budget = Budget("nvcc", version, options.record)
    wrong = []
    for row in rows:
        wrong += budget.faults(row.key, row.spill_stores + row.spill_loads)
        if row.shared > STATIC_SHARED:
            wrong.append(f"{row.key}: takes {row.shared} bytes of static shared memory of {STATIC_SHARED}")
    silent = [source.name for source in sources if source.stem not in {row.op for row in rows}]
    wrong += [f"{name}: ptxas reported no kernel" for name in silent]
    if options.record:
        wrong += budget.unused()
        document = {"nvcc": version, "kernels": [asdict(row) for row in rows]}
        (RESULTS / "nvcc.json").write_text(json.dumps(document, indent=1) + "\n")
        (RESULTS / "nvcc.md").write_text(table(rows, version))
    else:
        print(table(rows, version))
    print(*budget.told, f"{len(rows)} kernels compiled, {len(wrong)} faults", sep="\n")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
