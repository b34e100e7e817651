"""The PbKD game on the beds: the library's players against a convex solver.

The solver is `tests.tabular.game`; golden numbers come with the beds' definition.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linprog, minimize

from rkd_jax.losses import (
    bradley_terry,
    check_epsilon,
    confidence_slack,
    leave_one_out_per_step,
    reinforce,
    reward_gap,
    reward_player_loss,
    reward_to_go,
    trajectory_return,
    triviality_threshold,
)
from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.types import Pair
from tests.tabular.bed import (
    BED_E,
    PAIRS,
    REWARD,
    STUDENT,
    TabularLM,
    tabular_rewards,
)
from tests.tabular.game import BIG, BIG_STUDENT, SMALL

GOLDEN = 6e-7
ROUNDS = 3000  # of the dual ascent


# The library's side


def library_returns(game, table):
    """[X, N] returns of all responses under a reward table."""
    mask = jnp.broadcast_to(game.bed.mask, (len(table), *game.bed.mask.shape))
    rewards = table[:, game.bed.states, game.bed.actions]
    return trajectory_return(rewards, mask)


def gap_and_slack(game, table, student, epsilon):
    """Scalars: the imitation gap and the mean slack, by the library."""
    returns = library_returns(game, table)
    gap = reward_gap(jnp.sum(game.teacher * returns), jnp.sum(student * returns))
    x, i, j = game.pairs.T
    nll = bradley_terry(Pair(returns[x, i], returns[x, j]), label=game.labels)
    anchor = library_returns(game, jnp.asarray(game.true_rewards))
    anchor = bradley_terry(Pair(anchor[x, i], anchor[x, j]), label=game.labels)
    return gap, confidence_slack(nll, anchor, epsilon=epsilon).mean()


SWITCHES = ("rate", "hinge", "constraint", "dual_scale", "dual_step_size")


@functools.partial(jax.jit, static_argnames=SWITCHES)
def dual_ascent(*, rate=0.5, hinge=False, dual=1.0, **options):
    """Five projected gradient steps of the reward player for each dual step.

    Returns gap, slack and multiplier at the end, and the slack of every round.
    """
    optimiser, epsilon = optax.sgd(rate), 0.02
    dual_step = make_pbkd(
        TabularLM(), tabular_rewards, epsilon=epsilon, hinge=hinge, **options
    ).dual_step

    def loss(table, dual):
        gap, slack = gap_and_slack(BIG, table, BIG_STUDENT, epsilon)
        return reward_player_loss(gap, slack, dual, hinge=hinge)

    def step(carry, _):
        table, state, dual = carry
        updates, state = optimiser.update(jax.grad(loss)(table, dual), state)
        table = jnp.clip(optax.apply_updates(table, updates), -1.0, 1.0)
        return (table, state, dual), None

    def round_(carry, _):
        (table, state, dual), _ = jax.lax.scan(step, carry, length=5)
        _, slack = gap_and_slack(BIG, table, BIG_STUDENT, epsilon)
        if dual_step is not None:
            dual = dual_step(dual, {"critic/slack": slack})
        return (table, state, dual), slack

    table = jnp.asarray(BIG.true_rewards)
    start = table, optimiser.init(table), jnp.asarray(dual, table.dtype)
    (table, _, dual), slacks = jax.lax.scan(round_, start, length=ROUNDS)
    return (*gap_and_slack(BIG, table, BIG_STUDENT, epsilon), dual, slacks)


@functools.cache
def inner(epsilon):
    """The convex programme at the bed's student."""
    return BIG.inner(BIG_STUDENT, epsilon)


def test_the_solver_reproduces_the_beds_numbers():
    assert BIG.anchor_nll == pytest.approx(0.615189, abs=GOLDEN)
    gap = BIG.gap_slope(BIG_STUDENT) @ BIG.anchor
    assert gap == pytest.approx(0.038026, abs=GOLDEN)
    assert np.linalg.matrix_rank(BIG.differences) == 56
    for epsilon, gap, value in [
        (0.0, 0.208838, -0.855531),
        (0.005, 0.687161, -0.157917),
        (0.02, 1.113051, -0.025476),
        (0.1, 1.858684, 0.0),
    ]:
        assert inner(epsilon)[0] == pytest.approx(gap, abs=GOLDEN)
        assert BIG.value(epsilon) == pytest.approx(value, abs=GOLDEN)


def test_p1_a_potential_or_a_prompt_constant_changes_nothing(x64):
    """gamma Phi(s') - Phi(s) with Phi(terminal) = 0, at gamma = 0.9."""
    gamma, generator = 0.9, np.random.default_rng(0)
    potential = generator.normal(size=(2, BED_E.prefixes))
    shaped = REWARD - potential[:, :, None]
    for k in range((BED_E.prefixes - 1) // 2):
        shaped[:, k, :2] += gamma * potential[:, 2 * k + 1 : 2 * k + 3]
    _, i, j = PAIRS[PAIRS[:, 0] == 0].T
    mask = jnp.broadcast_to(BED_E.mask, (2, 31, 4))
    returns = [
        trajectory_return(jnp.asarray(BED_E.taken(table)), mask, gamma=gamma)
        for table in (REWARD, shaped)
    ]
    constant = jnp.array([[3.0], [-1.0]])
    for changed in (returns[1], returns[0] + constant):
        np.testing.assert_allclose(
            changed[0, i] - changed[0, j],
            returns[0][0, i] - returns[0][0, j],
            atol=1e-9,
        )
        gaps = [jnp.sum((BIG.teacher - BIG_STUDENT) * r) for r in (returns[0], changed)]
        np.testing.assert_allclose(gaps[1], gaps[0], atol=1e-9)


def test_dual_ascent_reaches_the_convex_programme(x64):
    """2.8.2 and 2.8.3: value, constraint and multiplier, at epsilon = 0.02."""
    gap, slack, dual, _ = dual_ascent()
    assert float(gap) == pytest.approx(1.113051, abs=1e-5)
    assert float(slack) <= 1e-6
    assert float(dual) == pytest.approx(17.889, abs=5e-3)
    assert float(gap) > 0.038026  # the anchor's own gap


def test_hinge_chatters_at_the_boundary_with_a_higher_multiplier(x64):
    gap, slack, dual, _ = dual_ascent(rate=0.1, hinge=True)
    assert float(slack) == pytest.approx(0.0, abs=0.002)
    assert float(gap) == pytest.approx(1.113051, abs=0.03)
    assert float(dual) > 20.0


def test_p6_fixed_multiplier_traces_the_family(x64):
    """Excess NLL falls as lambda rises; its values are those of the programme."""
    for dual, golden in [(1.0, 0.39424), (10.0, 0.04726), (100.0, 0.00115)]:
        penalised = minimize(
            lambda r, dual=dual: -BIG.gap_slope(BIG_STUDENT) @ r + dual * BIG.excess(r),
            BIG.anchor,
            jac=lambda r, dual=dual: (
                -BIG.gap_slope(BIG_STUDENT) + dual * BIG.excess_slope(r)
            ),
            bounds=[(-1, 1)] * BIG.size,
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000},
        )
        assert BIG.excess(penalised.x) == pytest.approx(golden, abs=6e-6)
        if dual > 10:
            continue  # too stiff for the plain step size of the players below
        _, slack, *_ = dual_ascent(constraint="fixed_lambda", dual=dual)
        assert float(slack) + 0.02 == pytest.approx(golden, abs=1e-5)


def test_p5_the_multiplier_grows_like_one_over_the_root_of_epsilon():
    """Stationarity inside the box: slope of the gap = lambda times that of the NLL."""
    slope, found = BIG.gap_slope(BIG_STUDENT), []
    for epsilon, golden in [
        (0.001, 107.0),
        (0.005, 46.93),
        (0.02, 17.889),
        (0.1, 5.422),
    ]:
        _, rewards = inner(epsilon)
        inside = np.abs(rewards) < 1 - 1e-6
        excess = BIG.excess_slope(rewards)[inside]
        found.append(slope[inside] @ excess / (excess @ excess))
        assert found[-1] == pytest.approx(golden, rel=1e-3)
        np.testing.assert_allclose(slope[inside], found[-1] * excess, atol=1e-4)
    assert found[0] * np.sqrt(0.001) == pytest.approx(3.38, abs=0.01)


def test_trap_raw_slack_is_far_too_slow_and_leaves_the_set_meanwhile(x64):
    """The relative slack is done within 600 rounds, the raw one not within 3,000."""
    *_, slacks = dual_ascent()
    np.testing.assert_allclose(slacks[600:], 0.0, atol=1e-5)
    *_, raw = dual_ascent(dual_scale="raw", dual_step_size=0.1)
    assert np.max(raw[:100]) + 0.02 > 0.20
    assert float(raw[-1]) + 0.02 == pytest.approx(0.032, abs=0.003)


def test_zero_multiplier_reaches_the_whole_box(x64):
    """2.8.8, lambda = 0: reward matching; the gap is the 1-norm of the occupancies."""
    gap, *_ = dual_ascent(constraint="fixed_lambda", dual=0.0, rate=5.0)
    assert float(gap) == pytest.approx(2.635585, abs=1e-6)


def test_limits_of_the_multiplier():
    """lambda = 0 matches rewards without preferences; epsilon = 0 is the worst MLE."""
    slope = BIG.gap_slope(BIG_STUDENT)
    free, _ = BIG.inner(BIG_STUDENT, 10.0)
    assert free == pytest.approx(np.abs(slope).sum(), abs=1e-6)
    assert free == pytest.approx(2.635585, abs=1e-6)
    pinned, rewards = inner(0.0)
    assert pinned == pytest.approx(0.208838, abs=GOLDEN)
    assert BIG.excess(rewards) == pytest.approx(0.0, abs=1e-9)
    nearly, _ = BIG.inner(BIG_STUDENT, 1e-6)
    assert pinned < nearly < pinned + 0.02


# P2: the whole game


@pytest.mark.parametrize(
    ("epsilon", "golden"),
    [
        (0.0, -0.550000),
        (0.0005, -0.464406),
        (0.002, -0.379522),
        (0.01, -0.172103),
        (0.05, -0.021269),
        (0.06, -0.011009),
        (0.0721, -7.5e-5),
    ],
)
def test_p2_value_of_the_mini_game_by_cutting_planes(epsilon, golden):
    """Policies against a growing list of rewards: certified from both sides."""
    assert SMALL.value(epsilon) == pytest.approx(golden, abs=GOLDEN)
    returns, upper = [], np.inf
    student = np.full((1, 4), 0.25)
    for _ in range(200):
        gap, rewards = SMALL.inner(student, epsilon)
        upper = min(upper, gap)
        returns.append((SMALL.features @ rewards)[0])
        # min t subject to (teacher - student) . returns <= t for every reward so far
        rows = np.array([[*-r, -1.0] for r in returns])
        limits = -np.array(returns) @ SMALL.teacher[0]
        lower = linprog(
            [0.0] * 4 + [1.0],
            A_ub=rows,
            b_ub=limits,
            A_eq=[[1.0] * 4 + [0.0]],
            b_eq=[1.0],
            bounds=[(0, 1)] * 4 + [(None, None)],
        )
        student = lower.x[None, :4]
        if upper - lower.fun < 1e-7:
            break
    assert lower.fun - 1e-7 <= SMALL.value(epsilon) <= upper + 1e-7
    assert upper - lower.fun < 1e-6


def test_p2_brute_force_over_the_policy_simplex():
    """At 0.002 the best student is deterministic on 00, a corner of the grid."""
    steps = 6
    grid = [
        np.array([[a, b, c, steps - a - b - c]]) / steps
        for a, b, c in np.ndindex(*[steps + 1] * 3)
        if a + b + c <= steps
    ]
    worst = [SMALL.inner(student, 0.002)[0] for student in grid]
    assert min(worst) == pytest.approx(-0.379522, abs=GOLDEN)
    np.testing.assert_array_equal(grid[int(np.argmin(worst))], [[1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("epsilon", "golden"), [(0.002, 0.142719), (0.01, 0.196175), (0.05, 0.319824)]
)
def test_inner_maximum_of_the_uniform_mini_student(epsilon, golden):
    uniform = np.full((1, 4), 0.25)
    assert SMALL.inner(uniform, epsilon)[0] == pytest.approx(golden, abs=GOLDEN)


@pytest.mark.parametrize(
    ("game", "golden"), [(BIG, 0.077958), (SMALL, 0.072189)], ids=["bed E", "mini"]
)
def test_p3_threshold_of_triviality(game, golden):
    threshold = triviality_threshold(game.anchor_nll)
    assert threshold == pytest.approx(golden, abs=GOLDEN)
    assert game.excess(np.zeros(game.size)) == pytest.approx(threshold, abs=1e-12)
    assert game.value(threshold + 1e-6) == pytest.approx(0.0, abs=1e-9)
    assert game.value(threshold - 1e-3) < -1e-6
    check_epsilon(threshold - 1e-6, game.anchor_nll)
    with pytest.raises(ValueError, match="triviality threshold"):
        check_epsilon(threshold, game.anchor_nll)


# The two players do not touch each other (G4)


def test_g4_cross_gradients_are_exactly_zero(x64):
    """Through returns, baseline and surrogate on real sequences of the bed."""
    mask = jnp.broadcast_to(BED_E.mask, (2, 31, 4))

    def student_loss(logits, rewards):
        log_probs = jax.nn.log_softmax(logits)[:, BED_E.states, BED_E.actions]
        to_go = reward_to_go(rewards[:, BED_E.states, BED_E.actions], mask)
        advantages = leave_one_out_per_step(to_go, mask)
        return jnp.sum(reinforce(log_probs, advantages, mask))

    def critic_loss(rewards, dual):
        gap, slack = gap_and_slack(BIG, rewards, BIG_STUDENT, 0.02)
        return reward_player_loss(gap, slack, dual)

    tables = jnp.asarray(STUDENT), jnp.asarray(REWARD)
    own, cross = jax.jit(jax.grad(student_loss, argnums=(0, 1)))(*tables)
    np.testing.assert_array_equal(cross, np.zeros(REWARD.shape))
    assert np.abs(own).max() > 0.1
    own, cross = jax.jit(jax.grad(critic_loss, argnums=(0, 1)))(tables[1], 3.0)
    assert cross == 0.0
    assert np.abs(own).max() > 0.1
