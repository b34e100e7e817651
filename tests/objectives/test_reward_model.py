"""Bradley-Terry fits: weights, penalty, and ensembles as K separate fits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from scipy.optimize import brentq

from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.heads import TOKEN_HEAD, RewardModel, ScalarHead, head_token_rewards
from rkd_jax.objectives.reward_model import (
    init_members,
    make_reward_ensemble,
    make_reward_model,
)
from rkd_jax.training.state import init_state
from rkd_jax.training.update import make_update
from rkd_jax.types import PreferenceBatch, PreferenceSignal, Sequences
from tests.models.reference import random_params
from tests.objectives.game_batch import LABELS, PAIRS, pair_nll, preference_batch
from tests.tabular.bed import BED_E, REWARD, tabular_rewards

pytestmark = pytest.mark.usefixtures("x64")

K = 3
TABLES = np.stack([REWARD, 0.3 * np.cos(5.0 * REWARD), -0.7 * REWARD])
WEIGHTS = np.array([[2.0, 0.0, 1.0], [1.0, 3.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.5, 2.0]])


def weighted(weights):
    return PreferenceSignal(weights=None if weights is None else jnp.asarray(weights))


def loss_of(objective, batch=None):
    """Jitted ``(params, weights) -> LossOutput``."""
    batch = preference_batch() if batch is None else batch
    return jax.jit(
        lambda params, weights: objective.student_loss(
            params, None, None, batch, weighted(weights), None
        )
    )


def members(tables=TABLES):
    return {"rewards": jnp.asarray(tables)}


def pair_losses(tables):
    """[4, K] in numpy."""
    return np.stack([pair_nll(BED_E.returns(table)) for table in tables], axis=-1)


def test_weights_multiply_the_loss_and_leave_count_and_metrics_alone():
    nll = pair_losses(TABLES[:1])[:, 0]
    loss = loss_of(make_reward_model(tabular_rewards))
    params = {"rewards": jnp.asarray(REWARD)}
    out = loss(params, WEIGHTS[:, 0])
    np.testing.assert_allclose(out.total, WEIGHTS[:, 0] @ nll, rtol=1e-12)
    assert float(out.weight) == len(LABELS)
    metric = out.metrics["reward_model/nll"]
    np.testing.assert_allclose(metric.total / metric.weight, nll.mean(), rtol=1e-12)
    check_grads(
        lambda p: loss(p, WEIGHTS[:, 0]).total, (params,), order=1, modes=["rev"]
    )
    assert not np.asarray(
        jax.grad(lambda w: loss(params, w).total)(WEIGHTS[:, 0])
    ).any()


def test_an_ensembles_loss_is_the_sum_of_its_members():
    nll = pair_losses(TABLES)
    loss = loss_of(make_reward_ensemble(tabular_rewards, K, l2=0.01))
    out = loss(members(), WEIGHTS)
    penalty = 0.01 * len(LABELS) * (TABLES**2).sum()
    np.testing.assert_allclose(out.total, (WEIGHTS * nll).sum() + penalty, rtol=1e-12)
    assert float(out.weight) == len(LABELS)
    returns = np.stack([BED_E.returns(table)[0] for table in TABLES], axis=-1)
    margin = returns[PAIRS[1][:, 0]] - returns[PAIRS[1][:, 1]]
    expected = {
        "nll": nll.mean(),
        "accuracy": (margin > 0).mean(),
        "spread": margin.std(axis=-1).mean(),
    }
    for name, value in expected.items():
        metric = out.metrics[f"reward_model/{name}"]
        np.testing.assert_allclose(metric.total / metric.weight, value, rtol=1e-12)
    once = loss(members(), None)
    np.testing.assert_array_equal(once.total, loss(members(), np.ones((4, K))).total)


def test_each_members_loss_reaches_that_member_alone():
    loss = loss_of(make_reward_ensemble(tabular_rewards, K))
    only_second = WEIGHTS * np.array([0.0, 1.0, 0.0])
    gradient = jax.grad(lambda p: loss(p, only_second).total)(members())["rewards"]
    assert not np.asarray(gradient[0]).any()
    assert np.abs(gradient[1]).max() > 0.1
    assert not np.asarray(gradient[2]).any()


def fit(objective, params, weights, optimizer, steps=4):
    update = make_update(objective, student_optimizer=optimizer)
    state = init_state(params, student_optimizer=optimizer, rng=jax.random.key(0))
    for _ in range(steps):
        state, _ = update(state, None, preference_batch(), weighted(weights))
    return state.student.params


def test_training_an_ensemble_is_training_each_member_by_itself():
    """Adam moves every entry by itself, so nothing ties the members together."""
    optimizer = optax.adam(0.1)
    ensemble = make_reward_ensemble(tabular_rewards, K, l2=0.01)
    together = fit(ensemble, members(), WEIGHTS, optimizer)["rewards"]
    alone = make_reward_model(tabular_rewards, l2=0.01)
    for k in range(K):
        start = {"rewards": jnp.asarray(TABLES[k])}
        expected = fit(alone, start, WEIGHTS[:, k], optimizer)["rewards"]
        assert np.abs(expected - TABLES[k]).max() > 0.1
        np.testing.assert_allclose(together[k], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ensemble", [False, True])
def test_padding_rows_may_hold_anything(ensemble):
    """An empty pair with NaN weights, label and features changes nothing."""
    generator = np.random.default_rng(3)
    features = generator.normal(size=(4, 2, 4, 5))
    head = {"output": {"kernel": generator.normal(size=(5, 1)), "bias": np.zeros(1)}}
    reward, weights = head_token_rewards(TOKEN_HEAD), WEIGHTS
    if ensemble:
        objective = make_reward_ensemble(reward, K)
        head = jax.tree.map(lambda x: np.stack([x, -x, 2 * x]), head)
    else:
        objective, weights = make_reward_model(reward), WEIGHTS[:, 0]
    batch = preference_batch()

    def pad(x):
        fill = np.nan if x.dtype.kind == "f" else 0
        return np.concatenate([x, np.full((1, *x.shape[1:]), fill, x.dtype)])

    @jax.jit
    def run(head, batch, signal):
        def total(head):
            out = objective.student_loss(head, None, None, batch, signal, None)
            return out.total, out

        return jax.grad(total, has_aux=True)(head)

    arrays = jax.tree.map(np.asarray, (batch, PreferenceSignal(features, weights)))
    expected = run(head, *arrays)
    assert float(expected[1].weight) == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        run(head, *jax.tree.map(pad, arrays)),
        expected,
    )


def test_trap_separable_pairs_need_a_penalty_or_a_bound():
    """One pair, hard label, one feature: the loss has a closed form in the weight."""
    mask = jnp.ones((1, 2, 1), bool)
    sequences = Sequences(jnp.zeros((1, 2, 2), int), jnp.ones((1, 2, 2), bool), mask)
    label, none = jnp.ones(1), jnp.full((1, 2), jnp.nan)
    batch = PreferenceBatch(sequences, sequences, label, none, jnp.zeros(1, int))
    signal = PreferenceSignal(jnp.array([1.5, -0.5]).reshape(1, 2, 1, 1))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def slope(weight, bound, l2):
        """Gradient in the head's only weight; the features are 2 apart."""
        objective = make_reward_model(
            head_token_rewards(ScalarHead(bound=bound)), l2=l2
        )

        def total(weight):
            output = {"kernel": weight.reshape(1, 1), "bias": jnp.zeros(1)}
            head = {"output": output}
            out = objective.student_loss(head, None, None, batch, signal, None)
            return out.total, out.metrics["reward_model/nll"].total

        return jax.grad(total, has_aux=True)(weight)

    for weight in (1.0, 5.0, 15.0):  # no finite maximum: downhill for ever
        gradient, _ = slope(jnp.asarray(weight), None, 0.0)
        np.testing.assert_allclose(gradient, -2 / (1 + np.exp(2 * weight)), rtol=1e-9)
    best = brentq(lambda w: -2 / (1 + np.exp(2 * w)) + 2 * 0.05 * w, 0.0, 10.0)
    assert float(slope(jnp.asarray(best), None, 0.05)[0]) == pytest.approx(0, abs=1e-9)
    _, least = slope(jnp.asarray(50.0), 1.0, 0.0)  # a bounded class stops at margin 2
    assert float(least) == pytest.approx(np.log1p(np.exp(-2.0)), rel=1e-9)


def test_an_ensemble_of_whole_models_with_trunks_of_their_own():
    config = DecoderConfig(
        vocab_size=3,
        hidden_size=4,
        intermediate_size=4,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        max_length=8,
        dtype="float64",
    )
    model, weights = RewardModel(Decoder(config), ScalarHead()), WEIGHTS[:, :2]
    output = {"kernel": np.ones((4, 1)), "bias": np.zeros(1)}
    each = [
        {"trunk": random_params(config, seed), "head": {"output": output}}
        for seed in range(2)
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).astype(float), *each)

    def gradient(objective, params, weights):
        loss = loss_of(objective)
        return jax.jit(jax.grad(lambda p: loss(p, weights).total))(params)

    together = gradient(make_reward_ensemble(model.token_rewards, 2), stacked, weights)
    second = jax.tree.map(lambda x: x[1], stacked)
    alone = gradient(make_reward_model(model.token_rewards), second, weights[:, 1])
    assert np.abs(alone["trunk"]["layers"]["mlp"]["up"]["kernel"]).max() > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-9, atol=1e-12),
        together,
        alone,
    )


def test_members_are_drawn_apart_but_linear_heads_differ_by_their_weights_alone():
    """Every head starts at 0: equal weights, equal models; spread 0 tells."""
    rng = jax.random.key(0)
    hidden = init_members(lambda key: ScalarHead(width=3).init(key, 5), rng, 2)
    kernel = np.asarray(hidden["hidden"]["kernel"])
    assert kernel.shape == (2, 5, 3)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    linear = init_members(lambda key: TOKEN_HEAD.init(key, 5), rng, 2)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(linear))


def test_wrong_members_are_refused():
    with pytest.raises(ValueError, match="members=0"):
        make_reward_ensemble(tabular_rewards, 0)
    loss = loss_of(make_reward_ensemble(tabular_rewards, 2))
    with pytest.raises(AssertionError):
        loss(members(), None)
    with pytest.raises(AssertionError):
        loss(members(TABLES[:2]), WEIGHTS)
    with pytest.raises(AssertionError):
        loss_of(make_reward_model(tabular_rewards))({"rewards": REWARD}, WEIGHTS)
