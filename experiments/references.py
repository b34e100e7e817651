"""What frozen models say about preference pairs: computed once in a run, then read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.game import TextBook
from experiments.lab import Lab
from experiments.stages import Desk
from rkd_jax.data.records import PreferenceRecord
from rkd_jax.signals.cache_identity import data_hash, name_of
from rkd_jax.training.run import RunMismatch
from rkd_jax.training.together import once
from rkd_jax.types import Params
from rkd_jax.untrusted import refused


def reference_log_probs(
    lab: Lab, desk: Desk, start: Params, pairs: Sequence[PreferenceRecord]
) -> np.ndarray:
    """`pair_log_probs` of a run's start, ``float32[n, 2]``, kept in its folder."""
    of = [data_hash(pairs), checksums(start)]
    return kept(desk, "3-reference", of, lambda: pair_log_probs(lab, start, pairs))


def checksums(params: Params) -> list[int]:
    """A number for every array, wherever it is: which weights these are.

    Sums of their bits, each times an odd number of its place, modulo 2 ** 32: exact, so
    the same on one device and on any mesh.
    """
    return [int(found) for found in _checksums(jax.tree.leaves(params))]


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(array) for array in arrays]


def _checksum(array: jax.Array) -> jax.Array:
    width = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place * jnp.uint32(size) + index
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def pair_log_probs(
    lab: Lab, params: Params, pairs: Sequence[PreferenceRecord]
) -> np.ndarray:
    """Summed log-probs of both responses of every pair, ``float32[n, 2]``."""
    scores = TextBook(lambda rows: lab.reference_scores(params, rows))
    return scores.look_up(lab.collated(pairs).sequences)


def kept(
    desk: Desk, stage: str, of: Any, compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """``compute()``, unless an earlier call or start of this run has kept it.

    Args:
        desk: of the run; what it depends on besides ``of`` has to be fixed in a run.
        stage: what it is, the beginning of the folder's name.
        of: JSON, such as the `checksums` of the model: a run is bound to the path of
            its weights and not to what is in there.
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
