"""How much memory a step will take, told before the first one runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from rkd_jax.sharding import device_bytes
from rkd_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes on one device: what each role holds, and the peak of the compiled step.

    Example: ``str(report)`` is ``"memory per device: student 0.50 GiB, student
    optimizer 1.00 GiB, frozen 2.00 GiB, inputs 0.01 GiB, working 1.20 GiB, peak 4.71
    GiB"``.
    """

    roles: dict[str, int]
    working: int | None  # temporaries of the step; None where the backend tells nothing
    limit: int | None  # what the device has, if it tells

    @property
    def peak(self) -> int | None:
        """Everything held plus everything temporary."""
        if self.working is None:
            return None
        return sum(self.roles.values()) + self.working

    def __str__(self) -> str:
        parts = {**self.roles, "working": self.working, "peak": self.peak}
        text = ", ".join(f"{k} {_gib(v)}" for k, v in parts.items() if v is not None)
        return f"memory per device: {text}" + (
            f" of {_gib(self.limit)}" if self.limit else ""
        )


def memory_report(
    update: Any, state: TrainState, frozen: Any, batch: Any, signal: Any
) -> MemoryReport:
    """Compile ``update`` for these inputs, without running it, and read its needs.

    The compiled step is the one that the first call then uses; nothing is compiled
    twice. Inputs may be abstract.
    """
    critic = state.critic
    held = {
        "student": state.student.params,
        "student optimizer": state.student.opt_state,
        "critic": critic and critic.params,
        "critic optimizer": critic and critic.opt_state,
        "frozen": frozen,
        "inputs": (batch, signal),
    }
    roles = {role: device_bytes(tree) for role, tree in held.items()}
    stats = update.lower(state, frozen, batch, signal).compile().memory_analysis()
    working = None
    if stats is not None:
        # Outputs that are not written over the donated state come on top.
        fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
        working = stats.temp_size_in_bytes + max(fresh, 0)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return MemoryReport({k: v for k, v in roles.items() if v}, working, limit)


def _gib(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size / 64:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.2f} KiB"
