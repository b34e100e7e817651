"""The losses against exact expectations on the enumerated bed (G8), in float64.

Golden numbers come with the bed's definition; they hold to the digits shown.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax import losses
from rkd_jax.losses import (
    dpo,
    leave_one_out,
    leave_one_out_per_step,
    on_policy_distillation,
    reinforce,
    reward_to_go,
    token_log_probs,
    trajectory_return,
)
from rkd_jax.masking import fill_masked, sequence_sum
from rkd_jax.models.api import CausalLM, response_logits
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.types import Pair
from tests.tabular.bed import (
    BED_E,
    CHOSEN,
    MINI,
    MINI_PAIRS,
    MINI_REWARD,
    MINI_TEACHER,
    REFERENCE,
    REJECTED,
    REWARD,
    STUDENT,
    TEACHER,
    TabularLM,
    bed_prompts,
    bed_sequences,
    log_softmax,
    preference_nll,
    tabular_rewards,
)

pytestmark = pytest.mark.usefixtures("x64")

N = len(BED_E.sequences)
MASK = np.broadcast_to(BED_E.mask, (2, N, 4))
ACTIONS = np.broadcast_to(BED_E.actions, (2, N, 4))
GOLDEN = 6e-7  # half a unit of the sixth digit, and a little


def sampled_log_probs(table):
    """[2, N, 4] log-probs of all responses, by the library, differentiable."""
    return token_log_probs(table[:, BED_E.states], ACTIONS)


def test_enumeration():
    assert BED_E.sequences[CHOSEN] == (0, 1, 2)
    lengths = BED_E.mask.sum(-1)
    np.testing.assert_array_equal(np.bincount(lengths), [0, 1, 2, 4, 24])
    assert sorted(BED_E.sequences) == BED_E.sequences
    for logits in (TEACHER, STUDENT, REFERENCE):
        np.testing.assert_allclose(BED_E.weights(logits).sum(1), [0.6, 0.4])


@pytest.mark.parametrize(
    ("gamma", "teacher", "student"),
    [(1.0, 0.303158, 0.227106), (0.9, 0.318026, 0.207723)],
)
def test_expected_returns(gamma, teacher, student):
    rewards = np.where(MASK, REWARD[:, BED_E.states, BED_E.actions], np.nan)
    returns = trajectory_return(jnp.asarray(rewards), jnp.asarray(MASK), gamma=gamma)
    for logits, golden in ((TEACHER, teacher), (STUDENT, student)):
        expected = float((BED_E.weights(logits) * returns).sum())
        assert expected == pytest.approx(golden, abs=GOLDEN)
        exact = BED_E.expected_return(logits, REWARD, gamma)
        assert expected == pytest.approx(exact, abs=1e-12)
        occupancy = BED_E.occupancy(logits, gamma)
        assert (occupancy * REWARD).sum() == pytest.approx(exact, abs=1e-12)


def test_lengths_and_named_pair():
    assert BED_E.expected_length(TEACHER) == pytest.approx(2.928117, abs=GOLDEN)
    assert BED_E.expected_length(STUDENT) == pytest.approx(2.353167, abs=GOLDEN)
    for table, chosen, rejected in (
        (STUDENT, -3.314144, -1.966646),
        (REFERENCE, -2.953269, -2.255082),
    ):
        sums = sequence_sum(sampled_log_probs(jnp.asarray(table)), jnp.asarray(MASK))
        assert float(sums[0, CHOSEN]) == pytest.approx(chosen, abs=GOLDEN)
        assert float(sums[0, REJECTED]) == pytest.approx(rejected, abs=GOLDEN)
    returns = BED_E.returns(REWARD)[0]
    assert returns[CHOSEN] == pytest.approx(-1.312256, abs=GOLDEN)
    assert returns[REJECTED] == pytest.approx(-0.914713, abs=GOLDEN)


def pair_of(table) -> Pair:
    sums = sequence_sum(sampled_log_probs(table), jnp.asarray(MASK))[0]
    return Pair(sums[CHOSEN], sums[REJECTED])


def test_dpo_of_the_named_pair():
    student, reference = (pair_of(jnp.asarray(t)) for t in (STUDENT, REFERENCE))
    difference = student.chosen - student.rejected
    difference -= reference.chosen - reference.rejected
    assert float(difference) == pytest.approx(-0.649311, abs=GOLDEN)
    loss = dpo(student, reference, beta=0.5)
    assert float(loss) == pytest.approx(0.868593, abs=GOLDEN)


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("forward_kl", 0.154527),
        ("reverse_kl", 0.239970),
        ("generalized_jsd", 0.045142),
    ],
)
def test_divergences_at_the_root(name, golden):
    value = getattr(losses, name)(STUDENT[0, 0], TEACHER[0, 0])
    assert float(value) == pytest.approx(golden, abs=GOLDEN)


@pytest.mark.parametrize(
    ("name", "states_of", "golden", "discounted"),
    [
        ("total_variation", STUDENT, 0.980262, 0.884626),
        ("total_variation", TEACHER, 1.231541, 1.096130),
        ("reverse_kl", STUDENT, 1.317522, None),
        ("forward_kl", TEACHER, 1.517072, None),
    ],
)
def test_expected_sums_of_divergences(name, states_of, golden, discounted):
    tokens = getattr(losses, name)(BED_E.rows(STUDENT), BED_E.rows(TEACHER))
    sums = sequence_sum(tokens, jnp.asarray(MASK))
    weights = BED_E.weights(states_of)
    assert float((weights * sums).sum()) == pytest.approx(golden, abs=GOLDEN)
    if discounted:
        sums = trajectory_return(tokens, jnp.asarray(MASK), gamma=0.9)
        assert float((weights * sums).sum()) == pytest.approx(discounted, abs=GOLDEN)


def test_token_divergences_add_up_to_the_sequence_divergence():
    log_q = BED_E.sequence_log_probs(STUDENT)
    log_p = BED_E.sequence_log_probs(TEACHER)
    reverse = (BED_E.weights(STUDENT) * (log_q - log_p)).sum()
    forward = (BED_E.weights(TEACHER) * (log_p - log_q)).sum()
    assert reverse == pytest.approx(1.317522, abs=GOLDEN)
    assert forward == pytest.approx(1.517072, abs=GOLDEN)


# Policy gradients


def descent(loss, weights=None):
    """Gradient at the student's table of a surrogate averaged over its samples."""
    weights = jnp.asarray(BED_E.weights(STUDENT) if weights is None else weights)

    def total(table):
        tokens = loss(sampled_log_probs(table))
        return (weights * sequence_sum(tokens, jnp.asarray(MASK))).sum()

    return np.asarray(jax.jit(jax.grad(total))(jnp.asarray(STUDENT)))


def rewards_to_go(gamma):
    rewards = jnp.asarray(BED_E.taken(REWARD))
    return reward_to_go(rewards, jnp.asarray(MASK), gamma=gamma)


@pytest.mark.parametrize(("gamma", "norm"), [(1.0, 0.317273), (0.9, 0.316936)])
def test_enumerated_reinforce_is_the_policy_gradient(gamma, norm):
    to_go = rewards_to_go(gamma)
    gradient = descent(lambda lp: reinforce(lp, to_go, jnp.asarray(MASK), gamma=gamma))
    exact = -BED_E.policy_gradient(STUDENT, REWARD, gamma)
    np.testing.assert_allclose(gradient, exact, atol=1e-12)
    assert np.linalg.norm(gradient) == pytest.approx(norm, abs=GOLDEN)


def test_named_entries_and_finite_differences():
    gradient = BED_E.policy_gradient(STUDENT, REWARD)
    np.testing.assert_allclose(
        -gradient[0, 0], [-0.046173, 0.150548, -0.104375], atol=GOLDEN
    )
    for index in [(0, 0, 1), (1, 4, 2), (0, 11, 0)]:
        bump = np.zeros(STUDENT.shape)
        bump[index] = 1e-5
        up, down = (BED_E.expected_return(STUDENT + s * bump, REWARD) for s in (1, -1))
        assert gradient[index] == pytest.approx((up - down) / 2e-5, abs=1e-9)


def test_dropping_the_leading_discount_is_biased_below_one():
    to_go = rewards_to_go(0.9)
    gradient = descent(lambda lp: reinforce(lp, to_go, jnp.asarray(MASK)))
    bias = gradient + BED_E.policy_gradient(STUDENT, REWARD, 0.9)
    assert np.abs(bias).max() == pytest.approx(8.7e-3, abs=5e-5)


# All ordered pairs of samples of one prompt: [2, N * N, G = 2].
FIRST, SECOND = np.divmod(np.arange(N * N), N)
GROUPS = np.stack([FIRST, SECOND], axis=-1)


def grouped_descent(advantages):
    """Exact expectation of the two-sample estimator with the given advantages."""
    probs = np.exp(BED_E.sequence_log_probs(STUDENT))
    weights = np.array([[0.6], [0.4]]) * probs[:, FIRST] * probs[:, SECOND]
    mask = jnp.asarray(MASK[:, GROUPS])

    def total(table):
        log_probs = sampled_log_probs(table)[:, GROUPS]
        steps = reinforce(log_probs, advantages, mask)
        return (weights * sequence_sum(steps, mask).mean(-1)).sum()

    return np.asarray(jax.jit(jax.grad(total))(jnp.asarray(STUDENT)))


@pytest.mark.parametrize(
    ("baseline", "factor"), [("return", 1.0), ("per step", 1.0), ("own mean", 0.5)]
)
def test_leave_one_out_is_unbiased_and_the_own_mean_shrinks_by_g(baseline, factor):
    to_go = rewards_to_go(1.0)[:, GROUPS]
    mask = jnp.asarray(MASK[:, GROUPS])
    returns = jnp.asarray(BED_E.returns(REWARD))[:, GROUPS]
    if baseline == "per step":
        advantages = leave_one_out_per_step(to_go, mask)
    else:
        each = leave_one_out(returns)
        if baseline == "own mean":
            each = returns - returns.mean(-1, keepdims=True)
        advantages = jnp.broadcast_to(jnp.expand_dims(each, -1), mask.shape)
    exact = -BED_E.policy_gradient(STUDENT, REWARD)
    np.testing.assert_allclose(grouped_descent(advantages), factor * exact, atol=1e-12)


# On-policy distillation


def sequence_reverse_kl(table):
    log_q, log_p = log_softmax(table), log_softmax(TEACHER)
    occupancy = BED_E.occupancy(table)
    return (occupancy * (log_q - log_p)).sum()


def test_on_policy_distillation_at_gamma_one_descends_the_sequence_divergence():
    teacher = jnp.asarray(BED_E.taken(log_softmax(TEACHER)))
    gradient = descent(
        lambda lp: on_policy_distillation(lp, teacher, jnp.asarray(MASK), gamma=1.0)
    )
    for index in [(0, 0, 0), (0, 0, 2), (1, 1, 1), (1, 6, 0), (0, 12, 2)]:
        bump = np.zeros(STUDENT.shape)
        bump[index] = 1e-5
        up, down = (sequence_reverse_kl(STUDENT + s * bump) for s in (1, -1))
        assert gradient[index] == pytest.approx((up - down) / 2e-5, abs=1e-9)


def test_on_policy_distillation_at_gamma_zero_is_reverse_kl_at_fixed_states():
    """And that is only part of the sequence gradient: cosine 0.78 on this bed."""
    mask, teacher = jnp.asarray(MASK), jnp.asarray(BED_E.taken(log_softmax(TEACHER)))
    one, full = (
        descent(lambda lp, g=g: on_policy_distillation(lp, teacher, mask, gamma=g))
        for g in (0.0, 1.0)
    )

    def single_step(table):
        rows = fill_masked(table[:, BED_E.states], mask)
        tokens = losses.reverse_kl(rows, fill_masked(BED_E.rows(TEACHER), mask))
        return (BED_E.weights(STUDENT) * sequence_sum(tokens, mask)).sum()

    expected = jax.jit(jax.grad(single_step))(jnp.asarray(STUDENT))
    np.testing.assert_allclose(one, expected, atol=1e-12)
    cosine = (one * full).sum() / np.linalg.norm(one) / np.linalg.norm(full)
    assert cosine == pytest.approx(0.78, abs=5e-3)


# The mini bed and the table behind the library's interfaces


def test_mini_bed():
    assert MINI.sequences == [(0, 0), (0, 1), (1, 0), (1, 1)]
    returns = MINI.returns(MINI_REWARD)[0]
    np.testing.assert_allclose(returns, [0.7, 0.2, -0.7, 0.0])
    _, i, j = MINI_PAIRS.T
    margins = returns[i] - returns[j]
    nll = preference_nll(margins, 1 / (1 + np.exp(-margins)))
    assert nll == pytest.approx(0.620958, abs=GOLDEN)
    assert MINI_TEACHER.sum() == pytest.approx(1.0)


def test_tabular_model_is_its_table():
    model = TabularLM()
    assert isinstance(model, CausalLM)
    numbers, indices = np.meshgrid(range(2), range(N), indexing="ij")
    sequences = bed_sequences(numbers, indices, width=3)

    def log_probs(params):
        logits = response_logits(model, params, sequences)
        return fill_masked(
            token_log_probs(logits, sequences.targets), sequences.response_mask
        )

    params = {"logits": jnp.asarray(STUDENT)}
    np.testing.assert_allclose(
        log_probs(params), BED_E.taken(log_softmax(STUDENT)), atol=1e-12
    )
    credit = jnp.asarray(BED_E.weights(STUDENT) * BED_E.returns(REWARD))
    gradient = jax.grad(lambda p: (credit * log_probs(p).sum(-1)).sum())(params)
    exact = BED_E.policy_gradient(STUDENT, REWARD)
    np.testing.assert_allclose(gradient["logits"], exact, atol=1e-12)


def test_tabular_model_decodes_token_by_token():
    """The cache gives the states of a full pass; padding and ended rows stand still."""
    model = TabularLM()
    params = {"logits": jnp.asarray(STUDENT)}
    sequences = bed_sequences([0, 1, 1], [CHOSEN, REJECTED, 3], width=2)
    segments = sequences.token_mask.astype(jnp.int32)
    full = model.hidden(params, sequences.tokens, segment_ids=segments)
    hidden, cache = model.hidden(
        params,
        sequences.tokens[:, :2],
        segment_ids=segments[:, :2],
        cache=model.init_cache(params, 3, 6),
    )
    columns = [hidden]
    for t in range(2, 6):
        hidden, cache = model.hidden(
            params,
            sequences.tokens[:, t : t + 1],
            segment_ids=segments[:, t : t + 1],
            cache=cache,
        )
        columns.append(hidden)
    np.testing.assert_array_equal(jnp.concatenate(columns, axis=1), full)
    np.testing.assert_array_equal(full.sum(-1), sequences.token_mask)


@pytest.mark.float32
def test_tabular_model_drives_the_sampler():
    """4,000 samples per prompt: mean length and return within four standard errors."""
    config = SamplingConfig(max_new_tokens=4, eos_ids=(2,), samples_per_prompt=4000)
    sample = make_sampler(TabularLM(), config)
    params = {"logits": jnp.asarray(STUDENT)}
    samples = sample(params, bed_prompts([0, 1]), jax.random.key(0))
    rewards = {"rewards": jnp.asarray(REWARD)}
    returns = tabular_rewards(rewards, samples.sequences).sum(-1)
    lengths = samples.sequences.response_mask.sum(-1)
    probs = BED_E.weights(STUDENT) / np.array([[0.6], [0.4]])
    exact_lengths, exact_returns = BED_E.mask.sum(-1), BED_E.returns(REWARD)
    for sampled, exact in ((lengths, exact_lengths), (returns, exact_returns)):
        mean = (probs * exact).sum(-1)
        error = np.sqrt((probs * exact**2).sum(-1) - mean**2) / np.sqrt(4000)
        assert (np.abs(np.asarray(sampled).mean(-1) - mean) < 4 * error).all()


def test_tabular_rewards_and_prompts():
    numbers, indices = np.meshgrid(range(2), range(N), indexing="ij")
    sequences = bed_sequences(numbers, indices)
    rewards = tabular_rewards({"rewards": jnp.asarray(REWARD)}, sequences)
    np.testing.assert_allclose(rewards, BED_E.taken(REWARD), atol=1e-12)
    prompts = bed_prompts([1, 0], width=3)
    np.testing.assert_array_equal(prompts.tokens, [[0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(prompts.mask, [[False, False, True]] * 2)
