"""What is known of a shard that is not finished, a batch at a time.

A journal is a file to which every batch is added as soon as it is computed, and flushed
to the disk before anything comes of it. Whoever starts again reads its whole entries;
what a killed process left of the next one is cut off, and only the records behind them
are asked for. An entry's checksum covers its place and what the cache is of, so that
nothing but the beginning of this very shard is ever read from it.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp(), "journal")
>>> Journal(path, {"teacher": "A"}, first=8).append([b"eight", b"nine"])
>>> again = Journal(path, {"teacher": "A"}, first=8)
>>> list(again.replay()), again.records
([b'eight', b'nine'], 2)
>>> Journal(path, {"teacher": "B"}, first=8).count()
0
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rkd_jax.signals.cache_format import CacheError
from rkd_jax.signals.cache_manifest import sync_directory

JOURNAL = ".journal"  # ends its name
# Number of the first record, how many there are, and bytes of what follows the
# checksum: the size of each record, and the records.
_HEAD = struct.Struct("<QIQ")
_CHECKSUM = 16  # bytes
_SIZE = 4  # bytes of a record's size
_REMEDY = "free some space or choose another folder, and start again"


class Journal:
    """The records of one shard so far, in order.

    Args:
        path: the file, which need not be there.
        identity: what the cache is of, anything JSON can hold. Entries that were
            written with another one are not read.
        first: number of the shard's first record.

    Attributes:
        first: number of the shard's first record.
        records: how many were replayed and appended.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, first: int):
        self.path, self.first = path, first
        text = json.dumps(identity, sort_keys=True).encode()
        self._key = hashlib.blake2b(text).digest()
        self.records = 0

    def count(self) -> int:
        """How many records can be replayed."""
        return sum(len(payloads) for _, payloads in self._entries())

    def replay(self) -> Iterator[bytes]:
        """The records of all whole entries; whatever is behind them is then cut off."""
        whole = self.records = 0
        for end, payloads in self._entries():
            self.records += len(payloads)
            yield from payloads
            whole = end
        if self.path.exists():
            os.truncate(self.path, whole)

    def append(self, payloads: Sequence[bytes]) -> None:
        """Add the records that follow; they are on the disk when this returns.

        Call it when `replay` is through: what is written behind half an entry is lost.

        Raises:
            CacheError: the disk does not take them.
        """
        sizes = struct.pack(f"<{len(payloads)}I", *map(len, payloads))
        body = sizes + b"".join(payloads)
        head = _HEAD.pack(self.first + self.records, len(payloads), len(body))
        is_new = not self.path.exists()
        try:
            with self.path.open("ab") as file:
                file.write(head + self._checksum(head, body) + body)
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync_directory(self.path.parent)
        except OSError as error:
            raise CacheError(
                f"{self.path}: cannot be written: {error}; {_REMEDY}"
            ) from error
        self.records += len(payloads)

    def _entries(self) -> Iterator[tuple[int, list[bytes]]]:
        """Where each whole entry ends, and its records."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            size, number = os.fstat(file.fileno()).st_size, self.first
            while payloads := self._entry(file, number, size - file.tell()):
                yield file.tell(), payloads
                number += len(payloads)

    def _entry(self, file: BinaryIO, number: int, left: int) -> list[bytes]:
        """Records from ``number`` on, or none if the next entry is not whole."""
        left -= _HEAD.size + _CHECKSUM
        if left < 0:
            return []
        head = file.read(_HEAD.size)
        first, count, size = _HEAD.unpack(head)
        # A damaged size must not make us read more than there is.
        if first != number or size > left or _SIZE * count > size:
            return []
        checksum, body = file.read(_CHECKSUM), file.read(size)
        if checksum != self._checksum(head, body):
            return []
        payloads, at = [], _SIZE * count
        for (length,) in struct.iter_unpack("<I", body[:at]):
            payloads.append(body[at : at + length])
            at += length
        return payloads

    def _checksum(self, head: bytes, body: bytes) -> bytes:
        digest = hashlib.blake2b(head, digest_size=_CHECKSUM, key=self._key)
        digest.update(body)
        return digest.digest()
