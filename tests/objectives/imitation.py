"""A small imitation batch on the bed, and a student with tabular heads to drive on it.

Use it with the ``x64`` fixture.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.objectives.reward_inference import RewardInference
from rkd_jax.types import DemonstrationBatch, ImitationBatch, ImitationSignal
from tests.tabular.bed import (
    BED_E,
    CHOSEN,
    STUDENT,
    TEACHER,
    bed_sequences,
    log_softmax,
)
from tests.tabular.posterior import QuickLM, tabular_posterior

MODEL = QuickLM()
NUMBERS = np.array([0, 1, 0, 1])
FIXED = np.array([CHOSEN, 7, 30, 12])  # of 3, 4, 1 and 4 tokens
SAMPLED = np.array([9, 30, 4, 0])
LENGTHS = BED_E.mask.sum(-1)
MEAN, LOG_STD, Q_TABLE = 0.4 * np.random.default_rng(5).normal(size=(3, 2, 15, 3))
PARTS = functools.partial(RewardInference, tabular_posterior)


def params(policy=STUDENT):
    head = {"mean": jnp.asarray(MEAN), "log_std": jnp.asarray(LOG_STD)}
    return {
        "policy": {"logits": jnp.asarray(policy)},
        "reward_head": head,
        "q_head": {"logits": jnp.asarray(Q_TABLE)},
    }


def responses(indices):
    sequences = bed_sequences(NUMBERS, indices)
    return DemonstrationBatch(sequences, sequences, jnp.arange(len(NUMBERS)))


def rows_of(table, indices):
    return table[NUMBERS[:, None], BED_E.states[indices]]


def imitation(sampled=SAMPLED):
    return ImitationBatch(responses(FIXED), responses(sampled))


def signal(sampled=SAMPLED, fixed=FIXED, table=TEACHER):
    log_p = log_softmax(table)
    return ImitationSignal(*(jnp.asarray(rows_of(log_p, i)) for i in (sampled, fixed)))


def evaluate(objective, batch, signal, at=None):
    """LossOutput, and the gradient of its total in all parameters."""

    def total(p):
        out = objective.student_loss(p, None, None, batch, signal, None)
        return out.total, out

    gradient, out = jax.grad(total, has_aux=True)(params() if at is None else at)
    return out, gradient
