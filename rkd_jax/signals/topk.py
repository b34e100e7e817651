"""The teacher's most likely tokens: what is kept of a distribution that is too wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_domain
from rkd_jax.losses.likelihood import put_tokens
from rkd_jax.masking import fill_masked
from rkd_jax.models.api import CausalLM, response_logits
from rkd_jax.types import Params, Sequences, TopkSignal


class TopkScores(NamedTuple):
    """The K most likely tokens of some states, and the mass of all others.

    Example: ``TopkScores(ids=[7, 2], log_probs=[-0.69, -1.20], log_tail=-1.61)``.
    """

    ids: jax.Array  # int32[*batch, K], most likely first
    log_probs: jax.Array  # float32[*batch, K], of the full softmax
    log_tail: jax.Array  # float32[*batch], -inf where nothing is left


def make_topk(
    model: CausalLM, *, top_k: int = 50, temperature: float = 1.0
) -> Callable[[Params, Sequences], TopkSignal]:
    """The teacher's most likely tokens at every target.

    Args:
        model: the teacher.
        top_k: K, in [1, V].
        temperature: divides the logits; the loss has to be taken at the same one.

    Returns:
        Jitted ``(params, sequences [*batch]) -> TopkSignal`` of ``[*batch, T, K]``; at
        masked positions id 0, and absent.

    Gradient:
        None: stopped at the model's parameters.

    Raises:
        ValueError: temperature out of range, or (when traced) a top_k that is.
    """
    check_domain("temperature", temperature, "(0, inf)")

    @jax.jit
    def topk(params: Params, sequences: Sequences) -> TopkSignal:
        logits = response_logits(model, jax.lax.stop_gradient(params), sequences)
        scores = topk_scores(logits / temperature, top_k)
        mask = sequences.response_mask
        return TopkSignal(
            fill_masked(scores.ids, mask),
            fill_masked(scores.log_probs, mask, -jnp.inf),
            temperature,
        )

    return topk


def topk_scores(logits: jax.Array, top_k: int) -> TopkScores:
    """The most likely tokens of logits ``[*batch, V]``.

    Args:
        logits: -inf marks impossible tokens.
        top_k: K, in [1, V]. Lower ids come first among equals.

    Gradient:
        Flows to the logits.

    Raises:
        ValueError: top_k out of range.
    """
    vocabulary = logits.shape[-1]
    if not 1 <= top_k <= vocabulary:
        raise ValueError(
            f"top_k={top_k} must lie between 1 and the {vocabulary} vocabulary entries "
            "of the teacher"
        )
    every = jax.nn.log_softmax(logits, axis=-1)
    log_probs, ids = jax.lax.top_k(every, top_k)
    # A sum over the others: one minus the list would be rounding where it has the mass.
    others = put_tokens(every, ids, -jnp.inf)
    some = jnp.any(others > -jnp.inf, axis=-1, keepdims=True)
    log_tail = jax.nn.logsumexp(jnp.where(some, others, 0.0), axis=-1)
    log_tail = jnp.where(some[..., 0], log_tail, -jnp.inf)
    return TopkScores(ids.astype(jnp.int32), log_probs, log_tail)
