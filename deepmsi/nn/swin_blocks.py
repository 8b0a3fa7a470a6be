"""The parts of a Swin V2 that may lose tokens: attention, MLP, compression, merging, on dense or packed rows.

Parameters have timm's names. All frames run at once, in one of two layouts (:class:`Tokens`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from deepmsi.backend import resolve
from deepmsi.nn.constants import Content, Fixed, HoldsConstants, LaidOut, content_of, stands
from deepmsi.nn.fusing import bias_table, bias_weights, fuses, fuses_attention, plain, unhooked
from deepmsi.nn.recompute import Source, again, again_in_parts, remade
from deepmsi.nn.vsc import VSC
from deepmsi.ops import project_cells, residual_mlp, residual_norm, residual_window_attention, window_attention
from deepmsi.ops._arguments import autocast, autocast_type, autocasts, needs_grad, without_autocast
from deepmsi.ops.window_attention import head_scale_of


class Tokens(NamedTuple):
    """The tokens of all frames.

    Attributes:
        x: [F, H, W, C] where every place of the grid has its token, else packed [R, C], by frame and position.
        grid: (H, W) on which positions lie.
        place: Position y · W + x of each packed row [R] int32. In the regrid layout it is where a token lay on the
            stage's own grid, for reports, where they are asked for; None where every token is at its own place.
        cu_seqlens: Packed: offsets of the frames' rows [F + 1] int32; the rows past the last one do not count.
        per_frame: Packed: the number of rows of every frame, where that is one number known beforehand.
        stage_grid: Regrid layout: the stage's own grid, where it is not ``grid``.
    """

    x: Tensor
    grid: tuple[int, int]
    place: Tensor | None = None
    cu_seqlens: Tensor | None = None
    per_frame: int | None = None
    stage_grid: tuple[int, int] | None = None

    def but(self, x: Tensor) -> "Tokens":
        """Return other contents in the same places: ``_replace(x=x)``, which torch 2.11 does not compile."""
        return Tokens(x, *self[1:])


class KeptTokens(NamedTuple):
    """What one compressing block kept, for reports and logs.

    Attributes:
        block: Its name in the state dict, such as ``layers.2.blocks.0``.
        grid: (H, W) of its stage.
        positions: y · W + x on that grid of each kept token [R'] int32; past ``cu_seqlens[-1]`` they mean nothing.
        cu_seqlens: Offsets of the frames' rows [F + 1] int32.
        relevance: r of each kept token [R'].
        ratio: Kept tokens over tokens that came in, a 0-dim tensor.
    """

    block: str
    grid: tuple[int, int]
    positions: Tensor
    cu_seqlens: Tensor
    relevance: Tensor
    ratio: Tensor


def frame_of_row(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Return the frame of each packed row [rows]; rows past the last offset give F."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], row, right=True)


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (pixels / 255 - mean) / std of uint8 pixels [F, 3, S, S] in float32 or wider.

    In one operation on them: mean and std, of one number a channel or a position, take the divisions. A GPU reads the
    pixels as they are; a CPU makes a float32 copy of them first.
    """
    mean, std = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (mean, std))
    return torch.addcmul(-mean / std, pixels, 1 / (255 * std))


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return norm(x) in the type of x, on every device: CUDA's autocast would norm a float32 copy and give float32."""
    if not (x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and autocasts("cuda")):
        return norm(x)
    if not plain(x, norm):
        return norm(x).to(x.dtype)
    with without_autocast("cuda"):
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return nn.functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def adding(norm: nn.LayerNorm, like: Tensor, scale: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what gives x + scale · norm(branch) for x and a branch such as ``like``; a scale of None is 1.

    What computes it is chosen now, so that backward makes the same sum again under another backend, too.
    """
    if fuses("residual_norm", like) and plain(like, norm):
        chosen = resolve("residual_norm", None, like.device.type, like.dtype, channels=like.shape[-1])
        return partial(
            residual_norm,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            row_scale=scale,
            eps=norm.eps,
            backend=chosen,
        )

    def added(x: Tensor, branch: Tensor) -> Tensor:
        branch = normed(norm, branch)
        return x + (branch if scale is None else branch * scale.unsqueeze(-1))

    return added


class WindowAttention(HoldsConstants):
    """Cosine window attention with log-spaced continuous position bias (Swin V2).

    Args:
        dim: Channels.
        heads: Number of heads.
        window: Side of a window.
        shift: Shift of the windows.
        reference_window: The window whose ``reference_window - 1`` scales the bias's coordinates: that of the loaded
            weights.

    Attributes:
        recompute: Whether backward computes q, k, v and the attention again in place of keeping them.
    """

    coordinate_bits: Tensor

    def __init__(self, dim: int, heads: int, window: int, shift: int, reference_window: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift, self.reference_window = heads, window, shift, reference_window
        self.recompute = False
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        # As integers, so that a change of the module's type cannot round them.
        self.register_buffer("coordinate_bits", self._coordinates().view(torch.int32), persistent=False)
        # No buffer, for what averages those of a model finds them by their order.
        self.fixed_table: Tensor | None = None
        self._fixed_from: Content | None = None
        self._laid_out = LaidOut()
        self._qkv_bias: Fixed[Tensor] = Fixed()
        self._head_scale: Fixed[Tensor] = Fixed()

    def _coordinates(self, device: torch.device | None = None) -> Tensor:
        """Return the log-spaced coordinates of every offset [(2w - 1)², 2] in float32."""
        step = torch.arange(1 - self.window, self.window, device=device)
        scaled = torch.cartesian_prod(step, step).float() / max(self.reference_window - 1, 1) * 8
        return scaled.sign() * torch.log2(scaled.abs() + 1.0) / math.log2(8)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        # A module that was made on no device has only now a place for them; else they stay where graphs read them.
        bits = self._coordinates(self.q_bias.device).view(torch.int32)
        if self.coordinate_bits.device == bits.device:
            self.coordinate_bits.copy_(bits)
        else:
            self.coordinate_bits = bits

    def bias_table(self) -> Tensor:
        """Return 16 · sigmoid of the position bias of every offset [(2w - 1)², heads].

        In float32 or wider; a network in the place of its own gives it in its type.
        """
        coordinates, weights = self.coordinate_bits.view(torch.float32), bias_weights(self.cpb_mlp)
        if weights is None:
            dtypes = [p.dtype for p in self.cpb_mlp.parameters()]  # none where its layers were quantised
            with without_autocast(coordinates.device.type):
                return 16 * self.cpb_mlp(coordinates.to(dtypes[0]) if dtypes else coordinates).sigmoid()
        if self.fixed_table is not None and stands(self._fixed_from, *weights):
            return self.fixed_table
        if self._fixed_from is not None and needs_grad(*weights):
            self._fixed_from = None  # what follows may change them unseen
        return bias_table(coordinates, weights)

    def fix(self) -> None:
        self.forget()
        self._laid_out.fix_layers("residual_window_attention", self.qkv, self.proj)
        self._qkv_bias.fix(self.qkv_bias, self.q_bias, self.v_bias)
        self._head_scale.fix(lambda: head_scale_of(self.logit_scale), self.logit_scale)
        weights = bias_weights(self.cpb_mlp)
        if weights is not None:
            self.fixed_table, self._fixed_from = self.bias_table(), content_of(*weights)

    def forget(self) -> None:
        self.fixed_table = self._fixed_from = None
        super().forget()

    def kept(self) -> list[Tensor]:
        return super().kept() + ([] if self.fixed_table is None else [self.fixed_table])

    def laid_out(self) -> tuple[Tensor, ...] | None:
        """Return the layers' weights as :meth:`fix` laid them out, while these stay."""
        return self._laid_out.of_layers(self.qkv, self.proj)

    def qkv_bias(self) -> Tensor:
        """Return the bias of q, k and v [3C]; keys have none."""
        held = self._qkv_bias.of(self.q_bias, self.v_bias)
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)) if held is None else held

    def head_scale(self) -> Tensor | None:
        """Return the scale of each head's cosines [heads], where :meth:`fix` computed it and it stands."""
        return self._head_scale.of(self.logit_scale)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the attention's output in the layout of the tokens."""
        table = self.bias_table()
        if not self.recompute:
            return self.proj(self._attended(tokens, table))
        x, grid, place, cu_seqlens = tokens[:4]

        def attended(x: Tensor, table: Tensor) -> Tensor:
            return self._attended(Tokens(x, grid, place, cu_seqlens), table)

        # Frames do not see one another; rows of packed ones cannot be told apart without reading the offsets.
        anew = again_in_parts if cu_seqlens is None else again
        # What is kept is the copy that the product reads.
        return self.proj(anew(attended, autocast(x), table, owners=(self,), draws=False))

    def _projected(self, x: Tensor) -> Tensor:
        """Return q, k and v; an adapter, a quantised or a watched layer in the place of theirs is called."""
        if plain(x, bare=(self.qkv,)):
            return nn.functional.linear(x, self.qkv.weight, self.qkv_bias())
        qkv = self.qkv(x)
        return qkv + self.qkv_bias().to(qkv.dtype)

    def _attended(self, tokens: Tokens, table: Tensor) -> Tensor:
        packed = tokens.cu_seqlens is not None
        return window_attention(
            self._projected(tokens.x),
            self.heads,
            tokens.grid,
            self.window,
            self.shift,
            bias_table=table,
            logit_scale=self.logit_scale,
            positions=tokens.place if packed else None,
            cu_seqlens=tokens.cu_seqlens,
            head_scale=self.head_scale(),
        )


class Mlp(HoldsConstants):
    """Linear, GELU, linear.

    Attributes:
        recompute: Whether backward computes the hidden layer again in place of keeping it.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.recompute = False
        self._laid_out = LaidOut()

    def fix(self) -> None:
        self._laid_out.fix_layers("residual_mlp", self.fc1, self.fc2)

    def laid_out(self) -> tuple[Tensor, ...] | None:
        """Return the layers' weights as :meth:`fix` laid them out, while these stay."""
        return self._laid_out.of_layers(self.fc1, self.fc2)

    def forward(self, x: Tensor, source: Source | None = None) -> Tensor:
        """Transform x [..., C]; where its ``source`` is given, backward makes x again from that."""
        x = autocast(x)
        if self.recompute:
            with remade(x, source):
                return again_in_parts(self._transformed, x, owners=(self,), draws=False)
        with remade(x, source):
            hidden = self.fc1(x)
        active = nn.functional.gelu(hidden)
        with remade(active, Source(nn.functional.gelu, (hidden,))):
            return self.fc2(active)

    def _transformed(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Compression(nn.Module):
    """VSC, then the norm and the gate: ``x ← gate · LN(y)``.

    Args:
        dim: Channels of the stage.
        guide_dim: Channels of the guide; where they differ, a linear projection stands before it.
        vsc: The compression.
        norm: Whether the layer norm follows.
        regrid: Whether to lay the kept tokens on a smaller square grid.

    Attributes:
        recompute: Whether backward computes the norm again in place of keeping its output.
    """

    def __init__(self, dim: int, guide_dim: int, vsc: VSC, norm: bool, regrid: bool) -> None:
        super().__init__()
        self.vsc = vsc
        self.norm = nn.LayerNorm(dim) if norm else None
        self.guide = nn.Linear(guide_dim, dim) if guide_dim != dim else None
        self.regrid = regrid
        self.recompute = False

    def forward(self, tokens: Tokens, guide: Tensor, name: str, kept: list[KeptTokens] | None = None) -> Tokens:
        """Compress the tokens of every frame under its guide [F, G]; append what stayed to ``kept``."""
        x, grid, place, cu_seqlens, per_frame, stage_grid = tokens
        channels, area = x.shape[-1], grid[0] * grid[1]
        if cu_seqlens is None:
            x, per_frame = x.flatten(1, 2), area
        elif per_frame is not None:
            # Equal lengths are a dense batch, whose output has a size known beforehand.
            x, cu_seqlens = x.view(-1, per_frame, channels), None
        out = self.vsc(x, cu_seqlens, guide if self.guide is None else self.guide(guide), max_seqlen=area)
        if self.recompute:
            y = again(self._gated, out.tokens, out.gate, owners=(self,), draws=False)
        else:
            y = self._gated(out.tokens, out.gate)

        keep = self.vsc.keep
        left = min(keep, per_frame) if keep is not None and per_frame is not None else None
        side = math.isqrt(left) if self.regrid and left is not None else None
        if side is None or kept is not None:  # only reports ask where the tokens of a smaller grid lay
            index = out.index.clamp(min=0)
            place = (index % area).to(torch.int32) if place is None else place[index]
        if kept is not None:
            assert place is not None
            came = out.relevance.shape[0] if cu_seqlens is None else cu_seqlens[-1]
            kept.append(
                KeptTokens(
                    name, stage_grid or grid, place, out.cu_seqlens, out.relevance[index], out.cu_seqlens[-1] / came
                )
            )
        if side is not None:
            return Tokens(y.view(-1, side, side, channels), (side, side), place, stage_grid=stage_grid or grid)
        if self.vsc.capacity is not None and self.vsc.capacity != left:
            left = None
        return Tokens(y, grid, place, out.cu_seqlens, left)

    def _gated(self, tokens: Tensor, gate: Tensor) -> Tensor:
        y = tokens if self.norm is None else normed(self.norm, tokens)
        source = None
        if self.norm is not None and self.norm.weight.requires_grad and unhooked(self.norm):
            source = Source(partial(normed, self.norm), (tokens,))
        if not gate.requires_grad:  # it is 1, and there for its gradient
            return y
        with remade(y, source):
            return y * gate.to(y.dtype).unsqueeze(1)


class Block(nn.Module):
    """A residual post-norm block, with a compression between attention and MLP where it has one.

    Args:
        dim: Channels.
        attn: Its attention.
        hidden: Width of the MLP.
        drop_path: Chance that a branch is dropped for a frame.
        compress: Its compression, or None.
    """

    def __init__(
        self, dim: int, attn: WindowAttention, hidden: int, drop_path: float, compress: Compression | None
    ) -> None:
        super().__init__()
        self.attn = attn
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = drop_path
        self.compress = compress

    def _attended(self, tokens: Tokens) -> tuple[Tokens, Source | None]:
        """x + LN(attn(x)), and what it can be made from again where all of that is kept anyway."""
        x, scale = tokens.x, self._drawn(tokens)
        attn, norm = self.attn, self.norm1
        source: Source | None = None
        # Where fewer bytes are asked for, a GPU runs the layers apart: they make y again, which the fused half keeps.
        lean = attn.recompute and x.device.type != "cpu"
        fused = not lean and fuses_attention(x, attn.heads, attn.window) and unhooked(attn)
        if fused and plain(x, attn.proj, norm, bare=(attn.qkv,)):
            y = residual_window_attention(
                x,
                attn.qkv.weight,
                attn.qkv_bias(),
                attn.proj.weight,
                attn.proj.bias,
                norm.weight,
                norm.bias,
                attn.heads,
                tokens.grid,
                attn.window,
                attn.shift,
                bias_table=attn.bias_table(),
                logit_scale=attn.logit_scale,
                positions=tokens.place if tokens.cu_seqlens is not None else None,
                cu_seqlens=tokens.cu_seqlens,
                row_scale=scale,
                eps=norm.eps,
                packed=attn.laid_out(),
                head_scale=attn.head_scale(),
            )
        else:
            branch = attn(tokens)
            added = adding(norm, branch, scale)
            y = added(x, branch)
            kept = _learns(attn.qkv) and _learns(norm) and unhooked(norm)
            # Under autocast it is a copy of y in fewer bits that is kept.
            if kept and autocast(y) is y:
                source = Source(added, (x, branch))
        return tokens.but(y), source

    def transform(self, tokens: Tokens, source: Source | None = None) -> Tokens:
        """x + LN(mlp(x)); where the ``source`` of x is given, backward makes x again from that."""
        x, scale = tokens.x, self._drawn(tokens)
        mlp, norm = self.mlp, self.norm2
        if fuses("residual_mlp", x) and unhooked(mlp) and plain(x, mlp.fc1, mlp.fc2, norm):
            weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, norm.weight, norm.bias)
            offsets, laid_out = tokens.cu_seqlens, mlp.laid_out()
            with remade(x, source):
                y = residual_mlp(x, *weights, row_scale=scale, cu_seqlens=offsets, eps=norm.eps, packed=laid_out)
            return tokens.but(y)
        branch = mlp(x, source)
        return tokens.but(adding(norm, branch, scale)(x, branch))

    def forward(
        self,
        tokens: Tokens,
        guide: Tensor | None = None,
        *,
        attends: bool = True,
        transforms: bool = True,
        name: str = "",
        kept: list[KeptTokens] | None = None,
    ) -> Tokens:
        """Attention and MLP, the compression between them where the block has one; or one half of it alone.

        Args:
            tokens, guide: What is read; a compression needs the guide [F, G].
            attends, transforms: Whether the first half runs, and whether the rest does.
            name, kept: As in :class:`Compression`.
        """
        source: Source | None = None
        if attends:
            tokens, source = self._attended(tokens)
        if not transforms:
            return tokens
        if self.compress is not None:
            assert guide is not None
            tokens, source = self.compress(tokens, guide, name, kept), None
        return self.transform(tokens, source)

    def _drawn(self, tokens: Tokens) -> Tensor | None:
        """Draw the factor of every row's branch: in training whole frames are dropped at random (stochastic depth)."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep, x = 1.0 - self.drop_path, tokens.x
        if tokens.cu_seqlens is None:
            return x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep).expand(x.shape[:-1])
        frames = tokens.cu_seqlens.shape[0] - 1
        # One number more, for the rows past the last frame.
        scale = x.new_empty(frames + 1).bernoulli_(keep).div_(keep)
        return scale[frame_of_row(tokens.cu_seqlens, x.shape[0])]


def _learns(layer: nn.Module) -> bool:
    """Whether a layer, or an adapter in its place, keeps what it reads for a gradient of its own."""
    return any(p.requires_grad for p in layer.parameters())


class PatchEmbed(HoldsConstants):
    """Cut an image into patches, embed and normalise them.

    Attributes:
        pixel_weight, pixel_bias: The embedding of uint8 pixels, their normalisation folded in; None outside inference.
        pixel_mean, pixel_std: What was folded in.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)
        self.pixel_weight: Tensor | None = None
        self.pixel_bias: Tensor | None = None
        self.pixel_mean: Tensor | None = None
        self.pixel_std: Tensor | None = None
        self._folded_from: Content | None = None
        self._folded_for: torch.dtype | None = None

    def forget(self) -> None:
        self.pixel_weight = self.pixel_bias = self.pixel_mean = self.pixel_std = self._folded_from = None

    def kept(self) -> list[Tensor]:
        folded = (self.pixel_weight, self.pixel_bias, self.pixel_mean, self.pixel_std)
        return [tensor for tensor in folded if tensor is not None]

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(self, mean: Tensor, std: Tensor) -> None:
        """Fold (pixel / 255 - mean) / std [3, 1, 1] into the embedding of uint8 frames, for inference.

        W (u / 255 - m) / s + b is V u + (b - Σ V 255 m) with V = W / (255 s). Half precisions hold every u as it is. V
        is rounded to the type of the product first, so that its error meets u - 255 m, as W's does, and not all of u.
        It holds under the autocast, or without one, of now. Of weights that nothing is kept of, such as shards (FSDP),
        the frames are normalised in every call.
        """
        self.pixel_mean, self.pixel_std = mean, std
        weight, bias = self.proj.weight, cast(Tensor, self.proj.bias)
        self._folded_from, self._folded_for = content_of(weight, bias), autocast_type(weight)
        if self._folded_from is None:  # nothing would tell when it no longer holds
            self.pixel_weight = self.pixel_bias = None
            return
        scaled = (weight.double() / (255 * std.double())).to(self._folded_for)
        self.pixel_weight = scaled.to(weight.dtype)
        self.pixel_bias = (bias.double() - (scaled * (255 * mean.double())).sum((1, 2, 3))).to(weight.dtype)

    def forward(self, frames: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map [F, 3, S, S] to [F, S/p, S/p, C]; frames that ``prepare`` makes are made again in backward.

        Where that is folded in, uint8 frames are embedded as they are while the weights stay and no gradient of them is
        wanted; else ``prepare`` normalises them, or what was folded in does.
        """
        if self.pixel_mean is not None and frames.dtype == torch.uint8:
            weight, bias = self.pixel_weight, self.pixel_bias
            if weight is not None and self._holds() and plain(pixels := frames.to(weight.dtype), self.proj):
                return self._embedded(pixels, weight, bias)
            prepare = prepare or self._normalised
        source = None
        if prepare is not None:

            def prepared(frames: Tensor) -> Tensor:
                return autocast(prepare(frames))

            source = Source(prepared, (frames,))
            frames = prepared(frames)
        with remade(frames, source):
            return self._embedded(frames)

    def _normalised(self, frames: Tensor) -> Tensor:
        assert self.pixel_mean is not None
        assert self.pixel_std is not None
        self.pixel_mean, self.pixel_std = self.pixel_mean.to(frames.device), self.pixel_std.to(frames.device)
        return normalised(frames, self.pixel_mean, self.pixel_std).to(self.proj.weight.dtype)

    def _holds(self) -> bool:
        weights = (self.proj.weight, cast(Tensor, self.proj.bias))
        if self._folded_from is not None and needs_grad(*weights):
            self._folded_from = None  # what follows may change them unseen
        return self._folded_for == autocast_type(self.proj.weight) and stands(self._folded_from, *weights)

    def _embedded(self, frames: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Embed and norm frames, by the layer's own weights or by others."""
        proj, norm = self.proj, self.norm
        if plain(frames, proj, norm) and fuses("project_cells", frames, casts=True, outputs=proj.out_channels):
            (height, width), (_, _, rows, columns) = proj.kernel_size, frames.shape
            cells = frames.unflatten(2, (rows // height, height)).unflatten(4, (columns // width, width))
            cells = cells.permute(0, 2, 4, 1, 3, 5)
            weight, bias = (proj.weight, proj.bias) if weight is None else (weight, bias)
            return project_cells(cells, weight.flatten(1), bias, norm.weight, norm.bias, eps=norm.eps)
        x = proj(frames) if weight is None else nn.functional.conv2d(frames, weight, bias, proj.stride)
        return normed(norm, x.permute(0, 2, 3, 1))


class PatchMerging(HoldsConstants):
    """Join the tokens of each 2x2 cell: channels in timm's order, zeros for missing ones; empty cells are left out.

    Attributes:
        recompute: Whether backward computes the reduction again in place of keeping it.
    """

    def __init__(self, dim: int, trim: bool) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)
        self.trim = trim
        self.recompute = False
        self._laid_out = LaidOut()

    def fix(self) -> None:
        self._laid_out.fix_layers("project_cells", self.reduction)

    def laid_out(self) -> Tensor | None:
        """Return the layer's weight as :meth:`fix` laid it out, while it stays."""
        found = self._laid_out.of_layers(self.reduction)
        return None if found is None else found[0]

    def forward(self, tokens: Tokens) -> Tokens:
        """Halve the grid. Packed rows keep their layout; with ``trim`` one integer is read on the host."""
        height, width = tokens.grid
        grid = ((height + 1) // 2, (width + 1) // 2)
        if tokens.cu_seqlens is not None:
            merged = self._packed(tokens, grid)
            cells = merged.x.view(1, 1, -1, 1, 1, merged.x.shape[1])
        else:
            x = tokens.x
            if height % 2 or width % 2:
                x = nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
            cells = x.unflatten(1, (grid[0], 2)).unflatten(3, (grid[1], 2)).permute(0, 1, 3, 4, 2, 5)
            merged = Tokens(x, grid)
        if self.recompute:
            y = again(self._reduced, autocast(cells), merged.cu_seqlens, owners=(self,), draws=False)
        else:
            y = self._reduced(cells, merged.cu_seqlens)
        return merged.but(y if merged.cu_seqlens is None else y.flatten(0, 2))

    def _reduced(self, cells: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Map cells [F, H, W, 2, 2, C], or rows of them [1, 1, R, 1, 1, 4C], to [F, H, W, 2C]."""
        norm, reduction = self.norm, self.reduction
        usual = plain(cells, norm, bare=(reduction,))
        if usual and fuses("project_cells", cells, casts=True, outputs=reduction.out_features):
            weights = (reduction.weight, None, norm.weight, norm.bias)
            return project_cells(cells, *weights, cu_seqlens=cu_seqlens, eps=norm.eps, packed=self.laid_out())
        return normed(self.norm, self.reduction(cells.flatten(3)))

    def _packed(self, tokens: Tokens, grid: tuple[int, int]) -> Tokens:
        x, place, cu_seqlens = tokens.x, tokens.place, tokens.cu_seqlens
        assert place is not None
        assert cu_seqlens is not None
        rows, channels = x.shape
        frames, cells, width = cu_seqlens.shape[0] - 1, grid[0] * grid[1], tokens.grid[1]
        row, column = place.long() // width, place.long() % width
        frame = frame_of_row(cu_seqlens, rows)
        # One cell past the end takes the rows that do not count.
        cell = torch.where(frame < frames, frame * cells + (row // 2) * grid[1] + column // 2, frames * cells)
        filled = cell.new_zeros(frames * cells + 1, dtype=torch.bool).index_fill_(0, cell, True)
        filled = filled[:-1]
        counts = filled.view(frames, cells).sum(1)
        offsets = nn.functional.pad(counts.cumsum(0), (1, 0))
        count = int(offsets[-1]) if self.trim else min(rows, frames * cells)
        rank = nn.functional.pad(filled.cumsum(0) - 1, (0, 1))
        # Within a cell timm puts the column's parity before the row's.
        slot = torch.where(frame < frames, rank[cell] * 4 + (column % 2) * 2 + row % 2, 4 * count)
        # narrow, since torch 2.11 compiles no slice up to a count that is read.
        joined = x.new_zeros(4 * count + 1, channels).index_copy_(0, slot, x).narrow(0, 0, 4 * count)
        where = torch.where(filled, rank[:-1], count)
        every = torch.arange(frames * cells, device=x.device, dtype=torch.int32) % cells
        place = every.new_zeros(count + 1).scatter(0, where, every).narrow(0, 0, count)
        return Tokens(joined.view(count, 4 * channels), grid, place, offsets.to(torch.int32))


def mean_of_frames(tokens: Tokens) -> Tensor:
    """Return the mean over the tokens of each frame [F, C]; a frame without tokens gives zeros."""
    x, grid, place, cu_seqlens = tokens[:4]
    if cu_seqlens is None or place is None:
        return x.mean((1, 2))
    frames, area = cu_seqlens.shape[0] - 1, grid[0] * grid[1]
    frame = frame_of_row(cu_seqlens, x.shape[0])
    slot = torch.where(frame < frames, frame * area + place, frames * area)
    # Copied to their places and summed over them in order, for an index_add has none.
    spread = x.new_zeros(frames * area + 1, x.shape[1]).index_copy_(0, slot, x)[:-1]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).clamp(min=1)
    return spread.view(frames, area, x.shape[1]).sum(1) / lengths.to(x.dtype).unsqueeze(1)
