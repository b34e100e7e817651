"""What a set of rewards says about two or three policies on the same prompts.

Every argument is one reward per prompt, float[n], the same prompts in the same order;
several samples of a prompt are averaged beforehand. Higher is better. Host code in
float64 numpy, deterministic: the bootstrap has a fixed seed.

>>> win_rate([1.0, 0.5, 0.2], [0.0, 0.5, 0.1]).rate
0.8333333333333334
"""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np

from rkd_jax.evaluation.intervals import (
    Interval,
    Values,
    mean_interval,
    paired_interval,
    paired_rows,
)

__all__ = [
    "GapClosed",
    "WinRate",
    "gap_closed",
    "mean_interval",
    "paired_interval",
    "win_rate",
]

_CHUNK = 1 << 20  # bootstrap indices held at once


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How often the first policy's reward is the higher one; a tie is half a win.

    Example: ``WinRate(rate=0.64, ties=3, interval=Interval(0.64, 0.54, 0.73, 100))``.
    """

    rate: float
    ties: int
    interval: Interval


@dataclasses.dataclass(frozen=True)
class GapClosed:
    """The share of the teacher's lead a student has made up, or why there is none.

    Example: ``GapClosed(value=0.62, interval=Interval(0.62, 0.41, 0.85, 200))``.
    ``value`` is NaN exactly when ``note`` is not empty.
    """

    value: float
    interval: Interval
    note: str = ""


def win_rate(a: Values, b: Values, level: float = 0.95) -> WinRate:
    r"""Share of prompts on which ``a`` beats ``b``, ties counted half.

    The interval is Wilson's score interval. With ties the score of a prompt is 0, 1/2
    or 1, whose variance is at most that of a coin with the same mean, so the interval
    errs on the wide side; it never leaves [0, 1] and does not collapse at 0 or 1.

    Args:
        a, b: float[n], rewards of the two policies.
        level: coverage in (0, 1).

    Returns:
        `WinRate`; rate and bounds are NaN for no prompts.

    Raises:
        ValueError: lengths differ, a reward is not finite, level out of range.

    References:
        Wilson, JASA 22, 1927. Deviation: applied to half-wins, see above.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1): {level}")
    a, b = paired_rows(a, b)
    ties, n = int((a == b).sum()), a.size
    if not n:
        return WinRate(math.nan, 0, Interval(math.nan, math.nan, math.nan, 0))
    rate = float(((a > b).sum() + 0.5 * ties) / n)
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    shrink = 1 / (1 + z * z / n)
    centre = shrink * (rate + z * z / (2 * n))
    half = shrink * z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return WinRate(rate, ties, Interval(rate, low, high, n))


def gap_closed(
    teacher: Values,
    start: Values,
    student: Values,
    level: float = 0.95,
    *,
    resamples: int = 4000,
    seed: int = 0,
) -> GapClosed:
    r"""How much of the teacher's lead over the start the student has made up.

    .. math:: (\bar r_{student} - \bar r_{start}) / (\bar r_{teacher} - \bar r_{start})

    0 is the start, 1 the teacher; more than 1 passes the teacher by the measure used,
    which with an oracle reward can be a sign of over-optimisation. The interval is the
    percentile bootstrap over prompts, all three policies resampled together.

    Args:
        teacher, start, student: float[n], rewards on the same prompts.
        level: coverage in (0, 1), of the result and of the test on the lead.
        resamples: bootstrap draws.
        seed: of the bootstrap.

    Returns:
        `GapClosed`. Refused (NaN with a note) when the interval of the teacher's lead
        contains 0 or lies below it: the ratio would be noise, or of the wrong sign.

    Raises:
        ValueError: lengths differ, a reward is not finite, level out of range.

    References:
        Burns et al., Weak-to-strong generalization, 2023, "performance gap recovered".
    """
    teacher, start = paired_rows(teacher, start)
    student, _ = paired_rows(student, start)
    lead = mean_interval(teacher - start, level)
    if not lead.low > 0:
        reason = "cannot be told from 0" if lead.contains_zero else "is negative"
        note = (
            f"the teacher's lead over the start, {lead.mean:.3g} "
            f"[{lead.low:.3g}, {lead.high:.3g}] on {lead.n} prompts, {reason}"
        )
        return GapClosed(math.nan, Interval(math.nan, math.nan, math.nan, lead.n), note)
    gains, leads = student - start, teacher - start
    value = float(gains.mean() / leads.mean())
    ratios = _bootstrap_ratio(gains, leads, resamples, seed)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return GapClosed(value, Interval(value, float(low), float(high), lead.n))


def _bootstrap_ratio(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """Ratios of means over rows drawn with replacement, float64[<= resamples]."""
    generator, n = np.random.default_rng(seed), numerator.size
    parts = []
    rows = max(1, _CHUNK // n)
    for first in range(0, resamples, rows):
        picks = generator.integers(0, n, (min(rows, resamples - first), n))
        top, bottom = numerator[picks].sum(axis=1), denominator[picks].sum(axis=1)
        # Few prompts can draw a resample without any lead; it has no ratio.
        parts.append(top[bottom != 0] / bottom[bottom != 0])
    return np.concatenate(parts)
