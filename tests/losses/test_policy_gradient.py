"""Surrogates by hand; that their gradients are the right ones is shown on the bed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    leave_one_out,
    leave_one_out_per_step,
    on_policy_distillation,
    reinforce,
)

pytestmark = pytest.mark.usefixtures("x64")

MASK = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], bool)
LOG_PROBS = np.array([[-1.0, -2.0, -0.5], [-3.0, 0, 0], [-0.2, -1.5, 0]])
ADVANTAGES = np.array([[2.0, -1.0, 0.5], [4.0, 0, 0], [-3.0, 1.0, 0]])


def test_leave_one_out_is_the_distance_to_the_others():
    returns = np.array([[1.0, 2.0, 6.0, -1.0], [0.5, 0.5, 0.5, 0.5]])
    value = leave_one_out(jnp.asarray(returns))
    others = [[np.mean(np.delete(row, i)) for i in range(4)] for row in returns]
    np.testing.assert_allclose(value, returns - np.array(others), atol=1e-12)
    centred = 4 / 3 * (returns - returns.mean(-1, keepdims=True))
    np.testing.assert_allclose(value, centred, atol=1e-12)


def test_leave_one_out_per_step_counts_ended_samples_as_zero():
    to_go = np.array([[5.0, 3.0, 1.0], [2.0, np.nan, np.inf], [7.0, 4.0, np.nan]])
    value = leave_one_out_per_step(jnp.asarray(to_go), jnp.asarray(MASK))
    expected = [
        [5.0 - (2 + 7) / 2, 3.0 - (0 + 4) / 2, 1.0 - 0.0],
        [2.0 - (5 + 7) / 2, 0.0, 0.0],
        [7.0 - (5 + 2) / 2, 4.0 - (3 + 0) / 2, 0.0],
    ]
    np.testing.assert_allclose(value, expected, atol=1e-12)


def test_one_sample_has_no_others():
    with pytest.raises(ValueError, match=r"got 1: raise\s+samples_per_prompt"):
        leave_one_out(jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match="two samples per prompt or more, got 1"):
        leave_one_out_per_step(jnp.zeros((3, 1, 5)), jnp.ones((3, 1, 5), bool))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_reinforce(gamma):
    poisoned = [np.where(MASK, x, np.nan) for x in (LOG_PROBS, ADVANTAGES)]

    def total(log_probs, advantages):
        values = reinforce(log_probs, advantages, jnp.asarray(MASK), gamma=gamma)
        return values.sum(), values

    (in_log_probs, in_advantages), values = jax.grad(
        total, argnums=(0, 1), has_aux=True
    )(*map(jnp.asarray, poisoned))
    weights = np.where(MASK, gamma ** np.arange(3), 0.0)
    np.testing.assert_allclose(values, -weights * ADVANTAGES * LOG_PROBS, atol=1e-12)
    np.testing.assert_allclose(in_log_probs, -weights * ADVANTAGES, atol=1e-12)
    np.testing.assert_array_equal(in_advantages, np.zeros((3, 3)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_on_policy_distillation_credits_log_ratios_from_each_step_on(gamma):
    teacher = np.array([[-2.0, -1.0, -0.5], [-1.0, 0, 0], [-4.0, -0.5, 0]])
    ratio = np.where(MASK, teacher - LOG_PROBS, 0.0)
    credit = ratio.copy()
    for t in (1, 0):
        credit[:, t] += gamma * credit[:, t + 1]
    credit = np.where(MASK, credit, 0.0)

    def total(student, teacher):
        values = on_policy_distillation(
            student, teacher, jnp.asarray(MASK), gamma=gamma
        )
        return values.sum(), values

    (in_student, in_teacher), values = jax.grad(total, argnums=(0, 1), has_aux=True)(
        jnp.asarray(LOG_PROBS), jnp.asarray(np.where(MASK, teacher, -np.inf))
    )
    np.testing.assert_allclose(values, -credit * LOG_PROBS, atol=1e-12)
    np.testing.assert_allclose(in_student, -credit, atol=1e-12)
    np.testing.assert_array_equal(in_teacher, np.zeros((3, 3)))


def test_clip_bounds_what_a_ruled_out_token_costs():
    student, teacher = jnp.array([-1.0, -1.0]), jnp.array([-jnp.inf, -1.5])
    mask = jnp.ones(2, bool)
    gradient = jax.grad(
        lambda s: on_policy_distillation(s, teacher, mask, clip=3.0).sum()
    )(student)
    np.testing.assert_allclose(gradient, [3.0, 0.5], atol=1e-12)
    unbounded = jax.grad(lambda s: on_policy_distillation(s, teacher, mask).sum())
    np.testing.assert_array_equal(unbounded(student), [np.inf, 0.5])


def test_domains_and_shapes():
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    for call, name in [
        (lambda: reinforce(x, x, mask, gamma=1.5), "gamma"),
        (lambda: on_policy_distillation(x, x, mask, gamma=-0.5), "gamma"),
        (lambda: on_policy_distillation(x, x, mask, clip=0.0), "clip"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            call()
    with pytest.raises(AssertionError):
        reinforce(x, x[:, :1], mask)
    with pytest.raises(AssertionError):
        leave_one_out_per_step(x, mask[:1])
