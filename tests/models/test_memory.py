"""The estimate of a step's memory against bytes that are counted while a step is really taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepmsi import DeepMSI, DeepMSIConfig
from deepmsi.models.memory import _Live, gigabytes, saved_bytes, step_memory
from deepmsi.nn import recompute as parts
from deepmsi.testing import halves_apart

POSITIONS = ("none", "light", "block", "chunk")
DEEPER = {"image_size": 64, "frames": 9, "options": {"patch_size": 4}}
SCHEDULES: dict[str, dict[str, Any]] = {
    "regrid": {"schedule": {"layout": "regrid", "keep": [16, 9]}},
    "capacity": {"schedule": {"capacity": [30, 20]}},
    "uncompressed": {"schedule": None},
}


def taken(model: DeepMSI, utterances: int, precision: str = "fp32", stems: bool = False) -> tuple[int, int]:
    """Take forward and backward; return what was kept in between, and the most that lived beside the gradients."""
    side, frames = model.config.vision.image_size, model.config.vision.frames
    torch.manual_seed(2)
    model.train()
    with _Live(model) as live:
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: live.settle(p.grad))
        batch = {
            "labels": torch.zeros(utterances, dtype=torch.long),
            "pixel_values": torch.randint(256, (utterances, frames, 3, side, side), dtype=torch.uint8),
            "text_features": torch.randn(utterances, 12),
            "audio_features": torch.randn(utterances, 10),
        }
        if stems:
            batch["pixel_values"] = torch.randn(utterances, frames, *model.video.stem_shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), saved_bytes(model) as saved:
            loss = model(**batch).loss
        kept = saved.total
        loss.backward()
    return kept, live.peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", POSITIONS)
def test_the_estimate_is_what_a_step_takes(tiny: Callable[..., DeepMSI], recompute: str, precision: str) -> None:
    model = tiny(vision={**DEEPER, **SCHEDULES["regrid"], "recompute": recompute})
    found = step_memory(model, 2, precision=precision)
    kept, peak = taken(model, 2, precision)
    # Under autocast torch's fake norm tells its statistics in 16 bits, and its kernel makes them in 32.
    assert abs(found.saved - kept) <= (0.02 * kept if precision == "bf16" else 0)
    assert abs(found.saved + found.temporary - peak) < 0.01 * peak  # the loss draws no numbers there
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert found.optimizer == sum(tensor.nbytes for tensor in moments)
    assert found.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert found.total == found.weights + found.gradients + found.optimizer + found.saved + found.temporary


@pytest.mark.parametrize("schedule", ["capacity", "uncompressed"])
def test_other_schedules(tiny: Callable[..., DeepMSI], schedule: str) -> None:
    model = tiny(vision={**DEEPER, **SCHEDULES[schedule]})
    assert step_memory(model, 2).saved == taken(model, 2)[0]


def test_a_threshold_is_counted_as_if_every_token_were_kept(tiny: Callable[..., DeepMSI]) -> None:
    model = tiny(vision={**DEEPER, "schedule": "paper", "threshold": 0.0})
    most = step_memory(model, 2)
    kept = taken(model, 2)[0]
    assert kept <= most.saved < 1.02 * kept
    assert model.config.vision.capacity is None
    assert model.video.backbone.schedule.capacity is None  # the model stays as it was
    other = tiny(vision={**DEEPER, "schedule": "paper", "threshold": 1.0})
    assert step_memory(other, 2) == most
    assert taken(other, 2)[0] < kept


def test_it_takes_no_memory(tiny: Callable[..., DeepMSI]) -> None:
    """A hundred thousand utterances are counted in no time, and as affine as they are."""
    model = tiny()
    one, two, many = (step_memory(model, n) for n in (1000, 2000, 100_000))
    assert many.saved == two.saved + 98 * (two.saved - one.saved)
    assert many.saved > 10e9


@pytest.mark.parametrize(
    ("recompute", "aim", "share"), [("none", 11.5, 1.0), ("light", 6.5, 0.4), ("block", 3.5, 0.4), ("chunk", 3.5, 1.0)]
)
def test_the_peak_of_the_paper_s_configuration(
    monkeypatch: pytest.MonkeyPatch, recompute: str, aim: float, share: float
) -> None:
    """16 utterances of 15 frames under bf16 autocast with Adam; what is computed again in parts lives in parts."""
    halves_apart(monkeypatch)
    pytest.importorskip("timm")
    vision = {"backbone": "swinv2_tiny_window8_256", "pretrained": False, "schedule": "released"}
    features = {"text": {"encoder": "features", "dim": 1024}, "audio": {"encoder": "features", "dim": 768}}
    model = DeepMSI(DeepMSIConfig(num_labels=6, vision={**vision, "recompute": recompute}, **features))
    found = step_memory(model, 16, precision="bf16")
    assert found is not None
    assert found.total < aim * 1e9
    if share < 1:
        monkeypatch.setattr(parts, "PART_ELEMENTS", 1 << 40)
        whole = step_memory(model, 16, precision="bf16")
        assert whole is not None
        assert found.temporary < share * whole.temporary


def test_averages_and_several_processes_cost_more(tiny: Callable[..., DeepMSI]) -> None:
    model = tiny(vision={"freeze": True})
    plain = step_memory(model, 1)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert plain.gradients == trained < plain.weights
    assert step_memory(model, 1, averaged=True).weights == plain.weights + trained
    assert step_memory(model, 1, processes=2).gradients == 2 * trained


def test_a_step_from_the_stem_s_output(tiny: Callable[..., DeepMSI]) -> None:
    model = tiny(vision={**DEEPER, **SCHEDULES["regrid"], "freeze": "stem"})
    found = step_memory(model, 2, stems=True)
    kept, peak = taken(model, 2, stems=True)
    assert found.saved == kept
    assert abs(found.saved + found.temporary - peak) < 0.01 * peak
    assert found.saved + found.temporary < 0.7 * sum(taken(tiny(vision={**DEEPER, **SCHEDULES["regrid"]}), 2)[1:])


def test_encoders_count_at_their_longest(tiny: Callable[..., DeepMSI]) -> None:
    def built(seconds: float) -> DeepMSI:
        text = {"encoder": "hashing", "dim": 12, "max_length": 32}
        return tiny(text=text, audio={"encoder": "logmel", "dim": 10, "max_seconds": seconds})

    short, long = step_memory(built(1), 2), step_memory(built(4), 2)
    assert long.saved > short.saved + 2 * 3 * 16_000 * 4


def test_encoders_of_text_count_too(tiny: Callable[..., DeepMSI], bert_folder: Path) -> None:
    model = tiny(text={"encoder": str(bert_folder), "dim": None, "max_length": 24})
    found = step_memory(model, 3)
    assert found is not None
    assert found.saved > step_memory(tiny(), 3).saved + 3 * 2 * 24 * 16 * 4


def test_encoders_of_sound_count_too(tiny: Callable[..., DeepMSI], wav2vec2_folder: Callable[..., Path]) -> None:
    model = tiny(audio={"encoder": str(wav2vec2_folder()), "dim": None, "max_seconds": 0.5})
    found = step_memory(model, 2)
    assert found is not None
    assert found.saved > step_memory(tiny(), 2).saved + 2 * 8000 * 4


def test_what_reads_a_value_is_not_known_beforehand(tiny: Callable[..., DeepMSI]) -> None:
    model = tiny()
    reads = model.classifier.register_forward_hook(lambda module, args, out: out * float(out.sum() > 0))
    assert step_memory(model, 2) is None
    reads.remove()
    assert step_memory(model, 2) is not None


def test_gigabytes() -> None:
    assert [gigabytes(n) for n in (13_245_000_000, 45_000_000, 4_400_000, 0)] == ["13.24", "0.04", "0.0044", "0"]
