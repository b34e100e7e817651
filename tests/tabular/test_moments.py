"""Moments of Q on bed E by enumeration, in float64: identities and golden numbers.

The library's losses against `tests.tabular.white_box` and the bed's own returns, which
know nothing of moments.
"""

import numpy as np
import pytest

from rkd_jax.losses import (
    advantage_sum,
    bounded_moment_distance,
    bradley_terry,
    moment_gap,
    trajectory_return,
)
from rkd_jax.masking import sequence_sum
from rkd_jax.types import Pair
from tests.tabular.bed import (
    BED_E,
    CHOSEN,
    REJECTED,
    REWARD,
    STUDENT,
    TEACHER,
    A,
    log_softmax,
)
from tests.tabular.white_box import (
    CHILDREN,
    RANDOM_Q,
    Q,
    action_values,
    implied_rewards,
    probs,
    state_values,
)
from tests.tabular.white_box import moment_gap as exact_moment_gap

pytestmark = pytest.mark.usefixtures("x64")

GOLDEN = 6e-7
MASK = np.broadcast_to(BED_E.mask, (2, len(BED_E.sequences), 4))
ACTIONS = np.broadcast_to(BED_E.actions, MASK.shape)
LOG_TEACHER = log_softmax(TEACHER)
both_discounts = pytest.mark.parametrize("gamma", [1.0, 0.9])


def library_gap(q, states_of, gamma, student=STUDENT):
    """Expectation of the library's moment gap over all responses of a policy."""
    rows = (BED_E.rows(table) for table in (q, log_softmax(student), LOG_TEACHER))
    tokens = moment_gap(*rows, MASK, gamma=gamma)
    return float((BED_E.weights(states_of) * sequence_sum(tokens, MASK)).sum())


# 1. Identities of the gap and of the preference logit


@pytest.mark.parametrize("q", [Q, RANDOM_Q], ids=["bed", "random"])
@both_discounts
def test_the_moment_gap_of_any_q_is_a_performance_difference(q, gamma):
    """Under the reward Q implies, with either anchor: no Bellman residual is needed."""
    for anchor, states_of in ((TEACHER, STUDENT), (STUDENT, TEACHER)):
        rewards = implied_rewards(q, anchor, gamma)
        difference = BED_E.expected_return(TEACHER, rewards, gamma)
        difference -= BED_E.expected_return(STUDENT, rewards, gamma)
        found = library_gap(q, states_of, gamma)
        assert found == pytest.approx(difference, abs=1e-12)
        exact = exact_moment_gap(q, states_of, gamma)
        assert found == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(
    ("states_of", "gamma", "golden"),
    [
        (STUDENT, 1.0, 0.807599),
        (STUDENT, 0.9, 0.789644),
        (TEACHER, 1.0, 1.151132),
        (TEACHER, 0.9, 1.087426),
    ],
    ids=["on", "on discounted", "off", "off discounted"],
)
def test_golden_moment_gaps(states_of, gamma, golden):
    assert library_gap(Q, states_of, gamma) == pytest.approx(golden, abs=GOLDEN)


@pytest.mark.parametrize("q", [Q, RANDOM_Q], ids=["bed", "random"])
@both_discounts
def test_the_implied_return_is_the_prompts_value_plus_the_advantage_sum(q, gamma):
    for anchor in (TEACHER, STUDENT):
        sums = advantage_sum(
            BED_E.rows(q), BED_E.rows(log_softmax(anchor)), ACTIONS, MASK, gamma=gamma
        )
        returns = BED_E.returns(implied_rewards(q, anchor, gamma), gamma)
        start = state_values(q, anchor)[:, :1]
        np.testing.assert_allclose(start + np.asarray(sums), returns, atol=1e-12)


@pytest.mark.parametrize(
    ("gamma", "chosen", "rejected"),
    [(1.0, -0.150092, -0.976883), (0.9, -0.103132, -0.906876)],
)
def test_golden_advantage_sums_and_preference_loss(gamma, chosen, rejected):
    sums = advantage_sum(
        BED_E.rows(Q), BED_E.rows(LOG_TEACHER), ACTIONS, MASK, gamma=gamma
    )[0]
    assert float(sums[CHOSEN]) == pytest.approx(chosen, abs=GOLDEN)
    assert float(sums[REJECTED]) == pytest.approx(rejected, abs=GOLDEN)
    if gamma == 1.0:
        loss = bradley_terry(Pair(sums[CHOSEN], sums[REJECTED]))
        assert float(loss) == pytest.approx(0.362871, abs=GOLDEN)
    start = state_values(Q, TEACHER)[:, 0]
    np.testing.assert_allclose(start, [0.446778, 0.724946], atol=GOLDEN)


@both_discounts
def test_the_right_q_reproduces_a_given_reward(gamma):
    """5: the teacher's action values on its anchor, the student's on the other."""
    difference = BED_E.expected_return(TEACHER, REWARD, gamma)
    difference -= BED_E.expected_return(STUDENT, REWARD, gamma)
    for owner, states_of in ((TEACHER, STUDENT), (STUDENT, TEACHER)):
        q = action_values(REWARD, owner, gamma)
        found = library_gap(q, states_of, gamma)
        assert found == pytest.approx(difference, abs=1e-12)


# 2. The gauge


def test_a_state_value_added_to_q_changes_no_gap_and_no_advantage():
    shift = np.random.default_rng(2).normal(size=(2, 15, 1))
    for states_of in (STUDENT, TEACHER):
        gaps = [library_gap(q, states_of, 0.9) for q in (Q, Q + shift)]
        assert gaps[1] == pytest.approx(gaps[0], abs=1e-12)
    sums = [
        advantage_sum(BED_E.rows(q), BED_E.rows(LOG_TEACHER), ACTIONS, MASK, gamma=0.9)
        for q in (Q, Q + shift)
    ]
    np.testing.assert_allclose(sums[1], sums[0], atol=1e-12)


# 3. Agreement


def test_no_gap_where_the_policies_agree_exactly():
    log_probs, q = BED_E.rows(LOG_TEACHER), BED_E.rows(RANDOM_Q)
    tokens = moment_gap(q, log_probs, log_probs, MASK)
    np.testing.assert_array_equal(tokens, np.zeros(MASK.shape))
    sampled = advantage_sum(q, log_probs, ACTIONS, MASK)
    assert np.abs(sampled).max() > 0.1  # zero in expectation only
    mean = float((BED_E.weights(TEACHER) * sampled).sum())
    assert mean == pytest.approx(0.0, abs=1e-12)


# MMKD: the bounded supremum


def distance(states_of, *, student=STUDENT, teacher=TEACHER, bound=1.0, gamma=1.0):
    """Expectation of the closed form over all responses of a policy."""
    rows = (BED_E.rows(log_softmax(table)) for table in (student, teacher))
    tokens = bounded_moment_distance(*rows, MASK, q_bound=bound, gamma=gamma)
    return float((BED_E.weights(states_of) * sequence_sum(tokens, MASK)).sum())


@pytest.mark.parametrize(
    ("states_of", "gamma", "golden"),
    [
        (STUDENT, 1.0, 0.980262),
        (STUDENT, 0.9, 0.884626),
        (TEACHER, 1.0, 1.231541),
        (TEACHER, 0.9, 1.096130),
    ],
    ids=["on", "on discounted", "off", "off discounted"],
)
def test_mmkd_bounded_critics_find_twice_the_total_variation(states_of, gamma, golden):
    bound = 1.7
    found = distance(states_of, bound=bound, gamma=gamma)
    assert found == pytest.approx(2 * bound * golden, abs=4 * GOLDEN)
    best = bound * np.sign(probs(TEACHER) - probs(STUDENT))
    attained = exact_moment_gap(best, states_of, gamma)
    assert found == pytest.approx(attained, abs=1e-12)


def test_mmkd_distance_bounds_the_gap_of_every_reward_with_such_values():
    """The class holds the action values of REWARD scaled into it, for either side."""
    for owner, states_of in ((TEACHER, STUDENT), (STUDENT, TEACHER)):
        values = action_values(REWARD, owner, 1.0)
        scale = 1.0 / np.abs(values).max()
        gap = exact_moment_gap(scale * values, states_of, 1.0)
        difference = BED_E.expected_return(TEACHER, scale * REWARD)
        difference -= BED_E.expected_return(STUDENT, scale * REWARD)
        assert gap == pytest.approx(difference, abs=1e-12)
        assert difference < distance(states_of)


def test_mmkd_distance_is_zero_exactly_where_the_visited_states_agree():
    """The teacher never starts with a: what the student does after it is not seen."""
    teacher, after_a = TEACHER.copy(), [1, 3, 4, 7, 8, 9, 10]
    teacher[:, 0, A] = -np.inf
    student = teacher.copy()
    student[:, after_a] = STUDENT[:, after_a]
    for states_of in (student, teacher):
        assert distance(states_of, student=student, teacher=teacher) == 0.0
    student[1, 2, A] += 0.3  # a state that both visit
    for states_of in (student, teacher):
        visits = BED_E.occupancy(states_of).sum(-1)[1, 2]
        expected = visits * np.abs(probs(teacher) - probs(student))[1, 2].sum()
        assert expected > 0.01
        found = distance(states_of, student=student, teacher=teacher)
        assert found == pytest.approx(expected, abs=1e-12)


def test_the_bed_of_the_formulas():
    """`implied_rewards` inverts `action_values`; the tree has 14 inner edges."""
    assert (CHILDREN >= 0).sum() == 14
    q = action_values(REWARD, TEACHER, 0.9)
    np.testing.assert_allclose(implied_rewards(q, TEACHER, 0.9), REWARD, atol=1e-12)
    start = state_values(q, TEACHER)[:, 0] @ np.array(BED_E.prompt_weights)
    assert start == pytest.approx(BED_E.expected_return(TEACHER, REWARD, 0.9))
    returns = trajectory_return(BED_E.taken(REWARD), MASK, gamma=0.9)
    np.testing.assert_allclose(returns, BED_E.returns(REWARD, 0.9), atol=1e-12)
