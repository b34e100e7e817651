"""What a cache keeps of frozen models, computed for rows of one shape at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rkd_jax.models.api import CausalLM, response_states
from rkd_jax.placement import on_own_rows
from rkd_jax.signals.cache_format import CacheSettings
from rkd_jax.signals.topk import TopkScores, topk_scores
from rkd_jax.signals.values import shaping_of_logits
from rkd_jax.types import Params, Sequences


class TeacherScores(NamedTuple):
    """What the teacher says about R rows; None where it is not asked.

    Example: ``TeacherScores(topk=TopkScores(ids=int32[R, T, K], ...), shaping=None)``.
    """

    topk: TopkScores | None  # [R, T, K]; anything at masked positions
    shaping: jax.Array | None  # float32[R]


def make_teacher_scores(
    model: CausalLM, settings: CacheSettings
) -> Callable[[Params, Sequences], TeacherScores]:
    """Everything that is read off the teacher, from one pass over it.

    The same numbers as `rkd_jax.signals.topk.make_topk` and
    `rkd_jax.signals.values.make_shaping`. Logits exist for one row at a time.

    Args:
        model: the teacher.
        settings: what to compute.

    Returns:
        Jitted ``(params, sequences [R]) -> TeacherScores``.

    Gradient:
        None: stopped at the model's parameters.
    """
    shaping_of = None
    if settings.shaping is not None:
        options = dataclasses.asdict(settings.shaping)
        shaping_of = shaping_of_logits(**options, temperature=settings.temperature)

    @jax.jit
    def teacher_scores(params: Params, sequences: Sequences) -> TeacherScores:
        params = jax.lax.stop_gradient(params)
        states = response_states(model, params, sequences)
        states = jnp.concatenate([states.before, states.after[:, -1:]], axis=1)

        def of_row(params: Params, row: tuple[jax.Array, jax.Array]) -> TeacherScores:
            hidden, mask = row
            logits = model.unembed(params, hidden)
            shaping = None if shaping_of is None else shaping_of(logits, mask)
            if settings.top_k is None:
                return TeacherScores(None, shaping)
            tempered = logits[:-1] / settings.temperature
            return TeacherScores(topk_scores(tempered, settings.top_k), shaping)

        def one_by_one(params: Params, rows: tuple[jax.Array, jax.Array]):
            return jax.lax.map(functools.partial(of_row, params), rows)

        return on_own_rows(one_by_one, params, (states, sequences.response_mask))

    return teacher_scores
