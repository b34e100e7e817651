"""Batches in a fixed order that any process can resume, on top of grain.

grain shuffles and repeats record *numbers*; a step's numbers become a batch only when
it is asked for. So the order of records depends on seed, batch size and data alone, not
on the number of processes: each takes its blocks of every global batch, and the blocks
put together are the batch a single process would have had. A position is one integer,
and a run that was saved on four hosts may go on with two.

>>> from rkd_jax.data.records import DemonstrationRecord
>>> from rkd_jax.data.tokenize import TokenizeConfig
>>> from rkd_jax.data.tokenizer import byte_tokenizer
>>> records = [DemonstrationRecord(f"{i}", f"{i + 1}") for i in range(6)]
>>> config = TokenizeConfig(max_prompt=2, max_response=4)
>>> batches = make_batches(records, byte_tokenizer(), config, batch_size=2, seed=0)
>>> first = next(batches)
>>> saved = batches.get_state()
>>> second = next(batches)
>>> batches.set_state(saved)
>>> next(batches).index.tolist() == second.index.tolist()
True
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from rkd_jax.data.collate import Batch, Widths, batch_widths, collate
from rkd_jax.data.packing import PackedBatch
from rkd_jax.data.records import Record
from rkd_jax.data.tokenize import (
    TokenizeConfig,
    Tokenized,
    TokenizeReport,
    tokenize_record,
)

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer

Shard = tuple[int | tuple[int, ...], int]
"""(a block or several, of so many): a process's rows of every global batch."""

_DIGEST_RECORDS = 64


class BatchIterator(Iterator[Batch | PackedBatch]):
    """Batches of one kind of record; made by `make_batches` and its neighbours.

    Attributes:
        report: what truncation did to the rows handed out so far by this object.
        index: the last batch's ``index`` with the rows of all processes.
        num_batches: how many batches the whole run has; None when it never ends, or
            when packing decides it.
    """

    def __init__(
        self,
        steps: grain.IterDataset,
        order: Mapping[str, Any],
        num_batches: int | None,
    ):
        self._steps = steps
        self._iterator = iter(steps)
        self._order = dict(order)
        self.num_batches = num_batches
        self.report = TokenizeReport()
        self.index: np.ndarray | None = None

    def __next__(self) -> Batch | PackedBatch:
        step: Step = next(self._iterator)
        self.index = step.index
        for row in step.rows:
            self.report.add(row)
        return step.batch

    def get_state(self) -> dict[str, Any]:
        """The position and what it is a position in, as a JSON-able dict."""
        return {"order": dict(self._order), "iterator": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position; the next batch is the one that followed `get_state`.

        Raises:
            ValueError: the state belongs to other data, another seed or another batch
            size, where the position would mean different batches.
        """
        if not isinstance(state, Mapping) or set(state) != {"order", "iterator"}:
            raise ValueError(
                "not a state of BatchIterator; pass what get_state returned"
            )
        saved = state["order"]
        differing = [
            f"{name} was {saved.get(name)!r}, is {self._order.get(name)!r}"
            for name in sorted(saved.keys() | self._order.keys())
            if saved.get(name) != self._order.get(name)
        ]
        if differing:
            raise ValueError(
                f"the saved data position is of another run: {'; '.join(differing)}; "
                "restore these or start anew"
            )
        # grain's flat map, set to its end, would still hand out what it held before.
        self._iterator = iter(self._steps)
        self._iterator.set_state(dict(state["iterator"]))


class ZippedBatches(Iterator[dict[str, Batch]]):
    """Several iterators in step, e.g. for the min-max game; one state for all.

    Example: ``ZippedBatches({"demonstrations": a, "preferences": b})`` yields ``{
    "demonstrations": DemonstrationBatch, "preferences": PreferenceBatch}`` and ends
    with the shortest.
    """

    def __init__(self, parts: Mapping[str, BatchIterator]):
        if not parts:
            raise ValueError("nothing to zip; name at least one iterator")
        self.parts = dict(parts)

    def __next__(self) -> dict[str, Batch]:
        return {name: next(part) for name, part in self.parts.items()}

    @property
    def index(self) -> dict[str, np.ndarray | None]:
        """That of every part."""
        return {name: part.index for name, part in self.parts.items()}

    def get_state(self) -> dict[str, Any]:
        """The states of all parts by name, JSON-able."""
        return {name: part.get_state() for name, part in self.parts.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Set every part; ValueError, and nothing set, if the names differ."""
        if set(state) != set(self.parts):
            raise ValueError(
                f"the saved data position has parts {sorted(state)}, this run has "
                f"{sorted(self.parts)}"
            )
        for name, part in self.parts.items():
            try:
                part.set_state(state[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def make_batches(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: TokenizeConfig,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    shard: Shard = (0, 1),
    agree: Callable[[Widths], Widths] | None = None,
    num_threads: int = 0,
) -> BatchIterator:
    """Batches of ``records``, in an order that ``seed`` fixes.

    Args:
        records: any sequence; a record is fetched and tokenized when its batch is due.
            One kind of record per pipeline.
        batch_size: rows of the *global* batch, of which this process gets its shard.
        seed: in [0, 2**32); every epoch has its own permutation.
        shuffle: False keeps the order of ``records``.
        epochs: None repeats for ever. Batches run across the end of an epoch, so no
            record is left out in any epoch.
        drop_remainder: leave out the rows behind the last full batch of the last epoch;
            False gives them as a shorter batch.
        shard: ``(k, n)`` is the k-th of n equal blocks, ``((0, 3), n)`` two of them.
            For a mesh over several processes take `rkd_jax.sharding.mesh_shard`.
        agree: gets the widths that this process's rows need and returns those that all
            processes use. Called for every batch in `next`, if there are several
            buckets and rows that others read; devices that tell it have to finish what
            they are at. None: each process then tokenizes the whole global batch.
        num_threads: 0 prepares a batch when it is asked for; more prepare ahead, with
            the same result.

    Raises:
        ValueError: no or too few records, sizes that do not divide, a bad shard, or
            ``agree`` with threads, where processes would ask in different orders.
    """
    _, count = shard
    check_sizes(len(records), batch_size, epochs, shard)
    if agree is not None and num_threads:
        raise ValueError(
            "agree needs num_threads=0: processes have to ask in one order"
        )
    check_remainder(len(records), batch_size, epochs, drop_remainder, count)
    batches = (
        record_numbers(len(records), seed if shuffle else None)
        .repeat(epochs)
        .batch(batch_size, drop_remainder=drop_remainder, batch_fn=np.array)
        .map(_MakeBatch(records, tokenizer, config, shard, agree))
    )
    order = order_of(records, batch_size=batch_size, shuffle=shuffle, seed=seed)
    num_batches = None if epochs is None else len(batches)
    return BatchIterator(read(batches, num_threads), order, num_batches)


@dataclasses.dataclass(frozen=True)
class Step:
    """One batch on its way to a `BatchIterator`, and what its report counts."""

    batch: Batch | PackedBatch
    rows: list[Tokenized]  # of this process
    index: np.ndarray  # record numbers as in the batch, of all processes


def record_numbers(records: int, seed: int | None) -> grain.MapDataset:
    """Record numbers of one epoch, shuffled anew in each unless ``seed`` is None."""
    numbers = grain.MapDataset.range(records)
    return numbers if seed is None else numbers.shuffle(seed)


def read(dataset: grain.MapDataset, num_threads: int) -> grain.IterDataset:
    """The data set in order, prepared ahead by so many threads."""
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=2 * num_threads
    )
    return dataset.to_iter_dataset(options)


def order_of(records: Sequence[Record], **settings: Any) -> dict[str, Any]:
    """What a data position means nothing without: the data, and ``settings``."""
    return {"records": len(records), "digest": _digest(records), **settings}


def my_rows(rows: int, shard: Shard) -> np.ndarray:
    """Numbers of the rows of a global batch that one process takes, ascending."""
    blocks, count = _blocks(shard), shard[1]
    return np.arange(rows).reshape(count, -1)[sorted(blocks)].reshape(-1)


def _blocks(shard: Shard) -> tuple[int, ...]:
    return tuple(np.atleast_1d(np.asarray(shard[0], int)).tolist())


@dataclasses.dataclass(frozen=True, repr=False)
class _MakeBatch:
    """The numbers of a global batch -> this process's rows, padded."""

    records: Sequence[Record]
    tokenizer: Tokenizer
    config: TokenizeConfig
    shard: Shard
    agree: Callable[[Widths], Widths] | None

    def __call__(self, numbers: np.ndarray) -> Step:
        mine = my_rows(len(numbers), self.shard)
        # Processes that padded to different widths would compile different programs
        # and wait for each other for ever.
        alone = self.shard[1] == 1 or self._one_shape()
        if alone or self.agree:
            rows = self._tokenize(numbers[mine])
            widths = batch_widths(rows, self.config)
            if not alone:
                widths = self.agree(widths)
        else:
            everyone = self._tokenize(numbers)
            rows = [everyone[i] for i in mine]
            widths = batch_widths(everyone, self.config)
        index = numbers.astype(np.int32)
        return Step(collate(rows, self.config, widths), rows, index)

    def _one_shape(self) -> bool:
        config = self.config
        widths = (
            config.prompt_widths,
            config.teacher_prompt_widths,
            config.response_widths,
        )
        return all(len(choices) == 1 for choices in widths)

    def _tokenize(self, numbers: np.ndarray) -> list[Tokenized]:
        return tokenize_numbers(numbers, self.records, self.tokenizer, self.config)


def tokenize_numbers(
    numbers: np.ndarray,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: TokenizeConfig,
) -> list[Tokenized]:
    """`tokenize_record` of the records with these numbers."""
    return [tokenize_record(records[i], tokenizer, config, i) for i in numbers.tolist()]


def check_sizes(
    records: int, batch_size: int, epochs: int | None, shard: Shard
) -> None:
    """Raise ValueError for sizes that no pipeline can serve."""
    blocks, count = _blocks(shard), shard[1]
    if records == 0:
        raise ValueError("no records; check what the reader skipped")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}; give at least 1, or None for ever")
    if not blocks or len(set(blocks)) < len(blocks):
        raise ValueError(f"shard {shard}: name at least one block, and each once")
    if not all(0 <= index < count for index in blocks):
        raise ValueError(f"shard {shard}: the index lies in [0, {count})")
    if batch_size % count:
        raise ValueError(f"batch_size {batch_size} does not divide into {count} parts")


def check_remainder(
    records: int, batch_size: int, epochs: int | None, drop: bool, count: int
) -> None:
    """Raise ValueError where the last batch is none, or does not divide."""
    if batch_size > records and drop:
        raise ValueError(
            f"batch_size {batch_size} exceeds the {records} records; lower it or add "
            "records (drop_remainder=False allows one short batch)"
        )
    rest = 0 if epochs is None or drop else records * epochs % batch_size
    if rest % count:
        raise ValueError(
            f"the last batch of {rest} rows does not divide into {count} parts; "
            "set drop_remainder=True"
        )


def _digest(records: Sequence[Record]) -> str:
    """Tells data sets apart by evenly spaced records, cheap for any size."""
    step = max(1, len(records) // _DIGEST_RECORDS)
    digest = hashlib.sha256()
    for i in range(0, len(records), step):
        digest.update(json.dumps(records[i].to_json(), sort_keys=True).encode())
    return digest.hexdigest()[:16]
