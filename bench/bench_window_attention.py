"""window_attention: stages 1 and 3 of Swin V2 tiny, against timm from a block's input to before its projection.

timm's side holds the product that makes qkv, ours begins after it: the same product is timed in the run and taken away.
Both sides make the table of the position bias from its small network.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import backend, testing
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


class Sides:
    """One block of timm without its projection, and the operation on the same weights."""

    def __init__(self, frames: int, side: int, channels: int, heads: int, shift: int) -> None:
        from timm.models.swin_transformer_v2 import SwinTransformerV2Block

        self.heads, self.grid, self.shift = heads, (side, side), shift
        torch.manual_seed(0)
        self.block = SwinTransformerV2Block(channels, self.grid, heads, window_size=WINDOW, shift_size=shift).eval()
        self.attention = self.block.attn
        self.attention.proj = torch.nn.Identity()
        self.x = testing.randn(frames, side, side, channels, seed=1).requires_grad_()
        self.qkv = self.product().detach().requires_grad_()
        self.grad = testing.randn(frames, side, side, channels, seed=2)
        self.grad_qkv = testing.randn(*self.qkv.shape, seed=3)
        bias = list(self.attention.cpb_mlp.parameters())
        self.of_attention = [self.attention.logit_scale, *bias]
        self.of_product = [self.attention.qkv.weight, self.attention.q_bias, self.attention.v_bias]

    def product(self) -> Tensor:
        bias = torch.cat([self.attention.q_bias, self.attention.k_bias, self.attention.v_bias])
        return torch.nn.functional.linear(self.x, self.attention.qkv.weight, bias)

    def timm(self) -> Tensor:
        return self.block._attn(self.x)

    def ours(self) -> Tensor:
        table = 16 * torch.sigmoid(self.attention.cpb_mlp(self.attention.relative_coords_table))
        return window_attention(
            self.qkv,
            self.heads,
            self.grid,
            WINDOW,
            self.shift,
            bias_table=table.view(-1, self.heads),
            logit_scale=self.attention.logit_scale,
            backend="cpp",
        )

    def forward(self, name: str) -> Tensor:
        with torch.no_grad():
            return getattr(self, name)()

    def step(self, name: str) -> tuple[Tensor, ...]:
        """Forward and backward of one side: gradients of what it is made of."""
        inputs, grad = {
            "timm": ([self.x, *self.of_product, *self.of_attention], self.grad),
            "product": ([self.x, *self.of_product], self.grad_qkv),
            "ours": ([self.qkv, *self.of_attention], self.grad),
        }[name]
        return torch.autograd.grad(getattr(self, name)(), inputs, grad)

    def check(self) -> None:
        """Both sides give the same numbers before either is timed."""
        torch.testing.assert_close(self.forward("ours"), self.forward("timm"), rtol=1e-4, atol=1e-5)
        ours, theirs = self.step("ours"), self.step("timm")
        for a, b in zip(ours[1:], theirs[1 + len(self.of_product) :], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
        through = torch.autograd.grad(self.product(), self.x, ours[0])[0]
        torch.testing.assert_close(through, theirs[0], rtol=1e-3, atol=1e-4 * theirs[0].abs().max().item())


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", CASES)
def bench_window_attention(compare: Any, smallest: bool, gemm_rate: float, name: str, direction: str) -> None:
    reason = backend.why_not("window_attention", "cpp", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    if smallest and name != SMALLEST:
        pytest.skip("only the smallest size was asked for")
    pytest.importorskip("timm")
    side, channels, heads, shift = CASES[name]
    frames = 1 if smallest else 15
    sides = Sides(frames, side, channels, heads, shift)
    sides.check()
    run = sides.forward if direction == "forward" else sides.step
    # Two products forward and five backward, of every token with the tokens of its window.
    operations = 2.0 * frames * side * side * WINDOW * WINDOW * channels * (2 if direction == "forward" else 7)
    compare(
        lambda: run("ours"),
        {"timm": lambda: run("timm"), "qkv_product": lambda: run("product")},
        floor=operations / gemm_rate,
        op="window_attention",
        case=f"{name}: {side} x {side} x {channels}, {heads} heads, {frames} frames",
        direction=direction,
    )
    info = compare.benchmark.extra_info
    info.pop("ratio_to_qkv_product", None)
    if "timm_s" in info:
        info["ratio_to_timm"] *= (info["timm_s"] - info["qkv_product_s"]) / info["timm_s"]
        info["timm_s"] -= info["qkv_product_s"]
