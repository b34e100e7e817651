"""The head of a GGUF file, walked before anything in it is believed.

The reader of the ``gguf`` package takes every length at its word: behind the end of a
file it finds empty arrays, so that a single wrong length may keep it busy until memory
ends. Here no string, array or tensor may reach beyond the file, and nothing is made of
them; what passes is parsed by that reader.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9  # types of metadata
# The reader makes an object of each; the largest vocabularies have a tenth of it.
_MOST_ITEMS = 2**21
_MOST_AXES = 4
_LARGEST_AXIS = 2**31 - 1
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def check_head(path: Path) -> None:
    """Pass if every length in the head of a file is possible in a file of its size.

    Args:
        path: an existing file.

    Raises:
        ValueError: it is none, and why; the file is not named.
    """
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if data[:4] != _MAGIC:
            raise ValueError(f"the magic is {data[:4]!r}, not {_MAGIC!r}")
        walk = _Walk(data, at=4)
        version = walk.u32()
        if version & 0xFFFF == 0:
            raise ValueError("big-endian; convert it to little-endian")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; 2 and 3 are read")
        tensors, fields = walk.u64(), walk.u64()
        alignment = 32
        for _ in range(fields):
            key, kind = walk.string(), walk.u32()
            start = walk.at
            walk.value(kind)
            if key == b"general.alignment" and kind == _UINT32:
                (alignment,) = _U32.unpack_from(data, start)
        places = [walk.tensor() for _ in range(tensors)]
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment} is no power of two")
        start = -(-walk.at // alignment) * alignment
        for number, (offset, size) in enumerate(places):
            if start + offset + size > len(data):
                raise ValueError(
                    f"tensor {number} has {size} bytes from {start + offset} on, in a "
                    f"file of {len(data)}"
                )


class _Walk:
    """A place in a file; no step leads out of it."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def skip(self, size: int) -> int:
        """Go on by ``size`` bytes; where they began."""
        start = self.at
        if size > len(self.data) - start:
            raise ValueError(f"{size} bytes at {start} of a file of {len(self.data)}")
        self.at += size
        return start

    def u32(self) -> int:
        return _U32.unpack_from(self.data, self.skip(4))[0]

    def u64(self) -> int:
        return _U64.unpack_from(self.data, self.skip(8))[0]

    def string(self) -> bytes:
        """A short string; of a longer one the beginning."""
        size = self.u64()
        start = self.skip(size)
        return self.data[start : start + min(size, 64)]

    def value(self, kind: int) -> None:
        """Pass one value of metadata; arrays hold numbers or strings."""
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.skip(self.u64())
        elif kind == _ARRAY:
            kind, count = self.u32(), self.u64()
            if count > _MOST_ITEMS or kind not in {*_SCALARS, _STRING}:
                raise ValueError(f"an array of {count} values of type {kind}")
            if kind in _SCALARS:
                self.skip(count * _SCALARS[kind])
            else:
                for _ in range(count):
                    self.skip(self.u64())
        else:
            raise ValueError(f"a value of type {kind}")

    def tensor(self) -> tuple[int, int]:
        """Offset and size of a tensor's data."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self.string()
        axes = self.u32()
        if axes > _MOST_AXES:
            raise ValueError(f"a tensor of {axes} axes")
        shape = [self.u64() for _ in range(axes)]
        if not all(0 < size <= _LARGEST_AXIS for size in shape):
            raise ValueError(f"a tensor of shape {tuple(shape)}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.u32())]
        return self.u64(), math.prod(shape) * size // block
