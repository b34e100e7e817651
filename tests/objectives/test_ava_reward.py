"""AVA's reward: its weights from attention, its use in a game, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.models.api import response_states
from rkd_jax.models.attention_weights import response_attention
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.heads import GaussianHead
from rkd_jax.objectives.ava import ava_token_rewards, make_ava_p
from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.training import init_state, make_update
from tests.models.reference import QWEN, random_params
from tests.objectives import game_batch as game
from tests.objectives.ava_pairs import (
    INDICES,
    LABELS,
    LENGTHS,
    LOG_STD,
    MEAN,
    MODEL,
    NUMBERS,
    Q_TABLE,
    demonstrations,
    evaluate,
    make_d,
    make_p,
    params,
    preferences,
)
from tests.tabular.bed import (
    BED_E,
    REWARD,
    STUDENT,
    TabularLM,
    log_softmax,
    single,
    tabular_rewards,
)
from tests.tabular.posterior import tabular_action_values, tabular_posterior

pytestmark = pytest.mark.usefixtures("x64")

# The reward weight


def table_weights(policy, sequences):
    """An arbitrary weight of every token that depends on the policy; NaN in padding."""
    states = response_states(MODEL, policy, sequences).before
    weights = jax.nn.sigmoid(MODEL.unembed(policy, states)[..., 0])
    return jnp.where(sequences.response_mask, weights, jnp.nan)


def ones(policy, sequences):
    del policy
    return jnp.ones(sequences.targets.shape)


def test_weights_of_one_are_no_weights():
    for make, batch in ((make_d, demonstrations()), (make_p, preferences())):
        plain = evaluate(make(), batch)
        weighted = evaluate(make(reward_weights=ones), batch)
        assert float(weighted[0].metrics.pop("student/last_weight").total) > 0
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
            weighted,
            plain,
        )


def test_weights_reach_both_heads_and_their_own_gradient():
    """A Q head and a posterior whose tables already hold the weighted values."""
    weights = 1 / (1 + np.exp(-STUDENT[..., :1]))
    q_head = {"logits": jnp.asarray(Q_TABLE)}
    options = {"q_head": tabular_action_values, "q_source": "q_head", "td_weight": 0.3}
    found, gradient = evaluate(
        make_d(**options, reward_weights=table_weights),
        demonstrations(),
        params(q_head=q_head),
    )
    head = {"mean": weights * MEAN, "log_std": weights * LOG_STD}
    scaled = params(
        q_head={"logits": jnp.asarray(weights * Q_TABLE)},
        reward_head=jax.tree.map(jnp.asarray, head),
    )
    expected, slopes = evaluate(make_d(**options), demonstrations(), scaled)
    np.testing.assert_allclose(found.total, expected.total, rtol=1e-12)
    to_weights = sum(
        np.asarray(slope) * table
        for slope, table in (
            (slopes["q_head"]["logits"], Q_TABLE),
            (slopes["reward_head"]["mean"], MEAN),
            (slopes["reward_head"]["log_std"], LOG_STD),
        )
    ).sum(-1)
    chained = to_weights * (weights * (1 - weights))[..., 0]
    to_policy = np.asarray(gradient["policy"]["logits"])
    np.testing.assert_allclose(to_policy[..., 0], chained, atol=1e-12)
    assert not to_policy[..., 1:].any()
    last = found.metrics["student/last_weight"]
    ends = [
        weights[x, BED_E.states[i][n - 1], 0]
        for x, i, n in np.stack([NUMBERS, INDICES, LENGTHS], -1).reshape(-1, 3)
    ]
    np.testing.assert_allclose(last.total / last.weight, np.mean(ends), rtol=1e-6)


@pytest.mark.float32
def test_a_decoders_own_attention_as_the_weight():
    model, head, batch = Decoder(QWEN), GaussianHead(), preferences()
    at = {
        "policy": random_params(QWEN),
        "reward_head": head.init(jax.random.key(1), QWEN.hidden_size),
    }
    at["reward_head"]["output"]["bias"] = jnp.asarray([0.4, -0.3])

    found = []

    def attention(policy, sequences):
        found.append(response_attention(model, policy, sequences))
        return found[-1]

    loss = make_ava_p(model, head.apply, reward_weights=attention).student_loss

    @jax.jit
    def both(at):
        out = loss(at, None, None, batch, None, None)
        return found.pop(), out

    weights, out = both(at)
    ends = np.take_along_axis(np.asarray(weights), LENGTHS[..., None] - 1, -1)[..., 0]
    found = out.metrics["student/last_weight"]
    np.testing.assert_allclose(found.total / found.weight, ends.mean(), rtol=1e-5)
    assert ends[LENGTHS == 1] == pytest.approx(1.0)
    # The head says 0.4 everywhere, so the contrast is that of the last weights.
    ahead = 1 / (1 + np.exp(-0.4 * (ends[:, 0] - ends[:, 1])))
    expected = (LABELS * ahead + (1 - LABELS) * (1 - ahead)).mean()
    found = out.metrics["student/contrast"]
    np.testing.assert_allclose(found.total / found.weight, expected, rtol=1e-5)


# The dense reward


def rewarded(mean):
    return params(reward_head={"mean": mean, "log_std": jnp.zeros_like(mean)})


def test_dense_reward_is_a_player_of_the_game_like_the_table_it_is():
    batch, signal, theta = game.game_batch(), game.signal(), game.student()

    def loss(token_rewards, phi):
        objective = make_pbkd(MODEL, token_rewards)
        arguments = (theta, jnp.asarray(2.5), None, batch, signal, None)
        return objective.critic_loss(phi, *arguments).total

    @jax.jit
    def both(mean):
        dense = ava_token_rewards(MODEL, tabular_posterior)
        own = jax.value_and_grad(lambda m: loss(dense, rewarded(m)))(mean)
        table = jax.value_and_grad(lambda m: loss(tabular_rewards, {"rewards": m}))
        return own, table(mean)

    own, table = both(jnp.asarray(REWARD))
    assert np.abs(own[1]).max() > 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        own,
        table,
    )


def test_dense_reward_reads_the_state_it_was_trained_on():
    sequences = preferences().sequences
    at = rewarded(jnp.asarray(MEAN))
    after = ava_token_rewards(MODEL, tabular_posterior)(at, sequences)
    before = ava_token_rewards(MODEL, tabular_posterior, reward_input="state")
    expected = BED_E.taken(MEAN)[NUMBERS, INDICES]
    np.testing.assert_allclose(after, expected, atol=1e-12)
    shifted = np.pad(expected[..., :-1], ((0, 0), (0, 0), (1, 0)))
    shifted = np.where(sequences.response_mask, shifted, 0.0)
    np.testing.assert_allclose(before(at, sequences), shifted, atol=1e-12)
    weighted = ava_token_rewards(MODEL, tabular_posterior, reward_weights=table_weights)
    weights = np.nan_to_num(table_weights(at["policy"], sequences))
    np.testing.assert_allclose(weighted(at, sequences), weights * expected, atol=1e-12)
    with pytest.raises(ValueError, match="features"):
        weighted(at, sequences, jnp.zeros((3, 2, 4, 5)))


# Training


def test_direct_alignment_moves_policy_and_reward_towards_the_preferences():
    """Through the library's update, from a policy that prefers the other response."""
    model, head = TabularLM(), GaussianHead()
    start = {
        "policy": {"logits": jnp.asarray(STUDENT, jnp.float32)},
        "reward_head": head.init(jax.random.key(0), model.config.hidden_size),
    }
    optimizer = optax.adam(0.05)
    state = init_state(start, student_optimizer=optimizer, rng=jax.random.key(1))
    objective = make_ava_p(model, head.apply, reject_floor=-4.0)
    update = make_update(objective, student_optimizer=optimizer)
    batch = single(preferences(np.ones(3)))
    for _ in range(150):
        state, metrics = update(state, None, batch, None)
    logits = np.asarray(state.student.params["policy"]["logits"], np.float64)
    before, after = (
        BED_E.sequence_log_probs(table)[NUMBERS, INDICES] for table in (STUDENT, logits)
    )
    assert (np.diff(after) < np.diff(before) - 1.0).all()
    assert (np.diff(after) < 0).all()
    assert (np.diff(before) > 0).any()
    assert float(metrics["student/reward_accuracy"]) == 1.0
    assert float(metrics["student/contrast"]) > 0.6
    # The floor: momentum carries a rejected token a little beyond it, not for ever.
    tokens = BED_E.taken(log_softmax(logits))[NUMBERS[:, 1], INDICES[:, 1]]
    assert -8.0 < tokens.min() < -3.0
