"""What the divergences sum over the vocabulary.

Elementwise functions ``(q, p) -> summand`` of the log-probs of one token under the
student and under the teacher. Dense divergences sum them over logits, fused ones tile
by tile.

>>> q, p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
>>> print(forward_kl_terms(q, p).sum().round(3))  # log 2
0.693
"""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp


def forward_kl_terms(q: jax.Array, p: jax.Array) -> jax.Array:
    """Of `forward_kl`."""
    return kl_terms(p, q)


def reverse_kl_terms(q: jax.Array, p: jax.Array) -> jax.Array:
    """Of `reverse_kl`."""
    return kl_terms(q, p)


def generalized_jsd_terms(q: jax.Array, p: jax.Array, *, beta=0.5) -> jax.Array:
    """Of `generalized_jsd`."""
    if isinstance(beta, numbers.Real) and beta in (0, 1):
        return kl_terms(p, q) if beta == 0 else kl_terms(q, p)
    beta = jnp.asarray(beta, q.dtype)
    m = _log_mixture(p, q, beta)
    return beta * kl_terms(p, m) + (1.0 - beta) * kl_terms(q, m)


def skew_forward_kl_terms(q: jax.Array, p: jax.Array, *, alpha=0.1) -> jax.Array:
    """Of `skew_forward_kl`."""
    return kl_terms(p, _log_mixture(p, q, alpha))


def skew_reverse_kl_terms(q: jax.Array, p: jax.Array, *, alpha=0.1) -> jax.Array:
    """Of `skew_reverse_kl`."""
    return kl_terms(q, _log_mixture(q, p, alpha))


def total_variation_terms(q: jax.Array, p: jax.Array) -> jax.Array:
    """Of `total_variation`."""
    q, p = jnp.exp(q), jnp.exp(p)
    difference = q - p
    # The sign of a rounding error is no direction: it would push q away from q == p.
    noise = 16 * jnp.finfo(q.dtype).eps * jnp.maximum(q, p)
    return 0.5 * jnp.abs(jnp.where(jnp.abs(difference) > noise, difference, 0.0))


def kl_terms(left: jax.Array, right: jax.Array) -> jax.Array:
    """Summands of KL(left || right) of log-probs, 0 log 0 = 0 in value and gradient."""
    support = left > -jnp.inf
    # Both `where`s are needed: 0 * inf is NaN in the value, and again in the gradient.
    mass = jnp.where(support, jnp.exp(left), 0.0)
    log_ratio = jnp.where(support, left, 0.0) - jnp.where(support, right, 0.0)
    # The masses sum to 0, but term by term they cancel the rounding of both
    # normalisers, which would leave an error of some 1e-7 however small the value.
    return mass * log_ratio - mass + jnp.exp(right)


def _log_mixture(left: jax.Array, right: jax.Array, weight) -> jax.Array:
    """log(weight * exp(left) + (1 - weight) * exp(right)), -inf where both are."""
    weight = jnp.asarray(weight, left.dtype)
    left, right = left + jnp.log(weight), right + jnp.log1p(-weight)
    possible = (left > -jnp.inf) | (right > -jnp.inf)
    mixture = jnp.logaddexp(
        jnp.where(possible, left, 0.0), jnp.where(possible, right, 0.0)
    )
    return jnp.where(possible, mixture, -jnp.inf)
