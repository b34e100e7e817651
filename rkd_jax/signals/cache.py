"""What frozen models said about a data set, computed once and read at every step.

A cache is written with `rkd cache` or `CacheWriter`, and read by `TeacherCache`: a
training that reads one never loads the teacher. ``prepare`` of `rkd_jax.training.fit`
is then::

    cache = TeacherCache("cache/", tokenizer=tokenizer, rows=rows)
    objective = make_topk_kd(student, temperature=cache.settings.temperature)
    fit(..., prepare=lambda state, batch: (batch, cache.topk(batch)))

Every record of a batch is recognised before anything is said about it: the cache was
made of the same data set, in the same order, by the same tokenizer. Rows may be packed
(`rkd_jax.data.make_packed_batches`): what is known of a record is then at its columns
and its entry of the row. What a list of K tokens costs against the whole distribution:
docs/teacher_cache.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
from grain.sources import ArrayRecordDataSource

from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.signals import cache_identity as identity
from rkd_jax.signals.cache_format import (
    REFERENCE,
    REWARD,
    SHAPING,
    CachedRecord,
    CachedResponse,
    CacheError,
    CacheMismatch,
    CacheSettings,
    ShapingSettings,
    Skipped,
    fingerprint,
    unpack_record,
)
from rkd_jax.signals.cache_identity import model_hash
from rkd_jax.signals.cache_manifest import Manifest, check_same
from rkd_jax.signals.cache_rows import Batch, Located, located, response_shape
from rkd_jax.signals.cache_shards import damaged, problem, strange
from rkd_jax.signals.cache_sources import Source
from rkd_jax.signals.cache_writer import CacheWriter
from rkd_jax.types import ReferenceSignal, ShapingSignal, TopkSignal
from rkd_jax.untrusted import one_line

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer

__all__ = [
    "CacheError",
    "CacheMismatch",
    "CacheSettings",
    "CacheWriter",
    "CachedRecord",
    "CachedResponse",
    "Manifest",
    "ShapingSettings",
    "Skipped",
    "Source",
    "TeacherCache",
    "model_hash",
]

# Where a packed row has no record: as `make_pair_scorer` and `collate_packed` fill.
_FILLERS = {REFERENCE: 0.0, SHAPING: 0.0, REWARD: np.nan}


class TeacherCache:
    """A finished cache, with random access by the number of the record.

    Args:
        path: its folder.
        tokenizer: of the run that reads it.
        rows: how records become ids in that run. Its buckets and ``max_response`` are
            free: of a response that is cut earlier than in the cache, `topk` gives the
            beginning.
        teacher_hash: `model_hash` of the teacher, or None to take the one there is.
        reference_hash: likewise.
        vocabulary: entries of the head that reads the lists; None to find out in the
            loss, where a listed token that it lacks gives NaN.

    Attributes:
        manifest: what it is a cache of.
        settings: what is in it.

    Raises:
        FileNotFoundError: no cache there, or a shard of it is gone.
        CacheError: not finished, or damaged.
        CacheMismatch: of another teacher, reference, tokenizer or template; both hashes
            are named.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: Tokenizer,
        rows: TokenizeConfig,
        teacher_hash: str | None = None,
        reference_hash: str | None = None,
        vocabulary: int | None = None,
    ):
        self.path = Path(path).absolute()  # files are opened when they are needed
        self.manifest = Manifest.load(self.path)
        wanted = {
            "teacher": teacher_hash,
            "reference": reference_hash,
            "tokenizer": identity.tokenizer_hash(tokenizer),
            "rows": identity.rows_hash(tokenizer, rows),
            "row_settings": identity.row_settings(rows),
        }
        asked = {name: value for name, value in wanted.items() if value is not None}
        check_same(self.path, self.manifest, asked)
        if not self.manifest.complete:
            raise CacheError(
                f"{self.path}: {self.manifest.done} of {self.manifest.records} records "
                "are there; the command that was interrupted goes on from them"
            )
        self.settings = CacheSettings.from_json(self.manifest.settings)
        listed = self.manifest.vocabulary
        if None not in (vocabulary, listed) and vocabulary < listed:
            raise CacheMismatch(
                f"{self.path} lists tokens of a teacher with {listed} vocabulary "
                f"entries, the student has {vocabulary}: bring both to one width with "
                "rkd_jax.models.surgery before the cache is written"
            )
        files = [self.path / shard.file for shard in self.manifest.shards]
        if gone := [file for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"{gone[0]}: listed in the manifest, but gone; write the cache again, "
                "which restores it alone"
            )
        first = 0
        for file, shard in zip(files, self.manifest.shards, strict=True):
            if why := strange(file, shard, self.manifest, first):
                raise damaged(file, why)
            first += shard.records
        self.source = self._opened(files)
        found = len(self.source)
        if found != self.manifest.records:
            raise CacheError(
                f"{self.path}: the shards hold {found} records, the manifest lists "
                f"{self.manifest.records}; a file is damaged"
            )

    def __len__(self) -> int:
        return self.manifest.records

    def __getitem__(self, number: SupportsIndex) -> CachedRecord | Skipped:
        if not 0 <= number.__index__() < len(self):
            raise IndexError(f"{self.path} has no record {number}")
        return self.read([number])[0]

    def read(
        self, numbers: Sequence[SupportsIndex], *, lists: bool = True
    ) -> list[CachedRecord | Skipped]:
        """Records by number, in the order asked for.

        Args:
            numbers: positions in the data set.
            lists: whether to decode the top k.

        Raises:
            CacheError: no such record, or the file is damaged.
        """
        for number in numbers:
            if not 0 <= number.__index__() < len(self):
                raise CacheError(
                    f"{self.path} has records 0 to {len(self) - 1}, not {number}: it "
                    "was made of another data set"
                )
        if not len(numbers):  # which the reader takes for an error
            return []
        try:
            payloads = self.source.__getitems__([n.__index__() for n in numbers])
        except Exception as error:  # of the reader's choice
            size = self.manifest.shard_records
            shards = sorted({n.__index__() // size for n in numbers})
            raise self._damaged(shards, error) from error
        return [
            self._unpacked(number, data, lists=lists)
            for number, data in zip(numbers, payloads, strict=True)
        ]

    def topk(self, batch: Batch) -> TopkSignal:
        """The teacher's top k at every target of a batch.

        Args:
            batch: records of the data set, with their ``index``; packed or not.

        Returns:
            ``[B, T, K]``, or ``[B, 2, T, K]`` of pairs, in numpy; at masked positions
            id 0, and absent. ``[B, T, K]`` of packed rows, whatever they hold.

        Raises:
            CacheError: the cache has no lists, or none of a record; the message names
            it. CacheMismatch: a record is not the one that was cached. ValueError:
            packed rows without an index ``[B, M]``.
        """
        if self.settings.top_k is None:
            raise CacheError(self._lacks("top k"))
        shape = (*np.shape(batch.sequences.response_mask), self.settings.top_k)
        # Read first: what the files hold bounds what is allocated.
        found = list(self._recognised(batch, whole=False))
        ids = np.zeros(shape, np.int32)
        log_probs = np.full(shape, -np.inf, np.float32)
        for row, response in found:
            length = len(row.targets)
            ids[row.columns] = response.topk.ids[:length]
            log_probs[row.columns] = response.topk.log_probs[:length]
        return TopkSignal(ids, log_probs, self.settings.temperature)

    def reference(self, batch: Batch) -> ReferenceSignal:
        """Summed log-probs under the reference, ``[B, 2]`` of pairs, else ``[B]``.

        Of packed rows, ``[B, M, 2]`` or ``[B, M]``, 0 where no record is. Arguments and
        errors as `topk`; of a response that is cut earlier than in the cache nothing is
        known.
        """
        return ReferenceSignal(*self._values(batch, REFERENCE))

    def shaping(self, batch: Batch) -> ShapingSignal:
        """The teacher's shaping, and the reference's log-probs if there are any.

        Arguments, shapes and errors as `reference`.
        """
        if not self.settings.reference:
            return ShapingSignal(None, *self._values(batch, SHAPING))
        return ShapingSignal(*self._values(batch, REFERENCE, SHAPING))

    def rewards(self, batch: Batch) -> np.ndarray:
        """The oracle's rewards of the whole texts, float32.

        Arguments, shapes and errors as `reference`; NaN where no record is, as in
        `PackedPreferenceBatch.rewards`.
        """
        return self._values(batch, REWARD)[0]

    def _values(self, batch: Batch, *names: str) -> list[np.ndarray]:
        """One array per name."""
        for name in names:
            if name not in self.settings.value_names:
                raise CacheError(self._lacks(name))
        found = list(self._recognised(batch, whole=True))
        shape = response_shape(batch)
        values = [np.full(shape, _FILLERS[name], np.float32) for name in names]
        for row, response in found:
            for name, array in zip(names, values, strict=True):
                array[row.place] = response.values[name]
        return values

    def _recognised(
        self, batch: Batch, *, whole: bool
    ) -> Iterator[tuple[Located, CachedResponse]]:
        """Every response of the batch, and what is known of it."""
        rows = located(batch)
        records = self.read([number for number, _ in rows], lists=not whole)
        for (number, responses), record in zip(rows, records, strict=True):
            if isinstance(record, Skipped):
                raise CacheError(
                    f"record {number} is not in {self.path}: {one_line(record.reason)}"
                )
            if len(record.responses) != len(responses):
                raise CacheMismatch(
                    f"{self.path} is a cache of {self.manifest.kind}s, the batch has "
                    f"{len(responses)} responses per record"
                )
            for row, response in zip(responses, record.responses, strict=True):
                found = fingerprint(row.prompt, row.teacher_prompt, row.targets)
                self._check(number, response, *found, whole=whole)
                yield row, response

    def _check(
        self,
        number: int,
        response: CachedResponse,
        digest: bytes,
        checks: np.ndarray,
        *,
        whole: bool,
    ) -> None:
        """Pass if a row is the one that was cached, or, if allowed, its beginning."""
        if digest == response.digest:
            return
        length = len(checks)
        begins = response.checks is not None and length < response.length
        if begins and np.array_equal(checks, response.checks[:length]):
            if not whole:
                return
            raise CacheMismatch(
                f"record {number}: the batch has {length} of the {response.length} "
                f"targets that {self.path} sums over; raise max_response to "
                f"{self.manifest.max_response}, or cache what you train on"
            )
        raise CacheMismatch(
            f"record {number}: its prompt or its {length} targets are not those in "
            f"{self.path} ({response.length} targets): the data or their order have "
            f"changed, or max_response is not the cache's {self.manifest.max_response}"
        )

    def _opened(self, files: Sequence[Path]) -> ArrayRecordDataSource:
        try:
            return ArrayRecordDataSource([str(file) for file in files])
        except Exception as error:  # of the reader's choice
            raise self._damaged(range(len(files)), error) from error

    def _unpacked(
        self, number: SupportsIndex, data: bytes, *, lists: bool
    ) -> CachedRecord | Skipped:
        try:
            return unpack_record(data, self.settings, lists=lists)
        except CacheError as error:
            place = number.__index__() // self.manifest.shard_records
            file = self.path / self.manifest.shards[place].file
            raise damaged(file, f"record {number}: {error}") from error

    def _damaged(self, shards: Iterable[int], error: Exception) -> CacheError:
        """An error that names the file."""
        files = (self.path / self.manifest.shards[n].file for n in shards)
        found = next(filter(None, map(problem, files)), None)
        return found or CacheError(f"{self.path}: cannot be read: {one_line(error)}")

    def _lacks(self, what: str) -> str:
        return f"{self.path} holds no {what}; it was written without"
