"""Truncation supports and the distribution of drawn tokens, against definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rkd_jax.models.categorical import (
    _first_beyond,
    draw_tokens,
    largest,
    truncate,
)

draw = jax.jit(draw_tokens)
cut = jax.jit(truncate, static_argnames=("top_k", "top_p"))


def _kept(weights, top_k, top_p):
    """The documented rule, token by token, in float64."""
    weights = np.asarray(weights, np.float64)
    if top_k:
        above = [np.sum(weights > w) for w in weights]
        weights = np.where(np.array(above) < top_k, weights, 0.0)
    mass = [np.sum(weights[weights > w]) for w in weights]
    inside = np.array(mass) < top_p * np.sum(weights)
    return (weights > 0) & (inside if top_p < 1 else True)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (0, 0.5), (0, 0.05), (4, 0.7)]
)
def test_truncate_keeps_exactly_the_defined_support(top_k, top_p):
    weights = np.random.default_rng(0).dirichlet(np.full(37, 0.3), size=6)
    weights = (weights / weights.max(-1, keepdims=True)).astype(np.float32)
    weights[0, 5:9] = weights[0, 4]  # ties, wherever they fall
    weights[1] = 1.0  # all tied: everything stays
    weights[2, 2:], weights[2, 0] = 0.0, 1.0  # fewer that are possible than top_k
    kept = np.asarray(cut(jnp.asarray(weights), top_k=top_k, top_p=top_p))
    expected = np.stack([_kept(row, top_k, top_p) for row in weights])
    np.testing.assert_array_equal(kept > 0, expected)
    np.testing.assert_array_equal(kept[expected], weights[expected])


@pytest.mark.parametrize(
    ("top_k", "top_p", "support"),
    [
        (1, 1.0, [1]),
        (2, 1.0, [0, 1, 3]),  # 0 and 3 tie for the second place
        (4, 1.0, [0, 1, 2, 3]),
        (9, 1.0, [0, 1, 2, 3]),
        (0, 0.4, [1]),  # 0.4 is reached by token 1 alone
        (0, 0.41, [0, 1, 3]),
        (0, 0.95, [0, 1, 2, 3]),
        (3, 0.85, [0, 1, 3]),  # 0.9 of the mass is left, renormalised
        (1, 0.01, [1]),
    ],
)
def test_truncate_by_hand(top_k, top_p, support):
    weights = jnp.array([[0.25, 0.4, 0.1, 0.25]]) / 0.4
    kept = cut(weights, top_k=top_k, top_p=top_p)
    assert np.flatnonzero(np.asarray(kept)[0]).tolist() == support


def test_tokens_follow_their_probabilities():
    probabilities = np.random.default_rng(1).dirichlet(np.full(23, 0.5))
    count = 20_000
    weights = jnp.broadcast_to(jnp.asarray(probabilities, jnp.float32), (count, 23))
    tokens = draw(weights, jax.random.split(jax.random.key(2), count))
    observed = np.bincount(np.asarray(tokens), minlength=23)
    common = probabilities * count > 5  # where the chi-square approximation holds
    expected = np.append(probabilities[common], probabilities[~common].sum()) * count
    observed = np.append(observed[common], observed[~common].sum())
    statistic = np.sum((observed - expected) ** 2 / expected)
    assert statistic < stats.chi2.ppf(0.999, len(expected) - 1)


def test_only_possible_tokens_of_a_large_vocabulary_are_drawn():
    # 1009 is prime: the last block is ragged. First, last and middle of blocks.
    possible, count = np.array([0, 31, 32, 500, 1008]), 10_000
    weights = np.zeros(1009, np.float32)
    weights[possible] = [0.1, 0.2, 0.3, 1e-9, 0.4]
    rows = jnp.broadcast_to(jnp.asarray(weights), (count, 1009))
    tokens = draw(rows, jax.random.split(jax.random.key(3), count))
    shares = [np.mean(np.asarray(tokens) == token) for token in possible]
    assert np.isin(np.asarray(tokens), possible).all()
    np.testing.assert_allclose(shares, weights[possible], atol=0.02)


def test_rounding_of_the_cumulative_sum_never_selects_an_impossible_token():
    random = np.random.default_rng(0)
    weights = random.dirichlet(np.full(1000, 0.5)).astype(np.float32)
    weights[random.random(1000) < 0.5] = 0.0
    cumulative = np.asarray(jnp.cumsum(jnp.asarray(weights)))
    rises = (np.diff(cumulative) > 0) & (weights[1:] == 0.0)
    if not rises.any():
        pytest.skip("this backend's cumulative sum is exact on zeros")
    at = cumulative / cumulative.max()  # uniform numbers right where it rises
    around = [np.nextafter(at, np.float32(end)) for end in (0, 1)]
    uniform = np.unique(np.concatenate([at, *around]))
    uniform = jnp.asarray(uniform[uniform < 1.0])
    rows = jnp.broadcast_to(jnp.asarray(weights), (len(uniform), 1000))
    assert (weights[np.asarray(jax.jit(_first_beyond)(rows, uniform))] > 0).all()


def test_a_row_depends_on_its_own_key_and_weights_only():
    keys = jax.random.split(jax.random.key(4), 16)
    weights = jax.random.uniform(jax.random.key(5), (16, 50))
    together = draw(weights, keys)
    alone = [draw(weights[i : i + 1], keys[i : i + 1])[0] for i in (0, 7, 15)]
    assert [int(t) for t in alone] == [int(together[i]) for i in (0, 7, 15)]


@pytest.mark.parametrize("size", [1, 2, 37, 1009])
def test_the_largest_entries_in_falling_order_and_of_equal_ones_the_first(size):
    random = np.random.default_rng(6)
    values = random.normal(size=(4, size)).astype(np.float32)
    values[1] = np.round(values[1]) + 0.0  # many ties, and no negative zero
    values[2, random.random(size) < 0.9] = -np.inf
    values[3] = 0.0
    order = np.argsort(-values, axis=1, kind="stable")
    for count in {1, min(3, size), min(31, size), size}:
        best, places = jax.jit(largest, static_argnums=1)(jnp.asarray(values), count)
        np.testing.assert_array_equal(places, order[:, :count])
        np.testing.assert_array_equal(
            best, np.take_along_axis(values, order[:, :count], axis=1)
        )
