"""The only reductions of the library, and the masking of what goes into a loss.

A masked-out entry may hold anything, NaN included: it changes neither value nor
gradient. That protects the *reduction*; a loss that computes something non-finite
before it reduces has to mask its input as well, because its backward pass multiplies
the reduction's zero by that something::

    student = fill_masked(student_logits, mask)
    teacher = fill_masked(teacher_logits, mask)
    total = masked_sum(forward_kl(student, teacher), mask)

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


def segment_sum(
    values: jax.Array, mask: jax.Array, segment_ids: jax.Array, *, segments: int
) -> jax.Array:
    """Sum over the target positions of each segment of a row.

    Args:
        values: float[*batch, T], any unit.
        mask: bool or 0/1 numbers, [*batch, T].
        segment_ids: int32[*batch, T]; 0, and ids above ``segments``, are left out.
        segments: how many segments are summed, those with ids 1 to ``segments``.

    Returns:
        float32[*batch, segments]; 0 for a segment without a set entry.

    Gradient:
        Flows to set entries only; exactly 0 elsewhere.

    Raises:
        AssertionError: shapes differ.
    """
    chex.assert_equal_shape([values, mask, segment_ids])
    *batch, width = values.shape
    kept = jnp.where(mask.astype(bool), values.astype(accumulator(values)), 0.0)

    def row_sums(row, ids):
        return jax.ops.segment_sum(row, ids, num_segments=segments + 1)

    sums = jax.vmap(row_sums)(kept.reshape(-1, width), segment_ids.reshape(-1, width))
    return sums[:, 1:].reshape(*batch, segments)


def last_target(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """The last set entry of each row, or of each segment of it, if there is one.

    Args:
        mask: bool or 0/1 numbers, [*batch, T].
        segment_ids: int32[*batch, T], ascending along a row; None: one segment.

    Returns:
        bool[*batch, T], set on those entries only.
    """
    mask = mask.astype(bool)
    ids = jnp.ones(mask.shape, jnp.int32) if segment_ids is None else segment_ids
    none = jnp.iinfo(ids.dtype).max
    following = jnp.where(mask, ids, none)[..., 1:]
    end = jnp.full_like(ids[..., :1], none)
    # Ids ascend: the smallest one behind an entry is that of the next set entry.
    following = jax.lax.cummin(
        jnp.concatenate([following, end], axis=-1), axis=mask.ndim - 1, reverse=True
    )
    return mask & (following != ids)


def fill_masked(values: jax.Array, mask: jax.Array, fill: float = 0.0) -> jax.Array:
    """``values`` where ``mask`` is set, ``fill`` elsewhere: masks the input of a loss.

    Args:
        values: number[*shape, *trailing], any unit and dtype.
        mask: bool or 0/1 numbers, [*shape]; broadcast over the trailing axes.
        fill: what padding becomes; any number at which the loss is finite.

    Returns:
        ``values`` with its shape and dtype kept.

    Gradient:
        Flows to set entries only; exactly 0 elsewhere, as long as the loss is
        differentiable at ``fill``.

    Raises:
        AssertionError: the shape of ``mask`` is no prefix of the shape of ``values``.
    """
    chex.assert_equal_shape_prefix([values, mask], mask.ndim)
    kept = jnp.expand_dims(mask.astype(bool), tuple(range(mask.ndim, values.ndim)))
    return jnp.where(kept, values, jnp.asarray(fill, values.dtype))


def accumulator(values: jax.Array) -> jnp.dtype:
    """The dtype results are computed in: float32, or float64 for float64 input."""
    wide = values.dtype == jnp.float64
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
