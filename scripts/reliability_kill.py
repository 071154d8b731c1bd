"""Runs of every method are killed at random moments and continued: the part `kill` of `scripts/reliability.py`."""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from wlora.config.schema import config_folder
from wlora.storage.records import Record, RecordStore

ENTRY = Path(__file__).with_name("reliability.py")
STEPS = 80
# Two epochs: WeightLoRA's cut at half of the run is allowed only within the first one.
ROWS = STEPS // 2 * 4 * 3
SETTING = [
    *("task=story_nli", "model=tiny_bert", f"task.max_train_rows={ROWS}", "task.max_eval_rows=48", "task.batch_size=4"),
    *("train.accumulation_steps=3", f"train.max_steps={STEPS}", "train.eval_every=20", "train.checkpoint_every=3"),
    *("++rank=4", "lr=1e-3", "offline=true"),  # ++: some methods do not read the rank
]
CUT_LATER = [f"method.select_steps={STEPS // 2}"]
# NoRA's default outer rank of 64 exceeds a tiny model's width. The variants have more structural changes, or later ones.
OWN = {"nora": ["method.outer_rank=16"], "flexlora": ["method.ranks=[2,4,4,3]"]}
OWN |= dict.fromkeys(("wlora", "wlora_plus", "wlora_depth", "rlora"), CUT_LATER)
METHODS = sorted(file.stem for file in (config_folder() / "method").glob("*.yaml"))
COMPARED = ("status", "metrics", "adapters", "events", "parameters", "steps")
DOINGS = ("starting", "accumulating", "updating", "restructuring", "evaluating", "saving")


def kill_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """Kill runs of every method and continue them."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        streams = {name: random.Random(f"{args.seed}/{name}") for name in METHODS}
        jobs = [pool.submit(kill_method, name, args.rounds, streams[name], Path(folder)) for name in METHODS]
        rows = [row for job in jobs for row in job.result()]
    counts = Counter(row["outcome"] for row in rows)
    resumed = sum(row["resumed_at"] != "" for row in rows)
    summary = {
        "kills": len(rows),
        "at_random_moments": sum(row["aimed_at"] == "" for row in rows),
        "methods": len(METHODS),
        **{name: counts[name] for name in ("equal", "different", "lost")},
        "resumed": resumed,
        "killed_while": dict(Counter(row["killed_while"] for row in rows)),
        "killed_where": dict(Counter(row["killed_where"] for row in rows)),
    }
    return rows, summary, counts["equal"] == len(rows) and resumed > len(rows) // 2


def kill_method(method: str, rounds: int, moments: random.Random, folder: Path) -> list[dict[str, Any]]:
    """Kill runs of one method, at `rounds` random moments and an aimed one. Then continue each to its end.

    The aimed moment is in the middle of a structural change or, for a method without one, while a checkpoint is written.
    """
    words = [*SETTING, f"method={method}", *OWN.get(method, [])]
    whole = folder / method / "whole"
    start(words, whole).wait()
    expected = only_record(whole)
    assert expected is not None and expected.status == "success", f"{method} fails without being killed"
    changes = [event["step"] for event in expected.events]
    aim = f"restructuring/{moments.randint(1, len(set(changes)))}" if changes else f"saving/{moments.randint(1, STEPS // 3)}"
    rows = []
    for number in range(rounds + 1):
        results = folder / method / str(number)
        aimed = aim if number == rounds else ""
        step, part, doing = kill_one(words, results, moments, aimed)
        left = sorted(int(path.name.removeprefix("step-")) for path in results.glob("checkpoints/*/*/step-*"))
        start(words, results).wait()
        record = only_record(results)
        outcome = "lost" if record is None else "equal" if same(expected, record, whole, results) else "different"
        rows.append(
            {
                "method": method,
                "aimed_at": aimed.partition("/")[0],
                "killed_while": doing,
                "step": step,
                "micro_batch": part,
                "killed_where": place(step, doing, changes),
                "checkpoints_left": " ".join(map(str, left)),
                "resumed_at": " ".join(map(str, record.resumed_at)) if record else "",
                "outcome": outcome,
            }
        )
        print(f"{method}: {rows[-1]}", flush=True)
        shutil.rmtree(results)
    return rows


def kill_one(words: list[str], results: Path, moments: random.Random, aim: str) -> tuple[int, int, str]:
    """Start a run and kill it; return the step, its completed micro-batches, and the activity at that moment."""
    results.mkdir(parents=True)
    moment = results / "moment"
    moment.write_bytes(bytes(3))
    process = start(words, results, "--folder", str(moment), *(["--aim", aim] if aim else []))
    # All steps are equally likely. Within a step, the moment depends on a delay, and thus on the load of the processor.
    step, pause = moments.randint(1, STEPS), moments.uniform(0, 0.03)
    if not aim:
        while process.poll() is None and moment.read_bytes()[0] < step:
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
    process.wait()
    at, part, doing = moment.read_bytes()
    assert process.returncode == -signal.SIGKILL, f"{words}: ended with {process.returncode} before it was killed"
    return at, part, DOINGS[doing]


def place(step: int, doing: str, changes: Sequence[int]) -> str:
    """Describe the position of a moment relative to the structural changes of the whole run."""
    if doing == "restructuring":
        return "during a change"
    if not changes:
        return "no change in this method"
    return "before the first" if step <= min(changes) else "after the last" if step > max(changes) else "between changes"


def start(words: list[str], results: Path, *observed: str) -> subprocess.Popen[bytes]:
    """Start a run in a new process. With `observed` arguments, an `Observer` writes its progress to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    entry = [str(ENTRY), "victim"] if observed else ["-m", "wlora.run"]
    command = [sys.executable, *entry, *words, f"results_dir={results}", *observed]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


class Observer:
    """Writes the progress of a run to a memory-mapped file, which survives a kill. It can also kill the run.

    The file has three bytes: the step, the number of completed micro-batches of the step, and the index of the activity in
    `DOINGS`. Each method with the prefix `around_` wraps a method of the trainer, which it gets as `original`.

    Args:
        moment: the file.
        aim: an activity and a count: with `saving/4`, the process kills itself in the middle of the fourth saving. If empty,
            the process does not kill itself.
    """

    def __init__(self, moment: Path, aim: str) -> None:
        self._target, _, self._count = aim.partition("/")
        self._met = Counter[str]()
        self._micro_batches = 0
        with open(moment, "r+b") as stream:
            self._noted = mmap.mmap(stream.fileno(), 3)

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        before, self._noted[2] = self._noted[2], DOINGS.index(what)
        self._met[what] += 1
        try:
            yield
        finally:
            self._noted[2] = before

    def _die_if_aimed_at(self, what: str) -> None:
        if what == self._target and self._met[what] == int(self._count):
            os.kill(os.getpid(), signal.SIGKILL)

    def around_gradients(self, original: Callable[..., Any], trainer: Any, batches: Any) -> Any:
        """Write the step to the file."""
        self._noted[0], self._noted[1], self._noted[2] = trainer.step + 1, 0, DOINGS.index("accumulating")
        self._micro_batches = len(batches)
        return original(trainer, batches)

    def around_backward(self, original: Callable[..., Any], *given: Any) -> None:
        """Write the number of micro-batches to the file. After the last one, the optimisers update the parameters."""
        original(*given)
        self._noted[1] += 1
        if self._noted[1] == self._micro_batches:
            self._noted[2] = DOINGS.index("updating")

    def around_restructure(self, original: Callable[..., Any], trainer: Any, events: list[Any]) -> None:
        """Write a structural change to the file. An aimed kill happens between model and optimisers."""
        with self._doing("restructuring") if events else nullcontext():
            if events:
                self._die_if_aimed_at("restructuring")
            original(trainer, events)

    def around_evaluate(self, original: Callable[..., Any], *given: Any) -> Any:
        """Write an evaluation to the file."""
        with self._doing("evaluating"):
            return original(*given)

    def around_write(self, original: Callable[..., Any], *given: Any) -> Any:
        """Write the saving of a checkpoint to the file."""
        with self._doing("saving"):
            return original(*given)

    def hear(self, event: str, given: tuple[Any, ...]) -> None:
        """Audit hook: an aimed kill happens when the first file of a checkpoint exists and the others do not."""
        if event == "open" and str(given[0]).endswith("/facts.json") and "x" in str(given[1]):
            self._die_if_aimed_at("saving")


def run_observed(moment: Path, aim: str, words: list[str]) -> None:
    """Execute `python -m wlora.run` with an `Observer`.

    Args:
        moment: the file of the observer.
        aim: the moment at which the observer kills the process.
        words: the command line of the run.
    """
    from accelerate import Accelerator

    from wlora.cli import run
    from wlora.experiment import run as experiment
    from wlora.training.checkpoints import CheckpointStore
    from wlora.training.trainer import Trainer

    def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *given, **named: around(original, *given, **named))

    observer = Observer(moment, aim)
    wrap(experiment, "compute_gradients", observer.around_gradients)
    wrap(Accelerator, "backward", observer.around_backward)
    wrap(Trainer, "_restructure", observer.around_restructure)
    wrap(Trainer, "_evaluate", observer.around_evaluate)
    wrap(CheckpointStore, "write", observer.around_write)
    sys.addaudithook(observer.hear)
    sys.argv = ["wlora.cli.run", *words]
    run.main()


def only_record(results: Path) -> Record | None:
    """Return the only record of a folder; None if there is no readable one."""
    found = list(RecordStore(results))
    return found[0] if len(found) == 1 else None


def same(expected: Record, record: Record, whole: Path, results: Path) -> bool:
    """Tell whether records and learning curves of two runs are bitwise equal."""
    curves = [next(folder.glob("records/*.jsonl")).read_bytes() for folder in (whole, results)]
    return curves[0] == curves[1] and all(getattr(expected, key) == getattr(record, key) for key in COMPARED)
