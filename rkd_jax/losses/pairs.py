"""Arithmetic on pairs that several losses share.

>>> import jax.numpy as jnp
>>> print(pair_difference(Pair(chosen=jnp.array([0.75]), rejected=jnp.array([0.5]))))
[0.25]
"""

from __future__ import annotations

import chex
import jax

from rkd_jax.masking import accumulator
from rkd_jax.types import Pair


def pair_difference(pair: Pair) -> jax.Array:
    """Chosen minus rejected, in float32 (float64 stays float64)."""
    chex.assert_equal_shape(list(pair))
    dtype = accumulator(pair.chosen)
    return pair.chosen.astype(dtype) - pair.rejected.astype(dtype)


def log_ratio(student: Pair, reference: Pair) -> Pair:
    """Log-ratio of both responses to the frozen reference, which is data."""
    chex.assert_equal_shape([*student, *reference])
    dtype = accumulator(student.chosen)

    def ratio(own, frozen):
        return own.astype(dtype) - jax.lax.stop_gradient(frozen).astype(dtype)

    return Pair(*map(ratio, student, reference))


def scaled(pair: Pair, factor: float) -> Pair:
    """The pair times a number, in float32 (float64 stays float64)."""
    return Pair(*(factor * member.astype(accumulator(member)) for member in pair))
