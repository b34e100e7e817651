"""Checkpoints: the state, the data position, and what they were made from.

Written by orbax in the background, restored onto the sharding of the state that asks.
Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp

from rkd_jax.training.provenance import differences, plain, summary, versions
from rkd_jax.training.state import TrainState

_LOGGER = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class CheckpointMismatch(CheckpointError, ValueError):
    """A checkpoint belongs to another configuration or another shape of state."""


class Checkpoints:
    """The checkpoints of one run in one folder, newest ``keep`` of them.

    Example::

        with Checkpoints("out/checkpoints", config={"lr": 1e-5}) as checkpoints:
            state = fit(state, update, batches, steps=100, checkpoints=checkpoints)

    Args:
        folder: a path of its own, local or understood by orbax (``gs://...``).
        config: the resolved configuration: every field that must agree for a resume
            to be the same run, and no other (not the output folder, say).
        keep: how many to keep.

    Raises:
        CheckpointError: the folder cannot be used.
        ValueError: ``config`` is not plain JSON.
    """

    def __init__(self, folder: str | os.PathLike, *, config: Any, keep: int = 2):
        path = os.fspath(folder)
        remote = "://" in path
        self.folder = path if remote else os.path.abspath(path)
        self._config = plain(config)
        self._versions = versions()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # A half-written checkpoint of a killed run is rubbish that fills the disk.
            cleanup_tmp_directories=True,
        )
        with self._one_line("open"):
            if not remote:
                # orbax would make it in the background and complain much later.
                os.makedirs(self.folder, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_names=("state", "data", "meta")
            )
        self._quiet = _Raised()
        logging.getLogger("absl").addFilter(self._quiet)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: Any) -> None:
        """Start writing ``state`` and the data position; returns once both are copied.

        Raises:
            CheckpointError: this or an earlier checkpoint could not be written, a full
                disk among the causes. Earlier ones are intact.
            ValueError: ``data`` is not plain JSON.
        """
        step = int(state.step)
        meta = {
            "config": self._config,
            "versions": self._versions,
            "layout": _layout(state),
        }
        try:
            data = json.loads(json.dumps(data))
        except TypeError as error:
            raise ValueError(f"the data position must be plain JSON: {error}") from None
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"position": data}),
            meta=ocp.args.JsonSave(meta),
        )
        with self._one_line("write"):
            self._manager.save(step, args=items)

    def restore(self, state: TrainState) -> tuple[TrainState, Any]:
        """The newest checkpoint: (state, data position).

        Args:
            state: real or abstract (`jax.ShapeDtypeStruct` with shardings); says which
                shapes to expect and where to put them. Its values are not read.

        Raises:
            CheckpointMismatch: made with another configuration or state layout.
            CheckpointError: there is none, or it cannot be read.
        """
        step = self.latest()
        if step is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        with self._one_line("read"):
            meta = self._read(step, meta=ocp.args.JsonRestore()).meta
        self._compare(step, "configuration", meta["config"], self._config)
        self._compare(step, "state", meta["layout"], _layout(state))
        if changed := differences(meta["versions"], self._versions):
            # Not an error, but the next steps may differ in their last bits.
            _LOGGER.warning("resuming with other versions: %s", summary(changed))
        with self._one_line("read"):
            found = self._read(
                step,
                state=ocp.args.StandardRestore(abstract(state)),
                data=ocp.args.JsonRestore(),
            )
        return found.state, found.data["position"]

    def wait(self) -> None:
        """Block until everything is on disk.

        Raises:
            CheckpointError: something could not be written.
        """
        with self._one_line("write"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then release the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()
            logging.getLogger("absl").removeFilter(self._quiet)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError:
            # The first failure is on its way up already.
            if error is None:
                raise

    def _read(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _compare(self, step: int, what: str, there: Any, here: Any) -> None:
        different = differences(there, here)
        if different:
            raise CheckpointMismatch(
                f"{self.folder}: checkpoint {step} has another {what}: "
                f"{summary(different)}; restore these fields, or use another folder"
            )

    @contextmanager
    def _one_line(self, verb: str):
        try:
            yield
        except CheckpointError:
            raise
        # orbax and tensorstore report a full disk as OSError, ValueError and others.
        except Exception as error:
            kept = self._kept()
            remedy = {
                "open": "check the path and its permissions",
                "write": f"free some space or choose another folder; checkpoints "
                f"{kept} are intact and the same command goes on from the newest",
                "read": f"delete that checkpoint to fall back on an earlier of {kept}",
            }[verb]
            message = f"cannot {verb} checkpoints in {self.folder}: {_reason(error)}"
            raise CheckpointError(f"{message}; {remedy}") from error

    def _kept(self) -> list[int]:
        manager = getattr(self, "_manager", None)
        return sorted(manager.all_steps()) if manager else []


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of ``state`` without its buffers."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _layout(state: TrainState) -> dict[str, str]:
    """``{"student.params['w']": "float32(3, 4)"}``, one entry per array."""
    return {
        jax.tree_util.keystr(path).lstrip("."): f"{leaf.dtype}{tuple(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _reason(error: Exception) -> str:
    """The operating system's words if they are in there, else the first line."""
    text = str(error)
    known = re.search(
        r"No space left on device|File too large|Disk quota exceeded"
        r"|Permission denied|Read-only file system|Not a directory|File exists",
        text,
    )
    return known.group() if known else (text.splitlines() or [repr(error)])[0][:200]


class _Raised(logging.Filter):
    """Drops the tracebacks orbax logs for failures that it also raises to us."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)
