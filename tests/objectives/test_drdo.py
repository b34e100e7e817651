"""DRDO's student and oracle: labels, padding, options, and where the gradient goes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.heads import RewardModel, ScalarHead
from rkd_jax.objectives.drdo import make_drdo, make_drdo_oracle
from rkd_jax.objectives.reward_model import make_reward_model
from rkd_jax.types import PreferenceBatch, PreferenceSignal
from tests.tabular.bed import BED_E, STUDENT, TabularLM, bed_sequences

pytestmark = pytest.mark.usefixtures("x64")

MODEL, HEAD = TabularLM(), ScalarHead()
ORACLE = RewardModel(MODEL, HEAD)
NUMBERS = np.array([[0, 0], [1, 1], [0, 0]])
INDICES = np.array([[3, 30], [11, 2], [7, 19]])
LABELS = np.array([1.0, 0.7, 0.0])
REWARDS = np.array([[0.8, -0.1], [0.2, 0.3], [-1.0, 1.5]])
LENGTHS = BED_E.mask.sum(-1)[INDICES]
LOG_PROBS = BED_E.sequence_log_probs(STUDENT)[NUMBERS, INDICES]
KERNEL = np.cos(np.arange(MODEL.config.hidden_size))


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    vocab_size: int = 3
    hidden_size: int = 4
    max_length: int = 16
    logit_softcap: float | None = None
    num_layers: int = 1


class EmbeddingLM:
    """A trunk with parameters, and a vocabulary head of its own."""

    config = EmbeddingConfig()

    def hidden(self, params, tokens, *, positions=None, segment_ids=None):
        del positions, segment_ids
        embedded = params["embedding"][tokens]
        return jnp.tanh(embedded + 0.5 * jnp.cumsum(embedded, axis=1))

    def head(self, params):
        return params["head"]

    def head_bias(self, params):
        del params

    def unembed(self, params, hidden):
        return hidden @ params["head"]


ROWS = 4  # of every batch: real pairs first, then pairs without any target


def batch(rewards=REWARDS, rows=slice(None)):
    """The pairs ``rows``, and padding that holds NaN and a response no mask shows."""
    numbers, indices, labels = NUMBERS[rows], INDICES[rows], LABELS[rows]
    kept, padding = len(numbers), ROWS - len(numbers)
    widen = ((0, padding), (0, 0))
    numbers, indices = (np.pad(x, widen) for x in (numbers, indices))
    rewards = np.pad(rewards[rows], widen, constant_values=np.nan)
    labels = np.pad(labels, (0, padding), constant_values=np.nan)
    sequences = bed_sequences(numbers, indices)
    mask = sequences.response_mask.at[kept:].set(False)
    sequences = dataclasses.replace(sequences, response_mask=mask)
    return PreferenceBatch(
        sequences,
        sequences,
        jnp.asarray(labels),
        jnp.asarray(rewards),
        jnp.arange(ROWS),
    )


def head_params():
    kernel = jnp.asarray(KERNEL[:, None])
    return {"output": {"kernel": kernel, "bias": jnp.asarray([0.25])}}


def student():
    return {"policy": {"logits": jnp.asarray(STUDENT)}, "reward_head": head_params()}


def oracle():
    return {"trunk": {"logits": jnp.asarray(STUDENT)}, "head": head_params()}


# Objectives that are compiled together, because they share parameters and trunk.
STUDENTS = DRDO, SUMS, REGRESSION = (
    make_drdo(MODEL, HEAD),
    make_drdo(MODEL, HEAD, length_norm=False, temperature=0.5),
    make_drdo(MODEL, HEAD, alpha=0.0),
)
ORACLES = FULL_ORACLE, RANKING, REWARD_MODEL = (
    make_drdo_oracle(ORACLE, alpha=0.4),
    make_drdo_oracle(ORACLE, alpha=0.0),
    make_reward_model(ORACLE.sequence_rewards),
)
UNTIED = (make_drdo(EmbeddingLM(), HEAD, alpha=0.0),)


@functools.cache
def compiled(family):
    """Jitted (params, rewards, batch) -> per objective (gradients in both, output)."""

    def evaluate(params, rewards, data):
        def total(params, rewards, objective):
            batch = dataclasses.replace(data, rewards=rewards)
            signal = PreferenceSignal()
            out = objective.student_loss(params, None, None, batch, signal, None)
            return out.total, out

        gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
        return [gradient(params, rewards, objective) for objective in family]

    return jax.jit(evaluate)


def evaluate(objective, params, data):
    """Gradients in parameters and cached rewards, and the output."""
    family = next(f for f in (STUDENTS, ORACLES, UNTIED) if objective in f)
    return compiled(family)(params, data.rewards, data)[family.index(objective)]


def call(objective, params, data):
    return evaluate(objective, params, data)[1]


def slopes(objective, params, data):
    return evaluate(objective, params, data)[0][0]


def check_slopes(objective, params):
    """The gradient is the derivative along one direction in all parameters."""
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, params))
    draw = np.random.default_rng(1).normal
    direction = [draw(size=leaf.shape) for leaf in leaves]
    ends = [
        call(
            objective,
            tree.unflatten([a + s * b for a, b in zip(leaves, direction, strict=True)]),
            batch(),
        ).total
        for s in (1e-5, -1e-5)
    ]
    found = jax.tree.leaves(slopes(objective, params, batch()))
    slope = sum(np.vdot(a, b) for a, b in zip(found, direction, strict=True))
    np.testing.assert_allclose(slope, float(ends[0] - ends[1]) / 2e-5, rtol=1e-7)
    assert abs(float(slope)) > 0.1


def head_rewards():
    """[3, 2]: what `KERNEL` says of the last state of every response."""
    rewards = np.zeros(INDICES.shape)
    for place, n in np.ndenumerate(INDICES):
        last = LENGTHS[place] - 1
        node = 1 + 3 * BED_E.states[n, last] + BED_E.actions[n, last]
        half = MODEL.config.hidden_size // 2
        rewards[place] = KERNEL[NUMBERS[place] * half + node] + 0.25
    return rewards


def preference(z_w, z_l, alpha=0.1, gamma=2.0):
    focus = (1 / (1 + np.exp(z_w - z_l))) ** gamma
    return -alpha * focus * (z_w + np.log(1 - np.exp(z_l)))


def expected_terms(z):
    """Regression and mixed preference term of the three pairs, summed."""
    own, target = head_rewards(), REWARDS
    gap = (target[:, 0] - target[:, 1]) - (own[:, 0] - own[:, 1])
    keep, swap = preference(*z.T), preference(*z.T[::-1])
    return (gap**2).sum(), (LABELS * keep + (1 - LABELS) * swap).sum()


@pytest.mark.parametrize(
    ("objective", "length_norm", "temperature"), [(DRDO, True, 1.0), (SUMS, False, 0.5)]
)
def test_total_is_both_terms_and_labels_mix_the_orders(
    objective, length_norm, temperature
):
    """Padding counts for nothing, whatever it holds."""
    out = call(objective, student(), batch())
    z = BED_E.sequence_log_probs(STUDENT / temperature)[NUMBERS, INDICES]
    if length_norm:
        z = z / LENGTHS
    distillation, preference = expected_terms(z)
    own = head_rewards()
    expected = {
        "distillation": distillation,
        "preference": preference,
        "reward_gap": (own[:, 0] - own[:, 1]).sum(),
        "oracle_gap": (REWARDS[:, 0] - REWARDS[:, 1]).sum(),
        "accuracy": (z[:, 0] > z[:, 1]).sum(),
        "chosen_log_prob": z[:, 0].sum(),
        "rejected_log_prob": z[:, 1].sum(),
    }
    found = {name: float(m.total) for name, m in out.metrics.items()}
    expected = {f"student/{name}": value for name, value in expected.items()}
    assert found == pytest.approx(expected, rel=1e-10)
    assert {float(m.weight) for m in out.metrics.values()} == {3.0}
    np.testing.assert_allclose(out.total, distillation + preference, rtol=1e-10)
    assert float(out.weight) == 3


def test_g7_student():
    check_slopes(DRDO, student())


def test_micro_batches_add_up():
    rows = slice(None), slice(2), slice(2, 3)
    whole, *parts = (call(DRDO, student(), batch(rows=r)) for r in rows)
    np.testing.assert_allclose(sum(p.total for p in parts), whole.total, rtol=1e-12)
    assert sum(float(p.weight) for p in parts) == float(whole.weight)


def test_a_missing_reward_is_not_passed_over():
    rewards = np.where(np.arange(3)[:, None] == 1, np.nan, REWARDS)
    assert np.isnan(call(DRDO, student(), batch(rewards)).total)


def test_without_the_preference_term_the_policy_gets_no_gradient():
    """And the head's is that of the regression."""
    found = slopes(REGRESSION, student(), batch())
    np.testing.assert_array_equal(found["policy"]["logits"], np.zeros(STUDENT.shape))
    own = head_rewards()
    gap = (REWARDS[:, 0] - REWARDS[:, 1]) - (own[:, 0] - own[:, 1])
    expected = np.zeros(MODEL.config.hidden_size)
    for b, n in np.ndindex(INDICES.shape):
        last = LENGTHS[b, n] - 1
        i = INDICES[b, n]
        node = 1 + 3 * BED_E.states[i, last] + BED_E.actions[i, last]
        node += NUMBERS[b, n] * (MODEL.config.hidden_size // 2)
        expected[node] += (-2, 2)[n] * gap[b]
    kernel = found["reward_head"]["output"]["kernel"]
    np.testing.assert_allclose(kernel[:, 0], expected, atol=1e-12)


def test_the_oracle_gets_no_gradient():
    data = batch()
    (_, found), out = evaluate(DRDO, student(), data)
    assert float(out.total) > 1.0
    np.testing.assert_array_equal(found, np.zeros((ROWS, 2)))


def embedding_params():
    shapes = {"embedding": (3, 4), "head": (4, 3)}
    draw = np.random.default_rng(0).normal
    trunk = {name: jnp.asarray(draw(size=shape)) for name, shape in shapes.items()}
    output = {"kernel": jnp.asarray(draw(size=(4, 1))), "bias": jnp.zeros(1)}
    return trunk, {"output": output}


def test_the_regression_reaches_the_trunk_and_never_the_vocabulary_head():
    trunk, head = embedding_params()
    params = {"policy": trunk, "reward_head": head}
    found = slopes(*UNTIED, params, batch())["policy"]
    np.testing.assert_array_equal(found["head"], np.zeros((4, 3)))
    assert np.abs(found["embedding"]).min() > 1e-3
    check_slopes(*UNTIED, params)


def test_student_refuses_what_it_cannot_mean():
    for wrong, message in [
        ({}, "'head' needs one"),
        ({"reward_head": HEAD, "reward_source": "implicit"}, "'implicit' has none"),
        ({"reward_source": "policy"}, "reward_source must be one of head, implicit"),
        ({"reward_head": HEAD, "oracle_scale": 0.0}, "oracle_scale must lie in"),
        ({"reward_head": HEAD, "beta": 0.0}, "beta must lie in"),
        ({"reward_head": HEAD, "alpha": -0.1}, "alpha must lie in"),
        ({"reward_head": HEAD, "gamma": -1.0}, "gamma must lie in"),
        ({"reward_head": HEAD, "preference_term": "ratio"}, "preference_term must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_drdo(MODEL, **wrong)


# The oracle


def test_oracle_is_bradley_terry_and_the_nll_of_the_chosen_response():
    out = call(FULL_ORACLE, oracle(), batch())
    margin = np.subtract(*head_rewards().T)
    nll = LABELS * np.logaddexp(0, -margin) + (1 - LABELS) * np.logaddexp(0, margin)
    language = -(LOG_PROBS / LENGTHS)[:, 0]
    np.testing.assert_allclose(out.total, (nll + 0.4 * language).sum(), rtol=1e-10)
    assert float(out.weight) == 3
    found = {name: float(m.total) for name, m in out.metrics.items()}
    expected = {
        "reward_model/nll": nll.sum(),
        "reward_model/accuracy": (margin > 0).sum(),
        "reward_model/language_nll": language.sum(),
    }
    assert found == pytest.approx(expected, rel=1e-10)
    tied = oracle() | {"head": jax.tree.map(jnp.zeros_like, head_params())}
    ties = call(FULL_ORACLE, tied, batch()).metrics
    assert float(ties["reward_model/accuracy"].total) == 1.5


def test_oracle_without_language_model_is_the_reward_model_objective():
    """Rewards, loss and gradient are those of `RewardModel.sequence_rewards`."""
    out, theirs = (call(o, oracle(), batch()) for o in (RANKING, REWARD_MODEL))
    assert out.total == theirs.total
    assert out.weight == theirs.weight
    assert out.metrics == theirs.metrics
    jax.tree.map(
        np.testing.assert_array_equal,
        slopes(RANKING, oracle(), batch()),
        slopes(REWARD_MODEL, oracle(), batch()),
    )


def test_g7_oracle():
    check_slopes(FULL_ORACLE, oracle())
    with pytest.raises(ValueError, match="alpha must lie in"):
        make_drdo_oracle(ORACLE, alpha=-1.0)
