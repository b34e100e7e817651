"""A function of every position, or of every row, a slice of them at a time.

What it makes over the vocabulary exists for one slice only. A backward pass computes a
slice again, unless its gradient was foreseen (`rkd_jax.losses.ahead`).

>>> add = lambda trained, data, x: trained * x + data
>>> x = jnp.arange(5.0)[None]
>>> in_slices(add, jnp.array(2.0), jnp.array(1.0), (x,), size=2).tolist()
[[1.0, 3.0, 5.0, 7.0, 9.0]]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rkd_jax.losses.ahead import scaled_or_again

Given = tuple[Any, ...]
Along = Literal["positions", "rows"]
At = Callable[..., Any]
"""``(trained, data, *given [.., T, ..]) -> pytree of [.., T]``, whatever T is; or of
rows, ``*given [B, ..] -> pytree of [B]``."""


def in_slices(
    at: At,
    trained: Any,
    data: Any,
    given: Given,
    *,
    size: int,
    along: Along = "positions",
    foreseen: Any = None,
) -> Any:
    """``at(trained, data, *given)``, slices of ``size`` positions one after the other.

    Args:
        at: what is said of every position by itself; axes of a slice stand as in
            [size, *batch, ..].
        trained: a pytree of arrays of floats, all of which every slice reads.
        data: the same, of any kind.
        given: pytrees of arrays [*batch, T, ..], the first of them with no more axes.
        size: positions; ``at`` is called once, with [*batch, T, ..], if T is no larger.
        along: "rows" cuts the first axis, B, in place of T, into slices of ``size``
            rows: ``at`` says something of each row by itself, and may read all of it.
        foreseen: like the result, up to one factor what it will be multiplied with.
            It changes no number.

    Returns:
        A pytree of [*batch, T]; along rows of [B].

    Gradient:
        Flows as in ``at``; with ``foreseen`` to ``trained`` alone.
    """
    first = jax.tree.leaves(given[0])[0]
    axis = first.ndim - 1 if along == "positions" else 0
    length = first.shape[axis]
    if foreseen is not None:
        data, given = jax.lax.stop_gradient((data, given))
    if size >= length:
        return at(trained, data, *given)
    count = -(-length // size)

    def cut(array):
        array = jnp.moveaxis(array, axis, 0)
        padding = [(0, count * size - length)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(count, size, *array.shape[1:])

    def whole(array):
        array = array.reshape(count * size, *array.shape[2:])[:length]
        return jnp.moveaxis(array, 0, axis)

    slices = jax.tree.map(cut, given)
    if foreseen is None:
        found = _again(at, trained, data, slices)
    else:
        found = _ahead(at, trained, data, slices, jax.tree.map(cut, foreseen))
    return jax.tree.map(whole, found)


def _again(at: At, trained, data, slices):
    """A backward pass computes every slice a second time."""
    one = jax.checkpoint(lambda given: at(trained, data, *given), prevent_cse=False)
    return jax.lax.map(one, slices)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ahead(at: At, trained, data, slices, foreseen):
    """The forward pass leaves the gradient in ``trained`` behind."""
    del foreseen
    return _again(at, trained, data, slices)


def _forward(at, trained, data, slices, foreseen):
    gradient, values = _with_gradient(at, trained, data, slices, foreseen)
    return values, (gradient, trained, data, slices, foreseen)


def _backward(at, saved, cotangent):
    gradient, trained, data, slices, foreseen = saved
    foreseen = _like(foreseen, cotangent)

    def again():
        return _with_gradient(at, trained, data, slices, cotangent)[0]

    gradient = scaled_or_again(gradient, foreseen, cotangent, again)
    return gradient, None, None, None


_ahead.defvjp(_forward, _backward)


def _with_gradient(at: At, trained, data, slices, cotangent):
    """The gradient in ``trained``, summed over slices, and what they say."""

    def one(total, here):
        given, cotangent = here
        values, pull = jax.vjp(lambda trained: at(trained, data, *given), trained)
        (gradient,) = pull(_like(cotangent, values))
        return jax.tree.map(jnp.add, total, gradient), values

    nothing = jax.tree.map(jnp.zeros_like, trained)
    return jax.lax.scan(one, nothing, (slices, cotangent))


def _like(tree, other):
    """In the dtypes of another tree."""
    return jax.tree.map(lambda x, like: x.astype(like.dtype), tree, other)
