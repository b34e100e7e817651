"""The e-DPO family: reductions to each other, padding, micro-batches, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.edpo import make_ddpo, make_dpdpo, make_edpo, make_pdpo
from rkd_jax.training import init_state, make_update
from rkd_jax.types import (
    AnchoredPairs,
    DemonstrationBatch,
    EnsembleSignal,
    PreferenceBatch,
    ReferenceSignal,
)
from tests.tabular.bed import BED_E, REFERENCE, STUDENT, TabularLM, bed_sequences

pytestmark = pytest.mark.usefixtures("x64")

MODEL, BETA, KAPPA = TabularLM(), 0.5, 0.3
SHARP = {"beta": BETA, "temperature": 0.5}
NUMBERS = np.array([[0, 0], [1, 1], [0, 0], [1, 1], [0, 0], [0, 0]])
INDICES = np.array([[3, 30], [11, 2], [7, 19], [0, 5], [1, 1], [1, 1]])
SAMPLES = np.array([8, 4, 30, 17, 2, 2])  # of the same prompts
REAL = 4  # the last two rows are padding
LABELS = np.array([1.0, 0.7, 0.0, 1.0])
REWARDS = np.random.default_rng(7).normal(size=(REAL, 2, 3)) * [0.5, 1.0, 0.8]
LOG_PROBS = BED_E.sequence_log_probs(STUDENT)
LOG_REFERENCE = BED_E.sequence_log_probs(REFERENCE)
KEPT = NUMBERS[:REAL], INDICES[:REAL]


def margin_of(log_probs):
    return BETA * np.subtract(*(log_probs - LOG_REFERENCE)[KEPT].T)


def nll_of(log_probs):
    return -log_probs[NUMBERS[:REAL, 0], SAMPLES[:REAL]]


MARGIN = margin_of(LOG_PROBS)
LOSSES = (REWARDS[:, 0] - REWARDS[:, 1] - MARGIN[:, None]) ** 2  # [pairs, models]
NLL = nll_of(LOG_PROBS)
RUNNING = np.array([0.3, 0.1, 0.2])  # the second model counts under ema_min
DIRECTION = np.zeros(STUDENT.shape)
DIRECTION[0, 0, 1], DIRECTION[1, 2, 0], DIRECTION[0, 2, 2] = 1.0, 2.0, -1.0


def padded(values):
    """[6, ...]: NaN in the rows of padding."""
    widen = [(0, len(NUMBERS) - REAL)] + [(0, 0)] * (np.ndim(values) - 1)
    return jnp.asarray(np.pad(values, widen, constant_values=np.nan))


def sequences_of(numbers, indices):
    found = bed_sequences(numbers, indices)
    mask = found.response_mask.at[REAL:].set(False)
    return dataclasses.replace(found, response_mask=mask)


def batch():
    pairs = sequences_of(NUMBERS, INDICES)
    index, missing = jnp.arange(len(NUMBERS)), jnp.full(NUMBERS.shape, jnp.nan)
    pairs = PreferenceBatch(pairs, pairs, padded(LABELS), missing, index)
    # A sample beside a pair of padding is there, and must not count.
    drawn = bed_sequences(NUMBERS[:, 0], SAMPLES)
    drawn = DemonstrationBatch(drawn, drawn, index)
    return AnchoredPairs(pairs, drawn)


def signal():
    return EnsembleSignal(padded(LOG_REFERENCE[KEPT]), padded(REWARDS))


def student():
    return {"logits": jnp.asarray(STUDENT)}


def gradients(objective, params, critic, data, signal):
    """In student, critic and signal; and the output."""

    def total(params, critic, signal):
        out = objective.student_loss(params, critic, None, data, signal, None)
        return out.total, out

    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(params, critic, signal)


@functools.cache
def results():
    """Of every objective by name, in one compilation: gradients, and the output."""
    swapped = padded(1.0 - LABELS)
    plain = {"beta": BETA, "kappa": KAPPA}

    @jax.jit
    def evaluate(params, critic, data, signal):
        run = functools.partial(gradients, params=params, critic=critic)
        bare = dataclasses.replace(data, samples=None)
        other = dataclasses.replace(data.pairs, label=swapped)
        one = dataclasses.replace(signal, rewards=signal.rewards[:, :, 1:2])
        reference = ReferenceSignal(signal.log_probs)
        found = {
            reduce: run(
                make_edpo(MODEL, reduce=reduce, softmin_temperature=0.2, **plain),
                data=data,
                signal=signal,
            )
            for reduce in REDUCTIONS
        }
        for name, objective, batch, says in [
            ("dp-DPO", make_dpdpo(MODEL, kappa=KAPPA, **SHARP), data, one),
            ("e-DPO of one", make_edpo(MODEL, kappa=KAPPA, **SHARP), data, one),
            ("dp-DPO at 0", make_dpdpo(MODEL, kappa=0.0, **SHARP), data, one),
            ("d-DPO", make_ddpo(MODEL, **SHARP), bare, one),
            (
                "d-DPO, other labels",
                make_ddpo(MODEL, **SHARP),
                AnchoredPairs(other),
                one,
            ),
            ("p-DPO", make_pdpo(MODEL, **plain), data, reference),
            ("p-DPO at 0", make_pdpo(MODEL, beta=BETA, kappa=0.0), data, reference),
            ("DPO", make_dpo(MODEL, beta=BETA), data.pairs, reference),
        ]:
            found[name] = run(objective, data=batch, signal=says)
        minimum = make_edpo(MODEL, reduce="min", **plain).student_loss
        parts = [  # how the update cuts
            minimum(params, None, None, *jax.tree.map(cut, (data, signal)), None)
            for cut in (lambda x: x[::2], lambda x: x[1::2])
        ]
        found["min in parts"] = None, jax.tree.map(jnp.add, *parts)
        return found

    return evaluate(student(), {"means": RUNNING}, batch(), signal())


def result(name):
    """The output, and the gradient in the logits."""
    (slopes, _, _), out = results()[name]
    return out, np.asarray(slopes["logits"])


def metrics_of(out):
    return {name: float(m.total / m.weight) for name, m in out.metrics.items()}


def check_slope(gradient, total):
    """Along one direction it is numpy's difference of ``total(log_probs)``."""
    ends = [
        total(BED_E.sequence_log_probs(STUDENT + step * DIRECTION))
        for step in (1e-6, -1e-6)
    ]
    slope = (np.asarray(gradient) * DIRECTION).sum()
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


def soft(means, tau=0.2):
    return -tau * np.log(np.mean(np.exp(-means / tau)))


REDUCTIONS = {
    "min": LOSSES.mean(0).min(),
    "softmin": soft(LOSSES.mean(0)),
    "mean": LOSSES.mean(),
    "ema_min": LOSSES.mean(0)[1],  # as the running means say
}


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_edpo_is_its_formula(reduce):
    """Real rows only, whatever the padding holds; nothing flows to the signal."""
    value = REDUCTIONS[reduce]
    slopes, out = results()[reduce]
    expected = {
        "student/distillation": value,
        "student/margin": MARGIN.mean(),
        "student/reference_nll": NLL.mean(),
    }
    for i, mean in enumerate(LOSSES.mean(0)):
        expected[f"student/distillation/{i}"] = mean
    found = metrics_of(out)
    weights = [found.pop(f"student/weight/{i}") for i in range(3)]
    assert found == pytest.approx(expected, rel=1e-10)
    assert float(out.weight) == REAL
    total = REAL * value + KAPPA * BETA * NLL.sum()
    np.testing.assert_allclose(out.total, total, rtol=1e-10)

    # The gradient is that of the weighted losses and the penalty.
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)

    def fixed_weights(log_probs):
        losses = (REWARDS[:, 0] - REWARDS[:, 1] - margin_of(log_probs)[:, None]) ** 2
        return (losses @ weights).sum() + KAPPA * BETA * nll_of(log_probs).sum()

    check_slope(slopes[0]["logits"], fixed_weights)
    for silent in jax.tree.leaves(slopes[1:]):
        np.testing.assert_array_equal(silent, np.zeros(silent.shape))


def same(one, other):
    """Total, weight and gradient, exactly."""
    assert one[0].total == other[0].total
    assert one[0].weight == other[0].weight
    np.testing.assert_array_equal(one[1], other[1])


def test_one_reward_model_is_dpdpo_and_without_penalty_ddpo():
    """At temperature 0.5, which divides the logits of pairs and samples."""
    log_probs = BED_E.sequence_log_probs(STUDENT / 0.5)
    losses = (np.subtract(*REWARDS[:, :, 1].T) - margin_of(log_probs)) ** 2

    dpdpo, ddpo = result("dp-DPO"), result("d-DPO")
    total = losses.sum() + KAPPA * BETA * nll_of(log_probs).sum()
    np.testing.assert_allclose(dpdpo[0].total, total, rtol=1e-10)
    same(result("e-DPO of one"), dpdpo)

    np.testing.assert_allclose(ddpo[0].total, losses.sum(), rtol=1e-10)
    assert metrics_of(ddpo[0]).keys() == {"student/distillation", "student/margin"}
    same(result("dp-DPO at 0"), ddpo)  # with samples, which are not read
    same(result("d-DPO, other labels"), ddpo)  # labels are not read either


def test_pdpo_without_penalty_is_dpo_and_with_it_adds_the_samples():
    plain = result("DPO")
    same(result("p-DPO at 0"), plain)

    def logistic(log_probs):
        margin = margin_of(log_probs)
        wins, losses = np.logaddexp(0, -margin), np.logaddexp(0, margin)
        return (LABELS * wins + (1 - LABELS) * losses).sum()

    def penalised(log_probs):
        return logistic(log_probs) + KAPPA * BETA * nll_of(log_probs).sum()

    np.testing.assert_allclose(plain[0].total, logistic(LOG_PROBS), rtol=1e-10)
    check_slope(plain[1], logistic)
    out, slope = result("p-DPO")
    np.testing.assert_allclose(out.total, penalised(LOG_PROBS), rtol=1e-10)
    check_slope(slope, penalised)
    assert metrics_of(out)["student/reference_nll"] == pytest.approx(NLL.mean())


def test_the_tracking_loss_moves_the_running_means_only():
    """That the student's loss does not is part of the formula's test."""
    objective = make_edpo(MODEL, beta=BETA, kappa=0.0, reduce="ema_min")
    means = {"means": jnp.array([0.4, 0.2, 0.9])}

    @jax.jit
    def tracking(critic, params):
        def total(critic, params):
            data = batch(), signal()
            out = objective.critic_loss(critic, params, None, None, *data, None)
            return out.total, out.weight

        return jax.grad(total, argnums=(0, 1), has_aux=True)(critic, params)

    (in_means, in_student), weight = tracking(means, student())
    np.testing.assert_array_equal(in_student["logits"], np.zeros(STUDENT.shape))
    assert float(weight) == REAL
    expected = REAL * (np.asarray(means["means"]) - LOSSES.mean(0))
    np.testing.assert_allclose(in_means["means"], expected, rtol=1e-10)


# Gradient accumulation, by the update itself


def step(accumulation, running):
    """Metrics, student and running means after one step of the update."""
    student_optimizer, critic_optimizer = optax.sgd(0.1), optax.sgd(1.0)
    update = make_update(
        make_edpo(MODEL, beta=BETA, kappa=KAPPA, reduce="ema_min"),
        student_optimizer=student_optimizer,
        critic_optimizer=critic_optimizer,
        accumulation=accumulation,
    )
    state = init_state(
        student(),
        student_optimizer=student_optimizer,
        critic_params={"means": jnp.asarray(running)},
        critic_optimizer=critic_optimizer,
        rng=jax.random.key(0),
    )
    state, metrics = update(state, None, batch(), signal())
    logits, means = state.student.params["logits"], state.critic.params["means"]
    return metrics, np.asarray(logits), np.asarray(means)


def test_ema_min_is_exact_under_accumulation():
    """At decay 0 the running means are the whole batch's, in any number of parts."""
    whole, slope = result("min")
    metrics, logits, means = step(2, running=[9.0, 9.0, 9.0])
    np.testing.assert_allclose(means, LOSSES.mean(0), rtol=1e-5)
    np.testing.assert_allclose(metrics["student/loss"], whole.total / REAL, rtol=1e-5)
    np.testing.assert_allclose(logits, STUDENT - 0.1 * slope / REAL, atol=1e-6)
    assert np.abs(slope).max() > 0.5


def test_accumulated_minimum_is_a_lower_bound():
    parts = LOSSES[::2].mean(0), LOSSES[1::2].mean(0)
    assert {int(part.argmin()) for part in parts} == {0, 1}  # each has its own
    metrics = metrics_of(results()["min in parts"][1])
    bound = np.mean([part.min() for part in parts])
    assert metrics["student/distillation"] == pytest.approx(bound, rel=1e-10)
    assert bound < LOSSES.mean(0).min() - 1e-2


def test_it_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="reduce must be one of min, softmin"):
        make_edpo(MODEL, reduce="max")
    for make in (make_edpo, make_dpdpo, make_pdpo):
        with pytest.raises(ValueError, match="kappa must lie in"):
            make(MODEL, kappa=-0.1)
    for make in (make_edpo, make_dpdpo, make_ddpo, make_pdpo):
        with pytest.raises(ValueError, match="beta must lie in"):
            make(MODEL, beta=0.0)
    with pytest.raises(ValueError, match="softmin_temperature must lie in"):
        make_edpo(MODEL, reduce="softmin", softmin_temperature=0.0)


@pytest.mark.parametrize(
    ("make", "samples", "message"),
    [
        (make_ddpo, True, "3 reward models, this objective takes one"),
        (make_edpo, False, "fill AnchoredPairs.samples"),
        (make_pdpo, False, "fill AnchoredPairs.samples"),
    ],
)
def test_it_refuses_data_it_cannot_mean(make, samples, message):
    data = batch() if samples else AnchoredPairs(batch().pairs)
    loss = make(MODEL).student_loss
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: loss(p, None, None, data, signal(), None), student())
