"""Records of adversarial lengths, packed and one by one, and models that read them.

Prompts and responses of one token, a row that is exactly full, a row that holds one
record, an empty row, teachers with longer and shorter prompts. All in float64: for
tests with the fixture `x64`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.data.packing import collate_packed, pack
from rkd_jax.data.tokenize import Tokenized
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.heads import RewardModel, ScalarHead
from rkd_jax.types import Sequences
from tests.models.reference import GEMMA, QWEN, random_params

ROW = 16
STUDENT = dataclasses.replace(QWEN, dtype="float64")  # its window is 4 columns
TEACHER = dataclasses.replace(GEMMA, dtype="float64")
GENERATOR = np.random.default_rng(5)
PAIR_LABELS = [1.0, 0.0, 0.25, 0.75]


def ids(length):
    return GENERATOR.integers(0, STUDENT.vocab_size, length).tolist()


# (prompt, teacher prompt, responses): the lengths.
SINGLES = [
    Tokenized(i, ids(p), ids(q), (ids(r),))
    for i, (p, q, r) in enumerate([(1, 1, 1), (9, 4, 7), (2, 5, 3)])
]
COUPLES = [
    Tokenized(i, ids(p), ids(p), (ids(a), ids(b)), label=PAIR_LABELS[i])
    for i, (p, a, b) in enumerate([(1, 1, 1), (5, 2, 4), (1, 3, 1), (5, 4, 2)])
]


def packed(rows=None, spare=1):
    """All records, and ``spare`` empty rows."""
    rows = SINGLES if rows is None else rows
    bins = pack(rows, ROW) + [[]] * spare
    return collate_packed(bins, ROW)


def wide(pairs):
    """Labels and rewards in float64, like all else in these tests."""
    label, rewards = (x.astype(np.float64) for x in (pairs.label, pairs.rewards))
    return dataclasses.replace(pairs, label=label, rewards=rewards)


def order(batch):
    """Places ``(row, m)`` of records 0, 1, ..."""
    numbers = range(batch.index.max() + 1)
    return [tuple(np.argwhere(batch.index == i)[0]) for i in numbers]


def alone(prompt, response):
    """One record in a row of its own, no padding anywhere."""
    columns = len(prompt) + len(response)
    return Sequences(
        jnp.asarray([[*prompt, *response]], jnp.int32),
        jnp.ones((1, columns), bool),
        jnp.ones((1, len(response)), bool),
    )


def params(config=STUDENT, seed=0):
    return jax.tree.map(lambda x: x.astype(np.float64), random_params(config, seed))


MODEL, EXPERT = Decoder(STUDENT), Decoder(TEACHER)


def value_and_gradient(objective, weights, batch, signal, frozen=None):
    """Jitted once: ``(LossOutput, gradient)``."""

    def total(weights):
        out = objective.student_loss(weights, None, frozen, batch, signal, None)
        return out.total, out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(weights)
    return out, gradient


def assert_equal(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
        found,
        expected,
    )


def members_alone():
    return [[alone(row.prompt, r) for r in row.responses] for row in COUPLES]


def by_record(batch, values):
    """``[B, M, ...]`` -> the entries of records 0, 1, ..."""
    return np.stack([np.asarray(values)[place] for place in order(batch)])


def bradley_terry(value, weights, scale=1.0, offset=0.0):
    """Bradley-Terry with soft labels on the difference of a value of each response.

    Args:
        value: ``(weights, sequences of one response) -> scalar``.
        weights: what it is differentiated in.
        scale: of the difference.
        offset: float[4, 2], taken from the values.

    Returns:
        Summed loss and its gradient, by the chain rule: one small program per shape.
    """
    run = jax.jit(jax.value_and_grad(value))
    parts = [[run(weights, s) for s in pair] for pair in members_alone()]
    values = np.array([[float(v) for v, _ in pair] for pair in parts]) - offset
    margin = scale * (values[:, 0] - values[:, 1])
    label = np.array(PAIR_LABELS)
    total = label * np.logaddexp(0, -margin) + (1 - label) * np.logaddexp(0, margin)
    slope = scale * (1 / (1 + np.exp(-margin)) - label)
    gradient = jax.tree.map(np.zeros_like, weights)
    for k, ((_, chosen), (_, rejected)) in zip(slope, parts, strict=True):
        gradient = jax.tree.map(
            lambda g, a, b, k=k: g + k * (np.asarray(a) - np.asarray(b)),
            *(gradient, chosen, rejected),
        )
    return total.sum(), gradient


REWARD = RewardModel(MODEL, ScalarHead(bound=2.0))


def reward_params(seed=0):
    kernel = np.random.default_rng(seed).normal(size=(STUDENT.hidden_size, 1))
    head = {"output": {"kernel": kernel, "bias": np.full(1, 0.1)}}
    return {"trunk": params(seed=seed), "head": head}
