"""The CUDA kernels' stand-in for a GPU keeps CUDA's rules, and finds what breaks them.

The kernels themselves run on it in `.ci/cuda_on_cpu`.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from build_on_cpu import translate

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX", "g++")
    if platform.machine() != "x86_64":
        pytest.skip("the emulation switches its threads in the assembly of x86-64")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler {compiler}")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    source, program = folder / "programs.cpp", folder / "programs"
    source.write_text(translate((HERE / "programs.cu").read_text()))
    command = [compiler, "-std=c++17", "-O1", f"-I{HERE}", f"-I{Path(torch.__file__).parent / 'include'}"]
    subprocess.run([*command, str(source), str(HERE / "scheduler.cpp"), "-o", str(program)], check=True)
    return program


def run(program: Path, name: str) -> list[int]:
    done = subprocess.run([str(program), name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(word) for word in done.stdout.split()]


def test_threads_meet_at_a_barrier(programs: Path) -> None:
    assert run(programs, "reverse") == [i * i for i in reversed(range(64))]
    assert run(programs, "rounds") == [sum(range(16))] * 64


def test_a_missing_barrier_shows(programs: Path) -> None:
    got = run(programs, "no_barrier")
    assert -1 in got, "some thread reads what another is yet to write"
    got = run(programs, "warp_ahead")
    assert max(got) > sum(range(16)), "some warp writes what another is yet to read"


def test_shared_memory_is_each_block_s_own_and_poisoned(programs: Path) -> None:
    assert run(programs, "unwritten") == [-2] * 64


@pytest.mark.parametrize("name", ["dynamic", "asked_shared"])
def test_dynamic_shared_memory(programs: Path, name: str) -> None:
    assert run(programs, name) == [63, *range(63)]


def test_a_warp_exchanges_values(programs: Path) -> None:
    def value(thread: int) -> int:
        lane, warp = thread % 32, thread // 32 * 32
        up = thread - 2 if lane >= 2 else thread
        return 10 * ((warp + (lane ^ 3)) - (warp + 4) + up) + 7 + 22_000

    assert run(programs, "operations") == [value(thread) for thread in range(64)]


def test_threads_that_have_ended_are_not_waited_for(programs: Path) -> None:
    assert run(programs, "early") == [2] * 32 + [1] * 32


def test_blocks_and_threads_have_their_places(programs: Path) -> None:
    assert run(programs, "indices") == [100 * b + 10 * y + x for b in range(8) for y in range(2) for x in range(4)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two_barriers", "threads of a block wait at different barriers"),
        ("barrier_of_a_half", "a warp waits for a lane that is gone"),
        ("lane_gone", "a warp waits for a lane that is gone"),
        ("lane_unnamed", "a lane reads another that its mask does not name"),
        ("lanes_apart", "lanes of a warp wait at different operations"),
        ("too_much_shared", "invalid configuration"),
        ("no_block", "invalid configuration"),
        ("large_block", "invalid configuration"),
        ("far_down", "invalid configuration"),
    ],
)
def test_what_cuda_forbids_is_refused(programs: Path, name: str, words: str) -> None:
    done = subprocess.run([str(programs), name], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert words in done.stdout
