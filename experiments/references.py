"""What frozen models say about preference pairs: computed once in a run, then read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.game import TextBook
from experiments.lab import Lab
from experiments.stages import Desk
from rkd_jax.data.collate import collate
from rkd_jax.data.records import PreferenceRecord
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.signals.cache_identity import data_hash, name_of
from rkd_jax.training.run import RunMismatch
from rkd_jax.training.together import once
from rkd_jax.types import Params, PreferenceBatch
from rkd_jax.untrusted import refused


def reference_log_probs(
    lab: Lab, desk: Desk, start: Params, pairs: Sequence[PreferenceRecord]
) -> np.ndarray:
    """`pair_log_probs` of the run's start, ``float32[n, 2]``, kept in the run folder.

    ``start`` is the one student that all methods of the run begin with.
    """
    return kept(
        desk, "3-reference", data_hash(pairs), lambda: pair_log_probs(lab, start, pairs)
    )


def pair_log_probs(
    lab: Lab, params: Params, pairs: Sequence[PreferenceRecord]
) -> np.ndarray:
    """Summed log-probs of both responses of every pair, ``float32[n, 2]``."""
    scores = TextBook(lambda rows: lab.reference_scores(params, rows))
    return scores.look_up(tabulated(lab, pairs).sequences)


def tabulated(lab: Lab, pairs: Sequence[PreferenceRecord]) -> PreferenceBatch:
    """All pairs as one batch on the host."""
    rows = [tokenize_record(r, lab.tokenizer, lab.rows, i) for i, r in enumerate(pairs)]
    return collate(rows, lab.rows)


def kept(
    desk: Desk, stage: str, of: Any, compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """``compute()``, unless an earlier call or start of this run has kept it.

    Args:
        desk: of the run; what it is of besides ``of`` has to be fixed in a run.
        stage: what it is, the beginning of the folder's name.
        of: JSON, what else it depends on.
        compute: its result is on the host, and equal in all processes.

    Raises:
        RunMismatch: the file is damaged.
    """
    folder = desk.run.stage(f"{stage}-{name_of(of)}")
    path = folder.path / "values.npy"
    if not folder.done:
        values = compute()
        once(lambda: np.save(path, values))
        folder.finish({"shape": values.shape})
    hint = f"{path} is damaged; remove {folder.path} and the same command goes on"
    with refused(hint, RunMismatch):
        values = np.load(path, allow_pickle=False)
        if list(values.shape) != folder.result["shape"]:
            raise ValueError(f"{values.shape} numbers")
    return values
