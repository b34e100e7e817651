r"""How much the last layer of a decoder attends to each token of a response.

.. math:: w_t = \frac 1{|y|} \sum_i \mathrm{softmax}\big(\{q_i \cdot k_{t'}\}_{t'}
    \big)_t

over the tokens of the response, queries i seeing keys up to their own: AVA's weight of
the reward of token t. With uniform attention the first token has the weight
:math:`H_{|y|} / |y|` (harmonic number) and the last :math:`1 / |y|^2`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rkd_jax.masking import fill_masked
from rkd_jax.models.api import positions_from_mask, sequence_hidden
from rkd_jax.models.attention import attention_bias
from rkd_jax.models.blocks import RMSNorm
from rkd_jax.models.config import DecoderConfig
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.projection import project
from rkd_jax.models.rope import rope_frequencies, rope_table, rotate
from rkd_jax.packed import refuse_packed
from rkd_jax.types import Params, Sequences


def response_attention(
    model: Decoder, params: Params, sequences: Sequences
) -> jax.Array:
    """Mean attention on each response token, over heads and response tokens.

    It is a second pass over all layers but the last; only ``[H, T, T]`` probabilities
    per response are ever in memory.

    Args:
        model: of two layers or more.
        params: its parameters.
        sequences: [*batch].

    Returns:
        float32[*batch, T], positive on response tokens, where it sums to 1; 0 in
        padding.

    Gradient:
        Flows to ``params``, of the layers below and the last layer's queries and keys.

    Raises:
        ValueError: the model has one layer; L exceeds its context; packed rows.

    References:
        AVA, 2411.09341. Reconstruction: layer, heads and mask are not published in what
        we have; here the last layer, the mean over heads, the model's causal attention
        with the prompt left out of the softmax.
    """
    if model.config.num_layers < 2:
        raise ValueError("response_attention needs a model of two layers or more")
    refuse_packed(sequences, "response_attention")
    width, length = sequences.prompt_width, sequences.tokens.shape[-1]
    tokens = sequences.token_mask.reshape(-1, length)
    mask = sequences.response_mask.reshape(tokens.shape[0], -1)
    normed = _last_attention_input(model, params, sequences)
    normed = normed.reshape(*tokens.shape, -1)[:, width:]
    layer = jax.tree.map(lambda leaf: leaf[-1], params["layers"]["attention"])
    positions = positions_from_mask(tokens)[:, width:]
    scores = _scores(model.config, layer, normed, positions)
    columns = jnp.arange(mask.shape[1], dtype=jnp.int32)
    segments = mask.astype(jnp.int32)
    bias = attention_bias(
        segments,
        segments,
        columns,
        columns,
        window=model.config.sliding_window,
        dtype=scores.dtype,
    )
    attention = jax.nn.softmax(scores + bias, axis=-1).mean(axis=(1, 2))
    queries = jnp.where(mask, 1.0, 0.0).astype(attention.dtype)
    lengths = jnp.maximum(queries.sum(axis=-1, keepdims=True), 1.0)
    weights = jnp.einsum("bq,bqk->bk", queries / lengths, attention)
    return fill_masked(weights, mask).reshape(sequences.response_mask.shape)


def _last_attention_input(
    model: Decoder, params: Params, sequences: Sequences
) -> jax.Array:
    """The normed states ``[*batch, L, D]`` that the last layer attends from and to.

    They are the output of a decoder without that layer, whose final norm is the one in
    front of that layer's attention.
    """
    layers = params["layers"]
    below = dataclasses.replace(model.config, num_layers=model.config.num_layers - 1)
    norm = layers["attention_norm"]["scale"][-1]
    lower = jax.tree.map(lambda leaf: leaf[:-1], layers)
    cut = dict(params) | {"layers": lower, "final_norm": {"scale": norm}}
    return sequence_hidden(Decoder(below), cut, sequences)


def _scores(
    config: DecoderConfig, layer: Params, normed: jax.Array, positions: jax.Array
) -> jax.Array:
    """Unmasked attention scores, ``[B, Hkv, H / Hkv, T, T]``."""
    frequencies = rope_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling
    )
    cos, sin = rope_table(positions, frequencies, config.accumulator)

    def heads(name: str) -> jax.Array:
        out = project(normed, layer[name]["kernel"])
        if config.attention_bias:
            bias = layer[name]["bias"].astype(out.dtype)
            out = out + jnp.expand_dims(bias, (0, 1))
        if config.qk_norm:
            norm = {"params": layer[f"{name}_norm"]}
            out = RMSNorm(config).apply(norm, out)
        return rotate(out, cos, sin)

    query, key = heads("query"), heads("key")
    groups = (key.shape[2], query.shape[2] // key.shape[2])
    query = query * config.head_dim**-0.5
    query = query.reshape(*query.shape[:2], *groups, config.head_dim)
    return jnp.einsum(
        "bqkgd,bskd->bkgqs", query, key, preferred_element_type=config.accumulator
    )
