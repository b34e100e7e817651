r"""Soft values of a frozen teacher, and how their differences shape a preference loss.

A language model acts in a token MDP whose states are prefixes; the value of a state is
a log-sum-exp of what the teacher says there (`soft_value`). The differences of such a
potential along a response add up to one number (`potential_shaping`),

.. math:: \Psi_\gamma(y) = \sum_{t=0}^{T-1} \big(\gamma V(s_{t+1}) - V(s_t)\big),

which joins the implicit reward of DPO (`tvkd`):

.. math:: -\log\sigma\Big(\beta\,[\Delta\log\pi_\theta - \Delta\log\pi_{ref}]
    + s\,\alpha\,\mathrm{sg}\,\Delta\Psi_\gamma\Big)

Derived, not stated in the source: with labels from a reward r the optimum is
:math:`\pi \propto \pi_{ref}\,e^{(r - s\alpha\Psi)/\beta}`. So a setting either is DPO
(`check_shaping` refuses those) or moves the optimum: with s = +1 the student leans away
from responses of high :math:`\Psi`, with s = -1 towards them. Values are entropies, so
:math:`\Psi` is mostly a length (`rkd_jax.signals.values.length_correlation`).

>>> import jax.numpy as jnp
>>> values = jnp.array([1.0, 2.0, jnp.nan])
>>> mask = jnp.array([True, True, False])
>>> print(potential_shaping(values, mask, gamma=0.5))  # (0.5 * 2 - 1) + (0 - 2)
-2.0
"""

from __future__ import annotations

import numbers
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.pairs import log_ratio, pair_difference, scaled
from rkd_jax.losses.reward import bradley_terry
from rkd_jax.masking import accumulator, fill_masked, last_target, sequence_sum
from rkd_jax.types import Pair

# V(s_T) by a rule that needs no further values, or the values themselves.
Terminal = Literal["zero", "last_prefix"] | jax.Array
ValueSource = Literal["log_probs", "raw_logits"]


def soft_value(
    logits: jax.Array, *, power: float = 1.0, scale: float = 1.0
) -> jax.Array:
    r"""Soft value of a state, from the scores of its actions.

    .. math:: V(s) = \kappa \log\sum_a \exp(p\,\ell(a|s))

    The temperature form :math:`\tau\log\sum_a e^{\ell/\tau}` is p = 1 / tau,
    kappa = tau.

    Args:
        logits: float[*batch, V], unnormalised logits or log-probs, any float dtype;
            evaluated in float32. -inf marks impossible actions.
        power: positive, p.
        scale: positive, kappa.

    Returns:
        float32[*batch], in nats times ``scale``; neither masked nor reduced. On
        log-probs: 0 for p = 1, and otherwise scale times (1 - p) times the Renyi
        entropy of order p, so in [0, scale (1 - p) log V] for p < 1. -inf where every
        action is impossible.

    Gradient:
        Flows to ``logits``: scale * power * softmax(power * logits). NaN where every
        action is impossible.

    Raises:
        ValueError: power or scale out of range (Python numbers; traced ones are not
            checked).

    References:
        TVKD, 2509.16965: value of a DPO-trained teacher; the form with a power is that
        of the released code (StarLab_Preference-Distillation-via-Value-based-
        Reinforcement-Learning). Reconstruction: the paper's own equation and constants
        are not published in what we have.
    """
    check_domain("power", power, "(0, inf)")
    check_domain("scale", scale, "(0, inf)")
    logits = logits.astype(accumulator(logits))
    power, scale = (jnp.asarray(x, logits.dtype) for x in (power, scale))
    return scale * jax.nn.logsumexp(power * logits, axis=-1)


def potential_shaping(
    values: jax.Array, mask: jax.Array, *, gamma: float, terminal: Terminal = "zero"
) -> jax.Array:
    r"""Undiscounted sum of discounted potential differences along a response.

    .. math:: \Psi_\gamma(y) = \sum_{t=0}^{T-1} \big(\gamma V(s_{t+1}) - V(s_t)\big)
        = \gamma \big(V(s_T) - V(s_0)\big) - (1 - \gamma) \sum_{t=0}^{T-1} V(s_t)

    The right-hand side is what is evaluated: it is exact at gamma = 1 and never looks
    at a padding column.

    Args:
        values: float[*batch, T], V of the state *before* each target, nats; padding
            may hold anything.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].
        terminal: V(s_T), after the last target. "zero"; "last_prefix", the value of the
            prefix that predicts the last target; or an array float[*batch].

    Returns:
        float32[*batch], nats; 0 where no entry is set.

    Gradient:
        Flows to set values and to an array ``terminal``; `tvkd` stops it.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked),
            or a ``terminal`` of an unknown name.
        AssertionError: shapes differ.

    References:
        TVKD, 2509.16965: potential-based form. Reconstruction: the paper's discount,
        terminal value and normalisation are not published in what we have. Discounting
        the sum itself as well would telescope to the two ends and, at terminal zero,
        change nothing in a pair.
    """
    check_domain("gamma", gamma, "[0, 1]")
    first, last, total = _ends_and_sum(values, mask, terminal)
    gamma = jnp.asarray(gamma, total.dtype)
    return gamma * (last - first) - (1.0 - gamma) * total


def next_value_sum(
    values: jax.Array, mask: jax.Array, *, terminal: Terminal = "zero"
) -> jax.Array:
    r"""Sum of the values of the states *after* each target, in nats.

    .. math:: \sum_{t=0}^{T-1} V(s_{t+1})

    Args:
        values: float[*batch, T], V of the state *before* each target, nats; padding
            may hold anything.
        mask: bool or 0/1 numbers, [*batch, T].
        terminal: V(s_T), as `potential_shaping`.

    Returns:
        float32[*batch], nats; 0 where no entry is set.

    Gradient:
        Flows to set values but the first, and to an array ``terminal``.

    Raises:
        ValueError: a ``terminal`` of an unknown name.
        AssertionError: shapes differ.

    References:
        A term of the losses released with TVKD, 2509.16965; see `release_return`.
        Deviation: the terminal is explicit, where the released code reads padding.
    """
    first, last, total = _ends_and_sum(values, mask, terminal)
    return total - first + last


def tvkd(
    student: Pair,
    reference: Pair | None,
    shaping: Pair,
    *,
    beta: float = 0.1,
    alpha: float | None = None,
    sign: float = 1.0,
) -> jax.Array:
    r"""DPO with the teacher's value differences as a granted margin, in nats per pair.

    .. math:: -\log\sigma\Big(\beta\,[\Delta\log\pi_\theta - \Delta\log\pi_{ref}]
        + s\,\alpha\,\mathrm{sg}\big[\Psi(y^w) - \Psi(y^l)\big]\Big)

    Args:
        student: `Pair` of float[*batch], log-probs *summed* over the response, nats.
        reference: the same under the frozen reference; None leaves the term out.
        shaping: `Pair` of float[*batch], `potential_shaping` of each response, nats.
        beta: positive, scale of the log-ratios.
        alpha: at least 0, scale of the shaping; None is ``beta``, so that both are
            measured in the same nats. 0 is exactly `dpo`.
        sign: 1 or -1, s: whether the shaping counts as reward already granted to the
            chosen response or as reward still asked for.

    Returns:
        float32[*batch], positive. Equals `dpo` where both responses have the same
        shaping. Not reduced.

    Gradient:
        Flows to the student only: that of `dpo`, each pair re-weighted by
        sigma(-logit) with the shaping over the same without.

    Raises:
        ValueError: beta or alpha out of range (Python numbers; traced ones are not
            checked), or sign not 1 or -1.
        AssertionError: shapes differ.

    References:
        TVKD, 2509.16965. Reconstruction: the equation of the objective and the values
        of alpha and beta are not published in what we have; sign +1 is that of the
        released branch ``tpkd_ref``.
    """
    check_domain("beta", beta, "(0, inf)")
    alpha = beta if alpha is None else alpha
    check_domain("alpha", alpha, "[0, inf)")
    if isinstance(sign, numbers.Real) and sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign}")
    if reference is None:
        reference = Pair(*map(jnp.zeros_like, student))
    chex.assert_equal_shape([*student, *reference, *shaping])
    rewards = scaled(log_ratio(student, reference), beta)
    granted = sign * alpha * pair_difference(shaping)
    return bradley_terry(rewards, margin=-granted)  # to which a margin is data


def check_shaping(
    *,
    gamma: float,
    power: float,
    terminal: Terminal | Literal["after_eos"],
    value_source: ValueSource = "log_probs",
) -> None:
    """Refuse, on the host and before training, the settings that are plain DPO.

    Args:
        gamma: in [0, 1], discount of `potential_shaping`.
        power: as `soft_value`.
        terminal: as `potential_shaping`, or "after_eos", a value read off the teacher
            after the last target.
        value_source: what the values are taken of; "log_probs" are normalised.

    Returns:
        Nothing.

    Gradient:
        None: host side.

    Raises:
        ValueError: gamma = 1 at terminal "zero", where the differences telescope to
            V(s_0), the same for both responses; or power = 1 on log-probs, where every
            value is log 1 = 0. The message holds the remedy.

    References:
        Derived: see the module's docstring.
    """
    check_potential(power=power, value_source=value_source)
    if gamma == 1 and isinstance(terminal, str) and terminal == "zero":
        raise ValueError(
            "gamma = 1 with terminal 'zero' is plain DPO: the shaping telescopes to "
            "the value of the prompt, which both responses share; choose gamma below 1 "
            "or terminal 'last_prefix' or 'after_eos'"
        )


def check_potential(*, power: float, value_source: ValueSource = "log_probs") -> None:
    """The part of `check_shaping` that concerns the values alone."""
    if power == 1 and value_source == "log_probs":
        raise ValueError(
            "power = 1 on normalised log-probs makes every value log 1 = 0, so the "
            "teacher says nothing; choose another power or value_source 'raw_logits'"
        )


def last_entry(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The value at the last set entry, ``[*batch, T] -> [*batch]``; 0 where none is."""
    return sequence_sum(values, last_target(mask))


def _first_entry(values: jax.Array, mask: jax.Array) -> jax.Array:
    mask = mask.astype(bool)
    return sequence_sum(values, mask & (jnp.cumsum(mask, axis=-1) == 1))


def _ends_and_sum(
    values: jax.Array, mask: jax.Array, terminal: Terminal
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """V(s_0), V(s_T) and the sum of V(s_t) over t < T; all 0 for an empty response."""
    chex.assert_equal_shape([values, mask])
    values = values.astype(accumulator(values))
    first, total = _first_entry(values, mask), sequence_sum(values, mask)
    if not isinstance(terminal, str):
        chex.assert_shape(terminal, total.shape)
        last = fill_masked(jnp.asarray(terminal, values.dtype), mask.any(-1))
    else:
        check_choice("terminal", terminal, ("zero", "last_prefix"))
        kept = terminal == "last_prefix"
        last = last_entry(values, mask) if kept else jnp.zeros_like(total)
    return first, last, total
