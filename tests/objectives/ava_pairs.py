"""Preference pairs of the bed, and AVA's objectives on tables. Use it with ``x64``."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.objectives.ava import make_ava_d, make_ava_p
from rkd_jax.types import DemonstrationBatch, PreferenceBatch
from tests.tabular.bed import BED_E, CHOSEN, REJECTED, STUDENT, bed_sequences
from tests.tabular.posterior import QuickLM, tabular_posterior

MODEL = QuickLM()
MEAN, LOG_STD, Q_TABLE = 0.4 * np.random.default_rng(5).normal(size=(3, 2, 15, 3))
# Three pairs of ragged responses; the members of the last are of one and four tokens.
NUMBERS = np.array([[0, 0], [1, 1], [0, 0]])
INDICES = np.array([[CHOSEN, REJECTED], [13, 7], [30, 20]])
LENGTHS = BED_E.mask.sum(-1)[INDICES]
LABELS = np.array([1.0, 0.3, 0.8])

make_d = functools.partial(make_ava_d, MODEL, tabular_posterior)
make_p = functools.partial(make_ava_p, MODEL, tabular_posterior)


def params(**changes):
    head = {"mean": jnp.asarray(MEAN), "log_std": jnp.asarray(LOG_STD)}
    return {"policy": {"logits": jnp.asarray(STUDENT)}, "reward_head": head, **changes}


def demonstrations(numbers=NUMBERS, indices=INDICES):
    """Six responses in the shape of the pairs, whose operations are then compiled."""
    sequences = bed_sequences(numbers, indices)
    return DemonstrationBatch(sequences, sequences, jnp.arange(6).reshape(3, 2))


def preferences(labels=LABELS):
    sequences = bed_sequences(NUMBERS, INDICES)
    rewards = jnp.full(NUMBERS.shape, jnp.nan)
    labels = jnp.asarray(labels)
    return PreferenceBatch(sequences, sequences, labels, rewards, jnp.arange(3))


def evaluate(objective, batch, at=None):
    """LossOutput, and the gradient of its total in all parameters."""

    def total(p):
        out = objective.student_loss(p, None, None, batch, None, None)
        return out.total, out

    gradient, out = jax.grad(total, has_aux=True)(params() if at is None else at)
    return out, gradient
