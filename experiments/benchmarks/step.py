r"""One training step of every objective: time, arithmetic, memory.

A step is what a run does for one batch but for sampling: what frozen models say of it,
then the jitted update (`rkd_jax.training.update.make_update`), critic included. Models
are Llama shapes with tied embeddings and float32 parameters; data is random, in full
rows of ``length`` columns of which ``prompt`` are the prompt's
(`experiments.benchmarks.step_cases` says what is computed and what is looked up).

    python -m experiments.benchmarks.step --objective kd
    python -m experiments.benchmarks.step --objective mm_pbkd --dtype bfloat16 --json

``--json`` prints one line with, beside the setting:

==================  ====================================================================
s_per_step          median over ``steps``, each waited for
s_prepare           median of its part before the update: frozen models, but for a
                    teacher's head that the loss reads
tokens_per_s        columns of the sequences the student is trained on, per second
model_flops...      ``model_flops_per_step``, of the products of matrices: forward of
                    every frozen model, forward and backward of the student (three times
                    the forward pass) on the sequences it is trained on, action values
                    of a critic. A forward pass is

                    .. math:: 2 B L\,[2 D H d + 2 D H_{kv} d + 3 D F + 2 L H d]
                        \cdot \text{layers} + 2 B T D V

                    with the head on the T response positions alone. What is computed
                    again (``remat``, logits in the backward pass of a fused loss, the
                    student's forward pass in every step of a critic) does not count,
                    nor do scalar heads. Attention counts as the whole square of its
                    scores, masked half included, as is custom.
matmul_peak_flops   per second, best of several products of two square matrices of
                    ``matmul_size`` of this dtype, in this process
utilization         model_flops_per_step / s_per_step / matmul_peak_flops
peak_temp_bytes     temporaries of the compiled update; parameters, moments, batch and
                    signal come on top
compile_s           tracing and compiling the update; from JAX's persistent cache if
                    that is on
compilations        programs compiled in the timed steps, after the warm-up: 0 unless
                    something is traced again
==================  ====================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.command_line import run_benchmark
from experiments.benchmarks.llama import llama
from experiments.benchmarks.step_cases import CASES, Case, Setting
from rkd_jax.models.decoder import Decoder
from rkd_jax.training.optim import OptimConfig, make_optimizer
from rkd_jax.training.state import init_state
from rkd_jax.training.update import make_update

WARM_UP = 2  # steps before the timed ones
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class StepBenchmark:
    """Sizes and what to measure."""

    objective: Literal[
        "kd", "gkd", "topk_kd", "dpo", "pbkd", "mm_pbkd", "tvkd", "xkd", "drdo"
    ] = "kd"
    vocab: int = 32000
    batch: int = 8
    """Demonstrations, preference pairs, or prompts of a game."""
    samples: int = 2
    """Rollouts per prompt of a game."""
    length: int = 256
    """Columns of a row, prompt and response."""
    prompt: int = 64
    """Of these, the prompt's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic."""
    student: str = "h384-l6-i1024-q6-kv3"
    """Width, layers, width of the MLP, query heads, key heads."""
    teacher: str = "h768-l12-i2048-q12-kv6"
    remat: Literal["none", "attention", "dots", "full"] = "dots"
    """What the student's blocks compute again; see `DecoderConfig`."""
    attention: Literal["auto", "xla", "dot_product", "cudnn", "splash"] = "auto"
    """Who computes attention, of both models."""
    steps: int = 5
    """Timed ones, after two that are not; the median counts."""
    matmul_size: int | None = None
    """Of the product that `utilization` is measured against; 2048 on a CPU, 8192
    elsewhere."""
    json: bool = False
    """Print one JSON line in place of the list."""


def setting_of(config: StepBenchmark) -> Setting:
    """The models and sizes.

    Raises:
        ValueError: a shape that is none, or sizes that do not go together.
    """
    if not 0 < config.prompt < config.length:
        raise ValueError(
            f"prompt={config.prompt} must be positive and below length={config.length}"
        )

    def model(shape: str, **options) -> Decoder:
        return Decoder(
            llama(
                shape,
                vocab_size=config.vocab,
                max_length=config.length,
                dtype=config.dtype,
                attention=config.attention,
                **options,
            )
        )

    return Setting(
        student=model(config.student, remat=config.remat),
        teacher=model(config.teacher),
        batch=config.batch,
        samples=config.samples,
        length=config.length,
        prompt=config.prompt,
    )


def measure(config: StepBenchmark) -> dict[str, Any]:
    """What the module's table lists, beside the setting."""
    setting = setting_of(config)
    case = CASES[config.objective](setting)
    found = run_steps(case, config.steps)
    size = config.matmul_size
    if size is None:
        size = 2048 if jax.default_backend() == "cpu" else 8192
    peak = matmul_peak(size, jnp.dtype(config.dtype))
    seconds = found["s_per_step"]
    count = sum(x.size for x in jax.tree.leaves(case.params))
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **dataclasses.asdict(config),
        "sequences": case.sequences,
        "student_parameters": count,
        **found,
        "tokens_per_s": case.sequences * setting.length / seconds,
        "model_flops_per_step": case.flops,
        "matmul_size": size,
        "matmul_peak_flops": peak,
        "utilization": case.flops / seconds / peak,
    }


def run_steps(case: Case, steps: int) -> dict[str, float]:
    """Compile, warm up and time; the times, the memory and the compilations."""
    step, compiled = stepper(case)
    for _ in range(WARM_UP):
        step()
    with compilations() as seen:
        seconds = [step() for _ in range(steps)]
    prepare, whole = np.median(seconds, axis=0)
    return {
        "s_per_step": float(whole),
        "s_prepare": float(prepare),
        **compiled,
        "compilations": len(seen),
    }


def stepper(case: Case) -> tuple[Callable[[], tuple[float, float]], dict[str, float]]:
    """A function that takes one step, and what compiling it said.

    Returns:
        ``() -> (seconds before the update, seconds of the whole step)``, which raises
        RuntimeError where the update refuses the step; and ``peak_temp_bytes`` and
        ``compile_s``.
    """
    optimizer = make_optimizer(OptimConfig())
    critic_optimizer = None if case.critic is None else optimizer
    update = make_update(
        case.objective,
        student_optimizer=optimizer,
        critic_optimizer=critic_optimizer,
        critic_steps=case.critic_steps,
    )
    state = init_state(
        case.params,
        student_optimizer=optimizer,
        critic_params=case.critic,
        critic_optimizer=critic_optimizer,
        rng=jax.random.key(0),
    )
    signal = case.prepare(case.batch)
    start = time.perf_counter()
    compiled = update.lower(state, case.frozen, case.batch, signal).compile()
    compile_s = time.perf_counter() - start
    temporaries = compiled.memory_analysis().temp_size_in_bytes

    def step() -> tuple[float, float]:
        nonlocal state
        start = time.perf_counter()
        signal = jax.block_until_ready(case.prepare(case.batch))
        middle = time.perf_counter()
        state, metrics = update(state, case.frozen, case.batch, signal)
        jax.block_until_ready((state, metrics))
        stop = time.perf_counter()
        if metrics["skipped"]:
            raise RuntimeError(f"{case.objective.name}: a step was not taken")
        return middle - start, stop - start

    return step, {"peak_temp_bytes": temporaries, "compile_s": compile_s}


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of every compilation inside the block."""
    seen = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        if event == _COMPILED:
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def matmul_peak(size: int, dtype: jnp.dtype, turns: int = 7) -> float:
    """FLOPs per second of the fastest of several square products."""
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(turns + 1):  # the first one compiles
        start = time.perf_counter()
        jax.block_until_ready(product(left, right))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def run(config: StepBenchmark) -> None:
    """Measure and print."""
    found = measure(config)
    if config.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(
            f"{name:>22}  {value:.6g}"
            if isinstance(value, float)
            else f"{name:>22}  {value}"
        )


def main() -> None:
    """Command line."""
    run_benchmark(run, StepBenchmark)


if __name__ == "__main__":
    main()
