"""The rows of any model's cache: repeated, or put in another order.

A cache is a pytree that only its model understands; all that is known here is that
``init_cache`` makes it for any number of rows, so the axis of the rows of a leaf is the
one that grows with that number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rkd_jax.models.api import CausalLM
from rkd_jax.types import Params

_SHARED = -1  # the axis of a leaf that has none for rows, such as the next free slot


def row_axes(model: CausalLM, params: Params, length: int) -> Any:
    """Which axis of every leaf of the model's cache counts rows.

    Args:
        model: whose ``init_cache`` is asked, by shape alone, for one row and for two.
        params: its parameters.
        length: slots of the cache.

    Returns:
        a pytree like the cache, of ints; -1 for leaves that all rows share.
    """
    one, two = (
        jax.eval_shape(lambda p, rows=rows: model.init_cache(p, rows, length), params)
        for rows in (1, 2)
    )

    def axis(small, large):
        grown = [i for i in range(small.ndim) if small.shape[i] != large.shape[i]]
        return grown[0] if grown else _SHARED

    return jax.tree.map(axis, one, two)


def repeat_rows(cache: Any, axes: Any, times: int) -> Any:
    """Every row of ``cache`` ``times`` over, copies side by side."""
    if times == 1:
        return cache
    return _map_rows(lambda leaf, axis: jnp.repeat(leaf, times, axis=axis), cache, axes)


def take_rows(cache: Any, axes: Any, rows: jax.Array) -> Any:
    """Row ``rows[i]`` of ``cache`` as row i; a row may be taken twice, or never.

    Args:
        cache: R rows.
        axes: from `row_axes`.
        rows: int32[R'], each in 0 .. R - 1; not checked.

    Returns:
        the same cache of R' rows.
    """

    def take(leaf, axis):
        return jnp.take(leaf, rows, axis=axis, mode="clip")

    return _map_rows(take, cache, axes)


def _map_rows(change, cache, axes):
    return jax.tree.map(
        lambda leaf, axis: leaf if axis == _SHARED else change(leaf, axis), cache, axes
    )
