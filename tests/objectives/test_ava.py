"""AVA's objectives on the enumerable bed, against float64 numpy and their relatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.api import response_states
from rkd_jax.models.heads import GaussianHead, QHead
from rkd_jax.objectives.ava import make_ava_d
from rkd_jax.objectives.avril import make_avril
from rkd_jax.objectives.sft import make_sft
from rkd_jax.types import (
    DemonstrationBatch,
    PreferenceBatch,
    Sequences,
    TrajectoryBatch,
)
from tests.objectives.ava_pairs import (
    INDICES,
    LABELS,
    LENGTHS,
    LOG_STD,
    MEAN,
    MODEL,
    NUMBERS,
    demonstrations,
    evaluate,
    make_d,
    make_p,
    params,
    preferences,
)
from tests.tabular.bed import BED_E, STUDENT, log_softmax
from tests.tabular.posterior import tabular_action_values

pytestmark = pytest.mark.usefixtures("x64")

GOLDEN = 6e-7


def token_terms(x, i, gamma=1.0, shifted=False):
    """One response, by loops over its tokens: log_probs, kl, td (lists), last mean."""
    response, states = BED_E.sequences[i], BED_E.states[i]
    log_policy = log_softmax(STUDENT)
    log_probs = [log_policy[x, s, a] for s, a in zip(states, response, strict=False)]
    kls, tds, mean = [], [], None
    for t in range(len(response)):
        cell = (x, states[t], response[t])
        if shifted:  # the head has seen the token before; the prompt reads 0
            cell = (x, states[t - 1], response[t - 1])
        known = t > 0 or not shifted
        mean, log_std = (MEAN[cell], LOG_STD[cell]) if known else (0.0, 0.0)
        if t + 1 == len(response):
            break
        variance = np.exp(2 * log_std)
        delta = log_probs[t] - gamma * log_probs[t + 1]
        kls.append(0.5 * (variance + mean**2 - 1) - log_std)
        square = (delta - mean) ** 2 / variance
        tds.append(-0.5 * np.log(2 * np.pi * variance) - 0.5 * square)
    return log_probs, kls, tds, mean


def reduced(values, normalise):
    return (np.mean(values) if normalise == "mean" else np.sum(values)) if values else 0


# Demonstrations


@pytest.mark.parametrize("normalise", ["mean", "sum"])
@pytest.mark.parametrize("reward_input", ["h_action", "state"])
def test_demonstrations_by_loops_over_tokens(normalise, reward_input):
    objective = make_d(
        td_weight=0.3,
        irl_weight=0.7,
        beta=0.8,
        gamma=0.9,
        normalise=normalise,
        reward_input=reward_input,
    )
    out, _ = evaluate(objective, demonstrations())
    expected, mean_td = 0.0, []
    for x, i in zip(NUMBERS.ravel(), INDICES.ravel(), strict=True):
        shifted = reward_input == "state"
        log_probs, kls, tds, _ = token_terms(x, i, gamma=0.9, shifted=shifted)
        brackets = [kl - 0.3 * td for kl, td in zip(kls, tds, strict=True)]
        expected -= 0.8 * reduced(log_probs, normalise)
        expected += 0.7 * reduced(brackets, normalise)
        mean_td += tds
    np.testing.assert_allclose(out.total, expected, rtol=1e-10)
    assert float(out.weight) == 6.0
    found = out.metrics["student/td_log_likelihood"]
    np.testing.assert_allclose(found.total / found.weight, np.mean(mean_td), rtol=1e-10)


@pytest.mark.parametrize(
    ("q_source", "gamma", "golden"),
    [
        ("raw_logits", 1.0, 1.572635),
        ("raw_logits", 0.9, 1.570330),
        ("log_probs", 1.0, 1.561276),
        ("log_probs", 0.9, 1.554352),
    ],
)
def test_golden_values_of_the_named_sequence(q_source, gamma, golden):
    """With the mean, this is X-KD's sequence mode on the same response."""
    named = BED_E.index(0, 1, 0, 2)
    mean, log_std = np.zeros((2, *BED_E.table_shape))
    cells = (0, BED_E.states[named], BED_E.actions[named])
    mean[cells], log_std[cells] = 0.3 * np.cos(np.arange(4)), -0.2 + 0.1 * np.arange(4)
    q_table = np.cos(0.6 * np.arange(15)[:, None] + 1.4 * np.arange(3))
    at = {
        "policy": {"logits": jnp.asarray(np.stack([q_table, q_table]))},
        "reward_head": {"mean": jnp.asarray(mean), "log_std": jnp.asarray(log_std)},
    }
    objective = make_d(q_source=q_source, gamma=gamma)
    out, _ = evaluate(objective, demonstrations(0 * NUMBERS, 0 * INDICES + named), at)
    assert float(out.total / out.weight) == pytest.approx(golden, abs=GOLDEN)


def random_head(head, seed):
    """Parameters of a head on the bed's states, none of them 0, in float64."""
    generator = np.random.default_rng(seed)
    shapes = head.init(jax.random.key(0), MODEL.config.hidden_size)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape)), shapes)


def test_matching_switches_make_it_avril():
    """Q head, reward of the state, lambda 1, the last action dropped: equal in all."""
    q_head, reward_head = QHead(3), GaussianHead(width=4, limit="none")
    heads = {
        "q_head": random_head(q_head, 1),
        "reward_head": random_head(reward_head, 2),
    }
    batch = demonstrations()
    objective = make_ava_d(
        MODEL,
        reward_head.apply,
        q_head=q_head.apply,
        q_source="q_head",
        beta=0.7,
        gamma=0.9,
        td_weight=1.0,
        drop_last="all_terms",
        normalise="sum",
        reward_input="state",
    )
    out, gradient = evaluate(objective, batch, params(**heads))

    sequences = batch.sequences
    states = response_states(MODEL, params()["policy"], sequences).before
    steps = TrajectoryBatch(states, sequences.targets, sequences.response_mask)
    parent = make_avril(
        q_head.apply, lambda p, s, a: reward_head.apply(p, s), beta=0.7, gamma=0.9
    )
    renamed = {"policy": heads["q_head"], "encoder": heads["reward_head"]}
    expected, slopes = evaluate(parent, steps, renamed)
    np.testing.assert_allclose(out.total, expected.total, rtol=1e-12)
    assert float(expected.weight) == (LENGTHS - 1).sum()
    assert float(out.weight) == (LENGTHS > 1).sum()
    for name, other in (("q_head", "policy"), ("reward_head", "encoder")):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14),
            gradient[name],
            slopes[other],
        )
    assert out.metrics.keys() == expected.metrics.keys()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12),
        out.metrics,
        expected.metrics,
    )
    # X5: a table has no shared trunk, so a Q head teaches the policy nothing.
    assert not np.asarray(gradient["policy"]["logits"]).any()


def test_without_the_reward_it_is_sft_end_of_text_included():
    objective = make_d(irl_weight=0.0, normalise="sum")
    out, gradient = evaluate(objective, demonstrations())
    sft = make_sft(MODEL)

    def total(policy):
        batch = demonstrations()
        return sft.student_loss(policy, None, None, batch, None, None).total

    expected, slope = jax.value_and_grad(total)(params()["policy"])
    np.testing.assert_allclose(out.total, expected, rtol=1e-12)
    np.testing.assert_allclose(
        gradient["policy"]["logits"], slope["logits"], atol=1e-13
    )

    # At a temperature it is that SFT, and Q is of the same logits.
    colder = functools.partial(make_d, normalise="sum", temperature=0.5)
    cold, _ = evaluate(colder(irl_weight=0.0), demonstrations())
    divided = params(policy={"logits": jnp.asarray(STUDENT) / 0.5})
    expected, _ = evaluate(objective, demonstrations(), divided)
    np.testing.assert_allclose(cold.total, expected.total, rtol=1e-12)
    cold, _ = evaluate(colder(), demonstrations())
    expected, _ = evaluate(make_d(normalise="sum"), demonstrations(), divided)
    np.testing.assert_allclose(cold.total, expected.total, rtol=1e-12)

    dropped, _ = evaluate(make_d(drop_last="all_terms"), demonstrations())
    counted = dropped.metrics["student/nll"].weight
    assert float(counted) == (LENGTHS - 1).sum()  # without any last token


# Preferences


def expected_parts(normalise):
    """nll, reject, kl - 0.3 td and contrast, summed over the labelled pairs."""
    parts = dict.fromkeys(("nll", "reject", "irl", "contrast"), 0.0)
    for pair, label in enumerate(LABELS):
        last = []
        for member, share in enumerate((label, 1 - label)):
            x, i = NUMBERS[pair, member], INDICES[pair, member]
            log_probs, kls, tds, mean = token_terms(x, i)
            brackets = [kl - 0.3 * td for kl, td in zip(kls, tds, strict=True)]
            parts["nll"] -= share * reduced(log_probs, normalise)
            parts["reject"] += (1 - share) * reduced(log_probs, normalise)
            parts["irl"] += reduced(brackets, normalise)
            last.append(mean)
        ahead = 1 / (1 + np.exp(last[1] - last[0]))
        parts["contrast"] += label * ahead + (1 - label) * (1 - ahead)
    return parts


def test_preferences_at_a_temperature_are_of_the_divided_logits():
    divided = params(policy={"logits": jnp.asarray(STUDENT) / 0.5})
    expected, _ = evaluate(make_p(), preferences(), divided)
    found, _ = evaluate(make_p(temperature=0.5), preferences())
    np.testing.assert_allclose(found.total, expected.total, rtol=1e-12)
    with pytest.raises(ValueError, match="temperature"):
        make_p(temperature=0.0)


ABLATIONS = {
    "none": {},
    "nll-and-reject": {"beta": 1e-12},
    "reject": {"reject_term": "none"},
    "irl": {"irl_weight": 0.0},
    "contrast": {"cer_weight": 0.0},
}


@pytest.mark.parametrize("normalise", ["mean", "sum"])
@pytest.mark.parametrize("removed", ABLATIONS)
def test_preferences_by_loops_and_each_ablation_removes_one_term(removed, normalise):
    objective = make_p(td_weight=0.3, normalise=normalise, **ABLATIONS[removed])
    out, _ = evaluate(objective, preferences())
    parts = expected_parts(normalise)
    parts["contrast"] *= -1
    expected = sum(v for name, v in parts.items() if name not in removed.split("-and-"))
    np.testing.assert_allclose(out.total, expected, rtol=1e-9)
    assert float(out.weight) == 3.0


def test_without_rejection_it_is_ava_d_on_the_chosen_and_a_regulariser_on_the_rest():
    options = {"td_weight": 0.3, "gamma": 0.9, "beta": 0.6}
    objective = make_p(reject_term="none", cer_weight=0.0, **options)
    out, gradient = evaluate(objective, preferences(np.ones(3)))
    # each of them twice
    chosen, rejected = (
        demonstrations(NUMBERS, INDICES[:, [member] * 2]) for member in (0, 1)
    )
    chosen = evaluate(make_d(**options), chosen)
    both = evaluate(make_d(**options), rejected)
    # irl_weight multiplies the regulariser: twice it, less once, is it alone
    twice = evaluate(make_d(irl_weight=2.0, **options), rejected)
    total = (chosen[0].total + twice[0].total - both[0].total) / 2
    np.testing.assert_allclose(out.total, total, rtol=1e-12)
    jax.tree.map(
        lambda found, c, d, e: np.testing.assert_allclose(
            found, (c + e - d) / 2, atol=1e-12
        ),
        gradient,
        chosen[1],
        both[1],
        twice[1],
    )


def test_metrics_of_a_pair():
    out, _ = evaluate(make_p(), preferences())
    found = {name: float(m.total / m.weight) for name, m in out.metrics.items()}
    parts, shares = expected_parts("sum"), np.stack([LABELS, 1 - LABELS], 1)
    nll = parts["nll"] / (shares * LENGTHS).sum()
    reject = parts["reject"] / ((1 - shares) * LENGTHS).sum()
    returns = BED_E.taken(MEAN).sum(-1)[NUMBERS, INDICES]
    accuracy = (returns[:, 0] > returns[:, 1]).mean()
    assert 0 < accuracy < 1
    expected = {
        "student/nll": nll,
        "student/reject": reject,
        "student/contrast": parts["contrast"] / 3,
        "student/reward_accuracy": accuracy,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    watched = {"reward_kl", "td_log_likelihood", "td_error", "log_std"}
    assert found.keys() == expected.keys() | {f"student/{name}" for name in watched}


def only(batch, keep):
    """The batch with the other pairs emptied, their labels NaN."""
    keep = jnp.asarray(keep)
    mask = batch.sequences.response_mask & jnp.expand_dims(keep, (1, 2))
    token_mask, label = (
        batch.sequences.token_mask,
        jnp.where(keep, batch.label, jnp.nan),
    )
    sequences = Sequences(batch.sequences.tokens, token_mask, mask)
    return PreferenceBatch(sequences, sequences, label, batch.rewards, batch.index)


def test_rows_add_up_and_empty_ones_weigh_nothing():
    objective, batch = make_p(), preferences()
    whole = evaluate(objective, batch)
    first = evaluate(objective, only(batch, [True, False, False]))
    rest = evaluate(objective, only(batch, [False, True, True]))
    assert (float(first[0].weight), float(rest[0].weight)) == (1.0, 2.0)
    jax.tree.map(
        lambda w, a, b: np.testing.assert_allclose(w, a + b, rtol=1e-6, atol=1e-12),
        whole,
        first,
        rest,
    )
    empty = jax.tree.map(jnp.zeros_like, demonstrations().sequences)
    batch = DemonstrationBatch(empty, empty, jnp.arange(6).reshape(3, 2))
    out, gradient = evaluate(make_d(), batch)
    assert float(out.total) == float(out.weight) == 0.0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_settings_are_checked():
    for name, options in {
        "q_source": {"q_source": "q_head"},
        "q_head": {"q_head": tabular_action_values},
        "td_weight": {"td_weight": -1.0},
        "irl_weight": {"irl_weight": -1.0},
        "normalise": {"normalise": "tokens"},
        "reward_input": {"reward_input": "action"},
    }.items():
        for make in (make_d, make_p):
            with pytest.raises(ValueError, match=name):
                make(**options)
    with pytest.raises(ValueError, match="cer_weight"):
        make_p(cer_weight=-1.0)
