"""The kernels of attention against the plain one, alone and inside the decoder."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from rkd_jax.models import attention_kernels
from rkd_jax.models.attention import (
    attention_bias,
    causal_attention,
    grouped_attention,
)
from rkd_jax.models.attention_kernels import (
    KERNELS,
    choose,
    cudnn_attention,
    dot_product_attention,
    splash_attention,
)
from rkd_jax.models.decoder import Decoder
from rkd_jax.objectives.sft import make_sft
from rkd_jax.sharding import MeshConfig, batch_sharding, make_mesh
from rkd_jax.training.optim import OptimConfig, make_optimizer
from rkd_jax.training.state import init_state
from rkd_jax.training.update import make_update
from rkd_jax.types import DemonstrationBatch, Sequences
from tests.models.reference import LLAMA, QWEN, random_params

L = 20
SEGMENTS = np.array([[0] * 3 + [1] * 12 + [2] * 4 + [0], [1] * 9 + [2] * 11], np.int32)
REAL = SEGMENTS != 0
interpreted = functools.partial(splash_attention, interpret=True)
as_cudnn = functools.partial(cudnn_attention, implementation="xla")


def heads():
    generator = np.random.default_rng(0)
    shapes = [(2, L, count, 8) for count in (4, 2, 2)]
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


def numpy_attention(query, key, value, segments, window):
    """float64, one query of one head at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for b, i, h in np.ndindex(query.shape[:3]):
        columns = np.arange(L)
        seen = (columns <= i) & (segments[b] == segments[b, i])
        if window is not None:
            seen &= i - columns < window
        scores = key[b, seen, h // 2] @ query[b, i, h] / 8**0.5
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ value[b, seen, h // 2]
    return out


def plain(query, key, value, segments, *, window):
    slots = jnp.arange(L, dtype=jnp.int32)
    dtype = query.dtype
    bias = attention_bias(segments, segments, slots, slots, window=window, dtype=dtype)
    return grouped_attention(query, (key,), (value,), bias)


@pytest.mark.parametrize(
    ("length", "stops"),
    [
        (64, {64}),
        (65, {33, 65}),
        (131, {44, 88, 131}),
        (256, {64, 128, 192, 256}),
        (259, {65, 130, 195, 259}),
    ],
)
def test_causal_attention_leaves_out_what_no_query_sees(length, stops):
    """One block, ragged ones and four: the plain one in value and gradient."""
    generator = np.random.default_rng(2)
    shapes = [(2, length, count, 8) for count in (4, 2, 2, 4)]
    *arrays, weight = (generator.normal(size=x).astype(np.float32) for x in shapes)
    segments = np.ones((2, length), np.int32)
    segments[0, :70], segments[1, 60:] = 0, 2
    slots = np.arange(length, dtype=np.int32)
    bias = attention_bias(
        segments, segments, slots, slots, window=50, dtype=jnp.dtype("float32")
    )

    def run(attend):
        def loss(*arrays):
            out = attend(*arrays)
            return (out * weight).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    def whole(query, key, value):
        return grouped_attention(query, (key,), (value,), bias)

    def blocks(query, key, value):
        return causal_attention(query, key, value, bias)

    (_, expected), grads = run(whole)(*arrays)
    (_, out), got = run(blocks)(*arrays)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (out, got), (expected, grads))
    # Scores [B, Hkv, G, rows, columns] end where a block does; 8 is a head's width.
    program = str(jax.make_jaxpr(blocks)(*arrays))
    widths = set(map(int, re.findall(r"f32\[2,2,2,\d+,(\d+)\]", program)))
    assert widths - {1, 8} == stops


def value_and_grad(attend, window):
    """The output, and the gradient of a function of its real rows."""
    weight = np.random.default_rng(1).normal(size=(2, L, 4, 8)).astype(np.float32)

    def loss(*arrays):
        out = attend(*arrays, jnp.asarray(SEGMENTS), window=window)
        return (out * jnp.where(REAL[:, :, None, None], weight, 0)).sum(), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, out), grads = run(*heads())
    return np.asarray(out), grads


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "attend", [dot_product_attention, interpreted], ids=["dot_product", "splash"]
)
def test_kernels_equal_numpy_and_their_gradients_the_plain_one(attend, window):
    out, grads = value_and_grad(attend, window)
    expected = numpy_attention(*heads(), SEGMENTS, window)
    np.testing.assert_allclose(out[REAL], expected[REAL], rtol=1e-5, atol=1e-5)
    assert np.isfinite(out).all()
    for got, wanted in zip(grads, value_and_grad(plain, window)[1], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend", [interpreted, as_cudnn], ids=["splash", "cudnn"])
def test_kernels_on_a_mesh_equal_those_on_one_device(attend):
    """Two key heads over a tensor axis of four are repeated."""
    arrays = heads()
    expected = attend(*arrays, SEGMENTS, window=None)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        run = jax.jit(lambda *x: attend(*x, window=None))
        got = run(*arrays, SEGMENTS)
        assert "shard_map" in str(jax.make_jaxpr(run)(*arrays, SEGMENTS))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [L, L - 1])
def test_cudnn_is_given_rows_of_even_length(length, monkeypatch):
    """As it needs to differentiate; the column more is seen by nobody."""
    lengths = []

    def seen(query, *rest, **options):
        lengths.append(query.shape[1])
        return dot_product_attention(query, *rest, **options)

    arrays = [x[:, :length] for x in heads()]
    expected = dot_product_attention(*arrays, SEGMENTS[:, :length], window=5)
    monkeypatch.setattr(attention_kernels, "dot_product_attention", seen)
    found = as_cudnn(*arrays, SEGMENTS[:, :length], window=5)
    assert lengths == [L]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(
    jax.default_backend() != "gpu",
    reason="cuDNN needs an NVIDIA GPU; JAX_PLATFORMS=cuda",
)
@pytest.mark.parametrize("window", [None, 5])
def test_cudnn_equals_the_plain_one_on_a_gpu(window):
    bfloat = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))

    def rounded(attend):
        def run(*arrays, window):
            *heads, segments = arrays
            return attend(*bfloat(heads), segments, window=window).astype(jnp.float32)

        return value_and_grad(run, window)

    out, grads = rounded(cudnn_attention)
    expected, wanted = rounded(dot_product_attention)
    np.testing.assert_allclose(out[REAL], expected[REAL], rtol=2e-2, atol=2e-2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-2, atol=5e-2),
        grads,
        wanted,
    )


def shapes_on_a_device(jaxpr) -> set:
    """Of everything that a `jax.shard_map` inside the program is given."""
    found = set()
    for eqn in jaxpr.eqns:
        for inside in jaxprs_in_params(eqn.params):
            if eqn.primitive.name == "shard_map":
                found |= {variable.aval.shape for variable in inside.invars}
            found |= shapes_on_a_device(inside)
    return found


def test_the_update_tells_the_kernel_its_mesh(monkeypatch, rng):
    monkeypatch.setitem(KERNELS, "splash", interpreted)
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    model = Decoder(dataclasses.replace(LLAMA, attention="splash"))
    params = jax.eval_shape(model.init, rng)
    optimizer = make_optimizer(OptimConfig())
    state = jax.eval_shape(
        functools.partial(init_state, student_optimizer=optimizer), params, rng=rng
    )
    update = make_update(
        make_sft(model),
        student_optimizer=optimizer,
        batch_sharding=batch_sharding(mesh),
    )
    tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    mask = jax.ShapeDtypeStruct((4, 8), bool)
    target = jax.ShapeDtypeStruct((4, 5), bool)
    rows = Sequences(tokens, mask, target)
    batch = DemonstrationBatch(rows, rows, jax.ShapeDtypeStruct((4,), jnp.int32))
    program = jax.make_jaxpr(update)(state, None, batch, None)
    shapes = {shape for shape in shapes_on_a_device(program.jaxpr) if len(shape) == 4}
    query, key = (1, 8, 3, 4), (1, 8, 1, 4)
    assert {query, key} <= shapes
    assert all(shape[0] == 1 for shape in shapes)


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "window"])
def test_the_decoder_says_the_same_with_either_implementation(config):
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(0, 37, (2, L)).astype(np.int32)

    def states_and_grads(attention):
        model = Decoder(dataclasses.replace(config, attention=attention))

        def loss(params):
            states = model.hidden(params, tokens, segment_ids=SEGMENTS)
            return jnp.sin(jnp.where(REAL[:, :, None], states, 0)).sum(), states

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, expected), plain_grads = states_and_grads("xla")
    (_, states), grads = states_and_grads("dot_product")
    assert np.isfinite(states).all()
    np.testing.assert_allclose(states[REAL], expected[REAL], rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        grads,
        plain_grads,
    )


def test_the_decoder_runs_splash_and_leaves_padding_without_influence(monkeypatch):
    monkeypatch.setitem(KERNELS, "splash", interpreted)
    params = random_params(LLAMA)
    tokens = np.random.default_rng(0).integers(0, 37, (2, L)).astype(np.int32)
    model = Decoder(dataclasses.replace(LLAMA, attention="splash", remat="dots"))
    run = jax.jit(model.hidden)
    states = run(params, tokens, segment_ids=SEGMENTS)
    expected = Decoder(LLAMA).hidden(params, tokens, segment_ids=SEGMENTS)
    np.testing.assert_allclose(states[REAL], expected[REAL], rtol=1e-4, atol=1e-5)
    garbage = np.where(REAL, tokens, 36).astype(np.int32)
    again = run(params, garbage, segment_ids=SEGMENTS)
    np.testing.assert_array_equal(again, states)


def test_decoding_with_a_cache_is_plain_whatever_is_named():
    params = random_params(LLAMA)
    tokens = np.arange(6, dtype=np.int32)[None]
    outs = []
    for attention in ("xla", "splash"):
        model = Decoder(dataclasses.replace(LLAMA, attention=attention))
        cache = model.init_cache(params, 1, 8)
        outs.append(model.hidden(params, tokens, cache=cache)[0])
    np.testing.assert_array_equal(*outs)


def test_auto_is_splash_on_a_tpu_where_it_is_legal_and_the_row_long(monkeypatch):
    named = dataclasses.replace(LLAMA, attention="cudnn", dtype="bfloat16")
    assert choose(LLAMA, 256, has_cache=False) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose(LLAMA, 256, has_cache=False) == "xla"  # eight devices, no mesh
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        assert choose(LLAMA, 256, has_cache=False) == "splash"
        assert choose(LLAMA, 127, has_cache=False) == "xla"
        assert choose(LLAMA, 256, has_cache=True) == "xla"
        assert choose(named, 256, has_cache=False) == "cudnn"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose(LLAMA, 256, has_cache=False) == "splash"


def test_auto_is_cudnn_on_gpus_that_have_kernels_for_it(monkeypatch):
    def here(capability):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda: [device])

    half = dataclasses.replace(LLAMA, dtype="bfloat16", head_dim=64)
    mesh = make_mesh(MeshConfig(data=8))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    here("9.0")
    assert choose(half, 256, has_cache=False) == "xla"  # eight devices, no mesh
    with jax.set_mesh(mesh):
        assert choose(half, 256, has_cache=False) == "cudnn"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose(half, 33, has_cache=False) == "cudnn"
    assert choose(half, 256, has_cache=True) == "xla"
    for other in ({"dtype": "float32"}, {"head_dim": 68}, {"head_dim": 256}):
        config = dataclasses.replace(half, **other)
        assert choose(config, 256, has_cache=False) == "xla", other
    for capability, name in (("12.0", "cudnn"), ("7.5", "xla"), ("gfx942", "xla")):
        here(capability)
        assert choose(half, 256, has_cache=False) == name, capability


def test_parameters_are_drawn_without_the_kernel_of_another_platform(rng):
    model = Decoder(dataclasses.replace(LLAMA, attention="splash", num_layers=1))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(model.init(rng)))


def test_wrong_choices_name_the_field():
    with pytest.raises(ValueError, match="attention='flash' is not one of"):
        dataclasses.replace(LLAMA, attention="flash")
    with pytest.raises(ValueError, match="not in dtype='float32'"):
        dataclasses.replace(LLAMA, attention="cudnn")
