"""MiniLLM from text that another sampler wrote: by hand and by enumeration."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import per_decision_weights, sequence_reverse_kl
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


# The loss, by hand

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
    batch = imitation(jnp.asarray(WEIGHTS), numbers, indices)
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
        np.prod(WEIGHTS[row, : t + 1]) if importance != "token" else WEIGHTS[row, t]
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


def test_weights_belong_to_samples():
    batch = imitation(jnp.ones((62, 4)))
    batch = dataclasses.replace(batch, imitated=None)
    with pytest.raises(ValueError, match="the samples in imitated, which is None"):
        make_minillm(MODEL).student_loss({}, None, None, batch, None, None)
