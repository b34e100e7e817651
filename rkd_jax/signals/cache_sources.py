"""The models that a cache is made of, and what keeps one from being made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax

from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord, Record
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.models.api import CausalLM
from rkd_jax.signals.cache_format import CacheError, CacheSettings
from rkd_jax.signals.oracles import Oracle
from rkd_jax.types import Params

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer


class Source(NamedTuple):
    """A frozen model."""

    model: CausalLM
    params: Params


def check_sources(
    records: Sequence[Record],
    rows: TokenizeConfig,
    tokenizer: Tokenizer,
    settings: CacheSettings,
    teacher: Source | None,
    reference: Source | None,
    oracle: Oracle | None,
) -> None:
    """Everything that can be known to go wrong before a model runs."""
    kinds = {type(record) for record in records}
    if len(kinds) != 1 or not kinds <= {DemonstrationRecord, PreferenceRecord}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no record"
        raise CacheError(
            f"{names}: a cache is of demonstrations or of preferences, at least one"
        )
    if jax.process_count() > 1:
        raise CacheError("a cache is written by one process; start it on one host")
    parts = {
        "teacher": (teacher, settings.needs_teacher, rows.teacher_prompt_widths),
        "reference": (reference, settings.reference, rows.prompt_widths),
        "oracle": (oracle, settings.oracle is not None, ()),
    }
    for name, (part, needed, prompts) in parts.items():
        if (part is None) == needed:
            raise CacheError(f"{name}: {'missing' if needed else 'not asked for'}")
        if part is not None and prompts:
            width = prompts[-1] + rows.response_widths[-1]
            _check_model(name, part.model, tokenizer, width)
    if settings.needs_teacher:
        _check_width(settings, teacher.model.config.vocab_size)


def _check_width(settings: CacheSettings, vocabulary: int) -> None:
    asked = {"top_k": settings.top_k}
    if settings.shaping is not None and settings.shaping.support is not None:
        asked["one more than support"] = settings.shaping.support + 1
    for name, count in asked.items():
        if count is not None and count > vocabulary:
            raise CacheError(
                f"{name}={count} exceeds the teacher's {vocabulary} vocabulary entries"
            )


def _check_model(name: str, model: CausalLM, tokenizer: Tokenizer, width: int) -> None:
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise CacheError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the {name} "
            f"{config.vocab_size} vocabulary entries: they do not belong together"
        )
    if width > config.max_length:
        raise CacheError(
            f"rows of up to {width} tokens exceed the {name}'s context of "
            f"{config.max_length}; lower max_prompt or max_response"
        )
