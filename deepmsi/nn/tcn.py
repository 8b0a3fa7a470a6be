"""The temporal convolutional network: whole sequences, their last step alone, and one step of many streams."""

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _WeightNorm

from deepmsi.errors import UserError
from deepmsi.nn.constants import Fixed, HoldsConstants, recorded
from deepmsi.nn.fusing import unhooked
from deepmsi.ops._arguments import autocast, autocasts, needs_grad, shape
from deepmsi.ops.dilated_causal_conv1d import causal_conv_rows, fold_weight_norm, pack

# What a stream remembers: for every convolution its last (k - 1)·d inputs [B, (k - 1)·d, C].
TCNState = tuple[Tensor, ...]
# What the dropouts after both convolutions of a block draw from, [] int64; None without dropout.
Seeds = tuple[Tensor | None, Tensor | None]


class TemporalBlock(HoldsConstants):
    """(Weight-normed dilated causal convolution, ReLU, dropout) twice, plus the input, ReLU. Works on rows of time.

    A layer that is hooked, or of another class than torch's own, is called: a convolution then maps [B, Cin, n] to
    [B, Cout, n - past], as one without padding does.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.widths = (inputs, outputs)
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.past = (kernel_size - 1) * dilation
        self.conv1 = _weight_normed(inputs, outputs, kernel_size, dilation)
        self.conv2 = _weight_normed(outputs, outputs, kernel_size, dilation)
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None
        self.dropout = nn.Dropout(dropout)
        self._folded: dict[nn.Conv1d, Fixed[Tensor]] = {}

    def forward(self, x: Tensor, seeds: Seeds = (None, None)) -> Tensor:
        """Map [B, T, Cin] to [B, T, Cout]."""
        y = self._convolve(self.conv1, x, seeds[0])
        return self._convolve(self.conv2, y, seeds[1], residual=self._shortcut(x))

    def sparse(self, x: Tensor, step: int, count: int, seeds: Seeds = (None, None)) -> Tensor:
        """Compute ``count`` outputs, ``step`` inputs apart and the last one at the end, from every d-th time step.

        Args:
            x: [B, n, Cin], the input at every d-th time step, d being the block's dilation.
            step: Distance of two outputs, in rows of x.
            count: Number of outputs.
            seeds: What the dropouts of both convolutions draw from.

        Returns:
            [B, count, Cout].
        """
        inner = min(x.shape[1], (count - 1) * step + self.kernel_size)
        y = self._convolve(self.conv1, x, seeds[0], dilation=1, count=inner)
        shortcut = self._shortcut(x, count, step)
        return self._convolve(self.conv2, y, seeds[1], dilation=1, count=count, step=step, residual=shortcut)

    def step(self, x: Tensor, first: Tensor, second: Tensor, seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
        """Map one time step [B, Cin] to [B, Cout], given the past inputs of both convolutions."""
        seen = torch.cat([first, x.unsqueeze(1).to(first.dtype)], 1)
        y = self._convolve(self.conv1, seen, seeds[0], count=1)
        seen_second = torch.cat([second, y.to(second.dtype)], 1)
        residual = self._shortcut(x.unsqueeze(1))
        y = self._convolve(self.conv2, seen_second, seeds[1], count=1, residual=residual)
        return y.squeeze(1), seen[:, 1:], seen_second[:, 1:]

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what was folded for evaluation is dropped."""
        self.forget()
        return super().train(mode)

    def fix(self) -> None:
        """Fold the weights of now, as the first call in evaluation does."""
        for conv in (self.conv1, self.conv2, self.downsample):
            if conv is not None and not self._called(conv):
                self._weight(conv)

    def calls(self) -> bool:
        """Whether it is hooked, or calls one of its layers, which compute every position: not for :meth:`sparse`."""
        convs = (self.conv1, self.conv2, self.downsample)
        return not unhooked(self) or self._called(*(conv for conv in convs if conv is not None))

    def dropped(self) -> float:
        """Return the share of its elements that a dropout drops in the mode that it is in."""
        dropout = self.dropout
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _called(self, *convs: nn.Module) -> bool:
        dropout = self.dropout
        return (
            not unhooked(dropout, *convs)
            or type(dropout) not in (nn.Dropout, nn.Identity)
            or not all(map(_convolves, convs))
        )

    def _convolve(
        self,
        conv: nn.Conv1d,
        x: Tensor,
        seed: Tensor | None,
        *,
        dilation: int | None = None,
        count: int | None = None,
        step: int = 1,
        residual: Tensor | None = None,
    ) -> Tensor:
        if dilation is None and self._called(conv):
            count = x.shape[1] if count is None else count
            seen = nn.functional.pad(x, (0, 0, self.past + count - x.shape[1], 0))
            y = self.dropout(torch.relu(conv(seen.transpose(1, 2)))).transpose(1, 2)
            if y.shape[1] != count:
                raise ValueError(
                    f"TCN: {type(conv).__name__} maps {seen.shape[1]} time steps to {y.shape[1]}, not {count}: "
                    "it must have no padding of its own"
                )
            return y if residual is None else torch.relu(y + residual.to(y.dtype))
        weight, g = self._weight(conv)
        return causal_conv_rows(
            x,
            weight,
            conv.bias,
            g=g,
            dilation=self.dilation if dilation is None else dilation,
            count=count,
            step=step,
            relu=True,
            residual=residual,
            seed=seed,
            dropout=self.dropped() if seed is not None else 0.0,
        )

    def _shortcut(self, x: Tensor, count: int | None = None, step: int = 1) -> Tensor:
        if self.downsample is not None:
            if count is None and self._called(self.downsample):
                return cast(Tensor, self.downsample(x.transpose(1, 2))).transpose(1, 2)
            weight, _ = self._weight(self.downsample)
            return causal_conv_rows(x, weight, self.downsample.bias, count=count, step=step)
        return x if count is None else x[:, x.shape[1] - 1 - (count - 1) * step :: step]

    def _weight(self, conv: nn.Conv1d) -> tuple[Tensor, Tensor | None]:
        """Return a convolution's weight [k, Cin, Cout] and None, or v [Cout, Cin, k] and g of its weight norm.

        In evaluation it is folded once, and kept while its :class:`Fixed` holds. A change that this does not see is
        seen after the next call of ``train()`` or ``eval()``.
        """
        norm = _weight_norm(conv)
        sources = (conv.weight,) if norm is None else (norm.original1, norm.original0)

        def folded() -> Tensor:
            return autocast(fold_weight_norm(*sources) if norm is not None else pack(*sources))

        if not self.training and not recorded():
            held = self._folded.setdefault(conv, Fixed())
            weight = held.of(*sources)
            if weight is None and not needs_grad(*sources):
                # A tensor that was made in inference mode could not be saved for the gradient of x.
                with torch.inference_mode(False), torch.no_grad():
                    held.fix(folded, *sources)
                weight = held.of(*sources)
            if weight is not None:
                return weight, None
        return (norm.original1, norm.original0) if norm is not None else (pack(*sources), None)


def _weight_normed(inputs: int, outputs: int, kernel_size: int, dilation: int) -> nn.Conv1d:
    conv = nn.Conv1d(inputs, outputs, kernel_size, dilation=dilation)
    return cast(nn.Conv1d, parametrizations.weight_norm(conv))


def _convolves(layer: nn.Module) -> bool:
    """Whether a call does with weight and bias, however these are computed, what torch's convolution does."""
    kind, own = type(layer), nn.Conv1d
    return issubclass(kind, own) and kind.forward is own.forward and kind._conv_forward is own._conv_forward


def _weight_norm(conv: nn.Module) -> Any:
    """Return the weight norm of a convolution's weight as :func:`_weight_normed` gives it, or None for any other."""
    parametrized = getattr(conv, "parametrizations", ())
    if "weight" not in parametrized:
        return None
    steps = cast(Any, parametrized)["weight"]
    return steps if len(steps) == 1 and isinstance(steps[0], _WeightNorm) and steps[0].dim == 0 else None


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
        if not 0 <= dropout < 1:
            raise UserError(f"TCN: dropout must lie in [0, 1), not {dropout}")
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

    def forward(self, x: Tensor, last: bool = False) -> Tensor:
        """Map [B, Cin, T] to [B, Cout, T], or to its ``last`` time step [B, Cout] as :meth:`last` does.

        A call is what hooks see, those of FSDP among them.
        """
        if last:
            return self.last(x)
        self._check(x, "TCN")
        x = x.transpose(1, 2)
        for block, seeds in zip(self.blocks(), self._seeds(x), strict=True):
            x = block(x, seeds)
        return x.transpose(1, 2)

    def blocks(self) -> list[TemporalBlock]:
        """Return the blocks in order."""
        return cast(list[TemporalBlock], list(self.network))

    def no_weight_decay(self) -> set[str]:
        """Return the names that weight decay is to spare: the lengths of the weight norms, [Cout, 1, 1] each."""
        return {name for name, _ in self.named_parameters() if name.endswith("parametrizations.weight.original0")}

    def last(self, x: Tensor) -> Tensor:
        """Map [B, Cin, T] to the last time step [B, Cout], computing nothing that does not reach it.

        For T = 15 and the paper's network: 15, 8, 8, 8, 4, 3, 1 positions of conv1 and conv2 of the first block, its
        shortcut, and the two convolutions of the second and third. Equivalent to ``tcn(x)[:, :, -1]``, except that
        dropout draws fewer numbers. Where a layer is called, every position is computed.

        Raises:
            ValueError: The sequence is empty.
        """
        self._check(x, "TCN.last")
        length = x.shape[2]
        if length < 1:
            raise ValueError("TCN.last: the sequence has no time step")
        blocks = self.blocks()
        if any(block.calls() for block in blocks):
            return self.forward(x)[:, :, -1]
        taps = blocks[0].kernel_size
        # Going back from the end: block i is needed at `count` steps, `stride` apart; it reads every d-th time step.
        plan: list[tuple[int, int, int]] = []
        stride, count = 2 ** (len(blocks) - 1), 1
        for block in reversed(blocks):
            step = stride // block.dilation
            reach = (count - 1) * step + 2 * (taps - 1) + 1
            read = min(reach, (length - 1) // block.dilation + 1)
            plan.append((read, step, count))
            stride, count = block.dilation, read
        x = x.transpose(1, 2)[:, length - plan[-1][0] :]
        for block, (_, step, wanted), seeds in zip(blocks, reversed(plan), self._seeds(x), strict=True):
            x = block.sparse(x, step, wanted, seeds)
        return x[:, -1]

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TCNState:
        """Return the state of ``batch_size`` streams before their first frame: zeros, as before every start.

        Set the rows of a stream to zero in every tensor to start that stream anew.
        """
        weight = next(self.parameters())
        device, dtype = device or weight.device, dtype or weight.dtype
        return tuple(torch.zeros(size, device=device, dtype=dtype) for size in self._state_sizes(batch_size))

    def step(self, x: Tensor, state: TCNState) -> tuple[Tensor, TCNState]:
        """Feed one frame of every stream: x [B, Cin] and the state so far to [B, Cout] and the new state.

        Equal at every step to the network on the stream's whole sequence since its first frame.

        Raises:
            ValueError: x or the state has the wrong shape or type.
        """
        blocks = self.blocks()
        if x.dim() != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"TCN.step: x must be [B, {self.inputs}], not {shape(x)}")
        if [part.shape for part in state] != self._state_sizes(x.shape[0]):
            raise ValueError(f"TCN.step: the state is not one of init_state({x.shape[0]}), as x {shape(x)} needs")
        self._check_types("TCN.step: x or the state", x, *state)
        following: list[Tensor] = []
        for block, first, second, seeds in zip(blocks, state[::2], state[1::2], self._seeds(x), strict=True):
            x, first, second = block.step(x, first, second, seeds)
            following += [first, second]
        return x, tuple(following)

    def _check(self, x: Tensor, name: str) -> None:
        if x.dim() != 3 or x.shape[1] != self.inputs:
            raise ValueError(f"{name}: x must be [B, {self.inputs}, T], not {shape(x)}")
        self._check_types(f"{name}: x", x)

    def _check_types(self, name: str, *tensors: Tensor) -> None:
        dtype = next(self.parameters()).dtype
        for tensor in tensors:
            if tensor.dtype != dtype and not autocasts(tensor.device.type):
                raise ValueError(f"{name} is {tensor.dtype} and the weights are {dtype}: bring one to the other's type")

    def _state_sizes(self, streams: int) -> list[tuple[int, int, int]]:
        return [(streams, block.past, channels) for block in self.blocks() for channels in block.widths]

    def _seeds(self, x: Tensor) -> list[Seeds]:
        """Return what the dropouts of each block draw from: one draw of torch's generator for the whole network."""
        blocks = self.blocks()
        if not any(block.dropped() > 0 for block in blocks):
            return [(None, None)] * len(blocks)
        drawn = torch.randint(2**63 - 1, (2 * len(blocks),), device=x.device).unbind()
        return list(zip(drawn[::2], drawn[1::2], strict=True))


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
