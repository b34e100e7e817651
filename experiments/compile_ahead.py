"""A step of an experiment, compiled for TPUs or GPUs that are not here.

    rkd compile tvkd --topology v5e:16x16 --mesh 1 64 4

The objective, the optimiser and the numbers are the experiment's own, from `config()`
with the options named; models are shapes (`experiments.published_shapes`). The step is
placed on a mesh as `rkd_jax.sharding` says: the student's state and the teacher cut
over fsdp and tensor, rows over data and fsdp. It is the step that the experiment itself
makes with the same ``--mesh`` (docs/scaling.md).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from experiments import abstract_games  # noqa: F401 - registers the games' shapes
from experiments.abstract_inputs import Inputs, inputs_of
from experiments.abstract_lab import abstract_lab
from experiments.abstract_programs import PROGRAMS, hold
from experiments.lab import Lab
from experiments.settings import ExperimentConfig, SettingsError
from rkd_jax.aot.compiling import compile_step
from rkd_jax.aot.report import Plan, gib
from rkd_jax.aot.topology import chip_of, slice_devices
from rkd_jax.sharding import MeshConfig, make_mesh, row_shards

EXPERIMENTS = (
    *("ava", "compare_seed_systems", "drdo", "edpo", "mm_pbkd", "pbkd", "tvkd"),
    "xkd",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile, for what.

    Example: ``Request("tvkd", "v5e:2x4", batch=8, accumulation=1)``.
    """

    experiment: str  # of `EXPERIMENTS`
    topology: str
    mesh: tuple[int, int, int] = (1, -1, 1)  # data, fsdp, tensor
    method: str | None = None  # of the experiment's report; None: the last, its own
    program: str = "update"  # of `PROGRAMS`
    batch: int | None = None  # records of one update; None: the experiment's
    accumulation: int | None = None  # None: as near to the experiment's as divides
    remat: str | None = None
    tiny: bool = False


def plan(request: Request, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Compile a program of the experiment's step and say what it needs.

    Args:
        request: what and where.
        devices: real or virtual ones in place of those of the topology; attention is
            then the one that is legal everywhere.

    Raises:
        SettingsError: an experiment, method or model that is not known, or sizes that
            do not divide.
        TopologyError: a machine that there is no compiler for.
        ImportError: the compiler is not installed.
    """
    chip = chip_of(request.topology)
    for name in ("batch", "accumulation"):
        if (number := getattr(request, name)) is not None and number < 1:
            raise SettingsError(f"--{name} {number} must be at least 1")
    config, table = _experiment(request)
    accelerator = None if devices is not None else chip.kind
    devices = devices or slice_devices(request.topology)
    lab = abstract_lab(config, accelerator=accelerator)
    methods = table(lab, config)
    name = request.method or list(methods)[-1]
    if name not in methods:
        raise SettingsError(
            f"{request.experiment} has no method {name!r}; there are "
            f"{', '.join(methods)}"
        )
    mesh = _mesh(request, devices)
    inputs = _cut(request, inputs_of(methods[name], request.batch), mesh)
    held = hold(lab, inputs, mesh, warmed=config.warm_start.steps > 0)
    program = PROGRAMS[request.program](lab, inputs, held, mesh)
    found = compile_step(
        program.jitted,
        program.arguments,
        mesh,
        beside=program.beside,
        unknown=program.turns,
    )
    result = Plan(
        setting=_setting(request, name, lab, inputs, mesh),
        chip=chip,
        devices=mesh.size,
        memory=found.memory,
        work=found.work,
        tokens=program.tokens,
        model_flops=program.model_flops,
        guessed_loops=found.guessed_loops,
        seconds_to_compile=found.seconds,
    )
    notes = _advice(result, request.program, inputs, lab, mesh)
    return dataclasses.replace(result, notes=notes)


def _experiment(request: Request) -> tuple[ExperimentConfig, Callable]:
    if request.experiment not in EXPERIMENTS:
        raise SettingsError(
            f"there is no experiment {request.experiment!r} to compile; there are "
            f"{', '.join(EXPERIMENTS)}"
        )
    module = importlib.import_module(f"experiments.{request.experiment}")
    config = module.tiny() if request.tiny else module.config()
    if request.remat is not None:
        models = dataclasses.replace(config.models, remat=request.remat)
        config = dataclasses.replace(config, models=models)
    return config, module.table


def _mesh(request: Request, devices: Sequence[jax.Device]) -> Mesh:
    try:
        mesh = make_mesh(MeshConfig(*request.mesh), devices)
    except (NotImplementedError, ValueError) as error:  # the torus has no such mesh
        raise SettingsError(str(error)) from error
    if mesh.size != len(devices):
        raise SettingsError(
            f"a mesh of {mesh.size} leaves {len(devices) - mesh.size} of the "
            f"{len(devices)} devices of {request.topology} without work; set one axis "
            "to -1"
        )
    return mesh


def _cut(request: Request, inputs: Inputs, mesh: Mesh) -> Inputs:
    """With as many micro-batches as asked for, or the most below that divide evenly."""
    shards = row_shards(mesh)
    counts = {leaf.shape[0] for leaf in jax.tree.leaves((inputs.batch, inputs.signal))}

    def divides(parts: int) -> bool:
        return all(n % parts == 0 and n // parts % shards == 0 for n in counts)

    usual, asked = inputs.step.accumulation, request.accumulation
    for parts in (asked,) if asked else range(usual, 0, -1):
        if divides(parts):
            step = dataclasses.replace(inputs.step, accumulation=parts)
            return dataclasses.replace(inputs, step=step)
    cut = f" in {asked} micro-batches" if asked else ""
    raise SettingsError(
        f"{inputs.records} records{cut} do not divide over data x fsdp = {shards} "
        "devices; set --batch to a multiple, or --mesh with more on the tensor axis"
    )


def _setting(
    request: Request, method: str, lab: Lab, inputs: Inputs, mesh: Mesh
) -> dict[str, str | int]:
    policy, student = lab.policy, lab.student.config
    return {
        "experiment": request.experiment,
        "method": method,
        "program": request.program,
        "topology": request.topology,
        "mesh": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "records": inputs.records,
        "sequences": f"{inputs.sequences} of {policy.max_prompt} + "
        f"{policy.max_response} columns",
        "accumulation": inputs.step.accumulation,
        "compute": f"{student.dtype}, attention {student.attention}, remat "
        f"{student.remat}",
    }


def _advice(
    result: Plan, program: str, inputs: Inputs, lab: Lab, mesh: Mesh
) -> tuple[str, ...]:
    """The first thing to change where it does not fit."""
    if result.fits:
        return ()
    memory, limit = result.memory, result.chip.usable
    rows = inputs.records // row_shards(mesh)
    part = rows // inputs.step.accumulation
    wider = "a larger slice, or more of --mesh on tensor"
    if memory.peak - memory.temporaries > 0.8 * limit:
        first = (
            "a larger slice, or more of --mesh on fsdp: what is held alone takes "
            f"{gib(memory.peak - memory.temporaries)}"
        )
    elif program != "update":  # which alone has micro-batches and a backward pass
        first = f"--batch {inputs.records // 2}" if rows % 2 == 0 else wider
    elif (remat := lab.student.config.remat) != "full":
        leaner = "full" if remat == "dots" else "dots"
        first = f"--remat {leaner} (in the experiment --models.remat {leaner})"
    elif part % 2 == 0:
        first = f"--accumulation {2 * inputs.step.accumulation}"
    else:
        first = wider
    over = gib(memory.peak - limit)
    return (f"{over} too much; the first thing to change: {first}",)
