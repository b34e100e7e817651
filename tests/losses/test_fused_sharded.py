"""Fused losses with the vocabulary over a mesh axis: the same numbers, no gather."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rkd_jax.losses import forward_kl, generalized_jsd, token_log_probs, topk_forward_kl
from rkd_jax.losses.fused import (
    Tiles,
    linear_divergence,
    linear_soft_value,
    linear_token_log_probs,
    linear_topk_divergence,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")

ROWS, WIDTH, VOCABULARY = 24, 6, 64
RNG = np.random.default_rng(1)
HIDDEN, TEACHER = RNG.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
HEAD, TEACHER_HEAD = RNG.normal(size=(2, WIDTH, VOCABULARY)).astype(np.float32)
TARGETS = RNG.integers(0, VOCABULARY, ROWS)
IDS = np.argsort(RNG.random((ROWS, VOCABULARY)))[:, :5]
COLUMNS = PartitionSpec(None, "tensor")
ROW = PartitionSpec()

options = functools.partial(Tiles, logits=8 * 8, block=8, columns=5)


def teacher_log_probs():
    return jax.nn.log_softmax(jnp.matmul(TEACHER, TEACHER_HEAD))


LOSSES = {
    "log-probs": (
        lambda h, w, t, u, **o: linear_token_log_probs(h, w, jnp.asarray(TARGETS), **o),
        lambda z, t: token_log_probs(z, jnp.asarray(TARGETS)),
    ),
    "forward": (linear_divergence, lambda z, t: forward_kl(z, t)),
    "jsd": (
        functools.partial(linear_divergence, divergence=generalized_jsd),
        lambda z, t: generalized_jsd(z, t),
    ),
    "topk": (
        lambda h, w, t, u, **o: linear_topk_divergence(
            h,
            w,
            jnp.asarray(IDS),
            jnp.take_along_axis(teacher_log_probs(), jnp.asarray(IDS), -1),
            **o,
        ),
        lambda z, t: topk_forward_kl(
            z,
            jnp.asarray(IDS),
            jnp.take_along_axis(jax.nn.log_softmax(t), jnp.asarray(IDS), -1),
        ),
    ),
    "value": (
        lambda h, w, t, u, **o: linear_soft_value(h, w, power=0.6, **o),
        lambda z, t: jax.nn.logsumexp(0.6 * jax.nn.log_softmax(z), axis=-1),
    ),
}


def sharded(loss, gradient):
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        functools.partial(loss, axis_name="tensor", tiles=options(gradient=gradient)),
        mesh=mesh,
        in_specs=(ROW, COLUMNS, ROW, COLUMNS),
        out_specs=ROW,
    )


def weighted(function, weights, *arguments):
    def total(hidden, head):
        values = function(hidden, head, *arguments)
        return (weights * values).sum(), values

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


@pytest.mark.parametrize("gradient", ["recompute", "ahead"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_sharded_vocabulary_changes_nothing(name, gradient):
    fused, dense = LOSSES[name]
    for weights in (jnp.ones(ROWS), jnp.asarray(RNG.normal(size=ROWS), jnp.float32)):
        function = sharded(fused, gradient)
        step = weighted(function, weights, TEACHER, TEACHER_HEAD)
        (_, values), slopes = step(HIDDEN, HEAD)

        def whole(hidden, head):
            return dense(jnp.matmul(hidden, head), jnp.matmul(TEACHER, TEACHER_HEAD))

        (_, expected), wanted = weighted(whole, weights)(HIDDEN, HEAD)
        np.testing.assert_allclose(values, expected, rtol=2e-5, atol=2e-6)
        for found, slope in zip(slopes, wanted, strict=True):
            np.testing.assert_allclose(found, slope, rtol=2e-4, atol=2e-5)


def test_two_small_collectives_per_chunk_and_no_gather():
    step = weighted(sharded(linear_divergence, "recompute"), 1.0, TEACHER, TEACHER_HEAD)
    text = step.lower(HIDDEN, HEAD).compile().as_text()
    assert "all-gather" not in text
    sizes = re.findall(r"= \(?(\w+\[[\d,]*\])[^=]*? all-reduce(?:-start)?\(", text)
    assert sizes
    rows = 8  # of a chunk
    inside = [size for size in sizes if size == f"f32[{rows},2]"]
    assert len(inside) == 2  # the maximum and the sum, of both sides
    assert not [size for size in sizes if str(VOCABULARY) in size]
