"""Rows, heads and tiles of the tests of fused losses, and the comparison with dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.losses import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from rkd_jax.losses.fused import Tiles

# More units than rows of a chunk, so that gradients of heads come in tiles.
ROWS, WIDTH, TEACHER_WIDTH, VOCABULARY, TOP = 37, 11, 9, 53, 5
SMALL = functools.partial(Tiles, logits=53 * 8, block=16, columns=20)
TILES = {  # by how the gradient comes about; one chunk holds all rows of the last
    "recompute": SMALL(gradient="recompute"),
    "ahead": SMALL(gradient="ahead"),
    "keep": Tiles(),
}
# Where a loss has two sides, a chunk of 24 rows goes by strips of 8.
STRIPS = Tiles(logits=53 * 24, strip=53 * 8, block=24, columns=20, gradient="ahead")
TILES_OF_TWO = TILES | {"strips": STRIPS}
DIVERGENCES = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd-0": functools.partial(generalized_jsd, beta=0),
    "jsd-0.1": functools.partial(generalized_jsd, beta=0.1),
    "jsd-0.5": functools.partial(generalized_jsd, beta=0.5),
    "jsd-1": functools.partial(generalized_jsd, beta=1),
    "skew-forward": functools.partial(skew_forward_kl, alpha=0.3),
    "skew-reverse": functools.partial(skew_reverse_kl, alpha=0.3),
    "total-variation": total_variation,
}
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape)  # numpy: float64 before x64 is switched on


HIDDEN, HEAD, BIAS = normal(ROWS, WIDTH), normal(WIDTH, VOCABULARY), normal(VOCABULARY)
TEACHER_HIDDEN = normal(ROWS, TEACHER_WIDTH)
TEACHER_HEAD, TEACHER_BIAS = normal(TEACHER_WIDTH, VOCABULARY), normal(VOCABULARY)
TARGETS = RNG.integers(0, VOCABULARY, ROWS)
MASK = RNG.random(ROWS) < 0.6
ANY = normal(ROWS)  # a cotangent that is no multiple of the mask
IDS = np.argsort(RNG.random((ROWS, VOCABULARY)))[:, :TOP]


def logits(hidden, head, bias=None, softcap=None):
    found = jnp.matmul(hidden, head)
    found = found if bias is None else found + bias[None]
    return found if softcap is None else jnp.tanh(found / softcap) * softcap


def agree(fused, dense, *arguments, mask=None, rtol=1e-10, atol=1e-12):
    """Values and gradients, for a sum and for a cotangent without a pattern.

    Masked rows of the fused loss's states hold NaN.
    """
    arguments = [jnp.asarray(x) for x in arguments]
    inputs = list(arguments)
    if mask is not None:
        inputs[0] = jnp.where(mask[:, None], inputs[0], jnp.nan)

    def step(loss):
        def value(arguments, weights):
            values = loss(*arguments)
            if mask is not None:
                values = jnp.where(mask, values, 0.0)
            return (weights * values).sum(), values

        return jax.jit(jax.value_and_grad(value, has_aux=True))

    found, wanted = step(fused), step(dense)
    for weights in (jnp.ones(ROWS), jnp.asarray(ANY)):
        (_, values), gradients = found(inputs, weights)
        (_, expected), slopes = wanted(arguments, weights)
        np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol)
        for gradient, slope in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(gradient, slope, rtol=rtol, atol=atol)
    if mask is not None:
        assert not np.asarray(fused(*inputs))[~np.asarray(mask)].any()
