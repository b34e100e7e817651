"""A command of several processes, of which one alone fails.

``python -m tests.experiments.failing_process --distributed --failure KIND --process N``
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import jax
from jax.experimental import multihost_utils

from experiments.command import run_command


@dataclasses.dataclass(frozen=True)
class Failure:
    """What ends the process: something mendable, a fault, or nothing."""

    failure: Literal["disk", "fault", "none"] = "none"
    process: int = 1


def run(config: Failure) -> Path:
    """All processes compute; one may leave before they do it again."""
    multihost_utils.sync_global_devices("before")
    if jax.process_index() == config.process:
        print("about to fail")  # into a buffer, for it is no terminal
        if config.failure == "disk":
            raise OSError("the disk of this process is full")
        if config.failure == "fault":
            raise ZeroDivisionError("a fault of ours")
    multihost_utils.sync_global_devices("after")
    return Path(sys.argv[0])


if __name__ == "__main__":
    run_command(run, Failure, Failure)
