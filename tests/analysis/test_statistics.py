from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from wlora.analysis.statistics import compare, generator, interval, resample, summarize, summarize_strata


def rng(seed: int = 0) -> np.random.Generator:
    return generator(seed, "test")


def test_mean_and_sample_deviation_by_hand() -> None:
    found = summarize([0.2, 0.4, 0.9], rng())
    assert found.mean == pytest.approx(0.5) and found.n == 3
    assert found.std == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))


def test_one_run_has_no_spread_and_none_is_refused() -> None:
    found = summarize([0.7], rng())
    assert (found.mean, found.std, found.low, found.high, found.n) == (0.7, None, None, None, 1)
    with pytest.raises(ValueError, match="nothing"):
        summarize([], rng())


def test_the_bootstrap_of_two_runs_is_its_closed_form() -> None:
    # The mean of two draws from {0, 1} is 0 and 1 with probability 1/4 each, so 2.5 % and 97.5 % lie at 0 and 1.
    found = summarize([0.0, 1.0], rng())
    assert (found.low, found.high) == (0.0, 1.0)
    means = resample(np.array([0.0, 1.0]), rng()).mean(axis=1)
    assert np.mean(means == 0) == pytest.approx(0.25, abs=0.02)


def test_the_bootstrap_of_zeros_and_ones_is_the_binomial() -> None:
    values = [1.0] * 30 + [0.0] * 70
    found = summarize(values, rng())
    low, high = stats.binom.ppf([0.025, 0.975], 100, 0.3) / 100
    assert found.low == pytest.approx(low, abs=0.011) and found.high == pytest.approx(high, abs=0.011)


def test_the_interval_of_draws_is_central() -> None:
    assert interval(np.arange(10_001.0)) == pytest.approx((250.0, 9750.0))


def test_the_seed_of_the_bootstrap_is_honoured() -> None:
    values = list(np.linspace(0, 1, 30) ** 2)
    assert summarize(values, rng(1)) == summarize(values, rng(1))
    assert summarize(values, rng(1)) != summarize(values, rng(2))
    assert generator(1, "a").random() != generator(1, "b").random()


def test_a_mean_over_tasks_draws_seeds_within_each_task() -> None:
    # Spread between the tasks is not spread of their mean: without any within a task the interval has no width.
    found = summarize_strata([[0.2, 0.2], [0.8, 0.8, 0.8]], rng())
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert summarize_strata([[0.2], [0.8, 0.9]], rng()).low is None


def test_runs_are_paired_by_seed() -> None:
    a = {"x": {0: 0.5, 1: 0.6, 2: 0.7}}
    b = {"x": {0: 0.4, 1: 0.5, 2: 0.6, 3: 0.9}}
    found = compare(a, b, rng())
    assert found is not None and found.paired and (found.tasks, found.pairs) == (1, 3)
    # Every seed gains 0.1, so the paired difference has no spread, and seed 3 has no part in it.
    assert (found.difference.mean, found.difference.low, found.difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (found.probability.mean, found.probability.low, found.probability.high) == (1.0, 1.0, 1.0)


def test_without_common_seeds_every_run_meets_every_other() -> None:
    found = compare({"x": {0: 0.1, 1: 0.4}}, {"x": {2: 0.2, 3: 0.4}}, rng())
    assert found is not None and not found.paired and found.pairs == 4
    assert found.difference.mean == pytest.approx(-0.05)
    # 0.4 beats 0.2 and ties with 0.4; 0.1 loses twice: 1.5 of 4.
    assert found.probability.mean == pytest.approx(1.5 / 4)
    assert found.probability.low == 0.0 and found.probability.high == 1.0


def test_tasks_weigh_the_same_and_those_of_one_side_are_left_out() -> None:
    a = {"x": {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "y": {0: 0.0}, "z": {0: 1.0}}
    b = {"x": {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}, "y": {0: 0.5}, "z": {}}
    found = compare(a, b, rng())
    assert found is not None and (found.tasks, found.pairs) == (2, 5)
    assert found.difference.mean == pytest.approx(0.25) and found.probability.mean == pytest.approx(0.5)
    assert compare({"x": {0: 1.0}}, {"y": {0: 1.0}}, rng()) is None


def test_a_single_pair_per_task_has_no_interval() -> None:
    found = compare({"x": {0: 1.0}}, {"x": {0: 0.5}}, rng())
    assert found is not None and found.difference.low is None
