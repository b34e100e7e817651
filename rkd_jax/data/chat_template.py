"""Chat templates: messages to text, in the Jinja dialect of Hugging Face.

>>> template = compile_template(CHATML)
>>> render(template, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
'<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rkd_jax.data.records import RecordError
from rkd_jax.untrusted import one_line, shown

Message = Mapping[str, Any]  # {"role": "user", "content": "Hello"}

ROLES = ("system", "user", "assistant", "tool")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a default system turn: only what the messages say is rendered."""


def named_template(name: str) -> str:
    """The template that an option names: ``chatml``, or a file with a Jinja template.

    Raises:
        ValueError: the file is not UTF-8.
        OSError: it cannot be read.
    """
    if name == "chatml":
        return CHATML
    try:
        return Path(name).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: a template is UTF-8: {error}") from error


_PRIVATE = "\ue000"  # of the private use area: has no meaning in any text
_MOST_REPEATED = 1 << 20  # characters or items
_LARGEST = {"*": 1 << 53, "**": 64}  # of what is multiplied, or raised
_PADDING = frozenset(("center", "expandtabs", "ljust", "rjust", "zfill"))  # of str
_WIDE = re.compile(r"%[^%a-zA-Z]*(\d{7}|\*)")  # in a format


class _Refusal(jinja2.TemplateError):
    """What a template says by ``raise_exception``: it is not for these messages."""


class _Environment(ImmutableSandboxedEnvironment):
    """A template comes with a download: it may neither look around nor fill memory.

    Not at one stroke: a loop may still make a long text of a short one, as any that
    writes down a long chat does.
    """

    # Being intercepted, they are not computed while the template is compiled either.
    intercepted_binops = frozenset(("*", "**", "%"))

    def is_safe_attribute(self, obj, attr, value):
        pads = isinstance(obj, str) and attr in _PADDING
        return not pads and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context, operator, left, right):
        if operator == "%":
            if isinstance(left, str) and _WIDE.search(left):
                raise jinja2.TemplateRuntimeError("a format that pads too far")
            return super().call_binop(context, operator, left, right)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if numbers and max(abs(left), abs(right)) > _LARGEST[operator]:
            raise jinja2.TemplateRuntimeError(f"too large for {operator}")
        if operator == "*" and not numbers:
            for items, times in ((left, right), (right, left)):
                if isinstance(times, int) and len(items) * times > _MOST_REPEATED:
                    raise jinja2.TemplateRuntimeError("text repeated too often")
        return super().call_binop(context, operator, left, right)


def compile_template(source: str) -> jinja2.Template:
    """The template, ready to render; it runs sandboxed and cannot change its inputs.

    Raises:
        ValueError: a syntax error, with its line, or what else is no template.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    for name in ("center", "format", "indent"):  # pad as far as they are told to
        environment.filters[name] = _bounded(environment.filters[name])
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"chat template, line {error.lineno}: {one_line(error.message)}"
        ) from error
    except Exception as error:  # of Python's compiler: nested too deeply, no text
        raise ValueError(
            f"the chat template does not compile: {one_line(error)}"
        ) from error


def render(
    template: jinja2.Template, messages: Sequence[Message], **variables: Any
) -> str:
    """The text of ``messages``.

    Raises:
        RecordError: the template says that it is not for such messages.
        ValueError: no message, unknown role, content that is not text, or the template
            fails.
    """
    _check(messages)
    try:
        return template.render(messages=messages, **variables)
    except _Refusal as error:
        raise RecordError(
            f"the chat template refuses the messages: {one_line(error)}",
            "write them otherwise or take another template",
        ) from error
    except Exception as error:  # a template is a program, and fails as programs do
        raise ValueError(
            f"the chat template fails on the messages: {one_line(error)}"
        ) from error


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """``value`` with ``function`` applied to every string in it, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {
            map_strings(k, function): map_strings(v, function) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [map_strings(item, function) for item in value]
    return value


def unused_mark(value: Any) -> str:
    """A string that occurs in no string of ``value``."""
    longest = 0

    def measure(text: str) -> str:
        nonlocal longest
        longest = max([longest, *map(len, re.findall(f"{_PRIVATE}+", text))])
        return text

    map_strings(value, measure)
    return _PRIVATE * (longest + 1)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError("a chat needs at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is a {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number}: role {shown(role)}; roles are {ROLES}")
        calls_tool = role == "assistant" and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not calls_tool:
            kind = type(message.get("content")).__name__
            raise ValueError(f"message {number} ({role}): content is {kind}, not text")


def _bounded(function: Callable[..., str]) -> Callable[..., str]:
    """A filter that pads no further than `_MOST_REPEATED`."""

    def call(text: Any, *options: Any, **named: Any) -> str:
        numbers = [n for n in (*options, *named.values()) if isinstance(n, int)]
        wide = function is do_format and _WIDE.search(str(text))
        if wide or max(numbers, default=0) > _MOST_REPEATED:
            raise jinja2.TemplateRuntimeError("a filter that pads too far")
        return function(text, *options, **named)

    return call


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise _Refusal(message)
