"""``tokenizer_config.json``, beside a ``tokenizer.json`` of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkd_jax.untrusted import read_object, refused, shown

NAME = "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "pad_token")


def read(folder: Path) -> dict[str, Any]:
    """The content of the file, empty if there is none; ValueError if it is broken."""
    path = folder / NAME
    return read_object(path) if path.is_file() else {}


def named_tokens(config: Mapping[str, Any]) -> dict[str, str | None]:
    """The texts of the tokens with a role; ValueError if one is no text."""
    found: dict[str, str | None] = {}
    for role in _ROLES:
        value = config.get(role)
        text = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(text, str) and value is not None:
            raise ValueError(f"{role}={shown(value)}: expected the text of a token")
        found[role] = text or None
    return found


def template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a model folder with this configuration, or None.

    Raises:
        ValueError: it is no text; names the file.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        with refused(str(path)):
            return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = _default(found)
    if isinstance(found, str | None):
        return found
    raise ValueError(
        f"{folder / NAME}: chat_template={shown(found)}: expected text, "
        'or a list of {"name": ..., "template": ...}'
    )


def _default(entries: list[Any]) -> Any:
    """The template named so, None without it; ``entries`` itself if it is no list."""
    if not all(
        isinstance(entry, Mapping) and {"name", "template"} <= set(entry)
        for entry in entries
    ):
        return entries
    named = [entry["template"] for entry in entries if entry["name"] == "default"]
    return named[-1] if named else None
