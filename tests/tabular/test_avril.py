"""AVRIL on tables, exactly: where its posterior goes, and what it leaves to Q.

For one posterior shared by transitions of fixed temporal differences everything has a
closed form; on the enumerable bed the optima are L-BFGS on the objective's gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from rkd_jax.losses import avril, gaussian_kl, gaussian_log_prob
from rkd_jax.objectives.avril import make_avril
from rkd_jax.types import TrajectoryBatch
from tests.tabular.bed import BED_E, STUDENT, TEACHER, log_softmax

pytestmark = pytest.mark.usefixtures("x64")


@jax.jit
def cell_loss(cell, deltas, td_weight):
    """Mean loss of one posterior (mean, log_std) over temporal differences."""
    mean, log_std = (jnp.broadcast_to(x, deltas.shape) for x in cell)
    fit = gaussian_log_prob(deltas, mean, log_std)
    return jnp.mean(gaussian_kl(mean, log_std) - td_weight * fit)


CELL = jax.jit(jax.value_and_grad(cell_loss))


def optimal_cell(deltas, td_weight):
    """Mean and variance at the optimum."""
    deltas = jnp.asarray(np.resize(deltas, 6))  # one shape, one compilation
    found = descend(lambda cell: CELL(cell, deltas, td_weight), np.array([0.1, -0.3]))
    return found[0], np.exp(2 * found[1])


def descend(value_and_grad, start):
    def both(x):
        return [np.asarray(part) for part in value_and_grad(jnp.asarray(x))]

    options = {"gtol": 1e-11, "ftol": 1e-16, "maxiter": 5000, "maxfun": 10_000}
    return minimize(both, start, jac=True, method="L-BFGS-B", options=options).x


@pytest.mark.parametrize(
    ("td_weight", "delta", "variance", "mean"),
    [
        (1.0, 2.0, 1.0, 1.0),
        (0.5, 1.5, 1.0, 0.5),
        (0.5, 0.0, 0.5, 0.0),
        (0.9, 1.5, 0.647528, 0.872359),
    ],
)
def test_a2_golden_posteriors_of_one_difference(td_weight, delta, variance, mean):
    found = optimal_cell([delta], td_weight)
    assert found == pytest.approx((mean, variance), abs=1e-6)


@pytest.mark.parametrize("td_weight", [0.1, 0.5, 1.0])
def test_a1_posterior_of_shared_differences(td_weight):
    deltas = np.array([1.7, -0.4, 2.9])
    mean, variance = optimal_cell(deltas, td_weight)
    average, spread = deltas.mean(), deltas.var()
    shrunk = td_weight * average / (td_weight + variance)
    assert mean == pytest.approx(shrunk, abs=1e-6)
    rest = np.mean((deltas - mean) ** 2)
    root = np.sqrt((1 - td_weight) ** 2 + 4 * td_weight * rest)
    assert variance == pytest.approx(0.5 * (1 - td_weight + root), abs=1e-6)
    left = variance**2 - (1 - td_weight) * variance
    bias = variance * average / (td_weight + variance)
    assert left == pytest.approx(td_weight * (spread + bias**2), abs=1e-5)


def profiled(log_std, delta, td_weight):
    """Loss at a given log_std with the mean at its optimum, by the library."""
    variance = np.exp(2 * log_std)
    mean = td_weight * delta / (td_weight + variance)
    cell, deltas = jnp.asarray([mean, log_std]), jnp.full(6, delta)
    return float(cell_loss(cell, deltas, td_weight))


def test_a2_collapse_at_weight_one():
    """|delta| <= 1: ever smaller is ever better, and descent goes there."""
    losses = [profiled(log_std, 0.8, 1.0) for log_std in (0.0, -1.0, -2.0, -4.0)]
    assert np.all(np.diff(losses) < 0)
    mean, variance = optimal_cell([0.8], 1.0)
    assert variance < 1e-4
    assert mean == pytest.approx(0.8, abs=1e-3)
    # Just above the edge it has somewhere to stay, just below the weight as well.
    assert optimal_cell([1.2], 1.0)[1] == pytest.approx(0.2, abs=1e-6)
    assert optimal_cell([0.0], 0.99)[1] == pytest.approx(0.01, abs=1e-6)


def test_a2_unbounded_above_weight_one():
    """Each unit of log_std is worth lambda - 1 nats, for ever."""
    losses = [profiled(-k, 0.0, 1.5) for k in (5.0, 6.0, 105.0)]
    assert losses[1] - losses[0] == pytest.approx(-0.5, abs=1e-4)
    assert losses[2] - losses[1] == pytest.approx(-0.5 * 99, abs=1e-4)


@pytest.mark.parametrize("td_weight", [0.3, 1.0])
def test_a3_with_the_best_mean_the_term_is_a_ridge(td_weight):
    log_std = -0.3
    variance = np.exp(2 * log_std)
    for delta in (0.5, 2.0):
        found = profiled(log_std, delta, td_weight) - profiled(log_std, 0.0, td_weight)
        ridge = td_weight * delta**2 / (2 * (td_weight + variance))
        assert found == pytest.approx(ridge, rel=1e-12)


# The enumerated bed


def test_g8_expected_terms_are_sums_over_occupancy():
    """All responses, weighted by their probability: no term sees anything else."""
    beta, gamma = 1.3, 0.9
    generator = np.random.default_rng(2)
    mean, log_std = 0.5 * generator.normal(size=(2, *BED_E.table_shape))
    mask = np.broadcast_to(BED_E.mask, (2, 31, 4))
    actions = np.broadcast_to(BED_E.actions, mask.shape)
    rows = (BED_E.rows(STUDENT), actions, BED_E.taken(mean), BED_E.taken(log_std), mask)
    options = {"beta": beta, "gamma": gamma, "drop_last": "irl_only"}
    terms = jax.jit(functools.partial(avril, **options))(*map(jnp.asarray, rows))
    weights = BED_E.weights(TEACHER)[..., None]
    found = [float((weights * x).sum()) for x in (terms.nll, terms.kl, terms.delta)]

    occupancy = BED_E.occupancy(TEACHER)
    nll = -(occupancy * log_softmax(beta * STUDENT)).sum()
    following = np.zeros(BED_E.table_shape)  # visits that a next action follows
    for k in range(7):
        for a in range(2):
            following[:, k, a] = occupancy[:, 2 * k + 1 + a].sum(-1)
    kl = 0.5 * (np.exp(2 * log_std) + mean**2 - 1) - log_std
    # sum Q(s, a) over transitions less gamma times that over their successors
    later = occupancy.copy()
    later[:, 0] = 0.0
    delta = (following * STUDENT).sum() - gamma * (later * STUDENT).sum()
    expected = [nll, (following * kl).sum(), delta]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


RNG = np.random.default_rng(0)
# Responses of prompt 0, drawn from the teacher: what a tabular expert did.
DRAWN = RNG.choice(31, size=24, p=BED_E.weights(TEACHER)[0] / 0.6)
DEMONSTRATIONS = TrajectoryBatch(
    states=BED_E.states[DRAWN], actions=BED_E.actions[DRAWN], mask=BED_E.mask[DRAWN]
)


def lookup(table, states):
    return table[states]


def posterior_table(tables, states, actions):
    return tuple(table[states, actions] for table in tables)


def optimum(**options):
    """Tables at the optimum of the mean loss, and the loss's output there."""
    objective = make_avril(
        lookup, posterior_table, reward_input="state_action", **options
    )
    batch = jax.tree.map(jnp.asarray, DEMONSTRATIONS)
    zeros = jnp.zeros((15, 3))
    start = {"policy": zeros, "encoder": (zeros + 0.3, zeros - 0.2)}
    flat, unravel = ravel_pytree(start)

    def loss(flat):
        out = objective.student_loss(unravel(flat), None, None, batch, None, None)
        return out.total / out.weight

    found = descend(jax.jit(jax.value_and_grad(loss)), np.asarray(flat))
    return jax.tree.map(np.asarray, unravel(jnp.asarray(found)))


def counts():
    """How often each action was taken at each prefix: all of them, and followed."""
    taken, followed = np.zeros((15, 3)), np.zeros((15, 3))
    for i in DRAWN:
        steps = list(zip(BED_E.states[i], BED_E.sequences[i], strict=False))
        for t, step in enumerate(steps):
            taken[step] += 1
            followed[step] += t + 1 < len(steps)
    return taken, followed


def test_weight_zero_is_behavioural_cloning_beside_the_prior():
    tables = optimum(td_weight=0.0, drop_last="irl_only")
    taken, followed = counts()
    seen = taken.sum(-1) > 0
    frequencies = taken[seen] / taken[seen].sum(-1, keepdims=True)
    found = np.exp(log_softmax(tables["policy"][seen]))
    np.testing.assert_allclose(found, frequencies, atol=2e-5)
    mean, log_std = tables["encoder"]
    assert (followed > 0).sum() >= 5
    np.testing.assert_allclose(mean[followed > 0], 0.0, atol=1e-6)
    np.testing.assert_allclose(log_std[followed > 0], 0.0, atol=1e-6)
    np.testing.assert_array_equal(mean[followed == 0], 0.3)  # never looked at


def test_posterior_at_convergence_obeys_a1():
    """With moving temporal differences too; cells are shared by several successors."""
    td_weight, gamma = 0.5, 0.9
    tables = optimum(td_weight=td_weight, gamma=gamma, drop_last="irl_only")
    q_values, (mean, log_std) = tables["policy"], tables["encoder"]
    cells = {}
    for i in DRAWN:
        states, actions = BED_E.states[i], BED_E.sequences[i]
        for t in range(len(actions) - 1):
            now, later = (states[t], actions[t]), (states[t + 1], actions[t + 1])
            delta = q_values[now] - gamma * q_values[later]
            cells.setdefault(now, []).append(delta)
    assert max(len(set(np.round(d, 9))) for d in cells.values()) > 1
    for cell, deltas in cells.items():
        deltas, variance = np.array(deltas), np.exp(2 * log_std[cell])
        shrunk = td_weight * deltas.mean() / (td_weight + variance)
        assert mean[cell] == pytest.approx(shrunk, abs=1e-5)
        rest = np.mean((deltas - mean[cell]) ** 2)
        root = np.sqrt((1 - td_weight) ** 2 + 4 * td_weight * rest)
        assert variance == pytest.approx(0.5 * (1 - td_weight + root), abs=1e-5)
