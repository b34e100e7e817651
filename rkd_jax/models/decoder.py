"""A decoder-only transformer: Llama, Mistral, SmolLM, Qwen2, Qwen3 and Gemma shapes.

One block is written once and scanned over stacked parameters, so tracing and compiling
take the same time for 2 layers and for 80. Parameters are a plain nested dict::

    {"embed": {"embedding": [V, D]},
     "layers": {                                       # every leaf stacked: [layers, ...]
         "attention_norm": {"scale": [D]},
         "attention": {"query": {"kernel": [D, H, Dh]},  "key", "value": [D, Hkv, Dh],
                       "output": {"kernel": [H, Dh, D]}},  # + biases, query/key norms
         "mlp_norm": {"scale": [D]},
         "mlp": {"gate", "up": {"kernel": [D, F]}, "down": {"kernel": [F, D]}}},
     "final_norm": {"scale": [D]},
     "head": {"kernel": [D, V]}}                       # absent when tied

Norms, rotary angles, softmax and logits are float32 whatever the compute dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from rkd_jax.models.attention import attention_bias, grouped_attention
from rkd_jax.models.rope import RopeScaling, rope_frequencies, rope_table, rotate
from rkd_jax.types import Params, struct

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of a `Decoder`; hashable, so it may be a static argument.

    Example: ``DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=128,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_length=128)``.
    """

    vocab_size: int  # V, rows of the embedding
    hidden_size: int  # D
    intermediate_size: int  # F, width of the MLP
    num_layers: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # Hkv, key and value heads; divides H
    head_dim: int  # Dh, even
    max_length: int  # context: most columns a row may have
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to stored norm scales; 1 for Gemma
    tie_embeddings: bool = True
    attention_bias: bool = False  # on query, key and value (Qwen2)
    qk_norm: bool = False  # RMS norm of each query and key head (Qwen3)
    activation: str = "silu"  # silu, gelu_tanh or gelu (exact)
    embed_scale: float = 1.0  # sqrt(D) for Gemma
    sliding_window: int | None = None  # keys a query sees, itself included
    logit_softcap: float | None = None  # c: logits become c * tanh(logits / c)
    dtype: str = "float32"  # compute
    param_dtype: str = "float32"
    remat: bool = False  # recompute each block in the backward pass

    def __post_init__(self) -> None:
        for name in (
            "vocab_size hidden_size intermediate_size num_layers num_heads "
            "num_kv_heads head_dim max_length rope_theta norm_eps embed_scale"
        ).split():
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("sliding_window", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, or None for none")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary pairs)")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is not one of {sorted(_ACTIVATIONS)}"
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {list(_DTYPES)}"
                )


@struct
class KVCache:
    """Keys and values already computed, in slots that fill from the left.

    Example, 2 layers, 1 row, 8 slots, 3 of them used: ``keys`` and ``values``
    [2, 1, 8, Hkv, Dh], ``segment_ids`` [[0, 1, 1, 0, 0, 0, 0, 0]] (slot 0 was left
    padding), ``index`` 3.
    """

    keys: jax.Array  # compute dtype [layers, B, S, Hkv, Dh]
    values: jax.Array  # compute dtype [layers, B, S, Hkv, Dh]
    segment_ids: jax.Array  # int32[B, S]; 0 on empty slots and on padding
    index: jax.Array  # int32[], the next free slot


class _Shared(NamedTuple):
    """What every block reads: rotary table and attention bias."""

    cos: jax.Array
    sin: jax.Array
    bias: jax.Array


class _RMSNorm(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, _accumulator(self.config)
        init = nn.initializers.constant(1.0 - config.norm_offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(config.param_dtype))
        scale = jnp.expand_dims(
            scale.astype(dtype) + config.norm_offset, range(x.ndim - 1)
        )
        wide = x.astype(dtype)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(power + config.norm_eps) * scale).astype(x.dtype)


class _Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cached: tuple | None, shared: _Shared
    ) -> tuple[jax.Array, tuple | None]:
        config = self.config

        def project(name: str, heads: int) -> jax.Array:
            shape = (heads, config.head_dim)
            return _dense(config, shape, name, bias=config.attention_bias)(x)

        query = project("query", config.num_heads)
        key = project("key", config.num_kv_heads)
        value = project("value", config.num_kv_heads)
        if config.qk_norm:
            query = _RMSNorm(config, name="query_norm")(query)
            key = _RMSNorm(config, name="key_norm")(key)
        query = rotate(query, shared.cos, shared.sin)
        key = rotate(key, shared.cos, shared.sin)
        keys, values = (key,), (value,)
        if cached is not None:
            keys, values = (cached[0], key), (cached[1], value)
        out = grouped_attention(query, keys, values, shared.bias)
        out = _dense(config, config.hidden_size, "output", axis=(-2, -1))(out)
        return out, None if cached is None else (key, value)


class _MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        gate = _dense(config, config.intermediate_size, "gate")(x)
        up = _dense(config, config.intermediate_size, "up")(x)
        active = _ACTIVATIONS[config.activation](gate) * up
        return _dense(config, config.hidden_size, "down")(active)


class _Block(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self, hidden: jax.Array, cached: tuple | None, shared: _Shared
    ) -> tuple[jax.Array, tuple | None]:
        normed = _RMSNorm(self.config, name="attention_norm")(hidden)
        update, new = _Attention(self.config, name="attention")(normed, cached, shared)
        hidden = hidden + update
        normed = _RMSNorm(self.config, name="mlp_norm")(hidden)
        return hidden + _MLP(self.config, name="mlp")(normed), new


class _Embed(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        table = self.param("embedding", _NORMAL, shape, jnp.dtype(config.param_dtype))
        # An id outside the vocabulary gives NaN rather than a neighbour's embedding.
        rows = jnp.take(table, tokens, axis=0, mode="fill").astype(config.dtype)
        return rows if config.embed_scale == 1.0 else rows * config.embed_scale


class _Head(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.config.hidden_size, self.config.vocab_size)
        return self.param("kernel", _NORMAL, shape, jnp.dtype(self.config.param_dtype))


class _Trunk(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, cached: tuple | None, shared: _Shared
    ) -> tuple[jax.Array, tuple | None]:
        config = self.config
        block = nn.remat(_Block, prevent_cse=False) if config.remat else _Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
        )(config, name="layers")
        hidden, new = layers(_Embed(config, name="embed")(tokens), cached, shared)
        if not config.tie_embeddings:
            _Head(config, name="head")()
        return _RMSNorm(config, name="final_norm")(hidden), new


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The library's own `rkd_jax.models.api.CausalLM`; see the module docstring.

    Two decoders of equal configuration are equal, so one may be a static argument of
    `jax.jit`. All methods are pure; gradients flow to ``params``.
    """

    config: DecoderConfig

    def init(self, rng: jax.Array) -> Params:
        """Random parameters in ``param_dtype``: normal, residual outputs scaled down.

        Args:
            rng: a key.

        Returns:
            The nested dict of the module docstring.
        """
        tokens = jnp.zeros((1, 1), jnp.int32)
        shared = self._shared(tokens, tokens, None)
        init = jax.jit(_Trunk(self.config).init)
        return init(rng, tokens, None, shared)["params"]

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Final-normed states ``[B, L, D]`` in the compute dtype.

        Args:
            params: nested dict of the module docstring.
            tokens: int32[B, L]; ids on padding are never looked at, an id outside
                the vocabulary elsewhere gives NaN states.
            positions: int32[B, L] rotary positions; None counts columns, from
                ``cache.index`` when there is a cache.
            segment_ids: int32[B, L], 0 on padding; None is one segment of ones.
            cache: the L tokens go to slots ``index .. index + L - 1``, after all that
                is in there. The caller keeps ``index + L`` within the cache: it is
                traced, and beyond the end the last slots are overwritten.

        Returns:
            states, or ``(states, cache)`` when a cache was given.

        Raises:
            ValueError: more columns than the context or the cache has.
        """
        chex.assert_rank(tokens, 2)
        self._check_length(tokens.shape[1], cache)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            start = 0 if cache is None else cache.index
            positions = jnp.broadcast_to((columns + start)[None], tokens.shape)
        chex.assert_equal_shape([tokens, positions, segment_ids])
        tokens = jnp.where(segment_ids == 0, 0, tokens)
        shared = self._shared(positions, segment_ids, cache)
        cached = None if cache is None else (cache.keys, cache.values)
        variables = {"params": params}
        hidden, new = _Trunk(self.config).apply(variables, tokens, cached, shared)
        if cache is None:
            return hidden
        return hidden, _append(cache, new, segment_ids)

    def head(self, params: Params) -> jax.Array:
        """The vocabulary head ``[D, V]`` as stored: the embedding's transpose if tied.

        In ``param_dtype``, so that a loss summing over chunks accumulates its gradient
        there; cast to the dtype of the states before multiplying.
        """
        if self.config.tie_embeddings:
            return params["embed"]["embedding"].T
        return params["head"]["kernel"]

    def head_bias(self, params: Params) -> None:
        """None: no supported family has a bias in its head."""
        del params

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits ``[..., V]`` of ``hidden [..., D]``, accumulated in float32.

        Soft-capped when the configuration says so. float64 states give float64.
        """
        head = self.head(params).astype(hidden.dtype)
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=dtype)
        cap = self.config.logit_softcap
        return logits if cap is None else jnp.tanh(logits / cap) * cap

    def logits(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """float32 logits ``[B, L, V]``: `unembed` of `hidden`, same arguments."""
        hidden = self.hidden(
            params, tokens, positions=positions, segment_ids=segment_ids
        )
        return self.unembed(params, hidden)

    def init_cache(
        self, params: Params | None, batch_size: int, length: int
    ) -> KVCache:
        """An empty cache of ``length`` slots; ``params`` is not needed and ignored.

        Raises:
            ValueError: ``length`` exceeds the context.
        """
        del params
        self._check_length(length, None)
        config = self.config
        shape = (config.num_layers, batch_size, length)
        shape += (config.num_kv_heads, config.head_dim)
        empty = jnp.zeros(shape, config.dtype)
        segment_ids = jnp.zeros((batch_size, length), jnp.int32)
        return KVCache(empty, empty, segment_ids, jnp.zeros((), jnp.int32))

    def logical_axes(self) -> Params:
        """Names of the axes of every parameter: a tuple of names per leaf of `init`.

        The names are layers, vocab, embed, heads, kv_heads, head_dim and mlp;
        `rkd_jax.sharding` maps them to mesh axes.
        """
        config = self.config
        embed, head = ("layers", "embed"), ("layers", "head_dim")
        wide = {"kernel": ("layers", "embed", "heads", "head_dim")}
        narrow = {"kernel": ("layers", "embed", "kv_heads", "head_dim")}
        if config.attention_bias:
            wide["bias"] = ("layers", "heads", "head_dim")
            narrow["bias"] = ("layers", "kv_heads", "head_dim")
        attention = {
            "query": wide,
            "key": narrow,
            "value": dict(narrow),
            "output": {"kernel": ("layers", "heads", "head_dim", "embed")},
        }
        if config.qk_norm:
            attention |= {"query_norm": {"scale": head}, "key_norm": {"scale": head}}
        axes = {
            "embed": {"embedding": ("vocab", "embed")},
            "layers": {
                "attention_norm": {"scale": embed},
                "attention": attention,
                "mlp_norm": {"scale": embed},
                "mlp": {
                    "gate": {"kernel": ("layers", "embed", "mlp")},
                    "up": {"kernel": ("layers", "embed", "mlp")},
                    "down": {"kernel": ("layers", "mlp", "embed")},
                },
            },
            "final_norm": {"scale": ("embed",)},
        }
        if not config.tie_embeddings:
            axes["head"] = {"kernel": ("embed", "vocab")}
        return axes

    def _shared(
        self, positions: jax.Array, segment_ids: jax.Array, cache: KVCache | None
    ) -> _Shared:
        config, dtype = self.config, _accumulator(self.config)
        frequencies = rope_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling
        )
        cos, sin = rope_table(positions, frequencies, dtype)
        slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
        key_slots, key_segments = slots, segment_ids
        if cache is not None:
            slots = slots + cache.index
            old = jnp.arange(cache.segment_ids.shape[1], dtype=jnp.int32)
            used = jnp.where((old < cache.index)[None], cache.segment_ids, 0)
            key_slots = jnp.concatenate([old, slots])
            key_segments = jnp.concatenate([used, segment_ids], axis=1)
        bias = attention_bias(
            segment_ids,
            key_segments,
            slots,
            key_slots,
            window=config.sliding_window,
            dtype=dtype,
        )
        return _Shared(cos, sin, bias)

    def _check_length(self, length: int, cache: KVCache | None) -> None:
        limit, what = self.config.max_length, "the context (max_length)"
        if cache is not None:
            limit, what = cache.segment_ids.shape[1], "the cache"
        if length > limit:
            raise ValueError(
                f"{length} token columns exceed {what} of {limit}; "
                f"shorten the rows or enlarge it"
            )


_NORMAL = nn.initializers.normal(0.02)


def _dense(
    config: DecoderConfig,
    features: int | tuple[int, ...],
    name: str,
    *,
    axis: int | tuple[int, ...] = -1,
    bias: bool = False,
) -> nn.DenseGeneral:
    # Both branches of every block add to one stream: their sum keeps variance 1.
    residual = name in ("output", "down")
    scale = 1.0 / (2 * config.num_layers) if residual else 1.0
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nn.initializers.variance_scaling(scale, "fan_in", "normal"),
        name=name,
    )


def _append(cache: KVCache, new: tuple, segment_ids: jax.Array) -> KVCache:
    """Write the new keys, values and segment ids at the next free slots."""
    start = cache.index
    zero = jnp.zeros_like(start)
    at = (zero, zero, start, zero, zero)
    return KVCache(
        keys=jax.lax.dynamic_update_slice(cache.keys, new[0], at),
        values=jax.lax.dynamic_update_slice(cache.values, new[1], at),
        segment_ids=jax.lax.dynamic_update_slice(
            cache.segment_ids, segment_ids, (zero, start)
        ),
        index=start + segment_ids.shape[1],
    )


def _accumulator(config: DecoderConfig) -> jnp.dtype:
    """The dtype of norms, angles and softmax."""
    return jnp.promote_types(jnp.dtype(config.dtype), jnp.float32)
