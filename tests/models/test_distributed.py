"""Two processes on the halves of a batch give the gradients of one process on the whole."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from deepmsi import DeepMSI, DeepMSIConfig

LABELS = torch.tensor([0, 1, 0, 2, 1])
# The second process has no video at all, and one row without text.
MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 1]]).bool()
SPLIT = 3


def build() -> DeepMSI:
    torch.manual_seed(0)
    model = DeepMSI(
        DeepMSIConfig(
            num_labels=3,
            vision={
                "backbone": "small",
                "image_size": 32,
                "frames": 2,
                "tcn_channels": [16],
                "tcn_dropout": 0,
                # Fixed counts: a threshold may fall differently by the last bit of another batch size.
                "schedule": {"keep": [9, 5]},
            },
            text={"dim": 12},
            audio={"dim": 10},
            fusion={"guide_hidden": 16, "projection": 16, "hidden": [16], "dropout": 0},
            loss={"class_weights": [0.5, 1.0, 3.0], "text_audio_pair": True},
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def part(rows: slice, way: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    frames = torch.randint(0, 256, (5, 2, 3, 32, 32), dtype=torch.uint8)
    text, audio = torch.randn(5, 12), torch.randn(5, 10)
    # Parts are sharded where every process runs them.
    mask = torch.ones_like(MASK[rows]) if way == "sharded in parts" else MASK[rows]
    return {
        "pixel_values": frames[rows][mask[:, 0]],
        "text_features": text[rows],
        "audio_features": audio[rows],
        "modality_mask": mask,
        "labels": LABELS[rows],
    }


def worker(rank: int, folder: str, way: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Where one process fails, the other must not wait for long.
    store, patience = f"file://{folder}/store", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    try:
        model = build()
        if way.startswith("sharded"):
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for each in (model.video.backbone, model.video.tcn, model.classifier) if way != "sharded" else ():
                fully_shard(each, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            model = DistributedDataParallel(model)
        rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, 5)
        out = model(**part(rows, way))
        out.loss.backward()
        losses = torch.stack([out.loss.detach(), out.cross_entropy.detach(), out.contrastive.detach()])
        dist.all_reduce(losses)
        if way.startswith("sharded"):
            grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        else:
            grads = {name: p.grad for name, p in model.module.named_parameters()}
        if rank == 0:
            torch.save({"grads": grads, "losses": losses / 2}, Path(folder) / "result.pt")
        elif way == "replicated":
            # Alone in evaluation: nothing may wait for the other process.
            model.module.eval()(**part(rows, way))
    finally:
        model = None  # its reducer holds the group, whose threads must end before the interpreter does
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
@pytest.mark.parametrize("way", ["replicated", "sharded", "sharded in parts"])
def test_two_processes_equal_one(way, tmp_path):
    # This file is its own script: a child finds it by its path, however the tests themselves were imported.
    commands = [[sys.executable, "-P", __file__, str(rank), str(tmp_path), way] for rank in range(2)]
    processes = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    model = build()
    out = model(**part(slice(0, 5), way))
    out.loss.backward()
    assert out.contrastive > 0
    expected = torch.stack([out.loss, out.cross_entropy, out.contrastive]).detach()
    torch.testing.assert_close(result["losses"], expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            result["grads"][name], parameter.grad, atol=1e-5, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


if __name__ == "__main__":
    worker(int(sys.argv[1]), *sys.argv[2:])
