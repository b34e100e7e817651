"""Long responses, written in stages between which the caches grow."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models import decoding
from rkd_jax.models.api import response_logits
from rkd_jax.models.beam import make_beam_search
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.decoding import stage_ends
from rkd_jax.models.mixed_sampling import make_mixed_sampler
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.types import Prompts
from tests.models.reference import GEMMA, LLAMA, QWEN, random_params

CONFIG = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_length=48,
    sliding_window=20,
)
T = 23  # stages of a size that does not divide it, and that a window spans
TOKENS = np.random.default_rng(0).integers(3, 31, (2, 5)).astype(np.int32)
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
PROMPTS = Prompts(jnp.asarray(TOKENS), jnp.asarray(MASK))


@pytest.fixture(scope="module")
def params():
    # Sharper than at initialisation, so that a wrong slot or position shows.
    drawn = Decoder(CONFIG).init(jax.random.key(0))
    return jax.tree.map(lambda x: x * 3.0, drawn)


@pytest.fixture
def short_stages(monkeypatch):
    monkeypatch.setattr(decoding, "_STAGE", 5)
    assert stage_ends(T) == (6, 12, 18, 23)


@dataclasses.dataclass(frozen=True)
class Watched(Decoder):
    """Notes the slots of every cache it reads, and how often each is read."""

    seen: list = dataclasses.field(default_factory=list, compare=False)
    reads: list = dataclasses.field(default_factory=list, compare=False)

    def hidden(self, params, tokens, *, cache=None, **rest):
        slots = cache.segment_ids.shape[1]
        self.seen.append(slots)
        jax.debug.callback(lambda: self.reads.append(slots))
        return super().hidden(params, tokens, cache=cache, **rest)


def test_stages_are_few_long_and_end_with_the_response():
    assert stage_ends(1) == (1,)
    assert stage_ends(511) == (511,)
    assert stage_ends(512) == (256, 512)
    assert stage_ends(1024) == (256, 512, 768, 1024)
    assert stage_ends(4096) == (1024, 2048, 3072, 4096)
    for new in range(1, 3000):
        ends = stage_ends(new)
        sizes = np.diff([0, *ends])
        assert ends[-1] == new
        assert 1 <= len(ends) <= 4
        assert len(ends) == 1 or sizes.min() >= 250
        assert sizes[:-1].min(initial=new) == sizes.max()


def _scores(params, sequences, temperature):
    """Log-probs of the responses by one forward over whole rows, float64."""
    logits = jax.jit(lambda s: response_logits(Decoder(CONFIG), params, s))(sequences)
    logits = np.asarray(logits, np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.asarray(sequences.targets)[..., None]
    own = np.take_along_axis(logs, targets, -1)[..., 0]
    return np.where(np.asarray(sequences.response_mask), own, 0.0)


@pytest.mark.parametrize("eos_ids", [(), (1, 2)], ids=["full", "ending"])
def test_log_probs_equal_a_fresh_forward(params, short_stages, eos_ids):
    config = SamplingConfig(T, 0.8, eos_ids=eos_ids, samples_per_prompt=3)
    samples = make_sampler(Decoder(CONFIG), config)(params, PROMPTS, jax.random.key(1))
    expected = _scores(params, samples.sequences, 0.8)
    np.testing.assert_allclose(samples.log_probs, expected, atol=1e-4)
    lengths = np.asarray(samples.sequences.response_mask).sum(-1)
    assert lengths.max() > 18  # the last stage is one that wrote something
    assert (lengths.min() < 18) == bool(eos_ids)


def test_stages_draw_what_one_loop_draws(params, monkeypatch):
    config = SamplingConfig(T, eos_ids=(1,), samples_per_prompt=2)
    drawn = []
    for least in (T, 5):
        monkeypatch.setattr(decoding, "_STAGE", least)
        sample = make_sampler(Decoder(CONFIG), config)
        drawn.append(sample(params, PROMPTS, jax.random.key(3)))
    whole, staged = drawn
    np.testing.assert_array_equal(staged.sequences.tokens, whole.sequences.tokens)
    np.testing.assert_array_equal(staged.ended, whole.ended)
    np.testing.assert_allclose(staged.log_probs, whole.log_probs, atol=1e-5)


def test_a_cache_has_room_for_the_columns_of_its_stage_alone(params, short_stages):
    model = Watched(CONFIG)
    config = SamplingConfig(T)
    prompts = jax.tree.map(lambda x: x[:, 1:], PROMPTS)
    samples = make_sampler(_without(model, "unrolled"), config)(
        params, prompts, jax.random.key(1)
    )
    jax.block_until_ready(samples)
    jax.effects_barrier()
    assert sorted(set(model.seen)) == [10, 16, 22, 27]
    turns = {slots: len(list(run)) for slots, run in itertools.groupby(model.reads)}
    # The prompt and six columns, twice six, and the last but that nobody reads.
    assert turns == {10: 7, 16: 6, 22: 6, 27: 4}


def test_when_all_rows_have_ended_no_stage_reads_a_column(params, short_stages):
    model = Watched(CONFIG)
    config = SamplingConfig(T, eos_ids=tuple(range(31)))
    samples = make_sampler(_without(model, "unrolled"), config)(
        params, PROMPTS, jax.random.key(1)
    )
    assert samples.ended.all()
    jax.effects_barrier()
    assert model.reads == [11]


def test_a_model_that_cannot_grow_its_cache_writes_in_one_stage(params, short_stages):
    model = Watched(CONFIG)
    config = SamplingConfig(T, 0.8)
    small = _without(model, "grow_cache", "unrolled")
    samples = make_sampler(small, config)(params, PROMPTS, jax.random.key(1))
    assert set(model.seen) == {28}
    expected = _scores(params, samples.sequences, 0.8)
    np.testing.assert_allclose(samples.log_probs, expected, atol=1e-4)


def test_two_models_of_which_one_can_grow(params, short_stages):
    """Behind prompts of different widths."""
    fixed = _without(Watched(CONFIG), "grow_cache", "unrolled")
    config = SamplingConfig(T, 0.8)
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (4, 0))), PROMPTS)
    arguments = (params, params, PROMPTS, jax.random.key(1), wider)
    for pair in ((Decoder(CONFIG), fixed), (fixed, Decoder(CONFIG))):
        samples = make_mixed_sampler(*pair, config, alpha=0.5)(*arguments)
        expected = _scores(params, samples.sequences, 0.8)
        np.testing.assert_allclose(samples.log_probs, expected, atol=1e-4)
        # Both models are the same, and so is their mixture.
        np.testing.assert_allclose(samples.behaviour_log_probs, expected, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_are_scored_as_by_a_fresh_forward(params, short_stages, beams):
    search = make_beam_search(
        Decoder(CONFIG), beams=beams, max_new_tokens=T, length_penalty=1.0
    )
    found = search(params, PROMPTS)
    expected = _scores(params, found.sequences, 1.0)
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-4)
    np.testing.assert_allclose(
        found.sequence_log_probs, expected.sum(-1), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
@pytest.mark.parametrize("config", [QWEN, GEMMA, LLAMA], ids=["qwen", "gemma", "llama"])
def test_a_grown_cache_is_one_that_had_the_slots_from_the_start(config, apart):
    model, params = Decoder(config), random_params(config)
    tokens = np.random.default_rng(0).integers(0, 37, (2, 9)).astype(np.int32)
    positions = np.tile(np.arange(9, dtype=np.int32), (2, 1))

    def extended(params, cache, grow):
        reader, held = model, params
        if apart:
            reader, held, cache = model.unrolled(params, cache, 9)
        for stop in range(5, 10):
            if grow:
                cache = reader.grow_cache(cache, stop)
            column = np.s_[:, stop - 1 : stop]
            states, cache = reader.hidden(
                held,
                tokens[column],
                positions=positions[column],
                segment_ids=np.ones((2, 1), np.int32),
                cache=cache,
            )
        return states, cache

    extended = jax.jit(extended, static_argnums=2)
    runs = []
    for slots in (9, 4):
        cache = model.init_cache(params, 2, slots)
        _, cache = model.hidden(params, tokens[:, :4], cache=cache)
        runs.append(extended(params, cache, slots == 4))
    for whole, grown in zip(*(jax.tree.leaves(run) for run in runs), strict=True):
        assert whole.shape == grown.shape
        np.testing.assert_allclose(grown, whole, rtol=1e-5, atol=1e-5)


def _without(model, *names):
    """A model of the same methods but for a few, that may be hashed."""

    class Lesser:
        def __getattr__(self, name):
            if name in names:
                raise AttributeError(name)
            return getattr(model, name)

    return Lesser()
