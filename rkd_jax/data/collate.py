"""From rows of ids to padded arrays, in the layout of `rkd_jax.types`.

Prompts are padded on the left, responses on the right, masks come from lengths. No id
is ever compared to find padding, so a tokenizer whose pad is its EOS, or that has
none, makes no difference; padding holds id 0.

>>> from rkd_jax.data.tokenize import TokenizeConfig, Tokenized
>>> config = TokenizeConfig(max_prompt=3, max_response=4)
>>> batch = collate([Tokenized(17, [7, 8], [9], ([5, 2],))], config)
>>> batch.sequences.tokens.tolist(), batch.teacher_sequences.tokens.tolist()
([[0, 7, 8, 5, 2, 0, 0]], [[0, 0, 9, 5, 2, 0, 0]])
>>> batch.sequences.response_mask.tolist()
[[True, True, False, False]]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rkd_jax.data.tokenize import TokenizeConfig, Tokenized
from rkd_jax.types import (
    DemonstrationBatch,
    PreferenceBatch,
    PromptBatch,
    Prompts,
    Sequences,
)

Batch = PromptBatch | DemonstrationBatch | PreferenceBatch


class Widths(NamedTuple):
    """Columns of a batch: P of the student, P of the teacher, T."""

    prompt: int
    teacher_prompt: int
    response: int


def batch_widths(rows: Sequence[Tokenized], config: TokenizeConfig) -> Widths:
    """The smallest buckets that hold every row."""
    return Widths(
        _bucket((len(row.prompt) for row in rows), config.prompt_widths),
        _bucket(
            (len(row.teacher_prompt) for row in rows), config.teacher_prompt_widths
        ),
        _bucket(
            (len(r) for row in rows for r in row.responses), config.response_widths
        ),
    )


def collate(
    rows: Sequence[Tokenized], config: TokenizeConfig, widths: Widths | None = None
) -> Batch:
    """Pad rows into one batch of numpy arrays; the rows' kind decides its type.

    Args:
        rows: all with the same number of responses: none gives a `PromptBatch`, one a
            `DemonstrationBatch`, two a `PreferenceBatch`. Both members of a pair, and
            all pairs of the batch, share P and T.
        config: the one the rows were tokenized with.
        widths: None takes `batch_widths` of these rows.

    Raises:
        ValueError: no rows, or rows of different kinds.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    kinds = {len(row.responses) for row in rows}
    if len(kinds) > 1:
        raise ValueError(
            "a batch mixes prompts, demonstrations or preferences; make one pipeline "
            "per kind of record and zip them"
        )
    widths = batch_widths(rows, config) if widths is None else widths
    prompts = _padded([row.prompt for row in rows], widths.prompt, side="left")
    teacher_prompts = _padded(
        [row.teacher_prompt for row in rows], widths.teacher_prompt, side="left"
    )
    index = np.array([row.index for row in rows], np.int32)
    members = [
        _padded([row.responses[n] for row in rows], widths.response, side="right")
        for n in range(kinds.pop())
    ]
    if not members:
        return PromptBatch(prompts, teacher_prompts, index)
    sequences = [_join(prompts, member) for member in members]
    teacher_sequences = [_join(teacher_prompts, member) for member in members]
    if len(members) == 1:
        return DemonstrationBatch(sequences[0], teacher_sequences[0], index)
    return PreferenceBatch(
        _stack_pair(*sequences),
        _stack_pair(*teacher_sequences),
        label=np.array([row.label for row in rows], np.float32),
        rewards=np.array([row.rewards for row in rows], np.float32),
        index=index,
    )


def _bucket(lengths: Iterable[int], buckets: Sequence[int]) -> int:
    longest = max(lengths, default=0)
    for width in buckets:
        if width >= longest:
            return width
    raise ValueError(
        f"a row of {longest} tokens exceeds {buckets[-1]}; collate with the "
        "configuration it was tokenized with"
    )


def _padded(rows: Sequence[Sequence[int]], width: int, *, side: str) -> Prompts:
    lengths = np.array([len(row) for row in rows])[:, None]
    columns = np.arange(width)[None, :]
    mask = columns >= width - lengths if side == "left" else columns < lengths
    tokens = np.zeros((len(rows), width), np.int32)
    tokens[mask] = [token for row in rows for token in row]
    return Prompts(tokens, mask)


def _join(prompts: Prompts, responses: Prompts) -> Sequences:
    return Sequences(
        tokens=np.concatenate([prompts.tokens, responses.tokens], axis=1),
        token_mask=np.concatenate([prompts.mask, responses.mask], axis=1),
        response_mask=responses.mask,
    )


def _stack_pair(chosen: Sequences, rejected: Sequences) -> Sequences:
    return Sequences(
        tokens=np.stack([chosen.tokens, rejected.tokens], axis=1),
        token_mask=np.stack([chosen.token_mask, rejected.token_mask], axis=1),
        response_mask=np.stack([chosen.response_mask, rejected.response_mask], axis=1),
    )
