"""Decoding speed beside what the machine can do, measured in the same run.

A step of decoding reads every weight once, whatever the number of rows, reads the keys
and values of all earlier columns, and multiplies each weight with every row::

    bytes = weights + rows * columns * keys and values of a column
    flops = 2 * rows * (weights + columns * layers * 2 * heads * head_dim)
    roofline seconds = max(bytes / bandwidth, flops / peak)

with the weights of trunk and head (the embedding counts once where it is the head; a
row of it is nothing), and the columns at the middle of the response. ``bandwidth`` is
the fastest of several ways to read as many bytes as the weights have, each a sum or a
product with a vector; ``peak`` the fastest of several products of square matrices. The
ways take turns with the sampler and the median of each counts, so a busy machine slows
both sides. A step's seconds are those of sampling ``new`` columns less those of
sampling one, by ``new`` - 1: the prefill is left out and told apart. No row ends early.

    python -m experiments.benchmarks.sample
    python -m experiments.benchmarks.sample --model h384-l6-i1024-q6-kv3 \\
        --vocab 32000 --batch 1 8 --dtype bfloat16 --json
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.command_line import run_benchmark
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.types import Params, Prompts

_MODEL = re.compile(r"h(\d+)-l(\d+)-i(\d+)-q(\d+)-kv(\d+)")


@dataclasses.dataclass(frozen=True)
class SampleBenchmark:
    """Sizes and what to measure."""

    model: str = "h576-l30-i1536-q9-kv3"
    """Hidden size, layers, intermediate size, query heads, key and value heads; those
    of SmolLM2-135M, with its vocabulary."""
    vocab: int = 49152
    tie_embeddings: bool = True
    batch: tuple[int, ...] = (1, 32)
    """Rows that are decoded at once."""
    prompt: int = 64
    """Tokens of every prompt."""
    new: int = 64
    """Tokens drawn per row."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and arithmetic."""
    square: int = 2048
    """Side of the matrices whose product measures the peak."""
    turns: int = 5
    """Times that everything is run; the median counts."""
    json: bool = False
    """Print one JSON line per batch size in place of the table."""


def decoder_config(config: SampleBenchmark) -> DecoderConfig:
    """The decoder that ``model`` names.

    Raises:
        ValueError: no such name, or heads that do not divide the hidden size.
    """
    found = _MODEL.fullmatch(config.model)
    if found is None:
        raise ValueError(
            f"model {config.model!r} is not of the form h384-l6-i1024-q6-kv3"
        )
    hidden, layers, intermediate, heads, kv_heads = map(int, found.groups())
    if hidden % heads:
        raise ValueError(f"model {config.model!r}: q{heads} does not divide h{hidden}")
    return DecoderConfig(
        vocab_size=config.vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_length=config.prompt + config.new,
        tie_embeddings=config.tie_embeddings,
        dtype=config.dtype,
        param_dtype=config.dtype,
    )


def step_costs(config: SampleBenchmark, rows: int) -> dict[str, int]:
    """``weights`` of a step, and the ``bytes`` and ``flops`` of the docstring."""
    model = decoder_config(config)
    params = jax.eval_shape(Decoder(model).init, jax.random.key(0))
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    if not model.tie_embeddings:
        weights -= params["embed"]["embedding"].size
    columns = config.prompt + config.new // 2
    key_value = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    attended = 2 * columns * model.num_layers * model.num_heads * model.head_dim
    return {
        "weights": weights,
        "bytes": (weights + rows * columns * key_value)
        * jnp.dtype(config.dtype).itemsize,
        "flops": 2 * rows * (weights + attended),
    }


def bandwidth_ways(config: SampleBenchmark, weights: int) -> dict[str, Callable]:
    """Functions that read ``weights`` numbers once."""
    width = decoder_config(config).hidden_size
    matrix = jnp.ones((weights // width, width), config.dtype)
    row, column = (
        jnp.ones(weights // width, config.dtype),
        jnp.ones(width, config.dtype),
    )
    ways = {
        "sum": functools.partial(jax.jit(jnp.sum), matrix),
        "matrix-vector": functools.partial(jax.jit(jnp.matmul), matrix, column),
        "vector-matrix": functools.partial(jax.jit(jnp.matmul), row, matrix),
    }
    if jax.default_backend() == "cpu" and config.dtype == "float32":
        host, right = np.ones(matrix.shape, np.float32), np.ones(width, np.float32)
        ways["numpy sum"] = lambda: host.sum()
        ways["numpy matrix-vector"] = lambda: host @ right
    return ways


def peak_ways(config: SampleBenchmark) -> dict[str, Callable]:
    """Functions that multiply two square matrices."""
    square = jnp.ones((config.square, config.square), config.dtype)
    ways = {"matmul": functools.partial(jax.jit(jnp.matmul), square, square)}
    if jax.default_backend() == "cpu" and config.dtype == "float32":
        host = np.ones(square.shape, np.float32)
        ways["numpy matmul"] = lambda: host @ host
    return ways


def sampling_ways(
    config: SampleBenchmark, params: Params, rows: int
) -> dict[str, Callable]:
    """Sampling one column, and all of them."""
    model = Decoder(decoder_config(config))
    tokens = jax.random.randint(
        jax.random.key(1), (rows, config.prompt), 0, config.vocab
    )
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool))
    short, long = (make_sampler(model, SamplingConfig(n)) for n in (1, config.new))
    key = jax.random.key(2)
    return {
        "first": lambda: short(params, prompts, key),
        "all": lambda: long(params, prompts, key),
    }


def median_seconds(ways: dict[str, Callable], turns: int) -> dict[str, float]:
    """Each way once to compile, then ``turns`` times by turns."""
    seconds = {name: [] for name in ways}
    for way in ways.values():
        jax.block_until_ready(way())
    for _ in range(turns):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def measure(config: SampleBenchmark, params: Params, rows: int) -> dict[str, Any]:
    """One line of the table."""
    costs = step_costs(config, rows)
    reads, products = bandwidth_ways(config, costs["weights"]), peak_ways(config)
    ways = reads | products | sampling_ways(config, params, rows)
    seconds = median_seconds(ways, config.turns)
    read, product = min(reads, key=seconds.get), min(products, key=seconds.get)
    size = costs["weights"] * jnp.dtype(config.dtype).itemsize
    bandwidth, peak = size / seconds[read], 2 * config.square**3 / seconds[product]
    roofline = max(costs["bytes"] / bandwidth, costs["flops"] / peak)
    step = (seconds["all"] - seconds["first"]) / (config.new - 1)
    if step <= 0.0:
        raise ValueError(
            f"{config.new} tokens took no longer than one: give a larger model, a "
            f"larger new, or more turns than {config.turns}"
        )
    return {
        "batch": rows,
        "step_bytes": costs["bytes"],
        "step_flops": costs["flops"],
        "bandwidth_gb_s": bandwidth / 1e9,
        "bandwidth_by": read,
        "peak_gflop_s": peak / 1e9,
        "peak_by": product,
        "first_column_seconds": seconds["first"],
        "step_seconds": step,
        "roofline_step_seconds": roofline,
        "tokens_per_second": rows / step,
        "roofline_tokens_per_second": rows / roofline,
        "share_of_roofline": roofline / step,
        "tokens_per_second_with_prefill": rows * config.new / seconds["all"],
    }


def run(config: SampleBenchmark) -> None:
    """Measure and print."""
    if config.new < 2:
        raise ValueError(f"new is {config.new}; a step takes at least 2 columns")
    device = jax.devices()[0]
    title = (
        f"{device.device_kind}, jax {jax.__version__}: {config.model}, V "
        f"{config.vocab}, {config.dtype}; {config.new} tokens after {config.prompt}"
    )
    params = Decoder(decoder_config(config)).init(jax.random.key(0))
    if not config.json:
        print(title)
        print(
            f"{'rows':>5} {'tokens/s':>9} {'roofline':>9} {'share':>6} {'ms/step':>8} "
            f"{'GB/s':>6} {'GFLOP/s':>8} {'with prefill':>12}"
        )
    for rows in config.batch:
        line = measure(config, params, rows)
        if config.json:
            print(json.dumps({"device": title, **line}))
            continue
        print(
            f"{rows:>5} {line['tokens_per_second']:>9.1f} "
            f"{line['roofline_tokens_per_second']:>9.1f} "
            f"{line['share_of_roofline']:>6.0%} {1e3 * line['step_seconds']:>8.2f} "
            f"{line['bandwidth_gb_s']:>6.1f} {line['peak_gflop_s']:>8.1f} "
            f"{line['tokens_per_second_with_prefill']:>12.1f}"
        )


def main() -> None:
    """Command line."""
    run_benchmark(run, SampleBenchmark)


if __name__ == "__main__":
    main()
