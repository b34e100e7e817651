"""X-KD's objectives on the enumerable bed, against float64 numpy and their parents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from rkd_jax.losses import generalized_jsd, reverse_kl
from rkd_jax.objectives.gkd import make_gkd
from rkd_jax.objectives.minillm import make_minillm
from rkd_jax.objectives.sft import make_seqkd
from rkd_jax.objectives.xkd import make_xkd_gkd, make_xkd_minillm, make_xkd_sequence
from rkd_jax.types import (
    DemonstrationBatch,
    ImitationBatch,
    ImitationSignal,
    Sequences,
)
from tests.objectives.imitation import (
    FIXED,
    LENGTHS,
    LOG_STD,
    MEAN,
    MODEL,
    NUMBERS,
    PARTS,
    Q_TABLE,
    SAMPLED,
    evaluate,
    imitation,
    params,
    responses,
    signal,
)
from tests.tabular.bed import (
    BED_E,
    STUDENT,
    TEACHER,
    log_softmax,
)
from tests.tabular.posterior import tabular_action_values

pytestmark = pytest.mark.usefixtures("x64")

# The parents, at a weight of 0


PARENTS = {
    "sequence": (make_xkd_sequence, make_seqkd),
    "gkd": (make_xkd_gkd, make_gkd),
    "gkd, reverse KL": (
        functools.partial(make_xkd_gkd, divergence=reverse_kl, temperature=0.7),
        functools.partial(make_gkd, divergence=reverse_kl, temperature=0.7),
    ),
    "gkd, JSD": (
        functools.partial(
            make_xkd_gkd, divergence=functools.partial(generalized_jsd, beta=0.3)
        ),
        functools.partial(
            make_gkd, divergence=functools.partial(generalized_jsd, beta=0.3)
        ),
    ),
    "minillm": (make_xkd_minillm, make_minillm),
    "minillm, options": (
        functools.partial(
            make_xkd_minillm,
            temperature=0.7,
            gamma=0.9,
            long_part="inclusive",
            length_normalised=True,
        ),
        functools.partial(
            make_minillm,
            temperature=0.7,
            gamma=0.9,
            long_part="inclusive",
            length_normalised=True,
        ),
    ),
}


@pytest.mark.parametrize("name", PARENTS)
def test_without_weight_it_is_its_parent(name):
    make, make_parent = PARENTS[name]
    sequence = name == "sequence"
    batch = responses(FIXED) if sequence else imitation()
    taught = () if sequence else signal()
    out, gradient = evaluate(make(MODEL, PARTS(), w_x=0.0), batch, taught)
    parent, expected = evaluate(
        make_parent(MODEL), batch, taught, at=params()["policy"]
    )
    np.testing.assert_allclose(out.total, parent.total, rtol=1e-12)
    assert float(out.weight) == float(parent.weight)
    np.testing.assert_allclose(
        gradient["policy"]["logits"], expected["logits"], rtol=1e-12, atol=1e-15
    )
    for leaf in jax.tree.leaves((gradient["reward_head"], gradient["q_head"])):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    shared = parent.metrics.keys() - {"student/nll"}  # at temperature 1 in the parent
    for metric in shared:
        np.testing.assert_allclose(out.metrics[metric], parent.metrics[metric])


# The whole loss, from loops


def regulariser_by_hand(x, i, policy, options):
    """R_X of one response."""
    gamma, weight = options.get("gamma", 1.0), options.get("td_weight", 0.1)
    source = options.get("q_source", "log_probs")
    q = {
        "raw_logits": policy,
        "log_probs": log_softmax(policy),
        "q_head": Q_TABLE,
    }[source][x]
    prior_mean, prior_std = options.get("prior_mean", 0), options.get("prior_std", 1)
    actions, states = BED_E.sequences[i], BED_E.states[i]
    anchored = options.get("terminal") == "anchor"
    terms = []
    for t in range(len(actions) - (not anchored)):
        k, a = states[t], actions[t]
        if t + 1 == len(actions):
            following = 0.0
        elif options.get("next_value") == "expected":
            following = (np.exp(log_softmax(TEACHER))[x] * q).sum(-1)[states[t + 1]]
        else:
            following = q[states[t + 1], actions[t + 1]]
        delta = q[k, a] - gamma * following
        mean, std = MEAN[x, k, a], np.exp(LOG_STD[x, k, a])
        kl = np.log(prior_std / std) - 0.5
        kl += (std**2 + (mean - prior_mean) ** 2) / (2 * prior_std**2)
        density = np.exp(-((delta - mean) ** 2) / (2 * std**2))
        density /= np.sqrt(2 * np.pi) * std
        terms.append(kl - weight * np.log(density))
    return np.mean(terms) if terms else 0.0


@pytest.mark.parametrize("normalise", ["tokens", "responses"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_source": "raw_logits", "gamma": 0.9, "next_value": "expected"},
        {"q_source": "q_head", "td_weight": 0.5, "terminal": "anchor"},
        {"terminal": "anchor", "gamma": 0.8, "prior_mean": 0.3, "prior_std": 2.0},
    ],
    ids=str,
)
def test_loss_by_hand(options, normalise):
    head = tabular_action_values if options.get("q_source") == "q_head" else None
    inference = PARTS(q_head=head, **options)
    objective = make_xkd_gkd(
        MODEL, inference, reverse_kl, w_x=0.7, temperature=0.8, normalise=normalise
    )
    out = objective.student_loss(
        params(), None, None, imitation(), signal(), None
    )  # the teacher's log-probs are what they are, at whatever temperature
    policy = STUDENT / 0.8
    log_q, log_p = log_softmax(policy), log_softmax(TEACHER)
    divergence = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    total, regulariser = 0.0, 0.0
    for x, fixed, sampled in zip(NUMBERS, FIXED, SAMPLED, strict=True):
        length = LENGTHS[sampled]
        each = divergence[x, BED_E.states[sampled, :length]].mean()
        beside = regulariser_by_hand(x, fixed, policy, options)
        weight = length if normalise == "tokens" else 1
        total += weight * (each + 0.7 * beside)
        regulariser += weight * beside
    rows = LENGTHS[SAMPLED].sum() if normalise == "tokens" else len(NUMBERS)
    np.testing.assert_allclose(out.total, total, rtol=1e-10)
    assert float(out.weight) == rows
    np.testing.assert_allclose(
        out.metrics["student/regularizer"], (regulariser, rows), rtol=1e-10
    )


def test_sequence_loss_by_hand_at_a_temperature():
    objective = make_xkd_sequence(
        MODEL, PARTS(gamma=0.9), temperature=0.8, normalise="responses"
    )
    out, _ = evaluate(objective, ImitationBatch(responses(FIXED)), ())
    nll = -BED_E.sequence_log_probs(STUDENT / 0.8)[NUMBERS, FIXED] / LENGTHS[FIXED]
    beside = [
        regulariser_by_hand(x, i, STUDENT / 0.8, {"gamma": 0.9})
        for x, i in zip(NUMBERS, FIXED, strict=True)
    ]
    np.testing.assert_allclose(out.total, nll.sum() + np.sum(beside), rtol=1e-10)
    assert float(out.weight) == 4


def test_td_sequences_all_averages_both_sets_with_their_own_teacher():
    options = {"next_value": "expected", "gamma": 0.9}
    objectives = (
        make_xkd_minillm(MODEL, PARTS(**options), w_x=w_x, td_sequences="all")
        for w_x in (0.7, 0.0)
    )
    (out, _), (parent, _) = (evaluate(o, imitation(), signal()) for o in objectives)
    expected = sum(
        0.5 * regulariser_by_hand(x, i, STUDENT, options)
        for indices in (FIXED, SAMPLED)
        for x, i in zip(NUMBERS, indices, strict=True)
    )
    np.testing.assert_allclose(out.total - parent.total, 0.7 * expected, rtol=1e-9)
    counted = out.metrics["student/reward_kl"].weight
    assert float(counted) == LENGTHS[FIXED].sum() + LENGTHS[SAMPLED].sum() - 8


@pytest.mark.parametrize("make", [make_xkd_gkd, make_xkd_minillm])
def test_the_regulariser_does_not_see_student_samples_by_default(make):
    def beside(sampled, **options):
        """The regulariser, and the gradient of the head that nothing else reads."""
        objective = make(MODEL, PARTS(gamma=0.9), **options)
        out, gradient = evaluate(objective, imitation(sampled), signal(sampled))
        regularizer = out.metrics["student/regularizer"].total
        return jnp.append(ravel_pytree(gradient["reward_head"])[0], regularizer)

    # Other samples of the same lengths, so that rows weigh the same.
    other = np.array([10, 30, 5, 1])
    np.testing.assert_array_equal(LENGTHS[other], LENGTHS[SAMPLED])
    np.testing.assert_allclose(beside(SAMPLED), beside(other), atol=1e-13)
    seen = beside(SAMPLED, td_sequences="all") - beside(other, td_sequences="all")
    assert np.abs(seen[:-1]).max() > 1e-2
    assert abs(seen[-1]) > 1e-2


# Gradients


@pytest.mark.parametrize("q_source", ["log_probs", "raw_logits", "q_head"])
def test_gradients_are_derivatives(q_source):
    head = tabular_action_values if q_source == "q_head" else None
    inference = PARTS(q_source=q_source, q_head=head, gamma=0.9, next_value="expected")
    objective = make_xkd_gkd(MODEL, inference, w_x=0.7, temperature=0.8)
    flat, unravel = ravel_pytree(params())
    direction = jnp.asarray(np.random.default_rng(1).normal(size=flat.shape))

    def along(step):
        moved = unravel(flat + step * direction)
        return objective.student_loss(
            moved, None, None, imitation(), signal(), None
        ).total

    check_grads(along, (jnp.asarray(0.3),), order=1, modes=["rev"], rtol=1e-6)


def test_stop_gradient_cuts_its_own_path_only():
    def gradients(stop, w_x=1.0):
        inference = PARTS(gamma=0.9, stop_gradient=stop)
        objective = make_xkd_sequence(MODEL, inference, w_x=w_x)
        _, gradient = evaluate(objective, responses(FIXED), ())
        return gradient["policy"]["logits"], gradient["reward_head"]

    (full, head), (parent, _) = gradients("none"), gradients("none", w_x=0.0)
    (cut, cut_head), (next_cut, next_head) = map(gradients, ("delta_for_phi", "next"))
    np.testing.assert_allclose(cut, parent, atol=1e-14)
    for other in (cut_head, next_head):
        jax.tree.map(np.testing.assert_array_equal, head, other)

    # "next" leaves the slope of Q(s_t, y_t) alone, which is enough to write down.
    log_q, expected = log_softmax(STUDENT), np.array(parent)
    for x, i in zip(NUMBERS, FIXED, strict=True):
        actions, states = BED_E.sequences[i], BED_E.states[i]
        for t in range(len(actions) - 1):
            k, a = states[t], actions[t]
            delta = log_q[x, k, a] - 0.9 * log_q[x, states[t + 1], actions[t + 1]]
            slope = 0.1 * (delta - MEAN[x, k, a]) * np.exp(-2 * LOG_STD[x, k, a])
            score = np.eye(3)[a] - np.exp(log_q[x, k])
            expected[x, k] += LENGTHS[i] * slope / (len(actions) - 1) * score
    np.testing.assert_allclose(next_cut, expected, atol=1e-12)
    assert np.abs(full - next_cut).max() > 1e-2


def squares(student_logits, teacher_log_probs):
    """A divergence of the user's own, which does not stop the teacher's gradient."""
    difference = jax.nn.log_softmax(student_logits) - teacher_log_probs
    return jnp.square(difference).sum(-1)


@pytest.mark.parametrize(
    "make", [functools.partial(make_xkd_gkd, divergence=squares), make_xkd_minillm]
)
def test_the_teacher_gets_no_gradient_and_padding_may_hold_anything(make):
    inference = PARTS(q_source="raw_logits", next_value="expected", gamma=0.9)
    objective = make(MODEL, inference, td_sequences="all")
    clean, batch = signal(), imitation()

    def poison(log_probs, responses):
        mask = responses.sequences.response_mask[..., None]
        return jnp.where(mask, log_probs, jnp.nan)

    def garble(responses):
        old = responses.sequences
        tokens = jnp.where(old.token_mask, old.tokens, 1)
        new = Sequences(tokens, old.token_mask, old.response_mask)
        return DemonstrationBatch(new, new, responses.index)

    dirty = ImitationSignal(
        poison(clean.log_probs, batch.imitated),
        poison(clean.demonstration_log_probs, batch.demonstrations),
    )
    garbled = ImitationBatch(garble(batch.demonstrations), garble(batch.imitated))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15),
        evaluate(objective, garbled, dirty),
        evaluate(objective, batch, clean),
    )

    def total(taught):
        return objective.student_loss(params(), None, None, batch, taught, None).total

    for leaf in jax.tree.leaves(jax.grad(total)(dirty)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_micro_batches_add_up_and_empty_rows_count_nowhere():
    inference = PARTS(next_value="expected")
    objective = make_xkd_gkd(MODEL, inference)
    empty = jnp.arange(4) == 2  # row 2 becomes padding

    def without(responses):
        old = responses.sequences
        mask = old.response_mask & ~empty[:, None]
        new = Sequences(old.tokens, old.token_mask, mask)
        return DemonstrationBatch(new, new, responses.index)

    batch = ImitationBatch(*map(without, (responses(FIXED), responses(SAMPLED))))
    whole = evaluate(objective, batch, signal())
    one = jax.jit(lambda data: evaluate(objective, *data))
    *parts, nothing = (
        one(jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, signal())))
        for i in (0, 1, 3, 2)
    )
    jax.tree.map(
        lambda total, *each: np.testing.assert_allclose(total, sum(each), atol=1e-12),
        whole,
        *parts,
    )
    for leaf in jax.tree.leaves(nothing):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
