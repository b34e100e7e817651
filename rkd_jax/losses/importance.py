r"""Importance weights of text that another sampler wrote.

A token drawn from :math:`\tilde p` instead of :math:`\pi_\theta` weighs
:math:`w_t = \pi_\theta(y_t|s_t) / \tilde p(y_t|s_t)`. A state weighs what led to it,
and what is measured at a token weighs all tokens up to it: per decision, the product of
the weights so far, and not that of the whole response.

>>> import jax.numpy as jnp
>>> mask = jnp.array([True, True, True, False])
>>> before, through = per_decision_weights(jnp.array([0.5, 2.0, 3.0, jnp.nan]), mask)
>>> print(before, through)
[1.  0.5 1.  0. ] [0.5 1.  3.  0. ]
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_choice
from rkd_jax.masking import accumulator, fill_masked

Importance = Literal["per_decision", "token"]


class PerDecisionWeights(NamedTuple):
    """What a target's state counts, and what is seen once the target is drawn."""

    before: jax.Array  # float32[*batch, T]
    through: jax.Array  # float32[*batch, T]


def per_decision_weights(weights: jax.Array, mask: jax.Array) -> PerDecisionWeights:
    r"""Products of the tokens' weights, up to each target and through it.

    .. math:: W_{t-1} = \prod_{s < t} w_s, \qquad W_t = W_{t-1}\, w_t

    Means under the sampler with these weights are means under the policy, if the
    sampler may write whatever the policy may. Both have mean 1 at every step that all
    responses reach; their spread grows along a response.

    Args:
        weights: float[*batch, T], at least 0: policy over sampler at each target.
        mask: bool or 0/1 numbers, [*batch, T]. ``weights`` may hold anything elsewhere;
            entries that are not set are skipped.

    Returns:
        Two float32[*batch, T]; 0 where the mask is not set.

    Gradient:
        Stopped: weights are data.

    Raises:
        AssertionError: shapes differ.

    References:
        Precup, Sutton and Singh, Eligibility Traces for Off-Policy Policy Evaluation,
        2000, per-decision importance sampling. Deviation: none.
    """
    chex.assert_equal_shape([weights, mask])
    weights = jax.lax.stop_gradient(weights.astype(accumulator(weights)))
    through = jnp.cumprod(fill_masked(weights, mask, 1.0), axis=-1)
    first = jnp.ones_like(through[..., :1])
    before = jnp.concatenate([first, through[..., :-1]], axis=-1)
    return PerDecisionWeights(fill_masked(before, mask), fill_masked(through, mask))


class Factors(NamedTuple):
    """How much the parts of a policy gradient count, ``[*batch, T]``; None: all of it.

    See `rkd_jax.losses.sequence_reverse_kl` for the parts.
    """

    states: jax.Array | None  # the single step, averaged over the target
    signals: jax.Array | None  # what a target adds to the credit of earlier ones
    credits: jax.Array | None  # the credit of a target
    targets: jax.Array | None  # a target in a mean over the policy's own text


def factors(
    weights: jax.Array | None, mask: jax.Array, importance: Importance
) -> Factors:
    """The two kinds of importance weights, out of those of the tokens.

    "per_decision" is exact. "token" weighs a target's credit by its own weight alone:
    given its state, these have mean 1, so a single step, which averages over the
    target, is not weighted. Targets of weight 0 add nothing to earlier ones' credit in
    either. No weights: the policy wrote the text.
    """
    check_choice("importance", importance, get_args(Importance))
    if weights is None:
        return Factors(None, None, None, None)
    if importance == "token":
        chex.assert_equal_shape([weights, mask])
        weights = fill_masked(weights.astype(accumulator(weights)), mask)
        weights = jax.lax.stop_gradient(weights)
        return Factors(None, jnp.sign(weights), weights, weights)
    before, through = per_decision_weights(weights, mask)
    return Factors(before, through, None, through)


def counted(share: jax.Array | None, values: jax.Array) -> jax.Array:
    """``share * values``; what counts nothing may be infinite."""
    if share is None:
        return values
    return jnp.where(share == 0.0, 0.0, share.astype(values.dtype) * values)
