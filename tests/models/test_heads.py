"""Heads against float64 numpy; the reward model reads the states it should."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.api import sequence_hidden
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.heads import (
    GaussianHead,
    QHead,
    RewardModel,
    ScalarHead,
    head_q_values,
)
from rkd_jax.types import Sequences
from tests.models.reference import LLAMA, random_params

P = 2
SEQUENCES = Sequences(
    tokens=jnp.array([[7, 8, 5, 6, 2, 0], [0, 8, 2, 0, 0, 0], [4, 8, 0, 0, 0, 0]]),
    token_mask=jnp.array(
        [[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], bool
    ),
    # Row 0 has a hole, as between two turns of an assistant.
    response_mask=jnp.array([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool),
)


def noisy(params, scale=1.0):
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * generator.normal(size=x.shape), x.dtype), params
    )


@pytest.fixture(scope="module")
def reward_model():
    model = RewardModel(Decoder(LLAMA), ScalarHead(bound=2.0))
    head = noisy(model.head.init(jax.random.key(0), LLAMA.hidden_size))
    return model, {"trunk": random_params(LLAMA), "head": head}


@pytest.mark.parametrize("width", [None, 5])
def test_every_head_starts_at_zero_and_can_leave_it(width, rng):
    hidden = jax.random.normal(rng, (2, 3, 4))
    scalar = ScalarHead(width=width, bound=1.0)
    params = scalar.init(rng, 4)
    np.testing.assert_array_equal(scalar.apply(params, hidden), np.zeros((2, 3)))
    q = QHead(actions=6, width=width)
    np.testing.assert_array_equal(q.apply(q.init(rng, 4), hidden), np.zeros((2, 3, 6)))
    gradient = jax.grad(lambda p: scalar.apply(p, hidden).sum())(params)
    assert np.abs(gradient["output"]["kernel"]).max() > 0.1


def test_linear_head_with_bound_by_hand(x64):
    hidden = np.random.default_rng(1).normal(size=(2, 3, 4))
    head = ScalarHead(bound=0.5)
    params = noisy(head.init(jax.random.key(0), 4))
    weights = np.asarray(params["output"]["kernel"], np.float64)[:, 0]
    raw = hidden @ weights + float(params["output"]["bias"][0])
    expected = 0.5 * np.tanh(raw / 0.5)
    got = head.apply(params, hidden)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_hidden_layer_by_hand(x64):
    hidden = np.random.default_rng(1).normal(size=(2, 4))
    head = QHead(actions=3, width=5)
    params = noisy(head.init(jax.random.key(0), 4))
    first, last = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), params[name])
        for name in ("hidden", "output")
    )
    inner = hidden @ first["kernel"] + first["bias"]
    inner *= 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    expected = inner @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(head.apply(params, hidden), expected, rtol=1e-12)


def test_a_bounded_head_never_leaves_its_range_and_has_slope_one_at_zero(rng):
    head = ScalarHead(bound=2.0)
    params = noisy(head.init(rng, 4), scale=100.0)
    values = head.apply(params, jax.random.normal(rng, (100, 4)).astype(jnp.bfloat16))
    assert values.dtype == jnp.float32
    assert np.abs(values).max() <= 2.0
    assert np.abs(values).max() > 1.9
    unit = {"output": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}
    assert float(jax.grad(lambda x: head.apply(unit, x[None]))(0.0)) == 1.0


def test_gaussian_head_limits_log_std():
    # One state of one number: the raw log_std is that number.
    params = {"output": {"kernel": jnp.array([[0.5, 1.0]]), "bias": jnp.zeros(2)}}
    raw = np.array([-50.0, -1.0, 0.0, 1.5, 50.0], np.float32)
    expected = {
        "smooth": -3 + 5 / (1 + np.exp(-raw.astype(np.float64))),
        "clip": np.array([-3, -1, 0, 1.5, 2]),
        "none": raw,
    }
    for limit, log_std in expected.items():
        got = GaussianHead(limit=limit).apply(params, raw[:, None])
        np.testing.assert_allclose(got.mean, raw / 2, rtol=1e-6)
        np.testing.assert_allclose(got.log_std, log_std, rtol=1e-6, atol=1e-6)
    # The reason for "smooth": outside the range it still has a gradient.
    far = {"output": {"kernel": jnp.array([[0.0, 1.0]]), "bias": jnp.array([0.0, 6.0])}}
    for limit, slope in (
        ("smooth", 5 * math.exp(-6) / (1 + math.exp(-6)) ** 2),
        ("clip", 0),
    ):
        head = GaussianHead(limit=limit)
        grad = jax.grad(lambda p, head=head: head.apply(p, jnp.zeros(1)).log_std)(far)
        got = float(grad["output"]["bias"][1])
        assert got == pytest.approx(slope, rel=1e-4)


def test_r13_token_rewards_include_eos_and_stop_at_the_mask(reward_model):
    model, params = reward_model
    got = jax.jit(model.token_rewards)(params, SEQUENCES)
    states = jax.jit(functools.partial(sequence_hidden, model.trunk))
    hidden = np.asarray(states(params["trunk"], SEQUENCES), np.float64)
    weights = np.asarray(params["head"]["output"]["kernel"], np.float64)[:, 0]
    raw = hidden[:, P:] @ weights + float(params["head"]["output"]["bias"][0])
    expected = np.where(SEQUENCES.response_mask, 2 * np.tanh(raw / 2), 0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert abs(got[0, 2]) > 1e-3  # the reward of the EOS in row 0


def test_r13_sequence_reward_sits_on_the_last_target_given_by_the_mask(reward_model):
    model, params = reward_model
    tokens = np.asarray(jax.jit(model.token_rewards)(params, SEQUENCES))
    got = jax.jit(model.sequence_rewards)(params, SEQUENCES)
    expected = np.zeros((3, 4))
    expected[0, 2], expected[1, 0] = tokens[0, 2], tokens[1, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_q_values_of_a_head_on_features_by_hand(x64):
    """Gradients reach head and features, where there is a response and nowhere else."""
    mask = np.asarray(SEQUENCES.response_mask)[..., None]
    states = np.random.default_rng(2).normal(size=(3, 4, 5))
    head = QHead(actions=6)
    params = noisy(head.init(jax.random.key(0), 5))
    features = jnp.where(mask, states, jnp.nan)
    q_values = head_q_values(head)

    def total(params, features):
        values = q_values(params, SEQUENCES, features)
        return values[..., 1].sum(), values

    (in_params, in_features), values = jax.grad(total, (0, 1), has_aux=True)(
        params, features
    )
    kernel = np.asarray(params["output"]["kernel"], np.float64)
    raw = states @ kernel + np.asarray(params["output"]["bias"], np.float64)
    np.testing.assert_allclose(values, np.where(mask, raw, 0.0), rtol=1e-12)
    np.testing.assert_allclose(in_features, mask * kernel[:, 1], rtol=1e-12)
    summed = np.where(mask, states, 0.0).sum((0, 1))
    np.testing.assert_allclose(in_params["output"]["kernel"][:, 1], summed, rtol=1e-6)

    with pytest.raises(ValueError, match="needs features"):
        q_values(params, SEQUENCES, None)
    with pytest.raises(AssertionError):
        q_values(params, SEQUENCES, features[:, 0])


def test_what_padding_holds_does_not_change_rewards_or_gradients(reward_model):
    model, params = reward_model
    garbage = jnp.where(SEQUENCES.token_mask, SEQUENCES.tokens, 10**6)
    other = Sequences(garbage, SEQUENCES.token_mask, SEQUENCES.response_mask)
    total = jax.jit(
        jax.value_and_grad(lambda p, s: jnp.square(model.token_rewards(p, s)).sum())
    )
    plain, moved = total(params, SEQUENCES), total(params, other)
    assert float(plain[0]) > 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        moved,
        plain,
    )


def test_init_gives_both_parts_and_rewards_of_zero_with_batch_axes_kept(reward_model):
    model, params = reward_model
    initial = jax.jit(model.init)(jax.random.key(0))
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (initial, params)]
    assert shapes[0] == shapes[1]
    pairs = jax.tree.map(lambda x: jnp.stack([x, x], axis=1), SEQUENCES)
    got = jax.jit(model.token_rewards)(initial, pairs)
    np.testing.assert_array_equal(got, np.zeros((3, 2, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScalarHead(bound=0.0), "bound=0.0 must be positive"),
        (lambda: ScalarHead(width=0), "width=0 must be positive"),
        (lambda: QHead(actions=0), "actions=0 must be positive"),
        (lambda: GaussianHead(log_std_range=(1.0, 1.0)), "must be"),
        (lambda: GaussianHead(limit="hard"), "limit='hard' is not"),
    ],
)
def test_wrong_settings_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()
