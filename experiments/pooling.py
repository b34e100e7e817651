"""Several seeds of the same methods as one table: the seed is the unit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import judging
from experiments.judging import Judged
from rkd_jax.evaluation.content import Difference, Policy
from rkd_jax.evaluation.intervals import Interval, mean_interval
from rkd_jax.evaluation.rewards import GapClosed, WinRate

Judgements = Mapping[str, Judged]  # of one seed, by policy


def pool(seeds: Sequence[Judgements]) -> list[Policy]:
    """One row per policy: as judged for one seed, means over the seeds of several."""
    if len(seeds) == 1:
        return [judged.policy for judged in seeds[0].values()]
    return [pool_rows([found[name].policy for found in seeds]) for name in seeds[0]]


def pool_rows(rows: Sequence[Policy]) -> Policy:
    """Means over seeds, every interval that of the mean over seeds."""
    cells = {}
    for field in dataclasses.fields(Policy):
        values = [getattr(row, field.name) for row in rows]
        missing = any(value is None for value in values)
        cells[field.name] = None if missing else _mean(values)
    return Policy(**cells)


def differences(
    seeds: Sequence[Judgements], pairs: Iterable[tuple[str, str]]
) -> list[Difference]:
    """Over prompts for one seed, over the seeds' means for several."""
    if len(seeds) == 1:
        return judging.differences(seeds[0], pairs)
    return [
        Difference(
            a,
            b,
            mean_interval(
                [found[a].rewards.mean() - found[b].rewards.mean() for found in seeds]
            ),
        )
        for a, b in pairs
    ]


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, str):
        return first
    if isinstance(first, Interval):
        return mean_interval([value.mean for value in values])
    if isinstance(first, WinRate):
        over = mean_interval([value.rate for value in values])
        return WinRate(over.mean, sum(value.ties for value in values), over)
    if isinstance(first, GapClosed):
        noted = [value for value in values if value.note]
        if noted:
            nothing = Interval(math.nan, math.nan, math.nan, len(values))
            return GapClosed(math.nan, nothing, noted[0].note)
        over = mean_interval([value.value for value in values])
        return GapClosed(over.mean, over)
    return sum(values) / len(values)
