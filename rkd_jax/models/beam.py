"""Beam search: the most probable responses of a model, by one compiled program.

The beam of a prompt holds K hypotheses, ended or live. At every step an ended one
stands for itself, a live one for all its continuations by one token, and the K of the
highest score stay::

    score = sum of the log-probs of its tokens / length ** length_penalty

where sum and length include the EOS. Taking an EOS id ends a hypothesis: its score is
final, but better ones may still push it out. A prompt is done once all its K hypotheses
have ended, or after ``max_new_tokens`` columns, when live ones compete as they are.
Live and ended ones are compared at their own lengths: no bound on what a live one may
still reach is used. Of equal scores the hypothesis that ranked higher stays, then the
one that continues by the smaller token id.

If no more than K responses and prefixes exist at any length the beam holds all of them:
the search is exhaustive and exact. One beam is greedy decoding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rkd_jax.models.api import CausalLM
from rkd_jax.models.cache_rows import take_rows
from rkd_jax.models.categorical import largest
from rkd_jax.models.decoding import (
    any_of,
    behind_prompts,
    check_eos_ids,
    check_prompts,
    check_whole,
    decode,
    pad_left,
    prefill,
)
from rkd_jax.types import Params, Prompts, Sequences, struct

_LARGEST_POWER = 75.0
"""Logarithm of the largest power of a length: times a log-prob it is a float32."""


@struct
class Beams:
    """The K best responses found for each prompt, best first.

    Where fewer than K responses have a positive probability the rest is blank: mask
    False, log-probs 0, ``sequence_log_probs`` and ``scores`` -inf, ``ended`` False.

    Example: B = 1, K = 2, prompt ``7 8``, EOS 2, T = 3, no length penalty::

        Beams(
            sequences=Sequences(
                tokens=[[[7, 8, 5, 2, 0], [7, 8, 2, 0, 0]]],
                token_mask=[[[True, True, True, True, False],
                             [True, True, True, False, False]]],
                response_mask=[[[True, True, False], [True, False, False]]],
            ),
            log_probs=[[[-0.5, -0.4, 0.0], [-1.3, 0.0, 0.0]]],
            sequence_log_probs=[[-0.9, -1.3]],
            scores=[[-0.9, -1.3]],
            ended=[[True, True]],
        )
    """

    sequences: Sequences  # [B, K, P + T]
    log_probs: jax.Array  # float32[B, K, T], nats, at temperature 1
    sequence_log_probs: jax.Array  # float32[B, K], their sums
    scores: jax.Array  # float32[B, K], what they are ordered by
    ended: jax.Array  # bool[B, K]; False when T columns did not reach an EOS


@struct
class _Beam:
    """K hypotheses of each prompt, by falling score; blank ones have the total -inf."""

    tokens: jax.Array  # int32[B, K, T]
    mask: jax.Array  # bool[B, K, T]
    log_probs: jax.Array  # float32[B, K, T]
    total: jax.Array  # float32[B, K]
    score: jax.Array  # float32[B, K]
    ended: jax.Array  # bool[B, K]

    @property
    def live(self) -> jax.Array:
        """bool[B, K]: neither ended nor blank."""
        return ~self.ended & (self.total > -jnp.inf)


def make_beam_search(
    model: CausalLM,
    *,
    beams: int,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    length_penalty: float = 0.0,
) -> Callable[[Params, Prompts], Beams]:
    """Build ``search(params, prompts) -> Beams``, compiled once per shape.

    Prompts as in `rkd_jax.models.sampling.make_sampler`: [B, P], padded on either side.
    They are searched together, but what is found for one depends on no other. The
    module's docstring states the score and when a search ends.

    Args:
        model: any `CausalLM`; ``init_cache`` is asked for P + T columns.
        beams: K, hypotheses kept and returned per prompt.
        max_new_tokens: T, columns of the response.
        eos_ids: any of these ends a hypothesis and is its last target.
        length_penalty: power of the length that divides the summed log-prob. 0 ranks
            by probability, 1 by log-prob per token; larger values prefer longer
            responses.

    Returns:
        The search. It may be called inside a jitted function.

    Gradient:
        None flows to ``params``.

    Raises:
        ValueError: fewer than one beam or column, a length penalty that is not finite
            or overflows, an EOS id outside the vocabulary; and from ``search`` as
            `make_sampler`.
    """
    for name, value in (("beams", beams), ("max_new_tokens", max_new_tokens)):
        check_whole(name, value, 1)
    # Of a NaN as well: only what is finite and small enough is below.
    if not abs(length_penalty) * math.log(max(max_new_tokens, 2)) < _LARGEST_POWER:
        raise ValueError(
            f"{max_new_tokens} ** length_penalty must be a float32, got length_penalty "
            f"{length_penalty}"
        )
    eos_ids = tuple(eos_ids)
    check_eos_ids(eos_ids, model.config.vocab_size)

    @jax.jit
    def find(params, prompts):
        params, prompts = lax.stop_gradient(params), pad_left(prompts)
        reader, logits, cache = prefill(
            model, params, prompts, new=max_new_tokens, times=beams
        )

        def extended(beam, logits, step):
            return _extend(beam, logits, step, eos_ids, length_penalty)

        shape = (prompts.tokens.shape[0], beams, max_new_tokens)
        beam, _ = extended(_roots(shape), logits, 0)  # one root: parents are all equal

        beam = decode(
            beam,
            (reader,),
            (cache,),
            unfinished=lambda beam: jnp.any(beam.live),
            advance=functools.partial(_advance, extended),
        )
        return _assemble(prompts, beam)

    def search(params: Params, prompts: Prompts) -> Beams:
        check_prompts(prompts, max_new_tokens, model.config.max_length)
        return find(params, prompts)

    return search


def _advance(extended, beam: _Beam, readers, caches, column):
    """The beam with one more column, and the cache in the order of its hypotheses."""
    (reader,), (cache,) = readers, caches
    batch, beams, _ = beam.tokens.shape
    tokens, mask = (
        lax.dynamic_index_in_dim(x, column - 1, axis=2, keepdims=False).reshape(-1)
        for x in (beam.tokens, beam.mask)
    )
    logits, cache = reader.read(tokens, mask, column - 1, cache)
    beam, parents = extended(beam, logits, column)
    if beams > 1:
        first = jnp.expand_dims(jnp.arange(batch, dtype=jnp.int32) * beams, 1)
        rows = (first + parents).reshape(-1)
        cache = take_rows(cache, reader.row_axes, rows)
    return beam, (cache,)


def _roots(shape: tuple[int, int, int]) -> _Beam:
    """One empty hypothesis per prompt; the others are blank."""
    first = jnp.broadcast_to(jnp.expand_dims(jnp.arange(shape[1]) == 0, 0), shape[:2])
    total = jnp.where(first, 0.0, -jnp.inf).astype(jnp.float32)
    return _Beam(
        tokens=jnp.zeros(shape, jnp.int32),
        mask=jnp.zeros(shape, bool),
        log_probs=jnp.zeros(shape, jnp.float32),
        total=total,
        score=total,
        ended=jnp.zeros(shape[:2], bool),
    )


def _extend(beam: _Beam, logits, step, eos_ids, length_penalty):
    """The beam one column longer, and the hypothesis [B, K] each one came from."""
    batch, beams, _ = beam.tokens.shape
    # No more than K continuations of one hypothesis can stay.
    gains, tokens = _most_probable(logits, min(beams, logits.shape[-1]))
    gains, tokens = (x.reshape(batch, beams, -1) for x in (gains, tokens))
    live = jnp.expand_dims(beam.live, 2)
    itself = jnp.expand_dims(jnp.arange(gains.shape[2]) == 0, (0, 1))

    def candidates(of_live, of_ended):
        alone = jnp.where(itself, jnp.expand_dims(of_ended, 2), -jnp.inf)
        return jnp.where(live, of_live, alone).reshape(batch, -1)

    longer = jnp.expand_dims(beam.total, 2) + gains
    length = jnp.asarray(step + 1, jnp.float32)
    totals = candidates(longer, beam.total)
    scores = candidates(longer / length**length_penalty, beam.score)
    scores, chosen = lax.top_k(scores, beams)

    parents = (chosen // gains.shape[2]).astype(jnp.int32)
    kept = jax.tree.map(lambda x: _rows_of(x, parents), beam)
    grew = kept.live

    def column(columns, candidate):
        picked = jnp.take_along_axis(candidate.reshape(batch, -1), chosen, axis=1)
        return columns.at[:, :, step].set(jnp.where(grew, picked, columns[:, :, step]))

    tokens, gains = column(kept.tokens, tokens), column(kept.log_probs, gains)
    ends = grew & any_of(tokens[:, :, step], eos_ids)
    beam = _Beam(
        tokens=tokens,
        mask=kept.mask.at[:, :, step].set(grew),
        log_probs=gains,
        total=jnp.take_along_axis(totals, chosen, axis=1),
        score=scores,
        ended=kept.ended | ends,
    )
    return beam, parents


def _most_probable(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Log-probs float32[R, count] and ids int32[R, count] of the likeliest tokens."""
    logits = logits.astype(jnp.float32)
    best, tokens = largest(logits, count)
    shifted = logits - jnp.expand_dims(best[:, 0], 1)
    total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    return best - jnp.expand_dims(best[:, 0], 1) - jnp.log(total), tokens


def _rows_of(values: jax.Array, parents: jax.Array) -> jax.Array:
    """``values[b, parents[b, k]]`` for values [B, K, ...]."""
    index = jnp.expand_dims(parents, tuple(range(2, values.ndim)))
    return jnp.take_along_axis(values, index, axis=1)


def _assemble(prompts: Prompts, beam: _Beam) -> Beams:
    """Blank what does not exist, and put the prompts in front."""
    exists = jnp.expand_dims(beam.total > -jnp.inf, 2)
    tokens, mask, log_probs = (
        jnp.where(exists, x, jnp.zeros_like(x))
        for x in (beam.tokens, beam.mask, beam.log_probs)
    )
    return Beams(
        sequences=behind_prompts(prompts, tokens, mask),
        log_probs=log_probs,
        sequence_log_probs=beam.total,
        scores=beam.score,
        ended=beam.ended & exists[:, :, 0],
    )
