"""All benchmarks at sizes for a small machine, written down as one page.

    make bench
    python -m experiments.benchmarks.report --out docs/performance.md

Every measurement is a process of its own, by the command that the page names, so that
none inherits the memory, the threads or the compiled programs of another; JAX's
persistent cache is off. With the defaults it takes about twenty minutes on two cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.benchmarks.command_line import run_benchmark
from experiments.benchmarks.step_cases import CASES
from experiments.settings import SettingsError

Row = dict[str, Any]
Runner = Callable[..., list[Row]]
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "torch",
    "transformers",
    "trl",
    "google-tunix",
)
REMARKS = "## Remarks\n"
"""From this heading on a page is written by hand, and kept."""
TOY = (
    *("--vocab", "64", "--batch", "2", "--length", "12", "--prompt", "4"),
    *("--student", "h32-l2-i48-q4-kv2", "--teacher", "h48-l3-i64-q4-kv2"),
    *("--steps", "1", "--matmul-size", "64"),
)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What is measured, and where it is written."""

    out: str = "docs/performance.md"
    batch: int = 8
    """Of the steps: demonstrations, pairs, or prompts of a game."""
    steps: int = 3
    """Timed ones of every objective."""
    objectives: tuple[str, ...] = tuple(CASES)
    peers: bool = True
    """Measure other libraries too, those that are installed."""
    toy: bool = False
    """Sizes that mean nothing, in seconds, to try the wiring."""


def measured(module: str, *arguments: str) -> list[Row]:
    """The JSON lines that a benchmark prints, in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", f"experiments.benchmarks.{module}", *arguments]
    print(f"{' '.join(command[2:])}", file=sys.stderr, flush=True)
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line]


def page(config: ReportConfig, run: Runner = measured) -> str:
    """The page, in Markdown."""
    sizes = (*TOY,) if config.toy else ("--batch", str(config.batch))
    if not config.toy:
        sizes += ("--steps", str(config.steps))
    before = os.getloadavg()[0]
    parts = [
        steps_section(config, run, sizes),
        remat_section(run, sizes),
        depth_section(run, config.toy),
        fused_section(run, config.toy),
        sampling_section(run, config.toy),
    ]
    if config.peers:
        parts.append(peers_section(run, sizes))
    head = heading(config, before, os.getloadavg()[0])
    return "\n\n".join([head, *filter(None, parts)]) + "\n"


def command_of(config: ReportConfig) -> str:
    """What to run for the same page; its file left out."""
    usual = ReportConfig()
    words = ["python -m experiments.benchmarks.report"]
    for name in ("batch", "steps"):
        if (value := getattr(config, name)) != getattr(usual, name):
            words += [f"--{name}", str(value)]
    if config.objectives != usual.objectives:
        words += ["--objectives", *config.objectives]
    words += ["--no-peers"] * (not config.peers) + ["--toy"] * config.toy
    return "make bench" if len(words) == 1 else " ".join(words)


def heading(config: ReportConfig, before: float, after: float) -> str:
    """The machine, the versions, and what to think of the numbers."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"""# Performance

Written by `{command_of(config)}` on
{datetime.now():%Y-%m-%d}; run it on your own machine before you rely on any number.

- Machine: {processor()}, {os.cpu_count()} cores. Load average {before:.1f} before and
  {after:.1f} after; the benchmark alone makes about the number of cores. Where it was
  higher before, others used the machine: times are upper bounds, ratios are rough,
  memory, FLOPs and compilations are exact.
- Python {platform.python_version()}, {versions}."""


def steps_section(config: ReportConfig, run: Runner, sizes: Sequence[str]) -> str:
    """One row per objective."""
    rows = [
        run("step", "--objective", name, *sizes, "--json")[0]
        for name in config.objectives
    ]
    first = rows[0]
    rates = {row["objective"]: row["tokens_per_s"] for row in rows}
    ratios = [
        f"{rates['topk_kd'] / rates[live]:.2f} times those of {live}"
        for live in ("kd", "gkd")
        if {live, "topk_kd"} <= rates.keys()
    ]
    cached = ""
    if ratios:
        cached = f"\n\nFrom a cached teacher, topk_kd: tokens / s {', '.join(ratios)}."
    peaks = sorted(row["matmul_peak_flops"] / 1e9 for row in rows)
    lines = table(
        ("objective", "sequences", "s / step", "frozen models, s", "tokens / s")
        + ("GFLOP / step", "utilisation", "temporaries", "compile, s", "recompiled"),
        [
            (
                row["objective"],
                row["sequences"],
                f"{row['s_per_step']:.2f}",
                f"{row['s_prepare']:.2f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['model_flops_per_step'] / 1e9:.0f}",
                f"{row['utilization']:.0%}",
                gib(row["peak_temp_bytes"]),
                f"{row['compile_s']:.1f}",
                row["compilations"],
            )
            for row in rows
        ],
    )
    return f"""## A training step

`python -m experiments.benchmarks.step --objective NAME {" ".join(sizes)} --json`

{setting(first)}. Utilisation is against the fastest product of two
{first["matmul_size"]} x {first["matmul_size"]} matrices seen in the same process
({peaks[0]:.0f} to {peaks[-1]:.0f} GFLOP/s); see the module for what counts.

{lines}{cached}"""


def remat_section(run: Runner, sizes: Sequence[str]) -> str:
    """Memory and time of what a block keeps for its backward pass."""
    rows = [
        run("step", "--objective", "dpo", "--remat", name, *sizes, "--json")[0]
        for name in ("none", "attention", "dots", "full")
    ]
    first = rows[0]
    lines = table(
        ("remat", "temporaries", "of none", "s / step", "of none"),
        [
            (
                row["remat"],
                gib(row["peak_temp_bytes"]),
                f"{row['peak_temp_bytes'] / first['peak_temp_bytes']:.2f}",
                f"{row['s_per_step']:.2f}",
                f"{row['s_per_step'] / first['s_per_step']:.2f}",
            )
            for row in rows
        ],
    )
    return f"""## What a block keeps for its backward pass

`--objective dpo --remat NAME`, the same sizes; "dots" is what is taken where nothing
is said. What the loss of {first["sequences"]} responses and the gradients take is part
of the temporaries whatever is kept.

{lines}"""


def depth_section(run: Runner, toy: bool) -> str:
    """Compile time of a shallow and a deep student."""
    depths = (2, 4) if toy else (6, 24)
    sizes = ("--batch", "1", "--length", "64", "--prompt", "16", "--steps", "1")
    sizes += ("--vocab", "512", "--teacher", "h64-l1-i64-q1-kv1")
    rows = [
        run("step", "--student", f"h256-l{n}-i512-q4-kv2", *sizes, "--json")[0]
        for n in depths
    ]
    seconds = [row["compile_s"] for row in rows]
    return f"""## Depth

Blocks are scanned, so the update of a student of {depths[1]} layers is the same program
as that of {depths[0]}: tracing and compiling took {seconds[1]:.1f} s against
{seconds[0]:.1f} s, ratio {seconds[1] / seconds[0]:.2f}."""


def fused_section(run: Runner, toy: bool) -> str:
    """Losses straight from hidden states."""
    sizes = ("--rows", "256", "1024", "--turns", "3")
    if toy:
        sizes = ("--rows", "16", "--hidden", "8", "--vocab", "32", "--turns", "1")
    rows = run("fused", *sizes, "--json")
    lines = table(
        (
            "loss",
            "rows",
            "dense, temporaries",
            "fused",
            "dense, s",
            "fused, s",
            "ratio",
        ),
        [
            (
                row["loss"],
                row["rows"],
                f"{row['dense_temp_gib']:.2f} GiB",
                f"{row['default_temp_gib']:.2f} GiB",
                number(row["dense_seconds"]),
                number(row["default_seconds"]),
                number(row.get("default_time_ratio")),
            )
            for row in rows
        ],
    )
    return f"""## Fused losses

`python -m experiments.benchmarks.fused {" ".join(sizes)} --json`: value and gradient
against the same through logits. {rows[0]["device"]}.

{lines}"""


def sampling_section(run: Runner, toy: bool) -> str:
    """Sampling, where that benchmark is there."""
    if toy or importlib.util.find_spec("experiments.benchmarks.sample") is None:
        return ""
    rows = run("sample", "--json")
    lines = table(
        ("batch", "MiB read / step", "ms / step", "of the roofline", "tokens / s")
        + ("with the prompt's pass", "bandwidth", "peak"),
        [
            (
                row["batch"],
                f"{row['step_bytes'] / 2**20:.0f}",
                f"{1e3 * row['step_seconds']:.1f}",
                f"{row['share_of_roofline']:.0%}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['tokens_per_second_with_prefill']:.0f}",
                f"{row['bandwidth_gb_s']:.1f} GB/s",
                f"{row['peak_gflop_s']:.0f} GFLOP/s",
            )
            for row in rows
        ],
    )
    return f"""## Sampling

`python -m experiments.benchmarks.sample --json`: {rows[0]["device"]}. The roofline of a
step is the longer of two times: its bytes at the fastest bandwidth and its operations
at the fastest rate that were seen in the same process.

{lines}"""


def peers_section(run: Runner, sizes: Sequence[str]) -> str:
    """The same step in other libraries."""
    named = [f"--sizes.{x[2:]}" if x.startswith("--") else x for x in sizes]
    options = " ".join(named)
    cells, absent, failed = [], {}, {}
    for objective in ("gkd", "kd"):
        (found,) = run("peers", "--sizes.objective", objective, *named, "--json")
        absent |= found["to_install"]
        failed |= found["failed"]
        for name, seconds in found["s_per_step"].items():
            ratio = f"{found['ratio_to_rkd_jax'][name]:.2f}"
            cells.append((objective, name, f"{seconds:.2f}", ratio))
    lines = table(("objective", "library", "s / step", "to rkd_jax"), cells)
    lacking = "".join(
        f"\n\nNot measured: {name} (`pip install {' '.join(lacks)}`)."
        for name, lacks in absent.items()
    )
    lacking += "".join(
        f"\n\nNot measured: {name}, which failed: `{error}`"
        for name, error in failed.items()
    )
    return f"""## Distillation beside other libraries

`python -m experiments.benchmarks.peers --sizes.objective NAME {options} --json`:
the same shapes, one process, in turns; {setting(found)}. "torch" is a loop over
transformers' Llama that we wrote for this comparison.

{lines}{lacking}"""


def setting(row: Row) -> str:
    """The sizes of a step in words."""
    return (
        f"Student {row['student']}, teacher {row['teacher']}, vocabulary "
        f"{row['vocab']}, batch {row['batch']}, {row['length']} columns of which "
        f"{row['prompt']} are the prompt's, {row['dtype']}"
    )


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(value: Any) -> str:
    """Three digits of a number; nothing for None."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def remarks(out: Path) -> str:
    """What somebody wrote by hand on the page that is there, its heading included."""
    before = out.read_text("utf-8") if out.exists() else ""
    _, heading, text = before.partition(REMARKS)
    return f"\n{heading}{text}" if heading else ""


def run(config: ReportConfig) -> None:
    """Measure and write the page."""
    unknown = [name for name in config.objectives if name not in CASES]
    if unknown:
        raise SettingsError(
            f"there is no objective {unknown[0]!r}; there are {', '.join(CASES)}"
        )
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = page(config)
    out.write_text(text + remarks(out), encoding="utf-8")
    print(f"report: {out}")


def main() -> None:
    """Command line."""
    run_benchmark(run, ReportConfig)


if __name__ == "__main__":
    main()
