"""A language model small enough to compute by hand: logits are a row of a table.

The next token depends on the last one only. The state of a padding column is NaN, which
no statistic may let through.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int = 1
    max_length: int = 64
    logit_softcap: float | None = None


class Bigram:
    """`CausalLM` with parameters ``{"table": [V, V]}`` and D = V."""

    def __init__(self, vocabulary: int):
        self.config = BigramConfig(vocabulary, vocabulary)
        self.traces = 0  # calls of `hidden`: under jit, once per compilation

    def init(self, rng):
        size = self.config.vocab_size
        return {"table": jax.random.normal(rng, (size, size))}

    def hidden(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        del positions
        self.traces += 1
        states = params["table"][tokens]
        if segment_ids is not None:
            real = jnp.expand_dims(segment_ids > 0, -1)
            states = jnp.where(real, states, jnp.nan)
        return states if cache is None else (states, cache)

    def head(self, params):
        del params
        return jnp.eye(self.config.vocab_size)

    def head_bias(self, params):
        del params

    def unembed(self, params, hidden):
        del params
        return hidden.astype(jnp.float32)

    def logits(self, params, tokens, *, positions=None, segment_ids=None):
        return self.hidden(params, tokens, segment_ids=segment_ids)

    def init_cache(self, params, batch_size, length):
        del params
        return {"slots": jnp.zeros((batch_size, length))}
