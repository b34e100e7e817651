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

from rkd_jax.packed import refuse_packed
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
    other position, and its own rows are finite but meaningless. A model that knows
    padding but no segments says so by an attribute ``single_segment = True``; packed
    rows are then refused.

    Two more methods make decoding faster where a model has them, and change nothing
    else (see `rkd_jax.models.decoding`): ``grow_cache(cache, length)``, the cache with
    empty slots behind its own, and ``unrolled(params, cache, slots)``, the same model,
    parameters and cache with layers apart.
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


def head_part(model: CausalLM, params: Params, tree: Any = None) -> Any:
    """What the head of a model reads of its parameters, and nothing else.

    The part of a frozen teacher that a loss on states needs (``frozen["teacher"]``):
    its trunk may sit on other devices.

    Args:
        model: the model.
        params: its parameters or their abstract values, nested dictionaries.
        tree: another tree of that structure to be cut alike, such as the logical axes
            of the parameters; None takes the parameters.

    Returns:
        The nested dictionaries with these entries alone; `CausalLM.head` and
        `CausalLM.head_bias` read it as they read the whole.
    """
    structure = jax.tree.structure(params)
    program = jax.make_jaxpr(lambda p: (model.head(p), model.head_bias(p)))(params)
    read = {id(x) for step in program.jaxpr.eqns for x in step.invars}
    read |= {id(x) for x in program.jaxpr.outvars}
    inside = jax.tree.unflatten(
        structure, [id(x) in read for x in program.jaxpr.invars]
    )

    def cut(inside: Any, tree: Any) -> Any:
        if not isinstance(inside, dict):
            return tree if inside else None
        parts = {name: cut(inside[name], tree[name]) for name in inside}
        return {name: part for name, part in parts.items() if part is not None} or None

    return cut(inside, params if tree is None else tree)


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


def positions_from_segments(segment_ids: jax.Array) -> jax.Array:
    """Positions that start anew in every segment of a packed row.

    >>> import jax.numpy as jnp
    >>> positions_from_segments(jnp.array([[1, 1, 1, 2, 2, 0, 3]])).tolist()
    [[0, 1, 2, 0, 1, 0, 0]]

    Args:
        segment_ids: int32[..., L]; the columns of a segment lie side by side.

    Returns:
        int32[..., L]: 0 in the first column of a segment; meaningless (but valid) on
        padding.
    """
    first = jnp.ones_like(segment_ids[..., :1], bool)
    change = segment_ids[..., 1:] != segment_ids[..., :-1]
    begins = jnp.concatenate([first, change], axis=-1)
    columns = jax.lax.broadcasted_iota(jnp.int32, begins.shape, begins.ndim - 1)
    start = jax.lax.cummax(jnp.where(begins, columns, 0), axis=begins.ndim - 1)
    return columns - start


def sequence_hidden(model: CausalLM, params: Params, sequences: Sequences) -> jax.Array:
    """The state of every column, ``[*batch, L, D]`` in the model's compute dtype.

    A packed record gets the states it would get in a row of its own: it attends to its
    own segment, and its positions start at 0.

    Args:
        model: the model.
        params: its parameters; gradient flows to them.
        sequences: any number of leading batch axes, flattened for the model.

    Returns:
        ``[*batch, L, D]``; columns of padding are finite and meaningless.

    Raises:
        ValueError: L exceeds the model's context, or the rows are packed and the model
        knows no segments.
    """
    chex.assert_equal_shape([sequences.tokens, sequences.token_mask])
    batch, length = sequences.tokens.shape[:-1], sequences.tokens.shape[-1]
    mask = sequences.token_mask.reshape(-1, length)
    if sequences.segment_ids is None:
        segment_ids, positions = mask.astype(jnp.int32), positions_from_mask(mask)
    else:
        chex.assert_equal_shape([sequences.tokens, sequences.segment_ids])
        if getattr(model, "single_segment", False):
            name = type(model).__name__
            refuse_packed(sequences, f"{name} (it knows no segments)")
        # Padding may hold anything, its ids included.
        segment_ids = jnp.where(mask, sequences.segment_ids.reshape(-1, length), 0)
        positions = positions_from_segments(segment_ids)
    hidden = model.hidden(
        params,
        sequences.tokens.reshape(-1, length),
        positions=positions,
        segment_ids=segment_ids,
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
