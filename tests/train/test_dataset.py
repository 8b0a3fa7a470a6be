"""Batches: their order and augmentation depend on (seed, epoch, row) alone, and hold what the mask says."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_corpus import make_recipe, prepared_corpus
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset

from deepmsi.data.store import PreparedData
from deepmsi.errors import DiskFullError
from deepmsi.models.encoders import build_audio_encoder, build_text_encoder
from deepmsi.train.augment import CHANGES, augment_audio, change_frames, draw_change, reorder, to_device
from deepmsi.train.dataset import AugmentSettings, Collator, EpochBatches, UtteranceDataset, hide_modalities
from deepmsi.train.seeding import derive_seed
from deepmsi.train.stems import Stems
from deepmsi.train.workers import loader_workers, utterance_bytes

VIDEO = {"vision": {"backbone": "small", "image_size": 64, "frames": 2}, "fusion": {"modality_dropout": 0.3}}


def dataset(path: Path, seed: int = 0, **changes: object) -> UtteranceDataset:
    data, config = PreparedData.open(path), make_recipe(**VIDEO | {"text": {"dim": 6}, "audio": {"dim": 6}} | changes)
    labels = [0] * len(data)
    return UtteranceDataset(data, range(len(data)), labels, config, augment=config.augment, seed=seed)


def epoch(rows: UtteranceDataset, number: int, workers: int = 0) -> list[dict[str, torch.Tensor]]:
    batches = EpochBatches(rows.labels, 5, rows.seed)
    batches.set_epoch(number)
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=Collator(rows.config, None, None), num_workers=workers)
    return list(loader)


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


def test_batches_depend_on_seed_and_epoch_only(video_corpus: Path) -> None:
    rows = dataset(video_corpus)
    first = epoch(rows, 3)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert same(first, epoch(rows, 3))
    assert same(first, epoch(rows, 3, workers=2))
    assert not same(first, epoch(rows, 4))
    assert not same(first, epoch(dataset(video_corpus, seed=1), 3))


def test_a_batch_holds_what_its_mask_says(video_corpus: Path) -> None:
    rows = dataset(video_corpus)
    seen = 0
    for batch in epoch(rows, 0):
        mask = batch["modality_mask"]
        seen += len(mask)
        assert mask.any(1).all()
        videos = int(mask[:, 0].sum())
        assert ("pixel_values" in batch) == (videos > 0)
        if videos:
            assert batch["pixel_values"].shape == (videos, 2, 3, 64, 64)
            assert batch["pixel_values"].dtype == torch.uint8
        for column, name in ((1, "text_features"), (2, "audio_features")):
            assert batch[name].shape == (len(mask), 6)
            assert not batch[name][~mask[:, column]].any()
            assert batch[name][mask[:, column]].any(1).all()
    assert seen == len(rows)


def test_without_a_key_nothing_is_drawn(video_corpus: Path) -> None:
    rows = dataset(video_corpus)
    example = rows[1]
    assert np.array_equal(np.asarray(example.frames), rows.data.frames(1))
    assert np.array_equal(np.asarray(example.audio), rows.data.features("audio", 1))
    assert rows[0].frames is None
    assert rows[0].text is None


def test_hidden_modalities_are_absent(video_corpus: Path) -> None:
    rows = dataset(video_corpus)
    hidden = UtteranceDataset(rows.data, rows.indices, rows.labels, rows.config, hidden=["video"])
    assert all(hidden[i].frames is None for i in range(len(hidden)))
    batch = Collator(rows.config, None, None)([hidden[1], hidden[2]])
    assert "pixel_values" not in batch
    assert batch["modality_mask"].tolist() == [[False, True, True]] * 2


def test_larger_frames_are_scaled_down(video_corpus: Path) -> None:
    rows = dataset(video_corpus, vision=VIDEO["vision"] | {"image_size": 32})
    frames = rows[1].frames
    assert frames is not None
    assert frames.shape == (2, 3, 32, 32)
    stored = rows.data.frames(1)
    assert stored is not None
    assert float(frames.float().mean()) == pytest.approx(float(stored.mean()), abs=0.5)


def test_modality_dropout_hides_each_but_never_all() -> None:
    rng = np.random.default_rng(0)
    draws = [hide_modalities((True, False, True), 0.4, rng) for _ in range(4000)]
    assert not any(text for _, text, _ in draws)
    assert all(any(draw) for draw in draws)
    both = sum(video and audio for video, _, audio in draws) / 4000
    assert both == pytest.approx(0.36, abs=0.03)
    only_video = sum(video and not audio for video, _, audio in draws) / 4000
    assert only_video == pytest.approx(0.6 * 0.4 + 0.4 * 0.4 / 2, abs=0.02)
    assert hide_modalities((True, True, True), 0.0, rng) == (True, True, True)
    assert hide_modalities((False, False, False), 0.5, rng) == (False, False, False)


def settings(**changes: float) -> AugmentSettings:
    return AugmentSettings.none().model_copy(update=changes)


def augment_frames(frames: torch.Tensor, settings: AugmentSettings, rng: np.random.Generator) -> torch.Tensor:
    """Augment one clip as a batch of one."""
    change = draw_change(settings, rng)
    return change_frames(reorder(frames, settings, rng)[None], change[None])[0]


def test_frames_are_left_alone_by_no_augmentation() -> None:
    frames = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(augment_frames(frames, settings(), np.random.default_rng(0)), frames)


def test_frame_augmentations_do_what_they_say() -> None:
    frames = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    rng = np.random.default_rng(0)
    assert torch.equal(augment_frames(frames, settings(flip=1.0), rng), frames.flip(-1))
    grey = augment_frames(frames, settings(grey=1.0), rng)
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 2])
    flat = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    brighter = [int(augment_frames(flat, settings(brightness=0.5), rng)[0, 0, 0, 0]) for _ in range(200)]
    assert 50 <= min(brighter) < 60
    assert 140 < max(brighter) <= 150
    shuffled = [augment_frames(frames, settings(shuffle=1.0), rng) for _ in range(80)]
    assert {tuple(int(frames.eq(frame).flatten(1).all(1).nonzero()) for frame in clip) for clip in shuffled} == {
        *itertools.permutations(range(3))
    }
    moved = augment_frames(frames, settings(shift=0.3, crop=0.3), rng)
    assert moved.shape == frames.shape
    assert not torch.equal(moved, frames)
    # One draw per clip: equal frames stay equal.
    still = frames[:1].expand(3, -1, -1, -1)
    out = augment_frames(still, AugmentSettings(crop=0.2), rng)
    assert torch.equal(out[0], out[2])


def test_clips_of_a_batch_are_changed_each_by_its_own_draw(video_corpus: Path) -> None:
    """On the device that trains, by numbers that were drawn where the clip was loaded."""
    rows = dataset(video_corpus)
    changed = 0
    for batch in epoch(rows, 0):
        moved = to_device(batch, torch.device("cpu"))
        assert moved.keys() == batch.keys() - {CHANGES}
        for name in moved.keys() - {"pixel_values"}:
            assert torch.equal(moved[name], batch[name])
        for i, frames in enumerate(moved.get("pixel_values", [])):
            alone = change_frames(batch["pixel_values"][i][None], batch[CHANGES][i][None])[0]
            assert torch.equal(frames, alone)
            changed += not torch.equal(frames, batch["pixel_values"][i])
    assert changed > len(rows) / 3
    plain = dataset(video_corpus)
    plain.augment = None
    assert all(CHANGES not in batch for batch in epoch(plain, 0))


def test_changing_frames_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensors of a GPU hold is not there to be asked for."""
    rng, all_of_it = np.random.default_rng(0), {"flip": 1.0, "grey": 1.0, "crop": 0.2, "shift": 0.1, "contrast": 0.2}
    changes = torch.stack([draw_change(settings(**all_of_it), rng) for _ in range(2)])
    numbers = changes.tolist()
    with FakeTensorMode() as mode:
        frames = torch.empty(2, 3, 3, 16, 16, dtype=torch.uint8, device="cuda")
        here = mode.from_tensor(changes)
        monkeypatch.setattr(here, "tolist", lambda: numbers, raising=False)  # of the CPU's memory
        out = change_frames(frames, here)
    assert (out.shape, out.dtype, out.device.type) == (frames.shape, torch.uint8, "cuda")


@pytest.mark.parametrize(
    ("asked", "device", "cores", "processes", "free", "size", "wanted"),
    [
        (None, "cpu", 16, 1, 10**12, 1, 0),
        (None, "cuda", 16, 1, 10**12, 1, 8),
        (None, "cuda", 4, 1, 10**12, 1, 3),
        (None, "cuda", 16, 4, 10**12, 1, 3),
        (None, "cuda", 1, 1, 10**12, 1, 0),
        (None, "cuda", 16, 1, 10**12, 8, 2),
        (None, "cuda", 16, 1, 8 * 24576, 1, 2),  # a clip of 2 frames of 64 px takes 24 kB, and there are 4 at a time
        (None, "cuda", 16, 1, 1000, 1, 0),
        (5, "cpu", 16, 1, 10**12, 1, 5),
        (0, "cuda", 16, 1, 10**12, 1, 0),
    ],
    ids=[
        "cpu",
        "gpu",
        "few cores",
        "shared",
        "one core",
        "few batches",
        "little memory",
        "none",
        "asked",
        "asked none",
    ],
)
def test_as_many_processes_load_as_serve_the_device(
    video_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    device: str,
    cores: int,
    processes: int,
    free: int,
    size: int,
    wanted: int,
) -> None:
    monkeypatch.setattr("deepmsi.train.workers.usable_cpus", lambda: cores)
    monkeypatch.setattr("deepmsi.train.workers._SHARED", Path("/"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    rows, recipe = dataset(video_corpus), make_recipe(train={"workers": asked})
    assert loader_workers(recipe.train, rows, torch.device(device), size) == wanted


def test_no_process_loads_what_is_no_load(video_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dataset(video_corpus, vision={"backbone": "none"})
    monkeypatch.setattr("deepmsi.train.workers.usable_cpus", lambda: 16)
    assert utterance_bytes(rows) == 0  # features alone
    assert loader_workers(make_recipe().train, rows, torch.device("cuda"), 1) == 0
    rows = dataset(video_corpus, audio={"encoder": "logmel", "max_seconds": 2.0, "sample_rate": 8000})
    assert utterance_bytes(rows) == 2 * 3 * 64 * 64 + 5 * 16000
    rows.stems = Stems(Path(), (2, 4, 4, 16), torch.float32)
    assert utterance_bytes(rows) == 2 * 4 * 4 * 16 * 4 + 5 * 16000


class Failing(Dataset[int]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> int:
        raise DiskFullError(f"the frames of row {i} are gone (OSError: no such file); prepare it again")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_in_a_process_that_loads_is_one_sentence(workers: int) -> None:
    with pytest.raises(DiskFullError) as told:
        list(DataLoader(Failing(), num_workers=workers))
    assert str(told.value) == "the frames of row 0 are gone (OSError: no such file); prepare it again"


def test_audio_augmentations_do_what_they_say() -> None:
    rng = np.random.default_rng(0)
    sound = (0.2 * np.sin(np.arange(4000) / 9)).astype(np.float32)
    assert np.array_equal(augment_audio(sound, settings(), rng), sound)
    loud = [np.abs(augment_audio(sound, settings(gain=6.0), rng)).max() for _ in range(200)]
    assert 0.1 < min(loud) < 0.11
    assert 0.36 < max(loud) <= 0.4
    noisy = augment_audio(sound, settings(noise=1.0), rng) - sound
    depth = 20 * np.log10(np.std(sound) / np.std(noisy))
    assert 14 < depth < 41
    lengths = [len(augment_audio(sound, settings(audio_crop=0.5), rng)) for _ in range(100)]
    assert 2000 <= min(lengths) < max(lengths) <= 4000
    lengths = [len(augment_audio(sound, settings(speed=0.2), rng)) for _ in range(100)]
    assert 3300 < min(lengths) < 4000 < max(lengths) <= 5001
    shifted = augment_audio(sound, settings(time_shift=0.5), rng)
    assert len(shifted) == len(sound)
    assert augment_audio(sound[:1], AugmentSettings(speed=0.5), rng).shape == (1,)
    assert augment_audio(sound, AugmentSettings(), rng).dtype == np.float32


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 12, 25])
def test_every_row_comes_once_an_epoch(rows: int, world: int) -> None:
    parts = [EpochBatches([0] * rows, 4, 9, rank=rank, world=world) for rank in range(world)]
    for part in parts:
        part.set_epoch(2)
    shares = [list(part) for part in parts]
    assert len({len(share) for share in shares}) == 1
    assert all(len(share) == len(parts[0]) for share in shares)
    assert all(1 <= len(batch) <= 4 for share in shares for batch in share)
    counts = Counter(position for share in shares for batch in share for _, _, position in batch)
    assert set(counts) == set(range(rows))
    assert sum(counts.values()) - rows < world
    joined = [key for step in zip(*shares, strict=True) for batch in step for key in batch]
    assert joined[:rows] == parts[0].keys()[:rows]


def test_the_balanced_sampler_draws_every_class_alike() -> None:
    labels = [0] * 40 + [1] * 8 + [2] * 3
    batches = EpochBatches(labels, 4, 1, balanced=True)
    keys = batches.keys()
    assert len(keys) == 51
    assert Counter(labels[position] for _, _, position in keys) == {0: 17, 1: 17, 2: 17}
    assert len(set(keys)) == 51  # a row that comes again is augmented anew
    rare = Counter(position for _, _, position in keys if position >= 48)
    assert max(rare.values()) - min(rare.values()) <= 1


def test_seeds_tell_their_parts_apart() -> None:
    seeds = {derive_seed(*parts) for parts in [(1, 23), (12, 3), (1, "23"), ("1", 23), (1, 2, 3), (123,)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_texts_and_sounds_go_through_the_processors(tmp_path: Path) -> None:
    path = prepared_corpus(tmp_path, rows=6)
    data = PreparedData.open(path)
    recipe = make_recipe(text={"encoder": "hashing", "context": 1}, audio={"encoder": "logmel"})
    rows = UtteranceDataset(data, range(6), [0] * 6, recipe)
    _, text = build_text_encoder(recipe.text)
    _, audio = build_audio_encoder(recipe.audio)
    assert rows[0].text == "s0: well"
    assert rows[1].text == "s0: well\ns1: well"
    batch = Collator(recipe, text, audio, with_labels=False)([rows[0], rows[1]])
    assert "labels" not in batch
    assert batch["input_ids"].shape[0] == batch["input_values"].shape[0] == 2
    assert batch["modality_mask"].tolist() == [[False, True, False]] * 2


def test_partial_rows_are_drawn_anew_beside_all_complete_ones() -> None:
    partial = np.arange(20) >= 6
    batches = EpochBatches([k % 2 for k in range(20)], 4, 1, partial=(partial, 3))
    assert len(batches) == 3
    drawn = []
    for epoch in range(30):
        batches.set_epoch(epoch)
        rows = [row for _, _, row in batches.keys()]  # noqa: SIM118
        assert sum(map(len, batches)) == len(rows) == len(set(rows)) == 9
        assert set(range(6)) <= set(rows)
        drawn += [row for row in rows if row >= 6]
    assert set(drawn) == set(range(6, 20))
    assert len(EpochBatches([0] * 20, 4, 1, partial=(partial, 0)).keys()) == 6
    even = EpochBatches([0] * 5 + [1] * 15, 4, 1, balanced=True, partial=(partial, 4)).keys()
    assert len(even) == 10
    assert sum(row < 5 for _, _, row in even) == 5
