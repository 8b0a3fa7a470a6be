"""Two processes of torchrun: they share the rows, score each of them once, and give what one process gives."""

import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from small_corpus import FEATURES, LABELS, make_recipe, prepared_corpus, write_corpus

from deepmsi.data.files import TEMPORARY
from deepmsi.errors import UserError
from deepmsi.train.evaluate import evaluate
from deepmsi.train.processes import start_processes
from deepmsi.train.recipe import load_recipe
from deepmsi.train.run import train

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"
)


def torchrun(*words: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """Run something in two processes, as `torchrun --nproc-per-node 2` does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


# Evaluates as a user's call does, and leaves the rows that each process read.
EVALUATE = """
import os, sys
from pathlib import Path
from deepmsi.train.dataset import UtteranceDataset
from deepmsi.train.evaluate import evaluate

run, data, out = map(Path, sys.argv[1:])
read, fetch = [], UtteranceDataset.__getitem__
def recorded(self, key):
    read.append(self.data.rows[self.indices[key]].id)
    return fetch(self, key)
UtteranceDataset.__getitem__ = recorded
evaluate(run, data, out)
Path(f"{out}-rank-{os.environ['RANK']}.txt").write_text("\\n".join(read))
"""


# Evaluates, and leaves a file for each process that prepared.
PREPARE = """
import os, sys
from pathlib import Path
from deepmsi.data import prepare as module
from deepmsi.train.evaluate import evaluate

run, data, *out = map(Path, sys.argv[1:])
prepare = module.prepare
def recorded(*words, **options):
    Path(f"{__file__}-prepared-{os.environ['RANK']}.txt").write_text("")
    return prepare(*words, **options)
module.prepare = recorded
evaluate(run, data, *out)
"""


# A group that gives up after two seconds, as NCCL's does after ten minutes.
PATIENT = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch
from torch.distributed.distributed_c10d import _set_pg_timeout
from deepmsi.train import processes

processes.start_processes(torch.device("cpu"))
_set_pg_timeout(timedelta(seconds=2))
rank, _ = processes.process_rank()
told = processes.from_main(lambda: time.sleep(4) or "told")
with processes.claimed_by_all(Path(sys.argv[1])) as free:
    time.sleep(4 * rank)
    processes.barrier()
Path(f"{sys.argv[1]}-{rank}.txt").write_text(f"{told} {free}")
"""


# The command, which leaves the threads that it still has at its end.
COMMAND = """
import atexit, os, sys
from pathlib import Path
def leave_threads():
    names = [comm.read_text() for comm in Path("/proc/self/task").glob("*/comm")]
    Path(f"{__file__}-threads-{os.environ['RANK']}.txt").write_text("".join(names))
atexit.register(leave_threads)  # registered first, called last
from deepmsi.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("rows", [13, 1], ids=["13 rows", "one row"])
def test_two_processes_evaluate_to_the_bits_of_one(rows: int, split_corpus: Path, tmp_path: Path) -> None:
    run, one, two = (tmp_path / name for name in ("run", "one", "two"))
    # A batch of one row, so that a row's sums do not depend on its neighbours.
    train(make_recipe(train={"epochs": 1, "eval_batch_size": 1}), split_corpus, run)
    data = prepared_corpus(tmp_path / "data", rows=rows, noise=2.0)
    expected = evaluate(run, data, one)
    script = tmp_path / "script.py"
    script.write_text(EVALUATE)
    torchrun(script, run, data, two)
    assert expected["n"] == rows
    for name in ("metrics.json", "predictions.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    shares = [Path(f"{two}-rank-{rank}.txt").read_text().split() for rank in (0, 1)]
    ids = [row["id"] for row in csv.DictReader((one / "predictions.csv").open(newline=""))]
    assert shares == [ids[0::2], ids[1::2]]
    truth, predicted = zip(
        *((r["label"], r["predicted"]) for r in csv.DictReader((two / "predictions.csv").open(newline=""))), strict=True
    )
    written = json.loads((two / "metrics.json").read_text())
    assert written["accuracy"] == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    weighted = f1_score(truth, predicted, average="weighted", zero_division=0)
    assert written["weighted_f1"] == pytest.approx(weighted, abs=1e-12)
    assert written["confusion_matrix"] == confusion_matrix(truth, predicted, labels=LABELS).tolist()
    assert rows == 1 or 0 < written["accuracy"] < 1


def test_two_processes_that_accumulate_train_as_one_on_the_joined_batch(split_corpus: Path, tmp_path: Path) -> None:
    """Five micro-batches of a row in each process; 6 of the 36 rows are left for the last step."""
    recipe, losses = tmp_path / "small.yaml", []
    for processes, sizes in ((1, {"batch_size": 10}), (2, {"batch_size": 1, "accumulation": 5})):
        changes = {
            "loss": {"class_weights": [1.0, 5.0, 0.2]},
            "fusion": FEATURES["fusion"] | {"dropout": 0.0, "modality_dropout": 0.0},
            "train": FEATURES["train"] | {"epochs": 1, "log_every": 1} | sizes,
        }
        recipe.write_text(yaml.safe_dump(FEATURES | changes))
        run = tmp_path / str(processes)
        if processes == 1:
            train(load_recipe(recipe), split_corpus, run)
        else:
            torchrun("-m", "deepmsi", "train", recipe, "--data", split_corpus, "--out", run)
        events = map(json.loads, (run / "history.jsonl").read_text().splitlines())
        losses.append([(e["loss"], e["cross_entropy"]) for e in events if e["split"] == "train"])
    assert len(losses[0]) == 4
    assert losses[1] == [pytest.approx(pair, rel=1e-4) for pair in losses[0]]


def test_processes_wait_for_the_first_longer_than_their_group_does(tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "folder"
    script.write_text(PATIENT)
    torchrun(script, folder)
    assert [Path(f"{folder}-{rank}.txt").read_text() for rank in (0, 1)] == ["told True"] * 2


def test_processes_that_nothing_joins_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: None)  # it starts no group where LOCAL_RANK is not said
    with pytest.raises(UserError, match="which nothing joins: start by torchrun"):
        start_processes(torch.device("cpu"))


# The first process meets what nobody expects while the others wait for it.
BROKEN = """
import sys
from pathlib import Path
from deepmsi.train import rows, run
from deepmsi.train.recipe import load_recipe

def full(*words, **options):
    raise MemoryError("all of it is taken")
rows.open_data = full
run.train(load_recipe(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_what_ends_the_first_process_ends_those_that_wait_for_it(split_corpus: Path, tmp_path: Path) -> None:
    script, recipe = tmp_path / "script.py", tmp_path / "small.yaml"
    script.write_text(BROKEN)
    recipe.write_text(yaml.safe_dump(FEATURES))
    begun = time.monotonic()
    done = torchrun(script, recipe, split_corpus, tmp_path / "run", fails=True)
    assert "MemoryError: all of it is taken" in done.stderr
    assert time.monotonic() - begun < 120  # and not a day


@pytest.mark.parametrize("written", [True, False], ids=["with --out", "without"])
def test_one_process_prepares_a_manifest_for_both(written: bool, split_corpus: Path, tmp_path: Path) -> None:
    run, script, out = tmp_path / "run", tmp_path / "script.py", tmp_path / "out"
    train(make_recipe(train={"epochs": 1}), split_corpus, run)
    script.write_text(PREPARE)
    torchrun(script, run, write_corpus(tmp_path / "raw", rows=9), *([out] if written else []))
    assert [path.name for path in tmp_path.glob("*-prepared-*")] == ["script.py-prepared-0.txt"]
    assert not written or json.loads((out / "metrics.json").read_text())["n"] == 9


def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    """35 rows in three folds: no part divides by two, and neither does the last batch."""
    data, recipe, run = prepared_corpus(tmp_path / "data", rows=35), tmp_path / "small.yaml", tmp_path / "run"
    settings = FEATURES["train"] | {"epochs": 1, "batch_size": 3, "selection": "auto"}
    recipe.write_text(yaml.safe_dump({**FEATURES, "protocol": {"name": "group-kfold", "folds": 3}, "train": settings}))
    words = ("train", recipe, "--data", data, "--out", run)
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    done = torchrun(script, *words)
    left = [Path(f"{script}-threads-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("python" in names and "gloo" not in names for names in left), left
    assert done.stdout.count("\naccuracy ") == 1
    assert done.stderr.count("Protocol: ") == 1
    facts = json.loads((run / "run.json").read_text())
    assert facts["processes"] == 2
    assert facts["finished"]
    assert (run / "model" / "model.safetensors").is_file()
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["complete"], metrics["n"], len(metrics["folds"])) == (True, 35, 3)
    table = list(csv.DictReader((run / "predictions.csv").open(newline="")))
    assert Counter(row["id"] for row in table) == Counter(f"r{i:03d}" for i in range(35))
    hits = sum(row["label"] == row["predicted"] for row in table)
    assert metrics["accuracy"] == pytest.approx(hits / 35, abs=1e-12)
    assert not [*run.rglob("*.part"), *run.rglob(f"{TEMPORARY}*")]
    # Both trained: an epoch of the two is half as many steps as it would be for one.
    history = [json.loads(line) for line in (run / "folds" / "01" / "history.jsonl").read_text().splitlines()]
    inner = 35 - metrics["folds"][0]["test"]
    assert max(event["step"] for event in history) <= -(-inner // 6)
    # A second call finds everything done, and one process reads the run like its own.
    again = torchrun("-m", "deepmsi", *words, "--resume", "--json")
    assert json.loads(again.stdout) == metrics
    assert evaluate(run, data)["n"] == 35


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_mistake_is_told_and_leaves_no_process_waiting(command: str, split_corpus: Path, tmp_path: Path) -> None:
    recipe, run, nowhere = tmp_path / "small.yaml", tmp_path / "run", tmp_path / "nowhere"
    recipe.write_text(yaml.safe_dump(FEATURES))
    words: tuple[object, ...] = ("train", recipe, "--data", nowhere, "--out", run)
    if command == "evaluate":
        train(make_recipe(train={"epochs": 1}), split_corpus, run)
        words = ("evaluate", run, "--data", nowhere)
    said = torchrun("-m", "deepmsi", *words, fails=True).stderr
    assert f"deepmsi: There is no data at {nowhere}" in said
    assert "[rank" not in said  # no traceback of ours; the launcher adds its own summary
