"""The command line every benchmark shares."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from experiments.command import MENDABLE
from experiments.host_memory import keep_freed_memory
from experiments.settings import SettingsError

Config = TypeVar("Config")
NO_SIZES = ("seed", "drop_layers")


def run_benchmark(run: Callable[[Config], None], config: type[Config]) -> None:
    """Parse the options and run; an error that options cause is one line and exit 2.

    Whole numbers are sizes and counts, checked to be at least 1. The description is the
    docstring of the module of ``run``.
    """
    keep_freed_memory()
    options = tyro.cli(config, description=sys.modules[run.__module__].__doc__)
    try:
        check_sizes(options)
        run(options)
    except (*MENDABLE, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check_sizes(config: Any, prefix: str = "") -> None:
    """Raise SettingsError if a size is below 1, or a list of sizes is empty."""
    for field in dataclasses.fields(config):
        if field.name in NO_SIZES:
            continue
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_sizes(value, f"{name}.")
        sizes = value if isinstance(value, tuple) else (value,)
        if not sizes:
            raise SettingsError(f"{name} is empty: give one at least")
        whole = [x for x in sizes if isinstance(x, int) and not isinstance(x, bool)]
        if any(x < 1 for x in whole):
            raise SettingsError(f"{name}={value} has to be at least 1")
