"""Writing a teacher cache, so that a process killed at any moment has lost little.

A shard is written under a temporary name, flushed to the disk and renamed; then the
manifest is replaced by one that lists it. Whoever starts again finds either the whole
shard or none of it: no record is missing, doubled or half there, and the shards that
were finished are not computed again. A shard comes out the same, bit for bit, however
often the writing was interrupted, because its batches start with it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from rkd_jax.data.collate import collate
from rkd_jax.data.records import (
    DemonstrationRecord,
    PreferenceRecord,
    Record,
    RecordError,
)
from rkd_jax.data.tokenize import TokenizeConfig, Tokenized, tokenize_record
from rkd_jax.models.api import CausalLM
from rkd_jax.signals import cache_identity as identity
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
from rkd_jax.signals.cache_manifest import MANIFEST, UNFINISHED, Manifest, check_same
from rkd_jax.signals.cache_scores import make_teacher_scores
from rkd_jax.signals.cache_shards import locked, summary, write_shard
from rkd_jax.signals.oracles import Oracle, score
from rkd_jax.signals.teacher import make_sequence_scorer
from rkd_jax.types import Params, Sequences

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer

Advance = Callable[[int, int], None]
_CHECK = "check the weights and the dtype it is computed in"


class Source(NamedTuple):
    """A frozen model."""

    model: CausalLM
    params: Params


class CacheWriter:
    """One cache, begun or gone on with.

    Example::

        writer = CacheWriter(folder, records, tokenizer, rows, CacheSettings(),
                             teacher=Source(model, params))
        manifest = writer.write()

    Args:
        folder: created if need be; one writer at a time.
        records: demonstrations or preferences, one kind of them.
        tokenizer: of the teacher.
        rows: how a record becomes ids, the one that training will use.
        settings: what to keep.
        teacher: what the lists and the shaping are read off.
        reference: whose log-probs are kept, if ``settings.reference``.
        oracle: what ``settings.oracle`` names.
        batch_size: records per forward pass. It decides nothing but speed and memory,
            up to rounding.
        shard_records: records per file; what an interruption can cost.
        on_error: what to do with a record that cannot be tokenized: ``"raise"``, or
            ``"skip"`` it, counted.

    Raises:
        CacheMismatch: the folder holds a cache of something else; both hashes are
            named.
        CacheError: a model or an oracle that ``settings`` needs is not there or does
            not fit, or no record is.
    """

    def __init__(
        self,
        folder: str | Path,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        rows: TokenizeConfig,
        settings: CacheSettings,
        *,
        teacher: Source | None = None,
        reference: Source | None = None,
        oracle: Oracle | None = None,
        batch_size: int = 8,
        shard_records: int = 1024,
        on_error: Literal["raise", "skip"] = "raise",
    ):
        _check(records, rows, tokenizer, settings, teacher, reference, oracle)
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
        if min(batch_size, shard_records) < 1:
            raise ValueError(
                f"batch_size={batch_size} and shard_records={shard_records} must be "
                "positive"
            )
        self.folder = Path(folder)
        self._records, self._tokenizer, self._rows = records, tokenizer, rows
        self._settings, self._oracle = settings, oracle
        self._batch_size, self._on_error = batch_size, on_error
        self._teacher, self._reference = teacher, reference
        self._ask_teacher = self._ask_reference = None
        if settings.needs_teacher:
            self._ask_teacher = make_teacher_scores(teacher.model, settings)
        if settings.reference:
            self._ask_reference = make_sequence_scorer(
                reference.model, temperature=settings.temperature
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._wanted = self._describe(shard_records)
        with locked(self.folder):
            self.manifest = self._open()

    @property
    def done(self) -> int:
        """Records that are finished."""
        return self.manifest.done

    def write(self, advance: Advance | None = None) -> Manifest:
        """Compute what is missing.

        Args:
            advance: told after each batch how many records and targets it had.

        Returns:
            The manifest of the finished cache.

        Raises:
            RecordError: a record that cannot be tokenized, with ``"raise"``.
            OracleError: see `rkd_jax.signals.oracles.score`.
            CacheError: the teacher says something that is no distribution, ``rows``
                ask for what the tokenizer lacks, the disk does not take a shard, or
                another process writes here.
        """
        advance = advance or (lambda records, tokens: None)
        with locked(self.folder):
            for leftover in self.folder.glob(f".*{UNFINISHED}"):
                leftover.unlink()
            self.manifest = self._there(self._open())
            while not self.manifest.complete:
                path = self._next_path()
                if not path.exists():
                    write_shard(path, self._payloads(advance))
                self._add(path)
        return self.manifest

    def _describe(self, shard_records: int) -> Manifest:
        """The manifest of a cache that is yet to be written."""
        settings, tokenizer = self._settings, self._tokenizer
        return Manifest(
            teacher=_hash(self._teacher),
            reference=_hash(self._reference),
            tokenizer=identity.tokenizer_hash(tokenizer),
            rows=identity.rows_hash(tokenizer, self._rows),
            data=identity.data_hash(self._records),
            kind=type(self._records[0]).__name__,
            records=len(self._records),
            shard_records=shard_records,
            settings=settings.to_json(),
            row_settings=identity.row_settings(self._rows),
            max_response=self._rows.max_response,
            vocabulary=settings.top_k and self._teacher.model.config.vocab_size,
        )

    def _open(self) -> Manifest:
        """The folder's own manifest if it is of the same, else a new one."""
        if (self.folder / MANIFEST).exists():
            found = Manifest.load(self.folder)
            check_same(self.folder, found, self._wanted.identity())
            return found
        others = sorted(path.name for path in self.folder.iterdir())
        if strangers := [name for name in others if not name.endswith(UNFINISHED)]:
            raise CacheError(
                f"{self.folder} holds {strangers[0]!r} and no {MANIFEST}; choose an "
                "empty folder"
            )
        self._wanted.save(self.folder)
        return self._wanted

    def _there(self, manifest: Manifest) -> Manifest:
        """The manifest up to a shard that somebody deleted, because it was damaged."""
        shards = itertools.takewhile(
            lambda shard: (self.folder / shard.file).is_file(), manifest.shards
        )
        return dataclasses.replace(manifest, shards=tuple(shards))

    def _next_path(self) -> Path:
        return self.folder / f"shard-{len(self.manifest.shards):05d}.array_record"

    def _add(self, path: Path) -> None:
        """Let the manifest list a finished shard."""
        shard = summary(path, self._settings, first=self.manifest.done)
        rest = self.manifest.records - self.manifest.done
        if shard.records != min(self.manifest.shard_records, rest):
            raise CacheError(
                f"{path}: {shard.records} records; delete this file and start again"
            )
        shards = (*self.manifest.shards, shard)
        self.manifest = dataclasses.replace(self.manifest, shards=shards)
        self.manifest.save(self.folder)

    def _payloads(self, advance: Advance) -> Iterator[bytes]:
        """The bytes of the next shard's records, in order."""
        first = self.manifest.done
        last = min(first + self.manifest.shard_records, self.manifest.records)
        rows = [self._tokenize(number) for number in range(first, last)]
        good = [row for row in rows if isinstance(row, Tokenized)]
        waiting = deque(rows)
        if len(rows) > len(good):
            advance(len(rows) - len(good), 0)
        for batch, scores in self._asked(good):
            packed = self._pack(batch, scores)
            tokens = sum(len(ids) for row in batch for ids in row.responses)
            advance(len(batch), tokens)
            while packed:
                row = waiting.popleft()
                if isinstance(row, str):
                    yield pack_skipped(row)
                else:
                    yield packed.pop(row.index)
        for reason in waiting:
            yield pack_skipped(reason)

    def _asked(
        self, rows: Sequence[Tokenized]
    ) -> Iterator[tuple[list[Tokenized], dict[str, Any]]]:
        """Batches and what the models say; the next is on its way when one is given."""
        before = None
        for start in range(0, len(rows), self._batch_size):
            batch = list(rows[start : start + self._batch_size])
            after = batch, self._ask(batch)
            if before is not None:
                yield before
            before = after
        if before is not None:
            yield before

    def _tokenize(self, number: int) -> Tokenized | str:
        """The row, or why there is none."""
        record = self._records[number]
        try:
            return tokenize_record(record, self._tokenizer, self._rows, number)
        except RecordError as error:
            if self._on_error == "raise":
                raise
            return error.reason.removeprefix(f"record {number}: ")
        except ValueError as error:
            raise CacheError(f"record {number}: {error}") from error

    def _ask(self, rows: Sequence[Tokenized]) -> dict[str, Any]:
        """What models and oracle say of each response; ``batch_size`` rows are seen."""
        padding = [rows[-1]] * (self._batch_size - len(rows))
        batch = collate([*rows, *padding], self._rows)
        found: dict[str, Any] = {}
        if self._ask_teacher is not None:
            seen = _flat(batch.teacher_sequences)
            scores = self._ask_teacher(self._teacher.params, seen)
            found |= {"topk": scores.topk, SHAPING: scores.shaping}
        if self._ask_reference is not None:
            seen = _flat(batch.sequences)
            found[REFERENCE] = self._ask_reference(self._reference.params, seen)
        if self._oracle is not None:
            records = [self._records[row.index] for row in rows]
            texts = [(r.prompt, text) for r in records for text in _responses(r)]
            prompts, responses = map(list, zip(*texts, strict=True))
            found[REWARD] = score(self._oracle, prompts, responses)
        return found

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


def _check(
    records: Sequence[Record],
    rows: TokenizeConfig,
    tokenizer: Tokenizer,
    settings: CacheSettings,
    teacher: Source | None,
    reference: Source | None,
    oracle: Oracle | None,
) -> None:
    """Everything that can be known to go wrong before a model runs."""
    kinds = {type(record) for record in records}
    if len(kinds) != 1 or not kinds <= {DemonstrationRecord, PreferenceRecord}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no record"
        raise CacheError(
            f"{names}: a cache is of demonstrations or of preferences, at least one"
        )
    if jax.process_count() > 1:
        raise CacheError("a cache is written by one process; start it on one host")
    parts = {
        "teacher": (teacher, settings.needs_teacher, rows.teacher_prompt_widths),
        "reference": (reference, settings.reference, rows.prompt_widths),
        "oracle": (oracle, settings.oracle is not None, ()),
    }
    for name, (part, needed, prompts) in parts.items():
        if (part is None) == needed:
            raise CacheError(f"{name}: {'missing' if needed else 'not asked for'}")
        if part is not None and prompts:
            width = prompts[-1] + rows.response_widths[-1]
            _check_model(name, part.model, tokenizer, width)
    if settings.needs_teacher:
        _check_width(settings, teacher.model.config.vocab_size)


def _check_width(settings: CacheSettings, vocabulary: int) -> None:
    asked = {"top_k": settings.top_k}
    if settings.shaping is not None and settings.shaping.support is not None:
        asked["one more than support"] = settings.shaping.support + 1
    for name, count in asked.items():
        if count is not None and count > vocabulary:
            raise CacheError(
                f"{name}={count} exceeds the teacher's {vocabulary} vocabulary entries"
            )


def _check_model(name: str, model: CausalLM, tokenizer: Tokenizer, width: int) -> None:
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise CacheError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the {name} "
            f"{config.vocab_size} vocabulary entries: they do not belong together"
        )
    if width > config.max_length:
        raise CacheError(
            f"rows of up to {width} tokens exceed the {name}'s context of "
            f"{config.max_length}; lower max_prompt or max_response"
        )


def _hash(source: Source | None) -> str | None:
    return None if source is None else identity.model_hash(*source)


def _flat(sequences: Sequences) -> Sequences:
    """Rows of responses, whether or not they come in pairs."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), sequences)


def _responses(record: Record) -> tuple[str, ...]:
    if isinstance(record, PreferenceRecord):
        return record.chosen, record.rejected
    return (record.response,)
