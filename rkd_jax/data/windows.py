"""Batches with little padding: packed rows, or rows of similar length.

Both look at a window of records at a time, tokenize it, and decide which records go
together. grain keeps the position, a window and a place in it; resuming prepares that
window again. As in `rkd_jax.data.pipeline`, the order depends on seed, settings and
data alone: every process prepares the same windows, and takes its block of each batch.

grain's own packing (`grain.experimental.FirstFitPackIterDataset`) is not used: it fills
rows in the order in which records come, with the records of one process, so that rows
would depend on the number of processes; and it knows neither pairs that must share a
row nor two prompts that must end in the same column.

>>> from rkd_jax.data.records import DemonstrationRecord
>>> from rkd_jax.data.tokenizer import byte_tokenizer
>>> records = [DemonstrationRecord("p", "r" * (1 + i)) for i in range(6)]
>>> config = TokenizeConfig(max_prompt=4, max_response=12)
>>> sizes = {"row_length": 16, "batch_size": 2}
>>> packed = make_packed_batches(
...     records, byte_tokenizer(), config, **sizes, seed=0, epochs=1)
>>> [sorted(i for i in batch.index.ravel().tolist() if i >= 0) for batch in packed]
[[0, 4, 5], [1, 2, 3]]
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grain
import jax
import numpy as np

from rkd_jax.data.collate import batch_widths, collate
from rkd_jax.data.packing import collate_packed, pack
from rkd_jax.data.pipeline import (
    BatchIterator,
    Shard,
    Step,
    check_remainder,
    check_sizes,
    my_rows,
    order_of,
    read,
    record_numbers,
    tokenize_numbers,
)
from rkd_jax.data.records import Record
from rkd_jax.data.tokenize import TokenizeConfig, Tokenized

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer


def make_packed_batches(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: TokenizeConfig,
    *,
    row_length: int,
    batch_size: int,
    seed: int,
    window: int = 1024,
    shuffle: bool = True,
    epochs: int | None = None,
    shard: Shard = (0, 1),
    num_threads: int = 0,
) -> BatchIterator:
    """Batches of packed rows (`rkd_jax.data.packing`), all of one shape.

    A step sees more records the shorter they are, so compare runs by records or tokens,
    not by steps.

    Args:
        records: any sequence; a window is fetched and tokenized when it is due. One
            kind of record per pipeline, with responses.
        tokenizer: of the records.
        config: its limits hold as ever; its buckets play no part.
        row_length: L, columns of a row; at most the model's context. A pair needs room
            for both members: ``2 * (max_prompt + max_response)`` is always enough.
        batch_size: rows of the *global* batch, of which this process gets its shard.
        seed: in [0, 2**32); every epoch has its own permutation.
        window: records that are packed together, an epoch being cut into windows of
            about equal size, at most this. More leave less padding, up to a point, and
            take longer to prepare.
        shuffle: False takes windows in the order of ``records``, and of the rows of a
            window those first whose first record comes first.
        epochs: None repeats for ever. No row holds records of two epochs; batches run
            across the end of one. The last batch of all is filled with empty rows, so
            that no record is left out.
        shard: as `make_batches`. Every process tokenizes all windows, since what shares
            a row depends on all lengths.
        num_threads: 0 prepares a window when it is asked for; more prepare ahead, with
            the same result.

    Returns:
        Iterator of `DemonstrationBatch` or `PackedPreferenceBatch`.

    Raises:
        ValueError: no records, sizes that do not divide, a bad shard; when met, a
        record that is longer than a row (the message names it) or has no response.
    """
    check_sizes(len(records), batch_size, epochs, shard)
    if row_length < 2 or window < 1:
        raise ValueError(
            f"row_length {row_length} and window {window}: a row holds at least 2 "
            "columns, a window at least 1 record"
        )
    windows = math.ceil(len(records) / window)
    size = math.ceil(len(records) / windows)
    rows = (
        record_numbers(len(records), seed if shuffle else None)
        # An epoch is cut before it is repeated, so that no window holds two.
        .batch(size, batch_fn=np.array)
        .repeat(epochs)
        .random_map(
            _PackWindow(records, tokenizer, config, row_length, shuffle), seed=seed
        )
    )
    steps = _flat(read(rows, num_threads)).batch(
        batch_size, batch_fn=_CollateRows(row_length, batch_size, shard)
    )
    order = order_of(
        records,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        tokens=_fingerprint(tokenizer, config),
        row_length=row_length,
        window=window,
    )
    return BatchIterator(steps, order, None)


def make_bucketed_batches(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: TokenizeConfig,
    *,
    batch_size: int,
    seed: int,
    window_batches: int = 32,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    shard: Shard = (0, 1),
    num_threads: int = 0,
) -> BatchIterator:
    """As `make_batches`, but records of similar length share a batch.

    The records of a window are sorted by the buckets they need and cut into batches,
    which come in random order. So most batches are as narrow as their records; a batch
    still has exactly ``batch_size`` of them, and any objective can read it.

    Args:
        records, tokenizer, batch_size, seed, epochs: as `make_batches`.
        config: with several buckets, or all batches are equally wide. Every combination
            of widths that occurs is compiled once.
        window_batches: batches whose records are sorted together. The more, the less
            padding, and the further from a uniform draw a batch is.
        shuffle: False takes windows, and batches of a window, in order.
        drop_remainder: leave out the rows behind the last full batch of the last epoch;
            False gives them as a shorter batch, the last one.
        shard: as `make_batches`. Every process tokenizes all windows, since what shares
            a batch depends on all lengths.
        num_threads: as `make_packed_batches`.

    Raises:
        ValueError: as `make_batches`; a ``config`` with one width only.
    """
    check_sizes(len(records), batch_size, epochs, shard)
    check_remainder(len(records), batch_size, epochs, drop_remainder, shard[1])
    if len(config.prompt_widths) == len(config.response_widths) == 1:
        raise ValueError(
            "config has one width for all batches, so sorting by length saves nothing; "
            "give prompt_buckets or response_buckets"
        )
    if window_batches < 1:
        raise ValueError(f"window_batches is {window_batches}; at least 1 is needed")
    numbers = record_numbers(len(records), seed if shuffle else None).repeat(epochs)
    total = len(numbers) // batch_size
    if drop_remainder and epochs is not None:
        numbers = numbers[: total * batch_size]
    windows = numbers.batch(window_batches * batch_size, batch_fn=np.array).random_map(
        _SortWindow(records, tokenizer, config, batch_size, shuffle), seed=seed
    )
    steps = _flat(read(windows, num_threads)).map(_CollateGroup(config, shard))
    order = order_of(
        records,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        tokens=_fingerprint(tokenizer, config),
        window_batches=window_batches,
        # The last window is cut short, and sorted otherwise than the whole one.
        end=None if epochs is None else len(numbers),
    )
    short = not drop_remainder and len(numbers) % batch_size > 0
    return BatchIterator(steps, order, None if epochs is None else total + short)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Records that go together: into one packed row, or into one batch."""

    rows: list[Tokenized]


@dataclasses.dataclass(frozen=True, repr=False)
class _PackWindow:
    """The record numbers of a window -> the packed rows they make."""

    records: Sequence[Record]
    tokenizer: Tokenizer
    config: TokenizeConfig
    row_length: int
    shuffle: bool

    def __call__(self, numbers: np.ndarray, rng: np.random.Generator) -> list[_Group]:
        rows = tokenize_numbers(numbers, self.records, self.tokenizer, self.config)
        packed = pack(rows, self.row_length)
        if self.shuffle:
            # First-fit decreasing puts the longest records into the first rows.
            return [_Group(packed[i]) for i in rng.permutation(len(packed))]
        place = {row.index: i for i, row in enumerate(rows)}
        packed.sort(key=lambda records: place[records[0].index])
        return [_Group(records) for records in packed]


@dataclasses.dataclass(frozen=True, repr=False)
class _SortWindow:
    """The record numbers of a window -> batches of records with like widths."""

    records: Sequence[Record]
    tokenizer: Tokenizer
    config: TokenizeConfig
    batch_size: int
    shuffle: bool

    def __call__(self, numbers: np.ndarray, rng: np.random.Generator) -> list[_Group]:
        rows = tokenize_numbers(numbers, self.records, self.tokenizer, self.config)
        # By bucket, not by length: within a bucket the order stays random.
        rows.sort(key=self._place)
        starts = range(0, len(rows), self.batch_size)
        groups = [_Group(rows[i : i + self.batch_size]) for i in starts]
        full = len(rows) // self.batch_size
        if self.shuffle:
            order = [*rng.permutation(full), *range(full, len(groups))]
            groups = [groups[i] for i in order]
        return groups

    def _place(self, row: Tokenized) -> tuple[int, ...]:
        widths = batch_widths([row], self.config)
        # Prompts ascend in one bucket of responses and descend in the next, so that a
        # batch across the border of two holds prompts of about one length.
        turn = -1 if self.config.response_widths.index(widths.response) % 2 else 1
        return widths.response, turn * widths.prompt, turn * widths.teacher_prompt


@dataclasses.dataclass(frozen=True, repr=False)
class _CollateRows:
    """Packed rows of a global batch -> this process's rows."""

    row_length: int
    batch_size: int
    shard: Shard

    def __call__(self, groups: Sequence[_Group]) -> Step:
        bins = [group.rows for group in groups]
        bins += [[]] * (self.batch_size - len(bins))
        batch = collate_packed(bins, self.row_length)
        mine = my_rows(self.batch_size, self.shard)
        rows = [row for i in mine for row in bins[i]]
        part = jax.tree.map(lambda leaf: leaf[mine], batch)
        return Step(part, rows, batch.index)


@dataclasses.dataclass(frozen=True, repr=False)
class _CollateGroup:
    """Records of a global batch -> this process's rows, as wide as all need."""

    config: TokenizeConfig
    shard: Shard

    def __call__(self, group: _Group) -> Step:
        rows = [group.rows[i] for i in my_rows(len(group.rows), self.shard)]
        widths = batch_widths(group.rows, self.config)
        index = np.array([row.index for row in group.rows], np.int32)
        return Step(collate(rows, self.config, widths), rows, index)


class _Each(grain.experimental.FlatMapTransform):
    """A window of groups -> its groups."""

    max_fan_out = 1 << 31  # of no meaning for a data set that is iterated

    def flat_map(self, element: list[_Group]) -> list[_Group]:
        return element


def _flat(windows: grain.IterDataset) -> grain.IterDataset:
    return grain.experimental.FlatMapIterDataset(windows, _Each())


def _fingerprint(tokenizer: Tokenizer, config: TokenizeConfig) -> str:
    """Tells apart what decides lengths, and so which records go together."""
    settings: dict[str, Any] = dataclasses.asdict(config)
    text = json.dumps([tokenizer.encoding_fingerprint(), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
