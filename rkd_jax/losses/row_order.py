"""Rows that count first, so that a loop over them can stop early.

>>> from rkd_jax.losses.readouts import Readout
>>> side = Readout(jnp.arange(3.0)[:, None], jnp.ones((1, 2)))
>>> rows = order_rows(2, side, None, None, jnp.array([False, True, True]))
>>> print(rows.index, rows.live)
[1 2 3 3] 2
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Ordered(NamedTuple):
    """The rows that count first; N' is a multiple of ``block``."""

    index: jax.Array | None  # int32[N'], N where there is no row; None: all as they are
    live: jax.Array  # number of rows that count
    hidden: tuple[jax.Array, ...]  # of student and teacher, [N', D]; dead rows are 0
    data: Any


def order_rows(block: int, student, teacher, data, mask) -> Ordered:
    """Gather the rows that count, so that the others cost nothing."""
    count = len(student.hidden)
    size = -(-count // block) * block
    hidden = tuple(side.hidden for side in (student, teacher) if side is not None)
    live = jnp.asarray(count, jnp.int32)
    if mask is None and size == count:
        return Ordered(None, live, hidden, data)
    index = jnp.arange(size, dtype=jnp.int32)
    if mask is not None:
        mask = mask.astype(bool)
        first = jnp.argsort(~mask, stable=True).astype(jnp.int32)
        index = index.at[:count].set(first)
        live = mask.sum(dtype=jnp.int32)
    index = jnp.where(jnp.arange(size, dtype=jnp.int32) < live, index, count)
    hidden, data = jax.tree.map(lambda x: take_rows(x, index), (hidden, data))
    return Ordered(index, live, hidden, data)


def take_rows(values: jax.Array, index: jax.Array | None) -> jax.Array:
    """Rows in order; zeros where there is none."""
    if index is None:
        return values
    return jnp.take(values, index, axis=0, mode="fill", fill_value=0)


def unorder_rows(values: jax.Array, rows: Ordered, count: int) -> jax.Array:
    """Rows back where they came from; zeros for those that do not count."""
    if rows.index is None:
        return values
    blank = jnp.zeros((count, *values.shape[1:]), values.dtype)
    return blank.at[rows.index].set(values, mode="drop")
