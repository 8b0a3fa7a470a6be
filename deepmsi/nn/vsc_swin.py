"""VSC-Swin: a Swin Transformer V2 that compresses the tokens of each frame under a guide."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from deepmsi.errors import UserError
from deepmsi.nn.constants import HoldsConstants
from deepmsi.nn.recompute import CHUNK_FRAMES, Recompute, again, again_in_parts, checked
from deepmsi.nn.schedule import Schedule
from deepmsi.nn.swin_blocks import (
    Block,
    Compression,
    KeptTokens,
    Mlp,
    PatchEmbed,
    PatchMerging,
    Tokens,
    WindowAttention,
    mean_of_frames,
)
from deepmsi.nn.vsc import VSC
from deepmsi.ops._arguments import autocast_type

# Buffers that older checkpoints of Swin V2 carry, and that follow from the sizes.
_DERIVED = ("relative_coords_table", "relative_position_index", "attn_mask", "k_bias")


class Stage(nn.Module):
    """The blocks of one resolution, behind the merging that leads to it."""

    def __init__(self, downsample: PatchMerging | None, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def enter(self, tokens: Tokens) -> Tokens:
        """Merge down to this stage's grid."""
        return tokens if self.downsample is None else self.downsample(tokens)

    def each(self) -> list[Block]:
        """Return the blocks in order."""
        return cast(list[Block], list(self.blocks))


class VSCSwin(nn.Module):
    """Swin Transformer V2 with visual sequence compression; without a schedule it is timm's Swin V2.

    A compressing block computes ``x ← x + LN(attn(x))``; ``(y, gate) = VSC(x, g)``; ``x ← gate · LN(y)``;
    ``x ← x + LN(mlp(x))``. The frame's feature is the mean over its tokens after the last norm. Parameters have timm's
    names; a compression's own are ``layers.{i}.blocks.{j}.compress.*``. Under autocast the tokens between the blocks
    are in its type on every device; under CUDA's, timm's are in float32.

    Args:
        img_size: Side of the square frames, in pixels.
        patch_size: Side of a patch, in pixels.
        in_chans: Channels of the frames.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks of each stage.
        heads: Heads of each stage.
        window: Side of a window, one number or one for each stage; no larger than the grid, without shift there.
        pretrained_window: The window that scales the coordinates of the position bias, for each stage; 0: its own.
        mlp_ratio: Width of the MLP over the channels.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0; 0 makes training deterministic.
        schedule: ``"paper"``, ``"released"``, a :class:`Schedule`, its fields as a mapping, or None: no compression.
        guide_dim: Channels G of the guide; default the first compressing stage's. A stage with another number of
            channels gets its own linear projection.
        compression: Fields of the schedule that take the place of the preset's, such as ``{"threshold": 0.5}``.
        recompute: What backward computes again in place of keeping it: ``"none"``: at most what passes over elements
            (GELU, the sum behind the attention), on a GPU or in 16 bits; ``"light"``: q, k, v with the
            attention, the MLP's hidden layer, the embedding and the reductions; ``"block"``: whole blocks, of which
            only the inputs are kept; ``"chunk"``: everything, 15 frames at a time, of which only the frames themselves
            are kept. The gradients are those of ``"none"``, dropped paths included; ``"chunk"`` sums over its chunks
            in another order and draws drop path chunk by chunk. ``"light"`` and ``"block"`` compute at most 60 frames
            of the first stage again at a time: larger batches are summed in that order, and ``"block"`` draws drop
            path part by part. May be set at any time.

    Attributes:
        num_features: Channels of the output.
        guide_dim: G, or None without a schedule.

    Raises:
        UserError: Sizes do not fit one another, or the schedule does not fit the backbone.
    """

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int | Sequence[int] = 8,
        pretrained_window: int | Sequence[int] = 0,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        schedule: str | Mapping[str, Any] | Schedule | None = "paper",
        guide_dim: int | None = None,
        compression: Mapping[str, Any] | None = None,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        count = len(depths)
        windows = (window,) * count if isinstance(window, int) else tuple(window)
        references = (pretrained_window,) * count if isinstance(pretrained_window, int) else tuple(pretrained_window)
        if not len(heads) == len(windows) == len(references) == count:
            raise UserError(f"VSCSwin: depths {tuple(depths)}, heads {tuple(heads)} and windows must match in number")
        if img_size % patch_size:
            raise UserError(f"VSCSwin: img_size {img_size} is no multiple of patch_size {patch_size}")
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"VSCSwin: drop_path_rate must lie in [0, 1), not {drop_path_rate}")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.num_features = embed_dim * 2 ** (count - 1)
        self.schedule = Schedule.resolve(schedule, depths, compression)
        plan = self.schedule.blocks if self.schedule is not None and self.schedule.blocks is not None else ()
        self.guide_dim = guide_dim or embed_dim * 2 ** plan[0][0] if plan else None

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        full = side = img_size // patch_size
        regridded = False
        stages: list[Stage] = []
        for i, depth in enumerate(depths):
            if i:
                full, side = (full + 1) // 2, (side + 1) // 2
            dim = embed_dim * 2**i
            if dim % heads[i]:
                raise UserError(f"VSCSwin: {heads[i]} heads do not divide the {dim} channels of stage {i}")
            own = min(windows[i], full)
            if full % own:
                raise UserError(
                    f"VSCSwin: the grid of stage {i} is {full}x{full}, no multiple of its window {own}: "
                    "choose another img_size or window"
                )
            blocks: list[Block] = []
            for j in range(depth):
                # Only the regrid layout leaves the stage's own grid, and its windows with it; so where all tokens stay.
                size = regrid_window(side) if regridded else own
                shift = size // 2 if j % 2 and side > size else 0
                attn = WindowAttention(dim, heads[i], size, shift, references[i] or own)
                compress = None
                if (i, j) in plan:
                    compress, side = self._compression(plan.index((i, j)), dim, side)
                    regridded = compress.regrid
                blocks.append(Block(dim, attn, int(dim * mlp_ratio), next(rates), compress))
            trim = self.schedule is not None and not self.schedule.static
            stages.append(Stage(PatchMerging(dim // 2, trim) if i else None, blocks))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.num_features)
        self.recompute = checked(recompute)
        self.register_load_state_dict_pre_hook(_forget_constants)
        self._initialise()

    @property
    def recompute(self) -> Recompute:
        """What backward computes again; see the class."""
        return self._recompute

    @recompute.setter
    def recompute(self, position: str) -> None:
        self._recompute = checked(position)
        for module in self.modules():
            if isinstance(module, (WindowAttention, Mlp, Compression, PatchMerging)):
                module.recompute = position == "light"

    def _compression(self, index: int, dim: int, side: int) -> tuple[Compression, int]:
        """Return the compression number ``index`` of the schedule, and the side of the grid behind it."""
        plan = self.schedule
        assert plan is not None
        assert plan.blocks is not None
        assert self.guide_dim is not None
        keep = plan.keep[index] if isinstance(plan.keep, tuple) else None
        capacity = plan.capacity[index] if isinstance(plan.capacity, tuple) else None
        if keep is not None and capacity is None and plan.blocks[index][0] > plan.blocks[0][0]:
            # Cells that merging left empty make frames unequal: only a capacity keeps the shapes static.
            capacity = keep if plan.layout == "packed" else None
        vsc = VSC(
            guide_weight=plan.guide_weight,
            temperature=plan.temperature,
            standardize=plan.standardize,
            threshold=plan.threshold,
            keep=keep,
            capacity=capacity,
            min_keep=plan.min_keep,
            fuse_threshold=plan.fuse_threshold,
            fuse_alpha=plan.fuse_alpha,
        )
        regrid = plan.layout == "regrid"
        if regrid and keep is not None:
            side = min(side, math.isqrt(keep))
        return Compression(dim, self.guide_dim, vsc, plan.norm, regrid), side

    def _initialise(self) -> None:
        """Start as timm does: truncated normal weights, zero biases, residual post-norms at zero."""
        for module in self.modules():
            if isinstance(module, (WindowAttention, Mlp, PatchMerging)):
                for linear in module.modules():
                    if isinstance(linear, nn.Linear):
                        nn.init.trunc_normal_(linear.weight, std=0.02)
                        if linear.bias is not None:
                            nn.init.zeros_(linear.bias)
            elif isinstance(module, Block):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)

    @classmethod
    def from_timm(
        cls,
        name: str,
        pretrained: bool | str | PathLike[str] = False,
        schedule: str | Mapping[str, Any] | Schedule | None = "paper",
        *,
        img_size: int | None = None,
        drop_path_rate: float = 0.0,
        guide_dim: int | None = None,
        compression: Mapping[str, Any] | None = None,
        recompute: str = "none",
    ) -> "VSCSwin":
        """Build one of timm's ``swinv2_*`` models with its starting or pretrained weights.

        Args:
            name: Such as ``swinv2_tiny_window8_256``.
            pretrained: Whether to load timm's weights (needs the model hub, or its cache), or the path of a
                ``.safetensors`` file of them, or of other weights by timm's names.
            schedule, guide_dim, compression, drop_path_rate, recompute: As in the constructor.
            img_size: Side of the frames where it is not the model's own.

        Raises:
            UserError: timm has no Swin V2 of that name, its weights cannot be had or are another model's, or the frames
                are not square.
        """
        source = _timm_model(name, pretrained, img_size)
        sizes = _sizes(source)
        model = cls(
            **sizes,
            drop_path_rate=drop_path_rate,
            schedule=schedule,
            guide_dim=guide_dim,
            compression=compression,
            recompute=recompute,
        )
        model.load_state_dict(source.state_dict())
        return model

    @classmethod
    def small(cls, schedule: str | Mapping[str, Any] | Schedule | None = "paper", **options: Any) -> "VSCSwin":
        """Build a small model for 64x64 frames that trains from nothing on a CPU: three stages, 128 channels out.

        Args:
            schedule: As in the constructor; the presets compress blocks 0 and 2 of the middle stage.
            **options: Arguments of the constructor that take the place of this preset's.
        """
        sizes: dict[str, Any] = {
            "img_size": 64,
            "embed_dim": 32,
            "depths": (2, 4, 2),
            "heads": (2, 4, 8),
            "window": 4,
            **options,
        }
        return cls(**sizes, schedule=schedule)

    @overload
    def forward(
        self,
        frames: Tensor,
        guide: Tensor | None = None,
        return_kept: Literal[False] = False,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        frames: Tensor,
        guide: Tensor | None = None,
        *,
        return_kept: Literal[True],
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, list[KeptTokens]]: ...

    def forward(
        self,
        frames: Tensor,
        guide: Tensor | None = None,
        return_kept: bool = False,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, list[KeptTokens]]:
        """Map frames [F, 3, S, S] (normalised) under their guides [F, G] to features [F, num_features].

        Args:
            frames: All frames of a batch, at once.
            guide: Semantic feature of each frame; not needed without a schedule.
            return_kept: Whether to return what each compressing block kept, too; nothing is then computed again.
            prepare: Turns frames as they are given, such as uint8 pixels, into normalised ones. Recomputing whole
                blocks or chunks then keeps the given frames only.

        Raises:
            ValueError: A shape is wrong, or the guide is missing.
        """
        if return_kept:
            kept: list[KeptTokens] = []
            feature = self._guided(self.stem(frames, prepare), guide, kept)
            return feature, kept
        if self.recompute != "chunk" or not torch.is_grad_enabled():
            return self._guided(self.stem(frames, prepare), guide)
        if self.stem_frozen and not frames.requires_grad:  # it is computed once, and its output kept
            return self._in_chunks(self._guided, frames, guide, partial(self.stem, prepare=prepare))

        def whole(frames: Tensor, guide: Tensor | None) -> Tensor:
            return self._guided(self.stem(frames, prepare), guide)

        return self._in_chunks(whole, frames, guide)

    def stem(self, frames: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Compute the half that does not depend on the guide, up to the first compression: [F, H, W, C].

        It can be kept per frame and given to :meth:`guided` under changing guides, or in every epoch where the stem is
        frozen. ``prepare`` as in :meth:`forward`.
        """
        expected = (self.in_chans, self.img_size, self.img_size)
        if frames.dim() != 4 or frames.shape[1:] != expected:
            raise ValueError(f"VSCSwin: frames must be [F, {', '.join(map(str, expected))}], not {list(frames.shape)}")
        folded = self.patch_embed.pixel_mean is not None and frames.dtype == torch.uint8
        if prepare is None and not frames.is_floating_point() and not folded:
            raise ValueError(f"VSCSwin: frames must be normalised, or prepare must do it, not {frames.dtype}")

        def embed(frames: Tensor) -> Tensor:
            return self.patch_embed(frames, prepare)

        if self.recompute in ("light", "block"):
            x = again(embed, frames, owners=(self.patch_embed,), draws=False)
        else:
            x = embed(frames)
        tokens = Tokens(x, (x.shape[1], x.shape[2]))
        for stage in self.stages():
            for j, block in enumerate(stage.each()):
                owner = stage if j == 0 else None
                if block.compress is not None:
                    return self._run(block, owner, partial(block, transforms=False), tokens).x
                tokens = self._run(block, owner, block, tokens)
        return tokens.x

    def guided(self, x: Tensor, guide: Tensor | None, kept: list[KeptTokens] | None = None) -> Tensor:
        """Compute the other half from :meth:`stem`'s output, under guides [F, G]: features [F, num_features].

        The output may have been kept in another floating type. What each compressing block kept is appended to
        ``kept``; nothing is then computed again.
        """
        x = x.to(autocast_type(self.patch_embed.proj.weight))
        if self.recompute == "chunk" and torch.is_grad_enabled() and kept is None:
            return self._in_chunks(self._guided, x, guide)
        return self._guided(x, guide, kept)

    def _guided(self, x: Tensor, guide: Tensor | None, kept: list[KeptTokens] | None = None) -> Tensor:
        tokens = Tokens(x, (x.shape[1], x.shape[2]))
        if self.guide_dim is not None:
            if guide is None:
                raise ValueError(f"VSCSwin: the schedule compresses under a guide [F, {self.guide_dim}]: give one")
            if guide.shape != (x.shape[0], self.guide_dim):
                raise ValueError(f"VSCSwin: guide must be [{x.shape[0]}, {self.guide_dim}], not {list(guide.shape)}")
            tokens = self._compressed(tokens, guide, kept)
        return mean_of_frames(tokens.but(self.norm(tokens.x)))

    def _compressed(self, tokens: Tokens, guide: Tensor, kept: list[KeptTokens] | None) -> Tokens:
        begun = False
        for i, stage in enumerate(self.stages()):
            for j, block in enumerate(stage.each()):
                owner = stage if begun and j == 0 else None
                if block.compress is not None:
                    # The stem ends behind the attention of the first one.
                    compressing = partial(block, attends=begun, name=f"layers.{i}.blocks.{j}", kept=kept)
                    tokens = self._run(block, owner, compressing, tokens, guide, kept is not None)
                    begun = True
                elif begun:
                    tokens = self._run(block, owner, block, tokens)
        return tokens

    def _run(
        self,
        block: Block,
        entered: Stage | None,
        function: Callable[..., Tokens],
        tokens: Tokens,
        guide: Tensor | None = None,
        watched: bool = False,
    ) -> Tokens:
        """Run a part of a block, behind the merging of the stage that it enters; keep its inputs only, where asked."""
        x, grid, place, cu_seqlens, per_frame, stage_grid = tokens

        def run(x: Tensor, place: Tensor | None, cu_seqlens: Tensor | None, guide: Tensor | None) -> Tokens:
            came = Tokens(x, grid, place, cu_seqlens, per_frame, stage_grid)
            if entered is not None:
                came = entered.enter(came)
            return function(came) if guide is None else function(came, guide)

        if self.recompute != "block" or watched:
            return run(x, place, cu_seqlens, guide)
        owners = (block,) if entered is None or entered.downsample is None else (block, entered.downsample)
        draws = self.training and block.drop_path > 0
        if place is not None or stage_grid is not None or guide is not None:
            return again(run, x, place, cu_seqlens, guide, owners=owners, draws=draws)
        # Every place has its token, so the frames can be taken apart, and what comes out tells its grid.
        y = again_in_parts(lambda x: run(x, None, None, None).x, x, owners=owners, draws=draws)
        return Tokens(y, (y.shape[1], y.shape[2]))

    def _in_chunks(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        given: Tensor,
        guide: Tensor | None,
        first: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute 15 frames at a time, and all of it again in backward, but for what is done ``first``."""
        draws = self.training and any(block.drop_path > 0 for stage in self.stages() for block in stage.each())
        features = []
        for start in range(0, max(len(given), 1), CHUNK_FRAMES):
            part = given[start : start + CHUNK_FRAMES]
            its_guide = None if guide is None else guide[start : start + CHUNK_FRAMES]
            part = part if first is None else first(part)
            features.append(again(function, part, its_guide, owners=(self,), draws=draws))
        return torch.cat(features)

    def no_weight_decay(self) -> set[str]:
        """Return the names that timm's optimizers spare: the attention's scales and the position bias's network."""
        return {name for name, _ in self.named_parameters() if "logit_scale" in name or "cpb_mlp" in name}

    @property
    def stem_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what :meth:`stem` gives for a frame."""
        stages = self.stages()
        compressing = [i for i, stage in enumerate(stages) if any(block.compress is not None for block in stage.each())]
        last = compressing[0] if compressing else len(stages) - 1
        side = -(-self.img_size // self.patch_size // 2**last)
        return side, side, self.num_features // 2 ** (len(stages) - 1 - last)

    @property
    def stem_frozen(self) -> bool:
        """Whether nothing that :meth:`stem` uses learns."""
        return not any(p.requires_grad for module in self.stem_modules() for p in module.parameters())

    def freeze_stem(self) -> "VSCSwin":
        """Let everything up to the first compression keep its weights; without a schedule that is all but a norm."""
        for module in self.stem_modules():
            module.requires_grad_(False)
        return self

    def stem_modules(self) -> list[nn.Module]:
        """Return the modules that :meth:`stem` uses."""
        found: list[nn.Module] = [self.patch_embed]
        for stage in self.stages():
            if stage.downsample is not None:
                found.append(stage.downsample)
            for block in stage.each():
                if block.compress is not None:
                    return [*found, block.attn, block.norm1]
                found.append(block)
        return found

    def reserve(self, capacity: Sequence[int] | None = None) -> "VSCSwin":
        """Reserve rows for each compressing block, so that all shapes are known beforehand.

        Args:
            capacity: Rows of a frame behind each compressing block, at most so many tokens stay; None reserves every
                place of the grid, which changes no number.

        Raises:
            UserError: There is another number of compressing blocks, or a capacity is below what its block must keep.
        """
        blocks = [
            (block.compress.vsc, (self.img_size // self.patch_size // 2**i) ** 2)
            for i, stage in enumerate(self.stages())
            for block in stage.each()
            if block.compress is not None
        ]
        rows = [area for _, area in blocks] if capacity is None else list(capacity)
        if self.schedule is None or len(rows) != len(blocks):
            raise UserError(f"VSCSwin: {len(rows)} capacities were given for {len(blocks)} compressing blocks")
        for (vsc, _), reserved in zip(blocks, rows, strict=True):
            least = vsc.keep or vsc.min_keep
            if reserved < least:
                raise UserError(f"VSCSwin: a capacity of {reserved} is below the {least} tokens that must stay")
        for (vsc, area), reserved in zip(blocks, rows, strict=True):
            vsc.capacity = min(reserved, area)
        self.schedule = replace(self.schedule, capacity=tuple(rows))
        for stage in self.stages():
            if stage.downsample is not None:
                stage.downsample.trim = False
        return self

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        return cast(list[Stage], list(self.layers))

    def fold_pixels(self, mean: Tensor, std: Tensor) -> "VSCSwin":
        """Take uint8 frames as they are in inference, (pixel / 255 - mean) / std [3, 1, 1] folded into the embedding.

        They are then not given to ``prepare``. Call it under the autocast that the model will run under. Undone as
        :func:`fix_constants` is.
        """
        self.eval()
        self.patch_embed.fold(mean, std)
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load a state dict of this class or of timm's Swin V2.

        ``head.*`` and buffers that follow from the sizes are ignored and listed among the unexpected keys. With
        ``strict`` everything else must fit, except that a compression's own parameters may be missing.
        """
        derived = [key for key in state_dict if key.startswith("head.") or key.split(".")[-1] in _DERIVED]
        mine = {key: value for key, value in state_dict.items() if key not in derived}
        result = super().load_state_dict(mine, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if ".compress." not in key]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(
                f"VSCSwin: the state dict does not fit: missing {missing or 'none'}, "
                f"unexpected {result.unexpected_keys or 'none'}"
            )
        return _IncompatibleKeys(result.missing_keys, [*result.unexpected_keys, *derived])


def _forget_constants(module: nn.Module, *_: Any) -> None:
    """Drop what :func:`fix_constants` and :meth:`VSCSwin.fold_pixels` computed."""
    for part in module.modules():
        if isinstance(part, HoldsConstants):
            part.forget()


def regrid_window(side: int) -> int:
    """Return the window of a regrid grid: all of it up to 8, else the largest divisor that is not above 8."""
    return side if side <= 8 else max(w for w in range(1, 9) if side % w == 0)


def _timm_model(name: str, pretrained: bool | str | PathLike[str], img_size: int | None) -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"timm does not import ({str(error).splitlines()[0]}): install timm, and a torchvision that fits the "
            "installed torch"
        ) from error
    if not name.startswith("swinv2_") or name.startswith("swinv2_cr_") or name.split(".")[0] not in timm.list_models():
        near = ", ".join(timm.list_models("swinv2_tiny*"))
        raise UserError(f"timm has no Swin V2 named {name!r} (swinv2_cr_* is another architecture); such are: {near}")
    if "." in name and name not in (tagged := timm.list_pretrained(f"{name.split('.')[0]}.*")):
        raise UserError(f"timm has no weights named {name!r}; such are: {', '.join(tagged)}")
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if not isinstance(pretrained, bool):
        model = timm.create_model(name, num_classes=0, **options)
        _load_file(model, Path(pretrained).expanduser(), name)
        return model
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise UserError(
            f"the weights of {name} cannot be had ({str(error).splitlines()[0]}): fetch them while online, set "
            "pretrained to the path of a .safetensors file of them, or to false"
        ) from error


def _load_file(model: nn.Module, file: Path, name: str) -> None:
    """Load a file of weights into a Swin V2 of timm, which has to find all of its own there, and no others."""
    from timm.models.swin_transformer_v2 import checkpoint_filter_fn

    if file.suffix != ".safetensors":
        raise UserError(f"{file}: weights are read from .safetensors files alone")
    try:
        found = load_file(file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file of weights") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: the file cannot be read ({error})") from error
    others = f"{file}: the file does not hold weights of {name}"
    embedding = "patch_embed.proj.weight"
    if embedding not in found or found[embedding].dim() != 4:
        raise UserError(f"{others} (it lacks {embedding})")
    for key, weight in found.items():
        if not key.endswith(_DERIVED) and not (weight.is_floating_point() and weight.float().isfinite().all()):
            raise UserError(f"{others} ({key} is {weight.dtype}, or not finite)")
    try:
        left = model.load_state_dict(checkpoint_filter_fn(found, model), strict=False)
    except RuntimeError as error:
        *_, why = str(error).strip().splitlines()  # which tells of a weight
        raise UserError(f"{others} ({why.strip()})") from error
    missing = [key for key in left.missing_keys if not key.endswith(_DERIVED)]
    beyond = [key for key in left.unexpected_keys if not key.startswith("head.") and not key.endswith(_DERIVED)]
    if missing or beyond:
        raise UserError(f"{others} ({f'it lacks {missing[0]}' if missing else f'nor has that {beyond[0]}'})")


def _sizes(source: Any) -> dict[str, Any]:
    """Return the constructor's arguments for a Swin V2 of timm."""
    height, width = source.patch_embed.img_size
    if height != width:
        raise UserError(f"VSCSwin: frames must be square, not {height}x{width}")
    first = [stage.blocks[0] for stage in source.layers]
    return {
        "img_size": height,
        "patch_size": source.patch_embed.patch_size[0],
        "in_chans": source.patch_embed.proj.in_channels,
        "embed_dim": source.patch_embed.proj.out_channels,
        "depths": [len(stage.blocks) for stage in source.layers],
        "heads": [block.num_heads for block in first],
        "window": [block.window_size[0] for block in first],
        "pretrained_window": [block.attn.pretrained_window_size[0] for block in first],
        "mlp_ratio": first[0].mlp_ratio,
    }
