"""Runs a command with the kernels that MKL keeps for Intel's CPUs: `python bench/mkl.py pytest bench/bench_model.py`.

torch's MKL asks who made the CPU, and on another one than Intel's multiplies float32 at half of the rate or less;
torch's other library of products, oneDNN, asks what the CPU can do. Ratios to what rests on MKL are therefore given for
both. A library that is loaded before MKL answers in its place; benchmarks add ", MKL as on Intel" to their cases. It
needs Linux and a C compiler, and is an experiment of this script alone: nothing else here changes how torch computes.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def main(command: list[str]) -> int:
    """Run a command so, and return its exit status."""
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "answer.c"), Path(folder, "answer.so")
        source.write_text(SOURCE)
        compiler = os.environ.get("CC", sysconfig.get_config_var("CC") or "cc").split()
        subprocess.run([*compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        loaded = " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
        environment = os.environ | {"LD_PRELOAD": loaded, "DEEPMSI_BENCH_NAME": "MKL as on Intel"}
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
