"""The command `deepmsi`: parse, call, print.

Results go to standard output, progress and logs to standard error. Exit codes: 0 the work was done; 1 `check`
found problems, or an unexpected error, with its traceback; 2 a mistake that the user can mend, in one line; 130
interrupted; 143 told to end, by SIGTERM.
"""

import codecs
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from deepmsi.errors import DISK_FULL, DiskFullError, UserError
from deepmsi.terminal import Terminated, is_first, json_text, on_signals, say, working

app = typer.Typer(
    name="deepmsi",
    help="Multimodal emotion recognition from video, sound and text, in the manner of DeepMSI-MER.",
    epilog="Begin with: deepmsi demo",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # by default the lines of a docstring end where they end here
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The base of every usage error, whether typer brings click inside or imports it.
_UsageProblem: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _named(text: str) -> str:
    """What was named: an empty word, as of a shell variable that is not set, would be the current folder."""
    if not text:
        raise typer.BadParameter("it is empty, name a path (the current folder is .)")
    return text


def _path(text: str) -> Path:
    return Path(_named(text))


RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `deepmsi train` wrote.", parser=_path)]
DataOpt = Annotated[
    Path,
    typer.Option(
        "--data", metavar="MANIFEST_OR_DIR", help="A manifest, or what `deepmsi prepare` wrote.", parser=_path
    ),
]
SourceArg = Annotated[
    str, typer.Argument(metavar="MANIFEST|meld|iemocap", help="A manifest, or the name of a release.", parser=_named)
]
RawArg = Annotated[
    Path | None, typer.Argument(metavar="RAW", help="Folder of the release, at any nesting.", parser=_path)
]
LabelSetOpt = Annotated[str | None, typer.Option(help="iemocap: erc7433 (the default), consensus7380 or four5531.")]
AutoBatchOpt = Annotated[
    bool,
    typer.Option("--auto-batch", help="Take the largest batch that fits the memory, and accumulate to the recipe's."),
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe, e.g. train.epochs=5."),
]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="Go on where a call that was interrupted stopped.")]
FoldsOpt = Annotated[
    str | None,
    typer.Option(metavar="FOLDS", help="Run these alone, by name or number, e.g. 3,4; other calls may share the rest."),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]

FAILURES_SHOWN = 20
INTERRUPTED, TERMINATED = 130, 143


class Resize(StrEnum):
    """How a frame becomes a square."""

    crop = "crop"
    squash = "squash"
    pad = "pad"


class Modality(StrEnum):
    """Whose encoder is fine-tuned."""

    text = "text"
    audio = "audio"


class PredictionFormat(StrEnum):
    """How predictions are written."""

    csv = "csv"
    srt = "srt"
    vtt = "vtt"
    json = "json"


class Device(StrEnum):
    """Where a model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


OtherDeviceOpt = Annotated[Device | None, typer.Option(help="In place of the one that RUN's recipe names.")]


class PrecisionName(StrEnum):
    """What products are made in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


PrecisionOpt = Annotated[
    PrecisionName, typer.Option(help="bf16 is faster where the device multiplies it; fp16 needs a GPU.")
]


class ExportBackend(StrEnum):
    """Whose operators an exported program is made of."""

    reference = "reference"
    auto = "auto"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from deepmsi._version import __version__

        print(f"deepmsi {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where clips, run and report go.", show_default=True, parser=_path),
    ] = Path("deepmsi-demo"),
    seed: Annotated[int, typer.Option(help="Fixes clips and training.")] = 0,
    speakers: Annotated[int, typer.Option(min=2, help="Drawn identities; a quarter of them are held out.")] = 40,
    takes: Annotated[int, typer.Option(min=1, help="Clips per speaker and label.")] = 1,
    settings: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Try everything in minutes: no data, no network, no GPU needed.

    Makes synthetic clips (drawn faces, synthesised voices), prepares them, trains, evaluates on speakers that
    training never saw, predicts one clip and writes a report.
    """
    from deepmsi.demo import run_demo

    with working() as result:
        summary = run_demo(out, seed=seed, speakers=speakers, takes=takes, overrides=settings or [])
        if as_json:
            result.write(json_text(summary.to_dict()))
        else:
            result.write(summary.render() + "\n")


@app.command()
def check(
    source: SourceArg,
    raw: RawArg = None,
    label_set: LabelSetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Look through a manifest: what is missing, corrupt, too short or long, duplicated; counts per label.

    Of a release (`deepmsi check iemocap RAW`) the labels and files are held against the published counts. Exits with
    1 where it found problems that keep rows from being used, or counts that differ.
    """
    from deepmsi.data.check import check as check_manifest
    from deepmsi.data.check import check_release

    settings = _release_settings("check", source, raw, label_set=label_set)
    with working() as result:
        report = check_manifest(Path(source)) if raw is None else check_release(source, raw, **settings)
        if as_json:
            result.write(json_text(report.to_dict()))
        else:
            result.write(report.render(FAILURES_SHOWN).rstrip("\n") + "\n")
    if report.problems:
        raise typer.Exit(1)


@app.command()
def prepare(
    source: SourceArg,
    raw: RawArg = None,
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where frames, sound and features go.", parser=_path)
    ],
    frames: Annotated[int, typer.Option(min=1, help="Frames per clip.")] = 15,
    size: Annotated[int, typer.Option(min=8, help="Side of a frame in pixels.")] = 256,
    resize: Annotated[Resize, typer.Option(help="How a frame becomes a square.")] = Resize.crop,
    face: Annotated[
        bool, typer.Option("--face", help="Crop to the face (needs the extra `face` of the package).")
    ] = False,
    face_model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.onnx", help="With --face: find it by YuNet, not by OpenCV's Haar cascade.", parser=_path
        ),
    ] = None,
    sample_rate: Annotated[int, typer.Option(metavar="HZ", help="Of the stored sound.")] = 16000,
    text_encoder: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FOLDER", help="Store text features of this encoder.")
    ] = None,
    audio_encoder: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FOLDER", help="Store sound features of this encoder.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Accept a release with parts missing.")] = False,
    exclude: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="meld: further clips to leave out: split,dialogue,utterance,reason.", parser=_path
        ),
    ] = None,
    label_set: LabelSetOpt = None,
    offset: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="iemocap: added to the times that cut the videos.")
    ] = None,
    sides: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="iemocap: dialogue,wearer: in which half (left, right) the markers are.", parser=_path
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Decode every clip once into frames and features that training reads fast.

    Of a release (`deepmsi prepare meld RAW --out DIR`) the manifest is made first, from the raw files, as
    DIR/manifest.csv. Run the command again after an interruption: it goes on where it stopped. Clips that fail
    are listed with reasons.
    """
    from deepmsi.data.options import PrepareOptions
    from deepmsi.data.prepare import prepare as prepare_manifest
    from deepmsi.data.release import prepare_release
    from deepmsi.models.config import validated

    given = {"label_set": label_set, "offset": offset, "sides": sides, "partial": partial or None}
    settings = _release_settings("prepare", source, raw, exclusions=exclude, **given)
    if face_model is not None and not face:
        raise UserError("--face-model says how faces are found; add --face")
    with working() as result:
        said = {
            "frames": frames,
            "size": size,
            "resize": resize.value,
            "face": face,
            "face_model": None if face_model is None else str(face_model.absolute()),
            "sample_rate": sample_rate,
            "text_encoder": text_encoder,
            "audio_encoder": audio_encoder,
        }
        options = validated(PrepareOptions, said, "prepare")
        if raw is None:
            prepared = prepare_manifest(Path(source), out, options, workers=workers)
        else:
            prepared = prepare_release(source, raw, out, options, workers=workers, note=say, **settings)
        failures = prepared.failures
        if as_json:
            summary = {"out": out, "rows": len(prepared), "fingerprint": prepared.fingerprint, "failures": failures}
            result.write(json_text(summary))
        else:
            for failure in failures[:FAILURES_SHOWN]:
                result.write("failed: {id}: {modality}: {reason}\n".format(**failure))
            if len(failures) > FAILURES_SHOWN:
                result.write(f"and {len(failures) - FAILURES_SHOWN} more, all in {out / 'failures.csv'}\n")
            result.write(f"prepared {len(prepared)} rows in {out}\n")


def _release_settings(command: str, source: str, raw: Path | None, **given: Any) -> dict[str, Any]:
    """What was given of the options that a release's reader takes; None is not given."""
    from deepmsi.data.release import RELEASES

    if raw is None and source in RELEASES and not Path(source).exists():
        out = " --out DIR" if command == "prepare" else ""
        raise UserError(f"{command} {source} needs the folder of the release: deepmsi {command} {source} RAW{out}")
    if raw is not None and source not in RELEASES:
        raise UserError(f"{source!r} is no release that deepmsi reads: there are {' and '.join(RELEASES)}")
    settings = {name: value for name, value in given.items() if value is not None}
    for name in sorted(settings):
        whose = {"exclusions": ("meld",), "partial": RELEASES}.get(name, ("iemocap",))
        if raw is None or source not in whose:
            option = "exclude" if name == "exclusions" else name.replace("_", "-")
            raise UserError(f"--{option} goes with: deepmsi {command} {' and '.join(whose)} RAW")
    return settings


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="clips, demo, ravdess, meld, iemocap, or a YAML file of your own."),
    ],
    data: DataOpt,
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="New folder for the run.", parser=_path)],
    settings: SetOpt = None,
    resume: ResumeOpt = False,
    folds: FoldsOpt = None,
    auto_batch: AutoBatchOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a recipe by its protocol, and measure what it held out.

    Folds may run one by one, in any order, at the same time or on other machines: give each call the same recipe,
    data and seed, bring the folders RUN/folds/* together, and `deepmsi report RUN` joins them. The call without
    --folds and with --resume runs what is left, and fits the model that is kept. Several such calls at the same time
    share the folds of one RUN.
    """
    from deepmsi.train.recipe import load_recipe
    from deepmsi.train.run import train as train_recipe

    with working() as result:
        loaded = load_recipe(recipe, settings or [])
        metrics = train_recipe(loaded, data, out, resume=resume, folds=_names(folds), auto_batch=auto_batch)
        if as_json:
            result.write(json_text(metrics))
        else:
            result.write(_render_metrics(metrics) + f"run: {out}\n")


@app.command()
def recipe(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="As `deepmsi train` takes it.")],
    settings: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Print a recipe in full: every key that --set takes, with its value and notes.

    What is printed is a recipe, too: `deepmsi recipe clips > mine.yaml` begins one of your own. Keys that the recipe
    leaves to defaults, presets and other keys are in comments.
    """
    from deepmsi.train.recipe import explain_recipe, load_recipe

    with working() as result:
        if as_json:
            result.write(json_text(load_recipe(name, settings or []).model_dump(mode="json")))
        else:
            result.write(explain_recipe(name, settings or []))


@app.command()
def finetune(
    modality: Annotated[Modality, typer.Argument(metavar="text|audio", help="Whose encoder is trained.")],
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe that the features are for.")],
    data: DataOpt,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="New folder for encoders and scores.", parser=_path)
    ],
    settings: SetOpt = None,
    resume: ResumeOpt = False,
    folds: FoldsOpt = None,
    auto_batch: AutoBatchOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Fine-tune the text or the audio encoder alone, on the training part of each fold only.

    Each fold's encoder is DIR/folds/NAME/encoder (DIR/encoder of a manifest's own split), a folder of transformers.
    `deepmsi prepare MANIFEST --out PREPARED --text-encoder THAT` extracts features with it, and `deepmsi train RECIPE
    --data PREPARED --out RUN --set text.encoder=features --folds NAME` uses them; features whose encoder saw the rows
    that a fold reports are refused.
    """
    from deepmsi.train.finetune import finetune as finetune_encoder
    from deepmsi.train.recipe import load_recipe

    with working() as result:
        loaded = load_recipe(recipe, settings or [])
        metrics = finetune_encoder(
            modality.value, loaded, data, out, resume=resume, folds=_names(folds), auto_batch=auto_batch
        )
        if as_json:
            result.write(json_text(metrics))
        else:
            made = sorted(str(path.parent) for path in out.glob("**/encoder/deepmsi.json"))
            result.write(_render_metrics(metrics) + "".join(f"encoder: {path}\n" for path in made))


def _names(folds: str | None) -> list[str] | None:
    """The folds of --folds; None for all."""
    if folds is None:
        return None
    names = [name.strip() for name in folds.split(",") if name.strip()]
    if not names:
        raise UserError("--folds names no fold; give names or numbers separated by commas, such as --folds 3,4")
    return names


@app.command()
def evaluate(
    run: RunArg,
    data: DataOpt,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write metrics.json and predictions.csv here.", parser=_path),
    ] = None,
    drop: Annotated[
        str,
        typer.Option(metavar="MODALITIES", help="Leave modalities out: any of text,audio,video, by commas."),
    ] = "",
    split: Annotated[
        str | None, typer.Option(metavar="PART", help="Only train, dev or test, by the data's column split.")
    ] = None,
    device: OtherDeviceOpt = None,
    precision: PrecisionOpt = PrecisionName.fp32,
    as_json: JsonOpt = False,
) -> None:
    """Measure a trained model on labelled clips."""
    from deepmsi.train.evaluate import evaluate as evaluate_run

    with working() as result:
        where = device and _device(device)
        metrics = evaluate_run(run, data, out=out, drop=[drop], split=split, device=where, precision=precision.value)
        if as_json:
            result.write(json_text(metrics))
        else:
            result.write(_render_metrics(metrics) + (f"written to {out}\n" if out else ""))


def _render_metrics(metrics: Mapping[str, Any]) -> str:
    """Lay the main figures and the per-class table out for a terminal."""
    from deepmsi.report.text import render_metrics

    return render_metrics(metrics)


@app.command()
def predict(
    run: RunArg,
    clips: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CLIP", help="Video or sound files; none where a text is all.", parser=_path),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="MANIFEST_OR_DIR",
            help="Read every row of a manifest, or of what `deepmsi prepare` wrote; labels need not be there.",
            parser=_path,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="PART", help="With --data: only train, dev or test, by the data's column split."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="What is said: once for all clips, or once for each, in order. Without a clip each is read alone.",
        ),
    ] = None,
    timeline: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Go over long recordings in windows of this length."),
    ] = None,
    fmt: Annotated[
        PredictionFormat | None,
        typer.Option(
            "--format",
            help="By the name of --out, or else csv; of clips and texts a line each. srt and vtt are for a timeline.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write there in place of standard output.", parser=_path),
    ] = None,
    device: Annotated[Device, typer.Option(help="auto is the GPU where there is one.")] = Device.auto,
    precision: PrecisionOpt = PrecisionName.fp32,
    as_json: JsonOpt = False,
) -> None:
    """Say what clips, texts or the rows of a manifest express: labels with probabilities, or a timeline."""
    if data is not None and (clips or text or timeline is not None):
        other = "a CLIP" if clips else "--text" if text else "--timeline"
        raise UserError(f"--data names all that is to be read: leave {other} out, or --data")
    if split is not None and data is None:
        raise UserError("--split is a part of the rows of --data: give both")
    if data is None and not clips and not text:
        raise UserError("there is nothing to predict from: give a CLIP, --data, or --text where the model reads text")
    if not clips and timeline is not None:
        raise UserError("--timeline goes over a recording: give a CLIP")
    if clips and text and len(text) not in (1, len(clips)):
        raise UserError(
            f"--text is given {len(text)} times for {len(clips)} clips; give it once, or once for each clip"
        )
    if timeline is not None and not (math.isfinite(timeline) and timeline > 0):
        raise UserError(f"--timeline takes a length in seconds above 0, not {timeline:g}")
    if out is not None:
        _check_out(out, [run, *(clips or ()), *([data] if data else ())])
    chosen = _prediction_format(fmt, out, as_json, rows=data is not None, windows=timeline is not None)
    subtitles = chosen in (PredictionFormat.srt, PredictionFormat.vtt)
    if subtitles and clips and len(clips) > 1:
        raise UserError(f"subtitles belong to one recording, and {len(clips)} clips are given")

    with working() as result:
        from deepmsi.data.files import write_text
        from deepmsi.report import text as render

        if data is not None:
            from deepmsi.train.predict import predict_rows

            rows = predict_rows(run, data, split, _device(device), precision.value)
            as_table = chosen is PredictionFormat.csv
            document = render.render_rows(rows) if as_table else json_text([row.to_dict() for row in rows])
        else:
            from deepmsi.models.predict import load_run

            model = load_run(run, _device(device), precision.value)
            if clips and text and "text" not in model.modalities:
                say(f"This model reads {' and '.join(model.modalities)} alone: --text changes nothing.")
            texts = [text[0]] * len(clips) if clips and text and len(text) == 1 else text
            given: list[Path | None] = [*clips] if clips else [None] * len(text or ())
            predictions = model.predict(given, texts=texts, timeline=timeline, progress=True, precision=precision.value)
            if chosen is PredictionFormat.json:
                document = json_text([p.to_dict() for p in predictions])
            elif chosen is None:
                document = render.render_predictions(predictions)
            elif timeline is None:
                document = render.render_clips(predictions)
            elif subtitles:
                document = render.render_subtitles(predictions, web=chosen is PredictionFormat.vtt)
            else:
                document = render.render_timeline(predictions)
        if out is None:
            result.write(document)
        elif is_first():
            write_text(out, document)
            say(f"written to {out}")


def _check_out(out: Path, read: Sequence[Path]) -> None:
    """Refuse a place where no file can be written, and one that is, or lies in, what is read."""
    if not out.parent.is_dir():
        raise UserError(f"the folder of --out {out} does not exist; make it first")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it")
    if not out.exists():
        return
    if not out.is_file():
        raise UserError(f"--out {out} is no file; leave it out to write to standard output")
    there = [path for path in read if path.exists()]
    if any(path.samefile(out) or out.resolve().is_relative_to(path.resolve()) for path in there):
        raise UserError(f"--out {out} is of what is to be read, and would be lost: name another file")


def _prediction_format(
    fmt: PredictionFormat | None, out: Path | None, as_json: bool, *, rows: bool, windows: bool
) -> PredictionFormat | None:
    """How predictions of rows, of windows, or of clips are written: as asked, or by the name of --out.

    Else as CSV, and of clips and texts a line each (None).

    Raises:
        UserError: there is no such form of them, or two are asked for.
    """
    named = {f".{each}": each for each in PredictionFormat}.get(out.suffix.lower() if out else "")
    given = {"--json": PredictionFormat.json if as_json else None, f"--format {fmt}": fmt, f"--out {out}": named}
    asked = {option: each for option, each in given.items() if each is not None}
    if len(set(asked.values())) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other; give one of them")
    known = [each for each in PredictionFormat if windows or each in (PredictionFormat.csv, PredictionFormat.json)]
    for option, each in asked.items():
        if each not in known:
            raise UserError(f"{option} is for a timeline; add --timeline SECONDS to a CLIP, or give csv or json")
    if (rows or windows) and out is not None and out.suffix and not asked:
        kind = "rows are" if rows else "a timeline is"
        names = ", ".join(f".{each}" for each in known)
        raise UserError(f"--out {out}: {kind} written as {names}; name the file so, or give --format")
    return next(iter(asked.values()), PredictionFormat.csv if rows or windows else None)


def _device(asked: Device) -> str:
    import torch

    found = torch.cuda.is_available()
    if asked is Device.cuda and not found:
        raise UserError("--device is cuda, and torch finds no CUDA device; give cpu or auto")
    return "cuda" if found and asked is not Device.cpu else "cpu"


@app.command()
def ablate(
    run: RunArg,
    data: DataOpt,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where the table goes, in place of RUN/ablation, which reports read.",
            parser=_path,
        ),
    ] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train a model for each line, as the paper's Table 3, by RUN's protocol.")
    ] = False,
    keep: Annotated[
        str, typer.Option(metavar="SHARES", help="With --retrain: shares of tokens to keep, such as 0.25,0.5.")
    ] = "",
    frames: Annotated[
        str, typer.Option(metavar="COUNTS", help="With --retrain: frames per clip, such as 4,8; needs a manifest.")
    ] = "",
    split: Annotated[
        str | None,
        typer.Option(metavar="PART", help="Without --retrain: only train, dev or test, by the data's column split."),
    ] = None,
    device: OtherDeviceOpt = None,
    precision: PrecisionOpt = PrecisionName.fp32,
    as_json: JsonOpt = False,
) -> None:
    """Measure what each modality and each part of the model is worth, in one table.

    Every subset of the modalities; with --retrain also the model without the compression of visual tokens and
    without the contrastive term, and other shares of tokens and numbers of frames. Run again after an interruption,
    it goes on with these trainings; without --retrain every line is scored anew.
    """
    from deepmsi.train.ablate import ablate as ablate_run
    from deepmsi.train.ablate import ablation_table, variants_of

    shares, counts = _numbers("--keep", keep, float), _numbers("--frames", frames, int)
    if (shares or counts) and not retrain:
        raise UserError("--keep and --frames change the model, so each needs a training: add --retrain")
    changed = {"--split": split, "--device": device, "--precision": precision is not PrecisionName.fp32}
    if retrain and any(changed.values()):
        given = next(option for option, value in changed.items() if value)
        raise UserError(f"{given} is for the model of RUN; --retrain measures on RUN's own folds, as its recipe says")
    with working() as result:
        variants = variants_of(run, shares, counts) if retrain else None
        lines = ablate_run(
            run,
            data,
            out,
            "retrain" if retrain else "evaluate",
            variants,
            split=split,
            device=device and _device(device),
            precision=precision.value,
        )
        if as_json:
            result.write(json_text(lines))
        else:
            result.write(ablation_table(lines) + "\n")


def _numbers(option: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """The numbers of an option that lists them by commas."""
    try:
        return [kind(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"{option} takes numbers separated by commas, not {text!r}") from None


@app.command()
def export(
    run: RunArg,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.pt2", help="The program to write.", parser=_path)],
    backend: Annotated[
        ExportBackend, typer.Option(help="reference needs torch alone; auto calls deepmsi's kernels.")
    ] = ExportBackend.reference,
    as_json: JsonOpt = False,
) -> None:
    """Write the model as one torch.export program: frames and utterance vectors in, logits out, any batch size."""
    with working() as result:
        from deepmsi.models.export import argument_of, export_model
        from deepmsi.models.predict import load_run

        model = load_run(run)
        difference = export_model(model, out, backend=backend.value)
        inputs = [argument_of(name) for name in model.modalities]
        if as_json:
            result.write(
                json_text({"out": out, "inputs": inputs, "labels": model.config.names, "difference": difference})
            )
        else:
            result.write(f"{out}: {', '.join(inputs)} -> logits, equal to the model to {difference:.1e}\n")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders that `deepmsi train` wrote.", parser=_path)
    ],
    as_json: JsonOpt = False,
) -> None:
    """Write RUN/report.html, one self-contained page, and report.md beside it; of several runs a comparison too.

    Folds of RUN that ran apart are joined first. The comparison of all runs goes into the folder of the first, as
    comparison.html and comparison.md.
    """
    from deepmsi.report import report as write_report
    from deepmsi.report import report_comparison

    with working() as result:
        pages = [write_report(run) for run in runs]
        if len(runs) > 1:
            pages.append(report_comparison(runs))
        if as_json:
            files = [{"html": page, "markdown": page.with_suffix(".md")} for page in pages]
            result.write(json_text(files if len(files) > 1 else files[0]))
        else:
            result.writelines(f"{page}\n" for page in pages)


@app.command()
def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="A run, or a folder that holds predictions.csv.", parser=_path)
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, measured on the same rows.", parser=_path)],
    as_json: JsonOpt = False,
) -> None:
    """Compare two runs row by row: differences of the scores with intervals, and McNemar's test."""
    from deepmsi.report.compare import measured
    from deepmsi.report.text import render_comparison
    from deepmsi.train.metrics import compare_predictions

    with working() as result:
        comparison = compare_predictions(first, second)
        comparison["measured"] = {"a": measured(first), "b": measured(second)}
        if as_json:
            result.write(json_text(comparison))
        else:
            result.write(render_comparison(str(first), str(second), comparison))


@app.command()
def explain(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Tell of this run's model, too: what becomes a CUDA graph.", parser=_path),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show which implementation of each op can run on this machine, and why the others cannot.

    Of a RUN also whether its model is captured as CUDA graphs, in training and in inference, and if not, why.
    """
    from deepmsi import __version__, backend

    with working() as result:
        graphs = None if run is None else _graphs_of(run)
        if as_json:
            ops = {
                op: {name: backend.why_not(op, name) or "available" for name in backend.BACKENDS} for op in backend.OPS
            }
            document = {"deepmsi": __version__, "host": backend.host_info(), "ops": ops}
            result.write(json_text(document if graphs is None else {**document, "cuda_graphs": graphs}))
        else:
            result.write(f"{backend.explain()}\n")
            if graphs is not None:
                lines = [f"CUDA graphs in {what}: {said}\n" for what, said in graphs.items()]
                result.write("\n" + "".join(lines))


def _graphs_of(run: Path) -> dict[str, str]:
    """What becomes a CUDA graph of a run's model, or why it does not."""
    import torch

    from deepmsi.models.graphs import why_not_inference, why_not_training
    from deepmsi.models.predict import load_run
    from deepmsi.train.recipe import load_recipe
    from deepmsi.train.record import RECIPE

    model, recipe = load_run(run), run / RECIPE
    accumulation = load_recipe(recipe).train.accumulation if recipe.is_file() else 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "training": why_not_training(model, device, accumulation) or "captured, with train.cuda_graphs",
        "inference": why_not_inference(model, device) or "captured, by deepmsi.models.graphs.CapturedInference",
    }


def _resume_hint(argv: Sequence[str]) -> str:
    if _makes_a_run(argv):
        return f"interrupted; {_again(argv)}"
    if _command(argv) == "prepare":
        return f"interrupted; what is done is kept, go on with: deepmsi {shlex.join(argv)}"
    return f"interrupted; nothing half-written is left, {_again(argv)}"


def _again(argv: Sequence[str]) -> str:
    """What to do after a command that stopped: a run that has begun is refused without --resume."""
    if not _makes_a_run(argv):
        return "run the same command again"
    return f"go on with: deepmsi {shlex.join(argv if '--resume' in argv else [*argv, '--resume'])}"


def _makes_a_run(argv: Sequence[str]) -> bool:
    return _command(argv) in ("train", "finetune")


def _command(argv: Sequence[str]) -> str:
    return next((word for word in argv if not word.startswith("-")), "")


def _leave_full_disk_to_main_thread() -> None:
    """Print no traceback of a full disk from another thread: the one of the logs hands its error on."""
    hook = threading.excepthook

    def tell(problem: threading.ExceptHookArgs) -> None:
        if getattr(problem.exc_value, "errno", None) not in DISK_FULL:
            hook(problem)

    threading.excepthook = tell


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `deepmsi`; those of the process by default, which an interruption may then end at once.

    Returns:
        the exit code (see the head of this file).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # for the rest of the process: such a thread may outlive the command
        _leave_full_disk_to_main_thread()

    def leave(*_: object) -> NoReturn:
        try:
            print(f"deepmsi: {_resume_hint(words)}", file=sys.stderr)
        finally:
            os._exit(INTERRUPTED)

    try:
        with on_signals({signal.SIGINT: leave} if argv is None else {}):
            outcome = app(args=words, prog_name="deepmsi", standalone_mode=False)
        sys.stdout.flush()
        if outcome == INTERRUPTED:  # some releases of typer turn the interruption into its exit code
            raise KeyboardInterrupt
        return outcome if isinstance(outcome, int) else 0
    except UserError as error:
        onward = f"; free some space and {_again(words)}" if isinstance(error, DiskFullError) else ""
        say(f"deepmsi: {_one_line(str(error))}{onward}")
        return 2
    except _UsageProblem as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "deepmsi"
        if not error.format_message():  # bare `deepmsi`: the help has been printed
            return 2
        say(f"deepmsi: {_one_line(error.format_message())} (see: {where} --help)")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say(f"deepmsi: {_resume_hint(words)}")
        return INTERRUPTED
    except Terminated:
        say(f"deepmsi: {_resume_hint(words)}")
        return TERMINATED
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            say(
                f"deepmsi: a process that loads was lost ({_one_line(str(error))}): set train.workers=0, or give "
                "/dev/shm more room"
            )
            return 2
        # Python 3.11 makes one of what is raised while a class is made, as the many late imports do.
        if not isinstance(error.__cause__, KeyboardInterrupt | Terminated):
            raise
        say(f"deepmsi: {_resume_hint(words)}")
        return TERMINATED if isinstance(error.__cause__, Terminated) else INTERRUPTED
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        if encoding == "utf-8" or codecs.lookup(error.encoding).name != codecs.lookup(encoding).name:
            raise
        say(f"deepmsi: {error.object} is no name in this locale's encoding, {encoding}: set PYTHONUTF8=1")
        return 2
    except BrokenPipeError:  # the reader of the output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in DISK_FULL:
            place = f" while writing {error.filename}" if error.filename else ""
            say(f"deepmsi: the disk is full{place}; free some space and {_again(words)}")
        elif error.filename and error.strerror:  # a folder without rights, a file system that is read-only
            say(f"deepmsi: {error.filename}: {error.strerror}")
        else:
            raise
        return 2


if __name__ == "__main__":
    sys.exit(main())
