"""How a student is trained on a teacher cache, and by what it is measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from experiments.cached_lessons import Lessons
from experiments.game import in_chunks
from experiments.pupil import Pupil
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.losses import generalized_jsd, linear_topk_divergence, reward_scale
from rkd_jax.masking import sequence_mean
from rkd_jax.models.api import CausalLM, response_hidden
from rkd_jax.models.heads import ScalarHead
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.drdo import make_drdo
from rkd_jax.objectives.topk_kd import make_topk_kd
from rkd_jax.objectives.tvkd import make_tvkd
from rkd_jax.placement import follow_parameters
from rkd_jax.signals.cache import TeacherCache
from rkd_jax.signals.cache_rows import Batch
from rkd_jax.signals.teacher import make_sequence_scorer
from rkd_jax.types import Objective, Pair, Params, Sequences, TopkSignal

if TYPE_CHECKING:
    from experiments.from_cache import FromCacheConfig

Measured = Callable[[Params], np.ndarray]


class Method(NamedTuple):
    """One way of training on what a cache holds.

    ``signal`` is ``(cache, batch) -> (batch, signal)``, ``measure`` makes the function
    of a policy's parameters whose value of every held-out record is called ``unit``.
    """

    reads: type  # kind of record
    signal: Callable[[TeacherCache, Batch], tuple[Batch, Any]]
    objective: Callable[[CausalLM, FromCacheConfig, Lessons], Objective]
    metric: str  # of the training log
    measure: Callable[[Pupil, Lessons], Measured]
    unit: str
    head: ScalarHead | None = None  # trained beside the policy
    refers: bool = False  # to the reference, which should be the start

    def begin(self, pupil: Pupil, rng: jax.Array) -> Params:
        """What the objective trains."""
        if self.head is None:
            return pupil.student_params
        head = self.head.init(rng, pupil.student.config.hidden_size)
        return {"policy": pupil.student_params, "reward_head": head}

    def policy(self, params: Params) -> Params:
        """The student in it."""
        return params if self.head is None else params["policy"]


def divergences(pupil: Pupil, lessons: Lessons) -> Measured:
    """Forward KL to the teacher's lists on every held-out response, nats per token."""
    model, batch = pupil.student, lessons.tabulate(lessons.held_out)
    temperature = lessons.cache.settings.temperature

    @jax.jit
    def per_row(params: Params, rows: tuple[Sequences, TopkSignal]) -> jax.Array:
        sequences, teacher = rows
        mask = sequences.response_mask
        found = linear_topk_divergence(
            response_hidden(model, params, sequences),
            model.head(params),
            teacher.ids,
            teacher.log_probs,
            mask=mask,
            temperature=temperature,
            bias=model.head_bias(params),
            softcap=model.config.logit_softcap,
        )
        return sequence_mean(found, mask)

    followed = follow_parameters(per_row, to_host=True)

    def measure(params: Params) -> np.ndarray:
        def of_some(index):
            some = jax.tree.map(lambda x: x[index], batch)
            return followed(params, (some.sequences, lessons.cache.topk(some)))

        return in_chunks(of_some, np.arange(len(batch.index)))

    return measure


def margins(pupil: Pupil, lessons: Lessons) -> Measured:
    """By how much the preferred responses of held-out pairs are likelier, in nats."""
    temperature = lessons.cache.settings.temperature
    scores = make_sequence_scorer(pupil.student, temperature=temperature)
    followed = follow_parameters(scores, to_host=True)
    sequences = lessons.tabulate(lessons.held_out).sequences

    def measure(params: Params) -> np.ndarray:
        found = in_chunks(lambda rows: followed(params, rows), sequences)
        return lessons.margins(found)

    return measure


def _kd(model: CausalLM, config: FromCacheConfig, lessons: Lessons) -> Objective:
    divergence = functools.partial(generalized_jsd, beta=config.kd.beta)
    temperature = lessons.cache.settings.temperature
    return make_topk_kd(model, divergence, temperature=temperature)


def _dpo(model: CausalLM, config: FromCacheConfig, lessons: Lessons) -> Objective:
    temperature = lessons.cache.settings.temperature
    return make_dpo(model, beta=config.beta, temperature=temperature)


def _tvkd(model: CausalLM, config: FromCacheConfig, lessons: Lessons) -> Objective:
    settings = lessons.cache.settings
    return make_tvkd(
        model,
        beta=config.beta,
        **dataclasses.asdict(config.tvkd),
        reference_free=not settings.reference,
        temperature=settings.temperature,
    )


def _drdo(model: CausalLM, config: FromCacheConfig, lessons: Lessons) -> Objective:
    chosen, rejected = lessons.rewards().T
    return make_drdo(
        model,
        _REWARD_HEAD,
        **dataclasses.asdict(config.drdo),
        oracle_scale=float(reward_scale(Pair(chosen, rejected))),
        temperature=lessons.cache.settings.temperature,
    )


def _rewarded(cache: TeacherCache, batch: Batch) -> tuple[Batch, Any]:
    return dataclasses.replace(batch, rewards=cache.rewards(batch)), ()


_REWARD_HEAD = ScalarHead()
_OF_PAIRS = {
    "reads": PreferenceRecord,
    "measure": margins,
    "unit": "margin of the preferred response, nats",
}
METHODS = {
    "kd": Method(
        reads=DemonstrationRecord,
        signal=lambda cache, batch: (batch, cache.topk(batch)),
        objective=_kd,
        metric="student/divergence",
        measure=divergences,
        unit="forward KL to the teacher's list, nats per token",
    ),
    "dpo": Method(
        signal=lambda cache, batch: (batch, cache.reference(batch)),
        objective=_dpo,
        metric="student/preference_loss",
        refers=True,
        **_OF_PAIRS,
    ),
    "tvkd": Method(
        signal=lambda cache, batch: (batch, cache.shaping(batch)),
        objective=_tvkd,
        metric="student/preference_loss",
        refers=True,
        **_OF_PAIRS,
    ),
    "drdo": Method(
        signal=_rewarded,
        objective=_drdo,
        metric="student/distillation",
        head=_REWARD_HEAD,
        **_OF_PAIRS,
    ),
}
