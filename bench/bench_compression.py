"""Whether compression pays in time: stages 3 and 4 of the same engine, with and without it, in one run.

`share_of_saving` is the time saved over the time that the saved operations take at the rate of the uncompressed
stages; 1 means that compressing costs nothing of its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bench_model import BACKBONE, backbones, quiet
from torch import Tensor

from deepmsi import testing
from deepmsi.nn import VSCSwin, fix_constants
from deepmsi.nn.swin_blocks import Tokens, mean_of_frames


def late(model: VSCSwin, x: Tensor, guide: Tensor | None) -> Tensor:
    """Run stages 3 and 4 on the output [F, H, W, C] of stage 2."""
    tokens = Tokens(x, (x.shape[1], x.shape[2]))
    for stage in model.stages()[2:]:
        tokens = stage.enter(tokens)
        for block in stage.each():
            tokens = block(tokens, guide)
    return mean_of_frames(tokens._replace(x=model.norm(tokens.x)))


def gflop(attended: Sequence[float], transformed: Sequence[float], cells: float, window: int, channels: int) -> float:
    """Count stages 3 and 4 of one frame: tokens of each block's attention and MLP, then the cells of stage 4."""
    total = 0.0
    for n in attended:
        total += 8 * n * channels**2 + 4 * n * min(64, n) * channels
    for n in transformed:
        total += 16 * n * channels**2
    wide = 2 * channels
    total += 2 * cells * 4 * channels * wide
    total += 2 * (24 * cells * wide**2 + 4 * cells * window * wide)
    return total / 1e9


def early(model: VSCSwin, frames: Tensor) -> Tensor:
    """Return the output of stage 2, which is the same whatever follows."""
    with torch.inference_mode():
        embedded = model.patch_embed(frames)
        tokens = Tokens(embedded, (embedded.shape[1], embedded.shape[2]))
        for stage in model.stages()[:2]:
            tokens = stage.enter(tokens)
            for block in stage.each():
                tokens = block(tokens)
    return tokens.x


def guide_of(model: VSCSwin, frames: int, device: str) -> Tensor:
    assert model.guide_dim is not None
    return testing.randn(frames, model.guide_dim, seed=2, device=device)


def cells_of(model: VSCSwin, run: Callable[[], Any]) -> float:
    """Count the cells of stage 4 that merging fills, a frame."""
    counted: list[float] = []

    def watch(_: Any, __: Any, tokens: Tokens) -> None:
        filled = tokens.grid[0] * tokens.grid[1]
        if tokens.cu_seqlens is not None:
            filled = float(tokens.cu_seqlens[-1]) / (tokens.cu_seqlens.shape[0] - 1)
        counted.append(filled)

    merging = model.stages()[3].downsample
    assert merging is not None
    handle = merging.register_forward_hook(watch)
    run()
    handle.remove()
    return counted[0]


@pytest.mark.parametrize("layout", ["regrid", "packed"])
def bench_saving(compare: Any, smallest: bool, device: str, layout: str) -> None:
    frames = 1 if smallest else 15
    keep = (196, 144, 100)
    _, plain = backbones(None, device)
    _, ours = backbones("released", device)
    if layout == "packed":
        ours = VSCSwin.from_timm(BACKBONE, schedule={"keep": keep}).to(device)
        ours.load_state_dict(plain.state_dict(), strict=False)
    # As prediction has them: what does not shrink with the tokens is not in either side's way.
    fix_constants(plain)
    fix_constants(ours)
    pixels = testing.randn(frames, 3, 256, 256, seed=1, device=device)
    x, guide = early(plain, pixels), guide_of(ours, frames, device)
    run = quiet(lambda: late(ours, x, guide))
    with torch.inference_mode():
        torch.testing.assert_close(run(), ours(pixels, guide), rtol=1e-4, atol=1e-4)
    cells = cells_of(ours, run)
    transformed = tuple(n for k in keep for n in (k, k))
    attended = (256, *transformed[:-1])
    window = int(cells) if layout == "regrid" else 64
    whole = gflop((256,) * 6, (256,) * 6, 64, 64, 384) * frames
    left = gflop(attended, transformed, cells, window, 384) * frames
    compare(
        run,
        {"uncompressed": quiet(lambda: late(plain, x, None))},
        rounds=9,
        op="VSCSwin, stages 3 and 4",
        case=f"{frames} frames, keep {', '.join(map(str, keep))}, {layout}",
        direction="forward",
        gflop=left,
        uncompressed_gflop=whole,
        stage_4_cells=cells,
    )
    info = compare.benchmark.extra_info
    if "uncompressed_s" not in info:
        return
    before, after = info["uncompressed_s"], info["uncompressed_s"] / info["ratio_to_uncompressed"]
    expected = (whole - left) / (whole / before)
    info["share_of_saving"] = (before - after) / expected
    info["note"] = (
        f"{layout}: {whole - left:.1f} of {whole:.1f} GFLOP saved would take {expected * 1e3:.1f} ms at the "
        f"uncompressed rate of {whole / before:.0f} GFLOP/s; {1e3 * (before - after):.1f} ms are saved, "
        f"{info['share_of_saving']:.0%} of it. Stage 4 has {cells:.1f} cells a frame."
    )


def bench_threshold(compare: Any, smallest: bool, device: str) -> None:
    """Packed by threshold against packed by number, at the same mean keep."""
    frames = 1 if smallest else 15
    _, ours = backbones("paper", device)
    fix_constants(ours)
    x, guide = testing.randn(frames, 3, 256, 256, seed=1, device=device), guide_of(ours, frames, device)
    with torch.inference_mode():
        _, kept = ours(x, guide, return_kept=True)
    keep = tuple(max(1, math.ceil(float(k.cu_seqlens[-1]) / frames)) for k in kept)
    fixed = VSCSwin.from_timm(BACKBONE, schedule={"keep": keep}).to(device)
    fixed.load_state_dict(ours.state_dict())
    fix_constants(fixed)
    run, baseline = quiet(lambda: ours(x, guide)), quiet(lambda: fixed(x, guide))
    assert run().shape == baseline().shape
    cells = cells_of(ours, run)
    compare(
        run,
        {"packed keep": baseline},
        rounds=9,
        op="VSCSwin",
        case=f"{frames} frames, threshold 0.3, which keeps {', '.join(map(str, keep))} on average",
        direction="forward",
        stage_4_cells=cells,
        note=f"At threshold 0.3 stage 4 has {cells:.1f} cells a frame.",
    )
