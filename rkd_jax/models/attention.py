"""Grouped-query attention over segments, on plain arrays."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_BLOCKS = 4
"""Of queries: four need the scores of 5 / 8 of all pairs, more hardly fewer."""
_COLUMNS = 64
"""Of a block at least: thinner products are slow ones."""


def attention_bias(
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_slots: jax.Array,
    key_slots: jax.Array,
    *,
    window: int | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """0 where a query sees a key, a huge negative number elsewhere.

    Args:
        query_segments: int32[B, Q], 0 on padding.
        key_segments: int32[B, S], 0 on padding and on empty slots.
        query_slots: int32[Q], column of each query.
        key_slots: int32[S], column of each key.
        window: keys visible to a query, itself included; None for all.
        dtype: of the result.

    Returns:
        dtype[B, 1, 1, Q, S], finite. Padding is a segment of its own: its queries see
        padding, so no row of scores is ever empty.
    """
    distance = query_slots[:, None] - key_slots[None, :]
    near = distance >= 0
    if window is not None:
        near &= distance < window
    same = query_segments[:, :, None] == key_segments[:, None, :]
    # Half the range, so that adding a score never overflows to -inf.
    hidden = jnp.asarray(jnp.finfo(dtype).min / 2, dtype)
    bias = jnp.where(same & near[None], jnp.zeros((), dtype), hidden)
    return bias[:, None, None]


def grouped_attention(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    bias: jax.Array,
) -> jax.Array:
    """Softmax attention; each key head serves a group of query heads, unrepeated.

    For new tokens with a cache before them; a whole row is `causal_attention`. Keys
    come in parts (a cache, then the new tokens) so that attending never copies the
    cache; the softmax runs over all parts together.

    Args:
        query: [B, Q, H, head_dim].
        keys: parts [B, S_i, H_kv, head_dim]; H_kv divides H.
        values: parts like ``keys``.
        bias: float[B, 1, 1, Q, sum of S_i], added to the scores; its dtype is the
            dtype of scores and softmax.

    Returns:
        [B, Q, H, head_dim] in the dtype of ``query``. Query head h reads key head
        ``h // (H // H_kv)``.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = keys[0].shape[2]
    grouped = (query * head_dim**-0.5).reshape(
        batch, length, kv_heads, heads // kv_heads, head_dim
    )
    scores = [
        jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=bias.dtype)
        for key in keys
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1) + bias, axis=-1)
    weights = weights.astype(query.dtype)
    # Summed in the dot's own axis order: any other makes XLA transpose the cache.
    out, start = 0.0, 0
    for value in values:
        part = weights[..., start : start + value.shape[1]]
        out += jnp.einsum("bkgqs,bskd->bkgqd", part, value)
        start += value.shape[1]
    return jnp.moveaxis(out, 3, 1).reshape(query.shape)


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array
) -> jax.Array:
    """`grouped_attention` of a row to itself, without the scores of later columns.

    A block of queries is scored against the columns up to its last one.

    Args:
        query: [B, L, H, head_dim].
        key: [B, L, H_kv, head_dim]; H_kv divides H.
        value: as ``key``.
        bias: float[B, 1, 1, L, L], added to the scores; its dtype is the dtype of
            scores and softmax. What it says of columns after a query's own block is
            not read: it has to hide them.

    Returns:
        [B, L, H, head_dim] in the dtype of ``query``. Query head h reads key head
        ``h // (H // H_kv)``.
    """
    batch, length, heads, head_dim = query.shape
    groups, shared = key.shape[2], heads // key.shape[2]
    scaled = (query * head_dim**-0.5).reshape(batch, length, groups, shared, head_dim)
    scaled = scaled.transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    blocks = min(_BLOCKS, -(-length // _COLUMNS))
    size, mixed = -(-length // blocks), []
    for start in range(0, length, size):
        stop = min(start + size, length)
        rows = (batch, groups, shared, stop - start)
        flat = (batch, groups, shared * (stop - start))
        scores = jnp.matmul(
            scaled[..., start:stop, :].reshape(*flat, head_dim),
            key[..., :stop],
            preferred_element_type=bias.dtype,
        )
        scores = scores.reshape(*rows, stop) + bias[..., start:stop, :stop]
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        out = jnp.matmul(weights.reshape(*flat, stop), value[..., :stop, :])
        mixed.append(out.reshape(*rows, head_dim))
    out = jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(query.shape)
