"""Configuration: presets, round trips, and the sentence that a mistake earns."""

import pytest
from pydantic import ValidationError

from deepmsi import DeepMSIConfig
from deepmsi.errors import UserError
from deepmsi.models.config import FusionConfig, ModelSections, validated


def test_the_paper_preset_is_the_papers_model():
    config = DeepMSIConfig(num_labels=6, preset="paper")
    assert config.vision.backbone == "swinv2_tiny_window8_256"
    assert (config.vision.frames, config.vision.schedule) == (15, "paper")
    assert config.vision.tcn_channels == (1024, 1024, 1024)
    assert (config.text.dim, config.audio.dim) == (1024, 768)
    assert config.fusion.hidden == (512, 256, 128)
    assert (config.loss.cross_entropy, config.loss.contrastive, config.loss.temperature) == (1.0, 0.5, 0.5)


@pytest.mark.parametrize("section", [{"frames": 4}, FusionConfig], ids=["mapping", "object"])
def test_what_is_said_wins_over_the_preset(section):
    if section is FusionConfig:
        config = DeepMSIConfig(num_labels=2, preset="small", fusion=FusionConfig(dropout=0.1))
        assert (config.fusion.dropout, config.fusion.projection) == (0.1, 64)
    else:
        config = DeepMSIConfig(num_labels=2, preset="small", vision=section)
        assert (config.vision.frames, config.vision.backbone) == (4, "small")


@pytest.mark.parametrize("preset", ["paper", "released", "small", None])
def test_json_round_trip(preset):
    config = DeepMSIConfig(label_names=["a", "b"], preset=preset, vision={"schedule": {"keep": [9, 4]}})
    assert DeepMSIConfig.model_validate_json(config.model_dump_json()) == config


def test_configurations_share_nothing():
    first, second = DeepMSIConfig(num_labels=2), DeepMSIConfig(num_labels=2)
    first.vision.frames = 3
    assert second.vision.frames == 15


def test_modalities_follow_from_the_sections():
    sections = ModelSections(vision={"backbone": "none"}, audio={"encoder": "none"})
    assert sections.modalities == ("text",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"vison": {}}, ("unknown key 'vison'", "'vision'")),
        ({"vision": {"tcn_chanels": [4]}}, ("'vision.tcn_chanels'", "'vision.tcn_channels'")),
        ({"temprature": 2}, ("'temprature'", ".temperature'")),
        ({"vision": {"zzz": 1}}, ("'vision.zzz'", "known here are", "backbone")),
        ({"vision": {"frames": 0}}, ("vision.frames", "found 0")),
        ({"vision": {"schedule": "papr"}}, ("vision.schedule", "papr")),
        ({"preset": "huge"}, ("preset", "huge")),
        ({"label_names": ["a", "a"]}, ("twice",)),
        ({"label_names": ["a"]}, ("1 names", "num_labels = 2")),
        ({"loss": {"class_weights": [1.0]}}, ("1 weights",)),
        ({"loss": {"class_weights": [1.0, -1.0]}}, ("loss.class_weights", "positive")),
        ({"loss": {"class_weights": []}}, ("loss.class_weights", "positive")),
        ({"loss": {"cross_entropy": 0, "contrastive": 0}}, ("loss", "nothing is learned")),
        ({"fusion": {"hidden": [-5]}}, ("fusion.hidden.0", "found -5")),
        ({"fusion": {"hidden": [0]}}, ("fusion.hidden.0", "found 0")),
        ({"fusion": {"projection": 10**12}}, ("fusion.projection", "1048576")),
        ({"audio": {"dim": 10**12}}, ("audio.dim", "1048576")),
        ({"audio": {"max_seconds": 1e-9}}, ("audio.max_seconds", "0.025")),
        ({"vision": {"tcn_channels": [10**12]}}, ("vision.tcn_channels.0", "1048576")),
        ({"vision": {"tcn_kernel": 10**6}}, ("vision.tcn_kernel", "64")),
        ({"vision": {"pretrained": "swin.bin"}}, ("vision.pretrained", ".safetensors", "swin.bin")),
        ({"vision": {"pretrained": ".safetensors"}}, ("vision.pretrained", "write true, false or the path")),
        ({"vision": {"pretrained": 2}}, ("vision.pretrained", "write true, false or the path", "found 2")),
        ({"vision": {"pretrained": None}}, ("vision.pretrained", "write true, false or the path")),
        ({"text": {"encoder": "hashing", "finetune": False}}, ("hashing", "finetune")),
        ({"text": {"options": {"buckets": 3}}}, ("options", "features")),
        ({"text": {"encoder": "x", "features_from": "y"}}, ("features_from",)),
        ({"text": {"features_from": "hashing"}}, ("hashing", "no pretrained weights")),
        (
            {"vision": {"backbone": "none"}, "text": {"encoder": "none"}, "audio": {"encoder": "none"}},
            ("at least one",),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_mistake_earns_one_sentence_that_says_where(data, words):
    with pytest.raises(UserError) as caught:
        validated(DeepMSIConfig, {"num_labels": 2, **data}, "recipe.yaml")
    sentence = str(caught.value)
    assert sentence.startswith("recipe.yaml: ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_a_mistake_in_code_is_a_validation_error():
    with pytest.raises(ValidationError):
        DeepMSIConfig(num_labels=2, vison={})


def test_a_file_of_weights_is_recorded_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DeepMSIConfig(num_labels=2, vision={"pretrained": "swin.safetensors"})
    assert config.vision.pretrained == str(tmp_path / "swin.safetensors")


def test_data_that_is_no_mapping():
    with pytest.raises(UserError, match="list"):
        validated(DeepMSIConfig, [1], "x.json")
