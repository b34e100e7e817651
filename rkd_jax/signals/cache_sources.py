"""The models that a cache is made of, and what keeps one from being made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax

from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord, Record
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.models.api import CausalLM
from rkd_jax.signals import cache_identity as identity
from rkd_jax.signals.cache_format import CacheError, CacheSettings
from rkd_jax.signals.oracles import Oracle
from rkd_jax.types import Params

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer


class Source(NamedTuple):
    """A frozen model, on one device or on a mesh: where its parameters are.

    What is kept is the same, up to rounding, and a cache may go on on other devices.
    """

    model: CausalLM
    params: Params


Given = Source | Callable[[], Source]


class HeldModel:
    """A model that is in memory from when it is first needed until it is let go.

    Args:
        name: its role.
        given: the model, or a function that loads it. The former is always there.

    Attributes:
        hash: its name, see `rkd_jax.signals.cache_identity.model_hash`.
        vocabulary: entries of its head.
    """

    def __init__(self, name: str, given: Given):
        self._name, self._given = name, given
        self._source = given() if callable(given) else given
        self.hash = identity.model_hash(*self._source)
        self.vocabulary = self._source.model.config.vocab_size

    def source(self) -> Source:
        """The model itself, loaded again if need be.

        Raises:
            CacheError: it is not the one that it was.
        """
        if self._source is None:
            self._source = self._given()
            if identity.model_hash(*self._source) != self.hash:
                raise CacheError(
                    f"the {self._name}'s weights have changed since the start; start "
                    "again with those that the cache is to be of"
                )
        return self._source

    def release(self) -> None:
        """Keep no parameters, if they can be loaded again."""
        if callable(self._given):
            self._source = None


def check_request(
    records: Sequence[Record],
    settings: CacheSettings,
    teacher: Given | None,
    reference: Given | None,
    oracle: Oracle | None,
) -> None:
    """Everything that can be known to go wrong before a model is loaded.

    Raises:
        CacheError: it does.
    """
    kinds = {type(record) for record in records}
    if len(kinds) != 1 or not kinds <= {DemonstrationRecord, PreferenceRecord}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no record"
        raise CacheError(
            f"{names}: a cache is of demonstrations or of preferences, at least one"
        )
    check_one_process()
    for name, part, needed in (
        ("teacher", teacher, settings.needs_teacher),
        ("reference", reference, settings.reference),
        ("oracle", oracle, settings.oracle is not None),
    ):
        if (part is None) == needed:
            raise CacheError(f"{name}: {'missing' if needed else 'not asked for'}")


def check_one_process() -> None:
    """Raise CacheError in one of several processes."""
    if (count := jax.process_count()) > 1:
        raise CacheError(
            f"a cache is written by one process, on all devices of its host, and these "
            f"are {count}; start it on one host"
        )


def hold_models(
    teacher: Given | None,
    reference: Given | None,
    *,
    tokenizer: Tokenizer,
    rows: TokenizeConfig,
    settings: CacheSettings,
) -> tuple[HeldModel | None, HeldModel | None]:
    """Look at each model in turn; what can be loaded again is there one at a time.

    Raises:
        CacheError: one does not fit tokenizer, rows or settings.
    """
    held: list[HeldModel | None] = []
    for name, given, prompts in (
        ("teacher", teacher, rows.teacher_prompt_widths),
        ("reference", reference, rows.prompt_widths),
    ):
        if given is None:
            held.append(None)
            continue
        for other in filter(None, held):
            other.release()
        model = HeldModel(name, given)
        width = prompts[-1] + rows.response_widths[-1]
        _check_model(name, model.source().model, tokenizer, width)
        if name == "teacher":
            _check_width(settings, model.vocabulary)
        held.append(model)
    return held[0], held[1]


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
