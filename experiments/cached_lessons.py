"""A data set and the cache that `rkd cache` made of it, divided for a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from experiments import ledger
from experiments.course import hold_out
from experiments.settings import SettingsError
from experiments.stages import as_key
from rkd_jax.data.collate import collate
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.sources import ReadReport, read_jsonl
from rkd_jax.data.tokenize import TokenizeConfig, survey, tokenize_record
from rkd_jax.data.tokenizer import Tokenizer
from rkd_jax.evaluation.content import DataSource, Incident
from rkd_jax.signals.cache import (
    CachedRecord,
    CacheMismatch,
    Manifest,
    Skipped,
    TeacherCache,
)
from rkd_jax.signals.cache_identity import data_hash
from rkd_jax.signals.cache_rows import Batch

Record = DemonstrationRecord | PreferenceRecord
KINDS = {kind.__name__: kind for kind in (DemonstrationRecord, PreferenceRecord)}
_READ = 1024  # records at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """Some records of a data set, and their numbers there.

    Example: ``Part(records=[record], numbers=[7])``.
    """

    records: Sequence[Record]
    numbers: np.ndarray  # int32[n]

    def numbered(self, batch: Batch) -> Batch:
        """A batch of these records that names them by their numbers in the data set.

        Where a packed row has no record its number stays negative.
        """
        index = np.asarray(batch.index)
        known = np.where(index < 0, index, self.numbers[np.maximum(index, 0)])
        return dataclasses.replace(batch, index=known)


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What a student is trained and measured on; prompts of one part are in no other.

    ``skipped`` are records that the cache left out, by its reason, with their numbers.
    """

    cache: TeacherCache
    tokenizer: Tokenizer
    rows: TokenizeConfig
    taught: Part
    held_out: Part
    read: ReadReport
    skipped: dict[str, list[int]]

    def look_up(self, signal: Callable[[TeacherCache, Batch], Any]) -> Callable:
        """``signal`` of batches of ``taught.records``."""
        return lambda batch: signal(self.cache, self.taught.numbered(batch))

    def rewards(self) -> np.ndarray:
        """The oracle's, of all pairs that are taught, ``float32[n, 2]``."""
        found = [
            [response.values["reward"] for response in record.responses]
            for record in _read(self.cache, self.taught.numbers)
        ]
        return np.array(found, np.float32)

    def tabulate(self, part: Part, count: int | None = None) -> Batch:
        """The first ``count`` records of a part, or all, as one batch on the host."""
        found = list(zip(part.records, part.numbers.tolist(), strict=True))[:count]
        rows = [
            tokenize_record(record, self.tokenizer, self.rows, number)
            for record, number in found
        ]
        return collate(rows, self.rows)

    def margins(self, scores: np.ndarray) -> np.ndarray:
        """Of held-out pairs, by how much the preferred response is ahead.

        Args:
            scores: float[n, 2], of the two responses as they are in the records.

        Returns:
            float[n], 0 where neither is preferred.
        """
        labels = np.array([record.label for record in self.held_out.records])
        return (scores[:, 0] - scores[:, 1]) * np.sign(labels - 0.5)

    def sources(self, name: str) -> list[DataSource]:
        """Both parts in the report; the first says what was left out of the data."""
        left_out = ledger.unread(self.read) + [
            Incident(
                f"not in the cache (records, from 0): {reason}",
                len(numbers),
                tuple(numbers[:5]),
            )
            for reason, numbers in self.skipped.items()
        ]
        return [
            DataSource(f"{title} ({name})", len(part.records), skipped, self._cut(part))
            for title, part, skipped in (
                ("trained on", self.taught, left_out),
                ("held out", self.held_out, ()),
            )
        ]

    def _cut(self, part: Part) -> list[Incident]:
        """Records that lost something, by their numbers in the data set."""
        found = ledger.cuts(survey(part.records, self.tokenizer, self.rows))
        return [
            dataclasses.replace(
                incident, places=tuple(part.numbers[list(incident.places)].tolist())
            )
            for incident in found
        ]


def open_lessons(
    data: str, folder: str, tokenizer: Tokenizer, *, vocabulary: int
) -> Lessons:
    """Read both, and make sure that one is of the other.

    Args:
        data: JSON Lines.
        folder: of the cache.
        tokenizer: the student's.
        vocabulary: entries of the student's head.

    Raises:
        CacheMismatch: of other data, or another tokenizer or template; both hashes are
            named.
        CacheError: the cache is not finished, or damaged.
        SettingsError: too few records to hold any out.
    """
    manifest = Manifest.load(folder)
    rows = manifest.row_layout()
    records, report = read_jsonl(data, KINDS[manifest.kind], on_error="skip")
    if not records:
        raise SettingsError(f"{data}: no {manifest.kind}, but {folder} is of them")
    found = data_hash(records)
    if found != manifest.data:
        raise CacheMismatch(
            f"{folder} is a cache of other data: {manifest.data} there, {data} is "
            f"{found} here, {manifest.records} and {len(records)} records; give the "
            "file it was made of, unchanged, or write another cache"
        )
    lists = manifest.settings["top_k"] is not None
    cache = TeacherCache(
        folder,
        tokenizer=tokenizer,
        rows=rows,
        vocabulary=vocabulary if lists else None,
    )
    skipped = _skipped(cache) if manifest.skipped else {}
    usable = sorted(set(range(len(records))) - set(sum(skipped.values(), [])))
    if len(usable) < 2:
        raise SettingsError(f"{data}: {len(usable)} usable records; at least 2 needed")
    _, aside = hold_out([records[n] for n in usable])
    prompts = {as_key(record) for record in aside}
    taught = [n for n in usable if as_key(records[n]) not in prompts]
    held_out = [n for n in usable if as_key(records[n]) in prompts]
    if not taught:
        raise SettingsError(f"{data}: one prompt in all; none is left to hold out")
    return Lessons(
        cache,
        tokenizer,
        rows,
        _part(records, taught),
        _part(records, held_out),
        report,
        skipped,
    )


def _part(records: Sequence[Record], numbers: Sequence[int]) -> Part:
    return Part([records[n] for n in numbers], np.array(numbers, np.int32))


def _skipped(cache: TeacherCache) -> dict[str, list[int]]:
    """Numbers of the records that are not in it, by reason."""
    found: dict[str, list[int]] = {}
    for number, record in enumerate(_read(cache, range(len(cache)))):
        if isinstance(record, Skipped):
            found.setdefault(record.reason, []).append(number)
    return found


def _read(
    cache: TeacherCache, numbers: Sequence[int]
) -> Iterable[CachedRecord | Skipped]:
    """Records without their lists, some at a time."""
    for first in range(0, len(numbers), _READ):
        yield from cache.read(numbers[first : first + _READ], lists=False)
