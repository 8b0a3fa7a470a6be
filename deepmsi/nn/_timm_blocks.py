"""timm's Swin blocks on deepmsi's operations: the one module that imports timm at its top, loaded by ``fuse``.

The classes add no state but what :func:`deepmsi.nn.fix_constants` computes: a block changes its class in place, and
keeps its weights, its state dict, its hooks and what timm does around it (drop path, checkpointing, changes of the
input size).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from timm.layers import DropPath, Mlp
from timm.layers.activations import GELU
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, window_partition, window_reverse
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from deepmsi.nn.constants import Fixed, HoldsConstants, LaidOut
from deepmsi.nn.fusing import bias_table, bias_weights, fuses, fuses_attention, plain, unhooked
from deepmsi.ops import project_cells, residual_mlp, residual_norm, residual_window_attention, window_attention
from deepmsi.ops.window_attention import head_scale_of


def square(block: Any) -> bool:
    """Whether a block's windows and their shift are square, as the operation has them."""
    return block.window_size[0] == block.window_size[1] and block.shift_size[0] == block.shift_size[1]


def _attention_of(block: Any, qkv: Tensor, **options: Any) -> Tensor:
    """Attend over the (padded) grid of qkv, and project."""
    attn, size = block.attn, (qkv.shape[1], qkv.shape[2])
    out = window_attention(qkv, attn.num_heads, size, block.window_size[0], block.shift_size[0], **options)
    return _called(block, attn.proj_drop, _called(block, attn.proj, out))


def _called(block: Any, layer: nn.Module, x: Tensor) -> Tensor:
    """Call a layer of the attention on a (padded) grid x.

    One that is not timm's own, is watched or draws random numbers is called as timm calls it: window by window, behind
    the cyclic shift.
    """
    if _passed_over(layer):
        return x
    if type(layer) is nn.Linear and unhooked(layer):
        return layer(x)
    shift = block.shift_size[0]
    windows = window_partition(x.roll((-shift, -shift), (1, 2)) if shift else x, block.window_size)
    out = layer(windows.flatten(1, 2)).unflatten(1, tuple(windows.shape[1:3]))
    out = window_reverse(out, block.window_size, x.shape[1], x.shape[2])
    return out.roll((shift, shift), (1, 2)) if shift else out


def _padding(block: Any, x: Tensor) -> tuple[int, int]:
    """Return the rows and columns that a grid lacks to a multiple of the window."""
    window = block.window_size[0]
    return -x.shape[1] % window, -x.shape[2] % window


def _pad_as_timm(block: Any, x: Tensor) -> Tensor:
    """Pad a grid that is no multiple of the window, as timm does: behind the cyclic shift, with zeros that take part.

    The operation shifts the padded grid, so the result is shifted back on it.
    """
    down, across = _padding(block, x)
    shift = block.shift_size[0]
    if not (down or across):
        return x
    shifted = x.roll((-shift, -shift), (1, 2)) if shift else x
    padded = torch.nn.functional.pad(shifted, (0, 0, 0, across, 0, down))
    return padded.roll((shift, shift), (1, 2)) if shift else padded


def _crop_as_timm(block: Any, y: Tensor, x: Tensor) -> Tensor:
    """Undo :func:`_pad_as_timm` on the attention's output."""
    down, across = _padding(block, x)
    shift = block.shift_size[0]
    if not (down or across):
        return y
    shifted = y.roll((-shift, -shift), (1, 2)) if shift else y
    cropped = shifted[:, : x.shape[1], : x.shape[2]].contiguous()
    return cropped.roll((shift, shift), (1, 2)) if shift else cropped


def _runs_fused(block: Any, x: Tensor) -> bool:
    """Whether the operation computes this call: no dropout on the attention's weights, nobody watches or has replaced
    what is passed over, and x is a tensor, not what stands for one while ``torch.fx`` traces."""
    attn = block.attn
    if "_attn" in block.__dict__:
        return False
    usual = type(attn) in (swin_transformer.WindowAttention, swin_transformer_v2.WindowAttention)
    if not (usual and isinstance(x, Tensor) and _passed_over(attn.attn_drop) and unhooked(attn, attn.softmax)):
        return False
    return type(attn.softmax) is torch.nn.Softmax and square(block)


def _drops(dropout: torch.nn.Module) -> bool:
    """Whether a layer may change what it is given: anything but a dropout that is off."""
    if type(dropout) is torch.nn.Dropout:
        return dropout.training and dropout.p > 0
    return type(dropout) is not torch.nn.Identity


def _passed_over(*dropouts: torch.nn.Module) -> bool:
    """Whether dropouts need not be called: they change nothing, and nobody watches them."""
    return not any(map(_drops, dropouts)) and unhooked(*dropouts)


def _draws_as_timm(drop_path: torch.nn.Module) -> bool:
    """Whether a drop path is timm's own: a factor for each frame."""
    return type(drop_path) in (DropPath, torch.nn.Identity) and unhooked(drop_path)


def _drawn(drop_path: torch.nn.Module, x: Tensor) -> Tensor | None:
    """Let timm's module draw the factor of each frame's branch, for its rows [B, H, W] or [B, L]."""
    if type(drop_path) is torch.nn.Identity or not drop_path.training:
        return None
    return cast(Tensor, drop_path(x.new_ones(x.shape[0], *[1] * (x.dim() - 2)))).expand(x.shape[:-1])


def _added(norm: Any, drop_path: torch.nn.Module, x: Tensor, branch: Tensor) -> Tensor:
    """Return x + drop_path(norm(branch))."""
    if fuses("residual_norm", branch) and plain(branch, norm) and _draws_as_timm(drop_path):
        scale = _drawn(drop_path, x)
        return residual_norm(x, branch, norm.weight, norm.bias, row_scale=scale, eps=norm.eps)
    return x + drop_path(norm(branch))


def _usual_half(x: Tensor, first: Any, second: Any, norm: Any, drop_path: Any) -> bool:
    """Whether the layers, the norm and the drop path of half a block do what timm's own do."""
    usual = type(first) is type(second) is torch.nn.Linear and type(norm) is torch.nn.LayerNorm
    if not (usual and norm.normalized_shape == x.shape[-1:]):
        return False
    return plain(x, second, norm, bare=(first,)) and _draws_as_timm(drop_path)


def _attends_fused(block: Any, x: Tensor) -> bool:
    """Whether the attention half of a block is one operation for x."""
    attn = block.attn
    return (
        _runs_fused(block, x)
        and not any(_padding(block, x))
        and _passed_over(attn.proj_drop)
        and _usual_half(x, attn.qkv, attn.proj, block.norm1, block.drop_path1)
        and _as_wide_as_its_heads(attn)
        and fuses_attention(x, attn.num_heads, block.window_size[0])
    )


def _as_wide_as_its_heads(attn: Any) -> bool:
    """Whether heads have the width that follows from their number, as the operation has them."""
    return isinstance(attn.proj, torch.nn.Linear) and attn.proj.in_features == attn.dim


def _attended(
    block: Any, x: Tensor, norm_first: bool, laid_out: LaidOut | None, qkv_bias: Tensor | None, **options: Any
) -> Tensor:
    """x + drop_path of both attention and norm, of a block that :func:`_attends_fused`.

    Args:
        block, x: A block and its grid.
        norm_first: As in ``residual_window_attention``.
        laid_out: The weights of qkv and proj as they are read, where they are fixed.
        qkv_bias: The bias of q, k and v.
        options: Those of ``residual_window_attention`` in which models differ.
    """
    attn, norm = block.attn, block.norm1
    return residual_window_attention(
        x,
        attn.qkv.weight,
        qkv_bias,
        attn.proj.weight,
        attn.proj.bias,
        norm.weight,
        norm.bias,
        attn.num_heads,
        (x.shape[1], x.shape[2]),
        block.window_size[0],
        block.shift_size[0],
        row_scale=_drawn(block.drop_path1, x),
        eps=norm.eps,
        norm_first=norm_first,
        packed=None if laid_out is None else laid_out.of_layers(attn.qkv, attn.proj),
        **options,
    )


def _transformed(block: Any, x: Tensor, norm_first: bool, laid_out: LaidOut | None) -> Tensor | None:
    """The MLP half of a block as one operation, x + drop_path of both MLP and norm; None where it is none."""
    mlp, norm = block.mlp, block.norm2
    usual = (
        type(mlp) is Mlp
        and type(mlp.act) in (GELU, torch.nn.GELU)
        and getattr(mlp.act, "approximate", "none") == "none"
        and type(mlp.norm) is torch.nn.Identity
        and _passed_over(mlp.drop1, mlp.drop2)
        and unhooked(mlp, mlp.act, mlp.norm)
        and _usual_half(x, mlp.fc1, mlp.fc2, norm, block.drop_path2)
        and mlp.fc1.bias is not None
    )
    if not (usual and fuses("residual_mlp", x)):
        return None
    return residual_mlp(
        x,
        mlp.fc1.weight,
        mlp.fc1.bias,
        mlp.fc2.weight,
        mlp.fc2.bias,
        norm.weight,
        norm.bias,
        row_scale=_drawn(block.drop_path2, x),
        eps=norm.eps,
        norm_first=norm_first,
        packed=None if laid_out is None else laid_out.of_layers(mlp.fc1, mlp.fc2),
    )


class _Layouts(NamedTuple):
    """The weights of a block's halves as they are read."""

    attention: LaidOut
    mlp: LaidOut


class _FusedBlock(HoldsConstants):
    """A block of timm's; where it is as timm built it, each half runs as one operation.

    Attributes:
        norm_first: Whether the norm of a half comes before its layers.
        constants: What :meth:`fix` computed of the weights, the layouts of both halves among it.
    """

    norm_first: bool
    constants: Any = None

    def forget(self) -> None:
        self.constants = None

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return cast(Tensor, super().forward(x))
        return self._transform(self._attend(x))

    def _attend(self, x: Tensor) -> Tensor:
        """x + drop_path of both attention and norm."""
        block: Any = self
        if not _attends_fused(block, x):
            return self._half(block.norm1, block.drop_path1, x, block._attn)
        laid_out = self.constants and self.constants.attention
        return _attended(block, x, self.norm_first, laid_out, block._qkv_bias(), **block._windows())

    def _transform(self, x: Tensor) -> Tensor:
        """x + drop_path of both MLP and norm."""
        block: Any = self
        y = _transformed(block, x, self.norm_first, self.constants and self.constants.mlp)
        if y is not None:
            return y
        return self._half(block.norm2, block.drop_path2, x.flatten(1, 2), block.mlp).view(x.shape)

    def _half(self, norm: Any, drop_path: Any, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + drop_path of both branch and norm, layer by layer."""
        if self.norm_first:
            return cast(Tensor, x + drop_path(branch(norm(x))))
        return _added(norm, drop_path, x, branch(x))


class FusedSwinBlock(_FusedBlock, SwinTransformerBlock):
    """A block of timm's Swin V1 and S3."""

    norm_first = True

    def fix(self) -> None:
        block: Any = self
        attn, mlp = block.attn, block.mlp
        self.constants = None
        if type(attn) is not swin_transformer.WindowAttention or type(mlp) is not Mlp:
            return
        self.constants = _Layouts(LaidOut(), LaidOut())
        if _as_wide_as_its_heads(attn):
            self.constants.attention.fix_layers("residual_window_attention", attn.qkv, attn.proj)
        self.constants.mlp.fix_layers("residual_mlp", mlp.fc1, mlp.fc2)

    def _qkv_bias(self) -> Tensor | None:
        attn: Any = self.attn
        return cast("Tensor | None", attn.qkv.bias)

    def _windows(self) -> dict[str, Any]:
        """Return what the attention of Swin V1 has of its own."""
        attn: Any = self.attn
        return {"bias_table": attn.relative_position_bias_table, "scale": attn.scale}

    def _attn(self, x: Tensor) -> Tensor:
        if not _runs_fused(self, x):
            return super()._attn(x)
        attn: Any = self.attn
        out = _attention_of(self, _called(self, attn.qkv, _pad_as_timm(self, x)), **self._windows())
        return _crop_as_timm(self, out, x)


class _BlockConstants(NamedTuple):
    """What follows from the weights of a block alone; its table and the bias of q, k and v from these buffers, too."""

    coordinates: Tensor
    k_bias: Tensor | None
    table: Fixed[Tensor]
    qkv_bias: Fixed[Tensor]
    head_scale: Fixed[Tensor]
    attention: LaidOut
    mlp: LaidOut


class FusedSwinV2Block(_FusedBlock, SwinTransformerV2Block):
    """A block of timm's Swin V2."""

    norm_first = False

    def fix(self) -> None:
        block: Any = self
        attn, mlp = block.attn, block.mlp
        self.constants = None
        if type(attn) is not swin_transformer_v2.WindowAttention or type(mlp) is not Mlp:
            return
        buffers = (cast(Tensor, attn.relative_coords_table), cast("Tensor | None", attn.k_bias))
        constants = _BlockConstants(*buffers, Fixed(), Fixed(), Fixed(), LaidOut(), LaidOut())
        weights = bias_weights(attn.cpb_mlp)
        if weights is not None:
            constants.table.fix(self._bias_table, *weights)
        if attn.q_bias is not None:
            constants.qkv_bias.fix(self._qkv_bias, attn.q_bias, attn.v_bias)
        constants.head_scale.fix(lambda: head_scale_of(attn.logit_scale), attn.logit_scale)
        constants.attention.fix_layers("residual_window_attention", attn.qkv, attn.proj)
        constants.mlp.fix_layers("residual_mlp", mlp.fc1, mlp.fc2)
        self.constants = constants

    def _windows(self) -> dict[str, Any]:
        """Return what the attention of Swin V2 has of its own."""
        attn: Any = self.attn
        return {"bias_table": self._bias_table(), "logit_scale": attn.logit_scale, "head_scale": self._head_scale()}

    def _qkv_bias(self) -> Tensor | None:
        attn: Any = self.attn
        if attn.q_bias is None:
            return None
        held = self.constants
        if held is not None and held.k_bias is attn.k_bias:
            fixed = held.qkv_bias.of(attn.q_bias, attn.v_bias)
            if fixed is not None:
                return fixed
        # What casts parameters for a call, as FSDP does, leaves the zeros of the buffer as they are.
        return torch.cat((attn.q_bias, attn.k_bias.to(attn.q_bias.dtype), attn.v_bias))

    def _head_scale(self) -> Tensor | None:
        attn: Any = self.attn
        return self.constants and self.constants.head_scale.of(attn.logit_scale)

    def _bias_table(self) -> Tensor:
        attn: Any = self.attn
        held, coordinates, weights = self.constants, attn.relative_coords_table, bias_weights(attn.cpb_mlp)
        if weights is None:
            return 16 * attn.cpb_mlp(coordinates).view(-1, attn.num_heads).sigmoid()
        fixed = held.table.of(*weights) if held is not None and held.coordinates is coordinates else None
        return bias_table(coordinates.reshape(-1, 2), weights) if fixed is None else fixed

    def _attn(self, x: Tensor) -> Tensor:
        if not _runs_fused(self, x):
            return super()._attn(x)
        attn: Any = self.attn
        padded, bias = _pad_as_timm(self, x), self._qkv_bias()
        if bias is not None and attn.qkv_bias_separate:
            qkv = _called(self, attn.qkv, padded) + bias
        elif bias is None:
            qkv = _called(self, attn.qkv, padded)
        else:
            qkv = torch.nn.functional.linear(padded, attn.qkv.weight, bias)
        out = _attention_of(self, qkv, **self._windows())
        return _crop_as_timm(self, out, x)


class _FusedMerging(HoldsConstants):
    """A merging of timm's, as one operation where the grid is even.

    Attributes:
        norm_first: Whether the norm comes before the reduction.
        constants: The weight as it is read, where it is fixed.
    """

    norm_first: bool
    constants: LaidOut | None = None

    def fix(self) -> None:
        self.constants = LaidOut()
        self.constants.fix_layers("project_cells", cast(torch.nn.Module, self.reduction))

    def forget(self) -> None:
        self.constants = None

    def forward(self, x: Tensor) -> Tensor:
        merging: Any = self
        if not isinstance(x, Tensor) or not self._is_one_operation(x):
            return cast(Tensor, super().forward(x))
        reduction, norm = merging.reduction, merging.norm
        cells = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        laid_out = None if self.constants is None else self.constants.of_layers(reduction)
        return project_cells(
            cells,
            reduction.weight,
            reduction.bias,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            norm_first=self.norm_first,
            packed=None if laid_out is None else laid_out[0],
        )

    def _is_one_operation(self, x: Tensor) -> bool:
        merging: Any = self
        reduction, norm = merging.reduction, merging.norm
        even = x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
        if not (even and type(reduction) is nn.Linear and type(norm) is nn.LayerNorm):
            return False
        normed = reduction.in_features if self.norm_first else reduction.out_features
        if norm.normalized_shape != (normed,) or not plain(x, norm, bare=(reduction,)):
            return False
        outputs, depth, norm_first = reduction.out_features, reduction.in_features, int(self.norm_first)
        return fuses("project_cells", x, outputs=outputs, depth=depth, norm_first=norm_first)


class FusedPatchMerging(_FusedMerging, PatchMerging):
    """The merging of timm's Swin V1 and S3."""

    norm_first = True


class FusedPatchMergingV2(_FusedMerging, PatchMergingV2):
    """The merging of timm's Swin V2."""

    norm_first = False


FUSED: dict[type, type] = {
    SwinTransformerBlock: FusedSwinBlock,
    SwinTransformerV2Block: FusedSwinV2Block,
    PatchMerging: FusedPatchMerging,
    PatchMergingV2: FusedPatchMergingV2,
}
