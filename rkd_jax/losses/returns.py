r"""Discounts and returns along a response.

.. math:: R = \sum_h \gamma^h r_h, \qquad G_t = r_t + \gamma G_{t+1}

>>> import jax.numpy as jnp
>>> rewards = jnp.array([1.0, 2.0, jnp.nan])
>>> mask = jnp.array([True, True, False])
>>> print(trajectory_return(rewards, mask, gamma=0.5))
2.0
>>> print(reward_to_go(rewards, mask, gamma=0.5))
[2. 2. 0.]
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_domain
from rkd_jax.masking import accumulator, fill_masked, sequence_sum


def discount_weights(
    mask: jax.Array, *, gamma: float, segment_ids: jax.Array | None = None
) -> jax.Array:
    r"""The discount of each step, :math:`\gamma^h`, h counting response tokens from 0.

    Args:
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].
        segment_ids: int32[*batch, T], whose segments lie side by side and are counted
            each by itself; None: a row is one response.

    Returns:
        float32[*batch, T]; 1 at the first set entry, 0 where the mask is not set.

    Gradient:
        None: hyper-parameters only.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked).

    References:
        Textbook. Deviation: none.
    """
    check_domain("gamma", gamma, "[0, 1]")
    kept = mask.astype(bool)
    counts = jnp.cumsum(kept, axis=-1)
    if segment_ids is not None:
        counts = counts - _counted_before(counts, kept, segment_ids)
    step = jnp.maximum(counts - 1, 0)
    dtype = jnp.result_type(float)
    weights = jnp.power(jnp.asarray(gamma, dtype), step.astype(dtype))
    return jnp.where(kept, weights, 0.0)


def _counted_before(
    counts: jax.Array, kept: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """int[*batch, T]: set entries of the row in front of the segment of each entry."""
    chex.assert_equal_shape([kept, segment_ids])
    first = jnp.ones_like(kept[..., :1])
    change = segment_ids[..., 1:] != segment_ids[..., :-1]
    begins = jnp.concatenate([first, change], axis=-1)
    before = jnp.where(begins, counts - kept.astype(counts.dtype), 0)
    return jax.lax.cummax(before, axis=before.ndim - 1)


def trajectory_return(
    rewards: jax.Array, mask: jax.Array, *, gamma: float = 1.0
) -> jax.Array:
    r"""Discounted return of a response, in the unit of the rewards.

    .. math:: R = \sum_h \gamma^h r_h

    Args:
        rewards: float[*batch, T], reward of each target; padding may hold anything.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch], a sum that is not divided by length; 0 where no entry is set.

    Gradient:
        Flows to set rewards, with weight gamma**h; exactly 0 elsewhere.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        PbKD, 2505.18952: trajectory reward. Deviation: none.
    """
    rewards = fill_masked(rewards.astype(accumulator(rewards)), mask)
    discounts = discount_weights(mask, gamma=gamma).astype(rewards.dtype)
    return sequence_sum(discounts * rewards, mask)


def reward_to_go(
    rewards: jax.Array, mask: jax.Array, *, gamma: float = 1.0
) -> jax.Array:
    r"""Discounted sum of the rewards from each step on.

    .. math:: G_t = r_t + \gamma G_{t+1}

    over set entries; an entry that is not set is skipped, without a discount.

    Args:
        rewards: float[*batch, T], reward of each target; padding may hold anything.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch, T], unit of the rewards; 0 where the mask is not set. The first
        set entry equals `trajectory_return`.

    Gradient:
        Flows to set rewards only.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        Textbook. Deviation: none.
    """
    check_domain("gamma", gamma, "[0, 1]")
    chex.assert_equal_shape([rewards, mask])
    rewards = fill_masked(rewards.astype(accumulator(rewards)), mask)
    gamma = jnp.asarray(gamma, rewards.dtype)
    discounts = jnp.where(mask.astype(bool), gamma, jnp.ones_like(gamma))

    # Each step is the affine map G -> reward + discount * G; a scan composes them.
    def after(later, now):
        return later[0] * now[0], now[1] + now[0] * later[1]

    _, to_go = jax.lax.associative_scan(
        after, (discounts, rewards), reverse=True, axis=rewards.ndim - 1
    )
    return fill_masked(to_go, mask)
