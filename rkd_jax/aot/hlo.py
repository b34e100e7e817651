r"""A compiled program as text, read far enough to count what its loops repeat.

XLA's own cost analysis counts the body of a loop once. Here every computation has a
weight: how often it is run, the body of a scan over L layers L times.

>>> program = parse('''
... %b (p: f32[]) -> f32[] {
...   ROOT %p = f32[] parameter(0)
... }
... ENTRY %main (x: f32[]) -> f32[] {
...   %x = f32[] parameter(0)
...   ROOT %w = f32[] while(%x), body=%b, c={"known_trip_count":{"n":"9"}}
... }
... ''')
>>> program.weights
{'main': 1, 'b': 9}
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(?P<entry>ENTRY\s+)?%?(?P<name>[\w.\-]+)\s.*\{\s*$")
_CLOSING = re.compile(r"^\}(, execution_thread=\S+)?\s*$")
_LINE = re.compile(r"^\s+(?P<root>ROOT\s+)?%(?P<name>[\w.\-]+)\s+=\s+(?P<rest>.*)$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)="
    r"%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")
_NAME = re.compile(r"%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")
_SPACE = re.compile(r"S\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/")
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Example: ``bf16[4,128]{1,0:T(8,128)(2,1)S(1)}`` is ``Array("bf16", (4, 128),
    in_hbm=False)``: memory space 1 is on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> float:
        """Without the padding of a layout."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``%name = result opcode(operands), attributes``.

    Example: ``Instruction("add.1", (Array("f32", (4,)),), "add", ("x", "x"), "x, x",
    "", True)``.
    """

    name: str
    result: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str  # of the parentheses, as written
    attributes: str
    root: bool

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Attributes that name a computation, such as ``("body", "while.3")``."""
        return _CALLS.findall(self.attributes)

    @property
    def called(self) -> tuple[str, ...]:
        """Computations it runs; not what a reduction applies to each element."""
        names = [name for kind, name in self.calls if kind != "to_apply"]
        if self.opcode == "call":
            names += [name for kind, name in self.calls if kind == "to_apply"]
        for found in _BRANCHES.finditer(self.attributes):
            names += _NAME.findall(found[1])
        return tuple(names)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by their names, in order."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it returns."""
        every = list(self.instructions.values())
        return next((i for i in every if i.root), every[-1])

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read ``name``."""
        return [i for i in self.instructions.values() if name in i.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    """A module, and how often each of its computations is run in one step.

    Of a condition one branch is run. ``guessed`` are loops whose number of turns
    depends on data: they are taken to reach the bound of their counter, or to turn
    ``unknown`` times if that is one of several bounds they have, else to walk over all
    rows of what they write, or for ``unknown`` turns.
    """

    computations: Mapping[str, Computation]
    entry: str
    weights: Mapping[str, int]
    fused: frozenset[str]  # computations that are a part of one instruction
    guessed: tuple[str, ...]

    def weighted(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that is run, with its computation and its weight."""
        for name, weight in self.weights.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, weight


def parse(text: str, *, unknown: int = 1) -> Program:
    """Read ``compiled.as_text()``.

    Args:
        text: of an optimised module.
        unknown: turns of a loop of which nothing else tells the number.

    Raises:
        ValueError: there is no entry computation.
    """
    computations, entry = {}, None
    name, lines = None, {}
    for line in text.splitlines():
        line = _COMMENT.sub("", line)
        if name is None:
            found = _HEADER.match(line)
            if found and found["name"] != "HloModule":
                name, lines = found["name"], {}
                entry = name if found["entry"] else entry
        elif _CLOSING.match(line):  # an attribute may go on over several lines
            computations[name] = Computation(name, lines)
            name = None
        elif found := _LINE.match(line):
            lines[found["name"]] = _instruction(found)
    if entry is None:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return _weigh(computations, entry, unknown)


def _instruction(found: re.Match) -> Instruction:
    rest = found["rest"]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    return Instruction(
        name=found["name"],
        result=tuple(_arrays(result)),
        opcode=rest[:opening],
        operands=tuple(_OPERAND.findall(inside)),
        inside=inside,
        attributes=rest[closing:],
        root=bool(found["root"]),
    )


def _closing(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    return len(text)


def _arrays(result: str) -> Iterator[Array]:
    for dtype, shape, layout in _ARRAY.findall(result):
        sizes = tuple(int(size.lstrip("<=")) for size in shape.split(",") if size)
        space = _SPACE.search(layout)
        yield Array(dtype, sizes, space is None or space[1] == "0")


def _weigh(computations, entry: str, unknown: int) -> Program:
    weights: dict[str, int] = collections.Counter()
    fused, guessed = set(), []

    def visit(name: str, weight: int, inside: bool) -> None:
        weights[name] += weight
        if inside:
            fused.add(name)
        for instruction in computations[name].instructions.values():
            # An asynchronous operation is named at its start and again at its end.
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            turns = 1
            if instruction.opcode == "while":
                turns, known = _turns(computations, instruction, unknown)
                if not known:
                    guessed.append(instruction.name)
            part = inside or instruction.opcode in ("fusion", "async-start")
            for called in _taken(computations, instruction):
                visit(called, weight * turns, part)

    visit(entry, 1, False)
    return Program(computations, entry, dict(weights), frozenset(fused), tuple(guessed))


def _taken(computations, instruction: Instruction) -> list[str]:
    """The computations that are run: of a condition the shortest, for a lower bound."""
    called = [name for name in instruction.called if name in computations]
    if instruction.opcode != "conditional" or len(called) < 2:
        return called
    return [min(called, key=functools.partial(_length, computations))]


def _length(computations, name: str) -> int:
    """Instructions of a computation and of all that it runs."""
    found = computations[name].instructions.values()
    return len(found) + sum(
        _length(computations, called)
        for instruction in found
        for called in _taken(computations, instruction)
    )


def _turns(computations, loop: Instruction, unknown: int) -> tuple[int, bool]:
    """How often a loop is run, and whether the program says so."""
    told = _TRIPS.search(loop.attributes)
    if told:
        return int(told[1]), True
    parts = dict(loop.calls)
    bound = None
    if "condition" in parts:
        bound = _bound(computations, parts["condition"], parts["body"])
    if bound is not None:
        return bound, len(_read(computations, parts["condition"])) < 2
    if unknown > 1 and unknown in _limits(computations, parts["condition"]):
        return unknown, False
    walked = _walked(computations, parts["body"])
    return (max(walked), False) if walked else (unknown, False)


def _bound(computations, condition: str, body: str) -> int | None:
    """Turns of ``for (i = 0; i < n; i += step)``; None where it is no such loop."""
    reached = _reachable(computations, condition)
    less = any("direction=LT" in one.attributes for one in reached)
    limits = _limits(computations, condition)
    if not less or len(limits) != 1:
        return None
    place = _read(computations, condition)
    step = _step(computations[body], place.pop()) if len(place) == 1 else 1
    return -(-limits.pop() // step)


def _read(computations, condition: str) -> set[int]:
    """Entries of the carry that a condition asks: a counter, and what may end it."""
    return {
        int(found[1])
        for one in _reachable(computations, condition)
        if one.opcode == "get-tuple-element"
        and (found := _INDEX.search(one.attributes))
    }


def _limits(computations, condition: str) -> set[int]:
    """The numbers that a condition knows."""
    reached = _reachable(computations, condition)
    return {n for one in reached if (n := _constant(one)) is not None}


def _constant(one: Instruction) -> int | None:
    number = one.opcode == "constant" and one.inside.isdigit()
    return int(one.inside) if number else None


def _step(body: Computation, place: int) -> int:
    """What a turn adds to an entry of the carry; 1 where that cannot be seen."""
    entries = body.root.operands
    one = body.instructions.get(entries[place]) if place < len(entries) else None
    if one is None or one.opcode != "add":
        return 1
    added = [_constant(body.instructions[name]) for name in one.operands]
    return max((n for n in added if n), default=1)


def _walked(computations, body: str) -> list[int]:
    """Rows of what a loop writes over the rows of one write; only where more than 1."""
    found = []
    for computation in _parts(computations, body):
        for instruction in computation.instructions.values():
            if instruction.opcode != "dynamic-update-slice":
                continue
            update = computation.instructions.get(instruction.operands[1])
            if update is None or not update.result[0].shape:
                continue
            rows, written = instruction.result[0].shape[0], update.result[0].shape[0]
            if written and rows > written:
                found.append(-(-rows // written))
    return found


def _reachable(computations, name: str) -> Iterator[Instruction]:
    for computation in _parts(computations, name):
        yield from computation.instructions.values()


def _parts(computations, name: str) -> Iterator[Computation]:
    """A computation and what is fused into it, but no loop inside it."""
    yield computations[name]
    for instruction in computations[name].instructions.values():
        if instruction.opcode == "fusion":
            for called in instruction.called:
                yield from _parts(computations, called)
