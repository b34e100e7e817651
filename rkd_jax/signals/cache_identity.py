"""Names of what a cache depends on: sixteen hexadecimal digits of a SHA-256 each.

>>> name_of({"a": 1, "b": 2}) == name_of({"b": 2, "a": 1})
True
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rkd_jax.data.records import Record
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.models.api import CausalLM
from rkd_jax.types import Params

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer

_DIGITS = 16
# Of a row's settings: what decides about padding alone, or (the last) only about how
# much of a response there is, which every record can tell.
_NO_MATTER = (
    "prompt_buckets",
    "response_buckets",
    "teacher_prompt_buckets",
    "max_response",
)


def model_hash(model: CausalLM, params: Params) -> str:
    """The name of a model: its configuration and every bit of its parameters.

    Args:
        model: its ``config`` is a dataclass.
        params: copied to the host one array at a time.
    """
    digest = hashlib.sha256(_text(dataclasses.asdict(model.config)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(
            _text([jax.tree_util.keystr(path), str(array.dtype), array.shape])
        )
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:_DIGITS]


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """The name of a vocabulary: which id is which token."""
    return tokenizer.fingerprint()[:_DIGITS]


def row_settings(rows: TokenizeConfig) -> dict[str, Any]:
    """What decides which ids a record becomes, besides tokenizer and template."""
    settings = dataclasses.asdict(rows)
    if settings["max_teacher_prompt"] is None:
        settings["max_teacher_prompt"] = rows.max_prompt
    return {name: value for name, value in settings.items() if name not in _NO_MATTER}


def rows_hash(tokenizer: Tokenizer, rows: TokenizeConfig) -> str:
    """The name of how text becomes ids: rules of the tokenizer, template, row layout.

    Buckets and ``max_response`` have no part in it.
    """
    return name_of(row_settings(rows) | {"encoding": tokenizer.encoding_fingerprint()})


def data_hash(records: Iterable[Record]) -> str:
    """The name of a data set: every record in its place."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_text([type(record).__name__, record.to_json()]))
    return digest.hexdigest()[:_DIGITS]


def name_of(value: Any) -> str:
    """The name of anything JSON can hold."""
    return hashlib.sha256(_text(value)).hexdigest()[:_DIGITS]


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
