"""Several records in one row: how many fit, where they lie, and what padding is left.

A row of L columns holds whole records one behind another, prompts included, with
segment ids that attention, positions and losses respect (`rkd_jax.packed`).
Rows are filled by first-fit decreasing: the longest record first, each into the first
row that has room. Both members of a preference pair are one item, so that they share a
row and a batch may be cut between any two rows.

Where the teacher reads another prompt, both prompts get the columns of the longer one,
right-aligned, so that the responses lie in the same columns for both.

>>> from rkd_jax.data.tokenize import Tokenized
>>> long = Tokenized(4, [7, 8], [7, 8], ([5, 2],))
>>> short = Tokenized(9, [9], [9], ([2],))
>>> batch = collate_packed([[long, short]], row_length=7)
>>> batch.sequences.tokens.tolist(), batch.sequences.segment_ids.tolist()
([[7, 8, 5, 2, 9, 2, 0]], [[1, 1, 1, 1, 2, 2, 0]])
>>> batch.sequences.response_mask.astype(int).tolist(), batch.index.tolist()
([[0, 1, 1, 0, 1, 0]], [[4, 9, -1]])
>>> padding_waste([batch])
Padding(tokens=6, columns=7, shapes=1)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rkd_jax.data.collate import Batch, collate
from rkd_jax.data.tokenize import TokenizeConfig, Tokenized
from rkd_jax.packed import PackedPreferenceBatch
from rkd_jax.types import DemonstrationBatch, Sequences

PackedBatch = DemonstrationBatch | PackedPreferenceBatch


def packed_length(row: Tokenized) -> int:
    """Columns that a record takes in a packed row, all its responses together."""
    prompt = max(len(row.prompt), len(row.teacher_prompt))
    return sum(prompt + len(response) for response in row.responses)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the items in each bin; no bin is above its capacity.

    >>> first_fit_decreasing([3, 6, 4, 1, 2], capacity=8)
    [[1, 4], [0, 2, 3]]

    Args:
        lengths: of the items; of equal ones the earlier goes first.
        capacity: of every bin.

    Returns:
        Bins in the order in which they were opened, numbers ascending in each. They
        are at most 11/9 of the fewest possible, and 6/9 (Dosa, 2007).

    Raises:
        ValueError: an item exceeds the capacity.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"an item of {max(lengths)} exceeds the capacity {capacity}")
    free = np.full(len(lengths), capacity)
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # One bin per item is always enough, so there is a first that has room.
        place = int(np.argmax(free >= lengths[item]))
        if place == len(bins):
            bins.append([])
        bins[place].append(item)
        free[place] -= lengths[item]
    return [sorted(numbers) for numbers in bins]


def pack(rows: Sequence[Tokenized], row_length: int) -> list[list[Tokenized]]:
    """Which records share a row, by `first_fit_decreasing`.

    Args:
        rows: demonstrations or preferences; all are packed, none is cut.
        row_length: L, columns of a row.

    Returns:
        Records of each row, in the order in which they came.

    Raises:
        ValueError: a record that is longer than a row, or has no response.
    """
    lengths = [_checked_length(row, row_length) for row in rows]
    bins = first_fit_decreasing(lengths, row_length)
    return [[rows[i] for i in numbers] for numbers in bins]


def collate_packed(bins: Sequence[Sequence[Tokenized]], row_length: int) -> PackedBatch:
    """One batch of numpy arrays; the records' kind decides its type.

    Args:
        bins: records of each row, from `pack`. A row may be empty, not all of them.
        row_length: L.

    Returns:
        `DemonstrationBatch` of packed rows, or `PackedPreferenceBatch`. M, the width of
        its ``index``, depends on ``row_length`` alone: shapes are always the same.

    Raises:
        ValueError: no record, records of different kinds, or more than fit.
    """
    kinds = {len(row.responses) for records in bins for row in records}
    if len(kinds) != 1:
        raise ValueError(
            "packed rows need records, and of one kind, demonstrations or preferences; "
            f"these have {sorted(kinds)} responses"
        )
    members = kinds.pop()
    student, teacher = (_Rows(len(bins), row_length) for _ in range(2))
    # The shortest record has one token in its prompt and one in each response.
    most = row_length // (2 * members) if members else 0
    index = np.full((len(bins), most), -1, np.int32)
    label = np.ones((len(bins), most), np.float32)
    rewards = np.full((len(bins), most, 2), math.nan, np.float32)
    for b, records in enumerate(bins):
        total = sum(_checked_length(row, row_length) for row in records)
        if total > row_length:
            raise ValueError(
                f"row {b} holds {total} tokens, row_length is {row_length}; fill rows "
                "with pack"
            )
        end, segment = 0, 0
        for m, row in enumerate(records):
            index[b, m], label[b, m], rewards[b, m] = row.index, row.label, row.rewards
            for response in row.responses:
                segment += 1
                end += max(len(row.prompt), len(row.teacher_prompt)) + len(response)
                student.put(b, end, segment, row.prompt, response)
                teacher.put(b, end, segment, row.teacher_prompt, response)
    sequences, teacher_sequences = student.sequences(), teacher.sequences()
    if members == 1:
        return DemonstrationBatch(sequences, teacher_sequences, index)
    return PackedPreferenceBatch(sequences, teacher_sequences, label, rewards, index)


def is_packed(batch: Batch | PackedBatch) -> bool:
    """Whether rows of the batch hold several records."""
    sequences = getattr(batch, "sequences", None)
    return sequences is not None and sequences.segment_ids is not None


def unpack(batch: PackedBatch) -> list[Tokenized]:
    """The records of a packed batch in order of its rows: `collate_packed` undone.

    What truncation did to them (`Tokenized.events`) is not in a batch.

    >>> row = Tokenized(4, [7, 8], [6], ([5, 2],))
    >>> found = unpack(collate_packed([[row]], row_length=16))[0]
    >>> found.index, found.prompt, found.teacher_prompt, found.responses
    (4, [7, 8], [6], ([5, 2],))
    """
    pairs = isinstance(batch, PackedPreferenceBatch)
    members = 2 if pairs else 1
    records = []
    for b, m in np.argwhere(np.asarray(batch.index) >= 0).tolist():
        parts = [
            (_segment(batch.sequences, b, s), _segment(batch.teacher_sequences, b, s))
            for s in range(members * m + 1, members * (m + 1) + 1)
        ]
        extra = {}
        if pairs:
            rewards = tuple(float(reward) for reward in batch.rewards[b, m])
            extra = {"rewards": rewards, "label": float(batch.label[b, m])}
        (prompt, _), (teacher_prompt, _) = parts[0]
        responses = tuple(response for (_, response), _ in parts)
        index = int(batch.index[b, m])
        records.append(Tokenized(index, prompt, teacher_prompt, responses, **extra))
    return records


def unpacked(batch: Batch | PackedBatch) -> Batch:
    """The batch with a record per row, as narrow as they allow; itself if it has."""
    if not is_packed(batch):
        return batch
    rows = unpack(batch)
    config = TokenizeConfig(
        max_prompt=max(len(row.prompt) for row in rows),
        max_response=max(len(r) for row in rows for r in row.responses),
        max_teacher_prompt=max(len(row.teacher_prompt) for row in rows),
    )
    return collate(rows, config)


class Padding(NamedTuple):
    """How much of some batches is padding: the student's columns, all rows together.

    Example: ``Padding(tokens=6, columns=8, shapes=1).waste == 0.25``.
    """

    tokens: int  # columns that hold a token
    columns: int
    shapes: int  # different widths, each of which is compiled

    @property
    def waste(self) -> float:
        """The fraction of columns that hold none; 0 of nothing."""
        return 1.0 - self.tokens / self.columns if self.columns else 0.0


def padding_waste(batches: Iterable[Batch | PackedBatch]) -> Padding:
    """Tokens and columns of the student's sequences in ``batches``, added up.

    Args:
        batches: of demonstrations or preferences, packed or not.
    """
    tokens = columns = 0
    shapes = set()
    for batch in batches:
        sequences = batch.sequences
        tokens += int(np.sum(sequences.token_mask))
        columns += sequences.token_mask.size
        shapes.add((sequences.token_mask.shape, sequences.response_mask.shape))
    return Padding(tokens, columns, len(shapes))


class _Rows:
    """The arrays of `Sequences` while they are filled."""

    def __init__(self, rows: int, length: int):
        self.tokens = np.zeros((rows, length), np.int32)
        self.segment_ids = np.zeros((rows, length), np.int32)
        self.targets = np.zeros((rows, length), bool)

    def put(self, row: int, end: int, segment: int, prompt, response) -> None:
        """Prompt and response side by side, the last token in column ``end - 1``."""
        columns = slice(end - len(prompt) - len(response), end)
        self.tokens[row, columns] = [*prompt, *response]
        self.segment_ids[row, columns] = segment
        self.targets[row, end - len(response) : end] = True

    def sequences(self) -> Sequences:
        """P = 1: column 0 is no target, its token begins a prompt."""
        real = self.segment_ids > 0
        return Sequences(self.tokens, real, self.targets[:, 1:], self.segment_ids)


def _segment(sequences: Sequences, row: int, segment: int) -> tuple[list, list]:
    """Ids of prompt and response of one segment."""
    mine = np.asarray(sequences.segment_ids[row]) == segment
    ids = np.asarray(sequences.tokens[row])[mine]
    trained = np.concatenate([[False], sequences.response_mask[row]])[mine]
    return ids[~trained].tolist(), ids[trained].tolist()


def _checked_length(row: Tokenized, row_length: int) -> int:
    if not row.responses:
        raise ValueError(
            f"record {row.index} is a prompt without a response, and prompts are not "
            "packed; use make_batches"
        )
    if not all((row.prompt, row.teacher_prompt, *row.responses)):
        raise ValueError(
            f"record {row.index} has an empty prompt or response; every one needs a "
            "token, as tokenize_record gives it"
        )
    length = packed_length(row)
    if length > row_length:
        parts = "both members of a pair" if len(row.responses) == 2 else "it"
        raise ValueError(
            f"record {row.index} is longer than a row: {length} columns for {parts}, "
            f"row_length is {row_length}; raise row_length, or lower max_prompt or "
            "max_response"
        )
    return length
