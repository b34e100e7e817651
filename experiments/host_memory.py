"""Memory of a host that is freed is kept for the next array.

XLA on a CPU takes the temporaries of a program anew at every call. glibc gives blocks
of their size back to the system, which then has to clear every page again: on two
cores 0.9 of the 9 seconds of processor time of a GKD step
(`experiments.benchmarks.step`).

Only a command line turns this on; importing the library or an experiment never does.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1
"""Bytes of a block that is kept: mallopt takes an int."""
_OWN = ("GLIBC_TUNABLES", "MALLOC_")
"""Variables by which a user says how memory is to be allocated."""


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed; to be called before the first array.

    The process then stays as large as it once was. One arena serves all threads: from
    another one large blocks would still go back to the system.

    Returns:
        Whether it does: not without glibc, nor where a variable of the environment
        (``GLIBC_TUNABLES``, ``MALLOC_..``) says what the allocator is to do.
    """
    if sys.platform != "linux" or any(name.startswith(_OWN) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    wanted = {_ARENA_MAX: 1, _MMAP_THRESHOLD: _LARGEST, _TRIM_THRESHOLD: -1}
    return all(mallopt(name, value) for name, value in wanted.items())
