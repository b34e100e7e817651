"""Reverse KL of weighted samples and its baselines, from loops in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import per_decision_weights, sequence_reverse_kl
from rkd_jax.losses.importance import factors
from tests.tabular.bed import log_softmax

IMPORTANCE = ["per_decision", "token"]

pytestmark = pytest.mark.usefixtures("x64")


RNG = np.random.default_rng(0)
STUDENT_ROWS, TEACHER_ROWS = RNG.normal(size=(2, 4, 4, 3))
TOKENS = np.array([[0, 2, 1, 1], [1, 0, 2, 0], [2, 2, 1, 0], [0, 1, 0, 2]])
MASK = np.arange(4) < np.array([[4], [2], [1], [3]])
WEIGHTS = np.exp(RNG.normal(size=(4, 4)))


def by_hand(importance, gamma, long_part, length_normalised):
    """Values, and their gradient in the logits, from loops."""
    log_q, log_p = log_softmax(STUDENT_ROWS), log_softmax(TEACHER_ROWS)
    q, ratio = np.exp(log_q), log_q - log_p
    divergence = (q * ratio).sum(-1)
    slope = q * (ratio - divergence[..., None])
    exact = importance == "per_decision"
    for row, t in itertools.product(range(4), repeat=2):
        before = np.prod(WEIGHTS[row, :t]) if exact else 1.0
        divergence[row, t] *= before
        slope[row, t] *= before
        credit, first = 0.0, t if long_part == "inclusive" else t + 1
        steps = range(first, MASK[row].sum())
        for u in steps:
            path = np.prod(WEIGHTS[row, : u + 1]) if exact else WEIGHTS[row, t]
            credit += gamma ** (u - t) * path * ratio[row, u, TOKENS[row, u]]
        if length_normalised:
            credit /= max(len(steps), 1)
        slope[row, t] += credit * (np.eye(3)[TOKENS[row, t]] - q[row, t])
    return np.where(MASK, divergence, 0.0), np.where(MASK[..., None], slope, 0.0)


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("long_part", ["following", "inclusive"])
@pytest.mark.parametrize("length_normalised", [False, True])
def test_value_and_gradient(importance, gamma, long_part, length_normalised):
    """Padding of the weights may hold anything, and nothing flows to them."""
    weights = jnp.asarray(np.where(MASK, WEIGHTS, np.nan))

    def total(student, weights):
        values = sequence_reverse_kl(
            student,
            jnp.asarray(TEACHER_ROWS),
            jnp.asarray(TOKENS),
            jnp.asarray(MASK),
            gamma=gamma,
            long_part=long_part,
            length_normalised=length_normalised,
            importance_weights=weights,
            importance=importance,
        )
        return values.sum(), values

    (found, nothing), values = jax.grad(total, argnums=(0, 1), has_aux=True)(
        jnp.asarray(STUDENT_ROWS), weights
    )
    divergence, slope = by_hand(importance, gamma, long_part, length_normalised)
    np.testing.assert_allclose(values, divergence, atol=1e-12)
    np.testing.assert_allclose(found, slope, atol=1e-12)
    np.testing.assert_array_equal(nothing, np.zeros((4, 4)))


@pytest.mark.parametrize("importance", [None, *IMPORTANCE])
@pytest.mark.parametrize("baseline", ["others", "whitened"])
def test_baselines_of_the_credit(baseline, importance):
    """From loops: less what the mean of others, or of all targets, would give."""
    options = {"importance": importance or "token", "gamma": 0.6}
    weights = jnp.asarray(WEIGHTS) if importance else None

    def slopes(**more):
        def total(student):
            return sequence_reverse_kl(
                student,
                jnp.asarray(TEACHER_ROWS),
                jnp.asarray(TOKENS),
                jnp.asarray(MASK),
                importance_weights=weights,
                **(options | more),
            ).sum()

        return np.asarray(jax.grad(total)(jnp.asarray(STUDENT_ROWS)))

    q = np.exp(log_softmax(STUDENT_ROWS))
    score = np.eye(3)[TOKENS] - q
    single = slopes(gamma=0.0)  # no long part
    # The credit, out of the one entry of the score that is the target's.
    place = np.expand_dims(TOKENS, -1)
    long, own = (
        np.take_along_axis(x, place, -1)[..., 0] for x in (slopes() - single, score)
    )
    credit = np.where(MASK, long / own, 0.0)
    exact = importance == "per_decision"
    share = np.cumprod(WEIGHTS, axis=-1) if exact else np.ones((4, 4))
    after = WEIGHTS if importance == "token" else np.ones((4, 4))
    credit = credit / after
    expected = np.zeros((4, 4))
    for row, t in np.argwhere(MASK):
        others = [credit[i, t] for i in range(4) if i != row and MASK[i, t]]
        mean = np.mean(others) if others else 0.0
        if baseline == "whitened":
            mean = credit[MASK].mean()
        expected[row, t] = credit[row, t] - share[row, t] * mean
        if baseline == "whitened":
            expected[row, t] /= credit[MASK].std()
    expected = single + np.expand_dims(after * expected, -1) * score
    expected = np.where(MASK[..., None], expected, 0.0)
    np.testing.assert_allclose(slopes(baseline=baseline), expected, atol=1e-12)


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_a_target_that_the_student_rules_out(importance):
    """Its log-ratio is -inf and counts nothing; per decision it is the end."""
    student = np.array(STUDENT_ROWS)
    student[0, 1, 2], student[3, 2, 0] = -np.inf, -np.inf  # the targets there
    weights = np.array(WEIGHTS)
    weights[0, 1], weights[3, 2] = 0.0, 0.0

    def values_of(student, rows=slice(None), mask=MASK):
        return sequence_reverse_kl(
            student[rows],
            jnp.asarray(TEACHER_ROWS[rows]),
            jnp.asarray(TOKENS[rows]),
            jnp.asarray(mask[rows]),
            importance_weights=jnp.asarray(weights[rows]),
            importance=importance,
        )

    def run(*arguments):
        return jax.value_and_grad(lambda x: values_of(x, *arguments).sum())(
            jnp.asarray(student)
        )

    _, slopes = run()
    assert np.isfinite(slopes).all()
    if importance == "per_decision":
        ended = MASK & (np.cumprod(np.where(MASK, weights, 1.0), axis=-1) > 0.0)
        # The state before that target counts, nothing behind it does.
        kept = np.concatenate([MASK[:, :1], ended[:, :-1] & MASK[:, 1:]], axis=-1)
        for row in range(4):
            values = np.asarray(values_of(jnp.asarray(student))[row])
            np.testing.assert_array_equal(values[~kept[row]], 0.0)
            assert (values[kept[row]] > 0.0).all()
            np.testing.assert_array_equal(slopes[row][~kept[row]], 0.0)
    # What comes before is what it is without the target's log-ratio.
    shorter = np.array(MASK)
    shorter[0, 1:], shorter[3, 2:] = False, False
    _, without = run(slice(None), shorter)
    if importance == "per_decision":
        np.testing.assert_allclose(slopes[0, 0], without[0, 0], atol=1e-12)
        np.testing.assert_allclose(slopes[3, :2], without[3, :2], atol=1e-12)
    else:  # row 3 ends with it, in row 0 other log-ratios follow
        np.testing.assert_allclose(slopes[3, :2], without[3, :2], atol=1e-12)


def test_states_that_the_student_never_sees_may_be_anything():
    """What the teacher rules out there is no infinite cost, and no NaN."""
    teacher, weights = np.array(TEACHER_ROWS), np.array(WEIGHTS)
    teacher[0, 2, 1], weights[0, 1] = -np.inf, 0.0

    def total(student):
        return sequence_reverse_kl(
            student,
            jnp.asarray(teacher),
            jnp.asarray(TOKENS),
            jnp.asarray(MASK),
            importance_weights=jnp.asarray(weights),
        ).sum()

    value, slopes = jax.value_and_grad(total)(jnp.asarray(STUDENT_ROWS))
    assert np.isfinite(value)
    assert np.isfinite(slopes).all()
    np.testing.assert_array_equal(slopes[0, 2:], 0.0)


def test_products_of_weights_skip_what_is_not_set():
    mask = jnp.array([[True, False, True, True, False]])
    weights = jnp.array([[0.5, jnp.nan, 4.0, 0.25, jnp.inf]])
    before, through = per_decision_weights(weights, mask)
    np.testing.assert_array_equal(before, [[1.0, 0.0, 0.5, 2.0, 0.0]])
    np.testing.assert_array_equal(through, [[0.5, 0.0, 2.0, 0.5, 0.0]])
    with pytest.raises(AssertionError):
        per_decision_weights(weights, mask[:, 1:])


@pytest.mark.parametrize("name", ["importance", "baseline"])
def test_unknown_options(name):
    rows, mask = jnp.zeros((4, 4, 3)), jnp.asarray(MASK)
    with pytest.raises(ValueError, match=f"{name} must be one of .*'all'"):
        sequence_reverse_kl(rows, rows, jnp.asarray(TOKENS), mask, **{name: "all"})


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_weights_of_another_shape_or_width(importance):
    """One for each target; in halves they are multiplied wide."""
    student, teacher = (
        jnp.asarray(rows, jnp.float32) for rows in (STUDENT_ROWS, TEACHER_ROWS)
    )

    def total(student, weights):
        return sequence_reverse_kl(
            student,
            teacher,
            jnp.asarray(TOKENS),
            jnp.asarray(MASK),
            importance_weights=weights,
            importance=importance,
        ).sum()

    halves = jnp.asarray(WEIGHTS, jnp.bfloat16)
    found, expected = (
        jax.grad(total)(student, weights)
        for weights in (halves, halves.astype(jnp.float32))
    )
    np.testing.assert_array_equal(found, expected)
    assert factors(halves, jnp.asarray(MASK), importance).targets.dtype == jnp.float32
    for shape in ((4, 1), (4, 4, 1)):
        with pytest.raises(AssertionError):
            total(student, jnp.ones(shape))
