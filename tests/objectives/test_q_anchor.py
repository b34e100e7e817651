"""The form of Q, and the anchor of its confidence set, against float64 numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.heads import QHead, head_q_values
from rkd_jax.objectives.action_values import QFunction, Rows
from rkd_jax.objectives.q_anchor import make_q_anchor, pair_advantages
from rkd_jax.objectives.reward_model import l2_penalty, pair_losses
from rkd_jax.types import WhiteBoxSignal
from tests.objectives.game_batch import (
    PAIRS,
    ROLLOUTS,
    extended,
    game_batch,
    means,
    pair_margin,
    pair_nll,
    preference_batch,
)
from tests.tabular.bed import BED_E, STUDENT, TEACHER
from tests.tabular.white_box import (
    RANDOM_Q,
    Q,
    action_values,
    advantages,
    log_prob_rows,
    tabular_q,
)

pytestmark = pytest.mark.usefixtures("x64")

GAMMA, BOUND, L2 = 0.9, 1.5, 0.003
each_anchor = pytest.mark.parametrize(
    "anchor", [TEACHER, STUDENT], ids=["teacher", "student"]
)


def shaped(q, anchor):
    """Centred, then bounded."""
    return BOUND * np.tanh(advantages(q, anchor) / BOUND)


def sums(anchor):
    """[X, N]: advantage sums of `RANDOM_Q` in the form above."""
    return BED_E.returns(advantages(shaped(RANDOM_Q, anchor), anchor), GAMMA)


def test_q_is_centred_then_bounded():
    sequences = game_batch().rollouts
    anchor = log_prob_rows(TEACHER, *ROLLOUTS)
    visited = (ROLLOUTS[0][..., None], BED_E.states[ROLLOUTS[1]])
    mask = np.asarray(sequences.response_mask)[..., None]
    expected = {
        (True, BOUND): shaped(100 * Q, TEACHER),
        (True, None): 100 * advantages(Q, TEACHER),
        (False, BOUND): BOUND * np.tanh(100 * Q / BOUND),
        (False, None): 100 * Q,
    }

    @jax.jit
    def all_forms(params):
        functions = [QFunction(tabular_q, *form) for form in expected]
        return [
            q.shaped(q.along(params, sequences, None).states, anchor, mask[..., 0])
            for q in functions
        ]

    found = all_forms({"q": jnp.asarray(100 * Q)})
    for values, table in zip(found, expected.values(), strict=True):
        by_hand = np.where(mask, table[visited], 0.0)
        np.testing.assert_allclose(values, by_hand, atol=1e-12)


def test_a_head_on_features_survives_garbage_in_their_padding():
    objective = make_q_anchor(head_q_values(QHead(actions=3)))
    kernel = jnp.asarray(np.random.default_rng(4).normal(size=(6, 3)))
    head = {"output": {"kernel": kernel, "bias": jnp.zeros(3)}}
    values = np.random.default_rng(8).normal(size=(*PAIRS[0].shape, 4, 6))
    real = BED_E.mask[PAIRS[1]][..., None]
    batch, rows = preference_batch(), log_prob_rows(TEACHER, *PAIRS)

    @jax.jit
    @jax.grad
    def gradient(head, features):
        given = WhiteBoxSignal(preferences=rows, preference_features=features)
        return objective.student_loss(head, None, None, batch, given, None).total

    clean, dirty = (
        gradient(head, jnp.where(real, values, garbage))["output"]["kernel"]
        for garbage in (0.0, jnp.nan)
    )
    np.testing.assert_array_equal(dirty, clean)
    assert np.abs(clean).max() > 0.01


@functools.cache
def anchor_step():
    """Jitted: gradient of the anchor's loss, and the loss."""
    objective = make_q_anchor(tabular_q, gamma=GAMMA, q_bound=BOUND, l2=L2)

    def total(params, batch, given):
        out = objective.student_loss(params, None, None, batch, given, None)
        return out.total, out

    return jax.jit(jax.grad(total, has_aux=True))


@each_anchor
def test_the_anchor_is_the_bradley_terry_loss_of_advantage_sums(anchor):
    """A pair without any token, all NaN, is at the end of the batch."""
    given = WhiteBoxSignal(preferences=log_prob_rows(anchor, *PAIRS))
    params, batch = {"q": jnp.asarray(RANDOM_Q)}, preference_batch()
    _, out = anchor_step()(params, *extended((batch, given)))
    margin, nll = pair_margin(sums(anchor)), pair_nll(sums(anchor))
    penalty = L2 * (RANDOM_Q**2).sum()
    assert float(out.weight) == 4.0
    np.testing.assert_allclose(out.total, nll.sum() + 4 * penalty, rtol=1e-10)
    expected = {"anchor/nll": nll.mean(), "anchor/accuracy": (margin > 0).mean()}
    assert means(out) == pytest.approx(expected, rel=1e-6)

    # Labels that Q itself explains make it the maximum of the likelihood: what is left
    # of the gradient is the penalty's.
    explained = jnp.asarray(1 / (1 + np.exp(-margin)))
    batch = dataclasses.replace(batch, label=explained)
    gradient, _ = anchor_step()(params, *extended((batch, given)))
    np.testing.assert_allclose(gradient["q"], 8 * L2 * RANDOM_Q, atol=1e-12)


@functools.cache
def pair_terms():
    """Jitted `pair_losses` of a table."""
    q_function = QFunction(tabular_q, center=True, bound=BOUND)

    @jax.jit
    def terms(params, batch, rows):
        args = (params, batch.sequences, None, Rows(rows), GAMMA)
        return pair_losses(pair_advantages(q_function, *args), batch)

    return terms


@each_anchor
def test_the_games_anchor_nll_per_pair(anchor):
    params, batch = {"q": jnp.asarray(RANDOM_Q)}, preference_batch()
    nll, valid = pair_terms()(params, batch, log_prob_rows(anchor, *PAIRS))
    np.testing.assert_allclose(nll, pair_nll(sums(anchor)), atol=1e-12)
    assert valid.all()
    np.testing.assert_allclose(l2_penalty(params), (RANDOM_Q**2).sum(), rtol=1e-12)


def test_the_anchors_least_loss_does_not_depend_on_the_anchoring_policy():
    """So a number cached once stays right while the student moves.

    Any trajectory reward is implied by some Q whoever anchors it: the Q below gives the
    same margins with the student as the other one with the teacher.
    """
    q = action_values(advantages(Q, TEACHER), STUDENT, GAMMA)
    given, implied = (
        BED_E.returns(advantages(table, policy), GAMMA)
        for table, policy in ((Q, TEACHER), (q, STUDENT))
    )
    shift = implied - given
    np.testing.assert_allclose(shift, shift[:, :1] + np.zeros(31), atol=1e-12)


@pytest.mark.parametrize("bad", [{"q_bound": 0.0}, {"l2": -1.0}], ids=str)
def test_numbers_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must lie in"):
        make_q_anchor(tabular_q, **bad)
