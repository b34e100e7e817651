"""The student's steps of MM-PbKD on bed E by enumeration, through the objective.

Their mean over all samples against the bed's own policy gradient, which knows nothing
of moments of Q, and against finite differences of the gap.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import one_step
from rkd_jax.masking import sequence_sum
from rkd_jax.objectives.mm_pbkd import make_mm_pbkd
from rkd_jax.objectives.white_box import STEPS
from rkd_jax.types import DemonstrationBatch, GameBatch, WhiteBoxSignal
from tests.tabular.bed import BED_E, STUDENT, TEACHER, TabularLM, bed_sequences
from tests.tabular.white_box import (
    Q,
    advantages,
    implied_rewards,
    log_prob_rows,
    moment_gap,
    probs,
    tabular_q,
)

pytestmark = pytest.mark.usefixtures("x64")

N = len(BED_E.sequences)
MASK = np.broadcast_to(BED_E.mask, (2, N, 4))
STATE_VALUES = np.random.default_rng(2).normal(size=(2, 15, 1))
TABLES = {"bed": Q, "shifted": Q + STATE_VALUES, "zero": np.zeros(Q.shape)}
both_discounts = pytest.mark.parametrize("gamma", [1.0, 0.9])


@functools.cache
def gradients(step, baseline, weighted):
    """Jitted (q, student, gamma, sequences, teacher) [2, M, G, ..] -> [2, M, ..]."""

    def of_all(q, student, gamma, sequences, teacher):
        objective = make_mm_pbkd(
            TabularLM(),
            tabular_q,
            student_step=step,
            baseline=baseline,
            gamma=gamma,
            discount_weighting=weighted,
            q_bound=None,
            center_q=False,
        )

        def total(params, sequences, teacher):
            row = jax.tree.map(lambda x: jnp.expand_dims(x, 0), sequences)
            batch = GameBatch(demonstrations=None, rollouts=row)
            signal = WhiteBoxSignal(rollouts=jnp.expand_dims(teacher, 0))
            out = objective.student_loss(params, {"q": q}, None, batch, signal, None)
            return out.total

        gradient = jax.vmap(jax.grad(total), in_axes=(None, 0, 0))
        gradient = jax.vmap(gradient, in_axes=(None, 0, 0))
        return gradient({"logits": student}, sequences, teacher)["logits"]

    return jax.jit(of_all)


@functools.cache
def enumerated(
    step, *, gamma, baseline="none", weighted=True, table="bed", agree=False
):
    """Mean and variance of the student's gradient over all samples of the bed.

    Groups of two samples where there is a baseline, single ones elsewhere.
    """
    student = TEACHER if agree else STUDENT
    size = 1 if baseline == "none" else 2
    groups = np.array(list(itertools.product(range(N), repeat=size)))
    numbers = np.broadcast_to(np.arange(2)[:, None, None], (2, *groups.shape))
    indices = np.broadcast_to(groups, numbers.shape)
    each = gradients(step, baseline, weighted)(
        TABLES[table],
        student,
        gamma,
        bed_sequences(numbers, indices),
        log_prob_rows(TEACHER, numbers, indices),
    )
    each = np.asarray(each).reshape(*numbers.shape[:2], -1)
    start = np.array(BED_E.prompt_weights)[:, None]
    weights = start * np.prod((BED_E.weights(student) / start)[:, groups], axis=-1)
    return Moments(weights, each)


class Moments:
    """Mean and trace of the covariance of ``each`` [2, M, D], weights [2, M]."""

    def __init__(self, weights, each):
        self.mean = np.einsum("xm,xmd->d", weights, each)
        square = np.einsum("xm,xmd->", weights, each**2)
        self.variance = square - (self.mean**2).sum()


def descent(gamma, anchor=TEACHER, student=STUDENT):
    """Gradient of the gap in the student's table: minus that of J, by the bed."""
    rewards = implied_rewards(Q, anchor, gamma)
    return -BED_E.policy_gradient(student, rewards, gamma).ravel()


@pytest.mark.parametrize(
    ("step", "baseline"),
    [
        ("reinforce", "none"),
        ("one_step_plus_long", "none"),
        ("one_step_plus_long", "loo_return"),
    ],
)
@both_discounts
def test_unbiased_steps_have_the_gradient_of_the_gap(step, baseline, gamma):
    found = enumerated(step, gamma=gamma, baseline=baseline).mean
    np.testing.assert_allclose(found, descent(gamma), atol=1e-12)


@pytest.mark.parametrize("step", STEPS)
def test_a_state_value_added_to_q_changes_no_step(step):
    before, after = (
        enumerated(step, gamma=0.9, table=table).mean for table in ("bed", "shifted")
    )
    np.testing.assert_allclose(after, before, atol=1e-12)
    assert np.linalg.norm(before) > 0.1


@pytest.mark.parametrize("step", STEPS)
def test_a_critic_of_zero_gives_no_gradient_exactly(step):
    """For any sample: the variance counts every one of them."""
    found = enumerated(step, gamma=0.9, table="zero")
    np.testing.assert_array_equal(found.mean, np.zeros(Q.size))
    assert found.variance == 0.0


def test_the_exact_gradient_is_the_gaps_derivative():
    """The reference of the test above, by finite differences of the moment gap.

    The gap's reward is fixed by the teacher as anchor, so both factors of the gap may
    move with the student.
    """
    gradient = descent(0.9).reshape(BED_E.table_shape)
    for index in [(0, 0, 1), (1, 4, 2), (0, 11, 0), (1, 0, 0)]:
        bump = np.zeros(STUDENT.shape)
        bump[index] = 1e-5
        up, down = (
            moment_gap(Q, STUDENT + s * bump, 0.9, student=STUDENT + s * bump)
            for s in (1, -1)
        )
        assert gradient[index] == pytest.approx((up - down) / 2e-5, abs=1e-9)


def test_without_discount_weights_reinforce_is_exact_at_gamma_one_only():
    step = functools.partial(
        enumerated, "reinforce", baseline="loo_per_step", weighted=False
    )
    np.testing.assert_allclose(step(gamma=1.0).mean, descent(1.0), atol=1e-12)
    biased = step(gamma=0.9).mean
    to_go = descent_without_weights(0.9)
    np.testing.assert_allclose(biased, to_go, atol=1e-12)
    assert np.abs(to_go - descent(0.9)).max() > 1e-3


def descent_without_weights(gamma):
    """The common practice by hand: cost-to-go without the leading gamma**h."""
    gradient = np.zeros(BED_E.table_shape)
    gains, policy = advantages(Q, TEACHER), probs(STUDENT)
    for x, (i, y) in itertools.product(range(2), enumerate(BED_E.sequences)):
        to_go = 0.0
        for t in reversed(range(len(y))):
            k = BED_E.states[i, t]
            to_go = gains[x, k, y[t]] + gamma * to_go
            score = np.eye(3)[y[t]] - policy[x, k]
            gradient[x, k] -= BED_E.weights(STUDENT)[x, i] * to_go * score
    return gradient.ravel()


@pytest.mark.parametrize(("gamma", "cosine"), [(1.0, 0.8013), (0.9, 0.8467)])
def test_one_step_is_biased_for_the_teachers_anchor(gamma, cosine):
    found, exact = enumerated("one_step", gamma=gamma).mean, descent(gamma)
    norms = np.linalg.norm(found) * np.linalg.norm(exact)
    assert found @ exact / norms == pytest.approx(cosine, abs=5e-5)


def test_one_step_is_exact_where_the_policies_agree():
    found = enumerated("one_step", gamma=0.9, agree=True).mean
    exact = descent(0.9, student=TEACHER)
    np.testing.assert_allclose(found, exact, atol=1e-12)
    assert np.linalg.norm(exact) > 0.1


@both_discounts
def test_one_step_is_exact_for_the_students_own_anchor(gamma):
    """The reward is the one Q implies with this student; it stays as it is."""
    weights = BED_E.weights(STUDENT)

    def total(table):
        tokens = one_step(
            BED_E.rows(Q), jax.nn.log_softmax(table)[:, BED_E.states], MASK, gamma=gamma
        )
        return (weights * sequence_sum(tokens, MASK)).sum()

    found = jax.jit(jax.grad(total))(STUDENT).ravel()
    exact = descent(gamma, anchor=STUDENT)
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_summing_the_first_step_out_lowers_the_variance():
    variances = [
        enumerated(step, gamma=1.0).variance
        for step in ("reinforce", "one_step_plus_long")
    ]
    np.testing.assert_allclose(variances, [1.531, 0.898], atol=5e-4)


def test_the_off_policy_step_is_the_derivative_of_its_gap():
    objective = make_mm_pbkd(TabularLM(), tabular_q, gap="off", gamma=0.9, q_bound=None)
    numbers, indices = np.meshgrid(range(2), range(N), indexing="ij")
    weights = jnp.asarray(BED_E.weights(TEACHER))

    @jax.jit
    @jax.grad
    def gradient(table):
        def total(sequences, teacher):
            row = jax.tree.map(lambda x: jnp.expand_dims(x, 0), sequences)
            batch = GameBatch(DemonstrationBatch(row, row, jnp.arange(1)), None)
            signal = WhiteBoxSignal(demonstrations=jnp.expand_dims(teacher, 0))
            return objective.student_loss(
                {"logits": table}, {"q": jnp.asarray(Q)}, None, batch, signal, None
            ).total

        losses = jax.vmap(jax.vmap(total))(
            bed_sequences(numbers, indices), log_prob_rows(TEACHER, numbers, indices)
        )
        return (weights * losses).sum()

    found = np.asarray(gradient(jnp.asarray(STUDENT)))
    for index in [(0, 0, 1), (1, 4, 2), (0, 11, 0), (1, 2, 0)]:
        bump = np.zeros(STUDENT.shape)
        bump[index] = 1e-5
        up, down = (
            moment_gap(Q, TEACHER, 0.9, student=STUDENT + s * bump) for s in (1, -1)
        )
        assert found[index] == pytest.approx((up - down) / 2e-5, abs=1e-9)
