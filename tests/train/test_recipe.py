"""Recipes: what is shipped loads, what is mistyped gets its sentence, what is resolved reads back equal."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from deepmsi.errors import UserError
from deepmsi.train.recipe import AugmentSettings, Recipe, TrainSettings, explain_recipe, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", ["clips", "demo", "iemocap", "meld", "ravdess"])
def test_shipped_recipes_load(name: str) -> None:
    assert name in shipped_recipes()
    recipe = load_recipe(name)
    assert recipe.name == name
    assert (recipe.labels is None) == (name == "clips")
    assert recipe.description


@pytest.mark.parametrize("name", ["demo", "ravdess"])
def test_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["train.lr=5e-4", "seed=3"])
    recipe.save(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.model_dump() == recipe.model_dump()
    assert (again.train.lr, again.seed) == (5e-4, 3)


@pytest.mark.parametrize(
    "settings",
    [[], ["vision.frames=8"], ["preset=paper"], ["drop=text"], ["drop=video"], ["text.encoder=features"]],
    ids=lambda settings: " ".join(settings) or "as it is",
)
@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_in_full_resolves_as_the_recipe(name: str, settings: list[str], tmp_path: Path) -> None:
    first = ['description="Mine: of two lines\\n # and signs"', "seed=3"]
    text = explain_recipe(name, first)
    mine = write(tmp_path, text)

    def resolved(source: str | Path, overrides: list[str]) -> object:
        try:
            return load_recipe(source, overrides)
        except UserError as error:
            return str(error).partition(": ")[2]

    assert resolved(mine, settings) == resolved(name, [*first, *settings])
    assert "  # of inner-folds, each shuffled anew\n  " in text
    assert "  # split-column | stratified-kfold | " in text
    assert "\n# Optimisation, and how the number of epochs is found.\ntrain:\n" in text


def test_every_key_has_a_note() -> None:
    lines = explain_recipe("demo").splitlines()
    keys = [n for n, line in enumerate(lines) if re.match(r" *#?[a-z_]+:", line)]
    assert [lines[n] for n in keys if not (n and lines[n - 1].lstrip().startswith("# "))] == []


def test_without_sound_its_rate_does_not_matter() -> None:
    recipe = load_recipe("clips", ["prepare.sample_rate=8000", "drop=audio"])
    assert recipe.prepare.sample_rate == 8000


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    path = write(tmp_path, "preset: small\nprotocol: group-kfold\ntext:\n  encoder: features\n")
    overrides = [
        "protocol.folds=3",
        "vision.schedule={layout: packed}",
        "text.dim=12",
        "labels=[a, b]",
        "train.patience=null",
        "audio.options.layers=1",
    ]
    recipe = load_recipe(path, overrides)
    assert (recipe.protocol.name, recipe.protocol.folds) == ("group-kfold", 3)
    assert recipe.vision.schedule == {"layout": "packed"}
    assert recipe.vision.backbone == "small"
    assert (recipe.text.dim, recipe.labels, recipe.train.patience) == (12, ["a", "b"], None)
    assert recipe.audio.options == {"layers": 1}
    assert recipe.name == "mine"


def test_drop_builds_the_model_without() -> None:
    recipe = load_recipe("demo", ["drop=video,audio"])
    assert recipe.modalities == ("text",)
    assert load_recipe("demo", ["drop=[text]"]).modalities == ("video", "audio")


def test_prepare_follows_the_model(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ["vision.frames=5", "vision.resize=pad", "audio.sample_rate=8000"])
    options = recipe.prepare
    assert (options.frames, options.size, options.resize, options.sample_rate) == (5, 64, "pad", 8000)
    larger = load_recipe("demo", ["prepare.size=96"])
    assert (larger.prepare.size, larger.vision.image_size) == (96, 64)


def test_no_augmentation_is_none_at_all() -> None:
    assert set(AugmentSettings.none().model_dump().values()) == {0.0}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lrr=1", r"unknown key 'train\.lrr': did you mean 'train\.lr'"),
        ("trian.lr=1", "unknown key 'trian': did you mean 'train'"),
        ("lr=1", r"unknown key 'lr': did you mean 'train\.lr'"),
        ("epochs=3", r"did you mean 'train\.epochs'"),
        ("augment.flips=1", r"did you mean 'augment\.flip'"),
        ("prepare.framez=3", r"did you mean 'prepare\.frames'"),
        ("train.lr=fast", r"train\.lr: .*number"),
        ("train.epochs=0", r"train\.epochs: .*greater than or equal to 1"),
        ("train.selection=best", r"train\.selection: input should be"),
        ("protocol=magic", r"protocol\.name: input should be"),
        ("vision.freeze=stm", r"vision\.freeze: input should be a valid boolean.*, or input should be 'stem' \(found"),
        ("vision.freeze=true", r"vision\.freeze keeps weights that start at random: set vision\.pretrained=true"),
        ("drop=[smell]", "'smell' is no modality"),
        ("drop=[video, text, audio]", "keep at least one"),
        ("prepare.frames=3", r"prepare\.frames is 3 and vision\.frames is 8: make them agree"),
        ("prepare.size=32", "cannot be stored smaller"),
        ("labels=[a, a]", "labels has a name twice"),
        ("labels=[yes, no]", r"labels: put names such as 'yes' and '1\.5' in quotes: .*\(found True\)"),
        ("exclude_labels=1.5", r"exclude_labels: put names such as .*\(found 1\.5\)"),
        ("exclude_labels={a: 1}", r"exclude_labels\.0: input should be a valid string"),
        ("exclude_labels=[joy]", "'joy' stands in labels and in exclude_labels"),
        ("train.lr", "write key=value"),
        ("=3", "write key=value"),
        ("train..lr=3", "write key=value"),
        ("train.lr=[1", "the value is no YAML"),
        ("preset.deep=3", "preset is 'small' and has no keys of its own"),
        ("train.memory_limit=.inf", "train.memory_limit: input should be a finite number"),
        ("train.lr=inf", "train.lr: input should be a finite number"),
        ("train.lr=1e300", r"train\.lr: .*less than or equal to 10"),
        ("train.encoder_lr=1e300", r"train\.encoder_lr: .*less than or equal to 10"),
        ("train.weight_decay=1e300", r"train\.weight_decay: .*less than or equal to 100"),
        ("train.betas=[2, 3]", r"train\.betas\.0: .*less than 1"),
        ("train.betas=[0.9, 1.0]", r"train\.betas\.1: .*less than 1"),
        ("train.betas=[-1, 0.5]", r"train\.betas\.0: .*greater than or equal to 0"),
        ("augment.gain=1e9", r"augment\.gain: .*less than or equal to 60"),
        ("train.epochs=yes", r"train\.epochs: write a number: YAML reads yes, no, .*found True"),
        ("train.patience=off", r"train\.patience: write a number or null: .*found False"),
        ("train.betas=[0.9, no]", r"train\.betas: write a number: .*found"),
        ("vision.keep=[yes, 4]", r"vision\.keep: write a number or null: "),
        ("text.options={buckets: yes}", r"text\.options: write a number"),
        ("loss.class_weights=[yes, 1]", r"loss\.class_weights: write a number or null: "),
        ("prepare.frames=on", r"prepare\.frames: write a number: "),
        ("protocol.folds=true", r"protocol\.folds: write a number: "),
        ("seed=no", "seed: write a number: "),
    ],
)
def test_a_mistaken_override_gets_its_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_recipe("demo", [override])
    assert "\n" not in str(caught.value)


def test_booleans_of_numpy_are_no_numbers() -> None:
    assert TrainSettings(lr=np.float64(0.5), cuda_graphs=np.True_).lr == 0.5
    for setting in ({"lr": np.True_}, {"epochs": np.True_}, {"betas": (np.False_, 0.9)}):
        with pytest.raises(ValueError, match="write a number"):
            TrainSettings(**setting)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds list at its top level"),
        ("train: [1\n", r"mine\.yaml:2 is no YAML"),
        ("seed: 1\nseed: 2\n", r"mine\.yaml:2 is no YAML: the key 'seed' stands twice"),
        ("train:\n  lr: 1\n  lr: 2\n", "the key 'lr' stands twice"),
        ("train: fast\n", "train: "),
        ("a: !!python/object/apply:os.system ['true']\n", "is no YAML"),
        ("seed: -1\n", "seed: "),
    ],
)
def test_a_mistaken_file_gets_its_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_merged_keys_may_be_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: small\nfusion: {<<: {dropout: 0.5, hidden: [8]}, dropout: 0.25}\n")
    assert load_recipe(path).fusion.dropout == 0.25
    assert list(load_recipe(path).fusion.hidden) == [8]
    path.write_text("preset: small\ntrain:\n  <<: &a {<<: {lr: 0.5}, lr: 0.25}\n  epochs: 2\n")
    assert (load_recipe(path).train.lr, load_recipe(path).train.epochs) == (0.25, 2)


def test_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe 'demoo': the package has clips, demo, "):
        load_recipe("demoo")
    with pytest.raises(UserError, match="no recipe file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")


def test_every_field_says_what_it_is_in_yaml_types() -> None:
    dumped = Recipe().model_dump(mode="json")
    assert yaml.safe_load(yaml.safe_dump(dumped)) == dumped


@pytest.mark.parametrize("name", shipped_recipes())
@pytest.mark.parametrize("left", ["video", "text", "audio"])
def test_every_shipped_recipe_can_be_reduced_to_one_modality(name: str, left: str) -> None:
    if left in load_recipe(name).modalities:
        others = ",".join({"video", "text", "audio"} - {left})
        assert load_recipe(name, [f"drop={others}"]).modalities == (left,)


def test_labels_have_the_form_of_a_manifests(tmp_path: Path) -> None:
    composed, decomposed = "fr\u00f6hlich", "fro\u0308hlich"
    recipe = load_recipe(str(write(tmp_path, f"labels: [{decomposed}, x]\nexclude_labels: [{decomposed}2]\n")))
    assert recipe.labels == [composed, "x"]
    assert recipe.exclude_labels == [f"{composed}2"]


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("[0, 1, 010, very sad]", ["0", "1", "010", "very sad"]),
        ("10", ["10"]),
        ("very sad", ["very sad"]),
        ("very sad, 10", ["very sad", "10"]),
        ("['very, very sad', 'yes']", ["very, very sad", "yes"]),
    ],
)
def test_labels_are_named_by_words_and_whole_numbers(said: str, names: list[str], tmp_path: Path) -> None:
    recipe = load_recipe("clips", [f"exclude_labels={said}"])
    assert recipe.exclude_labels == names
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    if len(names) > 1:
        assert load_recipe("clips", [f"labels={said}"]).labels == names


def test_the_face_model_of_the_preparation_is_the_models(tmp_path: Path) -> None:
    recipe = load_recipe(str(write(tmp_path, "vision: {face: true}\nprepare: {face_model: yunet.onnx}\n")))
    assert recipe.vision.face_model == recipe.prepare.face_model == "yunet.onnx"
