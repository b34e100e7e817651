"""What the min-max games share: the student's baselines, and means over prompts.

A row of a game is a prompt, with one response of the teacher and G of the student. A
prompt whose responses are all empty is padding: it counts nowhere, whatever it holds.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rkd_jax.losses import leave_one_out, leave_one_out_per_step
from rkd_jax.masking import fill_masked, masked_sum, sequence_mean
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.policy import target_log_probs
from rkd_jax.types import DemonstrationBatch, LossOutput, Mean, Params, Sequences

Baseline = Literal["loo_per_step", "loo_return", "none"]


def _less_other_returns(to_go, returns, mask):
    """Less the other samples' return, recovered from R - leave_one_out(R)."""
    others = returns - leave_one_out(returns)
    return fill_masked(to_go - jnp.expand_dims(others, -1), mask)


LESS_BASELINE = {
    "loo_per_step": lambda to_go, returns, mask: leave_one_out_per_step(to_go, mask),
    "loo_return": _less_other_returns,
    "none": lambda to_go, returns, mask: to_go,
}
"""By name: ``(to_go [B, G, T], returns [B, G], mask) -> [B, G, T]``, unbiased all."""


def prompt_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """Mean over a prompt's samples, summed over the prompts that have any token.

    ``values`` [B] or [B, G], ``mask`` the same with T appended.
    """
    rows = values.reshape(values.shape[0], -1).mean(axis=1)
    valid = mask.reshape(mask.shape[0], -1).any(axis=1)
    return Mean(masked_sum(rows, valid), valid.sum().astype(rows.dtype))


def value_of(mean: Mean) -> jax.Array:
    """Total / weight, 0 where nothing was counted."""
    return mean.total / jnp.maximum(mean.weight, 1.0)


def weighted(loss: jax.Array, prompts: jax.Array, metrics: dict) -> LossOutput:
    """A loss that is a mean over prompts already, as sum and weight."""
    return LossOutput(loss * prompts, prompts, metrics)


def length(sequences: Sequences) -> Mean:
    """Targets per response."""
    mask = sequences.response_mask
    return prompt_mean(mask.sum(axis=-1).astype(jnp.float32), mask)


def sft_nll(
    model: CausalLM,
    params: Params,
    demonstrations: DemonstrationBatch,
    *,
    temperature: float,
) -> Mean:
    """Mean negative log-likelihood of the teacher's responses, nats per token."""
    sequences = demonstrations.sequences
    mask = sequences.response_mask
    counted = mask.astype(jnp.float32)
    shares = counted / jnp.maximum(counted.sum(axis=-1, keepdims=True), 1.0)
    log_probs = target_log_probs(
        model, params, sequences, temperature=temperature, weights=shares
    )
    return prompt_mean(sequence_mean(-log_probs, mask), mask)
