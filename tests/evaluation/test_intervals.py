"""Intervals against published quantiles, scipy, and their own coverage."""

import math

import numpy as np
import pytest

from rkd_jax.evaluation.intervals import (
    mean_interval,
    paired_interval,
    ratio_interval,
    t_quantile,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.975, 1, 12.706205),
        (0.975, 2, 4.302653),
        (0.975, 3, 3.182446),
        (0.975, 10, 2.228139),
        (0.95, 29, 1.699127),
        (0.995, 7, 3.499483),
        (0.025, 10, -2.228139),
        (0.5, 4, 0.0),
    ],
)
def test_t_quantile_matches_the_printed_tables(probability, degrees, expected):
    assert t_quantile(probability, degrees) == pytest.approx(expected, abs=1e-6)


def test_t_quantile_matches_scipy_over_degrees():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 5, 8, 31, 200, 4999):
        for probability in (0.6, 0.9, 0.975, 0.9995):
            expected = stats.t.ppf(probability, degrees)
            assert t_quantile(probability, degrees) == pytest.approx(expected, 1e-9)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.9, 0)])
def test_t_quantile_refuses_what_does_not_exist(probability, degrees):
    with pytest.raises(ValueError, match="no t quantile"):
        t_quantile(probability, degrees)


def test_mean_interval_by_hand():
    # mean 3, s = sqrt(10/4), t_{0.975,4} = 2.776445
    interval = mean_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(10 / 4) / math.sqrt(5)
    assert interval.mean == 3
    assert interval.half_width == pytest.approx(half, abs=1e-6)
    assert (interval.low, interval.high) == pytest.approx((3 - half, 3 + half), 1e-6)
    assert interval.n == 5
    assert mean_interval([1, 2, 3, 4, 5], 0.5).half_width < half / 3


def test_few_values_have_no_interval():
    one, none = mean_interval([2.0]), mean_interval([])
    assert (one.mean, one.n, none.n) == (2.0, 1, 0)
    assert all(map(math.isnan, (one.low, one.high, none.mean, none.low, none.high)))
    assert one.contains_zero


def test_mean_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    draws = generator.exponential(1.0, (2000, 40))
    hits = [row.low < 1.0 < row.high for row in map(mean_interval, draws)]
    # Skewed data at n = 40 cost about two points of the nominal 95.
    assert 0.91 < np.mean(hits) < 0.96


def test_paired_interval_is_the_interval_of_the_differences():
    generator = np.random.default_rng(1)
    difficulty = generator.normal(0, 10, 30)
    a = difficulty + generator.normal(0.5, 0.1, 30)
    b = difficulty + generator.normal(0.0, 0.1, 30)
    paired = paired_interval(a, b)
    half = t_quantile(0.975, 29) * np.std(a - b, ddof=1) / math.sqrt(30)
    assert paired.mean == pytest.approx((a - b).mean())
    assert paired.half_width == pytest.approx(half)
    assert paired.low > 0
    assert mean_interval(a).half_width > 20 * paired.half_width


def test_ratio_interval_is_token_weighted_and_close_to_the_jackknife():
    generator = np.random.default_rng(2)
    tokens = generator.integers(5, 60, 80).astype(float)
    totals = tokens * generator.normal(0.8, 0.3, 80)
    interval = ratio_interval(totals, tokens)
    assert interval.mean == pytest.approx(totals.sum() / tokens.sum())
    left_out = (totals.sum() - totals) / (tokens.sum() - tokens)
    jackknife = math.sqrt(79 / 80 * ((left_out - left_out.mean()) ** 2).sum())
    # Both estimate one standard error and agree to first order in 1/n.
    expected = t_quantile(0.975, 79) * jackknife
    assert interval.half_width == pytest.approx(expected, rel=0.03)


def test_ratio_interval_with_equal_weights_is_the_mean_interval():
    values = np.array([0.3, 0.1, 0.7, 0.2])
    ratio, mean = ratio_interval(values * 8, np.full(4, 8)), mean_interval(values)
    found = (ratio.mean, ratio.low, ratio.high)
    assert found == pytest.approx((mean.mean, mean.low, mean.high), 1e-12)


def test_rows_without_weight_are_left_out():
    interval = ratio_interval([3.0, 99.0, 1.0], [2, 0, 2])
    assert (interval.mean, interval.n) == (1.0, 2)
    assert ratio_interval([1.0], [0]).n == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([0.1, math.nan]), r"values\[1\] is nan"),
        (lambda: mean_interval([[0.1], [0.2]]), "one number per prompt"),
        (lambda: mean_interval([0.1, 0.2], 95), r"level must lie in \(0, 1\)"),
        (lambda: paired_interval([1.0], [1.0, 2.0]), "1 values against 2"),
        (lambda: ratio_interval([1.0], [-1]), r"weights\[0\] is negative"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
