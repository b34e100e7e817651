"""A cache of a teacher that can be computed by hand, and a process that writes it.

``python -m tests.signals.tiny_cache FOLDER [kill=N | disk=BYTES]`` writes the cache.
The process kills itself at its N-th event, or makes files above a size fail as a full
disk does. Events are: the oracle was asked (before every batch), a
file is about to take its final name, a file has taken it. Every prompt that the oracle
was asked about is a line of ``FOLDER.asked``.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from rkd_jax.data.collate import collate
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.tokenize import TokenizeConfig, tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.sharding import tree_shardings
from rkd_jax.signals import cache_manifest, cache_shards
from rkd_jax.signals.cache import (
    CacheError,
    CacheSettings,
    CacheWriter,
    ShapingSettings,
    Source,
    TeacherCache,
)
from tests.evaluation.bigram import Bigram

TOKENIZER = byte_tokenizer()
VOCABULARY = TOKENIZER.vocab_size
ROWS = TokenizeConfig(max_prompt=6, max_response=9)
TOP = 5
SETTINGS = CacheSettings(
    top_k=TOP,
    log_prob_dtype="float32",
    shaping=ShapingSettings(),
    reference=True,
    oracle="length",
)
LISTS = CacheSettings(top_k=TOP, log_prob_dtype="float32")
REWARDS = CacheSettings(top_k=None, oracle="length")
_WORDS = ("a", "bcd", "efghij", "kl", "mnopqrstuvw", "x", "yz!")


def demonstrations(count=7):
    """Records of different lengths; the fifth response is cut."""
    return [
        DemonstrationRecord(f"{i}?", _WORDS[i % 7] + "." * (i // 7))
        for i in range(count)
    ]


def preferences(count=7):
    """The same, each beside the words that follow it; the teacher sees a hint."""
    return [
        PreferenceRecord(
            f"{i}?", _WORDS[i % 7], _WORDS[(i + 1) % 7], teacher_prompt=f"{i}!?"
        )
        for i in range(count)
    ]


KINDS = {"demonstrations": demonstrations, "preferences": preferences}


def table(seed):
    return 2 * np.random.default_rng(seed).normal(size=(VOCABULARY,) * 2)


def source(seed, mesh=None):
    """A bigram model; `table` has its logits in float64."""
    params = {"table": table(seed).astype(np.float32)}
    if mesh is not None:
        axes = {"table": ("vocab", "embed")}
        params = jax.device_put(params, tree_shardings(axes, mesh, shapes=params))
    return Source(Bigram(VOCABULARY), params)


def length(prompts, responses):
    """An oracle."""
    del prompts
    return [0.5 * len(text) for text in responses]


def writer(
    folder, records, settings=SETTINGS, *, oracle=length, meshes=(None, None), **options
):
    """Of teacher 1 and reference 2 on their meshes, as far as settings need them."""
    options = {"batch_size": 2, "shard_records": 3} | options
    return CacheWriter(
        folder,
        records,
        TOKENIZER,
        options.pop("rows", ROWS),
        settings,
        teacher=source(1, meshes[0]) if settings.needs_teacher else None,
        reference=source(2, meshes[1]) if settings.reference else None,
        oracle=oracle if settings.oracle else None,
        **options,
    )


def batch_of(records, rows=ROWS, numbers=None):
    """Some records, all if no numbers are given."""
    numbers = range(len(records)) if numbers is None else numbers
    return collate(
        [tokenize_record(records[i], TOKENIZER, rows, i) for i in numbers], rows
    )


def open_cache(folder, rows=ROWS, **options):
    return TeacherCache(folder, tokenizer=TOKENIZER, rows=rows, **options)


def _main(folder: str, trouble: str = "none=0") -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    kind, number = trouble.split("=")
    left = [int(number) if kind == "kill" else 0]
    if kind == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))

    def event():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def asked(prompts, responses):
        with Path(f"{folder}.asked").open("a") as file:
            file.writelines(f"{prompt}\n" for prompt in prompts)
        event()
        return length(prompts, responses)

    class Watched:
        """`os`, whose renaming is an event."""

        def __getattr__(self, name):
            return getattr(os, name)

        def replace(self, *names):
            event()
            os.replace(*names)
            event()

    cache_manifest.os = cache_shards.os = Watched()
    try:
        writer(folder, demonstrations(), oracle=asked).write()
    except CacheError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
