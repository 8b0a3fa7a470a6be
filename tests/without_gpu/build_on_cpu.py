"""Build a copy of deepmsi whose CPU extension is the CUDA kernels of ``csrc/cuda``, run by ``scheduler.cpp``.

``python build_on_cpu.py FOLDER`` leaves the package ``FOLDER/deepmsi``; CXX, CXXFLAGS and LDFLAGS are read. Its Triton
kernels and references are as they are; operations that have no CUDA kernel have no ``cpp`` there. Tests load it by
``PYTHONPATH=FOLDER`` and ``-p on_cpu``.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepmsi._built_for import STABLE_ABI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def translate(text: str) -> str:
    """Return a CUDA source as C++, line by line: launches are calls, and shared memory is static and marked as new."""
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"extern __shared__ .*?char (\w+)\[\];", r"char* \1 = cuda_on_cpu::dynamic_shared();", text)
    text = re.sub(r"__shared__ (union \{.*?\} \w+|[^;]*);", _shared, text, flags=re.DOTALL)
    text = text.replace("STABLE_TORCH_LIBRARY_IMPL(deepmsi, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m)")
    while (mark := text.find("<<<")) >= 0:
        begin, end = _kernel_before(text, mark), text.index(">>>", mark)
        call = f"cuda_on_cpu::launch({text[begin:mark].rstrip()}, {text[mark + 3 : end]})"
        text = text[:begin] + call + text[end + 3 :]
    return text


def _kernel_before(text: str, end: int) -> int:
    """Return where the kernel's name begins that ends before `end`, maybe with template arguments."""
    at = len(text[:end].rstrip())
    if text[at - 1] == ">":
        depth = 1
        while depth:
            at -= 1
            depth += {">": 1, "<": -1}.get(text[at - 1], 0)
        at -= 1
    while text[at - 1].isidentifier() or text[at - 1].isdigit():
        at -= 1
    return at


def _shared(declaration: re.Match[str]) -> str:
    """Return a declaration of shared memory as a static one, whose variables every block finds poisoned."""
    variables = re.findall(r"(\w+)(?:\[[^\]]*\])*\s*(?:,|$)", declaration[1])
    return f"static {declaration[1]}; cuda_on_cpu::poison({', '.join(variables)});"


def sources(folder: Path) -> Iterator[Path]:
    """Write the translated sources into a folder, and yield what is to be compiled."""
    for source in sorted((ROOT / "csrc" / "cuda").iterdir()):
        target = folder / (source.name if source.suffix == ".cuh" else f"{source.stem}.cpp")
        target.write_text(f'#line 1 "{source}"\n{translate(source.read_text())}')
        if target.suffix == ".cpp":
            yield target
    yield HERE / "scheduler.cpp"


def build(folder: Path) -> None:
    """Build the package in a folder."""
    import torch

    package, objects, home = folder / "deepmsi", folder / "objects", Path(torch.__file__).parent
    shutil.copytree(ROOT / "deepmsi", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels" / "triton", package / "_triton", ignore=shutil.ignore_patterns("__pycache__"))
    objects.mkdir()
    compiler = [os.environ.get("CXX", "g++"), *os.environ.get("CXXFLAGS", "-O2").split(), "-std=c++17", "-fPIC"]
    options = [f"-I{HERE}", f"-I{objects}", "-isystem", str(home / "include"), "-Wno-unknown-pragmas"]
    options += ["-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI]

    def compiled(source: Path) -> str:
        target = str(objects / f"{source.stem}.o")
        subprocess.run([*compiler, *options, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        linked = list(pool.map(compiled, sources(objects)))
    libraries = [f"-L{home / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]
    libraries += os.environ.get("LDFLAGS", "").split()
    subprocess.run([*compiler, "-shared", *linked, *libraries, "-o", str(package / "_C_cpu.so")], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
