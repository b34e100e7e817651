"""Resampling weights: their distribution, what they depend on, and by hand."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.signals.resampling import bootstrap_weights, length_bias_weights

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def resample(seed):
    index = jnp.arange(2000, dtype=jnp.int32)
    return np.asarray(bootstrap_weights(index, members=2, seed=seed))


def test_bootstrap_counts_are_independent_and_poisson():
    counts, other = resample(0), resample(1)
    assert counts.dtype == np.float32
    assert (counts == counts.round()).all()
    # Mean 1, variance 1, uncorrelated over members, records and seeds: within four
    # standard errors. So are the shares of 0, 1, 2 and 3 or more.
    error = 4 / np.sqrt(2000)
    np.testing.assert_allclose(counts.mean(0), 1.0, atol=error)
    np.testing.assert_allclose(counts.var(0), 1.0, atol=error * np.sqrt(3))
    expected = np.exp(-1.0) * np.array([1.0, 1.0, 0.5])
    for count, share in zip(range(4), [*expected, 1.0 - expected.sum()], strict=True):
        found = (counts >= 3 if count == 3 else counts == count).mean(0)
        np.testing.assert_allclose(found, share, atol=0.5 * error)
    pairs = (counts.T, (counts[1:, 0], counts[:-1, 0]), (counts[:, 0], other[:, 0]))
    for one, two in pairs:
        assert abs(np.corrcoef(one, two)[0, 1]) < error


def test_bootstrap_counts_belong_to_record_and_member():
    """The same in any batch, and for any number of members."""
    some = np.array([1999, 3, 3, 40], np.int32)
    wider = np.asarray(bootstrap_weights(some, members=3, seed=0))
    np.testing.assert_array_equal(wider[:, :2], resample(0)[some])
    with pytest.raises(AssertionError):
        bootstrap_weights(jnp.zeros((2, 2), jnp.int32), members=2, seed=0)


def test_length_bias_by_hand():
    lengths = np.array([[4, 2], [1, 3], [2, 2], [4, 2], [4, 2]])
    mask = np.arange(4) < lengths[..., None]
    label = np.array([1.0, 0.9, 1.0, 0.2, 0.5])
    found = length_bias_weights(
        jnp.asarray(mask), jnp.asarray(label), jnp.array([0.5, 1.0, 0.8])
    )
    longer, shorter, neither = [1.0, 2.0, 1.6], [1.0, 0.0, 0.4], [1.0, 1.0, 1.0]
    expected = [longer, shorter, neither, shorter, neither]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Over the first and the fourth, one vote each way: the share that says "longer".
    votes = np.asarray(found)[[0, 3]]
    np.testing.assert_allclose(votes.mean(0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(votes[0] / votes.sum(0), [0.5, 1.0, 0.8], rtol=1e-6)
    with pytest.raises(AssertionError):
        length_bias_weights(jnp.asarray(mask[:, 0]), jnp.asarray(label), jnp.ones(3))
