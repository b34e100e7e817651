"""Reward players of PbKD that read states, and facts of the game they play in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rkd_jax.models.heads import (
    SEQUENCE_HEAD,
    TOKEN_HEAD,
    RewardModel,
    head_sequence_rewards,
    head_token_rewards,
)
from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.signals.teacher import make_features
from rkd_jax.types import GameSignal
from tests.objectives.game_batch import (
    ANCHOR,
    DEMONSTRATIONS,
    MODEL,
    ROLLOUTS,
    critic,
    game_batch,
    pair_nll,
    signal,
    student,
)
from tests.tabular.bed import BED_E, REWARD, tabular_rewards

pytestmark = pytest.mark.usefixtures("x64")

# Rewards read from states: a linear head on the tree's one-hot states is a table


def head_params(table):
    """A head whose value after action a from prefix k of prompt x is the table's."""
    kernel = np.zeros((2, 1 + table[0].size))
    kernel[:, 1:] = table.reshape(2, -1)
    output = {"kernel": jnp.asarray(kernel.reshape(-1, 1)), "bias": jnp.zeros(1)}
    return {"output": output}


@functools.cache
def signal_with_features():
    read, batch = functools.partial(make_features(MODEL), student()), game_batch()
    return GameSignal(
        anchor_nll=jnp.asarray(ANCHOR),
        demonstrations=read(batch.demonstrations.sequences),
        rollouts=read(batch.rollouts),
        preferences=read(batch.preferences.sequences),
    )


def play(objective, found):
    """Jitted: reward player's parameters -> its loss and the student's gradient."""
    batch = game_batch()

    @jax.jit
    def both(params):
        out = objective.critic_loss(
            params, student(), jnp.asarray(2.5), None, batch, found, None
        )

        def total(theta):
            return objective.student_loss(theta, params, None, batch, found, None).total

        return out.total / out.weight, jax.grad(total)(student())["logits"]

    return both


# Where an action ends the response: EOS anywhere, any action from a deepest prefix.
ENDS = (np.arange(3) == 2)[None, None] | (np.arange(15) >= 7)[None, :, None]


@functools.cache
def on_features(credit):
    make = {"token": head_token_rewards, "sequence": head_sequence_rewards}[credit]
    return play(make_pbkd(MODEL, make(SEQUENCE_HEAD)), signal_with_features())


def test_2_8_9_a_sequence_head_is_a_token_head_with_only_the_last_reward():
    loss, gradient = on_features("sequence")(head_params(REWARD))
    last_only = head_params(np.where(ENDS, REWARD, 0.0))
    expected = on_features("token")(last_only)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-12, atol=1e-14)

    # The same in numpy: the scalar, in (-5, 5), is the return.
    last = BED_E.mask.sum(-1) - 1
    returns = 5.0 * np.tanh(BED_E.taken(REWARD)[:, np.arange(31), last] / 5.0)
    gap = returns[DEMONSTRATIONS].mean() - returns[ROLLOUTS].mean()
    slack = (pair_nll(returns) - ANCHOR).mean() - 0.02
    np.testing.assert_allclose(loss, -gap + 2.5 * slack, rtol=1e-10)


@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_a_head_on_features_is_the_reward_model_with_that_trunk(credit):
    whole, head = RewardModel(MODEL, SEQUENCE_HEAD), head_params(REWARD)
    own = {"token": whole.token_rewards, "sequence": whole.sequence_rewards}[credit]
    params = {"trunk": {"logits": jnp.zeros(REWARD.shape)}, "head": head}
    loss, gradient = play(make_pbkd(MODEL, own), signal())(params)
    run = on_features(credit)
    expected = run(head)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-12, atol=1e-14)
    check_grads(lambda h: run(h)[0], (head,), order=1, modes=["rev"])


def test_g3_the_anchor_and_the_features_get_exactly_no_gradient():
    objective = make_pbkd(MODEL, head_token_rewards(TOKEN_HEAD))

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(head, frozen):
        return objective.critic_loss(
            head, student(), jnp.asarray(2.0), None, game_batch(), frozen, None
        ).total

    to_head, to_frozen = jax.jit(gradients)(head_params(REWARD), signal_with_features())
    assert np.abs(to_head["output"]["kernel"]).max() > 0.1
    leaves = jax.tree.leaves(to_frozen)
    assert len(leaves) == 4
    assert not any(np.asarray(leaf).any() for leaf in leaves)


@pytest.mark.parametrize("make", [head_token_rewards, head_sequence_rewards])
def test_features_may_hold_anything_in_padding(make):
    rewards = make(TOKEN_HEAD)
    sequences = game_batch().rollouts
    clean = signal_with_features().rollouts
    dirty = jnp.where(jnp.expand_dims(sequences.response_mask, -1), clean, jnp.nan)

    def total(params, features):
        values = rewards(params, sequences, features)
        return jnp.square(values).sum(), values

    run = jax.jit(jax.grad(total, has_aux=True))
    gradient, values = run(head_params(REWARD), clean)
    dirty_gradient, dirty_values = run(head_params(REWARD), dirty)
    np.testing.assert_array_equal(dirty_values, values)
    jax.tree.map(np.testing.assert_array_equal, dirty_gradient, gradient)
    kept = BED_E.mask[ROLLOUTS[1]]
    assert np.abs(np.asarray(values)[kept]).max() > 0.1
    assert not np.asarray(values)[~kept].any()


def test_a_reward_player_without_its_input_says_so():
    sequences, features = game_batch().rollouts, signal_with_features().rollouts
    with pytest.raises(ValueError, match="needs features"):
        head_token_rewards(TOKEN_HEAD)({}, sequences, None)
    with pytest.raises(ValueError, match="trunk of its own"):
        RewardModel(MODEL, TOKEN_HEAD).token_rewards({}, sequences, features)
    with pytest.raises(AssertionError):
        head_sequence_rewards(TOKEN_HEAD)({}, sequences, features[0])


# Facts of the game, through the objective


@functools.cache
def metrics_of(gamma):
    """Jitted: reward table -> the reward player's metrics."""
    objective = make_pbkd(MODEL, tabular_rewards, gamma=gamma)
    args = student(), jnp.asarray(1.0), None, game_batch(), signal(), None
    return jax.jit(
        lambda table: objective.critic_loss({"rewards": table}, *args).metrics
    )


def critic_metrics(table, gamma=1.0):
    """Means of the reward player's metrics under a reward table."""
    metrics = metrics_of(gamma)(jnp.asarray(table))
    return {name: float(m.total / m.weight) for name, m in metrics.items()}


def test_p1_shaping_changes_neither_gap_nor_likelihood():
    """gamma Phi(s') - Phi(s), Phi(terminal) = 0; both sides have the same prompts."""
    gamma, generator = 0.9, np.random.default_rng(0)
    potential = generator.normal(size=(2, BED_E.prefixes))
    shaped = REWARD - potential[:, :, None]
    for k in range(7):
        shaped[:, k, :2] += gamma * potential[:, 2 * k + 1 : 2 * k + 3]
    plain, moved = (critic_metrics(table, gamma) for table in (REWARD, shaped))
    for name in ("critic/gap", "critic/nll", "critic/slack"):
        assert moved[name] == pytest.approx(plain[name], abs=1e-9)


def test_trap_a_constant_reward_wins_on_length_alone_and_the_metrics_show_it():
    found = critic_metrics(np.full(REWARD.shape, 0.3))
    longer = found["critic/teacher_length"] - found["critic/student_length"]
    assert longer > 0.1
    assert found["critic/gap"] == pytest.approx(0.3 * longer, rel=1e-6)


def test_the_anchor_must_be_of_the_same_pairs():
    other = GameSignal(anchor_nll=jnp.asarray(ANCHOR[:3]))
    with pytest.raises(AssertionError):
        play(make_pbkd(MODEL, tabular_rewards), other)(critic())


@jax.jit
def both_players(batch, frozen):
    """Gradient and output of each player, the reward player first."""
    objective = make_pbkd(MODEL, head_token_rewards(TOKEN_HEAD), sft_weight=0.3)
    args = (None, batch, frozen, None)

    def of_critic(head):
        out = objective.critic_loss(head, student(), jnp.asarray(2.5), *args)
        return out.total, out

    def of_student(theta):
        out = objective.student_loss(theta, head_params(REWARD), *args)
        return out.total, out

    return (
        jax.grad(of_critic, has_aux=True)(head_params(REWARD)),
        jax.grad(of_student, has_aux=True)(student()),
    )


def test_micro_batches_add_up():
    everything = game_batch(), signal_with_features()
    halves = [jax.tree.map(lambda x, i=i: x[i::2], everything) for i in (0, 1)]
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-6, atol=1e-14),
        *[both_players(*half) for half in halves],
        both_players(*everything),
    )


def test_padding_rows_may_hold_anything():
    """A prompt and a pair without any token, NaN wherever a number is."""

    def pad(x):
        fill = np.nan if x.dtype.kind == "f" else 0
        return np.concatenate([x, np.full((1, *x.shape[1:]), fill, x.dtype)])

    arrays = jax.tree.map(np.asarray, (game_batch(), signal_with_features()))
    expected = both_players(*arrays)
    assert [float(out.weight) for _, out in expected] == [2.0, 2.0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
        both_players(*jax.tree.map(pad, arrays)),
        expected,
    )
