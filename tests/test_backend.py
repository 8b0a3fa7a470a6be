"""Choosing a backend: precedence, sentences, and that nothing this machine can run was left out of the tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepmsi
import deepmsi.ops  # registers the operators
from deepmsi import _built_for, backend


def test_argument_goes_before_context_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.resolve("vsc_compress", "reference", "cpu", torch.float32) == "reference"
    monkeypatch.setattr(backend, "_environment", "triton")
    with deepmsi.use_backend("reference"):
        assert backend.resolve("vsc_compress", None, "cpu", torch.float32) == "reference"
        if backend.why_not("vsc_compress", "cpp", "cpu", torch.float32) is None:
            assert backend.resolve("vsc_compress", "cpp", "cpu", torch.float32) == "cpp"
            assert backend.resolve("vsc_compress", "auto", "cpu", torch.float32) == "cpp"
    monkeypatch.setattr(backend, "_environment", "reference")
    assert backend.resolve("vsc_compress", None, "cpu", torch.float32) == "reference"


def test_context_restores_after_an_error() -> None:
    before = backend._override
    with pytest.raises(KeyError), deepmsi.use_backend("reference"):
        raise KeyError
    assert backend._override == before


@pytest.mark.parametrize("name", ["cuda", "", "Reference"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of reference, triton, cpp, auto"), backend.use_backend(name):
        pass
    with pytest.raises(ValueError, match="must be one of reference, triton, cpp, auto"):
        backend.resolve("vsc_compress", name, "cpu", torch.float32)


def test_a_backend_asked_for_by_name_raises_the_sentence_that_explains_it() -> None:
    reason = backend.why_not("vsc_compress", "cpp", "meta", torch.float32)
    assert reason is not None
    with pytest.raises(RuntimeError) as raised:
        backend.resolve("vsc_compress", "cpp", "meta", torch.float32)
    assert reason in str(raised.value)


def test_a_type_that_a_kernel_lacks_falls_to_the_reference_only_under_auto() -> None:
    assert backend.resolve("vsc_compress", "auto", "cpu", torch.int32) == "reference"
    with pytest.raises(RuntimeError, match="vsc_compress"):
        backend.resolve("vsc_compress", "cpp", "cpu", torch.int32)


def test_explain_has_a_line_for_every_operation_and_backend() -> None:
    page = deepmsi.explain()
    for op in backend.OPS:
        for name in backend.BACKENDS:
            assert any(line.split()[:2] == [op, name] for line in page.splitlines()), (op, name)
    assert torch.__version__ in page


def test_every_kernel_that_is_registered_has_its_operators() -> None:
    for (op, name), kernel in backend.KERNELS.items():
        for direction in ("fwd", "bwd"):
            assert hasattr(torch.ops.deepmsi, f"{op}_{name}_{direction}"), (op, name)
        assert kernel.dtypes
        assert kernel.devices


def test_no_backend_that_this_machine_can_run_is_missing() -> None:
    """Fails when the suite would silently test less than this machine can: an extension that is not built, say."""
    missing = []
    for op, name in backend.KERNELS:
        for device in ("cpu", "cuda"):
            if device not in backend.KERNELS[(op, name)].devices:
                continue
            able = {
                ("cpp", "cpu"): shutil.which("c++") or shutil.which("g++"),
                ("cpp", "cuda"): torch.cuda.is_available() and shutil.which("nvcc"),
                ("triton", "cuda"): torch.cuda.is_available(),
                ("triton", "cpu"): backend._TRITON is None and not torch.cuda.is_available(),
            }[(name, device)]
            reason = backend.why_not(op, name, device)
            if able and reason is not None:
                missing.append(f"{op} {name} on {device}: {reason}")
    assert not missing, "\n".join(missing)


def test_environment_variable_is_checked_at_import() -> None:
    environment = {**os.environ, "DEEPMSI_BACKEND": "fast"}
    done = subprocess.run([sys.executable, "-c", "import deepmsi.ops"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "DEEPMSI_BACKEND must be one of" in done.stderr


def test_an_environment_variable_that_is_empty_says_nothing() -> None:
    environment = {**os.environ, "DEEPMSI_BACKEND": "", "DEEPMSI_ISA": ""}
    code = "import deepmsi; print(deepmsi.explain())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backend: auto (default)" in done.stdout


def test_choice_is_traced_without_a_break() -> None:
    torch._dynamo.reset()

    def choose(x: torch.Tensor) -> torch.Tensor:
        name = backend.resolve("vsc_compress", None, x.device.type, x.dtype)
        return x + len(name)

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    x = torch.zeros(3)
    assert torch.equal(compiled(x), choose(x))
    with deepmsi.use_backend("reference"):
        assert torch.equal(compiled(x), x + len("reference"))


def test_an_extension_from_before_an_operation_leaves_it_to_the_reference(
    tmp_path: Path,
) -> None:
    if backend._EXTENSIONS["cpu"] is not None:
        pytest.skip(backend._EXTENSIONS["cpu"])
    # The package as it is, over an extension whose tables name none of a newer operation's kernels.
    for built in copy_of_the_package(tmp_path).glob("*.so"):
        names = (b"residual_mlp_cpp_", b"weight_normed_conv1d_cpp_") if built.name.startswith("_C_cpu") else ()
        content = built.read_bytes()
        for name in names:
            assert name in content
            content = content.replace(name, b"x" * len(name))
        built.write_bytes(content)
    code = """if True:
        import torch
        from deepmsi import backend, use_backend, explain
        from deepmsi.nn import TCN
        from deepmsi.ops import vsc_compress
        assert backend.resolve("vsc_compress", "cpp", "cpu", torch.float32) == "cpp"
        assert backend.resolve("residual_mlp", None, "cpu", torch.float32) == "reference"
        for op in ("residual_mlp", "dilated_causal_conv1d"):
            print(backend.why_not(op, "cpp", "cpu"))
            assert backend.why_not(op, "cpp", "cpu") in explain()
        TCN(4, (4,)).last(torch.zeros(1, 4, 3)).sum().backward()
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" and lacks ")[1] for line in lines] == [
        "residual_mlp: run `pip install -e .`",
        "weight_normed_conv1d: run `pip install -e .`",
    ]
    assert all("_C_cpu is older than this deepmsi" in line for line in lines)


def copy_of_the_package(folder: Path) -> Path:
    """Return a copy of the package, extensions included, to be changed and imported from ``folder``."""
    source, package = Path(backend.__file__).parent, folder / "deepmsi"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def test_an_extension_of_other_schemas_leaves_the_operation_to_the_reference(tmp_path: Path) -> None:
    """It has the operator, with other arguments: torch would complain at the call, or read them wrongly."""
    if backend._EXTENSIONS["cpu"] is not None:
        pytest.skip(backend._EXTENSIONS["cpu"])
    assert backend._BUILT_FOR["cpu"] == _built_for.schemas(), "built before it told: pip install -e . builds it anew"
    schemas = copy_of_the_package(tmp_path) / "ops" / "_schemas.py"
    text = schemas.read_text(encoding="utf-8")
    # An argument more than the extension has, and a comment, which changes nothing.
    assert text.count('"(Tensor x, Tensor v, Tensor g, ') == 1
    text = text.replace('"(Tensor x, Tensor v, Tensor g, ', '"(Tensor x, Tensor v, Tensor g, bool fast, ')
    schemas.write_text(text + "# more\n", encoding="utf-8")
    code = """if True:
        import torch
        from deepmsi import backend, explain
        from deepmsi.nn import TCN
        from deepmsi.ops import vsc_compress
        print(backend.why_not("dilated_causal_conv1d", "cpp", "cpu"))
        assert backend.why_not("dilated_causal_conv1d", "cpp", "cpu") in explain()
        TCN(4, (4,)).last(torch.zeros(1, 4, 3)).sum().backward()
        vsc_compress(torch.zeros(1, 4, 3), None, torch.zeros(1, 3), keep=2, backend="cpp")
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "the extension _C_cpu is of another deepmsi than this one, and its weight_normed_conv1d takes other arguments: "
        "run `pip install -e .`"
    )


def test_every_compiled_operation_has_its_schemas_told() -> None:
    """What cannot be compared is not: a form of registration that is not understood would go unseen."""
    told = _built_for.schemas()
    assert set(backend.OPS) | {"weight_normed_conv1d"} == set(told)
    assert len(set(told.values())) == len(told)


def test_a_compiler_that_fails_leaves_the_extensions_out(tmp_path: Path) -> None:
    for module in ("setuptools", "ninja", "pybind11"):
        pytest.importorskip(module)
    root = Path(__file__).parents[1]
    for name in ("csrc", "kernels"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copytree(root / "deepmsi", tmp_path / "deepmsi", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    environment = {**os.environ, "CXX": shutil.which("false") or "false", "DEEPMSI_CUDA": "0"}
    words = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deepmsi: built without _C_cpu: the C++ compiler" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
    code = "import deepmsi; print(deepmsi.explain())"
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "extension _C_cpu: the extension _C_cpu is not built" in done.stdout, done.stderr
