"""What a block keeps for its backward pass: the same numbers, less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.aot.flops import matmul_flops
from rkd_jax.losses import token_log_probs
from rkd_jax.masking import masked_mean
from rkd_jax.models.decoder import Decoder, DecoderConfig
from tests.models.reference import LLAMA, QWEN, random_params

POLICIES = ("none", "attention", "dots", "full")
TOY = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=96,
    num_layers=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=128,
)


def step(config, batch=2, length=10):
    """The jitted value and gradient of a loss, and its arguments."""
    model = Decoder(config)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, config.vocab_size, (batch, length + 1))
    tokens = tokens.astype(np.int32)
    mask = np.ones((batch, length), bool)
    mask[0, length // 2 :] = False

    def loss(params):
        logits = model.logits(params, tokens[:, :-1])
        return masked_mean(-token_log_probs(logits, tokens[:, 1:]), jnp.asarray(mask))

    return jax.jit(jax.value_and_grad(loss))


def test_every_policy_gives_the_same_loss_and_gradient(x64):
    params = random_params(QWEN)

    def run(policy):
        changed = dataclasses.replace(QWEN, dtype="float64", remat=policy)
        return step(changed)(jax.tree.map(np.float64, params))

    plain = run("none")
    assert all(np.any(x) for x in jax.tree.leaves(plain))
    for policy in POLICIES[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
            run(policy),
            plain,
        )


@pytest.fixture
def optimising_compiler():
    """The compiler of a run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_every_policy_takes_less_memory_than_the_one_before(optimising_compiler):
    params = jax.eval_shape(Decoder(TOY).init, jax.random.key(0))

    def temporaries(policy):
        run = step(dataclasses.replace(TOY, remat=policy), batch=4, length=64)
        return run.lower(params).compile().memory_analysis().temp_size_in_bytes

    none, attention, dots, full = map(temporaries, POLICIES)
    assert full < dots < attention < none


def test_what_is_computed_again_is_what_the_policy_says():
    def products(policy):
        run = step(dataclasses.replace(TOY, remat=policy))
        params = jax.eval_shape(Decoder(TOY).init, jax.random.key(0))
        return str(jax.make_jaxpr(run)(params)).count("dot_general")

    head, attention, projections = 3, 2, 7
    none = head + 3 * (attention + projections)  # forward, and both sides backward
    assert products("none") == none
    # The scores; what probabilities do to values is needed by nobody.
    assert products("attention") == none + 1
    # Both, for the weights of the output projection.
    assert products("dots") == none + attention
    # All but the last projection of a block.
    assert products("full") == none + attention + projections - 1


def test_scores_of_the_library_attention_are_computed_again_too():
    params = jax.eval_shape(Decoder(TOY).init, jax.random.key(0))

    def products(policy):
        config = dataclasses.replace(TOY, remat=policy, attention="dot_product")
        return str(jax.make_jaxpr(step(config))(params)).count("dot_general")

    assert products("attention") == products("none") + 1


def test_a_kernel_runs_forward_once_unless_nothing_is_kept():
    params = jax.eval_shape(Decoder(TOY).init, jax.random.key(0))

    def products(policy):
        config = dataclasses.replace(TOY, remat=policy, attention="splash")
        run = step(config, length=TOY.max_length)
        return matmul_flops(jax.make_jaxpr(run)(params).jaxpr, devices=1)

    once = products("none")
    assert products("attention") == products("dots") == once
    assert products("full") > once


def test_a_deep_model_compiles_to_a_program_as_long_as_a_shallow_one():
    def instructions(layers):
        config = dataclasses.replace(TOY, num_layers=layers, remat="dots")
        params = jax.eval_shape(Decoder(config).init, jax.random.key(0))
        text = step(config).lower(params).compile().as_text()
        return sum(" = " in line for line in text.splitlines())

    assert instructions(6) == instructions(24)


def test_bfloat16_compute_with_float32_masters_stays_near_float32():
    params = random_params(LLAMA)
    loss, grads = step(LLAMA)(params)
    narrow = dataclasses.replace(LLAMA, dtype="bfloat16", param_dtype="float32")
    rounded, rounded_grads = step(narrow)(params)
    assert rounded.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(rounded_grads)} == {jnp.dtype("float32")}
    # 8 bits in each of three layers.
    assert float(rounded) == pytest.approx(float(loss), rel=0.02)
    flat, rounded_flat = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (grads, rounded_grads)
    )
    cosine = flat @ rounded_flat / np.linalg.norm(flat) / np.linalg.norm(rounded_flat)
    assert cosine > 0.99


def test_an_unknown_policy_names_the_field():
    with pytest.raises(ValueError, match="remat=True is not one of"):
        dataclasses.replace(LLAMA, remat=True)
