"""Bytes between HBM and the units of a device in a compiled program.

Every instruction reads its operands and writes its result once; what is fused is one
instruction. An operand of which only slices are read counts as these slices, a result
that is written into a part of an operand as that part, and arrays that the compiler
keeps on the chip (memory space 1) as nothing. Loops count as often as they turn.

What is fetched to the chip ahead of its use counts once, when it is fetched. A
collective that is spread over several fusions counts once, beside what else they do.
Padding of layouts is left out, so real traffic is somewhat more.
"""

from __future__ import annotations

from collections.abc import Iterable

from rkd_jax.aot.collectives import KINDS, once
from rkd_jax.aot.hlo import Array, Computation, Instruction, Program

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("conditional", "call", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "optimization-barrier", "get-dimension-size"),
}
_VIEWS = {"bitcast", "reshape"}
_IN_PLACE = "output_to_operand_aliasing={{}: (0, {})}"  # another tiling, on TPU7x
_SPREAD = "async_collective_fusion"  # holds a part of one that takes many fusions
_READS_A_PART = {"dynamic-slice", "gather", "slice"}


def hbm_bytes(program: Program) -> float:
    """Bytes read from and written to HBM by one device in one step.

    Args:
        program: of `rkd_jax.aot.hlo.parse`.
    """
    total = 0.0
    for name, weight in program.weights.items():
        if name in program.fused:
            continue
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            total += weight * _bytes(program, computation, instruction)
    for computation, instruction, weight in once(program):
        if computation.name.startswith(_SPREAD):
            total += weight * _alone(computation, instruction)
    return total


def _alone(computation: Computation, one: Instruction) -> float:
    """All operands and the result."""
    read = sum(_hbm(computation.instructions[name].result) for name in one.operands)
    return read + _hbm(one.result)


def _bytes(program: Program, computation: Computation, one: Instruction) -> float:
    opcode = one.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    operands = [computation.instructions[name] for name in one.operands]
    read = [_hbm(operand.result) for operand in operands]
    if opcode == "fusion":
        inner = program.computations[one.called[0]]
        parts = [_read_by(program, inner, i) for i in range(len(operands))]
        read = [
            whole if part is None else min(whole, part)
            for whole, part in zip(read, parts, strict=True)
        ]
        return sum(read) + min(_hbm(one.result), _written_by(inner, inner.root))
    if opcode in _READS_A_PART:
        return 2 * _hbm(one.result)
    if opcode == "dynamic-update-slice":
        return 2 * read[1]
    if opcode.endswith("-start"):  # the result holds the operands as well
        return sum(read) + max(_hbm(one.result) - sum(read), 0.0)
    return sum(read) + _hbm(one.result)


def _hbm(arrays: Iterable[Array]) -> float:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _read_by(program: Program, fused: Computation, index: int) -> float | None:
    """Bytes that a fusion reads of an operand; None for all of it."""
    for parameter in fused.instructions.values():
        if parameter.opcode == "parameter" and parameter.inside == str(index):
            return _read_of(program, fused, parameter.name)
    return None


def _read_of(program: Program, fused: Computation, name: str) -> float | None:
    total = 0.0
    for user in fused.users(name):
        if _is_spread(fused, user):
            continue
        first = bool(user.operands) and user.operands[0] == name
        if user.opcode in _READS_A_PART and first:
            part = sum(array.bytes for array in user.result)
        elif user.opcode == "dynamic-update-slice" and first:
            part = 0.0
        elif user.opcode in _VIEWS or _IN_PLACE in user.attributes:
            part = _read_of(program, fused, user.name)
        elif user.opcode == "fusion":
            inner = program.computations[user.called[0]]
            part = _read_by(program, inner, user.operands.index(name))
        else:
            part = None
        if part is None:
            return None
        total += part
    return total


def _is_spread(fused: Computation, one: Instruction) -> bool:
    """It only hands on, in place, what the parts of a collective work on."""
    if not fused.name.startswith(_SPREAD):
        return False
    return one.opcode in ("parameter", *KINDS) or (one.root and one.opcode == "tuple")


def _written_by(fused: Computation, one: Instruction) -> float:
    """Bytes that a fusion writes: of an update in place, the update."""
    if one.opcode != "tuple" and _is_spread(fused, one):
        return 0.0
    if one.opcode in _VIEWS and one.operands:
        return _written_by(fused, fused.instructions[one.operands[0]])
    if one.opcode == "tuple":
        return sum(_written_by(fused, fused.instructions[n]) for n in one.operands)
    if one.opcode == "dynamic-update-slice":
        return sum(a.bytes for a in fused.instructions[one.operands[1]].result)
    return sum(array.bytes for array in one.result)
