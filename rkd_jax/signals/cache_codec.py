r"""A teacher's top k as bytes: a set of ids and their log-probs in Rice codes.

What is listed is a set, so nothing is lost by sorting it by id and storing the gaps
between neighbours: about 11.5 bits an id at k = 50 of 49152, where a plain id takes 16.
Log-probs are kept in one of three ways:

=========  =================================================================
float32    every bit of what the teacher said
float16    the nearest float16, stored as its distance from the smallest one
uint8      one of 255 levels between the largest and the smallest, cubically
           spaced: of a gap g to the largest, in a range R, an error of at
           most 3/2 (R g^2)^(1/3) / 254, and R / 254^3 / 2 next to it, R
           being rounded up by at most 4 %
=========  =================================================================

With float16 and uint8 one float16 per token says how the mass divides between the list
and its tail. Decoding shifts the list to that mass: the tail, which the losses take as
one minus the list, is then not drowned in the rounding of the largest entries.

>>> ids, log_probs = np.array([[7, 2]]), np.log(np.array([[0.5, 0.3]]))
>>> topk = Topk(ids, log_probs, np.log(np.array([0.2])))
>>> found, end = decode_topk(encode_topk(topk, "float16"), 1, 2, "float16")
>>> print(found.ids, np.exp(found.log_probs).round(3), end)
[[7 2]] [[0.5 0.3]] 19
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple, get_args

import numpy as np

LogProbDtype = Literal["float32", "float16", "uint8"]
LOG_PROB_DTYPES: tuple[LogProbDtype, ...] = get_args(LogProbDtype)

_PLANE = struct.Struct("<BI")  # Rice parameter, bytes of the unary part
_MOST_BITS = 24
_MOST_ID = 2**31 - 1
# A log-softmax rounds to a little above 0 where one token has all the mass.
_ROUNDING = 1e-4
_LEVELS = 254  # steps from the largest log-prob to the smallest
_POWER = 3.0  # of their spacing
_FAR = 100.0  # nats below the largest, beyond which there is no mass in float32
_IMPOSSIBLE = 0x7C00  # infinity in float16, without its sign


class Topk(NamedTuple):
    """The most likely tokens of n states.

    Example: ``Topk(ids=[[7, 2]], log_probs=[[-0.69, -1.2]], log_tail=[-1.61])``.
    """

    ids: np.ndarray  # int32[n, K], most likely first
    log_probs: np.ndarray  # float32[n, K], -inf for a token that cannot occur
    log_tail: np.ndarray  # float32[n], log of the mass of all other tokens


def encode_topk(topk: Topk, dtype: LogProbDtype) -> bytes:
    """The bytes of n states' top k; the order of equal log-probs becomes that of ids.

    Args:
        topk: any order of the entries, distinct ids per state.
        dtype: how the log-probs are kept; see the module.

    Raises:
        ValueError: ids that are negative or not distinct; log-probs that are NaN,
            positive, or all -inf in some state.
    """
    ids = np.asarray(topk.ids, np.int64)
    log_probs = np.asarray(topk.log_probs, np.float32)
    log_tail = np.asarray(topk.log_tail, np.float32)
    _check_log_probs(log_probs, log_tail)
    order = np.argsort(ids, axis=-1, kind="stable")
    ids = np.take_along_axis(ids, order, -1)
    log_probs = np.minimum(np.take_along_axis(log_probs, order, -1), 0.0)
    gaps = np.diff(ids, axis=-1, prepend=-1) - 1
    if gaps.size and gaps.min() < 0:
        raise ValueError("ids of a state must be distinct and not negative")
    write = {"float32": _write_32, "float16": _write_16, "uint8": _write_8}[dtype]
    return pack_numbers(gaps) + write(log_probs, log_tail)


def decode_topk(
    data: bytes, states: int, top_k: int, dtype: LogProbDtype, *, offset: int = 0
) -> tuple[Topk, int]:
    """What `encode_topk` was given, within the precision of ``dtype``.

    Args:
        data: bytes that hold the encoding.
        states: n, how many states were encoded.
        top_k: K.
        dtype: the one it was encoded with.
        offset: where the encoding starts.

    Returns:
        The top k, most likely first and lower ids first among equals as `jax.lax.top_k`
        orders them, and the offset behind its bytes.

    Raises:
        ValueError: bytes that are no such encoding.
    """
    gaps, offset = unpack_numbers(data, states * top_k, offset)
    ids = np.cumsum(gaps.reshape(states, top_k) + 1, axis=-1) - 1
    if ids.size and not 0 <= ids.min() <= ids.max() <= _MOST_ID:
        raise ValueError("an id beyond int32")
    read = {"float32": _read_32, "float16": _read_16, "uint8": _read_8}[dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        log_probs, log_tail, offset = read(data, states, top_k, offset)
        # A list without mass, which is never written, has no log-probs.
        if not (np.all(log_probs <= _ROUNDING) and np.all(log_tail <= _ROUNDING)):
            raise ValueError("log-probs that are NaN or positive")
    order = np.argsort(-log_probs, axis=-1, kind="stable")
    return Topk(
        np.take_along_axis(ids, order, -1).astype(np.int32),
        np.take_along_axis(log_probs, order, -1).astype(np.float32),
        log_tail.astype(np.float32),
    ), offset


def pack_numbers(values: np.ndarray) -> bytes:
    """Whole numbers as a Rice code, whose parameter r is chosen to be the shortest.

    A number is its r low bits, all numbers' after one another, and behind them the rest
    in unary: as many zeros, then a one. In two planes either decodes without a loop.

    Args:
        values: int[*any], in [0, 2**32).
    """
    values = np.asarray(values, np.int64).ravel()
    sizes = [
        values.size * (r + 1) + int((values >> r).sum()) for r in range(_MOST_BITS)
    ]
    r = int(np.argmin(sizes))
    octets = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    low = np.unpackbits(octets, axis=1, bitorder="little")[:, :r]
    ends = np.cumsum((values >> r) + 1)
    unary = np.zeros(ends[-1] if values.size else 0, np.uint8)
    unary[ends - 1] = 1
    low, unary = (np.packbits(x, bitorder="little").tobytes() for x in (low, unary))
    return _PLANE.pack(r, len(unary)) + low + unary


def unpack_numbers(data: bytes, count: int, offset: int) -> tuple[np.ndarray, int]:
    """``count`` numbers that `pack_numbers` wrote at ``offset``: int64, and the end.

    Raises:
        ValueError: bytes that are no such code.
    """
    try:
        r, size = _PLANE.unpack_from(data, offset)
    except struct.error as error:
        raise ValueError(f"numbers cut short: {error}") from None
    low, offset = _take(data, offset + _PLANE.size, -(-count * r // 8), np.uint8)
    unary, offset = _take(data, offset, size, np.uint8)
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if len(ends) != count or r >= _MOST_BITS:
        raise ValueError(f"{len(ends)} numbers where {count} were stored")
    bits = np.zeros((count, 8 * -(-r // 8)), np.uint8)
    low = np.unpackbits(low, bitorder="little")[: count * r]
    bits[:, :r] = low.reshape(count, r)
    octets = np.zeros((count, 4), np.uint8)
    octets[:, : bits.shape[1] // 8] = np.packbits(bits, axis=1, bitorder="little")
    rest = np.diff(ends, prepend=-1) - 1
    return (rest << r) + octets.view("<u4")[:, 0], offset


def _check_log_probs(log_probs: np.ndarray, log_tail: np.ndarray) -> None:
    if not (np.all(log_probs <= _ROUNDING) and np.all(log_tail <= _ROUNDING)):
        raise ValueError("log-probs of the teacher are NaN or positive")
    if log_probs.size and np.any(np.max(log_probs, axis=-1) == -np.inf):
        raise ValueError("no token of a state has a finite log-prob")


# What stores log-probs [n, K] of ids in ascending order, and the log of the tail [n].


def _write_32(log_probs: np.ndarray, log_tail: np.ndarray) -> bytes:
    return log_probs.astype("<f4").tobytes() + log_tail.astype("<f4").tobytes()


def _read_32(data, states, top_k, offset):
    log_probs, offset = _take(data, offset, states * top_k, "<f4")
    log_tail, offset = _take(data, offset, states, "<f4")
    return log_probs.reshape(states, top_k), log_tail, offset


def _write_16(log_probs: np.ndarray, log_tail: np.ndarray) -> bytes:
    with np.errstate(over="ignore"):  # what float16 cannot reach becomes impossible
        patterns = log_probs.astype(np.float16).view(np.uint16).astype(np.int64)
    sizes = patterns & 0x7FFF  # grows with the distance from 0
    possible = sizes < _IMPOSSIBLE
    lowest = np.max(np.where(possible, sizes, 0), axis=-1, keepdims=True)
    codes = np.where(possible, lowest - sizes + 1, 0)
    parts = (lowest.astype("<u2"), _odds(log_probs, log_tail).astype("<f2"))
    return b"".join(part.tobytes() for part in parts) + pack_numbers(codes)


def _read_16(data, states, top_k, offset):
    lowest, offset = _take(data, offset, states, "<u2")
    odds, offset = _take(data, offset, states, "<f2")
    codes, offset = unpack_numbers(data, states * top_k, offset)
    codes = codes.reshape(states, top_k)
    sizes = np.where(codes > 0, lowest[:, None].astype(np.int64) + 1 - codes, 0)
    if sizes.size and sizes.min() < 0:
        raise ValueError("log-probs out of range")
    log_probs = -sizes.astype(np.uint16).view(np.float16).astype(np.float64)
    return (*_restored(np.where(codes > 0, log_probs, -np.inf), odds), offset)


def _write_8(log_probs: np.ndarray, log_tail: np.ndarray) -> bytes:
    largest = np.max(log_probs, axis=-1, keepdims=True)
    gaps = largest.astype(np.float64) - log_probs
    possible = gaps <= _FAR
    gaps = np.where(possible, gaps, 0.0)
    width = _width_code(np.max(gaps, axis=-1))
    share = gaps / _width(width)[:, None]
    levels = np.rint(_LEVELS * share ** (1 / _POWER)).astype(np.int64)
    # Most of a list lies near its end, which therefore has the small numbers.
    codes = np.where(possible, _LEVELS + 1 - levels, 0)
    parts = (width, _odds(log_probs, log_tail).astype("<f2"))
    return b"".join(part.tobytes() for part in parts) + pack_numbers(codes)


def _read_8(data, states, top_k, offset):
    width, offset = _take(data, offset, states, np.uint8)
    odds, offset = _take(data, offset, states, "<f2")
    codes, offset = unpack_numbers(data, states * top_k, offset)
    codes = codes.reshape(states, top_k)
    if codes.size and codes.max() > _LEVELS + 1:
        raise ValueError("log-probs out of range")
    share = ((_LEVELS + 1 - codes) / _LEVELS) ** _POWER
    log_probs = np.where(codes > 0, -share * _width(width)[:, None], -np.inf)
    return (*_restored(log_probs, odds), offset)


def _width_code(widest: np.ndarray) -> np.ndarray:
    """uint8: the smallest of the widths, 4 % apart, that holds each range."""
    with np.errstate(divide="ignore"):
        code = np.ceil(16 * np.log2(widest)) + 128
    return np.clip(code, 0, 255).astype(np.uint8)


def _width(code: np.ndarray) -> np.ndarray:
    """float64: from 2**-8 nats to above `_FAR`."""
    return 2.0 ** ((code.astype(np.float64) - 128) / 16)


def _odds(log_probs: np.ndarray, log_tail: np.ndarray) -> np.ndarray:
    """Log of the tail's mass over the list's, which float16 holds well at both ends."""
    return log_tail.astype(np.float64) - np.logaddexp.reduce(
        log_probs.astype(np.float64), axis=-1
    )


def _restored(log_probs: np.ndarray, odds: np.ndarray):
    """The list shifted to its mass, and the log of the tail's."""
    odds = odds.astype(np.float64)
    listed = np.logaddexp.reduce(log_probs, axis=-1)
    shift = -np.logaddexp(0.0, odds) - listed
    return log_probs + shift[:, None], -np.logaddexp(0.0, -odds)


def _take(data: bytes, offset: int, count: int, dtype) -> tuple[np.ndarray, int]:
    """``count`` numbers of one type, and the offset behind them."""
    end = offset + count * np.dtype(dtype).itemsize
    if end > len(data):
        raise ValueError(f"{len(data)} bytes where at least {end} were stored")
    return np.frombuffer(data, dtype, count, offset), end
