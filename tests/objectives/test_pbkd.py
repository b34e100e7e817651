"""PbKD's two losses and the anchor's on the enumerable bed, against float64 numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.objectives.reward_model import make_reward_model
from rkd_jax.types import GameBatch, PreferenceSignal
from tests.objectives.game_batch import (
    ANCHOR,
    DEMONSTRATIONS,
    LABELS,
    MODEL,
    PAIRS,
    ROLLOUTS,
    critic,
    game_batch,
    pair_nll,
    preference_batch,
    signal,
    student,
)
from tests.tabular.bed import BED_E, REWARD, STUDENT, bed_sequences, tabular_rewards

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("hinge", [False, True])
@pytest.mark.parametrize("l2", [0.0, 0.01])
def test_critic_loss_is_minus_the_gap_plus_lambda_times_the_slack(gamma, hinge, l2):
    objective = make_pbkd(
        MODEL, tabular_rewards, gamma=gamma, epsilon=0.05, hinge=hinge, l2=l2
    )
    out = objective.critic_loss(
        critic(), student(), jnp.asarray(2.5), None, game_batch(), signal(), None
    )
    returns = BED_E.returns(REWARD, gamma)
    gap = returns[DEMONSTRATIONS].mean() - returns[ROLLOUTS].mean()
    slack = (pair_nll(returns) - ANCHOR).mean() - 0.05 + l2 * (REWARD**2).sum()
    loss = -gap + 2.5 * (max(slack, 0.0) if hinge else slack)
    np.testing.assert_allclose(out.total / out.weight, loss, rtol=1e-10)
    found = {name: float(m.total / m.weight) for name, m in out.metrics.items()}
    lengths = BED_E.mask.sum(-1)
    expected = {
        "critic/gap": gap,
        "critic/nll": pair_nll(returns).mean(),
        "critic/slack": slack,
        "critic/teacher_length": lengths[DEMONSTRATIONS[1]].mean(),
        "critic/student_length": lengths[ROLLOUTS[1]].mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_cross_gradients_are_exactly_zero():
    objective = make_pbkd(MODEL, tabular_rewards, sft_weight=0.5)
    batch, one = game_batch(), jnp.asarray(1.0)

    @jax.jit
    @jax.grad
    def through_student(reward):
        return objective.student_loss(
            student(), reward, None, batch, signal(), None
        ).total

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def through_critic(theta, dual):
        return objective.critic_loss(
            critic(), theta, dual, None, batch, signal(), None
        ).total

    assert not np.asarray(through_student(critic())["rewards"]).any()
    to_student, to_dual = through_critic(student(), one)
    assert not np.asarray(to_student["logits"]).any()
    assert float(to_dual) == 0.0


def enumerated_gradient(baseline, gamma=1.0, weighted=False):
    """Expectation of the student's gradient over all ordered pairs of samples."""
    objective = make_pbkd(
        MODEL,
        tabular_rewards,
        gamma=gamma,
        baseline=baseline,
        discount_weighting=weighted,
    )
    pairs = np.array(list(itertools.product(range(31), repeat=2)))

    @jax.jit
    def row_gradients(x, rows):
        def total(theta, row):
            batch = game_batch()
            single = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), row)
            batch = GameBatch(batch.demonstrations, single, batch.preferences)
            return objective.student_loss(
                theta, critic(), None, batch, signal(), None
            ).total

        return jax.vmap(jax.grad(total), in_axes=(None, 0))(student(), rows)["logits"]

    mean = np.zeros(BED_E.table_shape)
    for x in range(2):
        conditional = BED_E.weights(STUDENT)[x] / BED_E.prompt_weights[x]
        weights = conditional[pairs[:, 0]] * conditional[pairs[:, 1]]
        rows = bed_sequences(np.full_like(pairs, x), pairs)
        grads = np.asarray(row_gradients(x, rows))
        mean += BED_E.prompt_weights[x] * np.tensordot(weights, grads, 1)
    return mean


@pytest.mark.parametrize("baseline", ["loo_per_step", "loo_return", "none"])
def test_student_gradient_is_unbiased_by_enumeration(baseline):
    expected = -BED_E.policy_gradient(STUDENT, REWARD)
    np.testing.assert_allclose(enumerated_gradient(baseline), expected, atol=1e-9)


def test_discount_weighting_makes_the_discounted_gradient_exact():
    expected = -BED_E.policy_gradient(STUDENT, REWARD, gamma=0.9)
    exact = enumerated_gradient("loo_per_step", gamma=0.9, weighted=True)
    np.testing.assert_allclose(exact, expected, atol=1e-9)
    common = enumerated_gradient("loo_per_step", gamma=0.9)
    np.testing.assert_allclose(np.abs(common - expected).max(), 8.7e-3, atol=5e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sft_weight_adds_the_mean_nll_of_the_teachers_responses(temperature):
    batch = game_batch()

    def loss(weight):
        objective = make_pbkd(
            MODEL, tabular_rewards, sft_weight=weight, temperature=temperature
        )
        return jax.jit(
            lambda theta: objective.student_loss(
                theta, critic(), None, batch, signal(), None
            )
        )

    log_probs = BED_E.sequence_log_probs(STUDENT / temperature)[DEMONSTRATIONS]
    nll = -log_probs / BED_E.mask.sum(-1)[DEMONSTRATIONS[1]]
    weighted = loss(0.7)
    with_it, without = weighted(student()), loss(0.0)(student())
    assert "student/sft" not in without.metrics
    added = float(with_it.total - without.total)
    np.testing.assert_allclose(added, 0.7 * nll.sum(), rtol=1e-9)
    metric = with_it.metrics["student/sft"]
    np.testing.assert_allclose(metric.total / metric.weight, nll.mean(), rtol=1e-9)
    check_grads(lambda t: weighted(t).total, (student(),), order=1, modes=["rev"])


@pytest.mark.parametrize(
    ("scale", "slack", "climb"),
    [
        ("relative", 0.03, 0.03 / 0.02),
        ("relative", 9.0, 4.0),
        ("relative", -9.0, -4.0),
        ("raw", 0.03, 0.03),
        ("raw", 9.0, 4.0),
    ],
)
def test_dual_step_reads_the_slack_and_fixed_lambda_has_none(scale, slack, climb):
    objective = make_pbkd(
        MODEL,
        tabular_rewards,
        epsilon=0.02,
        dual_scale=scale,
        dual_step_size=0.5,
        slack_clip=4.0,
    )
    moved = objective.dual_step(jnp.asarray(3.0), {"critic/slack": jnp.asarray(slack)})
    np.testing.assert_allclose(moved, 3.0 + 0.5 * climb, rtol=1e-6)
    fixed = make_pbkd(MODEL, tabular_rewards, constraint="fixed_lambda")
    assert fixed.dual_step is None


BAD = [
    ("baseline", "mean"),
    ("constraint", "hard"),
    ("dual_scale", "log"),
    ("epsilon", 0.0),
    ("gamma", 0.0),
    ("temperature", 0.0),
    ("dual_step_size", -1.0),
    ("slack_clip", 0.0),
    ("l2", -0.1),
    ("sft_weight", -0.1),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        make_pbkd(MODEL, tabular_rewards, **{name: value})


def test_reward_model_is_the_bradley_terry_loss_and_counts_hits():
    out = make_reward_model(tabular_rewards).student_loss(
        critic(), None, None, preference_batch(), PreferenceSignal(), None
    )
    returns = BED_E.returns(REWARD)
    np.testing.assert_allclose(out.total, pair_nll(returns).sum(), rtol=1e-10)
    margin = returns[0][PAIRS[1][:, 0]] - returns[0][PAIRS[1][:, 1]]
    hits = out.metrics["reward_model/accuracy"]
    assert float(hits.total) == (margin > 0).sum()
    assert float(out.weight) == len(LABELS)
