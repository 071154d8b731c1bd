"""Runs in each process that test_processes.py launches; writes what this process has seen to FOLDER/<rank>.json."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import TINY, compose
from wlora.distributed import leave
from wlora.experiment import run as experiment
from wlora.training.interruption import Guard
from wlora.training.trainer import Trainer

SETTING = [
    *TINY,
    *("precision=fp32", "rank=4", "lr=1e-2", "train.max_steps=12", "train.accumulation_steps=2", "task.batch_size=7"),
    *("train.eval_every=6", "train.checkpoint_every=4", "offline=true"),
]
STILL = ["dropout=0", "+model.architecture.hidden_dropout_prob=0", "+model.architecture.attention_probs_dropout_prob=0"]
# Of the methods those that are also stopped and resumed here; tests/training/test_checkpoints.py and a signal stop others.
STOPPED = ("wlora_plus", "increlora")
LONG = [*SETTING, "method=wlora", "train.checkpoint_every=0", "train.eval_every=12"]
# 49 rows in batches of 8 leave one for the last: a process has nothing to do there.
SHARDED = [*SETTING, "model=tiny_llama", "method=lora", "targets=all", "task.max_eval_rows=49", "task.eval_batch_size=8"]


class Crash(Exception):
    """Stands for processes that die together."""


def run(folder: Path, *words: str, crash_at: int | None = None) -> dict[str, Any]:
    """Run one setting and return what this process has of it: its record, random numbers, wrappers of the model."""
    seen: dict[str, Any] = {}
    before = Guard.__call__

    def watch(self: Guard, trainer: Trainer) -> None:
        before(self, trainer)
        seen["stream"] = int(torch.get_rng_state().double().dot(torch.arange(5056).double()))
        if trainer.step == trainer.plan.total_steps:
            seen["wrappers"] = sum(type(thing) is DistributedDataParallel for thing in gc.get_objects())
        if trainer.step == crash_at:
            raise Crash

    Guard.__call__ = watch  # type: ignore[method-assign]
    try:
        record = experiment.run(compose(*SETTING, *words, f"results_dir={folder}"))
    except Crash:
        return seen
    finally:
        Guard.__call__ = before  # type: ignore[method-assign]
    return {**seen, "metrics": record.metrics, "adapters": record.adapters, "resumed_at": record.resumed_at}


def main(folder: Path, methods: list[str]) -> None:
    """Run every method still, some with dropout, whole and in two parts; a long run; a sharded model."""
    found: dict[str, Any] = {"long": run(folder / "long", *LONG)}
    for method in methods:
        found[f"{method} still"] = run(folder / "still", f"method={method}", *STILL)
        if method not in STOPPED:
            continue
        found[f"{method} whole"] = run(folder / "whole", f"method={method}")
        run(folder / "parts", f"method={method}", crash_at=9)
        found[f"{method} parts"] = run(folder / "parts", f"method={method}")
    found["sharded"] = run(folder / "sharded", *SHARDED, "dropout=0", "train.fsdp=true")
    run(folder / "sharded_parts", *SHARDED, "dropout=0", "train.fsdp=true", crash_at=9)
    run(folder / "sharded_parts", *SHARDED, "dropout=0", "train.fsdp=true", "train.gradient_checkpointing=true")
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
