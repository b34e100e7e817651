"""Preference losses against formulas, and the identities between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import dpo, ipo, simpo
from rkd_jax.types import Pair

pytestmark = pytest.mark.usefixtures("x64")

STUDENT = Pair(np.array([-3.0, -1.5, -40.0]), np.array([-2.0, -6.0, -900.0]))
REFERENCE = Pair(np.array([-2.5, -2.0, -41.0]), np.array([-2.25, -5.5, -880.0]))
MARGIN = (STUDENT.chosen - STUDENT.rejected) - (
    REFERENCE.chosen - REFERENCE.rejected
)  # -0.75, 1.0, 21.0


def swap(pair):
    return Pair(pair.rejected, pair.chosen)


def log_sigmoid(u):
    return -np.logaddexp(0.0, -u)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, np.array([0.0, 0.3, 1.0])])
def test_dpo(smoothing):
    value = dpo(STUDENT, REFERENCE, beta=0.5, label_smoothing=smoothing)
    logit = 0.5 * MARGIN
    expected = -(1 - smoothing) * log_sigmoid(logit) - smoothing * log_sigmoid(-logit)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    # L_eps = L_0 + eps * beta * h
    plain = dpo(STUDENT, REFERENCE, beta=0.5)
    np.testing.assert_allclose(value, plain + smoothing * logit, rtol=1e-12)


def test_dpo_gradient():
    gradient = jax.grad(lambda s: dpo(s, REFERENCE, beta=0.5).sum())(STUDENT)
    force = 0.5 / (1.0 + np.exp(0.5 * MARGIN))
    np.testing.assert_allclose(gradient.chosen, -force, rtol=1e-12)
    np.testing.assert_allclose(gradient.rejected, force, rtol=1e-12)


def test_student_equal_to_reference_gives_log_two():
    np.testing.assert_allclose(dpo(STUDENT, STUDENT), np.full(3, np.log(2)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, r: dpo(s, r, beta=0.5),
        lambda s, r: ipo(s, r, tau=0.3),
        lambda s, r: simpo(s, beta=0.5, gamma=0.0),
    ],
    ids=["dpo", "ipo", "simpo"],
)
def test_g5_swapping_the_pair_flips_the_margin(loss):
    """loss(-m) - loss(m) is odd and known: m for logistic losses, 2 m / tau for IPO."""
    reference = Pair(np.zeros(3), np.zeros(3))
    margin = STUDENT.chosen - STUDENT.rejected
    difference = loss(swap(STUDENT), reference) - loss(STUDENT, reference)
    slope = loss(Pair(np.zeros(1), np.ones(1)), Pair(np.zeros(1), np.zeros(1)))
    slope = slope - loss(Pair(np.ones(1), np.zeros(1)), Pair(np.zeros(1), np.zeros(1)))
    np.testing.assert_allclose(difference, slope * margin, rtol=1e-9)


def test_ipo_value_and_sign_change_at_its_target():
    np.testing.assert_allclose(
        ipo(STUDENT, REFERENCE, tau=0.5), (MARGIN - 1.0) ** 2, rtol=1e-12
    )
    gradient = jax.grad(lambda s: ipo(s, REFERENCE, tau=0.5).sum())(STUDENT)
    np.testing.assert_allclose(gradient.chosen, 2 * (MARGIN - 1.0), atol=1e-12)
    np.testing.assert_allclose(gradient.rejected, -2 * (MARGIN - 1.0), atol=1e-12)


def test_simpo_margin_is_absolute():
    value = simpo(STUDENT, beta=2.0, gamma=1.4)
    difference = STUDENT.chosen - STUDENT.rejected
    ratio_form = -log_sigmoid(2.0 * (difference - 1.4 / 2.0))
    np.testing.assert_allclose(value, ratio_form, rtol=1e-12)
    tie = Pair(jnp.array([-1.0]), jnp.array([-1.0]))
    np.testing.assert_allclose(simpo(tie, gamma=1.4), [np.log1p(np.exp(1.4))])


def test_extreme_margins_stay_finite_in_float32():
    pair = Pair(jnp.float32([0.0, -1e6]), jnp.float32([-1e6, 0.0]))
    zero = Pair(jnp.zeros(2, jnp.float32), jnp.zeros(2, jnp.float32))
    value, gradient = jax.value_and_grad(lambda s: dpo(s, zero, beta=1.0).sum())(pair)
    assert float(value) == 1e6
    np.testing.assert_array_equal(gradient.chosen, [0.0, -1.0])


def test_domains_and_shapes():
    for call, name in [
        (lambda: dpo(STUDENT, REFERENCE, beta=0.0), "beta"),
        (lambda: dpo(STUDENT, REFERENCE, label_smoothing=0.6), "label_smoothing"),
        (lambda: ipo(STUDENT, REFERENCE, tau=-1), "tau"),
        (lambda: simpo(STUDENT, beta=-1.0), "beta"),
        (lambda: simpo(STUDENT, gamma=-0.5), "gamma"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            call()
    with pytest.raises(AssertionError):
        dpo(STUDENT, Pair(REFERENCE.chosen[:2], REFERENCE.rejected[:2]))
    with pytest.raises(AssertionError):
        simpo(Pair(STUDENT.chosen, STUDENT.rejected[:1]))
