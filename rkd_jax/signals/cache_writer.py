"""Writing a teacher cache, so that a process killed at any moment has lost little.

Every batch is added to the journal of its shard (`rkd_jax.signals.cache_journal`) as
soon as it is computed. The shard is written under a temporary name, flushed to the disk
and renamed; then the manifest is replaced by one that lists it, and the journal goes.
Whoever starts again finds either the whole shard or the journal: no record is missing,
doubled or half there, and what was computed is not computed again. A shard comes out
the same, bit for bit, however often the writing was interrupted, because its batches
start with it and are in the journal as a whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rkd_jax.data.records import Record, RecordError
from rkd_jax.data.tokenize import TokenizeConfig, Tokenized, tokenize_record
from rkd_jax.signals import cache_identity as identity
from rkd_jax.signals.cache_answers import Answers
from rkd_jax.signals.cache_format import CacheError, CacheSettings
from rkd_jax.signals.cache_journal import JOURNAL, Journal
from rkd_jax.signals.cache_manifest import MANIFEST, UNFINISHED, Manifest, check_same
from rkd_jax.signals.cache_shards import locked, summary, write_shard
from rkd_jax.signals.cache_sources import Source, check_sources
from rkd_jax.signals.oracles import Oracle

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer

Advance = Callable[[int, int], None]


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
        batch_size: records per forward pass, which is what an interruption can cost. It
            decides nothing else but speed and memory, up to rounding.
        shard_records: records per file.
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
        check_sources(records, rows, tokenizer, settings, teacher, reference, oracle)
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
        if min(batch_size, shard_records) < 1:
            raise ValueError(
                f"batch_size={batch_size} and shard_records={shard_records} must be "
                "positive"
            )
        self.folder = Path(folder)
        self._records, self._tokenizer, self._rows = records, tokenizer, rows
        self._settings, self._on_error = settings, on_error
        self._teacher, self._reference = teacher, reference
        self._answers = Answers(
            records,
            rows,
            settings,
            teacher=teacher,
            reference=reference,
            oracle=oracle,
            batch_size=batch_size,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._wanted = self._describe(shard_records)
        with locked(self.folder):
            self.manifest = self._open()

    @property
    def done(self) -> int:
        """Records that are computed: those in finished shards and in the journal."""
        return self.manifest.done + self._journal().count()

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
                ask for what the tokenizer lacks, the disk does not take a shard or its
                journal, or another process writes here.
        """
        advance = advance or (lambda records, tokens: None)
        with locked(self.folder):
            for leftover in self.folder.glob(f".*{UNFINISHED}"):
                leftover.unlink()
            self.manifest = self._there(self._open())
            for shard in self.manifest.shards:  # of a process killed before it went
                self._journal_path(shard.file).unlink(missing_ok=True)
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
        self._journal_path(path.name).unlink(missing_ok=True)

    def _journal(self) -> Journal:
        """That of the next shard."""
        manifest = self.manifest
        path = self._journal_path(self._next_path().name)
        return Journal(path, manifest.identity(), first=manifest.done)

    def _journal_path(self, shard: str) -> Path:
        return self.folder / f".{shard}{JOURNAL}"

    def _payloads(self, advance: Advance) -> Iterator[bytes]:
        """The bytes of the next shard's records, in order; each batch is kept first."""
        journal = self._journal()
        yield from journal.replay()
        first = self.manifest.done
        last = min(first + self.manifest.shard_records, self.manifest.records)
        rows = [self._tokenize(n) for n in range(first + journal.records, last)]
        for payloads, tokens in self._answers.of(rows):
            journal.append(payloads)
            advance(len(payloads), tokens)
            yield from payloads

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


def _hash(source: Source | None) -> str | None:
    return None if source is None else identity.model_hash(*source)
