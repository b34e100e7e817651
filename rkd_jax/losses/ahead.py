"""Gradients that the forward pass leaves behind, for a cotangent that was foreseen.

What costs much in a loss over the vocabulary is to compute the logits, and a gradient
needs them a second time unless it is made along with the value. That takes knowing what
the values will be multiplied with. A foreseen cotangent need only be right up to a
factor: gradients are linear.

>>> made = {"head": jnp.array([1.0, 2.0])}
>>> foreseen, come = jnp.array([1.0, 0.0]), jnp.array([3.0, 0.0])
>>> print(scaled_or_again(made, foreseen, come, lambda: made)["head"])
[3. 6.]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def scaled_or_again(
    ahead: Any, foreseen: Any, cotangent: Any, again: Callable[[], Any]
) -> Any:
    """The gradient under ``cotangent``: ``ahead`` times a factor, 0, or ``again()``.

    Args:
        ahead: a pytree, the gradient under ``foreseen``; it may be wider.
        foreseen: a pytree of floats.
        cotangent: the same, of the same shapes and dtypes.
        again: computes the gradient; it runs only where no factor takes one to the
            other, up to rounding. What it returns decides the dtypes.
    """
    scale, way = proportion(cotangent, foreseen)
    wanted = jax.eval_shape(again)

    def scaled():
        return jax.tree.map(
            lambda x, like: (scale.astype(x.dtype) * x).astype(like.dtype),
            ahead,
            wanted,
        )

    def nothing():
        return jax.tree.map(
            lambda x, like: jnp.zeros_like(x).astype(like.dtype), ahead, wanted
        )

    return on_the_way(way, scaled, again, nothing)


def proportion(cotangent: Any, foreseen: Any) -> tuple[jax.Array, jax.Array]:
    """The factor between two trees of floats, and the way from one to the other.

    Args:
        cotangent: a pytree of floats.
        foreseen: the same, of the same shapes and dtypes.

    Returns:
        the factor, and int32[]: 0 where it takes one to the other, up to rounding, 1
        where it does not, and 2 where the cotangent is 0 everywhere, and so is a
        gradient; 0 times one that was foreseen infinite would not be.
    """
    values, weights = _flat(cotangent), _flat(foreseen)
    largest = jnp.argmax(jnp.abs(weights))
    scale = values[largest] / jnp.where(weights.any(), weights[largest], 1.0)
    limits = jnp.finfo(values.dtype)
    noise = 4 * limits.eps * jnp.maximum(jnp.abs(values), limits.tiny)
    exact = jnp.all(jnp.abs(values - scale * weights) <= noise)
    some = values.any()
    return scale, jnp.where(some, jnp.where(exact, 0, 1), 2).astype(jnp.int32)


def on_the_way(way: jax.Array, scaled, again, nothing, *operands) -> Any:
    """What one of three functions makes of the operands, by `proportion`.

    Not one switch of three: of two branches the first costs nothing where it returns
    its operand, of three XLA for TPUs copies it.
    """

    def unscaled(*operands):
        return jax.lax.cond(way == 1, again, nothing, *operands)

    return jax.lax.cond(way == 0, scaled, unscaled, *operands)


def _flat(tree: Any) -> jax.Array:
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
