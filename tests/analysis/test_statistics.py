from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from wlora.analysis.statistics import (
    compare,
    difference,
    generator,
    interquartile_mean,
    interval,
    mcnemar,
    performance_profile,
    resample,
    summarize,
)


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


def test_a_task_with_a_single_pair_leaves_the_mean_without_an_interval() -> None:
    b = {"x": {0: 0.0}, "y": {0: 0.1, 1: 0.4, 2: 0.2}}
    found = compare({"x": {0: 1.0}, "y": {0: 0.5, 1: 0.5, 2: 0.5}}, b, rng())
    assert found is not None and found.pairs == 4 and found.difference.low is None and found.probability.low is None
    assert compare({"x": {0: 1.0}}, {"x": {1: 0.5, 2: 0.6, 3: 0.7}}, rng()).difference.low is None  # type: ignore[union-attr]


def test_the_paired_interval_on_one_task_is_that_of_the_t_test() -> None:
    a, b = {0: 0.81, 1: 0.84, 2: 0.80, 3: 0.86}, {0: 0.80, 1: 0.82, 2: 0.81, 3: 0.83}
    found = difference({"x": a}, {"x": b})
    expected = stats.ttest_rel(list(a.values()), list(b.values()))
    assert found is not None and found.paired and found.pairs == (4,)
    assert found.p_different() == pytest.approx(expected.pvalue)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p_above(0.0) == pytest.approx(stats.ttest_rel([*a.values()], [*b.values()], alternative="greater").pvalue)
    lower = stats.ttest_1samp([a[s] - b[s] for s in a], -0.05, alternative="greater").pvalue
    upper = stats.ttest_1samp([a[s] - b[s] for s in a], 0.05, alternative="less").pvalue
    assert found.p_within(0.05) == pytest.approx(max(lower, upper)) and found.p_within(0.05) != found.p_within(0.02)


def test_unpaired_runs_get_welchs_interval() -> None:
    a, b = [0.81, 0.84, 0.80], [0.70, 0.82, 0.75, 0.71]
    found = difference({"x": dict(enumerate(a))}, {"x": {9 + seed: score for seed, score in enumerate(b)}})
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert found is not None and not found.paired and found.p_different() == pytest.approx(expected.pvalue)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_over_tasks_the_seeds_are_the_sample() -> None:
    # Every seed is as good on the second task as on the first: this says no more than the first task alone.
    a, b = {0: 0.81, 1: 0.84, 2: 0.80, 3: 0.86}, {0: 0.80, 1: 0.82, 2: 0.81, 3: 0.83}
    alone, twice = difference({"x": a}, {"x": b}), difference({"x": a, "y": {**a, 9: 0.1}}, {"x": b, "y": {**b, 9: 0.9}})
    assert alone is not None and twice is not None and twice.interval() == pytest.approx(alone.interval())
    assert (twice.mean, twice.pairs) == (pytest.approx(alone.mean), (4, 4)), "seed 9 is only in the second task"
    one = compare({"x": a}, {"x": b}, rng())
    both = compare({"x": a, "y": a}, {"x": b, "y": b}, rng())
    assert one is not None and both is not None and (one.pairs, both.pairs) == (4, 8)
    for first, second in ((one.difference, both.difference), (one.probability, both.probability)):
        assert (first.mean, first.low, first.high) == pytest.approx((second.mean, second.low, second.high))


def test_without_common_seeds_the_errors_of_tasks_are_independent() -> None:
    a = {"x": {0: 0.9, 1: 0.8}, "y": {2: 0.3, 3: 0.4}}
    b = {"x": {0: 0.7, 1: 0.7}, "y": {2: 0.3, 3: 0.1}}
    found = difference(a, b)
    assert found is not None and found.mean == pytest.approx(0.15)
    # Differences are 0.2, 0.1 and 0.0, 0.3: variances of the means 0.0025 and 0.0225, one degree of freedom each.
    assert found.error == pytest.approx(math.sqrt(0.0025 + 0.0225) / 2)
    assert found.freedom == pytest.approx(0.025**2 / (0.0025**2 + 0.0225**2))


def test_a_score_below_a_threshold_by_rounding_has_reached_it() -> None:
    score = 400 / 872
    above = [100 * (score - sum([score] * 3) / 3)] * 2
    assert above[0] < 0 and performance_profile([above, [-math.inf, -1.0]], [-1.0, 0.0]) == [0.75, 0.5]


def test_a_single_pair_or_pairs_without_spread_have_no_interval() -> None:
    for a, b in (({0: 1.0}, {0: 0.5}), ({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.6})):
        found = difference({"x": a}, {"x": b})
        assert found is not None and found.mean > 0
        assert (found.interval(), found.p_different(), found.p_within(1.0)) == (None, None, None)
    assert difference({"x": {0: 1.0}}, {"y": {0: 1.0}}) is None


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    values = [0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 9.0]
    found = interquartile_mean([values[:4], values[4:]], rng())
    assert found.mean == pytest.approx(stats.trim_mean(values, 0.25)) == pytest.approx(0.45) and found.n == 8
    assert found.low is not None and found.high is not None and found.low < found.mean < found.high
    assert interquartile_mean([[0.1], [0.2, 0.3]], rng()).low is None


def test_a_performance_profile_weighs_tasks_the_same() -> None:
    assert performance_profile([[0.0, 1.0, 1.0, 1.0], [0.0]], [0.0, 0.5, 2.0]) == pytest.approx([1.0, 0.375, 0.0])


def test_mcnemar_is_the_binomial_test_of_the_examples_that_one_side_answers() -> None:
    for a, b in ((3, 12), (12, 3), (5, 5), (0, 6), (1, 0)):
        assert mcnemar(a, b) == pytest.approx(stats.binomtest(a, a + b, 0.5).pvalue)
    assert mcnemar(0, 0) == 1.0
