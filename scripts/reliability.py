"""Kills runs at random moments and looks at what is left: `kill` for whole runs, `store` for records of many processes.

    python scripts/reliability.py kill --rounds 3
    python scripts/reliability.py store

Both write a table to results/reliability and exit with 1 if anything was lost, torn, different or done twice.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wlora.config import config_folder
from wlora.locks import RunLock
from wlora.records import Record, RecordStore

SETTING = [
    *("task=story_nli", "model=tiny_bert", "task.max_train_rows=160", "task.max_eval_rows=48", "task.batch_size=4"),
    *("train.accumulation_steps=2", "train.max_steps=120", "train.eval_every=30", "train.checkpoint_every=3", "rank=4"),
    *("lr=1e-3", "offline=true"),
]
# NoRA's frame of rank 64 is wider than a tiny model; some variants have more structure than the default.
OWN = {"nora": ["method.outer_rank=16"], "flexlora": ["method.ranks=[2,4,4,3]"]}
METHODS = sorted(file.stem for file in (config_folder() / "method").glob("*.yaml"))
COMPARED = ("status", "metrics", "adapters", "events", "parameters", "steps")
WORKERS, RECORDS_EACH, KILLS = 8, 100, 40


def main() -> None:
    """Run one of the two tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "store", "work"))
    parser.add_argument("--rounds", type=int, default=3, help="kills per method")
    parser.add_argument("--jobs", type=int, default=2, help="methods at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("results/reliability"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "work":
        work(args.folder, args.seed)
        return
    rows, summary, well = kill_all(args) if args.what == "kill" else store(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / f"{args.what}.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (args.out / f"{args.what}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    sys.exit(0 if well else 1)


# Whole runs ----------------------------------------------------------------------------------------------------------


def kill_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """Kill runs of every method and go on with them."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        streams = {name: random.Random(f"{args.seed}/{name}") for name in METHODS}
        jobs = [pool.submit(kill_method, name, args.rounds, streams[name], Path(folder)) for name in METHODS]
        rows = [row for job in jobs for row in job.result()]
    counts = Counter(row["outcome"] for row in rows)
    resumed = sum(row["resumed_at"] != "" for row in rows)
    summary = {"kills": len(rows), **{name: counts[name] for name in ("equal", "different", "lost")}, "resumed": resumed}
    return rows, summary, counts["equal"] == len(rows) and resumed > len(rows) // 2


def kill_method(method: str, rounds: int, moments: random.Random, folder: Path) -> list[dict[str, Any]]:
    """Kill one method's run `rounds` times, each time anew; every run then goes on to its end."""
    words = [*SETTING, f"method={method}", *OWN.get(method, [])]
    whole = folder / method / "whole"
    begin = time.monotonic()
    start(words, whole).wait()
    seconds = time.monotonic() - begin
    expected = only_record(whole)
    assert expected is not None and expected.status == "success", f"{method} fails without being killed"
    rows = []
    for number in range(rounds):
        results = folder / method / str(number)
        process = start(words, results)
        while process.poll() is None and not [*results.glob("records/*.jsonl")]:
            time.sleep(0.02)
        # From the first step to about the last.
        pause = moments.uniform(0, max(0.1, float(expected.seconds["total"])))
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = sorted(int(path.name.removeprefix("step-")) for path in results.glob("checkpoints/*/step-*"))
        start(words, results).wait()
        record = only_record(results)
        outcome = "lost" if record is None else "equal" if same(expected, record, whole, results) else "different"
        rows.append(
            {
                "method": method,
                "killed_after_s": round(pause, 2),
                "checkpoints_left": " ".join(map(str, left)),
                "resumed_at": " ".join(map(str, record.resumed_at)) if record else "",
                "outcome": outcome,
            }
        )
        print(f"{method}: {rows[-1]}", flush=True)
        shutil.rmtree(results)
    print(f"{method}: one run takes {seconds:.0f} s", flush=True)
    return rows


def start(words: list[str], results: Path) -> subprocess.Popen[bytes]:
    """Start a run in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "wlora.run", *words, f"results_dir={results}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


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
            time.sleep(moments.uniform(0.2, 1.0))
            index = moments.randrange(WORKERS)
            if kills < KILLS and workers[index].poll() is None:
                workers[index].kill()
                workers[index].wait()
                kills += 1
                workers[index] = start_worker(folder, index)
        completed = Counter((folder / "completed").read_text().split())
        readable = [record.run_id for record in RecordStore(folder) if record.status == "success"]
        files = [path.stem for path in (folder / "records").glob("*.json")]
    summary = {
        "processes": WORKERS,
        "kills": kills,
        "records": len(readable),
        "torn": len(files) - len(readable),
        "completed_twice": sum(count > 1 for count in completed.values()),
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
            with lock.held():
                done = records.read(name)
                if done is None or done.status != "success":
                    records.write(Record(run_id=name, status="running", config={"padding": "x" * 20_000}))
                    records.write(Record(run_id=name, status="success", config={"padding": "x" * 20_000}))
                    with open(folder / "completed", "a") as stream:
                        stream.write(name + "\n")
            names.remove(name)


if __name__ == "__main__":
    main()
