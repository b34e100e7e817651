"""Bradley-Terry maximum likelihood: the anchor of the confidence set.

.. math:: \\hat r = \\arg\\min_r \\overline{\\mathrm{NLL}}_r(D), \\qquad
    \\mathrm{NLL}_r = -\\log\\sigma\\big(r(x, y^w) - r(x, y^l)\\big)

The trained player is the reward model; it takes the ``student`` seat of the update,
because the update does not care what it trains.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rkd_jax.losses import bradley_terry, trajectory_return
from rkd_jax.types import (
    LossOutput,
    Mean,
    Objective,
    Pair,
    Params,
    PreferenceBatch,
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
    rewards = token_rewards(params, sequences, features)
    returns = trajectory_return(rewards, sequences.response_mask, gamma=gamma)
    return Pair(returns[..., 0], returns[..., 1])


def l2_penalty(params: Params) -> jax.Array:
    """Sum of the squares of all parameters, float32[]."""
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def make_reward_model(
    token_rewards: TokenRewards, *, gamma: float = 1.0, l2: float = 0.0
) -> Objective:
    """Bradley-Terry loss of a token reward, per pair.

    Args:
        token_rewards: reward of every target token; see `TokenRewards`.
        gamma: discount in (0, 1]; the return is not divided by length.
        l2: weight of `l2_penalty`, nats per pair. Separable preferences have no finite
            maximum of the likelihood; with a penalty they have one.

    Returns:
        `Objective` whose ``student_loss`` trains the reward parameters and reads
        `PreferenceSignal.features` if the reward needs them. Unit: nats per pair.
        Metrics ``reward_model/nll`` and ``reward_model/accuracy`` (ties count half).

    Gradient:
        Flows to the reward parameters only.

    References:
        PbKD (2505.18952) anchor; Bradley and Terry, 1952. Deviation: none.
    """

    def student_loss(
        params, critic, frozen, batch: PreferenceBatch, signal: PreferenceSignal, rng
    ):
        del critic, frozen, rng
        returns = pair_returns(
            token_rewards, params, batch.sequences, signal.features, gamma
        )
        valid = batch.sequences.response_mask.any(axis=(-1, -2))
        nll = bradley_terry(returns, label=batch.label)
        total = jnp.where(valid, nll, 0.0).sum()
        weight = valid.sum().astype(total.dtype)
        hit = 0.5 * (1.0 + jnp.sign(returns.chosen - returns.rejected))
        metrics = {
            "reward_model/nll": Mean(total, weight),
            "reward_model/accuracy": Mean(jnp.where(valid, hit, 0.0).sum(), weight),
        }
        if l2:
            total = total + l2 * weight * l2_penalty(params)
        return LossOutput(total, weight, metrics)

    return Objective("reward_model", student_loss)
