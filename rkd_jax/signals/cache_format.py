"""What a teacher cache keeps of a record, in memory and as bytes.

Record i of a cache is record i of the data set. One that could not be used keeps its
place and says why.

>>> settings = CacheSettings(top_k=None, reference=True)
>>> response = CachedResponse(b"8 bytes.", 3, {"reference": -4.5})
>>> data = pack_record(CachedRecord((response,)), settings)
>>> len(data), unpack_record(data, settings).responses[0].values
(17, {'reference': -4.5})
>>> unpack_record(pack_skipped("no text"), settings)
Skipped(reason='no text')
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.value import ValueSource
from rkd_jax.signals.cache_codec import (
    LOG_PROB_DTYPES,
    LogProbDtype,
    Topk,
    decode_topk,
    encode_topk,
)
from rkd_jax.signals.values import Terminal, shaping_of_logits
from rkd_jax.untrusted import one_line, shown

REWARD, REFERENCE, SHAPING = "reward", "reference", "shaping"
_RESPONSE = struct.Struct("<I8s")  # number of targets, digest
_VALUE = struct.Struct("<f")
# Settings by type; others are text, one of a few.
_NUMBERS = ("temperature", "gamma", "power", "scale", "center")
_COUNTS = ("top_k", "support")
_MOST_LISTED = 2**24  # no vocabulary is larger


class CacheError(ValueError):
    """A cache that cannot be written or read; the message is one line."""


class CacheMismatch(CacheError):
    """A cache of something else than what was asked for."""


@dataclasses.dataclass(frozen=True)
class ShapingSettings:
    """Which shaping of TVKD is kept; see `rkd_jax.signals.values.make_shaping`."""

    gamma: float = 0.7
    terminal: Terminal = "zero"
    power: float = 0.7
    scale: float = 1.0
    value_source: ValueSource = "log_probs"
    support: int | None = None
    center: float = 0.0

    def __post_init__(self):
        check_choice("value_source", self.value_source, get_args(ValueSource))
        if self.support is not None and self.support < 1:
            raise ValueError(
                f"support={self.support} must be positive, or None for all"
            )
        shaping_of_logits(**dataclasses.asdict(self))
        _check_types(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """What is computed for every response. Each part may be left out, not all of them.

    Example: ``CacheSettings(top_k=None, shaping=ShapingSettings(), reference=True)``
    is what TVKD reads.
    """

    top_k: int | None = 50  # tokens listed at every target; None: no list
    log_prob_dtype: LogProbDtype = "uint8"  # see `rkd_jax.signals.cache_codec`
    temperature: float = 1.0  # of teacher and reference
    shaping: ShapingSettings | None = None
    reference: bool = False  # summed log-prob of each response
    oracle: str | None = None  # name of what rewards each response

    def __post_init__(self):
        check_choice("log_prob_dtype", self.log_prob_dtype, LOG_PROB_DTYPES)
        check_domain("temperature", self.temperature, "(0, inf)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be positive, or None for none")
        if self.top_k is None and not self.value_names:
            raise ValueError(
                "nothing to cache: choose top_k, shaping, reference or oracle"
            )
        _check_types(vars(self))

    @property
    def value_names(self) -> tuple[str, ...]:
        """The numbers kept per response, in their order in a record."""
        present = {
            SHAPING: self.shaping is not None,
            REFERENCE: self.reference,
            REWARD: self.oracle is not None,
        }
        return tuple(name for name, there in present.items() if there)

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is read off the teacher."""
        return self.top_k is not None or self.shaping is not None

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON-able dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheSettings:
        """What `to_json` gave.

        Raises:
            ValueError, TypeError, KeyError: it was something else.
        """
        shaping = data["shaping"]
        _check_types(data)
        if shaping is not None:
            _check_types(shaping)
            shaping = ShapingSettings(**shaping)
        return cls(**{**data, "shaping": shaping})


def _check_types(data: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that its setting never has, or no file can hold."""
    for name, value in data.items():
        good = True
        if name in _NUMBERS:
            good = type(value) in (int, float) and abs(value) < 1e30
        elif name in _COUNTS and value is not None:
            good = type(value) is int and 0 < value <= _MOST_LISTED
        elif name == "reference":
            good = isinstance(value, bool)
        elif name == "oracle":
            good = isinstance(value, str | None)
        if not good:
            raise ValueError(f"{name}={shown(value)} is nothing that a manifest keeps")


@dataclasses.dataclass(frozen=True)
class CachedResponse:
    """What is known of one response.

    Example: ``CachedResponse(digest=b"...", length=3, values={"reward": 0.4},
    checks=uint8[3], topk=Topk(int32[3, K], float32[3, K], float32[3]))``.
    """

    digest: bytes  # of its prompts and targets
    length: int  # number of targets
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    checks: np.ndarray | None = None  # uint8[length], one per prefix
    topk: Topk | None = None


@dataclasses.dataclass(frozen=True)
class CachedRecord:
    """One response, or a chosen and a rejected one."""

    responses: tuple[CachedResponse, ...]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record nothing is known of, and why."""

    reason: str


def fingerprint(
    prompt: Sequence[int], teacher_prompt: Sequence[int], targets: Sequence[int]
) -> tuple[bytes, np.ndarray]:
    """What tells whether a row is the one that was cached.

    Args:
        prompt: ids, without padding.
        teacher_prompt: ids, without padding.
        targets: ids, without padding.

    Returns:
        Eight bytes for the whole row, and uint8[T]: one byte for the row as it was up
        to and with each target, so that a beginning can be recognised.
    """
    ids = [np.asarray(part, "<i4") for part in (prompt, teacher_prompt, targets)]
    sizes = np.asarray([len(part) for part in ids], "<i4").tobytes()
    start = sizes[:8] + ids[0].tobytes() + ids[1].tobytes()
    digest = hashlib.blake2b(start + sizes[8:] + ids[2].tobytes(), digest_size=8)
    state, checks = zlib.crc32(start), []
    for target in ids[2]:
        state = zlib.crc32(target.tobytes(), state)
        checks.append(state & 0xFF)
    return digest.digest(), np.array(checks, np.uint8)


def pack_record(record: CachedRecord, settings: CacheSettings) -> bytes:
    """A record's bytes: per response length, digest and values, then all lists.

    Raises:
        ValueError: see `encode_topk`.
    """
    parts = [bytes([len(record.responses)])]
    for response in record.responses:
        parts.append(_RESPONSE.pack(response.length, response.digest))
        parts += [_VALUE.pack(response.values[name]) for name in settings.value_names]
    if settings.top_k is not None:
        parts += [response.checks.tobytes() for response in record.responses]
        lists = [response.topk for response in record.responses]
        topk = Topk(*(np.concatenate(column) for column in zip(*lists, strict=True)))
        parts.append(encode_topk(topk, settings.log_prob_dtype))
    return b"".join(parts)


def pack_skipped(reason: str) -> bytes:
    """The bytes of a record that nothing is known of."""
    return b"\0" + reason.encode()


def unpack_record(
    data: bytes, settings: CacheSettings, *, lists: bool = True
) -> CachedRecord | Skipped:
    """What `pack_record` or `pack_skipped` was given.

    Args:
        data: the bytes.
        settings: of the cache they are from.
        lists: whether to decode the top k, most of the work.

    Raises:
        CacheError: bytes that are neither.
    """
    try:
        if data[:1] == b"\0":
            return Skipped(data[1:].decode())
        return _unpack(data, settings, lists)
    except (ValueError, IndexError, struct.error) as error:
        raise CacheError(f"a record that cannot be read: {one_line(error)}") from error


def _unpack(data: bytes, settings: CacheSettings, lists: bool) -> CachedRecord:
    responses, offset = [], 1
    for _ in range(data[0]):
        length, digest = _RESPONSE.unpack_from(data, offset)
        offset += _RESPONSE.size
        values = {}
        for name in settings.value_names:
            (values[name],) = _VALUE.unpack_from(data, offset)
            offset += _VALUE.size
        responses.append(CachedResponse(digest, length, values))
    if settings.top_k is not None:
        ends = np.cumsum([response.length for response in responses])
        total = int(ends[-1])
        columns = [np.frombuffer(data, np.uint8, total, offset)]
        if lists:
            topk, offset = decode_topk(
                data,
                total,
                settings.top_k,
                settings.log_prob_dtype,
                offset=offset + total,
            )
            columns += topk
        split = [np.split(column, ends[:-1]) for column in columns]
        responses = [
            dataclasses.replace(
                response, checks=own, topk=Topk(*rest) if rest else None
            )
            for response, own, *rest in zip(responses, *split, strict=True)
        ]
    if offset != len(data) and (lists or settings.top_k is None):
        raise ValueError(f"{len(data) - offset} bytes too many")
    return CachedRecord(tuple(responses))
