"""Checkpoints of a run that goes on when some of them cannot be written.

A disk that is full now may have space in an hour, and the run has its state in memory
and the last whole checkpoint on disk. After a few failures in a row it ends all the
same: by then a crash would cost more than stopping does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from rkd_jax.training.checkpoint import CheckpointError, Checkpoints
from rkd_jax.training.state import TrainState


class Saves:
    """What `fit` saves with.

    Args:
        checkpoints: where to.
        note: called with a line for each checkpoint that was lost.
        most: how many may be lost in a row.
    """

    def __init__(
        self, checkpoints: Checkpoints, note: Callable[[str], None], most: int = 3
    ):
        self._checkpoints, self._note, self._most = checkpoints, note, most
        self._lost = 0

    def __call__(self, state: TrainState, position: Any, *, last: bool) -> None:
        """Begin a checkpoint, when the one before it is on disk or known to be lost.

        Args:
            state: what to save.
            position: of the data.
            last: whether the run ends with it; then it has to succeed.

        Raises:
            CheckpointError: it cannot be written and is the ``last`` one, or more than
                ``most`` in a row were lost, or (in several processes) any was.
        """
        if jax.process_count() == 1:
            try:
                self._checkpoints.wait()
                self._lost = 0
            except CheckpointError as error:
                self._lose(error)
                self._checkpoints.sweep()
        try:
            self._checkpoints.save(state, position)
        except CheckpointError as error:
            if last or jax.process_count() > 1:
                raise
            self._lose(error)

    def _lose(self, error: CheckpointError) -> None:
        self._lost += 1
        if self._lost > self._most:
            raise error
        self._note(f"checkpoint {self._lost} of at most {self._most} lost: {error}")
