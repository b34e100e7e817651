"""Students cut from teachers equal models cut by hand; the vocabulary rule."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.decoder import Decoder
from rkd_jax.models.surgery import (
    align_vocab,
    crop_vocab,
    greedy_depth_prune,
    keep_layers,
    mlp_importance,
    pad_vocab,
    slice_width,
)
from rkd_jax.types import Sequences
from tests.models import reference
from tests.models.reference import LLAMA, QWEN, random_params

CONFIG = dataclasses.replace(LLAMA, num_layers=4, intermediate_size=6)
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 7)).astype(np.int32)
LOGITS = jax.jit(Decoder.logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def batches():
    mask = np.array([[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 0]]], bool)
    generator = np.random.default_rng(1)
    return [
        Sequences(
            tokens=generator.integers(0, 37, (2, 7)).astype(np.int32),
            token_mask=np.concatenate([np.ones((2, 3), bool), rows], axis=1),
            response_mask=rows,
        )
        for rows in mask
    ]


def float64_loss(config, params, batches):
    """Mean negative log-prob of the response tokens, by the numpy decoder."""
    total, count = 0.0, 0
    for batch in batches:
        columns = np.tile(np.arange(7), (2, 1))
        segments = batch.token_mask.astype(int)
        logits = reference.logits(config, params, batch.tokens, columns, segments)
        logits = logits[:, 2:-1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, t in np.argwhere(batch.response_mask):
            total -= log_probs[row, t, batch.targets[row, t]]
            count += 1
    return total / count


def buffers(params):
    return {id(x) for x in jax.tree.leaves(params)}


def test_keeping_all_layers_is_the_identity_on_new_buffers(params):
    params = jax.tree.map(jnp.asarray, params)
    config, same = keep_layers(CONFIG, params, range(4))
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, same, params)
    jax.tree.map(lambda x: x.delete(), params)
    assert np.isfinite(LOGITS(Decoder(config), same, TOKENS)).all()


def test_kept_layers_run_in_the_given_order(params):
    config, kept = keep_layers(CONFIG, params, (3, 1))
    got = LOGITS(Decoder(config), kept, TOKENS)
    columns, ones = np.tile(np.arange(7), (2, 1)), np.ones((2, 7), int)
    by_hand = {**params, "layers": jax.tree.map(lambda x: x[[3, 1]], params["layers"])}
    expected = reference.logits(config, by_hand, TOKENS, columns, ones)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_greedy_pruning_removes_what_brute_force_removes(params, batches):
    model = Decoder(CONFIG)
    result = greedy_depth_prune(model, params, batches, keep=2)
    alive, order, losses = [0, 1, 2, 3], [], [float64_loss(CONFIG, params, batches)]
    for _ in range(2):
        trials = {}
        for layer in alive:
            rest = [i for i in alive if i != layer]
            layers = jax.tree.map(lambda x, rest=rest: x[rest], params["layers"])
            config = dataclasses.replace(CONFIG, num_layers=len(rest))
            trials[layer] = float64_loss(config, {**params, "layers": layers}, batches)
        best = min(trials, key=trials.get)
        alive.remove(best)
        order.append(best)
        losses.append(trials[best])
    assert result.removed == tuple(order)
    assert result.kept == tuple(alive)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    _, by_hand = keep_layers(CONFIG, params, alive)
    jax.tree.map(np.testing.assert_array_equal, result.params, by_hand)
    assert result.config.num_layers == 2


def test_greedy_pruning_compiles_once(params, batches):
    model = Decoder(dataclasses.replace(CONFIG, norm_eps=2e-5))
    with jax.log_compiles(), CountCompiles("_gated_nll") as compiled:
        greedy_depth_prune(model, params, batches, keep=1)
    assert compiled.count == 1


class CountCompiles(logging.Handler):
    """Counts compilations of one jitted function by jax's own log."""

    def __init__(self, name):
        super().__init__()
        self.name_of_function, self.count = name, 0

    def emit(self, record):
        message = record.getMessage()
        self.count += (
            message.startswith("Compiling") and self.name_of_function in message
        )

    def __enter__(self):
        self.logger = logging.getLogger("jax")
        self.propagate, self.logger.propagate = self.logger.propagate, False
        self.logger.addHandler(self)
        return self

    def __exit__(self, *exc):
        self.logger.removeHandler(self)
        self.logger.propagate = self.propagate


def test_importance_is_the_squared_derivative_of_the_loss(params, batches):
    got = np.asarray(mlp_importance(Decoder(CONFIG), params, batches))
    assert got.shape == (4, 6)
    step = 1e-5
    for layer, unit in [(0, 2), (3, 5)]:
        slopes = []
        for batch in batches:
            ends = []
            for factor in (1 + step, 1 - step):
                moved = jax.tree.map(lambda x: np.array(x, np.float64), params)
                moved["layers"]["mlp"]["down"]["kernel"][layer, unit] *= factor
                count = batch.response_mask.sum()
                ends.append(float64_loss(CONFIG, moved, [batch]) * count)
            slopes.append((ends[0] - ends[1]) / (2 * step))
        expected = sum(s**2 for s in slopes)
        assert got[layer, unit] == pytest.approx(expected, rel=1e-3)


def test_slicing_keeps_the_most_important_units_in_order(params):
    importance = np.random.default_rng(0).permuted(
        np.tile(np.arange(6.0), (4, 1)), axis=1
    )
    config, sliced = slice_width(CONFIG, params, 4, importance=jnp.asarray(importance))
    assert config.intermediate_size == 4
    old, new = params["layers"]["mlp"], sliced["layers"]["mlp"]
    for layer in range(4):
        keep = [f for f in range(6) if importance[layer, f] >= 2]
        for name in ("gate", "up"):
            np.testing.assert_array_equal(
                new[name]["kernel"][layer], old[name]["kernel"][layer][:, keep]
            )
        np.testing.assert_array_equal(
            new["down"]["kernel"][layer], old["down"]["kernel"][layer][keep]
        )


def test_slicing_by_weight_drops_dead_units_without_changing_the_model(params):
    dead = jax.tree.map(np.array, params)
    for layer, (name, axis) in enumerate(
        [("gate", 1), ("up", 1), ("down", 0), ("up", 1)]
    ):
        kernel = dead["layers"]["mlp"][name]["kernel"][layer]
        np.moveaxis(kernel, axis, 0)[[layer, layer + 2]] = 0
    config, sliced = slice_width(CONFIG, dead, 4)
    got = LOGITS(Decoder(config), sliced, TOKENS)
    expected = LOGITS(Decoder(CONFIG), dead, TOKENS)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_r01_heads_of_different_width_are_cut_to_the_real_tokens(caplog):
    student, teacher = np.random.default_rng(0).normal(size=(2, 3, 16))
    student = student[:, :13]
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            cut = align_vocab(student, teacher, token_count=11)
    np.testing.assert_array_equal(cut[0], student[:, :11])
    np.testing.assert_array_equal(cut[1], teacher[:, :11])
    messages = [r.getMessage() for r in caplog.records if "softmax" in r.getMessage()]
    assert len(messages) == 1
    assert "13" in messages[0]
    assert "16" in messages[0]


def test_r02_a_padded_id_receives_neither_probability_nor_gradient():
    student, teacher = jnp.zeros((1, 5)).at[0, 4].set(9.0), jnp.zeros((1, 4))

    def nll(logits):
        cut, _ = align_vocab(logits, teacher, token_count=4)
        return -jax.nn.log_softmax(cut)[0, 0]

    value, grad = jax.value_and_grad(nll)(student)
    assert float(value) == pytest.approx(np.log(4), rel=1e-6)
    assert float(grad[0, 4]) == 0.0


def test_r03_unequal_heads_without_a_token_count_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match="student head has 5 entries, teacher head 4"):
        align_vocab(np.zeros((1, 5)), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="token_count=5 must fit in both"):
        align_vocab(np.zeros((1, 5)), np.zeros((1, 4)), token_count=5)
    same = align_vocab(np.zeros((1, 5)), np.ones((1, 5)))
    assert [x.shape for x in same] == [(1, 5), (1, 5)]


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["tied", "untied"])
def test_padding_the_vocabulary_adds_zero_logits_and_cropping_undoes_it(config):
    params = random_params(config)
    wide_config, wide = pad_vocab(config, params, 48)
    assert wide_config.vocab_size == 48
    got = LOGITS(Decoder(wide_config), wide, TOKENS)
    expected = LOGITS(Decoder(config), params, TOKENS)
    np.testing.assert_allclose(got[..., :37], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[..., 37:], 0)
    back_config, back = crop_vocab(wide_config, wide, 37)
    assert back_config == config
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert not buffers(back) & buffers(wide)


def test_wrong_requests_name_the_sizes(params, batches):
    model = Decoder(CONFIG)
    empty = [
        dataclasses.replace(b, response_mask=b.response_mask & False) for b in batches
    ]
    cases = [
        (lambda: keep_layers(CONFIG, params, ()), "layers is empty"),
        (lambda: keep_layers(CONFIG, params, (0, 4)), r"layers \[4\] are not in 0..3"),
        (
            lambda: greedy_depth_prune(model, params, batches, 5),
            "keep=5 must be in 1..4",
        ),
        (lambda: greedy_depth_prune(model, params, empty, 3), "no response token"),
        (lambda: mlp_importance(model, params, empty), "no response token"),
        (lambda: slice_width(CONFIG, params, 7), "must be in 1..6"),
        (
            lambda: slice_width(CONFIG, params, 4, importance=np.ones((4, 5))),
            r"importance has shape \(4, 5\), not \(4, 6\)",
        ),
        (lambda: pad_vocab(CONFIG, params, 36), "cannot pad a vocabulary of 37 to 36"),
        (lambda: crop_vocab(CONFIG, params, 38), "vocab_size=38 must be in 1..37"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
