"""MMKD's two losses on the enumerable bed, against float64 numpy.

As in `test_mm_pbkd`: padding of the signals is NaN, and every batch ends in a row
without any token.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.objectives.mmkd import make_mmkd
from rkd_jax.types import DemonstrationBatch, GameBatch, WhiteBoxSignal
from tests.objectives.game_batch import (
    DEMONSTRATIONS,
    MODEL,
    ROLLOUTS,
    extended,
    game_batch,
    means,
    student,
)
from tests.tabular.bed import BED_E, STUDENT, TEACHER, bed_sequences
from tests.tabular.white_box import (
    RANDOM_Q,
    Q,
    advantages,
    implied_rewards,
    log_prob_rows,
    moment_gap,
    probs,
    tabular_q,
)

pytestmark = pytest.mark.usefixtures("x64")

GAMMA, BOUND, WEIGHT, SFT = 0.9, 1.5, 0.3, 0.7
SETTINGS = {"on_weight": WEIGHT, "q_bound": BOUND, "gamma": GAMMA}
SIDES = ("off", "on")
RESPONSES = {"on": ROLLOUTS, "off": DEMONSTRATIONS}
TABLES = {"on": Q, "off": RANDOM_Q}


def critic():
    return {side: {"q": jnp.asarray(TABLES[side])} for side in SIDES}


def arguments(moments):
    """Only what is required: no pairs, and off-policy samples need no teacher."""
    batch = dataclasses.replace(game_batch(), preferences=None)
    given = WhiteBoxSignal(rollouts=log_prob_rows(TEACHER, *ROLLOUTS))
    if moments == "all_actions":
        taught = log_prob_rows(TEACHER, *DEMONSTRATIONS)
        given = dataclasses.replace(given, demonstrations=taught)
    return critic(), student(), *extended((batch, given))


@functools.cache
def critics_side(moments):
    """Jitted (critic, params, batch, signal): all gradients of the critics' loss."""
    objective = make_mmkd(MODEL, tabular_q, moments=moments, **SETTINGS)

    def total(critic, params, signal, batch):
        args = (critic, params, jnp.asarray(1.0), None, batch, signal, None)
        out = objective.critic_loss(*args)
        return out.total, out

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
    return lambda critic, params, batch, signal: gradients(
        critic, params, signal, batch
    )


@functools.cache
def students_side():
    """As `critics_side`, of the student's loss; it does not know of moments."""
    objective = make_mmkd(MODEL, tabular_q, sft_weight=SFT, **SETTINGS)

    def total(params, critic, signal, batch):
        out = objective.student_loss(params, critic, None, batch, signal, None)
        return out.total, out

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
    return lambda critic, params, batch, signal: gradients(
        params, critic, signal, batch
    )


def bounded(q):
    return BOUND * np.tanh(q / BOUND)


def distance(side, moments, q=None):
    """A critic's objective by table look-ups: mean over prompts and samples."""
    values = bounded(TABLES[side] if q is None else q)
    if moments == "all_actions":
        difference = ((probs(TEACHER) - probs(STUDENT)) * values).sum(-1)
        per_action = np.repeat(difference[..., None], 3, axis=-1)
    elif side == "on":
        per_action = -advantages(values, TEACHER)
    else:
        per_action = advantages(values, STUDENT)
    return BED_E.returns(per_action, GAMMA)[RESPONSES[side]].mean()


both_moments = pytest.mark.parametrize("moments", ["all_actions", "sampled"])


@both_moments
def test_critics_maximise_the_convex_combination_of_distances(moments):
    gradients, out = critics_side(moments)(*arguments(moments))
    shares = {"off": 1 - WEIGHT, "on": WEIGHT}
    expected = {f"critic/{side}_distance": distance(side, moments) for side in SIDES}
    total = sum(shares[side] * distance(side, moments) for side in SIDES)
    expected["critic/distance"] = total
    assert means(out) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(out.total / out.weight, -total, rtol=1e-10)
    assert float(out.weight) == 2.0
    for side in SIDES:
        slope = np.asarray(gradients[0][side]["q"]) / (2.0 * shares[side])
        for index in [(0, 0, 1), (0, 2, 2), (1, 0, 0), (1, 1, 2)]:
            bump = np.zeros(Q.shape)
            bump[index] = 1e-5
            up, down = (
                distance(side, moments, TABLES[side] + s * bump) for s in (1, -1)
            )
            assert slope[index] == pytest.approx((down - up) / 2e-5, abs=1e-8)


@pytest.mark.parametrize("player", ["all_actions", "sampled", "student"])
def test_cross_gradients_and_those_of_the_signal_are_exactly_zero(player):
    if player == "student":
        (own, *others), _ = students_side()(*arguments("sampled"))
    else:
        (own, *others), _ = critics_side(player)(*arguments(player))
    for leaf in jax.tree.leaves(others):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    for leaf in jax.tree.leaves(own):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 1e-3


def test_what_the_student_reports_of_its_likelihoods():
    _, out = students_side()(*arguments("sampled"))
    mean_log_probs = BED_E.sequence_log_probs(STUDENT) / BED_E.mask.sum(-1)
    found = means(out)
    sft, own = -mean_log_probs[DEMONSTRATIONS], -mean_log_probs[ROLLOUTS]
    assert found["student/sft"] == pytest.approx(sft.mean(), rel=1e-6)
    assert found["student/entropy_bound"] == pytest.approx(own.mean(), rel=1e-6)


def test_the_students_gradient_is_that_of_both_distances_by_enumeration():
    """On policy for the reward that f and the teacher imply, off policy as written."""
    objective = make_mmkd(
        MODEL,
        tabular_q,
        on_weight=WEIGHT,
        q_bound=BOUND,
        gamma=GAMMA,
        baseline="none",
        discount_weighting=True,
    )
    numbers, indices = np.meshgrid(range(2), range(31), indexing="ij")
    numbers, indices = numbers[..., None], indices[..., None]  # one sample each
    weights = {"on": BED_E.weights(STUDENT), "off": BED_E.weights(TEACHER)}
    weights = {side: jnp.asarray(w) for side, w in weights.items()}

    @jax.jit
    @jax.grad
    def gradient(table):
        def totals(sequences, teacher):
            batch = GameBatch(
                DemonstrationBatch(sequences, sequences, jnp.arange(1)),
                jax.tree.map(lambda x: jnp.expand_dims(x, 0), sequences),
            )
            given = WhiteBoxSignal(
                rollouts=jnp.expand_dims(teacher, 0), demonstrations=teacher
            )

            def total(side):
                """The other side's critic is 0, and so is its loss."""
                other = "on" if side == "off" else "off"
                zero = {"q": jnp.zeros(Q.shape)}
                args = ({"logits": table}, critic() | {other: zero})
                return objective.student_loss(*args, None, batch, given, None).total

            return {side: total(side) for side in SIDES}

        losses = jax.vmap(jax.vmap(totals))(
            bed_sequences(numbers, indices), log_prob_rows(TEACHER, numbers, indices)
        )
        return sum((weights[side] * losses[side]).sum() for side in SIDES)

    found = np.asarray(gradient(jnp.asarray(STUDENT)))
    rewards = implied_rewards(bounded(Q), TEACHER, GAMMA)
    for index in itertools.islice(np.ndindex(2, 7, 3), 0, None, 4):
        bump = np.zeros(STUDENT.shape)
        bump[index] = 1e-5
        change = {"on": 0.0, "off": 0.0}
        for sign in (1, -1):
            moved = STUDENT + sign * bump
            off = moment_gap(bounded(RANDOM_Q), TEACHER, GAMMA, student=moved)
            change["off"] += sign * off / 2e-5
            own = BED_E.expected_return(moved, rewards, GAMMA)
            change["on"] -= sign * own / 2e-5
        expected = (1 - WEIGHT) * change["off"] + WEIGHT * change["on"]
        assert found[index] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("on_weight", "side"), [(0.0, "off"), (1.0, "on")])
def test_a_side_without_weight_is_not_asked_for(on_weight, side):
    objective = make_mmkd(
        MODEL, tabular_q, on_weight=on_weight, q_bound=BOUND, gamma=GAMMA
    )
    required = {"on": "rollouts", "off": "demonstrations"}[side]
    assert objective.requires == (required,)
    batch, given = game_batch(), WhiteBoxSignal()
    rows = log_prob_rows(TEACHER, *RESPONSES[side])
    given = dataclasses.replace(given, **{required: rows})
    if side == "off":
        batch = dataclasses.replace(batch, rollouts=None)
    own = {side: critic()[side]}

    @jax.jit
    def loss(own):
        return objective.critic_loss(own, student(), None, None, batch, given, None)

    out = loss(own)
    expected = distance(side, "all_actions")
    np.testing.assert_allclose(out.total / out.weight, -expected, rtol=1e-10)
    sampled = make_mmkd(MODEL, tabular_q, on_weight=on_weight, moments="sampled")
    assert sampled.requires == ((required,) if side == "on" else ())


def test_saturated_critics_reach_the_total_variation():
    """The supremum is in the class, and the critic's own gradient vanishes there."""
    best = 60.0 * np.sign(probs(TEACHER) - probs(STUDENT))
    tables = {side: {"q": jnp.asarray(best)} for side in SIDES}
    _, params, *rest = arguments("all_actions")
    gradients, out = critics_side("all_actions")(tables, params, *rest)
    variation = 0.5 * np.abs(probs(TEACHER) - probs(STUDENT)).sum(-1)
    per_action = np.repeat(2 * BOUND * variation[..., None], 3, axis=-1)
    sums = BED_E.returns(per_action, GAMMA)
    for side in SIDES:
        expected = sums[RESPONSES[side]].mean()
        assert means(out)[f"critic/{side}_distance"] == pytest.approx(expected)
        np.testing.assert_allclose(gradients[0][side]["q"], 0.0, atol=1e-12)
    mixture = (1 - WEIGHT) * Q, WEIGHT * RANDOM_Q  # any other critic finds less
    for q in (*mixture, -best):
        for side in SIDES:
            assert distance(side, "all_actions", q) < sums[RESPONSES[side]].mean()


# A critic on features, and its penalty


WIDTH = 6
KERNEL = np.random.default_rng(4).normal(size=(WIDTH, 3))


def features_of(responses):
    values = np.random.default_rng(8).normal(size=(*responses[0].shape, 4, WIDTH))
    return np.where(BED_E.mask[responses[1]][..., None], values, np.nan)


def featured():
    given = {side: jnp.asarray(features_of(RESPONSES[side])) for side in SIDES}
    return WhiteBoxSignal(
        rollouts=log_prob_rows(TEACHER, *ROLLOUTS),
        demonstrations=log_prob_rows(TEACHER, *DEMONSTRATIONS),
        rollout_features=given["on"],
        demonstration_features=given["off"],
    )


def penalised(objective):
    """Jitted critic loss and its gradient in the kernels, features NaN in padding."""

    @jax.jit
    def loss(critic):
        def total(critic):
            args = (critic, student(), None, None, game_batch(), featured(), None)
            out = objective.critic_loss(*args)
            return out.total, out

        return jax.grad(total, has_aux=True)(critic)

    return loss


def test_gradient_penalty_by_hand_and_its_derivative():
    """Linear critics: a moment's slope is W (teacher - student), whatever the state."""
    objective = make_mmkd(
        MODEL,
        lambda params, sequences, features: features @ params["w"],
        on_weight=WEIGHT,
        q_bound=None,
        gamma=GAMMA,
        critic_penalty=10.0,
        penalty_target=0.4,
    )
    loss = penalised(objective)
    kernels = {"off": KERNEL, "on": 0.5 * KERNEL[::-1]}

    def by_hand(kernels):
        total, penalties = 0.0, {}
        for side, share in (("off", 1 - WEIGHT), ("on", WEIGHT)):
            numbers, indices = RESPONSES[side]
            difference = probs(TEACHER) - probs(STUDENT)
            rows = difference[numbers[..., None], BED_E.states[indices]]
            mask = BED_E.mask[indices]
            norm = np.linalg.norm(rows @ kernels[side].T, axis=-1)
            penalty = np.where(mask, (norm - 0.4) ** 2, 0.0).sum(-1) / mask.sum(-1)
            values = np.nan_to_num(features_of(RESPONSES[side])) @ kernels[side]
            moments = np.where(mask, (rows * values).sum(-1), 0.0)
            moments = (moments * GAMMA ** np.arange(4)).sum(-1)
            total += share * (10.0 * penalty.mean() - moments.mean())
            penalties[side] = penalty.mean()
        return total, penalties

    gradient, out = loss(jax.tree.map(lambda w: {"w": jnp.asarray(w)}, kernels))
    expected, penalties = by_hand(kernels)
    np.testing.assert_allclose(out.total / out.weight, expected, rtol=1e-10)
    for side in SIDES:
        found = means(out)[f"critic/{side}_penalty"]
        assert found == pytest.approx(penalties[side], rel=1e-6)
        for index in [(0, 0), (3, 1), (5, 2)]:
            bump = np.zeros(KERNEL.shape)
            bump[index] = 1e-5
            up, down = (
                by_hand(kernels | {side: kernels[side] + s * bump})[0] for s in (1, -1)
            )
            slope = float(gradient[side]["w"][index]) / 2.0
            assert slope == pytest.approx((up - down) / 2e-5, abs=1e-7)

    zero = {side: {"w": jnp.zeros(KERNEL.shape)} for side in SIDES}
    gradient, out = loss(zero)  # where every head starts: the norm has no slope
    assert means(out)["critic/on_penalty"] == pytest.approx(0.16)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert np.abs(gradient["on"]["w"]).max() > 1e-3


def test_a_penalty_without_features_is_refused():
    objective = make_mmkd(MODEL, tabular_q, critic_penalty=1.0)
    _, params, batch, given = arguments("all_actions")

    def loss(critic):
        return objective.critic_loss(critic, params, None, None, batch, given, None)

    with pytest.raises(ValueError, match="needs rollout_features"):
        jax.eval_shape(loss, critic())


@pytest.mark.parametrize(
    "bad",
    [
        {"moments": "none"},
        {"baseline": "mean"},
        {"on_weight": -0.1},
        {"q_bound": 0.0},
        {"gamma": 1.1},
        {"temperature": 0.0},
        {"critic_penalty": -1.0},
        {"penalty_target": -1.0},
        {"sft_weight": -1.0},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_unknown_options_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_mmkd(MODEL, tabular_q, **bad)
