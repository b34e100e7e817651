"""What several processes of one run do once: look at files, write them, ask an oracle.

Every process runs the same code on the same rows. What need not be the same for all of
them is process 0's business, and it tells the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rkd_jax.training.interrupt import PeerLost


def once(work: Callable[[], Any]) -> Any:
    """Let process 0 do it; every process has the result, and goes on when it is there.

    All processes have to call it, in the same order. In a single one it is ``work()``.

    Args:
        work: returns plain JSON; what it writes lies where all processes can read it.

    Raises:
        PeerLost: in the other processes, where ``work`` raised in process 0.
    """
    if jax.process_count() == 1:
        return work()
    found, error = None, None
    if jax.process_index() == 0:
        try:
            found = work()
        except Exception as failure:  # the others must not wait for ever
            error = failure
    told = _tell({"found": found, "error": error and type(error).__name__})
    if error is not None:
        raise error
    if told["error"]:
        raise PeerLost(
            f"process 0 stopped with {told['error']}; its own log says why; start all "
            "of them again, and they go on from there"
        )
    return told["found"]


def _tell(message: dict[str, Any]) -> dict[str, Any]:
    """That of process 0, in every process."""
    text = json.dumps(message).encode()
    # A program is compiled for every size, so there are few.
    text = text.ljust(1 << max(10, (len(text) - 1).bit_length()))
    size = multihost_utils.broadcast_one_to_all(np.int32(len(text)))
    text = np.frombuffer(text, np.uint8)
    if jax.process_index() != 0:
        text = np.zeros(int(size), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())
