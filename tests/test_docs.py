"""The code that README and docs/ show is run as it stands there, and their links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepmsi
from deepmsi.nn.constants import HoldsConstants

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "in-your-own-training-script.md"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(page: Path) -> list[str]:
    """Return the Python of a page, block by block."""
    found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found


def test_the_page_on_training_scripts_runs_in_order() -> None:
    pytest.importorskip("timm")
    names: dict[str, object] = {}
    for block in blocks(PAGE):
        if not block.startswith("# train.py"):
            exec(compile(block, str(PAGE), "exec"), names)
        if "fix_constants(model)" in block:  # which keeps nothing where it is called too early, and says nothing
            parts = [part for part in names["model"].modules() if isinstance(part, HoldsConstants)]  # type: ignore[attr-defined]
            assert sum(len(part.kept()) for part in parts) > 50
        if "Trainer(" in block:
            assert names["logits"].shape == (14, 7)  # type: ignore[attr-defined]


def test_its_training_script_runs_on_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    script = tmp_path / "train.py"
    script.write_text(next(b for b in blocks(PAGE) if b.startswith("# train.py")))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run(start, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    # Both write to one pipe: a line may follow the other's without its end between them.
    losses = dict(re.findall(r"rank (\d): (\d+\.\d{3})", ran.stdout))
    assert set(losses) == {"0", "1"}
    assert all(float(loss) > 0 for loss in losses.values())


def test_the_code_of_the_readme_runs() -> None:
    pytest.importorskip("timm")
    config = deepmsi.DeepMSIConfig(num_labels=6, preset="paper")
    names: dict[str, object] = {
        "frames": torch.randint(256, (1, config.vision.frames, 3, 256, 256), dtype=torch.uint8),
        "h_t": torch.randn(2, config.text.dim),
        "h_a": torch.randn(2, config.audio.dim),
        "mask": torch.tensor([[True, True, True], [False, True, True]]),
        "y": torch.tensor([0, 3]),
    }
    for block in blocks(ROOT / "README.md"):
        exec(compile(block, "README.md", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    def anchors(file: Path) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}

    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), link
        assert not anchor or anchor in anchors(file), link
