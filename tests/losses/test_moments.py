"""Moments of action values against float64 numpy, and the invariants of every loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    advantage_sum,
    anchored_advantages,
    bounded_moment_distance,
    centered_q,
    gradient_penalty,
    moment_gap,
    off_policy_moment,
    on_policy_moment,
    one_step,
    one_step_plus_long,
    spread_topk,
)
from rkd_jax.masking import sequence_sum
from tests.losses import test_invariants as invariants
from tests.losses.test_invariants import Case

pytestmark = pytest.mark.usefixtures("x64")

GAMMA = 0.9
MASK = np.array([[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], bool)  # one with a hole
STEP = np.array([[0, 1, 2, 0], [0, 0, 1, 2], [0, 0, 0, 0]])
DISCOUNT = np.where(MASK, GAMMA**STEP, 0.0)
_GENERATOR = np.random.default_rng(5)
Q = _GENERATOR.normal(size=(3, 4, 5))
ACTIONS = _GENERATOR.integers(5, size=(3, 4))
LATER = _GENERATOR.normal(size=(3, 4))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


STUDENT = log_softmax(_GENERATOR.normal(size=Q.shape))
TEACHER = _GENERATOR.normal(size=Q.shape)
TEACHER[..., 2] = -np.inf  # a token the teacher rules out
TEACHER = log_softmax(TEACHER)
P, S = np.exp(TEACHER), np.exp(STUDENT)
TAKEN = np.take_along_axis(Q, ACTIONS[..., None], -1)[..., 0]
ADVANTAGES = np.where(MASK, TAKEN - (P * Q).sum(-1), 0.0)


def dirty(array):
    """NaN, or an impossible token, wherever the mask is not set."""
    garbage = -100 if np.issubdtype(array.dtype, np.integer) else np.nan
    outside = ~MASK.reshape(MASK.shape + (1,) * (array.ndim - 2))
    return np.where(outside, garbage, array)


Q_, STUDENT_, TEACHER_, ACTIONS_, LATER_ = map(
    dirty, (Q, STUDENT, TEACHER, ACTIONS, LATER)
)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


# By hand


def test_moment_gap_and_its_gradients():
    def total(q, student, teacher):
        values = moment_gap(q, student, teacher, MASK, gamma=GAMMA)
        return values.sum(), values

    gradients, values = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(
        Q_, STUDENT_, TEACHER_
    )
    weight = DISCOUNT[..., None]
    close(values, DISCOUNT * ((P - S) * Q).sum(-1))
    close(gradients[0], weight * (P - S))
    close(gradients[1], -weight * S * Q)
    np.testing.assert_array_equal(gradients[2], np.zeros(Q.shape))


def test_equal_policies_have_no_gap_whatever_the_critic_exactly():
    for dtype in (jnp.float32, jnp.float64):
        log_probs, q = STUDENT_.astype(dtype), 1e6 * Q_.astype(dtype)
        gap = moment_gap(q, log_probs, log_probs, MASK)
        np.testing.assert_array_equal(gap, np.zeros(MASK.shape))


def test_advantages():
    found = anchored_advantages(Q_, TEACHER_, ACTIONS_, MASK)
    close(found, ADVANTAGES)
    total = advantage_sum(Q_, TEACHER_, ACTIONS_, MASK, gamma=GAMMA)
    close(total, (DISCOUNT * ADVANTAGES).sum(-1))
    centred = centered_q(Q_, TEACHER_, MASK)
    close(centred, np.where(MASK[..., None], Q - (P * Q).sum(-1)[..., None], 0.0))
    close((P * centred).sum(-1), np.zeros(MASK.shape))


def test_student_steps():
    """Values and gradients in the log-probs; what the critic says is data."""

    def total(student, q, later, step):
        values = step(q, student, later)
        return values.sum(), values

    def long(q, student, later):
        return one_step_plus_long(q, student, ACTIONS_, later, MASK, gamma=GAMMA)

    def short(q, student, later):
        return one_step(q, student, MASK, gamma=GAMMA)

    taken = np.take_along_axis(STUDENT, ACTIONS[..., None], -1)[..., 0]
    weight, chosen = DISCOUNT[..., None], np.eye(5)[ACTIONS]
    for step, value, gradient in (
        (short, -DISCOUNT * (S * Q).sum(-1), -weight * S * Q),
        (
            long,
            -DISCOUNT * ((S * Q).sum(-1) + LATER * taken),
            -weight * (S * Q + LATER[..., None] * chosen),
        ),
    ):
        gradients, values = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(
            STUDENT_, Q_, LATER_, step
        )
        close(values, value)
        close(gradients[0], gradient)
        for data in gradients[1:]:
            np.testing.assert_array_equal(data, np.zeros(data.shape))


def test_sampled_moments_are_unbiased_for_the_moment_gap():
    """By hand for the given actions; averaged over actions they are the gap."""
    on = partial(on_policy_moment, Q_, TEACHER_, mask=MASK, gamma=GAMMA)
    off = partial(off_policy_moment, Q_, STUDENT_, mask=MASK, gamma=GAMMA)
    close(on(actions=ACTIONS_), -DISCOUNT * ADVANTAGES)
    close(off(actions=ACTIONS_), DISCOUNT * (TAKEN - (S * Q).sum(-1)))
    gap = DISCOUNT * ((P - S) * Q).sum(-1)
    for moment, policy in ((on, S), (off, P)):
        each = [moment(actions=jnp.full(MASK.shape, a)) for a in range(5)]
        mean = sum(policy[..., a] * each[a] for a in range(5))
        np.testing.assert_allclose(mean, gap, atol=1e-12)


def test_off_policy_moment_reaches_the_student():
    def total(student):
        return off_policy_moment(Q_, student, ACTIONS_, MASK, gamma=GAMMA).sum()

    close(jax.grad(total)(STUDENT_), -DISCOUNT[..., None] * S * Q)


def test_bounded_distance_is_the_supremum_over_bounded_critics():
    distance = bounded_moment_distance(
        STUDENT_, TEACHER_, MASK, q_bound=2.5, gamma=GAMMA
    )
    close(distance, 2 * 2.5 * DISCOUNT * 0.5 * np.abs(P - S).sum(-1))
    best = jnp.asarray(2.5 * np.sign(P - S))
    attained = moment_gap(best, STUDENT_, TEACHER_, MASK, gamma=GAMMA)
    close(attained, distance)
    for seed in range(20):
        critic = np.random.default_rng(seed).uniform(-2.5, 2.5, Q.shape)
        other = moment_gap(jnp.asarray(critic), STUDENT_, TEACHER_, MASK, gamma=GAMMA)
        assert (np.asarray(other) <= np.asarray(distance) + 1e-12).all()
    same = bounded_moment_distance(STUDENT_, STUDENT_, MASK)
    np.testing.assert_array_equal(same, np.zeros(MASK.shape))


def test_adding_a_state_value_changes_nothing():
    """Gaps, advantages and moments; of the steps, the gradient in the logits."""
    shift = _GENERATOR.normal(size=(3, 4, 1))
    later = jnp.asarray(LATER)

    def all_of(q):
        q = jnp.asarray(q)
        return [
            moment_gap(q, STUDENT_, TEACHER_, MASK),
            anchored_advantages(q, TEACHER_, ACTIONS_, MASK),
            on_policy_moment(q, TEACHER_, ACTIONS_, MASK),
            off_policy_moment(q, STUDENT_, ACTIONS_, MASK),
            centered_q(q, TEACHER_, MASK),
        ]

    def step_gradient(q, step):
        def total(logits):
            return step(jnp.asarray(q), jax.nn.log_softmax(logits)).sum()

        return jax.grad(total)(STUDENT)

    for before, after in zip(all_of(Q), all_of(Q + shift), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-12)
    for step in (
        lambda q, student: one_step(q, student, MASK),
        lambda q, student: one_step_plus_long(q, student, ACTIONS_, later, MASK),
    ):
        before, after = step_gradient(Q, step), step_gradient(Q + shift, step)
        np.testing.assert_allclose(after, before, atol=1e-12)
        assert np.abs(before).max() > 0.01


def test_gradient_penalty():
    slopes = np.where(MASK[..., None], Q, np.nan)
    slopes[0, 0] = 0.0  # a critic that starts at zero

    def total(slopes):
        values = gradient_penalty(slopes, MASK, target=0.7)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(jnp.asarray(slopes))
    norm = np.linalg.norm(np.nan_to_num(slopes), axis=-1)
    close(values, np.where(MASK, (norm - 0.7) ** 2, 0.0))
    direction = np.nan_to_num(slopes) / np.where(norm > 0, norm, 1.0)[..., None]
    close(gradient, 2 * (norm - 0.7)[..., None] * direction)


# Truncated teachers

spread = jax.jit(spread_topk, static_argnums=2, static_argnames="tail")


def test_uniform_tail_gives_the_mean_of_q_over_the_tail():
    full = log_softmax(np.array([[2.0, -1.0, 0.5, 1.0, -2.0, 0.3]]))
    ids = np.array([[3, 0, 9]])  # the last entry is absent: its log-prob is -inf
    listed = np.append(full[:, [3, 0]], [[-np.inf]], axis=1)
    q = np.array([[0.4, 1.0, -2.0, 3.0, 0.7, -0.1]])
    dense = spread(ids, listed, 6)
    p, tail = np.exp(full[0, [3, 0]]), [1, 2, 4, 5]
    expected = p @ q[0, [3, 0]] + (1 - p.sum()) * q[0, tail].mean()
    close((np.exp(dense) * q).sum(), expected)
    close(np.exp(dense).sum(), 1.0)
    renormalised = spread(ids, listed, 6, tail="renormalize")
    close((np.exp(renormalised) * q).sum(), p @ q[0, [3, 0]] / p.sum())
    np.testing.assert_array_equal(renormalised[0, tail], [-np.inf] * 4)


def test_a_complete_list_is_the_full_distribution():
    order = np.argsort(-STUDENT, axis=-1)
    listed = np.take_along_axis(STUDENT, order, -1)
    for tail in ("uniform", "renormalize"):
        close(spread(order, listed, 5, tail=tail), STUDENT)
    # Listed mass that rounding leaves short of one is no tail.
    ids, listed = (
        np.arange(2),
        np.log([0.75, 0.25]).astype(np.float32) - np.float32(1e-7),
    )
    dense = spread(ids, listed, 3)
    assert dense.dtype == jnp.float32
    assert float(dense[2]) == -np.inf
    gradient = jax.grad(lambda x: spread(ids, x, 3)[:2].sum())
    np.testing.assert_array_equal(gradient(listed), [0.0, 0.0])


# Errors


def test_domains_shapes_and_vocabularies():
    wide = jnp.zeros((3, 4, 7))
    for call in (
        lambda: moment_gap(Q_, STUDENT_, wide, MASK),
        lambda: anchored_advantages(wide, TEACHER_, ACTIONS_, MASK),
        lambda: one_step(wide, STUDENT_, MASK),
        lambda: centered_q(Q_, wide, MASK),
        lambda: bounded_moment_distance(wide, TEACHER_, MASK),
    ):
        with pytest.raises(ValueError, match=r"vocabulary entries.*align"):
            call()
    for call, name in (
        (lambda: moment_gap(Q_, STUDENT_, TEACHER_, MASK, gamma=1.1), "gamma"),
        (lambda: one_step(Q_, STUDENT_, MASK, gamma=-0.1), "gamma"),
        (
            lambda: bounded_moment_distance(STUDENT_, TEACHER_, MASK, q_bound=0.0),
            "q_bound",
        ),
        (lambda: gradient_penalty(Q_, MASK, target=-1.0), "target"),
    ):
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            call()
    with pytest.raises(ValueError, match="tail must be one of"):
        spread_topk(jnp.array([0]), jnp.array([0.0]), 2, tail="mean")
    for call in (
        lambda: moment_gap(Q_, STUDENT_, TEACHER_[:, :2], MASK),
        lambda: moment_gap(Q_, STUDENT_, TEACHER_, MASK[:, :2]),
        lambda: anchored_advantages(Q_, TEACHER_, ACTIONS_[:2], MASK),
        lambda: off_policy_moment(Q_, STUDENT_, ACTIONS_[:2], MASK),
        lambda: one_step_plus_long(Q_, STUDENT_, ACTIONS_, LATER_[:2], MASK),
        lambda: spread_topk(jnp.array([0, 1]), jnp.array([0.0]), 2),
    ):
        with pytest.raises(AssertionError):
            call()


# The invariants of every loss: x is trained, y is data, both [B, T, V]


def some_actions(mask):
    """Any tokens; they do not depend on the number of columns."""
    steps = jnp.arange(mask.shape[1]) * 3 % invariants.VOCABULARY
    return jnp.broadcast_to(jnp.expand_dims(steps, 0), mask.shape)


def per_row(loss):
    """Sum over T of a loss (x, y, actions, mask) -> [B, T]."""
    return lambda x, y, mask: sequence_sum(loss(x, y, some_actions(mask), mask), mask)


def moments(x, y, actions, mask):
    """The gap and both of its sampled forms, x being critic and student at once."""
    sampled = on_policy_moment(x, y, actions, mask, gamma=GAMMA)
    sampled = 0.7 * sampled - 1.3 * off_policy_moment(x, x, actions, mask)
    return moment_gap(x, x, y, mask, gamma=GAMMA) + sampled


def long_step(x, y, actions, mask):
    return one_step_plus_long(y, x, actions, y[..., 0], mask, gamma=GAMMA)


def centred(x, y, actions, mask):
    values = centered_q(x, y, mask)
    each = jnp.cos(jnp.arange(x.shape[-1], dtype=values.dtype))
    return jnp.sum(values * each.reshape(1, 1, -1), axis=-1)


CASES = [
    Case(name, rows, "logits", data)
    for name, rows, data in (
        ("moments", per_row(moments), "float"),
        (
            "advantage_sum",
            lambda x, y, m: advantage_sum(x, y, some_actions(m), m, gamma=GAMMA),
            "float",
        ),
        ("centered_q", per_row(centred), "float"),
        ("one_step_plus_long", per_row(long_step), "float"),
        (
            "bounded_moment_distance",
            per_row(lambda x, y, a, m: bounded_moment_distance(x, y, m)),
            "float",
        ),
        (
            "gradient_penalty",
            per_row(lambda x, y, a, m: gradient_penalty(x, m)),
            "none",
        ),
    )
]
CHECKS = [
    invariants.test_g1_g3_padding_changes_nothing_and_data_gets_no_gradient,
    invariants.test_g2_an_empty_row_gives_zero_and_zero_gradient,
    invariants.test_g6_rows_are_independent,
    invariants.test_g6_jit_changes_nothing,
    invariants.test_g7_gradients_are_derivatives,
    invariants.test_u6_half_precision_in_float32_out,
]


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[5:7])
def test_invariants(check, case):
    check(case)
