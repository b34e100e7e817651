"""The end of one of several processes that cannot go on."""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn

import jax

PATIENCE = 10.0
"""Seconds that a process has to end by itself."""


def leave(status: int) -> NoReturn:
    """`sys.exit`, within seconds however many processes there are; see `leave_soon`.

    Example: ``except CheckpointError as error: print(error); leave(2)`` in a program
    that several processes run.
    """
    leave_soon(status)
    sys.exit(status)


def leave_soon(status: int) -> None:
    """End this process with a status, unless it has ended by itself in ten seconds.

    At its end a process waits minutes for all others, and those that wait in a
    collective for what this one would have computed notice only that it is gone.
    Process 0 is the one that they find each other by: it stays twice as long, for
    without it the runtime ends those that have not yet said why they stop.
    """
    if not jax.distributed.is_initialized():
        return
    try:
        first = jax.process_index() == 0
    except RuntimeError:  # there are no devices, which may be why it leaves
        first = False

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    timer = threading.Timer(2 * PATIENCE if first else PATIENCE, end)
    timer.daemon = True
    timer.start()
