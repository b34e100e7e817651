"""Look at a batch before training on it: what is shown, what is trained, where it ends.

Both functions are cheap and meant for the first batch of every run. A packed batch is
looked at record by record: row i is its i-th record.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import jax
import numpy as np

from rkd_jax.data.packing import PackedBatch, unpacked
from rkd_jax.types import (
    DemonstrationBatch,
    PreferenceBatch,
    PromptBatch,
    Prompts,
    Sequences,
)

if TYPE_CHECKING:
    from rkd_jax.data.collate import Batch
    from rkd_jax.data.tokenizer import Tokenizer


def describe_batch(
    tokenizer: Tokenizer, batch: Batch | PackedBatch, row: int = 0
) -> str:
    """One decoded row of a batch; the tokens that are trained on stand in ⟦brackets⟧.

    Padding is left out, control tokens are shown. The brackets come from the response
    mask, so a wrong mask is visible.

    Example, a demonstration seen by the student::

        record 17, student: 3 prompt tokens of 8, 4 targets of 8
        <|im_start|>hi⟦yes<|im_end|>⟧
    """
    batch = unpacked(batch)
    index = int(batch.index[row])
    lines = []
    for name, part in _parts(batch):
        part = _row(part, row)
        lines.append(f"record {index}, {name}: {_sizes(part)}")
        lines.append(_marked(tokenizer, part))
    return "\n".join(lines)


def check_end_of_turn(
    tokenizer: Tokenizer, batch: DemonstrationBatch | PreferenceBatch | PackedBatch
) -> None:
    """Assert that the student can learn to stop: EOS is a target, and only the last.

    A response that fills all T columns may have been cut and need not end in EOS; if
    that holds for every response of the batch, it is an error too. Batches made with
    ``append_eos=False`` have nothing to check.

    Raises:
        ValueError: one line that names the record and the fault.
    """
    batch = unpacked(batch)
    members = 2 if isinstance(batch, PreferenceBatch) else 1
    records = np.repeat(np.asarray(batch.index), members)
    ended = False
    for sequences in (batch.sequences, batch.teacher_sequences):
        width = sequences.response_mask.shape[-1]
        targets = np.asarray(sequences.targets).reshape(-1, width)
        mask = np.asarray(sequences.response_mask).reshape(-1, width)
        real = np.asarray(sequences.token_mask)[..., -width:].reshape(-1, width)
        for record, *row in zip(records, targets, mask, real, strict=True):
            if fault := _fault(*row, tokenizer.eos_id):
                raise ValueError(f"record {record}: {fault}")
        ended = ended or bool((mask & (targets == tokenizer.eos_id)).any())
    if not ended:
        raise ValueError(
            "no response of the batch ends in EOS, so stopping cannot be learned; "
            "raise max_response"
        )


def _fault(
    ids: np.ndarray, trained: np.ndarray, real: np.ndarray, eos: int
) -> str | None:
    """What is wrong with one response, T columns wide, if anything."""
    if (trained & ~real).any():
        return "the mask covers padding"
    width = ids.size
    ids, trained = ids[real], trained[real]
    if not ids.size:
        return "the response is empty"
    if not trained.all():
        lost = ids[~trained].tolist()
        return f"response tokens {lost[:8]} lie outside the mask"
    if eos in ids[:-1]:
        return "EOS stands inside the response; targets behind it teach to go on"
    if ids[-1] != eos and ids.size < width:
        return "the response was not cut, yet does not end in EOS"
    return None


def _parts(batch: Batch) -> list[tuple[str, Prompts | Sequences]]:
    """Named views with one leading axis."""
    if isinstance(batch, PromptBatch):
        return [("student", batch.prompts), ("teacher", batch.teacher_prompts)]
    views = [("student", batch.sequences), ("teacher", batch.teacher_sequences)]
    if isinstance(batch, DemonstrationBatch):
        return views
    return [
        (f"{role}, {member}", _row(sequences, (slice(None), n)))
        for role, sequences in views
        for n, member in enumerate(("chosen", "rejected"))
    ]


def _row(part: Prompts | Sequences, index: int | tuple) -> Prompts | Sequences:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], part)


def _sizes(part: Prompts | Sequences) -> str:
    prompts = part if isinstance(part, Prompts) else part.prompts
    text = f"{prompts.mask.sum()} prompt tokens of {prompts.mask.size}"
    if isinstance(part, Sequences):
        mask = part.response_mask
        text += f", {mask.sum()} targets of {mask.size}"
    return text


def _marked(tokenizer: Tokenizer, part: Prompts | Sequences) -> str:
    """The real tokens of one row as text, targets in brackets."""
    if isinstance(part, Prompts):
        return tokenizer.decode(part.tokens[part.mask], skip_special=False)
    trained = np.zeros_like(part.token_mask)
    trained[part.prompt_width :] = part.response_mask
    shown = part.token_mask | trained
    tokens = zip(trained[shown], part.tokens[shown], strict=True)
    text = ""
    for is_target, run in groupby(tokens, key=lambda token: bool(token[0])):
        piece = tokenizer.decode([int(id_) for _, id_ in run], skip_special=False)
        text += f"⟦{piece}⟧" if is_target else piece
    return text
