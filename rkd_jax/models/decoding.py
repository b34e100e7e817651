"""What every way of decoding shares: prompts on the left, a prefill, then columns.

A `Reader` is one model reading along behind its own prompts. A decode loop carries the
readers' caches, shows each new column to all of them and chooses the next one from
their logits; how it chooses is the business of `rkd_jax.models.sampling`,
`rkd_jax.models.mixed_sampling` and `rkd_jax.models.beam`.

Every column is read against all slots of a cache, the empty ones too. Long responses
are therefore written in stages, one loop after the other, and between two of them the
caches grow: with a short prompt and four stages 5 / 8 as many slots are read as with
one, at the price of four loops to compile. See `stage_ends`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rkd_jax.models.api import CausalLM, positions_from_mask
from rkd_jax.models.cache_rows import repeat_rows, row_axes
from rkd_jax.models.gathering import gathered
from rkd_jax.types import Params, Prompts, Sequences

_STAGES = 4
"""At most: each is a loop to compile, and eight would read 9 / 16 of the slots."""
_STAGE = 256
"""Columns of a stage at least: growing costs as much as a few columns do."""
_State = TypeVar("_State")


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model behind its prompts, R rows; its cache is held by the decode loop."""

    model: CausalLM
    params: Params
    lengths: jax.Array  # int32[R], tokens of each row's prompt
    width: int  # columns of the prompts
    new: int  # columns of the response

    @property
    def slots(self) -> int:
        """Of the cache at the end."""
        return self.width + self.new

    @property
    def row_axes(self) -> Any:
        """Of the cache, see `rkd_jax.models.cache_rows`."""
        return row_axes(self.model, self.params, self.slots)

    def unrolled(self, cache: Any) -> tuple[Reader, Any]:
        """The same reader and cache with layers apart, if its model can do that."""
        if not hasattr(self.model, "unrolled"):
            return self, cache
        model, params, cache = self.model.unrolled(self.params, cache, self.slots)
        return dataclasses.replace(self, model=model, params=params), cache

    def grown(self, cache: Any, columns: int) -> Any:
        """The cache with room for so many response columns, where it can grow."""
        if not hasattr(self.model, "grow_cache"):
            return cache
        return self.model.grow_cache(cache, self.width + columns)

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
    first = stage_ends(new)[0] if hasattr(model, "grow_cache") else new
    hidden, cache = model.hidden(
        params,
        prompts.tokens,
        positions=positions_from_mask(prompts.mask),
        segment_ids=prompts.mask.astype(jnp.int32),
        cache=model.init_cache(params, batch, width + first),
    )
    lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
    logits = jnp.repeat(model.unembed(params, hidden[:, -1]), times, axis=0)
    reader = Reader(model, params, jnp.repeat(lengths, times), width, new)
    return reader, logits, repeat_rows(cache, reader.row_axes, times)


def stage_ends(new: int) -> tuple[int, ...]:
    """Response columns that the cache has room for in each stage of a decode loop.

    Example: ``stage_ends(1024)`` is ``(256, 512, 768, 1024)``, and up to 255 columns
    are written in one stage.

    Args:
        new: columns of the response, T.

    Returns:
        rising, equally far apart but for the last one, which is T.
    """
    size = -(-new // min(max(new // _STAGE, 1), _STAGES))
    return (*range(size, new, size), new)


def decode(
    state: _State,
    readers: Sequence[Reader],
    caches: Sequence[Any],
    *,
    unfinished: Callable[[_State], jax.Array],
    advance: Callable[..., tuple[_State, Sequence[Any]]],
) -> _State:
    """Write columns 1, 2, ... while ``unfinished``, T - 1 of them at most.

    Layers are unrolled where this runs on a CPU or an NVIDIA GPU. The platform is the
    one the program is compiled for, not the one it is traced on.

    Args:
        state: what has been written, with column 0; a pytree without the caches.
        readers: from `prefill`, all with the same T.
        caches: theirs.
        unfinished: bool[] of a state; once False, it stays so.
        advance: ``advance(state, readers, caches, column)`` with int32[] ``column``;
            the state and caches that hold this column as well.

    Returns:
        the state at the end.
    """

    def written(readers, caches):
        grow = any(hasattr(reader.model, "grow_cache") for reader in readers)
        ends = stage_ends(readers[0].new) if grow else (readers[0].new,)
        progress, start = (state, tuple(caches)), 1
        for end in ends:
            progress = _stage(progress, readers, start, end, unfinished, advance)
            start = end + 1
        return progress[0]

    def unrolled(caches):
        pairs = [r.unrolled(c) for r, c in zip(readers, caches, strict=True)]
        return written(*zip(*pairs, strict=True))

    if not any(hasattr(reader.model, "unrolled") for reader in readers):
        return written(readers, caches)
    return lax.platform_dependent(
        tuple(caches),
        cpu=unrolled,
        cuda=unrolled,
        default=lambda caches: written(readers, caches),
    )


def _stage(progress, readers, start: int, end: int, unfinished, advance):
    """State and caches after the columns ``start .. end``, or all before T.

    The caches have slots for ``end`` columns: column t is read to write the next one.
    """
    state, caches = progress
    caches = tuple(r.grown(c, end) for r, c in zip(readers, caches, strict=True))
    # Turns are counted from 0 in every stage: the bound is then how many there are, for
    # whoever reads the program to count its work.
    turns = min(end, readers[0].new - 1) - start + 1

    def more(carry):
        turn, state, _ = carry
        return (turn < turns) & unfinished(state)

    def write(carry):
        turn, state, caches = carry
        state, caches = advance(state, readers, caches, start + turn)
        return turn + 1, state, tuple(caches)

    return lax.while_loop(more, write, (jnp.int32(0), state, caches))[1:]


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
