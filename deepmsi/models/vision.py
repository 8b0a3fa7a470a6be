"""The video branch: normalise on the device, VSC-Swin over all frames at once, TCN over time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deepmsi.errors import UserError
from deepmsi.models.config import VisionConfig
from deepmsi.models.moments import moments
from deepmsi.nn import TCN, KeptTokens, VSCSwin, fix_constants
from deepmsi.nn.swin_blocks import normalised

if TYPE_CHECKING:
    from deepmsi.models.graphs import VideoGraphs


class VideoBranch(nn.Module):
    """Encode the frames of an utterance as one vector.

    Args:
        config: the vision section.
        weights: whether to load pretrained weights where the section asks for them.

    Attributes:
        dim: width of the video feature.
        guide_dim: channels of the guide, G; None where nothing compresses, and no guide is read.
        stem_shape: (H, W, C) of what `stem` makes of a frame.
        graphs: replays training steps where set; see `deepmsi.models.graphs`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig, weights: bool = True) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.backbone = _build_backbone(config, weights)
        if config.freeze == "stem":
            self.backbone.freeze_stem()
        else:
            for name, parameter in self.backbone.named_parameters():
                # What compresses has no pretrained values to keep.
                parameter.requires_grad_(not config.freeze or ".compress." in name)
        self.stem_shape = self.backbone.stem_shape
        self.tcn = TCN(self.backbone.num_features, config.tcn_channels, config.tcn_kernel, config.tcn_dropout)
        self.dim = config.tcn_channels[-1]
        self.guide_dim: int | None = self.backbone.guide_dim
        self.graphs: VideoGraphs | None = None
        self.pixel_statistics = config.pixel_statistics
        for name, values in (("mean", config.mean), ("std", config.std)):
            tensor = torch.tensor(values).view(3, 1, 1)
            if config.pixel_statistics:
                tensor = tensor.repeat(1, config.image_size, config.image_size)
            self.register_buffer(name, tensor, persistent=config.pixel_statistics)

    @torch.no_grad()
    def fit_pixel_statistics(self, videos: Iterable[Tensor], mirrored: bool = False) -> None:
        """Take each position's mean and deviation from training videos, for `vision.pixel_statistics`.

        The deviation is raised by 0.025 (a fortieth of the range from black to white), so that a still background
        is not blown up to noise.

        Args:
            videos: `[T, 3, S, S]` uint8, one at a time.
            mirrored: count each frame's mirror image too, as training that flips frames will show it.
        """
        found = moments(video.to(self.mean.device).double() / 255 for video in videos)
        if found is not None:
            mean, squares = ((moment + moment.flip(-1)) / 2 for moment in found) if mirrored else found
            self.mean.copy_(mean)
            self.std.copy_((squares - mean.square()).clamp_min(0).sqrt() + 0.025)

    def fold(self) -> None:
        """Compute once, for inference, what does not depend on the input.

        Those are the constants of the backbone, and the normalisation of uint8 frames folded into the patch embedding
        (not where each position has its own). The network over time folds its weight norm by itself. Undone by
        training mode, and by loading weights.
        """
        self.eval()
        fix_constants(self.backbone)
        if not self.pixel_statistics:
            self.backbone.fold_pixels(self.mean, self.std)

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """Bring uint8 pixels to the backbone's mean and deviation; floating ones are taken as they are.

        Raises:
            UserError: they are neither.
        """
        dtype = next(self.backbone.parameters()).dtype
        if pixel_values.is_floating_point():
            return pixel_values.to(dtype)
        if pixel_values.dtype != torch.uint8:
            raise UserError(f"the frames are {pixel_values.dtype}: give uint8 pixels, or float already normalised.")
        return normalised(pixel_values, self.mean, self.std).to(dtype)

    def forward(
        self, pixel_values: Tensor, guide: Tensor | None, return_kept: bool = False
    ) -> tuple[Tensor, list[KeptTokens]]:
        """Encode videos.

        Args:
            pixel_values: `[V, T, 3, S, S]`, uint8 or normalised float; or what `stem` made of them.
            guide: `[V, G]`, one for all frames of a video; None where `guide_dim` is None.
            return_kept: whether to tell what each compressing block kept.

        Returns:
            `[V, dim]`, and what each compressing block kept (nothing where it was not asked for).

        Raises:
            UserError: the frames have another shape or dtype than the model reads, or they are the output of a stem
                that learns.
        """
        self._check(pixel_values)
        if self.graphs is not None and self.training and torch.is_grad_enabled() and not return_kept:
            features = self.graphs(pixel_values, guide)
            if features is not None:
                return features, []
        return self.encode(pixel_values, guide, return_kept)

    def _check(self, pixel_values: Tensor) -> None:
        size, shape = self.image_size, tuple(pixel_values.shape)
        if len(shape) != 5 or not shape[1] or shape[2:] not in ((3, size, size), self.stem_shape):
            raise UserError(
                f"pixel_values is {list(shape)}: this model reads [videos, frames, 3, {size}, {size}], of at least one "
                f"frame, or the output of its stem, [videos, frames, {', '.join(map(str, self.stem_shape))}]."
            )
        if shape[2:] != self.stem_shape:
            return
        if not pixel_values.is_floating_point():
            raise UserError(f"pixel_values has the shape of the stem's output and is {pixel_values.dtype}: give float.")
        if torch.is_grad_enabled() and not self.backbone.stem_frozen:
            raise UserError(
                "pixel_values is the output of a stem that learns: give frames, freeze it (vision.freeze=stem), or use "
                "torch.no_grad()."
            )

    def stem(self, pixel_values: Tensor) -> Tensor:
        """Compute what depends on frames alone, `[V, T, H, W, C]` of `[V, T, 3, S, S]`, up to the first compression.

        While the stem's weights stay, `forward` takes it in place of the frames.

        Raises:
            UserError: as `forward`.
        """
        self._check(pixel_values)
        return self.backbone.stem(pixel_values.flatten(0, 1), self.normalize).unflatten(0, pixel_values.shape[:2])

    def encode(
        self, pixel_values: Tensor, guide: Tensor | None, return_kept: bool = False
    ) -> tuple[Tensor, list[KeptTokens]]:
        """As `forward`, of arguments that are as they should be and never by a graph."""
        videos, frames = pixel_values.shape[:2]
        if guide is not None:
            guide = guide.repeat_interleave(frames, 0)
        x = pixel_values.flatten(0, 1)
        kept: list[KeptTokens] = []
        if x.shape[1:] == self.stem_shape:
            features = self.backbone.guided(x, guide, kept if return_kept else None)
        elif return_kept:
            features, kept = self.backbone(x, guide, return_kept=True, prepare=self.normalize)
        else:
            features = self.backbone(x, guide, prepare=self.normalize)
        return self.tcn(features.view(videos, frames, -1).transpose(1, 2), last=True), kept


def check_vision(config: VisionConfig) -> None:
    """Build the backbone without memory or weights, to find out early whether it can be built.

    And once more with its weights, where these come from a file.

    Raises:
        UserError: sizes or the schedule do not fit one another, or the file is not there or holds others, in one
            sentence.
    """
    if config.backbone != "none":
        with torch.device("meta"):
            _build_backbone(config, weights=False)
        if isinstance(config.pretrained, str):
            _build_backbone(config, weights=True)


def _build_backbone(config: VisionConfig, weights: bool) -> VSCSwin:
    """Build the backbone that a configuration names; without its weights where a checkpoint's follow."""
    if config.schedule is None and config.compression:
        raise UserError(
            f"vision.schedule is null, so nothing compresses: leave out vision.{next(iter(config.compression))}."
        )
    if config.backbone == "small":
        if config.pretrained:
            raise UserError("vision.backbone 'small' has no pretrained weights: set vision.pretrained=false.")
        return VSCSwin.small(
            config.schedule,
            img_size=config.image_size,
            drop_path_rate=config.drop_path,
            compression=config.compression,
            recompute=config.recompute,
            **config.options,
        )
    return VSCSwin.from_timm(
        config.backbone,
        pretrained=config.pretrained if weights else False,
        schedule=config.schedule,
        img_size=config.image_size,
        drop_path_rate=config.drop_path,
        compression=config.compression,
        recompute=config.recompute,
    )
