"""Faults of peers in sampled text: scores after EOS, leaking padding, retraces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.masking import sequence_sum
from rkd_jax.models.api import response_logits
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.types import Prompts

EOS = 2  # and the padding id, as in SmolLM2
MODEL = Decoder(
    DecoderConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=16,
    )
)
PROMPTS = Prompts(
    tokens=jnp.array([[EOS, EOS, 5], [7, EOS, 9], [EOS, 3, 4], [1, 8, 6]]),
    mask=jnp.array([[0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]], dtype=bool),
)


@pytest.fixture(scope="module")
def params():
    """Sharp enough that a leaked token would show in every score."""
    return jax.tree.map(lambda x: x * 4.0, MODEL.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def samples(params):
    config = SamplingConfig(8, eos_ids=(EOS,), samples_per_prompt=2)
    drawn = make_sampler(MODEL, config)(params, PROMPTS, jax.random.key(5))
    lengths = np.sum(drawn.sequences.response_mask, axis=-1)
    assert lengths.min() < 8 == lengths.max()  # rows that end, and rows that do not
    return drawn


@jax.jit
def _score(params, sequences):
    """Summed log-prob of each response, and the gradient of their total."""

    def total(params):
        logits = response_logits(MODEL, params, sequences)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(log_probs, sequences.targets[..., None], axis=-1)
        scores = sequence_sum(chosen[..., 0], sequences.response_mask)
        return jnp.sum(scores), scores

    return jax.grad(total, has_aux=True)(params)


@pytest.mark.parametrize("garbage", [EOS, 11])
def test_t16_text_after_eos_and_in_padding_changes_nothing(params, samples, garbage):
    sequences = samples.sequences
    perturbed = dataclasses.replace(
        sequences, tokens=jnp.where(sequences.token_mask, sequences.tokens, garbage)
    )
    assert np.any(perturbed.tokens != sequences.tokens)
    gradient, scores = _score(params, sequences)
    perturbed_gradient, perturbed_scores = _score(params, perturbed)
    np.testing.assert_array_equal(scores, perturbed_scores)
    jax.tree.map(np.testing.assert_array_equal, gradient, perturbed_gradient)
    np.testing.assert_allclose(
        scores, np.sum(samples.log_probs, axis=-1), rtol=1e-5, atol=1e-4
    )


def test_r10_after_eos_there_is_neither_mask_nor_log_prob(samples):
    targets = np.asarray(samples.sequences.targets)
    mask = np.asarray(samples.sequences.response_mask)
    for row, row_mask, row_log_probs in zip(
        targets.reshape(-1, 8),
        mask.reshape(-1, 8),
        np.asarray(samples.log_probs).reshape(-1, 8),
        strict=True,
    ):
        length = row.tolist().index(EOS) + 1 if EOS in row else 8
        assert row_mask.tolist() == [True] * length + [False] * (8 - length)
        assert not row[length:].any()
        assert not row_log_probs[length:].any()


def test_r8_eos_is_a_target_and_prompts_may_hold_the_padding_id(params, samples):
    ended = np.asarray(samples.ended)
    last = np.sum(samples.sequences.response_mask, axis=-1) - 1
    targets = np.asarray(samples.sequences.targets)
    final = np.take_along_axis(targets, last[..., None], axis=-1)[..., 0]
    np.testing.assert_array_equal(final == EOS, ended)
    # An EOS id inside the second prompt is a token there, not the end of it.
    assert samples.sequences.prompts.mask[1].all()
    assert last[1].max() > 0
