"""A decoder-only transformer: Llama, Mistral, SmolLM, Qwen2, Qwen3 and Gemma shapes.

One block is written once and scanned over stacked parameters, so tracing and compiling
take the same time for 2 layers and for 80; the exception is decoding on a CPU or GPU
(`rkd_jax.models.unrolled`). Parameters are a plain nested dict, in which every leaf
under "layers" has a leading axis of layers::

    {"embed": {"embedding": [V, D]},
     "layers": {"attention_norm": {"scale": [D]},
                "attention": {"query": {"kernel": [D, H, Dh]},   # + "bias": [H, Dh]
                              "key": {"kernel": [D, Hkv, Dh]},   # + "bias": [Hkv, Dh]
                              "value": {"kernel": [D, Hkv, Dh]}, # + "bias": [Hkv, Dh]
                              "output": {"kernel": [H, Dh, D]}},
                              # + "query_norm", "key_norm": {"scale": [Dh]}
                "mlp_norm": {"scale": [D]},
                "mlp": {"gate": {"kernel": [D, F]}, "up": {"kernel": [D, F]},
                        "down": {"kernel": [F, D]}}},
     "final_norm": {"scale": [D]},
     "head": {"kernel": [D, V]}}                                 # absent when tied

Norms, rotary angles, softmax and logits are float32 whatever the compute dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rkd_jax.masking import accumulator
from rkd_jax.models.attention import attention_bias
from rkd_jax.models.attention_kernels import KERNELS, choose
from rkd_jax.models.blocks import KeyValue, Shared, Trunk
from rkd_jax.models.config import DecoderConfig
from rkd_jax.models.projection import project
from rkd_jax.models.rope import RopeScaling, rope_frequencies, rope_table
from rkd_jax.models.slots import add_slots
from rkd_jax.models.unrolled import (
    LayerCaches,
    UnrolledDecoder,
    unrolled_caches,
    unrolled_params,
)
from rkd_jax.types import Params, struct

__all__ = ["Decoder", "DecoderConfig", "KVCache", "RopeScaling"]


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


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The library's own `rkd_jax.models.api.CausalLM`; see the module docstring.

    Two decoders of equal configuration are equal, so one may be a static argument of
    `jax.jit`. All methods are pure; gradients flow to ``params``, in reverse mode only
    (`rkd_jax.models.projection.project`).
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
        # One column has nothing to attend to, and a kernel may be another platform's.
        plain = Decoder(dataclasses.replace(self.config, attention="xla"))
        shared = plain._shared(tokens, tokens, None)
        return _initialise(plain.config)(rng, tokens, None, shared)["params"]

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
        hidden, new = Trunk(self.config).apply(variables, tokens, cached, shared)
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
        return self.cap(project(hidden, self.head(params), 1, accumulator(hidden)))

    def cap(self, logits: jax.Array) -> jax.Array:
        """The soft cap of the configuration, if there is one."""
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
        return KVCache(
            keys=jnp.zeros(shape, config.dtype),
            values=jnp.zeros(shape, config.dtype),
            segment_ids=jnp.zeros((batch_size, length), jnp.int32),
            index=jnp.zeros((), jnp.int32),
        )

    def grow_cache(self, cache: KVCache, length: int) -> KVCache:
        """``cache`` with empty slots behind its own, ``length`` in all."""
        more = length - cache.segment_ids.shape[1]
        return KVCache(
            keys=add_slots(cache.keys, 2, more),
            values=add_slots(cache.values, 2, more),
            segment_ids=add_slots(cache.segment_ids, 1, more),
            index=cache.index,
        )

    def unrolled(
        self, params: Params, cache: KVCache, slots: int
    ) -> tuple[UnrolledDecoder, Params, LayerCaches]:
        """The same model, parameters and cache, as decoding on a CPU or GPU wants them.

        See `rkd_jax.models.unrolled`. ``slots`` is how many the cache will ever have.
        """
        params = unrolled_params(self.config, params, slots)
        return UnrolledDecoder(self), params, unrolled_caches(cache)

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
    ) -> Shared:
        config, dtype = self.config, self.config.accumulator
        frequencies = rope_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling
        )
        cos, sin = rope_table(positions, frequencies, dtype)
        length, has_cache = segment_ids.shape[1], cache is not None
        if choose(config, length, has_cache=has_cache) in KERNELS:
            return Shared(cos, sin, None, segment_ids)
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
        return Shared(cos, sin, bias, None)

    def _check_length(self, length: int, cache: KVCache | None) -> None:
        limit, what = self.config.max_length, "the context (max_length)"
        if cache is not None:
            limit, what = cache.segment_ids.shape[1], "the cache"
        if length > limit:
            raise ValueError(
                f"{length} token columns exceed {what} of {limit}; "
                f"shorten the rows or enlarge it"
            )


@functools.cache
def _initialise(config: DecoderConfig) -> Callable:
    """Jitted once for all decoders of a configuration."""
    return jax.jit(Trunk(config).init)


def _append(cache: KVCache, new: KeyValue, segment_ids: jax.Array) -> KVCache:
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
