"""DRDO as a function, against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.optimize import brentq

from rkd_jax.losses import drdo
from rkd_jax.masking import sequence_mean
from rkd_jax.types import Pair

pytestmark = pytest.mark.usefixtures("x64")

ALPHA, GAMMA = 0.3, 2.0
Z = Pair(np.array([-1.1, -0.3, -2.0, -1.4]), np.array([-0.9, -1.7, -2.0, -0.2]))
REWARDS = Pair(np.array([0.4, -0.1, 0.0, 1.2]), np.array([-0.1, 0.3, 0.0, 0.7]))
ORACLE = Pair(np.array([1.3, 0.9, -0.5, 0.2]), np.array([0.9, -0.4, 0.5, 0.2]))
FORMS = [("unlikelihood", 1.0), ("ratio_literal", -1.0)]


def sigmoid(u):
    return 1.0 / (1.0 + np.exp(-u))


def slopes(function, *arguments):
    """Gradient of the sum of ``function`` in every argument."""
    numbers = tuple(range(len(arguments)))
    total = jax.grad(lambda *a: jnp.sum(function(*a)), argnums=numbers)
    return jax.tree.map(np.asarray, total(*arguments))


@functools.partial(jax.jit, static_argnames=("form", "gamma", "focal_grad"))
def preference(z, form="unlikelihood", gamma=GAMMA, focal_grad=True):
    zeros = Pair(jnp.zeros_like(z[0]), jnp.zeros_like(z[0]))
    return drdo(
        z,
        zeros,
        zeros,
        alpha=ALPHA,
        gamma=gamma,
        preference_term=form,
        focal_grad=focal_grad,
    ).preference


@pytest.mark.parametrize(("form", "sign"), FORMS)
def test_drdo_is_its_formula(form, sign):
    found = drdo(Z, REWARDS, ORACLE, alpha=ALPHA, gamma=GAMMA, preference_term=form)
    gap = (ORACLE[0] - ORACLE[1]) - (REWARDS[0] - REWARDS[1])
    np.testing.assert_allclose(found.distillation, gap**2, rtol=1e-12)
    focus = (1 - sigmoid(Z[0] - Z[1])) ** GAMMA
    bracket = Z[0] + sign * np.log(1 - np.exp(Z[1]))
    np.testing.assert_allclose(found.preference, -ALPHA * focus * bracket, rtol=1e-12)


def gradient_table(z_w, z_l, sign, gamma):
    """The closed forms in both log-probs; gamma = 0 in them is a detached focus."""
    p = sigmoid(z_w - z_l)
    k = np.exp(z_l) / (1 - np.exp(z_l))
    bracket = z_w + sign * np.log(1 - np.exp(z_l))
    focus = (1 - p) ** GAMMA
    chosen = -ALPHA * focus * (1 - gamma * p * bracket)
    rejected = sign * ALPHA * focus * (k - sign * gamma * p * bracket)
    return chosen, rejected


GRID = [z.ravel() for z in np.meshgrid(*[-np.geomspace(1e-3, 6, 24)] * 2)]


@pytest.mark.parametrize(("form", "sign"), FORMS)
@pytest.mark.parametrize("focal_grad", [True, False])
def test_drdo_table_of_gradients(form, sign, focal_grad):
    found = slopes(lambda z: preference(z, form, focal_grad=focal_grad), Pair(*GRID))[0]
    expected = gradient_table(*GRID, sign, GAMMA if focal_grad else 0.0)
    np.testing.assert_allclose(found.chosen, expected[0], rtol=1e-9)
    np.testing.assert_allclose(found.rejected, expected[1], rtol=1e-7, atol=1e-12)
    if form == "unlikelihood":  # the chosen one always rises, the rejected one falls
        assert (found.chosen < 0).all()
        assert (found.rejected > 0).all()
    elif not focal_grad:  # D1: the literal form then pushes the rejected one up
        assert (found.chosen < 0).all()
        assert (found.rejected < 0).all()
    else:  # D1, D2: with it either sign occurs, on either side
        for side in found:
            assert {-1.0, 1.0} == set(np.sign(side))


def test_d1_the_literal_form_changes_sign_through_the_focal_factor():
    """At equal log-probs and gamma = 2: upwards above -1.016, downwards below."""

    def rejected(z, focal_grad=True, gamma=2.0):
        z = jnp.asarray([z])
        form = "ratio_literal"
        found = slopes(lambda z: preference(z, form, gamma, focal_grad), Pair(z, z))
        return found[0].rejected.item()

    assert brentq(rejected, -2.0, -0.5, xtol=1e-6) == pytest.approx(-1.016, abs=5e-4)
    assert rejected(-0.9) < 0 < rejected(-1.1)
    assert rejected(-1.1, focal_grad=False) < 0
    # Its slope in the bracket is k = 0.58 at z = -1, with the loss's -alpha before it.
    assert rejected(-1.0, gamma=0.0) == pytest.approx(-ALPHA * 0.58, abs=2e-3)


def test_d2_the_literal_form_can_push_the_chosen_one_down():
    z = Pair(jnp.asarray([-0.5]), jnp.asarray([-1e-3]))
    literal = slopes(lambda z: preference(z, "ratio_literal"), z)[0]
    assert literal.chosen > 0
    assert slopes(preference, z)[0].chosen < 0


def test_d3_summed_log_probs_leave_the_rejected_response_without_gradient():
    z = Pair(jnp.asarray([-41.0]), jnp.asarray([-40.0]))
    found = slopes(lambda z: preference(z, focal_grad=False), z)[0]
    focus = sigmoid(1.0) ** GAMMA
    assert found.rejected == pytest.approx(ALPHA * focus * 4.25e-18, rel=1e-2)
    far = Pair(jnp.asarray([-40.0, -70.0]), jnp.asarray([-70.0, -40.0]))
    values = -preference(far) / (ALPHA * far.chosen)  # the focal factor
    np.testing.assert_allclose(values, [0.0, 1.0], atol=1e-12)


def test_drdo_limits_of_alpha_and_gamma():
    terms = drdo(Z, REWARDS, ORACLE, alpha=0.0)
    np.testing.assert_array_equal(terms.preference, np.zeros(4))
    silent = slopes(lambda z: sum(drdo(z, REWARDS, ORACLE, alpha=0.0)), Z)[0]
    np.testing.assert_array_equal(silent, np.zeros((2, 4)))
    bracket = Z[0] + np.log(1 - np.exp(Z[1]))
    np.testing.assert_allclose(preference(Z, gamma=0.0), -ALPHA * bracket, rtol=1e-12)
    equal = Pair(Z[0], Z[0])  # p_w = 1/2, so f = 2^-gamma
    bracket = Z[0] + np.log(1 - np.exp(Z[0]))
    for gamma in (0.5, 1.0, 5.0):
        expected = -ALPHA * 2.0**-gamma * bracket
        np.testing.assert_allclose(preference(equal, gamma=gamma), expected, rtol=1e-12)


def test_d4_rewards_are_compared_up_to_a_constant():
    shifted = Pair(*(member + np.arange(4.0) for member in REWARDS))
    np.testing.assert_allclose(
        drdo(Z, shifted, ORACLE).distillation,
        drdo(Z, REWARDS, ORACLE).distillation,
        rtol=1e-12,
    )


def test_drdo_sends_each_term_where_it_belongs():
    """Each to its own argument alone; exactly nothing to the oracle."""
    by_term = [slopes(lambda *a, t=t: drdo(*a)[t], Z, REWARDS, ORACLE) for t in (0, 1)]
    (z, rewards, oracle), (z_too, rewards_too, oracle_too) = by_term
    for silent in (*z, *oracle, *rewards_too, *oracle_too):
        np.testing.assert_array_equal(silent, np.zeros(4))
    gap = (ORACLE[0] - ORACLE[1]) - (REWARDS[0] - REWARDS[1])
    np.testing.assert_allclose(rewards.chosen, -2 * gap, rtol=1e-12)
    np.testing.assert_allclose(rewards.rejected, 2 * gap, rtol=1e-12)
    assert (np.abs(z_too) > 1e-3).all()


@pytest.mark.parametrize(("form", "_"), FORMS)
def test_g7_drdo(form, _):
    def total(z, rewards):
        terms = drdo(z, rewards, ORACLE, preference_term=form)
        return jnp.sum(terms.distillation) + jnp.sum(terms.preference)

    check_grads(total, (Z, REWARDS), order=1, modes=["rev"], rtol=1e-6, atol=1e-8)


def test_repeating_the_tokens_leaves_the_mean_log_prob():
    tokens = -np.array([[0.3, 1.2, 0.7, 9.0], [2.0, 0.1, 9.0, 9.0]])
    mask = np.array([[True, True, True, False], [True, True, False, False]])
    once = sequence_mean(jnp.asarray(tokens), jnp.asarray(mask))
    twice = sequence_mean(
        jnp.asarray(np.repeat(tokens, 2, -1)), jnp.asarray(np.repeat(mask, 2, -1))
    )
    np.testing.assert_allclose(once, [-2.2 / 3, -1.05], rtol=1e-12)
    np.testing.assert_allclose(preference(Pair(*twice)), preference(Pair(*once)))


def test_drdo_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="preference_term must be one of"):
        drdo(Z, REWARDS, ORACLE, preference_term="ratio")
    with pytest.raises(ValueError, match="alpha must lie in"):
        drdo(Z, REWARDS, ORACLE, alpha=-0.1)
    with pytest.raises(ValueError, match="gamma must lie in"):
        drdo(Z, REWARDS, ORACLE, gamma=-1.0)
    with pytest.raises(AssertionError):
        drdo(Z, REWARDS, Pair(jnp.zeros(3), jnp.zeros(3)))
