"""Compile a step for devices that are not here, and read what it would need."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import Mesh, NamedSharding

from rkd_jax.aot.collectives import collective_traffic
from rkd_jax.aot.flops import matmul_flops
from rkd_jax.aot.hlo import parse
from rkd_jax.aot.report import Memory, Work
from rkd_jax.aot.traffic import hbm_bytes
from rkd_jax.sharding import device_bytes

_REFUSED = re.compile(  # two ways of libtpu to say so
    r"(?:Used |total memory required for [\w ]+\()(?P<used>[\d.]+)(?P<unit>[KMG]?)"
    r"(?= of [\d.]+[KMG]? hbm|\) exceeds available HBM)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What `compile_step` found.

    Example: ``compile_step(update, arguments, mesh).memory.peak``.
    """

    memory: Memory
    work: Work | None
    guessed_loops: int
    seconds: float


def compile_step(
    jitted: Any,
    arguments: tuple[Any, ...],
    mesh: Mesh,
    *,
    beside: float = 0.0,
    unknown: int = 1,
) -> Compiled:
    """Trace, lower and compile; run nothing.

    Args:
        jitted: of `jax.jit`.
        arguments: abstract values, each with its sharding on ``mesh``.
        mesh: of devices of a topology, or real ones.
        beside: bytes on a device that are no arguments.
        unknown: see `rkd_jax.aot.hlo.parse`.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses it for another reason than want
            of memory.
    """
    start = time.perf_counter()
    traced = jitted.trace(*arguments)
    jaxpr = traced.jaxpr.jaxpr
    unread = unread_bytes(jaxpr, arguments)
    beside += unread
    flops = matmul_flops(jaxpr, devices=mesh.size, unknown=unknown)
    lowered = traced.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = _refused(error, device_bytes(arguments) - unread)
        if memory is None:
            raise
        memory = dataclasses.replace(memory, beside=beside)
        return Compiled(memory, None, 0, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        beside=beside,
    )
    program = parse(text_of(lowered, compiled), unknown=unknown)
    traffic = collective_traffic(program, mesh.size)
    work = Work(flops, hbm_bytes(program), traffic)
    return Compiled(memory, work, len(program.guessed), seconds)


def text_of(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> str:
    """The optimised program, for `rkd_jax.aot.hlo.parse`.

    jax 0.10.2 cannot read back what libtpu 0.0.51 compiles for TPU7x. What the compiler
    writes down itself is the same text, for compiling a second time.

    Raises:
        jax.errors.JaxRuntimeError: jax cannot read it and the compiler wrote no such
            file, or several.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        with tempfile.TemporaryDirectory() as folder:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            lowered.compile(compiler_options=options)
            written = list(Path(folder).glob("*.jit_*.after_optimizations.txt"))
            if len(written) != 1:
                raise error
            return written[0].read_text(encoding="utf-8")


def placed(tree: Any, shardings: Any) -> Any:
    """Abstract values with their shardings.

    Args:
        tree: of abstract values.
        shardings: the same tree, or one sharding for all.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings)


def unread_bytes(jaxpr: Any, arguments: tuple[Any, ...]) -> float:
    """Bytes on one device of arguments that a function does not read.

    They are no arguments of the compiled program, but they are there.
    """
    read = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for eqn in jaxpr.eqns:
        read |= {v for v in eqn.invars if not isinstance(v, Literal)}
    leaves = jax.tree.leaves(arguments)
    given = jaxpr.invars[len(jaxpr.invars) - len(leaves) :]  # constants come first
    unread = [leaf for v, leaf in zip(given, leaves, strict=True) if v not in read]
    return device_bytes(unread)


def _refused(error: Exception, arguments: float) -> Memory | None:
    """What the compiler says it would have used."""
    found = _REFUSED.search(str(error))
    if found is None:
        return None
    used = float(found["used"]) * _UNITS[found["unit"]]
    return Memory(arguments, used - arguments, compiled=False)
