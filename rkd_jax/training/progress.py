"""Where a run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TextIO

from rkd_jax.training.memory import MemoryReport


class Progress:
    """Shows stage, step, loss, tokens per second and time left.

    Example::

        with Progress() as progress:
            progress.stage("train", 1000)
            progress.advance(loss=2.31, tokens=8192)

    On a terminal this is one rich bar per stage; otherwise a line at the start and the
    end of a stage and about every ``interval`` seconds between them.

    Args:
        stream: where to write; standard error by default, so output stays clean.
        interval: seconds between plain lines.
        clock: seconds, monotonic.

    Attributes:
        timings: seconds by stage, until the next one began or `close`.
        paces: seconds per step by stage, the first steps (which compile) left out.
        peaks: bytes on one device by stage, of those that reported their `memory`.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._clock = clock
        self._bar = _make_bar(self._stream) if self._stream.isatty() else None
        self._name = ""
        self.timings: dict[str, float] = {}
        self.paces: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def stage(self, name: str, total: int, *, done: int = 0) -> None:
        """Begin a stage of ``total`` steps, ``done`` of which an earlier start did."""
        self._finish_stage()
        self._name, self._total, self._done = name, total, done
        self._start_done, self._tokens, self._loss = done, 0, None
        self._start = self._shown = self._clock()
        self._first: tuple[int, float] | None = None
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, completed=done, note="")
        elif done < total:
            self._line(f"{name}: {done}/{total}")

    def advance(self, n: int = 1, *, loss: float | None = None, tokens: int = 0):
        """``n`` more steps are done, at this loss, having read ``tokens`` tokens."""
        self._done += n
        self._tokens += tokens
        self._loss = self._loss if loss is None else loss
        now = self._clock()
        if self._first is None:
            self._first = (self._done, now)
        elif self._done > self._first[0]:
            done, then = self._first
            self.paces[self._name] = (now - then) / (self._done - done)
        if self._bar is not None:
            note = "  ".join(self._facts(now))
            self._bar.update(self._task, completed=self._done, note=note)
        elif now - self._shown >= self._interval or self._done >= self._total:
            self._shown = now
            facts = [*self._facts(now), f"left {self._left(now)}"]
            steps = f"{self._done}/{self._total}"
            self._line(f"{self._name}: " + "  ".join([steps, *facts]))

    def memory(self, report: MemoryReport) -> None:
        """What the stage's step needs: noted, and kept in `peaks`."""
        self.note(str(report))
        if report.peak is not None:
            self.peaks[self._name] = report.peak

    def note(self, text: str) -> None:
        """One line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    def close(self) -> None:
        """End the current stage and leave the terminal as it was."""
        self._finish_stage()
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _finish_stage(self) -> None:
        if self._name:
            spent = self._clock() - self._start
            self.timings[self._name] = self.timings.get(self._name, 0.0) + spent
        if self._name and self._bar is not None:
            self._bar.stop_task(self._task)
        self._name = ""

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _facts(self, now: float) -> list[str]:
        facts = [] if self._loss is None else [f"loss {self._loss:.4g}"]
        if self._tokens and now > self._start:
            facts.append(f"{self._tokens / (now - self._start):,.0f} tokens/s")
        return facts

    def _left(self, now: float) -> timedelta:
        pace = (now - self._start) / max(self._done - self._start_done, 1)
        return timedelta(seconds=round(pace * max(self._total - self._done, 0)))


class Silent:
    """The same interface, saying nothing."""

    def stage(self, name: str, total: int, *, done: int = 0) -> None:
        """Nothing."""

    def advance(self, n: int = 1, *, loss: float | None = None, tokens: int = 0):
        """Nothing."""

    def memory(self, report: MemoryReport) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def _make_bar(stream: TextIO) -> Any:
    # Imported here, so that logs and tests without a terminal do without rich.
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeRemainingColumn(),
        console=Console(file=stream),
    )
    bar.start()
    return bar
