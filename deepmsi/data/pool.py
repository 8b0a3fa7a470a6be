"""Runs shard tasks in worker processes: hands them out, follows their rows, survives a worker's crash."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import deepmsi
from deepmsi.data.shards import Task, make_shard
from deepmsi.errors import DiskFullError, UserError


def usable_cpus() -> int:
    """Return how many processors this process may use, by its affinity and by the quota of its container."""
    from joblib import cpu_count

    return int(cpu_count())


def run_tasks(tasks: Sequence[Task], workers: int, advance: Callable[[int], None]) -> None:
    """Make the shards of ``tasks``.

    Args:
        tasks: what to make, in any order of completion.
        workers: processes; 0 works in this one.
        advance: called with the number of rows that came to an end, from one thread at a time.

    Raises:
        UserError: the first failure to write; the other workers are stopped, complete shards stay.
    """
    if workers == 0:
        for task in tasks:
            make_shard(task, lambda i: advance(1) if i else None)
            advance(1)
        return
    _Pool(tasks, min(workers, len(tasks)), advance).run()


class _Pool:
    def __init__(self, tasks: Sequence[Task], workers: int, advance: Callable[[int], None]) -> None:
        self._todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in tasks:
            self._todo.put(task)
        self._advance = advance
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._processes: set[subprocess.Popen[str]] = set()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        try:
            for thread in self._threads:
                while thread.is_alive():
                    thread.join(0.2)  # a join without end would not see Ctrl-C
        finally:
            self._stop()
            for thread in self._threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _stop(self) -> None:
        self._stopping.set()
        with self._lock:
            for process in self._processes:
                process.kill()

    def _serve(self) -> None:
        worker: _Worker | None = None
        try:
            while not self._stopping.is_set():
                try:
                    task = self._todo.get_nowait()
                except queue.Empty:
                    return
                told = 0  # rows of this task that the progress bar has seen

                def row_started(i: int) -> None:
                    nonlocal told
                    if i > told:
                        self._report(i - told)
                        told = i

                while not self._stopping.is_set():
                    if worker is None:
                        worker = self._start()
                    crash = worker.make(task, row_started)
                    if crash is None:
                        self._report(len(task.sources) - told)
                        break
                    self._drop(worker)
                    worker = None
                    task = replace(task, crashed={**task.crashed, crash[0]: crash[1]})
        except BaseException as error:
            if not self._stopping.is_set():
                self._error = error
                self._stop()
        finally:
            if worker is not None:
                self._drop(worker)

    def _report(self, rows: int) -> None:
        with self._lock:
            self._advance(rows)

    def _start(self) -> "_Worker":
        worker = _Worker()
        with self._lock:
            self._processes.add(worker.process)
            if self._stopping.is_set():
                worker.process.kill()
        return worker

    def _drop(self, worker: "_Worker") -> None:
        worker.close()
        with self._lock:
            self._processes.discard(worker.process)


class _Worker:
    """One worker process and its two pipes."""

    def __init__(self) -> None:
        home = str(Path(deepmsi.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        # Processes share the machine's cores already; threads inside them would only compete.
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deepmsi.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in: IO[str] = self.process.stdin
        self._out: IO[str] = self.process.stdout

    def make(self, task: Task, row_started: Callable[[int], None]) -> tuple[int, str] | None:
        """Have a task done; where the process dies instead, return the row it was at and a reason.

        Raises:
            UserError: the shard cannot be written.
            RuntimeError: the process died outside of any row.
        """
        row: int | None = None
        try:
            self._in.write(task.to_json() + "\n")
            self._in.flush()
            for line in self._out:
                message: dict[str, Any] = json.loads(line)
                if "row" in message:
                    row = message["row"]
                    row_started(message["row"])
                elif "error" in message:
                    raise (DiskFullError if message["full"] else UserError)(message["error"])
                else:
                    return None
        except BrokenPipeError:
            pass
        status = self.process.wait()
        if row is None or row in task.crashed or status >= 0:
            raise RuntimeError(f"a worker of deepmsi prepare ended with status {status}:\n{self._tail()}")
        name = signal.Signals(-status).name
        cause = "killed, perhaps for want of memory" if name == "SIGKILL" else f"ended by {name}"
        return row, f"{task.sources[row].id}: the process that decoded this clip was {cause}"

    def close(self) -> None:
        """End the process and reap it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self._in, self._out, self._stderr):
            with contextlib.suppress(OSError):
                pipe.close()

    def _tail(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode("utf-8", "replace")[-2000:]
