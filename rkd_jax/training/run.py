"""An output folder that belongs to one run, and the stages finished inside it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkd_jax.training.provenance import differences, digest, plain, summary, versions
from rkd_jax.training.together import once
from rkd_jax.untrusted import one_line, read_object


class RunMismatch(ValueError):
    """The folder holds something other than this run."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run: a folder, and a marker once it is finished.

    Example::

        stage = run.stage("sft")
        if not stage.done:
            stage.finish({"loss": train_into(stage.path)})
        loss = stage.result["loss"]
    """

    path: Path

    @property
    def done(self) -> bool:
        """Whether `finish` was reached, now or in an earlier start."""
        return once(self._marker.exists)

    @property
    def result(self) -> dict[str, Any]:
        """What `finish` was given.

        Raises:
            FileNotFoundError: the stage is not finished.
            RunMismatch: what was written then cannot be read any more.
        """
        if not self._marker.exists():
            raise FileNotFoundError(f"{self._marker}: no such file; finish the stage")
        try:
            return read_object(self._marker, RunMismatch)
        except RunMismatch as error:
            raise RunMismatch(f"{error}; delete it to do the stage again") from None

    def finish(self, result: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Mark the stage as finished; ``result`` is plain JSON and comes back."""
        found = plain(result or {})
        once(lambda: write_json(self._marker, found))
        return found

    @property
    def _marker(self) -> Path:
        return self.path / "done.json"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """An output folder bound to one configuration by its ``run.json``.

    In several processes it has to be one that all of them can read, and all of them do
    the same with it: process 0 looks and writes for all.

    Example::

        run = RunFolder.open("out/tvkd", {"learning_rate": 1e-5}, name="tvkd")
        stage = run.stage("sft")
    """

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        config: Any,
        *,
        name: str = "",
        resume: bool = True,
        overwrite: bool = False,
    ) -> RunFolder:
        """Create the folder, or come back to it.

        Args:
            path: the folder; created with its parents.
            config: mapping or dataclass; every field that makes it this run. What may
                change from start to start (the folder itself) stays out.
            name: of the experiment, part of the run's identity.
            resume: False refuses a folder that already holds this run.
            overwrite: discard the run that is there, this one or another. A folder
                without ``run.json`` is never touched.

        Raises:
            RunMismatch: the folder holds another run, this run while ``resume`` is
                False, or files that belong to no run.
            ValueError: ``config`` is not plain JSON.
        """
        path, config = Path(path), plain(config)
        once(lambda: _claim(path, config, name, resume, overwrite))
        return cls(path, config)

    def stage(self, name: str) -> Stage:
        """The stage ``name``, in a folder of its own.

        Raises:
            ValueError: ``name`` is no plain folder name.
        """
        if not name or name.startswith(".") or Path(name).name != name:
            raise ValueError(f"stage {name!r} must be a plain folder name")
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return Stage(folder)


def _claim(path: Path, config: dict, name: str, resume: bool, overwrite: bool) -> None:
    """Create the folder of a run, or make sure that it is this one's."""
    record = path / "run.json"
    if path.exists() and not path.is_dir():
        raise RunMismatch(f"{path} is a file; choose another --out")
    if overwrite and record.exists():
        _read(record)
        _empty(path)
    if record.exists():
        _check_same(path, _read(record), name, config, resume)
    elif path.exists() and (foreign := _foreign(path)):
        raise RunMismatch(
            f"{path} is not empty and holds no run ({summary(foreign)}); choose "
            "another --out"
        )
    else:
        path.mkdir(parents=True, exist_ok=True)
        write_json(record, _identity(name, config))


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` as a whole: a reader sees the old text or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _identity(name: str, config: dict[str, Any]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "name": name,
        "config_hash": digest(config),
        "created": now.isoformat(timespec="seconds"),
        "versions": versions(),
        "config": config,
    }


def _read(record: Path) -> dict[str, Any]:
    try:
        found = read_object(record)
        if lacking := {"name", "config"} - found.keys():
            raise ValueError(f"it has no {min(lacking)}")
    except ValueError as error:
        reason = str(error).removeprefix(f"{record}: ")
        raise RunMismatch(
            f"{record} is not the record of a run ({reason}); choose another --out"
        ) from None
    return {"name": found["name"], "config": found["config"]}


def _check_same(path: Path, there: dict, name: str, config: dict, resume: bool) -> None:
    """Refuse unless ``there`` is this run and may be resumed."""
    try:
        different = differences(there, {"name": name, "config": config})
    except RecursionError:
        different = ["its configuration is nested too deeply"]
    if different:
        raise RunMismatch(
            f"{path} holds another run: {one_line(summary(different))}; choose another "
            "--out, or --fresh to discard what is there"
        )
    if not resume:
        raise RunMismatch(
            f"{path} already holds this run; choose another --out, or --fresh to "
            "discard what is there"
        )


def _foreign(path: Path) -> list[str]:
    """What is in a folder without record, but for what a killed start left of one."""
    torn = set(path.glob(".run.json.*"))
    foreign = sorted(entry.name for entry in path.iterdir() if entry not in torn)
    for part in torn if not foreign else ():
        part.unlink()
    return foreign


def _empty(path: Path) -> None:
    """Delete what is in the folder, its ``run.json`` last: a kill leaves it a run."""
    entries = sorted(path.iterdir(), key=lambda entry: entry.name == "run.json")
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
