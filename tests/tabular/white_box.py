"""The white-box game on bed E: a table of action values as critic, exact formulas.

Tables are float64 numpy; nothing here uses the library but its records.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from rkd_jax.types import Sequences
from tests.tabular.bed import BED_E, STUDENT, TEACHER, log_softmax

_X, _K, _V = np.meshgrid(*(np.arange(n) for n in BED_E.table_shape), indexing="ij")
Q = np.cos(0.6 * _K + 1.4 * _V + 0.2 * _X)
RANDOM_Q = np.random.default_rng(11).normal(size=BED_E.table_shape)
# Prefix reached by an action, -1 where the episode ends.
CHILDREN = np.full((BED_E.prefixes, 3), -1)
CHILDREN[:7, :2] = 2 * np.arange(7)[:, None] + np.array([1, 2])


def tabular_q(params, sequences: Sequences, features=None):
    """A table as critic: ``[*batch, T, 3]``; parameters ``{"q": float[2, 15, 3]}``."""
    del features
    x = sequences.tokens[..., sequences.prompt_width - 1]
    prefix, columns = jnp.zeros_like(x), []
    for t in range(sequences.targets.shape[-1]):
        columns.append(params["q"][x, prefix])
        action = sequences.targets[..., t]
        prefix = jnp.minimum(2 * prefix + 1 + action, BED_E.prefixes - 1)
    return jnp.stack(columns, axis=-2)


def log_prob_rows(logits, numbers, indices):
    """[*batch, T, 3]: log-probs along enumerated responses, garbage in padding."""
    numbers, indices = np.asarray(numbers), np.asarray(indices)
    rows = log_softmax(logits)[numbers[..., None], BED_E.states[indices]]
    return jnp.asarray(np.where(BED_E.mask[indices][..., None], rows, np.nan))


def probs(logits):
    return np.exp(log_softmax(logits))


def state_values(q, policy):
    """[X, K]: mean of Q under a policy's table."""
    return (probs(policy) * q).sum(-1)


def implied_rewards(q, anchor, gamma):
    """r(s, a) = Q(s, a) - gamma V(s'), V(terminal) = 0."""
    following = state_values(q, anchor)[:, CHILDREN]
    return q - gamma * np.where(CHILDREN >= 0, following, 0.0)


def action_values(rewards, policy, gamma):
    """Q of a policy for given rewards, by backward induction."""
    q = rewards.copy()
    for k in reversed(range(7)):
        for a in (0, 1):
            q[:, k, a] += gamma * state_values(q, policy)[:, CHILDREN[k, a]]
    return q


def moment_gap(q, states_of, gamma, student=STUDENT):
    """E over the states of a policy of sum_a (teacher - student)(a) Q(s, a)."""
    visits = BED_E.occupancy(states_of, gamma).sum(-1)
    return float((visits * ((probs(TEACHER) - probs(student)) * q).sum(-1)).sum())


def advantages(q, anchor):
    return q - state_values(q, anchor)[..., None]
