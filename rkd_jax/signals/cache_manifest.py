"""The manifest of a teacher cache: what its numbers are, and how far it has got.

A cache is a folder with ``manifest.json`` and the shards it lists: ArrayRecord files
that hold the records of a data set, in order.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rkd_jax.data.sources import OTHER_REASONS
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.signals.cache_format import (
    CacheError,
    CacheMismatch,
    CacheSettings,
    ShapingSettings,
)
from rkd_jax.untrusted import is_plain_name, one_line, refused, shown

FORMAT = 2
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"  # ends the name of a file that is being written
_MEANING = {
    "teacher": "teacher (hash of parameters and configuration)",
    "reference": "reference (hash of parameters and configuration)",
    "tokenizer": "tokenizer (hash of the vocabulary)",
    "rows": "template and row layout (hash)",
    "data": "data (hash of all records)",
    "kind": "kind of records",
    "records": "number of records",
    "shard_records": "records per shard",
    "max_response": "max_response",
    "vocabulary": "vocabulary of the lists",
}
_HASH = re.compile("[0-9a-f]{16}")
_KINDS = ("DemonstrationRecord", "PreferenceRecord")
_MOST = 2**53  # of anything that is counted
_DAMAGED = (
    "not the manifest of a cache (restore it, or write the cache into another folder)"
)
_MOST_REASONS = 8  # that a shard tells apart
_LONGEST_REASON = 120  # characters


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished file; ``skipped`` counts by reason, as `few_reasons` says it.

    Example: ``Shard("shard-00000.array_record", records=1024, responses=2046,
    tokens=391204, bytes=45875200, skipped={"response: encodes to no token": 1})``.
    """

    file: str
    records: int  # skipped ones included
    responses: int
    tokens: int
    bytes: int
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    first_skipped: int | None = None  # number of the record
    seal: str | None = None  # see `rkd_jax.signals.cache_shards`; older ones have none

    def check(self, records: int) -> None:
        """Raise ValueError if no writer would say this of a file of ``records``."""
        if not is_plain_name(self.file):
            raise ValueError(f"{shown(self.file)} is not a file name in this folder")
        if self.records != records:
            raise ValueError(f"{self.file} with {shown(self.records)} records")
        if self.seal is not None and not _is_hash(self.seal):
            raise ValueError(f"{self.file}: seal={shown(self.seal)} is no hash")
        first = 0 if self.first_skipped is None else self.first_skipped
        counts = (self.responses, self.tokens, self.bytes, first)
        for count in (self.records, *counts, *dict(self.skipped).values()):
            _check_count(self.file, count)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache is of, and how far it has got.

    Hashes are sixteen hexadecimal digits, see `rkd_jax.signals.cache_identity`; None
    where nothing was read of that model.
    """

    teacher: str | None
    reference: str | None
    tokenizer: str
    rows: str  # chat template, and how a record becomes ids
    data: str  # every record
    kind: str  # name of the records' type
    records: int  # in the data set
    shard_records: int
    settings: dict[str, Any]  # of `CacheSettings`
    row_settings: dict[str, Any]  # what a `TokenizeConfig` contributes to `rows`
    max_response: int
    vocabulary: int | None = None  # entries of the teacher's head, if it is listed
    shards: tuple[Shard, ...] = ()
    format: int = FORMAT

    @property
    def done(self) -> int:
        """Records in finished shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def complete(self) -> bool:
        """Whether every record is in a finished shard."""
        return self.done == self.records

    @property
    def tokens(self) -> int:
        """Targets in finished shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of the finished shards, their indices included."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def skipped(self) -> dict[str, int]:
        """How many records were left out, by reason, as `few_reasons` says it.

        A reason counts in the shards that name it; the counts add up to all records.
        """
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.skipped)
        return few_reasons(total)

    def row_layout(self) -> TokenizeConfig:
        """How records became ids, without buckets.

        Example: ``TeacherCache(path, tokenizer=tokenizer,
        rows=Manifest.load(path).row_layout())``.

        Raises:
            CacheError: it is one of another version.
        """
        with refused("row_settings of the manifest are not known here", CacheError):
            return TokenizeConfig(**self.row_settings, max_response=self.max_response)

    def identity(self) -> dict[str, Any]:
        """All that has to be the same for a cache to be gone on with."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("shards", "format")
        }

    def numbers(self) -> dict[str, Any]:
        """All that decides a number in a shard; settings that are the defaults are left
        out, so that one which a later version adds changes nothing."""
        names = ("teacher", "reference", "tokenizer", "rows", "data")
        said = _less(self.settings, CacheSettings().to_json())
        if said.get("shaping"):
            defaults = dataclasses.asdict(ShapingSettings())
            said["shaping"] = _less(said["shaping"], defaults)
        return {name: getattr(self, name) for name in names} | {"settings": said}

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest, all or nothing.

        Raises:
            CacheError: the disk does not take it.
        """
        data = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        temporary = folder / f".{MANIFEST}{UNFINISHED}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / MANIFEST)
            sync_directory(folder)
        except OSError as error:
            raise CacheError(
                f"{folder / MANIFEST}: cannot be written: {error}; free some space or "
                "choose another folder, and start again"
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            FileNotFoundError: there is none. CacheError: not a manifest, of another
            format, or one that contradicts itself or names files elsewhere.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; write one with `rkd cache`")
        with refused(f"{path}: {_DAMAGED}", CacheError):
            data = json.loads(path.read_text("utf-8"))
            version = data["format"]
        if version != FORMAT:
            raise CacheError(
                f"{path}: format {shown(version)}, this version reads {FORMAT}; use "
                "the version that wrote it, or write the cache into another folder"
            )
        with refused(f"{path}: {_DAMAGED}", CacheError):
            # With what settings that came later are in a manifest from before them.
            data["settings"] = CacheSettings.from_json(data["settings"]).to_json()
            shards = tuple(Shard(**shard) for shard in data.pop("shards"))
            manifest = cls(**data, shards=shards)
            _check(manifest)
        return manifest


def few_reasons(counts: Mapping[str, int], most: int = _MOST_REASONS) -> dict[str, int]:
    """The most frequent reasons, and `OTHER_REASONS` for all others together.

    A reason may quote what a template says of one record, so there may be as many as
    records; each record has its own, in full (`rkd_jax.signals.cache.Skipped`).

    >>> few_reasons({"a": 1, "b": 3, "c": 1, "d": 2}, most=2)
    {'b': 3, 'd': 2, 'other reasons': 2}

    Args:
        counts: how many records have a reason.
        most: how many reasons are named.

    Returns:
        The same sum of counts; no reason has more than 120 characters.
    """
    short: Counter[str] = Counter()
    for reason, count in counts.items():
        cut = len(reason) > _LONGEST_REASON
        short[f"{reason[: _LONGEST_REASON - 3]}..." if cut else reason] += count
    others = short.pop(OTHER_REASONS, 0)
    named = sorted(short.items(), key=lambda item: (-item[1], item[0]))
    others += sum(count for _, count in named[most:])
    return dict(named[:most]) | ({OTHER_REASONS: others} if others else {})


def _check(manifest: Manifest) -> None:
    """Raise ValueError if no writer leaves such a manifest behind."""
    optional = {"teacher", "reference"}
    for name in ("teacher", "reference", "tokenizer", "rows", "data"):
        value = getattr(manifest, name)
        absent = value is None and name in optional
        if not absent and not _is_hash(value):
            raise ValueError(f"{name}={shown(value)} is no hash")
    if manifest.kind not in _KINDS:
        raise ValueError(f"kind={shown(manifest.kind)}")
    for name in ("records", "shard_records", "max_response"):
        _check_count(name, getattr(manifest, name), least=1)
    if manifest.vocabulary is not None:
        _check_count("vocabulary", manifest.vocabulary, least=1)
    if not isinstance(manifest.row_settings, dict):
        raise ValueError(f"row_settings={shown(manifest.row_settings)}")
    left = manifest.records
    for shard in manifest.shards:
        if left < 1:
            raise ValueError(f"{shown(shard.file)} after the last record")
        shard.check(min(manifest.shard_records, left))
        left -= shard.records
    files = [shard.file for shard in manifest.shards]
    if len(set(files)) != len(files):
        raise ValueError("a shard is listed twice")


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _less(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not the defaults."""
    return {k: v for k, v in settings.items() if k not in defaults or defaults[k] != v}


def _check_count(name: str, value: Any, *, least: int = 0) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= _MOST:
        raise ValueError(f"{name}: {shown(value)} where a number of things belongs")


def sync_directory(folder: Path) -> None:
    """Make new and renamed files survive a crash; only POSIX opens directories."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_same(folder: str | Path, found: Manifest, wanted: Mapping[str, Any]) -> None:
    """Pass if a manifest says the same as ``wanted``, field -> value.

    Raises:
        CacheMismatch: it does not; names both values of everything that differs.
    """
    differing = []
    for name, here in wanted.items():
        there = getattr(found, name)
        if isinstance(here, dict):  # settings: one phrase for each of them
            differing += _differing(there, here)
        elif there != here:
            differing.append(f"{_MEANING[name]} is {there} there, {here} here")
    if differing:
        raise CacheMismatch(
            f"{folder} is a cache of something else: {one_line('; '.join(differing))}; "
            "use what it was written with, or write another"
        )


def _differing(
    there: Mapping[str, Any], here: Mapping[str, Any], group: str = ""
) -> Iterator[str]:
    """A phrase for each setting that is another one, those in groups by themselves."""
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, f"{key}.")
        elif old != new:
            yield f"{group}{key} is {shown(old)} there, {shown(new)} here"
