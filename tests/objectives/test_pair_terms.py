"""The loss of pairs whose positions are over the vocabulary: read once, by pairs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.api import response_hidden
from rkd_jax.models.heads import QHead, head_q_values
from rkd_jax.objectives import action_values, position_slices
from rkd_jax.objectives.action_values import FrozenPolicy, QFunction, Rows
from rkd_jax.objectives.mm_pbkd import make_mm_pbkd
from rkd_jax.objectives.q_anchor import make_q_anchor, pair_advantages, pair_terms
from rkd_jax.objectives.reward_model import pair_losses
from rkd_jax.types import WhiteBoxSignal
from tests.objectives.game_batch import (
    DEMONSTRATIONS,
    MODEL,
    PAIRS,
    ROLLOUTS,
    extended,
    game_batch,
    preference_batch,
)
from tests.tabular.bed import BED_E, STUDENT, TEACHER
from tests.tabular.white_box import log_prob_rows

pytestmark = pytest.mark.usefixtures("x64")

GAMMA, WIDTH, HEAD = 0.9, 6, QHead(actions=3, width=5)
Q = QFunction(head_q_values(HEAD), center=True, bound=0.7)
# A pair of the bed is 2 x 4 x 3 numbers, and there are five with one of padding.
LIMITS = {"at once": 2**20, "three": 72, "one by one": 24, "in positions": 23}
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def critic():
    zeros = HEAD.init(jax.random.key(0), WIDTH)
    generator = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape)), zeros)


def features(where, seed):
    """NaN in padding."""
    values = normal(*where[0].shape, 4, WIDTH, seed=seed)
    return jnp.where(jnp.asarray(BED_E.mask[where[1]][..., None]), values, jnp.nan)


def pairs():
    """Five, the last of padding; their features; the teacher's log-probs and states."""
    batch = preference_batch()
    states = response_hidden(MODEL, {"logits": jnp.asarray(TEACHER)}, batch.sequences)
    mask = jnp.expand_dims(batch.sequences.response_mask, -1)
    given = (
        batch,
        features(PAIRS, 8),
        log_prob_rows(TEACHER, *PAIRS),
        jnp.where(mask, states, jnp.nan),
    )
    return extended(given)


def mean(values, valid):
    return jnp.where(valid, values, 0.0).sum() / valid.sum().astype(values.dtype)


def other(values, valid):
    """No factor takes the mean to this."""
    weights = jnp.asarray([3.0, -1.0, 0.5, 2.0, 1.0])
    return jnp.where(valid, weights * values, 0.0).sum()


def reference(reduce):
    """Of whole arrays, with nothing foreseen."""
    batch, rows, log_probs, _ = pairs()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(params):
        returns = pair_advantages(
            Q, params, batch.sequences, rows, Rows(log_probs), GAMMA
        )
        nll, valid = pair_losses(returns, batch)
        return reduce(nll, valid), (nll, returns.chosen - returns.rejected, valid)

    return total(critic())


def in_slices(reduce):
    """Out of the states of the anchor, as the limit says."""
    batch, rows, _, states = pairs()
    anchor = FrozenPolicy("anchor", MODEL, 1.0)
    frozen = {"anchor": {"logits": jnp.asarray(TEACHER)}}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(params):
        found = pair_terms(Q, params, batch, rows, anchor(frozen, states), GAMMA)
        return reduce(found.nll, found.valid), tuple(found)

    return total(critic())


@pytest.fixture
def again(monkeypatch):
    """Gradients that were there when the cotangent came, and what is made anew is NaN.

    So a test can tell whether a slice was computed a second time.
    """
    asked = []
    whole = position_slices.scaled_or_again

    def never(ahead, foreseen, cotangent, again):
        asked.append(1)
        nothing = jax.tree.map(lambda x: jnp.nan * x, ahead)
        return whole(ahead, foreseen, cotangent, lambda: nothing)

    monkeypatch.setattr(position_slices, "scaled_or_again", never)
    return asked


@pytest.mark.parametrize("reduce", [mean, other])
@pytest.mark.parametrize("limit", LIMITS)
def test_cut_by_pairs_or_positions_it_is_the_loss_of_whole_arrays(
    limit, reduce, monkeypatch
):
    monkeypatch.setattr(action_values, "LOGITS", LIMITS[limit])
    (value, terms), gradient = in_slices(reduce)
    (expected, wanted), slopes = reference(reduce)
    valid = np.asarray(wanted[-1])
    assert valid.tolist() == [True] * 4 + [False]
    np.testing.assert_array_equal(terms[-1], valid)
    for one, another in zip(terms[:2], wanted[:2], strict=True):
        close(one[valid], another[valid])
    jax.tree.map(close, (value, gradient), (expected, slopes))
    assert min(np.abs(x).max() for x in jax.tree.leaves(gradient)) > 1e-4


@pytest.mark.parametrize("limit", ["three", "one by one"])
def test_the_gradient_of_the_mean_is_there_after_one_reading(limit, monkeypatch, again):
    monkeypatch.setattr(action_values, "LOGITS", LIMITS[limit])
    _, gradient = in_slices(mean)
    assert len(again) == 1
    jax.tree.map(close, gradient, reference(mean)[1])
    _, gradient = in_slices(other)
    assert all(np.isnan(x).any() for x in jax.tree.leaves(gradient))


def test_so_it_is_for_the_anchor(monkeypatch, again):
    """Of its own objective, that is: with its penalty and its metrics."""
    batch, rows, log_probs, states = pairs()
    expected = evaluate_anchor(None, batch, rows, log_probs)
    assert not again
    monkeypatch.setattr(action_values, "LOGITS", LIMITS["one by one"])
    found = evaluate_anchor(MODEL, batch, rows, states)
    assert len(again) == 1
    jax.tree.map(close, found, expected)


def evaluate_anchor(anchor, batch, rows, preferences):
    objective = make_q_anchor(
        head_q_values(HEAD), anchor=anchor, gamma=GAMMA, q_bound=0.7, l2=0.01
    )
    signal = WhiteBoxSignal(preferences=preferences, preference_features=rows)
    frozen = {"anchor": {"logits": jnp.asarray(TEACHER)}}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(params):
        out = objective.student_loss(params, None, frozen, batch, signal, None)
        return out.total, (out.weight, out.metrics)

    return total(critic())


@pytest.mark.parametrize("hinge", [False, True])
@pytest.mark.parametrize("gap", ["on", "mixed"])
def test_and_for_the_critic_of_a_game(gap, hinge, monkeypatch, again):
    """Of every side the gap and the pairs, under its own multiplier."""
    expected = critic_step(gap, hinge)
    assert not again
    monkeypatch.setattr(action_values, "LOGITS", LIMITS["one by one"])
    found = critic_step(gap, hinge)
    # The demonstrations are so few that they are read at once.
    assert len(again) == (2 if gap == "on" else 3)
    jax.tree.map(close, found, expected)


def critic_step(gap, hinge):
    batch, critics, dual = game_batch(), critic(), jnp.asarray(2.0)
    responses = {
        "rollouts": (ROLLOUTS, batch.rollouts),
        "preferences": (PAIRS, batch.preferences.sequences),
        "demonstrations": (DEMONSTRATIONS, batch.demonstrations.sequences),
    }
    params = {"logits": jnp.asarray(TEACHER)}
    signal = WhiteBoxSignal(
        anchor_nll=jnp.asarray([0.4, 0.5, 0.6, 0.2]),
        rollout_features=features(ROLLOUTS, 5),
        preference_features=features(PAIRS, 6),
        demonstration_features=features(DEMONSTRATIONS, 7),
        **{
            name: response_hidden(MODEL, params, sequences)
            for name, (_, sequences) in responses.items()
        },
    )
    if gap == "mixed":
        critics = {"off": critics, "on": jax.tree.map(jnp.negative, critics)}
        dual = jnp.asarray([2.0, 0.5])
        both = jnp.stack([signal.anchor_nll] * 2, -1)
        signal = dataclasses.replace(signal, anchor_nll=both)
    objective = make_mm_pbkd(
        MODEL,
        head_q_values(HEAD),
        teacher=MODEL,
        gap=gap,
        hinge=hinge,
        gamma=GAMMA,
        l2=0.01,
    )

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(critics):
        out = objective.critic_loss(
            critics,
            {"logits": jnp.asarray(STUDENT)},
            dual,
            {"teacher": params},
            batch,
            signal,
            None,
        )
        return out.total, out.metrics

    return total(critics)
