"""Writing a teacher cache, so that a process killed at any moment has lost little.

Every batch is added to the journal of its shard (`rkd_jax.signals.cache_journal`) as
soon as it is computed. The shard is written under a temporary name, flushed to the disk
and renamed; then the manifest is replaced by one that lists it, and the journal goes.
Whoever starts again finds either the whole shard or the journal: no record is missing,
doubled or half there, and what was computed is not computed again. A shard comes out
the same, bit for bit, however often the writing was interrupted, because its batches
start with it and are in the journal as a whole.

Where teacher and reference are both read, the reference comes first, alone: what it
says is one number per response, and waits in a journal of its own beside each shard.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rkd_jax.data.records import Record, RecordError
from rkd_jax.data.tokenize import TokenizeConfig, Tokenized, tokenize_record
from rkd_jax.signals import cache_identity as identity
from rkd_jax.signals.cache_answers import Answers
from rkd_jax.signals.cache_format import (
    REFERENCE,
    CachedRecord,
    CacheError,
    CacheSettings,
    unpack_record,
)
from rkd_jax.signals.cache_journal import JOURNAL, Journal
from rkd_jax.signals.cache_manifest import MANIFEST, UNFINISHED, Manifest, check_same
from rkd_jax.signals.cache_shards import locked, seal, strange, summary, write_shard
from rkd_jax.signals.cache_sources import (
    Given,
    HeldModel,
    check_request,
    hold_models,
)
from rkd_jax.signals.oracles import Oracle

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer

Advance = Callable[[int, int], None]
Begin = Callable[[str, int, int], None]
_CACHE = "cache"  # name of the pass that writes the shards


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
        teacher: what the lists and the shaping are read off: the model, on a device or
            a mesh, or a function that loads it.
        reference: whose log-probs are kept, if ``settings.reference``; likewise. If
            both are loaded by functions, never more than one of them is in memory:
            the reference speaks of all records before the teacher does.
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
        teacher: Given | None = None,
        reference: Given | None = None,
        oracle: Oracle | None = None,
        batch_size: int = 8,
        shard_records: int = 1024,
        on_error: Literal["raise", "skip"] = "raise",
    ):
        check_request(records, settings, teacher, reference, oracle)
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
        if min(batch_size, shard_records) < 1:
            raise ValueError(
                f"batch_size={batch_size} and shard_records={shard_records} must be "
                "positive"
            )
        self.folder = Path(folder).absolute()
        self._records, self._tokenizer, self._rows = records, tokenizer, rows
        self._settings, self._oracle = settings, oracle
        self._batch_size, self._on_error = batch_size, on_error
        self._teacher, self._reference = hold_models(
            teacher, reference, tokenizer=tokenizer, rows=rows, settings=settings
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise CacheError(
                f"{self.folder}: is no folder; write the cache into another one"
            ) from error
        self._wanted = self._describe(shard_records)
        with locked(self.folder):
            self.manifest = self._open()

    @property
    def done(self) -> int:
        """Records that are computed: those in shards, and in journals of others."""
        held = sum(self.manifest.shards[number].records for number in self._held())
        return held + sum(self._journal(n).count() for n in self._missing())

    def write(
        self, advance: Advance | None = None, *, begin: Begin | None = None
    ) -> Manifest:
        """Compute what is missing.

        Args:
            advance: told after each batch of a pass how many records and targets it
                had.
            begin: told before a pass over the records its name, how many there are and
                how many are done. There is ``"reference"``, if a teacher is to be read
                too and something is missing, and ``"cache"``, which is always there.

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
        begin = begin or (lambda name, records, done: None)
        with locked(self.folder):
            for leftover in self.folder.glob(f".*{UNFINISHED}"):
                leftover.unlink()
            self.manifest = self._open()
            for number in self._held():
                self._forget(number)  # a process was killed before it could
            missing = self._missing()
            try:
                if self._reference_is_first:
                    self._let_reference_speak(missing, advance, begin)
                self._write_shards(missing, advance, begin)
            finally:
                for model in filter(None, (self._teacher, self._reference)):
                    model.release()
        return self.manifest

    @property
    def _reference_is_first(self) -> bool:
        """Whether it has a pass of its own, because the teacher needs the memory."""
        return None not in (self._teacher, self._reference)

    def _let_reference_speak(
        self, missing: Sequence[int], advance: Advance, begin: Begin
    ) -> None:
        """Put its words about every shard that is not there in that shard's journal."""
        records = self.manifest.records
        journals = [self._journal(n, REFERENCE) for n in missing]
        left = sum(self._end(j.first) - j.first - j.count() for j in journals)
        if left:
            begin(REFERENCE, records, records - left)
        answers = self._asking(self._said_by_reference, reference=self._reference)
        for journal in journals:
            for _ in self._kept(journal, answers, advance):
                pass
        self._reference.release()

    def _write_shards(
        self, missing: Sequence[int], advance: Advance, begin: Begin
    ) -> None:
        begin(_CACHE, self.manifest.records, self.done)
        answers = self._asking(
            self._settings,
            teacher=self._teacher,
            reference=None if self._reference_is_first else self._reference,
            oracle=self._oracle,
        )
        for number in missing:
            known = self._known(number) if self._reference_is_first else None
            kept = self._kept(self._journal(number), answers, advance, known)
            write_shard(self._path(number), kept)
            self._list(number)
            self._forget(number)

    def _describe(self, shard_records: int) -> Manifest:
        """The manifest of a cache that is yet to be written."""
        settings, tokenizer = self._settings, self._tokenizer
        return Manifest(
            teacher=self._teacher and self._teacher.hash,
            reference=self._reference and self._reference.hash,
            tokenizer=identity.tokenizer_hash(tokenizer),
            rows=identity.rows_hash(tokenizer, self._rows),
            data=identity.data_hash(self._records),
            kind=type(self._records[0]).__name__,
            records=len(self._records),
            shard_records=shard_records,
            settings=settings.to_json(),
            row_settings=identity.row_settings(self._rows),
            max_response=self._rows.max_response,
            vocabulary=settings.top_k and self._teacher.vocabulary,
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

    def _held(self) -> list[int]:
        """Numbers of the shards that are there as the manifest lists them.

        Not one that is not listed, whoever wrote it: its journal has its records. Nor
        one that was deleted or replaced since.
        """
        held, first = [], 0
        for number, shard in enumerate(self.manifest.shards):
            path = self.folder / shard.file
            if path.is_file() and not strange(path, shard, self.manifest, first):
                held.append(number)
            first += shard.records
        return held

    def _missing(self) -> list[int]:
        """Numbers of all other shards, in order."""
        count = -(-self.manifest.records // self.manifest.shard_records)
        return sorted(set(range(count)).difference(self._held()))

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.array_record"

    def _list(self, number: int) -> None:
        """Let the manifest list a finished shard, in its place."""
        first = number * self.manifest.shard_records
        path, shards = self._path(number), list(self.manifest.shards)
        shard = dataclasses.replace(
            summary(path, self._settings, first=first),
            seal=seal(path, self.manifest, first),
        )
        shards[number : number + 1] = [shard]
        self.manifest = dataclasses.replace(self.manifest, shards=tuple(shards))
        self.manifest.save(self.folder)

    def _journal(self, number: int, name: str = _CACHE) -> Journal:
        """What a pass has found out about a shard."""
        about = self.manifest.identity() | {"pass": name}
        first = number * self.manifest.shard_records
        return Journal(self._journal_path(number, name), about, first=first)

    def _journal_path(self, number: int, name: str) -> Path:
        shard = self._path(number).name
        return self.folder / f".{shard}.{name}{JOURNAL}"

    def _forget(self, number: int) -> None:
        """Nothing but the shard is needed from now on."""
        for name in (REFERENCE, _CACHE):
            if (path := self._journal_path(number, name)).exists():
                path.unlink()  # unasked, a read-only folder would refuse

    def _end(self, first: int) -> int:
        """Number behind the last record of the shard that begins with ``first``."""
        return min(first + self.manifest.shard_records, self.manifest.records)

    def _asking(
        self,
        settings: CacheSettings,
        *,
        teacher: HeldModel | None = None,
        reference: HeldModel | None = None,
        oracle: Oracle | None = None,
    ) -> Callable[[], Answers]:
        """What gives `Answers`; models are loaded when they are first needed."""

        @functools.cache
        def answers() -> Answers:
            return Answers(
                self._records,
                self._rows,
                settings,
                batch_size=self._batch_size,
                teacher=teacher and teacher.source(),
                reference=reference and reference.source(),
                oracle=oracle,
            )

        return answers

    def _kept(
        self,
        journal: Journal,
        answers: Callable[[], Answers],
        advance: Advance,
        known: Mapping[int, CachedRecord] | None = None,
    ) -> Iterator[bytes]:
        """The bytes of a shard's records, in order; each is in the journal by then."""
        yield from journal.replay()
        first = journal.first + journal.records
        rows = [self._tokenize(n) for n in range(first, self._end(journal.first))]
        if not rows:
            return
        for payloads, tokens in answers().of(rows, known):
            journal.append(payloads)
            advance(len(payloads), tokens)
            yield from payloads

    @property
    def _said_by_reference(self) -> CacheSettings:
        """Settings of what is kept of the reference until a shard is written."""
        temperature = self._settings.temperature
        return CacheSettings(top_k=None, temperature=temperature, reference=True)

    def _known(self, number: int) -> dict[int, CachedRecord]:
        """What the reference said of a shard's records, by number."""
        journal, settings = self._journal(number, REFERENCE), self._said_by_reference
        records = (unpack_record(data, settings) for data in journal.replay())
        return dict(enumerate(records, journal.first))

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
