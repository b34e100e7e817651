"""The files of a teacher cache: ArrayRecord shards that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from rkd_jax.signals.cache_format import (
    CacheError,
    CacheSettings,
    Skipped,
    unpack_record,
)
from rkd_jax.signals.cache_manifest import (
    UNFINISHED,
    Manifest,
    Shard,
    few_reasons,
    sync_directory,
)
from rkd_jax.untrusted import one_line

# One record per read; what the codec leaves has no slack that zstd would find.
_OPTIONS = "group_size:1,uncompressed"
_ENDS = 2**16  # bytes of either end of a file that its seal covers
_REMEDY = "free some space or choose another folder, and start again"


def write_shard(path: Path, payloads: Iterable[bytes]) -> None:
    """Write a shard; the file appears when all of it is on the disk.

    Raises:
        CacheError: the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    count = 0
    with _on_disk(path):
        writer = ArrayRecordWriter(str(temporary), _OPTIONS)
    for payload in payloads:  # what fails in here is no fault of the disk
        with _on_disk(path):
            writer.write(payload)
        count += 1
    with _on_disk(path):
        writer.close()
    written = _count(temporary)
    if written != count:
        raise CacheError(f"{path}: {written} of {count} records arrived; {_REMEDY}")
    with _on_disk(path):
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise CacheError(f"{path}: cannot be written: {error}; {_REMEDY}") from error


def seal(path: Path, manifest: Manifest, first: int) -> str:
    """Ties a shard that begins with record ``first`` to what its cache is of.

    A hash of both and of the file's size and ends: ArrayRecord has checksums of the
    rest, and a file that changed as a whole changed there.
    """
    size = path.stat().st_size
    about = json.dumps([manifest.numbers(), first, size], sort_keys=True)
    digest = hashlib.blake2b(about.encode(), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(size - _ENDS, 0))
        digest.update(file.read(_ENDS))
    return digest.hexdigest()


def strange(path: Path, shard: Shard, manifest: Manifest, first: int) -> str | None:
    """How a file that is there differs from what the manifest lists, if it does."""
    if (size := path.stat().st_size) != shard.bytes:
        return f"{size} bytes, the manifest lists {shard.bytes}"
    if shard.seal not in (None, seal(path, manifest, first)):
        return (
            "not what the manifest lists: its bytes have changed, it is of another "
            "cache or another place in this one, or the manifest was edited"
        )
    return None


def summary(path: Path, settings: CacheSettings, *, first: int) -> Shard:
    """What a finished shard holds; its records count from ``first`` in the data set.

    Raises:
        CacheError: the file cannot be read.
    """
    responses = tokens = 0
    skipped: Counter[str] = Counter()
    first_skipped = None
    count = _count(path)
    for number, data in enumerate(_records(path), first):
        try:
            record = unpack_record(data, settings, lists=False)
        except CacheError as error:
            raise damaged(path, f"record {number}: {error}") from error
        if isinstance(record, Skipped):
            skipped[record.reason] += 1
            first_skipped = number if first_skipped is None else first_skipped
            continue
        responses += len(record.responses)
        tokens += sum(response.length for response in record.responses)
    return Shard(
        file=path.name,
        records=count,
        responses=responses,
        tokens=tokens,
        bytes=path.stat().st_size,
        skipped=few_reasons(skipped),
        first_skipped=first_skipped,
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the lock of a process that was killed is free again.

    Raises:
        CacheError: another process writes there.
    """
    if os.name != "posix":  # nothing to lock a folder with
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CacheError(f"{folder}: another process is writing this cache") from None
    try:
        yield
    finally:
        os.close(descriptor)


def problem(path: Path) -> CacheError | None:
    """What keeps a file from being read, if anything does."""
    try:
        for _ in _records(path):
            pass
    except CacheError as error:
        return error
    return None


def _count(path: Path) -> int:
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except Exception as error:  # of the reader's choice
        raise damaged(path, error) from error
    return count


def _records(path: Path) -> Iterator[bytes]:
    try:
        reader = ArrayRecordReader(str(path))
        for number in range(reader.num_records()):
            yield reader.read([number])[0]
        reader.close()
    except Exception as error:  # of the reader's choice
        raise damaged(path, error) from error


def damaged(path: Path, error: object) -> CacheError:
    """The error for a shard that cannot be read: why, and what helps.

    Raises:
        OSError: the file cannot even be opened, so nothing is known of its bytes.
    """
    with path.open("rb"):
        pass
    return CacheError(
        f"{path}: damaged: {one_line(error)}; delete this file and write the cache "
        "again, which restores it alone"
    )
