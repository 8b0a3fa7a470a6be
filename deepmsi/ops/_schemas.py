"""Every operator that deepmsi registers with torch: schema, fake, autograd.

One operator per operation, backend and direction: ``deepmsi::<op>_<backend>_fwd`` and ``…_bwd``. A dispatch
key picks a device, never an implementation: ``cpp`` operators have kernels under the CPU and the CUDA key
(registered by the extensions), ``triton`` operators call ``deepmsi/_triton/<op>.py``, imported at the first
call. The fake, the setup of the context and the backward are the same for both backends. Schemas hold int,
float, bool, Tensor and their optional forms: the stable ABI has no others.

A sibling operation adds its section here: one schema and one fake per direction, then ``_register``.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepmsi.backend import host_info
from deepmsi.ops._arguments import without_autocast

LIBRARY = torch.library.Library("deepmsi", "FRAGMENT")
COMPILED_BACKENDS = ("cpp", "triton")


def _register(
    op: str,
    forward: str,
    backward: str,
    fake_forward: Callable[..., Any] | dict[str, Callable[..., Any]],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    gradient: Callable[..., tuple[Any, ...]],
    backends: tuple[str, ...] = COMPILED_BACKENDS,
) -> None:
    """Define both directions of an operation for its compiled backends.

    Args:
        op: Name of the operation.
        forward, backward: Schemas without the name: ``(Tensor x, ...) -> (Tensor, ...)``.
        fake_forward, fake_backward: Shapes, types and strides of the outputs; the forward's may be one for each
            backend.
        setup_context: ``(ctx, inputs, output)``; saves what the backward reads.
        gradient: ``(bwd, ctx, *grads)``; calls the backward operator ``bwd`` and returns the gradients of the first
            inputs; those after them have none. It is not called where no output has a gradient; one that has none is
            None.
        backends: The compiled backends that have it.
    """
    for backend in backends:
        name = f"{op}_{backend}"
        LIBRARY.define(f"{name}_fwd{forward}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.define(f"{name}_bwd{backward}", tags=(torch.Tag.pt2_compliant_tag,))
        fake = fake_forward[backend] if isinstance(fake_forward, dict) else fake_forward
        torch.library.register_fake(f"deepmsi::{name}_fwd", fake, lib=LIBRARY)
        torch.library.register_fake(f"deepmsi::{name}_bwd", fake_backward, lib=LIBRARY)
        if backend == "triton":
            for direction in ("fwd", "bwd"):
                launch = _launcher(op, f"{op}_{direction}")
                for key in ("CUDA", "CPU"):
                    LIBRARY.impl(f"{name}_{direction}", launch, key)
        fwd, bwd = (getattr(torch.ops.deepmsi, f"{name}_{direction}").default for direction in ("fwd", "bwd"))

        def backward_of(ctx: Any, *grads: Tensor | None, _bwd: Any = bwd) -> tuple[Any, ...]:
            found = gradient(_bwd, ctx, *grads) if any(grad is not None for grad in grads) else ()
            inputs = len(ctx.needs_input_grad) - 1  # after them come the dispatch keys
            return (*found, *(None,) * (inputs - len(found)))

        # Without one torch would warn, and leave this operation out of a second derivative.
        def refused(*_: Any, _op: str = op) -> Any:
            raise RuntimeError(f"{_op} has a second derivative on the reference backend alone")

        first, second = _differentiable(fwd, setup_context, backward_of), _differentiable(bwd, _keep_nothing, refused)
        LIBRARY.impl(f"{name}_fwd", first, "Autograd", with_keyset=True)
        LIBRARY.impl(f"{name}_bwd", second, "Autograd", with_keyset=True)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Set up a context that no gradient reads."""


def _differentiable(
    operator: Any, setup_context: Callable[..., None], gradient: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    """Return the kernel of an operator under the Autograd key.

    It is what ``torch.library.register_autograd`` registers for a schema without defaults. That one looks each argument
    up in the schema at each call, in a time that grows with the square of their number: 30% of a step of
    cross_modal_contrastive on 16 rows.
    """

    def below(keys: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keys = args
        output = below(keys, *inputs)
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (*gradient(ctx, *grads), None)

    # Profiles and graphs show the operator's name.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"deepmsi_{operator._opname}", (torch.autograd.Function,), members)

    def kernel(keys: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs, keys)
        return below(keys, *inputs)

    return kernel


def _launcher(op: str, function: str) -> Callable[..., Any]:
    """Return a function that imports ``deepmsi._triton.<op>`` when it is first called.

    What it calls of torch is in the types of its tensors, whatever autocast is around a backward pass.
    """

    def launch(*args: Any) -> Any:
        device = next(tensor for tensor in args if isinstance(tensor, Tensor)).device.type
        with without_autocast(device):
            return getattr(importlib.import_module(f"deepmsi._triton.{op}"), function)(*args)

    return launch


def _empty_unless(wanted: bool, *likes: Tensor) -> tuple[Tensor, ...]:
    """Return a fresh tensor like each, or one without elements where they are not wanted."""
    return tuple(like.new_empty(like.shape if wanted else (0,)) for like in likes)


def _require_kept(op: str, kept: bool) -> None:
    """Raise where backward comes to a call that kept nothing for it."""
    if not kept:
        raise RuntimeError(f"{op}: this call was recorded without gradients: record it with gradients enabled")


def _read_by_backward(x: Tensor, branch: Tensor, norm_first: bool) -> Tensor:
    """Return x as backward reads it: rounded to the type of the products, unless the norm is of x."""
    return x if norm_first or x.dtype == branch.dtype else x.to(branch.dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which kernels sum: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- vsc_compress
# Forward: x [B, N, C] or packed [R, C] with cu_seqlens [B + 1] int32; guide [B, C], guide_weight [] in float32 (float64
# with a float64 x). Exactly R' output rows: B·capacity, else B·min(keep, N) where x is dense, else one integer is read.
# `state` [3, R]: score s, floored norm, closeness c of an irrelevant token to its nearest relevant one (0 for others).
# `mean` [B, C]: v. Rows past the last valid one: tokens 0, gate 0, index -1.

_VSC_FORWARD = (
    "(Tensor x, Tensor? cu_seqlens, Tensor guide, Tensor guide_weight, float temperature, bool standardize, "
    "float threshold, int? keep, int? capacity, int min_keep, float fuse_threshold, float fuse_alpha) -> "
    "(Tensor tokens, Tensor cu_out, Tensor index, Tensor gate, Tensor relevance, Tensor assignment, "
    "Tensor state, Tensor mean)"
)
_VSC_BACKWARD = (
    "(Tensor? grad_tokens, Tensor? grad_gate, Tensor x, Tensor? cu_seqlens, Tensor guide, "
    "Tensor guide_weight, Tensor cu_out, Tensor index, Tensor assignment, Tensor state, Tensor mean, "
    "float fuse_alpha) -> "
    "(Tensor grad_x, Tensor grad_guide, Tensor grad_guide_weight)"
)


def _vsc_fake_forward(
    x: Tensor,
    cu_seqlens: Tensor | None,
    guide: Tensor,
    guide_weight: Tensor,
    temperature: float,
    standardize: bool,
    threshold: float,
    keep: int | None,
    capacity: int | None,
    min_keep: int,
    fuse_threshold: float,
    fuse_alpha: float,
) -> tuple[Tensor, ...]:
    frames, channels = guide.shape
    rows = x.shape[0] * x.shape[1] if cu_seqlens is None else x.shape[0]
    packed: Any
    if capacity is not None:
        packed = frames * capacity
    elif keep is not None and cu_seqlens is None:
        packed = frames * torch.sym_min(keep, x.shape[1])
    else:
        packed = torch.library.get_ctx().new_dynamic_size()
    wide = accumulate_dtype(x.dtype)
    return (
        x.new_empty((packed, channels)),
        x.new_empty((frames + 1,), dtype=torch.int32),
        x.new_empty((packed,), dtype=torch.int64),
        x.new_empty((packed,)),
        x.new_empty((rows,), dtype=wide),
        x.new_empty((rows,), dtype=torch.int32),
        x.new_empty((3, rows), dtype=wide),
        x.new_empty((frames, channels), dtype=wide),
    )


def _vsc_fake_backward(
    grad_tokens: Tensor | None,
    grad_gate: Tensor | None,
    x: Tensor,
    cu_seqlens: Tensor | None,
    guide: Tensor,
    guide_weight: Tensor,
    cu_out: Tensor,
    index: Tensor,
    assignment: Tensor,
    state: Tensor,
    mean: Tensor,
    fuse_alpha: float,
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), guide.new_empty(guide.shape), guide_weight.new_empty(())


def _vsc_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, cu_seqlens, guide, guide_weight, *_, fuse_alpha = inputs
    _, cu_out, index, _, relevance, assignment, state, mean = output
    ctx.mark_non_differentiable(cu_out, index, relevance, assignment, state, mean)
    ctx.save_for_backward(x, cu_seqlens, guide, guide_weight, cu_out, index, assignment, state, mean)
    ctx.fuse_alpha = fuse_alpha


def _vsc_gradient(bwd: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    grad_tokens, grad_gate = grads[0], grads[3]
    grad_x, grad_guide, grad_weight = bwd(grad_tokens, grad_gate, *ctx.saved_tensors, ctx.fuse_alpha)
    return grad_x, None, grad_guide, grad_weight


_register(
    "vsc_compress",
    _VSC_FORWARD,
    _VSC_BACKWARD,
    _vsc_fake_forward,
    _vsc_fake_backward,
    _vsc_setup_context,
    _vsc_gradient,
)


# --- window_attention
# Forward: qkv rows [R, 3C] (a dense grid is rows frame after frame, positions and cu_seqlens None), bias_table
# [(2w - 1)², heads] and head_scale [heads] (exp of the clamped logit scale, None for V1) in float32. `lse` [R, heads]
# float32 is the log-sum-exp of each row's logits. Rows past the last offset: out 0.

_WINDOW_FORWARD = (
    "(Tensor qkv, Tensor bias_table, Tensor? head_scale, float scale, Tensor? positions, Tensor? cu_seqlens, "
    "int heads, int height, int width, int window, int shift) -> (Tensor out, Tensor lse)"
)
_WINDOW_BACKWARD = (
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor bias_table, Tensor? head_scale, float scale, "
    "Tensor? positions, Tensor? cu_seqlens, int heads, int height, int width, int window, int shift) -> "
    "(Tensor grad_qkv, Tensor grad_bias_table, Tensor grad_head_scale)"
)


def _window_fake_forward(qkv: Tensor, bias_table: Tensor, head_scale: Tensor | None, *rest: Any) -> Any:
    heads = rest[3]
    out = qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))
    return out, qkv.new_empty((qkv.shape[0], heads), dtype=torch.float32)


def _window_fake_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_table: Tensor,
    head_scale: Tensor | None,
    *rest: Any,
) -> Any:
    heads = rest[3]
    return (
        qkv.new_empty(qkv.shape),
        bias_table.new_empty(bias_table.shape),
        bias_table.new_empty((heads,)),
    )


def _window_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, bias_table, head_scale, scale, positions, cu_seqlens, *sizes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output, bias_table, head_scale, positions, cu_seqlens)
    ctx.scale, ctx.sizes = scale, sizes


def _window_gradient(bwd: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    qkv, out, lse, bias_table, head_scale, positions, cu_seqlens = ctx.saved_tensors
    grad_qkv, grad_bias, grad_scale = bwd(
        grads[0], qkv, out, lse, bias_table, head_scale, ctx.scale, positions, cu_seqlens, *ctx.sizes
    )
    return grad_qkv, grad_bias, None if head_scale is None else grad_scale


_register(
    "window_attention",
    _WINDOW_FORWARD,
    _WINDOW_BACKWARD,
    _window_fake_forward,
    _window_fake_backward,
    _window_setup_context,
    _window_gradient,
)


# --- cross_modal_contrastive
# Forward: a [B, D] and b [P, J, D] in float32, labels int64, valid [P, B] and valid_b [P, J] bool or None (all). With
# `with_grad` it makes the gradients of a and b with the loss, since the scores are at hand only then; else they are
# empty. The backward scales them; a and b are kept for one thing, that a second derivative meets its refusal.

_CONTRASTIVE_FORWARD = (
    "(Tensor a, Tensor b, Tensor labels, Tensor labels_b, int row_offset, Tensor? valid, Tensor? valid_b, "
    "float temperature, bool include_matched, bool per_positive, bool with_grad) -> "
    "(Tensor loss, Tensor grad_a, Tensor grad_b)"
)
_CONTRASTIVE_BACKWARD = "(Tensor grad_loss, Tensor grad_a, Tensor grad_b) -> (Tensor, Tensor)"


def _contrastive_fake_forward(a: Tensor, b: Tensor, *rest: Any) -> Any:
    with_grad = rest[-1]
    pairs, columns, dim = b.shape
    return (
        a.new_empty(()),
        a.new_empty((a.shape[0] if with_grad else 0, dim)),
        a.new_empty((pairs, columns if with_grad else 0, dim)),
    )


def _contrastive_fake_backward(grad_loss: Tensor, grad_a: Tensor, grad_b: Tensor) -> Any:
    return grad_a.new_empty(grad_a.shape), grad_b.new_empty(grad_b.shape)


def _contrastive_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, grad_a, grad_b = output
    ctx.mark_non_differentiable(grad_a, grad_b)
    ctx.save_for_backward(*inputs[:2], grad_a, grad_b)
    ctx.with_grad = inputs[-1]


def _contrastive_gradient(bwd: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    _require_kept("cross_modal_contrastive", ctx.with_grad)
    a, b, grad_a, grad_b = ctx.saved_tensors
    if torch.is_grad_enabled():
        # They were made with the loss. That they depend on a and b has a second derivative meet the refusal.
        never = grad_a.new_zeros((), dtype=torch.bool)
        grad_a, grad_b = torch.where(never, a, grad_a), torch.where(never, b, grad_b)
    return bwd(grads[0], grad_a, grad_b)


_register(
    "cross_modal_contrastive",
    _CONTRASTIVE_FORWARD,
    _CONTRASTIVE_BACKWARD,
    _contrastive_fake_forward,
    _contrastive_fake_backward,
    _contrastive_setup_context,
    _contrastive_gradient,
)


# --- project_cells
# Forward: x [F, H, W, A, B, c], read where it lies, a weight of its type or in float32, which is rounded, and vectors
# of either; y [R, C] for R = F·H·W in the type of x. Triton's takes x in any type beside its weight, and rounds it,
# before or after the norm; y is of the weight's type. `branch` [R, C] is what the norm reads, kept with `with_grad`
# unless that is x (`norm_first`), else [0, C]. C is `outputs`, which a packed weight does not tell. Rows past the last
# of cu_seqlens [F' + 1] int32 give 0 and get none of the gradient. Backward: the gradient of x lies as x does, and is
# empty where it is not wanted, as are those of weight and bias where both are frozen; those of the bias and of the norm
# are in float32.

_CELLS_FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, Tensor? cu_seqlens, float eps, "
    "bool norm_first, int outputs, bool with_grad) -> (Tensor y, Tensor branch)"
)
_CELLS_BACKWARD = (
    "(Tensor grad_y, Tensor x, Tensor branch, Tensor weight, Tensor norm_weight, Tensor norm_bias, "
    "Tensor? cu_seqlens, float eps, bool norm_first, bool wants_x, bool wants_layer) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _cells_made(x: Tensor, like: Tensor, norm_first: bool, outputs: int, with_grad: bool) -> Any:
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    return like.new_empty((rows, outputs)), like.new_empty((rows if with_grad and not norm_first else 0, outputs))


def _cells_fake_forward_cpp(x: Tensor, *rest: Any) -> Any:
    return _cells_made(x, x, *rest[-3:])


def _cells_fake_forward_triton(x: Tensor, weight: Tensor, *rest: Any) -> Any:
    return _cells_made(x, weight, *rest[-3:])


def _cells_fake_backward(
    grad_y: Tensor, x: Tensor, branch: Tensor, weight: Tensor, norm_weight: Tensor, *rest: Any
) -> Any:
    wants_x, wants_layer = rest[-2:]
    grad_x = torch.empty_like(x) if wants_x else x.new_empty((0,) * 6)
    like = (weight[:, 0], norm_weight, norm_weight)
    vectors = [vector.new_empty(vector.shape, dtype=torch.float32) for vector in like]
    return (grad_x, *_empty_unless(wants_layer, weight, vectors[0]), *vectors[1:])


def _cells_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, norm_weight, norm_bias, cu_seqlens, ctx.eps, ctx.norm_first, _, ctx.with_grad = inputs
    ctx.dtypes = [None if vector is None else vector.dtype for vector in (bias, norm_weight, norm_bias)]
    ctx.mark_non_differentiable(output[1])
    ctx.x_dtype = x.dtype
    read = _read_by_backward(x, output[1], ctx.norm_first)
    ctx.save_for_backward(read, output[1], weight, norm_weight, norm_bias, cu_seqlens)


def _cells_gradient(bwd: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    _require_kept("project_cells", ctx.with_grad)
    wants_x, wants_layer = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    grad_x, grad_weight, *found = bwd(grads[0], *ctx.saved_tensors, ctx.eps, ctx.norm_first, wants_x, wants_layer)
    vectors = [None if dtype is None else grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True)]
    layer = (grad_weight, vectors[0]) if wants_layer else (None, None)
    return (grad_x.to(ctx.x_dtype) if wants_x else None, *layer, *vectors[1:])


_register(
    "project_cells",
    _CELLS_FORWARD,
    _CELLS_BACKWARD,
    {"cpp": _cells_fake_forward_cpp, "triton": _cells_fake_forward_triton},
    _cells_fake_backward,
    _cells_setup_context,
    _cells_gradient,
)


# --- pack_weight
# A weight [out, in] as the CPU's blocks read it, [panels, in, width] for as many columns at a time as its registers
# take (in is even where bfloat16 is multiplied). project_cells, residual_mlp and residual_window_attention take it in
# the weight's place where nothing is kept for the gradient, which it has none of.

LIBRARY.define("pack_weight_cpp(Tensor weight, bool halves) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("deepmsi::pack_weight_cpp", lib=LIBRARY)
def _packed_fake(weight: Tensor, halves: bool) -> Tensor:
    # How many columns a panel has only the extension knows.
    sizes = [torch.library.get_ctx().new_dynamic_size() for _ in range(3)]
    narrow = halves and host_info().get("instruction set in use") == "avx512_bf16"
    return weight.new_empty(sizes, dtype=torch.bfloat16 if narrow else torch.float32)


# --- position_bias
# Forward: coordinates [P, 2] and weights [D, 2], [D] and [heads, D] of any floating type each; the table [P, heads] is
# float32. Backward reads the table, and coordinates get no gradient.

_BIAS_FORWARD = "(Tensor coordinates, Tensor hidden_weight, Tensor hidden_bias, Tensor out_weight) -> Tensor"
_BIAS_BACKWARD = (
    "(Tensor grad_table, Tensor coordinates, Tensor hidden_weight, Tensor hidden_bias, Tensor out_weight, "
    "Tensor table) -> (Tensor, Tensor, Tensor)"
)


def _bias_fake_forward(coordinates: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, out_weight: Tensor) -> Tensor:
    return out_weight.new_empty((coordinates.shape[0], out_weight.shape[0]), dtype=torch.float32)


def _bias_fake_backward(grad_table: Tensor, coordinates: Tensor, *rest: Tensor) -> Any:
    return tuple(weight.new_empty(weight.shape) for weight in rest[:3])


def _bias_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _bias_gradient(bwd: Any, ctx: Any, grad_table: Tensor) -> tuple[Any, ...]:
    return None, *bwd(grad_table, *ctx.saved_tensors)


_register(
    "position_bias",
    _BIAS_FORWARD,
    _BIAS_BACKWARD,
    _bias_fake_forward,
    _bias_fake_backward,
    _bias_setup_context,
    _bias_gradient,
    backends=("triton",),
)


# --- residual_norm
# Forward: rows x and branch [R, C], norm_weight and norm_bias of one type, and all else of any floating type; y has the
# type of x. Backward: the gradient of x is that of y. row_scale [R] gets none.

_NORM_FORWARD = (
    "(Tensor x, Tensor branch, Tensor norm_weight, Tensor norm_bias, Tensor? row_scale, float eps) -> Tensor"
)
_NORM_BACKWARD = (
    "(Tensor grad_y, Tensor branch, Tensor norm_weight, Tensor? row_scale, float eps) -> (Tensor, Tensor, Tensor)"
)


def _norm_fake_forward(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _norm_fake_backward(grad_y: Tensor, branch: Tensor, norm_weight: Tensor, *rest: Any) -> Any:
    return tuple(like.new_empty(like.shape) for like in (branch, norm_weight, norm_weight))


def _norm_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, norm_weight, _, row_scale, ctx.eps = inputs
    ctx.save_for_backward(branch, norm_weight, row_scale)


def _norm_gradient(bwd: Any, ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    grad_branch, grad_weight, grad_bias = bwd(grad_y, *ctx.saved_tensors, ctx.eps)
    return grad_y, grad_branch, grad_weight, grad_bias


_register(
    "residual_norm",
    _NORM_FORWARD,
    _NORM_BACKWARD,
    _norm_fake_forward,
    _norm_fake_backward,
    _norm_setup_context,
    _norm_gradient,
)


# --- residual_mlp
# Forward: rows x [R, C] and y of one type, both layers' weights and biases of one, in which products are; cpp's are in
# that of x, its weights in that or in float32, which is rounded, and vectors in either. `branch` [R, C] is what the
# norm reads, in the type of the products, kept with `with_grad` unless that is x (`norm_first`), else [0, C]; the
# hidden rows are made again. Backward reads x in the type of the products, or with `norm_first` as it is; without
# `wants_layers`, where all of both layers is frozen, the gradients of their weights and biases are empty. row_scale [R]
# gets no gradient. Rows past the last of cu_seqlens [F + 1] int32 are passed on: y is x, and their gradient goes to x
# alone.

_MLP_WEIGHTS = (
    "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor norm_weight, Tensor norm_bias, "
    "Tensor? row_scale, Tensor? cu_seqlens, float eps, bool norm_first"
)
_MLP_FORWARD = f"(Tensor x, {_MLP_WEIGHTS}, bool with_grad) -> (Tensor y, Tensor branch)"
_MLP_BACKWARD = (
    f"(Tensor grad_y, Tensor x, Tensor branch, {_MLP_WEIGHTS}, bool wants_layers) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _branch_kept(x: Tensor, like: Tensor, norm_first: bool, with_grad: bool) -> Tensor:
    return like.new_empty((x.shape[0] if with_grad and not norm_first else 0, x.shape[1]))


def _mlp_fake_forward_cpp(x: Tensor, *rest: Any) -> Any:
    return x.new_empty(x.shape), _branch_kept(x, x, *rest[-2:])


def _mlp_fake_forward_triton(x: Tensor, *rest: Any) -> Any:
    return x.new_empty(x.shape), _branch_kept(x, rest[0], *rest[-2:])


def _mlp_fake_backward(grad_y: Tensor, x: Tensor, branch: Tensor, *rest: Any) -> Any:
    layers = _empty_unless(rest[-1], *rest[:4])
    return (grad_y.new_empty(grad_y.shape), *layers, *(like.new_empty(like.shape) for like in rest[4:6]))


def _mlp_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *others, ctx.eps, ctx.norm_first, ctx.with_grad = inputs
    branch = output[1]
    ctx.mark_non_differentiable(branch)
    ctx.save_for_backward(_read_by_backward(x, branch, ctx.norm_first), branch, *others)


def _mlp_gradient(bwd: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    _require_kept("residual_mlp", ctx.with_grad)
    wants_layers = any(ctx.needs_input_grad[1:5])
    grad_x, *found = bwd(grads[0], *ctx.saved_tensors, ctx.eps, ctx.norm_first, wants_layers)
    layers = found[:4] if wants_layers else (None,) * 4
    return (grad_x, *layers, *found[4:])


_register(
    "residual_mlp",
    _MLP_FORWARD,
    _MLP_BACKWARD,
    {"cpp": _mlp_fake_forward_cpp, "triton": _mlp_fake_forward_triton},
    _mlp_fake_backward,
    _mlp_setup_context,
    _mlp_gradient,
)


# --- residual_window_attention
# Forward: rows x [R, C], weights and vectors in the types that residual_mlp takes; the attention's arguments as in
# window_attention. With `with_grad` `branch` [R, C] is as in residual_mlp and `attended` [R, C] what the attention
# gives, in the type of the products, else both are [0, C]; q, k and v are made again. row_scale [R] gets no gradient.
# `wants_layers`, what backward reads of x, and rows past the last offset, are as in residual_mlp.

_ATTENTION_ARGUMENTS = (
    "Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor proj_bias, Tensor norm_weight, Tensor norm_bias, "
    "Tensor? row_scale, float eps, bool norm_first, Tensor bias_table, Tensor? head_scale, float scale, "
    "Tensor? positions, Tensor? cu_seqlens, int heads, int height, int width, int window, int shift"
)
_ATTENTION_FORWARD = f"(Tensor x, {_ATTENTION_ARGUMENTS}, bool with_grad) -> (Tensor y, Tensor branch, Tensor attended)"
_ATTENTION_BACKWARD = (
    f"(Tensor grad_y, Tensor x, Tensor branch, Tensor attended, {_ATTENTION_ARGUMENTS}, bool wants_layers) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _attention_fake_forward_cpp(x: Tensor, *rest: Any) -> Any:
    return _attention_made(x, x, rest[8], rest[-1])


def _attention_fake_forward_triton(x: Tensor, *rest: Any) -> Any:
    return _attention_made(x, rest[0], rest[8], rest[-1])


def _attention_made(x: Tensor, like: Tensor, norm_first: bool, with_grad: bool) -> Any:
    attended = like.new_empty((x.shape[0] if with_grad else 0, x.shape[1]))
    return x.new_empty(x.shape), _branch_kept(x, like, norm_first, with_grad), attended


def _attention_fake_backward(grad_y: Tensor, x: Tensor, branch: Tensor, attended: Tensor, *rest: Any) -> Any:
    qkv_weight, qkv_bias, proj_weight, proj_bias, norm_weight, norm_bias, _, _, _, bias_table = rest[:10]
    like_bias = qkv_weight[:, 0] if qkv_bias is None else qkv_bias
    layers = _empty_unless(rest[-1], qkv_weight, like_bias, proj_weight, proj_bias)
    others = (norm_weight, norm_bias, bias_table, bias_table[0])
    return (grad_y.new_empty(grad_y.shape), *layers, *(like.new_empty(like.shape) for like in others))


def _attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *weights, ctx.eps, ctx.norm_first, table, head_scale, ctx.scale, positions, cu_seqlens = inputs[:15]
    *ctx.sizes, ctx.with_grad = inputs[15:]
    ctx.mark_non_differentiable(*output[1:])
    read = _read_by_backward(x, output[1], ctx.norm_first)
    ctx.save_for_backward(read, *output[1:], *weights, table, head_scale, positions, cu_seqlens)


def _attention_gradient(bwd: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    _require_kept("residual_window_attention", ctx.with_grad)
    *tensors, table, head_scale, positions, cu_seqlens = ctx.saved_tensors
    wants_layers = any(ctx.needs_input_grad[1:5])
    windows = (table, head_scale, ctx.scale, positions, cu_seqlens, *ctx.sizes)
    found = bwd(grads[0], *tensors, ctx.eps, ctx.norm_first, *windows, wants_layers)
    grad_x, *layers, grad_norm, grad_norm_bias, grad_table, grad_scale = found
    if not wants_layers:
        layers = [None] * 4
    elif tensors[4] is None:
        layers[1] = None
    if head_scale is None:
        grad_scale = None
    return (grad_x, *layers, grad_norm, grad_norm_bias, None, None, None, grad_table, grad_scale)


_register(
    "residual_window_attention",
    _ATTENTION_FORWARD,
    _ATTENTION_BACKWARD,
    {"cpp": _attention_fake_forward_cpp, "triton": _attention_fake_forward_triton},
    _attention_fake_backward,
    _attention_setup_context,
    _attention_gradient,
)


# --- dilated_causal_conv1d
# Forward: rows x [B, n, Cin], weight [k, Cin, Cout], residual [B, count, Cout]; count None is n positions. `active`
# says where h = dropout(relu(…)) is above 0, and is kept only where the backward cannot read it from y, that is with
# relu, residual and `with_grad`; else it is empty. Backward: what is not wanted comes back empty, as grad_residual does
# where there was none.

_CONV_FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? seed, int dilation, int? count, int step, "
    "bool relu, float dropout, bool with_grad) -> (Tensor y, Tensor active)"
)
_CONV_BACKWARD = (
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor y, Tensor active, int dilation, int step, bool relu, "
    "bool residual, float dropout, bool want_x, bool want_weight) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)"
)


def _conv_fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    dilation: int,
    count: int | None,
    step: int,
    relu: bool,
    dropout: float,
    with_grad: bool,
) -> Any:
    size = (x.shape[0], x.shape[1] if count is None else count, weight.shape[2])
    kept = relu and residual is not None and with_grad
    return x.new_empty(size), x.new_empty(size if kept else (0,), dtype=torch.bool)


def _conv_fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    active: Tensor,
    dilation: int,
    step: int,
    relu: bool,
    residual: bool,
    dropout: float,
    want_x: bool,
    want_weight: bool,
) -> Any:
    return (
        x.new_empty(x.shape if want_x else (0,)),
        x.new_empty(weight.shape if want_weight else (0,)),
        x.new_empty((weight.shape[2],)),
        x.new_empty(grad_y.shape if residual else (0,)),
    )


def _conv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, residual, _, dilation, _, step, relu, dropout, with_grad = inputs
    y, active = output
    ctx.mark_non_differentiable(active)
    # A plain convolution's gradient does not read its result.
    ctx.save_for_backward(x, weight, y if relu or residual is not None else active, active)
    ctx.facts = (dilation, step, relu, residual is not None, dropout)
    ctx.kept = with_grad or not relu or residual is None


def _conv_gradient(bwd: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    _require_kept("dilated_causal_conv1d", ctx.kept)
    want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad[:4]
    grad_x, grad_weight, grad_bias, grad_residual = bwd(grads[0], *ctx.saved_tensors, *ctx.facts, want_x, want_weight)
    return (
        grad_x if want_x else None,
        grad_weight if want_weight else None,
        grad_bias if want_bias else None,
        grad_residual if want_residual else None,
    )


_register(
    "dilated_causal_conv1d",
    _CONV_FORWARD,
    _CONV_BACKWARD,
    _conv_fake_forward,
    _conv_fake_backward,
    _conv_setup_context,
    _conv_gradient,
)


# --- weight_normed_conv1d
# The same with v [Cout, Cin, k] and g [Cout, 1, 1] of a weight norm in place of the weight, on the CPU. `norms`
# [2, Cout]: |v| and g / |v|, in the type that sums.

_NORMED_FORWARD = (
    "(Tensor x, Tensor v, Tensor g, Tensor? bias, Tensor? residual, Tensor? seed, int dilation, int? count, int step, "
    "bool relu, float dropout, bool with_grad) -> (Tensor y, Tensor active, Tensor norms)"
)
_NORMED_BACKWARD = (
    "(Tensor grad_y, Tensor x, Tensor v, Tensor g, Tensor norms, Tensor y, Tensor active, int dilation, int step, "
    "bool relu, bool residual, float dropout, bool want_x, bool want_weight) -> "
    "(Tensor grad_x, Tensor grad_v, Tensor grad_g, Tensor grad_bias, Tensor grad_residual)"
)


def _normed_fake_forward(x: Tensor, v: Tensor, g: Tensor, *others: Any) -> Any:
    y, active = _conv_fake_forward(x, v.permute(2, 1, 0), *others)
    return y, active, x.new_empty((2, v.shape[0]), dtype=accumulate_dtype(x.dtype))


def _normed_fake_backward(
    grad_y: Tensor, x: Tensor, v: Tensor, g: Tensor, norms: Tensor, y: Tensor, active: Tensor, *facts: Any
) -> Any:
    grad_x, _, grad_bias, grad_residual = _conv_fake_backward(grad_y, x, v.permute(2, 1, 0), y, active, *facts)
    want_weight = facts[-1]
    return (
        grad_x,
        x.new_empty(v.shape if want_weight else (0,)),
        x.new_empty((v.shape[0] if want_weight else 0, 1, 1)),
        grad_bias,
        grad_residual,
    )


def _normed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, v, g, _, residual, _, dilation, _, step, relu, dropout, with_grad = inputs
    y, active, norms = output
    ctx.mark_non_differentiable(active, norms)
    ctx.save_for_backward(x, v, g, norms, y if relu or residual is not None else active, active)
    ctx.facts = (dilation, step, relu, residual is not None, dropout)
    ctx.kept = with_grad or not relu or residual is None


def _normed_gradient(bwd: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    _require_kept("dilated_causal_conv1d", ctx.kept)
    want_x, want_v, want_g, want_bias, want_residual = ctx.needs_input_grad[:5]
    found = bwd(grads[0], *ctx.saved_tensors, *ctx.facts, want_x, want_v or want_g)
    wanted = (want_x, want_v, want_g, want_bias, want_residual)
    return tuple(grad if want else None for grad, want in zip(found, wanted, strict=True))


_register(
    "weight_normed_conv1d",
    _NORMED_FORWARD,
    _NORMED_BACKWARD,
    _normed_fake_forward,
    _normed_fake_backward,
    _normed_setup_context,
    _normed_gradient,
    backends=("cpp",),
)
