"""Returns, the reward player's Lagrangian and the multiplier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    discount_weights,
    dual_update,
    reward_gap,
    reward_player_loss,
    reward_to_go,
    trajectory_return,
)

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


def test_gap():
    gap = reward_gap(jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0]))
    np.testing.assert_allclose(gap, [-2.0, 3.0])
    with pytest.raises(AssertionError):
        reward_gap(jnp.zeros(2), jnp.zeros((2, 4)))


def test_reward_player_minimises_minus_gap_plus_weighted_slack():
    gap, slack = jnp.array([1.0, -2.0]), jnp.array([0.3, -0.1])

    def total(gap, slack, dual):
        values = reward_player_loss(gap, slack, dual)
        return values.sum(), values

    (in_gap, in_slack, in_dual), values = jax.grad(
        total, argnums=(0, 1, 2), has_aux=True
    )(gap, slack, jnp.array(5.0))
    np.testing.assert_allclose(values, [-1.0 + 1.5, 2.0 - 0.5], rtol=1e-12)
    np.testing.assert_array_equal(in_gap, [-1.0, -1.0])
    np.testing.assert_array_equal(in_slack, [5.0, 5.0])
    assert in_dual == 0.0


@pytest.mark.parametrize(("slack", "expected"), [(0.3, 0.5), (-0.3, -1.0)])
def test_hinge_pays_outside_the_set_only(slack, expected):
    def loss(slack):
        return reward_player_loss(jnp.array(1.0), slack, jnp.array(5.0), hinge=True)

    value, gradient = jax.value_and_grad(loss)(jnp.array(slack))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert gradient == (5.0 if slack > 0 else 0.0)


@pytest.mark.parametrize(
    ("slack", "expected"),
    [
        (0.0, 3.0),
        (0.01, 3.0 + 0.5 * 0.5),
        (-0.01, 3.0 - 0.5 * 0.5),
        (1.0, 3.0 + 0.5 * 10.0),
        (-1.0, 0.0),
    ],
)
def test_dual_update(slack, expected):
    for dtype in (jnp.float32, jnp.float64):
        new = dual_update(jnp.array(3.0, dtype), jnp.array(slack), epsilon=0.02)
        assert new.dtype == dtype
        np.testing.assert_allclose(new, expected, rtol=1e-6)


def test_dual_update_options_and_no_gradient():
    new = dual_update(1.0, 0.3, epsilon=1.0, step_size=0.1, clip=np.inf)
    np.testing.assert_allclose(new, 1.03, rtol=1e-6)
    gradients = jax.grad(lambda d, s: dual_update(d, s, epsilon=0.02), argnums=(0, 1))(
        jnp.array(3.0), jnp.array(0.01)
    )
    np.testing.assert_array_equal(gradients, [0.0, 0.0])


def test_domains_and_shapes():
    for call, name in [
        (lambda: reward_to_go(jnp.zeros(2), jnp.ones(2, bool), gamma=1.1), "gamma"),
        (lambda: trajectory_return(jnp.zeros(2), jnp.ones(2), gamma=-0.1), "gamma"),
        (lambda: dual_update(1.0, 0.0, epsilon=0), "epsilon"),
        (lambda: dual_update(1.0, 0.0, epsilon=0.1, step_size=0.0), "step_size"),
        (lambda: dual_update(1.0, 0.0, epsilon=0.1, clip=-1.0), "clip"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            call()
    with pytest.raises(AssertionError):
        reward_player_loss(jnp.zeros(2), jnp.zeros(3), jnp.array(1.0))
    with pytest.raises(AssertionError):
        reward_player_loss(jnp.zeros(2), jnp.zeros(2), jnp.ones(2))
    with pytest.raises(AssertionError):
        dual_update(jnp.array(1.0), jnp.zeros(3), epsilon=0.1)
    with pytest.raises(AssertionError):
        reward_to_go(jnp.zeros((2, 3)), jnp.ones((2, 4), bool))
