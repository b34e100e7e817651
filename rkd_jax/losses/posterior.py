r"""A Gaussian posterior over rewards, and the rewards that action values imply.

What `rkd_jax.losses.variational` and `rkd_jax.losses.ava` are made of. Entry t of every
array belongs to the transition that starts at target t. The state after the last target
has no action value, so the last target of a row has no transition unless
``terminal="anchor"`` says that the value after it is 0.

>>> import jax.numpy as jnp
>>> print(gaussian_kl(jnp.array([0.0, 2.0]), jnp.array([0.0, 0.0])))
[0. 2.]
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.likelihood import taken_values
from rkd_jax.masking import accumulator, fill_masked

NextValue = Literal["sampled", "expected"]
StopGradient = Literal["none", "next", "delta_for_phi"]
Terminal = Literal["drop", "anchor"]
DropLast = Literal["all_terms", "irl_only"]


class AvrilTerms(NamedTuple):
    """The terms of a variational imitation loss, ``[*batch, T]`` each, not reduced.

    ``nll + kl - lambda * td_log_likelihood`` is minimised; each term is 0 outside its
    mask.
    """

    nll: jax.Array  # nats, under `mask`
    kl: jax.Array  # nats, under `transition_mask`
    td_log_likelihood: jax.Array  # nats, under `transition_mask`
    mask: jax.Array  # bool, the actions whose likelihood counts
    transition_mask: jax.Array  # bool, the actions that have a temporal difference
    delta: jax.Array  # temporal differences, under `transition_mask`


def gaussian_kl(
    mean: jax.Array,
    log_std: jax.Array,
    *,
    prior_mean: float = 0.0,
    prior_std: float = 1.0,
) -> jax.Array:
    r"""KL from a Gaussian to the prior, in nats.

    .. math:: \log\frac{s_0}{\sigma} + \frac{\sigma^2 + (\mu - m_0)^2}{2 s_0^2}
        - \frac 1 2

    Args:
        mean: float[*batch].
        log_std: float[*batch], natural logarithm of the standard deviation.
        prior_mean: real.
        prior_std: positive.

    Returns:
        float32[*batch], non-negative; 0 iff the posterior is the prior. Grows like
        ``-log_std`` as the standard deviation collapses. Not reduced.

    Gradient:
        Flows to both arguments.

    Raises:
        ValueError: prior_std out of range (Python numbers; traced ones are not
            checked).
        AssertionError: shapes differ.

    References:
        Textbook; AVRIL, 2102.06483, with prior N(0, 1). Deviation: none.
    """
    check_domain("prior_std", prior_std, "(0, inf)")
    chex.assert_equal_shape([mean, log_std])
    dtype = accumulator(mean)
    location, scale = jnp.asarray(prior_mean, dtype), jnp.asarray(prior_std, dtype)
    shift = (mean.astype(dtype) - location) / scale
    log_ratio = log_std.astype(dtype) - jnp.log(scale)
    return 0.5 * (jnp.exp(2.0 * log_ratio) + jnp.square(shift) - 1.0) - log_ratio


def gaussian_log_prob(
    value: jax.Array, mean: jax.Array, log_std: jax.Array
) -> jax.Array:
    r"""Log-density of a value under a Gaussian, in nats.

    .. math:: -\tfrac 1 2 \log 2\pi - \log\sigma - \frac{(v - \mu)^2}{2\sigma^2}

    Args:
        value: float[*batch].
        mean: float[*batch].
        log_std: float[*batch], natural logarithm of the standard deviation.

    Returns:
        float32[*batch]; unbounded above where the standard deviation collapses on its
        value. Not reduced.

    Gradient:
        Flows to all arguments.

    Raises:
        AssertionError: shapes differ.

    References:
        Textbook. Deviation: none.
    """
    chex.assert_equal_shape([value, mean, log_std])
    dtype = accumulator(value)
    log_std = log_std.astype(dtype)
    score = (value.astype(dtype) - mean.astype(dtype)) * jnp.exp(-log_std)
    return -0.5 * math.log(2.0 * math.pi) - log_std - 0.5 * jnp.square(score)


def temporal_difference(
    q_values: jax.Array,
    actions: jax.Array,
    mask: jax.Array,
    next_log_probs: jax.Array | None = None,
    *,
    gamma: float = 1.0,
    next_value: NextValue = "sampled",
    stop_gradient: StopGradient = "none",
    terminal: Terminal = "drop",
) -> tuple[jax.Array, jax.Array]:
    r"""Reward implied by action values, and the mask of the transitions that have one.

    .. math:: \delta_t = Q(s_t, a_t) - \gamma\, V_{t+1}, \qquad
        V_t = Q(s_t, a_t) \text{ or } \textstyle\sum_a p(a | s_t)\, Q(s_t, a)

    Args:
        q_values: float[*batch, T, A], finite where the mask is not set (`fill_masked`).
        actions: int[*batch, T]; anything in padding.
        mask: bool or 0/1 numbers, [*batch, T].
        next_log_probs: float[*batch, T, A], log p; needed for "expected" only.
        gamma: in [0, 1], discount of the next value.
        next_value: see `rkd_jax.losses.avril`, and so for the others.
        stop_gradient: what is a constant.
        terminal: what happens at the last action.

    Returns:
        delta float32[*batch, T], 0 outside the second; bool[*batch, T], set where t and
        t + 1 are ("drop"), or where t is ("anchor").

    Gradient:
        Flows to ``q_values``, and to ``next_log_probs``, less what is stopped.

    Raises:
        ValueError: unknown switch, gamma out of range (Python numbers).
        AssertionError: shapes differ.

    References:
        AVRIL, 2102.06483. Deviation: switches, see `avril`.
    """
    check_domain("gamma", gamma, "[0, 1]")
    check_choice("next_value", next_value, get_args(NextValue))
    check_choice("stop_gradient", stop_gradient, get_args(StopGradient))
    check_choice("terminal", terminal, get_args(Terminal))
    chex.assert_shape([actions, mask], q_values.shape[:-1])
    q_values = q_values.astype(accumulator(q_values))
    taken = taken_values(q_values, actions, mask)
    value = taken
    if next_value == "expected":
        chex.assert_equal_shape([q_values, next_log_probs])
        probs = jnp.exp(next_log_probs.astype(q_values.dtype))
        # An impossible action may have the value -inf, and 0 * -inf is not 0.
        value = jnp.sum(probs * jnp.where(probs > 0, q_values, 0.0), axis=-1)
    kept = mask.astype(bool)
    continues = _shift_left(kept)
    # Beyond the end the value is 0: the anchor, and what keeps padding out.
    following = jnp.where(continues, _shift_left(value), 0.0)
    if stop_gradient == "next":
        following = jax.lax.stop_gradient(following)
    transition_mask = kept if terminal == "anchor" else kept & continues
    delta = fill_masked(taken - gamma * following, transition_mask)
    if stop_gradient == "delta_for_phi":
        delta = jax.lax.stop_gradient(delta)
    return delta, transition_mask


def posterior_terms(
    delta: jax.Array,
    mean: jax.Array,
    log_std: jax.Array,
    transition_mask: jax.Array,
    prior_mean: float = 0.0,
    prior_std: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """`gaussian_kl` and `gaussian_log_prob` of every transition, 0 elsewhere.

    All arrays are [*batch, T]; outside the mask ``mean`` and ``log_std`` may hold
    anything. Gradient flows to the first three.
    """
    chex.assert_equal_shape([delta, mean, log_std, transition_mask])
    mean, log_std = (
        fill_masked(x.astype(delta.dtype), transition_mask) for x in (mean, log_std)
    )
    kl = gaussian_kl(mean, log_std, prior_mean=prior_mean, prior_std=prior_std)
    log_likelihood = gaussian_log_prob(delta, mean, log_std)
    return tuple(fill_masked(x, transition_mask) for x in (kl, log_likelihood))


def _shift_left(values: jax.Array) -> jax.Array:
    """``[..., T]``: entry t + 1 at t, zero at the end."""
    return jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)
