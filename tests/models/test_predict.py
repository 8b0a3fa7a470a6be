"""Prediction from files: the recorded preprocessing, missing streams, timelines, features, bad input."""

import csv
import re
import warnings
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from deepmsi.data.decode import decode_frames, decode_pcm
from deepmsi.data.options import PrepareOptions
from deepmsi.data.prepare import prepare
from deepmsi.data.store import as_waveform
from deepmsi.errors import UserError
from deepmsi.models.predict import Prediction, load_run
from deepmsi.report.text import render_predictions, render_subtitles, render_timeline
from deepmsi.train.dataset import UtteranceDataset

RATE = 16000


def write_clip(path, seconds=2.0, video=True, audio=True, audio_seconds=None, stripes=0):
    """A real file: moving grey steps at 10 frames per second, and a tone that rises."""
    with av.open(str(path), "w") as container:
        if video:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if audio:
            sound = container.add_stream("aac" if video else "pcm_s16le", rate=RATE, layout="mono")
        if video:
            for k in range(round(10 * seconds)):
                picture = np.full((48, 64, 3), 40 + 8 * (k % 20), dtype=np.uint8)
                picture[:, ::5] += np.uint8(stripes)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture)):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        if audio:
            time = np.arange(round(RATE * (audio_seconds or seconds))) / RATE
            wave = (0.3 * np.sin(2 * np.pi * (200 + 200 * time) * time) * 32767).astype(np.int16)
            for start in range(0, len(wave), 1024):
                frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="s16", layout="mono")
                frame.sample_rate, frame.pts = RATE, start
                for packet in sound.encode(frame):
                    container.mux(packet)
            for packet in sound.encode():
                container.mux(packet)
    return path


@pytest.fixture
def model(tiny):
    return tiny(
        label_names=["joy", "anger", "calm"],
        vision={"resize": "squash"},
        text={"encoder": "hashing", "dim": 8, "options": {"buckets": 64}},
        audio={"encoder": "logmel", "dim": 8, "options": {"mels": 16, "width": 16, "layers": 1}},
    )


def test_a_clip_is_predicted_as_its_arrays_are(model, tmp_path):
    clip = write_clip(tmp_path / "a.mp4")
    model.train()
    (found,) = model.predict([clip], texts=["such joy"])
    assert model.training
    model.eval()
    out = model(
        torch.from_numpy(decode_frames(clip, 2, size=32, resize="squash"))[None],
        **model.text_processor(["such joy"]),
        **model.audio_processor([as_waveform(decode_pcm(clip))]),
    )
    expected = out.logits.double().softmax(1)[0].tolist()
    assert found.probabilities == pytest.approx(dict(zip(["joy", "anger", "calm"], expected, strict=True)))
    assert found.label == max(found.probabilities, key=found.probabilities.get)
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert (found.clip, found.start) == (str(clip), 0.0)
    assert found.end == pytest.approx(2.0, abs=0.2)
    assert found.modalities == ("video", "text", "audio")
    assert found.to_dict()["label"] == found.label
    assert model.predict(clip, "such joy") == [found]


def test_a_text_that_stands_alone_is_predicted_as_it_is_beside_a_clip_of_nothing_else(model, tmp_path):
    silent = write_clip(tmp_path / "voice.wav", video=False)
    texts = ["such joy", "such joy", " so  angry\n"]
    found = model.predict([None, silent, None], texts, batch_size=2)
    assert [(p.clip, p.text, p.modalities) for p in found] == [
        (None, "such joy", ("text",)),
        (str(silent), "such joy", ("text", "audio")),
        (None, "so  angry", ("text",)),
    ]
    for item, text in ((found[0], "such joy"), (found[2], "so  angry")):
        mask = torch.tensor([[False, True, False]])
        out = model.eval()(modality_mask=mask, **model.text_processor([text])).logits.double().softmax(1)[0]
        assert list(item.probabilities.values()) == pytest.approx(out.tolist(), abs=1e-6)
        assert (item.start, item.end) == (0.0, None)
    assert render_predictions(found[2:]).startswith(f"so angry: {found[2].label} (")


def test_a_text_alone_needs_no_encoder_of_sound(tiny, recwarn):
    """Which is not there, or not known."""
    for source in ("/nowhere/wav2vec", None):
        model = tiny(text={"encoder": "hashing", "dim": 8}, audio={"encoder": "features", "features_from": source})
        (found,) = model.predict([None], ["such joy"])
        assert found.modalities == ("text",)
    assert not recwarn.list


def test_what_no_text_alone_can_be_is_refused(model, tiny):
    with pytest.raises(UserError, match="give a clip or a text that is not blank"):
        model.predict([None], ["  "])
    with pytest.raises(UserError, match="a text belongs to a whole clip"):
        model.predict([None], ["joy"], timeline=1.0)
    with pytest.raises(UserError, match="goes over the windows of a recording: give a clip"):
        model.predict([None], timeline=1.0)
    with pytest.raises(UserError, match="None for the clip of a text that stands alone"):
        model.predict([], ["joy"])
    torch.nn.init.constant_(model.classifier.output.bias, torch.nan)
    with pytest.raises(UserError, match=r"^the text 'joy joy .*\[\.\.\.\]': the model's logits are not finite") as told:
        model.predict([None], ["joy " * 1000])
    assert len(str(told.value)) < 200
    deaf = tiny(text={"encoder": "none"}, audio={"encoder": "none"})
    with pytest.raises(UserError, match="this model reads video: give a clip"):
        deaf.predict([None], ["joy"])


def test_frames_that_were_stored_larger_are_predicted_alike(tiny, tmp_path):
    """They are scaled twice, so that one scaling from the file gave other pixels."""
    clip = write_clip(tmp_path / "a.mp4", stripes=50)
    (tmp_path / "m.csv").write_text("id,video,label\na,a.mp4,joy\n")
    sections = {"text": {"encoder": "none"}, "audio": {"encoder": "none"}}
    model = tiny(vision={"stored_size": 47}, **sections).eval()
    data = prepare(tmp_path / "m.csv", tmp_path / "p", PrepareOptions(frames=2, size=47), workers=0, progress=False)
    (example,) = UtteranceDataset(data, [0], [0], model.config)
    assert not np.array_equal(example.frames, decode_frames(clip, 2, size=32))
    expected = model(example.frames[None]).logits.double().softmax(1)[0].tolist()
    (found,) = model.predict([clip])
    assert list(found.probabilities.values()) == pytest.approx(expected, abs=1e-7)


def test_batches_mix_what_clips_have(model, tmp_path):
    clips = [
        write_clip(tmp_path / "both.mp4"),
        write_clip(tmp_path / "silent.mp4", audio=False),
        write_clip(tmp_path / "voice.wav", video=False),
    ]
    texts = [None, "words", None]
    together = model.predict(clips, texts, batch_size=3)
    assert [p.modalities for p in together] == [("video", "audio"), ("video", "text"), ("audio",)]
    alone = [p for clip, text in zip(clips, texts, strict=True) for p in model.predict([clip], [text])]
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_blank_text_is_absent(model, tmp_path, blank):
    clip = write_clip(tmp_path / "a.mp4")
    first, second = model.predict([clip, clip], [blank, "words"])
    assert (first.modalities, second.modalities) == (("video", "audio"), ("video", "text", "audio"))
    assert model.predict([clip], [blank]) == model.predict([clip])
    assert model.predict([clip], [blank], timeline=1.0) == model.predict([clip], timeline=1.0)


def test_a_timeline_covers_the_recording(model, tmp_path):
    clip = write_clip(tmp_path / "long.mp4", seconds=3.4)
    windows = model.predict([clip], timeline=1.0, batch_size=2)
    assert [w.start for w in windows] == [0.0, 1.0, 2.0, 3.0]
    assert [w.end for w in windows[:3]] == [1.0, 2.0, 3.0]
    assert windows[-1].end == pytest.approx(3.4, abs=0.2)
    assert all(isinstance(w, Prediction) and w.modalities == ("video", "audio") for w in windows)
    # A rest of a tenth is no window of its own.
    clip = write_clip(tmp_path / "rest.mp4", seconds=3.1, audio=False)
    assert len(model.predict([clip], timeline=1.0)) == 3
    assert len(model.predict([clip], timeline=60.0)) == 1


def test_a_window_is_no_longer_than_what_is_heard(model, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "long.mp4", seconds=3.4)
    monkeypatch.setattr(model.config.audio, "max_seconds", 2.0)
    assert len(model.predict([clip], timeline=2.0)) == 2
    with pytest.raises(UserError, match=r"of a window of 3 s this model would hear the first 2 \(audio\.max_seconds\)"):
        model.predict([clip], timeline=3.0)


def test_what_is_not_heard_of_whole_clips_is_told(model, tmp_path, monkeypatch):
    clips = [write_clip(tmp_path / f"{name}.mp4", seconds=s) for name, s in (("a", 1.0), ("b", 3.4), ("c", 3.4))]
    silent = write_clip(tmp_path / "d.mp4", seconds=3.4, audio=False)
    monkeypatch.setattr(model.config.audio, "max_seconds", 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict([clips[0], silent])
    with pytest.warns(UserWarning, match=r"b\.mp4 and 1 more: this model hears the first 2 s of the sound"):
        model.predict(clips)


def test_a_clip_that_is_read_in_part_is_told(model, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", seconds=4.0, stripes=40)
    data = clip.read_bytes()
    begin, end = data.index(b"mdat"), data.index(b"moov")
    half = (begin + end) // 2
    clip.write_bytes(data[:half] + bytes(end - 4 - half) + data[end - 4 :])
    with pytest.warns(UserWarning, match=r"a\.mp4: there are \d\.\d\d s of sound in it, and the header states 4\.0"):
        (found,) = model.predict([clip])
    assert found.label is not None


def test_a_bar_shows_how_far_it_is(model, tmp_path, monkeypatch):
    """Of a recording of hours it is silent for minutes."""
    shown = []
    show = "deepmsi.models.predict.progress_bar"
    monkeypatch.setattr(show, lambda items, **options: shown.append((items, options)) or items)
    model.predict([write_clip(tmp_path / "a.wav", 3.2, video=False)], timeline=1.0, progress=True)
    assert [(len(items), options["unit"], options["shown"]) for items, options in shown] == [
        (1, "clip", True),
        (3, "window", True),
    ]
    model.predict([tmp_path / "a.wav"])
    assert [options["shown"] for _, options in shown[2:]] == [False, False]


def test_a_clip_that_is_not_there_is_told_before_others_are_decoded(model, tmp_path, monkeypatch):
    monkeypatch.setattr("deepmsi.models.predict._decode", lambda *_, **__: pytest.fail("nothing is to be decoded"))
    with pytest.raises(UserError, match="there is no such file"):
        model.predict([*[write_clip(tmp_path / "a.wav", video=False)] * 9, tmp_path / "gone.mp4"])


def test_a_window_is_its_cut(model, tmp_path):
    clip = write_clip(tmp_path / "long.mp4", seconds=3.0)
    second = model.predict([clip], timeline=1.0)[1]
    out = model.eval()(
        torch.from_numpy(decode_frames(clip, 2, start=1.0, end=2.0, size=32, resize="squash"))[None],
        **model.audio_processor([as_waveform(decode_pcm(clip, start=1.0, end=2.0))]),
    )
    expected = out.logits.double().softmax(1)[0].tolist()
    assert list(second.probabilities.values()) == pytest.approx(expected, abs=1e-5)


def test_sound_may_end_before_the_picture(model, tmp_path):
    clip = write_clip(tmp_path / "short-sound.mkv", seconds=3.0, audio_seconds=1.0)
    windows = model.predict([clip], timeline=1.0)
    assert windows[0].modalities == ("video", "audio")
    assert windows[-1].modalities == ("video",)


def test_a_window_without_content_has_no_label(tiny, tmp_path):
    """Subtitles leave it out, and its cells in a table are empty."""
    clip = write_clip(tmp_path / "short-sound.mkv", seconds=3.0, audio_seconds=0.8)
    model = tiny(vision={"backbone": "none"}, text={"encoder": "none"}, audio={"encoder": "logmel", "dim": 8})
    windows = model.predict([clip], timeline=1.0)
    assert [bool(w.label) for w in windows] == [bool(w.probabilities) for w in windows] == [True, False, False]
    assert windows[1].modalities == ()
    head, *_, last = csv.reader(render_timeline(windows[::-1]).splitlines())
    assert (head[3:], last[2]) == (list(windows[0].probabilities), windows[0].label)
    assert render_timeline(windows).endswith(",,,,\n")
    assert render_subtitles(windows).count("-->") == 1
    web = render_subtitles(windows, web=True)
    assert web.startswith("WEBVTT\n\n1\n")
    assert re.search(r"^00:00:\d\d\.\d{3} --> 00:00:\d\d\.\d{3}$", web, re.MULTILINE)
    odd = replace(windows[0], label="<3 & joy", probabilities={"<3 & joy": 1.0})
    assert "\n<3 & joy 100%\n" in render_subtitles([odd])
    assert "\n&lt;3 &amp; joy 100%\n" in render_subtitles([odd], web=True)


def test_a_recording_without_content(tiny, tmp_path):
    clip = write_clip(tmp_path / "a.mkv")
    model = tiny(vision={"backbone": "none"}, text={"encoder": "none"})
    with (
        pytest.warns(UserWarning, match=r"audio\.features_from"),
        pytest.raises(UserError, match=r"a\.mkv: nothing"),
    ):
        model.predict([clip], timeline=1.0)


def write_floats(path, samples):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path


@pytest.mark.parametrize("peak", [1e-3, 9000.0, 3e37])
def test_sound_is_read_as_prepare_stores_it(model, tmp_path, peak):
    clip = write_floats(tmp_path / "a.wav", peak * np.sin(np.arange(RATE) ** 1.2))
    (tmp_path / "m.csv").write_text("id,audio\na,a.wav\n")
    stored = prepare(tmp_path / "m.csv", tmp_path / "out", workers=0, progress=False).waveform(0)
    (found,) = model.predict([clip])
    expected = model.eval()(**model.audio_processor([stored])).logits.double().softmax(1)[0]
    assert list(found.probabilities.values()) == expected.tolist()


def test_what_is_not_finite_is_refused(model, tmp_path):
    clip = write_floats(tmp_path / "a.wav", np.where(np.arange(RATE) == 99, np.nan, 0.1))
    with pytest.raises(UserError, match=r"a\.wav: the sound holds samples that are not numbers"):
        model.predict([clip])
    torch.nn.init.constant_(model.classifier.output.bias, np.inf)
    with pytest.raises(UserError, match=r"b\.wav: the model's logits are not finite"):
        model.predict([write_clip(tmp_path / "b.wav", video=False)])


def test_features_come_from_the_encoder_that_is_named(tiny, bert_folder, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", audio=False)
    model = tiny(text={"dim": 16, "features_from": str(bert_folder)}, audio={"encoder": "none"})
    (happy,), (sad,) = model.predict([clip], ["i am so happy"]), model.predict([clip], ["you sad"])
    assert happy.modalities == ("video", "text")
    assert happy.probabilities != sad.probabilities


def test_features_of_an_unknown_encoder(tiny, tmp_path):
    clip = write_clip(tmp_path / "a.mp4")
    model = tiny()
    with pytest.raises(UserError, match=r"text\.features_from"):
        model.predict([clip], ["words"])
    with pytest.warns(UserWarning, match=r"audio\.features_from"):
        (found,) = model.predict([clip])
    assert found.modalities == ("video",)


def test_a_face_model_that_has_gone(tiny, tmp_path):
    pytest.importorskip("cv2", reason="OpenCV, the extra deepmsi[face], is not installed")
    model = tiny(vision={"face": True, "face_model": str(tmp_path / "yunet.onnx")}, audio={"encoder": "logmel"})
    for timeline in (None, 1.0):
        with pytest.raises(UserError, match=r"yunet\.onnx: there is no such face model"):
            model.predict([write_clip(tmp_path / "a.mp4")], timeline=timeline)


def test_load_run(model, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        assert load_run(folder).config == model.config
    assert {p.device.type for p in load_run(folder, "meta").parameters()} == {"meta"}
    with pytest.raises(UserError, match="no run directory"):
        load_run(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no model"):
        load_run(tmp_path)


def test_in_bfloat16_it_says_the_same(model, tmp_path):
    clips = [write_clip(tmp_path / "a.mp4"), write_clip(tmp_path / "b.mp4", stripes=90)]
    model.save_pretrained(tmp_path / "run" / "model")
    exact = model.predict(clips, ["so", "why"])
    rounded = load_run(tmp_path / "run", precision="bf16").predict(clips, ["so", "why"], precision="bf16")
    for found, wanted in zip(rounded, exact, strict=True):
        assert found.probabilities != wanted.probabilities
        assert found.probabilities == pytest.approx(wanted.probabilities, abs=0.02)
        assert sum(found.probabilities.values()) == pytest.approx(1)


def test_bad_input(model, tiny, tmp_path):
    clip = write_clip(tmp_path / "a.mp4")
    text_file = tmp_path / "text.mp4"
    text_file.write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    voice = write_clip(tmp_path / "voice.wav", video=False)
    blind = tiny(text={"encoder": "none"}, audio={"encoder": "none"})
    for call, words in (
        (lambda: model.predict([tmp_path / "absent.mp4"]), "absent.mp4"),
        (lambda: model.predict([text_file]), "text.mp4"),
        (lambda: model.predict([tmp_path / "empty.mp4"]), "empty.mp4"),
        (lambda: blind.predict([voice]), "reads video, and the clip gives none"),
        (lambda: model.predict([clip], ["a", "b"]), "2 texts were given for 1 clips"),
        (lambda: model.predict([clip], ["a"], timeline=1.0), "a text belongs to a whole clip"),
        (lambda: model.predict([clip], timeline=0.0), "timeline is 0.0"),
        (lambda: model.predict([clip], timeline=float("nan")), "timeline is nan"),
        (lambda: model.predict([clip], timeline=1e-320), "timeline is 1e-320"),
        (lambda: model.predict([clip], batch_size=0), "batch_size is 0"),
        (lambda: model.predict([clip], precision="int8"), "precision is 'int8': give fp32, bf16 or fp16"),
        (lambda: model.predict([clip], precision="fp16"), "precision=fp16 needs a GPU"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_real_clip(model, shared_data):
    (found,) = model.predict([shared_data / "ravdess" / "original" / _first(shared_data)])
    assert found.modalities == ("video", "audio")


def _first(shared_data):
    return min(path.name for path in (shared_data / "ravdess" / "original").glob("*.mp4"))
