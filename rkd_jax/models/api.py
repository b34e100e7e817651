"""What the rest of the library may assume about a language model.

`CausalLM` is the whole contract. Parameters are an argument of every call, so a
student, its frozen copy and a teacher are the same code with different pytrees. The
free functions read states out of `rkd_jax.types.Sequences`; they are the one place
where the state *before* a target and the state *after* it are told apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp

from rkd_jax.types import Params, Sequences


class ModelConfig(Protocol):
    """The static facts every model's configuration states."""

    @property
    def vocab_size(self) -> int:
        """V, the width of the head; it may exceed the number of real tokens."""

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def num_layers(self) -> int:
        """Number of blocks."""

    @property
    def max_length(self) -> int:
        """Longest row of tokens the model accepts (its context)."""

    @property
    def logit_softcap(self) -> float | None:
        """c: `CausalLM.unembed` gives ``c * tanh(logits / c)``; None for no cap."""


@runtime_checkable
class CausalLM(Protocol):
    """A causal language model: static configuration and pure functions of ``params``.

    Attention rule: position i attends to position j iff ``j <= i`` in column order and
    their segment ids are equal and non-zero. Segment id 0 is padding: it influences no
    other position, and its own rows are finite but meaningless.
    """

    config: ModelConfig

    def init(self, rng: jax.Array) -> Params:
        """Random parameters; works under `jax.eval_shape` and `jax.jit`."""

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Any = None,
    ) -> Any:
        """Final-normed states ``[B, L, D]`` of ``tokens`` int32[B, L].

        Args:
            params: parameters.
            tokens: int32[B, L].
            positions: int32[B, L]; None counts columns (from the cache's next slot).
            segment_ids: int32[B, L], 0 on padding; None means one segment of ones.
            cache: from `init_cache`. The new tokens are then appended to it.

        Returns:
            states in the compute dtype; ``(states, cache)`` when a cache was given.
        """

    def head(self, params: Params) -> jax.Array:
        """The vocabulary head ``[D, V]`` in its stored dtype; gradient flows to it."""

    def head_bias(self, params: Params) -> jax.Array | None:
        """The bias ``[V]`` of the head, None when the model has none."""

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits ``[..., V]`` of states ``[..., D]``, accumulated in float32."""

    def logits(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """float32 logits ``[B, L, V]``; column i predicts the token of column i + 1."""

    def init_cache(self, params: Params | None, batch_size: int, length: int) -> Any:
        """An empty cache with ``length`` slots for ``batch_size`` rows."""


def positions_from_mask(token_mask: jax.Array) -> jax.Array:
    """Positions that count real tokens only, so that padding shifts nothing.

    >>> import jax.numpy as jnp
    >>> positions_from_mask(jnp.array([[False, False, True, True, False]])).tolist()
    [[0, 0, 0, 1, 1]]

    Args:
        token_mask: bool[..., L], True on real tokens.

    Returns:
        int32[..., L]: 0 for the first real token; meaningless (but valid) on padding.
    """
    counts = jnp.cumsum(token_mask.astype(jnp.int32), axis=-1)
    return jnp.maximum(counts - 1, 0)


def sequence_hidden(model: CausalLM, params: Params, sequences: Sequences) -> jax.Array:
    """The state of every column, ``[*batch, L, D]`` in the model's compute dtype.

    Args:
        model: the model.
        params: its parameters; gradient flows to them.
        sequences: any number of leading batch axes, flattened for the model.

    Returns:
        ``[*batch, L, D]``; columns of padding are finite and meaningless.

    Raises:
        ValueError: L exceeds the model's context.
    """
    chex.assert_equal_shape([sequences.tokens, sequences.token_mask])
    batch, length = sequences.tokens.shape[:-1], sequences.tokens.shape[-1]
    mask = sequences.token_mask.reshape(-1, length)
    hidden = model.hidden(
        params,
        sequences.tokens.reshape(-1, length),
        positions=positions_from_mask(mask),
        segment_ids=mask.astype(jnp.int32),
    )
    return hidden.reshape(*batch, length, hidden.shape[-1])


def response_hidden(model: CausalLM, params: Params, sequences: Sequences) -> jax.Array:
    """The state *before* each target, ``[*batch, T, D]``: it predicts that target.

    Columns P - 1 .. L - 2 of `sequence_hidden`, whose arguments and errors it shares.

    Raises:
        ValueError: P = 0, so the first target has no state before it.
    """
    start = _first_state(sequences)
    hidden = sequence_hidden(model, params, sequences)
    return hidden[..., start:-1, :]


def action_hidden(model: CausalLM, params: Params, sequences: Sequences) -> jax.Array:
    """The state *after* consuming each target, ``[*batch, T, D]``.

    Columns P .. L - 1 of `sequence_hidden`, whose arguments and errors it shares. A
    reward of the action ``target[t]``, EOS included, is read at entry t.
    """
    hidden = sequence_hidden(model, params, sequences)
    return hidden[..., sequences.prompt_width :, :]


class ResponseStates(NamedTuple):
    """The states around every target, ``[*batch, T, D]`` each."""

    before: jax.Array  # predicts the target: values, action values, the vocabulary head
    after: jax.Array  # has consumed it: rewards


def response_states(
    model: CausalLM, params: Params, sequences: Sequences
) -> ResponseStates:
    """`response_hidden` and `action_hidden` out of one pass over the trunk.

    Arguments and errors as those two. Entry t of ``before`` is entry t - 1 of
    ``after``.
    """
    start = _first_state(sequences)
    hidden = sequence_hidden(model, params, sequences)
    return ResponseStates(hidden[..., start:-1, :], hidden[..., start + 1 :, :])


def _first_state(sequences: Sequences) -> int:
    """The column before the first target."""
    start = sequences.prompt_width - 1
    if start < 0:
        raise ValueError(
            "sequences have no prompt column, so nothing precedes the first target; "
            "give every row at least one prompt token (BOS)"
        )
    return start


def response_logits(model: CausalLM, params: Params, sequences: Sequences) -> jax.Array:
    """float32 logits of each target, ``[*batch, T, V]``; entry t predicts target t.

    The head runs on the T response states alone, never on the prompt. Arguments and
    errors as `response_hidden`.
    """
    return model.unembed(params, response_hidden(model, params, sequences))
