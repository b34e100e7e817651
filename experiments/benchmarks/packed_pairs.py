"""A reward model's epoch over GSM8K pairs: one width, sorted buckets, packed rows.

The chosen response is the reference solution, the rejected one a model's wrong answer
(GSM8K's `model_solutions.jsonl`). Trunk and head are trained by `make_reward_model`, on
random weights: numbers of this page are of speed alone. Every shape is compiled before
the clock starts; then the ways take turns, a batch each, until all have had every pair.

    python -m experiments.benchmarks.packed_pairs \\
        --data ../shared/data/gsm8k/model_solutions.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import optax

from experiments.benchmarks.command_line import run_benchmark
from experiments.benchmarks.packing import limits, load_tokenizer
from rkd_jax.data.packing import PackedBatch, padding_waste
from rkd_jax.data.pipeline import make_batches
from rkd_jax.data.records import PreferenceRecord, RecordError
from rkd_jax.data.tokenizer import Tokenizer
from rkd_jax.data.windows import make_bucketed_batches, make_packed_batches
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.heads import TOKEN_HEAD, RewardModel
from rkd_jax.objectives.reward_model import make_reward_model
from rkd_jax.training import init_state, make_update
from rkd_jax.types import PreferenceBatch, PreferenceSignal

Batches = list[PreferenceBatch | PackedBatch]


@dataclasses.dataclass(frozen=True)
class PairsBenchmark:
    """Which pairs, which reward model, which batches."""

    data: str
    """JSON Lines with question, ground_truth and models' solutions."""
    model: str = "6b_finetuning"
    """Whose wrong answers are rejected."""
    pairs: int = 96
    """The first ones."""
    tokenizer: str = "smollm2"
    """As in `experiments.benchmarks.packing`."""
    hidden: int = 128
    layers: int = 2
    batch_size: int = 8
    """Pairs of a batch where a row holds one response."""
    bucket: int = 64
    """Widths of buckets are its multiples."""
    row_length: int = 1280
    """Of packed rows."""
    packed_rows: int = 4
    """Of a packed batch."""
    seed: int = 0


def read_pairs(config: PairsBenchmark) -> list[PreferenceRecord]:
    """The reference solution before a wrong one.

    Raises:
        RecordError: a line that has not what is asked for, or no wrong answer at all.
    """
    lines = Path(config.data).read_text().splitlines()
    found = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            answer = line[config.model]
            if not answer["is_correct"]:
                found.append(
                    PreferenceRecord(
                        line["question"], line["ground_truth"], answer["solution"]
                    )
                )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise RecordError(
                f"{config.data}:{number}: {error!r}",
                "lines have question, ground_truth, and of a model solution and "
                "is_correct",
            ) from error
        if len(found) == config.pairs:
            break
    if not found:
        raise RecordError(f"{config.data}: {config.model} has no wrong answer there")
    return found


def ways(
    config: PairsBenchmark, records: list[PreferenceRecord], tokenizer: Tokenizer
) -> dict[str, Batches]:
    """One epoch of batches, made each way."""
    plain, bucketed = limits(records, tokenizer, config.bucket)
    given = {"seed": config.seed, "epochs": 1}
    single = given | {"batch_size": config.batch_size, "drop_remainder": False}
    return {
        "one width": list(make_batches(records, tokenizer, plain, **single)),
        "sorted buckets": list(
            make_bucketed_batches(records, tokenizer, bucketed, **single)
        ),
        f"packed {config.row_length}": list(
            make_packed_batches(
                records,
                tokenizer,
                plain,
                row_length=config.row_length,
                batch_size=config.packed_rows,
                **given,
            )
        ),
    }


def make_step(config: PairsBenchmark, tokenizer: Tokenizer) -> Callable[[Any], None]:
    """One update on a batch, waited for."""
    heads = max(1, config.hidden // 64)
    trunk = Decoder(
        DecoderConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=config.hidden,
            intermediate_size=4 * config.hidden,
            num_layers=config.layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=config.hidden // heads,
            max_length=4096,
        )
    )
    reward = RewardModel(trunk, TOKEN_HEAD)
    optimizer = optax.adam(1e-4)
    update = make_update(
        make_reward_model(reward.token_rewards),
        student_optimizer=optimizer,
        max_traces=1000,
    )
    state = init_state(
        reward.init(jax.random.key(0)),
        student_optimizer=optimizer,
        rng=jax.random.key(1),
    )

    def step(batch) -> None:
        nonlocal state
        state, metrics = update(state, None, batch, PreferenceSignal())
        jax.block_until_ready(metrics)

    return step


def by_turns(epochs: dict[str, Batches], step) -> Iterator[tuple[str, float]]:
    """Seconds of every batch; who is behind in its epoch goes next."""
    done = dict.fromkeys(epochs, 0)
    while any(done[name] < len(epochs[name]) for name in epochs):
        name = min(epochs, key=lambda name: done[name] / len(epochs[name]))
        start = time.perf_counter()
        step(epochs[name][done[name]])
        yield name, time.perf_counter() - start
        done[name] += 1


def run(config: PairsBenchmark) -> None:
    """Measure and print."""
    tokenizer, records = load_tokenizer(config.tokenizer), read_pairs(config)
    epochs, step = ways(config, records, tokenizer), make_step(config, tokenizer)
    for batches in epochs.values():
        for batch in {_shape(batch): batch for batch in batches}.values():
            step(batch)
    seconds = dict.fromkeys(epochs, 0.0)
    for name, spent in by_turns(epochs, step):
        seconds[name] += spent
    print(f"{len(records)} pairs, {config}")
    print(f"{'':>16} {'padding':>8} {'columns':>9} {'shapes':>6} {'ms / pair':>9}")
    for name, batches in epochs.items():
        found = padding_waste(batches)
        print(
            f"{name:>16} {found.waste:>8.1%} {found.columns:>9} {found.shapes:>6} "
            f"{1000 * seconds[name] / len(records):>9.1f}"
        )


def _shape(batch: PreferenceBatch | PackedBatch) -> tuple:
    return batch.sequences.tokens.shape, batch.sequences.response_mask.shape


def main() -> None:
    """Command line."""
    run_benchmark(run, PairsBenchmark)


if __name__ == "__main__":
    main()
