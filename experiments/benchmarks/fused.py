"""Fused against dense losses: temporaries from the compiler, time as a ratio.

Value and gradient in states and head of the student. Temporaries are exact; times are
of one run in which both versions take turns, so that their ratio means something on a
busy machine.

    python -m experiments.benchmarks.fused
    python -m experiments.benchmarks.fused --hidden 4096 --vocab 128256 \\
        --dtype bfloat16 --rows 1024 8192

With `--topology` the compiler of TPUs or GPUs says what one chip would take. It has to
be installed (`pip install 'rkd_jax[aot]'`, or 'jax[cuda12]'), a chip does not, and
nothing is timed:

    python -m experiments.benchmarks.fused --topology v5e:2x2 --hidden 4096 \\
        --vocab 128256 --dtype bfloat16 --rows 256 1024 8192
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.command_line import run_benchmark
from rkd_jax.aot.topology import prefer_the_compiler, slice_devices
from rkd_jax.losses import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    token_log_probs,
    total_variation,
)
from rkd_jax.losses.fused import (
    Tiles,
    linear_divergence,
    linear_token_log_probs,
)
from rkd_jax.masking import accumulator

DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": generalized_jsd,
    "total_variation": total_variation,
}
Loss = Literal["log_probs", "forward_kl", "reverse_kl", "jsd", "total_variation"]


@dataclasses.dataclass(frozen=True)
class FusedBenchmark:
    """Sizes and what to measure."""

    rows: tuple[int, ...] = (256, 1024, 4096)
    """Positions, batch times length."""
    hidden: int = 576
    """Width of the student's states."""
    teacher_hidden: int | None = None
    """Of the teacher's; as the student's if not given."""
    vocab: int = 49152
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of states and heads."""
    head_dtype: Literal["float32", "bfloat16"] | None = None
    """Of the student's head, where it is another: float32 for a master copy."""
    losses: tuple[Loss, ...] = ("log_probs", "forward_kl", "jsd")
    gradients: tuple[Literal["default", "recompute", "ahead"], ...] = ("default",)
    """What the backward pass does where rows do not fit at once, see `Tiles`; what the
    objectives get is the default."""
    turns: int = 5
    """Times that every version is run; the median counts."""
    most_temp_gib: float = 8.0
    """Versions with more temporaries are compiled, not run."""
    topology: str | None = None
    """TPUs or GPUs, such as v5e:2x2 or h100:1, for one of which all is compiled."""
    json: bool = False
    """Print one JSON line per row in place of the table."""


def inputs(config: FusedBenchmark, rows: int) -> dict[str, jax.Array]:
    """Random states, heads and targets."""
    width = config.teacher_hidden or config.hidden
    keys = jax.random.split(jax.random.key(0), 5)
    dtype = jnp.dtype(config.dtype)

    def normal(key, *shape, scale=1.0):
        return (scale * jax.random.normal(key, shape)).astype(dtype)

    return {
        "hidden": normal(keys[0], rows, config.hidden),
        "head": normal(
            keys[1], config.hidden, config.vocab, scale=config.hidden**-0.5
        ).astype(config.head_dtype or dtype),
        "teacher_hidden": normal(keys[2], rows, width),
        "teacher_head": normal(keys[3], width, config.vocab, scale=width**-0.5),
        "targets": jax.random.randint(keys[4], (rows,), 0, config.vocab),
    }


def arguments(config: FusedBenchmark, rows: int) -> dict[str, Any]:
    """`inputs`, or where nothing is run their shapes, on one chip of the slice."""
    if config.topology is None:
        return inputs(config, rows)
    chip = jax.sharding.SingleDeviceSharding(slice_devices(config.topology)[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip),
        jax.eval_shape(functools.partial(inputs, config, rows)),
    )


def dense(loss: str, hidden, head, given) -> jax.Array:
    """The sum of a loss of logits."""

    def logits(states, head):
        wide = accumulator(states)
        head = head.astype(states.dtype)
        return jnp.matmul(states, head, preferred_element_type=wide)

    student = logits(hidden, head)
    if loss == "log_probs":
        return token_log_probs(student, given["targets"]).sum()
    teacher = logits(given["teacher_hidden"], given["teacher_head"])
    return DIVERGENCES[loss](student, teacher).sum()


def fused(gradient: str, loss: str, hidden, head, given) -> jax.Array:
    """The same without logits."""
    tiles = Tiles(gradient=None if gradient == "default" else gradient)
    if loss == "log_probs":
        return linear_token_log_probs(hidden, head, given["targets"], tiles=tiles).sum()
    return linear_divergence(
        hidden,
        head,
        given["teacher_hidden"],
        given["teacher_head"],
        divergence=DIVERGENCES[loss],
        tiles=tiles,
    ).sum()


def measure(config: FusedBenchmark, loss: str, rows: int) -> dict[str, dict]:
    """Versions of one loss at one size: ``temp_bytes``, ``seconds`` if it was run."""
    versions = {"dense": dense} | {
        name: functools.partial(fused, name) for name in config.gradients
    }
    given = arguments(config, rows)
    hidden, head = given.pop("hidden"), given.pop("head")
    found, runs = {}, {}
    for name, version in versions.items():
        step = jax.jit(jax.value_and_grad(functools.partial(version, loss), (0, 1)))
        compiled = step.lower(hidden, head, given).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        found[name] = {"temp_bytes": temporary}
        runs_here = config.topology is None
        if runs_here and temporary <= config.most_temp_gib * 2**30:
            runs[name] = compiled
    seconds = {name: [] for name in runs}
    for compiled in runs.values():
        jax.block_until_ready(compiled(hidden, head, given))
    for _ in range(config.turns):
        for name, compiled in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(hidden, head, given))
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        found[name]["seconds"] = float(np.median(times))
    return found


def row_of(loss: str, rows: int, found: dict[str, dict]) -> dict[str, Any]:
    """One line of the table."""
    line = {"loss": loss, "rows": rows}
    whole = found["dense"]
    for name, version in found.items():
        line[f"{name}_temp_gib"] = version["temp_bytes"] / 2**30
        line[f"{name}_seconds"] = version.get("seconds")
        if name != "dense" and "seconds" in whole and "seconds" in version:
            line[f"{name}_time_ratio"] = version["seconds"] / whole["seconds"]
    return line


def run(config: FusedBenchmark) -> None:
    """Measure and print."""
    if config.topology is not None:
        prefer_the_compiler()
        jax.config.update("jax_platforms", "cpu")
    device = config.topology or jax.devices()[0].device_kind
    title = (
        f"{device}, jax {jax.__version__}: D {config.hidden}, V "
        f"{config.vocab}, {config.dtype}; value and gradient"
    )
    if not config.json:
        print(title)
        print(
            f"{'loss':>15} {'rows':>6} {'version':>10} {'temp GiB':>9} {'seconds':>8} "
            f"{'to dense':>8}"
        )
    for loss in config.losses:
        for rows in config.rows:
            found = measure(config, loss, rows)
            if config.json:
                print(json.dumps({"device": title, **row_of(loss, rows, found)}))
                continue
            line = row_of(loss, rows, found)
            for name in found:
                seconds, ratio = line[f"{name}_seconds"], line.get(f"{name}_time_ratio")
                print(
                    f"{loss:>15} {rows:>6} {name:>10} {line[f'{name}_temp_gib']:>9.3f} "
                    f"{'' if seconds is None else f'{seconds:.3f}':>8} "
                    f"{'' if ratio is None else f'{ratio:.2f}':>8}"
                )


def main() -> None:
    """Command line."""
    run_benchmark(run, FusedBenchmark)


if __name__ == "__main__":
    main()
