"""Raced sweeps (`race=halving`): the launcher is called in rounds; after each round the worse runs of a race are stopped.

`wlora.analysis.racing` decides which runs continue and until which step. In each round, the launcher gets these runs, each
with its `train.until`. A run stops there with a checkpoint and continues from it in a later round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from time import sleep
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict

from wlora.analysis.racing import RUNGS, judge
from wlora.analysis.study import Run, seeds_of
from wlora.analysis.tuning import wanted_keys
from wlora.cli.sweep import Cell, asked_run, expand, read_records
from wlora.config.schema import Config
from wlora.console import put
from wlora.distributed import from_main, is_main, several
from wlora.errors import ConfigError, wrong_value
from wlora.experiment.resolve import resolve

# Seconds between checks of runs that other processes are executing.
WAIT_SECONDS = 10.0

Words = Sequence[str]
Compose = Callable[[Words], DictConfig]


class Move(NamedTuple):
    """The next part of a run: the index of its job, and the share of its steps at which it stops."""

    job: int
    until: float

    def words(self, jobs: Sequence[Words]) -> list[str]:
        """Return the command-line arguments of the job with its `train.until`."""
        return [*jobs[self.job], *([] if self.until == 1 else [f"train.until={self.until:g}"])]


class Field:
    """The jobs of a raced sweep. Jobs that differ only in learning rates and warm-up are in the same race.

    Args:
        jobs: the arguments of each job.
        compose: returns the configuration of a job, given its arguments.
    """

    def __init__(self, jobs: Sequence[Words], compose: Compose) -> None:
        self._cells: dict[tuple[str, ...], Cell] = {}
        self._entered: dict[tuple[Cell, Any], int] = {}
        self._alone: set[int] = set()  # jobs that are launched once, without a race
        self._out: set[int] = set()  # jobs that failed
        self._advanced: set[Move] = set()
        self._run_of: dict[int, tuple[Cell, Any]] = {}
        for job, words in enumerate(jobs):
            self._enter(job, words, compose)

    def _enter(self, job: int, words: Words, compose: Compose) -> None:
        """Add a job to the race of its cell and seed. A job that is invalid, or whose rate is unknown, is in no race."""
        ((overrides, (point,)),) = expand(words)
        key = tuple(sorted(overrides))
        try:
            if key not in self._cells:
                self._cells[key] = Cell(_resolved(overrides, compose))
            cell = self._cells[key]
            config = cell.place(point)
        except ConfigError:
            self._alone.add(job)  # the run will print the error
            return
        if wanted_keys(config) or len(seeds_of(config)) > 1:  # each fold is a separate run
            self._alone.add(job)
            return
        run = asked_run(config)
        cell.wanted.add(run)
        self._run_of[job] = cell, run
        self._entered.setdefault((cell, run), job)

    def moves(self) -> list[Move]:
        """Return the next moves of all races, and the jobs outside races; empty when all races are decided."""
        found = [Move(job, 1.0) for job in self._alone - self._out]
        read_records.cache_clear()
        for cell in self._cells.values():
            cell.read()
            for runs, race in cell.races():
                jobs = [self._entered[cell, run] for run in runs]
                there = [index for index, job in enumerate(jobs) if job not in self._out]
                now = judge([race[index] for index in there])
                found += [Move(jobs[there[index]], now.until) for index in now.behind]
        if stuck := self._advanced.intersection(found):
            # The run was advanced, but its record or curve does not show this.
            self._out |= {move.job for move in stuck}
            return self.moves()
        return sorted(found)

    def note(self, move: Move, status: str) -> None:
        """Note the status after a move. A run of another process is tried again; a failed run is not."""
        if status != "running":
            self._advanced.add(move)
        if status not in ("running", "success", "stopped", "Diverged") or move.job in self._alone:
            self._out.add(move.job)

    def first(self, job: int) -> int:
        """Return the first job with the same run. For example, `lr=tuned,1e-3` may give the same run twice."""
        return self._entered[self._run_of[job]] if job in self._run_of else job

    def recorded(self, job: int) -> Run | None:
        """Return the recorded run of a job; None if it has no record."""
        if job not in self._run_of:
            return None
        cell, asked = self._run_of[job]
        return next((run for run in cell.recorded if (run.point, run.seed) == asked), None)


def race(jobs: Sequence[Words], compose: Compose, launch: Callable[[list[list[str]]], Sequence[Any]]) -> list[Any]:
    """Run a raced sweep until every race is decided or a run is interrupted.

    Args:
        jobs: the arguments of each job.
        compose: returns the configuration of a job, given its arguments.
        launch: runs jobs, given their arguments; returns Hydra's `JobReturn` of each, in order.

    Returns:
        For each job, the last result of `launch`; for a job that was never launched, its recorded run.
    """
    field, results = Field(jobs, compose), dict[int, Any]()
    while moves := (from_main(field.moves()) if several() else field.moves()):
        if is_main():
            put(describe(moves))
        returned = launch([move.words(jobs) for move in moves])
        statuses = [str(getattr(job._return_value, "status", "failed")) for job in returned]
        for move, job, status in zip(moves, returned, statuses, strict=True):
            results[move.job] = job
            field.note(move, status)
        if "interrupted" in statuses:
            break
        if set(statuses) == {"running"}:
            sleep(WAIT_SECONDS)
    return [results.get(first, field.recorded(first)) for first in map(field.first, range(len(jobs)))]


def describe(moves: Sequence[Move]) -> str:
    """Describe how many runs continue and until when: `race: 5 runs to 1/4, 1 run to the end`."""
    counts = Counter(move.until for move in moves)
    names = {share: f"1/{1 / share:g}" for share in RUNGS} | {1.0: "the end"}
    parts = [f"{count} run{'s' if count > 1 else ''} to {names[share]}" for share, count in sorted(counts.items())]
    return f"race: {', '.join(parts)}"


def is_raced(composed: DictConfig, *, swept: Container[str], in_batches: bool) -> bool:
    """Tell whether a sweep is raced, given the configuration of its first job.

    Args:
        swept: the keys that the sweep varies.
        in_batches: whether the sweeper launches the jobs in several batches.

    Raises:
        ConfigError: a key is incompatible with a race.
    """
    if composed.get("race") != "halving" or composed.get("dry_run") is True:
        return False
    if "race" in swept:
        raise ConfigError("race: a sweep is raced as a whole: allowed is one value, halving or off")
    if in_batches:
        raise ConfigError("race=halving: a race needs all its runs at once: allowed is hydra.sweeper.max_batch_size=null")
    for key, allowed in (("force", False), ("train.until", 1.0)):
        if (value := OmegaConf.select(composed, key)) != allowed:
            raise wrong_value(key, str(value).lower(), f"{str(allowed).lower()} with race=halving")
    return True


def _resolved(overrides: Words, compose: Compose) -> Config:
    composed = compose(overrides)
    with open_dict(composed):
        composed.pop("hydra", None)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return resolve(config)
