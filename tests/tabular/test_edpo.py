"""The e-DPO family on the enumerated bed: optima, pessimism and penalty, in float64.

Prompt 0, three reward tables, every pair of responses weighted alike. The library's
objectives are driven row by row, so that every expectation is exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from rkd_jax.losses import pessimistic_reduce, reward_distillation, reward_scale
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.edpo import make_ddpo, make_dpdpo, make_edpo, make_pdpo
from rkd_jax.types import (
    AnchoredPairs,
    DemonstrationBatch,
    EnsembleSignal,
    Pair,
    PreferenceBatch,
    ReferenceSignal,
)
from tests.tabular.bed import (
    BED_E,
    CHOSEN,
    REFERENCE,
    REJECTED,
    REWARD,
    STUDENT,
    TabularLM,
    bed_sequences,
    log_softmax,
)

pytestmark = pytest.mark.usefixtures("x64")

MODEL, BETA = TabularLM(), 0.6
_, _K, _V = np.meshgrid(*(np.arange(n) for n in BED_E.table_shape), indexing="ij")
TABLES = (REWARD, np.cos(0.8 * _K + 1.1 * _V), 0.8 * np.sin(0.5 * _K * _V + 0.2))
RETURNS = np.stack([BED_E.returns(table)[0] for table in TABLES])  # [3, 31]
LOG_REFERENCE = BED_E.sequence_log_probs(REFERENCE)[0]
PI_REFERENCE = np.exp(LOG_REFERENCE)
PAIRS = np.stack(np.triu_indices(31, 1), axis=-1)  # [465, 2]
GOLDEN = 6e-7


def optimum(weights) -> np.ndarray:
    """[31]: log-probs of pi proportional to pi_ref exp(sum_i w_i r^i / beta)."""
    unnormalised = LOG_REFERENCE + weights @ RETURNS / BETA
    return unnormalised - np.log(np.exp(unnormalised).sum())


def forward_kl(log_probs) -> float:
    """KL(pi_ref || pi)."""
    return float(PI_REFERENCE @ (LOG_REFERENCE - log_probs))


def regularised(log_probs) -> np.ndarray:
    """[3]: E_pi r - E_ref r - beta KL(pi || pi_ref), for every reward."""
    probs = np.exp(log_probs)
    gain = RETURNS @ (probs - PI_REFERENCE)
    return gain - BETA * probs @ (log_probs - LOG_REFERENCE)


def table_of(log_probs) -> np.ndarray:
    """The logit table [2, 15, 3] of a law over the responses to prompt 0."""
    mass = np.zeros(BED_E.table_shape[1:])
    for n, y in enumerate(BED_E.sequences):
        for t, action in enumerate(y):
            mass[BED_E.states[n, t], action] += np.exp(log_probs[n])
    return np.stack([np.log(mass), REFERENCE[1]])


# The library's side: one row is one pair and one sample of the reference.


def anchored(pairs, samples, rewards) -> tuple[AnchoredPairs, EnsembleSignal]:
    """Responses [rows, 2] and [rows], rewards [K, 31]; soft labels by the first one."""
    sequences = bed_sequences(np.zeros_like(pairs), pairs)
    labels = 1 / (1 + np.exp(-np.subtract(*rewards[0, pairs].T)))
    index, missing = jnp.arange(len(pairs)), jnp.full(pairs.shape, jnp.nan)
    batch = PreferenceBatch(sequences, sequences, jnp.asarray(labels), missing, index)
    drawn = bed_sequences(np.zeros_like(samples), samples)
    signal = EnsembleSignal(
        jnp.asarray(LOG_REFERENCE[pairs]),
        jnp.asarray(np.moveaxis(rewards, 0, -1)[pairs]),
    )
    return AnchoredPairs(batch, DemonstrationBatch(drawn, drawn, index)), signal


@functools.cache
def expected_loss(make):
    """Jitted (logits, kappa) -> exact objective and its gradient.

    The mean over all pairs, plus kappa times the penalty's expectation: rows that
    differ in their sample alone differ by that sample's penalty.
    """
    pairs = np.concatenate([PAIRS, np.tile(PAIRS[:1], (31, 1))])
    samples = np.concatenate([np.zeros(len(PAIRS), int), np.arange(31)])
    rows = anchored(pairs, samples, RETURNS[:1])
    plain, penalised = (
        make(MODEL, beta=BETA, kappa=0.0),
        make(MODEL, beta=BETA, kappa=1.0),
    )

    def total(objective, logits, rows):
        def one(row):
            row = jax.tree.map(lambda x: jnp.expand_dims(x, 0), row)
            params = {"logits": logits}
            return objective.student_loss(params, None, None, *row, None).total

        return jax.vmap(one)(rows)

    def loss(logits, kappa):
        count = len(PAIRS)
        pair_rows, sample_rows = (
            jax.tree.map(lambda x, cut=cut: x[cut], rows)
            for cut in (slice(count), slice(count, None))
        )
        base = total(plain, logits, pair_rows)
        penalty = total(penalised, logits, sample_rows) - base[0]
        return base.mean() + kappa * jnp.sum(PI_REFERENCE * penalty)

    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def minimiser(make, kappa) -> np.ndarray:
    """[31]: log-probs at the optimum of the library's objective."""
    value_and_grad = expected_loss(make)

    def at(logits):
        value, slope = value_and_grad(jnp.asarray(logits.reshape(2, 15, 3)), kappa)
        return float(value), np.asarray(slope).ravel()

    options = {"ftol": 1e-16, "gtol": 1e-9, "maxiter": 3000, "maxfun": 5000}
    found = minimize(
        at, REFERENCE.ravel(), jac=True, method="L-BFGS-B", options=options
    )
    return BED_E.sequence_log_probs(found.x.reshape(2, 15, 3))[0]


@pytest.mark.parametrize("make", [make_dpdpo, make_pdpo], ids=["d-DPO", "DPO"])
def test_e1_the_optimum_is_the_reference_times_the_exponential_reward(make):
    """Without the penalty; DPO has the same optimum, on its own soft labels."""
    exact = optimum(np.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(minimiser(make, 0.0), exact, atol=2e-5)


def test_e1_the_squared_error_vanishes_there_and_dpo_has_no_slope():
    exact = {"logits": jnp.asarray(table_of(optimum(np.array([1.0, 0.0, 0.0]))))}
    batch, signal = anchored(PAIRS, PAIRS[:, 0], RETURNS[:1])
    ddpo, dpo = make_ddpo(MODEL, beta=BETA), make_dpo(MODEL, beta=BETA)
    reference = ReferenceSignal(signal.log_probs)

    def both(params):
        squared = ddpo.student_loss(params, None, None, batch, signal, None)
        logistic = dpo.student_loss(params, None, None, batch.pairs, reference, None)
        totals = jnp.stack([squared.total, logistic.total])
        return totals, squared.total

    slopes, squared = jax.jit(jax.jacrev(both, has_aux=True))(exact)
    assert float(squared) == pytest.approx(0.0, abs=1e-24)
    np.testing.assert_allclose(slopes["logits"], np.zeros((2, 2, 15, 3)), atol=1e-10)


def test_e1_dividing_the_reward_multiplies_beta():
    """At scale 2 the optimum of beta = 0.6 is that of beta = 1.2 on the raw reward."""
    rewards = RETURNS[:1] / 2.0
    unnormalised = LOG_REFERENCE + RETURNS[0] / (2.0 * BETA)
    log_probs = unnormalised - np.log(np.exp(unnormalised).sum())
    found = ensemble_means(table_of(log_probs), rewards)
    assert found["student/distillation"] == pytest.approx(0.0, abs=1e-24)


def ensemble_means(logits, rewards, reduce="min") -> dict[str, float]:
    """Metrics of `make_edpo` over all pairs, without the penalty."""
    batch, signal = anchored(PAIRS, PAIRS[:, 0], rewards)
    objective = make_edpo(MODEL, beta=BETA, kappa=0.0, reduce=reduce)
    params = {"logits": jnp.asarray(logits)}
    out = objective.student_loss(params, None, None, batch, signal, None)
    return {name: float(m.total / m.weight) for name, m in out.metrics.items()}


def test_named_pair():
    pairs = np.tile([[CHOSEN, REJECTED]], (len(PAIRS), 1))  # the shape of all pairs
    batch, signal = anchored(pairs, pairs[:, 0], RETURNS[:1])
    out = make_ddpo(MODEL, beta=0.5).student_loss(
        {"logits": jnp.asarray(STUDENT)}, None, None, batch, signal, None
    )
    assert float(out.total / out.weight) == pytest.approx(0.005313, abs=GOLDEN)
    margin = out.metrics["student/margin"]
    mean = float(margin.total / margin.weight)
    assert mean == pytest.approx(0.5 * -0.649311, abs=GOLDEN)


def test_e2_value_of_the_optimum_is_its_forward_kl():
    for i, golden in enumerate((0.646700, 0.570406, 0.177084)):
        log_probs = optimum(np.eye(3)[i])
        value = BETA * forward_kl(log_probs)
        assert value == pytest.approx(golden, abs=GOLDEN)
        assert regularised(log_probs)[i] == pytest.approx(value, abs=1e-9)
        free_energy = BETA * np.log(PI_REFERENCE @ np.exp(RETURNS[i] / BETA))
        free_energy -= PI_REFERENCE @ RETURNS[i]
        assert free_energy == pytest.approx(value, abs=1e-9)
    trained = minimiser(make_dpdpo, 0.0)
    assert BETA * forward_kl(trained) == pytest.approx(0.646700, abs=1e-4)
    assert regularised(trained)[0] == pytest.approx(0.646700, abs=1e-4)


def test_e3_pessimism_is_a_minimum_over_mixtures_of_rewards():
    """The hull's minimum, the direct max-min, and a certificate from both sides."""
    hull = minimize(
        lambda w: BETA * forward_kl(optimum(w)),
        np.full(3, 1 / 3),
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 200},
    )
    assert hull.fun == pytest.approx(0.115360, abs=GOLDEN)
    np.testing.assert_allclose(hull.x, [0.1243, 0.2106, 0.6650], atol=1e-4)
    # The mixture's policy does equally well under every reward it mixes; no policy
    # does better under the mixture. So neither side can gain.
    mixed = optimum(hull.x)
    np.testing.assert_allclose(regularised(mixed), [hull.fun] * 3, atol=1e-6)

    def log_probs(z):
        return z[:31] - np.log(np.exp(z[:31]).sum())

    direct = minimize(
        lambda z: -z[31],
        np.append(LOG_REFERENCE, 0.0),
        constraints={
            "type": "ineq",
            "fun": lambda z: regularised(log_probs(z)) - z[31],
        },
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert -direct.fun == pytest.approx(0.115360, abs=2e-6)
    # Distilling the mixed reward is what finds that policy.
    metrics = ensemble_means(table_of(mixed), hull.x[None] @ RETURNS)
    assert metrics["student/distillation"] == pytest.approx(0.0, abs=1e-20)


def test_e3_the_closest_single_optimum_is_no_pessimistic_optimum():
    """Each of them has e-DPO loss 0, and a worst case below the mixture's, 0.115360."""
    worst = [regularised(optimum(unit)).min() for unit in np.eye(3)]
    np.testing.assert_allclose(worst, [-0.383312, -0.665386, -0.286965], atol=GOLDEN)
    for i, unit in enumerate(np.eye(3)):
        metrics = ensemble_means(table_of(optimum(unit)), RETURNS)
        assert metrics["student/distillation"] == pytest.approx(0.0, abs=1e-20)
        assert metrics[f"student/weight/{i}"] == 1.0
    closest = min(BETA * forward_kl(optimum(unit)) for unit in np.eye(3))
    assert closest == pytest.approx(0.177084, abs=GOLDEN)
    assert closest > 0.115360


def student_losses(scale=1.0) -> np.ndarray:
    """[3, 465], by numpy: the bed's student against every reward."""
    ratio = BED_E.sequence_log_probs(STUDENT)[0] - LOG_REFERENCE
    implicit = BETA * np.subtract(*ratio[PAIRS.T])
    rewards = RETURNS / np.reshape(scale, (-1, 1))
    return (rewards[:, PAIRS[:, 0]] - rewards[:, PAIRS[:, 1]] - implicit) ** 2


def test_e4_smaller_batches_are_more_pessimistic():
    """Exact over all 465 x 465 batches of two: per pair < per batch < over the data."""
    losses = student_losses()
    sums = BED_E.sequence_log_probs(STUDENT)[0]
    student, reference = (
        Pair(*(jnp.asarray(values[side]) for side in PAIRS.T))
        for values in (sums, LOG_REFERENCE)
    )
    rewards = Pair(*(jnp.asarray(RETURNS[:, side]) for side in PAIRS.T))
    found = reward_distillation(student, reference, rewards, beta=BETA)
    np.testing.assert_allclose(found, losses, rtol=1e-10)

    @jax.jit
    def of_all_pairs(first):
        def batch(i, j):
            both = jnp.stack([found[:, i], found[:, j]], axis=1)
            return pessimistic_reduce(both).objective

        return jax.vmap(lambda i: jax.vmap(lambda j: batch(i, j))(first))(first).mean()

    of_two = float(of_all_pairs(jnp.arange(465)))
    exact = ((losses[:, :, None] + losses[:, None, :]) / 2).min(0).mean()
    assert of_two == pytest.approx(exact, rel=1e-12)
    of_one, of_all = losses.min(0).mean(), losses.mean(1).min()
    metrics = ensemble_means(STUDENT, RETURNS)
    assert metrics["student/distillation"] == pytest.approx(of_all, rel=1e-12)
    assert of_one + 0.1 < of_two < of_all - 0.1


def test_e5_without_a_common_scale_the_smallest_reward_wins_at_the_start():
    differences = RETURNS[:, PAIRS[:, 0]] - RETURNS[:, PAIRS[:, 1]]
    squares = (differences**2).mean(1)
    raw = ensemble_means(REFERENCE, RETURNS)
    means = [raw[f"student/distillation/{i}"] for i in range(3)]
    np.testing.assert_allclose(means, squares, rtol=1e-10)
    assert [raw[f"student/weight/{i}"] for i in range(3)] == [0.0, 0.0, 1.0]
    assert np.argmin(squares) == 2

    scale = reward_scale(Pair(RETURNS[:, PAIRS[:, 0]], RETURNS[:, PAIRS[:, 1]]))
    np.testing.assert_allclose(scale, np.sqrt(squares), rtol=1e-12)
    tied = ensemble_means(REFERENCE, RETURNS / scale[:, None])
    means = [tied[f"student/distillation/{i}"] for i in range(3)]
    np.testing.assert_allclose(means, np.ones(3), rtol=1e-12)


def test_e6_the_penalty_is_silent_at_the_reference():
    """Its value there is kappa beta times the reference's entropy."""
    loss = expected_loss(make_dpdpo)
    logits = jnp.asarray(REFERENCE)
    (base, slope), (value, penalised) = (loss(logits, k) for k in (0.0, 5.0))
    np.testing.assert_allclose(penalised, slope, atol=1e-12)
    assert np.abs(slope).max() > 0.1
    entropy = -PI_REFERENCE @ LOG_REFERENCE
    assert float(value - base) == pytest.approx(5.0 * BETA * entropy, rel=1e-10)
    away = loss(jnp.asarray(STUDENT), 5.0)[1] - loss(jnp.asarray(STUDENT), 0.0)[1]
    probs = np.exp(log_softmax(STUDENT[0]))
    occupancy = BED_E.occupancy(REFERENCE)[0] / BED_E.prompt_weights[0]
    visits = occupancy.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        away[0], 5.0 * BETA * (visits * probs - occupancy), atol=1e-10
    )


def test_e6_the_penalty_pulls_to_the_reference_and_harder_against_dpo():
    distances = {
        make: [forward_kl(minimiser(make, kappa)) for kappa in (0.0, 0.1, 1.0, 100.0)]
        for make in (make_dpdpo, make_pdpo)
    }
    for along in distances.values():
        assert along == sorted(along, reverse=True)
        assert along[0] == pytest.approx(0.646700 / BETA, abs=1e-4)
        assert along[-1] < 0.02
    assert distances[make_dpdpo][2] == pytest.approx(0.638, abs=5e-4)
    assert distances[make_pdpo][2] == pytest.approx(0.080, abs=5e-4)
