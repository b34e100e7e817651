"""MiniLLM: the loss by hand, its gradient by enumeration of the bed, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import reverse_kl, sequence_reverse_kl
from rkd_jax.objectives.gkd import make_gkd
from rkd_jax.objectives.minillm import make_minillm
from rkd_jax.types import DemonstrationBatch, ImitationBatch, TeacherSignal
from tests.tabular.bed import (
    BED_E,
    STUDENT,
    TEACHER,
    bed_sequences,
    log_softmax,
)
from tests.tabular.posterior import QuickLM

MODEL = QuickLM()
NUMBERS, INDICES = (
    grid.ravel() for grid in np.meshgrid(range(2), range(31), indexing="ij")
)

pytestmark = pytest.mark.usefixtures("x64")


# The loss, by hand

STUDENT_ROWS, TEACHER_ROWS = np.random.default_rng(0).normal(size=(2, 4, 4, 3))
TOKENS = np.array([[0, 2, 1, 1], [1, 0, 2, 0], [2, 2, 1, 0], [0, 1, 0, 2]])
MASK = np.arange(4) < np.array([[4], [2], [1], [3]])


def by_hand(gamma, long_part="following", length_normalised=False, tokens=TOKENS, v=3):
    """Single-step divergences, and gradient in the logits of v tokens, from loops."""
    log_q, log_p = (log_softmax(rows[..., :v]) for rows in (STUDENT_ROWS, TEACHER_ROWS))
    q, ratio = np.exp(log_q), log_q - log_p
    divergence = (q * ratio).sum(-1)
    slope = q * (ratio - divergence[..., None])
    for row, t in itertools.product(range(4), repeat=2):
        first = t if long_part == "inclusive" else t + 1
        last = MASK[row].sum()
        terms = [
            gamma ** (u - t) * ratio[row, u, tokens[row, u]] for u in range(first, last)
        ]
        credit = sum(terms) / (max(len(terms), 1) if length_normalised else 1)
        slope[row, t] += credit * (np.eye(v)[tokens[row, t]] - q[row, t])
    return np.where(MASK, divergence, 0.0), np.where(MASK[..., None], slope, 0.0)


@pytest.mark.parametrize("gamma", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("long_part", ["following", "inclusive"])
@pytest.mark.parametrize("length_normalised", [False, True])
def test_value_and_gradient(gamma, long_part, length_normalised):
    outside = ~MASK[..., None]
    student, teacher = (
        jnp.asarray(np.where(outside, garbage, rows))
        for garbage, rows in ((np.nan, STUDENT_ROWS), (np.inf, TEACHER_ROWS))
    )
    tokens = jnp.asarray(np.where(MASK, TOKENS, -100))

    def total(student, teacher):
        values = sequence_reverse_kl(
            student,
            teacher,
            tokens,
            jnp.asarray(MASK),
            gamma=gamma,
            long_part=long_part,
            length_normalised=length_normalised,
        )
        return values.sum(), values

    (in_student, in_teacher), values = jax.grad(total, argnums=(0, 1), has_aux=True)(
        student, teacher
    )
    divergence, slope = by_hand(gamma, long_part, length_normalised)
    np.testing.assert_allclose(values, divergence, atol=1e-12)
    np.testing.assert_allclose(in_student, slope, atol=1e-12)
    np.testing.assert_array_equal(in_teacher, np.zeros(teacher.shape))


def test_tokens_that_are_impossible_for_both_change_nothing():
    """Vocabulary padding, -inf in both; in the teacher alone it is an infinite cost."""
    tokens, mask = TOKENS % 2, jnp.asarray(MASK)
    allowed = jnp.asarray(STUDENT_ROWS)
    student, teacher = (
        jnp.asarray(np.where(np.arange(3) == 2, -np.inf, rows))
        for rows in (STUDENT_ROWS, TEACHER_ROWS)
    )

    def total(student):
        values = sequence_reverse_kl(
            student, teacher, jnp.asarray(tokens), mask, gamma=0.6
        )
        return values.sum(), values

    slope, values = jax.grad(total, has_aux=True)(student)
    divergence, expected = by_hand(0.6, tokens=tokens, v=2)
    np.testing.assert_allclose(values, divergence, atol=1e-12)
    np.testing.assert_allclose(slope[..., :2], expected, atol=1e-12)
    np.testing.assert_array_equal(slope[..., 2], np.zeros((4, 4)))
    np.testing.assert_array_equal(total(allowed)[1], np.where(MASK, np.inf, 0.0))


def test_domains_and_shapes():
    rows, mask = jnp.zeros((4, 4, 3)), jnp.asarray(MASK)
    tokens = jnp.asarray(TOKENS)
    with pytest.raises(ValueError, match="gamma must lie in"):
        sequence_reverse_kl(rows, rows, tokens, mask, gamma=2.0)
    with pytest.raises(ValueError, match="long_part must be one of .*'all'"):
        sequence_reverse_kl(rows, rows, tokens, mask, long_part="all")
    with pytest.raises(AssertionError):
        sequence_reverse_kl(rows, rows, tokens[:, :1], mask)
    with pytest.raises(ValueError, match="temperature must lie in"):
        make_minillm(MODEL, temperature=-1.0)


# The objective, by enumeration


def responses(numbers=NUMBERS, indices=INDICES):
    sequences = bed_sequences(numbers, indices)
    return DemonstrationBatch(sequences, sequences, jnp.arange(len(numbers)))


def signal(temperature=1.0, numbers=NUMBERS, indices=INDICES):
    table = log_softmax(TEACHER / temperature)
    return TeacherSignal(jnp.asarray(table[numbers[:, None], BED_E.states[indices]]))


def expectation(objective, temperature=1.0):
    """Mean loss and mean gradient over all samples of the student."""
    weights = jnp.asarray(BED_E.weights(STUDENT / temperature).ravel())

    @jax.jit
    @jax.value_and_grad
    def mean(table):
        def total(batch, signal):
            batch, signal = jax.tree.map(
                lambda leaf: jnp.expand_dims(leaf, 0), (batch, signal)
            )
            return objective.student_loss(
                {"logits": table}, None, None, batch, signal, None
            ).total

        return weights @ jax.vmap(total)(responses(), signal(temperature))

    return mean(jnp.asarray(STUDENT))


def exact_gradient(temperature=1.0):
    """Of the sequence-level divergence: the policy gradient of its log-ratios."""
    tempered = STUDENT / temperature
    ratio = log_softmax(tempered) - log_softmax(TEACHER / temperature)
    return BED_E.policy_gradient(tempered, ratio) / temperature


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_is_that_of_the_sequence_divergence(temperature):
    objective = make_minillm(MODEL, temperature=temperature)
    value, gradient = expectation(objective, temperature)
    np.testing.assert_allclose(gradient, exact_gradient(temperature), atol=1e-12)
    tempered = STUDENT / temperature
    ratio = log_softmax(tempered) - log_softmax(TEACHER / temperature)
    exact = (BED_E.occupancy(tempered) * ratio).sum()
    assert float(value) == pytest.approx(exact, abs=1e-12)
    if temperature == 1.0:
        assert float(value) == pytest.approx(1.317522, abs=6e-7)


def test_the_exact_gradient_is_a_finite_difference():
    def divergence(table):
        return (
            BED_E.occupancy(table) * (log_softmax(table) - log_softmax(TEACHER))
        ).sum()

    gradient = exact_gradient()
    for index in [(0, 0, 0), (1, 1, 1), (0, 12, 2)]:
        bump = np.zeros(STUDENT.shape)
        bump[index] = 1e-5
        up, down = (divergence(STUDENT + s * bump) for s in (1, -1))
        assert gradient[index] == pytest.approx((up - down) / 2e-5, abs=1e-9)


def test_inclusive_counts_the_single_step_twice():
    """It is all that GKD with reverse KL sees, here from the visits of the states."""
    log_q, log_p = log_softmax(STUDENT), log_softmax(TEACHER)
    q, ratio = np.exp(log_q), log_q - log_p
    divergence = (q * ratio).sum(-1, keepdims=True)
    visits = BED_E.occupancy(STUDENT).sum(-1, keepdims=True)
    one, full = visits * q * (ratio - divergence), exact_gradient()
    _, gkd = expectation(make_gkd(MODEL, reverse_kl))
    np.testing.assert_allclose(gkd, one, atol=1e-12)
    cosine = (one * full).sum() / np.linalg.norm(one) / np.linalg.norm(full)
    assert float(cosine) == pytest.approx(0.78, abs=5e-3)
    _, twice = expectation(make_minillm(MODEL, long_part="inclusive"))
    np.testing.assert_allclose(twice, full + one, atol=1e-12)


def test_without_the_long_part_it_is_gkd():
    rows = np.array([5, 30, 40, 61])
    batch, taught = (
        jax.tree.map(lambda leaf: leaf[rows], data) for data in (responses(), signal())
    )

    def gradient(objective):
        def total(params):
            return objective.student_loss(params, None, None, batch, taught, None).total

        return jax.grad(total)({"logits": jnp.asarray(STUDENT)})["logits"]

    found = gradient(make_minillm(MODEL, gamma=0.0))
    parent = gradient(make_gkd(MODEL, reverse_kl))
    np.testing.assert_allclose(found, parent, rtol=1e-12, atol=1e-15)


def test_it_reads_the_imitated_responses_and_counts_responses():
    """An empty row counts nowhere, NaN in its signal included."""
    numbers, indices = np.array([0, 1, 0, 0]), np.array([9, 0, 4, 6])
    fixed, sampled = responses(numbers, indices + 20), responses(numbers, indices)
    taught = signal(1.0, numbers, indices)
    empty = sampled.sequences.response_mask.at[1].set(False)
    sequences = sampled.sequences
    sequences = type(sequences)(sequences.tokens, sequences.token_mask, empty)
    sampled = DemonstrationBatch(sequences, sequences, sampled.index)
    dirty = jnp.where(empty[..., None], taught.log_probs, jnp.nan)
    objective = make_minillm(MODEL)

    def total(table):
        out = objective.student_loss(
            {"logits": table},
            None,
            None,
            ImitationBatch(fixed, sampled),
            TeacherSignal(dirty),
            None,
        )
        return out.total, out

    gradient, out = jax.grad(total, has_aux=True)(jnp.asarray(STUDENT))
    log_q, log_p = log_softmax(STUDENT), log_softmax(TEACHER)
    divergence = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    rows = [(0, 9), (0, 4), (0, 6)]
    lengths = [len(BED_E.sequences[i]) for _, i in rows]
    expected = sum(
        divergence[x, BED_E.states[i, : len(BED_E.sequences[i])]].sum() for x, i in rows
    )
    np.testing.assert_allclose(out.total, expected, rtol=1e-12)
    assert float(out.weight) == 3
    assert float(out.metrics["student/divergence"].weight) == sum(lengths)
    nll = -sum(BED_E.sequence_log_probs(STUDENT)[x, i] for x, i in rows)
    np.testing.assert_allclose(out.metrics["student/nll"].total, nll, rtol=1e-12)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], np.zeros((15, 3)))
