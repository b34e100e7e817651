"""What a compiled step needs and how fast it could be, and how that is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rkd_jax.aot.chips import Chip
from rkd_jax.aot.collectives import Traffic


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device, layout padding included where the compiler tells.

    ``beside`` are arrays that stay there and that the step does not read. Where the
    compiler gives up for want of memory, temporaries are what it says it would have
    used less everything else, and no more is known of the program.

    Example: ``Memory(arguments=4e9, temporaries=7e9, outputs=4e9, aliased=4e9,
    code=1e6, beside=2e9, compiled=True).peak`` is ``1.3001e10``.
    """

    arguments: float
    temporaries: float
    outputs: float = 0.0
    aliased: float = 0.0  # of the outputs, written over donated arguments
    code: float = 0.0
    beside: float = 0.0
    compiled: bool = True

    @property
    def peak(self) -> float:
        """Everything that is there at once: what is donated counts once."""
        fresh = self.outputs - self.aliased
        return self.arguments + self.temporaries + fresh + self.code + self.beside


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one step.

    Example: ``Work(flops=1e13, hbm_bytes=2e10, collectives={"all-gather":
    Traffic(32, 1e9)})``.
    """

    flops: float  # of matrix products, computed-again ones included
    hbm_bytes: float
    collectives: Mapping[str, Traffic]

    @property
    def ici_bytes(self) -> float:
        """Sent in all collectives."""
        return sum(traffic.bytes for traffic in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each unit alone would be busy; a step takes at least the longest.

    Example: ``Roofline(compute=0.05, hbm=0.02, interconnect=0.06).binds`` is
    ``"interconnect"``.
    """

    compute: float
    hbm: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """A lower bound of a step."""
        return max(dataclasses.astuple(self))

    @property
    def binds(self) -> str:
        """The unit that is busy longest."""
        seconds = dataclasses.asdict(self)
        return max(seconds, key=seconds.get)


def roofline(work: Work, chip: Chip) -> Roofline:
    """The times of one device at its published speeds."""
    return Roofline(
        work.flops / chip.peak,
        work.hbm_bytes / chip.hbm_bandwidth,
        work.ici_bytes / chip.ici_bandwidth,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step on a slice.

    Example: ``print(plan)``; ``json.dumps(plan.as_dict())``.
    """

    setting: Mapping[str, Any]  # experiment, method, topology, mesh, rows and so on
    chip: Chip
    devices: int
    memory: Memory
    work: Work | None  # None where it could not be compiled
    tokens: int  # columns of the sequences that the student is trained on, all devices
    model_flops: float  # forward and backward of the student on them, all devices
    guessed_loops: int = 0
    seconds_to_compile: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the compiler took it and nothing beside it is too much."""
        return self.memory.compiled and self.memory.peak <= self.chip.usable

    @property
    def speed(self) -> dict[str, float]:
        """Upper bounds: ``tokens_per_s_per_device`` and ``mfu``."""
        times = roofline(self.work, self.chip)
        return {
            "tokens_per_s_per_device": self.tokens / times.seconds / self.devices,
            "mfu": self.model_flops / times.seconds / self.devices / self.chip.peak,
        }

    def as_dict(self) -> dict[str, Any]:
        """Numbers by name: bytes, operations and seconds on one device."""
        memory = dataclasses.asdict(self.memory)
        found = {
            **self.setting,
            "chip": self.chip.name,
            "devices": self.devices,
            "fits": self.fits,
            "memory": memory | {"peak": self.memory.peak, "limit": self.chip.usable},
            "tokens": self.tokens,
            "model_flops": self.model_flops,
            "seconds_to_compile": self.seconds_to_compile,
            "notes": list(self.notes),
        }
        if self.work is None:
            return found
        times = roofline(self.work, self.chip)
        return found | {
            "flops": self.work.flops,
            "hbm_bytes": self.work.hbm_bytes,
            "collectives": {
                kind: dataclasses.asdict(traffic)
                for kind, traffic in self.work.collectives.items()
            },
            "guessed_loops": self.guessed_loops,
            "roofline_s": dataclasses.asdict(times) | {"step": times.seconds},
            "binds": times.binds,
            "at_most": self.speed,
        }

    def __str__(self) -> str:
        return "\n".join(
            [*_settings(self), *_memory(self), *_speed(self), *_said(self)]
        )


def _settings(plan: Plan) -> list[str]:
    return [f"{name:>14}  {value}" for name, value in plan.setting.items()]


def _memory(plan: Plan) -> list[str]:
    memory, limit = plan.memory, plan.chip.usable
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    parts = [
        f"arguments {gib(memory.arguments)}",
        f"temporaries {gib(memory.temporaries)}",
    ]
    fresh = memory.outputs - memory.aliased
    if gib(fresh) != gib(0):
        parts.append(f"results {gib(fresh)}")
    if memory.beside:
        parts.append(f"kept beside the step {gib(memory.beside)}")
    return [
        f"{'memory':>14}  {verdict}: {gib(memory.peak)} of {gib(limit)} per device",
        f"{'':>14}  {', '.join(parts)}",
    ]


def _speed(plan: Plan) -> list[str]:
    if plan.work is None:
        return []
    work, times = plan.work, roofline(plan.work, plan.chip)
    kinds = [
        f"{kind} {traffic.bytes / 1e9:.3g} GB in {traffic.count}"
        for kind, traffic in sorted(work.collectives.items())
    ]
    speed = plan.speed
    return [
        f"{'compute':>14}  {work.flops / 1e12:.4g} TFLOP, {times.compute:.3g} s",
        f"{'HBM':>14}  {work.hbm_bytes / 1e9:.4g} GB, {times.hbm:.3g} s",
        f"{'interconnect':>14}  {work.ici_bytes / 1e9:.4g} GB sent, "
        f"{times.interconnect:.3g} s",
        *(f"{'':>14}  {line}" for line in kinds),
        f"{'binds':>14}  {times.binds}: a step takes at least {times.seconds:.3g} s",
        f"{'at most':>14}  {speed['tokens_per_s_per_device']:,.0f} tokens/s per "
        f"device, model FLOPs utilisation {100 * speed['mfu']:.3g} %",
    ]


def _said(plan: Plan) -> list[str]:
    notes = list(plan.notes)
    if plan.guessed_loops:
        loops = "1 loop turns" if plan.guessed_loops == 1 else "{} loops turn"
        loops = loops.format(plan.guessed_loops)
        notes.append(f"{loops} as often as the data asks; counted as for full rows")
    return [f"{'note':>14}  {note}" for note in notes]


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.2f} GiB"
