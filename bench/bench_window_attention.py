"""window_attention: stages 1 and 3 of Swin V2 tiny, against timm from a block's input to before its projection.

timm's side holds the product that makes qkv, ours begins after it: the same product is timed in the run and taken away.
Both sides make the table of the position bias from its small network.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi.ops import window_attention

WINDOW = 8
# name: side of the grid, channels, heads, shift
CASES = {
    "stage 1": (64, 96, 3, 0),
    "stage 1, shifted": (64, 96, 3, 4),
    "stage 3": (16, 384, 12, 0),
    "stage 3, shifted": (16, 384, 12, 4),
}
SMALLEST = "stage 3, shifted"
FRAMES = {"cpu": 15, "cuda": 240}


class Sides:
    """One block of timm without its projection, and the operation on the same weights."""

    def __init__(self, place: Any, frames: int, side: int, channels: int, heads: int, shift: int) -> None:
        from timm.models.swin_transformer_v2 import SwinTransformerV2Block

        self.place, self.heads, self.grid, self.shift = place, heads, (side, side), shift
        torch.manual_seed(0)
        block = SwinTransformerV2Block(channels, self.grid, heads, window_size=WINDOW, shift_size=shift).eval()
        block.attn.proj = torch.nn.Identity()
        self.block = block.to(place.device, place.dtype)
        self.attention: Any = self.block.attn
        self.x = place.randn(frames, side, side, channels, seed=1).requires_grad_()
        self.qkv = self.product().detach().requires_grad_()
        self.grad = place.randn(frames, side, side, channels, seed=2)
        self.grad_qkv = place.randn(*self.qkv.shape, seed=3)
        bias = list(self.attention.cpb_mlp.parameters())
        self.of_attention = [self.attention.logit_scale, *bias]
        self.of_product = [self.attention.qkv.weight, self.attention.q_bias, self.attention.v_bias]
        self.compiled = torch.compile(self.block._attn)
        # What the operation must move: qkv in, tokens out; for backward qkv and a gradient in, that of qkv out.
        self.traffic = {"forward": 4 * self.grad.nbytes, "forward_backward": 11 * self.grad.nbytes}

    def product(self) -> Tensor:
        bias = torch.cat([self.attention.q_bias, self.attention.k_bias, self.attention.v_bias])
        return torch.nn.functional.linear(self.x, self.attention.qkv.weight, bias)

    def timm(self) -> Tensor:
        return self.block._attn(self.x)

    def compile(self) -> Tensor:
        return self.compiled(self.x)

    def ours(self) -> Tensor:
        table = 16 * torch.sigmoid(self.attention.cpb_mlp(self.attention.relative_coords_table))
        return window_attention(
            self.qkv,
            self.heads,
            self.grid,
            WINDOW,
            self.shift,
            bias_table=table.view(-1, self.heads).float(),
            logit_scale=self.attention.logit_scale.float(),
            backend=self.place.backend,
        )

    def forward(self, name: str) -> Tensor:
        with torch.no_grad():
            return getattr(self, name)()

    def step(self, name: str) -> tuple[Tensor, ...]:
        """Forward and backward of one side: gradients of what it is made of."""
        whole = [self.x, *self.of_product, *self.of_attention], self.grad
        inputs, grad = {
            "timm": whole,
            "compile": whole,
            "product": ([self.x, *self.of_product], self.grad_qkv),
            "ours": ([self.qkv, *self.of_attention], self.grad),
        }[name]
        return torch.autograd.grad(getattr(self, name)(), inputs, grad)

    def check(self) -> None:
        """Both sides give the same numbers before either is timed."""
        self.place.close(self.forward("ours"), self.forward("timm"), rtol=1e-4, atol=1e-5)
        ours, theirs = self.step("ours"), self.step("timm")
        for a, b in zip(ours[1:], theirs[1 + len(self.of_product) :], strict=True):
            self.place.close(a, b)
        through = torch.autograd.grad(self.product(), self.x, ours[0])[0]
        self.place.close(through, theirs[0])

    def check_compiled(self) -> None:
        """The compiled block gives the numbers of the block."""
        self.place.close(self.forward("compile"), self.forward("timm"), rtol=1e-4, atol=1e-5)
        for a, b in zip(self.step("compile"), self.step("timm"), strict=True):
            self.place.close(a, b)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", CASES)
def bench_window_attention(compare: Any, smallest: bool, ceilings: Any, place: Any, name: str, direction: str) -> None:
    place.need("window_attention")
    if smallest and name != SMALLEST:
        pytest.skip("only the smallest size was asked for")
    pytest.importorskip("timm")
    side, channels, heads, shift = CASES[name]
    frames = 1 if smallest else FRAMES[place.device]
    sides = Sides(place, frames, side, channels, heads, shift)
    sides.check()
    run = sides.forward if direction == "forward" else sides.step
    baselines: dict[str, Callable[[], Any]] = {"timm": lambda: run("timm"), **compare.compiled(lambda: run("compile"))}
    if "compile" in baselines:
        sides.check_compiled()
    # Two products forward and five backward, of every token with the tokens of its window.
    operations = 2.0 * frames * side * side * WINDOW * WINDOW * channels * (2 if direction == "forward" else 7)
    compare(
        lambda: run("ours"),
        {**baselines, "qkv_product": lambda: run("product")},
        dtype=place.dtype,
        floor=ceilings.floor(operations, sides.traffic[direction], place.dtype),
        graph=True,
        op="window_attention",
        case=f"{name}: {side} x {side} x {channels}, {heads} heads, {frames} frames{place.suffix}",
        direction=direction,
    )
    info = compare.benchmark.extra_info
    info.pop("ratio_to_qkv_product", None)
    for baseline in baselines:
        if f"{baseline}_s" in info:
            without = info[f"{baseline}_s"] - info["qkv_product_s"]
            info[f"ratio_to_{baseline}"] *= without / info[f"{baseline}_s"]
            info[f"{baseline}_s"] = without
        if "eager_s" in info:
            info["eager_s"][baseline] -= info["eager_s"]["qkv_product"]
