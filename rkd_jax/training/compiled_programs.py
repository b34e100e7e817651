"""Compiled programs kept on disk, so that the same command does not compile again.

Only a command line turns this on; importing the library or an experiment never does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import jax

MOST_BYTES = 4 * 2**30
"""Of the folder; what was used least lately goes first."""


def keep_compiled_programs() -> Path | None:
    """Let JAX read and write its persistent compilation cache; where it is.

    The folder is ``rkd_jax/compiled`` in the user's cache folder (``XDG_CACHE_HOME``,
    by default ``~/.cache``). JAX's own variables win: ``JAX_COMPILATION_CACHE_DIR``
    names another folder, ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. Programs
    that compile in less than a second are not kept
    (``JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS``), nor more than `MOST_BYTES` of them
    (``JAX_COMPILATION_CACHE_MAX_SIZE``). With a bound JAX locks the folder, so commands
    that run side by side may share it.

    Returns:
        The folder; None where programs are not kept, because they should not be or,
        with a line that says so, because the folder cannot be written to.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        print(
            f"warning: compiled programs are not kept ({error}); name a folder in "
            "JAX_COMPILATION_CACHE_DIR, or pass --no-compilation-cache",
            file=sys.stderr,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    if jax.config.jax_compilation_cache_max_size != -1:
        _drop_half_written(folder)
    return folder


def _drop_half_written(folder: Path) -> None:
    """Delete programs that a killed command did not finish writing.

    With a bound on the folder JAX writes a program, and then beside it when it was last
    used. Without that note it may be cut off, it is never replaced, and no other
    program is kept any more.
    """
    for program in folder.glob("*-cache"):
        note = program.name.removesuffix("-cache") + "-atime"
        if not program.with_name(note).exists():
            program.unlink(missing_ok=True)


def cache_folder() -> Path:
    """``rkd_jax/compiled`` in the user's cache folder.

    Raises:
        RuntimeError: there is no ``XDG_CACHE_HOME``, and no home to be found.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification ignores relative paths.
    base = base if base.is_absolute() else Path.home() / ".cache"
    return base / "rkd_jax" / "compiled"
