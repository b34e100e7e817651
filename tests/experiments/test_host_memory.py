"""What is freed is there for the next array, unless the user said otherwise."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from experiments.host_memory import keep_freed_memory

print(int(KEEP and keep_freed_memory()))
np.ones(2**24)  # 128 MiB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def answers(keep: bool, **variables: str) -> tuple[bool, int]:
    """What `keep_freed_memory` says, and the page faults of the second array."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    program = PROGRAM.replace("KEEP", str(keep))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        # Huge pages would make few faults of many.
        env=clean | {"NUMPY_MADVISE_HUGEPAGE": "0"} | variables,
    )
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


@pytest.mark.skipif(sys.platform != "linux", reason="an allocator of Linux")
def test_an_array_takes_the_pages_of_the_one_before():
    kept, faults = answers(keep=True)
    if not kept:
        pytest.skip("the C library is not glibc")
    _, without = answers(keep=False)
    assert without > 2**14  # pages of 4 KiB in 128 MiB: 2**15
    assert faults < 2**8


def test_a_variable_of_the_environment_wins():
    assert answers(keep=True, MALLOC_ARENA_MAX="2")[0] is False
