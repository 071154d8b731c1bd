"""Successive halving of recorded runs: which runs of a race continue, and until which step. Never imports torch.

Decisions depend only on records and learning curves. Therefore a killed race needs no other state to continue, and several
processes that work on one race make the same decisions. `wlora.cli.racing` executes the runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wlora.analysis.study import ENDED, Point, Run
from wlora.analysis.study_reader import read_curve
from wlora.storage.records import RecordStore
from wlora.training.run_length import step_at

# Rungs: the shares of the steps at which runs are compared. With 4 or more runs, a race takes at most 0.4 of all steps.
RUNGS = (1 / 8, 1 / 4, 1 / 2)
# At each rung, one of this many runs continues (rounded up).
FACTOR = 2

# Sort key of an evaluation: the primary metric, then the negative dev loss.
Mark = tuple[float, float]
_WORST: Mark = (-math.inf, -math.inf)


@dataclass(frozen=True)
class Entrant:
    """The state of one run in a race.

    Attributes:
        total: optimiser steps of the whole run; 0 if not known yet.
        marks: the evaluations so far as pairs of step and mark, sorted by step.
        ended: whether the run has succeeded or diverged.
    """

    total: int = 0
    marks: tuple[tuple[int, Mark], ...] = ()
    ended: bool = False

    @property
    def reached(self) -> float:
        """Step of the last evaluation divided by the total number of steps."""
        return self.marks[-1][0] / self.total if self.marks else 0.0

    def mark(self, rung: int) -> Mark | None:
        """Return the first mark at a rung or after it, but before the next one; None if there is none."""
        begin, end = (step_at(share, self.total) for share in (*RUNGS, 1.0)[rung : rung + 2])
        return next((mark for step, mark in self.marks if begin <= step < end), None)

    def passed(self, rung: int) -> bool:
        """Tell whether the run is past a rung without a mark there, because it was started without a race."""
        if self.mark(rung) is not None or not self.marks:
            return False
        return self.marks[-1][0] >= step_at((*RUNGS, 1.0)[rung + 1], self.total)


@dataclass(frozen=True)
class Standing:
    """The state of a race.

    Attributes:
        alive: indices of the runs that have not been eliminated.
        behind: indices of the alive runs that must be trained further before the next decision; empty at the end.
        until: the share of their steps up to which these runs are trained.
    """

    alive: tuple[int, ...]
    behind: tuple[int, ...]
    until: float


def judge(entrants: Sequence[Entrant]) -> Standing:
    """Decide a race as far as the evaluations of its runs allow.

    Once all runs have a mark at a rung, the best ones continue (`survivors`). A diverged run ranks last. A run that has
    passed a rung without a mark is not judged there. In a tie, the run that is earlier in the sequence wins.
    """
    alive = list(range(len(entrants)))
    for rung, share in enumerate(RUNGS):
        judged = [index for index in alive if not entrants[index].passed(rung)]
        if len(judged) < 2:
            continue
        marks = {index: entrants[index].mark(rung) for index in judged}
        behind = [index for index, mark in marks.items() if mark is None and not entrants[index].ended]
        if behind:
            return Standing(tuple(alive), tuple(behind), share)
        ranked = sorted(judged, key=lambda index: marks[index] or _WORST, reverse=True)
        beaten = set(ranked[survivors(len(ranked)) :])
        alive = [index for index in alive if index not in beaten]
    return Standing(tuple(alive), tuple(index for index in alive if not entrants[index].ended), 1.0)


def survivors(count: int) -> int:
    """Return how many of `count` judged runs continue after a rung."""
    return math.ceil(count / FACTOR)


def work_left(entrants: Sequence[Entrant]) -> float:
    """Return the remaining steps of a race, as a multiple of a whole run."""
    now = judge(entrants)
    work = sum(max(0.0, now.until - entrants[index].reached) for index in now.behind)
    count, at = len(now.alive), now.until
    for share in [share for share in (*RUNGS, 1.0) if share > now.until]:
        count = survivors(count)
        work, at = work + count * (share - at), share
    return work


def divide(
    wanted: Iterable[tuple[Point, int]], known: Mapping[tuple[Point, int], Entrant]
) -> list[tuple[list[tuple[Point, int]], list[Entrant]]]:
    """Divide the runs of one setting into one race per seed. Return the points of each race, lower rates first, with states.

    Args:
        wanted: point and seed of every run.
        known: the runs that have records.
    """
    by_seed: dict[int, list[tuple[Point, int]]] = {}
    for asked in sorted(wanted, key=lambda run: [value if isinstance(value, float | int) else 0 for value in run[0]]):
        by_seed.setdefault(asked[1], []).append(asked)
    return [(runs, [known.get(run, Entrant()) for run in runs]) for _, runs in sorted(by_seed.items())]


def read_entrant(store: RecordStore, run: Run) -> Entrant:
    """Return the state of a recorded run in a race. The marks are read from its learning curve."""
    metric, marks = run.record.primary_metric, []
    for point in read_curve(store, run, key="metrics"):
        metrics = point.get("metrics", {})
        if metric in metrics:
            marks.append((int(point["step"]), (float(metrics[metric]), -float(metrics.get("loss", math.inf)))))
    total = run.record.steps.get("total", 0)
    return Entrant(total, tuple(sorted(marks)) if total else (), run.status in ENDED)
