"""What a layer attends to: its new keys and values, and those of a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from rkd_jax.types import struct

KeyValue = tuple[jax.Array, jax.Array]
Parts = tuple[jax.Array, ...]


@struct
class Slots:
    """One layer's cache into which new keys and values are written before reading.

    Written in place where the caller gives the slots up, as a decode loop does.
    """

    keys: jax.Array  # [B, Hkv, S, Dh]
    values: jax.Array  # [B, Hkv, S, Dh]
    index: jax.Array  # int32[], the next free slot

    def write(self, key: jax.Array, value: jax.Array) -> Slots:
        """The slots with [B, L, Hkv, Dh] at ``index``, which stays where it is."""
        zero = jnp.zeros_like(self.index)
        at = (zero, zero, self.index, zero)
        return Slots(
            lax.dynamic_update_slice(self.keys, jnp.swapaxes(key, 1, 2), at),
            lax.dynamic_update_slice(self.values, jnp.swapaxes(value, 1, 2), at),
            self.index,
        )


def attended(
    cached: KeyValue | Slots, key: jax.Array, value: jax.Array
) -> tuple[Parts, Parts, KeyValue | Slots]:
    """Keys and values to attend to, in parts, and what is handed back for the cache.

    Args:
        cached: keys and values [B, S, Hkv, Dh] that come before the new ones and are
            not touched; or `Slots`.
        key: the new ones, [B, L, Hkv, Dh].
        value: like ``key``.

    Returns:
        parts of keys and of values, [B, S_i, Hkv, Dh] each, for
        `rkd_jax.models.attention.grouped_attention`; and the new key and value, or the
        slots they were written into.
    """
    if isinstance(cached, Slots):
        slots = cached.write(key, value)
        keys, values = (jnp.swapaxes(x, 1, 2) for x in (slots.keys, slots.values))
        return (keys,), (values,), slots
    return (cached[0], key), (cached[1], value), (key, value)
