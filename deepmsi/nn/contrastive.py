"""The cross-modal contrastive loss as a module, over the joined batch of all processes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepmsi.ops import cross_modal_contrastive
from deepmsi.ops.cross_modal_contrastive import masks_of_pairs

if dist.is_available():
    # Its functions keep, as the default of an argument, the group that there is when they are imported. Some part of
    # torch imports them sooner or later, and a group that lives on in them has threads that may abort the process at
    # its exit. Imported here, before there is a group, they keep none.
    import torch.distributed.nn


class CrossModalContrastiveLoss(nn.Module):
    """Contrast modalities by labels (Eq. 5), over the batch of all processes where there are several.

    Each process computes the part of the joined loss that its rows of ``a`` have, times the number of processes, so
    that the mean over processes (which DistributedDataParallel takes of the gradients) is the loss of one process on
    the joined batch. Batches of unequal length are padded with rows that take no part. Under gradient accumulation the
    contrastive batch is the micro-batch of all processes.

    Args:
        temperature: τ_c > 0.
        include_matched: Whether the matched pair (i, i) is a positive, too.
        normalize: ``"batch"`` divides by B - 1, ``"positives"`` by the number of positives.
        gather: Whether to join the batches of all processes of a running ``torch.distributed``.
        batch_size: The largest number of rows that a process passes. Given, nothing waits for the device; None reads
            the processes' numbers of rows on the host in every step.
        group: The processes; None means all of them.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        include_matched: bool = False,
        normalize: str = "batch",
        gather: bool = True,
        batch_size: int | None = None,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.include_matched = include_matched
        self.normalize = normalize
        self.gather = gather
        self.batch_size = batch_size
        self.group = group

    def forward(
        self,
        a: Tensor,
        b: Tensor | Sequence[Tensor],
        labels: Tensor,
        valid_a: Tensor | Sequence[Tensor | None] | None = None,
        valid_b: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return the loss of a [B, D] against b [B, D], or the mean over a sequence of such b.

        Args:
            a: [B, D], normalised inside.
            b: [B, D], or a sequence of them.
            labels: [B], integers.
            valid_a: Whether a row has its a-side [B] bool, or a sequence of them where b is one; None means all.
            valid_b: Whether a row has its b-side [B] bool, or a sequence of them where b is one.

        Returns:
            A scalar. With several processes: this process's part, times their number.

        Raises:
            ValueError: An argument has the wrong shape, type or range.
        """
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "include_matched": self.include_matched,
            "normalize": self.normalize,
        }
        if not self._distributed():
            return cross_modal_contrastive(a, b, labels, valid_a=valid_a, valid_b=valid_b, **options)
        others = [b] if isinstance(b, Tensor) else list(b)
        sides = masks_of_pairs(a, others, valid_a, valid_b)
        rows, size = a.shape[0], self._joined_rows(a)
        world, rank = dist.get_world_size(self.group), dist.get_rank(self.group)

        present = torch.ones(rows, dtype=torch.bool, device=a.device)
        columns = [labels]
        for mask_a, mask_b in zip(*sides, strict=True):
            both = present if mask_a is None else mask_a
            columns.append(both if mask_b is None else both & mask_b)
        facts = _pad(torch.stack([column.long() for column in columns], 1), size)
        facts = _gather(facts, self.group)
        own = _pad(torch.cat(others, 1), size)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not (own.requires_grad or a.requires_grad):
            own.requires_grad_()  # neither side does, but another process's may, whose backward waits for this one's
        everything = _GatherRows.apply(own, a, self.group)
        part = cross_modal_contrastive(
            _pad(a, size),
            list(everything.split([other.shape[1] for other in others], 1)),
            _pad(labels, size),
            valid_b=[facts[:, 1 + i].bool() for i in range(len(others))],
            labels_b=facts[:, 0].contiguous(),
            row_offset=rank * size,
            **options,
        )
        return part * world

    def _distributed(self) -> bool:
        return self.gather and dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def _joined_rows(self, a: Tensor) -> int:
        """Return the rows that every process pads its batch to."""
        if self.batch_size is not None:
            if a.shape[0] > self.batch_size:
                raise ValueError(
                    f"CrossModalContrastiveLoss: {a.shape[0]} rows are more than batch_size {self.batch_size}"
                )
            return self.batch_size
        largest = torch.tensor(a.shape[0], device=a.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return int(largest)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, include_matched={self.include_matched}, normalize={self.normalize!r}"


def _pad(x: Tensor, rows: int) -> Tensor:
    """Append rows of zeros (labels 0, absent on every side) up to ``rows``."""
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def _collective(name: str, before: str) -> Any:
    """Return a collective by the name that torch has since 2.14, where the one before warns."""
    return getattr(dist, name, None) or getattr(dist, before)


def _gather(x: Tensor, group: Any) -> Tensor:
    """Return the rows of all processes [world · n, ...], in the order of their ranks."""
    joined = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    _collective("all_gather_single", "all_gather_into_tensor")(joined, x.contiguous(), group)
    return joined


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward is a reduce-scatter sum: every process's use of a row counts in its gradient.

    That is a collective, which every process has to call: also one whose own rows need no gradient, for what else of
    its loss does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        own = grad.new_empty(ctx.rows, *grad.shape[1:])
        if dist.get_backend(ctx.group) == "gloo":
            # Gloo has no reduce-scatter in every release of torch that runs this.
            grad = grad.clone()
            dist.all_reduce(grad, dist.ReduceOp.SUM, ctx.group)
            start = dist.get_rank(ctx.group) * ctx.rows
            own.copy_(grad[start : start + ctx.rows])
        else:
            scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
            scatter(own, grad, dist.ReduceOp.SUM, ctx.group)
        return own, None, None
