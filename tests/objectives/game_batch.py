"""One small batch of the game on the enumerable bed, for the objectives' tests.

Meant for float64: call the builders inside a test with the fixture `x64`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.types import DemonstrationBatch, GameBatch, GameSignal, PreferenceBatch
from tests.tabular.bed import REWARD, STUDENT, TabularLM, bed_sequences

MODEL = TabularLM()
DEMONSTRATIONS = (np.array([0, 1]), np.array([3, 11]))
ROLLOUTS = (np.array([[0] * 3, [1] * 3]), np.array([[0, 5, 30], [2, 2, 17]]))
PAIRS = (np.zeros((4, 2), int), np.array([[1, 9], [4, 20], [30, 0], [8, 13]]))
LABELS, ANCHOR = np.array([1.0, 0.8, 0.0, 0.5]), np.array([0.4, 0.5, 0.6, 0.2])


def preference_batch():
    sequences = bed_sequences(*PAIRS)
    return PreferenceBatch(
        sequences,
        sequences,
        jnp.asarray(LABELS),
        jnp.full(PAIRS[0].shape, jnp.nan),
        jnp.arange(len(LABELS)),
    )


def game_batch(rollouts=ROLLOUTS):
    demonstrations = bed_sequences(*DEMONSTRATIONS)
    return GameBatch(
        DemonstrationBatch(demonstrations, demonstrations, jnp.arange(2)),
        bed_sequences(*rollouts),
        preference_batch(),
    )


def signal():
    return GameSignal(anchor_nll=jnp.asarray(ANCHOR))


def student():
    return {"logits": jnp.asarray(STUDENT)}


def critic():
    return {"rewards": jnp.asarray(REWARD)}


def extended(tree):
    """One more row everywhere: no token in it, and NaN for every number."""

    def extend(leaf):
        leaf = np.asarray(leaf)
        row = leaf[:1]
        if leaf.dtype == bool:
            row = np.zeros_like(row)
        elif np.issubdtype(leaf.dtype, np.floating):
            row = np.full_like(row, np.nan)
        return np.concatenate([leaf, row])

    return jax.tree.map(extend, tree)


def means(out):
    """What a `LossOutput` reports, by name."""
    return {name: float(m.total / m.weight) for name, m in out.metrics.items()}


def pair_margin(returns):
    """[pairs]: difference of the returns [X, N] of each pair."""
    chosen, rejected = (returns[PAIRS[0][:, i], PAIRS[1][:, i]] for i in range(2))
    return chosen - rejected


def pair_nll(returns):
    margin = pair_margin(returns)
    wins, losses = np.logaddexp(0, -margin), np.logaddexp(0, margin)
    return LABELS * wins + (1 - LABELS) * losses
