"""DeepMSI: text and audio guide the compression of the frames; three modalities meet in a late fusion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from deepmsi.errors import UserError
from deepmsi.models import checkpoint
from deepmsi.models.config import MODALITIES, DeepMSIConfig, Precision, building
from deepmsi.models.encoders import build_audio_encoder, build_text_encoder
from deepmsi.models.fusion import Classifier, ProjectionHead, SemanticGuide
from deepmsi.models.losses import UNKNOWN, classification_loss
from deepmsi.models.vision import VideoBranch
from deepmsi.nn import TCN, CrossModalContrastiveLoss, KeptTokens, VSCSwin

if TYPE_CHECKING:
    from deepmsi.models.predict import Prediction

# What an encoder reads: its content and the mask of that, by their arguments.
READ = {"text": ("input_ids", "attention_mask"), "audio": ("input_values", "audio_attention_mask")}


class _Said(NamedTuple):
    """What a call passes of the text or the sound: utterance vectors, or content for the encoder with its mask."""

    features: Tensor | None
    content: Tensor | None
    mask: Tensor | None

    def given(self) -> Tensor | None:
        return self.content if self.features is None else self.features


class DeepMSIOutput(NamedTuple):
    """What a forward pass returns; fields that were not asked for or do not exist are None.

    Attributes:
        loss: scalar, `β · cross_entropy + α · contrastive`; with labels only.
        logits: `[U, K]`.
        cross_entropy, contrastive: scalars, the two parts before weighting.
        video, text, audio: projections `[U, P]` of the configured modalities.
        kept: what each compressing block kept of the frames `[V · T]`, where `return_kept` asked for it.
    """

    loss: Tensor | None
    logits: Tensor
    cross_entropy: Tensor | None = None
    contrastive: Tensor | None = None
    video: Tensor | None = None
    text: Tensor | None = None
    audio: Tensor | None = None
    kept: list[KeptTokens] | None = None


class DeepMSI(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="deepmsi",
    tags=["emotion-recognition", "multimodal"],
):
    """Recognise emotions from the frames, the words and the voice of an utterance.

    A modality that the configuration leaves out ("none") has no parameters; one that a row lacks is replaced by a
    learned vector. Works for every subset of the modalities and for a batch of one.

    Args:
        config: the configuration, see `DeepMSIConfig`.
        saved: folder of a checkpoint that is about to be loaded: nothing is downloaded that it holds.

    Raises:
        UserError: an encoder or backbone that the configuration names cannot be had, or sizes that it gives cannot be.
    """

    class_weights: Tensor | None

    @building("the model")
    def __init__(self, config: DeepMSIConfig, *, saved: Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.modalities = config.modalities
        self.text_encoder: nn.Module | None = None
        self.audio_encoder: nn.Module | None = None
        self.text_processor = self.audio_processor = None
        self.video: VideoBranch | None = None
        fusion = config.fusion

        dims: dict[str, int] = {}
        if "video" in self.modalities:
            self.video = VideoBranch(config.vision, weights=saved is None)
            dims["video"] = self.video.dim
        if config.text.encoded:
            self.text_encoder, self.text_processor = build_text_encoder(config.text, saved and saved / "text_encoder")
        if config.audio.encoded:
            self.audio_encoder, self.audio_processor = build_audio_encoder(
                config.audio, saved and saved / "audio_encoder"
            )
        for name, section, encoder in (
            ("text", config.text, self.text_encoder),
            ("audio", config.audio, self.audio_encoder),
        ):
            if section.present:
                dims[name] = int(section.dim if encoder is None else encoder.dim)  # type: ignore[arg-type]

        self.missing = nn.ParameterDict({name: nn.Parameter(torch.zeros(dim)) for name, dim in dims.items()})
        self.projections = nn.ModuleDict(
            {name: ProjectionHead(dim, fusion.projection, fusion.dropout) for name, dim in dims.items()}
        )
        semantic = sum(dim for name, dim in dims.items() if name != "video")
        self.guide: SemanticGuide | None = None
        if self.video is not None and self.video.guide_dim is not None and semantic:
            self.guide = SemanticGuide(semantic, fusion.guide_hidden, self.video.guide_dim, fusion.dropout)
        self.classifier = Classifier(fusion.projection * len(dims), fusion.hidden, config.num_labels, fusion.dropout)
        self.contrast = CrossModalContrastiveLoss(
            config.loss.temperature, config.loss.include_matched, config.loss.normalize
        )
        weights = config.loss.class_weights
        if weights == "balanced":
            raise UserError(
                "loss.class_weights is 'balanced': give the weights themselves, or train with a recipe, "
                "which takes them from the training part's counts."
            )
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)
        for vector in self.missing.values():
            nn.init.normal_(vector, std=0.02)

    def train(self, mode: bool = True) -> DeepMSI:
        """Set training mode. Only in training are the batches of several processes joined by the loss."""
        super().train(mode)
        # Processes may evaluate different numbers of batches: a gather there would wait for ever.
        self.contrast.gather = mode
        return self

    def forward(
        self,
        pixel_values: Tensor | None = None,
        text_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
        modality_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_kept: bool = False,
    ) -> DeepMSIOutput:
        """Classify a batch of U utterances; compute the loss (Eq. 5 to 7) where labels are given.

        Nothing here waits for the device where the schedule has static shapes, except that wav2vec 2.0 models
        with a group norm read the lengths of their rows.

        Args:
            pixel_values: `[V, T, 3, S, S]` uint8, or float already normalised: the videos that are present,
                in the order of their rows. Or what `model.video.stem` made of them, where the stem does not learn.
            text_features: `[U, Dt]` utterance vectors, in place of `input_ids`.
            audio_features: `[U, Da]` utterance vectors, in place of `input_values`.
            input_ids, attention_mask: `[U, L]` int64, for the text encoder.
            input_values, audio_attention_mask: `[U, S]` float and bool, for the audio encoder.
            modality_mask: `[U, 3]` bool, true where video, text, audio is present; None: what is passed is
                present in every row. What an absent row holds has no influence.
            labels: `[U]` int64; a loss takes an utterance or more. -100 for an utterance that no loss counts.
            return_kept: whether to return which tokens of each frame were kept, too.

        Returns:
            `DeepMSIOutput`.

        Raises:
            UserError: an input has a wrong shape or dtype, or belongs to a modality or encoder that is not configured;
                or labels are given and U is 0.
        """
        said = {
            "text": _Said(text_features, input_ids, attention_mask),
            "audio": _Said(audio_features, input_values, audio_attention_mask),
        }
        given = {"video": pixel_values} | {name: one.given() for name, one in said.items()}
        self._check_inputs(given, said)
        rows = self._rows(given, modality_mask, labels)
        if pixel_values is not None and pixel_values.shape[0] == 0:
            given["video"] = pixel_values = None
        present = {name: self._present(name, given[name], modality_mask, rows) for name in self.modalities}

        features = {name: self._semantic(name, said[name], present[name]) for name in self.modalities if name in said}
        kept: list[KeptTokens] = []
        if "video" in self.modalities:
            guide = self.guide(list(features.values())) if self.guide and pixel_values is not None else None
            features["video"], kept = self._video(pixel_values, guide, present["video"], rows, return_kept)
        logits, projected = self.classify(features)
        if self.training and torch.is_grad_enabled():
            logits = logits + self._idle(logits.new_zeros(()), pixel_values, said, present)
        shown = kept if return_kept else None
        if labels is None:
            return DeepMSIOutput(None, logits, kept=shown, **projected)
        cross_entropy = self._cross_entropy(logits, labels)
        contrastive = self._contrastive(projected, present, labels)
        loss = self.config.loss.cross_entropy * cross_entropy + self.config.loss.contrastive * contrastive
        return DeepMSIOutput(loss, logits, cross_entropy, contrastive, kept=shown, **projected)

    def semantics(
        self,
        rows: int,
        text_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
        modality_mask: Tensor | None = None,
    ) -> tuple[int, dict[str, Tensor], Tensor | None]:
        """Compute what guides the frames, from text and sound alone: the first part of `forward`.

        Args:
            rows: U where neither is passed.
            text_features, audio_features, input_ids, attention_mask, input_values, audio_attention_mask,
                modality_mask: as in `forward`; the mask's column of the video is not read.

        Returns:
            U, the text and audio features `[U, D]` by name, and the guide `[U, G]` (None where nothing compresses).

        Raises:
            UserError: as `forward`.
        """
        said = {
            "text": _Said(text_features, input_ids, attention_mask),
            "audio": _Said(audio_features, input_values, audio_attention_mask),
        }
        given = {name: one.given() for name, one in said.items()}
        self._check_inputs(given, said)
        if modality_mask is not None or any(tensor is not None for tensor in given.values()):
            rows = self._rows(given, modality_mask, None)
        features = {
            name: self._semantic(name, said[name], self._present(name, given[name], modality_mask, rows))
            for name in self.modalities
            if name in said
        }
        guide = None
        if self.video is not None and self.video.guide_dim is not None:
            guide = self.guide(list(features.values())) if self.guide else self._no_guide(rows)
        return rows, features, guide

    def classify(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Join the features `[U, D]` of all configured modalities: the logits `[U, K]`, and the projections."""
        projected = {name: self.projections[name](features[name]) for name in self.modalities}
        return self.classifier(list(projected.values())), projected

    def _no_guide(self, videos: int) -> Tensor:
        """The guide where there is neither text nor sound: the direction of m = λ g + (1 - λ) v is then that of v."""
        assert self.video is not None
        assert self.video.guide_dim is not None
        return self.missing["video"].new_zeros(videos, self.video.guide_dim)

    def _check_inputs(self, given: dict[str, Tensor | None], said: dict[str, _Said]) -> None:
        for name, tensor in given.items():
            if tensor is not None and name not in self.modalities:
                raise UserError(
                    f"{name} was passed to a model that is configured without it: "
                    f"it reads {', '.join(self.modalities)}."
                )
        for name, (features, content, _) in said.items():
            argument = READ[name][0]
            if features is not None and content is not None:
                raise UserError(f"{name}_features and {argument} were both passed: give one of them.")
            if content is not None and getattr(self, f"{name}_encoder") is None:
                raise UserError(
                    f"{argument} needs an encoder, and this model's {name}.encoder is 'features': pass {name}_features."
                )
            if features is not None and (features.dim() != 2 or features.shape[1] != self.missing[name].shape[0]):
                raise UserError(
                    f"{name}_features is {list(features.shape)}: this model reads "
                    f"[utterances, {self.missing[name].shape[0]}]."
                )
            if content is not None and content.dim() != 2:
                raise UserError(f"{argument} is {list(content.shape)}: give [utterances, longest], a row for each.")

    def _rows(self, given: dict[str, Tensor | None], modality_mask: Tensor | None, labels: Tensor | None) -> int:
        """U, from whatever tells it; everything that tells it has to agree."""
        sizes = {name: tensor.shape[0] for name, tensor in given.items() if tensor is not None}
        if modality_mask is not None:
            if modality_mask.dim() != 2 or modality_mask.shape[1] != len(MODALITIES):
                raise UserError(f"modality_mask is {list(modality_mask.shape)}: give [utterances, 3] booleans.")
            sizes.pop("video", None)
            sizes["modality_mask"] = modality_mask.shape[0]
        elif not sizes:
            raise UserError(f"nothing was passed: this model reads {', '.join(self.modalities)}.")
        if labels is not None:
            if labels.dim() != 1 or labels.dtype != torch.int64:
                raise UserError(f"labels is {list(labels.shape)} {labels.dtype}: give [utterances] int64.")
            sizes["labels"] = labels.shape[0]
        rows = next(iter(sizes.values()))
        if any(size != rows for size in sizes.values()):
            told = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise UserError(f"the inputs disagree about the number of utterances: {told}.")
        return rows

    def _present(self, name: str, tensor: Tensor | None, modality_mask: Tensor | None, rows: int) -> Tensor | None:
        """Which rows have a modality, of which a tensor was given or not: `[U]` bool; None: all of them."""
        device = self.classifier.output.weight.device
        if modality_mask is None:
            return None if tensor is not None else torch.zeros(rows, dtype=torch.bool, device=device)
        column = modality_mask[:, MODALITIES.index(name)].bool()
        # On the CPU the mask can be read for nothing; elsewhere the read would wait for the device.
        if column.device.type == "cpu" and not torch.compiler.is_compiling():
            count = int(column.sum())
            if tensor is None and count:
                raise UserError(f"modality_mask says that {count} rows have {name}, and no {name} was passed.")
            if name == "video" and tensor is not None and tensor.shape[0] != count:
                raise UserError(
                    f"modality_mask says that {count} rows have video, and pixel_values holds "
                    f"{tensor.shape[0]}: pass the present ones only."
                )
        return column.to(device) if tensor is not None else torch.zeros_like(column, device=device)

    def _semantic(self, name: str, said: _Said, present: Tensor | None) -> Tensor:
        """Utterance vectors of text or audio `[U, D]`, with the learned vector in absent rows."""
        missing = self.missing[name]
        features, content, mask = said
        if features is None and content is not None:
            if present is not None:
                # What stands in absent rows may be anything, NaN too: it must not reach the encoder's gradients.
                content = torch.where(present[:, None], content, content.new_zeros(()))
            inputs = {key: x for key, x in zip(READ[name], (content, mask), strict=True) if x is not None}
            features = getattr(self, f"{name}_encoder")(**inputs)
        if features is None:
            assert present is not None
            return missing.expand(present.shape[0], -1)
        features = features.to(missing.dtype)
        return features if present is None else torch.where(present[:, None], features, missing)

    def _video(
        self,
        pixel_values: Tensor | None,
        guide: Tensor | None,
        present: Tensor | None,
        rows: int,
        return_kept: bool,
    ) -> tuple[Tensor, list[KeptTokens]]:
        """Video features `[U, D]`: only videos that are there run, the rest is the learned vector."""
        assert self.video is not None
        missing = self.missing["video"]
        if pixel_values is None:
            return missing.expand(rows, -1), []
        videos = pixel_values.shape[0]
        if present is not None and guide is not None:
            # The rows with a video, in order, without asking the device how many there are.
            guide = guide[torch.argsort(present.logical_not(), stable=True)[:videos]]
        if guide is None and self.video.guide_dim is not None:
            guide = self._no_guide(videos)
        features, kept = self.video(pixel_values, guide, return_kept)
        features = features.to(missing.dtype)
        if present is None:
            return features, kept
        place = (present.cumsum(0) - 1).clamp(0, videos - 1)
        return torch.where(present[:, None], features[place], missing), kept

    def _idle(
        self,
        zero: Tensor,
        pixel_values: Tensor | None,
        said: dict[str, _Said],
        present: dict[str, Tensor | None],
    ) -> Tensor:
        """Zero, plus zero times the sum of the trainable parameters that this batch does not use.

        So every parameter has a gradient in every step, and data parallelism need not search for unused ones.
        """
        parameters: list[Iterable[nn.Parameter]] = [
            [self.missing[name]] for name in self.modalities if present[name] is None
        ]
        if pixel_values is None:
            parameters += [module.parameters() for module in (self.video, self.guide) if module is not None]
        for name, one in said.items():
            encoder = getattr(self, f"{name}_encoder")
            if encoder is not None and (one.features is not None or one.content is None):
                parameters.append(encoder.parameters())
        for group in parameters:
            for parameter in group:
                if parameter.requires_grad:
                    zero = zero + 0 * parameter.sum()
        return zero

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in float32 or wider, by class weights where configured, over all processes' batch."""
        joined = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if labels.shape[0] == 0 and not joined:  # NaN would spread to every weight; a process without rows adds zero
            raise UserError("the batch holds no utterance, and a mean over none is no loss: leave it out.")
        smoothing = self.config.loss.label_smoothing
        return classification_loss(logits, labels, weights=self.class_weights, label_smoothing=smoothing, joined=joined)

    def _contrastive(self, projected: dict[str, Tensor], present: dict[str, Tensor | None], labels: Tensor) -> Tensor:
        """Mean of the pairs' losses: ½ (L(video, text) + L(video, audio)) where all three are configured."""
        pairs: list[tuple[str, Sequence[str]]] = []
        if "video" in projected and len(projected) > 1:
            pairs.append(("video", [name for name in projected if name != "video"]))
        if self.config.loss.text_audio_pair and {"text", "audio"} <= projected.keys():
            pairs.append(("text", ["audio"]))
        if not pairs or self.config.loss.contrastive == 0:
            return labels.new_zeros((), dtype=torch.float32)
        count = sum(len(others) for _, others in pairs)
        total = torch.zeros((), device=labels.device)
        known = labels != UNKNOWN
        for name, others in pairs:
            loss = self.contrast(
                projected[name],
                [projected[other] for other in others],
                labels,
                valid_a=known if (there := present[name]) is None else there & known,
                valid_b=[present[other] for other in others],
            )
            total = total + loss * (len(others) / count)
        return total

    def no_weight_decay(self) -> set[str]:
        """Return the names that weight decay is to spare beside vectors: those of its VSCSwin and TCN."""
        parts = [(path, module) for path, module in self.named_modules() if isinstance(module, (VSCSwin, TCN))]
        return {f"{path}.{name}" for path, module in parts for name in module.no_weight_decay()}

    def predict(
        self,
        clips: Sequence[str | Path | None] | str | Path,
        texts: Sequence[str | None] | str | None = None,
        timeline: float | None = None,
        batch_size: int = 8,
        progress: bool = False,
        precision: Precision = "fp32",
    ) -> list[Prediction]:
        """Predict from media files, or from texts alone; see `deepmsi.models.predict.predict`."""
        from deepmsi.models.predict import predict

        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "precision": precision}
        return predict(self, clips, texts, timeline=timeline, **options)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write a checkpoint folder; it appears whole or not at all.

        Args:
            save_directory: the folder.
            **kwargs: as `huggingface_hub.PyTorchModelHubMixin.save_pretrained` takes them.

        Raises:
            UserError: the folder cannot be written.
        """
        target = Path(save_directory)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)
        with checkpoint.staged(target) as staging:
            return super().save_pretrained(staging, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.write(self, save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> DeepMSI:
        """Load a checkpoint folder, or a repository of the model hub, in eval mode.

        Raises:
            UserError: there is no such checkpoint, or it is damaged or of another architecture.
        """
        return checkpoint.read(
            cls,
            checkpoint.locate(
                str(pretrained_model_name_or_path),
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            ),
        )
