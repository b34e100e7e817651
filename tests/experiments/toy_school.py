"""The toy of `experiments.from_cache`, its models, and caches of a test's own pairs."""

import dataclasses
import json
from pathlib import Path

import jax

from experiments import from_cache, toy_cache
from experiments.sentiment_task import letter_share
from rkd_jax.data.sources import write_jsonl
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.models.decoder import Decoder
from rkd_jax.signals.cache import CacheSettings, CacheWriter, Source
from rkd_jax.training.metrics import read_metrics

SEED = 3


def options(folder, method, **changes):
    """The toy, its student not the default one."""
    config = from_cache.tiny()
    student = dataclasses.replace(config.student, seed=SEED)
    return dataclasses.replace(
        config, out=str(folder), method=method, student=student, **changes
    )


def toys_of(folder: Path) -> Path:
    """Data and cache of a run of the toy."""
    return Path(f"{folder}-toys-{folder.name}")


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report" / "report.json").read_text("utf-8"))


def losses(folder: Path) -> list[float]:
    return [entry["metrics"]["student/loss"] for entry in read_metrics(folder)]


def toy_models():
    """Teacher and reference of the toy's cache."""
    model = Decoder(toy_cache.RANDOM_TEACHER)
    return model, *(model.init(jax.random.key(seed)) for seed in (SEED + 1, SEED))


def cached_pairs(folder: Path, records, *, oracle=None) -> tuple[str, str]:
    """A file of pairs and a cache of the reference's and an oracle's word on them."""
    data, cache = folder / "data.jsonl", folder / "cache"
    folder.mkdir()
    write_jsonl(data, records)
    model, _, reference = toy_models()
    CacheWriter(
        cache,
        records,
        byte_tokenizer(),
        toy_cache.ROWS,
        CacheSettings(top_k=None, reference=True, oracle="toy"),
        reference=Source(model, reference),
        oracle=oracle or letter_share,
    ).write()
    return str(data), str(cache)
