"""MiniLLM from text that another sampler wrote, by enumeration of the bed."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.api import response_logits
from rkd_jax.models.mixed_sampling import make_mixed_sampler
from rkd_jax.models.sampling import SamplingConfig
from rkd_jax.objectives.minillm import make_minillm
from rkd_jax.objectives.reward_inference import RewardInference
from rkd_jax.objectives.xkd import make_xkd_gkd, make_xkd_minillm
from rkd_jax.types import DemonstrationBatch, ImitationBatch, TeacherSignal
from tests.tabular.bed import (
    BED_E,
    STUDENT,
    TEACHER,
    TabularLM,
    bed_prompts,
    bed_sequences,
    log_softmax,
    single,
)
from tests.tabular.posterior import QuickLM, tabular_posterior

MODEL = QuickLM()
NUMBERS, INDICES = (
    grid.ravel() for grid in np.meshgrid(range(2), range(31), indexing="ij")
)
ALPHA = 0.3
SAMPLERS = {  # log-probs of the table that writes the text
    "mixture": np.log(
        ALPHA * np.exp(log_softmax(TEACHER))
        + (1.0 - ALPHA) * np.exp(log_softmax(STUDENT))
    ),
    "another policy": log_softmax(
        np.random.default_rng(3).normal(size=BED_E.table_shape)
    ),
}
IMPORTANCE = ["per_decision", "token"]

pytestmark = pytest.mark.usefixtures("x64")


# The objective, by enumeration


def imitation(weights, numbers=NUMBERS, indices=INDICES):
    sequences = bed_sequences(numbers, indices)
    rows = DemonstrationBatch(sequences, sequences, jnp.arange(len(numbers)))
    return ImitationBatch(rows, rows, weights)


def token_weights(sampler):
    """[62, 4]: student over sampler at every token of every response."""
    ratio = BED_E.taken(log_softmax(STUDENT) - sampler)
    return np.exp(ratio).reshape(-1, BED_E.horizon)


def expectation(
    objective, sampler, params=None, table=lambda params: params, weighted=True
):
    """Means of loss, gradient and metrics over all samples of a table."""
    chances = jnp.asarray(BED_E.weights(sampler).ravel())
    weights = jnp.asarray(token_weights(sampler)) if weighted else None
    teacher = jnp.asarray(log_softmax(TEACHER)[NUMBERS[:, None], BED_E.states[INDICES]])
    params = {"logits": jnp.asarray(STUDENT)} if params is None else params

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def mean(params):
        def row(batch, signal):
            batch, signal = jax.tree.map(
                lambda leaf: jnp.expand_dims(leaf, 0), (batch, signal)
            )
            out = objective.student_loss(params, None, None, batch, signal, None)
            return out.total, out.metrics

        batch = imitation(weights)
        totals, metrics = jax.vmap(row)(batch, TeacherSignal(teacher))
        return chances @ totals, jax.tree.map(lambda x: chances @ x, metrics)

    (value, metrics), gradient = mean(params)
    gradient = table(gradient)
    return value, gradient.get("logits", gradient), metrics


RATIO = log_softmax(STUDENT) - log_softmax(TEACHER)
EXACT = BED_E.policy_gradient(STUDENT, RATIO)
DIVERGENCE = (BED_E.occupancy(STUDENT) * RATIO).sum()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_per_decision_is_exact_whoever_wrote_the_text(sampler):
    """Value, gradient and means over the student's own text."""
    value, gradient, metrics = expectation(make_minillm(MODEL), SAMPLERS[sampler])
    np.testing.assert_allclose(gradient, EXACT, atol=1e-12)
    np.testing.assert_allclose(value, DIVERGENCE, rtol=1e-12)
    length = BED_E.expected_length(STUDENT)
    np.testing.assert_allclose(metrics["student/divergence"].total, DIVERGENCE)
    np.testing.assert_allclose(metrics["student/divergence"].weight, length)
    entropy = -(BED_E.occupancy(STUDENT) * log_softmax(STUDENT)).sum()
    np.testing.assert_allclose(metrics["student/nll"].total, entropy)
    np.testing.assert_allclose(metrics["student/nll"].weight, length)


def off(gradient) -> float:
    """Distance to the exact gradient, of its norm."""
    return float(np.linalg.norm(gradient - EXACT) / np.linalg.norm(EXACT))


def at_the_samplers_states(sampler, weights):
    """Gradient and mean divergence; states and later log-ratios unweighted: loops."""
    chances = BED_E.weights(sampler)
    q = np.exp(log_softmax(STUDENT))
    divergence = (q * RATIO).sum(-1)
    gradient, total = np.zeros(BED_E.table_shape), 0.0
    for x, (i, y) in itertools.product(range(2), enumerate(BED_E.sequences)):
        ratios = BED_E.taken(RATIO)[x, i]
        for t, a in enumerate(y):
            state = x, BED_E.states[i, t]
            step = q[state] * (RATIO[state] - divergence[state])
            long = weights[x, i, t] * ratios[t + 1 :].sum()
            score = np.eye(3)[a] - q[state]
            gradient[state] += chances[x, i] * (step + long * score)
            total += chances[x, i] * divergence[state]
    return gradient, total


def test_weights_of_tokens_leave_states_and_later_log_ratios_to_the_sampler():
    """Here as far off as without any weights, 42 and 43 % of the norm."""
    sampler = SAMPLERS["mixture"]
    objective = make_minillm(MODEL, importance="token")
    _, gradient, metrics = expectation(objective, sampler)
    weights = token_weights(sampler).reshape(2, 31, BED_E.horizon)
    expected, divergence = at_the_samplers_states(sampler, weights)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)
    found = metrics["student/divergence"]
    np.testing.assert_allclose(found.total, divergence)
    np.testing.assert_allclose(found.weight, BED_E.expected_length(sampler))

    _, bare, _ = expectation(make_minillm(MODEL), sampler, weighted=False)
    expected, _ = at_the_samplers_states(sampler, np.ones_like(weights))
    np.testing.assert_allclose(bare, expected, atol=1e-12)
    assert off(gradient) == pytest.approx(0.416, abs=5e-4)
    assert off(bare) == pytest.approx(0.431, abs=5e-4)


def gradients_of_batches(objective, indices, x, weights, teacher):
    """[n, 2, 15, 3]: of batches of responses ``indices`` [n, rows] to prompt x."""
    numbers = np.full_like(indices, x)
    sequences = bed_sequences(numbers, indices)
    rows = DemonstrationBatch(sequences, sequences, jnp.asarray(indices))
    drawn = None if weights is None else jnp.asarray(weights[x][indices])
    log_probs = log_softmax(teacher)[numbers[..., None], BED_E.states[indices]]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def gradients(params, batch, signal):
        def mean(params):
            out = objective.student_loss(params, None, None, batch, signal, None)
            return out.total / out.weight

        return jax.grad(mean)(params)["logits"]

    found = gradients(
        {"logits": jnp.asarray(STUDENT)},
        ImitationBatch(rows, rows, drawn),
        TeacherSignal(jnp.asarray(log_probs)),
    )
    return np.asarray(found)


@pytest.mark.parametrize("sampler", [None, "mixture"])
def test_the_mean_of_another_row_is_no_bias(sampler):
    """Over all pairs of rows of a prompt."""
    table = log_softmax(STUDENT) if sampler is None else SAMPLERS[sampler]
    weights = token_weights(table).reshape(2, 31, BED_E.horizon)
    chance = np.exp(BED_E.sequence_log_probs(table))
    pairs = np.array(list(itertools.product(range(31), repeat=2)))
    objective, mean = make_minillm(MODEL, baseline="others"), 0.0
    for x, share in enumerate(BED_E.prompt_weights):
        given = None if sampler is None else weights
        each = gradients_of_batches(objective, pairs, x, given, TEACHER)
        both = chance[x][pairs].prod(axis=1)
        mean += share * np.tensordot(both, each, 1)
    np.testing.assert_allclose(mean, EXACT, atol=1e-12)


def test_the_mean_of_many_rows_takes_variance_away():
    """To a teacher far away every credit is large; 2000 batches of 16 rows."""
    far, spread = -2.0 * STUDENT, {}
    chance = np.exp(BED_E.sequence_log_probs(log_softmax(STUDENT)))[0]
    drawn = np.random.default_rng(4).choice(31, size=(2000, 16), p=chance)
    for baseline in ("none", "others"):
        objective = make_minillm(MODEL, baseline=baseline)
        each = gradients_of_batches(objective, drawn, 0, None, far)
        spread[baseline] = each.var(axis=0).sum()
    assert spread["others"] < 0.85 * spread["none"]


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_weights_of_one_are_the_students_own_text(importance):
    sampler = log_softmax(STUDENT)
    value, gradient, metrics = expectation(
        make_minillm(MODEL, importance=importance), sampler
    )
    np.testing.assert_allclose(gradient, EXACT, atol=1e-12)
    np.testing.assert_allclose(value, DIVERGENCE, rtol=1e-12)
    for name in ("student/importance", "student/importance_squared"):
        np.testing.assert_allclose(*metrics[name], rtol=1e-12)


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_reward_inference_beside_it(importance):
    """At no weight of the regulariser the objective alone, metrics included."""
    table = {"mean": jnp.zeros((2, 15, 3)), "log_std": jnp.zeros((2, 15, 3))}
    params = {"policy": {"logits": jnp.asarray(STUDENT)}, "reward_head": table}
    inference = RewardInference(tabular_posterior)
    objective = make_xkd_minillm(MODEL, inference, w_x=0.0, importance=importance)
    found = expectation(
        objective, SAMPLERS["mixture"], params, lambda params: params["policy"]
    )
    alone = make_minillm(MODEL, importance=importance)
    value, gradient, metrics = expectation(alone, SAMPLERS["mixture"])
    np.testing.assert_allclose(found[0], value, rtol=1e-12)
    np.testing.assert_allclose(found[1], gradient, atol=1e-14)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    jax.tree.map(close, {name: found[2][name] for name in metrics}, metrics)


def test_a_divergence_at_given_states_reads_no_weights():
    """GKD with reward inference: neither its value nor its metrics."""
    table = {"mean": jnp.zeros((2, 15, 3)), "log_std": jnp.zeros((2, 15, 3))}
    params = {"policy": {"logits": jnp.asarray(STUDENT)}, "reward_head": table}
    objective = make_xkd_gkd(MODEL, RewardInference(tabular_posterior))
    with_weights, without = (
        expectation(objective, SAMPLERS["mixture"], params, dict, weighted=weighted)
        for weighted in (True, False)
    )
    assert "student/importance" not in with_weights[2]
    jax.tree.map(np.testing.assert_array_equal, with_weights, without)


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_the_weights_of_a_batch_are_reported(importance):
    """From loops over the weights, an empty row among them."""
    numbers, indices = np.array([0, 1, 0, 1]), np.array([9, 0, 4, 6])
    weights = np.exp(np.random.default_rng(0).normal(size=(4, 4)))
    batch = imitation(jnp.asarray(weights), numbers, indices)
    sequences = batch.imitated.sequences
    mask = sequences.response_mask.at[1].set(False)
    sequences = dataclasses.replace(sequences, response_mask=mask)
    rows = DemonstrationBatch(sequences, sequences, batch.imitated.index)
    batch = dataclasses.replace(batch, imitated=rows)
    teacher = log_softmax(TEACHER)[numbers[:, None], BED_E.states[indices]]
    out = make_minillm(MODEL, importance=importance).student_loss(
        {"logits": jnp.asarray(STUDENT)},
        None,
        None,
        batch,
        TeacherSignal(jnp.asarray(teacher)),
        None,
    )
    counts = [
        np.prod(weights[row, : t + 1]) if importance != "token" else weights[row, t]
        for row in (0, 2, 3)
        for t in range(len(BED_E.sequences[indices[row]]))
    ]
    for name, power in (("importance", 1), ("importance_squared", 2)):
        found = out.metrics[f"student/{name}"]
        wanted = np.sum(np.power(counts, power)), len(counts)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert float(out.weight) == 3


def test_samples_of_the_mixed_sampler():
    """Its log-probs are all that the weights need: the mean gradient is the exact one.

    In standard errors of each entry's mean over 20000 samples.
    """
    count, alpha = 20000, 0.5
    sample = make_mixed_sampler(
        TabularLM(),
        TabularLM(),
        SamplingConfig(max_new_tokens=4, eos_ids=(2,)),
        alpha=alpha,
    )
    params, teacher = (
        {"logits": jnp.asarray(table)} for table in (STUDENT, log_softmax(TEACHER))
    )
    prompts = bed_prompts(np.arange(count) % 2)
    voices = single(params), single(teacher)
    samples = jax.tree.map(
        lambda x: x[:, 0], sample(*voices, prompts, jax.random.key(1))
    )
    weights = jnp.exp(samples.log_probs - samples.behaviour_log_probs)
    assert float(weights.max()) <= 1.0 / (1.0 - alpha) + 1e-5
    rows = DemonstrationBatch(samples.sequences, samples.sequences, jnp.arange(count))
    log_probs = jax.nn.log_softmax(response_logits(MODEL, teacher, samples.sequences))
    objective = make_minillm(MODEL)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def gradients(params, batch, signal):
        batch, signal = jax.tree.map(lambda x: jnp.expand_dims(x, 0), (batch, signal))
        return jax.grad(
            lambda p: objective.student_loss(p, None, None, batch, signal, None).total
        )(params)["logits"]

    # Half of the rows are each prompt's: as many as in `prompt_weights` on the mean.
    scale = np.array(BED_E.prompt_weights)[:, None, None] * 2.0
    each = gradients(
        params, ImitationBatch(rows, rows, weights), TeacherSignal(log_probs)
    )
    each = np.asarray(each) * scale
    error = each.std(0) / np.sqrt(count)
    seen = error > 0.0
    distance = np.abs(each.mean(0) - EXACT)[seen] / error[seen]
    assert distance.max() < 4.5
    assert np.sqrt(np.mean(distance**2)) < 1.5


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_metrics_are_constants(importance):
    """Only the total has a gradient."""
    batch = imitation(jnp.asarray(token_weights(SAMPLERS["mixture"])))
    teacher = log_softmax(TEACHER)[NUMBERS[:, None], BED_E.states[INDICES]]
    objective = make_minillm(MODEL, importance=importance)

    def added(table):
        signal = TeacherSignal(jnp.asarray(teacher))
        out = objective.student_loss({"logits": table}, None, None, batch, signal, None)
        assert len(out.metrics) == 4
        return sum(jax.tree.leaves(out.metrics))

    assert not np.asarray(jax.grad(added)(jnp.asarray(STUDENT))).any()


def test_weights_belong_to_samples():
    batch = imitation(jnp.ones((62, 4)))
    batch = dataclasses.replace(batch, imitated=None)
    with pytest.raises(ValueError, match="the samples in imitated, which is None"):
        make_minillm(MODEL).student_loss({}, None, None, batch, None, None)
