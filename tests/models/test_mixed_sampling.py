"""Teacher-mixed samples against the enumerated mixture and fresh forwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.evaluation.generation import with_prompts
from rkd_jax.models.api import response_logits
from rkd_jax.models.bucketing import bucket_prompts
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.mixed_sampling import make_mixed_sampler
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.types import Prompts
from tests.tabular.bed import (
    BED_E,
    EOS,
    REWARD,
    STUDENT,
    TEACHER,
    TabularLM,
    bed_prompts,
    log_softmax,
)

ALPHA, TEMPERATURE, COUNT = 0.3, 0.7, 4096
# The teacher reads the other prompt, in wider columns.
OTHER = TEACHER[::-1]
MIXTURE = np.log(
    ALPHA * np.exp(log_softmax(OTHER / TEMPERATURE))
    + (1 - ALPHA) * np.exp(log_softmax(STUDENT / TEMPERATURE))
)


def _table(logits):
    return {"logits": jnp.asarray(logits, jnp.float32)}


def _tabular(config, alpha):
    sample = make_mixed_sampler(TabularLM(), TabularLM(), config, alpha=alpha)
    prompts, others = bed_prompts([0, 1]), bed_prompts([1, 0], width=5)
    key = jax.random.key(2)
    return sample(_table(STUDENT), _table(TEACHER), prompts, key, others)


@pytest.fixture(scope="module")
def samples():
    """[2, COUNT] responses on the bed; and the index of each in the enumeration."""
    config = SamplingConfig(
        4, temperature=TEMPERATURE, eos_ids=(EOS,), samples_per_prompt=COUNT
    )
    samples = jax.tree.map(np.asarray, _tabular(config, ALPHA))
    place = {y: i for i, y in enumerate(BED_E.sequences)}
    tokens, lengths = (
        samples.sequences.targets,
        samples.sequences.response_mask.sum(-1),
    )
    index = [
        [place[tuple(y[:n])] for y, n in zip(*row, strict=True)]
        for row in zip(tokens.tolist(), lengths, strict=True)
    ]
    return samples, np.array(index)


def test_frequencies_are_the_enumerated_mixture(samples):
    _, index = samples
    exact = np.exp(BED_E.sequence_log_probs(MIXTURE))
    np.testing.assert_allclose(exact.sum(-1), 1.0)
    seen = np.stack([np.bincount(row, minlength=31) for row in index]) / COUNT
    error = np.sqrt(exact * (1 - exact) / COUNT)
    assert (np.abs(seen - exact) < 4 * error).all()
    # Neither model alone would pass.
    for policy in (STUDENT, OTHER):
        alone = np.exp(BED_E.sequence_log_probs(policy / TEMPERATURE))
        assert (np.abs(seen - alone) > 8 * error).any(-1).all()


def test_both_log_probs_are_the_enumerated_ones(samples):
    samples, index = samples
    rows = np.arange(2)[:, None]
    student = BED_E.taken(log_softmax(STUDENT / TEMPERATURE))[rows, index]
    mixture = BED_E.taken(MIXTURE)[rows, index]
    np.testing.assert_allclose(samples.log_probs, student, atol=2e-6)
    np.testing.assert_allclose(samples.behaviour_log_probs, mixture, atol=2e-6)
    np.testing.assert_array_equal(samples.sequences.response_mask, BED_E.mask[index])


def test_importance_weights_turn_the_mixture_into_the_student(samples):
    samples, index = samples
    weights = np.exp(samples.log_probs - samples.behaviour_log_probs)
    assert weights.max() <= 1 / (1 - ALPHA) + 1e-5
    assert (weights[~samples.sequences.response_mask] == 1.0).all()
    returns = BED_E.returns(REWARD)[np.arange(2)[:, None], index]
    weighted = weights.prod(-1) * returns
    probs = np.exp(BED_E.sequence_log_probs(STUDENT / TEMPERATURE))
    exact = (probs * BED_E.returns(REWARD)).sum(-1)
    error = weighted.std(-1) / np.sqrt(COUNT)
    assert (np.abs(weighted.mean(-1) - exact) < 4 * error).all()
    assert (np.abs(returns.mean(-1) - exact) > 4 * error).all()  # it takes the weights


def _decoder(seed, **shape):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 4, "head_dim": 4} | shape
    config = DecoderConfig(
        vocab_size=40, intermediate_size=24, num_kv_heads=2, max_length=32, **sizes
    )
    model = Decoder(config)
    # Sharper than at initialisation, so that a wrong cache or position shows.
    return model, jax.tree.map(lambda x: x * 3.0, model.init(jax.random.key(seed)))


PROMPTS = Prompts(
    np.array([[5, 6, 7, 8, 9], [0, 0, 0, 10, 11], [0, 0, 0, 0, 12]], np.int32),
    np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], bool),
)
TEACHER_PROMPTS = Prompts(  # on the right, for once
    np.array([[3, 5, 6, 7, 8, 9, 4, 0], [10, 0, 0, 0, 0, 0, 0, 0], [1] * 8], np.int32),
    np.array([[1, 1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1] * 8], bool),
)
CONFIG = SamplingConfig(
    6, temperature=0.8, top_k=12, eos_ids=(1, 2), samples_per_prompt=3
)


@pytest.fixture(scope="module")
def models():
    """A student, and a teacher of another shape."""
    return (*_decoder(0), *_decoder(1, hidden_size=24, num_layers=2, num_heads=2))


@pytest.fixture(scope="module")
def alone(models):
    """What the student draws by itself."""
    student, params, _, _ = models
    return make_sampler(student, CONFIG)(params, PROMPTS, jax.random.key(4))


def test_alpha_zero_draws_what_the_student_alone_draws(models, alone):
    student, student_params, teacher, teacher_params = models
    key = jax.random.key(4)
    sample = make_mixed_sampler(student, teacher, CONFIG, alpha=0.0)
    mixed = sample(student_params, teacher_params, PROMPTS, key, TEACHER_PROMPTS)
    jax.tree.map(np.testing.assert_array_equal, mixed.sequences, alone.sequences)
    for name in ("log_probs", "behaviour_log_probs"):
        ours, theirs = getattr(mixed, name), getattr(alone, name)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_alpha_one_of_equal_models_is_the_model(models, alone):
    student, params, _, _ = models
    key = jax.random.key(4)
    sample = make_mixed_sampler(student, student, CONFIG, alpha=1.0)
    mixed = sample(params, params, PROMPTS, key)
    jax.tree.map(np.testing.assert_array_equal, mixed.sequences, alone.sequences)
    np.testing.assert_array_equal(mixed.ended, alone.ended)


def test_log_probs_equal_fresh_forwards_behind_either_prompt(models):
    student, student_params, teacher, teacher_params = models
    config = dataclasses.replace(CONFIG, top_k=0)
    sample = make_mixed_sampler(student, teacher, config, alpha=0.4)
    key = jax.random.key(6)
    drawn = sample(student_params, teacher_params, PROMPTS, key, TEACHER_PROMPTS)
    left = bucket_prompts(TEACHER_PROMPTS, widths=(8,), rows=(3,))
    behind = with_prompts(drawn.sequences, left)
    targets = np.asarray(drawn.sequences.targets)[..., None]

    def log_probs(model, params, sequences):
        logits = jax.jit(lambda p, s: response_logits(model, p, s))(params, sequences)
        normal = log_softmax(np.asarray(logits, np.float64) / 0.8)
        return np.take_along_axis(normal, targets, -1)[..., 0]

    mask = np.asarray(drawn.sequences.response_mask)
    assert not mask.all()
    own = log_probs(student, student_params, drawn.sequences)
    other = log_probs(teacher, teacher_params, behind)
    mixture = np.log(0.4 * np.exp(other) + 0.6 * np.exp(own))
    np.testing.assert_allclose(drawn.log_probs, np.where(mask, own, 0), atol=1e-4)
    np.testing.assert_allclose(
        drawn.behaviour_log_probs, np.where(mask, mixture, 0), atol=1e-4
    )


class Strict(TabularLM):
    """Rules out what its table gives less than -1e8."""

    def unembed(self, params, hidden):
        logits = super().unembed(params, hidden)
        return jnp.where(logits < -1e8, -jnp.inf, logits)


def test_a_token_the_student_rules_out_has_weight_zero():
    student = np.array(STUDENT)
    student[:, :, 0] = -1e9
    teacher = np.full_like(TEACHER, -1e9)
    teacher[:, :, 0] = 0.0
    config = SamplingConfig(1, samples_per_prompt=64)
    sample = make_mixed_sampler(Strict(), Strict(), config, alpha=0.5)
    prompts, key = bed_prompts([0, 1]), jax.random.key(0)
    drawn = sample(_table(student), _table(teacher), prompts, key)
    tokens = np.asarray(drawn.sequences.targets)[..., 0]
    weights = np.exp(drawn.log_probs - drawn.behaviour_log_probs)[..., 0]
    assert np.isneginf(drawn.log_probs[tokens == 0]).all()
    assert 0.2 < np.mean(tokens == 0) < 0.8
    np.testing.assert_allclose(weights, np.where(tokens == 0, 0.0, 2.0), rtol=1e-5)


def test_bad_arguments_are_named(models):
    student, student_params, teacher, teacher_params = models
    small = Decoder(dataclasses.replace(teacher.config, vocab_size=39, max_length=12))
    config = SamplingConfig(6)
    with pytest.raises(ValueError, match="student head has 40 .* teacher head 39"):
        make_mixed_sampler(student, small, config)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            make_mixed_sampler(student, teacher, config, alpha=alpha)
    with pytest.raises(ValueError, match="temperature must be positive"):
        make_mixed_sampler(student, teacher, SamplingConfig(6, temperature=0.0))
    with pytest.raises(ValueError, match=r"eos_ids \[40\]"):
        make_mixed_sampler(student, teacher, SamplingConfig(6, eos_ids=(40,)))
    short = Decoder(dataclasses.replace(teacher.config, max_length=12))
    sample, key = make_mixed_sampler(student, short, config), jax.random.key(0)
    with pytest.raises(ValueError, match="teacher prompt width 8 .* context of 12"):
        sample(student_params, teacher_params, PROMPTS, key, TEACHER_PROMPTS)
    two = jax.tree.map(lambda x: x[:2, :5], TEACHER_PROMPTS)
    with pytest.raises(ValueError, match="3 prompts, but 2 teacher prompts"):
        sample(student_params, teacher_params, PROMPTS, key, two)
    empty = dataclasses.replace(PROMPTS, mask=PROMPTS.mask & (np.arange(5) < 4))
    with pytest.raises(ValueError, match="teacher prompt 2 has no token"):
        sample(student_params, teacher_params, PROMPTS, key, empty)
