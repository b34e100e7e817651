"""Signals of frozen models: the teacher, the reference, a frozen reward trunk.

Each ``make_*`` returns one jitted function of ``(params, sequences)``; XLA compiles it
once per shape bucket. The results carry no gradient.

A teacher that reads another prompt than the student needs nothing special here: pass
the batch's ``teacher_sequences``, whose targets are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax

from rkd_jax.losses import linear_token_log_probs
from rkd_jax.masking import fill_masked, sequence_sum
from rkd_jax.models.api import (
    CausalLM,
    action_hidden,
    response_hidden,
    response_logits,
)
from rkd_jax.types import Params, Sequences

Scorer = Callable[[Params, Sequences], jax.Array]


def make_teacher_log_probs(model: CausalLM, *, temperature: float = 1.0) -> Scorer:
    """The full distribution at every target.

    Args:
        model: the teacher.
        temperature: divides the logits.

    Returns:
        Jitted ``(params, sequences [*batch]) -> float32[*batch, T, V]``, natural log,
        0 at masked positions.

    Gradient:
        None: stopped at the model's parameters.
    """

    @jax.jit
    def teacher_log_probs(params: Params, sequences: Sequences) -> jax.Array:
        logits = response_logits(model, jax.lax.stop_gradient(params), sequences)
        log_probs = jax.nn.log_softmax(logits / temperature, axis=-1)
        return fill_masked(log_probs, sequences.response_mask)

    return teacher_log_probs


def make_token_scorer(model: CausalLM, *, temperature: float = 1.0) -> Scorer:
    """Log-prob of every target under a frozen model, ``[*batch, T]``, 0 where masked.

    Args, returns and gradient as `make_teacher_log_probs`, without the axis V.
    """

    @jax.jit
    def token_scores(params: Params, sequences: Sequences) -> jax.Array:
        params = jax.lax.stop_gradient(params)
        return linear_token_log_probs(
            response_hidden(model, params, sequences),
            model.head(params),
            sequences.targets,
            mask=sequences.response_mask,
            temperature=temperature,
            bias=model.head_bias(params),
            softcap=model.config.logit_softcap,
        )

    return token_scores


def make_sequence_scorer(model: CausalLM, *, temperature: float = 1.0) -> Scorer:
    """Summed log-prob of each response under a frozen model, ``[*batch]``.

    The reference signal of DPO is this on a `PreferenceBatch`, ``[B, 2]``. Arguments
    and gradient as `make_teacher_log_probs`.
    """
    token_scores = make_token_scorer(model, temperature=temperature)

    @jax.jit
    def sequence_scores(params: Params, sequences: Sequences) -> jax.Array:
        return sequence_sum(token_scores(params, sequences), sequences.response_mask)

    return sequence_scores


def make_features(
    model: CausalLM, *, states: Literal["before", "after"] = "after"
) -> Scorer:
    """States of a frozen trunk around each target, ``[*batch, T, D]``, 0 where masked.

    The input of a player that is only a head. Computing it once per text is what makes
    several steps of that player per student step cheap. Gradient: none.

    Args:
        model: the trunk.
        states: ``"after"`` the target was consumed, for rewards; ``"before"`` it, for
            action values.

    Raises:
        ValueError: neither of the two.
    """
    if states not in ("before", "after"):
        raise ValueError(f"states is before or after: {states!r}")
    read = response_hidden if states == "before" else action_hidden

    @jax.jit
    def features(params: Params, sequences: Sequences) -> jax.Array:
        hidden = read(model, jax.lax.stop_gradient(params), sequences)
        return fill_masked(hidden, sequences.response_mask)

    return features
