"""Methods on pairs that read packed rows, against the same pairs one by one or padded.

Where no pair is, and wherever else nothing may be read, stands NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.data.collate import collate
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.models.heads import ScalarHead, head_sequence_rewards, head_token_rewards
from rkd_jax.objectives.drdo import make_drdo, make_drdo_oracle
from rkd_jax.objectives.edpo import make_ddpo, make_dpdpo, make_edpo, make_pdpo
from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.objectives.policy import target_log_probs
from rkd_jax.objectives.tvkd import make_tvkd
from rkd_jax.signals.teacher import make_features
from rkd_jax.training.state import init_state
from rkd_jax.training.update import make_update
from rkd_jax.types import (
    AnchoredPairs,
    EnsembleSignal,
    GameBatch,
    GameSignal,
    ReferenceSignal,
    Sequences,
    ShapingSignal,
)
from tests.objectives.packed_rows import (
    COUPLES,
    EXPERT,
    MODEL,
    PAIR_LABELS,
    REWARD,
    SINGLES,
    STUDENT,
    TEACHER,
    assert_equal,
    bradley_terry,
    order,
    packed,
    params,
    reward_params,
    value_and_gradient,
    wide,
)

pytestmark = pytest.mark.usefixtures("x64")

LIMITS = TokenizeConfig(8, 8)
REWARDS = np.random.default_rng(3).normal(size=(4, 2))  # of the pairs, by an oracle


def spread(batch, values):
    """``[4, ...]`` at the records' entries of packed rows, NaN at all others."""
    found = np.full((*batch.label.shape, *values.shape[1:]), np.nan)
    for place, value in zip(order(batch), values, strict=True):
        found[place] = value
    return jnp.asarray(found)


def both_layouts(*values):
    """The pairs packed and padded, each with the values ``[4, ...]`` where it asks."""
    batch, padded = wide(packed(COUPLES, spare=3)), wide(collate(COUPLES, LIMITS))
    unread = np.where(batch.index < 0, np.nan, batch.label)
    batch = dataclasses.replace(
        batch, label=unread, rewards=np.asarray(spread(batch, REWARDS))
    )
    padded = dataclasses.replace(padded, rewards=REWARDS)
    return (
        (batch, *(spread(batch, each) for each in values)),
        (padded, *map(jnp.asarray, values)),
    )


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("sign", [1, -1])
def test_tvkd_of_packed_pairs_is_the_sum_over_pairs(sign):
    """The shaping is a margin: scale s alpha, beside log-ratios of scale beta."""
    beta, alpha = 0.3, 0.7
    reference, shaping = drawn(1, 4, 2) - 5.0, drawn(2, 4, 2)
    (batch, *signal), _ = both_layouts(reference, shaping)

    def log_prob(weights, sequences):
        return target_log_probs(MODEL, weights, sequences).sum()

    objective = make_tvkd(MODEL, beta=beta, alpha=alpha, sign=sign)
    assert objective.packed
    found, gradient = value_and_gradient(
        objective, params(), batch, ShapingSignal(*signal)
    )
    assert float(found.weight) == 4.0
    offset = reference - sign * alpha / beta * shaping
    expected = bradley_terry(log_prob, params(), scale=beta, offset=offset)
    assert_equal((found.total, gradient), expected)
    added = sign * alpha * (shaping[:, 0] - shaping[:, 1])
    metric = found.metrics["student/shaping_margin"]
    np.testing.assert_allclose(metric.total, added.sum(), rtol=1e-6)


def with_head(seed=0):
    whole = reward_params(seed)
    return {"policy": whole["trunk"], "reward_head": whole["head"]}


DRDO = {
    "head": make_drdo(MODEL, REWARD.head, oracle_scale=2.0),
    "sums": make_drdo(MODEL, REWARD.head, length_norm=False, temperature=0.7),
    "implicit": make_drdo(MODEL, reward_source="implicit", beta=0.3),
}


@pytest.mark.parametrize("kind", DRDO)
def test_drdo_reads_packed_and_padded_pairs_alike(kind):
    weights = with_head()
    if kind == "implicit":
        del weights["reward_head"]
    assert DRDO[kind].packed
    found, expected = (
        value_and_gradient(DRDO[kind], weights, batch, ())
        for (batch,) in both_layouts()
    )
    assert float(found[0].weight) == 4.0
    assert float(found[0].metrics["student/distillation"].total) > 1.0
    assert_equal(found, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_so_does_its_oracle(alpha):
    objective = make_drdo_oracle(REWARD, alpha=alpha)
    assert objective.packed
    found, expected = (
        value_and_gradient(objective, reward_params(), batch, ())
        for (batch,) in both_layouts()
    )
    assert ("reward_model/language_nll" in found[0].metrics) == (alpha > 0)
    assert_equal(found, expected)


ENSEMBLE = {
    "min": make_edpo(MODEL, beta=0.3, kappa=0.0),
    "softmin": make_edpo(MODEL, beta=0.3, kappa=0.0, reduce="softmin"),
    "mean": make_edpo(MODEL, beta=0.3, kappa=0.0, reduce="mean"),
    "d-DPO": make_ddpo(MODEL, beta=0.3),
    "p-DPO": make_pdpo(MODEL, beta=0.3, kappa=0.0),
}


@pytest.mark.parametrize("name", ENSEMBLE)
def test_without_a_penalty_rewards_are_distilled_from_packed_pairs(name):
    rewards = drawn(5, 4, 2, 1 if name == "d-DPO" else 3)
    assert ENSEMBLE[name].packed
    found, expected = (
        value_and_gradient(
            ENSEMBLE[name],
            params(),
            AnchoredPairs(batch),
            EnsembleSignal(*signal) if name != "p-DPO" else ReferenceSignal(signal[0]),
        )
        for batch, *signal in both_layouts(drawn(1, 4, 2) - 5.0, rewards)
    )
    assert float(found[0].weight) == 4.0
    assert_equal(found, expected)


def test_the_running_means_follow_packed_pairs():
    objective = make_edpo(MODEL, beta=0.3, kappa=0.0, reduce="ema_min")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def follow(critic, batch, signal):
        given = (params(), 1.0, None, AnchoredPairs(batch), EnsembleSignal(*signal))
        out = objective.critic_loss(critic, *given, None)
        return out.total, out

    means = {"means": jnp.asarray([0.5, 1.0, 2.0])}
    found, expected = (
        follow(means, batch, signal)
        for batch, *signal in both_layouts(drawn(1, 4, 2), drawn(5, 4, 2, 3))
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("make", [make_edpo, make_dpdpo, make_pdpo])
def test_a_penalty_is_on_samples_of_the_rows_and_refuses_packed_ones(make):
    objective = make(MODEL, kappa=0.1)
    update = make_update(objective, student_optimizer=optax.sgd(0.1))
    state = init_state(
        params(), student_optimizer=optax.sgd(0.1), rng=jax.random.key(0)
    )
    (batch, *signal), _ = both_layouts(drawn(1, 4, 2), drawn(5, 4, 2, 1))
    with pytest.raises(ValueError, match="objective '.*': these rows are packed"):
        update(state, None, AnchoredPairs(batch), EnsembleSignal(*signal))


# The game: packed pairs beside prompts that have a row each.

ANCHOR = np.array([0.4, 0.5, 0.6, 0.2])
HEAD = ScalarHead(bound=2.0)


def rollouts():
    """Of three prompts, two samples each, one of them empty."""
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, STUDENT.vocab_size, (3, 2, 9)).astype(np.int32)
    lengths = np.array([[4, 1], [0, 3], [2, 2]])
    mask = np.arange(4) < lengths[..., None]
    prompts = np.ones((3, 2, 5), bool)
    return Sequences(tokens, np.concatenate([prompts, mask], -1), mask)


def trunk_states(sequences):
    """NaN where there is no target."""
    found = make_features(EXPERT)(params(TEACHER, seed=1), sequences)
    mask = sequences.response_mask[..., None]
    return jnp.where(mask, found, jnp.nan)


def head_params():
    kernel = 0.3 * drawn(7, TEACHER.hidden_size, 1)
    return {"output": {"kernel": kernel, "bias": np.full(1, 0.1)}}


def games(own_trunk):
    """The same game with packed and with padded pairs."""
    demonstrations, samples = collate(SINGLES, TokenizeConfig(9, 7)), rollouts()
    states = (lambda s: None) if own_trunk else trunk_states
    fixed = states(demonstrations.sequences), states(samples)
    for pairs, anchor in both_layouts(ANCHOR):
        signal = GameSignal(anchor, *fixed, states(pairs.sequences))
        yield GameBatch(demonstrations, samples, pairs), signal


PLAYERS = {
    "token": (head_token_rewards(HEAD), head_params),
    "sequence": (head_sequence_rewards(HEAD), head_params),
    "trunk": (REWARD.token_rewards, reward_params),
}


def play(objective, critic, game):
    """Jitted: both losses, each with its gradients in both players."""
    batch, signal = game

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def reward_player(critic, student):
        dual = jnp.asarray(2.5)
        out = objective.critic_loss(critic, student, dual, None, batch, signal, None)
        return out.total, out

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def policy(critic, student):
        out = objective.student_loss(student, critic, None, batch, signal, None)
        return out.total, out

    return jax.jit(lambda *players: (reward_player(*players), policy(*players)))(
        critic, params()
    )


@pytest.mark.parametrize("kind", PLAYERS)
def test_the_game_reads_packed_and_padded_pairs_alike(kind):
    rewards, begin = PLAYERS[kind]
    objective = make_pbkd(
        MODEL, rewards, gamma=0.9, epsilon=0.05, l2=0.01, sft_weight=0.3
    )
    assert objective.packed
    found, expected = (
        play(objective, begin(), game) for game in games(kind == "trunk")
    )
    assert_equal(found, expected)
    ((to_critic, across), out), ((to_reward, to_student), _) = found
    assert float(out.metrics["critic/nll"].weight) == 4.0
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(to_critic)) > 1e-3
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(to_student)) > 1e-3
    for leaf in jax.tree.leaves((across, to_reward)):
        assert not np.asarray(leaf).any()  # exactly


def test_the_constraint_is_bradley_terry_on_the_pairs():
    """Nothing of the library but the rewards of each response by itself."""
    objective = make_pbkd(MODEL, REWARD.token_rewards, epsilon=0.05)
    (batch, signal), _ = games(own_trunk=True)
    out = objective.critic_loss(
        reward_params(), params(), jnp.asarray(1.0), None, batch, signal, None
    )
    nll, _ = bradley_terry(
        lambda weights, s: REWARD.token_rewards(weights, s)[0].sum(), reward_params()
    )
    assert len(PAIR_LABELS) == 4
    np.testing.assert_allclose(out.metrics["critic/nll"].total, nll, rtol=1e-9)
    slack = out.metrics["critic/slack"]
    np.testing.assert_allclose(
        slack.total / slack.weight, (nll - ANCHOR.sum()) / 4 - 0.05, rtol=1e-9
    )


@pytest.mark.parametrize("kind", ["token", "trunk"])
def test_micro_batches_with_unequal_numbers_of_pairs_add_up(kind):
    """Three of packed rows, against the whole of padded ones, two critic steps."""
    rewards, begin = PLAYERS[kind]
    sgd, players, metrics = optax.sgd(0.1), [], []
    packed_game, padded_game = games(kind == "trunk")
    rows = (packed_game[0].preferences.index >= 0).sum(-1)
    assert (rows[:3] + rows[3:]).tolist() == [1, 1, 2]  # pairs of each micro-batch
    for (batch, signal), parts in ((packed_game, 3), (padded_game, 1)):
        update = make_update(
            make_pbkd(MODEL, rewards, epsilon=0.05, l2=0.01, sft_weight=0.3),
            student_optimizer=sgd,
            critic_optimizer=sgd,
            critic_steps=2,
            accumulation=parts,
        )
        state = init_state(
            params(),
            student_optimizer=sgd,
            critic_params=begin(),
            critic_optimizer=sgd,
            dual=2.5,
            rng=jax.random.key(0),
        )
        state, found = update(state, None, batch, signal)
        players.append((state.student.params, state.critic.params, state.dual))
        metrics.append(found)
    # The multiplier is float32 whatever the rest is.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, *players)
    jax.tree.map(close, *metrics)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), players[0][1], begin())
    assert max(jax.tree.leaves(moved)) > 1e-2


@pytest.mark.parametrize("what", ["demonstrations", "rollouts"])
def test_prompts_of_a_game_are_not_packed(what):
    objective = make_pbkd(MODEL, REWARD.token_rewards)
    (batch, signal), _ = games(own_trunk=True)
    rows = packed()
    wrong = rows if what == "demonstrations" else rows.sequences
    batch = dataclasses.replace(batch, **{what: wrong})
    for loss, players in (
        (objective.critic_loss, (reward_params(), params(), 1.0)),
        (objective.student_loss, (params(), reward_params())),
    ):
        with pytest.raises(ValueError, match=f"the {what} of pbkd: these rows are pac"):
            loss(*players, None, batch, signal, None)
