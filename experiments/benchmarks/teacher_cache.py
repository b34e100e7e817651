"""What a teacher's top k leaves out, and what it takes to store it.

The teacher answers prompts; the student is the teacher without some layers, as in the
quickstart before its warm start. At every target: the KL divergence between the
buckets of the top k and their tail, its share of the whole KL, the KL that a list
without a tail would give (both sides renormalised), and bytes and error of each way to
keep the log-probs.

    python -m experiments.benchmarks.teacher_cache
    python -m experiments.benchmarks.teacher_cache --models.drop-layers 17
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from experiments.benchmarks.command_line import run_benchmark
from experiments.sentiment_task import make_prompts
from experiments.settings import ModelConfig
from experiments.teacher_student import cut_student, load_teacher
from rkd_jax.data.collate import collate
from rkd_jax.data.tokenize import TokenizeConfig, tokenize_record
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.signals.cache_codec import (
    LOG_PROB_DTYPES,
    Topk,
    decode_topk,
    encode_topk,
)
from rkd_jax.signals.teacher import make_teacher_log_probs


@dataclasses.dataclass(frozen=True)
class CacheBenchmark:
    """Models, and what to measure."""

    models: ModelConfig = ModelConfig()
    top_k: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200, 1000)
    prompts: int = 16
    tokens: int = 64
    """Longest response."""
    temperature: float = 1.0
    """Of the responses' sampling."""


def distributions(config: CacheBenchmark) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Log-probs of teacher and student, float64[n, V] each, response by response."""
    teacher, params, tokenizer = load_teacher(config.models)
    student, student_params = cut_student(config.models, teacher, params, None)
    rows = TokenizeConfig(max_prompt=96, max_response=config.tokens, chat=True)
    records = make_prompts(config.prompts, 0, seed=0, steering=None)[0]
    batch = collate(
        [tokenize_record(r, tokenizer, rows, i) for i, r in enumerate(records)], rows
    )
    sample = make_sampler(
        teacher,
        SamplingConfig(
            max_new_tokens=config.tokens,
            temperature=config.temperature,
            eos_ids=(tokenizer.eos_id,),
        ),
    )
    samples = sample(params, batch.prompts, jax.random.key(0)).sequences
    scorers = [
        (make_teacher_log_probs(model), weights)
        for model, weights in ((teacher, params), (student, student_params))
    ]
    for row in range(config.prompts):
        one = jax.tree.map(lambda x, row=row: _response(x, row), samples)
        mask = np.asarray(one.response_mask[0])
        yield tuple(
            np.asarray(scores(weights, one)[0], np.float64)[mask]
            for scores, weights in scorers
        )


def measure(p: np.ndarray, q: np.ndarray, order: np.ndarray, top_k: int):
    """Per token of one response, whose tokens ``order`` sorts: the columns of `run`."""
    ids, others = order[:, :top_k], order[:, top_k:]
    tail, rest = (
        np.log(np.exp(np.take_along_axis(x, others, -1)).sum(-1)) for x in (p, q)
    )
    topk = Topk(ids, np.take_along_axis(p, ids, -1), tail)
    listed = np.take_along_axis(q, ids, -1)
    found = {
        "mass": np.exp(topk.log_probs).sum(-1),
        "whole": (np.exp(p) * (p - q)).sum(-1),
        "buckets": bucket_kl(topk, listed, rest),
        "no tail": list_kl(topk, listed),
    }
    for dtype in LOG_PROB_DTYPES:
        data = encode_topk(topk, dtype)
        kept, _ = decode_topk(data, len(p), top_k, dtype)
        listed = np.take_along_axis(q, kept.ids, -1)
        found[f"{dtype} bytes"] = np.full(len(p), len(data) / len(p))
        found[f"{dtype} error"] = bucket_kl(kept, listed, rest) - found["buckets"]
    return found


def bucket_kl(topk: Topk, listed: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """KL of the list and its tail."""
    log_probs, tail = np.float64(topk.log_probs), np.float64(topk.log_tail)
    inside = (np.exp(log_probs) * (log_probs - listed)).sum(-1)
    return inside + np.exp(tail) * (tail - rest)


def list_kl(topk: Topk, listed: np.ndarray) -> np.ndarray:
    """KL of the list alone, both sides renormalised."""
    p, q = (
        x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for x in (topk.log_probs, listed)
    )
    return (np.exp(p) * (p - q)).sum(-1)


def run(config: CacheBenchmark) -> None:
    """Measure and print."""
    found: dict[int, dict[str, list]] = {k: {} for k in config.top_k}
    for p, q in distributions(config):
        order = np.argsort(-p, axis=-1, kind="stable")
        for k, columns in found.items():
            for name, values in measure(p, q, order, k).items():
                columns.setdefault(name, []).append(values)
    tokens = sum(map(len, found[config.top_k[0]]["mass"]))
    print(f"{config.models.teacher}, {config.prompts} responses, {tokens} tokens")
    names = [f"{dtype} {what}" for dtype in LOG_PROB_DTYPES for what in ("B", "err")]
    head = ["k", "mass", "KL", "buckets", "share", "no tail", *names]
    print(" ".join(f"{name:>11}" for name in head))
    for k, columns in found.items():
        mean = {name: np.concatenate(x).mean() for name, x in columns.items()}
        share = mean["buckets"] / mean["whole"]
        cells = [f"{mean['mass']:.4f}", f"{mean['whole']:.4f}"]
        cells += [f"{mean['buckets']:.4f}", f"{share:.4f}", f"{mean['no tail']:.4f}"]
        for dtype in LOG_PROB_DTYPES:
            cells += [f"{mean[f'{dtype} bytes']:.1f}", f"{mean[f'{dtype} error']:+.1e}"]
        print(" ".join(f"{cell:>11}" for cell in [str(k), *cells]))


def _response(array: jax.Array, row: int) -> jax.Array:
    """One response, as a batch of its own."""
    return array.reshape(-1, array.shape[-1])[row][None]


def main() -> None:
    """Command line."""
    run_benchmark(run, CacheBenchmark)


if __name__ == "__main__":
    main()
