"""Build the native parts: the CPU kernels, the CUDA kernels where a toolkit is found, and the host module.

`_C_cpu` and `_C_cuda` use PyTorch's stable ABI alone, so that what pip's isolated environment builds against one torch
runs with another (2.11 or newer). Environment variables:

- DEEPMSI_CUDA=0 leaves the CUDA extension out; =1 makes its absence or failure an error. Without it, it is built where
  torch is a CUDA build and nvcc is found.
- DEEPMSI_CPP=0 builds nothing.
- CUDA_HOME names the toolkit's own folder; TORCH_CUDA_ARCH_LIST (such as "9.0;10.0+PTX") names what to compile for.
- MAX_JOBS limits the compilers that run at once.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c -mtune=haswell",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def say(sentence: str) -> None:
    """Print one line that shows in pip's log."""
    print(f"deepmsi: {sentence}", file=sys.stderr, flush=True)


def built_for() -> ModuleType:
    """Return what extensions are built for, loaded without importing the package."""
    spec = importlib.util.spec_from_file_location("_built_for", ROOT / "deepmsi" / "_built_for.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_cuda_home() -> tuple[Path | None, str]:
    """Return the toolkit's own folder, or None and why there is none. A wrapper named nvcc is asked where it leads."""
    candidates = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    commands = [str(Path(c) / "bin" / "nvcc") for c in candidates if c]
    commands += [c for c in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if c]
    for command in commands:
        if not Path(command).is_file():
            continue
        shown = subprocess.run(
            [command, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        ).stderr
        top = re.search(r"^#\$ TOP=(.+)$", shown, re.MULTILINE)
        home = Path(top.group(1).strip()) if top else Path(command).resolve().parents[1]
        if (home / "bin" / "nvcc").is_file():
            return home.resolve(), ""
    return None, "no nvcc was found (set CUDA_HOME to the toolkit's folder)"


def want_cuda() -> tuple[Path | None, str]:
    """Return the toolkit to build the CUDA extension with, or None and the reason for not building it."""
    import torch

    asked = os.environ.get("DEEPMSI_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"deepmsi: DEEPMSI_CUDA must be 0 or 1, not {asked!r}")
    if asked == "0":
        return None, "DEEPMSI_CUDA=0"
    if not any((CSRC / "cuda").glob("*.cu")):
        return None, "this source tree holds no CUDA kernels"
    home, reason = find_cuda_home()
    if torch.version.cuda is None and asked != "1":
        home, reason = None, f"torch {torch.__version__} is built without CUDA"
    if home is None and asked == "1":
        raise SystemExit(f"deepmsi: DEEPMSI_CUDA=1, but {reason}")
    return home, reason


def gencode() -> list[str]:
    """Return nvcc's architecture flags."""
    flags = []
    for item in re.findall(r"[^;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) or CUDA_ARCHITECTURES.split(";"):
        number = item.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if item.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaBuild(build_ext):
    """Compile each extension with one ninja file, so that a source may be compiled once per instruction set."""

    def run(self) -> None:
        if os.environ.get("DEEPMSI_CPP") == "0":
            say("built without native code: DEEPMSI_CPP=0")
            self.extensions = []
        elif shutil.which(self.compiler_command()) is None:
            say(f"built without native code: no C++ compiler {self.compiler_command()!r} was found")
            self.extensions = []
        super().run()

    def get_outputs(self) -> list[str]:
        # What could not be built is left out of the wheel rather than missed.
        return [path for path in super().get_outputs() if Path(path).is_file()]

    @staticmethod
    def compiler_command() -> str:
        return (os.environ.get("CXX", "").strip() or ("g++" if shutil.which("g++") else "c++")).split()[0]

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        name = extension.name.rsplit(".", 1)[1]
        if name == "_C_cuda":
            home, reason = want_cuda()
            if home is None:
                say(f"built without the CUDA extension: {reason}")
                return
            try:
                self.build_cuda(output, home)
            except subprocess.CalledProcessError as error:
                if os.environ.get("DEEPMSI_CUDA") == "1":
                    raise
                say(f"built without the CUDA extension: nvcc of {home} failed ({error})")
            return
        try:
            (self.build_cpu if name == "_C_cpu" else self.build_host)(output)
        except subprocess.CalledProcessError as error:
            output.unlink(missing_ok=True)  # what an earlier build left is not of these sources
            say(f"built without {name}: the C++ compiler {self.compiler_command()!r} failed ({error})")

    def build_host(self, output: Path) -> None:
        import pybind11
        import torch

        includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
        defines = (
            f'-DDEEPMSI_BUILD_TORCH=\\"{torch.__version__}\\" -DDEEPMSI_BUILD_CUDA=\\"{torch.version.cuda or "none"}\\"'
        )
        self.ninja(output, [("host", CSRC / "host.cpp", "cxx", f"{includes} {defines}")], "")

    def build_cpu(self, output: Path) -> None:
        torch_flags, libraries = self.torch_flags("torch_cpu")
        objects = [
            (source.stem, source, "cxx", torch_flags)
            for source in sorted((CSRC / "cpu").glob("*.cpp"))
            if source.stem != "isa_kernels"
        ]
        for isa in ISA_FLAGS if IS_X86 else ("baseline",):
            objects.append((f"isa_{isa}", CSRC / "cpu" / "isa_kernels.cpp", "cxx", ISA_FLAGS[isa]))
        objects.append(("built_for", self.built_for(output), "cxx", ""))
        self.ninja(output, objects, libraries)

    def build_cuda(self, output: Path, home: Path) -> None:
        torch_flags, libraries = self.torch_flags("torch_cpu", "torch_cuda")
        flags = " ".join([torch_flags, "-DUSE_CUDA", *gencode()])
        objects = [(s.stem, s, "nvcc", flags) for s in sorted((CSRC / "cuda").glob("*.cu"))]
        objects.append(("built_for", self.built_for(output), "cxx", ""))
        folders = [home / "lib64", home / "lib", home / "targets" / f"{platform.machine()}-linux" / "lib"]
        libraries += "".join(f" -L{folder}" for folder in folders if folder.is_dir())
        self.ninja(output, objects, f"{libraries} -lcudart_static -lrt -lpthread -ldl", nvcc=home / "bin" / "nvcc")

    def folder_of(self, output: Path) -> Path:
        """Return the folder that an extension is built in."""
        folder = Path(self.build_temp).resolve() / output.name.split(".")[0]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def built_for(self, output: Path) -> Path:
        """Write the source by which an extension tells what it was built for, where that has changed."""
        path, text = self.folder_of(output) / "built_for.cpp", built_for().source()
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        return path

    @staticmethod
    def torch_flags(*libraries: str) -> tuple[str, str]:
        """Return compile and link flags of the stable ABI. No run path: torch is loaded before any of these."""
        import torch

        folder = Path(torch.__file__).parent
        present = [lib for lib in libraries if (folder / "lib" / f"lib{lib}.so").is_file()]
        links = " ".join(["-Wl,--no-as-needed", *(f"-l{lib}" for lib in present), "-Wl,--as-needed"])
        # Symbols that this torch lacks (a CPU build's libtorch_cuda) are found when a CUDA build loads the object.
        return f"-isystem {folder / 'include'} {built_for().STABLE_ABI}", f"-L{folder / 'lib'} {links}"

    def ninja(
        self, output: Path, objects: list[tuple[str, Path, str, str]], libraries: str, nvcc: Path | None = None
    ) -> None:
        """Write and run a ninja file that compiles (name, source, rule, flags) and links them into `output`."""
        import ninja

        folder = self.folder_of(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "").strip() or self.compiler_command()
        common = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wno-psabi {os.environ.get('CXXFLAGS', '')}"
        lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {cxx} {common} -fno-math-errno -fno-trapping-math -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {nvcc} -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -MMD -MF $out.d $flags"
            " -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared $in -o $out {libraries} {os.environ.get('LDFLAGS', '')}",
        ]
        built = []
        for name, source, rule, flags in objects:
            built.append(f"{name}.o")
            lines += [f"build {name}.o: {rule} {str(source).replace(' ', '$ ')}", f"  flags = {flags}"]
        lines += [f"build {output.name}: link {' '.join(built)}", f"default {output.name}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        binary = Path(ninja.BIN_DIR) / "ninja"
        subprocess.run([str(binary), "-C", str(folder), *jobs], check=True)
        # Replace rather than overwrite: a process may have the old file mapped.
        fresh = output.with_suffix(".new")
        shutil.copyfile(folder / output.name, fresh)
        os.replace(fresh, output)


setup(
    packages=[*find_packages(include=["deepmsi", "deepmsi.*"]), "deepmsi._triton"],
    package_dir={"deepmsi._triton": "kernels/triton"},
    package_data={
        "deepmsi": ["py.typed", "recipes/*.yaml", "data/*.csv", "report/templates/*"],
    },
    # optional: what this machine cannot build is left out, and deepmsi.explain() says so.
    ext_modules=[Extension(f"deepmsi.{name}", [], optional=True) for name in ("_host", "_C_cpu", "_C_cuda")],
    cmdclass={"build_ext": NinjaBuild},
)
