"""Successive halving of recorded runs: which of a race go on, and how far. Never imports torch.

Decisions follow from records and learning curves alone. So nothing else has to survive a kill, and several processes that
work on one race decide alike. How runs are advanced is not known here (`wlora.cli.racing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from wlora.analysis.study import ENDED, Point, Run
from wlora.analysis.study_reader import read_curve
from wlora.storage.records import RecordStore
from wlora.training.run_length import step_at

# Shares of the steps at which a race is judged. With 4 or more runs it takes at most 0.4 of all steps.
RUNGS = (1 / 8, 1 / 4, 1 / 2)
# One in so many, rounded up, goes on from a rung.
FACTOR = 2

# What an evaluation is ranked by: the primary metric, then the negative dev loss.
Mark = tuple[float, float]
_WORST: Mark = (-math.inf, -math.inf)


@dataclass(frozen=True)
class Entrant:
    """What is known of one run of a race.

    Attributes:
        total: optimiser steps of the whole run; 0 if it is not known yet.
        marks: its evaluations so far, as step and mark, by step.
        ended: whether it has succeeded or diverged.
    """

    total: int = 0
    marks: tuple[tuple[int, Mark], ...] = ()
    ended: bool = False

    @property
    def reached(self) -> float:
        """The evaluated share of the steps."""
        return self.marks[-1][0] / self.total if self.marks else 0.0

    def mark(self, rung: int) -> Mark | None:
        """Return the first mark at a rung or after it, but before the next one; None if there is none."""
        begin, end = (step_at(share, self.total) for share in (*RUNGS, 1.0)[rung : rung + 2])
        return next((mark for step, mark in self.marks if begin <= step < end), None)

    def passed(self, rung: int) -> bool:
        """Tell whether the run is past a rung without a mark there, as one that was begun without a race."""
        if self.mark(rung) is not None or not self.marks:
            return False
        return self.marks[-1][0] >= step_at((*RUNGS, 1.0)[rung + 1], self.total)


@dataclass(frozen=True)
class Standing:
    """The state of a race.

    Attributes:
        alive: indices of the runs that have not been beaten.
        behind: those of them that have to be advanced before the race can be judged again; empty at its end.
        until: the share of their steps up to which they are advanced.
    """

    alive: tuple[int, ...]
    behind: tuple[int, ...]
    until: float


def judge(entrants: Sequence[Entrant]) -> Standing:
    """Judge a race as far as its runs have come.

    At each rung, the better half of the runs goes on, as soon as all have a mark there. A diverged run ranks last. A run
    that has passed a rung without a mark is not judged there. In a tie the earlier run of the sequence wins.
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
    """Return how many of `count` judged runs go on from a rung."""
    return math.ceil(count / FACTOR)


def work_left(entrants: Sequence[Entrant]) -> float:
    """Return the steps that the rest of a race takes, in whole runs."""
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
    """Divide the runs of one setting into a race per seed; returns its runs, lower rates first, and what is known of each.

    Args:
        wanted: the runs, as point and seed.
        known: the recorded ones of them.
    """
    by_seed: dict[int, list[tuple[Point, int]]] = {}
    for asked in sorted(wanted, key=lambda run: [value if isinstance(value, float | int) else 0 for value in run[0]]):
        by_seed.setdefault(asked[1], []).append(asked)
    return [(runs, [known.get(run, Entrant()) for run in runs]) for _, runs in sorted(by_seed.items())]


def read_entrant(store: RecordStore, run: Run) -> Entrant:
    """Return what a race knows of a recorded run; its learning curve has the marks."""
    metric, marks = run.record.primary_metric, []
    for point in read_curve(store, run, key="metrics"):
        metrics = point.get("metrics", {})
        if metric in metrics:
            marks.append((int(point["step"]), (float(metrics[metric]), -float(metrics.get("loss", math.inf)))))
    total = run.record.steps.get("total", 0)
    return Entrant(total, tuple(sorted(marks)) if total else (), run.status in ENDED)
