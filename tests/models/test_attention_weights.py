"""The mean attention on response tokens, against the float64 numpy decoder."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.attention_weights import response_attention
from rkd_jax.models.decoder import Decoder
from rkd_jax.types import Sequences
from tests.models import reference
from tests.models.reference import GEMMA, LLAMA, QWEN, random_params

pytestmark = pytest.mark.usefixtures("x64")

WEIGHTS = jax.jit(response_attention, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def gradient_and_weights(model, params, sequences):
    """Gradient of the mean place of the attention, and the weights."""

    def place(params):
        weights = response_attention(model, params, sequences)
        return (weights[0] * jnp.arange(T, dtype=weights.dtype)).sum(), weights

    return jax.grad(place, has_aux=True)(params)


P, T = 3, 5
PROMPTS, RESPONSES = (2, 3, 1), (5, 3, 0)  # tokens of each row


def sequences():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 37, (3, P + T)).astype(np.int32)
    prompt = np.arange(P) >= P - np.array(PROMPTS)[:, None]
    response = np.arange(T) < np.array(RESPONSES)[:, None]
    token_mask = np.concatenate([prompt, response], axis=1)
    return Sequences(*map(jnp.asarray, (tokens, token_mask, response)))


def numpy_weights(config, params, tokens, prompt, response):
    """One row without padding: loops over heads, queries and keys of the response."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    positions, segments = np.arange(prompt + response), np.ones(prompt + response, int)
    x = params["embed"]["embedding"][tokens] * config.embed_scale
    for i in range(config.num_layers - 1):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x = reference.block(config, layer, x, positions, segments)
    last = jax.tree.map(lambda leaf: leaf[-1], params["layers"])
    h = reference.rms_norm(config, last["attention_norm"]["scale"], x)
    weights = np.zeros(response)
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        q = reference.project(last["attention"]["query"], h, head)
        k = reference.project(last["attention"]["key"], h, shared)
        if config.qk_norm:
            q = reference.rms_norm(config, last["attention"]["query_norm"]["scale"], q)
            k = reference.rms_norm(config, last["attention"]["key_norm"]["scale"], k)
        q, k = (reference.rope(config, z, positions)[prompt:] for z in (q, k))
        for i in range(response):
            seen = reference.visible(config, segments[prompt:], i)
            scores = np.exp(k[seen] @ q[i] / math.sqrt(config.head_dim))
            weights[seen] += scores / scores.sum() / response / config.num_heads
    return weights


@pytest.mark.parametrize("config", [LLAMA, QWEN, GEMMA], ids=["llama", "qwen", "gemma"])
def test_weights_equal_the_reference_and_sum_to_one(config):
    params, batch = random_params(config), sequences()
    model = Decoder(dataclasses.replace(config, dtype="float64"))
    if config is QWEN:  # compiled with the gradient, for the test of that
        found = np.asarray(gradient_and_weights(model, params, batch)[1])
    else:
        found = np.asarray(WEIGHTS(model, params, batch))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        tokens = np.asarray(batch.tokens)[row, P - prompt : P + response]
        expected = np.zeros(T)
        expected[:response] = numpy_weights(config, params, tokens, prompt, response)
        np.testing.assert_allclose(found[row], expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.sum(-1), [1.0, 1.0, 0.0], rtol=1e-12)


def test_uniform_attention_hides_the_last_token():
    """V4: the first weighs H_n / n, the last 1 / n^2."""
    params, batch = random_params(LLAMA), sequences()
    query = params["layers"]["attention"]["query"]
    query["kernel"] = np.zeros_like(query["kernel"])
    model = Decoder(dataclasses.replace(LLAMA, dtype="float64"))
    found = np.asarray(WEIGHTS(model, params, batch))
    for row, n in ((0, 5), (1, 3)):
        harmonic = sum(1 / i for i in range(1, n + 1))
        assert found[row, 0] == pytest.approx(harmonic / n, rel=1e-12)
        assert found[row, n - 1] == pytest.approx(1 / n**2, rel=1e-12)


def test_gradient_reaches_queries_keys_and_the_layers_below_alone():
    params, batch = random_params(QWEN), sequences()
    model = Decoder(dataclasses.replace(QWEN, dtype="float64"))
    gradient, _ = gradient_and_weights(model, params, batch)
    layers = gradient["layers"]
    for name, reached in (("query", True), ("key", True), ("value", False)):
        assert np.asarray(layers["attention"][name]["kernel"][-1]).any() == reached
    assert not np.asarray(layers["mlp"]["up"]["kernel"][-1]).any()
    assert not np.asarray(gradient["final_norm"]["scale"]).any()
    assert np.asarray(layers["attention_norm"]["scale"][-1]).any()
    assert np.asarray(layers["mlp"]["up"]["kernel"][0]).any()


def test_one_layer_is_refused():
    config = dataclasses.replace(LLAMA, num_layers=1)
    with pytest.raises(ValueError, match="two layers"):
        response_attention(Decoder(config), random_params(config), sequences())
