"""The temporal convolutional network: whole sequences, their last step alone, and one step of many streams."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deepmsi.errors import UserError
from deepmsi.ops import dilated_causal_conv1d

# What a stream remembers: for every convolution its last (k - 1)·d inputs [B, C, (k - 1)·d].
TCNState = tuple[Tensor, ...]


class TemporalBlock(nn.Module):
    """(Weight-normed dilated causal convolution, ReLU, dropout) twice, plus the input, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv1 = _weight_normed(inputs, outputs, kernel_size, dilation)
        self.conv2 = _weight_normed(outputs, outputs, kernel_size, dilation)
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, Cin, T] to [B, Cout, T]."""
        y = self._activate(dilated_causal_conv1d(x, self.conv1.weight, self.conv1.bias, self.dilation))
        y = self._activate(dilated_causal_conv1d(y, self.conv2.weight, self.conv2.bias, self.dilation))
        return torch.relu(y + self._shortcut(x))

    def sparse(self, x: Tensor, step: int, count: int) -> Tensor:
        """Compute ``count`` outputs, ``step`` inputs apart and the last one at the end, from every d-th time step.

        Args:
            x: [B, Cin, n], the input at every d-th time step, d being the block's dilation.
            step: Distance of two outputs, in columns of x.
            count: Number of outputs.

        Returns:
            [B, Cout, count].
        """
        taps = self.conv1.kernel_size[0]
        y = self._activate(_valid(x, self.conv1, 1, min(x.shape[2], (count - 1) * step + taps)))
        y = self._activate(_valid(y, self.conv2, step, count))
        return torch.relu(y + self._shortcut(x[:, :, x.shape[2] - 1 - (count - 1) * step :: step]))

    def step(self, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map one time step [B, Cin] to [B, Cout], given the past inputs of both convolutions."""
        y, first = _advance(x, first, self.conv1, self.dilation)
        y, second = _advance(self._activate(y), second, self.conv2, self.dilation)
        return torch.relu(self._activate(y) + self._shortcut(x.unsqueeze(2)).squeeze(2)), first, second

    def _activate(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else _valid(x, self.downsample, 1, x.shape[2])


def _weight_normed(inputs: int, outputs: int, kernel_size: int, dilation: int) -> nn.Conv1d:
    conv = nn.Conv1d(inputs, outputs, kernel_size, dilation=dilation)
    return cast(nn.Conv1d, parametrizations.weight_norm(conv))


def _valid(x: Tensor, conv: nn.Conv1d, step: int, count: int) -> Tensor:
    """Convolve x [B, Cin, n] without dilation into the last ``count`` outputs, ``step`` apart: [B, Cout, count].

    Zeros stand before the start. One product of the gathered taps: at a few positions that is what a convolution is.
    """
    weight = conv.weight
    missing = (count - 1) * step + weight.shape[2] - x.shape[2]
    x = torch.nn.functional.pad(x, (missing, 0))
    taps = x.unfold(2, weight.shape[2], step).transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(taps, weight.flatten(1), conv.bias).transpose(1, 2)


def _advance(x: Tensor, past: Tensor, conv: nn.Conv1d, dilation: int) -> tuple[Tensor, Tensor]:
    """Convolve one more time step x [B, Cin]; return its output [B, Cout] and the new past."""
    seen = torch.cat([past, x.unsqueeze(2).to(past.dtype)], 2)
    y = torch.nn.functional.linear(seen[:, :, ::dilation].flatten(1), conv.weight.flatten(1), conv.bias)
    return y, seen[:, :, 1:]


class TCN(nn.Module):
    """Stack dilated causal convolutions (Eq. 4) with dilations 1, 2, 4, ….

    Args:
        inputs: Channels of the input.
        channels: Channels of each block.
        kernel_size: Taps k of every convolution.
        dropout: Dropout after each ReLU.

    Attributes:
        receptive_field: Time steps that the last output sees: 1 + 2 (k - 1) Σ 2^i, which is 29 for the paper's.
    """

    def __init__(self, inputs: int, channels: Sequence[int], kernel_size: int = 3, dropout: float = 0.3) -> None:
        super().__init__()
        if not channels or inputs < 1 or min(channels) < 1 or kernel_size < 1:
            raise UserError(
                f"TCN: inputs {inputs}, channels {tuple(channels)} and kernel_size {kernel_size} must be positive"
            )
        widths = (inputs, *channels)
        self.network = nn.ModuleList(
            TemporalBlock(widths[i], widths[i + 1], kernel_size, 2**i, dropout) for i in range(len(channels))
        )
        self.inputs = inputs
        self.outputs = widths[-1]
        self.receptive_field = 1 + 2 * (kernel_size - 1) * (2 ** len(channels) - 1)
        self.register_load_state_dict_pre_hook(_accept_older_names)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, Cin, T] to [B, Cout, T]."""
        for block in self.blocks():
            x = block(x)
        return x

    def blocks(self) -> list[TemporalBlock]:
        """Return the blocks in order."""
        return cast(list[TemporalBlock], list(self.network))

    def last(self, x: Tensor) -> Tensor:
        """Map [B, Cin, T] to the last time step [B, Cout], computing nothing that does not reach it.

        For T = 15 and the paper's network: 15, 8, 8, 8, 4, 3, 1 positions of conv1 and conv2 of the first block, its
        shortcut, and the two convolutions of the second and third. Equivalent to ``tcn(x)[:, :, -1]``, except that
        dropout draws fewer numbers.

        Raises:
            ValueError: The sequence is empty.
        """
        length = x.shape[2]
        if length < 1:
            raise ValueError("TCN.last: the sequence has no time step")
        blocks = self.blocks()
        taps = blocks[0].conv1.kernel_size[0]
        # Going back from the end: block i is needed at `count` steps, `stride` apart; it reads every d-th time step.
        plan: list[tuple[int, int, int]] = []
        stride, count = 2 ** (len(blocks) - 1), 1
        for block in reversed(blocks):
            step = stride // block.dilation
            reach = (count - 1) * step + 2 * (taps - 1) + 1
            read = min(reach, (length - 1) // block.dilation + 1)
            plan.append((read, step, count))
            stride, count = block.dilation, read
        x = x[:, :, length - plan[-1][0] :]
        for block, (_, step, wanted) in zip(blocks, reversed(plan), strict=True):
            x = block.sparse(x, step, wanted)
        return x[:, :, -1]

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TCNState:
        """Return the state of ``batch_size`` streams before their first frame: zeros, as before every start.

        Set the rows of a stream to zero in every tensor to start that stream anew.
        """
        bias = cast(Tensor, self.blocks()[0].conv1.bias)
        device, dtype = device or bias.device, dtype or bias.dtype
        return tuple(
            torch.zeros(
                batch_size,
                conv.in_channels,
                (conv.kernel_size[0] - 1) * block.dilation,
                device=device,
                dtype=dtype,
            )
            for block in self.blocks()
            for conv in (block.conv1, block.conv2)
        )

    def step(self, x: Tensor, state: TCNState) -> tuple[Tensor, TCNState]:
        """Feed one frame of every stream: x [B, Cin] and the state so far to [B, Cout] and the new state.

        Equal at every step to the network on the stream's whole sequence since its first frame.
        """
        following: list[Tensor] = []
        for block, first, second in zip(self.blocks(), state[::2], state[1::2], strict=True):
            x, first, second = block.step(x, first, second)
            following += [first, second]
        return x, tuple(following)


def _accept_older_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename weight_g and weight_v of the older weight norm, and drop the duplicates ``network.{i}.net.*``."""
    for key in [key for key in state if key.startswith(f"{prefix}network.")]:
        name = key.removeprefix(prefix)
        if name.split(".")[2:3] == ["net"]:
            del state[key]
            continue
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            if name.endswith(f".{old}"):
                state[key.removesuffix(old) + f"parametrizations.weight.{new}"] = state.pop(key)
