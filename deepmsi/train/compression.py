"""What the compressions of a video branch did in training: shares that stayed, overflow, filled cells, and the capacity
that follows from them.

Everything is summed in place on the device, so that nothing waits for it between two logs, and a captured graph goes
on summing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepmsi.errors import UserError
from deepmsi.nn import VSC
from deepmsi.nn.swin_blocks import Tokens
from deepmsi.train.processes import process_rank

if TYPE_CHECKING:
    from deepmsi.models.deepmsi import DeepMSI


class CompressionLog:
    """Watches the compressions of a model in training.

    Args:
        model: hooks stay on it until `remove`.
        measure: whether to count, too, how many tokens each frame kept, from which `capacity` follows.

    Attributes:
        histograms: by compression, how many frames kept 0, 1, … tokens; int64. Empty unless measuring.
    """

    def __init__(self, model: DeepMSI, measure: bool = False) -> None:
        self.model, self.measuring = model, measure
        self.sums: dict[str, Tensor] = {}
        self.histograms: dict[int, Tensor] = {}
        self.hooks = []
        for number, module in enumerate(module for module in model.modules() if isinstance(module, VSC)):
            self.hooks.append(module.register_forward_hook(partial(self._compressed, number)))
        if model.video is not None and self.hooks:
            stages = model.video.backbone.stages()
            last = stages[-1].downsample
            if last is not None:
                self.hooks.append(last.register_forward_hook(partial(self._merged, f"cells/stage{len(stages)}")))
        if measure:
            check_measurable(model)

    @torch.no_grad()
    def _compressed(self, number: int, module: VSC, args: tuple[Any, ...], out: Any) -> None:
        if not module.training:
            return
        x, cu_seqlens = args[0], args[1]
        kept = out.cu_seqlens.diff()
        came = x.shape[:-1].numel() if cu_seqlens is None else cu_seqlens[-1]
        self._add(f"keep/{number}", kept.sum(), came)
        if module.keep is None and module.capacity is not None:
            above = out.relevance >= module.threshold
            if cu_seqlens is None:
                wanted = above.view(x.shape[:2]).sum(1)
            else:
                wanted = nn.functional.pad(above.cumsum(0), (1, 0))[cu_seqlens.long()].diff()
            self._add(f"overflow/{number}", (wanted - kept).clamp_min(0).sum(), wanted.sum())
        if self.measuring:
            self._count(number, kept)

    @torch.no_grad()
    def _merged(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Tokens) -> None:
        if module.training and out.cu_seqlens is not None:
            self._add(name, out.cu_seqlens[-1], out.cu_seqlens.shape[0] - 1)

    def _add(self, name: str, part: Tensor, whole: Tensor | int) -> None:
        whole = whole.long() if isinstance(whole, Tensor) else torch.full_like(part, whole, dtype=torch.long)
        pair = torch.stack((part.long(), whole))
        if name in self.sums:
            self.sums[name].add_(pair)
        else:
            self.sums[name] = pair

    def _count(self, number: int, kept: Tensor) -> None:
        if number not in self.histograms:
            assert self.model.video is not None
            backbone = self.model.video.backbone
            places = (backbone.img_size // backbone.patch_size) ** 2
            self.histograms[number] = torch.zeros(places + 1, dtype=torch.long, device=kept.device)
        # Integers: their sum has no order.
        self.histograms[number].index_add_(0, kept, torch.ones_like(kept, dtype=torch.long))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Leave the sums as they are, whatever runs in the block: passes that warm a captured graph up, say.

        What is measured for a capacity is not left out: nothing is captured meanwhile.
        """
        before = {name: pair.clone() for name, pair in self.sums.items()}
        yield
        for name, pair in self.sums.items():
            pair.copy_(before.get(name, torch.zeros_like(pair)))

    def take(self) -> dict[str, float]:
        """What there was since the last call, by compression: `keep/K`, the share of the tokens that stayed;
        `overflow/K`, the share of those above the threshold that the capacity dropped; `cells/stageN`, how many cells
        of the last stage were not empty, on average over frames.
        """
        shares = {}
        for name, pair in sorted(self.sums.items()):
            part, whole = pair.tolist()
            if whole:
                shares[name] = part / whole
            pair.zero_()
        return shares

    def reserve(self, quantile: float) -> tuple[int, ...]:
        """Stop measuring, and reserve the rows that this share of the frames got by with, in the model and its
        configuration; over all processes.

        Returns:
            Rows of each compression.
        """
        rows = []
        for _, histogram in sorted(self.histograms.items()):
            if process_rank()[1] > 1:
                dist.all_reduce(histogram)
            below = histogram.cumsum(0).double() / histogram.sum()
            rows.append(int((below < quantile).sum()))
        self.adopt(rows)
        return tuple(rows)

    def adopt(self, rows: list[int]) -> None:
        """Reserve rows that were found before; nothing is measured any more."""
        assert self.model.video is not None
        self.model.video.backbone.reserve(rows)
        self.model.config.vision.capacity = tuple(rows)
        self.measuring = False
        self.histograms = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain data."""
        if not self.measuring:
            return {"capacity": list(self.model.config.vision.capacity or ())}  # type: ignore[arg-type]
        return {"histograms": {str(number): histogram.tolist() for number, histogram in self.histograms.items()}}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state` gave."""
        if "capacity" in state:
            self.adopt(state["capacity"])
        else:
            self.histograms = {int(k): torch.tensor(v, device=device) for k, v in state["histograms"].items()}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()


def check_measurable(model: DeepMSI) -> None:
    """Refuse a model that has no capacity to find.

    Raises:
        UserError: nothing is kept by a threshold, or rows are reserved already.
    """
    schedule = None if model.video is None else model.video.backbone.schedule
    if schedule is None or schedule.static:
        raise UserError(
            "train.capacity_quantile is for a video branch that keeps tokens by a threshold and reserves no rows: "
            "leave it out."
        )
