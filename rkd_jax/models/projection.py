"""A projection whose weight gradient has the layout and the dtype of the weight."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x: jax.Array,
    kernel: jax.Array,
    contracted: int = 1,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """``x @ kernel`` over the last axes of ``x`` and the first axes of ``kernel``.

    The derivative rule is written out for two reasons. JAX's own transpose builds the
    weight gradient transposed, and XLA on CPU then recomputes the cotangent in the
    wrong memory order (a fifth of a training step); and with bfloat16 states a float32
    kernel would receive a gradient rounded to bfloat16. Reverse mode only.

    Args:
        x: [*batch, *inner].
        kernel: [*inner, *outer], cast to the dtype of ``x``.
        contracted: number of inner axes.
        dtype: of the result; None for the dtype of ``x``.

    Returns:
        dtype[*batch, *outer].

    Gradient:
        To ``x`` in its dtype; to ``kernel`` accumulated in the kernel's dtype.
    """
    return _product(x, kernel, contracted, dtype)


def _product(x, kernel, contracted, dtype):
    lead = x.ndim - contracted
    axes = (tuple(range(lead, x.ndim)), tuple(range(contracted)))
    return _dot(x, kernel.astype(x.dtype), axes, dtype or x.dtype)


def _project_forward(x, kernel, contracted, dtype):
    # Not `project`: a checkpoint policy has to see the dot.
    return _product(x, kernel, contracted, dtype), (x, kernel)


def _project_backward(contracted, dtype, saved, cotangent):
    x, kernel = saved
    cotangent = cotangent.astype(x.dtype)
    lead = tuple(range(x.ndim - contracted))
    outer = tuple(range(len(lead), cotangent.ndim))
    inner = (outer, tuple(range(contracted, kernel.ndim)))
    to_x = _dot(cotangent, kernel.astype(x.dtype), inner, x.dtype)
    return to_x, _of_kernel(x, cotangent, lead, kernel)


def _of_kernel(x, cotangent, lead, kernel):
    """The kernel's gradient: a product over everything but its own axes."""
    if x.size <= cotangent.size:
        return _dot(x, cotangent, (lead, lead), kernel.dtype)
    outer = cotangent.ndim - len(lead)
    turned = _dot(cotangent, x, (lead, lead), kernel.dtype)
    # XLA turns the factors back. On CPUs it then writes the first one anew with its
    # rows as columns, number by number: of the wider one that is 2 to 7 % of a step.
    turned = jax.lax.platform_dependent(
        turned, cpu=jax.lax.optimization_barrier, default=lambda product: product
    )
    return turned.transpose(*range(outer, kernel.ndim), *range(outer))


def _dot(left, right, axes, dtype):
    def dot(left, right):
        return jax.lax.dot_general(left, right, (axes, ((), ())), None, dtype)

    def wide(left, right):
        return dot(left.astype(dtype), right.astype(dtype))

    if left.dtype == dtype:
        return dot(left, right)
    # On CPUs XLA has no product of halves into float32 for every order of axes; the
    # product of the wide copies is the same number.
    return jax.lax.platform_dependent(left, right, cpu=wide, default=dot)


project.defvjp(_project_forward, _project_backward)
