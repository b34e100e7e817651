"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, say so."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupted(KeyboardInterrupt):
    """A run stopped at its user's or its cluster's wish, after saving its work.

    A `KeyboardInterrupt`, so no ``except Exception`` takes it for a failure. Its text
    is one line for the user; ``exit_code`` is what the process should end with.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


class PeerLost(RuntimeError):
    """A step failed in one of several processes, as it does when another is gone."""


@contextlib.contextmanager
def blaming_peers():
    """Turns what a collective says when a process is gone into one line.

    Raises:
        PeerLost: in one of several processes, the runtime failed.
    """
    try:
        yield
    # With a single device to a process a CPU's collectives raise the other kind.
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        known = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
        if not known or jax.process_count() == 1:
            raise
        why = (str(error).splitlines() or [""])[0][:200]
        raise PeerLost(
            f"a step failed in process {jax.process_index()} of {jax.process_count()} "
            f"({why}); if another process is gone its own log says why; start all of "
            "them again, and they go on from the last checkpoint"
        ) from error


class StopRequest:
    """While active, the first SIGINT or SIGTERM is remembered instead of obeyed.

    A second one acts as usual, for those in a hurry. Several processes have to stop
    at the same step: there SIGTERM goes through the notice that `jax.distributed`
    spreads to all of them, and SIGINT is left alone.
    """

    def __init__(self):
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may install handlers.
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *error) -> None:
        self._restore()

    def due(self, step: int) -> bool:
        """Whether to stop after ``step``; call it once per step, on every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            step
        ):
            self.signum = signal.SIGTERM
        return self.signum is not None

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
