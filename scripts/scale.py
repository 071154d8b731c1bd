"""Measure time and memory of the commands that read records, on a study with thousands of runs.

    python scripts/scale.py --records 10000 --cells 5000

The study is created in a temporary folder from committed records of `results/baselines`: one per method, with configurations
for other tasks, ranks, rates and seeds. Every command runs in a separate process. `first` is without an index; `again` uses
the index that the first command has written. A small study shows the cost that does not depend on the number of records. CPU
seconds are reported in addition to wall seconds, because wall time depends on the load of the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from wlora.cli.sweep import compose
from wlora.config.identity import run_id, scientific_fields
from wlora.config.schema import Config
from wlora.models.source import locate
from wlora.storage.records import Record, RecordStore
from wlora.storage.sealing import seal

REAL = Path("results/baselines")
TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
METHODS = ("lora", "wlora", "rlora", "wlora_plus", "adalora", "melora", "increlora", "flexlora")
RANKS = (1, 4, 8)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SMALL = 120  # all settings of the first method
STUDY = "results_dir={}"
SETTING = ["model=minilm", "precision=fp32"]


def main() -> None:
    """Create the studies, run the commands, and write the table to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000, help="runs in the study")
    parser.add_argument("--cells", type=int, default=5_000, help="cells in the sweeps")
    parser.add_argument("--folder", type=Path, help="folder of the studies, created if missing; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path("results/reliability"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() if args.folder is None else nullcontext(args.folder) as folder:
        studies = {count: Path(folder) / f"study_{count}" for count in (args.records, SMALL)}
        for count, study in studies.items():
            if not study.exists():
                write_study(study, count)
        rows = []
        for name, words, lines, turns in commands(args.cells):
            for count, study in studies.items() if words[0] == "wlora.run" else [(args.records, studies[args.records])]:
                for turn in turns:
                    filled, given = ([word.format(study) for word in part] for part in (words, lines))
                    told = measure(filled, given, study, turn)
                    rows.append({"command": name, "records": count, "read": turn, **told})
                    print(_line(rows[-1].values()), flush=True)
                    write(rows, args)  # after every command, because all commands together take long


def write(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the measurements as JSON and as a table."""
    args.out.mkdir(parents=True, exist_ok=True)
    summary = {
        "records": args.records,
        "cells": args.cells,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[1],
        "rows": rows,
    }
    (args.out / "scale.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [f"# python scripts/scale.py --records {args.records} --cells {args.cells}", "", _line(rows[0])]
    lines += [f"|{' --- |' * len(rows[0])}", *(_line(row.values()) for row in rows)]
    (args.out / "scale.md").write_text("\n".join(lines) + "\n")


def _line(values: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"


def commands(cells: int) -> Iterator[tuple[str, list[str], list[str], tuple[str, ...]]]:
    """Yield the commands to measure: name, arguments after `python -m`, input lines, and turns (`first`, `again`).

    `{}` in arguments and lines is replaced by the folder of the study.
    """
    both = ("first", "again")
    yield "tables all", ["wlora.tables", "all", STUDY], [], both
    yield "report", ["wlora.report", STUDY], [], both
    tuned = [*SETTING, STUDY, "task=sst2", f"method={METHODS[0]}", "rank=8", "seed=77", "dry_run=true"]
    yield "run lr=tuned dry_run=true", ["wlora.run", *tuned, "lr=tuned"], [], both
    yield "run lr=1e-3 dry_run=true", ["wlora.run", *tuned, "lr=1e-3"], [], ("again",)
    asked = [f"lr={','.join(map(str, RATES))}", "seed=range(10)"]
    yield "dry run of the study", ["wlora.sweep"], [*sweeps(RANKS, asked)], ("again",)
    ranks = range(1, 1 + -(-cells // (len(TASKS) * len(METHODS))))
    asked = ["lr=1e-4,1e-3,1e-2", "seed=range(5)"]
    yield f"sweep of {cells:,} cells or a few more", ["wlora.sweep"], [*sweeps(ranks, asked)], ("again",)


def sweeps(ranks: Sequence[int], points: Sequence[str]) -> Iterator[str]:
    """Yield one sweep per task and method, as in the scripts for tables."""
    for task, method in itertools.product(TASKS, METHODS):
        own = [f"task={task}", *_method_words(method), f"rank={','.join(map(str, ranks))}"]
        yield " ".join([*SETTING, STUDY, *own, *points])


def _method_words(method: str) -> list[str]:
    return [f"method={method}", *(["k=5"] if method in ("wlora", "rlora") else [])]


def measure(words: Sequence[str], lines: Sequence[str], study: Path, turn: str) -> dict[str, Any]:
    """Run one command; return wall and CPU seconds and its peak resident memory in MB."""
    if turn == "first":
        for index in (".index", ".curves"):
            (study / "records" / index).unlink(missing_ok=True)
    begin = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", *words], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert child.stdin is not None and child.stderr is not None
    child.stdin.write("\n".join(lines))
    child.stdin.close()
    told = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {child.returncode}:\n{told}")
    seconds = time.perf_counter() - begin
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_s": round(seconds, 1), "cpu_s": round(cpu, 1), "peak_mb": round(usage.ru_maxrss / 1024)}


# The study ------------------------------------------------------------------------------------------------------------


def write_study(study: Path, count: int) -> None:
    """Write the records and learning curves of `count` runs: all settings with one seed, then with the next."""
    store = RecordStore(study)
    store.folder.mkdir(parents=True)
    models = [(*_real(method), compose_all(method)) for method in METHODS]
    settings = [(record, curve, config) for record, curve, configs in models for config in configs]
    grid = ((seed, *setting, rate) for seed in itertools.count() for setting in settings for rate in RATES)
    for seed, record, curve, config, rate in itertools.islice(grid, count):
        made = make_record(record, dataclasses.replace(config, seed=seed, lr=rate, results_dir=str(study)))
        made.curve = _write_curve(store, made, curve)
        store.path(made.run_id).write_text(seal(dataclasses.asdict(made)))


def compose_all(method: str) -> list[Config]:
    """Return the configurations of a method for all tasks and ranks."""
    words = [*SETTING, *_method_words(method)]
    return [compose([*words, f"task={task}", f"rank={rank}"]) for task in TASKS for rank in RANKS]


def _real(method: str) -> tuple[Record, list[dict[str, Any]]]:
    """Return a committed run of a method: its record and its learning curve."""
    store = RecordStore(REAL)
    found = (record for record in store if record.status == "success" and record.config["method"]["name"] == method)
    record = next(found)
    return record, store.read_curve(record)


def make_record(real: Record, config: Config) -> Record:
    """Return a record of a configuration with the content of a real record, but with other scores."""
    model_data = locate(config.model).fingerprint
    fields = scientific_fields(config, task_data=None, model_data=model_data, precision=config.precision)
    metrics = {name: _score(config, name) for name in config.task.metrics}
    return dataclasses.replace(
        real,
        run_id=run_id(fields),
        config=dataclasses.asdict(config),
        task={"name": config.task.name, "version": "main", "data": "hub", "train_rows": config.task.train_rows},
        model={**real.model, "name": config.model.name, "fingerprint": model_data},
        metrics={**metrics, "loss": 0.5},
        primary_metric=config.task.primary_metric,
        environment={**real.environment, "precision": config.precision},
    )


def _score(config: Config, metric: str) -> float:
    """Return a deterministic score that depends on task, method, rank, learning rate and seed."""
    drawn = random.Random(f"{config.task.name} {config.method['name']} {config.rank} {config.lr} {config.seed} {metric}")
    return round(0.6 + 0.3 * drawn.random(), 4)


def _write_curve(store: RecordStore, record: Record, real: Sequence[dict[str, Any]]) -> str:
    """Write a learning curve with the record's metrics at every evaluation; return its checksum."""
    writer = store.curve(record.run_id, write=False)
    for point in real:
        writer({**point, "metrics": record.metrics} if "metrics" in point else point)
    text = "".join(json.dumps(point) + "\n" for point in writer.points)
    store.path(record.run_id).with_suffix(".jsonl").write_text(text)
    return writer.checksum()


if __name__ == "__main__":
    main()
