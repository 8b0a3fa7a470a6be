"""The script for a machine with a GPU goes its whole way on one without: parts, limits, budget, results."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import BENCHES, STEPS, Part, parts, read_tests, run
from table import rows

from deepmsi import testing

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"


def call(out: Path, *options: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--smallest", "--out", str(out), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return done, json.loads((out / "results.json").read_text())


def test_every_step_runs_and_is_written_down(tmp_path: Path) -> None:
    testing.need("vsc_compress", "cpp", "cpu")
    done, results = call(tmp_path, "--steps", "test,sanitize,bench")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(part["step"], part["name"]): part for part in results["parts"]}
    assert found["build", "explain"]["result"] == "passed"
    for part in found.values():
        assert part["result"] == "passed" or part["step"] == "sanitize", part
    assert found["test", "operations"]["counts"]["tests"] >= 4
    assert found["test", "modules"]["counts"]["failures"] == 0
    assert results["versions"]["torch"] == torch.__version__
    assert done.stdout.startswith("python ")  # what is there and what is not is said before anything runs
    assert ", timm " in done.stdout.splitlines()[0]
    assert {entry["extra_info"]["op"] for entry in results["benchmarks"]} == {"vsc_compress"}
    page = (tmp_path / "results.md").read_text()
    assert page in done.stdout
    assert "| `vsc_compress` |" in page
    assert str(SCRIPT.parents[1]) not in (tmp_path / "results.json").read_text()
    # What comes back from a lent machine: few files in one folder.
    assert {path.name for path in tmp_path.iterdir()} <= {
        "results.json", "results.md", "build.log", "test.log", "sanitize.log", "bench.log",
    }  # fmt: skip


def test_what_most_depends_on_is_measured_first() -> None:
    """On a GPU: the whole model, also against what is compiled, then the tests, then what the model is made of."""
    options = argparse.Namespace(device="cuda", smallest=False, steps=STEPS, build=Path("build"))
    found = [(part.step, part.name, part.command) for part in parts(options, "9.0")]
    assert list(dict.fromkeys(step for step, *_ in found)) == list(STEPS)
    names = {step: [name for one, name, _ in found if one == step] for step in STEPS}
    assert names["model"] == ["step", "against torch.compile", "model", "latency", "frozen stem"]
    assert names["bench"] == names["compile"] == list(BENCHES)
    against = next(command for _, name, command in found if name == "against torch.compile")
    assert against[-4:] == ["--compile", "-k", "video and released-16", "bench/bench_model.py"]
    measured = {path.stem.removeprefix("bench_") for path in SCRIPT.parent.glob("bench_*.py")}
    assert {"step", "model", "latency", "frozen_stem", *BENCHES} == measured - {
        "compression",
        "input",
    }  # the time is too short


def test_memory_is_written_in_full() -> None:
    """A thousand MiB and more were told as 1.5e+03."""
    sizes = {"peak_bytes": {"ours": 9_500 * 2**20}, "held_bytes": 1_504 * 2**20}
    info = {"op": "DeepMSI", "case": "a step", "direction": "training_step", "p20_s": 1.0, "p80_s": 1.0, **sizes}
    (row,) = rows({"benchmarks": [{"extra_info": info, "stats": {"median": 1.0}}]})
    assert row["peak memory"] == "9500 MiB above 1500 held"


def test_what_it_builds_is_what_it_runs(tmp_path: Path) -> None:
    """Built without native code, so that the installed package beside it would show."""
    done, results = call(tmp_path / "out", "--steps", "build", "--build", str(tmp_path / "build"), DEEPMSI_CPP="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [part["name"] for part in results["parts"]] == ["extensions", "explain"]
    assert "the extension _C_cpu is not built" in done.stdout


def test_what_does_not_fit_the_budget_is_dropped_and_said(tmp_path: Path) -> None:
    done, results = call(tmp_path, "--steps", "bench", "--budget", "1")
    assert done.returncode == 1
    assert all(part["result"].startswith("dropped: ") for part in results["parts"])
    assert "dropped: " in (tmp_path / "results.md").read_text()


def test_a_part_that_hangs_or_fails_does_not_lose_the_rest(tmp_path: Path) -> None:
    log = tmp_path / "test.log"
    hangs = Part("test", "hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 60)
    run(hangs, 0.5, log, dict(os.environ))
    assert (hangs.result, hangs.good) == ("stopped after 0.5 s", False)
    fails = Part("test", "fails", [sys.executable, "-c", "raise SystemExit('no such thing')"], 60)
    run(fails, 60, log, dict(os.environ))
    assert fails.result == "failed with exit code 1"
    refused = Part("test", "refused", fails.command, 60, refusal="no such thing")
    run(refused, 60, log, dict(os.environ))
    assert refused.good
    assert log.read_text().count("no such thing") == 3  # twice by the command, once as the reason
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="2" failures="0" errors="0" skipped="2"/></testsuites>')
    silent = Part("test", "silent", [], 60, result="passed")
    read_tests(silent, report)
    assert silent.result == "failed: every test was skipped"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no CUDA device is visible" in done.stderr
