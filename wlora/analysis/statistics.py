"""Statistics over seeds, tasks and examples: intervals, paired comparisons and tests. All random draws are seeded."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

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
    share of pairs in which a is better, averaged over tasks; a tie counts as half. The bootstrap draws seeds, for the tasks
    of a block (`_blocks`) together. Tasks are fixed, so the intervals say nothing about other tasks.
    """
    tasks = [task for task in a if a[task] and b.get(task)]
    if not tasks:
        return None
    differences, probabilities, gaps, wins, pairs, fewest, paired = [], [], [], [], 0, sys.maxsize, True
    for block in _blocks(a, b, tasks):
        common = _common_seeds(a, b, block)
        if common:
            x = np.array([[(a[task][seed], b[task][seed]) for task in block] for seed in common])
            drawn = resample(x, rng)
            gap, won = drawn[..., 0] - drawn[..., 1], _wins(drawn[..., 0], drawn[..., 1])
            first, share = x[..., 0] - x[..., 1], _wins(x[..., 0], x[..., 1])
        else:
            x, y = (np.array(list(side[block[0]].values())) for side in (a, b))
            left, right = resample(x, rng)[:, :, None], resample(y, rng)[:, None, :]
            gap, won = left - right, _wins(left, right)
            first, share = x[:, None] - y, _wins(x[:, None], y)
            fewest, paired = min(fewest, len(y)), False
        differences.append(first.mean())
        probabilities.append(share.mean())
        gaps.append(gap.mean(axis=(1, 2)))
        wins.append(won.mean(axis=(1, 2)))
        pairs, fewest = pairs + first.size, min(fewest, len(first))

    def summary(values: Sequence[float], draws: Sequence[np.ndarray]) -> Summary:
        # The error of a task with a single run is unknown, and so is that of the mean over tasks.
        low, high = interval(np.mean(draws, axis=0)) if fewest > 1 else (None, None)
        return Summary(float(np.mean(values)), n=pairs, low=low, high=high)

    return Comparison(len(tasks), pairs, paired, summary(differences, gaps), summary(probabilities, wins))


def _blocks(a: Scores, b: Scores, tasks: Sequence[str]) -> list[list[str]]:
    """Group the tasks whose runs must not be treated as independent: all of them, if they share two seeds or more.

    Runs with one seed are alike on all tasks: RLoRA, for example, draws the same adapters. Therefore the seeds are the
    sample, and a seed's score is its mean over the tasks. Seeds that a task lacks are then left out.
    """
    return [list(tasks)] if len(_common_seeds(a, b, tasks)) > 1 else [[task] for task in tasks]


def _common_seeds(a: Scores, b: Scores, tasks: Sequence[str]) -> list[int]:
    """Return the seeds with runs of both methods on all given tasks."""
    return sorted(set.intersection(*(set(a[task].keys() & b[task].keys()) for task in tasks)))


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    won: np.ndarray = (x > y) + 0.5 * (x == y)
    return won


@dataclass(frozen=True)
class Difference:
    """The mean over tasks of mean(a) - mean(b), with the t distribution of its error.

    Attributes:
        mean: the difference, in the units of the scores.
        pairs: by task, the number of common seeds; of unpaired runs the smaller number of runs.
        paired: whether a and b share seeds on every task.
        error: standard error; None if a task has fewer than two pairs, or if nothing varies.
        freedom: degrees of freedom: seeds - 1, or those of Welch and Satterthwaite for unpaired runs or tasks without two
            common seeds.
    """

    mean: float
    pairs: tuple[int, ...]
    paired: bool
    error: float | None = None
    freedom: float = 0.0

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Return the ends of the interval at a level, None without an error."""
        if self.error is None:
            return None
        half = float(special.stdtrit(self.freedom, (1 + level) / 2)) * self.error
        return self.mean - half, self.mean + half

    def p_above(self, bound: float) -> float | None:
        """Return the one-sided p-value of "the difference is above `bound`", None without an error."""
        return None if self.error is None else float(special.stdtr(self.freedom, (bound - self.mean) / self.error))

    def p_different(self) -> float | None:
        """Return the two-sided p-value of "the difference is not 0" (paired t test), None without an error."""
        above = self.p_above(0.0)
        return None if above is None else 2 * min(above, 1 - above)

    def p_within(self, margin: float) -> float | None:
        """Return the p-value of "the difference is within ± `margin`": the larger one of two one-sided tests."""
        above, below = self.p_above(-margin), self.p_above(margin)
        return None if above is None or below is None else max(above, 1 - below)


def difference(a: Scores, b: Scores) -> Difference | None:
    """Compare two methods on the tasks that both have; return None if there are none.

    Runs are paired by seed as in `compare`. Tasks are fixed and weigh the same; the error is that of the seeds, which the
    tasks of a block share (`_blocks`). The t distribution makes the interval as wide as so few seeds require, which the
    bootstrap does not.
    """
    tasks = [task for task in a if a[task] and b.get(task)]
    if not tasks:
        return None
    means, pairs, parts, paired = [], [], list[np.ndarray](), True
    blocks = _blocks(a, b, tasks)
    for block in blocks:
        common = _common_seeds(a, b, block)
        x, y = (
            np.array([np.mean([side[task][seed] for task in block]) for seed in (common or sorted(side[block[0]]))])
            for side in (a, b)
        )
        means.append(float(x.mean() - y.mean()))
        pairs += [min(len(x), len(y))] * len(block)
        parts += [x - y] if common else [x, y]
        paired &= bool(common)
    found = Difference(float(np.mean(means)), tuple(pairs), paired)
    if any(len(part) < 2 for part in parts):
        return found
    squares = [float(part.var(ddof=1)) / len(part) for part in parts]
    # A spread of the size of rounding errors is none: all pairs of all tasks differ by the same amount.
    if sum(squares) <= 1e-24:
        return found
    freedom = sum(squares) ** 2 / sum(square**2 / (len(part) - 1) for square, part in zip(squares, parts, strict=True))
    return replace(found, error=math.sqrt(sum(squares)) / len(blocks), freedom=freedom)


def interquartile_mean(strata: Sequence[Sequence[float]], rng: np.random.Generator) -> Summary:
    """Return the mean of the middle half of all runs over all tasks, with its 95 % bootstrap interval.

    This is the aggregate of Agarwal et al. (2021) and of their library rliable: a quarter of the runs is cut off at each
    end, and the bootstrap draws runs within each task. rliable itself would add arch, statsmodels and seaborn.

    Args:
        strata: scores by task; they must be comparable between tasks.
        rng: draws the bootstrap.
    """
    values = np.concatenate([np.asarray(stratum, dtype=float) for stratum in strata])
    mean = float(_trimmed(values))
    if any(len(stratum) < 2 for stratum in strata):
        return Summary(mean, n=len(values))
    draws = np.concatenate([resample(np.asarray(stratum, dtype=float), rng) for stratum in strata], axis=1)
    low, high = interval(_trimmed(draws))
    return Summary(mean, n=len(values), low=low, high=high)


def _trimmed(values: np.ndarray) -> np.ndarray:
    """Average the middle half along the last axis, as `scipy.stats.trim_mean(values, 0.25)` does."""
    cut = values.shape[-1] // 4
    middle: np.ndarray = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)
    return middle


def performance_profile(strata: Sequence[Sequence[float]], thresholds: Sequence[float]) -> list[float]:
    """Return the share of runs with a score of at least each threshold, every task weighing the same.

    A score that is only a rounding error below a threshold has reached it.
    """
    least = [threshold - 1e-9 for threshold in thresholds]
    return [float(np.mean([np.mean(np.asarray(stratum) >= threshold) for stratum in strata])) for threshold in least]


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        only_a: examples that only a answers correctly.
        only_b: examples that only b answers correctly.
    """
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5))) if only_a + only_b else 1.0
