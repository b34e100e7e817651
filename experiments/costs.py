"""What one step of a training costs: written beside its checkpoints, for the report.

A training that was killed may have its last step in its last checkpoint; the next start
then measures nothing. So what is known is on disk before a checkpoint is begun.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rkd_jax.training.checkpoint import Checkpoints
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunMismatch, write_json
from rkd_jax.training.state import TrainState
from rkd_jax.training.together import once
from rkd_jax.untrusted import read_object, refused

_FILE = "cost.json"
_NAMES = ("seconds_per_step", "peak_bytes")


class CostedCheckpoints(Checkpoints):
    """`Checkpoints` of a stage, in ``folder/checkpoints``, with ``folder/cost.json``.

    Args:
        folder: of the stage.
        progress: has seconds and memory of a step.
        title: of the stage in ``progress``.
        config: as in `Checkpoints`.
        keep: as in `Checkpoints`.

    Raises:
        RunMismatch: ``cost.json`` is damaged.
        CheckpointError: as `Checkpoints`.
    """

    def __init__(
        self, folder: Path, progress: Progress, title: str, *, config: Any, keep: int
    ):
        self._cost, self._progress, self._title = folder / _FILE, progress, title
        self._known = once(lambda: _open(self._cost))
        super().__init__(folder / "checkpoints", config=config, keep=keep)

    def save(self, state: TrainState, data: Any) -> None:
        """As `Checkpoints.save`; what the steps so far cost is written first."""
        measured = self._progress.paces, self._progress.peaks
        for name, of_stages in zip(_NAMES, measured, strict=True):
            # A start of one step has no pace.
            self._known[name] = of_stages.get(self._title, self._known.get(name))
        if failure := once(lambda: _write(self._cost, self._known)):
            self._progress.note(f"{self._title}: the cost of a step is lost: {failure}")
        super().save(state, data)


def read_costs(folder: Path) -> dict[str, float]:
    """Seconds and memory of one step of the stage in a folder, as far as is known.

    Raises:
        RunMismatch: ``cost.json`` is damaged.
    """
    found = _read(folder / _FILE)
    if "peak_bytes" in found:
        found["peak_gib"] = found.pop("peak_bytes") / 2**30
    return found


def _open(path: Path) -> dict[str, float]:
    """What an earlier start knew; what a kill left of its writing is cleared away."""
    for half in path.parent.glob(f".{path.name}.*"):
        half.unlink()
    return _read(path)


def _read(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    found = read_object(path, RunMismatch)
    with refused(f"{path} is damaged; remove it, and the report lacks it", RunMismatch):
        known = {name: found[name] for name in _NAMES if found[name] is not None}
        return {name: float(value) for name, value in known.items()}


def _write(path: Path, known: dict[str, float]) -> str | None:
    """Why it could not; that is no reason to lose a training."""
    try:
        write_json(path, {name: known.get(name) for name in _NAMES})
    except OSError as error:
        return str(error)
    return None
