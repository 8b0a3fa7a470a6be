"""Where the time of the video branch goes, by operation and shape: a table for `bench/results/profile.md`.

`python bench/profile_model.py --out bench/results` profiles a forward pass and a training step of one utterance at the
released schedule. The rate is that of the operations counted from the shapes; torch's own product of the same shape,
timed in the same run, stands beside it.
"""

import argparse
import json
import re
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_model import backbones, quiet, step_of
from conftest import facts, products
from torch.profiler import ProfilerActivity, profile

from deepmsi import testing

TURNS = 3
# In training autograd's node of an operation has its forward time.
WRAPPED = re.compile(r"^deepmsi_(?=\w+_fwd$)")


def rows_of(event: Any) -> tuple[int, int]:
    """Return the rows and channels of an operation's first input."""
    shape = next((s for s in event.input_shapes if len(s) >= 2), [0, 0])
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1]


def gflop(name: str, event: Any) -> float | None:
    """Count the operations of a call from its shapes, a multiply-add as two; None where no product is behind it."""
    rows, channels = rows_of(event)
    backward = "bwd" in name
    if "project_cells" in name:
        # Backward: of the weights, and of the cells where they come from tokens.
        cells = next((s for s in event.input_shapes if len(s) == 6), None)
        if cells is None:
            return None
        rows, depth = cells[0] * cells[1] * cells[2], cells[3] * cells[4] * cells[5]
        weight = next(s for s in event.input_shapes if len(s) == 2 and s[1] == depth)
        return (2 if not backward else 2 if cells[5] <= 16 else 4) * rows * depth * weight[0] / 1e9
    if "residual_mlp" in name:
        # Backward makes the hidden rows again: five products for two.
        return (40 if backward else 16) * rows * channels**2 / 1e9
    if "residual_window_attention" in name:
        # Backward makes q, k and v again, and the attention's weights.
        linear, attention = (22, 10) if backward else (8, 4)
        return (linear * rows * channels**2 + attention * rows * 64 * channels) / 1e9
    if name in ("aten::mm", "aten::addmm"):
        left, right = [s for s in event.input_shapes if len(s) == 2][-2:]
        return 2 * left[0] * left[1] * right[1] / 1e9
    return None


def measure(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Profile some turns of a function: its operations of at least 0.1%, those with the most own time first."""
    run()
    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(TURNS):
            run()
    table = []
    total = 0.0
    for event in profiled.key_averages(group_by_input_shape=True):
        seconds = event.self_cpu_time_total / 1e6 / TURNS
        total += seconds
        rows, channels = rows_of(event)
        count = gflop(event.key, event)
        calls = event.count / TURNS
        table.append(
            {
                "operation": WRAPPED.sub("", event.key).removeprefix("deepmsi::"),
                "rows": rows,
                "channels": channels,
                "calls": calls,
                "ms": seconds * 1e3,
                "gflop": None if count is None else count * calls,
            }
        )
    table.sort(key=lambda row: -row["ms"])
    for row in table:
        row["share"] = row["ms"] / 1e3 / total
    return [row for row in table if row["share"] > 1e-3]


def torch_rate(rows: int, channels: int) -> float:
    """Return the GFLOP/s of torch's own product of that many rows with a square matrix: the best of eight."""
    a, b = torch.randn(rows, channels), torch.randn(channels, channels)
    best = min(min(timeit.repeat(product, number=1, repeat=8)) for product in products(a, b))
    return 2 * rows * channels**2 / best / 1e9


def render(title: str, table: list[dict[str, Any]]) -> str:
    """Return a Markdown table of what takes at least 1% of the time, and the rest in a line."""
    lines = [
        f"## {title}: {sum(row['ms'] for row in table):.0f} ms",
        "",
        "| operation | rows x channels | calls | ms | share | GFLOP | GFLOP/s | torch there |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = [row for row in table if row["share"] >= 0.01]
    for row in shown:
        rate = there = count = ""
        if row["gflop"]:
            count, rate = f"{row['gflop']:.1f}", f"{row['gflop'] / row['ms'] * 1e3:.0f}"
            there = f"{torch_rate(row['rows'], row['channels']):.0f}"
        lines.append(
            f"| `{row['operation']}` | {row['rows']} x {row['channels']} | {row['calls']:.0f} | {row['ms']:.1f} | "
            f"{row['share']:.0%} | {count} | {rate} | {there} |"
        )
    rest = [row for row in table if row["share"] < 0.01]
    lines.append(f"| {len(rest)} others | | | {sum(r['ms'] for r in rest):.1f} | {sum(r['share'] for r in rest):.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Profile the video branch of one utterance and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for profile.json and profile.md")
    parser.add_argument("--frames", type=int, default=15)
    arguments = parser.parse_args()
    _, model = backbones("released")
    x = testing.randn(arguments.frames, 3, 256, 256, seed=1)
    guide = testing.randn(arguments.frames, model.guide_dim, seed=2)

    def forward() -> torch.Tensor:
        return model(x, guide)

    tables = {"forward": measure(quiet(forward)), "training step": measure(step_of(model, forward))}
    where = facts("cpu", torch.float32)
    text = [
        "# Where the time goes",
        "",
        f"The video branch of {arguments.frames} frames at the released schedule, own time of each operation on "
        f"{where['device']}, {where['threads']} threads, {where['instruction_set']}, float32, torch {where['torch']}. "
        "`torch there` is the faster of torch's products (MKL, oneDNN) of as many rows with a square matrix of as many "
        "channels, in GFLOP/s.",
        "",
    ]
    text.append("\n\n".join(render(title, table) for title, table in tables.items()))
    (arguments.out / "profile.md").write_text("\n".join(text) + "\n")
    (arguments.out / "profile.json").write_text(json.dumps({**where, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
