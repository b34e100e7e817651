"""Discounts and returns, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import discount_weights, reward_to_go, trajectory_return

pytestmark = pytest.mark.usefixtures("x64")

REWARDS = np.array([[1.0, -2.0, 0.5, 3.0, 7.0], [4.0, 1.0, 9.0, 2.0, -1.0]])
MASK = np.array([[1, 1, 1, 1, 0], [0, 1, 0, 1, 1]], bool)  # the second has holes


def to_go_by_loop(rewards, mask, gamma):
    result = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        following = 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[row, t]:
                following = rewards[row, t] + gamma * following
                result[row, t] = following
    return result


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0, 1])
def test_returns_by_hand(gamma):
    mask = jnp.asarray(MASK)
    to_go = to_go_by_loop(REWARDS, MASK, gamma)
    np.testing.assert_allclose(
        reward_to_go(jnp.asarray(REWARDS), mask, gamma=gamma), to_go, rtol=1e-12
    )
    total = trajectory_return(jnp.asarray(REWARDS), mask, gamma=gamma)
    np.testing.assert_allclose(total, [to_go[0, 0], to_go[1, 1]], rtol=1e-12)
    steps = np.array([[0, 1, 2, 3, 0], [0, 0, 0, 1, 2]])
    np.testing.assert_allclose(
        discount_weights(mask, gamma=gamma),
        np.where(MASK, float(gamma) ** steps, 0.0),
        rtol=1e-12,
    )


def test_a_traced_discount_is_as_good():
    jitted = jax.jit(lambda g: reward_to_go(jnp.asarray(REWARDS), MASK, gamma=g))
    np.testing.assert_allclose(
        jitted(0.9), to_go_by_loop(REWARDS, MASK, 0.9), rtol=1e-12
    )


def test_domains_and_shapes():
    ones = jnp.ones(2, bool)
    for call in (
        lambda: discount_weights(ones, gamma=2.0),
        lambda: reward_to_go(jnp.zeros(2), ones, gamma=1.1),
        lambda: trajectory_return(jnp.zeros(2), ones, gamma=-0.1),
    ):
        with pytest.raises(ValueError, match="gamma must lie in"):
            call()
    with pytest.raises(AssertionError):
        reward_to_go(jnp.zeros((2, 3)), jnp.ones((2, 4), bool))
    with pytest.raises(AssertionError):
        trajectory_return(jnp.zeros((2, 3)), jnp.ones((2, 4), bool))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_the_discount_of_a_packed_row_starts_anew_in_every_segment(gamma):
    mask = np.array([[0, 1, 1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 0, 1, 0, 0]], bool)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 2, 3, 3, 0, 0]], np.int32)
    steps = np.array([[0, 0, 1, 0, 0, 1, 2, 0], [0] * 8])
    expected = np.where(mask, gamma**steps, 0.0)
    for padding in (0, 9):
        ids = np.where(segments == 0, padding, segments).astype(np.int32)
        got = discount_weights(mask, gamma=gamma, segment_ids=ids)
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    with pytest.raises(AssertionError):
        discount_weights(mask, gamma=gamma, segment_ids=segments[:1])
