"""The fused top-k divergence against the dense one, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import forward_kl, topk_divergence, topk_forward_kl
from rkd_jax.losses.fused import linear_topk_divergence
from tests.losses.fused_rows import (
    ANY,
    BIAS,
    DIVERGENCES,
    HEAD,
    HIDDEN,
    IDS,
    MASK,
    ROWS,
    SMALL,
    TEACHER_HEAD,
    TEACHER_HIDDEN,
    TILES,
    TOP,
    VOCABULARY,
    agree,
    logits,
)

pytestmark = pytest.mark.usefixtures("x64")


CASES = [("forward", softcap, tiles) for softcap in (None, 4.0) for tiles in TILES]
CASES += [
    ("jsd-0.1", None, "ahead"),
    ("skew-forward", 4.0, "recompute"),
    ("skew-reverse", None, "ahead"),
    ("total-variation", 4.0, "keep"),
]


@pytest.mark.parametrize(("name", "softcap", "gradient"), CASES)
def test_topk_is_the_dense_one_with_its_bucket(name, softcap, gradient):
    """Also of a list with gaps, and of one that leaves nothing to the bucket."""
    divergence = DIVERGENCES[name]
    teacher = jax.nn.log_softmax(logits(TEACHER_HIDDEN, TEACHER_HEAD))
    listed = jnp.take_along_axis(teacher, IDS, -1).at[3, 2].set(-jnp.inf)
    full = np.flatnonzero(MASK)[-1]
    listed = listed.at[full].set(jax.nn.log_softmax(listed[full]))

    def fused(hidden, head, bias):
        return linear_topk_divergence(
            hidden,
            head,
            IDS,
            listed,
            divergence=divergence,
            mask=MASK,
            temperature=0.7,
            bias=bias,
            softcap=softcap,
            tiles=TILES[gradient],
        )

    def dense(hidden, head, bias):
        found = logits(hidden, head, bias, softcap)
        return topk_divergence(
            found, IDS, listed, divergence=divergence, temperature=0.7
        )

    agree(fused, dense, HIDDEN, HEAD, BIAS, mask=MASK)


@pytest.mark.parametrize("gradient", TILES)
@pytest.mark.parametrize("gap", [30.0, 200.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_topk_where_one_bucket_has_hardly_any_mass(sign, gap, gradient):
    """In float32: one minus the other bucket would be nothing but rounding."""
    teacher = jax.nn.log_softmax(logits(TEACHER_HIDDEN, TEACHER_HEAD))
    ids = np.broadcast_to(np.arange(TOP), IDS.shape)
    listed = jnp.take_along_axis(teacher, ids, -1).astype(jnp.float32)
    bias = np.where(np.arange(VOCABULARY) < TOP, sign * gap, 0.0)

    def fused(hidden, head):
        narrow = (x.astype(jnp.float32) for x in (hidden, head, jnp.asarray(bias)))
        hidden, head, offset = narrow
        values = linear_topk_divergence(
            hidden, head, ids, listed, bias=offset, tiles=TILES[gradient]
        )
        return values.astype(jnp.float64)

    def dense(hidden, head):
        return topk_forward_kl(logits(hidden, head, bias), ids, listed)

    agree(fused, dense, HIDDEN, HEAD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", TILES)
def test_a_row_without_weight_may_hold_a_teacher_that_is_not_a_number(gradient):
    teacher = jax.nn.log_softmax(logits(TEACHER_HIDDEN, TEACHER_HEAD))
    listed = jnp.take_along_axis(teacher, IDS, -1)
    weights = jnp.where(jnp.arange(ROWS, dtype=jnp.int32) == 3, 0.0, ANY)

    def slopes(listed):
        def total(hidden, head):
            values = linear_topk_divergence(
                hidden, head, IDS, listed, tiles=TILES[gradient]
            )
            return jnp.where(weights == 0.0, 0.0, weights * values).sum()

        return jax.jit(jax.grad(total, (0, 1)))(HIDDEN, HEAD)

    found, expected = slopes(listed.at[3, 1].set(jnp.nan)), slopes(listed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("gradient", TILES)
def test_topk_with_tokens_that_the_student_never_says(gradient):
    """Some that are listed, some that are not, and all that are not."""
    teacher = jax.nn.log_softmax(logits(TEACHER_HIDDEN, TEACHER_HEAD))
    ids = np.broadcast_to(np.arange(TOP), IDS.shape)
    for impossible in ([1, 3], [7, 20], range(TOP, VOCABULARY)):
        bias = np.zeros(VOCABULARY)
        bias[list(impossible)] = -np.inf
        listed = jnp.take_along_axis(teacher, ids, -1)

        def fused(hidden, head, bias=bias, listed=listed):
            return linear_topk_divergence(
                hidden, head, ids, listed, bias=bias, tiles=TILES[gradient]
            )

        def dense(hidden, head, bias=bias, listed=listed):
            return topk_forward_kl(logits(hidden, head, bias), ids, listed)

        agree(fused, dense, HIDDEN, HEAD)


@pytest.mark.parametrize("gradient", TILES)
def test_a_listed_token_that_the_student_lacks_is_not_a_number(gradient):
    teacher = jax.nn.log_softmax(logits(TEACHER_HIDDEN, TEACHER_HEAD))
    listed = jnp.take_along_axis(teacher, IDS, -1).at[4, 0].set(-jnp.inf)
    ids = IDS.copy()
    ids[3, 2], ids[2, 0], ids[4, 0] = VOCABULARY, -1, VOCABULARY + 5
    found = linear_topk_divergence(HIDDEN, HEAD, ids, listed, tiles=TILES[gradient])
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found)), [2, 3])


def test_topk_of_all_tokens_is_forward_kl():
    teacher = jax.nn.log_softmax(logits(TEACHER_HIDDEN, TEACHER_HEAD))
    ids = jnp.broadcast_to(jnp.arange(VOCABULARY), teacher.shape)
    found = linear_topk_divergence(HIDDEN, HEAD, ids, teacher, tiles=SMALL())
    np.testing.assert_allclose(
        found, forward_kl(logits(HIDDEN, HEAD), teacher), rtol=1e-9
    )


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 5, 3), (2, 6, 3), (5, 3)])
def test_lists_of_other_rows_are_refused(shape):
    hidden, head = np.ones((2, 5, 4)), np.ones((4, 7))
    lists = np.zeros(shape, int), np.zeros(shape)
    with pytest.raises(AssertionError, match="shape"):
        linear_topk_divergence(hidden, head, *lists, mask=np.ones((2, 5), bool))
