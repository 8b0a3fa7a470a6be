"""The TCN: its last step and whole sequences, against the usual stack of weight-normed, padded and chomped conv1d."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import deepmsi
from deepmsi.nn import TCN

INPUTS, CHANNELS, TAPS = 768, (1024, 1024, 1024), 3
# Multiply-adds of one utterance of 15 frames that reach the last step: 15, 8, 8, 8, 4, 3 and 1 positions.
LAST_STEP = TAPS * 1024 * (15 * INPUTS + (8 + 8 + 4 + 3 + 1) * 1024) + 8 * INPUTS * 1024


class UsualBlock(nn.Module):
    """What common implementations of a TCN do: pad both ends, convolve all steps, chomp the end."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.pad = (TAPS - 1) * dilation

        def convolution(width: int) -> nn.Conv1d:
            conv = nn.Conv1d(width, outputs, TAPS, padding=self.pad, dilation=dilation)
            return cast(nn.Conv1d, parametrizations.weight_norm(conv))

        self.conv1, self.conv2 = convolution(inputs), convolution(outputs)
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in (self.conv1, self.conv2):
            y = self.dropout(torch.relu(conv(y)[:, :, : -self.pad]))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Usual(nn.Module):
    """The stack of these blocks, with the names of `deepmsi.nn.TCN`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (INPUTS, *CHANNELS)
        self.network = nn.Sequential(*(UsualBlock(widths[i], widths[i + 1], 2**i) for i in range(len(CHANNELS))))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class Sides:
    """Both networks with the same weights, and the second under torch.compile, on one input."""

    def __init__(self, place: Any, utterances: int, steps: int, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.place = place
        torch.manual_seed(0)
        self.ours, self.usual = TCN(INPUTS, CHANNELS, TAPS, dropout=0.3), Usual()
        self.usual.load_state_dict(self.ours.state_dict())
        for network in (self.ours, self.usual):
            network.to(place.device, place.dtype).eval()
        self.compiled = torch.compile(self.usual)
        self.x = place.randn(utterances, INPUTS, steps, seed=1)
        self.call = call

    def forward(self, network: nn.Module) -> Tensor:
        with torch.inference_mode(), deepmsi.use_backend(self.place.backend):
            return self.call(network, self.x)

    def step(self, network: nn.Module) -> tuple[Tensor, ...]:
        with deepmsi.use_backend(self.place.backend):
            loss = self.call(network, self.x).square().mean()
        return torch.autograd.grad(loss, list(network.parameters()))

    def check(self, network: nn.Module) -> None:
        """A side gives the numbers of the usual network before it is timed."""
        self.place.close(self.forward(network), self.forward(self.usual), rtol=1e-4, atol=1e-4)

    def compare(self, compare: Any, direction: str, floor: float | None, case: str) -> None:
        """Time both networks in inference, or in a training step with dropout on."""
        run = self.forward if direction == "forward" else self.step
        self.check(self.ours)
        baselines = {"conv1d": lambda: run(self.usual), **compare.compiled(lambda: run(self.compiled))}
        if "compile" in baselines:
            self.check(self.compiled)
        for network in (self.ours, self.usual):
            network.train(direction != "forward")
        compare(
            lambda: run(self.ours),
            baselines,
            dtype=self.place.dtype,
            floor=floor,
            graph=True,
            op="dilated_causal_conv1d",
            case=case + self.place.suffix,
            direction=direction,
        )


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("utterances", [1, 16])
def bench_last_step(compare: Any, smallest: bool, ceilings: Any, place: Any, utterances: int, direction: str) -> None:
    place.need("dilated_causal_conv1d")
    if smallest and utterances > 1:
        pytest.skip("only the smallest size was asked for")
    sides = Sides(place, utterances, 15, _last)
    floor = None
    if direction == "forward":
        weights = sum(p.nbytes for p in sides.usual.parameters())
        floor = ceilings.floor(2 * LAST_STEP * utterances, weights, place.dtype)
    sides.compare(compare, direction, floor, f"last step, {utterances} utterance{'s' * (utterances > 1)} of 15 frames")


@pytest.mark.parametrize("steps", [15, 64, 512])
def bench_whole_sequence(compare: Any, smallest: bool, place: Any, steps: int) -> None:
    place.need("dilated_causal_conv1d")
    if smallest and steps > 15:
        pytest.skip("only the smallest size was asked for")
    sides = Sides(place, 1, steps, lambda network, x: network(x))
    sides.compare(compare, "forward", None, f"whole sequence of {steps} steps")


def _last(network: nn.Module, x: Tensor) -> Tensor:
    return network.last(x) if isinstance(network, TCN) else network(x)[:, :, -1]
