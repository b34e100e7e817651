"""What is said of a file that somebody else wrote fits into one printable line."""

import doctest
import os

import pytest

from rkd_jax import untrusted
from rkd_jax.untrusted import is_plain_name, one_line, read_object, refused, shown


def test_examples():
    assert doctest.testmod(untrusted).failed == 0


def test_lines_are_short_and_printable():
    assert one_line("é \x1b[2J\ud800\u2028") == r"é \x1b[2J\ud800\u2028"
    assert len(one_line("x" * 10**6)) < 700
    deep = []
    for _ in range(10**5):
        deep = [deep]
    for value in (deep, "x" * 10**6, {"\n": "\n"}, list(range(10**5)), 10**900):
        assert len(shown(value)) < 700
        assert shown(value).isprintable()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/x", "a/b", "a\\b", "C:x", "x\n", "\ud800", "é" * 128, 5],
)
def test_names_that_lead_away_are_not_plain(name):
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")


def test_whatever_fails_is_refused_but_an_interruption():
    class Panic(BaseException):
        """As raised for a panic in Rust."""

    for error in (Panic("a\nb"), RecursionError("a\nb"), MemoryError("a\nb")):
        with (
            pytest.raises(UnicodeError, match=r"^file: a\\nb$"),
            refused("file", UnicodeError),
        ):
            raise error
    with pytest.raises(KeyboardInterrupt), refused("file"):
        raise KeyboardInterrupt


def test_objects_are_read_from_files_alone(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1]}')
    assert read_object(path) == {"a": [1]}
    for content in (b"[1]", b"{", b"\xff", b"[" * 10**5, b"9" * 5000, b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.json: "):
            read_object(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a file"):
        read_object(path)
