"""DRDO on the enumerated bed: its objective against exact numbers, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.heads import ScalarHead
from rkd_jax.objectives.drdo import make_drdo
from rkd_jax.objectives.edpo import make_ddpo
from rkd_jax.types import AnchoredPairs, EnsembleSignal, PreferenceBatch
from tests.tabular.bed import (
    BED_E,
    CHOSEN,
    REJECTED,
    REWARD,
    STUDENT,
    TabularLM,
    bed_sequences,
    log_softmax,
)

pytestmark = pytest.mark.usefixtures("x64")

MODEL, HEAD = TabularLM(), ScalarHead()
RETURNS = BED_E.returns(REWARD)
LENGTHS = BED_E.mask.sum(-1)
MEAN_LOG_PROBS = BED_E.sequence_log_probs(STUDENT) / LENGTHS
ALL = np.stack(np.triu_indices(31, 1), axis=-1)  # every pair of responses, in order
SOME = ALL[::5]  # 93 of them, and as many copies of one: all tests share a shape
NAMED = np.tile([[CHOSEN, REJECTED]], (len(SOME), 1))
GOLDEN = 6e-7  # half a unit of the sixth digit, and a little
FORMS = [("unlikelihood", 1.0), ("ratio_literal", -1.0)]


def pairs(numbers, indices, returns=RETURNS) -> PreferenceBatch:
    """Prompts and responses [B, 2], with the true returns as the oracle's rewards."""
    sequences = bed_sequences(numbers, indices)
    rewards = jnp.asarray(returns[numbers, indices])
    rows = len(indices)
    return PreferenceBatch(
        sequences, sequences, jnp.ones(rows), rewards, jnp.arange(rows)
    )


def last_states(numbers, indices):
    """Index of the hidden state after each response: see `TabularLM`."""
    last = np.take_along_axis(BED_E.states, LENGTHS[:, None] - 1, -1)[:, 0]
    action = np.take_along_axis(BED_E.actions, LENGTHS[:, None] - 1, -1)[:, 0]
    node = 1 + BED_E.vocabulary * last + action
    return np.asarray(numbers) * (MODEL.config.hidden_size // 2) + node[indices]


def student(rewards=None):
    """The bed's student; its reward head says ``rewards[x, n]`` after response n."""
    params = {"policy": {"logits": jnp.asarray(STUDENT)}}
    if rewards is None:
        return params
    numbers, indices = np.indices(rewards.shape)
    kernel = np.full((MODEL.config.hidden_size, 1), 9.0)  # elsewhere: never read
    kernel[last_states(numbers, indices), 0] = rewards
    params["reward_head"] = {
        "output": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(1)}
    }
    return params


GAP = RETURNS[0, SOME[:, 0]] - RETURNS[0, SOME[:, 1]]
RMS = np.sqrt(np.mean(GAP**2))
OBJECTIVES = {  # compiled together, because they share everything but the loss
    **{
        f"{form} {focal_grad=}": make_drdo(
            MODEL, HEAD, preference_term=form, focal_grad=focal_grad
        )
        for form, _ in FORMS
        for focal_grad in (True, False)
    },
    **{
        f"{form} gamma=0": make_drdo(MODEL, HEAD, gamma=0.0, preference_term=form)
        for form, _ in FORMS
    },
    "regression": make_drdo(MODEL, HEAD, alpha=0.0),
    "scaled": make_drdo(MODEL, HEAD, alpha=0.0, oracle_scale=RMS),
}


@functools.cache
def compiled():
    """Jitted (params, batch) -> of every objective (gradient, output)."""

    def total(params, batch, objective):
        out = objective.student_loss(params, None, None, batch, (), None)
        return out.total, out

    gradient = jax.grad(total, has_aux=True)
    return jax.jit(
        lambda params, batch: {
            name: gradient(params, batch, objective)
            for name, objective in OBJECTIVES.items()
        }
    )


def call(name, params, batch):
    """The output."""
    return compiled()(params, batch)[name][1]


def policy_gradient(name, params, batch):
    """[2, 15, 3], of the sum over pairs."""
    return np.asarray(compiled()(params, batch)[name][0]["policy"]["logits"])


@pytest.mark.parametrize(
    ("form", "golden"), [("unlikelihood", 0.044244), ("ratio_literal", 0.017892)]
)
def test_named_pair(form, golden):
    rewards = np.zeros((2, 31))
    rewards[0, [CHOSEN, REJECTED]] = 0.4, -0.1
    named = pairs(np.zeros_like(NAMED), NAMED)
    out = call(f"{form} focal_grad=True", student(rewards), named)  # alpha 0.1, gamma 2
    found = {name: float(m.total / m.weight) for name, m in out.metrics.items()}
    expected = {
        "student/distillation": 0.805584,
        "student/preference": golden,
        "student/reward_gap": 0.5,
        "student/oracle_gap": -1.312256 + 0.914713,
        "student/accuracy": 0.0,
        "student/chosen_log_prob": -1.104715,
        "student/rejected_log_prob": -0.983323,
    }
    assert found == pytest.approx(expected, abs=1e-6)
    mean = float(out.total / out.weight)
    assert mean == pytest.approx(0.805584 + golden, abs=2 * GOLDEN)
    odds = np.exp(found["student/chosen_log_prob"] - found["student/rejected_log_prob"])
    assert odds / (1 + odds) == pytest.approx(0.469689, abs=GOLDEN)


def mean_scores(x, n):
    """[15, 3]: gradient of a response's mean log-prob in the logits of its prompt."""
    probs, out = np.exp(log_softmax(STUDENT[x])), np.zeros(BED_E.table_shape[1:])
    for t, action in enumerate(BED_E.sequences[n]):
        state = BED_E.states[n, t]
        out[state] += (np.eye(3)[action] - probs[state]) / LENGTHS[n]
    return out


@pytest.mark.parametrize(("form", "sign"), FORMS)
@pytest.mark.parametrize("focal_grad", [True, False])
def test_gradient_table_reaches_the_logits(form, sign, focal_grad):
    """The table of gradients in z, times the exact gradient of z."""
    chosen, rejected = SOME.T
    batch = pairs(np.zeros_like(SOME), SOME)
    found = policy_gradient(f"{form} {focal_grad=}", student(RETURNS), batch)

    z_w, z_l = MEAN_LOG_PROBS[0, chosen], MEAN_LOG_PROBS[0, rejected]
    p, k = 1 / (1 + np.exp(z_l - z_w)), np.exp(z_l) / (1 - np.exp(z_l))
    bracket = z_w + sign * np.log(1 - np.exp(z_l))
    focal = 2.0 * p * bracket if focal_grad else 0.0
    weight = 0.1 * (1 - p) ** 2
    by_chosen, by_rejected = -weight * (1 - focal), weight * (sign * k - focal)
    if form == "unlikelihood":
        assert (by_chosen < 0).all()
        assert (by_rejected > 0).all()
    elif not focal_grad:  # minimising the literal form raises both, always
        assert (by_chosen < 0).all()
        assert (by_rejected < 0).all()
    else:
        assert {-1.0, 1.0} == set(np.sign(by_rejected))
    scores = np.stack([mean_scores(0, n) for n in range(31)])
    expected = np.tensordot(by_chosen, scores[chosen], 1)
    expected += np.tensordot(by_rejected, scores[rejected], 1)
    np.testing.assert_allclose(found[0], expected, atol=1e-10)
    np.testing.assert_array_equal(found[1], np.zeros(expected.shape))


def test_a_step_on_the_preference_term_moves_both_log_probs_as_the_table_says():
    """Named pair, gamma = 0: the default parts them, the literal form raises both."""
    for form, sign in FORMS:
        named = pairs(np.zeros_like(NAMED), NAMED)
        slope = policy_gradient(f"{form} gamma=0", student(RETURNS), named)
        stepped = STUDENT - 1e-3 * slope
        moved = BED_E.sequence_log_probs(stepped) - BED_E.sequence_log_probs(STUDENT)
        assert moved[0, CHOSEN] > 1e-6
        assert sign * moved[0, REJECTED] < -1e-6


def test_d4_the_regression_identifies_rewards_up_to_a_prompt_constant():
    numbers = np.broadcast_to(np.arange(len(SOME))[:, None] % 2, SOME.shape)
    batch = pairs(numbers, SOME)
    constant = np.array([[3.0], [-1.0]])
    exact = call("regression", student(RETURNS + constant), batch)
    assert float(exact.weight) == len(SOME)
    assert float(exact.total) == pytest.approx(0.0, abs=1e-20)
    within = RETURNS + np.linspace(0, 1, 31)  # no constant: steps of 1 / 30
    expected = np.mean(((SOME[:, 0] - SOME[:, 1]) / 30) ** 2)
    off = call("regression", student(within), batch)
    assert float(off.total / off.weight) == pytest.approx(expected, rel=1e-10)


@functools.cache
def compiled_implicit():
    """Jitted (params, batch) -> (total, gradient) of DRDO and of d-DPO.

    DRDO without head and preference term, on summed log-probs; d-DPO with the uniform
    policy as its reference.
    """
    own = make_drdo(
        MODEL, reward_source="implicit", alpha=0.0, length_norm=False, beta=0.7
    )
    other = make_ddpo(MODEL, beta=0.7)

    def implicit(params, batch):
        return own.student_loss(params, None, None, batch, (), None).total

    def from_uniform(params, batch):
        lengths = batch.sequences.response_mask.sum(-1)
        signal = EnsembleSignal(
            -lengths.astype(batch.rewards.dtype) * np.log(3.0).item(),
            jnp.expand_dims(batch.rewards, -1),
        )
        anchored, params = AnchoredPairs(batch), params["policy"]
        return other.student_loss(params, None, None, anchored, signal, None).total

    return jax.jit(
        lambda *arguments: [
            jax.value_and_grad(loss)(*arguments) for loss in (implicit, from_uniform)
        ]
    )


def test_d5_implicit_is_distillation_from_a_uniform_reference_at_equal_lengths():
    same = ALL[LENGTHS[ALL[:, 0]] == LENGTHS[ALL[:, 1]]]
    assert len(same) == 283  # 1 + 6 + 276 pairs of lengths 2, 3 and 4
    same = same[::3][: len(SOME)]
    batch = pairs(np.zeros_like(same), same)
    (own, slope), (other, other_slope) = compiled_implicit()(student(), batch)
    assert float(own) > 1.0
    np.testing.assert_allclose(own, other, rtol=1e-12)
    slope, other_slope = slope["policy"]["logits"], other_slope["policy"]["logits"]
    np.testing.assert_allclose(slope, other_slope, atol=1e-10)


def test_d5_at_unequal_lengths_they_differ_by_the_uniform_log_prob():
    chosen_log_prob, rejected_log_prob = -3.314144, -1.966646
    error = -1.312256 + 0.914713 - 0.7 * (chosen_log_prob - rejected_log_prob)
    named = pairs(np.zeros_like(NAMED), NAMED)
    (implicit, _), (from_uniform, _) = compiled_implicit()(student(), named)
    assert float(implicit) / len(NAMED) == pytest.approx(error**2, abs=2e-6)
    shifted = error - 0.7 * np.log(3.0)  # lengths 3 and 2
    assert float(from_uniform) / len(NAMED) == pytest.approx(shifted**2, abs=2e-6)


def test_oracle_scale_divides_the_oracles_rewards():
    batch = pairs(np.zeros_like(SOME), SOME)
    silent = call("scaled", student(np.zeros((2, 31))), batch)
    assert float(silent.total / silent.weight) == pytest.approx(1.0, rel=1e-12)
