"""What orbax and tensorstore say when a checkpoint cannot be written or read."""

from __future__ import annotations

import asyncio
import logging
import re
import sys

from rkd_jax.training.together import Disagreement

_TELL = asyncio.BaseEventLoop.call_soon_threadsafe
"""How another thread tells an event loop that something has come to its end."""


def reason_of(error: BaseException) -> str:
    """The operating system's words if they are in there, else the first line."""
    text = str(error)
    if isinstance(error, Disagreement):  # names the processes
        return text
    known = re.search(
        r"No space left on device|File too large|Disk quota exceeded"
        r"|Permission denied|Read-only file system|Not a directory|File exists",
        text,
    )
    return known.group() if known else (text.splitlines() or [repr(error)])[0][:200]


class Raised(logging.Filter):
    """Drops the tracebacks orbax logs for failures that it also raises to us.

    It logs them at once and raises them behind a barrier, where one of several
    processes may wait in vain. ``failure`` is the first since it was set to None, in
    one line; the caller sets it.
    """

    failure: OSError | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is kept."""
        raised = record.levelno >= logging.ERROR and "orbax" in record.pathname
        if raised and record.exc_info and self.failure is None:
            self.failure = OSError(reason_of(record.exc_info[1]))
        return not raised


def hide_late_answers() -> None:
    """Print nothing of arrays whose end nobody waits for; calling this again is cheap.

    At the first array that cannot be written orbax closes the event loop that waits for
    all of them. To tensorstore every other array then is an error that it cannot raise
    anywhere; it prints a traceback for each from threads of its own, amid the line in
    which a program says why it stops. All else goes on to the hook that was there.
    """
    there = sys.unraisablehook
    if getattr(there, "hides_late_answers", False):
        return

    def hook(failure: sys.UnraisableHookArgs) -> None:
        trace = failure.exc_traceback
        late = (
            isinstance(failure.exc_value, RuntimeError)
            and trace is not None
            and trace.tb_frame.f_code is _TELL.__code__
            and trace.tb_frame.f_locals["self"].is_closed()
        )
        if not late:
            there(failure)

    hook.hides_late_answers = True
    sys.unraisablehook = hook
