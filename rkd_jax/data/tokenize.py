"""From text to ids: which ids a record becomes, and what is cut off.

The prompt and the response are encoded apart and joined as ids, so the boundary always
lies between two tokens. A response that fits ends in exactly one EOS, which is a
target; a response that had to be cut has none: the student must not learn to stop in
the middle.

>>> from rkd_jax.data.records import DemonstrationRecord
>>> from rkd_jax.data.tokenizer import byte_tokenizer
>>> config = TokenizeConfig(max_prompt=3, max_response=4)
>>> record = DemonstrationRecord("hello", "yes")
>>> row = tokenize_record(record, byte_tokenizer(), config)
>>> row.prompt, row.responses, row.events
([108, 108, 111], ([121, 101, 115, 257],), ('prompt truncated',))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from rkd_jax.data.records import (
    DemonstrationRecord,
    PreferenceRecord,
    Prompt,
    Record,
    RecordError,
)

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer

PROMPT_CUT = "prompt truncated"
TEACHER_PROMPT_CUT = "teacher prompt truncated"
RESPONSE_CUT = "response truncated"
PAIR_EQUAL = "pair equal after truncation"
EOS_AS_TEXT = "response spells the end token as text"


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """How records become rows. Lengths are in tokens.

    A batch is padded to the smallest bucket that holds its longest row; every
    combination of buckets compiles once, so keep them few. No buckets means one, the
    maximum.
    """

    max_prompt: int
    max_response: int  # EOS included
    prompt_buckets: tuple[int, ...] = ()  # ascending, the last one is max_prompt
    response_buckets: tuple[int, ...] = ()
    max_teacher_prompt: int | None = None  # None: as for the student, buckets included
    teacher_prompt_buckets: tuple[int, ...] = ()
    chat: bool = False  # text prompts become one user message of the chat template
    truncate_prompt: Literal["left", "right"] = "left"  # the side that is cut off
    append_eos: bool = True
    add_bos: bool = False  # start with one BOS; for templates that do not write it

    def __post_init__(self):
        for field in ("max_prompt", "max_response", "max_teacher_prompt"):
            least = 2 if self.add_bos and field != "max_response" else 1
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"{field} is {value}; at least {least} is needed")
        for field, longest in (
            ("prompt_buckets", self.max_prompt),
            ("response_buckets", self.max_response),
            ("teacher_prompt_buckets", self.max_teacher_prompt),
        ):
            buckets = getattr(self, field)
            if not buckets:
                continue
            ascending = list(buckets) == sorted(set(buckets)) and buckets[0] >= 1
            if not ascending or buckets[-1] != longest:
                raise ValueError(
                    f"{field} {tuple(buckets)} must ascend from at least 1 and end in "
                    f"max_{field.removesuffix('_buckets')} = {longest}"
                )
        if self.truncate_prompt not in ("left", "right"):
            raise ValueError(
                f"truncate_prompt is 'left' or 'right', not {self.truncate_prompt!r}"
            )

    @property
    def prompt_widths(self) -> tuple[int, ...]:
        """Every P a batch can have."""
        return tuple(self.prompt_buckets) or (self.max_prompt,)

    @property
    def teacher_prompt_widths(self) -> tuple[int, ...]:
        """Every P of the teacher a batch can have."""
        if self.max_teacher_prompt is None:
            return self.prompt_widths
        return tuple(self.teacher_prompt_buckets) or (self.max_teacher_prompt,)

    @property
    def response_widths(self) -> tuple[int, ...]:
        """Every T a batch can have."""
        return tuple(self.response_buckets) or (self.max_response,)


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """One record as ids, truncated and not yet padded.

    Example: ``Tokenized(17, prompt=[7], teacher_prompt=[7], responses=([5, 2],))``.
    """

    index: int  # position of the record in its source
    prompt: list[int]
    teacher_prompt: list[int]
    responses: tuple[list[int], ...]  # none, one, or chosen and rejected
    rewards: tuple[float, float] = (math.nan, math.nan)
    label: float = 1.0
    events: tuple[str, ...] = ()  # what a `TokenizeReport` counts


@dataclasses.dataclass
class TokenizeReport:
    """How many rows lost something, and the first records that did.

    Example: ``TokenizeReport(rows=64, counts={"response truncated": 3},
    first={"response truncated": [5, 17, 40]})``. A record that comes again in a later
    epoch is counted again.
    """

    rows: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    first: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    FIRST_KEPT = 5

    def add(self, row: Tokenized) -> None:
        """Count one row."""
        self.rows += 1
        for event in row.events:
            self.counts[event] = self.counts.get(event, 0) + 1
            first = self.first.setdefault(event, [])
            if len(first) < self.FIRST_KEPT and row.index not in first:
                first.append(row.index)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-able dict."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        parts = [
            f"{event}: {count} (first records {self.first[event]})"
            for event, count in sorted(self.counts.items())
        ]
        return f"{self.rows} rows tokenized. " + (
            ". ".join(parts) or "Nothing was cut."
        )


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, *, chat: bool, add_bos: bool = False
) -> list[int]:
    """Ids of a prompt, ready for the response to follow.

    Args:
        tokenizer: see `rkd_jax.data.tokenizer`.
        prompt: messages always go through the chat template and end in the opening of
            the assistant's turn.
        chat: what to do with text: True makes it one user message, False encodes it
            as it is.
        add_bos: begin with BOS unless the template already wrote one.

    Raises:
        RecordError: a prompt without a token, or messages that the template refuses.
        ValueError: the tokenizer lacks the template or the BOS asked for, or the
            template fails.
    """
    if isinstance(prompt, str) and not chat:
        ids = tokenizer.encode(prompt)
    else:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        ids = tokenizer.encode_chat(prompt, add_generation_prompt=True)
    if not ids:
        raise RecordError("prompt: encodes to no token", "check text and tokenizer")
    if add_bos:
        if tokenizer.bos_id is None:
            raise ValueError("add_bos: this tokenizer has no BOS; set add_bos=False")
        if ids[0] != tokenizer.bos_id:
            ids = [tokenizer.bos_id, *ids]
    return list(ids)


def tokenize_record(
    record: Record, tokenizer: Tokenizer, config: TokenizeConfig, index: int = 0
) -> Tokenized:
    """One record as ids, truncated to the limits of ``config``.

    At least one prompt token and one response token survive any truncation. Without a
    teacher prompt the teacher gets the student's.

    Args:
        record: decides by its type how many responses there are.
        index: position of the record in its source; travels with the batch.

    Raises:
        RecordError: text that encodes to nothing, messages that the template refuses;
            the error names the record.
        ValueError: what ``config`` asks for and the tokenizer lacks.
    """
    try:
        return _tokenize(record, tokenizer, config, index)
    except RecordError as error:
        raise RecordError(f"record {index}: {error.reason}", error.remedy) from None


def survey(
    records: Iterable[Record], tokenizer: Tokenizer, config: TokenizeConfig
) -> TokenizeReport:
    """Tokenize everything once, to know before training what will be cut."""
    report = TokenizeReport()
    for index, record in enumerate(records):
        report.add(tokenize_record(record, tokenizer, config, index))
    return report


def _tokenize(
    record: Record, tokenizer: Tokenizer, config: TokenizeConfig, index: int
) -> Tokenized:
    events = []
    eos_text = _eos_text(tokenizer)

    def prompt_ids(prompt: Prompt, limit: int, event: str) -> list[int]:
        ids, cut = _cut_prompt(prompt, tokenizer, config, limit)
        events.extend([event] * cut)
        return ids

    def response_ids(text: str) -> list[int]:
        ids, cut = _cut_response(text, tokenizer, config)
        events.extend([RESPONSE_CUT] * cut)
        if eos_text and eos_text in text:
            events.append(EOS_AS_TEXT)
        return ids

    prompt = prompt_ids(record.prompt, config.max_prompt, PROMPT_CUT)
    teacher = record.prompt if record.teacher_prompt is None else record.teacher_prompt
    limit = config.teacher_prompt_widths[-1]
    if teacher is record.prompt and limit == config.max_prompt:
        teacher_prompt = prompt
    else:
        teacher_prompt = prompt_ids(teacher, limit, TEACHER_PROMPT_CUT)
    extra = {}
    if isinstance(record, PreferenceRecord):
        responses = (response_ids(record.chosen), response_ids(record.rejected))
        if responses[0] == responses[1]:
            events.append(PAIR_EQUAL)
        rewards = (record.chosen_reward, record.rejected_reward)
        if None not in rewards:
            extra["rewards"] = rewards
        extra["label"] = record.label
    elif isinstance(record, DemonstrationRecord):
        responses = (response_ids(record.response),)
    else:
        responses = ()
    return Tokenized(
        index, prompt, teacher_prompt, responses, events=tuple(events), **extra
    )


def _eos_text(tokenizer: Tokenizer) -> str:
    eos = tokenizer.eos_id
    return "" if eos is None else tokenizer.decode([eos], skip_special=False)


def _cut_prompt(
    prompt: Prompt, tokenizer: Tokenizer, config: TokenizeConfig, limit: int
) -> tuple[list[int], bool]:
    ids = encode_prompt(tokenizer, prompt, chat=config.chat, add_bos=config.add_bos)
    if len(ids) <= limit:
        return ids, False
    if config.truncate_prompt == "right":
        if config.chat or not isinstance(prompt, str):
            raise RecordError(
                f"a chat prompt of {len(ids)} tokens, limit {limit}",
                "cutting it on the right would remove the assistant's opening; use "
                "truncate_prompt='left' or raise the limit",
            )
        return ids[:limit], True
    if config.add_bos:
        return ids[:1] + ids[1 - limit :], True
    return ids[-limit:], True


def _cut_response(
    text: str, tokenizer: Tokenizer, config: TokenizeConfig
) -> tuple[list[int], bool]:
    ids = list(tokenizer.encode(text))
    if not ids:
        raise RecordError("response: encodes to no token", "check text and tokenizer")
    if config.append_eos:
        if tokenizer.eos_id is None:
            raise ValueError(
                "append_eos: this tokenizer has no EOS; name its eos_token"
            )
        ids.append(tokenizer.eos_id)
    return ids[: config.max_response], len(ids) > config.max_response
