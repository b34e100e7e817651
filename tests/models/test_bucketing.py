"""Batches of any size in few shapes: the same results, and nothing compiled twice."""

import contextlib
import itertools

import jax
import numpy as np
import pytest

from rkd_jax.models.beam import make_beam_search
from rkd_jax.models.bucketing import bucket_prompts, bucketed
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.mixed_sampling import make_mixed_sampler
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.types import Prompts
from tests.evaluation.bigram import Bigram

MODEL = Decoder(
    DecoderConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_length=16,
    )
)
CONFIG = SamplingConfig(4, eos_ids=(2,), samples_per_prompt=2)
BUCKETS = {"widths": (3, 6), "rows": (2, 4)}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 4.0, MODEL.init(jax.random.key(0)))


def _prompts(rows, width, seed=0):
    """Random prompts of 1 .. width tokens, one of them full, padded on the right."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, width + 1, (rows, 1))
    lengths[-1] = width
    tokens = random.integers(0, 20, (rows, width)).astype(np.int32)
    return Prompts(tokens, np.arange(width) < lengths)


@contextlib.contextmanager
def _compilations():
    """Counts what XLA compiles."""
    events = []

    def listen(event, duration, **kwargs):
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_after_the_warm_up():
    model = Bigram(20)
    table = model.init(jax.random.key(0))
    plain = make_sampler(model, CONFIG)
    mixed = make_mixed_sampler(model, model, CONFIG)
    beam = make_beam_search(model, beams=2, max_new_tokens=4, eos_ids=(2,))
    sample = bucketed(plain, **BUCKETS)
    sample_mixed = bucketed(mixed, widths=(3, 6), rows=(4,))
    search = bucketed(beam, widths=(6,), rows=(4,))

    def call(rows, width, seed):
        prompts, key = _prompts(rows, width, seed), jax.random.key(seed)
        sample(table, prompts, key)
        sample_mixed(table, table, prompts, key, teacher_prompts=prompts)
        search(table, prompts)

    with _compilations() as warming:
        for rows, width in itertools.product((2, 4), (3, 6)):
            call(rows, width, seed=rows + width)
    assert len(warming) >= 4 + 2 + 1  # the counter counts
    traces = model.traces
    with _compilations() as later:
        for rows, width in itertools.product(range(1, 5), range(1, 7)):
            call(rows, width, seed=7 * rows + width)
    assert not later
    assert model.traces == traces


def test_results_are_those_of_the_plain_sampler(params):
    plain = make_sampler(MODEL, CONFIG)
    sample = bucketed(plain, **BUCKETS)
    prompts, key = _prompts(3, 5), jax.random.key(1)
    expected, found = plain(params, prompts, key), sample(params, prompts, rng=key)
    assert found.sequences.tokens.shape == (3, 2, 6 + 4)
    np.testing.assert_array_equal(found.sequences.targets, expected.sequences.targets)
    np.testing.assert_array_equal(found.ended, expected.ended)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    # The prompts are there, on the left of the bucket's columns.
    lengths = prompts.mask.sum(1)
    for row, length in enumerate(lengths):
        for kept in found.sequences.tokens[row, :, 6 - length : 6]:
            np.testing.assert_array_equal(kept, prompts.tokens[row, :length])
        assert (found.sequences.token_mask[row, :, :6].sum(-1) == length).all()


def test_a_narrow_prompt_in_many_columns_takes_the_narrow_bucket():
    prompts = Prompts(
        np.array([[9, 0, 8, 0, 0, 7, 1, 1]], np.int32),
        np.array([[1, 0, 1, 0, 0, 1, 0, 0]], bool),
    )
    fitted = bucket_prompts(prompts, **BUCKETS)
    assert fitted.tokens.tolist() == [[9, 8, 7]] * 2
    assert fitted.mask.all()
    wide = bucket_prompts(prompts, widths=(10,), rows=(1,))
    assert wide.mask.tolist() == [[False] * 7 + [True] * 3]
    assert wide.tokens[0, 7:].tolist() == [9, 8, 7]


def test_bad_buckets_and_batches_are_named():
    for widths in ((), (0, 4), (4, 3), (4, 4)):
        with pytest.raises(ValueError, match="widths must ascend"):
            bucketed(print, widths=widths, rows=(1,))
    with pytest.raises(ValueError, match="rows must ascend"):
        bucketed(print, widths=(4,), rows=(2, 1))
    with pytest.raises(ValueError, match="7 tokens in a prompt, .* holds 6"):
        bucket_prompts(_prompts(2, 7), **BUCKETS)
    with pytest.raises(ValueError, match="5 prompts in a batch, .* holds 4"):
        bucket_prompts(_prompts(5, 3), **BUCKETS)
    with pytest.raises(ValueError, match="no prompt"):
        bucket_prompts(jax.tree.map(lambda x: x[:0], _prompts(1, 3)), **BUCKETS)
    with pytest.raises(ValueError, match=r"must be \[B, P\]: tokens \(3,\)"):
        bucket_prompts(jax.tree.map(lambda x: x[0], _prompts(1, 3)), **BUCKETS)
    with pytest.raises(ValueError, match=r"prompts with \[2, 1\] rows"):
        bucketed(print, **BUCKETS)(_prompts(2, 3), other=_prompts(1, 3))
    with pytest.raises(TypeError, match="Prompts"):
        bucketed(print, widths=(4,), rows=(2,))("hello")
