"""A decoder prepared for decoding on a CPU or GPU: weights and caches of layers apart.

A scan over stacked layers hands each one a slice of the weights and of the cache, and
there a slice is a copy: every step of decoding would copy the trunk, and the whole
cache, on a CPU transposed. Here the weights are cut once, before the loop. Keys are
written into their slot in place and then read where they are, in the order of axes in
which the products read. Rotary angles come from a table: without the boundary of a scan
they would be fused into, and computed again by, every head of every layer.

The price is memory, a second trunk while the loop runs, and compiling in proportion to
the layers. Platforms whose products read a slice in place, TPUs, need not pay it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rkd_jax.masking import accumulator
from rkd_jax.models.attention import attention_bias
from rkd_jax.models.blocks import Block, Embed, RMSNorm
from rkd_jax.models.config import DecoderConfig
from rkd_jax.models.rope import rope_frequencies, rope_table
from rkd_jax.models.slots import Slots, add_slots
from rkd_jax.types import Params, struct

_FEW_ROWS = 64


@struct
class LayerCaches:
    """`rkd_jax.models.decoder.KVCache` with an array per layer, heads before slots."""

    keys: tuple[jax.Array, ...]  # compute dtype [B, Hkv, Dh, S] of each layer
    values: tuple[jax.Array, ...]  # compute dtype [B, Hkv, S, Dh] of each layer
    segment_ids: jax.Array  # int32[B, S]; 0 on empty slots and on padding
    index: jax.Array  # int32[], the next free slot


@dataclasses.dataclass(frozen=True)
class UnrolledDecoder:
    """The part of `rkd_jax.models.api.CausalLM` that a decode loop calls.

    Parameters are from `unrolled_params`. Equal to the decoder's own steps up to
    rounding.
    """

    decoder: Any  # rkd_jax.models.decoder.Decoder, which makes these

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: LayerCaches,
    ) -> tuple[jax.Array, LayerCaches]:
        """As `Decoder.hidden` with a cache; nothing is optional here.

        Positions lie below the number of slots, as they do where they count tokens.
        """
        config, start = self.config, cache.index
        zero = jnp.zeros_like(start)
        tokens = jnp.where(segment_ids == 0, 0, tokens)
        segments = lax.dynamic_update_slice(
            cache.segment_ids, segment_ids, (zero, start)
        )
        columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        bias = attention_bias(
            segment_ids,
            segments,
            start + columns,
            jnp.arange(segments.shape[1], dtype=jnp.int32),
            window=config.sliding_window,
            dtype=config.accumulator,
        )
        cos, sin = (
            jnp.expand_dims(jnp.take(table, positions, axis=0), 2)
            for table in params["rotations"]
        )
        shared = self.decoder._shared(positions, segment_ids, None)
        shared = shared._replace(cos=cos, sin=sin, bias=bias)
        hidden = Embed(config).apply({"params": params["embed"]}, tokens)
        written = []
        for layer, keys, values in zip(
            params["layers"], cache.keys, cache.values, strict=True
        ):
            slots = Slots(keys, values, start)
            hidden, slots = Block(config).apply(
                {"params": layer}, hidden, slots, shared
            )
            written.append(slots)
        hidden = RMSNorm(config).apply({"params": params["final_norm"]}, hidden)
        return hidden, LayerCaches(
            keys=tuple(slots.keys for slots in written),
            values=tuple(slots.values for slots in written),
            segment_ids=segments,
            index=start + tokens.shape[1],
        )

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """As `Decoder.unembed`, for states [R, D]."""
        table = params["embed"]["embedding"]
        few = 1 < hidden.shape[0] <= _FEW_ROWS
        wide = table.dtype == hidden.dtype == accumulator(hidden)
        if not (self.config.tie_embeddings and few and wide):
            return self.decoder.unembed(params, hidden)
        # Every row of the table with all states, then the transpose. Without the
        # barrier XLA swaps the two, into a product that for few states takes half as
        # long again.
        logits = lax.dot_general(table, hidden, (((1,), (1,)), ((), ())))
        return self.decoder.cap(lax.optimization_barrier(logits).T)

    def init_cache(self, params: Params, batch_size: int, length: int) -> LayerCaches:
        """As `Decoder.init_cache`."""
        return unrolled_caches(self.decoder.init_cache(params, batch_size, length))

    def grow_cache(self, cache: LayerCaches, length: int) -> LayerCaches:
        """As `Decoder.grow_cache`."""
        more = length - cache.segment_ids.shape[1]
        return LayerCaches(
            keys=tuple(add_slots(keys, 3, more) for keys in cache.keys),
            values=tuple(add_slots(values, 2, more) for values in cache.values),
            segment_ids=add_slots(cache.segment_ids, 1, more),
            index=cache.index,
        )


def unrolled_params(config: DecoderConfig, params: Params, slots: int) -> Params:
    """A decoder's parameters with a tuple of layers in place of the stack.

    Beside them stand the cosines and sines [slots, Dh / 2] of all positions there are.
    """
    frequencies = rope_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling
    )
    positions = jnp.expand_dims(jnp.arange(slots, dtype=jnp.int32), 0)
    tables = rope_table(positions, frequencies, config.accumulator)
    return {
        **params,
        "layers": _unstacked(params["layers"]),
        "rotations": tuple(table[0, :, 0] for table in tables),
    }


def unrolled_caches(cache: Any) -> LayerCaches:
    """A decoder's cache with an array per layer."""
    keys = tuple(layer.transpose(0, 2, 3, 1) for layer in _unstacked(cache.keys))
    values = tuple(layer.transpose(0, 2, 1, 3) for layer in _unstacked(cache.values))
    return LayerCaches(keys, values, cache.segment_ids, cache.index)


def _unstacked(tree: Any) -> tuple[Any, ...]:
    count = jax.tree.leaves(tree)[0].shape[0]
    return tuple(
        jax.tree.map(lambda x, i=i: lax.index_in_dim(x, i, keepdims=False), tree)
        for i in range(count)
    )
