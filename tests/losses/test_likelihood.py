"""Token log-probs against the formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import token_log_probs
from rkd_jax.losses.likelihood import log1mexp, put_tokens

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 7))
TARGETS = np.array([[0, 6, 3], [2, 2, 5]])


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_value_and_gradient(x64, temperature):
    def total(logits):
        values = token_log_probs(logits, TARGETS, temperature=temperature)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(jnp.asarray(LOGITS))
    probs = softmax(LOGITS / temperature)
    taken = np.take_along_axis(probs, TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(values, np.log(taken), rtol=1e-12)
    np.testing.assert_allclose(
        gradient, (np.eye(7)[TARGETS] - probs) / temperature, rtol=1e-9, atol=1e-12
    )


def test_uniform_logits_give_log_v():
    values = token_log_probs(jnp.full((3, 7), 5.0), jnp.array([0, 3, 6]))
    np.testing.assert_allclose(values, -np.log(7.0), rtol=1e-6)


def test_large_offsets_and_impossible_tokens_stay_exact():
    logits = jnp.array([[1e4, 1e4, -jnp.inf]])
    both = token_log_probs(jnp.tile(logits, (2, 1)), jnp.array([1, 2]))
    np.testing.assert_allclose(both, [-np.log(2.0), -np.inf], rtol=1e-6)


def test_stray_ids_are_written_nowhere():
    found = put_tokens(jnp.zeros((2, 4)), jnp.array([[-1, 2], [4, -100]]), 1.0)
    np.testing.assert_array_equal(found, [[0, 0, 1, 0], [0, 0, 0, 0]])


def test_a_target_outside_the_vocabulary_is_nan_not_another_token():
    """-100 must not be read as the token 100 from the end."""
    values = token_log_probs(jnp.zeros((3, 200)), jnp.array([-100, 200, 5]))
    np.testing.assert_allclose(values, [np.nan, np.nan, -np.log(200.0)], rtol=1e-6)


def test_shapes_and_domain():
    with pytest.raises(AssertionError, match=r"\(2, 4\)"):
        token_log_probs(jnp.zeros((2, 3, 7)), jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"temperature must lie in \(0, inf\), got 0"):
        token_log_probs(jnp.zeros((2, 7)), jnp.zeros((2,), jnp.int32), temperature=0.0)


@jax.jit
def complement_and_slope(z):
    return log1mexp(z), jax.grad(lambda z: jnp.sum(log1mexp(z)))(z)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log1mexp_is_finite_with_its_gradient_at_the_ends(x64, dtype):
    value, slope = complement_and_slope(
        jnp.asarray([0.0, -1e-9, -50.0, -np.inf], dtype)
    )
    assert value.dtype == dtype
    end = math.log(-math.expm1(-1e-6))
    # e^-50 = 1.9e-22 survives beside 1 only because log1p is used.
    far = [-math.exp(-50.0), 0.0]
    np.testing.assert_allclose(value, [end, end, *far], rtol=1e-5)
    np.testing.assert_allclose(slope, [0.0, 0.0, *far], rtol=1e-5)


def test_log1mexp_keeps_its_digits(x64):
    z = -np.array([2e-6, 1e-4, 1e-3, 0.1, 0.69, 0.6931, 0.6932, 0.7, 3.0, 30.0, 700.0])
    # 1 - e^z by its series where the difference would cancel.
    series = -sum(z**n / math.factorial(n) for n in range(1, 8))
    expected = np.where(z > -0.01, np.log(series.clip(1e-9)), np.log1p(-np.exp(z)))
    value, slope = complement_and_slope(jnp.asarray(z))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(slope, -1.0 / np.expm1(-z), rtol=1e-9)
    single = log1mexp(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(single, expected, rtol=3e-6, atol=1e-37)
