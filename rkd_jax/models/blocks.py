"""The flax.linen modules of the decoder: one block, scanned over stacked parameters."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax.models.attention import (
    causal_attention,
    grouped_attention,
    slot_attention,
)
from rkd_jax.models.attention_kernels import (
    HOLD_SCORES,
    KERNELS,
    choose,
    kept_of_kernels,
)
from rkd_jax.models.config import DecoderConfig
from rkd_jax.models.linear import Dense
from rkd_jax.models.rope import rotate
from rkd_jax.models.slots import KeyValue, Slots
from rkd_jax.sharding import constrain

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
ROWS = ("batch", None, None)  # of states: rows apart, whole in their width
_NORMAL = nn.initializers.normal(0.02)
_KEPT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        kept_of_kernels,
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a block that is computed again keeps, by name."""


class Shared(NamedTuple):
    """What every block reads."""

    cos: jax.Array  # [B, L, 1, Dh // 2]
    sin: jax.Array  # [B, L, 1, Dh // 2]
    bias: jax.Array | None  # [B, 1, 1, L, S]: S cached slots, then the new columns
    segment_ids: jax.Array | None  # int32[B, L], in place of the bias for a kernel


class RMSNorm(nn.Module):
    """``x / rms(x) * (scale + norm_offset)`` over the last axis, in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.config.accumulator
        init = nn.initializers.constant(1.0 - config.norm_offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(config.param_dtype))
        scale = scale.astype(dtype) + config.norm_offset
        wide = x.astype(dtype)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(power + config.norm_eps)
        return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class Attention(nn.Module):
    """Rotary grouped-query attention; returns the new keys and values if cached."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cached: KeyValue | Slots | None, shared: Shared
    ) -> tuple[jax.Array, KeyValue | Slots | None]:
        config = self.config

        def heads(name: str, count: int) -> jax.Array:
            shape = (count, config.head_dim)
            return Dense(
                shape,
                use_bias=config.attention_bias,
                param_dtype=config.param_dtype,
                name=name,
            )(x)

        query = heads("query", config.num_heads)
        key = heads("key", config.num_kv_heads)
        value = heads("value", config.num_kv_heads)
        if config.qk_norm:
            query = RMSNorm(config, name="query_norm")(query)
            key = RMSNorm(config, name="key_norm")(key)
        query = rotate(query, shared.cos, shared.sin)
        key = rotate(key, shared.cos, shared.sin)
        mixed, new = _attend(config, query, key, value, cached, shared)
        out = Dense(
            (config.hidden_size,),
            contracted=2,
            init_scale=_residual_scale(config),
            param_dtype=config.param_dtype,
            name="output",
        )(mixed)
        return out, new


def _attend(
    config: DecoderConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cached: KeyValue | Slots | None,
    shared: Shared,
) -> tuple[jax.Array, KeyValue | Slots | None]:
    """By a kernel where segments are all there is to know, else by the bias."""
    name = choose(config, query.shape[1], has_cache=cached is not None)
    if name in KERNELS:
        attend = functools.partial(KERNELS[name], window=config.sliding_window)
        seen = shared.segment_ids
    elif cached is None:
        attend, seen = causal_attention, shared.bias
    elif isinstance(cached, Slots):
        slots = cached.write(key, value)
        return slot_attention(query, slots.keys, slots.values, shared.bias), slots
    else:
        keys, values = zip(cached, (key, value), strict=True)
        return grouped_attention(query, keys, values, shared.bias), (key, value)
    if config.remat == "attention" and name in HOLD_SCORES:
        attend = jax.checkpoint(attend, prevent_cse=False)
    return attend(query, key, value, seen), None


class MLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        wide = (config.intermediate_size,)
        gate = Dense(wide, param_dtype=config.param_dtype, name="gate")(x)
        up = Dense(wide, param_dtype=config.param_dtype, name="up")(x)
        # Recomputed in the backward pass: cheap, and its intermediates are as wide as
        # the MLP.
        activation = jax.checkpoint(_ACTIVATIONS[config.activation], prevent_cse=False)
        return Dense(
            (config.hidden_size,),
            init_scale=_residual_scale(config),
            param_dtype=config.param_dtype,
            name="down",
        )(activation(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden: jax.Array, cached: KeyValue | Slots | None, shared: Shared
    ) -> tuple[jax.Array, KeyValue | Slots | None]:
        hidden = constrain(hidden, ROWS)
        normed = RMSNorm(self.config, name="attention_norm")(hidden)
        update, new = Attention(self.config, name="attention")(normed, cached, shared)
        hidden = constrain(hidden + update, ROWS)
        normed = RMSNorm(self.config, name="mlp_norm")(hidden)
        return constrain(hidden + MLP(self.config, name="mlp")(normed), ROWS), new


class Embed(nn.Module):
    """Rows of the embedding table, scaled, in the compute dtype."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        table = self.param("embedding", _NORMAL, shape, jnp.dtype(config.param_dtype))
        # An id outside the vocabulary gives NaN rather than a neighbour's embedding.
        rows = jnp.take(table, tokens, axis=0, mode="fill").astype(config.dtype)
        return rows if config.embed_scale == 1.0 else rows * config.embed_scale


class Head(nn.Module):
    """The untied vocabulary head; only its parameter is declared here."""

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.config.hidden_size, self.config.vocab_size)
        return self.param("kernel", _NORMAL, shape, jnp.dtype(self.config.param_dtype))


class Trunk(nn.Module):
    """Tokens to final-normed states ``[B, L, D]``; keys and values if cached."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, cached: KeyValue | None, shared: Shared
    ) -> tuple[jax.Array, KeyValue | None]:
        config = self.config
        block = Block
        if config.remat in _KEPT:
            # Inside a scan nothing can be merged across the barrier remat would add.
            policy = _KEPT[config.remat]
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
        )(config, name="layers")
        hidden, new = layers(Embed(config, name="embed")(tokens), cached, shared)
        if not config.tie_embeddings:
            Head(config, name="head")()
        return RMSNorm(config, name="final_norm")(hidden), new


def _residual_scale(config: DecoderConfig) -> float:
    # 2 * num_layers branches add up in one stream: their sum keeps variance 1.
    return 1.0 / (2 * config.num_layers)
