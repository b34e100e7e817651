"""The reductions, and the masking of a loss's input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax import masking
from rkd_jax.losses import forward_kl
from rkd_jax.masking import (
    fill_masked,
    last_target,
    masked_mean,
    masked_sum,
    segment_sum,
    sequence_mean,
    sequence_sum,
)

VALUES = np.array([[1.0, 2.0, np.nan], [4.0, np.inf, -np.inf], [np.nan] * 3])
MASK = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        (sequence_sum, [3.0, 4.0, 0.0]),
        (sequence_mean, [1.5, 4.0, 0.0]),
        (masked_sum, 7.0),
        (masked_mean, 7.0 / 3.0),
        (lambda v, m: masked_sum(v, m, axis=0), [5.0, 2.0, 0.0]),
        (lambda v, m: masked_mean(v, m, axis=(0, 1)), 7.0 / 3.0),
    ],
)
def test_reductions_by_hand(reduce, expected, dtype):
    result = reduce(jnp.asarray(VALUES, jnp.float32), jnp.asarray(MASK.astype(dtype)))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
def test_gradient_is_one_over_the_count_and_zero_outside(reduce):
    gradient = jax.grad(lambda v: reduce(v, jnp.asarray(MASK)))(jnp.asarray(VALUES))
    weight = 1.0 if reduce is masked_sum else 1.0 / 3.0
    np.testing.assert_allclose(gradient, MASK * weight, rtol=1e-6)


def test_nothing_set_gives_zero_and_zero_gradient():
    nothing = jnp.zeros(VALUES.shape, bool)
    value, gradient = jax.value_and_grad(masked_mean)(jnp.asarray(VALUES), nothing)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros(VALUES.shape))


def test_half_precision_is_summed_in_float32_and_float64_stays(x64):
    # In bfloat16 the running sum would stop growing at 256.
    ones = jnp.ones(1000, jnp.bfloat16)
    total = masked_sum(ones, jnp.ones(1000, bool))
    assert (total.dtype, float(total)) == (jnp.float32, 1000.0)
    assert masked_sum(ones.astype(jnp.float64), ones == 1).dtype == jnp.float64


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        masked_sum(jnp.ones((2, 3)), jnp.ones((2, 1), bool))


def test_fill_masked_broadcasts_over_trailing_axes_and_keeps_the_dtype():
    values = np.arange(12).reshape(2, 2, 3)
    mask = np.array([[True, False], [False, True]])
    filled = fill_masked(jnp.asarray(values, jnp.int32), jnp.asarray(mask), fill=-5)
    assert filled.dtype == jnp.int32
    np.testing.assert_array_equal(filled, np.where(mask[..., None], values, -5))
    same = fill_masked(jnp.asarray(values, jnp.int32), jnp.asarray(mask[:, :1])[:, 0])
    np.testing.assert_array_equal(same[0], values[0])
    np.testing.assert_array_equal(same[1], np.zeros((2, 3)))


def test_fill_masked_refuses_a_mask_that_is_no_prefix():
    with pytest.raises(AssertionError):
        fill_masked(jnp.ones((2, 3, 4)), jnp.ones((3,), bool))


def test_composite_with_nan_logits_in_padding_has_the_gradient_of_the_rest():
    """Masking only the reduction would give the right value and a NaN gradient."""
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 2, 3, 5))
    mask = np.array([[True, True, False], [True, False, False]])
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student, teacher))
    student[~mask], teacher[~mask] = np.nan, np.inf

    def loss(student):
        kept = fill_masked(student, jnp.asarray(mask))
        data = fill_masked(jnp.asarray(teacher), jnp.asarray(mask))
        return masked_sum(forward_kl(kept, data), jnp.asarray(mask))

    gradient = jax.grad(loss)(jnp.asarray(student))
    np.testing.assert_allclose(
        gradient, np.where(mask[..., None], q - p, 0.0), atol=1e-6
    )


def test_doctests():
    import doctest

    assert doctest.testmod(masking).failed == 0


def test_last_target_is_found_by_the_mask_alone():
    mask = np.array(
        [[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool
    )
    expected = np.zeros_like(mask)
    for row, position in ((0, 1), (1, 3), (2, 3), (4, 0)):
        expected[row, position] = True
    np.testing.assert_array_equal(last_target(jnp.asarray(mask)), expected)
    found = last_target(jnp.asarray(mask, jnp.float32))  # a mask of numbers
    np.testing.assert_array_equal(found, expected)


SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]], np.int32)
SET = np.array([[0, 1, 0, 1, 1, 0], [1, 0, 1, 1, 0, 0]], bool)


def test_segment_sums_by_hand():
    values = np.arange(12.0, dtype=np.float32).reshape(2, 6)
    dirty = np.where(SET, values, np.nan)
    for segments, expected in ((3, [[1, 7, 0], [6, 0, 17]]), (2, [[1, 7], [6, 0]])):
        got = segment_sum(dirty, SET, SEGMENTS, segments=segments)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)
    stacked = segment_sum(
        np.stack([dirty] * 3),
        np.stack([SET] * 3),
        np.stack([SEGMENTS] * 3),
        segments=3,
    )
    np.testing.assert_array_equal(stacked, [[[1, 7, 0], [6, 0, 17]]] * 3)
    weights = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)

    def weighted(v):
        return (weights * segment_sum(v, SET, SEGMENTS, segments=3)).sum()

    gradient = jax.grad(weighted)(jnp.asarray(dirty))
    expected = np.array([[0, 1, 0, 2, 2, 0], [4, 0, 6, 6, 0, 0]])
    np.testing.assert_array_equal(gradient, expected)
    with pytest.raises(AssertionError):
        segment_sum(values, SET, SEGMENTS[:1], segments=3)


def test_last_target_of_every_segment():
    got = last_target(SET, SEGMENTS)
    expected = np.array([[0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]], bool)
    np.testing.assert_array_equal(got, expected)
    padding = np.where(SEGMENTS == 0, 7, SEGMENTS)  # ids on padding may be anything
    np.testing.assert_array_equal(last_target(SET, padding), expected)
    np.testing.assert_array_equal(
        last_target(SET), [[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]]
    )
