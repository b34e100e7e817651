"""X-KD on the enumerable bed, exactly: what the regulariser does, and where it is 0.

Everything goes through the objectives on a tabular student with a tabular posterior;
the optima are L-BFGS on their gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from rkd_jax.losses import experiential_regularizer, forward_kl, token_log_probs
from rkd_jax.objectives.reward_inference import RewardInference
from rkd_jax.objectives.xkd import make_xkd_gkd, make_xkd_sequence
from rkd_jax.types import DemonstrationBatch, ImitationSignal
from tests.tabular.bed import (
    BED_E,
    EOS,
    STUDENT,
    TEACHER,
    A,
    B,
    bed_sequences,
    log_softmax,
)
from tests.tabular.posterior import (
    QuickLM,
    tabular_action_values,
    tabular_posterior,
)

pytestmark = pytest.mark.usefixtures("x64")

MODEL = QuickLM()
Q_TABLE = np.cos(
    0.6 * np.arange(15)[:, None]
    + 1.4 * np.arange(3)
    + 0.2 * np.arange(2)[:, None, None]
)
GOLDEN = 6e-7  # half a unit of the sixth digit, and a little
NAMED = BED_E.index(A, B, A, EOS)

# Every response of both prompts, one row each.
NUMBERS, INDICES = (
    grid.ravel() for grid in np.meshgrid(range(2), range(31), indexing="ij")
)
LENGTHS = BED_E.mask.sum(-1)[INDICES]
TAUGHT = BED_E.weights(TEACHER).ravel()  # d_0(x) p_T(y | x)


def demonstrations(numbers=NUMBERS, indices=INDICES):
    sequences = bed_sequences(numbers, indices)
    return DemonstrationBatch(sequences, sequences, jnp.arange(len(indices)))


def teacher_signal():
    rows = log_softmax(TEACHER)[NUMBERS[:, None], BED_E.states[INDICES]]
    return ImitationSignal(jnp.asarray(rows))


def student(policy=STUDENT, mean=0.0, log_std=0.0, **heads):
    def posterior(value):
        return jnp.broadcast_to(jnp.asarray(value, float), BED_E.table_shape)

    head = {"mean": posterior(mean), "log_std": posterior(log_std)}
    return {"policy": {"logits": jnp.asarray(policy)}, "reward_head": head, **heads}


def row_totals(make, params, w_x):
    """The total of every response on its own, ``[62]``; ``w_x`` one per response."""

    def total(batch, signal, w_x):
        batch, signal = jax.tree.map(lambda x: jnp.expand_dims(x, 0), (batch, signal))
        return make(w_x).student_loss(params, None, None, batch, signal, None).total

    w_x = jnp.broadcast_to(jnp.asarray(w_x, float), NUMBERS.shape)
    return jax.vmap(total)(demonstrations(), teacher_signal(), w_x)


# Golden values on the named sequence


@pytest.mark.parametrize(
    ("q_source", "gamma", "delta", "td_log_likelihood", "loss"),
    [
        (
            "raw_logits",
            1.0,
            [1.416147, 0.321247, -0.398239],
            [-1.648184, -0.834408, -0.956311],
            1.572635,
        ),
        (
            "raw_logits",
            0.9,
            [1.374532, 0.247508, -0.432154],
            [-1.580183, -0.823394, -0.966158],
            1.570330,
        ),
        (
            "log_probs",
            1.0,
            [1.159815, 0.048498, 0.280075],
            [-1.270379, -0.826819, -1.000918],
            1.561276,
        ),
        (
            "log_probs",
            0.9,
            [0.998128, -0.118039, 0.085530],
            [-1.082483, -0.866862, -0.941067],
            1.554352,
        ),
    ],
)
def test_golden_values_of_the_named_sequence(
    q_source, gamma, delta, td_log_likelihood, loss
):
    mean, log_std = np.zeros((2, *BED_E.table_shape))
    steps = np.arange(3)
    visited = (0, BED_E.states[NAMED, :3], BED_E.actions[NAMED, :3])
    mean[visited], log_std[visited] = 0.3 * np.cos(steps), -0.2 + 0.1 * steps
    inference = RewardInference(tabular_posterior, q_source=q_source, gamma=gamma)
    objective = make_xkd_sequence(MODEL, inference)
    batch = demonstrations(np.zeros(4, int), np.full(4, NAMED))
    params = student(Q_TABLE, mean, log_std)

    out = objective.student_loss(params, None, None, batch, (), None)
    found = {name: float(m.total / m.weight) for name, m in out.metrics.items()}
    assert float(out.total / out.weight) == pytest.approx(loss, abs=GOLDEN)
    expected = {
        "student/nll": 1.421187,
        "student/reward_kl": np.mean([0.080160, 0.022502, 0.007793]),
        "student/td_log_likelihood": np.mean(td_log_likelihood),
        "student/td_error": np.abs(delta).mean(),
        "student/regularizer": loss - 1.421187,
        "student/log_std": -0.1,
        "student/log_std_variance": np.var([-0.2, -0.1, 0.0]),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-6), name


# The joint optimum


@functools.cache
def joint_optimum(q_source, next_value):
    """Tables at the optimum of KL and regulariser, weighted by teacher visitation.

    The regulariser of a response is a mean over its T - 1 transitions; a weight of
    (T - 1) / T beside T tokens turns it into their sum.
    """
    inference = RewardInference(
        tabular_posterior,
        q_source=q_source,
        next_value=next_value,
        gamma=0.9,
        td_weight=0.5,
    )
    start, unravel = ravel_pytree(student())

    @jax.jit
    @jax.value_and_grad
    def loss(flat):
        totals = row_totals(
            lambda w_x: make_xkd_gkd(MODEL, inference, w_x=w_x),
            unravel(flat),
            (LENGTHS - 1) / LENGTHS,
        )
        return jnp.asarray(TAUGHT) @ totals

    options = {"maxiter": 5000, "maxfun": 10_000, "maxcor": 50, "ftol": 0}
    found = minimize(
        lambda flat: tuple(map(np.asarray, loss(flat))),
        np.asarray(start),
        jac=True,
        method="L-BFGS-B",
        options=options | {"gtol": 1e-8},
    )
    assert np.abs(found.jac).max() < 1e-7
    tables = jax.tree.map(np.asarray, unravel(found.x))
    return found.fun, tables["policy"]["logits"], tables["reward_head"]


def divergence_from_teacher(logits):
    difference = log_softmax(TEACHER) - log_softmax(logits)
    return (BED_E.occupancy(TEACHER) * difference).sum()


def test_x2_raw_logits_and_expected_next_values_change_nothing():
    loss, logits, posterior = joint_optimum("raw_logits", "expected")
    assert divergence_from_teacher(logits) < 1e-8
    # What is left is the bound: delta = mean = 0 and a variance of 1 - lambda.
    each = 0.5 * (0.5 - 1.0) - 0.5 * np.log(0.5) + 0.25 * np.log(2 * np.pi * 0.5)
    transitions = BED_E.expected_length(TEACHER) - 1.0
    assert loss == pytest.approx(each * transitions, abs=1e-9)
    inside = (slice(None), slice(0, 7), slice(0, 2))  # the (s, a) that have a successor
    np.testing.assert_allclose(posterior["mean"][inside], 0.0, atol=1e-4)
    np.testing.assert_allclose(np.exp(2 * posterior["log_std"][inside]), 0.5, atol=1e-4)


@pytest.mark.parametrize(
    ("q_source", "next_value", "golden"),
    [
        ("raw_logits", "sampled", 0.05864),
        ("log_probs", "expected", 0.02775),
        ("log_probs", "sampled", 0.09558),
    ],
)
def test_every_other_combination_moves_the_optimum(q_source, next_value, golden):
    _, logits, _ = joint_optimum(q_source, next_value)
    assert divergence_from_teacher(logits) == pytest.approx(golden, abs=5.5e-6)


def test_a1_posterior_at_convergence():
    """Mean and variance of every cell from its temporal differences, lambda = 1/2."""
    _, logits, posterior = joint_optimum("log_probs", "sampled")
    log_q, probs = log_softmax(logits), np.exp(log_softmax(TEACHER))
    for x, k, a in np.ndindex(2, 7, 2):
        following = 2 * k + 1 + a
        delta = log_q[x, k, a] - 0.9 * log_q[x, following]
        average = (probs[x, following] * delta).sum()
        mean = posterior["mean"][x, k, a]
        variance = np.exp(2 * posterior["log_std"][x, k, a])
        assert mean == pytest.approx(0.5 * average / (0.5 + variance), abs=1e-4)
        squared = (probs[x, following] * (delta - mean) ** 2).sum()
        closed = 0.5 * (0.5 + np.sqrt(0.25 + 2.0 * squared))
        assert variance == pytest.approx(closed, abs=1e-4)


# The gauge


def temporal_differences(table, gamma, next_value="sampled"):
    """[62, 4], by the library, 0 without a transition."""
    q_values = table[NUMBERS[:, None], BED_E.states[INDICES]]
    actions, mask = BED_E.actions[INDICES], BED_E.mask[INDICES]
    zeros = jnp.zeros(mask.shape)
    return experiential_regularizer(
        q_values,
        jnp.asarray(actions),
        zeros,
        zeros,
        jnp.asarray(mask),
        gamma=gamma,
        next_value=next_value,
        teacher_log_probs=teacher_signal().log_probs,
    ).delta


@pytest.mark.parametrize(
    ("next_value", "residual"), [("sampled", 0.284800), ("expected", 0.0)]
)
def test_x3_no_gauge_removes_the_varentropy(next_value, residual):
    """Least squares over all c(s), and the closed form of what remains."""
    log_q = jnp.asarray(log_softmax(STUDENT))

    def scaled(gauge):
        shifted = log_q + jnp.expand_dims(gauge, -1)
        delta = temporal_differences(shifted, 0.9, next_value)
        return (jnp.sqrt(TAUGHT)[:, None] * delta).ravel()

    target = np.asarray(scaled(jnp.zeros((2, 15))))
    # Affine in the gauge: columns are differences.
    units = jnp.eye(30).reshape(30, 2, 15)
    slopes = np.stack([np.asarray(scaled(unit)) - target for unit in units], axis=-1)
    gauge = np.linalg.lstsq(slopes, -target)[0]
    found = np.square(target + slopes @ gauge).sum()
    assert found == pytest.approx(residual, abs=GOLDEN)

    probs, taught = np.exp(log_softmax(TEACHER)), BED_E.occupancy(TEACHER).sum(-1)
    first, second = ((probs * np.asarray(log_q) ** n).sum(-1) for n in (1, 2))
    varentropy = (taught * (second - first**2))[:, 1:].sum()
    if next_value == "sampled":
        assert found == pytest.approx(0.9**2 * varentropy, abs=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_x1_a_gauge_shifts_the_differences_of_raw_logits_only(gamma):
    gauge = np.sin(np.arange(30.0)).reshape(2, 15)
    raw, shifted = STUDENT, STUDENT + gauge[..., None]
    change = temporal_differences(shifted, gamma) - temporal_differences(raw, gamma)
    along = gauge[NUMBERS[:, None], BED_E.states[INDICES]]
    expected = np.zeros(along.shape)
    expected[:, :-1] = along[:, :-1] - gamma * along[:, 1:]
    expected *= np.arange(4) < LENGTHS[:, None] - 1
    np.testing.assert_allclose(change, expected, atol=1e-12)

    rows = np.array([5, 30, 40, 61])
    batch = demonstrations(NUMBERS[rows], INDICES[rows])
    taught = jax.tree.map(lambda x: x[rows], teacher_signal())
    drift = along[rows][BED_E.mask[INDICES[rows]]].sum()
    for q_source in ("raw_logits", "log_probs"):
        inference = RewardInference(tabular_posterior, q_source=q_source, gamma=gamma)
        objective = make_xkd_gkd(MODEL, inference)
        before, after = (
            objective.student_loss(
                student(table), None, None, batch, taught, None
            ).metrics
            for table in (raw, shifted)
        )
        for name in ("student/divergence", "student/nll"):
            np.testing.assert_allclose(before[name].total, after[name].total, rtol=1e-9)
        if q_source == "log_probs":  # their log-sum-exp is 0, there is no gauge
            assert "student/lse_q" not in after
            continue
        moved = after["student/lse_q"].total - before["student/lse_q"].total
        assert float(moved) == pytest.approx(drift, abs=1e-9)


def test_x6_undiscounted_differences_telescope():
    delta = temporal_differences(jnp.asarray(Q_TABLE), 1.0)
    taken = BED_E.taken(Q_TABLE).reshape(62, 4)
    last = taken[np.arange(62), LENGTHS - 1]
    np.testing.assert_allclose(delta.sum(-1), taken[:, 0] - last, atol=1e-12)


def test_x5_a_q_head_does_not_move_a_tabular_policy():
    inference = RewardInference(
        tabular_posterior, q_source="q_head", q_head=tabular_action_values
    )
    params = student(log_std=-0.3, q_head={"logits": jnp.asarray(Q_TABLE)})

    @jax.jit
    @jax.grad
    def gradient(params, w_x):
        totals = row_totals(
            lambda w: make_xkd_gkd(MODEL, inference, w_x=w), params, w_x
        )
        return jnp.asarray(TAUGHT) @ totals

    parent, found = gradient(params, 0.0), gradient(params, 1.0)
    np.testing.assert_array_equal(parent["policy"]["logits"], found["policy"]["logits"])
    assert np.abs(found["q_head"]["logits"]).max() > 1e-2


# Likelihood of the teacher's text is forward KL


def test_likelihood_under_the_teacher_is_forward_kl_plus_its_entropy():
    log_p = log_softmax(TEACHER)
    inference = RewardInference(tabular_posterior)

    @jax.jit
    def expected(params):
        totals = row_totals(
            lambda w_x: make_xkd_sequence(MODEL, inference, w_x=w_x), params, 0
        )
        return jnp.asarray(TAUGHT) @ totals

    entropy = -(BED_E.weights(TEACHER) * BED_E.sequence_log_probs(TEACHER)).sum()
    divergence = divergence_from_teacher(STUDENT)
    assert divergence == pytest.approx(1.517072, abs=GOLDEN)
    assert float(expected(student())) == pytest.approx(divergence + entropy, abs=1e-12)

    tokens = np.broadcast_to(np.arange(3), (2, 15, 3))
    rows = jnp.broadcast_to(jnp.asarray(STUDENT)[..., None, :], (2, 15, 3, 3))
    each = -(np.exp(log_p) * token_log_probs(rows, tokens)).sum(-1)
    state_entropy = -(np.exp(log_p) * log_p).sum(-1)
    found = forward_kl(jnp.asarray(STUDENT), jnp.asarray(TEACHER))
    np.testing.assert_allclose(each, found + state_entropy, atol=1e-12)
