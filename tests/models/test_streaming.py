"""Streams: equal at every frame to the model on all frames so far, under the words that hold now."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepmsi import DeepMSI
from deepmsi.errors import UserError
from deepmsi.models.streaming import EmotionStream

STREAMS, LENGTH = 3, 11
# Two blocks see 1 + 2·2·3 = 13 frames, one sees 5: the state has to hold what has left the sight of the last step.
CASES = {
    "threshold": {"schedule": "paper"},
    "keep": {"schedule": {"keep": [40, 21]}},
    "regrid": {"schedule": {"layout": "regrid", "keep": [49, 25]}},
    "uncompressed": {"schedule": None},
    "short sight": {"schedule": {"keep": [40, 21]}, "tcn_channels": [16]},
}


@pytest.fixture
def frames() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(256, (STREAMS, LENGTH, 3, 32, 32), dtype=torch.uint8)


def words(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"text_features": torch.randn(STREAMS, 12).double(), "audio_features": torch.randn(STREAMS, 10).double()}


def whole(model: DeepMSI, frames: Tensor, said: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=frames, **said).logits


@pytest.mark.parametrize("case", CASES)
def test_equals_the_model_on_all_frames_so_far(case: str, tiny: Callable[..., DeepMSI], frames: Tensor) -> None:
    model = tiny(vision=CASES[case]).double()
    stream = EmotionStream(model, STREAMS)
    assert stream.hear(**words(3)) is None
    for t in range(LENGTH):
        out = stream.step(frames[:, t])
        torch.testing.assert_close(out.logits, whole(model, frames[:, : t + 1], words(3)), rtol=1e-9, atol=1e-9)
    changed = stream.hear(**words(4))
    assert changed is not None
    expected = whole(model, frames, words(4))
    torch.testing.assert_close(changed.logits, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, out.logits)
    # What follows rests on the state that was computed anew.
    torch.testing.assert_close(
        stream.step(frames[:, 0]).logits,
        whole(model, torch.cat([frames, frames[:, :1]], 1), words(4)),
        rtol=1e-9,
        atol=1e-9,
    )


def test_streams_begin_apart(tiny: Callable[..., DeepMSI], frames: Tensor) -> None:
    model = tiny(vision=CASES["keep"]).double()
    stream = EmotionStream(model, STREAMS)
    stream.hear(**words(3))
    for t in range(6):
        if t == 4:
            stream.restart([1])
        out = stream.step(frames[:, t])
    begun = torch.tensor([0, 4, 0])
    for said, result in ((words(3), out), (words(4), stream.hear(**words(4)))):
        for n in range(STREAMS):
            its = {name: value[n : n + 1] for name, value in said.items()}
            expected = whole(model, frames[n : n + 1, begun[n] : 6], its)
            torch.testing.assert_close(result.logits[n : n + 1], expected, rtol=1e-9, atol=1e-9)
    assert stream.seen.tolist() == [6, 2, 6]
    stream.restart([0])
    waiting = stream.hear(**words(3))
    mask = torch.ones(STREAMS, 3, dtype=torch.bool)
    mask[0, 0] = False
    alone = model.eval()(frames[1:, :2], **words(3), modality_mask=mask).logits[0]
    torch.testing.assert_close(waiting.logits[0], alone, msg="nothing of the frames before is left")
    stream.hear(**words(4))
    stream.restart()
    torch.testing.assert_close(stream.step(frames[:, 0]).logits, whole(model, frames[:, :1], words(4)))


def test_each_frame_is_computed_once(tiny: Callable[..., DeepMSI], frames: Tensor, monkeypatch) -> None:
    model = tiny(vision=CASES["keep"]).double()
    stream = EmotionStream(model, STREAMS)
    counts = {"stem": 0, "guided": 0}
    for name in counts:
        original = getattr(model.video.backbone, name)

        def counted(x: Tensor, *rest, name: str = name, original=original) -> Tensor:
            counts[name] += len(x)
            return original(x, *rest)

        monkeypatch.setattr(model.video.backbone, name, counted)
    for t in range(5):
        stream.step(frames[:, t])
    assert counts == {"stem": 5 * STREAMS, "guided": 5 * STREAMS}
    stream.hear(**words(3))
    assert counts == {"stem": 5 * STREAMS, "guided": 10 * STREAMS}


def test_missing_words(tiny: Callable[..., DeepMSI], frames: Tensor) -> None:
    model = tiny(vision=CASES["keep"]).double()
    stream = EmotionStream(model, STREAMS)
    mask = torch.tensor([[True, False, False]]).expand(STREAMS, -1)
    torch.testing.assert_close(stream.step(frames[:, 0]).logits, whole(model, frames[:, :1], {"modality_mask": mask}))
    some = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])
    stream.hear(**words(3), modality_mask=some)
    expected = whole(model, frames[:, :2], {**words(3), "modality_mask": some})
    torch.testing.assert_close(stream.step(frames[:, 1]).logits, expected)
    alone = tiny(vision=CASES["keep"], text={"encoder": "none"}, audio={"encoder": "none"}).double()
    torch.testing.assert_close(EmotionStream(alone, STREAMS).step(frames[:, 0]).logits, whole(alone, frames[:, :1], {}))


def test_mistakes_are_told(tiny: Callable[..., DeepMSI], frames: Tensor) -> None:
    with pytest.raises(UserError, match="without video"):
        EmotionStream(tiny(vision={"backbone": "none"}), 1)
    stream = EmotionStream(tiny(), STREAMS)
    with pytest.raises(UserError, match=r"these streams take \[3, 3, 32, 32\]"):
        stream.step(frames[:2, 0])
    with pytest.raises(UserError, match="2 utterances were given for 3 streams"):
        stream.hear(text_features=torch.zeros(2, 12))
    for streams in ([3], [0, -1], -1, [True]):
        with pytest.raises(UserError, match=f"no such stream: {re.escape(str(streams))} of 3 streams"):
            stream.restart(streams)
    with pytest.raises(UserError, match=r"the frames are torch\.int64: give uint8"):
        stream.step(frames[:, 0].long())
    stream.model.train()
    for call in (lambda: stream.step(frames[:, 0]), stream.hear):
        with pytest.raises(UserError, match="the model was put in training mode"):
            call()
    with pytest.raises(UserError, match="at least 1"):
        EmotionStream(tiny(), 0)


def test_none_or_some_begin_anew(tiny: Callable[..., DeepMSI], frames: Tensor) -> None:
    stream = EmotionStream(tiny(), STREAMS)
    stream.step(frames[:, 0])
    for streams, seen in (([], [1, 1, 1]), (torch.tensor([False, True, False]), [1, 0, 1]), ([0, 2], [0, 0, 0])):
        stream.restart(streams)
        assert stream.seen.tolist() == seen
