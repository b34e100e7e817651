"""Log-probabilities of given tokens.

>>> import jax.numpy as jnp
>>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
>>> print(jnp.exp(token_log_probs(logits, jnp.array([1]))))
[0.25]
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_domain
from rkd_jax.masking import accumulator, fill_masked


def token_log_probs(
    logits: jax.Array, targets: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    r"""Log-probability of each target, in nats.

    .. math:: \ell_t = \log\mathrm{softmax}(z_t / \tau)_{y_t}

    The negative is the token loss of supervised fine-tuning.

    Args:
        logits: float[*batch, V], unnormalised; log-probs are as good. -inf marks
            impossible tokens.
        targets: int[*batch], in [0, V). They are aligned with ``logits``: nothing is
            shifted, and there is no sentinel such as -100.
        temperature: positive; divides the logits.

    Returns:
        float32[*batch], at most 0; -inf at an impossible target, NaN at a target
        outside [0, V). Neither masked nor reduced.

    Gradient:
        Flows to ``logits``: one-hot minus softmax, over the temperature.

    Raises:
        ValueError: temperature out of range (Python numbers; traced ones are not
            checked).
        AssertionError: ``targets`` has another shape than ``logits`` without V.

    References:
        Textbook. Deviation: none.
    """
    check_domain("temperature", temperature, "(0, inf)")
    chex.assert_shape(targets, logits.shape[:-1])
    log_probs = tempered_log_softmax(logits, temperature)
    return take_tokens(log_probs, jnp.expand_dims(targets, -1)).squeeze(-1)


def tempered_log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    """Log-softmax over the last axis, in float32 (float64 stays float64)."""
    dtype = accumulator(logits)
    scaled = logits.astype(dtype) / jnp.asarray(temperature, dtype)
    return jax.nn.log_softmax(scaled, axis=-1)


def take_tokens(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Entries ``ids`` [..., K] of ``values`` [..., V]; NaN at ids outside [0, V)."""
    vocabulary = values.shape[-1]
    # Indexing counts negative ids from the end: a stray -100 would be a real token.
    ids = jnp.where(ids < 0, jnp.asarray(vocabulary, ids.dtype), ids)
    return jnp.take_along_axis(values, ids, axis=-1, mode="fill")


def put_tokens(values: jax.Array, ids: jax.Array, new) -> jax.Array:
    """``values`` [..., V] with ``new`` at ids [..., K]; ids outside [0, V) are none."""
    vocabulary = values.shape[-1]
    ids = jnp.where(ids < 0, jnp.asarray(vocabulary, ids.dtype), ids)
    return jnp.put_along_axis(values, ids, new, -1, inplace=False, mode="drop")


def taken_values(values: jax.Array, actions: jax.Array, mask: jax.Array) -> jax.Array:
    """Entries of the given actions, ``[.., T, V] -> [.., T]``, 0 where masked."""
    actions = jnp.expand_dims(fill_masked(actions, mask), -1)
    # Masked after the lookup: before, it would write a second array of size V.
    taken = take_tokens(values, actions)[..., 0]
    return fill_masked(taken.astype(accumulator(values)), mask)


def log1mexp(log_prob: jax.Array) -> jax.Array:
    r"""Log-probability of the complement of an event, in nats.

    .. math:: \log(1 - e^z)

    Args:
        log_prob: float[*batch], z, at most 0; -inf is an impossible event. Accurate for
            probabilities near 0 and near 1, up to 1 - 1e-6; those beyond count as that.

    Returns:
        float32[*batch], from 0 (an impossible event) down to -13.8: always finite.
        Neither masked nor reduced.

    Gradient:
        ``-exp(z) / (1 - exp(z))``; 0 above -1e-6: an event that certain is out of
        reach.

    References:
        Maechler, Accurately computing log(1 - exp(-|a|)), 2012. Deviation: the clip.
    """
    z = jnp.minimum(log_prob.astype(accumulator(log_prob)), -1e-6)
    # Each form loses its digits where the other is used; they meet at half. Both are
    # finite everywhere, so neither spoils the other's gradient.
    near_one = jnp.log(-jnp.expm1(z))
    near_zero = jnp.log1p(-jnp.exp(z))
    return jnp.where(z > -0.6931472, near_one, near_zero)
