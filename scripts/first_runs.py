"""The first study on real data: six methods, MiniLM, MRPC and SST-2, three seeds (dev-set numbers of a 22M model).

    python scripts/first_runs.py DATA [RESULTS]

DATA holds `mrpc/` and `sst2/` with train and validation files. The learning rate of each method is the best of three on
SST-2 with seed 0 (on the dev set: optimistic, and alike for all). Finished runs are skipped, so the script resumes.
Prints a table of mean ± standard deviation over seeds. JOBS (default 2) processes run at once, one thread each.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wlora.records import Record, RecordStore

RATES = {"full": ("3e-5", "1e-4", "3e-4")}
ADAPTER_RATES = ("3e-4", "1e-3", "3e-3")
METHODS = ("full", "probe", "lora", "wlora", "wlora_plus", "rlora")
TASKS = {"sst2": ("task.max_train_rows=4000", "task.epochs=1"), "mrpc": ("task.epochs=2",)}


def sweep(data: Path, results: Path, task: str, method: str, rates: str, seeds: str) -> None:
    """Run one method on one task through the command line; what is recorded is skipped."""
    words = [
        *(
            sys.executable,
            "-m",
            "wlora.run",
            "-m",
            "model=minilm",
            f"task={task}",
            f"task.path={data / task}",
            *TASKS[task],
        ),
        *(
            "task.batch_size=32",
            "train.accumulation_steps=1",
            "k=5",
            f"method={method}",
            f"lr={rates}",
            f"seed={seeds}",
        ),
        f"results_dir={results}",
    ]
    log = results / "logs" / f"{task}_{method}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        subprocess.run(words, check=True, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})


def study(data: Path, results: Path, method: str) -> None:
    """Tune one method on SST-2, then run all seeds of both tasks."""
    sweep(data, results, "sst2", method, ",".join(RATES.get(method, ADAPTER_RATES)), "0")
    rate = best_rate(results, method)
    for task in TASKS:
        sweep(data, results, task, method, str(rate), "0,1,2")


def best_rate(results: Path, method: str) -> float:
    """Return the learning rate with the best score on SST-2, seed 0."""
    tuning = [record for record in runs(results, "sst2", method) if record.config["seed"] == 0]
    return float(max(tuning, key=lambda record: record.metrics[record.primary_metric]).config["lr"])


def runs(results: Path, task: str, method: str) -> list[Record]:
    """Return the successful records of a method on a task."""
    return [
        record
        for record in RecordStore(results)
        if record.status == "success" and record.task["name"] == task and record.config["method"]["name"] == method
    ]


def main() -> None:
    """Run what is missing and print the table."""
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: python {sys.argv[0]} DATA [RESULTS]")
    data, results = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "results/first_runs")
    with ThreadPoolExecutor(int(os.environ.get("JOBS", "2"))) as pool:
        for pending in [pool.submit(study, data, results, method) for method in METHODS]:
            pending.result()
    print("| task | method | lr | seeds | accuracy | parameters at the end | training seconds |\n|" + "---|" * 7)
    for task in TASKS:
        for method in METHODS:
            rate = best_rate(results, method)
            chosen = [record for record in runs(results, task, method) if record.config["lr"] == rate]
            scores = [record.metrics["accuracy"] for record in chosen]
            trained = chosen[0].parameters["adapter_final"] + chosen[0].parameters["base"]
            seconds = statistics.mean(record.seconds["train"] for record in chosen)
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            print(
                f"| {task} | {method} | {rate:g} | {len(scores)} | {statistics.mean(scores):.3f} ± {spread:.3f} "
                f"| {trained:,} | {seconds:.0f} |"
            )


if __name__ == "__main__":
    main()
