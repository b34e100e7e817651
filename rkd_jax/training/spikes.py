"""Spikes of the loss: seen and said, never acted on."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

WINDOW = 64  # earlier losses that the next one is compared with
ENOUGH = 16  # of them, before anything is called a spike
FACTOR = 10.0  # spreads above the median; 6.7 standard deviations of a normal noise
FLOOR = 0.05  # least spread, as a share of the median: a flat curve has none


class Spike(NamedTuple):
    """A loss far above those before it."""

    loss: float
    median: float
    spread: float  # median absolute deviation, at least FLOOR of the median

    def __str__(self) -> str:
        times = (self.loss - self.median) / self.spread if self.spread else math.inf
        return (
            f"loss {self.loss:.4g} is {times:.0f} times the usual spread above the "
            f"median {self.median:.4g}"
        )


class SpikeWatch:
    """Compares every loss with the `WINDOW` losses before it.

    A spike is more than `FACTOR` median absolute deviations above their median, which
    is meaningful for losses of either sign. Losses that are not finite are no spikes
    and are not remembered.

    Example: ``SpikeWatch([2.0] * 20).see(9.0)`` is a `Spike`.

    Args:
        past: losses that were there before, oldest first.
    """

    def __init__(self, past: Iterable[float] = ()):
        self._past = deque(past, maxlen=WINDOW)

    def see(self, loss: float) -> Spike | None:
        """Whether this one is a spike; it is remembered."""
        if not math.isfinite(loss):
            return None
        found = None
        if len(self._past) >= ENOUGH:
            median = statistics.median(self._past)
            spread = statistics.median(abs(past - median) for past in self._past)
            spread = max(spread, FLOOR * abs(median))
            if loss - median > FACTOR * spread:
                found = Spike(loss, median, spread)
        self._past.append(loss)
        return found
