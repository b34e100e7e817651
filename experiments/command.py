"""The command line every experiment shares."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import tyro

from experiments.host_memory import keep_freed_memory
from experiments.settings import SettingsError
from experiments.several_processes import meet
from rkd_jax.data.records import RecordError
from rkd_jax.data.tokenizer import VocabularyMismatch
from rkd_jax.interop import UnsupportedConfigError, WeightsError
from rkd_jax.sharding import ShardingError
from rkd_jax.signals.cache_format import CacheError
from rkd_jax.signals.oracles import OracleError
from rkd_jax.training import leave, leave_soon
from rkd_jax.training.checkpoint import CheckpointError
from rkd_jax.training.compiled_programs import keep_compiled_programs
from rkd_jax.training.interrupt import Interrupted, PeerLost, blaming_peers
from rkd_jax.training.loop import Diverged
from rkd_jax.training.run import RunMismatch

Config = TypeVar("Config")
NO_CACHE, DISTRIBUTED = "--no-compilation-cache", "--distributed"

# What a user can cause and mend. Anything else is our bug and keeps its traceback.
MENDABLE = (
    CacheError,
    CheckpointError,
    Diverged,
    OracleError,
    OSError,  # no such file, full disk, read-only folder
    PeerLost,
    RecordError,
    RunMismatch,
    SettingsError,
    ShardingError,  # no such mesh, or an axis that does not divide over it
    UnsupportedConfigError,
    VocabularyMismatch,
    WeightsError,
)


def run_command(
    run: Callable[[Config], Path],
    config: Callable[[], Config],
    tiny: Callable[[], Config],
    **presets: Callable[[], Config],
) -> None:
    """Parse the options, run, name the report; one line for a mendable error.

    ``--tiny``, or the name of another preset, replaces the defaults of ``config``;
    ``--no-compilation-cache`` leaves no compiled program behind
    (`rkd_jax.training.compiled_programs`); ``--distributed`` is for one of several
    processes (`experiments.several_processes`). Freed memory is kept for the next array
    (`experiments.host_memory`).

    Exit codes: 0 done; 1 a fault of ours, with its traceback; 2 something the user can
    mend, in one line; 130 Ctrl-C and 143 SIGTERM (128 + the signal), after the step was
    finished and saved, so that the same command resumes. What ends one of several
    processes ends the others too (`rkd_jax.training.leave`); a failure of
    the runtime is then one line and 2, for most often it means that a peer is gone.
    """
    arguments = sys.argv[1:]
    presets = {f"--{name}": make for name, make in presets.items()} | {"--tiny": tiny}
    named = [argument for argument in arguments if argument in presets]
    keep = NO_CACHE not in arguments
    distributed = DISTRIBUTED in arguments
    flags = {*presets, NO_CACHE, DISTRIBUTED}
    arguments = [argument for argument in arguments if argument not in flags]
    if named[-1:] == ["--tiny"]:  # a toy spends its time in the compiler
        jax.config.update("jax_disable_most_optimizations", True)
    default = presets[named[-1]]() if named else config()
    options = tyro.cli(
        type(default),
        default=default,
        args=arguments,
        description=f"{type(default).__doc__}\n\nDefaults for another purpose: "
        f"{', '.join(presets)} (tiny: the same wiring with a toy teacher, in seconds). "
        f"{NO_CACHE}: do not keep compiled programs for the next run. {DISTRIBUTED}: "
        "this is one of several processes that make the run together.",
    )
    keep_freed_memory()
    if keep:
        keep_compiled_programs()
    try:
        if distributed:
            meet()
        with blaming_peers():
            report = run(options)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        leave(stop.exit_code)
    except KeyboardInterrupt:
        print(
            "\ninterrupted between checkpoints; the same command goes on from the last "
            "finished stage",
            file=sys.stderr,
        )
        leave(130)
    except MENDABLE as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except Exception:
        leave_soon(1)
        raise
    print(f"report: {report}")
