"""Win rates and the closed gap by hand, and the bootstrap's coverage."""

import math

import numpy as np
import pytest

from rkd_jax.evaluation.rewards import gap_closed, win_rate


def test_win_rate_counts_a_tie_half():
    result = win_rate([1, 1, 0, 0.5], [0, 1, 1, 0.5])
    assert (result.rate, result.ties, result.interval.n) == (0.5, 2, 4)


def test_win_rate_interval_is_wilsons():
    # 7 of 10: the published Wilson interval at 95% is (0.397, 0.892).
    result = win_rate([1.0] * 7 + [0.0] * 3, [0.5] * 10)
    assert result.rate == pytest.approx(0.7)
    bounds = (result.interval.low, result.interval.high)
    assert bounds == pytest.approx((0.3968, 0.8922), abs=1e-4)


def test_win_rate_does_not_collapse_at_the_ends():
    result = win_rate(np.ones(20), np.zeros(20))
    z = 1.959964
    assert result.interval.low == pytest.approx(20 / (20 + z * z), abs=1e-6)
    assert result.interval.high == pytest.approx(1.0, abs=1e-12)
    assert result.interval.high <= 1.0


def test_win_rates_of_the_two_sides_mirror_each_other():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 3, (2, 50)).astype(float)
    one, other = win_rate(a, b), win_rate(b, a)
    assert one.ties == other.ties == int((a == b).sum())
    assert one.rate == pytest.approx(1 - other.rate)
    assert one.interval.low == pytest.approx(1 - other.interval.high)


def test_no_prompts_no_rate():
    assert math.isnan(win_rate([], []).rate)


def test_gap_closed_known_numbers():
    start = np.array([0.0, 0.1, 0.2, 0.3])
    result = gap_closed(start + 0.4, start, start + 0.1)
    # The ratio is 1/4 on every resample.
    assert result.value == pytest.approx(0.25)
    bounds = (result.interval.low, result.interval.high)
    assert bounds == pytest.approx((0.25, 0.25))
    assert result.note == ""


def test_gap_closed_is_a_ratio_of_means_not_a_mean_of_ratios():
    start = np.zeros(8)
    teacher = np.array([1.0, 3.0] * 4)
    student = np.array([1.0, 0.0] * 4)
    assert gap_closed(teacher, start, student).value == pytest.approx(0.25)


def test_gap_closed_interval_agrees_with_the_delta_method():
    generator = np.random.default_rng(3)
    n = 400
    teacher, start, student = generator.normal(0, 1, (3, n)) + [[1.0], [0.0], [0.6]]
    result = gap_closed(teacher, start, student)
    gains, leads = student - start, teacher - start
    ratio = gains.mean() / leads.mean()
    error = np.std(gains - ratio * leads, ddof=1) / leads.mean() / math.sqrt(n)
    assert result.value == pytest.approx(ratio)
    # Percentile bounds of 4000 draws scatter by a few percent of the width.
    assert result.interval.low == pytest.approx(ratio - 1.96 * error, abs=0.2 * error)
    assert result.interval.high == pytest.approx(ratio + 1.96 * error, abs=0.3 * error)


def test_gap_closed_bootstrap_covers_the_truth():
    generator = np.random.default_rng(4)
    hits = []
    for _ in range(200):
        noise = generator.normal(0, 0.5, (3, 60))
        teacher, start, student = noise + [[1.0], [0.0], [0.5]]
        interval = gap_closed(teacher, start, student, resamples=400).interval
        hits.append(interval.low < 0.5 < interval.high)
    # 95% nominal; three standard errors of 200 trials are 4.6 points.
    assert 0.90 < np.mean(hits) <= 1.0


def test_gap_closed_is_reproducible_and_its_seed_matters():
    generator = np.random.default_rng(5)
    arms = generator.normal(0, 0.3, (3, 50)) + [[1.0], [0.0], [0.4]]
    assert gap_closed(*arms) == gap_closed(*arms)
    assert gap_closed(*arms).interval.low != gap_closed(*arms, seed=1).interval.low


@pytest.mark.parametrize(
    ("lead", "reason"), [(0.0, "cannot be told from 0"), (-2.0, "is negative")]
)
def test_gap_closed_refuses_without_a_lead(lead, reason):
    generator = np.random.default_rng(6)
    start = generator.normal(0, 1, 30)
    teacher = start + lead + generator.normal(0, 0.1, 30) - 0.001
    result = gap_closed(teacher, start, start + 1)
    assert math.isnan(result.value)
    assert math.isnan(result.interval.mean)
    assert reason in result.note
    assert "30 prompts" in result.note


def test_gap_closed_survives_resamples_without_a_lead():
    # Ten prompts, six with a lead: some resamples draw none of the six.
    start = np.zeros(10)
    teacher = np.array([1.0] * 6 + [0.0] * 4)
    result = gap_closed(teacher, start, teacher / 2, resamples=60_000)
    assert (result.interval.low, result.interval.high) == pytest.approx((0.5, 0.5))


def test_three_policies_need_the_same_prompts():
    with pytest.raises(ValueError, match="2 values against 3"):
        gap_closed([1.0, 2.0, 3.0], [0.0, 0.0, 0.1], [1.0, 1.0])
