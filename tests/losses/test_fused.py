"""Fused losses against the dense ones, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_reverse_kl,
    soft_value,
    token_log_probs,
    total_variation,
)
from rkd_jax.losses.fused import (
    linear_divergence,
    linear_expectation,
    linear_soft_value,
    linear_token_log_probs,
)
from tests.losses.fused_rows import (
    ANY,
    BIAS,
    DIVERGENCES,
    HEAD,
    HIDDEN,
    MASK,
    ROWS,
    SMALL,
    TARGETS,
    TEACHER_BIAS,
    TEACHER_HEAD,
    TEACHER_HIDDEN,
    TILES,
    TILES_OF_TWO,
    VOCABULARY,
    agree,
    logits,
    normal,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("gradient", TILES_OF_TWO)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_the_dense_ones(name, gradient):
    divergence, masked = DIVERGENCES[name], name != "forward"
    mask = MASK if masked else None

    def fused(hidden, head, bias):
        return linear_divergence(
            hidden,
            head,
            TEACHER_HIDDEN,
            TEACHER_HEAD,
            divergence=divergence,
            mask=mask,
            temperature=0.7,
            student_bias=bias,
            teacher_bias=TEACHER_BIAS,
            student_softcap=4.0,
            teacher_softcap=3.0,
            tiles=TILES_OF_TWO[gradient],
        )

    def dense(hidden, head, bias):
        teacher = logits(TEACHER_HIDDEN, TEACHER_HEAD, TEACHER_BIAS, 3.0)
        return divergence(logits(hidden, head, bias, 4.0), teacher, temperature=0.7)

    agree(fused, dense, HIDDEN, HEAD, BIAS, mask=mask)


@pytest.mark.parametrize("gradient", TILES)
def test_token_log_probs_are_the_dense_ones(gradient):
    def fused(hidden, head, bias, mask=MASK):
        return linear_token_log_probs(
            hidden,
            head,
            TARGETS,
            mask=mask,
            temperature=0.5,
            bias=bias,
            softcap=5.0,
            tiles=TILES[gradient],
        )

    def dense(hidden, head, bias):
        return token_log_probs(
            logits(hidden, head, bias, 5.0), TARGETS, temperature=0.5
        )

    agree(fused, dense, HIDDEN, HEAD, BIAS, mask=MASK)
    np.testing.assert_allclose(
        fused(HIDDEN, HEAD, BIAS, None), dense(HIDDEN, HEAD, BIAS), rtol=1e-12
    )


@pytest.mark.parametrize("gradient", TILES)
def test_soft_values_are_the_dense_ones(gradient):
    def fused(hidden, head):
        return linear_soft_value(
            hidden,
            head,
            power=0.7,
            scale=2.0,
            mask=MASK,
            tiles=TILES[gradient],
        )

    def dense(hidden, head):
        log_probs = jax.nn.log_softmax(logits(hidden, head))
        return soft_value(log_probs, power=0.7, scale=2.0)

    agree(fused, dense, HIDDEN, HEAD, mask=MASK)


@pytest.mark.parametrize("gradient", TILES)
@pytest.mark.parametrize("trains", ["policy", "values"])
def test_expectations_train_one_side(trains, gradient):
    sides = {
        "policy": (HIDDEN, HEAD, BIAS),
        "values": (TEACHER_HIDDEN, TEACHER_HEAD, TEACHER_BIAS),
    }

    def both(own):
        return {**sides, trains: own}

    def fused(*own):
        (policy, head, bias), (state, q_head, q_bias) = both(own).values()
        return linear_expectation(
            policy,
            head,
            state,
            q_head,
            trains=trains,
            mask=MASK,
            temperature=0.7,
            policy_bias=bias,
            value_bias=q_bias,
            value_softcap=2.0,
            tiles=TILES[gradient],
        )

    def dense(*own):
        policy, q = both(own).values()
        return (jax.nn.softmax(logits(*policy) / 0.7) * logits(*q, 2.0)).sum(-1)

    agree(fused, dense, *sides[trains], mask=MASK)
    other = "values" if trains == "policy" else "policy"

    def through(own):
        return linear_expectation(
            *(own if other == "policy" else sides["policy"][:2]),
            *(own if other == "values" else sides["values"][:2]),
            trains=trains,
            tiles=TILES[gradient],
        ).sum()

    for slope in jax.tree.leaves(jax.grad(through)(sides[other][:2])):
        assert not np.asarray(slope).any()


def test_no_gradient_reaches_the_teacher():
    def total(teacher):
        return linear_divergence(
            HIDDEN, HEAD, *teacher, divergence=reverse_kl, tiles=SMALL()
        ).sum()

    for slope in jax.tree.leaves(jax.grad(total)((TEACHER_HIDDEN, TEACHER_HEAD))):
        assert not np.asarray(slope).any()


def test_weights_are_a_hint():
    """Right, wrong or centred on zero: the gradient is the same."""
    advantages = ANY - ANY.mean()

    def slopes(weights, gradient):
        def total(hidden, head):
            values = linear_token_log_probs(
                hidden, head, TARGETS, weights=weights, tiles=TILES[gradient]
            )
            return (advantages * values).sum() / 7.0

        return jax.grad(total, (0, 1))(HIDDEN, HEAD)

    expected = slopes(None, "recompute")
    for weights in (advantages, -3.0 * advantages, jnp.ones(ROWS), jnp.zeros(ROWS)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13),
            slopes(weights, "ahead"),
            expected,
        )


def test_impossible_tokens_of_the_teacher_are_legal():
    bias = jnp.asarray(TEACHER_BIAS).at[7].set(-jnp.inf).at[40].set(-jnp.inf)
    for divergence in (forward_kl, generalized_jsd, skew_reverse_kl, total_variation):

        def fused(hidden, head, divergence=divergence):
            return linear_divergence(
                hidden,
                head,
                TEACHER_HIDDEN,
                TEACHER_HEAD,
                divergence=divergence,
                teacher_bias=bias,
                tiles=SMALL(),
            )

        def dense(hidden, head, divergence=divergence):
            return divergence(
                logits(hidden, head), logits(TEACHER_HIDDEN, TEACHER_HEAD, bias)
            )

        agree(fused, dense, HIDDEN, HEAD)


def test_nothing_counted_is_zero_and_has_zero_gradient():
    hidden = jnp.full_like(HIDDEN, jnp.nan)

    def total(hidden, head):
        return linear_token_log_probs(
            hidden, head, TARGETS, mask=jnp.zeros(ROWS, bool), tiles=SMALL()
        ).sum()

    value, slopes = jax.value_and_grad(total, (0, 1))(hidden, HEAD)
    assert float(value) == 0.0
    assert not any(np.asarray(slope).any() for slope in slopes)


def test_a_target_outside_the_vocabulary_is_nan():
    targets = jnp.asarray(TARGETS).at[0].set(VOCABULARY).at[1].set(-1)
    found = np.asarray(linear_token_log_probs(HIDDEN, HEAD, targets, tiles=SMALL()))
    assert np.isnan(found[:2]).all()
    assert np.isfinite(found[2:]).all()


def test_leading_axes_are_kept():
    def shaped(x):
        return x[:36].reshape(3, 4, 3, *x.shape[1:])

    found = linear_token_log_probs(shaped(HIDDEN), HEAD, shaped(TARGETS))
    flat = linear_token_log_probs(HIDDEN[:36], HEAD, TARGETS[:36])
    np.testing.assert_array_equal(found, flat.reshape(3, 4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": lambda q, p: q.sum(-1)}, "cannot be fused"),
        ({"divergence": functools.partial(generalized_jsd, beta=2.0)}, "beta"),
        ({"divergence": functools.partial(forward_kl, temperature=2.0)}, "itself"),
        ({"temperature": 0.0}, "temperature"),
        ({"student_softcap": -1.0}, "softcap"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(HIDDEN, HEAD, TEACHER_HIDDEN, TEACHER_HEAD, **options)


def test_vocabularies_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"53.*52.*align_vocab"):
        linear_divergence(HIDDEN, HEAD, TEACHER_HIDDEN, TEACHER_HEAD[:, 1:])


@pytest.mark.parametrize("gradient", TILES)
@pytest.mark.parametrize("wide_head", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_dense_float32_result_up_to_its_rounding(
    dtype, wide_head, gradient
):
    """Products of halves are exact in float32: only the slopes and the result round.

    Rounding to 8 bits (11 for float16) is off by at most 2**-9 (2**-12) of a number; a
    gradient's own rounding and that of the slopes in it are allowed for.
    """
    half = jnp.dtype(dtype)
    eps = float(jnp.finfo(half).eps)
    hidden, head, bias = (jnp.asarray(x, half) for x in (HIDDEN, HEAD, BIAS))
    teacher_hidden = jnp.asarray(TEACHER_HIDDEN, half)
    teacher_head = jnp.asarray(TEACHER_HEAD, half)

    def fused(hidden, head, bias):
        return linear_divergence(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            divergence=generalized_jsd,
            student_bias=bias,
            tiles=TILES[gradient],
        )

    def dense(hidden, head, bias):
        wide = (x.astype(jnp.float32) for x in (teacher_hidden, teacher_head))
        return generalized_jsd(logits(hidden, head, bias), logits(*wide))

    stored = (hidden, head, bias)
    if wide_head:
        stored = (hidden, head.astype(jnp.float32), bias.astype(jnp.float32))
    wide = tuple(x.astype(jnp.float32) for x in (hidden, head, bias))
    values = fused(*stored)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, dense(*wide), rtol=2e-5, atol=1e-6)
    found = jax.grad(lambda x: fused(*x).sum())(stored)
    expected = jax.grad(lambda x: dense(*x).sum())(wide)
    for gradient, slope, like in zip(found, expected, stored, strict=True):
        assert gradient.dtype == like.dtype
        error = np.abs(np.asarray(gradient, np.float32) - np.asarray(slope))
        assert error.max() <= 2 * eps * np.abs(np.asarray(slope)).max()


@pytest.mark.parametrize("gradient", [None, "ahead", "recompute"])
@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_a_float32_head_is_cast_tile_by_tile_where_it_meets_few_rows(wide, gradient):
    """As by a cast of the whole: 12 rows of width 40, in two chunks and three tiles."""
    hidden, teacher_hidden = (jnp.asarray(normal(12, 40), jnp.bfloat16) for _ in "st")
    head, teacher_head = (jnp.asarray(normal(40, VOCABULARY) / 6) for _ in "st")
    stored = {
        "student": (head.astype(jnp.float32), teacher_head.astype(jnp.bfloat16)),
        "teacher": (head.astype(jnp.bfloat16), teacher_head.astype(jnp.float32)),
    }[wide]

    def loss(hidden, head, teacher_head):
        return linear_divergence(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            divergence=generalized_jsd,
            tiles=SMALL(gradient=gradient),
        )

    def slopes(hidden, head, teacher_head, weights):
        def total(hidden, head):
            return (weights * loss(hidden, head, teacher_head)).sum()

        return jax.grad(total, (0, 1))(hidden, head)

    whole = tuple(x.astype(jnp.bfloat16) for x in stored)
    exactly = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7)
    exactly(loss(hidden, *stored), loss(hidden, *whole))
    for weights in (jnp.full(12, 0.5, jnp.float32), jnp.asarray(ANY[:12], jnp.float32)):
        found = slopes(hidden, *stored, weights)
        for slope, expected in zip(found, slopes(hidden, *whole, weights), strict=True):
            slope, expected = (np.asarray(x, np.float32) for x in (slope, expected))
            error = np.abs(slope - expected).max()  # as stored in bfloat16
            assert error <= 2**-8 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (2, 1), (2, 5, 1)])
def test_targets_of_other_rows_are_refused(shape):
    hidden, head = np.ones((2, 5, 4)), np.ones((4, 7))
    targets = np.zeros(shape, int)
    with pytest.raises(AssertionError, match="shape"):
        linear_token_log_probs(hidden, head, targets, mask=np.ones((2, 5), bool))


@pytest.mark.parametrize("batch", [(0,), (0, 5), (2, 0)])
def test_of_no_rows_there_are_no_values(batch):
    hidden, targets = jnp.ones((*batch, 4)), jnp.zeros(batch, int)

    def total(head):
        values = linear_token_log_probs(hidden, head, targets)
        assert values.shape == batch
        return values.sum()

    assert not jax.grad(total)(jnp.ones((4, 7))).any()
    both = linear_divergence(hidden, jnp.ones((4, 7)), hidden, jnp.ones((4, 7)))
    assert both.shape == batch
