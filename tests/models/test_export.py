"""Exported programs: the model's logits for any batch size, from torch alone."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepmsi import DeepMSI
from deepmsi.errors import UserError
from deepmsi.models.export import export_model
from deepmsi.models.predict import load_run

LOAD = """
import sys, torch
sys.modules["deepmsi"] = None  # an import of it would fail
inputs = torch.load(sys.argv[2])
torch.save(torch.export.load(sys.argv[1]).module()(*inputs), sys.argv[3])
"""
REGRID = {"schedule": {"layout": "regrid", "keep": [49, 25]}}


def test_a_program_runs_on_torch_alone(
    tiny: Callable[..., DeepMSI],
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny(vision=REGRID)
    before = model.training
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
    assert export_model(model, tmp_path / "model.pt2") < 1e-5
    assert "Unable to load package" not in caplog.text
    assert model.training == before
    torch.save(tuple(batch.values()), tmp_path / "in.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "in.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-4, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2", "in.pt", "out.pt"}


@pytest.mark.parametrize("case", ["threshold", "keep, without sound"])
def test_schedules_and_modalities(case: str, tiny: Callable[..., DeepMSI], tmp_path: Path) -> None:
    if case == "threshold":
        model = tiny(vision={"schedule": "paper"})
    else:
        model = tiny(vision={"schedule": {"keep": [40, 21]}}, audio={"encoder": "none"})
    # Traced with the kernels, which is the quicker way; the other test has the reference.
    assert export_model(model, tmp_path / "model.pt2", backend="auto") < 1e-5
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.manual_seed(5)
    inputs = [torch.randint(256, (5, 2, 3, 32, 32), dtype=torch.uint8), torch.randn(5, 12), torch.randn(5, 10)]
    inputs = inputs[: len(model.modalities)]
    names = ("pixel_values", "text_features", "audio_features")
    with torch.no_grad():
        expected = model.eval()(**dict(zip(names, inputs, strict=False))).logits
    torch.testing.assert_close(program(*inputs), expected, rtol=1e-4, atol=1e-5)
    if case == "threshold":
        assert model.video.backbone.schedule.capacity is None, "the model itself was changed"


def test_a_wrong_path_is_told(tiny: Callable[..., DeepMSI], tmp_path: Path) -> None:
    for path in (tmp_path / "model.onnx", tmp_path / "nowhere" / "model.pt2"):
        with pytest.raises(UserError, match=r"give a file that ends in \.pt2, in a folder that exists"):
            export_model(tiny(), path)
    with pytest.raises(UserError, match="there is no ONNX, for torch's exporter has no conversion of the stable sort"):
        export_model(tiny(), tmp_path / "model.onnx")


def test_a_full_disk_is_told_in_one_sentence(tiny: Callable[..., DeepMSI], mount: Callable[[str], Path]) -> None:
    disk = mount("16k")
    with pytest.raises(UserError, match=r"the disk is full, model\.pt2 was not written$"):
        export_model(tiny(vision={"backbone": "none"}), disk / "model.pt2")
    assert not list(disk.iterdir())


def test_a_loaded_run_has_its_tables(tiny: Callable[..., DeepMSI], tmp_path: Path) -> None:
    model = tiny(vision=REGRID).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = load_run(tmp_path)
    attention = loaded.video.backbone.layers[0].blocks[0].attn
    assert attention.fixed_table is not None
    assert set(loaded.state_dict()) == set(model.state_dict())
    loaded.load_state_dict(model.state_dict())
    assert attention.fixed_table is None
