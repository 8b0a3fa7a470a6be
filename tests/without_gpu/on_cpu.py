"""A plugin of pytest: what the backend knows of CUDA kernels holds of the CPU, where ``build_on_cpu.py`` put them."""

from dataclasses import replace

from deepmsi import backend

assert backend._EXTENSIONS["cpu"] is None, backend._EXTENSIONS["cpu"]
backend.BESIDE.clear()
for (op, name), kernel in list(backend.KERNELS.items()):
    if name == "cpp" and "cuda" not in kernel.devices:
        del backend.KERNELS[op, name]
    elif name == "cpp":
        backend.KERNELS[op, name] = replace(kernel, devices=("cpu",))
        backend._OUTDATED[op, "cpu"] = backend._outdated(op, "cpu")
        assert backend.why_not(op, name, "cpu") is None, backend.why_not(op, name, "cpu")
