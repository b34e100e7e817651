"""Decoding with the layers apart: the decoder's own numbers, and only on CPUs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.decoder import Decoder
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.types import Prompts
from tests.models.reference import GEMMA, LLAMA, QWEN, random_params

L = 9
TOKENS = np.random.default_rng(0).integers(0, 37, (2, L)).astype(np.int32)
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
POSITIONS = np.maximum(np.cumsum(SEGMENTS, axis=1) - 1, 0).astype(np.int32)


@pytest.mark.parametrize("config", [QWEN, GEMMA], ids=["qwen", "gemma"])
def test_columns_one_by_one_equal_the_decoder(config):
    model, params = Decoder(config), random_params(config)
    segments = SEGMENTS.astype(np.int32)

    @jax.jit
    def compare(params):
        def extend(model, params, cache, start, stop):
            columns = np.s_[:, start:stop]
            return model.hidden(
                params,
                TOKENS[columns],
                positions=POSITIONS[columns],
                segment_ids=segments[columns],
                cache=cache,
            )

        cache = model.init_cache(params, 2, L + 3)
        _, cache = extend(model, params, cache, 0, 4)
        other, layers, caches = model.unrolled(params, cache, L + 3)
        pairs = []
        for start, stop in ((4, 5), (5, 7), (7, 8), (8, 9)):
            stacked, cache = extend(model, params, cache, start, stop)
            apart, caches = extend(other, layers, caches, start, stop)
            real = segments[:, start:stop, None] != 0
            pairs.append([jnp.where(real, x, 0.0) for x in (stacked, apart)])
        return pairs, cache, caches, other.unembed(layers, apart[:, -1])

    pairs, cache, caches, logits = compare(params)
    for stacked, apart in pairs:
        np.testing.assert_allclose(apart, stacked, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(caches.segment_ids, cache.segment_ids)
    assert int(caches.index) == int(cache.index) == L
    real = np.asarray(cache.segment_ids) != 0
    for name, order in (("keys", (0, 3, 1, 2)), ("values", (0, 2, 1, 3))):
        apart = np.stack([np.transpose(x, order) for x in getattr(caches, name)])
        stacked = np.asarray(getattr(cache, name))
        np.testing.assert_allclose(apart[:, real], stacked[:, real], atol=1e-5)
    own = model.unembed(params, pairs[-1][0][:1, -1])
    np.testing.assert_allclose(logits[:1], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
@pytest.mark.parametrize("config", [QWEN, GEMMA, LLAMA], ids=["qwen", "gemma", "llama"])
def test_logits_of_any_number_of_rows_equal_the_decoder(config, rows):
    model, params = Decoder(config), random_params(config)
    states = np.random.default_rng(1).normal(size=(rows, config.hidden_size))
    states = states.astype(np.float32)
    apart, layers, _ = model.unrolled(params, model.init_cache(params, 2, L), L)
    unembed = jax.jit(apart.unembed)
    expected = model.unembed(params, states)
    np.testing.assert_allclose(unembed(layers, states), expected, rtol=1e-5, atol=1e-5)
    program = unembed.lower(layers, states).as_text()
    few = config.tie_embeddings and rows in (2, 64)
    assert ("optimization_barrier" in program) == few


def test_logits_of_halves_are_summed_wide():
    config = dataclasses.replace(GEMMA, dtype="bfloat16", param_dtype="bfloat16")
    model, params = Decoder(config), random_params(config)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    apart, layers, _ = model.unrolled(params, model.init_cache(params, 2, L), L)
    states = jnp.asarray(
        np.random.default_rng(1).normal(size=(4, config.hidden_size)), jnp.bfloat16
    )
    logits = jax.jit(apart.unembed)(layers, states)
    assert logits.dtype == jnp.float32
    exact = np.asarray(states, "f4") @ np.asarray(params["embed"]["embedding"], "f4").T
    exact = np.tanh(exact / config.logit_softcap) * config.logit_softcap
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


def test_stale_slots_are_not_seen():
    """A cache whose index was set back, as a decode loop's never is."""
    model, params = Decoder(LLAMA), random_params(LLAMA)
    others = {
        "positions": np.full((2, 1), 6, np.int32),
        "segment_ids": np.ones((2, 1), np.int32),
    }

    @jax.jit
    def compare(params):
        _, cache = model.hidden(params, TOKENS, cache=model.init_cache(params, 2, L))
        rewound = dataclasses.replace(cache, index=jnp.int32(6))
        apart, layers, caches = model.unrolled(params, rewound, L)
        again = apart.hidden(layers, TOKENS[:, :1], cache=caches, **others)
        return model.hidden(params, TOKENS[:, :1], cache=rewound, **others)[0], again[0]

    stacked, apart = compare(params)
    np.testing.assert_allclose(apart, stacked, rtol=1e-5, atol=1e-5)


def test_programs_for_cpus_and_gpus_have_the_layers_apart_and_for_tpus_not():
    model = Decoder(LLAMA)
    params = jax.eval_shape(model.init, jax.random.key(0))
    sample = make_sampler(model, SamplingConfig(5))
    prompts = Prompts(TOKENS[:, :6], np.ones((2, 6), bool))
    traced = jax.jit(lambda p, k: sample(p, prompts, k)).trace(
        params, jax.eval_shape(lambda: jax.random.key(0))
    )
    apart, stacked = "tensor<2x2x11x4xf32>", "tensor<3x2x11x2x4xf32>"
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert apart in texts["cpu"]
    assert apart in texts["cuda"]
    assert apart not in texts["tpu"]
    assert stacked in texts["tpu"]
