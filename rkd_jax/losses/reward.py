r"""Rewards from comparisons, and the confidence set they span.

Losses that distil a reward's differences into a policy are at home in
`rkd_jax.losses.reward_distillation`; the three main ones can be imported from here.

>>> import jax.numpy as jnp
>>> tie = Pair(jnp.array([0.3]), jnp.array([0.3]))
>>> print(jnp.exp(-bradley_terry(tie)))
[0.5]
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rkd_jax.losses.domain import check_domain
from rkd_jax.losses.pairs import pair_difference
from rkd_jax.losses.reward_distillation import (
    drdo,
    pessimistic_reduce,
    reward_distillation,
)
from rkd_jax.masking import accumulator
from rkd_jax.types import Pair

__all__ = [
    "bradley_terry",
    "check_epsilon",
    "confidence_slack",
    "drdo",
    "pair_difference",
    "pessimistic_reduce",
    "reward_distillation",
    "triviality_threshold",
]


def bradley_terry(
    rewards: Pair, *, margin: ArrayLike = 0.0, label: ArrayLike = 1.0
) -> jax.Array:
    r"""Bradley-Terry negative log-likelihood of a comparison, in nats per pair.

    .. math:: -l \log\sigma(r_w - r_l - m) - (1 - l) \log\sigma(r_l - r_w - m)

    Args:
        rewards: `Pair` of float[*batch], in nats: the scale of the logistic is 1.
        margin: by how much the preferred side is asked to win; real, or [*batch].
        label: probability that ``chosen`` was preferred, in [0, 1], or [*batch].
            Swapping the pair and taking 1 - label changes nothing.

    Returns:
        float32[*batch], positive; log 2 at a tie with margin 0. Not reduced.

    Gradient:
        Flows to both rewards; ``margin`` and ``label`` are data. For a hard label the
        chosen reward gets -sigma(r_l - r_w + m), the rejected one the opposite.

    Raises:
        ValueError: label out of range (Python numbers; arrays are not checked).
        AssertionError: the pair's shapes differ.

    References:
        Bradley and Terry, 1952; margin as in Touvron et al., Llama 2, 2307.09288,
        Eq. (2). Deviation: soft labels, mirrored margin.
    """
    check_domain("label", label, "[0, 1]")
    gap = pair_difference(rewards)
    label, margin = (
        jax.lax.stop_gradient(jnp.asarray(x, gap.dtype)) for x in (label, margin)
    )
    chosen_wins = jax.nn.softplus(margin - gap)
    rejected_wins = jax.nn.softplus(margin + gap)
    return label * chosen_wins + (1.0 - label) * rejected_wins


def confidence_slack(
    nll: jax.Array, anchor_nll: jax.Array, *, epsilon: float
) -> jax.Array:
    r"""How far each pair's loss is above the anchor's budget, in nats.

    .. math:: s = \mathrm{NLL}_r - \mathrm{NLL}_{\hat r} - \epsilon

    A reward lies in the confidence set iff the *mean* over the pairs is at most 0;
    single pairs may be on either side.

    Args:
        nll: float[*batch], loss of the reward player on a pair (`bradley_terry`).
        anchor_nll: float[*batch], loss of the frozen maximum-likelihood anchor on the
            *same* pairs.
        epsilon: positive, nats per pair; see `check_epsilon` for its upper limit.

    Returns:
        float32[*batch]; positive means outside. Not reduced.

    Gradient:
        Flows to ``nll`` with weight 1; the anchor is data.

    Raises:
        ValueError: epsilon out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        PbKD, 2505.18952, confidence set. Reconstruction: how the practical algorithm
        enforces it is not published; epsilon is 2 zeta / n of the paper's slack zeta.
    """
    check_domain("epsilon", epsilon, "(0, inf)")
    chex.assert_equal_shape([nll, anchor_nll])
    nll = nll.astype(accumulator(nll))
    anchor_nll = jax.lax.stop_gradient(anchor_nll).astype(nll.dtype)
    return nll - anchor_nll - epsilon


def triviality_threshold(anchor_nll_mean: ArrayLike) -> ArrayLike:
    r"""The radius from which the confidence set contains the zero reward, in nats.

    .. math:: \epsilon_0 = \log 2 - \overline{\mathrm{NLL}}_{\hat r}

    At and above it the value of the game is exactly 0: the preferences say nothing.

    Args:
        anchor_nll_mean: mean Bradley-Terry loss of the anchor, nats per pair. Soft
            labels are included; a margin is not.

    Returns:
        Same kind as the argument. Not positive if the anchor is no better than a tie.

    Gradient:
        -1; meant for numbers.

    References:
        PbKD, 2505.18952. Derived, not stated there: the zero reward has loss log 2.
    """
    return math.log(2.0) - anchor_nll_mean


def check_epsilon(epsilon: float, anchor_nll: ArrayLike) -> None:
    """Refuse, on the host and before training, a radius that makes the game trivial.

    Args:
        epsilon: radius of the confidence set, nats per pair.
        anchor_nll: loss of the anchor, its mean or one number per pair, in nats.

    Returns:
        Nothing.

    Gradient:
        None: host side.

    Raises:
        ValueError: epsilon not positive, or at or above `triviality_threshold`. The
            message holds both numbers and the remedy.

    References:
        See `triviality_threshold`.
    """
    check_domain("epsilon", epsilon, "(0, inf)")
    mean = float(np.mean(np.asarray(anchor_nll, np.float64)))
    threshold = triviality_threshold(mean)
    if epsilon < threshold:
        return
    remedy = (
        f"choose epsilon below {threshold:.6g}"
        if threshold > 0
        else "train the anchor further, it is no better than a coin flip"
    )
    raise ValueError(
        f"epsilon = {epsilon:.6g} is not below the triviality threshold log 2 - "
        f"{mean:.6g} (anchor NLL) = {threshold:.6g} nats: the zero reward is in the "
        f"confidence set and the game has value 0; {remedy}"
    )
