"""CrossModalContrastiveLoss: the operation in one process; two processes equal one on the joined batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepmsi.nn import CrossModalContrastiveLoss
from deepmsi.ops import cross_modal_contrastive
from deepmsi.testing import randn

WORKER = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deepmsi.nn import CrossModalContrastiveLoss

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
case = torch.load(folder / "case.pt", weights_only=True)
part = slice(0, 5) if rank == 0 else slice(5, 8)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 6).double() for _ in range(3))

    def forward(self, *inputs):
        return [head(x) for head, x in zip(self.heads, inputs)]


model = Heads()
model.load_state_dict(case["weights"])
model = DistributedDataParallel(model)
results = []
for batch_size, normalize in ((None, "batch"), (6, "positives")):
    model.zero_grad(set_to_none=False)
    a, b, c = model(*(x[part] for x in case["inputs"]))
    loss_of = CrossModalContrastiveLoss(batch_size=batch_size, normalize=normalize, include_matched=True)
    loss = loss_of(
        a, (b, c), case["labels"][part], valid_a=case["has_a"][part], valid_b=(case["has_b"][part], None)
    )
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.module.named_parameters()}
    results.append({"loss": loss.detach(), "gradients": gradients})
del model  # its reducer holds the group, whose threads must end before the interpreter does
dist.destroy_process_group()
threads = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
torch.save({"results": results, "threads": threads}, folder / f"result{rank}.pt")
"""


# One process has texts alone, the other one videos alone besides, as placeholders that no gradient goes to.
UNEVEN = """
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from deepmsi.nn import CrossModalContrastiveLoss

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
store = f"file://{folder}/rendezvous"
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
case = torch.load(folder / "case.pt", weights_only=True)
part = slice(0, case["rows"]) if rank == 0 else slice(case["rows"], None)
a = case["a"][part].requires_grad_()
b = case["b"][part].requires_grad_(rank == 1)
CrossModalContrastiveLoss()(a, b, case["labels"][part], valid_b=case["has_b"][part]).backward()
dist.barrier()
torch.save({"a": a.grad, "b": b.grad}, folder / f"result{rank}.pt")
dist.destroy_process_group()
"""


def of_two_processes(script: str, folder: Path) -> list[Any]:
    """What two processes saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=240)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("rows", [4, 0], ids=["no row with the other side", "no row"])
def test_a_process_whose_other_side_needs_no_gradient_takes_part_in_backward(rows: int, tmp_path: Path) -> None:
    a, b = randn(rows + 4, 6, seed=0, dtype=torch.float64), randn(rows + 4, 6, seed=1, dtype=torch.float64)
    labels = torch.arange(rows + 4) % 2
    has_b = torch.arange(rows + 4) >= rows
    torch.save({"rows": rows, "a": a, "b": b, "labels": labels, "has_b": has_b}, tmp_path / "case.pt")
    first, second = of_two_processes(UNEVEN, tmp_path)
    a.requires_grad_()
    b.requires_grad_()
    cross_modal_contrastive(a, b, labels, valid_b=has_b).backward()
    assert first["b"] is None
    # Each process's loss is its part of the mean, times their number.
    torch.testing.assert_close(torch.cat([first["a"], second["a"]]) / 2, a.grad)
    torch.testing.assert_close(second["b"] / 2, b.grad[rows:])


def test_two_processes_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    """Batches of 5 and 3 rows, the sizes asked for (with `batch`) and given (with `positives`)."""
    torch.manual_seed(3)
    heads = torch.nn.ModuleDict({"heads": torch.nn.ModuleList(torch.nn.Linear(4, 6).double() for _ in range(3))})
    inputs = [randn(8, 4, seed=seed, dtype=torch.float64) for seed in range(3)]
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0, 2])
    has_a = torch.tensor([True] * 6 + [False, True])
    has_b = torch.tensor([True, False] + [True] * 6)
    case = {"inputs": inputs, "labels": labels, "has_a": has_a, "has_b": has_b}
    torch.save({**case, "weights": heads.state_dict()}, tmp_path / "case.pt")
    saved = of_two_processes(WORKER, tmp_path)
    results = [each["results"] for each in saved]
    assert not [name for each in saved for name in each["threads"] if "gloo" in name]
    for n, normalize in enumerate(("batch", "positives")):
        heads.zero_grad()
        a, b, c = (head(x) for head, x in zip(heads["heads"], inputs, strict=True))
        loss = cross_modal_contrastive(
            a, (b, c), labels, valid_a=has_a, valid_b=(has_b, None), normalize=normalize, include_matched=True
        )
        loss.backward()
        torch.testing.assert_close((results[0][n]["loss"] + results[1][n]["loss"]) / 2, loss.detach())
        for name, parameter in heads.named_parameters():
            for result in results:
                torch.testing.assert_close(result[n]["gradients"][name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_one_process_is_the_operation() -> None:
    a, b, c = (randn(8, 5, seed=seed) for seed in range(3))
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0, 3])
    loss = CrossModalContrastiveLoss(temperature=0.3, include_matched=True, normalize="positives")
    expected = cross_modal_contrastive(a, (b, c), labels, temperature=0.3, include_matched=True, normalize="positives")
    assert torch.equal(loss(a, (b, c), labels), expected)
    valid = labels < 3
    assert torch.equal(
        CrossModalContrastiveLoss()(a, b, labels, valid, valid),
        cross_modal_contrastive(a, b, labels, valid_a=valid, valid_b=valid),
    )


@pytest.mark.parametrize("world", [1, 2])
def test_bad_masks_are_refused_before_processes_meet(world: int) -> None:
    a, b, c = (randn(4, 5, seed=seed) for seed in range(3))
    labels, mask = torch.arange(4) % 2, torch.ones(4, dtype=torch.bool)
    loss = CrossModalContrastiveLoss()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        assert loss._distributed() == (world > 1)
        for valid_b, words in (
            ((mask,), "valid_b holds 1 masks for 2 of b"),
            (mask, "valid_b holds 1 masks for 2 of b"),
            ((mask, mask.float()), r"valid_b must be \[4\] bool, not \[4\] torch.float32"),
            ((mask, mask[:3]), r"valid_b must be \[4\] bool, not \[3\] torch.bool"),
        ):
            with pytest.raises(ValueError, match=words):
                loss(a, (b, c), labels, mask, valid_b)
    finally:
        dist.destroy_process_group()
