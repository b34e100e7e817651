"""Checkpoints of a run, of which some may fail: a full disk is soon somebody's concern.

The run has its state in memory and the last checkpoint on disk, so that it can go on
without one more. Not for ever: who is not told stops nothing.
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
        checkpoints: where.
        note: is given a line for each checkpoint that was lost.
        most: to lose in a row.
    """

    def __init__(
        self, checkpoints: Checkpoints, note: Callable[[str], None], most: int = 3
    ):
        self._checkpoints, self._note, self._most = checkpoints, note, most
        self._lost = 0

    def __call__(self, state: TrainState, position: Any, *, last: bool) -> None:
        """Begin a checkpoint; the one before it is on disk then, or lost.

        Raises:
            CheckpointError: it cannot be written and is the ``last`` one, one too many
                were lost, or one of several processes cannot go on by itself.
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
