"""The directions that imports may run in, read from the source, and what `import deepmsi` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "deepmsi"

# Lower layers never import higher ones. `data` may use `models`, `train` may use `data`, `report` both.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "progress": set(),
    "reference": set(),
    "testing": {"backend"},
    "backend": {"errors", "_version"},
    "ops": {"backend", "reference", "errors"},
    "nn": {"ops", "backend", "errors"},
    "models": {"nn", "ops", "backend", "errors", "progress", "_version"},
    "data": {"models", "nn", "ops", "backend", "errors", "progress", "_version"},
    "train": {"data", "models", "nn", "ops", "backend", "errors", "progress", "_version", "recipes"},
    "report": {"train", "data", "models", "nn", "ops", "backend", "errors", "_version"},
}
# Lazily, inside a function, prediction on files decodes with `data`.
LAZY_UPWARD = {("models", "data")}
HEAVY = (
    *("transformers", "timm", "torchvision", "triton", "pydantic", "av", "sklearn", "matplotlib", "accelerate"),
    "huggingface_hub",
)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the modules that a file imports, each with whether it does so at import time."""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: imports are absolute"
                found.append((child.module or "", top))
                if child.module == "deepmsi":
                    found.extend((f"deepmsi.{alias.name}", top) for alias in child.names)
            guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            walk(child, top and not inside and not guard)

    walk(ast.parse(path.read_text()), True)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    layer = parts[0]
    for module, top in imports(path):
        names = module.split(".")
        assert names[0] not in ("tests", "bench"), f"{path.name} imports {module}"
        if layer == "reference" and names[0] not in ("torch", "math", "typing", "collections"):
            assert module.startswith("deepmsi.reference"), f"a reference imports torch alone, not {module}"
        if names[0] != "deepmsi" or len(names) < 2 or layer not in LAYERS:
            continue
        target = names[1]
        if target == layer or target not in LAYERS or target in LAYERS[layer]:
            continue
        lazy = not top and (layer, target) in LAZY_UPWARD
        assert lazy, f"{layer} must not import {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels" / "triton").glob("*.py")), ids=lambda p: p.name)
def test_triton_kernels_import_torch_and_triton_alone(path: Path) -> None:
    for module, _ in imports(path):
        allowed = module.split(".")[0] in ("torch", "triton", "math", "typing", "collections", "dataclasses", "os")
        assert allowed or module.startswith("deepmsi._triton"), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_timm_and_torchvision_stay_where_they_belong(path: Path) -> None:
    for module, top in imports(path):
        # Subclasses of timm's modules have a file of their own, which only functions import.
        if module.split(".")[0] in ("timm", "torchvision") and path.stem != "_timm_blocks":
            assert not top, f"{path.name} imports {module} at import time"
        assert not (top and module.endswith("_timm_blocks")), f"{path.name} imports {module} at import time"


def test_import_costs_no_more_than_torch() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import deepmsi, deepmsi.ops; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "deepmsi" in loaded
    assert not loaded & set(HEAVY), f"import deepmsi pulls {sorted(loaded & set(HEAVY))}"


def test_import_survives_without_triton_and_extensions(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import pathlib; real = pathlib.Path.glob;\n"
        "pathlib.Path.glob = lambda self, p, **k: [] if p.endswith('.so') else real(self, p, **k)\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "import deepmsi, torch; from deepmsi.ops import vsc_compress\n"
        "assert vsc_compress(torch.randn(1, 4, 3), None, torch.randn(1, 3), keep=2).tokens.shape == (2, 3)\n"
        "print(deepmsi.explain())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the extension _C_cpu is not built" in done.stdout
    assert "triton is not installed" in done.stdout
