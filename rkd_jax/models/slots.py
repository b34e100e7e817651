"""Keys and values of one layer: new ones, and those that it keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from rkd_jax.types import struct

KeyValue = tuple[jax.Array, jax.Array]


@struct
class Slots:
    """One layer's cache into which new keys and values are written before reading.

    Written in place where the caller gives the slots up, as a decode loop does.
    """

    keys: jax.Array  # [B, Hkv, Dh, S], as the scores read them
    values: jax.Array  # [B, Hkv, S, Dh]
    index: jax.Array  # int32[], the next free slot

    def write(self, key: jax.Array, value: jax.Array) -> Slots:
        """The slots with [B, L, Hkv, Dh] at ``index``, which stays where it is."""
        zero = jnp.zeros_like(self.index)
        last, before = (zero, zero, zero, self.index), (zero, zero, self.index, zero)
        return Slots(
            lax.dynamic_update_slice(self.keys, key.transpose(0, 2, 3, 1), last),
            lax.dynamic_update_slice(self.values, value.transpose(0, 2, 1, 3), before),
            self.index,
        )


def add_slots(cached: jax.Array, axis: int, count: int) -> jax.Array:
    """``cached`` with ``count`` zeros behind what it has along its axis of slots."""
    ends = [(0, 0)] * cached.ndim
    ends[axis] = (0, count)
    return jnp.pad(cached, ends)
