"""Packed rows against the same records one by one, without a column of padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.data.collate import collate
from rkd_jax.data.packing import collate_packed, pack, packed_length
from rkd_jax.data.tokenize import TokenizeConfig, Tokenized
from rkd_jax.evaluation.likelihood import teacher_nll
from rkd_jax.models.attention_weights import response_attention
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.heads import ScalarHead, head_sequence_rewards
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.policy import target_log_probs
from rkd_jax.objectives.reward_model import (
    init_members,
    make_reward_ensemble,
    make_reward_model,
    pair_returns,
)
from rkd_jax.objectives.sft import make_seqkd, make_sft
from rkd_jax.objectives.topk_kd import make_topk_kd
from rkd_jax.signals.reward_oracle import make_return_scorer
from rkd_jax.signals.teacher import (
    make_features,
    make_pair_scorer,
    make_sequence_scorer,
    make_teacher_log_probs,
    make_token_scorer,
)
from rkd_jax.signals.topk import make_topk
from rkd_jax.signals.values import make_shaping
from rkd_jax.training.state import init_state
from rkd_jax.training.update import make_update
from rkd_jax.types import (
    Objective,
    PreferenceSignal,
    ReferenceSignal,
    TeacherSignal,
    TeacherStates,
)
from tests.models import reference as numpy_model
from tests.models.reference import QWEN, random_params
from tests.objectives.packed_rows import (
    COUPLES,
    EXPERT,
    MODEL,
    REWARD,
    ROW,
    SINGLES,
    STUDENT,
    TEACHER,
    alone,
    assert_equal,
    bradley_terry,
    by_record,
    ids,
    order,
    packed,
    params,
    reward_params,
    value_and_gradient,
    wide,
)

pytestmark = pytest.mark.usefixtures("x64")


def test_the_lengths_are_adversarial():
    lengths = [[packed_length(row) for row in part] for part in pack(SINGLES, ROW)]
    assert any(sum(row) == ROW and len(row) == 1 for row in lengths)
    assert any(len(row) > 1 for row in lengths)
    pairs = [[packed_length(row) for row in part] for part in pack(COUPLES, ROW)]
    assert any(sum(row) == ROW for row in pairs)
    assert any(len(row) > 1 for row in pairs)


def test_log_probs_are_those_of_numpy_on_each_record_by_itself():
    """Another implementation, loops over rows and columns, no segments."""
    batch, weights = packed(), params()
    sequences = batch.sequences
    found = np.asarray(
        jax.jit(lambda p: target_log_probs(MODEL, p, sequences))(weights)
    )
    for (b, m), row in zip(order(batch), SINGLES, strict=True):
        tokens = np.array([[*row.prompt, *row.responses[0]]])
        positions, ones = np.arange(tokens.shape[1])[None], np.ones_like(tokens)
        logits = numpy_model.logits(STUDENT, weights, tokens, positions, ones)[0]
        log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        response = row.responses[0]
        states = range(len(row.prompt) - 1, tokens.shape[1] - 1)
        expected = log_probs[list(states), response]
        mine = sequences.response_mask[b] & (sequences.segment_ids[b, 1:] == m + 1)
        np.testing.assert_allclose(found[b][mine], expected, rtol=1e-6, atol=1e-6)


def one_by_one(objective, weights, batches, signals, frozen=None):
    """Sum over batches of one record each; all in one program."""

    def total(weights):
        outs = [
            objective.student_loss(weights, None, frozen, batch, signal, None)
            for batch, signal in zip(batches, signals, strict=True)
        ]
        out = jax.tree.map(lambda *leaves: sum(leaves), *outs)
        return out.total, out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(weights)
    return out, gradient


def demonstration(row):
    batch = packed([row], spare=0)
    student = alone(row.prompt, row.responses[0])
    teacher = alone(row.teacher_prompt, row.responses[0])
    return dataclasses.replace(batch, sequences=student, teacher_sequences=teacher)


def test_likelihood_of_packed_rows_is_the_sum_over_records():
    objective = make_sft(MODEL, temperature=0.7)
    singles = [demonstration(row) for row in SINGLES]
    expected = one_by_one(objective, params(), singles, [()] * len(singles))
    found = value_and_gradient(objective, params(), packed(), ())
    assert float(found[0].weight) == 11.0
    assert_equal(found, expected)
    assert objective.packed
    assert make_seqkd(MODEL).packed  # the same loss


def test_any_lengths_give_the_loss_and_gradient_of_padded_rows():
    generator = np.random.default_rng(11)
    rows = [
        Tokenized(i, ids(p), ids(p), (ids(r),))
        for i, (p, r) in enumerate(generator.integers(1, 12, (20, 2)))
    ]
    batch = collate_packed(pack(rows, 32), 32)
    assert max((batch.index >= 0).sum(axis=1)) > 2
    objective = make_sft(MODEL)
    padded = collate(rows, TokenizeConfig(12, 12))
    found = value_and_gradient(objective, params(), batch, ())
    assert_equal(found, value_and_gradient(objective, params(), padded, ()))


@pytest.mark.parametrize("known_by", ["log_probs", "states", "top k"])
def test_distillation_of_packed_rows_is_the_sum_over_records(known_by):
    """The teacher has other prompts, longer and shorter ones."""
    expert = params(TEACHER, seed=1)
    if known_by == "log_probs":
        objective, kind = make_kd(MODEL, temperature=0.7), TeacherSignal
        score = make_teacher_log_probs(EXPERT, temperature=0.7)
    elif known_by == "top k":
        objective = make_topk_kd(MODEL, temperature=0.7)
        score = make_topk(EXPERT, top_k=5, temperature=0.7)

        def kind(signal):
            return signal

    else:
        objective = make_kd(MODEL, teacher=EXPERT, temperature=0.7)
        score, kind = make_features(EXPERT, states="before"), TeacherStates
    singles = [demonstration(row) for row in SINGLES]
    signals = [kind(score(expert, s.teacher_sequences)) for s in singles]
    frozen = {"teacher": expert}
    expected = one_by_one(objective, params(), singles, signals, frozen)
    batch = packed()
    signal = kind(score(expert, batch.teacher_sequences))
    found = value_and_gradient(objective, params(), batch, signal, frozen)
    assert float(found[0].metrics["student/divergence"].total) > 1.0
    assert_equal(found, expected)


def test_the_reference_signal_of_packed_pairs():
    batch, expert = packed(COUPLES), params(TEACHER, seed=1)
    padded = collate(COUPLES, TokenizeConfig(8, 8))
    score = make_pair_scorer(EXPERT, temperature=0.7)
    found, unpacked = score(expert, batch), score(expert, padded)
    assert found.shape == (*batch.label.shape, 2)
    assert not np.asarray(found)[batch.index < 0].any()
    by_row = make_sequence_scorer(EXPERT, temperature=0.7)(expert, padded.sequences)
    assert by_row.shape == (4, 2)
    np.testing.assert_allclose(by_record(batch, found), by_row, rtol=1e-9)
    np.testing.assert_allclose(unpacked, by_row, rtol=1e-12)


def test_dpo_of_packed_pairs_is_the_sum_over_pairs():
    batch = wide(packed(COUPLES))
    scores = np.random.default_rng(1).normal(size=(4, 2)) - 5.0
    signal = np.full((*batch.label.shape, 2), np.nan)  # where no pair is, anything
    for place, pair in zip(order(batch), scores, strict=True):
        signal[place] = pair

    def log_prob(weights, sequences):
        return target_log_probs(MODEL, weights, sequences).sum()

    found, gradient = value_and_gradient(
        make_dpo(MODEL, beta=0.3),
        params(),
        batch,
        ReferenceSignal(jnp.asarray(signal)),
    )
    assert float(found.weight) == 4.0
    expected = bradley_terry(log_prob, params(), scale=0.3, offset=scores)
    assert_equal((found.total, gradient), expected)


@pytest.mark.parametrize(("level", "gamma"), [("token", 0.9), ("sequence", 1.0)])
def test_the_reward_model_of_packed_pairs_is_the_sum_over_pairs(level, gamma):
    rewards = REWARD.token_rewards if level == "token" else REWARD.sequence_rewards
    batch = wide(packed(COUPLES))

    def returns(weights, sequences):
        tokens = rewards(weights, sequences)[0]
        return (gamma ** np.arange(tokens.size) * tokens).sum()

    objective = make_reward_model(rewards, gamma=gamma)
    found, gradient = value_and_gradient(
        objective, reward_params(), batch, PreferenceSignal()
    )
    assert float(found.weight) == 4.0
    expected = bradley_terry(returns, reward_params())
    assert_equal((found.total, gradient), expected)


def test_an_ensemble_on_frozen_features_reads_packed_and_padded_pairs_alike():
    """Heads on a trunk's states, a weight for every pair and member, NaN elsewhere."""
    batch = wide(packed(COUPLES))
    padded = wide(collate(COUPLES, TokenizeConfig(8, 8)))
    features = make_features(EXPERT)
    expert = params(TEACHER, seed=1)
    head = ScalarHead(width=3)
    members = init_members(
        lambda key: head.init(key, TEACHER.hidden_size), jax.random.key(0), 2
    )
    members = jax.tree.map(lambda x: x.astype(jnp.float64) + 0.1, members)
    weights = np.array([[1.0, 2.0], [0.5, 0.0], [3.0, 1.0], [1.0, 1.0]])
    spread = np.full((*batch.label.shape, 2), np.nan)
    for place, pair in zip(order(batch), weights, strict=True):
        spread[place] = pair
    objective = make_reward_ensemble(head_sequence_rewards(head), 2, l2=0.01)
    found, expected = (
        value_and_gradient(
            objective,
            members,
            pairs,
            PreferenceSignal(features(expert, pairs.sequences), jnp.asarray(w)),
        )
        for pairs, w in ((batch, spread), (padded, weights))
    )
    assert_equal(found, expected)


def test_no_record_sees_another():
    """Bitwise: what stands in one segment, or in padding, changes no other."""
    batch = packed()
    score, weights = make_token_scorer(MODEL), params()
    sequences = batch.sequences
    before = np.asarray(score(weights, sequences))
    row = next(b for b in range(len(batch.index)) if (batch.index[b] >= 0).sum() > 1)
    segments = sequences.segment_ids
    for segment in range(1, segments[row].max() + 1):
        mine = np.zeros(segments.shape, bool)
        mine[row] = segments[row] == segment
        tokens = np.where(mine, (sequences.tokens + 1) % 37, sequences.tokens)
        changed = score(weights, dataclasses.replace(sequences, tokens=tokens))
        others = sequences.response_mask & ~mine[:, 1:]
        np.testing.assert_array_equal(np.asarray(changed)[others], before[others])
        own = sequences.response_mask & mine[:, 1:]
        assert np.abs(np.asarray(changed)[own] - before[own]).min() > 1e-6
    tokens = np.where(segments == 0, 36, sequences.tokens)
    changed = score(weights, dataclasses.replace(sequences, tokens=tokens))
    np.testing.assert_array_equal(changed, before)


# The update


def fitted(batch, signal, accumulation):
    optimizer = optax.sgd(0.5)
    update = make_update(
        make_dpo(Decoder(QWEN), beta=0.3),
        student_optimizer=optimizer,
        accumulation=accumulation,
    )
    state = init_state(
        random_params(QWEN), student_optimizer=optimizer, rng=jax.random.key(0)
    )
    return update(state, None, batch, signal)


@pytest.mark.float32
def test_an_update_on_packed_pairs_is_the_update_on_padded_ones():
    score = make_pair_scorer(Decoder(QWEN))
    batch, padded = packed(COUPLES, spare=1), collate(COUPLES, TokenizeConfig(5, 4))
    assert len(batch.index) % 2 == 0
    frozen = random_params(QWEN, seed=1)
    found, metrics = fitted(batch, ReferenceSignal(score(frozen, batch)), 2)
    expected, plain = fitted(padded, ReferenceSignal(score(frozen, padded)), 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found.student.params,
        expected.student.params,
    )
    start = random_params(QWEN)["embed"]["embedding"]
    moved = np.asarray(found.student.params["embed"]["embedding"]) - start
    assert np.abs(moved).max() > 1e-2
    assert float(metrics["tokens"]) == float(plain["tokens"])
    assert float(metrics["tokens"]) == sum(map(packed_length, COUPLES))
    for name in ("student/loss", "student/margin", "student/grad_norm"):
        np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-5)


def test_who_takes_a_row_for_a_response_refuses_packed_rows():
    batch, weights = packed(), params()
    sequences = batch.sequences
    with pytest.raises(ValueError, match="a sequence scorer: these rows are packed"):
        make_sequence_scorer(MODEL)(weights, sequences)
    with pytest.raises(ValueError, match="a return scorer: these rows are packed"):
        make_return_scorer(REWARD.token_rewards)(reward_params(), sequences)
    with pytest.raises(ValueError, match="response_attention: these rows are packed"):
        response_attention(MODEL, weights, sequences)
    with pytest.raises(ValueError, match="state values: these rows are packed"):
        make_shaping(MODEL)(weights, sequences)
    with pytest.raises(ValueError, match="teacher_nll: these rows are packed"):
        teacher_nll(MODEL, weights, sequences)
    with pytest.raises(ValueError, match="pair_returns: these rows are packed"):
        pair_returns(REWARD.token_rewards, reward_params(), sequences, None, 1.0)
    optimizer = optax.sgd(0.1)
    unaware = Objective("unaware", make_sft(MODEL).student_loss)
    update = make_update(unaware, student_optimizer=optimizer)
    state = init_state(weights, student_optimizer=optimizer, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="objective 'unaware': these rows are packed"):
        update(state, None, batch, ())
