"""Where the records of a batch lie, packed or a row each, and what they consist of.

>>> from rkd_jax.data.packing import collate_packed
>>> from rkd_jax.data.tokenize import Tokenized
>>> records = [Tokenized(4, [7, 8], [7, 8], ([5, 2],)), Tokenized(9, [9], [9], ([2],))]
>>> batch = collate_packed([records], row_length=7)
>>> for number, responses in located(batch):
...     print(number, responses[0].place, responses[0].columns, responses[0].targets)
4 (0, 0) (0, slice(1, 3, None)) [5 2]
9 (0, 1) (0, slice(4, 5, None)) [2]
>>> response_shape(batch)
(1, 3)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from rkd_jax.packed import PackedPreferenceBatch
from rkd_jax.signals.cache_format import CacheMismatch
from rkd_jax.types import DemonstrationBatch, PreferenceBatch, Sequences

Batch = DemonstrationBatch | PreferenceBatch | PackedPreferenceBatch
"""What a cache can be asked about; demonstrations may be packed too."""


class Located(NamedTuple):
    """One response of a batch: where numbers about it go, and all that it consists of.

    Example: ``Located(place=(0, 1), columns=(0, slice(4, 5)), prompt=[9],
    teacher_prompt=[9], targets=[2])``, entry 1 of packed row 0.
    """

    place: tuple[int, ...]  # in an array of `response_shape`
    columns: tuple[int | slice, ...]  # of its targets, in one like ``response_mask``
    prompt: np.ndarray  # ids, without padding, as are the next two
    teacher_prompt: np.ndarray
    targets: np.ndarray


def response_shape(batch: Batch) -> tuple[int, ...]:
    """The shape of one number per response.

    ``[B]`` or ``[B, 2]``; of packed rows ``[B, M]`` or ``[B, M, 2]``.
    """
    if batch.sequences.segment_ids is None:
        return np.shape(batch.sequences.response_mask)[:-1]
    pair = (2,) if isinstance(batch, PackedPreferenceBatch) else ()
    return (*np.shape(batch.index), *pair)


def located(batch: Batch) -> list[tuple[int, list[Located]]]:
    """Number and responses of every record of a batch.

    Args:
        batch: of either layout. Entries of a packed row's ``index`` that are negative
            name no record.

    Returns:
        In the order of the rows, and of the entries of a packed row.

    Raises:
        CacheMismatch: of packed rows, a segment that is not a prompt with a response
            behind it, which names the record; or targets that belong to no record.
        ValueError: packed rows whose ``index`` is not ``[B, M]``, or whose teacher's
            rows are not packed.
    """
    if batch.sequences.segment_ids is None:
        return list(_rows(batch))
    return list(_entries(batch))


def _rows(batch: Batch) -> Iterator[tuple[int, list[Located]]]:
    """Of rows that hold one record."""
    mask = np.asarray(batch.sequences.response_mask)
    members = [()] if mask.ndim == 2 else [(n,) for n in range(mask.shape[1])]
    student, teacher = map(_unpadded, (batch.sequences, batch.teacher_sequences))
    for row, number in enumerate(np.asarray(batch.index).tolist()):
        responses = []
        for at in ((row, *member) for member in members):
            (prompt, targets), (teacher_prompt, _) = student(at), teacher(at)
            columns = (*at, slice(len(targets)))
            responses.append(Located(at, columns, prompt, teacher_prompt, targets))
        yield number, responses


def _unpadded(
    sequences: Sequences,
) -> Callable[[tuple[int, ...]], tuple[np.ndarray, np.ndarray]]:
    """Prompt and targets of any row, without padding."""
    width, tokens = sequences.prompt_width, np.asarray(sequences.tokens)
    mask = np.asarray(sequences.token_mask)
    target_mask = np.asarray(sequences.response_mask)

    def row(at: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        prompt = tokens[at][:width][mask[at][:width]]
        return prompt, tokens[at][width:][target_mask[at]]

    return row


def _entries(batch: Batch) -> Iterator[tuple[int, list[Located]]]:
    """Of packed rows."""
    index = np.asarray(batch.index)
    mask = np.asarray(batch.sequences.response_mask)
    if (index.ndim, mask.ndim) != (2, 2) or batch.teacher_sequences.segment_ids is None:
        raise ValueError(
            "packed rows have an index [B, M] of what each segment is, and rows of the "
            "teacher that are packed alike; make them with make_packed_batches"
        )
    pairs = isinstance(batch, PackedPreferenceBatch)
    members = 2 if pairs else 1
    _check_all_named(batch.sequences, index, members)
    student, teacher = map(_segments, (batch.sequences, batch.teacher_sequences))
    for row, entry in np.argwhere(index >= 0).tolist():
        number, responses = int(index[row, entry]), []
        for n in range(members):
            segment = members * entry + n + 1
            start, prompt, targets = student(number, row, segment)
            _, teacher_prompt, _ = teacher(number, row, segment)
            place = (row, entry, n) if pairs else (row, entry)
            columns = (row, slice(start, start + len(targets)))
            responses.append(Located(place, columns, prompt, teacher_prompt, targets))
        yield number, responses


def _segments(
    sequences: Sequences,
) -> Callable[[int, int, int], tuple[int, np.ndarray, np.ndarray]]:
    """First target's position, prompt and targets of a record's segment in a row."""
    width, tokens = sequences.prompt_width, np.asarray(sequences.tokens)
    segment_ids = np.asarray(sequences.segment_ids)
    target_mask = np.asarray(sequences.response_mask)

    def segment(
        number: int, row: int, wanted: int
    ) -> tuple[int, np.ndarray, np.ndarray]:
        mine = segment_ids[row] == wanted
        columns = np.flatnonzero(mine)
        trained = np.flatnonzero(target_mask[row] & mine[width:])
        # Ids are compared as a prompt and targets, so their order must be that.
        if not len(trained) or not np.array_equal(
            columns, np.arange(columns[0], width + trained[0] + len(trained))
        ):
            raise CacheMismatch(
                f"record {number}: segment {wanted} of row {row}, where the index puts "
                "it, is not a prompt with a response right behind it"
            )
        ids = tokens[row, columns]
        return int(trained[0]), ids[: -len(trained)], ids[-len(trained) :]

    return segment


def _check_all_named(sequences: Sequences, index: np.ndarray, members: int) -> None:
    """Raise CacheMismatch for a target that belongs to no record of ``index``."""
    rows, columns = np.nonzero(np.asarray(sequences.response_mask))
    ids = np.asarray(sequences.segment_ids)[:, sequences.prompt_width :]
    segments = ids[rows, columns]
    # Padding (segment 0) and what is beyond the index come to one more entry, at -1.
    entries = np.minimum((segments - 1) // members, index.shape[1])
    named = np.pad(index, [(0, 0), (0, 1)], constant_values=-1)[rows, entries] >= 0
    if not named.all():
        first = np.argmin(named)
        raise CacheMismatch(
            f"row {rows[first]} has targets in segment {segments[first]}, where its "
            "index names no record"
        )
