"""Encoders that need no download: log-mel for audio, hashing for text, each with its processor.

Both start from random weights and are trained with the rest of the model. Each module has ``.dim``, the width
of its utterance vector, and takes exactly the tensors that its processor makes; the processors are what the
collator calls. Padding never changes a row's vector, and a row that is masked altogether gets a finite one.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepmsi.errors import UserError
from deepmsi.models.moments import moments

_LEVEL = 0.05
"""Root mean square of speech in [-1, 1], about; what lies below 1e-4 is no speech, and is not raised to it."""

PADDING, EMPTY, RESERVED = 0, 1, 2
"""Ids of the hashing vocabulary: padding, the sign of a text without words, and the number of such ids."""

_TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_APOSTROPHES = str.maketrans({"‘": "'", "’": "'", "\x91": "'", "\x92": "'"})


class WaveformProcessor:
    """Pads waveforms to one length: float32 arrays [n] at ``sample_rate`` Hz to ``[U, S]`` and its mask.

    Args:
        sample_rate: samples per second of every waveform; kept for those who decode the files.
        max_seconds: longer waveforms are cut there; None keeps them whole.
    """

    def __init__(self, sample_rate: int = 16_000, max_seconds: float | None = None) -> None:
        if sample_rate <= 0:
            raise UserError(f"audio.sample_rate is {sample_rate}; give samples per second, such as 16000")
        if max_seconds is not None and max_seconds <= 0:
            raise UserError(f"audio.max_seconds is {max_seconds}; give a positive number, or null for no limit")
        self.sample_rate = sample_rate
        self.max_seconds = max_seconds

    def __call__(self, waveforms: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Return ``input_values [U, S] float32`` and ``audio_attention_mask [U, S] bool``, S at least 1.

        Raises:
            UserError: a waveform has more than one axis, or holds NaN or infinity.
        """
        limit = None if self.max_seconds is None else max(1, round(self.max_seconds * self.sample_rate))
        rows = [np.asarray(waveform, dtype=np.float32)[:limit] for waveform in waveforms]
        for number, row in enumerate(rows):
            if row.ndim != 1:
                raise UserError(f"waveform {number} has shape {row.shape}; give mono sound, shape [samples]")
            if not np.isfinite(row).all():
                raise UserError(f"waveform {number} holds NaN or infinity; decode or repair that recording again")
        values = torch.zeros(len(rows), max([1, *map(len, rows)]))
        mask = torch.zeros(values.shape, dtype=torch.bool)
        for target, valid, row in zip(values, mask, rows, strict=True):
            target[: len(row)] = torch.from_numpy(row)
            valid[: len(row)] = True
        return {"input_values": values, "audio_attention_mask": mask}


def mel_filterbank(sample_rate: int, fft_size: int, mels: int, low: float = 50.0) -> Tensor:
    """Return triangular filters of equal area, spaced evenly on the mel scale: ``[fft_size // 2 + 1, mels]``.

    ``mel(f) = 2595 log10(1 + f / 700)``, f in Hz from ``low`` to half the sample rate. A filter narrower than
    the spacing of the bins takes the bin nearest to its centre, so that none is empty.
    """

    def to_mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    points = torch.linspace(to_mel(low), to_mel(sample_rate / 2), mels + 2, dtype=torch.float64)
    edges = 700.0 * (10.0 ** (points / 2595.0) - 1.0)
    bins = torch.linspace(0, sample_rate / 2, fft_size // 2 + 1, dtype=torch.float64)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    bank = torch.minimum(rising, falling).clamp_min(0)
    nearest = (bins - edges[1:-1]).abs().argmin(0)
    bank[nearest, torch.arange(mels)] = bank[nearest, torch.arange(mels)].clamp_min(1e-3)
    return (bank / bank.sum(0)).float()


class LogMel(nn.Module):
    """Log-mel spectrogram: 25 ms Hann windows every 10 ms, no parameters.

    ``y = (log(mel power + floor) + 10) / 4``: a fixed affine map that brings speech near zero mean and unit
    deviation.

    Equivalent to: ``torch.stft(center=False)``, squared, times :func:`mel_filterbank`, then the logarithm.
    """

    bank: Tensor
    window: Tensor

    def __init__(self, sample_rate: int = 16_000, mels: int = 64, floor: float = 1e-7) -> None:
        super().__init__()
        self.length = round(0.025 * sample_rate)
        self.hop = round(0.010 * sample_rate)
        self.fft_size = 1 << (self.length - 1).bit_length()
        self.mels = mels
        self.floor = floor
        window = torch.hann_window(self.length)
        self.register_buffer("bank", mel_filterbank(sample_rate, self.fft_size, mels), persistent=False)
        self.register_buffer("window", window / window.square().sum().sqrt(), persistent=False)

    def frames(self, samples: Tensor) -> Tensor:
        """Number of windows wholly inside ``samples [U]`` int64 samples; a shorter row counts as one."""
        return 1 + (samples - self.length).clamp_min(0) // self.hop

    def forward(self, waveforms: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``waveforms [U, S]`` and ``mask [U, S]`` (true = sample) to ``[U, T, mels]`` and its mask."""
        with torch.autocast(waveforms.device.type, enabled=False):
            x = torch.where(mask, waveforms.float(), 0.0)
            x = F.pad(x, (0, max(0, self.length - x.shape[1])))
            spectrum = torch.fft.rfft(x.unfold(1, self.length, self.hop) * self.window, n=self.fft_size)
            power = (spectrum.real.square() + spectrum.imag.square()) @ self.bank
            logmel = ((power + self.floor).log() + 10.0) / 4.0
        valid = torch.arange(logmel.shape[1], device=x.device) < self.frames(mask.sum(1))[:, None]
        return torch.where(valid[..., None], logmel, 0.0), valid


class _TimeBlock(nn.Module):
    """Residual block over time: LayerNorm, depthwise convolution, two pointwise layers."""

    def __init__(self, width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.expand = nn.Linear(width, 2 * width)
        self.reduce = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        inside = torch.where(valid, self.norm(x), 0.0)  # padding must look like the zeros past the end
        mixed = self.depthwise(inside.transpose(1, 2)).transpose(1, 2)
        return x + self.dropout(self.reduce(F.gelu(self.expand(mixed))))


class LogMelEncoder(nn.Module):
    """Encode speech as one vector: log-mel frames, convolutions over time, mean and deviation over time.

    The statistics of the spectrogram itself stand beside those of the learned frames: with few utterances they
    are what carries timbre and liveliness, and the learned ones add to them. What all speech has in common is taken
    out of them, band by band (:meth:`fit_statistics`). Those of the learned frames are normalised. Every utterance is
    brought to one level first, since that of the recording must not matter.

    Args:
        dim: width of the utterance vector.
        sample_rate: samples per second of the input.
        mels: mel bands.
        width: channels of the blocks over time.
        layers: number of blocks; 0 leaves the spectrogram's statistics and a linear layer.
        kernel: taps of the blocks' convolutions over time, an odd number.
        dropout: inside the blocks and on the pooled statistics.
        masks: SpecAugment in training: this many stretches of time (each up to 10% of the utterance) and of
            bands (each up to 12% of them) are set to the utterance's mean; drawn from torch's generator.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int = 256,
        *,
        sample_rate: int = 16_000,
        mels: int = 64,
        width: int = 128,
        layers: int = 2,
        kernel: int = 9,
        dropout: float = 0.1,
        masks: int = 2,
    ) -> None:
        super().__init__()
        if min(dim, sample_rate, mels, width) < 1 or kernel % 2 == 0 or not {layers, masks} <= set(range(65)):
            raise UserError(
                f"a log-mel encoder cannot be built from dim={dim}, sample_rate={sample_rate}, mels={mels}, "
                f"width={width}, layers={layers}, masks={masks}, kernel={kernel}: sizes must be positive, "
                "the kernel odd, layers and masks at most 64"
            )
        self.dim = dim
        self.masks = int(masks)
        self.logmel = LogMel(sample_rate, mels)
        self.stem = nn.Linear(mels, width)
        self.stem.requires_grad_(layers > 0)  # without blocks nothing reads it, and data parallelism awaits gradients
        self.blocks = nn.ModuleList(_TimeBlock(width, kernel, dropout) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 if layers else 0))
        self.head = nn.Linear(2 * mels + width * len(self.norms), dim)
        # Until they are fitted: about what speech has, of a mean over time and of a deviation.
        self.register_buffer("mean", torch.tensor([0.0, 0.65]).repeat_interleave(mels))
        self.register_buffer("std", torch.tensor([0.25, 0.2]).repeat_interleave(mels))

    def _mask(self, logmel: Tensor, valid: Tensor) -> Tensor:
        """SpecAugment: hide random stretches of time and of bands behind the utterance's mean frame."""
        rows, steps, mels = logmel.shape
        device = logmel.device
        count = valid.sum(1).view(-1, 1, 1)
        mean = logmel.sum(1, keepdim=True) / count

        def stretches(extent: Tensor, share: float, size: int) -> Tensor:
            length = torch.rand(rows, self.masks, 1, device=device) * share * extent
            start = torch.rand(rows, self.masks, 1, device=device) * (extent - length)
            place = torch.arange(size, device=device)
            return ((place >= start) & (place < start + length)).any(1)

        hidden = (
            stretches(count, 0.10, steps)[:, :, None] | stretches(torch.full_like(count, mels), 0.12, mels)[:, None]
        )
        return torch.where(hidden & valid[..., None], mean, logmel)

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Take the mean and deviation of each band's statistics from training utterances; silent ones tell nothing.

        The deviation is raised by 0.02, so that a band in which nothing differs is not blown up to noise.

        Args:
            batches: what the processor makes of some waveforms, batch by batch.
        """

        def of(batch: dict[str, Tensor]) -> Tensor:
            waveforms, mask = (batch[name].to(self.mean.device) for name in ("input_values", "audio_attention_mask"))
            heard = (waveforms.bool() & mask.bool()).any(1)
            return self._of_bands(*self._spectrogram(waveforms, mask))[heard]

        found = moments(map(of, batches))
        if found is not None:
            mean, squares = found
            self.mean.copy_(mean)
            self.std.copy_((squares - mean.square()).clamp_min(0).sqrt() + 0.02)

    def _spectrogram(self, waveforms: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The log-mel frames of utterances brought to one level, and which of them are valid."""
        mask = torch.ones_like(waveforms, dtype=torch.bool) if mask is None else mask.bool()
        x = torch.where(mask, waveforms.float(), 0.0)
        level = (x.square().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)).sqrt()
        return self.logmel(x * (_LEVEL / level.clamp_min(1e-4)), mask)

    def _of_bands(self, logmel: Tensor, valid: Tensor) -> Tensor:
        """Each band's mean over time, less that of all bands, and its deviation: ``[U, 2 mels]``."""
        mean, deviation = self._statistics(logmel, valid[..., None])
        return torch.cat([mean - mean.mean(1, keepdim=True), deviation], 1)

    @staticmethod
    def _statistics(x: Tensor, valid: Tensor) -> list[Tensor]:
        """Mean and deviation over the valid time steps, in float32: two ``[U, C]``."""
        x = torch.where(valid, x.float(), 0.0)
        count = valid.sum(1)
        mean = x.sum(1) / count
        variance = torch.where(valid, x - mean[:, None], 0.0).square().sum(1) / count
        return [mean, (variance + 1e-5).sqrt()]

    def forward(self, input_values: Tensor, audio_attention_mask: Tensor | None = None) -> Tensor:
        """Encode utterances.

        Args:
            input_values: ``[U, S]`` float waveforms in [-1, 1].
            audio_attention_mask: ``[U, S]``, nonzero for the samples of the utterance, which come first;
                None where all are.

        Returns:
            ``[U, dim]``.
        """
        logmel, valid = self._spectrogram(input_values, audio_attention_mask)
        if self.training and self.masks:
            logmel = self._mask(logmel, valid)
        # Silence, and a band that SpecAugment hides, lie far from all speech.
        pooled = [((self._of_bands(logmel, valid) - self.mean) / self.std).clamp(-4, 4)]
        if self.blocks:
            inside = valid[..., None]
            x = self.stem(logmel)
            for block in self.blocks:
                x = block(x, inside)
            learned = self._statistics(x, inside)
            pooled += [norm(statistic) for norm, statistic in zip(self.norms, learned, strict=True)]
        return self.head(self.dropout(torch.cat(pooled, dim=1)))


class HashingTokenizer:
    """Turn text into hashed ids of its words, neighbouring word pairs and character n-grams.

    No vocabulary is stored: an id is a BLAKE2 hash of the piece, so that the same text has the same ids in
    every process and release. Case is folded; punctuation marks are words, since they tell about emotion.

    Args:
        buckets: ids a piece can be hashed to.
        max_length: at most so many ids per text: words first, then pairs, then n-grams.
        ngrams: smallest and largest length of the character n-grams of ``<word>``; None leaves them out.
        context: the last line of a text is the utterance, and what goes before it its context: that is hashed apart
            from the utterance's own pieces, and they come first, so that a limit cuts the context.
    """

    def __init__(
        self,
        buckets: int = 32_768,
        max_length: int = 512,
        ngrams: tuple[int, int] | None = (3, 5),
        context: bool = False,
    ) -> None:
        if buckets < 1 or max_length < 1:
            raise UserError(
                f"the hashing vocabulary needs positive sizes, not buckets={buckets}, max_length={max_length}"
            )
        if ngrams is not None and not (isinstance(ngrams, tuple) and len(ngrams) == 2 and 1 <= ngrams[0] <= ngrams[1]):
            raise UserError(f"ngrams takes the smallest and the largest length, such as [3, 5], or null, not {ngrams}")
        self.buckets = buckets
        self.max_length = max_length
        self.ngrams = ngrams
        self.context = context

    def pieces(self, text: str) -> Iterator[str]:
        """Yield words, then pairs, then n-grams, each kind under its own mark so that they cannot meet."""
        if not self.context:
            yield from self._pieces(text)
            return
        before, _, own = text.rpartition("\n")
        yield from self._pieces(own)
        for line in reversed(before.splitlines()):  # of a context that is too long the latest lines are read
            yield from (f"before {piece}" for piece in self._pieces(line))

    def _pieces(self, text: str) -> Iterator[str]:
        words = _TOKEN.findall(unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).casefold())
        yield from (f"w {word}" for word in words)
        yield from (f"p {first} {second}" for first, second in zip(["<", *words], [*words, ">"], strict=True) if words)
        if self.ngrams is not None:
            shortest, longest = self.ngrams
            for word in words:
                marked = f"<{word}>"
                for length in range(shortest, min(longest, len(marked) - 1) + 1):
                    yield from (f"n {marked[i : i + length]}" for i in range(len(marked) - length + 1))

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text; a text without words is the single id ``EMPTY``."""
        ids: list[int] = []
        for piece in self.pieces(text):
            if len(ids) == self.max_length:
                break
            digest = blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            ids.append(RESERVED + int.from_bytes(digest, "little") % self.buckets)
        return ids or [EMPTY]

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return ``input_ids [U, L] int64``, padded with 0, and ``attention_mask [U, L] int64``.

        Raises:
            UserError: an entry is not a string.
        """
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"text {number} is {type(text).__name__}, not text; leave its modality out instead")
        rows = [self.encode(text) for text in texts]
        ids = torch.full((len(rows), max([1, *map(len, rows)])), PADDING)
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = torch.tensor(row)
        return {"input_ids": ids, "attention_mask": (ids != PADDING).long()}


class HashingTextEncoder(nn.Module):
    """Encode a bag of hashed pieces as one vector: an embedding and a learned weight for each id.

    ``h = LayerNorm(Σ_i softmax_i(w[id_i]) E[id_i])``, then ``h + MLP(h)``. The order of words enters through
    the tokenizer's pairs.

    Args:
        dim: width of the utterance vector and of the embedding.
        buckets: as the tokenizer's.
        dropout: inside the MLP; in training each piece is also left out with this probability.
    """

    def __init__(self, dim: int = 128, *, buckets: int = 32_768, dropout: float = 0.1) -> None:
        super().__init__()
        if min(dim, buckets) < 1:
            raise UserError(f"the hashing text encoder needs positive sizes, not dim={dim}, buckets={buckets}")
        self.dim = dim
        self.drop_pieces = dropout
        self.embedding = nn.Embedding(RESERVED + buckets, dim)
        self.weight = nn.Embedding(RESERVED + buckets, 1)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))
        nn.init.zeros_(self.weight.weight)
        # The norm takes the scale out again, but a step of Adam is as long whatever the scale: at torch's deviation of
        # 1 the pieces would hardly leave where they were drawn.
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode texts.

        Args:
            input_ids: ``[U, L]`` int64 from :class:`HashingTokenizer`.
            attention_mask: ``[U, L]``, nonzero for ids of the text; None takes every id that is not padding.

        Returns:
            ``[U, dim]``.
        """
        valid = input_ids != PADDING if attention_mask is None else attention_mask.bool()
        if self.training and self.drop_pieces:
            kept = valid & (torch.rand(valid.shape, device=valid.device) >= self.drop_pieces)
            valid = torch.where(kept.any(1, keepdim=True), kept, valid)
        score = self.weight(input_ids).squeeze(-1).float()
        # a finite floor in place of -inf: a row without any id gets a uniform mixture that is then zeroed
        share = torch.where(valid, score, torch.finfo(score.dtype).min).softmax(1) * valid
        pooled = (share[..., None] * self.embedding(input_ids)).sum(1)
        h = self.norm(pooled)
        return h + self.mlp(h)
