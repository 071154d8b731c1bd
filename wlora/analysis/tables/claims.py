"""The paper's claims, tested on the runs of a table: which hold, which do not, and which are undecided at this scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from wlora.analysis.statistics import Difference, Scores, Summary, compare, difference, generator
from wlora.analysis.study import Point
from wlora.analysis.tables.cells import Table
from wlora.analysis.tables.layouts import LAYOUTS, Row

MARGIN = 1.0
"""Points within which two scores count as equivalent."""

LEVEL = 0.95
Kind = Literal["better", "worse", "equivalent", "at least"]
Verdict = Literal["holds", "does not hold", "undecided"]

# Layouts whose runs are tested. Table 6 is left out, as its runs are also those of Table 1.
TESTED = tuple(name for name in LAYOUTS if name != "6")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper about the difference of two methods.

    Attributes:
        text: the claim, as displayed.
        kind: the claimed relation of the score of `first` to that of `second`.
        first: the methods that the claim is about.
        second: the method that each of them is compared with.
        same_k: compare only rows with the same K.
    """

    text: str
    kind: Kind
    first: tuple[str, ...]
    second: str
    same_k: bool = False


OTHERS = tuple(row.method for row in LAYOUTS["1"].rows if row.method not in ("full", "lora", "wlora"))
CLAIMS = (
    Claim("WLoRA is better than RLoRA with as many adapters", "better", ("wlora",), "rlora", same_k=True),
    Claim("WLoRA equals LoRA within one point, with fewer parameters", "equivalent", ("wlora",), "lora"),
    Claim("WLoRA+ is at least as good as LoRA", "at least", ("wlora_plus",), "lora"),
    Claim("The other methods are worse than LoRA", "worse", OTHERS, "lora"),
)


@dataclass(frozen=True)
class Finding:
    """One claim on one task, or over all tasks that both rows have.

    Attributes:
        claim: the claim.
        table: name of the layout.
        a: row of the first method.
        b: row of the second method.
        task: the task's title; None over several tasks.
        tasks: names of the tasks with runs of both.
        found: the difference in points.
        probability: the probability of improvement.
        share: trained parameters of a divided by those of b, on these tasks; None if b trains none.
        diverged: number of diverged runs of a and of b. The difference is that of the other runs.
        rates: the difference at every point (learning rate, warm-up) that both rows have run, without the tuning seed where
            there are others.
    """

    claim: Claim
    table: str
    a: Row
    b: Row
    task: str | None
    tasks: tuple[str, ...]
    found: Difference
    probability: Summary
    share: float | None
    diverged: tuple[int, int]
    rates: Mapping[Point, Difference]

    @property
    def p(self) -> float | None:
        """The p-value of the claim's test, which depends on its kind (`judge`); None without an interval."""
        if self.claim.kind == "equivalent":
            return self.found.p_within(MARGIN)
        return self.found.p_above(-MARGIN) if self.claim.kind == "at least" else self.found.p_different()

    @property
    def verdict(self) -> Verdict:
        """Whether the claim holds (see `judge`). If runs have diverged, the others alone decide nothing."""
        return "undecided" if any(self.diverged) else judge(self.claim.kind, self.found)

    @property
    def turned(self) -> list[Point]:
        """The common points at which the sign of the difference is opposite to that at the tuned points."""
        return [point for point, other in self.rates.items() if other.mean * self.found.mean < 0]


def judge(kind: Kind, found: Difference) -> Verdict:
    """Judge a claim by the interval of its difference in points.

    - better, worse: it holds if the 95 % interval lies on that side of 0, and does not if it lies on the other side.
    - equivalent: it holds if both one-sided tests at 5 % reject a difference of `MARGIN` or more (the 90 % interval lies
      within it), and does not if the 95 % interval lies outside.
    - at least: it does not hold if the 95 % interval lies below 0. Otherwise it holds if the one-sided test at 5 % rejects
      a loss of `MARGIN` or more.
    """
    ends = found.interval(LEVEL)
    if ends is None:
        return "undecided"
    low, high = ends
    limit = 1 - LEVEL
    if kind in ("better", "worse"):
        holds, fails = (low > 0, high < 0) if kind == "better" else (high < 0, low > 0)
    elif kind == "equivalent":
        holds, fails = (found.p_within(MARGIN) or 0.0) < limit, low > MARGIN or high < -MARGIN
    else:
        fails = high < 0
        holds = not fails and (found.p_above(-MARGIN) or 0.0) < limit
    return "holds" if holds else "does not hold" if fails else "undecided"


def check_claims(tables: Iterable[Table], *, bootstrap_seed: int = 0) -> list[Finding]:
    """Test every claim on filled tables, for each pair of rows: per task, and then over all common tasks if several."""
    known = list(tables)
    return [
        finding
        for claim in CLAIMS
        for table in known
        for a, b in pairs(table, claim)
        for finding in _findings(table, claim, a, b, bootstrap_seed)
    ]


def pairs(table: Table, claim: Claim) -> Iterator[tuple[Row, Row]]:
    """Yield the pairs of rows that a claim compares. Their ranks are equal; with `same_k`, K is equal, too."""
    for a in (row for row in table.rows if row.method in claim.first):
        for b in (row for row in table.rows if row.method == claim.second and row.rank == a.rank):
            if not claim.same_k or a.k == b.k:
                yield a, b


def order(point: Point) -> tuple[float, float, float]:
    """Return the sort key of a point: learning rate, warm-up, learning rate of the head."""
    return point.lr, point.warmup or 0, point.head_lr or 0


def points(table: Table) -> float:
    """Return the factor from a table's units to points."""
    return 1.0 if table.layout.percent else 100.0


def _findings(table: Table, claim: Claim, a: Row, b: Row, bootstrap_seed: int) -> Iterator[Finding]:
    both = [task for task in table.titles if table.cells[a, task].scores and table.cells[b, task].scores]
    for tasks in [[task] for task in both] + ([both] if len(both) > 1 else []):
        first, second = (_scores(table, row, tasks) for row in (a, b))
        cells = [[table.cells[row, task] for task in tasks] for row in (a, b)]
        ours, theirs = (fmean(run.trained for cell in side for run in cell.runs) for side in cells)
        found = difference(first, second)
        rng = generator(bootstrap_seed, f"claims {table.layout.name} {a} {b} {' '.join(tasks)}")
        compared = compare(first, second, rng)
        if found and compared:
            yield Finding(
                claim=claim,
                table=table.layout.name,
                a=a,
                b=b,
                task=table.titles[tasks[0]] if len(tasks) == 1 else None,
                tasks=tuple(tasks),
                found=found,
                probability=compared.probability,
                share=ours / theirs if theirs else None,
                diverged=(sum(cell.diverged for cell in cells[0]), sum(cell.diverged for cell in cells[1])),
                rates=_at_rates(table, a, b, tasks),
            )


def _scores(table: Table, row: Row, tasks: Sequence[str]) -> Scores:
    scale = points(table)
    return {task: {seed: scale * score for seed, score in table.cells[row, task].scores.items()} for task in tasks}


def _at_rates(table: Table, a: Row, b: Row, tasks: Sequence[str]) -> dict[Point, Difference]:
    """Return the difference at every point that both rows have run with common seeds on all given tasks.

    Only the reported seeds count, or if there are none, the tuning seed, which favours the rates that were chosen on it.
    """
    cells = {task: (table.cells[a, task], table.cells[b, task]) for task in tasks}
    common = set.intersection(*(set(cell.tried) for pair in cells.values() for cell in pair))
    scale, found = points(table), {}
    for point in sorted(common, key=order):
        first, second = dict[str, dict[int, float]](), dict[str, dict[int, float]]()
        for task, (one, other) in cells.items():
            seeds = one.tried[point].keys() & other.tried[point].keys()
            kept = seeds & one.scores.keys() & other.scores.keys() or seeds
            first[task], second[task] = ({seed: scale * cell.tried[point][seed] for seed in kept} for cell in (one, other))
        at_point = difference(first, second) if all(first.values()) else None
        if at_point is not None:
            found[point] = at_point
    return found
