"""Means with the uncertainty they have: Student-t intervals in float64 numpy.

The unit of observation is the prompt. Several samples of one prompt are not
independent, so average them first or keep them in one row (see `ratio_interval`).

>>> mean_interval([0.2, 0.4, 0.6, 0.8])
Interval(mean=0.5, low=0.08915, high=0.9109, n=4)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

Values = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate, the interval it lies in at the stated level, and how many units.

    Example: ``Interval(mean=0.53, low=0.49, high=0.57, n=200)``. Bounds are NaN when
    one unit cannot say how far it is off, everything is NaN for none.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the length of the interval, the unit of the mean."""
        return (self.high - self.low) / 2

    @property
    def contains_zero(self) -> bool:
        """True unless the whole interval lies on one side of 0; NaN bounds count."""
        return not (self.low > 0 or self.high < 0)

    def __repr__(self) -> str:
        numbers = (f"{k}={getattr(self, k):.4g}" for k in ("mean", "low", "high"))
        return f"Interval({', '.join(numbers)}, n={self.n})"


def mean_interval(values: Values, level: float = 0.95) -> Interval:
    """Mean of independent values with its Student-t interval.

    Args:
        values: float[n], one finite number per prompt, any unit.
        level: coverage in (0, 1).

    Returns:
        `Interval`, symmetric about the mean, n - 1 degrees of freedom.

    Raises:
        ValueError: a value is not finite, not one row of values, level out of range.
    """
    values = _finite_row(values, "values")
    return _student_interval(values.mean() if values.size else math.nan, values, level)


def paired_interval(a: Values, b: Values, level: float = 0.95) -> Interval:
    """Mean of ``a - b`` over prompts, with the interval of the paired difference.

    The prompts' own difficulty cancels, so this is the interval to judge a method
    by, not the overlap of two separate ones.

    Args:
        a, b: float[n], the same prompts in the same order.
        level: coverage in (0, 1).

    Returns:
        `Interval` of the difference; positive means ``a`` is higher.

    Raises:
        ValueError: lengths differ, or as `mean_interval`.
    """
    a, b = paired_rows(a, b)
    return mean_interval(a - b, level)


def ratio_interval(totals: Values, weights: Values, level: float = 0.95) -> Interval:
    r"""``sum(totals) / sum(weights)``, such as a mean per token, over rows.

    The rows are the independent units and their weights vary, so the variance is the
    linearised one of a ratio estimator,

    .. math:: \widehat{\mathrm{Var}} = \frac{1}{n (n-1)\,\bar w^2}
        \sum_i (t_i - \hat R\, w_i)^2 .

    Args:
        totals: float[n], sum of the quantity over the row.
        weights: float[n], non-negative, how many tokens that was. A row of weight 0
            is left out.
        level: coverage in (0, 1).

    Returns:
        `Interval` whose ``n`` counts the rows with a positive weight. Equal weights
        give exactly `mean_interval` of the rows' means.

    Raises:
        ValueError: a weight is negative, lengths differ, or as `mean_interval`.

    References:
        Cochran, Sampling Techniques, 1977, Eq. (6.13), without the finite-population
        correction.
    """
    totals, weights = paired_rows(totals, weights)
    if (weights < 0).any():
        raise ValueError(f"weights[{int(np.argmax(weights < 0))}] is negative")
    kept = weights > 0
    totals, weights = totals[kept], weights[kept]
    if not totals.size:
        return Interval(math.nan, math.nan, math.nan, 0)
    ratio = totals.sum() / weights.sum()
    return _student_interval(ratio, (totals - ratio * weights) / weights.mean(), level)


@functools.lru_cache(maxsize=1024)
def t_quantile(probability: float, degrees: int) -> float:
    """The value Student's t with ``degrees`` degrees of freedom stays below.

    Bisection on the closed form of the distribution function for integer degrees of
    freedom, to about 1e-12 relative; no scipy.

    Args:
        probability: in (0, 1).
        degrees: at least 1.

    Raises:
        ValueError: out of range.

    References:
        Abramowitz and Stegun, Eq. 26.7.3 and 26.7.4.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"no t quantile for {probability=}, {degrees=}")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    inside = 2 * probability - 1
    coefficients = _central_coefficients(degrees)
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        if _central_mass(middle, degrees, coefficients) < inside:
            low = middle
        else:
            high = middle
    return math.tan(high) * math.sqrt(degrees)


def _finite_row(values: Values, name: str) -> np.ndarray:
    """``values`` as float64[n].

    Raises:
        ValueError: not one-dimensional, or the first value that is not finite.
    """
    row = np.asarray(values, np.float64)
    if row.ndim != 1:
        raise ValueError(
            f"{name} has shape {row.shape}: one number per prompt is needed, so "
            "average the samples of a prompt first"
        )
    bad = np.flatnonzero(~np.isfinite(row))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] is {row[bad[0]]}: only finite values count")
    return row


def paired_rows(a: Values, b: Values) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64[n].

    Raises:
        ValueError: as `_finite_row`, or the lengths differ.
    """
    a, b = _finite_row(a, "the first argument"), _finite_row(b, "the second argument")
    if a.size != b.size:
        raise ValueError(
            f"{a.size} values against {b.size}: paired statistics need the same "
            "prompts in the same order"
        )
    return a, b


def _student_interval(mean: float, spread: np.ndarray, level: float) -> Interval:
    """``mean`` with the standard error of the mean of ``spread``."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1): {level}")
    n = spread.size
    if n < 2:
        return Interval(float(mean), math.nan, math.nan, n)
    half = t_quantile((1 + level) / 2, n - 1) * spread.std(ddof=1) / math.sqrt(n)
    return Interval(float(mean), float(mean - half), float(mean + half), n)


def _central_coefficients(degrees: int) -> np.ndarray:
    """Coefficients of the powers of cos(angle)**2 in `_central_mass`."""
    start = 1 if degrees % 2 == 0 else 2
    numerators = np.arange(start, degrees - 2, 2, dtype=np.float64)
    return np.cumprod(np.append(1.0, numerators / (numerators + 1)))


def _central_mass(angle: float, degrees: int, coefficients: np.ndarray) -> float:
    """P(|t| < tan(angle) * sqrt(degrees)), in closed form."""
    cosine, sine = math.cos(angle), math.sin(angle)
    series = float(coefficients @ (cosine**2) ** np.arange(coefficients.size))
    if degrees % 2 == 0:
        return sine * series
    if degrees == 1:
        return 2 / math.pi * angle
    return 2 / math.pi * (angle + sine * cosine * series)
