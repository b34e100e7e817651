"""One experiment in several processes: how they meet, and who asks the oracle.

Every process runs the whole experiment. What is on the mesh they compute together; of a
training's batches each reads its rows; whatever else is on the host each computes
alike; and files are process 0's (`rkd_jax.training.together`). The output folder has to
be one that all of them see.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.settings import SettingsError
from rkd_jax.data.collate import Widths
from rkd_jax.data.records import Prompt
from rkd_jax.signals.retrying_oracle import RetryingOracle
from rkd_jax.training.together import once


def meet() -> None:
    """`jax.distributed.initialize`, before anything is computed.

    On a TPU slice, under Slurm, Open MPI or Kubernetes the processes find each other.
    Elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID tell each of them.

    Raises:
        SettingsError: they cannot.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        given = {k: int(os.environ[v]) for k, v in names.items() if v in os.environ}
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise SettingsError(
            f"--distributed: {(str(error).splitlines() or [''])[0]}; set "
            f"JAX_COORDINATOR_ADDRESS, {' and '.join(names.values())}"
        ) from error


def widest(mine: Widths) -> Widths:
    """The widths that hold the rows of all processes; all have to call it."""
    every = multihost_utils.process_allgather(np.array(mine, np.int32))
    return Widths(*every.reshape(-1, len(mine)).max(axis=0).tolist())


class AskedOnce(RetryingOracle):
    """Process 0 asks the oracle, for all: it may cost something, or change its mind."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> np.ndarray:
        """As `RetryingOracle`."""
        ask = super().__call__
        return np.array(once(lambda: ask(prompts, responses).tolist()), np.float64)
