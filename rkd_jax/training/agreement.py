"""What one of several processes sees, decided once and told to all of them.

Processes that each look at a disk for themselves may see different things, and one that
acts on what it saw leaves the others waiting, or goes another way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def word_of_first(decide: Callable[[], Any]) -> Any:
    """What ``decide()`` returns in process 0, in every process.

    Args:
        decide: called in process 0 only; returns plain JSON.

    Raises:
        RuntimeError: with its text, in the other processes, where it raised.
        Exception: what it raised, in process 0.
    """
    if jax.process_count() == 1:
        return decide()
    failure, text = None, b""
    if jax.process_index() == 0:
        try:
            word = {"said": decide()}
        except Exception as error:  # raised below, when the others know of it
            failure, word = error, {"failed": str(error)}
        text = json.dumps(word).encode()
    word = json.loads(_broadcast(text))
    if failure is not None:
        raise failure
    if "failed" in word:
        raise RuntimeError(word["failed"])
    return word["said"]


def _broadcast(text: bytes) -> bytes:
    """The bytes of process 0; what others give is not read."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    mine = np.zeros(size, np.int32)
    if jax.process_index() == 0:
        mine = np.frombuffer(text, np.uint8).astype(np.int32)
    return multihost_utils.broadcast_one_to_all(mine).astype(np.uint8).tobytes()
