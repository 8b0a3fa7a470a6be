"""The command line's own manners: help, usage errors, exit codes, a clean standard output."""

import errno
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from deepmsi import cli
from deepmsi.errors import UserError
from deepmsi.progress import progress_bar
from deepmsi.terminal import Terminated, plain

COMMANDS = ("demo", "check", "prepare", "recipe", "train", "evaluate", "predict", "export", "report", "explain")


def test_help_names_every_command(deepmsi) -> None:
    outcome = deepmsi("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert command in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(deepmsi, command: str) -> None:
    outcome = deepmsi(command, "--help")
    assert outcome.code == 0
    assert "Usage: deepmsi " + command in outcome.out


def test_a_recipe_is_printed_in_full_and_is_a_recipe(deepmsi, mistake, tmp_path) -> None:
    outcome = deepmsi("recipe", "clips", "--set", "train.epochs=3")
    assert outcome.code == 0
    (tmp_path / "mine.yaml").write_text(outcome.out)
    again = deepmsi("recipe", tmp_path / "mine.yaml", "--json")
    assert json.loads(again.out)["train"]["epochs"] == 3
    assert "did you mean 'train.epochs'" in mistake("recipe", "clips", "--set", "train.epoch=3")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from deepmsi.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): assert main(['train', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'timm', 'torchvision', 'av', 'sklearn', 'matplotlib', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(deepmsi) -> None:
    from deepmsi import __version__

    outcome = deepmsi("--version")
    assert (outcome.code, outcome.out) == (0, f"deepmsi {__version__}\n")


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deepmsi", "check", "nowhere.csv"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("deepmsi: ")
    assert "nowhere.csv" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_by_the_module_records_the_command(monkeypatch) -> None:
    """What a report shows as the command can be given again: it was `__main__.py train ...`."""
    monkeypatch.setattr(sys, "argv", ["somewhere/__main__.py", "train"])
    monkeypatch.setattr(cli, "main", lambda: 0)
    with pytest.raises(SystemExit):
        runpy.run_module("deepmsi.__main__")
    assert sys.argv == ["deepmsi", "train"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bogus"], "bogus"),
        (["train"], "RECIPE"),
        (["train", "demo", "--out", "run"], "--data"),
        (["train", "demo", "--data", "x"], "--out"),
        (["predict", "run"], "give a CLIP, --data, or --text"),
        (["predict", "run", "--text", "so", "--timeline", "3"], "goes over a recording: give a CLIP"),
        (["report", "run", "--shiny"], "--shiny"),
        (["prepare", "m.csv", "--out", "d", "--frames", "0"], "frames"),
        (["prepare", "m.csv", "--out", "d", "--frames", "5000"], "frames"),
        (["prepare", "m.csv", "--out", "d", "--size", "5000"], "size"),
        (["prepare", "m.csv", "--out", "d", "--text-encoder", ""], "text_encoder"),
        (["prepare", "m.csv", "--out", "d", "--audio-encoder", ""], "audio_encoder"),
        (["prepare", "m.csv", "--out", "d", "--resize", "zoom"], "zoom"),
        (["prepare", "m.csv", "--out", "d", "--sample-rate", "10"], "sample_rate"),
        (["prepare", "m.csv", "--out", "d", "--face-model", "yunet.onnx"], "add --face"),
        (["evaluate", "run", "--data", "d", "--drop", "smell"], "smell"),
        (["predict", "run", "a.mp4", "--timeline", "0"], "above 0"),
        (["predict", "run", "a.mp4", "--timeline", "nan"], "above 0"),
        (["predict", "run", "a.mp4", "b.mp4", "--timeline", "3", "--format", "srt"], "one recording"),
        (["predict", "run", "a.mp4", "--format", "srt"], "--timeline"),
        (["predict", "run", "a.mp4", "--timeline", "3", "--json", "--format", "srt"], "exclude"),
        (["predict", "run", "a.mp4", "b.mp4", "c.mp4", "--text", "x", "--text", "y"], "2 times for 3 clips"),
        (["predict", "run", "a.mp4", "--out", "x.srt"], "--out x.srt is for a timeline; add --timeline SECONDS"),
        (["predict", "run", "a.mp4", "--timeline", "3", "--json", "--out", "x.srt"], "--json and --out x.srt exclude"),
        (["predict", "run", "a.mp4", "--json", "--out", "x.csv"], "--json and --out x.csv exclude each other"),
        (
            ["predict", "run", "a.mp4", "--timeline", "3", "--out", "x.ass"],
            "x.ass: a timeline is written as .csv",
        ),
        (["predict", "run", "a.mp4", "--out", "no/such/folder/x.csv"], "no/such/folder"),
        (["predict", "nowhere", "a.mp4"], "nowhere"),
        (["evaluate", "nowhere", "--data", "d"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["train", "no-such-recipe", "--data", "d", "--out", "r"], "no-such-recipe"),
        (["train", "nowhere.yaml", "--data", "d", "--out", "r"], "nowhere.yaml"),
        (["train", "demo", "--data", "d", "--out", "r", "--set", "train.epoch=3"], "train.epochs"),
        (["train", "demo", "--data", "d", "--out", "r", "--set", "train.epochs"], "key=value"),
        (["train", "demo", "--data", "nowhere", "--out", "r"], "nowhere"),
        (["prepare", "nowhere.csv", "--out", "d"], "nowhere.csv"),
        (["prepare", "nowhere.csv", "--out", ""], "'--out': it is empty"),
        (["train", "demo", "--data", "", "--out", "r"], "'--data': it is empty"),
        (["evaluate", "run", "--data", "d", "--out="], "'--out': it is empty"),
        (["report", ""], "'RUN': it is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(mistake, tmp_path, monkeypatch, words, says) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in mistake(*words)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_bare_command_shows_help_and_fails(deepmsi) -> None:
    outcome = deepmsi()
    assert outcome.code == 2
    assert "Commands" in outcome.out


def test_explain(deepmsi) -> None:
    outcome = deepmsi("explain")
    assert outcome.code == 0
    for word in ("vsc_compress", "window_attention", "dilated_causal_conv1d", "cross_modal_contrastive", "reference"):
        assert word in outcome.out


@pytest.mark.parametrize(("processes", "says"), [(None, True), ("1", True), ("2", False)])
def test_only_one_process_of_several_prints(deepmsi, monkeypatch, processes, says) -> None:
    monkeypatch.setenv("RANK", "1")
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    assert bool(deepmsi("explain").out) == says


def test_explain_json(deepmsi) -> None:
    outcome = deepmsi("explain", "--json")
    assert outcome.code == 0
    assert "vsc_compress" in json.dumps(json.loads(outcome.out))


class TestEndings:
    """How each ending of the work becomes an exit code and a line."""

    @staticmethod
    def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        def fail(run: Path) -> Path:
            raise error

        monkeypatch.setattr("deepmsi.report.report", fail)

    def test_user_error_stays_on_one_line(self, monkeypatch, mistake) -> None:
        self.ending(monkeypatch, UserError("a sentence\nwith a break"))
        assert mistake("report", "run") == "deepmsi: a sentence with a break"

    def test_a_bar_that_is_left_behind_shares_no_line_with_it(self, monkeypatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        bars = []

        def fail(run: Path) -> Path:
            bars.append(progress_bar(total=2, description="reporting", unit="run"))
            raise UserError("a sentence")

        for left in list(getattr(tqdm, "_instances", ())):
            left.close()  # of an earlier test: it would push this one a line down
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        monkeypatch.setattr("deepmsi.report.report", fail)
        assert cli.main(["report", "run"]) == 2
        bars[0].close()
        assert "\rreporting:" in terminal.getvalue()
        assert "\rdeepmsi: a sentence\n" in terminal.getvalue()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["full", "quota"])
    def test_full_disk(self, monkeypatch, mistake, number) -> None:
        self.ending(monkeypatch, OSError(number, "No space left on device", "/data/shard"))
        line = mistake("report", "run")
        assert "disk is full" in line
        assert "/data/shard" in line

    @pytest.mark.parametrize("command", ["train demo", "finetune text demo"])
    def test_a_full_disk_says_how_a_run_goes_on(self, monkeypatch, mistake, command) -> None:
        def full(*args: object, **kwargs: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("deepmsi.train.run.train", full)
        monkeypatch.setattr("deepmsi.train.finetune.finetune", full)
        line = mistake(*command.split(), "--data", "clips", "--out", "run")
        assert line.endswith(f"free some space and go on with: deepmsi {command} --data clips --out run --resume")

    def test_a_full_disk_is_told_once(self, monkeypatch, capsys) -> None:
        """The thread that writes the logs of training fails, too, and may come to that after the command."""

        def full(number: int = errno.ENOSPC) -> None:
            raise OSError(number, "of the thread")

        monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
        monkeypatch.setattr(sys, "argv", ["deepmsi", "report", "run"])
        self.ending(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
        assert cli.main() == 2
        for number in (errno.ENOSPC, errno.EIO):
            thread = threading.Thread(target=full, args=[number])
            thread.start()
            thread.join()
            assert ("of the thread" in capsys.readouterr().err) == (number == errno.EIO)

    def test_unexpected_errors_keep_their_traceback(self, monkeypatch, deepmsi) -> None:
        self.ending(monkeypatch, ZeroDivisionError("a bug"))
        with pytest.raises(ZeroDivisionError):
            deepmsi("report", "run")
        self.ending(monkeypatch, OSError(errno.EIO, "broken device"))
        with pytest.raises(OSError, match="broken device"):
            deepmsi("report", "run")

    def test_interruption(self, monkeypatch, deepmsi) -> None:
        self.ending(monkeypatch, KeyboardInterrupt())
        outcome = deepmsi("report", "run")
        assert outcome.code == 130
        assert outcome.err.strip().startswith("deepmsi: interrupted")
        assert len(outcome.err.strip().splitlines()) == 1

    @pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
    def test_interruption_while_a_class_is_made(self, monkeypatch, deepmsi, raised, code) -> None:
        class Field:
            def __set_name__(self, *_: object) -> None:
                raise raised

        monkeypatch.setattr("deepmsi.report.report", lambda run: type("Made", (), {"field": Field()}))
        outcome = deepmsi("report", "run")
        assert outcome.code == code
        assert outcome.err.strip().startswith("deepmsi: interrupted")

    @pytest.mark.parametrize(
        ("function", "command"), [("run.train", "train"), ("finetune.finetune", "finetune text")], ids=lambda text: text
    )
    def test_interrupted_training_says_how_to_go_on(self, function, command, monkeypatch, deepmsi) -> None:
        def interrupted(*args: object, **kwargs: object) -> dict[str, object]:
            raise KeyboardInterrupt

        monkeypatch.setattr(f"deepmsi.train.{function}", interrupted)
        outcome = deepmsi(*command.split(), "demo", "--data", "my clips", "--out", "run")
        assert outcome.code == 130
        assert outcome.err.strip().endswith(f"deepmsi {command} demo --data 'my clips' --out run --resume")


@pytest.mark.parametrize(("arguments", "swallowed"), [("", True), ("['explain']", False)], ids=["command", "called"])
def test_interruption_while_torch_is_imported(tmp_path, arguments, swallowed) -> None:
    """The first second or two of every command; parts of torch swallow exceptions as they are imported.

    The process of the command ends at once, that of someone who calls `main` goes on.
    """
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        f"try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    if not {swallowed}: raise\n"
    )
    code = (
        # What runs behind a shell ignores the signal.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['deepmsi', 'explain']\n"
        f"from deepmsi import cli; code = cli.main({arguments}); print('after'); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "deepmsi: interrupted; nothing half-written is left, run the same command again"
    assert done.returncode == 130
    assert done.stdout.strip() == ("after" if arguments else "")


@pytest.mark.parametrize("variable", ["DEEPMSI_BACKEND", "DEEPMSI_ISA"])
def test_a_mistaken_environment_is_one_line(variable) -> None:
    environment = {**os.environ, variable: "fast"}
    code = "import sys; from deepmsi import cli; sys.exit(cli.main(['explain']))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"deepmsi: {variable} must ")
    assert done.stderr.count("\n") == 1


def test_sigterm_leaves_no_temporary_folder(monkeypatch, deepmsi, trained, clips, tmp_path) -> None:
    """`evaluate` without --out prepares a manifest in one."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def killed(*args: object) -> None:
        assert list(tmp_path.iterdir()), "the folder is there"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("deepmsi.train.evaluate.open_shared", killed)
    outcome = deepmsi("evaluate", trained, "--data", clips / "manifest.csv")
    assert outcome.code == 143
    assert outcome.err.strip().splitlines()[-1].startswith("deepmsi: interrupted")
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_to_a_group_is_no_error_of_its_workers(monkeypatch, deepmsi) -> None:
    """As `timeout` and systemd send it: torch's handler raises where a DataLoader's worker has been ended."""

    def worker_fails(*_: object) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")

    def killed(run: Path) -> Path:
        signal.signal(signal.SIGCHLD, worker_fails)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGCHLD)

    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr("deepmsi.report.report", killed)
    try:
        assert deepmsi("report", "run").code == 143
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_nothing_else_reaches_standard_output(monkeypatch, deepmsi, tmp_path) -> None:
    """With or without --json: what libraries and child processes print goes to standard error."""

    def chatty(run: Path) -> Path:
        print("from Python")
        subprocess.run(["echo", "from a child"], check=True)
        return tmp_path / "report.html"

    monkeypatch.setattr("deepmsi.report.report", chatty)
    outcome = deepmsi("report", "run", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["html"].endswith("report.html")
    assert "from Python" in outcome.err
    assert "from a child" in outcome.err
    print("restored")
    assert deepmsi("report", "run").out.strip() == str(tmp_path / "report.html")


def test_numbers_that_json_lacks_become_null() -> None:
    import numpy as np

    value = plain({"a": float("nan"), "b": np.float32(0.5), "c": (Path("x"), np.arange(2)), 3: True})
    assert value == {"a": None, "b": 0.5, "c": ["x", [0, 1]], "3": True}


def test_a_process_that_loads_and_is_lost_is_one_sentence(monkeypatch, capsys) -> None:
    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that\nit is full.")

    monkeypatch.setattr(cli, "app", lost)
    assert cli.main(["train"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "worker (pid 7) is killed by signal: Bus error. It is possible that it is full." in told
    assert "set train.workers=0, or give /dev/shm more room" in told
