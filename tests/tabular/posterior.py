"""Tables of reward posteriors and action values behind the heads' interface.

And a `TabularLM` that is quick outside of `jax.jit`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tests.tabular.bed import TabularLM


def tabular_posterior(params, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``{"mean", "log_std"}``, each float[2, 15, 3] over (x, k, a), as a reward head.

    A `TabularLM` state after an action is the one-hot of the node it leads to, and node
    1 + 3 k + a of prompt x belongs to one (x, k, a).
    """

    def read(table: jax.Array) -> jax.Array:
        return states @ jnp.pad(table.reshape(2, -1), ((0, 0), (1, 0))).ravel()

    return read(params["mean"]), read(params["log_std"])


def tabular_action_values(params, states: jax.Array) -> jax.Array:
    """``{"logits"}``, float[2, 15, 3], as a Q head on the states before each action."""
    return TabularLM().unembed(params, states)


@jax.jit
def _states(tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    dtype = {"logits": jnp.zeros((), float)}
    return TabularLM().hidden(dtype, tokens, segment_ids=segment_ids)


class QuickLM(TabularLM):
    """A `TabularLM` whose trunk, which has no parameters, is compiled once per shape.

    Without `jax.jit` around it, the trunk's scan would be compiled at every call.
    """

    def hidden(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        del params, positions
        assert cache is None
        return _states(tokens, segment_ids)
