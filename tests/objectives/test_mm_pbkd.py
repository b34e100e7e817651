"""MM-PbKD's two losses on the enumerable bed, against float64 numpy.

All padding of the signals is NaN (`log_prob_rows`), and every batch has a row without
any token at its end, whose signals and labels are NaN: no number below knows of either.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.objectives.mm_pbkd import make_mm_pbkd
from rkd_jax.types import GameBatch, WhiteBoxSignal
from tests.objectives.game_batch import (
    DEMONSTRATIONS,
    MODEL,
    PAIRS,
    ROLLOUTS,
    extended,
    game_batch,
    means,
    pair_nll,
)
from tests.tabular.bed import BED_E, STUDENT, TEACHER
from tests.tabular.white_box import (
    RANDOM_Q,
    Q,
    advantages,
    log_prob_rows,
    probs,
    tabular_q,
)

pytestmark = pytest.mark.usefixtures("x64")

GAMMA, EPSILON, BOUND, L2, TEMPERATURE = 0.9, 0.05, 1.5, 0.003, 2.0
ANCHORS = {"on": TEACHER, "off": STUDENT}
RESPONSES = {"on": ROLLOUTS, "off": DEMONSTRATIONS}
ANCHOR_NLL = {"on": [0.4, 0.5, 0.6, 0.2], "off": [0.3, 0.7, 0.5, 0.4]}
TABLES = {"on": Q, "off": RANDOM_Q}
DUALS = {"on": 2.5, "off": 0.7}


def signal(gap):
    both = np.stack([ANCHOR_NLL["off"], ANCHOR_NLL["on"]], axis=-1)
    return WhiteBoxSignal(
        anchor_nll=jnp.asarray(both if gap == "mixed" else ANCHOR_NLL[gap]),
        rollouts=log_prob_rows(TEACHER, *ROLLOUTS),
        preferences=log_prob_rows(TEACHER, *PAIRS),
        demonstrations=log_prob_rows(TEACHER, *DEMONSTRATIONS),
    )


def critic(gap):
    tables = {side: {"q": jnp.asarray(TABLES[side])} for side in ("off", "on")}
    return tables if gap == "mixed" else tables[gap]


def dual(gap):
    both = [DUALS["off"], DUALS["on"]]
    return jnp.asarray(both if gap == "mixed" else DUALS[gap])


def student():
    """A table that is `STUDENT` at the temperature of all tests here."""
    return {"logits": TEMPERATURE * jnp.asarray(STUDENT)}


def arguments(gap, *, batch=None, given=None):
    """What both losses read, a row of padding at the end of every array."""
    batch = game_batch() if batch is None else batch
    given = signal(gap) if given is None else given
    return critic(gap), student(), dual(gap), *extended((batch, given))


SETTINGS = {
    "gamma": GAMMA,
    "epsilon": EPSILON,
    "temperature": TEMPERATURE,
    "q_bound": BOUND,
    "l2": L2,
}
WEIGHT = 0.3  # of the on-policy side of "mixed"
SFT = 0.7  # weight of the teacher's responses where only one side is played


@functools.cache
def mixed():
    """Jitted: both losses of "mixed" and all their gradients, at any weight."""

    @jax.jit
    def both(critic, params, dual, batch, signal, on_weight):
        options = SETTINGS | {"on_weight": on_weight}
        objective = make_mm_pbkd(MODEL, tabular_q, gap="mixed", **options)

        def critic_total(critic, params, dual, signal):
            out = objective.critic_loss(critic, params, dual, None, batch, signal, None)
            return out.total, out

        def student_total(params, critic, signal):
            out = objective.student_loss(params, critic, None, batch, signal, None)
            return out.total, out

        of_critic = jax.grad(critic_total, argnums=(0, 1, 2, 3), has_aux=True)
        of_student = jax.grad(student_total, argnums=(0, 1, 2), has_aux=True)
        return (
            of_critic(critic, params, dual, signal),
            of_student(params, critic, signal),
        )

    return both


@functools.cache
def one_side(side):
    """Jitted: the outputs of both losses; on policy, with the options it has."""
    options = {"hinge": True, "sft_weight": SFT} if side == "on" else {}
    objective = make_mm_pbkd(MODEL, tabular_q, gap=side, **SETTINGS, **options)

    @jax.jit
    def both(critic, params, dual, batch, signal):
        return (
            objective.critic_loss(critic, params, dual, None, batch, signal, None),
            objective.student_loss(params, critic, None, batch, signal, None),
        )

    return both


# The same in numpy, on tables


def shaped(q, anchor, bound=BOUND):
    """Centred, then bounded."""
    return bound * np.tanh(advantages(q, anchor) / bound)


def side_terms(side, q=None):
    """What the critic's loss is made of, by table look-ups."""
    q = TABLES[side] if q is None else q
    values = shaped(q, ANCHORS[side])
    difference = ((probs(TEACHER) - probs(STUDENT)) * values).sum(-1)
    moments = np.repeat(difference[..., None], 3, axis=-1)  # whatever the action
    gap = BED_E.returns(moments, GAMMA)[RESPONSES[side]].mean()
    sums = BED_E.returns(advantages(values, ANCHORS[side]), GAMMA)
    nll = pair_nll(sums)
    slack = (nll - ANCHOR_NLL[side]).mean() + L2 * (q**2).sum() - EPSILON
    return {"gap": gap, "nll": nll.mean(), "slack": slack}


def side_loss(side, q=None):
    terms = side_terms(side, q)
    return -terms["gap"] + DUALS[side] * terms["slack"]


SIDES = ("off", "on")


def alone(side):
    """Outputs of both losses of one gap; off-policy, with nothing it does not need."""
    batch, given = game_batch(), signal(side)
    if side == "off":
        batch = dataclasses.replace(batch, rollouts=None)
        given = dataclasses.replace(given, rollouts=None, preferences=None)
    return one_side(side)(*arguments(side, batch=batch, given=given))


def student_total(side):
    """The student's loss against the critic of one side, without the likelihood."""
    return alone(side)[1].total - (SFT * TAUGHT.sum() if side == "on" else 0.0)


MEAN_LOG_PROBS = BED_E.sequence_log_probs(STUDENT) / BED_E.mask.sum(-1)
TAUGHT = -MEAN_LOG_PROBS[DEMONSTRATIONS]  # per demonstration, nats per token


@pytest.mark.parametrize("side", SIDES)
def test_critic_loss_is_minus_the_gap_plus_lambda_times_the_slack(side):
    out, student_out = alone(side)
    assert float(out.weight) == 2.0
    np.testing.assert_allclose(out.total / out.weight, side_loss(side), rtol=1e-10)
    lengths, found = BED_E.mask.sum(-1), means(out)
    expected = {f"critic/{name}": value for name, value in side_terms(side).items()}
    expected["critic/teacher_length"] = lengths[DEMONSTRATIONS[1]].mean()
    if side == "on":
        expected["critic/student_length"] = lengths[ROLLOUTS[1]].mean()
    assert found == pytest.approx(expected, rel=1e-6)
    assert means(student_out)["student/gap"] == pytest.approx(found["critic/gap"])


def test_mixed_is_the_weighted_sum_of_two_games():
    """Each with its own critic, anchor, multiplier; on both sides of the update."""
    shares = {"off": 1 - WEIGHT, "on": WEIGHT}
    (gradients, out), (in_student, student_out) = mixed()(*arguments("mixed"), WEIGHT)
    expected = sum(shares[side] * side_loss(side) for side in SIDES)
    np.testing.assert_allclose(out.total / out.weight, expected, rtol=1e-10)
    for side in SIDES:
        for name, value in side_terms(side).items():
            assert means(out)[f"critic/{side}_{name}"] == pytest.approx(value, rel=1e-6)
    expected = sum(shares[side] * student_total(side) for side in SIDES)
    np.testing.assert_allclose(student_out.total, expected, rtol=1e-10)

    for side in SIDES:
        slope = np.asarray(gradients[0][side]["q"]) / (2.0 * shares[side])
        for index in [(0, 0, 1), (0, 2, 2), (1, 0, 0), (0, 1, 1)]:
            bump = np.zeros(Q.shape)
            bump[index] = 1e-5
            up, down = (side_loss(side, TABLES[side] + s * bump) for s in (1, -1))
            assert slope[index] == pytest.approx((up - down) / 2e-5, abs=1e-8)

    one, other = (
        mixed()(*arguments("mixed"), w)[1][0][0]["logits"] for w in (0.0, 1.0)
    )
    np.testing.assert_allclose(
        in_student[0]["logits"], (1 - WEIGHT) * one + WEIGHT * other, atol=1e-12
    )


@pytest.mark.parametrize(("on_weight", "side"), [(0.0, "off"), (1.0, "on")])
def test_mixed_with_all_weight_on_one_side_is_that_game(on_weight, side):
    found = mixed()(*arguments("mixed"), on_weight)
    expected = alone(side)[0].total, student_total(side)
    for (_, out), total in zip(found, expected, strict=True):
        np.testing.assert_allclose(out.total, total, rtol=1e-12)
    other = {"on": "off", "off": "on"}[side]
    ignored = found[0][0][0][other]["q"]
    np.testing.assert_array_equal(ignored, np.zeros(Q.shape))


def test_g3_g4_cross_gradients_and_those_of_the_signal_are_exactly_zero():
    (of_critic, _), (of_student, _) = mixed()(*arguments("mixed"), WEIGHT)
    for leaf in jax.tree.leaves((of_critic[1:], of_student[1:])):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    for leaf in jax.tree.leaves((of_critic[0], of_student[0])):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 1e-3


def test_a_shared_critic_pays_for_both_sides():
    shared = {"q": jnp.asarray(Q)}
    objective = make_mm_pbkd(
        MODEL, tabular_q, gap="mixed", share_critic=True, **SETTINGS
    )
    _, params, dual_, batch, given = arguments("mixed")

    @jax.jit
    def total(shared):
        args = (shared, params, dual_, None, batch, given, None)
        return objective.critic_loss(*args).total

    tables = {"off": shared, "on": shared}
    (_, apart), _ = mixed()(tables, params, dual_, batch, given, 0.5)
    np.testing.assert_allclose(total(shared), apart.total, rtol=1e-10)


def test_hinge_pays_outside_the_set_only():
    terms, inside = (
        side_terms("on"),
        dataclasses.replace(signal("on"), anchor_nll=np.full(4, 2.0)),
    )
    assert terms["slack"] > 0  # where the other tests are
    out, _ = one_side("on")(*arguments("on", given=inside))
    np.testing.assert_allclose(out.total / 2, -terms["gap"], rtol=1e-10)


def test_what_the_student_reports_of_its_likelihoods():
    _, out = alone("on")
    found = means(out)
    assert found["student/sft"] == pytest.approx(TAUGHT.mean(), rel=1e-6)
    own = -MEAN_LOG_PROBS[ROLLOUTS].mean()
    assert found["student/entropy_bound"] == pytest.approx(own, rel=1e-6)
    (_, plain) = mixed()(*arguments("mixed"), 1.0)[1]
    np.testing.assert_allclose(out.total - plain.total, SFT * TAUGHT.sum(), rtol=1e-9)


def test_micro_batches_add_up():
    """One prompt and two pairs at a time; what is left out becomes padding."""
    whole = mixed()(*arguments("mixed"), WEIGHT)

    def part(i):
        def keep(rows):
            def blank(leaf):
                leaf = np.asarray(leaf)
                kept = np.isin(np.arange(len(leaf)), rows)
                kept = kept.reshape(-1, *[1] * (leaf.ndim - 1))
                if leaf.dtype == bool:
                    return leaf & kept
                floating = np.issubdtype(leaf.dtype, np.floating)
                return np.where(kept, leaf, np.nan) if floating else leaf

            return lambda tree: jax.tree.map(blank, tree)

        prompt, two = keep([i]), keep([i, i + 2])
        batch, given = game_batch(), signal("mixed")
        batch = GameBatch(
            prompt(batch.demonstrations),
            prompt(batch.rollouts),
            two(batch.preferences),
        )
        given = WhiteBoxSignal(
            anchor_nll=two(given.anchor_nll),
            rollouts=prompt(given.rollouts),
            preferences=two(given.preferences),
            demonstrations=prompt(given.demonstrations),
        )
        return mixed()(*arguments("mixed", batch=batch, given=given), WEIGHT)

    parts = [part(i) for i in range(2)]
    for player in range(2):
        assert float(parts[0][player][1].weight) == 1.0
        for take in (lambda p: p[0][0], lambda p: (p[1].total, p[1].weight)):
            sums = jax.tree.map(jnp.add, take(parts[0][player]), take(parts[1][player]))
            leaves = jax.tree.leaves(sums), jax.tree.leaves(take(whole[player]))
            for a, b in zip(*leaves, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-12)


# The multiplier, what is required, errors


def test_dual_step_moves_each_multiplier_by_its_own_slack():
    one = make_mm_pbkd(MODEL, tabular_q, epsilon=0.02, dual_step_size=0.5)
    moved = one.dual_step(jnp.asarray(1.0), {"critic/slack": jnp.asarray(0.03)})
    np.testing.assert_allclose(moved, 1.0 + 0.5 * 0.03 / 0.02, rtol=1e-6)
    raw = make_mm_pbkd(MODEL, tabular_q, epsilon=0.02, dual_scale="raw")
    moved = raw.dual_step(jnp.asarray(1.0), {"critic/slack": jnp.asarray(0.03)})
    np.testing.assert_allclose(moved, 1.0 + 0.5 * 0.03, rtol=1e-6)
    two = make_mm_pbkd(MODEL, tabular_q, gap="mixed", epsilon=0.02, slack_clip=2.0)
    slacks = {"critic/off_slack": 0.03, "critic/on_slack": -0.01}
    moved = two.dual_step(jnp.array([1.0, 4.0]), jax.tree.map(jnp.asarray, slacks))
    np.testing.assert_allclose(moved, [1.0 + 0.5 * 1.5, 4.0 - 0.5 * 0.5], rtol=1e-6)
    fixed = make_mm_pbkd(MODEL, tabular_q, constraint="fixed_lambda")
    assert fixed.dual_step is None


def test_each_gap_requires_its_signals():
    required = {
        gap: set(make_mm_pbkd(MODEL, tabular_q, gap=gap).requires)
        for gap in ("on", "off", "mixed")
    }
    assert required["on"] == {"anchor_nll", "rollouts", "preferences"}
    assert required["off"] == {"anchor_nll", "demonstrations"}
    assert required["mixed"] == required["on"] | required["off"]


@pytest.mark.parametrize(
    "bad",
    [
        {"gap": "both"},
        {"student_step": "two_step"},
        {"baseline": "mean"},
        {"constraint": "hard"},
        {"dual_scale": "log"},
        {"on_weight": 1.5},
        {"epsilon": 0.0},
        {"gamma": -0.1},
        {"temperature": 0.0},
        {"dual_step_size": 0.0},
        {"slack_clip": -1.0},
        {"q_bound": -1.0},
        {"l2": -1.0},
        {"sft_weight": -1.0},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_unknown_options_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_mm_pbkd(MODEL, tabular_q, **bad)


@pytest.mark.parametrize("name", ["dual", "anchor_nll"])
def test_mixed_asks_for_two_multipliers_and_two_anchors(name):
    objective = make_mm_pbkd(MODEL, tabular_q, gap="mixed")
    critic_, params, dual_, batch, given = arguments("mixed")
    if name == "dual":
        dual_ = jnp.asarray(1.0)
    else:
        given = dataclasses.replace(given, anchor_nll=given.anchor_nll[:, :1])

    def loss(critic, params, dual, batch, given):
        return objective.critic_loss(critic, params, dual, None, batch, given, None)

    with pytest.raises(ValueError, match=rf"needs {name} \[\.\., 2\]"):
        jax.eval_shape(loss, critic_, params, dual_, batch, given)
