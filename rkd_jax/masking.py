"""The only reductions of the library.

A masked-out entry may hold anything, NaN included: it changes neither value nor
gradient. That protects the *reduction*; a loss that computes something non-finite
before it reduces has to mask its input instead (the double-`where` form).

>>> import jax.numpy as jnp
>>> float(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
2.0
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def masked_sum(
    values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Sum of ``values`` where ``mask`` is set.

    Args:
        values: float[*shape], any unit.
        mask: bool or 0/1 numbers, [*shape].
        axis: axes to sum over; None sums everything.

    Returns:
        float32, the shape of ``values`` without ``axis``; 0 where nothing is set.

    Gradient:
        Flows to set entries only; exactly 0 elsewhere.

    Raises:
        AssertionError: shapes differ.
    """
    chex.assert_equal_shape([values, mask])
    kept = jnp.where(mask.astype(bool), values.astype(accumulator(values)), 0.0)
    return jnp.sum(kept, axis=axis)


def masked_mean(
    values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Mean of ``values`` over the set entries of ``mask``; 0 if none is set.

    Args, gradient and errors as `masked_sum`.

    Returns:
        float32, the shape of ``values`` without ``axis``.
    """
    total = masked_sum(values, mask, axis)
    count = jnp.sum(mask.astype(bool), axis=axis).astype(total.dtype)
    return total / jnp.maximum(count, 1.0)


def sequence_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum over target positions, ``[..., T] -> [...]``; see `masked_sum`."""
    return masked_sum(values, mask, axis=-1)


def sequence_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over target positions, ``[..., T] -> [...]``; see `masked_mean`."""
    return masked_mean(values, mask, axis=-1)


def accumulator(values: jax.Array) -> jnp.dtype:
    """The dtype results are computed in: float32, or float64 for float64 input."""
    return jnp.promote_types(values.dtype, jnp.float32)
