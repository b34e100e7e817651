"""Fused losses with the vocabulary over a mesh axis: the same numbers, no gather."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rkd_jax.losses import forward_kl, generalized_jsd, token_log_probs, topk_forward_kl
from rkd_jax.losses.fused import (
    Tiles,
    linear_divergence,
    linear_soft_value,
    linear_token_log_probs,
    linear_topk_divergence,
)
from rkd_jax.sharding import MeshConfig, make_mesh

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


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("gradient", ["recompute", "ahead", "keep"])
@pytest.mark.parametrize("name", ["log-probs", "jsd", "topk"])
def test_in_a_mesh_every_device_takes_its_own_rows_and_columns(name, gradient, sizes):
    """Numbers as on one device; nothing of the size of the states is gathered."""
    fused, dense = LOSSES[name]
    tiles = Tiles() if gradient == "keep" else options(gradient=gradient)
    mesh = make_mesh(MeshConfig(*sizes))
    mask = jnp.asarray(RNG.random(ROWS) < 0.6)
    weights = jnp.asarray(RNG.normal(size=ROWS), jnp.float32)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    columns = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

    def whole(hidden, head):
        values = dense(jnp.matmul(hidden, head), jnp.matmul(TEACHER, TEACHER_HEAD))
        return jnp.where(mask, values, 0.0)

    step = weighted(
        functools.partial(fused, mask=mask, tiles=tiles), weights, TEACHER, TEACHER_HEAD
    )
    hidden, head = jax.device_put(HIDDEN, rows), jax.device_put(HEAD, columns)
    with jax.set_mesh(mesh):
        (_, values), slopes = step(hidden, head)
        text = step.lower(hidden, head).compile().as_text()
    (_, expected), wanted = weighted(whole, weights)(HIDDEN, HEAD)
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=2e-6)
    for found, slope in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(found, slope, rtol=2e-4, atol=2e-5)
    here = ROWS // (sizes[0] * sizes[1]), VOCABULARY // sizes[2]
    logits = {tuple(map(int, pair)) for pair in re.findall(r"f32\[(\d+),(\d+)\]", text)}
    assert max(n for n, m in logits if m == here[1] and n != WIDTH) <= max(8, here[0])
    gathered = re.findall(r"= \w+\[([\d,]+)\][^=]*? all-gather\(", text)
    assert all(str(ROWS) not in shape.split(",") for shape in gathered)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("jsd", ["8,2", "8,2"]),  # the maximum and the sum, of 8 rows and both sides
        ("topk", ["8", "8", "8,5"]),  # the same; the listed tokens go with the maximum
        ("value", ["8,1", "8,2"]),  # with the sum goes that of the powers
    ],
)
def test_two_small_collectives_per_chunk_and_no_gather(name, small):
    fused, _ = LOSSES[name]
    step = weighted(sharded(fused, "recompute"), 1.0, TEACHER, TEACHER_HEAD)
    text = step.lower(HIDDEN, HEAD).compile().as_text()
    assert "all-gather" not in text
    found = re.findall(r"= ([^=]*?) all-reduce(?:-start)?\(", text)
    shapes = [re.findall(r"f32\[([\d,]*)\]", one) for one in found]
    inside = [one for one in shapes if one[0].split(",")[0] == "8"]
    assert len(inside) == 2
    assert sorted(sum(inside, [])) == small
    assert not any(str(VOCABULARY) in shape for one in shapes for shape in one)


@pytest.mark.parametrize("gradient", [None, "recompute", "ahead"])
@pytest.mark.parametrize("axis", ["tensor", None])
def test_rows_may_be_cut_in_a_shard_map_of_the_callers(axis, gradient):
    """With the columns cut too, and with whole heads, whose gradients add up."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows, head = PartitionSpec("data"), PartitionSpec(None, axis)
    tiles = Tiles() if gradient is None else options(gradient=gradient)

    def both(h, w, t, u, targets):
        given = {"axis_name": axis, "tiles": tiles}
        log_probs = linear_token_log_probs(h, w, targets, **given)
        return log_probs + linear_divergence(
            h, w, t, u, divergence=generalized_jsd, **given
        )

    cut = jax.shard_map(
        both, mesh=mesh, in_specs=(rows, head, rows, head, rows), out_specs=rows
    )
    arguments = (TEACHER, TEACHER_HEAD, jnp.asarray(TARGETS))
    weights = jnp.arange(1.0, ROWS + 1)
    found = weighted(cut, weights, *arguments)(HIDDEN, HEAD)

    def dense(h, w, t, u, targets):
        z = jnp.matmul(h, w)
        return token_log_probs(z, targets) + generalized_jsd(z, jnp.matmul(t, u))

    expected = weighted(dense, weights, *arguments)(HIDDEN, HEAD)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        found,
        expected,
    )


@pytest.mark.parametrize("known", [True, False])
def test_a_head_that_is_not_known_to_be_cut_is_refused(known):
    """Without ``check_vma`` its gradient would come out an eighth as large."""
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    loss = jax.shard_map(
        functools.partial(linear_soft_value, axis_name="tensor"),
        mesh=mesh,
        in_specs=(ROW, ROW if known else COLUMNS),
        out_specs=ROW,
        check_vma=known,
    )
    with pytest.raises(ValueError, match="'tensor', over which a head is not cut"):
        loss(jnp.asarray(HIDDEN), jnp.asarray(HEAD))
