"""What the vision backbone keeps for backward, and what it computes again there: one switch of four positions."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepmsi.errors import UserError

Recompute = Literal["none", "light", "block", "chunk"]
CHUNK_FRAMES = 15
# Elements that are computed again at a time: 60 frames of Swin V2's first stage, enough to fill any device.
PART_ELEMENTS = 60 * 64 * 64 * 96


def checked(recompute: str) -> Recompute:
    """Return the position, or say which there are.

    Raises:
        UserError: There is no such position.
    """
    for position in get_args(Recompute):
        if recompute == position:
            return position
    raise UserError(f"recompute must be one of {', '.join(get_args(Recompute))}, not {recompute!r}")


class Source(NamedTuple):
    """How a tensor is made again, bit for bit: a function without random numbers, and what it is a function of."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


class _Held(torch.autograd.Function):
    """Keep tensors as autograd keeps what an operation saves: counted by hooks, guarded against changes in place."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("what is held has no gradient")


class _Hold:
    """Keeps tensors as autograd would, for as long as it lives."""

    def __init__(self, *tensors: Tensor) -> None:
        with torch.enable_grad():
            anchor = torch.empty(0, requires_grad=True, device=tensors[0].device)
            # The output, since up to torch 2.11 a node lets its tensors go with the last output that it made.
            self._output = _Held.apply(anchor, *(tensor.detach() for tensor in tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, as they were."""
        return self._output.grad_fn.saved_tensors


def remade(value: Tensor, source: Source | None) -> AbstractContextManager[None]:
    """Inside, an operation that saves ``value`` for backward saves what it is made from; backward makes it again.

    Worth it where the inputs are saved anyway, or are smaller, and the function passes over elements only. On a CPU
    with float32 the time counts for more than the bytes, and nothing changes; nor does it without content (``meta``),
    under ``torch.compile``, which decides by itself, or in ``torch.func``, which has no hooks.
    """
    if source is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    kind = value.device.type
    wide = kind == "cpu" and value.dtype in (torch.float32, torch.float64)
    if wide or kind == "meta" or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return _remade(value, source)


class _Remade:
    """The hooks of :func:`remade` for one tensor; what it is made from goes with the last thing that was saved."""

    def __init__(self, value: Tensor, source: Source) -> None:
        device = value.device.type
        self.address = value.untyped_storage()._cdata
        self.function = source.function
        self.context = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        # What the graph keeps must not hold the inputs themselves, which a checkpoint around it is free to drop.
        self.inputs: _Hold | None = _Hold(*source.inputs)
        self.used = False

    def pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata == self.address:
            self.used = True
            return tensor.size(), tensor.stride(), tensor.storage_offset()
        if isinstance(tensor, nn.Parameter):
            return tensor.detach()
        # Kept as it would be without this: by the hooks around, which have to be the innermost for that.
        torch._C._autograd._pop_saved_tensors_default_hooks()
        try:
            return _Hold(tensor)
        finally:
            torch._C._autograd._push_saved_tensors_default_hooks(self.pack, self.unpack)

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, _Hold):
            return packed.tensors[0]
        assert self.inputs is not None
        with torch.no_grad(), torch.autocast(*self.context, cache_enabled=False):
            return self.function(*self.inputs.tensors).as_strided(*packed)


@contextmanager
def _remade(value: Tensor, source: Source) -> Iterator[None]:
    made = _Remade(value, source)
    with torch.autograd.graph.saved_tensors_hooks(made.pack, made.unpack):
        yield
    if not made.used:
        made.inputs = None


def again(function: Callable[..., Any], *tensors: Tensor | None, owners: tuple[nn.Module, ...], draws: bool) -> Any:
    """Compute ``function(*tensors)``, keep only the tensors for backward, and compute it again there.

    One backward over the whole graph, so hooks on gradients fire once; a backward under another backend than the
    forward raises. Where nothing learns, nothing is kept.

    Args:
        function: Of the tensors alone; what else it reads must not change before backward.
        tensors: Its arguments, and all that is kept.
        owners: The modules whose parameters it uses.
        draws: Whether it draws random numbers, which backward then draws again.
    """
    learns = any(tensor is not None and tensor.requires_grad for tensor in tensors) or any(
        parameter.requires_grad for owner in owners for parameter in owner.parameters()
    )
    if not (torch.is_grad_enabled() and learns):
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=draws)


def again_in_parts(
    function: Callable[..., Tensor], x: Tensor, *others: Tensor | None, owners: tuple[nn.Module, ...], draws: bool
) -> Tensor:
    """Compute ``function(x, *others)`` as :func:`again` does, a part of x's first dimension at a time.

    What lives at once while backward computes it again is then bounded, whatever the batch. The function has to treat
    the entries of that dimension apart from each other; weights' gradients are summed part by part.

    Args:
        function, others, owners, draws: As in :func:`again`; ``others`` are given to every part.
        x: [N, ...]; a part has at most ``PART_ELEMENTS`` elements, and at least one entry.
    """
    entries = max(PART_ELEMENTS // max(x[:1].numel(), 1), 1)
    if x.shape[0] <= entries:
        return again(function, x, *others, owners=owners, draws=draws)
    # As equal as can be, so that no small rest has launches of its own.
    count = -(-x.shape[0] // entries)
    parts = x.split(-(-x.shape[0] // count))
    return torch.cat([again(function, part, *others, owners=owners, draws=draws) for part in parts])
