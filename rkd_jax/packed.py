"""Rows of several records, pairs of which share a row, and sums over their responses.

``7 8 -> 5 2`` and ``9 -> 2`` in one row of L = 7 columns::

    Sequences(
        tokens=[[7, 8, 5, 2, 9, 2, 0]],
        token_mask=[[True, True, True, True, True, True, False]],
        response_mask=[[False, True, True, False, True, False]],
        segment_ids=[[1, 1, 1, 1, 2, 2, 0]],
    )

Segment ids ascend from 1 along a row, the columns of a segment lie side by side, and
padding, anywhere between them, has id 0. The first column of a segment is never a
target: the state before it belongs to another record. `rkd_jax.data.packing` makes such
rows.

Token-level losses read packed rows as they are; a loss per response asks here for its
sums and then does not know whether the pairs were packed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rkd_jax.masking import last_target, segment_sum, sequence_sum
from rkd_jax.types import PreferenceBatch, Sequences, struct


@struct
class PackedPreferenceBatch:
    """Preference pairs, several to a row, both members of a pair in the same row.

    Member n of pair m of a row is its segment ``2 m + n + 1``, so that rows may be cut
    into micro-batches anywhere. Rows are padded with pairs that have no tokens.

    Example, one row for M = 2 pairs that holds record 3 only: ``PackedPreferenceBatch(
    sequences, teacher_sequences, label=[[1.0, 1.0]], rewards=[[[0.8, -0.1], [nan,
    nan]]], index=[[3, -1]])``.
    """

    sequences: Sequences  # [B, 1 + T], packed
    teacher_sequences: Sequences  # [B, 1 + T], packed, targets in the same columns
    label: jax.Array  # float32[B, M] in [0, 1]; 1 where no pair is
    rewards: jax.Array  # float32[B, M, 2]; NaN where the record carries none
    index: jax.Array  # int32[B, M]; -1 where no pair is


Pairs = PreferenceBatch | PackedPreferenceBatch
"""Preference pairs in either layout."""


def target_segments(sequences: Sequences) -> jax.Array | None:
    """int32[*batch, T], the segment ids of the targets; None of rows not packed."""
    if sequences.segment_ids is None:
        return None
    return sequences.segment_ids[..., sequences.prompt_width :]


def pair_sums(values: jax.Array, pairs: Pairs) -> jax.Array:
    """Sum over the targets of each response of a pair, whether pairs are packed or not.

    Args:
        values: float, aligned with ``pairs.sequences.response_mask``, whose masked
            entries may hold anything.
        pairs: says where the responses are.

    Returns:
        float32[B, 2]; float32[B, M, 2] of packed pairs.

    Gradient:
        Flows to targets only; exactly 0 elsewhere.

    Raises:
        AssertionError: shapes differ.
    """
    sequences = pairs.sequences
    if not isinstance(pairs, PackedPreferenceBatch):
        return sequence_sum(values, sequences.response_mask)
    sums = segment_sum(
        values,
        sequences.response_mask,
        target_segments(sequences),
        segments=2 * pairs.label.shape[-1],
    )
    return sums.reshape(*pairs.label.shape, 2)


def pair_means(values: jax.Array, pairs: Pairs) -> jax.Array:
    """Mean over the targets of each response of a pair; 0 of an empty one.

    Args, gradient and errors as `pair_sums`.

    Returns:
        float32[B, 2]; float32[B, M, 2] of packed pairs.
    """
    sums = pair_sums(values, pairs)
    counts = pair_sums(jnp.ones(values.shape, sums.dtype), pairs)
    return sums / jnp.maximum(counts, 1.0)


def last_targets(sequences: Sequences) -> jax.Array:
    """bool[*batch, T]: the last target of each response, packed or not."""
    return last_target(sequences.response_mask, target_segments(sequences))


def refuse_packed(sequences: Sequences, reader: str) -> None:
    """Raise ValueError, naming ``reader``, which takes a row for one response."""
    if sequences.segment_ids is not None:
        raise ValueError(
            f"{reader}: these rows are packed, and a row is taken for one response "
            "here; use batches with a record per row (make_batches)"
        )
