"""Fused losses where numbers are extreme, dtypes meet, or an option is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rkd_jax.losses import generalized_jsd, reverse_kl, token_log_probs
from rkd_jax.losses.ahead import scaled_or_again
from rkd_jax.losses.fused import (
    Tiles,
    linear_divergence,
    linear_token_log_probs,
    linear_topk_divergence,
)
from tests.losses.fused_rows import (
    HEAD,
    HIDDEN,
    MASK,
    ROWS,
    SMALL,
    TARGETS,
    TEACHER_HEAD,
    TEACHER_HIDDEN,
    TILES,
    TILES_OF_TWO,
    logits,
)


@pytest.mark.parametrize("gradient", TILES)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
def test_float16_states_keep_gradients_under_small_cotangents(size, gradient):
    """Slopes of 0.02 times 1e-6 would be 0 in float16; a float32 head sees none of it.

    The cotangents are no multiple of the weights, which makes "ahead" compute again.
    """
    hidden = jnp.asarray(HIDDEN, jnp.float16)
    head = jnp.asarray(HEAD, jnp.float16).astype(jnp.float32)
    cotangent = jnp.linspace(size / 8, size, ROWS)

    def fused(head, bias):
        values = linear_token_log_probs(
            hidden, head, TARGETS, bias=bias, tiles=TILES[gradient]
        )
        return (cotangent * values).sum()

    def dense(head, bias):
        found = logits(hidden.astype(jnp.float32), head, bias)
        return (cotangent * token_log_probs(found, jnp.asarray(TARGETS))).sum()

    arguments = head, jnp.zeros(head.shape[1])
    pairs = zip(
        jax.grad(fused, (0, 1))(*arguments),
        jax.grad(dense, (0, 1))(*arguments),
        strict=True,
    )
    for found, expected in pairs:
        error = np.abs(np.asarray(found - expected)).max()
        assert error <= 2**-10 * np.abs(np.asarray(expected)).max()


@pytest.mark.parametrize("gradient", TILES_OF_TWO)
@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_float64_may_meet_float32(x64, wide, gradient):
    narrow = {"student": jnp.float64, "teacher": jnp.float64}
    narrow["teacher" if wide == "student" else "student"] = jnp.float32
    student = [jnp.asarray(x, narrow["student"]) for x in (HIDDEN, HEAD)]
    teacher = [
        jnp.asarray(x, narrow["teacher"]) for x in (TEACHER_HIDDEN, TEACHER_HEAD)
    ]

    def fused(hidden, head):
        values = linear_divergence(
            hidden,
            head,
            *teacher,
            divergence=generalized_jsd,
            tiles=TILES_OF_TWO[gradient],
        )
        return values.sum()

    def dense(hidden, head):
        return generalized_jsd(logits(hidden, head), jnp.matmul(*teacher)).sum()

    found = jax.value_and_grad(fused, (0, 1))(*student)
    student = [x.astype(jnp.float64) for x in student]
    teacher = [x.astype(jnp.float64) for x in teacher]
    expected = jax.value_and_grad(dense, (0, 1))(*student)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )


@pytest.mark.parametrize("gradient", TILES_OF_TWO)
def test_an_infinite_loss_without_weight_has_no_gradient(gradient):
    """The teacher excludes a token, so that every reverse KL is infinite."""
    bias = np.zeros(HEAD.shape[1])
    bias[3] = -np.inf

    def loss(hidden, head):
        return linear_divergence(
            hidden,
            head,
            jnp.asarray(TEACHER_HIDDEN),
            jnp.asarray(TEACHER_HEAD),
            divergence=reverse_kl,
            teacher_bias=jnp.asarray(bias),
            tiles=TILES_OF_TWO[gradient],
        )

    values, pull = jax.vjp(loss, jnp.asarray(HIDDEN), jnp.asarray(HEAD))
    assert np.isposinf(values).all()
    for slope in pull(jnp.zeros_like(values)):
        np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize(
    ("cotangent", "foreseen", "factor", "computed"),
    [
        ([2.0, 0.0], [0.5, 0.0], 4.0, False),
        ([2.0, 1.0], [0.5, 0.0], 7.0, True),
        ([0.0, 0.0], [0.5, 1.0], 0.0, False),  # such as a multiplier that is 0
        ([0.0, 0.0], [0.0, 0.0], 0.0, False),
        ([1.0, 0.0], [0.0, 0.0], 7.0, True),
    ],
)
def test_a_gradient_is_computed_again_only_where_it_has_to_be(
    cotangent, foreseen, factor, computed
):
    calls = []

    def again():
        jax.debug.callback(lambda: calls.append(1))
        return jnp.full(3, 7.0)

    @jax.jit
    def gradient(ahead, *weights):
        return scaled_or_again(ahead, *weights, again)

    found = gradient(jnp.ones(3), jnp.array(foreseen), jnp.array(cotangent))
    np.testing.assert_array_equal(found, factor)
    jax.effects_barrier()
    assert bool(calls) == computed


@pytest.mark.parametrize("gradient", TILES)
def test_no_number_on_the_way_is_none_where_nothing_counts(gradient):
    with jax.debug_nans(True):
        slopes = jax.grad(
            lambda *x: linear_token_log_probs(
                *x,
                jnp.asarray(TARGETS),
                mask=jnp.zeros(ROWS, bool),
                tiles=TILES[gradient],
            ).sum(),
            (0, 1),
        )(jnp.asarray(HIDDEN), jnp.asarray(HEAD))
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("inside", [True, False])
def test_a_shard_map_may_leave_axes_to_the_partitioner(inside):
    """Rows cut by the caller, the tensor axis automatic; in `jax.set_mesh` too."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    row = PartitionSpec("data")
    hidden = jnp.asarray(HIDDEN[:36], jnp.float32)
    head = jnp.asarray(HEAD[:, :52], jnp.float32)
    targets = jnp.asarray(TARGETS[:36] % 52)

    def loss(hidden, head, targets):
        return linear_token_log_probs(hidden, head, targets, tiles=SMALL())

    cut = jax.shard_map(
        loss,
        mesh=mesh,
        in_specs=(row, PartitionSpec(), row),
        out_specs=row,
        axis_names={"data"},
    )

    def both(loss):
        total = jax.value_and_grad(lambda *x: (loss(*x) ** 2).sum(), (0, 1))
        return jax.jit(total)(hidden, head, targets)

    expected = both(loss)
    if inside:
        with jax.set_mesh(mesh):
            found = both(cut)
    else:
        found = both(cut)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        found,
        expected,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "recompte"}, "gradient must be one of recompute, ahead"),
        ({"columns": 0}, "columns must lie in"),
        ({"logits": -1}, "logits must lie in"),
        ({"block": 0}, "block must lie in"),
        ({"strip": 0}, "strip must lie in"),
    ],
)
def test_tiles_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**options)


def test_what_is_compiled_in_has_to_be_known(x64):
    def loss(number, **names):
        return linear_divergence(
            HIDDEN, HEAD, TEACHER_HIDDEN, TEACHER_HEAD, **{names["name"]: number}
        ).sum()

    for name in ("temperature", "student_softcap"):
        with pytest.raises(ValueError, match=r"must be a number while .* traced"):
            jax.jit(functools.partial(loss, name=name))(0.5)

    def by_beta(beta):
        return linear_divergence(
            HIDDEN,
            HEAD,
            TEACHER_HIDDEN,
            TEACHER_HEAD,
            divergence=functools.partial(generalized_jsd, beta=beta),
        )

    with pytest.raises(ValueError, match="beta must be a number while"):
        jax.jit(by_beta)(0.5)
    np.testing.assert_array_equal(by_beta(jnp.float32(0.5)), by_beta(0.5))


def test_ids_are_whole_numbers_and_lists_have_some():
    with pytest.raises(AssertionError, match="float64"):
        linear_token_log_probs(HIDDEN, HEAD, TARGETS + 0.5, mask=MASK)
    lists = np.zeros((ROWS, 2)), np.zeros((ROWS, 2))
    with pytest.raises(AssertionError, match="float64"):
        linear_topk_divergence(HIDDEN, HEAD, *lists)
    none = np.zeros((ROWS, 0), int), np.zeros((ROWS, 0))
    with pytest.raises(ValueError, match="the length of a list must lie in"):
        linear_topk_divergence(HIDDEN, HEAD, *none)
