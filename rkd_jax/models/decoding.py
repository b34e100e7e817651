"""What every way of decoding shares: prompts on the left, a prefill, then columns.

A `Reader` is one model reading along behind its own prompts. A decode loop carries the
readers' caches, shows each new column to all of them and chooses the next one from
their logits; how it chooses is the business of `rkd_jax.models.sampling`,
`rkd_jax.models.mixed_sampling` and `rkd_jax.models.beam`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rkd_jax.models.api import CausalLM, positions_from_mask
from rkd_jax.models.cache_rows import repeat_rows, row_axes
from rkd_jax.models.gathering import gathered
from rkd_jax.types import Params, Prompts, Sequences


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model behind its prompts, R rows; its cache is held by the decode loop."""

    model: CausalLM
    params: Params
    lengths: jax.Array  # int32[R], tokens of each row's prompt
    columns: int  # slots of the cache

    @property
    def row_axes(self) -> Any:
        """Of the cache, see `rkd_jax.models.cache_rows`."""
        return row_axes(self.model, self.params, self.columns)

    def unrolled(self, cache: Any) -> tuple[Reader, Any]:
        """The same reader and cache with layers apart, if its model can do that."""
        if not hasattr(self.model, "unrolled"):
            return self, cache
        model, params, cache = self.model.unrolled(self.params, cache)
        return dataclasses.replace(self, model=model, params=params), cache

    def read(
        self, tokens: jax.Array, mask: jax.Array, column: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Logits after one more response column.

        Args:
            tokens: int32[R], what column ``column`` holds.
            mask: bool[R], False in rows that had ended before it.
            column: int32[], counted from 0.
            cache: holds the prompt and all earlier columns.

        Returns:
            float32[R, V], meaningless where the mask is not set, and the cache that
            holds this column as well.
        """
        hidden, cache = self.model.hidden(
            self.params,
            jnp.expand_dims(tokens, 1),
            positions=jnp.expand_dims(self.lengths + column, 1),
            segment_ids=jnp.expand_dims(mask, 1).astype(jnp.int32),
            cache=cache,
        )
        return self.model.unembed(self.params, hidden[:, -1]), cache


def prefill(
    model: CausalLM,
    params: Params,
    prompts: Prompts,
    *,
    new: int,
    times: int,
    gather: bool | None = None,
) -> tuple[Reader, jax.Array, Any]:
    """Read the prompts once, and stand ``times`` rows behind each of them.

    Args:
        model: who reads.
        params: its parameters.
        prompts: [B, P] from `pad_left`.
        new: response columns to leave room for.
        times: rows of a prompt, side by side: R = B * times.
        gather: see `rkd_jax.models.gathering.gathered`; the reader has what it returns.

    Returns:
        the reader; logits float32[R, V] of the first response column; the cache.
    """
    batch, width = prompts.tokens.shape
    params = gathered(model, params, gather)
    hidden, cache = model.hidden(
        params,
        prompts.tokens,
        positions=positions_from_mask(prompts.mask),
        segment_ids=prompts.mask.astype(jnp.int32),
        cache=model.init_cache(params, batch, width + new),
    )
    lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
    logits = jnp.repeat(model.unembed(params, hidden[:, -1]), times, axis=0)
    reader = Reader(model, params, jnp.repeat(lengths, times), width + new)
    return reader, logits, repeat_rows(cache, reader.row_axes, times)


def decode(
    loop: Callable[[Sequence[Reader], Sequence[Any]], Any],
    readers: Sequence[Reader],
    caches: Sequence[Any],
) -> Any:
    """``loop(readers, caches)``, unrolled where it runs on a CPU or an NVIDIA GPU.

    The platform is the one the program is compiled for, not the one it is traced on.

    Args:
        loop: what it returns must not contain the caches.
        readers: from `prefill`.
        caches: theirs.
    """

    def unrolled(caches):
        pairs = [r.unrolled(c) for r, c in zip(readers, caches, strict=True)]
        return loop(*zip(*pairs, strict=True))

    if not any(hasattr(reader.model, "unrolled") for reader in readers):
        return loop(readers, caches)
    return lax.platform_dependent(
        tuple(caches),
        cpu=unrolled,
        cuda=unrolled,
        default=lambda caches: loop(readers, caches),
    )


def pad_left(prompts: Prompts) -> Prompts:
    """Masked columns first, order kept: the identity on left-padded prompts."""
    order = jnp.argsort(prompts.mask, axis=1, stable=True)
    return jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), prompts)


def behind_prompts(prompts: Prompts, tokens: jax.Array, mask: jax.Array) -> Sequences:
    """G responses [B, G, T] of every prompt [B, P] as rows [B, G, P + T]."""
    shape = (*tokens.shape[:2], prompts.tokens.shape[1])
    prompts = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.expand_dims(x, 1), shape), prompts
    )
    return Sequences(
        tokens=jnp.concatenate([prompts.tokens, tokens], axis=-1),
        token_mask=jnp.concatenate([prompts.mask, mask], axis=-1),
        response_mask=mask,
    )


def any_of(tokens: jax.Array, ids: Iterable[int]) -> jax.Array:
    """Whether a token is one of a few given ones; all False when none is given."""
    found = jnp.zeros(tokens.shape, bool)
    for token in ids:
        found = found | (tokens == token)
    return found


def check_whole(name: str, value: int, least: int) -> None:
    """Raise ValueError unless the number is whole and at least ``least``."""
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_eos_ids(eos_ids: Iterable[int], vocab_size: int) -> None:
    """Raise ValueError unless every id is a whole number in the vocabulary."""
    for one in eos_ids:
        check_whole("each of eos_ids", one, 0)
    beyond = [i for i in eos_ids if not 0 <= i < vocab_size]
    if beyond:
        raise ValueError(f"eos_ids {beyond} lie outside the vocabulary of {vocab_size}")


def check_prompts(prompts: Prompts, new: int, context: int, *, whose: str = "") -> None:
    """Raise ValueError unless the prompts can be decoded from.

    Args:
        prompts: must be [B, P] with a token in every row (not checked while tracing).
        new: response columns.
        context: columns the model accepts.
        whose: role the message names, such as "teacher "; a space at its end.
    """
    shape = prompts.tokens.shape
    if len(shape) != 2 or prompts.mask.shape != shape:
        raise ValueError(
            f"{whose}prompts must be [B, P]: tokens {shape}, mask {prompts.mask.shape}"
        )
    if not shape[0]:
        raise ValueError(f"there is no {whose}prompt in the batch")
    if shape[1] + new > context:
        raise ValueError(
            f"{whose}prompt width {shape[1]} + max_new_tokens {new} exceeds the "
            f"model's context of {context}: shorten one of them"
        )
    mask = prompts.mask
    if isinstance(mask, jax.core.Tracer) or not getattr(
        mask, "is_fully_addressable", True
    ):
        return
    empty = np.flatnonzero(~np.asarray(mask).any(axis=1))
    if empty.size:
        raise ValueError(
            f"{whose}prompt {empty[0]} has no token: give it at least one (for example "
            "BOS)"
        )
