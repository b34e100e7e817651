"""Bytes that leave a device in the collectives of a compiled program.

What a device has to send at the least, with n devices in the group and b bytes of
operand on each of them:

==================  ================================================================
all-gather          ``(n - 1) b``
reduce-scatter      ``(n - 1) / n b``
all-reduce          both after each other: ``2 (n - 1) / n b``
all-to-all          ``(n - 1) / n b``
collective-permute  ``b``; what else passes from one device to one other likewise
==================  ================================================================

TPUs reduce and scatter in one fusion that holds an all-reduce and a slice of it; that
counts as what it is. A collective in a scan counts as often as the scan turns.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping

from rkd_jax.aot.hlo import Computation, Instruction, Program

_SENT: Mapping[str, Callable[[float, int], float]] = {
    "all-gather": lambda b, n: b * (n - 1),
    "reduce-scatter": lambda b, n: b * (n - 1) / n,
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "ragged-all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-permute": lambda b, n: b,
    "collective-broadcast": lambda b, n: b,
}
KINDS = frozenset(_SENT)
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'=(\d+)")
_PART = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_COUNTED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kind of collective, on one device, in one step.

    Example: ``Traffic(count=32, bytes=2.1e9)``.
    """

    count: int  # times one is run
    bytes: float  # sent


def collective_traffic(program: Program, devices: int) -> dict[str, Traffic]:
    """What each kind of collective sends from one device.

    Args:
        program: of `rkd_jax.aot.hlo.parse`.
        devices: of the whole mesh; the group where the program names none.

    Returns:
        By the names of the module's table, those that occur; groups of one device send
        nothing and are left out.
    """
    found: dict[str, Traffic] = {}
    for computation, instruction, weight in once(program):
        kind = instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and _scatters(computation):
            kind = "reduce-scatter"
        group = group_size(instruction, devices)
        if group == 1 and kind != "collective-permute":
            continue
        sent = _SENT[kind](_operand_bytes(computation, instruction), group)
        old = found.get(kind, Traffic(0, 0.0))
        found[kind] = Traffic(old.count + weight, old.bytes + weight * sent)
    return found


def once(program: Program) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every collective; one that is spread over several fusions is one.

    Its parts share a channel and their shapes, and the outermost of them is run as
    often as it is. A channel alone may be shared by strangers.
    """
    spread: dict[tuple, tuple[Computation, Instruction, int]] = {}
    for computation, instruction, weight in program.weighted():
        if instruction.opcode.removesuffix("-start") not in KINDS:
            continue
        channel = _CHANNEL.search(instruction.attributes)
        if channel is None or computation.name not in program.fused:
            yield computation, instruction, weight
            continue
        shapes = tuple((array.dtype, array.shape) for array in instruction.result)
        key = (channel[1], instruction.opcode, shapes)
        if key not in spread or weight < spread[key][2]:
            spread[key] = (computation, instruction, weight)
    yield from spread.values()


def group_size(instruction: Instruction, devices: int) -> int:
    """Devices that a collective runs over."""
    listed = _LISTED.search(instruction.attributes)
    if listed and listed[1]:
        return len(listed[1].split(","))
    counted = _COUNTED.search(instruction.attributes)
    if counted:
        return int(counted[2])
    named = _NAMED.search(instruction.attributes)
    if not named:
        return devices
    sizes = {name: int(size) for name, size in _AXIS.findall(named[1])}
    # A part of an axis is written as name:(what is before it)size.
    parts = _PART.findall(named[2])
    return math.prod(int(size) if size else sizes[name] for name, size in parts)


def _operand_bytes(computation: Computation, instruction: Instruction) -> float:
    arrays = [
        array
        for name in instruction.operands
        for array in computation.instructions[name].result
    ]
    return sum(array.bytes for array in arrays)


def _scatters(computation: Computation) -> bool:
    """Whether what is returned is a slice of what was reduced."""
    return computation.name.startswith("all-reduce-scatter") or (
        computation.root.opcode == "dynamic-slice"
    )
