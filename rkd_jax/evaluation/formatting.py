"""Numbers as people read them: as many decimals as the uncertainty deserves.

>>> as_text(Interval(0.5312, 0.4887, 0.5737, 200), 2)
'0.53 ± 0.04'
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from rkd_jax.evaluation.intervals import Interval


def decimals(intervals: Iterable[Interval], *, percent: bool = False) -> int:
    """Decimals for one column: the tightest interval keeps one significant digit.

    2 where there is no interval (0 for percentages), never more than 4.
    """
    scale = 100 if percent else 1
    widths = [i.half_width * scale for i in intervals if i.half_width > 0]
    if not widths:
        return 0 if percent else 2
    return min(4, max(0, math.ceil(-math.log10(min(widths)))))


def number(value: float, places: int, *, percent: bool = False) -> str:
    """``value`` with ``places`` decimals and no negative zero; an en dash for NaN."""
    if not math.isfinite(value):
        return "–"
    rounded = round(value * (100 if percent else 1), places) + 0.0
    return f"{rounded:,.{places}f}" + ("%" if percent else "")


def spread(interval: Interval, places: int, *, percent: bool = False) -> str:
    """``± h`` for a symmetric interval, ``[low, high]`` for another, else nothing."""
    half = interval.half_width
    if not math.isfinite(half):
        return ""
    scale = 100 if percent else 1
    low, high = interval.low * scale, interval.high * scale
    centre = interval.mean * scale
    if abs((low + high) / 2 - centre) <= 1e-9 * max(1.0, abs(centre)):
        return f"± {number(half * scale, places)}"
    return f"[{number(low, places)}, {number(high, places)}]"


def as_text(interval: Interval | None, places: int, *, percent: bool = False) -> str:
    """Value and spread on one line; an en dash for None."""
    if interval is None:
        return "–"
    shown = number(interval.mean, places, percent=percent)
    return f"{shown} {spread(interval, places, percent=percent)}".rstrip()


def signed(interval: Interval, places: int) -> str:
    """A difference with its sign and both bounds: ``+0.06 [+0.01, +0.11]``."""
    values = (interval.mean, interval.low, interval.high)
    mean, low, high = (
        f"{round(v, places) + 0.0:+.{places}f}" if math.isfinite(v) else "–"
        for v in values
    )
    return f"{mean} [{low}, {high}]"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
