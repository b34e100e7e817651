"""Which batches an update refused: a file to look at after the run gave up."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.training.run import write_json

FILE = Path("refused_batches.json")
_INDEX = ".index"  # what every batch of `rkd_jax.types` calls its record numbers


class Drawn(NamedTuple):
    """A batch as it came, and where it came from.

    ``position`` is the data position after it, or None where the batch knows the
    numbers of its records.
    """

    batch: Any
    position: Any = None


def drawn(batch: Any, batches: Any) -> Drawn:
    """The batch just taken from ``batches``."""
    known = any(name.endswith(_INDEX) for name in _leaves(batch))
    if known or not hasattr(batches, "get_state"):
        return Drawn(batch)
    return Drawn(batch, batches.get_state())


class RefusedBatches:
    """The last ``keep`` batches in a row whose update was refused.

    Attributes:
        count: how many there were in a row.
    """

    def __init__(self, keep: int = 8):
        self._last: deque[tuple[int, dict[str, float], Drawn]] = deque(maxlen=keep)
        self.count = 0

    def add(self, step: int, metrics: Mapping[str, float], batch: Drawn) -> None:
        """One more in a row."""
        self._last.append((step, dict(metrics), batch))
        self.count += 1

    def clear(self) -> None:
        """An update was taken."""
        self._last.clear()
        self.count = 0

    def write(self, folder: Path) -> Path:
        """Describe them in ``folder/refused_batches.json``.

        Of several processes each describes the rows it read: the second one in
        ``refused_batches-1.json``.

        An entry has the step, its metrics (null: not finite), the numbers of its
        records or else the data position after it, and of every array shape, dtype,
        sha256 and how many entries are not finite.

        Raises:
            OSError: it cannot be written.
        """
        me = jax.process_index()
        path = folder / (f"{FILE.stem}-{me}{FILE.suffix}" if me else FILE)
        write_json(path, [_describe(*entry) for entry in self._last])
        return path


def _describe(step: int, metrics: Mapping[str, float], source: Drawn) -> dict[str, Any]:
    finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    records = _records(source.batch)
    where = {"records": records} if records else {"position_after": source.position}
    arrays = {name: _array(leaf) for name, leaf in _leaves(source.batch).items()}
    return {"step": step, "metrics": finite, **where, "arrays": arrays}


def _records(batch: Any) -> dict[str, Any]:
    """The numbers of a batch's records: its leaves called ``index``."""
    return {
        name: np.asarray(leaf).tolist()
        for name, leaf in _leaves(batch).items()
        if name.endswith(_INDEX)
    }


def _leaves(batch: Any) -> dict[str, Any]:
    """Arrays by their path, without those that live partly on other hosts."""
    return {
        f"batch{jax.tree_util.keystr(path)}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        if getattr(leaf, "is_fully_addressable", True)
    }


def _array(leaf: Any) -> dict[str, Any]:
    values = np.asarray(leaf)
    # NumPy does not know bfloat16 as a float.
    floats = jnp.issubdtype(values.dtype, jnp.inexact)
    bad = ~np.isfinite(values) if floats else False
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype),
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "not_finite": int(np.sum(bad)),
    }
