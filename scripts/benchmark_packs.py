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
from collections.abc import Iterator
from typing import Any

from benchmark_limits import count_operations, count_products, product_rate, time_step
from benchmark_runs import fast_precision

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

    def close(self) -> None:
        """End the runs where they are. Only then their folder may go: a run whose lock is gone believes it taken over."""
        with contextlib.redirect_stdout(io.StringIO()):
            for steps in self._courses:
                steps.close()
        self._folder.cleanup()


def time_packs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, number of runs, and kind of seeds. Ratios are per run, relative to a single run."""
    for model in args.models:
        words = [*MODELS[model], "task=story_nli", "task.epochs=50", f"precision={fast_precision()}", "k=5", "rank=8"]
        words += ["task.max_train_rows=960", "train.eval_every=1500", "train.checkpoint_every=0", "warmup=0"]
        alone = _quietly(words, 1, seeds=False, packed=False)
        for size, seeds in itertools.product(args.sizes, (False, True)):
            if size > 1 or not seeds:
                pack = _quietly(words, size, seeds=seeds, packed=True)
                yield {"model": model, "runs": size, "seeds": "own" if seeds else "one", **_compare(alone, pack, size, args)}
                pack.close()
        alone.close()


def _compare(alone: Runs, pack: Runs, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time steps of a run alone and of a pack in turns, and count what each dispatches."""
    for _ in range(args.warm_up):
        alone.step()
        pack.step()
    seconds = [(time_step(alone.step), time_step(pack.step)) for _ in range(args.repeats)]
    single, whole = (statistics.median(of_kind) for of_kind in zip(*seconds, strict=True))
    operations = [count_operations(runs.step) for runs in (alone, pack)]
    rate = product_rate(fast_precision())
    return {
        "precision": fast_precision(),
        "alone_ms": round(1000 * single, 1),
        "pack_ms": round(1000 * whole, 1),
        "time_per_run": round(whole / size / single, 3),
        "operations_alone": operations[0],
        "operations_pack": operations[1],
        "operations_per_run": round(operations[1] / size / operations[0], 3),
        "alone_to_limit": round(single * rate / count_products(alone.step), 2),
        "pack_to_limit": round(whole * rate / count_products(pack.step), 2),
    }


def _quietly(words: list[str], size: int, *, seeds: bool, packed: bool) -> Runs:
    with contextlib.redirect_stdout(io.StringIO()):
        return Runs(words, size, seeds=seeds, packed=packed)
