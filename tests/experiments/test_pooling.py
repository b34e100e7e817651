"""Means over seeds: the seed is the unit, a missing cell stays missing."""

import dataclasses
import math

import numpy as np
import pytest

from experiments.judging import Judged
from experiments.pooling import differences, pool, pool_rows
from rkd_jax.evaluation.content import Policy
from rkd_jax.evaluation.intervals import Interval
from rkd_jax.evaluation.rewards import GapClosed, WinRate

T_2 = 4.302652729749464  # the 97.5 % quantile of Student's t, 2 degrees of freedom


def row(reward: float, **cells) -> Policy:
    interval = Interval(reward, reward - 0.1, reward + 0.1, 50)
    return Policy("DPO", reward=interval, **cells)


def judged(rewards) -> Judged:
    rewards = np.asarray(rewards, float)
    return Judged(row(float(rewards.mean())), [""] * len(rewards), rewards)


def test_the_interval_is_that_of_the_seeds_not_of_the_prompts():
    pooled = pool_rows([row(0.2), row(0.4), row(0.9)])
    half = T_2 * math.sqrt(0.13 / 3)  # variance of 0.2, 0.4, 0.9
    assert pooled.reward.mean == pytest.approx(0.5, abs=1e-12)
    assert pooled.reward.half_width == pytest.approx(half, abs=1e-9)
    assert pooled.reward.n == 3
    assert pooled.name == "DPO"
    assert pooled.role == "student"


def test_plain_numbers_rates_and_gaps_are_averaged():
    rows = [
        row(
            0.0,
            distinct_2=distinct,
            win_rate=WinRate(rate, ties, Interval(rate, 0.0, 1.0, 50)),
            gap_closed=GapClosed(gap, Interval(gap, 0.0, 1.0, 50)),
        )
        for distinct, rate, ties, gap in ((0.5, 0.4, 3, 0.1), (0.7, 0.8, 5, 0.5))
    ]
    pooled = pool_rows(rows)
    assert pooled.distinct_2 == pytest.approx(0.6)
    assert (pooled.win_rate.rate, pooled.win_rate.ties) == (pytest.approx(0.6), 8)
    assert pooled.gap_closed.value == pytest.approx(0.3)
    assert pooled.gap_closed.interval.n == 2
    assert not pooled.gap_closed.note


def test_a_cell_one_seed_lacks_is_empty():
    pooled = pool_rows([row(0.1, seconds_per_step=2.0), row(0.2)])
    assert pooled.seconds_per_step is None
    assert pooled.teacher_nll is None


def test_a_seed_without_a_gap_says_so_for_all():
    none = GapClosed(math.nan, Interval(math.nan, math.nan, math.nan, 5), "no lead")
    some = GapClosed(0.5, Interval(0.5, 0.4, 0.6, 5))
    pooled = pool_rows([row(0.1, gap_closed=some), row(0.2, gap_closed=none)])
    assert pooled.gap_closed.note == "no lead"
    assert math.isnan(pooled.gap_closed.value)


def test_one_seed_keeps_its_rows_and_its_paired_differences():
    one = {"a": judged([0.0, 1.0, 1.0]), "b": judged([0.0, 0.0, 1.0])}
    assert pool([one]) == [one["a"].policy, one["b"].policy]
    (found,) = differences([one], [("a", "b")])
    assert found.difference.mean == pytest.approx(1 / 3)
    assert found.difference.n == 3  # prompts


def test_several_seeds_are_compared_seed_by_seed():
    seeds = [
        {"a": judged([first, first]), "b": judged([0.0, 0.2])}
        for first in (0.3, 0.4, 0.5)
    ]
    (found,) = differences(seeds, [("a", "b")])
    assert found.difference.mean == pytest.approx(0.3)
    assert found.difference.half_width == pytest.approx(T_2 * 0.1 / math.sqrt(3))
    assert found.difference.n == 3  # seeds
    assert found.finding == "higher"
    assert [policy.reward.n for policy in pool(seeds)] == [3, 3]


def test_a_row_is_pooled_field_by_field():
    """A new column of the table is not forgotten."""
    same = row(0.3, distinct_1=0.5, ended_share=1.0, repetition=0.0)
    pooled = pool_rows([same, same])
    for field in dataclasses.fields(Policy):
        before, after = getattr(same, field.name), getattr(pooled, field.name)
        if isinstance(before, Interval):
            before, after = before.mean, after.mean
        assert after == before, field.name
