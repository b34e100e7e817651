"""Ctrl-C that is heard whatever the process is in the middle of."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_AGAIN = 0.05  # seconds


@contextlib.contextmanager
def hearing_ctrl_c() -> Iterator[Callable[[], bool]]:
    """While active a `KeyboardInterrupt` gets through; gives whether there was one.

    An exception that is raised while Python calls something that returns nothing to
    anybody is printed and dropped: a destructor, or what JAX does at every garbage
    collection. There the interrupt is sent again. A C extension that is being imported
    makes another error of it, so whatever fails after one failed because of it.

    Where SIGINT is ignored, or handled by somebody else, or this is another thread,
    nothing changes.
    """
    heard = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield heard.is_set
        return
    hook = sys.unraisablehook

    def interrupt(signum, frame):
        heard.set()
        raise KeyboardInterrupt

    def dropped(unraisable):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        again = threading.Timer(_AGAIN, _thread.interrupt_main)
        again.daemon = True
        again.start()

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = dropped
    try:
        yield heard.is_set
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, signal.default_int_handler)
