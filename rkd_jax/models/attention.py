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
    length, groups = query.shape[1], key.shape[2]
    scaled = _by_group(query, groups)
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    blocks = min(_BLOCKS, -(-length // _COLUMNS))
    size, mixed = -(-length // blocks), []
    for start in range(0, length, size):
        stop = min(start + size, length)
        out = _mix(
            scaled[..., start:stop, :],
            key[..., :stop],
            value[..., :stop, :],
            bias[..., start:stop, :stop],
        )
        mixed.append(out)
    return _by_head(jnp.concatenate(mixed, axis=3))


def slot_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array
) -> jax.Array:
    """`grouped_attention` to a cache that has its heads before its slots.

    Args:
        query: [B, Q, H, head_dim].
        keys: [B, H_kv, head_dim, S], the new ones among them; H_kv divides H.
        values: [B, H_kv, S, head_dim].
        bias: float[B, 1, 1, Q, S], as in `grouped_attention`.

    Returns:
        [B, Q, H, head_dim] in the dtype of ``query``.
    """
    scaled = _by_group(query, keys.shape[1])
    return _by_head(_mix(scaled, keys, values, bias))


def _by_group(query: jax.Array, groups: int) -> jax.Array:
    """[B, Q, H, head_dim] as [B, H_kv, group, Q, head_dim], scaled for the scores."""
    batch, length, heads, head_dim = query.shape
    scaled = (query * head_dim**-0.5).reshape(
        batch, length, groups, heads // groups, head_dim
    )
    return scaled.transpose(0, 2, 3, 1, 4)


def _by_head(mixed: jax.Array) -> jax.Array:
    """Back from [B, H_kv, group, Q, head_dim] to [B, Q, H, head_dim]."""
    batch, groups, shared, length, head_dim = mixed.shape
    mixed = mixed.transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, groups * shared, head_dim)


def _mix(
    scaled: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array
) -> jax.Array:
    """Values [B, H_kv, S, Dh] weighted by scores with keys [B, H_kv, Dh, S].

    The queries of a group are rows of one matrix, which is what makes this fast on a
    CPU: as axes of their own they would be products of their own, or copies.
    """
    *rows, head_dim = scaled.shape
    flat = (*rows[:2], rows[2] * rows[3])
    scores = jnp.matmul(
        scaled.reshape(*flat, head_dim), keys, preferred_element_type=bias.dtype
    )
    scores = scores.reshape(*rows, keys.shape[-1]) + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(scaled.dtype)
    out = jnp.matmul(weights.reshape(*flat, keys.shape[-1]), values)
    return out.reshape(scaled.shape)
