"""Damage to files, a function of a number: what fails once fails again.

`damaged_bytes` knows nothing of a format, `damaged_json` keeps most of the syntax and
changes what it says. To `verdict` a reader may do two things: give what the file holds,
or say in one line what is wrong with which file.
"""

import copy
import json
import math
import random
import signal
import struct
from contextlib import contextmanager

SECONDS = 30  # no damaged file is large: a reader that takes so long does not end
LENGTHS = [
    *(0, 1, 5, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**40, 2**63 - 1, 2**64 - 1),
]
NAMES = [
    "../x",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "..",
    ".",
    "",
    "sub/x",
    "sub\\x",
    "C:x",
    "nul\0byte",
    "two\nlines",
    "\x1b[2J",
    "\ud800",
    "\u202egnp",
    "n" * 300,
    "é" * 200,
    "x" * 5000,
    "[0:9]",
]
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1.0, 2.5, -0.0, 1e-320, 1e39, 1e308),
    *(math.inf, -math.inf, math.nan, 2**24, 2**31, 2**53, 2**63, 2**64, 10**30),
    *(10**400, -(10**400), "1", [], {}, [[]], {"": {}}, [None], ["a", 1]),
]


class Hung(KeyboardInterrupt):
    """A reader took too long; no `Exception`, which a reader would catch."""


@contextmanager
def deadline(seconds=SECONDS):
    """Stop Python code that takes longer."""

    def stop(*_):
        raise Hung(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Hung as error:
        raise AssertionError(str(error)) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_message(error, *texts):
    """Fail unless an error says in one printable line what it must."""
    message = str(error)
    assert message.isprintable(), ascii(message)
    assert 0 < len(message) < 1500, len(message)
    assert any(text in message for text in texts), message


def verdict(read, errors, names):
    """What became of a damaged file, "loaded" or "refused"; a test fails at all else.

    Args:
        read: reads a file and asserts that what it got is what the file says.
        errors: what it may raise instead; the message is one printable line.
        names: text that this line must contain, the path of the file's folder.
    """
    try:
        with deadline():
            read()
    except errors as error:
        check_message(error, str(names))
        return "refused"
    return "loaded"


def damaged_bytes(data, seed, spots=()):
    """``data`` with one to three faults; half of them at or behind one of ``spots``."""
    rng, damaged = random.Random(seed), bytearray(data)
    spots = [spot for spot in spots if spot < len(data)]

    def place():
        if spots and rng.random() < 0.5:
            return min(rng.choice(spots) + rng.randrange(32), len(damaged))
        return rng.randrange(len(damaged) + 1)

    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_FAULTS)(damaged, place, rng)
    return bytes(damaged)


def _flip(data, place, rng):
    at = min(place(), len(data) - 1)
    if at >= 0:
        data[at] ^= 1 << rng.randrange(8)


def _overwrite(data, place, rng):
    at = place()
    size = min(rng.choice((1, 2, 4, 8, 64)), len(data) - at)
    data[at : at + size] = rng.randbytes(size)


def _truncate(data, place, rng):
    del data[place() :]


def _insert(data, place, rng):
    at = place()
    data[at:at] = rng.randbytes(rng.choice((1, 3, 8, 100)))


def _remove(data, place, rng):
    at = place()
    del data[at : at + rng.choice((1, 3, 8, 100))]


def _repeat(data, place, rng):
    at, source = place(), place()
    data[at:at] = data[source : source + rng.choice((1, 8, 32, 500))]


def _swap(data, place, rng):
    size = rng.choice((1, 4, 8, 16))
    first, second = sorted((place(), place()))
    if first + size <= second and second + size <= len(data):
        swapped = data[second : second + size], data[first : first + size]
        data[first : first + size], data[second : second + size] = swapped


def _length(data, place, rng):
    at = place()
    value = rng.choice([*LENGTHS, len(data), len(data) + 1, len(data) - at])
    number = struct.pack("<Q", value)[: rng.choice((4, 8))]
    data[at : at + len(number)] = number


def _zero(data, place, rng):
    at = place()
    size = min(rng.choice((1, 8, 64)), len(data) - at)
    data[at : at + size] = bytes(size)


_FAULTS = (
    *(_flip, _overwrite, _truncate, _insert, _remove),
    *(_repeat, _swap, _length, _length, _zero),
)


def damaged_json(value, seed):
    """``value`` as JSON text, with one or two changes to content or form."""
    rng = random.Random(seed)
    kind = rng.random()
    if kind < 0.04:
        return _deep(rng)
    if kind < 0.16:
        return damaged_bytes(json.dumps(value).encode(), seed)
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2))):
        _change(root, rng)
    return json.dumps(root[0]).encode()


_LEVELS = ((b"[", b"]"), (b'{"a":', b"}"), (b'{"a":[', b"]}"))


def _deep(rng):
    depth = rng.choice((200, 480, 900, 990, 5000, 100_000))
    opening, closing = rng.choice(_LEVELS)
    return opening * depth + b"1" + closing * depth


def _nested(rng):
    value = 1
    for _ in range(rng.choice((3, 50, 400, 700))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _keys(parent):
    return list(parent) if isinstance(parent, dict) else range(len(parent))


def _change(root, rng):
    """One change somewhere below ``root``, a list with the whole value in it."""
    parent, key = root, 0
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(_keys(parent))
    kind = rng.random()
    if kind < 0.35:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind < 0.5:
        parent[key] = rng.choice(NAMES)
    elif kind < 0.56:
        parent[key] = _nested(rng)
    elif kind < 0.62:
        parent[key] = [parent[key]]
    elif kind < 0.7 and parent is not root:
        other = rng.choice(_keys(parent))
        parent[key], parent[other] = parent[other], parent[key]
    elif isinstance(parent, dict):
        value = parent.pop(key) if kind < 0.85 else parent[key]
        if kind > 0.77:
            parent[rng.choice([*NAMES, "a", "name", key + key])] = value
    elif parent is not root:
        if kind < 0.85:
            del parent[key]
        else:
            parent.append(parent[key])
    else:
        root[0] = copy.deepcopy(rng.choice(VALUES))
