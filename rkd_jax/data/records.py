"""What a user writes down: prompts, demonstrations and preference pairs, as text.

A prompt is text or a list of chat messages. The teacher may see another prompt than
the student (``teacher_prompt``: hints, a reference answer, another system message); it
then scores the very same response. A record is checked when it is made, so whatever
holds one may rely on it.

>>> record = PreferenceRecord("Name a prime.", chosen="7", rejected="9")
>>> record.to_json()
{'prompt': 'Name a prime.', 'chosen': '7', 'rejected': '9'}
>>> PreferenceRecord.from_json(record.to_json()) == record
True
>>> DemonstrationRecord("Name a prime.", response="")
Traceback (most recent call last):
    ...
rkd_jax.data.records.RecordError: response: empty; give at least one visible character
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Self

from rkd_jax.untrusted import shown

Message = dict[str, str]  # {"role": one of ROLES, "content": text}
Prompt = str | list[Message]
ROLES = ("system", "user", "assistant", "tool")


class RecordError(ValueError):
    """A record breaks the format. ``reason`` is short and countable, ``remedy`` helps.

    Readers put file and line before ``reason`` and keep both on one line.
    """

    def __init__(self, reason: str, remedy: str = ""):
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


class _Record:
    """JSON form shared by the records: keys are the field names, defaults left out."""

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON-able dict; `from_json` gives back an equal record."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, allow_extra: bool = False) -> Self:
        """Make and check a record.

        Args:
            data: field name -> value.
            allow_extra: ignore keys that are no field instead of refusing them.

        Raises:
            RecordError: a missing or unknown key, or a value that breaks the format.
        """
        if not isinstance(data, Mapping):
            raise RecordError(
                f"a {_kind(data)} instead of an object", f"write {_example(cls)}"
            )
        fields = dataclasses.fields(cls)
        required = [f.name for f in fields if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in data]:
            raise RecordError(
                f"missing {quoted(missing)}", f"the keys here are {quoted(data)}"
            )
        known = {field.name for field in fields}
        extra = [key for key in data if key not in known]
        if extra and not allow_extra:
            raise RecordError(
                f"unknown {quoted(extra)}",
                f"{cls.__name__} has {quoted(sorted(known))}; "
                "remove the key or allow extra keys",
            )
        return cls(**{key: data[key] for key in data if key in known})

    def _check_prompts(self) -> None:
        _store(self, "prompt", _checked_prompt("prompt", self.prompt))
        if self.teacher_prompt is not None:
            checked = _checked_prompt("teacher_prompt", self.teacher_prompt)
            _store(self, "teacher_prompt", checked)


@dataclasses.dataclass(frozen=True)
class PromptRecord(_Record):
    """A prompt to sample responses for.

    Example: ``PromptRecord([{"role": "user", "content": "Name a prime."}])``.
    """

    prompt: Prompt
    teacher_prompt: Prompt | None = None  # None: the teacher sees `prompt`

    def __post_init__(self):
        self._check_prompts()


@dataclasses.dataclass(frozen=True)
class DemonstrationRecord(_Record):
    """A prompt and a response worth imitating.

    Example: ``DemonstrationRecord("Name a prime.", "7")``.
    """

    prompt: Prompt
    response: str
    teacher_prompt: Prompt | None = None

    def __post_init__(self):
        self._check_prompts()
        _checked_text("response", self.response)


@dataclasses.dataclass(frozen=True)
class PreferenceRecord(_Record):
    """Two responses to one prompt, the preferred one first.

    Example: ``PreferenceRecord("Name a prime.", chosen="7", rejected="9")``.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    teacher_prompt: Prompt | None = None
    chosen_reward: float | None = None  # an oracle's rewards: both or neither
    rejected_reward: float | None = None
    label: float = 1.0  # probability that `chosen` is preferred; 0.5 is a tie

    def __post_init__(self):
        self._check_prompts()
        _checked_text("chosen", self.chosen)
        _checked_text("rejected", self.rejected)
        if self.chosen == self.rejected:
            raise RecordError("chosen equals rejected", "drop the pair")
        for field in ("chosen_reward", "rejected_reward"):
            if getattr(self, field) is not None:
                _store(self, field, _checked_number(field, getattr(self, field)))
        if (self.chosen_reward is None) != (self.rejected_reward is None):
            missing = (
                "chosen_reward" if self.chosen_reward is None else "rejected_reward"
            )
            raise RecordError(f"{missing}: missing", "give both rewards or neither")
        _store(self, "label", _checked_number("label", self.label))
        if not 0.0 <= self.label <= 1.0:
            raise RecordError("label: not a probability", "give a number in [0, 1]")


Record = PromptRecord | DemonstrationRecord | PreferenceRecord


def to_prompt(record: Record) -> PromptRecord:
    """The prompts of any record, without its responses."""
    return PromptRecord(record.prompt, record.teacher_prompt)


def to_demonstration(record: PreferenceRecord) -> DemonstrationRecord:
    """The preferred response of a pair as a demonstration."""
    return DemonstrationRecord(record.prompt, record.chosen, record.teacher_prompt)


def _checked_prompt(field: str, value: Any) -> Prompt:
    if isinstance(value, str):
        return _checked_text(field, value)
    if not isinstance(value, list | tuple):
        raise RecordError(
            f"{field}: a {_kind(value)}", "give text or a list of chat messages"
        )
    if not value:
        raise RecordError(f"{field}: empty", "give at least one message")
    messages = [_checked_message(field, i, message) for i, message in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise RecordError(
            f"{field}: ends with an assistant message",
            "that text belongs into the response",
        )
    _checked_text(field, messages[-1]["content"])
    return messages


def _checked_message(field: str, position: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise RecordError(
            f"{field}: a message is a {_kind(message)}",
            f'message {position} must be {{"role": ..., "content": ...}}',
        )
    if set(message) != {"role", "content"}:
        raise RecordError(
            f"{field}: a message has {quoted(message)}",
            f"message {position} must have exactly 'role' and 'content'",
        )
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(
            f"{field}: unknown role {_clipped(role)}",
            f"message {position} may have {quoted(ROLES)}",
        )
    return {
        "role": role,
        "content": _checked_text(field, message["content"], allow_empty=True),
    }


def _checked_text(field: str, value: Any, *, allow_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{field}: a {_kind(value)} instead of text", "give a string")
    if not allow_empty and not value.strip():
        raise RecordError(f"{field}: empty", "give at least one visible character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{field}: invalid Unicode",
            f"remove the lone surrogate at character {error.start}",
        ) from None
    return value


def _checked_number(field: str, value: Any) -> float:
    # bool is a Real in Python; here it is always a mistake for a score.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RecordError(f"{field}: a {_kind(value)}", "give a finite number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecordError(
            f"{field}: not finite", "give a finite number or leave it out"
        )
    return number


def _store(record: _Record, field: str, value: Any) -> None:
    object.__setattr__(record, field, value)  # frozen: the one legal moment is creation


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _clipped(value: Any, limit: int = 40) -> str:
    text = shown(value)
    return text if len(text) <= limit else text[:limit] + "..."


def quoted(names: Iterable[Any], limit: int = 8) -> str:
    """At most ``limit`` names, quoted and clipped, for one line of an error message."""
    shown = [_clipped(name) for name in names]
    more = ["..."] if len(shown) > limit else []
    return ", ".join(shown[:limit] + more) or "nothing"


def _example(cls: type[_Record]) -> str:
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
    ]
    return "{" + ", ".join(f'"{name}": ...' for name in required) + "}"
