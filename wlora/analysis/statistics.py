"""Statistics over seeds: standard deviation, bootstrap intervals and paired comparisons. All random draws are seeded."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95

Scores = Mapping[str, Mapping[int, float]]
"""Score by task and seed."""


@dataclass(frozen=True)
class Summary:
    """A mean over runs.

    Attributes:
        mean: arithmetic mean.
        std: sample standard deviation (divisor n - 1); None with fewer than two runs.
        n: number of runs; None if it is unknown.
        low: lower end of the 95 % interval; None with fewer than two runs.
        high: upper end.
    """

    mean: float
    std: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Method a against method b over tasks and seeds.

    Attributes:
        tasks: tasks on which both have runs.
        pairs: pairs of runs compared, over all tasks.
        paired: whether a and b share seeds on every task.
        difference: mean over tasks of mean(a) - mean(b), with the ends of its 95 % interval.
        probability: probability of improvement, with the ends of its 95 % interval.
    """

    tasks: int
    pairs: int
    paired: bool
    difference: Summary
    probability: Summary


def generator(seed: int, name: str) -> np.random.Generator:
    """Return the random generator of one named quantity. It does not depend on which other quantities are computed."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def summarize(values: Sequence[float], rng: np.random.Generator) -> Summary:
    """Summarise the scores of runs that differ only in their seed.

    The interval is the percentile bootstrap interval of the mean over seeds. With the usual three to five seeds it is too
    narrow (the variance is underestimated by the factor (n - 1) / n). It shows the spread and is no significance test.

    Raises:
        ValueError: no values.
    """
    if len(values) == 0:
        raise ValueError("nothing to summarise")
    array = np.asarray(values, dtype=float)
    if len(array) == 1:
        return Summary(float(array[0]), n=1)
    low, high = interval(resample(array, rng).mean(axis=1))
    return Summary(float(array.mean()), float(array.std(ddof=1)), len(array), low, high)


def summarize_strata(strata: Sequence[Sequence[float]], rng: np.random.Generator) -> Summary:
    """Summarise the mean over tasks of the mean over seeds. The bootstrap draws seeds within each task.

    `n` and `std` are None, because tasks may have different numbers of runs.
    """
    mean = float(np.mean([np.mean(values) for values in strata]))
    if any(len(values) < 2 for values in strata):
        return Summary(mean)
    draws = np.mean([resample(np.asarray(values, dtype=float), rng).mean(axis=1) for values in strata], axis=0)
    low, high = interval(draws)
    return Summary(mean, low=low, high=high)


def resample(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw with replacement along the first axis: [n, ...] -> [DRAWS, n, ...]."""
    drawn: np.ndarray = values[rng.integers(len(values), size=(DRAWS, len(values)))]
    return drawn


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Return the ends of the central 95 % of bootstrap draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def compare(a: Scores, b: Scores, rng: np.random.Generator) -> Comparison | None:
    """Compare two methods on the tasks that both have; return None if there are none.

    On a task with common seeds, runs are compared seed by seed, because they share initialisation and data order. Otherwise
    every run of a is compared with every run of b. The probability of improvement (Agarwal et al., 2021, equation 1) is the
    share of pairs in which a is better, averaged over tasks; a tie counts as half. The bootstrap draws seeds within each
    task. Tasks are fixed, so the intervals say nothing about other tasks.
    """
    tasks = [task for task in a if a[task] and b.get(task)]
    if not tasks:
        return None
    differences, probabilities, gaps, wins, pairs, paired = [], [], [], [], 0, True
    for task in tasks:
        common = sorted(a[task].keys() & b[task].keys())
        if common:
            x = np.array([(a[task][seed], b[task][seed]) for seed in common])
            drawn = resample(x, rng)
            gap, won, count = drawn[..., 0] - drawn[..., 1], _wins(drawn[..., 0], drawn[..., 1]), len(common)
            first, share = x[:, 0] - x[:, 1], _wins(x[:, 0], x[:, 1])
        else:
            x, y = np.array(list(a[task].values())), np.array(list(b[task].values()))
            left, right = resample(x, rng)[:, :, None], resample(y, rng)[:, None, :]
            gap, won, count = (left - right).reshape(DRAWS, -1), _wins(left, right).reshape(DRAWS, -1), len(x) * len(y)
            first, share = x[:, None] - y, _wins(x[:, None], y)
            paired = False
        differences.append(first.mean())
        probabilities.append(share.mean())
        gaps.append(gap.mean(axis=1))
        wins.append(won.mean(axis=1))
        pairs += count
    return Comparison(
        len(tasks), pairs, paired, _with_interval(differences, gaps, pairs), _with_interval(probabilities, wins, pairs)
    )


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    won: np.ndarray = (x > y) + 0.5 * (x == y)
    return won


def _with_interval(values: Sequence[float], draws: Sequence[np.ndarray], pairs: int) -> Summary:
    """Average over tasks and add the interval. With a single pair per task no interval is possible."""
    mean = float(np.mean(values))
    if pairs == len(values):
        return Summary(mean, n=pairs)
    low, high = interval(np.mean(draws, axis=0))
    return Summary(mean, n=pairs, low=low, high=high)
