"""The decoder against an independent float64 numpy model, and its invariances."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rkd_jax.models.api import positions_from_mask
from rkd_jax.models.attention import (
    attention_bias,
    grouped_attention,
    slot_attention,
)
from rkd_jax.models.decoder import Decoder, DecoderConfig, RopeScaling
from rkd_jax.models.projection import project
from rkd_jax.models.rope import rope_frequencies, rope_table, rotate
from rkd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from tests.models import reference
from tests.models.reference import GEMMA, LLAMA, QWEN, random_params

L = 10
HIDDEN = jax.jit(Decoder.hidden, static_argnums=0)
LOGITS = jax.jit(Decoder.logits, static_argnums=0)
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 37, (2, L)).astype(np.int32)


@pytest.mark.parametrize("config", [LLAMA, QWEN, GEMMA], ids=["llama", "qwen", "gemma"])
def test_logits_equal_the_float64_reference(config, tokens, x64):
    params = random_params(config)
    positions = np.array([np.arange(L) - 2, np.arange(L)]).clip(0)
    wide = dataclasses.replace(config, dtype="float64")
    segments = SEGMENTS.astype(np.int32)
    got = LOGITS(
        Decoder(wide), params, tokens, positions=positions, segment_ids=segments
    )
    expected = reference.logits(config, params, tokens, positions, SEGMENTS)
    real = SEGMENTS != 0
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-9, atol=1e-9)


def test_float32_logits_are_close_to_the_float64_reference(tokens):
    params = random_params(LLAMA)
    got = LOGITS(Decoder(LLAMA), params, tokens)
    columns = np.tile(np.arange(L), (2, 1))
    ones = np.ones((2, L), int)
    expected = reference.logits(LLAMA, params, tokens, columns, ones)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def embedding_jacobian(config, params, segment_ids):
    """Derivative of a projection of each state, [L, V, D]; column j holds token j+1."""
    tokens = jnp.arange(1, L + 1, dtype=jnp.int32)[None]

    def outputs(table):
        moved = {**params, "embed": {"embedding": table}}
        hidden = Decoder(config).hidden(moved, tokens, segment_ids=segment_ids[None])
        return hidden[0] @ jnp.arange(1.0, config.hidden_size + 1)

    return jax.jacrev(outputs)(params["embed"]["embedding"])


def influence(config, segments):
    """bool[L, L + 1]: does output column i depend on the token of column j?

    The last entry is token 0, which stands in for whatever a padding column holds.
    """
    params = random_params(config)
    jacobian = embedding_jacobian(config, params, segments.astype(np.int32))
    touched = np.abs(np.asarray(jacobian)).max(-1) > 0
    return np.concatenate([touched[:, 1 : L + 1], touched[:, :1]], axis=1)


def test_no_column_depends_on_a_later_one():
    lower = np.tril(np.ones((L, L), bool))
    got = influence(LLAMA, np.ones(L, int))
    np.testing.assert_array_equal(got[:, :L], lower)


def test_segments_and_padding_do_not_see_each_other():
    segments = np.array([0, 0, 1, 1, 1, 2, 2, 2, 0, 0])
    i, j = np.indices((L, L))
    expected = (j <= i) & (segments[i] == segments[j])
    real = segments != 0
    got = influence(LLAMA, segments)
    np.testing.assert_array_equal(got[real, :L], expected[real])
    assert not got[real, L].any()


def test_sliding_window_shows_as_many_keys_as_its_size_itself_included():
    one_layer = dataclasses.replace(LLAMA, num_layers=1, sliding_window=3)
    got = influence(one_layer, np.ones(L, int))[:, :L]
    np.testing.assert_array_equal(got.sum(1), np.minimum(np.arange(L) + 1, 3))
    assert got.diagonal().all()


@pytest.mark.parametrize(
    ("config", "explicit"), [(LLAMA, False), (QWEN, True)], ids=["llama", "window"]
)
def test_decoding_with_a_cache_equals_one_forward(config, explicit, tokens):
    model, params = Decoder(config), random_params(config)
    segments = np.ones((2, L), np.int32)
    segments[0, :3] = 0
    # Rotary scores hold differences only, so counting columns must do as well.
    positions = np.asarray(positions_from_mask(segments)) if explicit else None
    full = HIDDEN(model, params, tokens, positions=positions, segment_ids=segments)

    def extend(cache, start, stop):
        columns = np.s_[:, start:stop]
        return HIDDEN(
            model,
            params,
            tokens[columns],
            positions=positions[columns] if explicit else None,
            segment_ids=segments[columns],
            cache=cache,
        )

    parts, cache = [], model.init_cache(params, 2, L + 3)
    for start, stop in [(0, 4), (4, 8), (8, 9), (9, 10)]:
        out, cache = extend(cache, start, stop)
        parts.append(out)
    got = np.concatenate(parts, axis=1)
    real = segments != 0
    np.testing.assert_allclose(got[real], full[real], rtol=1e-5, atol=1e-5)
    assert int(cache.index) == L
    np.testing.assert_array_equal(cache.segment_ids[:, :L], segments)
    np.testing.assert_array_equal(cache.segment_ids[:, L:], 0)

    # Rewound, the slots from the index on are stale and must not be seen.
    again, _ = extend(dataclasses.replace(cache, index=jnp.int32(8)), 8, 9)
    np.testing.assert_allclose(again, parts[2], rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_on_either_side_whatever_it_holds(tokens):
    model, params = Decoder(LLAMA), random_params(LLAMA)
    plain = HIDDEN(model, params, tokens)
    for left, garbage in [(0, 0), (4, 5), (2, -1), (4, 10**6)]:
        padded = np.full((2, L + 4), garbage, np.int32)
        segments = np.zeros((2, L + 4), np.int32)
        padded[:, left : left + L] = tokens
        segments[:, left : left + L] = 1
        positions = positions_from_mask(segments)
        got = HIDDEN(model, params, padded, positions=positions, segment_ids=segments)
        assert np.isfinite(got).all()
        inside = got[:, left : left + L]
        np.testing.assert_allclose(inside, plain, rtol=1e-5, atol=1e-5)


def test_an_id_outside_the_vocabulary_is_loud_in_its_row_only(tokens):
    model, params = Decoder(LLAMA), random_params(LLAMA)
    foreign = tokens.copy()
    foreign[0, 3] = LLAMA.vocab_size
    hidden = HIDDEN(model, params, foreign)
    assert np.isnan(hidden[0, 3:]).all()
    np.testing.assert_array_equal(hidden[1], HIDDEN(model, params, tokens)[1])


def test_bfloat16_compute_keeps_float32_parameters_logits_and_gradients(tokens):
    config = dataclasses.replace(QWEN, dtype="bfloat16")
    model, params = Decoder(config), random_params(QWEN)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        hidden = model.hidden(params, tokens)
        logits = model.unembed(params, hidden)
        return logits.mean(), (hidden, logits)

    grads, (hidden, got) = gradient(params)
    assert hidden.dtype == jnp.bfloat16
    assert got.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    head = np.asarray(params["head"]["kernel"].astype(jnp.bfloat16), np.float64)
    expected = np.asarray(hidden, np.float64) @ head
    # Rounding the products or the sum to bfloat16 would leave errors of 1e-2.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    full = LOGITS(Decoder(QWEN), params, tokens)
    # Two layers in bfloat16 (8 bits) on logits of size about 3.
    np.testing.assert_allclose(got, full, atol=0.15)


def test_projection_gradient_is_accumulated_in_the_dtype_of_the_kernel():
    generator = np.random.default_rng(1)
    x = jnp.asarray(generator.normal(size=(3, 50, 4)), jnp.bfloat16)
    ct = jnp.asarray(generator.normal(size=(3, 50, 5)), jnp.bfloat16)
    kernel = jnp.asarray(generator.normal(size=(4, 5)), jnp.float32)
    _, pullback = jax.vjp(project, x, kernel)
    to_x, to_kernel = pullback(ct)
    wide_x, wide_ct = np.asarray(x, np.float64), np.asarray(ct, np.float64)
    expected = np.einsum("blm,bln->mn", wide_x, wide_ct)
    assert (to_x.dtype, to_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(to_kernel, expected, rtol=1e-5, atol=1e-5)


def test_projection_gradient_is_right_for_several_inner_and_outer_axes(x64):
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=(2, 3, 4)), generator.normal(size=(3, 4, 5, 2))
    expected = np.einsum("bmn,mnop->bop", x, kernel)
    np.testing.assert_allclose(project(x, kernel, 2), expected, rtol=1e-12)
    check_grads(lambda a, b: jnp.sin(project(a, b, 2)), (x, kernel), 1, modes=["rev"])


def test_rotary_scores_depend_on_the_distance_only(x64):
    frequencies = rope_frequencies(8, 1e4)
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8))

    def score(i, j):
        i, j = (
            rope_table(jnp.array([[n]]), frequencies, jnp.dtype("float64"))
            for n in (i, j)
        )
        return float((rotate(query, *i) * rotate(key, *j)).sum())

    assert score(17, 12) == pytest.approx(score(5, 0), rel=1e-10)
    assert score(9, 9) == pytest.approx(float((query * key).sum()), rel=1e-10)
    assert abs(score(5, 0) - score(6, 0)) > 1e-3


def test_llama3_scaling_equals_the_published_branches():
    # Llama 3.1: heads of 128 reach all three branches.
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(
        LLAMA, head_dim=128, rope_theta=5e5, rope_scaling=scaling
    )
    got = rope_frequencies(128, 5e5, scaling)
    np.testing.assert_allclose(got, reference.frequencies(config), rtol=1e-12)
    plain = rope_frequencies(128, 5e5)
    assert got[0] == plain[0]
    assert got[-1] == pytest.approx(plain[-1] / 8, rel=1e-12)


def test_grouped_attention_equals_repeated_heads_and_splits_into_parts(x64):
    generator = np.random.default_rng(0)
    query = generator.normal(size=(2, 5, 6, 4))
    key, value = generator.normal(size=(2, 2, 5, 3, 4))
    segments, slots = np.ones((2, 5), np.int32), np.arange(5)
    bias = attention_bias(
        segments, segments, slots, slots, window=None, dtype=jnp.dtype("float64")
    )
    got = grouped_attention(query, (key,), (value,), bias)
    scores = np.einsum("bqhd,bshd->bhqs", query, key.repeat(2, axis=2)) / 2
    weights = np.exp(scores) * np.tril(np.ones((5, 5)))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqs,bshd->bqhd", weights, value.repeat(2, axis=2))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    parts = [(x[:, :2], x[:, 2:]) for x in (key, value)]
    np.testing.assert_allclose(grouped_attention(query, *parts, bias), got, rtol=1e-12)
    slots = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    np.testing.assert_allclose(slot_attention(query, *slots, bias), got, rtol=1e-12)


def test_the_traced_program_does_not_grow_with_depth(tokens):
    def size(layers):
        model = Decoder(dataclasses.replace(LLAMA, num_layers=layers))
        params = jax.eval_shape(model.init, jax.random.key(0))
        loss = jax.grad(lambda p: model.logits(p, tokens).sum())
        return len(str(jax.make_jaxpr(loss)(params)).splitlines())

    assert size(2) == size(4)


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen"])
def test_logical_axes_name_every_axis_of_every_parameter(config):
    model = Decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    axes = model.logical_axes()
    sizes = {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
    }
    named = jax.tree.map(
        lambda names: tuple(sizes[n] for n in names),
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert named == jax.tree.map(lambda x: x.shape, shapes)


def test_a_sharded_forward_equals_the_unsharded_one(tokens):
    config = dataclasses.replace(LLAMA, vocab_size=38)
    model, params = Decoder(config), random_params(config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = tree_shardings(model.logical_axes(), mesh, shapes=params)
    got = jax.jit(model.logits)(jax.device_put(params, shardings), tokens)
    np.testing.assert_allclose(got, model.logits(params, tokens), rtol=1e-5, atol=1e-5)


def test_parameter_count_is_that_of_the_published_model():
    config = DecoderConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_length=8192,
    )
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == 134_515_008  # SmolLM2-135M
    untied = dataclasses.replace(config, tie_embeddings=False)
    shapes = jax.eval_shape(Decoder(untied).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 134_515_008 + 576 * 49_152


def test_initial_kernels_are_drawn_per_layer_with_the_stated_variance():
    params = Decoder(LLAMA).init(jax.random.key(3))
    kernel = np.asarray(params["layers"]["mlp"]["gate"]["kernel"])
    assert kernel.std() * 24**0.5 == pytest.approx(1.0, abs=0.1)
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.2
    output = np.asarray(params["layers"]["attention"]["output"]["kernel"])
    # Two branches in each of three layers, fan-in 6 heads x 4.
    assert output.std() * (24 * 6) ** 0.5 == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"num_layers": 0}, "num_layers=0 must be positive"),
        ({"sliding_window": 0}, "sliding_window=0 must be positive"),
        ({"activation": "relu"}, "activation='relu' is not one of"),
        ({"dtype": "bf16"}, "dtype='bf16' is not one of"),
    ],
)
def test_a_wrong_configuration_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


def test_wrong_rope_scaling_names_the_field():
    with pytest.raises(ValueError, match="low_freq_factor=4.0 must be below"):
        RopeScaling(8.0, 4.0, 1.0, 8192)
    with pytest.raises(ValueError, match="factor=0.0"):
        RopeScaling(0.0, 1.0, 4.0, 8192)


def test_more_columns_than_the_context_or_the_cache_are_refused(tokens):
    model = Decoder(dataclasses.replace(LLAMA, max_length=8))
    params = random_params(LLAMA)
    with pytest.raises(ValueError, match=r"10 token columns .* \(max_length\) of 8"):
        model.hidden(params, tokens)
    with pytest.raises(ValueError, match="9 token columns"):
        model.init_cache(None, 2, 9)
    with pytest.raises(ValueError, match="6 token columns exceed the cache of 5"):
        model.hidden(params, tokens[:, :6], cache=model.init_cache(None, 2, 5))
