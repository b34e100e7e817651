r"""What the divergences sum over the vocabulary.

Elementwise functions of the log-probs of one token under the student, q, and under the
teacher, p: ``*_terms`` are the summands, ``*_slopes`` their derivatives in q. Dense
divergences sum the terms over logits and leave the derivatives to JAX, fused ones take
both tile by tile.

Mixtures m = a p + (1 - a) q are written in the log-ratio ``d = q - p``. Where q is the
larger, a and p change places with 1 - a and q:

.. math:: \log\frac{p}{m} = -\log(a + (1 - a) e^d), \qquad
    \log\frac{q}{m} = d + \log\frac{p}{m}

Both are exactly 0 at d = 0; a logarithm of m would leave the rounding of log p.

>>> q, p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
>>> print(forward_kl_terms(q, p).sum().round(3))  # log 2
0.693
>>> print(forward_kl_slopes(q, p))
[-0.5  0.5]
"""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp

_LARGEST = 80.0
"""Of a log-ratio inside a mixture: what is rarer by exp(80) counts nothing there."""
_LOWEST = -1e4
"""A log-prob without mass that may be subtracted from another."""


def forward_kl_terms(q: jax.Array, p: jax.Array) -> jax.Array:
    """Of `forward_kl`."""
    return kl_terms(p, q)


def forward_kl_slopes(q: jax.Array, p: jax.Array) -> jax.Array:
    """Minus the teacher's mass, and the student's for `kl_terms` to add up to it."""
    return jnp.exp(q) - jnp.exp(p)


def reverse_kl_terms(q: jax.Array, p: jax.Array) -> jax.Array:
    """Of `reverse_kl`."""
    return kl_terms(q, p)


def reverse_kl_slopes(q: jax.Array, p: jax.Array) -> jax.Array:
    """The student's mass times the log-ratio."""
    mass = jnp.exp(q)
    return mass * _log_ratio(mass, q, p)


def reverse_kl_pull(q: jax.Array, p: jax.Array) -> jax.Array:
    """What sums up to the same as the slopes.

    Of the slopes themselves XLA on a GPU would keep an array, for whoever needs them
    after their sum.
    """
    return reverse_kl_terms(q, p) + (jnp.exp(q) - jnp.exp(p))


def generalized_jsd_terms(q: jax.Array, p: jax.Array, *, beta=0.5) -> jax.Array:
    """Of `generalized_jsd`."""
    if _is(beta, 0):
        return forward_kl_terms(q, p)
    if _is(beta, 1):
        return reverse_kl_terms(q, p)
    q_over_m, p_over_m = _in_mixture(q, p, beta)
    beta = jnp.asarray(beta, q.dtype)
    return (1.0 - beta) * jnp.exp(q) * q_over_m + beta * jnp.exp(p) * p_over_m


def generalized_jsd_slopes(q: jax.Array, p: jax.Array, *, beta=0.5) -> jax.Array:
    """Of the student's part alone: what m moves cancels."""
    if _is(beta, 0):
        return forward_kl_slopes(q, p)
    if _is(beta, 1):
        return reverse_kl_slopes(q, p)
    q_over_m, _ = _in_mixture(q, p, beta)
    return (1.0 - jnp.asarray(beta, q.dtype)) * jnp.exp(q) * q_over_m


def skew_forward_kl_terms(q: jax.Array, p: jax.Array, *, alpha=0.1) -> jax.Array:
    """Of `skew_forward_kl`."""
    if _is(alpha, 0):
        return forward_kl_terms(q, p)
    _, p_over_m = _in_mixture(q, p, alpha)
    alpha, mass = jnp.asarray(alpha, q.dtype), jnp.exp(p)
    return (1.0 - alpha) * (jnp.exp(q) - mass) + mass * p_over_m


def skew_forward_kl_slopes(q: jax.Array, p: jax.Array, *, alpha=0.1) -> jax.Array:
    """``(1 - alpha) q (1 - p / m)``."""
    if _is(alpha, 0):
        return forward_kl_slopes(q, p)
    _, p_over_m = _in_mixture(q, p, alpha)
    return (jnp.asarray(alpha, q.dtype) - 1.0) * jnp.exp(q) * jnp.expm1(p_over_m)


def skew_reverse_kl_terms(q: jax.Array, p: jax.Array, *, alpha=0.1) -> jax.Array:
    """Of `skew_reverse_kl`: both change places."""
    return skew_forward_kl_terms(p, q, alpha=alpha)


def skew_reverse_kl_slopes(q: jax.Array, p: jax.Array, *, alpha=0.1) -> jax.Array:
    """The log-ratio to m, and what q moves of m."""
    if _is(alpha, 0):
        return reverse_kl_slopes(q, p)
    p_over_m, q_over_m = _in_mixture(p, q, alpha)
    rest = 1.0 - jnp.asarray(alpha, q.dtype)
    return jnp.exp(q) * (q_over_m + rest * jnp.expm1(p_over_m))


def total_variation_terms(q: jax.Array, p: jax.Array) -> jax.Array:
    """Of `total_variation`."""
    return 0.5 * jnp.abs(_difference(jnp.exp(q), jnp.exp(p)))


def total_variation_slopes(q: jax.Array, p: jax.Array) -> jax.Array:
    """Half the student's mass, by the sign of the difference."""
    mass = jnp.exp(q)
    return 0.5 * mass * jnp.sign(_difference(mass, jnp.exp(p)))


def kl_terms(left: jax.Array, right: jax.Array) -> jax.Array:
    """Summands of KL(left || right) of log-probs, 0 log 0 = 0 in value and gradient."""
    mass = jnp.exp(left)
    # The masses sum to 0, but term by term they cancel the rounding of both
    # normalisers, which would leave an error of some 1e-7 however small the value.
    return mass * _log_ratio(mass, left, right) - mass + jnp.exp(right)


def _log_ratio(mass: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """left - right where the left one has mass, 0 elsewhere."""
    return jnp.where(mass > 0.0, left - right, 0.0)


def _in_mixture(q: jax.Array, p: jax.Array, weight) -> tuple[jax.Array, jax.Array]:
    """Logs of q / m and of p / m, m = weight p + (1 - weight) q; both are finite."""
    weight = jnp.asarray(weight, q.dtype)
    d = jnp.maximum(q, _LOWEST) - jnp.maximum(p, _LOWEST)
    # Not jnp.abs, whose derivative at 0 would be of neither side.
    q_larger = d > 0.0
    above = jnp.where(q_larger, d, 0.0)
    larger = jnp.where(q_larger, 1.0 - weight, weight)
    ratio = jnp.exp(jnp.maximum(d - 2.0 * above, -_LARGEST))  # of the smaller one
    log_m = jnp.log(larger + (1.0 - larger) * ratio)  # over the larger one
    return d - above - log_m, -above - log_m


def _difference(q: jax.Array, p: jax.Array) -> jax.Array:
    """q - p, 0 where it is rounding: the sign of an error is no direction."""
    difference = q - p
    noise = 16 * jnp.finfo(q.dtype).eps * jnp.maximum(q, p)
    return jnp.where(jnp.abs(difference) > noise, difference, 0.0)


def _is(weight, value: int) -> bool:
    """Whether a weight is a Python number of this value, not an array."""
    return isinstance(weight, numbers.Real) and weight == value
