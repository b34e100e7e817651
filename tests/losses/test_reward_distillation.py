"""Rewards distilled into a policy, pessimism and scales, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    check_rewards,
    ipo,
    pessimistic_reduce,
    reward_distillation,
    reward_scale,
    running_mean_loss,
)
from rkd_jax.types import Pair

pytestmark = pytest.mark.usefixtures("x64")

STUDENT = Pair(np.array([-3.3, -1.0]), np.array([-2.0, -4.0]))
REFERENCE = Pair(np.array([-2.9, -1.5]), np.array([-2.3, -3.0]))
ENSEMBLE = Pair(
    np.array([[1.0, 0.3], [0.2, 0.0], [-1.0, 2.0]]),
    np.array([[0.5, 0.9], [0.1, -0.4], [0.3, 1.0]]),
)


def test_reward_distillation_is_its_formula_for_every_model():
    found = reward_distillation(STUDENT, REFERENCE, ENSEMBLE, beta=0.5)
    h = 0.5 * ((STUDENT[0] - REFERENCE[0]) - (STUDENT[1] - REFERENCE[1]))
    error = (ENSEMBLE[0] - ENSEMBLE[1]) - h
    np.testing.assert_allclose(found, error**2, rtol=1e-12)
    one = reward_distillation(
        STUDENT, REFERENCE, Pair(*(r[1] for r in ENSEMBLE)), beta=0.5
    )
    np.testing.assert_array_equal(one, found[1])

    def total(*arguments):
        return jnp.sum(reward_distillation(*arguments, beta=0.5))

    slopes = jax.grad(total, argnums=(0, 1, 2))(STUDENT, REFERENCE, ENSEMBLE)
    student, reference, rewards = slopes
    np.testing.assert_allclose(student.chosen, -2 * 0.5 * error.sum(0), rtol=1e-12)
    np.testing.assert_allclose(student.rejected, 2 * 0.5 * error.sum(0), rtol=1e-12)
    for silent in (*reference, *rewards):
        np.testing.assert_array_equal(silent, np.zeros(silent.shape))


def test_swapping_a_pair_changes_nothing():
    swapped = (Pair(*pair[::-1]) for pair in (STUDENT, REFERENCE, ENSEMBLE))
    np.testing.assert_allclose(
        reward_distillation(*swapped),
        reward_distillation(STUDENT, REFERENCE, ENSEMBLE),
        rtol=1e-12,
    )


def test_scaling_rewards_and_beta_scales_the_loss_by_the_square():
    scaled = Pair(*(3.0 * member for member in ENSEMBLE))
    np.testing.assert_allclose(
        reward_distillation(STUDENT, REFERENCE, scaled, beta=3.0 * 0.2),
        9.0 * reward_distillation(STUDENT, REFERENCE, ENSEMBLE, beta=0.2),
        rtol=1e-12,
    )


def test_e7_a_constant_margin_is_ipo():
    beta, tau = 0.4, 0.3
    constant = Pair(np.full(2, beta / (2 * tau)), np.zeros(2))
    np.testing.assert_allclose(
        reward_distillation(STUDENT, REFERENCE, constant, beta=beta),
        beta**2 * ipo(STUDENT, REFERENCE, tau=tau),
        rtol=1e-12,
    )


def test_reward_distillation_checks_shapes_and_beta():
    with pytest.raises(ValueError, match="beta must lie in"):
        reward_distillation(STUDENT, REFERENCE, ENSEMBLE, beta=0.0)
    wide = Pair(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    with pytest.raises(AssertionError):
        reward_distillation(STUDENT, REFERENCE, wide)


# Pessimism

LOSSES = np.array([[1.0, 3.0, 2.0], [0.5, 0.4, 3.0], [2.0, 2.0, 2.5]])
MEANS = LOSSES.mean(-1)  # 2, 1.3, 2.1667
RUNNING = np.array([0.3, 0.7, 0.2])


@pytest.mark.parametrize(
    ("how", "options", "value", "weights"),
    [
        ("min", {}, MEANS[1], [0, 1, 0]),
        ("mean", {}, MEANS.mean(), [1 / 3] * 3),
        ("ema_min", {"running": RUNNING}, MEANS[2], [0, 0, 1]),
        (
            "softmin",
            {"temperature": 0.5},
            -0.5 * np.log(np.mean(np.exp(-MEANS / 0.5))),
            np.exp(-MEANS / 0.5) / np.exp(-MEANS / 0.5).sum(),
        ),
    ],
)
def test_pessimistic_reduce(how, options, value, weights):
    """Values by hand; the weights are those of the gradient; masked pairs are not."""
    options = {name: jnp.asarray(v) for name, v in options.items()}
    found = pessimistic_reduce(jnp.asarray(LOSSES), how=how, **options)
    np.testing.assert_allclose(found.objective, value, rtol=1e-12)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-12)

    padded = jnp.asarray(np.pad(LOSSES, ((0, 0), (0, 2)), constant_values=np.nan))
    mask = jnp.array([True, True, True, False, False])

    def objective(losses):
        return pessimistic_reduce(losses, how=how, mask=mask, **options).objective

    np.testing.assert_array_equal(objective(padded), found.objective)
    slope = np.pad(np.repeat(np.reshape(weights, (3, 1)) / 3, 3, 1), ((0, 0), (0, 2)))
    np.testing.assert_allclose(jax.grad(objective)(padded), slope, rtol=1e-12)
    nothing = pessimistic_reduce(padded, how=how, mask=jnp.zeros(5, bool), **options)
    assert nothing.objective == 0.0


def test_a_tie_shares_the_gradient_and_a_nan_is_not_hidden():
    tied = jnp.asarray([[1.0, 2.0], [2.0, 1.0], [9.0, 9.0]])
    found = pessimistic_reduce(tied)
    np.testing.assert_array_equal(found.weights, [0.5, 0.5, 0.0])
    assert found.objective == 1.5
    for how in ("min", "softmin", "mean"):
        broken = pessimistic_reduce(tied.at[2, 0].set(jnp.nan), how=how)
        assert np.isnan(broken.objective)


def test_e8_softmin_goes_from_the_minimum_to_the_mean():
    def soft(temperature):
        losses = jnp.asarray(LOSSES)
        return pessimistic_reduce(losses, how="softmin", temperature=temperature)

    values = [float(soft(t).objective) for t in (1e-3, 0.1, 1.0, 10.0, 1e5)]
    assert values == sorted(values)
    # At low temperature the K-th share of the minimum costs tau log K.
    assert values[0] == pytest.approx(MEANS.min() + 1e-3 * np.log(3), abs=1e-12)
    assert values[-1] == pytest.approx(MEANS.mean(), abs=1e-5)
    np.testing.assert_allclose(soft(1e-3).weights, [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(soft(1e5).weights, [1 / 3] * 3, atol=1e-5)


def test_pessimistic_reduce_refuses_what_it_cannot_mean():
    losses = jnp.asarray(LOSSES)
    with pytest.raises(ValueError, match="how must be one of min, softmin"):
        pessimistic_reduce(losses, how="max")
    with pytest.raises(ValueError, match="temperature must lie in"):
        pessimistic_reduce(losses, how="softmin", temperature=0.0)
    for how, running in (("ema_min", None), ("min", jnp.asarray(RUNNING))):
        with pytest.raises(ValueError, match="running goes with"):
            pessimistic_reduce(losses, how=how, running=running)
    with pytest.raises(AssertionError):
        pessimistic_reduce(losses, how="ema_min", running=jnp.zeros(2))
    with pytest.raises(AssertionError):
        pessimistic_reduce(losses, mask=jnp.ones(2, bool))


def test_descent_on_the_running_mean_loss_is_a_running_mean():
    decay = 0.9

    def mean(running, losses):
        return running_mean_loss(running, losses).mean(-1).sum()

    in_running, in_losses = jax.grad(mean, argnums=(0, 1))(
        jnp.asarray(RUNNING), jnp.asarray(LOSSES)
    )
    np.testing.assert_array_equal(in_losses, np.zeros((3, 3)))
    np.testing.assert_allclose(
        RUNNING - (1 - decay) * in_running,
        decay * RUNNING + (1 - decay) * MEANS,
        rtol=1e-12,
    )


# The scale of rewards


def test_rms_of_the_differences_makes_every_model_start_at_one():
    scale = reward_scale(ENSEMBLE)
    np.testing.assert_allclose(scale[0], np.sqrt((0.5**2 + 0.6**2) / 2), rtol=1e-12)
    scaled = Pair(*(member / scale[:, None] for member in ENSEMBLE))
    losses = reward_distillation(REFERENCE, REFERENCE, scaled)
    np.testing.assert_allclose(losses.mean(-1), np.ones(3), rtol=1e-12)
    alone = reward_scale(Pair(*(member[2] for member in ENSEMBLE)))
    assert alone.shape == ()
    assert alone == scale[2]


def test_standard_deviation_is_over_all_responses():
    scale = reward_scale(ENSEMBLE, how="std")
    values = np.array([1.0, 0.3, 0.5, 0.9])
    expected = np.sqrt(((values - values.mean()) ** 2).mean())
    np.testing.assert_allclose(scale[0], expected, rtol=1e-12)


def test_reward_scale_refuses_models_that_say_nothing():
    with pytest.raises(ValueError, match=r"reward models \[1\] give all"):
        reward_scale(Pair(np.array([[1.0], [2.0]]), np.array([[0.0], [2.0]])))
    with pytest.raises(ValueError, match="how must be one of rms_pair, std"):
        reward_scale(ENSEMBLE, how="rms")
    missing = Pair(np.array([[1.0, np.nan]]), np.array([[0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"1 of 2 pairs .* \(pairs 1\)"):
        reward_scale(missing)


def test_check_rewards_counts_and_names_the_pairs():
    check_rewards(np.zeros((3, 2)))
    rewards = np.zeros((9, 2, 4))
    rewards[[1, 4], 0, 2] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"2 of 9 pairs .* \(pairs 1, 4\).*chosen_rew"):
        check_rewards(jnp.asarray(rewards))
    with pytest.raises(
        ValueError, match=r"9 of 9 pairs .* \(pairs 0, 1, 2, 3, 4, \.\.\."
    ):
        check_rewards(np.full((9, 2), np.nan))
