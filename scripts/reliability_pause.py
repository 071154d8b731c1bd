"""Pause the owner of a run for longer than its lock's lease: the part `pause` of `scripts/reliability.py`.

A first process runs a tiny experiment and is paused at a random moment. In every second trial, an external signal
pauses it. In the other trials, it pauses itself before a random write operation, that is, between a check and the write.
When the lease has expired, a second process takes over the run. The first process is continued before a random write of
the second process, or after the end of the second process.

All processes are forked from one process that has imported all modules and loaded the data and the model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from wlora.adapters.peft_format import RECORDED
from wlora.cli.job import Outcome, attempt
from wlora.cli.sweep import compose
from wlora.config.schema import Config
from wlora.errors import ConfigError
from wlora.experiment import run as experiment
from wlora.experiment.shared_inputs import SharedInputs
from wlora.storage import locks
from wlora.storage.records import Record, RecordStore

LEASE_SECONDS = 2.0
WORDS = [
    *("task=story_nli", "model=tiny_bert", "task.max_train_rows=32", "task.max_eval_rows=16", "task.batch_size=4"),
    *("method=wlora", "method.select_steps=4", "rank=4", "lr=1e-3", "offline=true", "precision=fp32"),
    *("train.max_steps=12", "train.eval_every=2", "train.checkpoint_every=3", "train.save_adapter=true"),
]
COMPARED = ("status", "metrics", "adapters", "events", "parameters", "steps", "model", "curve", "predictions")
CALLS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")
PARTS = ("locks", "records", "checkpoints", "adapters")
FAULTS = ("torn", "double_winner", "no_winner", "different", "files_left", "tracebacks")
ENDED = "its end"
DEADLINE = 300
# Maximum delay in seconds between a call and the signal that pauses the process: the time of a step on a busy machine.
LONGEST_BETWEEN_CALLS = 0.1

Row = dict[str, Any]


@dataclasses.dataclass
class Watch:
    """An audit hook that counts the calls of its process that write in a folder, and acts before one of them.

    Attributes:
        folder: the folder, with a final slash.
        parts: the subfolders in which calls are counted.
        at: the number of the call before which the hook acts, counted from 1.
        count: the number of calls so far, in memory that is shared with the parent process.
        last: the call that comes next, such as `rename records`.
    """

    folder: str
    parts: tuple[str, ...]
    at: int = 0
    act: Callable[[], None] = lambda: None
    count: mmap.mmap = dataclasses.field(default_factory=lambda: mmap.mmap(-1, 2))
    last: str = ""

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if event not in CALLS or not isinstance(given[0], str | os.PathLike):
            return
        path = os.fspath(given[0])
        if not path.startswith(self.folder) or (event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        part = path.removeprefix(self.folder).partition("/")[0]
        if part in self.parts:
            self.last = f"{event.removeprefix('os.')} {part}"
            self.count[:] = (self.calls() + 1).to_bytes(2, "little")
            if self.calls() == self.at:
                self.act()

    def calls(self) -> int:
        """Return the number of calls so far."""
        return int.from_bytes(self.count[:], "little")


class Stage:
    """The state that all forked processes share: the composed experiment, its data and its model."""

    def __init__(self, folder: Path) -> None:
        locks.LEASE_SECONDS = LEASE_SECONDS
        torch.set_num_threads(1)
        self.config = compose(WORDS)
        self.stock = SharedInputs(keep=True)
        self.run(folder)  # load data and model before forking

    def run(self, folder: Path) -> Record:
        """Run the experiment in this process."""
        config: Config = dataclasses.replace(self.config, results_dir=str(folder))
        return experiment.run(config, (), self.stock)

    def fork(self, folder: Path, name: str, watch: Watch, *, until_done: bool = False) -> int:
        """Run the experiment in a forked process; return the process id.

        The process writes `<name>.json` (how it ended) and `<name>.out` (its output) to the folder.
        """
        process = os.fork()
        if not process:
            output = os.open(folder / f"{name}.out", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.addaudithook(watch)
            _end(lambda: self._live(folder, name, until_done))
        return process

    def _live(self, folder: Path, name: str, until_done: bool) -> None:
        trained = False

        def act() -> Outcome:
            nonlocal trained
            record = self.run(folder / "results")
            trained = record.trained
            return Outcome("", record.status, None, 0)

        outcome = attempt("", act)
        while until_done and outcome.status == "running":  # skipped, because the first process was running it
            time.sleep(0.3)
            outcome = attempt("", act)
        told = {"code": outcome.exit_code, "status": outcome.status, "trained": trained}
        (folder / f"{name}.json").write_text(json.dumps(told))


def _end(act: Callable[[], None]) -> NoReturn:
    """Call a function in a forked process with a time limit, and exit without the cleanup of the parent process."""
    signal.alarm(DEADLINE)
    try:
        act()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def pause_all(args: argparse.Namespace) -> tuple[list[Row], Row, bool]:
    """Make `args.rounds` trials; return the rows, the summary, and whether all trials succeeded."""
    begin, moments, rows = time.monotonic(), random.Random(args.seed), list[Row]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage = Stage(folder / "warm")
        watches = [Watch(f"{folder}/{kind}/results/", parts) for kind, parts in (("whole", PARTS), ("again", PARTS[1:]))]
        for kind, watch in zip(("whole", "again"), watches, strict=True):
            (folder / kind).mkdir()
            os.waitpid(stage.fork(folder / kind, "first", watch), 0)
        (expected,) = RecordStore(folder / "whole" / "results")
        running: dict[int, Path] = {}
        started = 0
        while running or sum(row["stopped_before"] != ENDED for row in rows) < args.rounds:
            paused = sum(row["stopped_before"] != ENDED for row in rows)
            while len(running) < min(args.jobs, args.rounds - paused):
                own, started = folder / str(started), started + 1
                at, on = (moments.randint(1, watch.calls()) for watch in watches)
                late = moments.random() < 1 / 3
                trial = Trial(stage, own, at, 0 if late else on, moments.random() if started % 2 else None)
                sys.stdout.flush()
                process = os.fork()
                if not process:
                    _end(lambda trial=trial: trial.play(expected))  # type: ignore[misc]
                running[process] = own
            own = running.pop(os.wait()[0])
            rows.append({"trial": int(own.name), **json.loads((own / "row.json").read_text())})
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(own)
    return rows, *judge(rows, time.monotonic() - begin)


def judge(rows: list[Row], seconds: float) -> tuple[Row, bool]:
    """Return the summary of all pauses, and whether all trials succeeded."""
    paused = [row for row in rows if row["stopped_before"] != ENDED]
    counts = {key: sum(row[key] for row in rows) for key in FAULTS}
    summary = {
        "pauses": len(paused),
        "lease_seconds": LEASE_SECONDS,
        **counts,
        "seconds": round(seconds),
        **{key: dict(Counter(row[key] for row in paused)) for key in ("first", "second", "continued", "stopped_before")},
    }
    return summary, not any(counts.values()) and sum(row["first"] == "taken over" for row in paused) > len(paused) // 4


@dataclasses.dataclass
class Trial:
    """One trial: a pause of a run's owner, and the takeover by another process.

    Attributes:
        at: the number of the first process's call at which it is paused (before the call, or soon after it by a signal).
        on: the number of the second process's call before which the first continues; 0: after the end of the second.
        chance: with a signal, the delay after the call as a share of the maximum; otherwise None.
    """

    stage: Stage
    folder: Path
    at: int
    on: int
    chance: float | None

    def play(self, expected: Record) -> None:
        """Execute the trial and write a row of the table to `row.json`."""
        self.folder.mkdir()
        root = f"{self.folder}/results/"
        watch = Watch(root, PARTS, 0 if self.chance is not None else self.at)
        watch.act = lambda: self._stop_itself(watch)
        first = self.stage.fork(self.folder, "first", watch)
        try:
            where = self._wait_for_its_pause(first, watch)

            def go_on() -> None:
                if where != ENDED:
                    (self.folder / "continued").touch()
                    os.kill(first, signal.SIGCONT)

            second = self.stage.fork(self.folder, "second", Watch(root, PARTS[1:], self.on, go_on), until_done=True)
            os.waitpid(second, 0)
            during = (self.folder / "continued").exists()
            if where != ENDED:
                os.kill(first, signal.SIGCONT)
                os.waitpid(first, 0)
        except BaseException:
            os.kill(first, signal.SIGKILL)
            raise
        row = {
            "stopped_before": where,
            "continued": "while the second process ran" if during else "after the second process",
            **{name: self._describe(name) for name in ("first", "second")},
            **self._look(expected),
        }
        (self.folder / "row.json").write_text(json.dumps(row))

    def _stop_itself(self, watch: Watch) -> None:
        (self.folder / "stopped").write_text(watch.last)
        os.kill(os.getpid(), signal.SIGSTOP)

    def _wait_for_its_pause(self, process: int, watch: Watch) -> str:
        """Wait until the first process is paused or has ended; return the place of the pause."""
        if self.chance is None:
            _, status = os.waitpid(process, os.WUNTRACED)
            return (self.folder / "stopped").read_text() if os.WIFSTOPPED(status) else ENDED
        while watch.calls() < self.at:
            time.sleep(0.005)
            if os.waitpid(process, os.WNOHANG)[0]:
                return ENDED
        time.sleep(self.chance * LONGEST_BETWEEN_CALLS)
        os.kill(process, signal.SIGSTOP)
        return "any moment" if os.WIFSTOPPED(os.waitpid(process, os.WUNTRACED)[1]) else ENDED

    def _told(self, name: str) -> Row:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else {"code": "none", "status": "", "trained": False}

    def _describe(self, name: str) -> str:
        """Describe how a process ended."""
        told = self._told(name)
        if told["code"]:
            said = (self.folder / f"{name}.out").read_text()
            return "taken over" if "has taken over the run, because this one" in said else f"exit code {told['code']}"
        return "published" if told["trained"] else "found it done" if told["status"] == "success" else "left it"

    def _look(self, expected: Record) -> Row:
        """Check the files that two processes have written for one run. Return whether, or how often, each fault occurs."""
        results, outputs = self.folder / "results", [self.folder / f"{name}.out" for name in ("first", "second")]
        winners = sum(self._describe(name) == "published" for name in ("first", "second"))
        adapters = {f"adapters/{expected.run_id}/{file}": key for file, key in RECORDED.items()}
        wanted = {*adapters, *(f"records/{expected.run_id}.{kind}" for kind in ("json", "jsonl", "parquet"))}
        found = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
        whole = different = False
        with contextlib.suppress(ConfigError, FileNotFoundError):
            record = RecordStore(results).load(expected.run_id)
            if record is not None and record.status == "success" and record.curve and record.predictions:
                RecordStore(results).read_curve(record)
                RecordStore(results).read_predictions(record)
                sums = {key: hashlib.sha256((results / file).read_bytes()).hexdigest() for file, key in adapters.items()}
                whole = all(sums[key].startswith(record.model[key] or "none") for key in sums)
                different = any(getattr(record, key) != getattr(expected, key) for key in COMPARED)
        return {
            "torn": not whole,
            "double_winner": winners > 1,
            "no_winner": winners == 0,
            "different": different,
            "files_left": len(found - wanted),
            "tracebacks": sum("Traceback" in output.read_text() for output in outputs),
        }
