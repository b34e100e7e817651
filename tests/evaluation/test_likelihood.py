"""Divergences against float64 numpy and against exact expectations."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from rkd_jax.evaluation.generation import with_prompts
from rkd_jax.evaluation.likelihood import (
    SequenceStatistic,
    sequence_divergences,
    teacher_nll,
)
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.types import Prompts, Sequences
from tests.evaluation.bigram import Bigram

V = 5
STUDENT, TEACHER = Bigram(V), Bigram(V)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(7))
    return STUDENT.init(keys[0]), TEACHER.init(keys[1])


def rows(lengths, prompt_lengths, width=3, targets=6, seed=0):
    """Random left- and right-padded rows; padding holds an impossible token id."""
    generator = np.random.default_rng(seed)
    n, columns = len(lengths), width + targets
    column = np.arange(columns)
    prompt_lengths, lengths = np.asarray(prompt_lengths), np.asarray(lengths)
    mask = (column >= width - prompt_lengths[:, None]) & (
        column < width + lengths[:, None]
    )
    tokens = np.where(mask, generator.integers(0, V, (n, columns)), 10_000)
    return Sequences(tokens.astype(np.int32), mask, mask[:, width:])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def by_hand(sequences, student, teacher, temperature=1.0):
    """Row sums of forward KL, reverse KL and teacher NLL, float64, in loops."""
    q_table, p_table = (
        log_softmax(np.asarray(t) / temperature) for t in (student, teacher)
    )
    nll_table = log_softmax(teacher)
    sums = np.zeros((3, len(sequences.tokens)))
    for row, tokens in enumerate(sequences.tokens):
        for t in np.flatnonzero(sequences.response_mask[row]):
            before, target = tokens[sequences.prompt_width - 1 + t :][:2]
            q, p = q_table[before], p_table[before]
            sums[0, row] += (np.exp(p) * (p - q)).sum()
            sums[1, row] += (np.exp(q) * (q - p)).sum()
            sums[2, row] -= nll_table[before, target]
    return sums


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_divergences_and_nll_match_float64(params, temperature):
    sequences = rows([6, 1, 4, 0, 2], [3, 1, 2, 3, 1])
    student, teacher = params
    forward, reverse, nll = by_hand(
        sequences, student["table"], teacher["table"], temperature
    )
    found = sequence_divergences(
        STUDENT,
        student,
        TEACHER,
        teacher,
        sequences,
        temperature=temperature,
        batch_size=2,
    )
    np.testing.assert_allclose(found.forward_kl.totals, forward, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.reverse_kl.totals, reverse, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.forward_kl.tokens, [6, 1, 4, 0, 2])
    assert found.forward_kl.per_token.mean == pytest.approx(forward.sum() / 13, 1e-5)
    assert found.reverse_kl.per_sequence.mean == pytest.approx(reverse.mean(), 1e-5)
    fluency = teacher_nll(TEACHER, teacher, sequences, batch_size=3)
    np.testing.assert_allclose(fluency.totals, nll, rtol=1e-5, atol=1e-6)


def test_divergence_of_a_model_from_itself_is_zero(params):
    sequences = rows([3, 6], [2, 3])
    found = sequence_divergences(STUDENT, params[0], STUDENT, params[0], sequences)
    assert found.forward_kl.per_token.mean == pytest.approx(0, abs=1e-6)
    assert found.reverse_kl.per_sequence.mean == pytest.approx(0, abs=1e-6)


def test_r11_padding_does_not_count_and_cutting_it_off_changes_nothing(params):
    student, teacher = params
    wide, narrow = rows([2, 3], [1, 2]), rows([2, 3], [1, 2])
    narrow = Sequences(
        narrow.tokens[:, 1:-3], narrow.token_mask[:, 1:-3], narrow.response_mask[:, :-3]
    )
    for sequences in (wide, narrow):
        found = sequence_divergences(STUDENT, student, TEACHER, teacher, sequences)
        expected = by_hand(sequences, student["table"], teacher["table"])
        np.testing.assert_allclose(found.forward_kl.totals, expected[0], rtol=1e-5)
        np.testing.assert_allclose(found.reverse_kl.totals, expected[1], rtol=1e-5)


def test_sequence_kl_on_own_samples_is_the_kl_of_whole_responses(params):
    """G8: all responses, weighted by their probability, give the exact expectation."""
    student, teacher = params
    eos, horizon, first = 0, 3, 2
    q_table, p_table = (log_softmax(p["table"]) for p in params)
    responses = [
        y
        for n in range(1, horizon + 1)
        for y in itertools.product(range(V), repeat=n)
        if eos not in y[:-1] and (y[-1] == eos or n == horizon)
    ]
    steps = [list(itertools.pairwise((first, *y))) for y in responses]
    log_q = np.array([sum(q_table[s] for s in pairs) for pairs in steps])
    log_p = np.array([sum(p_table[s] for s in pairs) for pairs in steps])
    assert np.exp(log_q).sum() == pytest.approx(1.0)
    mask = np.array([[t < len(y) for t in range(horizon)] for y in responses])
    tokens = np.array([[first, *y, *[9] * (horizon - len(y))] for y in responses])
    token_mask = np.concatenate([np.ones((len(responses), 1), bool), mask], axis=1)
    sequences = Sequences(tokens.astype(np.int32), token_mask, mask)

    found = sequence_divergences(
        STUDENT, student, TEACHER, teacher, sequences, batch_size=32
    )
    reverse = (np.exp(log_q) * (log_q - log_p)).sum()
    assert np.exp(log_q) @ found.reverse_kl.totals == pytest.approx(reverse, 1e-5)
    forward = (np.exp(log_p) * (log_p - log_q)).sum()
    assert np.exp(log_p) @ found.forward_kl.totals == pytest.approx(forward, 1e-5)


def test_samples_of_a_prompt_are_one_unit():
    totals = np.array([[1.0, 3.0], [2.0, 2.0], [6.0, 0.0]])
    statistic = SequenceStatistic(
        totals, np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])
    )
    assert statistic.per_token.n == statistic.per_sequence.n == 3
    assert statistic.per_token.mean == pytest.approx(14 / 12)
    assert statistic.per_sequence.mean == pytest.approx(14 / 6)
    # Prompt means 2, 2, 3: s = 1/sqrt(3), t_{0.975,2} = 4.302653.
    assert statistic.per_sequence.half_width == pytest.approx(4.302653 / 3, 1e-6)


def test_r43_teacher_reads_its_own_prompts(params):
    student, teacher = params
    sequences = rows([4, 2], [1, 3])
    prompts = Prompts(
        np.array([[9, 3], [1, 4]], np.int32), np.array([[False, True], [True, True]])
    )
    other = with_prompts(sequences, prompts)
    found = sequence_divergences(STUDENT, student, TEACHER, teacher, sequences, other)
    # Only the first state of a bigram depends on the prompt.
    q, p = (log_softmax(x["table"]) for x in params)
    shared = by_hand(sequences, student["table"], teacher["table"])[0]
    last = sequences.tokens[:, sequences.prompt_width - 1]
    for row, teacher_last in enumerate((3, 4)):
        teacher_p = p[teacher_last]
        change = (np.exp(teacher_p) * (teacher_p - q[last[row]])).sum()
        change -= (np.exp(p[last[row]]) * (p[last[row]] - q[last[row]])).sum()
        assert found.forward_kl.totals[row] == pytest.approx(shared[row] + change, 1e-5)


def test_one_compilation_for_all_batches_and_calls(params):
    student, teacher = Bigram(V), Bigram(V)
    for seed in (0, 1):
        sequences = rows([6, 1, 4, 2, 2], [3, 1, 2, 3, 1], seed=seed)
        sequence_divergences(
            student, params[0], teacher, params[1], sequences, batch_size=2
        )
    assert (student.traces, teacher.traces) == (1, 1)


def test_decoder_divergences_match_its_logits(params):
    config = DecoderConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_length=16,
    )
    model = Decoder(config)
    generator = np.random.default_rng(1)
    weights = jax.tree.map(  # cheaper than compiling `init`
        lambda x: generator.normal(0, 0.5, x.shape).astype(x.dtype),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    table = log_softmax(params[1]["table"])
    sequences = rows([6, 1, 4], [3, 1, 2])
    sequences = dataclasses.replace(
        sequences, tokens=np.where(sequences.token_mask, sequences.tokens, 0)
    )
    found = sequence_divergences(
        model, weights, TEACHER, params[1], sequences, batch_size=2
    )
    logits = jax.jit(model.logits)
    for row in range(3):
        columns = np.flatnonzero(sequences.token_mask[row])
        tokens = sequences.tokens[row : row + 1, columns]
        # Right-padding alone cannot reach earlier columns, so one shape serves all.
        tokens = np.pad(tokens, ((0, 0), (0, 9 - len(columns))))
        length = sequences.response_mask[row].sum()
        window = slice(len(columns) - length - 1, len(columns) - 1)
        q = log_softmax(logits(weights, tokens))[0, window]
        p = table[tokens[0, window]]
        reverse, forward = (np.exp(q) * (q - p)).sum(), (np.exp(p) * (p - q)).sum()
        assert found.reverse_kl.totals[row] == pytest.approx(reverse, rel=1e-4)
        assert found.forward_kl.totals[row] == pytest.approx(forward, rel=1e-4)


def test_bad_input_is_named(params):
    sequences = rows([2, 3], [1, 2])
    shorter = rows([2, 2], [1, 2])
    moved = dataclasses.replace(
        sequences, tokens=np.where(sequences.token_mask, (sequences.tokens + 1) % V, 0)
    )
    empty = jax.tree.map(lambda x: x[:0], sequences)

    def divergences(rows=sequences, teacher_rows=None, teacher=TEACHER, **options):
        return sequence_divergences(
            STUDENT, params[0], teacher, params[1], rows, teacher_rows, **options
        )

    for call, message in (
        (lambda: divergences(temperature=0.0), "temperature must be positive"),
        (lambda: divergences(batch_size=0), "batch_size must be at least 1"),
        (
            lambda: divergences(teacher=Bigram(7)),
            "5 logits, the teacher 7.*align_vocab",
        ),
        (lambda: divergences(teacher_rows=shorter), "mask different responses"),
        (lambda: divergences(teacher_rows=moved), "hold different responses"),
        (lambda: divergences(rows=empty), "no sequence to evaluate"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
