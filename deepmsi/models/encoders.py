"""Text and audio encoders: what the configuration names, as a module with `.dim` and its processor.

A module takes the tensors of its processor by keyword and returns one vector per utterance, `[U, dim]`.
Padding never changes a row's vector. Encoders of transformers are loaded by hub name or from a local folder;
nothing stored beside the weights is ever executed.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from deepmsi.errors import UserError
from deepmsi.models.config import OFFLINE_AUDIO, OFFLINE_TEXT, OWN_ENCODERS, AudioConfig, TextConfig
from deepmsi.models.finetuned import read_notes
from deepmsi.models.offline import (
    HashingTextEncoder,
    HashingTokenizer,
    LogMelEncoder,
    WaveformProcessor,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TextProcessor = Callable[[Sequence[str]], dict[str, Tensor]]
AudioProcessor = Callable[[Sequence[np.ndarray]], dict[str, Tensor]]

LONGEST_TEXT = 512
"""Tokens that a text is cut to where neither the configuration nor the tokenizer says fewer."""

UNUSED = ("pooler", "masked_spec_embed")
"""Parts of encoders that no utterance vector depends on: files without them are complete."""


class Utterance(Protocol):
    """What `context_strings` reads of a row."""

    @property
    def text(self) -> str | None: ...
    @property
    def speaker(self) -> str | None: ...
    @property
    def dialogue(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...


def context_strings(rows: Sequence[Utterance], context: int) -> list[str | None]:
    """Join each utterance with those before it in its dialogue: the encoder input of `text.context = n`.

    Each utterance becomes a line `speaker: text`, in which line breaks are spaces; the utterance itself is
    the last line. The order inside a dialogue is that of the rows, dialogues are told apart by (split, dialogue), and
    rows without text are passed over. Only earlier utterances are read, and no labels.

    Args:
        rows: all rows of a manifest, in its order.
        context: number of previous utterances, n; 0 returns the texts unchanged.

    Returns:
        One string per row; None where the row has no text.
    """
    if context == 0:
        return [row.text for row in rows]
    before: dict[tuple[str | None, str], list[str]] = {}
    joined: list[str | None] = []
    for row in rows:
        if row.text is None:
            joined.append(None)
            continue
        said = f"{row.speaker}: {row.text}" if row.speaker else row.text
        line = " ".join(said.splitlines())
        history = before.setdefault((row.split, row.dialogue), []) if row.dialogue is not None else []
        joined.append("\n".join([*history[-context:], line]))
        history.append(line)
    return joined


class TokenizerProcessor:
    """Turn texts into padded token ids with a tokenizer of transformers.

    Args:
        tokenizer: the tokenizer; padding goes to the right.
        max_length: longer texts are cut to so many tokens.
        keep_end: cut the start instead of the end, so that context goes before the utterance itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, keep_end: bool) -> None:
        tokenizer.padding_side = "right"
        tokenizer.truncation_side = "left" if keep_end else "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.keep_end = keep_end

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both `[U, L]` int64.

        The mask is 0 where padded and 1 for a token; the tokens of the utterance itself are 2 where context stands
        before it, so that the mean over them is the utterance's and not the dialogue's.
        """
        texts = list(texts)
        encoded = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
            return_offsets_mapping=self.keep_end and self.tokenizer.is_fast,
        )
        mask = encoded["attention_mask"]
        if "offset_mapping" in encoded:
            begin = torch.tensor([[text.rfind("\n") + 1] for text in texts])
            first, last = encoded["offset_mapping"].unbind(-1)
            mask = mask + ((mask > 0) & (begin > 0) & (first >= begin) & (last > first)).long()
        return {"input_ids": encoded["input_ids"], "attention_mask": mask}

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


class NormalizedWaveformProcessor(WaveformProcessor):
    """Pad waveforms, and bring each row's own samples to zero mean and unit variance (wav2vec 2.0)."""

    def __call__(self, waveforms: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Return `input_values [U, S]` float32, zero where padded, and `audio_attention_mask [U, S]` bool."""
        batch = super().__call__(waveforms)
        values, mask = batch["input_values"], batch["audio_attention_mask"]
        count = mask.sum(1, keepdim=True).clamp_min(1)
        centred = torch.where(mask, values - values.sum(1, keepdim=True) / count, 0.0)
        variance = centred.square().sum(1, keepdim=True) / count
        return {"input_values": centred / (variance + 1e-7).sqrt(), "audio_attention_mask": mask}


class PretrainedEncoder(nn.Module):
    """An encoder of transformers that stays frozen, or is trained with the model.

    A frozen one is always in eval mode and records no graph. In a trained one, parameters that cannot
    influence the vector (a pooler, the mask embedding of SpecAugment) are switched off, so that every
    trainable parameter gets a gradient in every step.
    """

    def __init__(self, model: PreTrainedModel, finetune: bool) -> None:
        super().__init__()
        self.model = model
        self.dim: int = model.config.hidden_size
        self.finetune = finetune
        self.requires_grad_(finetune)
        self.train(self.training)

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """Set training mode, except that a frozen encoder stays in eval mode."""
        return super().train(mode and self.finetune)

    def encode(self, **inputs: Tensor) -> Tensor:
        """Return `[U, dim]` for the processor's tensors."""
        raise NotImplementedError

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return `[U, dim]` for the processor's tensors, without a graph where frozen."""
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            return self.encode(**inputs)

    def switch_off_unused(self, **sample: Tensor) -> None:
        """Freeze every parameter that a backward pass over `sample` does not reach."""
        training = self.training
        self.eval()  # no dropout, hence no numbers drawn from torch's generator
        with torch.enable_grad():
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(self(**sample).sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        self.train(training)


class PretrainedTextEncoder(PretrainedEncoder):
    """BERT-family encoder: the mean over valid tokens, or the first token."""

    def __init__(self, model: PreTrainedModel, finetune: bool, pooling: str) -> None:
        super().__init__(model, finetune)
        self.pooling = pooling
        if finetune:
            ids = torch.zeros(1, 2, dtype=torch.long)
            self.switch_off_unused(input_ids=ids, attention_mask=torch.ones_like(ids))

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Encode `input_ids [U, L]` int64 with `attention_mask [U, L]` to `[U, dim]`.

        Nonzero is a token; where a row has tokens of 2 or more, the mean is over those (`TokenizerProcessor`).
        """
        given = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        valid = (given > 0).long()
        own = given > 1
        # A row without a token would be a softmax over nothing: it reads its first one, and is not pooled.
        first = torch.arange(valid.shape[1], device=valid.device) == 0
        read = torch.where(first & (valid.sum(1, keepdim=True) == 0), 1, valid)
        hidden = self.model(input_ids=input_ids, attention_mask=read).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        return _masked_mean(hidden, torch.where(own.any(1, keepdim=True), own, valid.bool()))


class PretrainedAudioEncoder(PretrainedEncoder):
    """wav2vec 2.0-family encoder: the mean over the time steps that stand for the row's own samples.

    Models whose first layer is a group norm over time (wav2vec2-base among them) see their padding, mask or
    not: there the rows run in groups of equal length. That reads the lengths on the host.
    """

    # Checked to be blind to masked padding; another family runs by length, which is always right.
    MASKABLE = ("wav2vec2", "hubert", "wavlm")

    def __init__(self, model: PreTrainedModel, finetune: bool) -> None:
        super().__init__(model, finetune)
        config = model.config
        self.by_length = config.feat_extract_norm != "layer" or config.model_type not in self.MASKABLE
        samples = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        self.shortest = samples
        if finetune:
            self.switch_off_unused(input_values=torch.zeros(1, samples))

    def train(self, mode: bool = True) -> PretrainedAudioEncoder:
        """Set training mode, except of the module that chooses which layers to leave out: none is left out."""
        super().train(mode)
        # In that mode transformers 5.0 draws a number for every layer all the same, and reads it on the host.
        cast(Any, self.model).encoder.training = False
        return self

    def encode(self, input_values: Tensor, audio_attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Encode `input_values [U, S]` with `audio_attention_mask [U, S]` (nonzero = sample) to `[U, dim]`.

        A row shorter than the receptive field of one time step is extended by zeros to one.
        """
        missing = max(0, self.shortest - input_values.shape[1])
        values = nn.functional.pad(input_values, (0, missing))
        if audio_attention_mask is None:
            return self.model(values).last_hidden_state.float().mean(1)
        lengths = audio_attention_mask.sum(1).clamp_min(self.shortest)
        inside = nn.functional.pad(audio_attention_mask.bool(), (0, missing))
        values = torch.where(inside, values, 0.0)
        if self.by_length:
            return self._encode_by_length(values, lengths.tolist())
        mask = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
        hidden = self.model(values, attention_mask=mask.long()).last_hidden_state
        steps = cast(Any, self.model)._get_feat_extract_output_lengths(lengths)
        return _masked_mean(hidden, torch.arange(hidden.shape[1], device=hidden.device) < steps[:, None])

    def _encode_by_length(self, values: Tensor, lengths: list[int]) -> Tensor:
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        pooled = []
        for length in sorted(set(lengths)):
            rows = [row for row in order if lengths[row] == length]
            pooled.append(self.model(values[rows, :length]).last_hidden_state.float().mean(1))
        back = torch.tensor(order, device=values.device).argsort()
        return torch.cat(pooled)[back]


def _masked_mean(hidden: Tensor, valid: Tensor) -> Tensor:
    """Mean of `hidden [U, L, C]` over `valid [U, L]`, in float32; zeros for a row without any."""
    total = torch.where(valid[..., None], hidden.float(), 0.0).sum(1)
    return total / valid.sum(1, keepdim=True).clamp_min(1)


def build_text_encoder(config: TextConfig, saved: Path | None = None) -> tuple[nn.Module, TextProcessor]:
    """Build the text encoder that a configuration names.

    Args:
        config: the text section; `encoder` is "hashing", a hub name or a local folder.
        saved: folder that `save_encoder` wrote: a trained encoder is rebuilt from there, without its weights
            and without the hub.

    Returns:
        The module (`.dim`; `input_ids`, `attention_mask` to `[U, dim]`) and the processor of `list[str]`.

    Raises:
        UserError: the hub cannot be reached, or the name or folder is no text encoder.
    """
    if config.encoder == OFFLINE_TEXT:
        module, processor = _build_offline(
            HashingTextEncoder,
            HashingTokenizer,
            "text",
            config.options,
            {"dim": config.dim},
            {"max_length": config.max_length, "context": config.context > 0},
        )
        return module, processor
    from transformers import AutoTokenizer

    source = _source(config.encoder, "text.encoder") if saved is None or not config.finetune else str(saved)
    model = _load_model(source, "text.encoder", weights=source != str(saved))
    with _sentence(source, "text.encoder", "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=_is_local(source))
    length = config.max_length or min(LONGEST_TEXT, tokenizer.model_max_length)
    positions = getattr(model.config, "max_position_embeddings", None)
    if config.max_length and positions and config.max_length > positions:
        raise UserError(f"text.max_length is {config.max_length}, but {config.encoder} reads {positions} tokens.")
    _check_dim(config.dim, model, config.encoder, "text")
    processor = TokenizerProcessor(tokenizer, min(length, positions or length), keep_end=config.context > 0)
    return PretrainedTextEncoder(model, config.finetune, config.pooling), processor


def build_audio_encoder(config: AudioConfig, saved: Path | None = None) -> tuple[nn.Module, AudioProcessor]:
    """Build the audio encoder that a configuration names.

    Args:
        config: the audio section; `encoder` is "logmel", a hub name or a local folder.
        saved: as for `build_text_encoder`.

    Returns:
        The module (`.dim`; `input_values`, `audio_attention_mask` to `[U, dim]`) and the processor of
        `list[np.ndarray]`, mono float32 at `config.sample_rate` Hz.

    Raises:
        UserError: the hub cannot be reached, or the name or folder is no wav2vec 2.0-family encoder.
    """
    limits: dict[str, Any] = {"sample_rate": config.sample_rate, "max_seconds": config.max_seconds}
    if config.encoder == OFFLINE_AUDIO:
        return _build_offline(
            LogMelEncoder,
            WaveformProcessor,
            "audio",
            config.options,
            {"dim": config.dim, "sample_rate": config.sample_rate},
            limits,
        )
    from transformers import AutoFeatureExtractor

    source = _source(config.encoder, "audio.encoder") if saved is None or not config.finetune else str(saved)
    model = _load_model(source, "audio.encoder", weights=source != str(saved))
    with _sentence(source, "audio.encoder", "feature extractor"):
        extractor = AutoFeatureExtractor.from_pretrained(source, local_files_only=_is_local(source))
    if not hasattr(model, "_get_feat_extract_output_lengths") or not hasattr(extractor, "do_normalize"):
        raise UserError(f"audio.encoder {config.encoder} is no wav2vec 2.0-family model that reads waveforms.")
    if extractor.sampling_rate != config.sample_rate:
        raise UserError(
            f"audio.encoder {config.encoder} reads {extractor.sampling_rate} Hz: "
            f"audio.sample_rate is {config.sample_rate}."
        )
    _check_dim(config.dim, model, config.encoder, "audio")
    processor = (NormalizedWaveformProcessor if extractor.do_normalize else WaveformProcessor)(**limits)
    return PretrainedAudioEncoder(model, config.finetune), processor


def check_encoder(modality: str, name: str) -> None:
    """Read an encoder's configuration, to find out early whether it can be had.

    Args:
        modality: "text" or "audio".
        name: what a section's `encoder` may be.

    Raises:
        UserError: it cannot, or it is an encoder-decoder.
    """
    if name not in OWN_ENCODERS:
        key = f"{modality}.encoder"
        _read_config(_source(name, key), key)


def build_feature_encoder(
    modality: str, name: str, sample_rate: int = 16000
) -> tuple[nn.Module, Callable[[Any], dict[str, Tensor]]]:
    """Build the frozen encoder that utterance vectors were prepared with, in eval mode.

    One that was fine-tuned here reads (pooling, length, context) as it was trained to.

    Args:
        modality: "text" or "audio".
        name: a hub name or a local folder.
        sample_rate: Hz of the waveforms, for audio.

    Returns:
        As `build_text_encoder` and `build_audio_encoder`.

    Raises:
        UserError: the encoder cannot be had.
    """
    notes = read_notes(name)
    if notes is not None and notes.modality != modality:
        raise UserError(f"{name} is an encoder of {notes.modality}, not of {modality}.")
    reads = notes.reads if notes is not None else {}
    if modality == "text":
        text, tokenizer = build_text_encoder(TextConfig(encoder=name, finetune=False, **reads))
        return text.eval(), tokenizer
    config = AudioConfig(encoder=name, sample_rate=sample_rate, finetune=False, **reads)
    audio, padding = build_audio_encoder(config)
    return audio.eval(), padding


def heard_seconds(name: str) -> float:
    """How much of a sound the audio encoder of `build_feature_encoder` hears, in seconds from its start."""
    notes = read_notes(name)
    return AudioConfig(encoder=name, **(notes.reads if notes is not None else {})).max_seconds


def save_encoder(module: nn.Module, processor: Any, folder: Path, weights: bool = False) -> None:
    """Write what `build_*_encoder(..., saved=folder)` rebuilds a trained encoder from; its weights on request.

    With the weights the folder is one of transformers, to be named as any other.

    Offline encoders need nothing but the configuration, frozen ones stay where their name points: nothing is
    written for either.
    """
    if not isinstance(module, PretrainedEncoder) or not module.finetune:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (module.model if weights else module.model.config).save_pretrained(folder)
    if isinstance(processor, TokenizerProcessor):
        processor.save(folder)
    else:
        from transformers import Wav2Vec2FeatureExtractor

        Wav2Vec2FeatureExtractor(
            sampling_rate=processor.sample_rate,
            do_normalize=isinstance(processor, NormalizedWaveformProcessor),
        ).save_pretrained(folder)


def _build_offline(
    encoder: type[nn.Module],
    processor: type,
    section: str,
    options: dict[str, Any],
    encoder_sizes: dict[str, Any],
    processor_sizes: dict[str, Any],
) -> tuple[nn.Module, Any]:
    """Give each option to the constructors that know it; what the section's own keys say goes first."""
    known = [set(inspect.signature(cls).parameters) for cls in (encoder, processor)]
    unknown = set(options) - (known[0] | known[1]) | set(options) & (set(encoder_sizes) | set(processor_sizes))
    if unknown:
        free = sorted((known[0] | known[1]) - set(encoder_sizes) - set(processor_sizes))
        raise UserError(
            f"{section}.options: {', '.join(map(repr, sorted(unknown)))} cannot stand there: "
            f"the encoder takes {', '.join(free)}."
        )
    built = []
    for cls, names, sizes in zip((encoder, processor), known, (encoder_sizes, processor_sizes), strict=True):
        chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        chosen = {key: value for key, value in chosen.items() if key in names}
        try:
            built.append(cls(**chosen, **{key: value for key, value in sizes.items() if value is not None}))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{section}.options: {(str(error) or type(error).__name__).splitlines()[0]}.") from None
    return built[0], built[1]


def _is_local(source: str) -> bool:
    return Path(source).is_dir() or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _source(name: str, key: str) -> str:
    """A folder as an absolute path, a hub name as it is."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.is_file():
        raise UserError(f"{key}: there is no folder {name}.")
    return name


@contextmanager
def _sentence(source: str, key: str, part: str) -> Iterator[None]:
    """Turn the many ways in which loading fails into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Hub clients, tokenizers and weight readers share no base class, and all of it comes from user input.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if Path(source).is_dir():
            raise UserError(f"{key}: the folder {source} has no usable {part} ({reason:.200})") from None
        raise UserError(
            f"{key}: {source!r} could be had neither from the model hub nor from the local cache; "
            f"give a local folder, or 'hashing' / 'logmel', which need no download ({reason:.200})"
        ) from None


def _load_model(source: str, key: str, weights: bool) -> PreTrainedModel:
    """Load an encoder with its weights, or only its architecture where they follow from a checkpoint."""
    from transformers import AutoModel

    config = _read_config(source, key)
    _settle(config)
    with _sentence(source, key, "model"):
        if not weights:
            return AutoModel.from_config(config)
        # Pickled weights are read by torch's restricted reader at most: it runs no code.
        model, report = AutoModel.from_pretrained(
            source,
            config=config,
            local_files_only=_is_local(source),
            weights_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    unset = [name for name in report["missing_keys"] if not any(part in name for part in UNUSED)]
    if unset:
        raise UserError(
            f"{key}: the weights of {source} lack {len(unset)} of the model's tensors ({min(unset)}): "
            "they belong to another architecture than its configuration names."
        )
    return model


def _read_config(source: str, key: str) -> PretrainedConfig:
    from transformers import AutoConfig

    with _sentence(source, key, "configuration"):
        config = AutoConfig.from_pretrained(source, local_files_only=_is_local(source))
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{key}: {source} is an encoder-decoder: give an encoder such as BERT or wav2vec 2.0.")
    return config


def _settle(config: PretrainedConfig) -> None:
    """Switch off what breaks repeatable training: layers left out at random, masks from numpy's generator."""
    for name, value in (("layerdrop", 0.0), ("apply_spec_augment", False), ("add_adapter", False)):
        if hasattr(config, name):
            setattr(config, name, value)


def _check_dim(dim: int | None, model: PreTrainedModel, name: str, section: str) -> None:
    if dim is not None and dim != model.config.hidden_size:
        raise UserError(
            f"{section}.dim is {dim}, but {name} gives {model.config.hidden_size}: leave {section}.dim out."
        )
