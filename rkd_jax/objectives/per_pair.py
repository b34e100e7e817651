"""Losses with one number per preference pair, as an objective's output."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rkd_jax.masking import masked_sum
from rkd_jax.packed import Pairs, pair_sums
from rkd_jax.types import LossOutput, Mean, Sequences


def real_pairs(sequences: Sequences) -> jax.Array:
    """Which of the pairs ``[B, 2]`` are data, bool[B].

    A pair whose responses are both empty is padding, not data.
    """
    return sequences.response_mask.any(axis=(-1, -2))


def real_pairs_of(pairs: Pairs) -> jax.Array:
    """`real_pairs` of a batch, packed or not: bool[B] or bool[B, M]."""
    ones = jnp.ones(pairs.sequences.response_mask.shape, jnp.float32)
    return (pair_sums(ones, pairs) > 0).any(axis=-1)


def per_pair(losses: jax.Array, real: jax.Array, **metrics: jax.Array) -> LossOutput:
    """Sums over the real pairs.

    Args:
        losses: float[B], or [B, M] of packed pairs.
        real: bool, of the same shape: `real_pairs` or `real_pairs_of`.
        metrics: float, of the same shape each; their names get the prefix ``student/``.

    Returns:
        `LossOutput` normalised by the number of real pairs.
    """
    total = masked_sum(losses, real)
    weight = real.sum().astype(total.dtype)
    means = {
        f"student/{name}": Mean(masked_sum(values, real), weight)
        for name, values in metrics.items()
    }
    return LossOutput(total, weight, means)
