"""Options that cannot be meant, told from faults of the library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UsageError(ValueError):
    """Options that contradict each other; the message is one line."""


@contextlib.contextmanager
def said_by_options() -> Iterator[None]:
    """A value that a configuration refuses was given as an option."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
