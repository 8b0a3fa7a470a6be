"""The TCN: its last step and whole sequences, against the usual stack of weight-normed, padded and chomped conv1d."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deepmsi import testing
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


def sides() -> tuple[TCN, Usual]:
    """Return both networks with the same weights."""
    torch.manual_seed(0)
    ours, theirs = TCN(INPUTS, CHANNELS, TAPS, dropout=0.3), Usual()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def check(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("utterances", [1, 16])
def bench_last_step(compare: Any, smallest: bool, gemm_rate: float, utterances: int, direction: str) -> None:
    if smallest and utterances > 1:
        pytest.skip("only the smallest size was asked for")
    ours, theirs = sides()
    x = testing.randn(utterances, INPUTS, 15, seed=1)
    ours.eval(), theirs.eval()
    check(lambda: ours.last(x), lambda: theirs(x)[:, :, -1])
    _time(compare, ours, theirs, lambda net: _last(net, x), direction,
          floor=2 * LAST_STEP * utterances / gemm_rate if direction == "forward" else None,
          case=f"last step, {utterances} utterance{'s' * (utterances > 1)} of 15 frames")  # fmt: skip


@pytest.mark.parametrize("steps", [15, 64, 512])
def bench_whole_sequence(compare: Any, smallest: bool, steps: int) -> None:
    if smallest and steps > 15:
        pytest.skip("only the smallest size was asked for")
    ours, theirs = sides()
    x = testing.randn(1, INPUTS, steps, seed=1)
    ours.eval(), theirs.eval()
    check(lambda: ours(x), lambda: theirs(x))
    _time(compare, ours, theirs, lambda net: net(x), "forward", floor=None, case=f"whole sequence of {steps} steps")


def _last(network: nn.Module, x: Tensor) -> Tensor:
    return network.last(x) if isinstance(network, TCN) else network(x)[:, :, -1]


def _time(
    compare: Any,
    ours: TCN,
    theirs: Usual,
    call: Callable[[nn.Module], Tensor],
    direction: str,
    floor: float | None,
    case: str,
) -> None:
    """Time both networks in inference, or in a training step with dropout on."""

    def runner(network: nn.Module) -> Callable[[], None]:
        def forward() -> None:
            with torch.inference_mode():
                call(network)

        def step() -> None:
            call(network).square().mean().backward()
            network.zero_grad(set_to_none=True)

        network.train(direction != "forward")
        return forward if direction == "forward" else step

    compare(
        runner(ours),
        {"conv1d": runner(theirs)},
        floor=floor,
        rounds=15,
        op="dilated_causal_conv1d",
        case=case,
        direction=direction,
    )
