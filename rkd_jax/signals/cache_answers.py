"""What models and oracle say of a cache's records, a batch at a time, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rkd_jax.data.collate import collate
from rkd_jax.data.records import PreferenceRecord, Record
from rkd_jax.data.tokenize import TokenizeConfig, Tokenized
from rkd_jax.placement import fill_rows, follow_parameters
from rkd_jax.sharding import mesh_of, row_shards
from rkd_jax.signals.cache_codec import Topk
from rkd_jax.signals.cache_format import (
    REFERENCE,
    REWARD,
    SHAPING,
    CachedRecord,
    CachedResponse,
    CacheError,
    CacheSettings,
    fingerprint,
    pack_record,
    pack_skipped,
)
from rkd_jax.signals.cache_scores import make_teacher_scores
from rkd_jax.signals.cache_sources import Source
from rkd_jax.signals.oracles import Oracle, score
from rkd_jax.signals.teacher import make_sequence_scorer
from rkd_jax.types import Params, Sequences

_CHECK = "check the weights and the dtype it is computed in"

Row = Tokenized | str  # or why there is none


class Answered(NamedTuple):
    """Records that follow one another, skipped ones among them."""

    payloads: list[bytes]
    tokens: int  # targets


class Answers:
    """Asks for the settings' numbers.

    Args:
        records: the data set.
        rows: how a record became ids.
        settings: what to keep.
        batch_size: records per forward pass, filled up to divide over the devices that
            parameters are on.
        teacher: None if nothing is read of it.
        reference: None if nothing is read of it, or what it says is known.
        oracle: None if there are no rewards.
    """

    def __init__(
        self,
        records: Sequence[Record],
        rows: TokenizeConfig,
        settings: CacheSettings,
        *,
        batch_size: int,
        teacher: Source | None = None,
        reference: Source | None = None,
        oracle: Oracle | None = None,
    ):
        self._records, self._rows, self._settings = records, rows, settings
        self._oracle, self._batch_size = oracle, batch_size
        self._teacher = self._reference = None
        if teacher is not None:
            self._teacher = _asking(
                make_teacher_scores(teacher.model, settings), teacher.params
            )
        if reference is not None:
            scorer = make_sequence_scorer(
                reference.model, temperature=settings.temperature
            )
            self._reference = _asking(scorer, reference.params)

    def of(
        self, rows: Sequence[Row], known: Mapping[int, CachedRecord] | None = None
    ) -> Iterator[Answered]:
        """The bytes of rows, in their order.

        The models are at work on the next batch when one is given. The oracle is asked
        only then: whoever keeps each batch at once has kept every answer but the last.

        Args:
            rows: those of a shard, or of its end from where a batch of it begins.
            known: by number, what the reference said of them, if it was asked before.

        Raises:
            CacheError: what is said is no distribution.
            OracleError: see `rkd_jax.signals.oracles.score`.
        """
        before = None
        for batch in _cut(rows, self._batch_size):
            good = [row for row in batch if isinstance(row, Tokenized)]
            found = self._ask_models(good)
            if known is not None:
                found[REFERENCE] = _said_before(known, good)
            if before is not None:
                yield self._packed(*before)
            before = batch, good, found | self._ask_oracle(good)
        if before is not None:
            yield self._packed(*before)

    def _ask_models(self, rows: Sequence[Tokenized]) -> dict[str, Any]:
        """What they say of each response; ``batch_size`` rows are seen."""
        found: dict[str, Any] = {}
        if not rows or (self._teacher is None and self._reference is None):
            return found
        padding = [rows[-1]] * (self._batch_size - len(rows))
        batch = collate([*rows, *padding], self._rows)
        if self._teacher is not None:
            scores = self._teacher(batch.teacher_sequences)
            found |= {"topk": scores.topk, SHAPING: scores.shaping}
        if self._reference is not None:
            found[REFERENCE] = self._reference(batch.sequences)
        return found

    def _ask_oracle(self, rows: Sequence[Tokenized]) -> dict[str, Any]:
        if not rows or self._oracle is None:
            return {}
        records = [self._records[row.index] for row in rows]
        texts = [(r.prompt, text) for r in records for text in _responses(r)]
        prompts, responses = map(list, zip(*texts, strict=True))
        return {REWARD: score(self._oracle, prompts, responses)}

    def _packed(
        self, batch: Sequence[Row], good: Sequence[Tokenized], found: dict[str, Any]
    ) -> Answered:
        packed = self._pack(good, found)
        payloads = [
            pack_skipped(row) if isinstance(row, str) else packed[row.index]
            for row in batch
        ]
        tokens = sum(len(targets) for row in good for targets in row.responses)
        return Answered(payloads, tokens)

    def _pack(
        self, rows: Sequence[Tokenized], found: dict[str, Any]
    ) -> dict[int, bytes]:
        """The bytes of each row's record, by its number."""
        found = jax.tree.map(np.asarray, found)
        position, packed = 0, {}
        for row in rows:
            responses = []
            for targets in row.responses:
                responses.append(self._response(row, targets, found, position))
                position += 1
            try:
                packed[row.index] = pack_record(
                    CachedRecord(tuple(responses)), self._settings
                )
            except ValueError as error:
                raise CacheError(f"record {row.index}: {error}; {_CHECK}") from error
        return packed

    def _response(
        self, row: Tokenized, targets: list[int], found: dict[str, Any], position: int
    ) -> CachedResponse:
        digest, checks = fingerprint(row.prompt, row.teacher_prompt, targets)
        values = {
            name: float(np.float32(found[name][position]))
            for name in self._settings.value_names
        }
        if not np.all(np.isfinite(list(values.values()))):
            raise CacheError(f"record {row.index}: {values}; {_CHECK}")
        topk = None
        if self._settings.top_k is not None:
            topk = Topk(*(part[position, : len(targets)] for part in found["topk"]))
        return CachedResponse(digest, len(targets), values, checks, topk)


def _cut(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Pieces with ``size`` rows that can be used, the last one with what is left."""
    batch, good = [], 0
    for row in rows:
        batch.append(row)
        good += isinstance(row, Tokenized)
        if good == size:
            yield batch
            batch, good = [], 0
    if batch:
        yield batch


def _said_before(
    known: Mapping[int, CachedRecord], rows: Sequence[Tokenized]
) -> np.ndarray:
    responses = (response for row in rows for response in known[row.index].responses)
    return np.array([response.values[REFERENCE] for response in responses], np.float32)


def _asking(
    scores: Callable[[Params, Sequences], Any], params: Params
) -> Callable[[Sequences], Any]:
    """What is said of rows of responses, whether or not they come in pairs.

    Rows that do not divide over the devices are filled up: of what is said of more rows
    nobody reads the end, where `follow_parameters` would wait for it, to cut it off.
    """
    follow, parts = follow_parameters(scores), row_shards(mesh_of(params))

    def ask(sequences: Sequences) -> Any:
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), sequences)
        count = rows.tokens.shape[0]
        if missing := -count % parts:
            rows = fill_rows(rows, count + missing)
        return follow(params, rows)

    return ask


def _responses(record: Record) -> tuple[str, ...]:
    if isinstance(record, PreferenceRecord):
        return record.chosen, record.rejected
    return (record.response,)
