"""Objectives read policies from states and heads: the dense numbers, without logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    token_log_probs,
    total_variation,
)
from rkd_jax.losses.fused import Tiles
from rkd_jax.masking import masked_sum
from rkd_jax.models.api import response_hidden, response_logits
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.heads import GaussianHead
from rkd_jax.objectives.gkd import imitated_responses, make_gkd
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.minillm import make_minillm
from rkd_jax.objectives.policy import LATER, target_log_probs
from rkd_jax.objectives.reward_inference import RewardInference
from rkd_jax.objectives.sft import make_sft
from rkd_jax.objectives.xkd import make_xkd_gkd, make_xkd_minillm
from rkd_jax.signals.teacher import make_sequence_scorer, make_teacher_log_probs
from rkd_jax.types import (
    DemonstrationBatch,
    ImitationBatch,
    Sequences,
    TeacherSignal,
    TeacherStates,
)
from tests.jaxprs import outputs

pytestmark = pytest.mark.usefixtures("x64")

SHAPE = {
    "vocab_size": 23,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "max_length": 32,
    "dtype": "float64",
    "param_dtype": "float64",
}
TIED = Decoder(DecoderConfig(**SHAPE))
CAPPED = Decoder(DecoderConfig(**SHAPE, tie_embeddings=False, logit_softcap=2.0))
TEACHER = Decoder(DecoderConfig(**SHAPE | {"hidden_size": 6}, logit_softcap=3.0))
B, P, T = 4, 3, 5
LENGTHS = np.array([5, 0, 2, 4])
TOKENS = np.random.default_rng(0).integers(0, 23, (B, P + T)).astype(np.int32)
TILES = {  # all rows at once, and rows and columns in pieces
    "whole": Tiles(),
    "ahead": Tiles(logits=23 * 8, block=8, columns=10, gradient="ahead"),
    "later": Tiles(logits=23 * 8, block=8, columns=10, gradient="recompute"),
}


def sequences():
    mask = np.arange(T)[None] < LENGTHS[:, None]
    prompt = np.ones((B, P), bool)
    prompt[0, 0] = False
    return Sequences(
        jnp.asarray(TOKENS),
        jnp.asarray(np.concatenate([prompt, mask], axis=1)),
        jnp.asarray(mask),
    )


def loud(model, seed):
    """Parameters whose distributions are far from uniform."""
    params = model.init(jax.random.key(seed))
    return jax.tree.map(lambda x: x * 6.0 if x.ndim == 2 else x, params)


def compare(found, wanted, rtol=1e-10):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-11),
        found,
        wanted,
    )


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("model", [TIED, CAPPED], ids=["tied", "capped"])
def test_log_probs_of_targets_are_those_of_the_dense_logits(model, tiles):
    batch = sequences()
    mask, params = batch.response_mask, loud(model, 1)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, T)))

    def fused(params):
        values = target_log_probs(
            model, params, batch, temperature=0.6, tiles=TILES[tiles]
        )
        assert values.shape == (B, T)
        return (weights * values).sum()

    def dense(params):
        logits = response_logits(model, params, batch)
        values = token_log_probs(logits, batch.targets, temperature=0.6)
        return masked_sum(weights * values, mask)

    compare(*(jax.jit(jax.value_and_grad(f))(params) for f in (fused, dense)))


@pytest.mark.parametrize(
    "divergence",
    [
        forward_kl,
        reverse_kl,
        total_variation,
        functools.partial(generalized_jsd, beta=0.3),
    ],
    ids=["forward", "reverse", "total-variation", "jsd"],
)
def test_divergence_to_the_states_of_a_teacher_is_that_to_its_log_probs(divergence):
    text = sequences()
    batch = DemonstrationBatch(text, text, jnp.arange(B))
    agree(functools.partial(make_kd, CAPPED, divergence), batch, loud(CAPPED, 1))


def test_gkd_imitates_either_kind_of_responses():
    text = sequences()
    batch = DemonstrationBatch(text, text, jnp.arange(B))
    for given in (batch, ImitationBatch(batch, imitated=batch)):
        agree(functools.partial(make_gkd, CAPPED), given, loud(CAPPED, 1))


@pytest.mark.parametrize(
    "options",
    [{}, {"gamma": 0.8, "long_part": "inclusive"}, {"length_normalised": True}],
    ids=str,
)
def test_the_sequence_level_divergence_is_that_to_the_log_probs(options):
    text = sequences()
    batch = DemonstrationBatch(text, text, jnp.arange(B))
    agree(functools.partial(make_minillm, CAPPED, **options), batch, loud(CAPPED, 1))


@pytest.mark.parametrize("importance", ["per_decision", "token"])
def test_weighted_samples_count_the_same_without_logits(importance):
    """Weights of padding are NaN; one target has none, and ends its row."""
    text = sequences()
    rows = DemonstrationBatch(text, text, jnp.arange(B))
    weights = np.exp(np.random.default_rng(5).normal(size=(B, T)))
    weights[3, 1] = 0.0
    weights = jnp.where(text.response_mask, jnp.asarray(weights), jnp.nan)
    batch = ImitationBatch(rows, rows, weights)
    inclusive = {"gamma": 0.8, "long_part": "inclusive"}
    for options in ({}, inclusive, {"baseline": "others"}, {"baseline": "whitened"}):
        make = functools.partial(make_minillm, CAPPED, importance=importance, **options)
        agree(make, batch, loud(CAPPED, 1))


@pytest.mark.parametrize(
    ("make", "td_sequences", "q_source"),
    [  # every two of the options meet
        (make_xkd_gkd, "fixed", "log_probs"),
        (make_xkd_gkd, "all", "raw_logits"),
        (make_xkd_minillm, "all", "log_probs"),
        (make_xkd_minillm, "fixed", "raw_logits"),
    ],
)
def test_reward_inference_beside_either_kind_of_teacher(make, td_sequences, q_source):
    """Demonstrations and imitated responses are not the same."""
    head, fixed = GaussianHead(), sequences()
    samples = dataclasses.replace(fixed, tokens=(fixed.tokens + 3) % 23)
    batch = ImitationBatch(
        DemonstrationBatch(fixed, fixed, jnp.arange(B)),
        DemonstrationBatch(samples, samples, jnp.arange(B)),
    )
    inference = RewardInference(head.apply, q_source=q_source, gamma=0.9)
    params = {
        "policy": loud(CAPPED, 1),
        "reward_head": jax.tree.map(
            lambda x: x.astype(jnp.float64), head.init(jax.random.key(4), 8)
        ),
    }
    make = functools.partial(make, CAPPED, inference, td_sequences=td_sequences)
    agree(make, batch, params)


def test_an_expected_next_value_is_not_read_from_states():
    inference = RewardInference(GaussianHead().apply, next_value="expected")
    with pytest.raises(ValueError, match="give teacher=None and a signal"):
        make_xkd_gkd(TIED, inference, teacher=TEACHER)


@jax.jit
def teacher_states(params, text):
    return response_hidden(TEACHER, params, text)


teacher_log_probs = make_teacher_log_probs(TEACHER, temperature=0.7)


def agree(make, batch, params):
    """Total, metrics and gradient, to a teacher as a model and to its log-probs.

    The teacher has another width and cap than the student.
    """
    text = imitated_responses(batch).sequences
    teacher_params = loud(TEACHER, 2)
    states = TeacherStates(teacher_states(teacher_params, text))
    log_probs = teacher_log_probs(teacher_params, text)

    def step(objective, frozen, signal):
        def total(params):
            out = objective.student_loss(params, None, frozen, batch, signal, None)
            return out.total, out.metrics

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    fused = make(teacher=TEACHER, temperature=0.7)
    dense = make(temperature=0.7)
    (value, metrics), slopes = step(fused, {"teacher": teacher_params}, states)
    (wanted, expected), gradient = step(dense, None, TeacherSignal(log_probs))
    compare((value, slopes), (wanted, gradient))
    assert fused.requires == ("hidden",)
    assert dense.requires == ("log_probs",)
    assert set(metrics) >= set(expected) - {"student/nll"}
    compare(metrics, {name: expected[name] for name in metrics})


def test_nothing_reaches_the_teacher_and_its_padding_may_hold_nan():
    text = sequences()
    batch = DemonstrationBatch(text, text, jnp.arange(B))
    params, teacher_params = loud(TIED, 1), loud(TEACHER, 2)
    hidden = teacher_states(teacher_params, text)
    objective = make_kd(TIED, teacher=TEACHER)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def run(params, frozen, hidden):
        signal = TeacherStates(hidden)
        return objective.student_loss(params, None, frozen, batch, signal, None).total

    dirty = jnp.where(text.response_mask[..., None], hidden, jnp.nan)
    clean, poisoned = (
        run(params, {"teacher": teacher_params}, states) for states in (hidden, dirty)
    )
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    _, (to_student, *to_teacher) = clean
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(to_student))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(to_teacher))


@pytest.mark.parametrize("frozen", [None, {}, ()])
def test_a_missing_teacher_is_named(frozen):
    text = sequences()
    batch = DemonstrationBatch(text, text, jnp.arange(B))
    signal = TeacherStates(jnp.zeros((B, T, 6)))
    objective = make_kd(TIED, teacher=TEACHER)
    with pytest.raises(ValueError, match="the head of the teacher is read in the loss"):
        objective.student_loss(loud(TIED, 1), None, frozen, batch, signal, None)


def test_reference_scores_are_summed_dense_log_probs():
    text, params = sequences(), loud(CAPPED, 3)
    found = make_sequence_scorer(CAPPED, temperature=0.6)(params, text)
    logits = jax.jit(lambda p: response_logits(CAPPED, p, text))(params)
    log_probs = token_log_probs(logits, text.targets, temperature=0.6)
    wanted = np.where(text.response_mask, log_probs, 0.0).sum(-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("tiles", [Tiles(logits=4096 * 8), LATER])
def test_no_array_holds_the_logits_of_a_batch(tiles):
    """No shape in the traced gradient has rows x vocabulary numbers."""
    wide = {"vocab_size": 4096, "max_length": 256, "num_layers": 1}
    model = Decoder(DecoderConfig(**SHAPE | wide))
    rows, columns = 64, 128
    text = Sequences(
        *(
            jax.ShapeDtypeStruct((rows, columns + 1), dtype)
            for dtype in (jnp.int32, bool)
        ),
        jax.ShapeDtypeStruct((rows, columns), bool),
    )
    params = jax.eval_shape(model.init, jax.random.key(0))

    def total(params, text):
        return target_log_probs(model, params, text, tiles=tiles).sum()

    def largest(function):
        jaxpr = jax.make_jaxpr(jax.grad(function))(params, text).jaxpr
        return max(getattr(aval, "size", 0) for aval in outputs(jaxpr))

    assert largest(total) < rows * columns * 4096 / 2

    def dense(params, text):
        return token_log_probs(response_logits(model, params, text), text.targets).sum()

    assert largest(dense) >= rows * columns * 4096


def test_sft_is_the_objective_it_was():
    """Unit, weight and metric, out of the fused path."""
    text, params = sequences(), loud(TIED, 1)
    batch = DemonstrationBatch(text, text, jnp.arange(B))
    objective = make_sft(TIED)
    out = jax.jit(lambda p: objective.student_loss(p, None, None, batch, None, None))(
        params
    )
    logits = jax.jit(lambda p: response_logits(TIED, p, text))(params)
    log_probs = jax.nn.log_softmax(logits)
    taken = np.take_along_axis(np.asarray(log_probs), TOKENS[:, P:, None], -1)[..., 0]
    np.testing.assert_allclose(
        out.total, -taken[np.asarray(text.response_mask)].sum(), rtol=1e-12
    )
    assert float(out.weight) == LENGTHS.sum()
    assert set(out.metrics) == {"student/nll"}
