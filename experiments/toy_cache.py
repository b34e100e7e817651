"""Toy records, and a random teacher's cache of them."""

from __future__ import annotations

from pathlib import Path

import jax

from experiments.sentiment_task import letter_share, make_prompts
from experiments.teacher_student import RANDOM_TEACHER
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.sources import write_jsonl
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.models.decoder import Decoder
from rkd_jax.signals.cache import CacheSettings, CacheWriter, ShapingSettings, Source
from rkd_jax.training.together import once

ROWS = TokenizeConfig(max_prompt=96, max_response=12)
_RECORDS = 24
EVERYTHING = CacheSettings(
    top_k=5,
    log_prob_dtype="float32",
    shaping=ShapingSettings(),
    reference=True,
    oracle="letter_share",
)


def write(folder: Path, kind: type, *, seed: int) -> tuple[str, str]:
    """Write both, or go on with what is there.

    Args:
        folder: created if need be.
        kind: of the records, `DemonstrationRecord` or `PreferenceRecord`.
        seed: of the reference; the teacher has another one.

    Returns:
        The file and the cache's folder.
    """
    prompts, _ = make_prompts(_RECORDS, 1, seed=0)
    records = [
        DemonstrationRecord(record.prompt, "see it " * (1 + n % 2))
        if kind is DemonstrationRecord
        else PreferenceRecord(record.prompt, "see it", f"no. {n}")
        for n, record in enumerate(prompts)
    ]
    data, cache = folder / "data.jsonl", folder / "cache"

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(data, records)
        model = Decoder(RANDOM_TEACHER)
        teacher, reference = (
            Source(model, model.init(jax.random.key(n))) for n in (seed + 1, seed)
        )
        CacheWriter(
            cache,
            records,
            byte_tokenizer(),
            ROWS,
            EVERYTHING,
            teacher=teacher,
            reference=reference,
            oracle=letter_share,
        ).write()

    once(make)
    return str(data), str(cache)
