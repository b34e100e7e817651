"""Checkpoints: the state, the data position, and what they were made from.

Written by orbax in the background, restored onto the sharding of the state that asks.
Nothing is pickled. A checkpoint carries the checksums of its files, and damage is
noticed before anything is restored from it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rkd_jax.training.checksums import first_damage, has_checksums, write_checksums
from rkd_jax.training.interrupt import PeerLost, blaming_peers
from rkd_jax.training.orbax_failures import Raised, hide_late_answers, reason_of
from rkd_jax.training.provenance import differences, plain, summary, versions
from rkd_jax.training.state import TrainState, abstract
from rkd_jax.training.tensorstore_leaks import avoid_leaks
from rkd_jax.training.together import (
    Disagreement,
    check_folder,
    check_writable,
    in_touch,
    once,
    unanimous,
)

_LOGGER = logging.getLogger(__name__)
_META = ("config", "layout", "versions")


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
        folder: a path of its own, local or understood by orbax (``gs://...``); of
            several processes one folder that all of them see.
        config: the resolved configuration: every field that must agree for a resume
            to be the same run, and no other (not the output folder, say).
        keep: how many to keep. With 2 or more, one that is damaged costs the steps
            since the one before it.

    Attributes:
        damage: one line for each checkpoint that `restore` passed over, saying why and
            what became of it.

    Raises:
        CheckpointError: the folder cannot be used, be it by one process alone, or is
            not the same for all of them.
        ValueError: ``config`` is not plain JSON.
    """

    def __init__(self, folder: str | os.PathLike, *, config: Any, keep: int = 2):
        avoid_leaks()
        hide_late_answers()
        path = os.fspath(folder)
        self._remote = "://" in path
        self.folder = path if self._remote else os.path.abspath(path)
        self.damage: list[str] = []
        self._config = plain(config)
        self._versions = versions()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # A half-written checkpoint of a killed run is rubbish that fills the disk.
            cleanup_tmp_directories=True,
            # Of several processes one lists the steps: a disk that shows them different
            # ones must not send them to different checkpoints.
            single_host_load_and_broadcast=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._saving: int | None = None
        with self._one_line("open"):
            if not self._remote:
                # orbax would make it in the background and complain much later, and
                # of processes with a folder each all would wait in the first save.
                check_folder(self.folder)
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_names=("state", "data", "meta")
            )
        # Behind every read the manager waits for all processes, and for ever if one of
        # them could not read. Here each reads alone, and then they agree.
        me = jax.process_index()
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}
            ),
        )
        self._quiet = Raised()
        logging.getLogger("absl").addFilter(self._quiet)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, damaged or not."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: Any) -> None:
        """Start writing ``state`` and the data position; returns once both are copied.

        Raises:
            CheckpointError: this or an earlier checkpoint could not be written, a full
                disk among the causes. Earlier ones are intact.
            ValueError: ``data`` is not plain JSON.
            PeerLost: another process is gone.
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
            # The checksums of the one before are written under its own step.
            self._settle()
            if not self._remote:
                # At once: after a failed start orbax keeps the process from ending.
                unanimous(functools.partial(check_writable, self.folder))
            self._saving, self._quiet.failure = step, None
            self._manager.save(step, args=items)

    def restore(self, state: TrainState) -> tuple[TrainState, Any]:
        """The newest whole checkpoint: (state, data position).

        Newer ones that are damaged (a file is missing, cut off or changed, or the
        format is an older one) are renamed ``damaged-<step>``, which keeps them and
        lets the run save that step again. `damage` and a warning name each. If none is
        whole they all stay where they are. Of several processes the first one looks
        and renames, and all take the same checkpoint; one without checksums that cannot
        be read is an error there, because the others may have read it. What only some
        of them can read is an error in all of them, and nothing is renamed.

        Args:
            state: real or abstract (`jax.ShapeDtypeStruct` with shardings); says which
                shapes to expect and where to put them. Its values are not read.

        Raises:
            CheckpointMismatch: made with another configuration or state layout.
            CheckpointError: there is none, none is whole, or one that is whole cannot
                be read, be it by one process alone.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                whole = self._verify(step)
                found = unanimous(functools.partial(self._restore, step, whole, state))
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            except Disagreement as error:
                raise CheckpointError(
                    f"not every process can read checkpoint {step} ({error}); all stop "
                    "and nothing was renamed: start them again when each can read it, "
                    "or move it away to go on from the one before"
                ) from error
            self._set_aside(damaged, fallback=step)
            return found
        if not damaged:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        reasons = [f"{step}: {why}" for step, why in damaged.items()]
        raise CheckpointError(
            f"{self.folder}: no checkpoint is whole ({summary(reasons)}); put a copy "
            "of one back, or move the folder away to begin this training again"
        )

    def wait(self) -> None:
        """Block until everything is on disk.

        Raises:
            CheckpointError: something could not be written, be it by one process.
            PeerLost: another process is gone.
        """
        with self._one_line("write"):
            self._settle()

    def sweep(self) -> None:
        """Clear away what a failed save left; of several processes others may write."""
        if not self._remote:
            for half in Path(self.folder).glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
        self._manager.reload()

    def close(self) -> None:
        """Wait, then release the folder."""
        try:
            self.wait()
        except BaseException as error:
            self._abandon(error)
            raise
        self._release()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
        else:
            self._abandon(error)

    def _abandon(self, error: BaseException) -> None:
        """Release the folder; nobody is told, for others may know of no failure."""
        if isinstance(error, PeerLost) or (
            isinstance(error, CheckpointError) and jax.process_count() > 1
        ):
            # A save in the background waits for processes that are dead or have given
            # up: whoever waits for it does so for many minutes, or is ended by the
            # runtime before he can say what happened.
            return
        try:
            with self._one_line("write"):
                self._manager.wait_until_finished()
        except PeerLost:
            return
        except CheckpointError:
            pass
        self._release()

    def _settle(self) -> None:
        """The last save is on disk, for all processes."""
        if self._saving is not None:
            in_touch(self._manager.wait_until_finished, lambda: self._quiet.failure)

    def _release(self) -> None:
        self._manager.close()
        self._reader.close()
        logging.getLogger("absl").removeFilter(self._quiet)

    def _seal(self) -> None:
        """Write the checksums; orbax calls this before a checkpoint gets its name."""
        if not self._remote:
            for unnamed in Path(self.folder).glob(f"{self._saving}.orbax-checkpoint*"):
                write_checksums(unnamed)

    def _restore(
        self, step: int, whole: bool, state: TrainState
    ) -> tuple[TrainState, Any]:
        """What checkpoint ``step`` holds, or `_Damaged`; waits for no other process."""
        meta = self._read(step, whole, meta=ocp.args.JsonRestore()).meta
        if not isinstance(meta, dict):
            raise self._unreadable(step, whole, "meta is missing")
        lacking = [name for name in _META if name not in meta]
        if lacking:
            raise _Damaged(f"meta lacks {lacking[0]}, as in an older format")
        self._compare(step, "configuration", meta["config"], self._config)
        self._compare(step, "state", meta["layout"], _layout(state))
        if changed := differences(meta["versions"], self._versions):
            # Not an error, but the next steps may differ in their last bits.
            _LOGGER.warning("resuming with other versions: %s", summary(changed))
        found = self._read(
            step,
            whole,
            state=ocp.args.StandardRestore(abstract(state)),
            data=ocp.args.JsonRestore(),
        )
        if found.state is None or not isinstance(found.data, dict):
            raise self._unreadable(step, whole, "state or data position is missing")
        return found.state, found.data["position"]

    def _verify(self, step: int) -> bool:
        """Whether every byte is as it was written; False where nobody can know.

        Raises:
            _Damaged: it is not.
        """
        if self._remote:
            return False
        path = Path(self.folder) / str(step)

        def look() -> tuple[bool, str | None]:
            sealed = has_checksums(path)
            return sealed, first_damage(path) if sealed else None

        with self._one_line("read"):
            sealed, wrong = once(look)
        if not sealed:
            _LOGGER.warning("checkpoint %s has no checksums: an older one", path)
        elif wrong:
            raise _Damaged(wrong)
        return sealed

    def _read(self, step: int, whole: bool, **items: Any) -> Any:
        """Items of a checkpoint; what fails although it is whole is no damage."""
        try:
            path = self._manager.directory / str(step)
            return self._reader.restore(path, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._unreadable(step, whole, reason_of(error)) from error

    def _unreadable(self, step: int, whole: bool, why: str) -> Exception:
        """What to raise about a checkpoint that orbax could not read."""
        alone = jax.process_count() == 1
        if not whole and alone:
            return _Damaged(why)
        rest = (
            f"its files are as they were written{'' if alone else ', says process 0'}"
            if whole
            else "it has no checksums, and other processes may have read it; move it "
            "away to go on from the one before"
        )
        return CheckpointError(
            f"cannot read checkpoint {step} in {self.folder}: {why}; {rest}"
        )

    def _set_aside(self, damaged: dict[int, str], fallback: int) -> None:
        """Rename damaged checkpoints, so that their steps can be saved again."""
        self.damage = []
        for step, why in damaged.items():
            with self._one_line("write"):
                name = once(functools.partial(self._rename, step))
            self.damage.append(
                f"checkpoint {step} in {self.folder} is damaged ({why}); it is now "
                f"called {name}, and the run goes on from step {fallback}"
            )
            _LOGGER.warning("%s", self.damage[-1])
        if damaged:
            self._manager.reload()

    def _rename(self, step: int) -> str:
        """To ``damaged-<step>``, or with a number if that was damaged before."""
        folder = self._manager.directory
        first = f"damaged-{step}"
        names = itertools.chain([first], (f"{first}-{n}" for n in itertools.count(2)))
        name = next(n for n in names if not (folder / n).exists())
        (folder / str(step)).rename(folder / name)
        return name

    def _compare(self, step: int, what: str, there: Any, here: Any) -> None:
        different = differences(there, here)
        if different:
            raise CheckpointMismatch(
                f"{self.folder}: checkpoint {step} has another {what}: "
                f"{summary(different)}; restore these fields, or use another folder"
            )

    @contextlib.contextmanager
    def _one_line(self, verb: str):
        try:
            with blaming_peers():  # orbax's barriers before a save are the devices'
                yield
        except (CheckpointError, PeerLost):
            raise
        # orbax and tensorstore report a full disk as OSError, ValueError and others.
        except Exception as error:
            kept = self._kept()
            remedy = {
                "open": "check the path and its permissions",
                "write": f"free some space or choose another folder; checkpoints "
                f"{kept} are intact and the same command goes on from the newest",
                "read": "check the disk and its permissions",
            }[verb]
            message = f"cannot {verb} checkpoints in {self.folder}: {reason_of(error)}"
            raise CheckpointError(f"{message}; {remedy}") from error

    def _kept(self) -> list[int]:
        manager = getattr(self, "_manager", None)
        return sorted(manager.all_steps()) if manager else []


class _Damaged(Exception):
    """A checkpoint that nothing can be restored from; the text says what is wrong."""


def _layout(state: TrainState) -> dict[str, str]:
    """``{"student.params['w']": "float32(3, 4)"}``, one entry per array."""
    return {
        jax.tree_util.keystr(path).lstrip("."): f"{leaf.dtype}{tuple(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
