"""What one chip has, as its maker publishes it.

Figures of TPUs are those of https://docs.cloud.google.com/tpu/docs, pages v5e, v5p, v6e
and tpu7x (Specification tables, read November 2026), but for `Chip.usable`, which
libtpu 0.0.51 says of a program that is too large. Those of GPUs are of NVIDIA's data
sheets, SXM, without sparsity; usable is what JAX takes of the memory by itself, three
quarters (``XLA_PYTHON_CLIENT_MEM_FRACTION``). The published bandwidth between chips is
of both directions; one direction is half of it.

>>> round(CHIPS["v5e"].peak / CHIPS["v5e"].hbm_bandwidth)  # operations per byte
241
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a slice: a chip, or half of one where a chip is two devices.

    Example: ``CHIPS["v5e"].usable`` is 15.75 GiB in bytes.
    """

    name: str
    usable: int  # bytes of HBM that a program is given
    peak: float  # bfloat16 operations per second
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second out of the device over all its links
    kind: Literal["tpu", "gpu"] = "tpu"


CHIPS = MappingProxyType(
    {
        "v5e": Chip("TPU v5e", int(15.75 * GIB), 197e12, 819e9, 400e9 / 2),
        "v5p": Chip("TPU v5p", int(95.73 * GIB), 459e12, 2765e9, 1200e9 / 2),
        "v6e": Chip("TPU v6e", int(31.24 * GIB), 918e12, 1638e9, 800e9 / 2),
        # Two devices to a chip: half of 2307 TFLOP/s, 7380 GB/s and 1200 GB/s.
        "tpu7x": Chip("TPU7x, half", int(94.74 * GIB), 1153.5e12, 3690e9, 600e9 / 2),
        "h100": Chip("H100", 3 * 84929347584 // 4, 989.4e12, 3352e9, 900e9 / 2, "gpu"),
        "h200": Chip("H200", 3 * 150754820096 // 4, 989.4e12, 4800e9, 900e9 / 2, "gpu"),
    }
)
"""By the name that begins a topology."""
