"""What a bad disk does to one file."""

import os


def cut(path):
    """Half of it is left."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """One bit in the middle is another."""
    text = bytearray(path.read_bytes())
    text[len(text) // 2] ^= 1
    path.write_bytes(text)
