"""The command line of the library: ``rkd COMMAND --help``.

A module per command. What is heavy is imported when a command runs, so that help comes
at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro

from rkd_jax.cli.cache import CacheCommand
from rkd_jax.cli.compiling import CompileCommand
from rkd_jax.cli.interrupt import hearing_ctrl_c
from rkd_jax.cli.usage import UsageError


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``rkd``.

    Exit codes: 0 done, 2 bad input, 130 interrupted (the same command resumes).
    """
    command = tyro.extras.subcommand_cli_from_dict(
        {"cache": CacheCommand, "compile": CompileCommand},
        prog="rkd",
        description="Reward-guided and preference-based distillation.",
        args=None if arguments is None else list(arguments),
    )
    # Modules of the user's own, such as an oracle; nothing that is installed is hidden.
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    with hearing_ctrl_c() as interrupted:
        try:
            command.run()
        except (KeyboardInterrupt, Exception) as error:
            if interrupted() or isinstance(error, KeyboardInterrupt):
                print(f"\ninterrupted; {command.after_interrupt}", file=sys.stderr)
                sys.exit(130)
            if not isinstance(error, _mendable()):
                raise
            print(f"error: {_one_line(error)}", file=sys.stderr)
            sys.exit(2)


def _mendable() -> tuple[type[Exception], ...]:
    """What a user can cause and mend. Anything else keeps its traceback."""
    from rkd_jax.data.records import RecordError
    from rkd_jax.data.tokenizer import VocabularyMismatch
    from rkd_jax.interop import UnsupportedConfigError, WeightsError
    from rkd_jax.sharding import ShardingError
    from rkd_jax.signals.cache import CacheError
    from rkd_jax.signals.oracles import OracleError

    return (
        CacheError,
        ImportError,  # an extra that is not installed
        OracleError,
        OSError,  # no such file, full disk, read-only folder
        RecordError,
        ShardingError,  # no such mesh, or an axis that does not divide over it
        UnsupportedConfigError,
        UsageError,
        VocabularyMismatch,
        WeightsError,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
