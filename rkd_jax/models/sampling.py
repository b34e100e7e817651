"""Sampling: one prefill of the prompts, then one token per step with a KV cache.

The whole of it is one compiled program per shape. A prompt is prefilled once and its
cache repeated for the ``samples_per_prompt`` continuations. The loop leaves as soon as
every row has ended. How a token is chosen, ties and all, is defined in
`rkd_jax.models.categorical`; two models write together in
`rkd_jax.models.mixed_sampling`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rkd_jax.models.api import CausalLM
from rkd_jax.models.categorical import draw_tokens, truncate
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
    # Whether weights that a mesh has in parts are put together before the first column,
    # rather than at each; None: if that takes 4 GiB of a device at most. See
    # `rkd_jax.models.gathering`.
    gather: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.eos_ids, Iterable):
            raise ValueError(f"eos_ids must be several ids, got {self.eos_ids}")
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        for name in ("max_new_tokens", "samples_per_prompt"):
            check_whole(name, getattr(self, name), 1)
        check_whole("top_k", self.top_k, 0)
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or positive, got {self.temperature}"
            )
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
class Draw:
    """One token per row: R = B * G rows, or [R, T] once collected."""

    tokens: jax.Array  # int32[R]
    mask: jax.Array  # bool[R], False in rows that had ended before
    log_probs: jax.Array  # float32[R]
    behaviour_log_probs: jax.Array  # float32[R]


@struct
class _Progress:
    """What the decode loop carries beside the caches."""

    drawn: Draw  # [R, T], blank from the next column on
    ended: jax.Array  # bool[R]


def make_sampler(
    model: CausalLM, config: SamplingConfig
) -> Callable[[Params, Prompts, jax.Array], Samples]:
    """Build ``sample(params, prompts, rng) -> Samples``, compiled once per shape.

    ``sample`` takes prompts of shape [B, P], padded on either side (or with holes:
    masked columns move to the left, real tokens keep their order), and a PRNG key. The
    draw of prompt b, sample g, column t uses ``rng`` folded with b, g and t, so it
    depends neither on B and G nor on what other rows hold. Where batches vary in size,
    `rkd_jax.models.bucketing.bucketed` keeps the shapes few.

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
    check_eos_ids(config.eos_ids, model.config.vocab_size)

    def draw(logits, keys):
        return _draw(config, logits[0], keys)

    @jax.jit
    def generate(params, prompts, rng):
        return sample_rows(config, ((model, params, prompts),), draw, rng)

    def sample(params: Params, prompts: Prompts, rng: jax.Array) -> Samples:
        check_prompts(prompts, config.max_new_tokens, model.config.max_length)
        return generate(params, prompts, rng)

    return sample


def sample_rows(
    config: SamplingConfig,
    voices: Sequence[tuple[CausalLM, Params, Prompts]],
    draw: Callable[[tuple[jax.Array, ...], jax.Array], Draw],
    rng: jax.Array,
) -> Samples:
    """The decode loop of one or more models that read the same responses; traceable.

    Args:
        config: its columns, samples per prompt and EOS ids.
        voices: model, parameters and prompts [B, P]; the prompts of the first one come
            back in the result. B is the same for all, P may differ.
        draw: one token per row from the voices' logits, float32[R, V] each, and keys
            [R]; R = B * G.
        rng: key.

    Returns:
        `Samples`. No gradient flows to any parameters.
    """
    voices = [
        (model, lax.stop_gradient(params), pad_left(prompts))
        for model, params, prompts in voices
    ]
    new, group = config.max_new_tokens, config.samples_per_prompt
    keys = _row_keys(rng, voices[0][2].tokens.shape[0], group)
    readers, logits, caches = zip(
        *(
            prefill(*voice, new=new, times=group, gather=config.gather)
            for voice in voices
        ),
        strict=True,
    )

    def draw_column(logits, step):
        return draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step))

    def unfinished(progress):
        return ~jnp.all(progress.ended)

    def advance(progress, readers, caches, column):
        tokens, mask = (
            lax.dynamic_index_in_dim(x, column - 1, axis=1, keepdims=False)
            for x in (progress.drawn.tokens, progress.drawn.mask)
        )
        logits, caches = zip(
            *(
                reader.read(tokens, mask, column - 1, cache)
                for reader, cache in zip(readers, caches, strict=True)
            ),
            strict=True,
        )
        return _record(config, progress, draw_column(logits, column), column), caches

    first = draw_column(logits, 0)
    empty = _Progress(
        drawn=jax.tree.map(lambda x: jnp.zeros((x.size, new), x.dtype), first),
        ended=jnp.zeros(first.tokens.shape, bool),
    )
    progress = decode(
        _record(config, empty, first, 0),
        readers,
        caches,
        unfinished=unfinished,
        advance=advance,
    )
    return _assemble(voices[0][2], progress, group)


def _record(config, progress, draw, column) -> _Progress:
    """Write a column: blank in rows that had ended, EOS ends the others."""
    alive = ~progress.ended
    draw = jax.tree.map(lambda x: jnp.where(alive, x, jnp.zeros_like(x)), draw)
    return _Progress(
        drawn=jax.tree.map(
            lambda columns, x: columns.at[:, column].set(x), progress.drawn, draw
        ),
        ended=progress.ended | (alive & any_of(draw.tokens, config.eos_ids)),
    )


def _assemble(prompts, progress, group) -> Samples:
    """The rows [B * G] as [B, G], behind their prompts."""
    batch = prompts.tokens.shape[0]
    drawn = jax.tree.map(lambda x: x.reshape(batch, group, -1), progress.drawn)
    return Samples(
        sequences=behind_prompts(prompts, drawn.tokens, drawn.mask),
        log_probs=drawn.log_probs,
        behaviour_log_probs=drawn.behaviour_log_probs,
        ended=progress.ended.reshape(batch, group),
    )


class Softmax(NamedTuple):
    """A softmax before its division, float32; see `tempered`."""

    scaled: jax.Array  # [R, V], logits over temperature, 0 at the largest of a row
    weights: jax.Array  # [R, V], their exponentials, in [0, 1]
    total: jax.Array  # [R], the sums of these


def tempered(logits: jax.Array, temperature: float) -> Softmax:
    """``softmax(logits / temperature)`` of float[R, V], temperature positive."""
    logits = logits.astype(jnp.float32)
    # In this order the largest is 0 whatever a compiler fuses, and however cold it is.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled / max(temperature, float(jnp.finfo(jnp.float32).tiny))
    weights = jnp.exp(scaled)
    return Softmax(scaled, weights, jnp.sum(weights, axis=-1))


def entry(values: jax.Array, tokens: jax.Array) -> jax.Array:
    """``values[r, tokens[r]]``, [R]."""
    return jnp.take_along_axis(values, jnp.expand_dims(tokens, 1), axis=1)[:, 0]


def _draw(config, logits, keys) -> Draw:
    """One token per row from ``logits`` [R, V], and its two log-probs."""
    greedy = config.temperature == 0.0
    policy = tempered(logits, 1.0 if greedy else config.temperature)
    if greedy:
        tokens = jnp.argmax(policy.scaled, axis=-1).astype(jnp.int32)
    else:
        kept = truncate(policy.weights, top_k=config.top_k, top_p=config.top_p)
        tokens = draw_tokens(kept, keys)
    chosen = entry(policy.scaled, tokens)
    return Draw(
        tokens=tokens,
        mask=jnp.ones_like(tokens, dtype=bool),
        log_probs=chosen - jnp.log(policy.total),
        behaviour_log_probs=(
            jnp.zeros_like(chosen)
            if greedy
            else chosen - jnp.log(jnp.sum(kept, axis=-1))
        ),
    )


def _row_keys(rng, batch, group):
    """A key for each prompt and sample, [B * G], whatever B and G are."""
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        rng = jax.random.wrap_key_data(rng)  # of `jax.random.PRNGKey`
    per_prompt = jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(batch))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(per_prompt, jnp.arange(group)).reshape(batch * group)
