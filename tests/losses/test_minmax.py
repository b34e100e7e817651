"""The gap, the reward player's Lagrangian and the multiplier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    dual_update,
    reward_gap,
    reward_player_loss,
)

pytestmark = pytest.mark.usefixtures("x64")


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
