"""Kills and pauses runs at random moments and looks at what is left.

    python scripts/reliability.py kill --rounds 3       whole runs of every method, killed and gone on with
    python scripts/reliability.py store                 records of many processes, some of which are killed
    python scripts/reliability.py pause --rounds 200    owners of a run, stopped until another process has taken it over
    python scripts/reliability.py faults --minutes 25   file operations of runs, answered with EIO, ENOSPC, ESTALE or EMFILE

All write a table (.csv, .md) and a summary (.json) to results/reliability and exit with 1 if anything was lost, torn,
different or done twice.
"""

from __future__ import annotations

import argparse
import csv
import json
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
from wlora.storage.claims import Claim
from wlora.storage.locks import RunLock
from wlora.storage.records import Record, RecordStore

STEPS = 80
SETTING = [
    *("task=story_nli", "model=tiny_bert", "task.max_train_rows=160", "task.max_eval_rows=48", "task.batch_size=4"),
    *("train.accumulation_steps=3", f"train.max_steps={STEPS}", "train.eval_every=20", "train.checkpoint_every=3"),
    *("rank=4", "lr=1e-3", "offline=true"),
]
CUT_LATER = [f"method.select_steps={STEPS // 2}"]
# NoRA's frame of rank 64 is wider than a tiny model; some variants have more structure than the default, or have it later.
OWN = {"nora": ["method.outer_rank=16"], "flexlora": ["method.ranks=[2,4,4,3]"]}
OWN |= dict.fromkeys(("wlora", "wlora_plus", "wlora_depth", "rlora"), CUT_LATER)
METHODS = sorted(file.stem for file in (config_folder() / "method").glob("*.yaml"))
COMPARED = ("status", "metrics", "adapters", "events", "parameters", "steps")
DOINGS = ("starting", "accumulating", "updating", "restructuring", "evaluating", "saving")
WORKERS, RECORDS_EACH, KILLS = 8, 100, 40


def main() -> None:
    """Run one of the tests, or be one of their processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "store", "pause", "faults", "work", "victim"))
    parser.add_argument(
        "--rounds", type=int, help="kills per method at random moments, one more is aimed (3); pauses in all (200)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="methods, or pauses, at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--minutes", type=float, default=25, help="of `faults`: calls that are left by then go unanswered")
    parser.add_argument("--out", type=Path, default=Path("results/reliability"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--aim", default="", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "work":
        work(args.folder, args.seed)
        return
    if args.what == "victim":
        run_observed(args.folder, args.aim, args.words)
        return
    if args.what == "pause":
        from reliability_pause import pause_all  # which imports torch

        args.rounds = args.rounds or 200
        rows, summary, well = pause_all(args)
    elif args.what == "faults":
        from reliability_faults import faults

        rows, summary, well = faults(args.minutes)
    else:
        args.rounds = args.rounds or 3
        rows, summary, well = kill_all(args) if args.what == "kill" else store(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / f"{args.what}.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (args.out / f"{args.what}.json").write_text(json.dumps(summary, indent=1) + "\n")
    (args.out / f"{args.what}.md").write_text(page(args.what, rows, summary))
    print(json.dumps(summary))
    sys.exit(0 if well else 1)


def page(what: str, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Return a summary and, of killed runs, every row as Markdown."""
    said = [f"- {key.replace('_', ' ')}: {value}" for key, value in summary.items() if not isinstance(value, dict)]
    said += [
        f"- {key.replace('_', ' ')}: {', '.join(f'{name} {count}' for name, count in value.items())}"
        for key, value in summary.items()
        if isinstance(value, dict)
    ]
    lines = [f"# python scripts/reliability.py {what}", "", *said]
    if what == "kill":
        head = list(rows[0])
        lines += ["", f"| {' | '.join(name.replace('_', ' ') for name in head)} |", f"|{' --- |' * len(head)}"]
        lines += [f"| {' | '.join(str(row[name]) for name in head)} |" for row in rows]
    return "\n".join(lines) + "\n"


# Whole runs ----------------------------------------------------------------------------------------------------------


def kill_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """Kill runs of every method and go on with them."""
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
    """Kill one method's run at `rounds` random moments and an aimed one, each time anew; all then go on to their end.

    The aimed moment is in the middle of a structural change or, of a method without one, of writing a checkpoint.
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
    """Start a run and kill it; returns the step, the micro-batches of it that were done, and what was being done."""
    results.mkdir(parents=True)
    moment = results / "moment"
    moment.write_bytes(bytes(3))
    process = start(words, results, "--folder", str(moment), *(["--aim", aim] if aim else []))
    # Any moment of any step is as likely; within a step the time decides, which the processor's load stretches.
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
    """Say where a moment lies among the structural changes of the whole run."""
    if doing == "restructuring":
        return "during a change"
    if not changes:
        return "no change in this method"
    return "before the first" if step <= min(changes) else "after the last" if step > max(changes) else "between changes"


def start(words: list[str], results: Path, *observed: str) -> subprocess.Popen[bytes]:
    """Start a run in a fresh process, with `observed` words as one that notes its moment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    entry = [__file__, "victim"] if observed else ["-m", "wlora.run"]
    command = [sys.executable, *entry, *words, f"results_dir={results}", *observed]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def run_observed(moment: Path, aim: str, words: list[str]) -> None:
    """Be `python -m wlora.run` and note step, micro-batch and activity in a mapped file, which outlives a kill.

    `aim` is an activity and a count, as in `saving/4`: the process kills itself in the middle of the fourth of them.
    """
    from wlora.cli import run
    from wlora.training import checkpoints
    from wlora.training import trainer as loop

    target, _, count = aim.partition("/")
    met = Counter[str]()
    with open(moment, "r+b") as stream:
        noted = mmap.mmap(stream.fileno(), 3)

    @contextmanager
    def doing(what: str) -> Iterator[None]:
        before, noted[2] = noted[2], DOINGS.index(what)
        met[what] += 1
        try:
            yield
        finally:
            noted[2] = before

    def die(what: str) -> None:
        if what == target and met[what] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *given, **named: around(original, *given, **named))

    def train_step(original: Callable[..., Any], trainer: Any, step: int, batches: Any) -> Any:
        noted[0], noted[1], noted[2] = step, 0, DOINGS.index("accumulating")
        met["micro-batches"] = len(batches)
        return original(trainer, step, batches)

    def backward(original: Callable[..., Any], trainer: Any, loss: Any) -> None:
        original(trainer, loss)
        noted[1] += 1
        if noted[1] == met["micro-batches"]:
            noted[2] = DOINGS.index("updating")

    def restructure(original: Callable[..., Any], trainer: Any, events: list[Any]) -> None:
        with doing("restructuring") if events else nullcontext():
            if events:
                die("restructuring")  # the model is another, its optimisers are not
            original(trainer, events)

    def evaluate(original: Callable[..., Any], *given: Any) -> None:
        with doing("evaluating"):
            original(*given)

    def write(original: Callable[..., Any], *given: Any) -> Any:
        with doing("saving"):
            return original(*given)

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and str(given[0]).endswith("/facts.json") and "x" in str(given[1]):
            die("saving")  # the first file is there, the others are not

    wrap(loop.Trainer, "_train_step", train_step)
    wrap(loop.Trainer, "_backward", backward)
    wrap(loop.Trainer, "_restructure", restructure)
    wrap(loop.Trainer, "_evaluate", evaluate)
    wrap(checkpoints.CheckpointStore, "write", write)
    sys.addaudithook(hear)
    sys.argv = ["wlora.cli.run", *words]
    run.main()


def only_record(results: Path) -> Record | None:
    """Return the one record of a folder, None if there is none that can be read."""
    found = list(RecordStore(results))
    return found[0] if len(found) == 1 else None


def same(expected: Record, record: Record, whole: Path, results: Path) -> bool:
    """Tell whether two runs ended alike, bit for bit: record and learning curve."""
    curves = [next(folder.glob("records/*.jsonl")).read_bytes() for folder in (whole, results)]
    return curves[0] == curves[1] and all(getattr(expected, key) == getattr(record, key) for key in COMPARED)


# Records of many processes -------------------------------------------------------------------------------------------


def store(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """Let processes complete the same records in one folder, and kill and replace them as they go."""
    moments, kills, total = random.Random(seed), 0, WORKERS * RECORDS_EACH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = [start_worker(folder, index) for index in range(WORKERS)]
        while any(worker.poll() is None for worker in workers):
            time.sleep(moments.uniform(0.05, 0.3))
            index = moments.randrange(WORKERS)
            if kills < KILLS and workers[index].poll() is None:
                workers[index].kill()
                workers[index].wait()
                kills += 1
                workers[index] = start_worker(folder, index)
        completed = Counter((folder / "completed").read_text().split())
        readable = [record.run_id for record in RecordStore(folder) if record.status == "success"]
        files = [path.stem for path in (folder / "records").glob("*.json")]
        left = [path.name for path in (folder / "records").iterdir() if path.suffix != ".json"]
    summary = {
        "processes": WORKERS,
        "kills": kills,
        "records": len(readable),
        "torn": len(files) - len(readable),
        "completed_twice": sum(count > 1 for count in completed.values()),
        "half_written_files_left": len(left),
    }
    rows = [{"record": name, "completed": completed[name]} for name in sorted(files)]
    return rows, summary, (len(readable), summary["torn"], summary["completed_twice"]) == (total, 0, 0) and kills > 0


def start_worker(folder: Path, index: int) -> subprocess.Popen[bytes]:
    """Start one of the processes that complete records."""
    command = [sys.executable, __file__, "work", "--folder", str(folder), "--seed", str(index)]
    return subprocess.Popen(command)


def work(folder: Path, seed: int) -> None:
    """Complete whatever record is not complete and nobody else's, until all are."""
    names = [f"{number:016x}" for number in range(WORKERS * RECORDS_EACH)]
    random.Random(seed).shuffle(names)
    records = RecordStore(folder)
    while names:
        for name in list(names):
            lock = RunLock(folder, name)
            if not lock.acquire():
                continue
            claim = Claim(folder, lock, lock.token or "")
            with lock.held(), claim.opened():
                own, done = RecordStore(folder, claim.put), records.read(name)
                if done is None or done.status != "success":
                    own.write(Record(run_id=name, status="running", config={"padding": "x" * 20_000}))
                    own.write(Record(run_id=name, status="success", config={"padding": "x" * 20_000}))
                    with open(folder / "completed", "a") as stream:
                        stream.write(name + "\n")
            names.remove(name)


if __name__ == "__main__":
    main()
