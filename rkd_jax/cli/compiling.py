"""``rkd compile``: a step is compiled for devices that are not here."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar, Literal

import tyro

from rkd_jax.cli.usage import UsageError


@dataclasses.dataclass(frozen=True)
class CompileCommand:
    """Compile a step of an experiment for TPUs or GPUs that are not here, run nothing.

    Says, per device, whether it fits, and what bounds its speed. Needs the compiler:
    pip install 'rkd_jax[aot]' for TPUs, or for GPUs 'jax[cuda12]' of the same version
    as jax.
    """

    after_interrupt: ClassVar[str] = "nothing was compiled"

    experiment: tyro.conf.Positional[str]
    """Name of a module of experiments, such as tvkd; its config() is compiled."""
    topology: str
    """Chip and grid of the slice, such as v5e:16x16, v5p:8x8x8 or v6e:16x16; or GPUs of
    one host, such as h100:8."""
    mesh: tuple[int, int, int] = (1, -1, 1)
    """Devices along data, fsdp and tensor; -1 is all that remain."""
    method: str | None = None
    """Of the experiment's report, such as DPO; the last of it if not given."""
    program: Literal["update", "teacher", "sampler"] = "update"
    """The update, the teacher's pass before it, or the student's sampler."""
    batch: int | None = None
    """Records of one update; the experiment's if not given."""
    accumulation: int | None = None
    """Micro-batches of one update; if not given, as the experiment's or fewer."""
    remat: Literal["none", "attention", "dots", "full"] | None = None
    """What the student's blocks compute again; the experiment's if not given."""
    tiny: bool = False
    """Compile tiny() in place of config()."""
    json: bool = False
    """Print one JSON line."""

    def run(self) -> None:
        """Print what was found."""
        from rkd_jax.aot.topology import TopologyError, prefer_the_compiler

        prefer_the_compiler()
        from experiments.compile_ahead import Request, plan
        from experiments.settings import SettingsError

        options = dataclasses.asdict(self)
        as_json = options.pop("json")
        try:
            found = plan(Request(**options))
        except (SettingsError, TopologyError) as error:
            raise UsageError(str(error)) from error
        print(json.dumps(found.as_dict()) if as_json else found)
