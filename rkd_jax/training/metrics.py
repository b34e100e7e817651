"""The log of a run: one JSON object per step, and TensorBoard beside it."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax


class MetricsWriter:
    """Appends to ``folder/metrics.jsonl``; only process 0 writes.

    A line is ``{"step": 3, "metrics": {"student/loss": 1.25}}``. Numbers read back
    exactly as they were; null marks one that was not finite. A last line torn by a
    crash is removed on opening.

    Args:
        folder: created if needed.
        tensorboard: also write event files to ``folder/tensorboard`` (tensorboardX).

    Raises:
        ValueError: a line other than the last is unreadable.
    """

    def __init__(self, folder: str | os.PathLike, *, tensorboard: bool = True):
        self.path = Path(folder) / "metrics.jsonl"
        self._active = jax.process_index() == 0
        self._tensorboard = tensorboard and self._active
        self._events: Any = None
        self._file = None
        if self._active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self.truncate()
            # Unbuffered: followers see every line, and after a failed write nothing
            # is left over that would fail again on closing.
            self._file = self.path.open("ab", buffering=0)

    def truncate(self, step: int | None = None) -> None:
        """Drop entries after ``step`` (and a torn last line).

        A resumed run thus logs every step once, as if it had never stopped.
        """
        if not self._active:
            return
        end = 0
        for entry, entry_end in _entries(self.path):
            if step is not None and entry["step"] > step:
                break
            end = entry_end
        os.truncate(self.path, end)

    def recent(self, name: str, count: int) -> list[float]:
        """The last ``count`` finite values of one metric, oldest first."""
        values: deque[float] = deque(maxlen=count)
        if self._active:
            found = (entry["metrics"].get(name) for entry, _ in _entries(self.path))
            values.extend(value for value in found if value is not None)
        return list(values)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step.

        Raises:
            OSError: the disk is full or the folder gone; names the file.
        """
        if not self._active:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        try:
            line = json.dumps({"step": step, "metrics": finite}, allow_nan=False)
            rest = memoryview(f"{line}\n".encode())
            while rest:
                rest = rest[self._file.write(rest) :]
            if self._tensorboard:
                self._write_events(step, metrics)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot log step {step}, {error.strerror}", str(self.path)
            ) from error

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _write_events(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._events is None:
            # Imported here: it takes longer than all of rkd_jax.
            from tensorboardX import SummaryWriter

            # TensorBoard then forgets what a killed run logged from this step on.
            self._events = SummaryWriter(
                str(self.path.parent / "tensorboard"), purge_step=step
            )
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of ``folder/metrics.jsonl``, without a torn last line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than the last is unreadable.
    """
    return [entry for entry, _ in _entries(Path(folder) / "metrics.jsonl")]


def _entries(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Entries and the byte offset after each; stops before a torn last line."""
    end = 0
    with path.open("rb") as file:
        lines = enumerate(file, start=1)
        for number, line in lines:
            end += len(line)
            try:
                if not line.endswith(b"\n"):
                    return
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError(f"a {type(entry).__name__}")
            except (ValueError, RecursionError) as error:
                if next(lines, None) is None:
                    return
                raise ValueError(
                    f"{path}:{number}: not a JSON object ({error}); repair the line or "
                    "delete the file"
                ) from None
            yield entry, end
