"""Sampling: one prefill of the prompts, then one token per step with a KV cache.

The whole of it is one compiled program per shape. A prompt is prefilled once and its
cache repeated for the ``samples_per_prompt`` continuations. The loop leaves as soon as
every row has ended. How a token is chosen, ties and all, is defined in
`rkd_jax.models.categorical`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rkd_jax.models.api import CausalLM, positions_from_mask
from rkd_jax.models.categorical import draw_tokens, truncate
from rkd_jax.types import Params, Prompts, Sequences, struct


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn; every field is static.

    Example: ``SamplingConfig(max_new_tokens=64, top_p=0.9, eos_ids=(2,))``.
    """

    max_new_tokens: int  # T, columns of the response
    temperature: float = 1.0  # divides the logits; 0 takes the most probable token
    top_k: int = 0  # 0 keeps the whole vocabulary
    top_p: float = 1.0  # in (0, 1]; 1 keeps everything
    eos_ids: tuple[int, ...] = ()  # any of these ends a row and is its last target
    samples_per_prompt: int = 1  # G

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        for name in ("max_new_tokens", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or positive, got {self.temperature}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


@struct
class Samples:
    """Responses drawn from a model, G for each prompt.

    Positions after a row's EOS hold token 0, mask False and log-prob exactly 0.

    Example: B = 1, G = 1, prompt ``7 8``, sampled ``5 2`` with EOS 2, T = 3::

        Samples(
            sequences=Sequences(
                tokens=[[[7, 8, 5, 2, 0]]],
                token_mask=[[[True, True, True, True, False]]],
                response_mask=[[[True, True, False]]],
            ),
            log_probs=[[[-1.2, -0.3, 0.0]]],
            behaviour_log_probs=[[[-0.9, -0.1, 0.0]]],
            ended=[[True]],
        )
    """

    sequences: Sequences  # [B, G, P + T]
    log_probs: jax.Array  # float32[B, G, T], nats; the model's own, all tokens allowed
    behaviour_log_probs: jax.Array  # float32[B, G, T], nats; what was drawn from
    ended: jax.Array  # bool[B, G]; False when T columns did not reach an EOS


@struct
class _Draw:
    """One token per row: R = B * G rows, or [R, T] once collected."""

    tokens: jax.Array  # int32[R]
    mask: jax.Array  # bool[R], False in rows that had ended before
    log_probs: jax.Array  # float32[R]
    behaviour_log_probs: jax.Array  # float32[R]


@struct
class _Progress:
    """What the decode loop carries."""

    step: jax.Array  # int32[], columns drawn so far
    drawn: _Draw  # [R, T]
    ended: jax.Array  # bool[R]
    cache: Any


def make_sampler(
    model: CausalLM, config: SamplingConfig
) -> Callable[[Params, Prompts, jax.Array], Samples]:
    """Build ``sample(params, prompts, rng) -> Samples``, compiled once per shape.

    ``sample`` takes prompts of shape [B, P], padded on either side (or with holes:
    masked columns move to the left, real tokens keep their order), and a PRNG key. The
    draw of prompt b, sample g, column t uses ``rng`` folded with b, g and t, so it
    depends neither on B and G nor on what other rows hold.

    ``log_probs`` are taken at ``config.temperature`` over the full vocabulary, or at
    temperature 1 when greedy. ``behaviour_log_probs`` are those of the truncated
    distribution the token came from: 0 when greedy. Softmax is in float32.

    Args:
        model: any `CausalLM`; ``init_cache`` is asked for P + T columns.
        config: static; another configuration is another sampler.

    Returns:
        The sampler. It may be called inside a jitted function.

    Gradient:
        None flows to ``params``; score the sequences with a fresh forward for that.

    Raises:
        ValueError: an EOS id outside the vocabulary; and from ``sample``: prompts that
            are not [B, P], P + T beyond the model's context, a prompt without a token
            (the last not checked while tracing).
    """
    beyond = [i for i in config.eos_ids if not 0 <= i < model.config.vocab_size]
    if beyond:
        raise ValueError(
            f"eos_ids {beyond} lie outside the vocabulary of {model.config.vocab_size}"
        )

    @jax.jit
    def generate(params, prompts, rng):
        params = lax.stop_gradient(params)
        return _generate(model, config, params, _pad_left(prompts), rng)

    def sample(params: Params, prompts: Prompts, rng: jax.Array) -> Samples:
        _check_prompts(prompts, config.max_new_tokens, model.config.max_length)
        return generate(params, prompts, rng)

    return sample


def _generate(model, config, params, prompts, rng) -> Samples:
    batch, width = prompts.tokens.shape
    group, new = config.samples_per_prompt, config.max_new_tokens
    keys = _row_keys(rng, batch, group)
    lengths = jnp.repeat(jnp.sum(prompts.mask, axis=1, dtype=jnp.int32), group)

    def unfinished(progress):
        return (progress.step < new) & ~jnp.all(progress.ended)

    def advance(progress):
        last = progress.step - 1
        column = lax.dynamic_slice_in_dim
        hidden, cache = model.hidden(
            params,
            column(progress.drawn.tokens, last, 1, axis=1),
            positions=jnp.expand_dims(lengths + last, 1),
            segment_ids=column(progress.drawn.mask, last, 1, axis=1).astype(jnp.int32),
            cache=progress.cache,
        )
        logits = model.unembed(params, hidden[:, -1])
        draw = _draw(config, logits, keys, progress.step)
        return _record(config, progress, draw, cache)

    logits, cache = _prefill(model, params, prompts, width + new)
    cache = _repeat_rows(model, params, cache, width + new, group)
    first = _draw(config, jnp.repeat(logits, group, axis=0), keys, 0)
    empty = _Progress(
        step=jnp.int32(0),
        drawn=jax.tree.map(lambda x: jnp.zeros((x.size, new), x.dtype), first),
        ended=jnp.zeros(batch * group, dtype=bool),
        cache=cache,
    )
    start = _record(config, empty, first, cache)
    return _assemble(prompts, lax.while_loop(unfinished, advance, start), group)


def _record(config, progress, draw, cache) -> _Progress:
    """Append a column: blank in rows that had ended, EOS ends the others."""
    alive = ~progress.ended
    draw = jax.tree.map(lambda x: jnp.where(alive, x, jnp.zeros_like(x)), draw)
    ends = jnp.zeros_like(alive)
    for eos in config.eos_ids:
        ends = ends | (draw.tokens == eos)
    return _Progress(
        step=progress.step + 1,
        drawn=jax.tree.map(
            lambda columns, x: columns.at[:, progress.step].set(x), progress.drawn, draw
        ),
        ended=progress.ended | ends,
        cache=cache,
    )


def _assemble(prompts, progress, group) -> Samples:
    """The rows [B * G] as [B, G], behind their prompts."""
    batch, width = prompts.tokens.shape
    shape = (batch, group, width)
    prompts = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.expand_dims(x, 1), shape), prompts
    )
    drawn = jax.tree.map(lambda x: x.reshape(batch, group, -1), progress.drawn)
    return Samples(
        sequences=Sequences(
            tokens=jnp.concatenate([prompts.tokens, drawn.tokens], axis=-1),
            token_mask=jnp.concatenate([prompts.mask, drawn.mask], axis=-1),
            response_mask=drawn.mask,
        ),
        log_probs=drawn.log_probs,
        behaviour_log_probs=drawn.behaviour_log_probs,
        ended=progress.ended.reshape(batch, group),
    )


def _prefill(model, params, prompts, length):
    """Logits [B, V] of the first response token, and a cache that holds the prompt."""
    hidden, cache = model.hidden(
        params,
        prompts.tokens,
        positions=positions_from_mask(prompts.mask),
        segment_ids=prompts.mask.astype(jnp.int32),
        cache=model.init_cache(params, prompts.tokens.shape[0], length),
    )
    return model.unembed(params, hidden[:, -1]), cache


def _repeat_rows(model, params, cache, length, times):
    """Repeat every row of any model's cache: B rows become B * times.

    Which axis of a leaf is the batch is read off the shapes: the one that grows when
    the model is asked for a cache of one more row. A leaf without one is shared.
    """
    one, two = (
        jax.eval_shape(lambda p, rows=rows: model.init_cache(p, rows, length), params)
        for rows in (1, 2)
    )

    def repeat(leaf, small, large):
        grown = [i for i in range(small.ndim) if small.shape[i] != large.shape[i]]
        return jnp.repeat(leaf, times, axis=grown[0]) if grown else leaf

    return cache if times == 1 else jax.tree.map(repeat, cache, one, two)


def _draw(config, logits, keys, step) -> _Draw:
    """One token per row from ``logits`` [R, V], and its two log-probs."""
    greedy = config.temperature == 0.0
    scaled = logits.astype(jnp.float32) / (1.0 if greedy else config.temperature)
    scaled = scaled - jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(scaled)
    if greedy:
        tokens = jnp.argmax(scaled, axis=-1).astype(jnp.int32)
    else:
        kept = truncate(weights, top_k=config.top_k, top_p=config.top_p)
        tokens = draw_tokens(kept, jax.vmap(jax.random.fold_in, (0, None))(keys, step))
    chosen = jnp.take_along_axis(scaled, jnp.expand_dims(tokens, 1), axis=1)[:, 0]
    return _Draw(
        tokens=tokens,
        mask=jnp.ones_like(tokens, dtype=bool),
        log_probs=chosen - jnp.log(jnp.sum(weights, axis=-1)),
        behaviour_log_probs=(
            jnp.zeros_like(chosen)
            if greedy
            else chosen - jnp.log(jnp.sum(kept, axis=-1))
        ),
    )


def _row_keys(rng, batch, group):
    """A key for each prompt and sample, [B * G], whatever B and G are."""
    per_prompt = jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(batch))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(per_prompt, jnp.arange(group)).reshape(batch * group)


def _pad_left(prompts: Prompts) -> Prompts:
    """Masked columns first, order kept: the identity on left-padded prompts."""
    order = jnp.argsort(prompts.mask, axis=1, stable=True)
    return jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), prompts)


def _check_prompts(prompts: Prompts, new: int, context: int) -> None:
    shape = prompts.tokens.shape
    if len(shape) != 2 or prompts.mask.shape != shape:
        raise ValueError(
            f"prompts must be [B, P]: tokens {shape}, mask {prompts.mask.shape}"
        )
    if shape[1] + new > context:
        raise ValueError(
            f"prompt width {shape[1]} + max_new_tokens {new} exceeds the model's "
            f"context of {context}: shorten one of them"
        )
    mask = prompts.mask
    if isinstance(mask, jax.core.Tracer) or not getattr(
        mask, "is_fully_addressable", True
    ):
        return
    empty = np.flatnonzero(~np.asarray(mask).any(axis=1))
    if empty.size:
        raise ValueError(
            f"prompt {empty[0]} has no token: give it at least one (for example BOS)"
        )
