"""What every objective asks of a policy: the log-probs of given responses."""

from __future__ import annotations

import jax

from rkd_jax.losses import token_log_probs
from rkd_jax.masking import fill_masked
from rkd_jax.models.api import CausalLM, response_logits
from rkd_jax.types import Pair, Params, Sequences


def target_log_probs(
    model: CausalLM,
    params: Params,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """Log-prob of every target, finite and meaningless where masked.

    Args:
        model: the policy.
        params: its parameters; gradient flows to them.
        sequences: [*batch].
        temperature: the policy is ``softmax(logits / temperature)``.

    Returns:
        float32[*batch, T], nats.
    """
    logits = response_logits(model, params, sequences)
    logits = fill_masked(logits, sequences.response_mask)
    return token_log_probs(logits, sequences.targets, temperature=temperature)


def members(values: jax.Array) -> Pair:
    """``[..., 2]`` as a `Pair` of ``[...]``: member 0 is the chosen one."""
    return Pair(values[..., 0], values[..., 1])
