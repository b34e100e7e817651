"""Grouped-query attention over segments, on plain arrays."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


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

    Keys come in parts (a cache, then the new tokens) so that attending never copies
    the cache; the softmax runs over all parts together.

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
