"""Every fused loss at any size, cut, mask and option is the dense one, in either width.

In float32 the dense loss is that of the same numbers in float64; tolerances are of the
largest entry.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    soft_value,
    token_log_probs,
    topk_forward_kl,
)
from rkd_jax.losses.fused import (
    Tiles,
    linear_divergence,
    linear_expectation,
    linear_soft_value,
    linear_token_log_probs,
    linear_topk_divergence,
)
from tests.losses.fused_rows import DIVERGENCES, logits

pytestmark = pytest.mark.usefixtures("x64")


def of_states(name, sides, options, given):
    """The loss out of states and heads of a student and another model."""
    (hidden, head, bias), (other, other_head, other_bias) = sides
    one = options | {"bias": bias}
    two = options | {"student_bias": bias, "teacher_bias": other_bias}
    cap = two.pop("softcap")
    match name:
        case "log-probs":
            return linear_token_log_probs(hidden, head, given["targets"], **one)
        case "soft value":
            return linear_soft_value(hidden, head, power=0.6, scale=2.0, **one)
        case "top k":
            listed = given["ids"], given["listed"].astype(hidden.dtype)
            return linear_topk_divergence(hidden, head, *listed, **one)
        case "policy" | "values":
            del two["student_bias"], two["teacher_bias"]
            if name == "values":  # which is the student's side
                sides = sides[::-1]
            (hidden, head, bias), (other, other_head, other_bias) = sides
            return linear_expectation(
                hidden,
                head,
                other,
                other_head,
                trains=name,
                policy_bias=bias,
                value_bias=other_bias,
                policy_softcap=cap,
                value_softcap=cap,
                **two,
            )
        case _:
            return linear_divergence(
                hidden,
                head,
                other,
                other_head,
                divergence=DIVERGENCES[name],
                student_softcap=cap,
                teacher_softcap=cap,
                **two,
            )


def of_logits(name, sides, options, given):
    """The dense loss."""
    cap, temperature = options["softcap"], options["temperature"]
    student, other = (logits(*side, cap) for side in sides)
    cold = student / temperature
    match name:
        case "log-probs":
            return token_log_probs(cold, given["targets"])
        case "soft value":
            return soft_value(jax.nn.log_softmax(cold), power=0.6, scale=2.0)
        case "top k":
            return topk_forward_kl(cold, given["ids"], given["listed"])
        case "policy":
            return (jax.nn.softmax(cold) * other).sum(-1)
        case "values":
            return (jax.nn.softmax(other / temperature) * student).sum(-1)
        case _:
            return DIVERGENCES[name](cold, other / temperature)


LOSSES = ("log-probs", "soft value", "top k", "policy", "values", *DIVERGENCES)


@pytest.mark.parametrize("name", LOSSES)
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_size_any_cut_any_mask_any_option(name, data):
    draw = data.draw
    rows, vocabulary = draw(st.integers(1, 19)), draw(st.integers(3, 23))
    widths = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    tiles = Tiles(
        logits=vocabulary * draw(st.integers(8, 9)),
        strip=vocabulary * draw(st.sampled_from([8, 100])),
        block=draw(st.integers(1, 20)),
        columns=draw(st.integers(1, 24)),
        gradient=draw(st.sampled_from(["recompute", "ahead", None])),
    )
    options = {
        "temperature": draw(st.sampled_from([1.0, 0.6, 2.0])),
        "softcap": draw(st.sampled_from([None, 1.5])),
    }
    biased = draw(st.booleans())
    dtype = draw(st.sampled_from([jnp.float32, jnp.float64]))
    # Where both sides agree the slope of the total variation jumps.
    if name == "total-variation":
        dtype = jnp.float64
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random(rows) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    sides = [
        (
            rng.normal(size=(rows, width)).astype(dtype),
            rng.normal(size=(width, vocabulary)).astype(dtype),
            rng.normal(size=vocabulary).astype(dtype) if biased else None,
        )
        for width in widths
    ]
    count = draw(st.integers(1, vocabulary - 1))
    teacher = np.asarray(jax.nn.log_softmax(rng.normal(size=(rows, vocabulary))))
    ids = np.argsort(rng.random((rows, vocabulary)))[:, :count]
    given = {
        "targets": rng.integers(0, vocabulary, rows),
        "ids": ids,
        "listed": np.take_along_axis(teacher, ids, -1).astype(dtype).astype(float),
    }

    def fused(student, other):
        hidden, *head = student
        hidden = jnp.where(jnp.expand_dims(mask, 1), hidden, jnp.nan)
        more = options | {"mask": mask, "tiles": tiles}
        return of_states(name, ((hidden, *head), other), more, given)

    def dense(student, other):
        return jnp.where(mask, of_logits(name, (student, other), options, given), 0.0)

    def step(loss, sides):
        student, other = jax.tree.map(jnp.asarray, sides)

        def total(student, weights):
            values = loss(student, other).astype(float)
            return (weights * values).sum(), values

        return functools.partial(jax.jit(jax.grad(total, has_aux=True)), student)

    wide = jax.tree.map(lambda x: x.astype(float), sides)
    found, expected = step(fused, sides), step(dense, wide)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-9

    def compare(one, other):
        largest = max(np.abs(other).max(), 1.0)
        np.testing.assert_allclose(one, other, atol=tolerance * largest)

    for weights in (mask.astype(float), np.where(mask, rng.normal(size=rows), 0.0)):
        (slopes, values), wanted = found(weights), expected(weights)
        assert slopes[0].dtype == dtype
        assert not np.asarray(values)[~mask].any()
        jax.tree.map(compare, (slopes, values), wanted)
