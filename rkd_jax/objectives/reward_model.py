"""Bradley-Terry maximum likelihood: the anchor of the confidence set, and ensembles.

.. math:: \\hat r = \\arg\\min_r \\overline{\\mathrm{NLL}}_r(D), \\qquad
    \\mathrm{NLL}_r = -\\log\\sigma\\big(r(x, y^w) - r(x, y^l)\\big)

The trained player is the reward model; it takes the ``student`` seat of the update,
because the update does not care what it trains. An ensemble is K such players in that
one seat: every parameter has a leading axis K, every pair K weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses import bradley_terry, trajectory_return
from rkd_jax.losses.domain import check_domain
from rkd_jax.losses.returns import discount_weights
from rkd_jax.masking import accumulator, fill_masked
from rkd_jax.objectives.per_pair import real_pairs_of
from rkd_jax.packed import Pairs, pair_sums, refuse_packed, target_segments
from rkd_jax.types import (
    LossOutput,
    Mean,
    Objective,
    Pair,
    Params,
    PreferenceSignal,
    Sequences,
)

TokenRewards = Callable[[Params, Sequences, jax.Array | None], jax.Array]
"""``(parameters, sequences [*batch], features | None) -> float32[*batch, T]``."""


def pair_returns(
    token_rewards: TokenRewards,
    params: Params,
    sequences: Sequences,
    features: jax.Array | None,
    gamma: float,
) -> Pair:
    """Discounted return of both responses of each pair, ``[pairs]`` each."""
    refuse_packed(sequences, "pair_returns")
    rewards = token_rewards(params, sequences, features)
    returns = trajectory_return(rewards, sequences.response_mask, gamma=gamma)
    return Pair(returns[..., 0], returns[..., 1])


def batch_returns(
    token_rewards: TokenRewards,
    params: Params,
    pairs: Pairs,
    features: jax.Array | None,
    gamma: float,
) -> Pair:
    """`pair_returns` of a batch, packed or not: ``[B]`` or ``[B, M]`` each."""
    sequences = pairs.sequences
    mask = sequences.response_mask
    rewards = token_rewards(params, sequences, features)
    rewards = fill_masked(rewards.astype(accumulator(rewards)), mask)
    segments = target_segments(sequences)
    discounts = discount_weights(mask, gamma=gamma, segment_ids=segments)
    returns = pair_sums(discounts.astype(rewards.dtype) * rewards, pairs)
    return Pair(returns[..., 0], returns[..., 1])


def pair_losses(returns: Pair, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
    """Bradley-Terry loss of each pair, and which are not padding: ``[pairs]`` each.

    The loss of a padding pair is a number without meaning, whatever its label holds.
    """
    real = real_pairs_of(pairs)
    return bradley_terry(returns, label=fill_masked(pairs.label, real, 1.0)), real


def l2_penalty(params: Params) -> jax.Array:
    """Sum of the squares of all parameters, float32[]."""
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def make_reward_model(
    token_rewards: TokenRewards, *, gamma: float = 1.0, l2: float = 0.0
) -> Objective:
    """Bradley-Terry loss of a reward, per pair.

    Args:
        token_rewards: reward of every target token; see `TokenRewards`.
        gamma: discount in (0, 1]; the return is not divided by length.
        l2: weight of `l2_penalty`, nats per pair. Separable preferences have no finite
            maximum of the likelihood; with a penalty they have one.

    Returns:
        `Objective` whose ``student_loss`` trains the reward parameters. It reads
        `PreferenceSignal.features` if the reward needs them and, if they are there, the
        pairs' `PreferenceSignal.weights` [B]. Unit: nats per pair; the sum is divided
        by the number of pairs, not by that of their weights. Metrics, unweighted:
        ``reward_model/nll`` and ``reward_model/accuracy`` (ties count half).

    Gradient:
        Flows to the reward parameters only.

    Raises:
        ValueError: l2 out of range; gamma when traced.

    References:
        PbKD (2505.18952) anchor; Bradley and Terry, 1952. Deviation: none.
    """
    check_domain("l2", l2, "[0, inf)")

    def student_loss(
        params, critic, frozen, batch: Pairs, signal: PreferenceSignal, rng
    ):
        del critic, frozen, rng
        comparisons = _compare(token_rewards, params, batch, signal.features, gamma)
        return _likelihood(comparisons, params, batch, signal.weights, l2)

    return Objective("reward_model", student_loss, packed=True)


def init_members(
    init: Callable[[jax.Array], Params], rng: jax.Array, members: int
) -> Params:
    """Parameters of K members, drawn apart: every leaf ``[K, ...]``.

    Every head starts at exactly 0, so *linear* heads on one frozen trunk are all the
    same at first, whatever the key: there, members differ by their weights alone.

    Args:
        init: ``key -> parameters`` of one member.
        rng: key; member k uses the k-th of its ``split``.
        members: K.

    Returns:
        The members' parameters, stacked.
    """
    return jax.vmap(init)(jax.random.split(rng, members))


def make_reward_ensemble(
    token_rewards: TokenRewards, members: int, *, gamma: float = 1.0, l2: float = 0.0
) -> Objective:
    r"""K reward models trained side by side, each on its own resample of the pairs.

    .. math:: \mathcal L(\phi_1, \dots, \phi_K) = \sum_k \frac1B \sum_b
        w_{bk}\,\mathrm{NLL}_{\phi_k}(b)

    The loss is the *sum* over the members, so each gets exactly the gradient, and under
    an optimiser that treats every entry by itself exactly the path, that
    `make_reward_model` would give it alone. A clip of the *global* gradient norm is no
    such optimiser: it ties the members together.

    Args:
        token_rewards: reward of one member; see `TokenRewards`. Members that share a
            frozen trunk are heads on its features, which all of them read.
        members: K, the leading axis of every parameter; see `init_members`.
        gamma, l2: as in `make_reward_model`; the penalty is each member's own.

    Returns:
        `Objective` whose ``student_loss`` trains the stacked parameters and reads
        `PreferenceSignal.features`, ``[B, 2, T, D]``, and `PreferenceSignal.weights`,
        ``[B, K]`` (`rkd_jax.signals.resampling`); None is 1 everywhere. Unit: nats per
        pair, summed over members. Metrics, unweighted and means over pairs and members:
        ``reward_model/nll``, ``reward_model/accuracy``; and ``reward_model/spread``,
        the standard deviation over members of a pair's margin, nats. At spread 0 they
        are one model K times.

    Gradient:
        Member k's loss reaches member k only.

    Raises:
        AssertionError: parameters or weights are not for K members.
        ValueError: ``members`` is not positive; others as `make_reward_model`.

    References:
        e-DPO, 2405.19316, trains K reward models. Reconstruction: how its members
        differ is not published in what we have.
    """
    if members < 1:
        raise ValueError(f"members={members} must be at least 1")
    check_domain("l2", l2, "[0, inf)")

    def student_loss(
        params, critic, frozen, batch: Pairs, signal: PreferenceSignal, rng
    ):
        del critic, frozen, rng
        chex.assert_tree_shape_prefix(params, (members,))
        if signal.weights is not None:
            chex.assert_axis_dimension(signal.weights, -1, members)

        def compare(member):
            return _compare(token_rewards, member, batch, signal.features, gamma)

        comparisons = jax.vmap(compare, out_axes=-1)(params)
        output = _likelihood(comparisons, params, batch, signal.weights, l2)
        margin = jax.lax.stop_gradient(comparisons.margin)
        spread = fill_masked(margin, real_pairs_of(batch)).std(axis=-1).sum()
        metrics = {"reward_model/spread": Mean(spread, output.weight)}
        return LossOutput(output.total, output.weight, output.metrics | metrics)

    return Objective("reward_ensemble", student_loss, packed=True)


class _Comparisons(NamedTuple):
    """What a reward says about every pair, ``[B]``, or ``[B, K]`` for K of them.

    Of packed pairs, ``[B, M]`` takes the place of ``[B]``.
    """

    margin: jax.Array  # return of the chosen minus that of the rejected
    nll: jax.Array


def _compare(token_rewards, params, batch, features, gamma) -> _Comparisons:
    returns = batch_returns(token_rewards, params, batch, features, gamma)
    nll, _ = pair_losses(returns, batch)
    return _Comparisons(returns.chosen - returns.rejected, nll)


def _likelihood(comparisons: _Comparisons, params, batch, weights, l2) -> LossOutput:
    """Weighted sum over pairs and members, per pair; metrics per pair and member."""
    real = real_pairs_of(batch)
    nll = fill_masked(comparisons.nll, real)
    hits = fill_masked(0.5 * (1.0 + jnp.sign(comparisons.margin)), real)
    pairs = real.sum().astype(nll.dtype)
    weighted = nll
    if weights is not None:
        chex.assert_equal_shape([nll, weights])
        given = jax.lax.stop_gradient(fill_masked(weights, real))
        weighted = given.astype(nll.dtype) * nll
    total = weighted.sum()
    if l2:
        total = total + l2 * pairs * l2_penalty(params)
    counted = pairs * (nll.size // real.size)
    metrics = {
        "reward_model/nll": Mean(nll.sum(), counted),
        "reward_model/accuracy": Mean(hits.sum(), counted),
    }
    return LossOutput(total, pairs, metrics)
