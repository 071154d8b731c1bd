"""Compare steps of packed runs with steps of single runs: the part `packs` of `scripts/benchmark.py`.

The runs are a grid of learning rates for LoRA and WLoRA on the synthetic task story_nli. Packs and a single run take turns.
In one measurement all runs have the same seed, and thus the same batches; in another, each run has its own seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from benchmark_runs import DEVICE, fast_precision
from torch.utils._python_dispatch import TorchDispatchMode

from wlora.cli.sweep import compose
from wlora.experiment.run import Course, course
from wlora.experiment.shared_inputs import SharedInputs
from wlora.training.gradients import compute_gradients
from wlora.training.interruption import StopSignals
from wlora.training.pack import Pack
from wlora.training.trainer import Trainer

# The architecture of DeBERTaV3-base with random weights, whose cost equals that of trained ones.
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
MODELS = {
    "minilm": ["model=minilm"],
    "deberta": ["model=tiny_deberta", *(f"++model.architecture.{key}={value}" for key, value in _BASE.items())],
}


class Counter(TorchDispatchMode):
    """Counts the operations that are dispatched to the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


class Runs:
    """Runs of a grid that are trained step by step, alone or in a pack.

    Args:
        words: the arguments that all runs share.
        size: number of runs.
        seeds: whether each run has its own seed.
        packed: whether the runs train in a pack.
    """

    def __init__(self, words: list[str], size: int, *, seeds: bool, packed: bool) -> None:
        self._folder = tempfile.TemporaryDirectory()
        signals, shared = StopSignals(), SharedInputs()
        methods = itertools.cycle(["method=lora", "method=wlora"])
        self._courses: list[Course] = []
        self.trainers: list[Trainer] = []
        for index, method in zip(range(size), methods, strict=False):
            own = [method, f"lr={1e-4 * (index + 1)}", f"seed={index if seeds else 0}"]
            config = compose([*words, *own, f"results_dir={self._folder.name}"])
            steps = course(config, (), shared, signals=signals)
            self.trainers.append(next(steps).trainer)
            self._courses.append(steps)
        self._pack = Pack(self.trainers[0]) if packed else None
        for trainer in self.trainers[1:]:
            assert self._pack is not None
            self._pack.join(trainer)
        self._batches = [next(steps) for steps in self._courses]

    def step(self) -> None:
        """Take one optimiser step with every run."""
        requests = list(zip(self.trainers, self._batches, strict=True))
        computed = self._pack.compute(requests) if self._pack else [compute_gradients(*request) for request in requests]
        self._batches = [steps.send(found) for steps, found in zip(self._courses, computed, strict=True)]

    def count(self) -> int:
        """Take a step and return the number of operations dispatched in it."""
        counter = Counter()
        with counter:
            self.step()
        return counter.count


def time_packs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, number of runs, and kind of seeds. Ratios are per run, relative to a single run."""
    for model in args.models:
        words = [*MODELS[model], "task=story_nli", "task.epochs=50", f"precision={fast_precision()}", "k=5", "rank=8"]
        words += ["task.max_train_rows=960", "train.eval_every=1500", "train.checkpoint_every=0", "warmup=0"]
        alone = _quietly(words, 1, seeds=False, packed=False)
        for size, seeds in itertools.product(args.sizes, (False, True)):
            if size == 1 and seeds:
                continue
            pack = _quietly(words, size, seeds=seeds, packed=True)
            both: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(args.warm_up):
                alone.step()
                pack.step()
            for _, packed in itertools.product(range(args.repeats), (False, True)):
                both[packed].append(_time(pack if packed else alone))
            single, whole = (statistics.median(both[packed]) for packed in (False, True))
            operations = [alone.count(), pack.count()]
            yield {
                "model": model,
                "runs": size,
                "seeds": "own" if seeds else "one",
                "precision": fast_precision(),
                "alone_ms": round(1000 * single, 1),
                "pack_ms": round(1000 * whole, 1),
                "time_per_run": round(whole / size / single, 3),
                "operations_alone": operations[0],
                "operations_pack": operations[1],
                "operations_per_run": round(operations[1] / size / operations[0], 3),
            }


def _quietly(words: list[str], size: int, *, seeds: bool, packed: bool) -> Runs:
    with contextlib.redirect_stdout(io.StringIO()):
        return Runs(words, size, seeds=seeds, packed=packed)


def _time(runs: Runs) -> float:
    begin = time.perf_counter()
    runs.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
