"""JSON Lines on disk: reading that explains every bad line, writing that leaves none.

>>> import io
>>> for place, row in json_lines(io.BytesIO(b'{"prompt": "Hi"}\\n{"pro'), max_chars=80):
...     print(place, row)
1 {'prompt': 'Hi'}
2 torn last line; its writer was interrupted; delete that line
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rkd_jax.data.records import Record, RecordError

EMPTY_LINE = RecordError("empty line", "harmless")


def json_lines(file: Any, max_chars: int) -> Iterator[tuple[int, Any]]:
    """Line number from 1, and the parsed line or the `RecordError` that describes it.

    Args:
        file: opened in binary mode. UTF-8; a byte order mark is tolerated.
        max_chars: a longer line is an error and is never held as a whole.
    """
    max_bytes = 4 * max_chars + 2  # UTF-8 needs at most four bytes per character
    place = 0
    while line := file.readline(max_bytes + 1):
        place += 1
        if len(line) > max_bytes:
            while line and not line.endswith(b"\n"):
                line = file.readline(max_bytes)
            yield place, _too_long(max_chars)
            continue
        if place == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield place, _json_line(line, max_chars)


def _json_line(line: bytes, max_chars: int) -> Any:
    """The parsed line, or the error that describes it."""
    if not line.strip():
        return EMPTY_LINE
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        if len(text) > max_chars:
            return _too_long(max_chars)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            return RecordError(
                "torn last line", "its writer was interrupted; delete that line"
            )
        if isinstance(error, UnicodeDecodeError):
            where = f"byte {error.start} of the line is {line[error.start]:#04x}"
            return RecordError("not UTF-8", f"{where}; convert the file to UTF-8")
        if isinstance(error, json.JSONDecodeError):
            return RecordError("malformed JSON", f"column {error.colno}: {error.msg}")
        return RecordError("malformed JSON", "nested too deeply or a number too long")


def _too_long(max_chars: int) -> RecordError:
    return RecordError(
        f"line longer than {max_chars} characters", "split it or raise max_chars"
    )


def _encode(records: Iterable[Record]) -> bytes:
    lines = [json.dumps(r.to_json(), ensure_ascii=False) + "\n" for r in records]
    return "".join(lines).encode("utf-8")


def write_jsonl(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSON Lines, all or nothing: the file appears when it is whole.

    An existing file stays as it is until then; the directory must exist.
    """
    path = Path(path)
    data = _encode(records)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def append_jsonl(
    path: str | Path, records: Iterable[Record], *, repair: bool = False
) -> None:
    """Append whole lines to a JSON Lines file and wait until they are on disk.

    If writing fails, the file is cut back to its old length. If the machine dies, the
    last line may be torn; the next call refuses to write behind it, or, with
    ``repair``, removes it first. One writer at a time.

    Raises:
        RecordError: the file ends in a torn line and ``repair`` is False.
    """
    path = Path(path)
    data = _encode(records)
    # Unbuffered: closing must not write again what a failed write has left behind.
    with path.open("a+b", buffering=0) as file:
        tail = _unfinished_line(file)
        end = file.seek(0, os.SEEK_END)
        if tail and _is_json(tail):
            data = b"\n" + data  # a whole line that only lacks its line feed
        elif tail and repair:
            end = file.truncate(end - len(tail))
        elif tail:
            raise RecordError(
                f"{path}: torn last line", "delete it, or append with repair=True"
            )
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), end)
            raise
    _sync_directory(path.parent)


def _unfinished_line(file: Any, block: int = 1 << 16) -> bytes:
    """What stands behind the last line feed; reads no more of the file than that."""
    tail = b""
    start = file.seek(0, os.SEEK_END)
    while start and b"\n" not in tail:
        size = min(block, start)
        start -= size
        file.seek(start)
        tail = file.read(size) + tail
    return tail[tail.rfind(b"\n") + 1 :]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _sync_directory(directory: Path) -> None:
    """Make a new or renamed file survive a crash; only POSIX opens directories."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
