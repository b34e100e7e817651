"""What several processes of one run do once: look at files, write them, ask an oracle.

Every process runs the same code. What need not be the same for all of them is process
0's business, and it tells the others. What each has to see for itself they tell one
another, so that they come to one conclusion.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rkd_jax.training.interrupt import PeerLost, blaming_peers
from rkd_jax.training.provenance import summary


class Disagreement(RuntimeError):
    """Something failed in some processes and not in others; the text names them."""


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


def unanimous(work: Callable[[], Any]) -> Any:
    """Let every process do it; if it fails in one of them it fails in all.

    All processes have to call it, in the same order. In a single one it is ``work()``.

    Args:
        work: waits for no other process.

    Returns:
        What ``work`` returned in this process.

    Raises:
        Disagreement: ``work`` raised in some of the processes, or not the same kind of
            error in all of them. Where it did, it is raised as it is.
    """
    found, error = None, None
    try:
        found = work()
    except Exception as failure:  # the others must not wait for ever
        error = failure
    verdicts = _from_each(error and [type(error).__name__, str(error)])
    if len({verdict and verdict[0] for verdict in verdicts}) > 1:
        failed = [
            f"process {index} of {len(verdicts)}: {verdict[1]}"
            for index, verdict in enumerate(verdicts)
            if verdict
        ]
        raise Disagreement(summary(failed)) from error
    if error is not None:
        raise error
    return found


def in_touch(
    wait: Callable[[], None], failed: Callable[[], BaseException | None]
) -> None:
    """Let every process wait for its own part, and none for one that is gone or failed.

    What waits at a barrier outside of the devices learns of a death from the runtime's
    time-out alone, which ends the process before it can say anything, and of a failure
    elsewhere not at all. Meanwhile the devices can tell. All processes have to call it,
    in the same order. In a single one it is ``wait()``.

    Args:
        wait: called in another thread, which goes on waiting where this raises.
        failed: asked again and again: what ``wait`` is going to raise, once that is
            known, although it still waits for others.

    Raises:
        PeerLost: another process is gone.
        Disagreement: it failed in some of the processes, or not in the same way in
            all. Where it did, in each its own error is raised.
    """
    if jax.process_count() == 1:
        wait()
        return
    done, raised = threading.Event(), []

    def work() -> None:
        try:
            wait()
        except Exception as error:
            raised.append(error)
        done.set()

    def look() -> bool:
        ended = done.wait(timeout=0.1)
        error = raised[0] if raised else failed()
        if error is not None:
            raise error
        return ended

    threading.Thread(target=work, daemon=True).start()
    while not all(_from_each(unanimous(look))):
        pass


def check_folder(folder: str, *, patience: float = 10.0) -> None:
    """Every process can write into a folder, and it is one and the same for all.

    All processes have to call it, in the same order.

    Args:
        folder: made if it is not there.
        patience: seconds that a network disk is given to show a new file.

    Raises:
        OSError: it cannot be made or written to.
        Disagreement: it cannot by some of the processes, or some look at another one.
    """
    unanimous(functools.partial(check_writable, folder))
    if jax.process_count() == 1:
        return
    mark = once(lambda: tempfile.mkdtemp(dir=folder, prefix=".shared-"))
    mark = os.path.join(folder, os.path.basename(mark))

    def look() -> None:
        end = time.monotonic() + patience
        while not os.path.exists(mark):
            if time.monotonic() > end:
                raise FileNotFoundError(
                    "not the folder of process 0; all need one, on a disk that they "
                    "share or in a bucket"
                )
            time.sleep(0.1)

    try:
        unanimous(look)
    finally:
        if jax.process_index() == 0:
            os.rmdir(mark)


def check_writable(folder: str) -> None:
    """Make a folder if it is not there, and something in it.

    Raises:
        OSError: it does not work.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writable-"):
        pass


def _from_each(mine: Any) -> list[Any]:
    """What every process has to say, in their order."""
    if jax.process_count() == 1:
        return [mine]
    text = json.dumps(mine).encode()
    with blaming_peers():
        sizes = multihost_utils.process_allgather(np.int32(len(text)))
        texts = multihost_utils.process_allgather(_padded(text, int(sizes.max())))
    return [json.loads(row.tobytes()) for row in texts]


def _tell(message: dict[str, Any]) -> dict[str, Any]:
    """That of process 0, in every process."""
    text = json.dumps(message).encode()
    text = _padded(text, len(text))
    size = multihost_utils.broadcast_one_to_all(np.int32(len(text)))
    if jax.process_index() != 0:
        text = np.zeros(int(size), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


def _padded(text: bytes, size: int) -> np.ndarray:
    """JSON filled up with blanks to at least ``size`` bytes, and few sizes in all.

    A program is compiled for every size.
    """
    return np.frombuffer(text.ljust(1 << max(10, (size - 1).bit_length())), np.uint8)
