"""Bradley-Terry and the confidence set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    bradley_terry,
    check_epsilon,
    confidence_slack,
    triviality_threshold,
)
from rkd_jax.types import Pair

pytestmark = pytest.mark.usefixtures("x64")

REWARDS = Pair(np.array([1.0, -2.0, 0.5]), np.array([0.2, 1.0, 0.5]))
GAP = REWARDS.chosen - REWARDS.rejected


def sigmoid(u):
    return 1.0 / (1.0 + np.exp(-u))


@pytest.mark.parametrize("label", [1.0, 0.3, np.array([1.0, 0.0, 0.6])])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_value_and_gradient(label, margin):
    def total(rewards):
        values = bradley_terry(rewards, margin=margin, label=label)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(REWARDS)
    wins, loses = sigmoid(GAP - margin), sigmoid(-GAP - margin)
    expected = -label * np.log(wins) - (1 - label) * np.log(loses)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    slope = -label * (1 - wins) + (1 - label) * (1 - loses)
    np.testing.assert_allclose(gradient.chosen, slope, rtol=1e-12)
    np.testing.assert_allclose(gradient.rejected, -slope, rtol=1e-12)


def test_relabelling_a_swapped_pair_changes_nothing():
    label = np.array([0.9, 0.2, 0.5])
    swapped = Pair(REWARDS.rejected, REWARDS.chosen)
    np.testing.assert_allclose(
        bradley_terry(swapped, margin=0.4, label=1 - label),
        bradley_terry(REWARDS, margin=0.4, label=label),
        rtol=1e-12,
    )


def test_common_shift_and_tie():
    shifted = Pair(REWARDS.chosen + 1e3, REWARDS.rejected + 1e3)
    np.testing.assert_allclose(
        bradley_terry(shifted), bradley_terry(REWARDS), rtol=1e-9
    )
    np.testing.assert_allclose(bradley_terry(REWARDS)[2], np.log(2.0))


def test_margin_and_label_are_data():
    gradient = jax.grad(
        lambda m, y: bradley_terry(REWARDS, margin=m, label=y).sum(), argnums=(0, 1)
    )(jnp.full(3, 0.3), jnp.full(3, 0.8))
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_confidence_slack():
    nll, anchor = np.array([0.9, 0.5]), np.array([0.6, 0.7])
    value = confidence_slack(jnp.asarray(nll), jnp.asarray(anchor), epsilon=0.1)
    np.testing.assert_allclose(value, [0.2, -0.3], atol=1e-12)


def test_threshold_is_the_excess_loss_of_the_zero_reward():
    """P3: the zero reward is inside the set exactly from the threshold on."""
    zero = Pair(np.zeros(3), np.zeros(3))
    label = np.array([0.8, 0.6, 0.9])
    entropy = -label * np.log(label) - (1 - label) * np.log(1 - label)
    threshold = triviality_threshold(entropy.mean())
    slack = confidence_slack(
        bradley_terry(zero, label=label), jnp.asarray(entropy), epsilon=threshold
    )
    np.testing.assert_allclose(slack.mean(), 0.0, atol=1e-12)


def test_check_epsilon_names_both_numbers_and_the_remedy():
    anchor = np.array([0.5, 0.7])  # mean 0.6, threshold 0.093147
    check_epsilon(0.0931, anchor)
    check_epsilon(0.0931, 0.6)
    for epsilon in (0.0932, np.log(2.0) - 0.6, 0.5):
        with pytest.raises(ValueError, match=r"choose epsilon below 0\.0931472") as e:
            check_epsilon(epsilon, anchor)
        assert f"epsilon = {epsilon:.6g}" in str(e.value)
        assert "0.6 (anchor NLL) = 0.0931472" in str(e.value)


def test_check_epsilon_with_an_anchor_that_learned_nothing():
    with pytest.raises(ValueError, match="train the anchor further"):
        check_epsilon(0.01, jnp.array([0.8]))


def test_domains_and_shapes():
    with pytest.raises(ValueError, match=r"label must lie in \[0, 1\], got 1.2"):
        bradley_terry(REWARDS, label=1.2)
    with pytest.raises(ValueError, match="epsilon must lie in"):
        confidence_slack(jnp.zeros(2), jnp.zeros(2), epsilon=0.0)
    with pytest.raises(ValueError, match="epsilon must lie in"):
        check_epsilon(-0.1, 0.5)
    with pytest.raises(AssertionError):
        confidence_slack(jnp.zeros(2), jnp.zeros(3), epsilon=0.1)
    with pytest.raises(AssertionError):
        bradley_terry(Pair(jnp.zeros(2), jnp.zeros(3)))
