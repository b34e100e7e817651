r"""Files that somebody else wrote: what is wrong with one fits into one line.

A copy breaks off, a disk returns other bytes, a name points elsewhere. A reader then
raises its own error, which names the file and shows what it found there, never more
than a line of it and never a character that a terminal would act upon.

>>> one_line("two\nlines")
'two\\nlines'
>>> shown({"a": [[[[[0]]]]]})
"{'a': [[[[...]]]]}"
>>> [is_plain_name(name) for name in ("model-00001.safetensors", "../secret")]
[True, False]
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MOST_NAME_BYTES = 255  # what file systems take
_MOST_CHARACTERS = 600

_REPR = reprlib.Repr()  # bounded in depth, where `repr` recurses until it fails
_REPR.maxlevel = 4
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def one_line(text: object) -> str:
    """The beginning of a text, with everything but printable characters escaped."""
    text = str(text)
    end = "..." if len(text) > _MOST_CHARACTERS else ""
    return "".join(map(_printable, text[:_MOST_CHARACTERS])) + end


def shown(value: Any) -> str:
    """`repr` of a value, short however large or deep it is."""
    return one_line(_REPR.repr(value))


def is_plain_name(name: Any) -> bool:
    """Whether ``name`` is that of a file and cannot lead out of a folder."""
    if not isinstance(name, str) or not name.isprintable() or set("/\\:") & set(name):
        return False
    return name not in (".", "..") and 0 < len(name.encode()) <= _MOST_NAME_BYTES


@contextmanager
def refused(prefix: str, error: type[ValueError] = ValueError) -> Iterator[None]:
    """What the block raises becomes ``error``: one line that begins with ``prefix``.

    For parsers that surface a damaged file as whatever they trip over; what is written
    in Rust may even panic, which is no `Exception`.

    Args:
        prefix: names the file.
        error: raised in place of anything but an interruption.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as reason:
        raise error(f"{prefix}: {one_line(reason)}") from reason


def read_object(path: Path, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        error: raised for whatever is wrong with it.

    Raises:
        ValueError: as ``error``: no regular file, not UTF-8, no JSON, nested too
        deeply, no object.
    """
    if not path.is_file():  # a pipe would be waited for
        raise error(f"{path}: not a file")
    with refused(f"{path}: not valid JSON", error):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object")
    return content


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()
