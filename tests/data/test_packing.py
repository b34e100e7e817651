"""Packed rows: every token once, and segments that touch nowhere."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd_jax.data.inspection import check_end_of_turn, describe_batch
from rkd_jax.data.packing import (
    collate_packed,
    first_fit_decreasing,
    pack,
    packed_length,
    padding_waste,
    unpack,
    unpacked,
)
from rkd_jax.data.pipeline import make_batches
from rkd_jax.data.records import DemonstrationRecord
from rkd_jax.data.tokenize import TokenizeConfig, Tokenized, tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONFIG = TokenizeConfig(4, 12)
RECORDS = [
    DemonstrationRecord("p" * (1 + i % 5), "r" * (1 + i * 7 % 11)) for i in range(23)
]


# The layout


@given(st.lists(st.integers(1, 12)), st.integers(12, 30))
def test_first_fit_decreasing_keeps_every_item_and_every_limit(lengths, capacity):
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(i for numbers in bins for i in numbers) == list(range(len(lengths)))
    full = [sum(lengths[i] for i in numbers) for numbers in bins]
    assert all(0 < total <= capacity for total in full)
    # The first item of a bin had room in none that was opened before.
    for later in range(1, len(bins)):
        largest = max(lengths[i] for i in bins[later])
        assert all(
            sum(n for n in (lengths[i] for i in numbers) if n >= largest) + largest
            > capacity
            for numbers in bins[:later]
        )


def test_first_fit_decreasing_by_hand():
    # 7 | 6 | 5 goes to neither, 4 to none, 3 into the first, ...
    assert first_fit_decreasing([3, 7, 2, 6, 5, 4], 10) == [[0, 1], [3, 5], [2, 4]]
    assert first_fit_decreasing([5, 5, 5], 5) == [[0], [1], [2]]
    assert first_fit_decreasing([], 5) == []
    with pytest.raises(ValueError, match="an item of 6 exceeds the capacity 5"):
        first_fit_decreasing([1, 6], 5)


def test_a_packed_row_by_hand():
    rows = [
        Tokenized(4, [7, 8], [9], ([5, 2],)),
        Tokenized(6, [3], [11, 12, 13], ([6],)),
    ]
    batch = collate_packed([rows, []], row_length=9)
    for sequences, tokens, segments in (
        (batch.sequences, [7, 8, 5, 2, 0, 0, 3, 6, 0], [1, 1, 1, 1, 0, 0, 2, 2, 0]),
        (
            batch.teacher_sequences,
            [0, 9, 5, 2, 11, 12, 13, 6, 0],
            [0, 1, 1, 1, 2, 2, 2, 2, 0],
        ),
    ):
        np.testing.assert_array_equal(sequences.tokens, [tokens, [0] * 9])
        np.testing.assert_array_equal(sequences.segment_ids, [segments, [0] * 9])
        np.testing.assert_array_equal(sequences.token_mask, sequences.segment_ids > 0)
        np.testing.assert_array_equal(
            sequences.response_mask, [[0, 1, 1, 0, 0, 0, 1, 0], [0] * 8]
        )
        assert sequences.prompt_width == 1
    np.testing.assert_array_equal(batch.index, [[4, 6, -1, -1], [-1] * 4])


def test_a_packed_pair_by_hand():
    row = Tokenized(3, [7], [7], ([5, 2], [6]), rewards=(0.5, -1.0), label=0.75)
    batch = collate_packed([[row, row]], row_length=12)
    np.testing.assert_array_equal(
        batch.sequences.tokens, [[7, 5, 2, 7, 6, 7, 5, 2, 7, 6, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.sequences.segment_ids, [[1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 0, 0]]
    )
    np.testing.assert_array_equal(batch.index, [[3, 3, -1]])
    np.testing.assert_array_equal(batch.label, np.float32([[0.75, 0.75, 1.0]]))
    np.testing.assert_array_equal(
        batch.rewards, np.float32([[[0.5, -1.0], [0.5, -1.0], [math.nan] * 2]])
    )


tokens = st.lists(st.integers(0, 40), min_size=1, max_size=9)


@st.composite
def tokenized(draw, members):
    """Records of any lengths; half of the teachers read another prompt."""
    rows = []
    for index in range(draw(st.integers(1, 12))):
        prompt = draw(tokens)
        teacher = draw(tokens) if draw(st.booleans()) else prompt
        responses = tuple(draw(tokens) for _ in range(members))
        extra = {"label": 0.25, "rewards": (1.0, -0.5)} if members == 2 else {}
        rows.append(Tokenized(index, prompt, teacher, responses, **extra))
    return rows


@pytest.mark.parametrize("members", [1, 2])
@given(data=st.data(), spare=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_invariants_of_any_packed_batch(members, data, spare):
    rows = data.draw(tokenized(members))
    row_length = max(map(packed_length, rows)) + spare  # at 0 a row is exactly full
    bins = pack(rows, row_length)
    batch = collate_packed(bins, row_length)
    in_order = [row for records in bins for row in records]
    assert sorted(row.index for row in in_order) == list(range(len(rows)))
    found = unpack(batch)
    for row, again in zip(in_order, found, strict=True):
        assert again.responses == row.responses
        assert (again.prompt, again.teacher_prompt) == (row.prompt, row.teacher_prompt)
        assert (again.index, again.label) == (row.index, row.label)
    if members == 2:
        assert all(row.rewards == (1.0, -0.5) for row in found)
    targets = sum(len(r) for row in rows for r in row.responses)
    for view, prompt_of in (
        (batch.sequences, lambda row: row.prompt),
        (batch.teacher_sequences, lambda row: row.teacher_prompt),
    ):
        prompts = members * sum(len(prompt_of(row)) for row in rows)
        assert view.token_mask.sum() == targets + prompts
        assert view.response_mask.sum() == targets
        np.testing.assert_array_equal(view.token_mask, view.segment_ids > 0)
        for ids, mask in zip(view.segment_ids, view.response_mask, strict=True):
            seen = ids[ids > 0]
            # Ascending from 1 without a gap, and the columns of each side by side.
            assert (np.diff(seen) >= 0).all()
            assert sorted(set(seen.tolist())) == list(range(1, max(ids) + 1))
            for segment in set(seen.tolist()):
                columns = np.flatnonzero(ids == segment)
                assert columns[-1] - columns[0] + 1 == len(columns)
            # A target's state before it belongs to the same segment.
            t = np.flatnonzero(mask)
            np.testing.assert_array_equal(ids[t], ids[t + 1])
    same = batch.sequences.response_mask
    np.testing.assert_array_equal(batch.teacher_sequences.response_mask, same)
    np.testing.assert_array_equal(
        batch.teacher_sequences.targets[same], batch.sequences.targets[same]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Tokenized(7, [1] * 5, [1], ([2] * 4,)), "record 7 is longer .* 9 columns .*8"),
        (Tokenized(7, [1], [1] * 5, ([2] * 4,)), "record 7 is longer than a row"),
        (Tokenized(7, [1, 1], [1], ([2], [2] * 4)), "9 columns for both members"),
        (Tokenized(7, [1], [1], ()), "record 7 is a prompt without a response"),
        (Tokenized(7, [], [1], ([2],)), "record 7 has an empty prompt or response"),
        (Tokenized(7, [1], [1], ([2], [])), "record 7 has an empty prompt or response"),
    ],
)
def test_records_that_cannot_be_packed_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        pack([row], row_length=8)
    with pytest.raises(ValueError, match=message):
        collate_packed([[row]], row_length=8)


def test_rows_that_cannot_be_are_refused():
    one, two = Tokenized(0, [1], [1], ([2],)), Tokenized(1, [1], [1], ([2], [3]))
    for bins in ([[one, two]], [[one], [two]], [[]], []):
        with pytest.raises(ValueError, match="of one kind"):
            collate_packed(bins, row_length=8)
    with pytest.raises(ValueError, match="row 0 holds 10 tokens, row_length is 8"):
        collate_packed([[one] * 5], row_length=8)


def test_packed_rows_have_no_prompt_columns():
    batch = collate_packed([[Tokenized(0, [1], [1], ([2],))]], row_length=8)
    with pytest.raises(ValueError, match="several prompts each"):
        _ = batch.sequences.prompts


def test_a_packed_batch_can_be_looked_at():
    rows = [
        tokenize_record(DemonstrationRecord(prompt, response), TOKENIZER, CONFIG, i)
        for i, (prompt, response) in enumerate([("hi", "yes"), ("a", "no!!")])
    ]
    batch = collate_packed([[rows[1]], [rows[0]]], row_length=16)
    check_end_of_turn(TOKENIZER, batch)
    first, second = (describe_batch(TOKENIZER, batch, i) for i in range(2))
    assert first.startswith("record 1, student: 1 prompt tokens of 2, 5 targets of 5")
    assert "hi⟦yes" in second
    plain = make_batches(RECORDS, TOKENIZER, CONFIG, batch_size=2, seed=0)
    padded = next(plain)
    assert unpacked(padded) is padded
    cut = Tokenized(5, [1], [1], ([TOKENIZER.eos_id, 3],))
    with pytest.raises(ValueError, match="record 5: EOS stands inside"):
        check_end_of_turn(TOKENIZER, collate_packed([[cut]], row_length=8))


def test_padding_waste_by_hand():
    rows = [Tokenized(i, [7] * 2, [7] * 2, ([5] * n,)) for i, n in enumerate([6, 2])]
    packed = collate_packed([rows], row_length=16)
    assert padding_waste([packed]) == (12, 16, 1)
    assert padding_waste([packed]).waste == 0.25
    wider = collate_packed([rows], row_length=20)
    assert padding_waste([packed, wider, packed]) == (36, 52, 2)
    assert padding_waste([]).waste == 0.0
