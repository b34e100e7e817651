"""Token log-probs against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import token_log_probs

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


def test_a_target_outside_the_vocabulary_is_nan_not_another_token():
    """-100 must not be read as the token 100 from the end."""
    values = token_log_probs(jnp.zeros((3, 200)), jnp.array([-100, 200, 5]))
    np.testing.assert_allclose(values, [np.nan, np.nan, -np.log(200.0)], rtol=1e-6)


def test_shapes_and_domain():
    with pytest.raises(AssertionError, match=r"\(2, 4\)"):
        token_log_probs(jnp.zeros((2, 3, 7)), jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"temperature must lie in \(0, inf\), got 0"):
        token_log_probs(jnp.zeros((2, 7)), jnp.zeros((2,), jnp.int32), temperature=0.0)
