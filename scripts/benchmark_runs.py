"""Compare whole training runs with PEFT's LoRA and transformers' Trainer: the part `end_to_end` of `scripts/benchmark.py`.

All runs train MiniLM in the precision that is fast on this machine. Times are training seconds: they include warm-up, cut
and filling the prefix cache, but not evaluations. Finished runs are not repeated. A folder with runs of another machine is
an error.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wlora.cli.sweep import compose
from wlora.models.source import locate
from wlora.storage.environment import describe_environment, name_machine
from wlora.storage.records import RecordStore
from wlora.training.precision import choose_precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# PEFT's LoRA with transformers' Trainer: `--batches` of `scripts/peft_baseline.py`, and the name of the contender.
PEFT = {
    "grouped": "PEFT + Trainer, grouped",
    "random": "PEFT + Trainer, random",
    "padded": "PEFT + Trainer, padded",
}
# The runs of this project: the name of the contender, and its arguments for `python -m wlora.run`.
RUNS = {
    "LoRA": ["method=lora"],
    "LoRA, fast": ["method=lora", "train.fast_step=true"],
    "WLoRA": ["method=wlora", "k=5"],
    "WLoRA, prefix": ["method=wlora", "k=5", "train.prefix_cache=memory"],
    "WLoRA, prefix, fast": ["method=wlora", "k=5", "train.prefix_cache=memory", "train.fast_step=true"],
    "WLoRA depth, prefix": ["method=wlora_depth", "k=5", "train.prefix_cache=memory"],
}
TASKS = {"sst2": ["task.max_train_rows=4000"], "mrpc": []}


def fast_precision() -> str:
    """Return the precision that `precision=auto` chooses on this machine."""
    return choose_precision("auto", DEVICE).name


@dataclass(frozen=True)
class Outcome:
    """A finished training.

    Attributes:
        seconds: training seconds without evaluations.
        score: accuracy on the dev set.
        trained: trained parameters at the end, including those of the head.
        peak: peak memory in bytes.
        curve: (seconds, accuracy) after every epoch.
    """

    seconds: float
    score: float
    trained: int
    peak: int | None
    curve: list[tuple[float, float]]

    def seconds_to(self, target: float) -> float | None:
        """Return the training seconds up to the first epoch that reached a score."""
        return next((seconds for seconds, score in self.curve if score >= target), None)


def refuse_others(out: Path, machine: str) -> None:
    """Exit if a folder contains runs of another machine, because ratios of their times would have no meaning."""
    found = {name_machine(record.environment) for record in RecordStore(out / "runs")}
    found |= {json.loads(file.read_text())["machine"] for file in (out / "peft").glob("*.json")}
    if others := sorted(found - {machine}):
        raise SystemExit(
            f"error: --out {out} contains runs of {', '.join(others)}, but this is {machine}: use another folder"
        )


def time_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every contender once per seed, in turns. Runs that exist in `args.out` are read instead.

    Batches of random rows and rows padded to 128 tokens take PEFT two to ten times as long: they are run on the first seed.

    Args:
        args: the command line: `data`, `baseline`, `tasks`, `seeds`, `epochs` and `out`.

    Returns:
        One row of the table for each task and contender (`summarize`).
    """
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        found: dict[str, list[Outcome]] = {}
        for seed in args.seeds:
            for batches, name in PEFT.items():
                if batches != "grouped" and seed != args.seeds[0]:
                    continue
                found.setdefault(name, []).append(_run_peft(args, task, seed, batches))
            for name, words in RUNS.items():
                found.setdefault(name, []).append(_run_ours(args, task, [*TASKS[task], *words, f"seed={seed}"]))
            last = {name: (round(runs[-1].seconds, 1), runs[-1].score) for name, runs in found.items()}
            print(task, seed, last, flush=True)
        rows += summarize(task, found)
    return rows


def summarize(task: str, found: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """Return the rows of one task's table.

    A ratio of times, such as `time_to_grouped`, compares runs of one seed; the median over the seeds that both have is
    reported. The target of `to_target_s` is the mean final accuracy of PEFT with grouped batches, minus one point.

    Args:
        task: name of the task.
        found: the runs of every contender, in the order of the seeds.
    """
    target = statistics.mean(run.score for run in found[PEFT["grouped"]]) - 0.01
    rows = []
    for name, runs in found.items():
        reached = [seconds for run in runs if (seconds := run.seconds_to(target)) is not None]
        peaks = [run.peak for run in runs if run.peak is not None]
        rows.append(
            {
                "task": task,
                "what": name,
                "precision": fast_precision(),
                "seeds": len(runs),
                "train_s": round(statistics.median(run.seconds for run in runs), 1),
                **{f"time_to_{batches}": _time_ratio(runs, found[peft]) for batches, peft in PEFT.items()},
                "trained": round(statistics.mean(run.trained for run in runs)),
                "mean_accuracy": round(statistics.mean(run.score for run in runs), 4),
                "target": round(target, 4),
                "to_target_s": round(statistics.median(reached), 1) if reached else None,
                "reached": f"{len(reached)} of {len(runs)}",
                "peak_mib": round(statistics.median(peaks) / 2**20) if peaks else None,
            }
        )
    return rows


def _time_ratio(runs: list[Outcome], others: list[Outcome]) -> float:
    """Return the median ratio of the training times over the seeds that both have; these are the first ones."""
    return round(statistics.median(run.seconds / other.seconds for run, other in zip(runs, others, strict=False)), 3)


def _run_peft(args: argparse.Namespace, task: str, seed: int, batches: str) -> Outcome:
    """Run the baseline script with one kind of batches, unless its result exists."""
    file = args.out / "peft" / f"{task}_{batches}_{args.epochs:g}_{fast_precision()}_{seed}.json"
    if not file.exists():
        model = compose(["model=minilm", f"task={task}"]).model
        words = [sys.executable, str(args.baseline), "--model", str(locate(model).location), "--task", task]
        words += ["--data", str(args.data / task), "--epochs", str(args.epochs), "--lr", "1e-3", "--seed", str(seed)]
        words += ["--batches", batches]
        words += ["--bf16"] if fast_precision() == "bf16" else []
        words += ["--train-rows", "4000"] if task == "sst2" else []
        said_last = _call(words).strip().splitlines()[-1]
        file.parent.mkdir(parents=True, exist_ok=True)
        machine = name_machine(describe_environment(DEVICE.type, fast_precision(), 1))
        file.write_text(json.dumps({"machine": machine, **json.loads(said_last)}) + "\n")
    said = json.loads(file.read_text())
    peak = said.get("peak_mb" if DEVICE.type == "cuda" else "peak_rss_mb")
    return Outcome(said["train_s"], said["score"], said["trainable"], peak and peak * 2**20, said.get("curve", []))


def _run_ours(args: argparse.Namespace, task: str, words: list[str]) -> Outcome:
    """Run one setting in a separate process, unless its record exists."""
    common = ["model=minilm", f"task={task}", f"task.path={args.data / task}", f"precision={fast_precision()}", "lr=1e-3"]
    common += ["warmup=20", "task.batch_size=32", "train.accumulation_steps=1", f"task.epochs={args.epochs:g}"]
    common += [f"results_dir={args.out / 'runs'}", "train.save_adapter=false", *words]
    printed = _call([sys.executable, "-m", "wlora.run", *common])
    (identity,) = set(re.findall(r"^([0-9a-f]{16})(?:: task=| is done)", printed, flags=re.MULTILINE))
    store = RecordStore(args.out / "runs")
    record = store.read(identity)
    assert record is not None
    scores = {point["step"]: point["metrics"]["accuracy"] for point in store.read_curve(record) if "metrics" in point}
    curve = [(point["seconds"], scores[int(point["step"])]) for point in record.evaluations]
    peak = record.memory.get("device", record.memory.get("process"))
    trained = record.parameters["adapter_final"] + record.parameters["head"]
    return Outcome(record.seconds["train"], record.metrics["accuracy"], trained, peak, curve)


def _call(words: list[str]) -> str:
    """Run a command and return its output; exit with its error message if it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: {shlex.join(words)} ended with {done.returncode}\n{done.stderr.strip()[-2000:]}")
    return done.stdout
