"""What every objective asks of a policy: the log-probs of given responses.

They come out of the states and the head by `rkd_jax.losses.fused`, so the logits of a
batch never exist as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from rkd_jax.losses import linear_token_log_probs
from rkd_jax.losses.fused import Tiles
from rkd_jax.masking import fill_masked
from rkd_jax.models.api import (
    CausalLM,
    ResponseStates,
    response_hidden,
    response_states,
)
from rkd_jax.types import Pair, Params, Sequences

TILES = Tiles()
LATER = Tiles(gradient="recompute")
"""For losses that say only after all log-probs are in how each of them counts: there is
no gradient to prepare."""


def target_log_probs(
    model: CausalLM,
    params: Params,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    weights: jax.Array | None = None,
    tiles: Tiles = TILES,
) -> jax.Array:
    """Log-prob of every target, 0 where masked.

    Args:
        model: the policy.
        params: its parameters; gradient flows to them.
        sequences: [*batch].
        temperature: the policy is ``softmax(logits / temperature)``.
        weights: float[*batch, T], a hint, see `linear_token_log_probs`.
        tiles: see `Tiles`.

    Returns:
        float32[*batch, T], nats.
    """
    hidden = response_hidden(model, params, sequences)
    return log_probs_of_states(
        model,
        params,
        hidden,
        sequences,
        temperature=temperature,
        weights=weights,
        tiles=tiles,
    )


def log_probs_of_states(
    model: CausalLM,
    params: Params,
    hidden: jax.Array,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    weights: jax.Array | None = None,
    tiles: Tiles = TILES,
) -> jax.Array:
    """`target_log_probs` out of the states before every target, ``[*batch, T, D]``."""
    return linear_token_log_probs(
        hidden,
        model.head(params),
        sequences.targets,
        mask=sequences.response_mask,
        weights=weights,
        temperature=temperature,
        bias=model.head_bias(params),
        softcap=model.config.logit_softcap,
        tiles=tiles,
    )


@dataclasses.dataclass(frozen=True)
class Reading:
    """A policy along given responses, after one pass of its trunk.

    What it says is computed when it is first asked for.
    """

    model: CausalLM
    params: Params
    sequences: Sequences  # [*batch]
    states: ResponseStates
    temperature: float
    tiles: Tiles

    @functools.cached_property
    def log_probs(self) -> jax.Array:
        """`target_log_probs`."""
        return log_probs_of_states(
            self.model,
            self.params,
            self.states.before,
            self.sequences,
            temperature=self.temperature,
            tiles=self.tiles,
        )

    @functools.cached_property
    def logits(self) -> jax.Array:
        """``[*batch, T, V]``, over the temperature; 0 where masked.

        For what reads whole distributions: this array is what the rest avoids.
        """
        logits = self.model.unembed(self.params, self.states.before)
        logits = fill_masked(logits, self.sequences.response_mask)
        return logits / self.temperature


def read(
    model: CausalLM,
    params: Params,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    tiles: Tiles = TILES,
) -> Reading:
    """Arguments as `target_log_probs`."""
    states = response_states(model, params, sequences)
    return Reading(model, params, sequences, states, temperature, tiles)


def frozen_params(frozen: Any, name: str) -> Params:
    """The parameters ``frozen[name]``.

    Raises:
        ValueError: they are not there.
    """
    try:
        return frozen[name]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the head of the {name} is read in the loss: give the update "
            f'frozen={{"{name}": its parameters}}'
        ) from error


def members(values: jax.Array) -> Pair:
    """``[..., 2]`` as a `Pair` of ``[...]``: member 0 is the chosen one."""
    return Pair(values[..., 0], values[..., 1])
