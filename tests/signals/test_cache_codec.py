"""Lists of tokens as bytes: exact where they promise it, small where they must be."""

import doctest
import struct

import jax
import numpy as np
import pytest

from rkd_jax.signals import (
    cache_codec,
    cache_format,
    cache_identity,
    cache_manifest,
)
from rkd_jax.signals.cache_codec import (
    LOG_PROB_DTYPES,
    Topk,
    decode_topk,
    encode_topk,
    pack_numbers,
    unpack_numbers,
)
from rkd_jax.signals.cache_format import (
    CachedRecord,
    CachedResponse,
    CacheError,
    CacheSettings,
    fingerprint,
    pack_record,
    unpack_record,
)
from rkd_jax.signals.cache_shards import summary, write_shard

VOCABULARY, TOP = 49152, 50


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_topk(states, *, vocabulary=VOCABULARY, top=TOP, scale=1.0, seed=0):
    """The top of random logits, and all of its log-probs: float64."""
    rng = np.random.default_rng(seed)
    log_probs = log_softmax(scale * rng.normal(size=(states, vocabulary)))
    ids = np.argsort(-log_probs, axis=-1, kind="stable")
    listed = np.take_along_axis(log_probs, ids, -1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(listed[:, top:]).sum(-1))
    return Topk(ids[:, :top], listed[:, :top], tail)


def there_and_back(topk, dtype):
    states, top = topk.ids.shape
    data = encode_topk(topk, dtype)
    found, end = decode_topk(b"front" + data, states, top, dtype, offset=5)
    assert end == 5 + len(data)
    return found


def slow_rice(data):
    """A bit at a time."""
    r, size = struct.unpack_from("<BI", data)
    low, unary = (
        "".join(f"{byte:08b}"[::-1] for byte in plane)
        for plane in (data[5 : len(data) - size], data[len(data) - size :])
    )
    high = [len(zeros) for zeros in unary.rstrip("0").split("1")[:-1]]
    for i, rest in enumerate(high):
        digits = low[i * r : (i + 1) * r][::-1]  # lowest bit first
        yield (rest << r) + (int(digits, 2) if digits else 0)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0],
        [3, 0, 1, 2],
        [1000, 900, 1100, 5],
        [2**17, 0, 0],
        np.random.default_rng(1).geometric(1 / 50, size=1000) - 1,
    ],
    ids=["none", "zero", "small", "large", "outlier", "many"],
)
def test_numbers_come_back_and_are_a_rice_code(values):
    values = np.asarray(values, np.int64)
    data = pack_numbers(values)
    found, end = unpack_numbers(data, len(values), 0)
    np.testing.assert_array_equal(found, values)
    assert end == len(data)
    assert list(slow_rice(data)) == values.tolist()
    best = min(len(values) * (r + 1) + int((values >> r).sum()) for r in range(24))
    assert 8 * (len(data) - 5) - best < 16  # two planes, each rounded up to a byte


def test_float32_keeps_every_bit_and_the_order_of_top_k():
    logits = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32)
    logits[0, 10:14] = logits[0].max()  # equals: the lower id comes first
    log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits), 6)
    tail = np.log1p(-np.exp(log_probs).sum(-1))
    found = there_and_back(Topk(ids, log_probs, tail), "float32")
    for array, expected in zip(found, (ids, log_probs, tail), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert (found.ids.dtype, found.log_probs.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_coarse_log_probs_are_as_close_as_they_promise(dtype, scale):
    topk = random_topk(60, vocabulary=2000, scale=scale)
    found = there_and_back(topk, dtype)
    same = np.zeros((60, 2000))
    np.put_along_axis(same, found.ids, found.log_probs.astype(np.float64), -1)
    kept = np.take_along_axis(same, topk.ids, -1)
    largest = topk.log_probs.max(-1, keepdims=True)
    gap, error = largest - topk.log_probs, np.abs(kept - topk.log_probs)
    if dtype == "float16":  # its rounding, and the shift that makes up for it
        step = 2.0**-10 * np.abs(topk.log_probs)
        assert np.all(error <= step / 2 + step.max(-1, keepdims=True) / 2 + 2.0**-9)
    else:
        width = 1.045 * gap.max(-1, keepdims=True)  # ranges are 4.4 % apart
        half = 1.5 * np.cbrt(width * gap**2) / 254 + 1.5 * width / 254**2
        drift = np.abs((kept - kept.max(-1, keepdims=True)) + gap)
        assert np.all(drift <= half + 1e-6)
    mass = np.exp(found.log_probs.astype(np.float64)).sum(-1)
    np.testing.assert_allclose(mass + np.exp(found.log_tail), 1.0, atol=2e-6)
    # As odds, the tail is as exact as float16, however small or large it is.
    odds = topk.log_tail - np.log(np.exp(topk.log_probs).sum(-1))
    stored = found.log_tail - np.log(mass)
    np.testing.assert_allclose(stored, odds, rtol=2**-11 + 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", LOG_PROB_DTYPES)
def test_impossible_tokens_and_a_list_without_a_tail(dtype):
    log_probs = np.array([[np.log(0.75), np.log(0.25), -np.inf], [0.0, *[-np.inf] * 2]])
    topk = Topk(np.array([[2, 0, 1], [1, 0, 2]]), log_probs, np.full(2, -np.inf))
    found = there_and_back(topk, dtype)
    np.testing.assert_array_equal(found.ids, [[2, 0, 1], [1, 0, 2]])
    np.testing.assert_array_equal(np.isinf(found.log_probs), np.isinf(log_probs))
    np.testing.assert_allclose(found.log_probs[0, :2], log_probs[0, :2], atol=5e-4)
    np.testing.assert_array_equal(found.log_probs[1, 0], 0.0)
    np.testing.assert_array_equal(found.log_tail, -np.inf)


def test_what_has_no_mass_is_impossible_in_uint8():
    topk = Topk(np.array([[0, 1]]), np.array([[0.0, -200.0]]), np.array([-300.0]))
    found = there_and_back(topk, "uint8")
    np.testing.assert_array_equal(found.log_probs, [[0.0, -np.inf]])


@pytest.mark.parametrize("dtype", LOG_PROB_DTYPES)
@pytest.mark.parametrize(
    ("ids", "log_probs", "message"),
    [
        ([[1, 1]], [[-1.0, -1.0]], "distinct"),
        ([[-1, 1]], [[-1.0, -1.0]], "not negative"),
        ([[0, 1]], [[np.nan, -1.0]], "NaN or positive"),
        ([[0, 1]], [[0.5, -1.0]], "NaN or positive"),
        ([[0, 1]], [[-np.inf, -np.inf]], "no token"),
    ],
)
def test_what_is_no_distribution_is_refused(ids, log_probs, message, dtype):
    with pytest.raises(ValueError, match=message):
        encode_topk(Topk(np.array(ids), np.array(log_probs), np.zeros(1)), dtype)


@pytest.mark.parametrize("dtype", LOG_PROB_DTYPES)
def test_damaged_bytes_are_an_error(dtype):
    topk = random_topk(4, vocabulary=30, top=5)
    data = encode_topk(topk, dtype)
    for broken in (data[:-1], data[:3], data[:5] + b"\xff" * (len(data) - 5)):
        with pytest.raises(ValueError, match=r"stored|cut short|range"):
            decode_topk(broken, 4, 5, dtype)


def record_of(topk, rng, values=None):
    """A record whose states are drawn from ``topk``."""
    targets = rng.integers(0, VOCABULARY, size=len(topk.ids))
    digest, checks = fingerprint([1, 2], [3], targets)
    response = CachedResponse(digest, len(targets), values or {}, checks, topk)
    return CachedRecord((response,))


def test_a_record_survives_and_its_bytes_are_counted():
    rng, settings = np.random.default_rng(0), CacheSettings(50, "float32")
    record = record_of(random_topk(3, vocabulary=VOCABULARY), rng)
    data = pack_record(record, settings)
    (found,) = unpack_record(data, settings).responses
    (wanted,) = record.responses
    assert (found.digest, found.length) == (wanted.digest, 3)
    np.testing.assert_array_equal(found.checks, wanted.checks)
    np.testing.assert_array_equal(found.topk.ids, wanted.topk.ids)
    assert unpack_record(data, settings, lists=False).responses[0].topk is None
    for broken in (data[:-1], data + b"0", data[:4]):
        with pytest.raises(CacheError, match="a record that cannot be read"):
            unpack_record(broken, settings)


@pytest.mark.parametrize(
    ("dtype", "scale", "limit"),
    # uint8 is bounded whatever the teacher; float16 grows with the range of the list.
    [("uint8", 1.0, 120), ("uint8", 8.0, 120), ("float16", 1.0, 124)],
)
def test_bytes_per_token_with_index(tmp_path, dtype, scale, limit):
    """A file of 256 responses of 512 random targets at V = 49152 and k = 50."""
    rng = np.random.default_rng(0)
    pool = random_topk(200, scale=scale)
    settings = CacheSettings(TOP, dtype)
    states = rng.integers(0, 200, size=(256, 512))
    lists = [Topk(*(part[rows] for part in pool)) for rows in states]
    path = tmp_path / "shard-00000.array_record"
    write_shard(path, (pack_record(record_of(x, rng), settings) for x in lists))
    shard = summary(path, settings, first=0)
    assert (shard.records, shard.tokens) == (256, 256 * 512)
    assert path.stat().st_size == shard.bytes
    assert 110 < shard.bytes / shard.tokens <= limit


def test_fingerprints_tell_rows_and_beginnings_apart():
    digest, checks = fingerprint([1, 2], [3], [4, 5, 6])
    assert len(digest) == 8
    assert checks.shape == (3,)
    for other in (
        ([1], [2, 3], [4, 5, 6]),
        ([1, 2], [4], [4, 5, 6]),
        ([1, 2], [3], [4, 5, 7]),
        ([1, 2], [3], [4, 5]),
    ):
        assert fingerprint(*other)[0] != digest
    np.testing.assert_array_equal(fingerprint([1, 2], [3], [4, 5])[1], checks[:2])
    assert fingerprint([1, 2], [3], [5, 5])[1][0] != checks[0]


DOCTESTED = [cache_codec, cache_format, cache_identity, cache_manifest]


@pytest.mark.parametrize("module", DOCTESTED)
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
