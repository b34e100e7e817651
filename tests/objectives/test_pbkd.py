"""PbKD's two losses and the anchor's on the enumerable bed, against float64 numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.objectives.reward_model import make_reward_model
from rkd_jax.types import (
    DemonstrationBatch,
    GameBatch,
    GameSignal,
    PreferenceBatch,
    PreferenceSignal,
)
from tests.tabular.bed import (
    BED_E,
    REWARD,
    STUDENT,
    TabularLM,
    bed_sequences,
    tabular_rewards,
)

MODEL = TabularLM()
DEMONSTRATIONS = (np.array([0, 1]), np.array([3, 11]))
ROLLOUTS = (np.array([[0] * 3, [1] * 3]), np.array([[0, 5, 30], [2, 2, 17]]))
PAIRS = (np.zeros((4, 2), int), np.array([[1, 9], [4, 20], [30, 0], [8, 13]]))
LABELS, ANCHOR = np.array([1.0, 0.8, 0.0, 0.5]), np.array([0.4, 0.5, 0.6, 0.2])


pytestmark = pytest.mark.usefixtures("x64")


def preference_batch():
    sequences = bed_sequences(*PAIRS)
    return PreferenceBatch(
        sequences,
        sequences,
        jnp.asarray(LABELS),
        jnp.full(PAIRS[0].shape, jnp.nan),
        jnp.arange(len(LABELS)),
    )


def game_batch(rollouts=ROLLOUTS):
    demonstrations = bed_sequences(*DEMONSTRATIONS)
    return GameBatch(
        DemonstrationBatch(demonstrations, demonstrations, jnp.arange(2)),
        bed_sequences(*rollouts),
        preference_batch(),
    )


def signal():
    return GameSignal(anchor_nll=jnp.asarray(ANCHOR))


def student():
    return {"logits": jnp.asarray(STUDENT)}


def critic():
    return {"rewards": jnp.asarray(REWARD)}


def pair_nll(returns):
    margin = returns[PAIRS[0][:, 0], PAIRS[1][:, 0]]
    margin = margin - returns[PAIRS[0][:, 1], PAIRS[1][:, 1]]
    wins, losses = np.logaddexp(0, -margin), np.logaddexp(0, margin)
    return LABELS * wins + (1 - LABELS) * losses


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("hinge", [False, True])
def test_critic_loss_is_minus_the_gap_plus_lambda_times_the_slack(gamma, hinge):
    objective = make_pbkd(
        MODEL, tabular_rewards, gamma=gamma, epsilon=0.05, hinge=hinge
    )
    out = objective.critic_loss(
        critic(), student(), jnp.asarray(2.5), None, game_batch(), signal(), None
    )
    returns = BED_E.returns(REWARD, gamma)
    gap = returns[DEMONSTRATIONS].mean() - returns[ROLLOUTS].mean()
    slack = (pair_nll(returns) - ANCHOR).mean() - 0.05
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

    def student_total(reward):
        return objective.student_loss(
            student(), reward, None, batch, signal(), None
        ).total

    def critic_total(theta, dual):
        return objective.critic_loss(
            critic(), theta, dual, None, batch, signal(), None
        ).total

    assert not np.asarray(jax.grad(student_total)(critic())["rewards"]).any()
    to_student, to_dual = jax.grad(critic_total, argnums=(0, 1))(student(), one)
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


def test_sft_weight_adds_the_mean_nll_of_the_teachers_responses():
    batch = game_batch()

    def total(weight):
        objective = make_pbkd(MODEL, tabular_rewards, sft_weight=weight)
        out = objective.student_loss(student(), critic(), None, batch, signal(), None)
        return float(out.total)

    log_probs = BED_E.sequence_log_probs(STUDENT)[DEMONSTRATIONS]
    nll = -log_probs / BED_E.mask.sum(-1)[DEMONSTRATIONS[1]]
    np.testing.assert_allclose(total(0.7) - total(0.0), 0.7 * nll.sum(), rtol=1e-9)


def test_dual_step_reads_the_slack_and_fixed_lambda_has_none():
    objective = make_pbkd(MODEL, tabular_rewards, epsilon=0.02, dual_step_size=0.5)
    moved = objective.dual_step(jnp.asarray(1.0), {"critic/slack": jnp.asarray(0.03)})
    np.testing.assert_allclose(moved, 1.0 + 0.5 * 0.03 / 0.02, rtol=1e-6)
    fixed = make_pbkd(MODEL, tabular_rewards, constraint="fixed_lambda")
    assert fixed.dual_step is None


@pytest.mark.parametrize("bad", [{"baseline": "mean"}, {"constraint": "hard"}])
def test_unknown_options_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad.values()))):
        make_pbkd(MODEL, tabular_rewards, **bad)


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
