"""Generation keeps order and shapes; text measures agree with counting by hand."""

import jax
import numpy as np
import pytest

from rkd_jax.evaluation.generation import (
    distinct_n,
    generate,
    repetition,
    with_prompts,
)
from rkd_jax.models.sampling import Samples, SamplingConfig, make_sampler
from rkd_jax.types import Prompts, Sequences
from tests.evaluation.bigram import Bigram

V, EOS = 6, 0


def prompts(*last_tokens, width=2):
    """One-token prompts, left-padded."""
    tokens = np.zeros((len(last_tokens), width), np.int32)
    tokens[:, -1] = last_tokens
    return Prompts(tokens, np.arange(width) + 0 * tokens == width - 1)


def countdown():
    """A bigram model that counts down to 0, deterministically."""
    return {"table": 50.0 * np.eye(V, dtype=np.float32)[[0, 0, 1, 2, 3, 4]]}


def echo(params, rows, rng):
    """A sampler whose only response token is the prompt's last."""
    del params, rng
    mask = np.ones((len(rows.tokens), 1, 1), bool)
    join = [(rows.tokens, rows.tokens[:, -1:]), (rows.mask, mask[:, 0])]
    tokens, token_mask = (np.concatenate(x, axis=1)[:, None] for x in join)
    sequences = Sequences(tokens, token_mask, mask)
    return Samples(sequences, mask * -0.5, mask * -0.5, ~mask[..., 0])


def decode(ids):
    return " ".join(map(str, ids))


def test_texts_keep_the_order_and_stop_before_eos():
    model = Bigram(V)
    config = SamplingConfig(max_new_tokens=4, eos_ids=(EOS,), samples_per_prompt=2)
    result = generate(
        make_sampler(model, config),
        countdown(),
        [prompts(5, 3, 2), prompts(1)],
        decode,
        jax.random.key(0),
    )
    expected = ("4 3 2 1", "2 1", "1", "")
    assert result.texts == tuple((text, text) for text in expected)
    assert result.flat_texts == [text for text in expected for _ in range(2)]
    # Lengths 4, 3, 2, 1: EOS counts, and the first response was cut off before it.
    assert result.mean_length.mean == 2.5
    assert result.mean_length.n == 4
    assert result.ended_share == 0.75
    assert result.samples.sequences.tokens.shape == (4, 2, 6)
    assert result.samples.log_probs.shape == (4, 2, 4)


def test_a_smaller_last_batch_compiles_nothing():
    model = Bigram(V)
    sample = make_sampler(model, SamplingConfig(max_new_tokens=3, eos_ids=(EOS,)))
    key = jax.random.key(0)
    generate(sample, countdown(), [prompts(1, 2, 3)], decode, key)
    before = model.traces
    batches = [prompts(1, 2, 3), prompts(4), prompts(5, 2)]
    result = generate(sample, countdown(), batches, decode, key)
    assert model.traces == before
    assert [group[0] for group in result.texts] == [
        "",
        "1",
        "2 1",
        "3 2 1",
        "4 3 2",
        "1",
    ]


def test_batches_get_different_keys_and_runs_repeat():
    model = Bigram(V)
    params = {"table": np.zeros((V, V), np.float32)}
    sample = make_sampler(model, SamplingConfig(max_new_tokens=12))
    batches = [prompts(1, 2), prompts(1, 2)]
    once, again = (
        generate(sample, params, batches, decode, jax.random.key(3)).texts
        for _ in range(2)
    )
    assert once == again
    assert len(set(once)) == 4


def test_prompts_of_other_widths_are_padded_on_the_left():
    batches = [prompts(2, 3), prompts(4, width=3)]
    result = generate(echo, None, batches, decode, jax.random.key(0))
    assert result.texts == (("2",), ("3",), ("4",))
    sequences = result.samples.sequences
    assert sequences.prompt_width == 3
    np.testing.assert_array_equal(sequences.prompts.tokens[:, 0, -1], [2, 3, 4])
    np.testing.assert_array_equal(
        sequences.prompts.mask.sum(axis=-1), np.ones((3, 1), int)
    )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no prompt batch"),
        ([prompts(1), prompts(1, 2)], "prompt batch 1 has 2 rows, the first has 1"),
        ([prompts(1, 2), prompts()], "prompt batch 1 has 0 rows"),
    ],
)
def test_bad_batches_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        generate(echo, None, batches, decode, jax.random.key(0))


def test_with_prompts_keeps_responses_and_masks():
    tokens = np.array([[[0, 7, 5, 2], [0, 7, 6, 9]]], np.int32)  # N=1, G=2, P=2, T=2
    mask = np.array([[[True, True], [True, False]]])
    token_mask = np.concatenate([np.array([[[False, True]] * 2]), mask], axis=-1)
    sequences = Sequences(tokens, token_mask, mask)
    other = Prompts(np.array([[1, 2, 3]], np.int32), np.ones((1, 3), bool))
    result = with_prompts(sequences, other)
    np.testing.assert_array_equal(result.tokens, [[[1, 2, 3, 5, 2], [1, 2, 3, 6, 9]]])
    np.testing.assert_array_equal(
        result.token_mask, [[[True] * 5, [True] * 4 + [False]]]
    )
    np.testing.assert_array_equal(result.targets, sequences.targets)
    same = with_prompts(sequences, Prompts(tokens[:, 0, :2], token_mask[:, 0, :2]))
    np.testing.assert_array_equal(same.tokens, tokens)
    with pytest.raises(ValueError, match="2 prompts for 1 rows"):
        with_prompts(sequences, jax.tree.map(lambda x: np.repeat(x, 2, 0), other))


def test_distinct_n_by_hand():
    texts = ["the cat the cat", "the dog"]
    assert distinct_n(texts, 1) == pytest.approx(3 / 6)
    assert distinct_n(texts, 2) == pytest.approx(3 / 4)  # the cat, cat the, the dog
    assert distinct_n(["a  b\nc"], 3) == 1.0
    assert np.isnan(distinct_n(["one", ""], 2))


def test_repetition_by_hand():
    assert repetition(["a b c d e f"]) == 0.0
    assert repetition(["a a a a a a a a"]) == pytest.approx(4 / 5)
    # a b a b a b a b: 4-grams abab, baba, abab, baba, abab; too short ones are skipped.
    assert repetition(["a b a b a b a b", "a b c", "a b c d"]) == pytest.approx(0.3)
    assert repetition(["x y x y x y"], n=2) == pytest.approx(3 / 5)
    assert np.isnan(repetition(["a b c"]))
