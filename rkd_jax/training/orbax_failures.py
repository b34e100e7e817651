"""What orbax and tensorstore say when a checkpoint cannot be written or read."""

from __future__ import annotations

import logging
import re

from rkd_jax.training.together import Disagreement


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
