"""Beam search against enumeration, a search in numpy, and greedy decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.api import response_logits
from rkd_jax.models.beam import make_beam_search
from rkd_jax.models.cache_rows import repeat_rows, row_axes, take_rows
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.types import Prompts
from tests.tabular.bed import (
    BED_E,
    EOS,
    STUDENT,
    TEACHER,
    TabularLM,
    bed_prompts,
    log_softmax,
)


@functools.cache
def _bed_search(**options):
    return make_beam_search(TabularLM(), max_new_tokens=4, eos_ids=(EOS,), **options)


def _search_bed(logits, **options):
    search = _bed_search(**options)
    params = {"logits": jnp.asarray(logits, jnp.float32)}
    return jax.tree.map(np.asarray, search(params, bed_prompts([0, 1], width=3)))


def _responses(found):
    """[B][K] tuples of tokens."""
    lengths = found.sequences.response_mask.sum(-1)
    return [
        [tuple(y[:n]) for y, n in zip(*row, strict=True)]
        for row in zip(found.sequences.targets.tolist(), lengths, strict=True)
    ]


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, -0.5])
@pytest.mark.parametrize("beams", [31, 34])
def test_a_beam_that_holds_everything_ranks_everything(beams, length_penalty):
    found = _search_bed(STUDENT, beams=beams, length_penalty=length_penalty)
    log_probs = BED_E.sequence_log_probs(STUDENT)
    scores = log_probs / BED_E.mask.sum(-1) ** length_penalty
    for x, row in enumerate(_responses(found)):
        order = np.argsort(-scores[x])
        assert row[:31] == [BED_E.sequences[i] for i in order]
        assert row[31:] == [()] * (beams - 31)
        np.testing.assert_allclose(found.scores[x, :31], scores[x, order], rtol=2e-6)
        np.testing.assert_allclose(
            found.sequence_log_probs[x, :31], log_probs[x, order], rtol=2e-6
        )
        ended = [EOS in BED_E.sequences[i] for i in order]
        assert found.ended[x].tolist() == ended + [False] * (beams - 31)
        np.testing.assert_allclose(
            found.log_probs[x, :31],
            BED_E.taken(log_softmax(STUDENT))[x, order],
            atol=2e-6,
        )
    assert np.isneginf(found.scores[:, 31:]).all()
    assert np.isneginf(found.sequence_log_probs[:, 31:]).all()
    assert not found.log_probs[:, 31:].any()


def _numpy_search(logits, beams, length_penalty):
    """Of one prompt: the rule of the module's docstring, over tuples."""
    log_probs = log_softmax(logits)

    def score(response, total):
        return total / len(response) ** length_penalty

    kept = [((), 0.0)]
    for _ in range(BED_E.horizon):
        candidates = []
        for response, total in kept:
            if response and response[-1] == EOS:
                candidates.append((response, total))
                continue
            state = 0
            for token in response:
                state = 2 * state + 1 + token
            candidates += [
                ((*response, token), total + log_probs[state, token])
                for token in range(3)
            ]
        kept = sorted(candidates, key=lambda c: -score(*c))[:beams]
    return kept


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_a_narrow_beam_follows_the_rule(beams, length_penalty):
    exact = 0
    for logits in (STUDENT, TEACHER):
        found = _search_bed(logits, beams=beams, length_penalty=length_penalty)
        for x, row in enumerate(_responses(found)):
            expected = _numpy_search(logits[x], beams, length_penalty)
            assert row == [response for response, _ in expected]
            np.testing.assert_allclose(
                found.sequence_log_probs[x], [total for _, total in expected], rtol=2e-6
            )
            best = BED_E.sequence_log_probs(logits)[x].max()
            exact += found.sequence_log_probs[x, 0] > best - 1e-5
    assert (
        beams > 1 or length_penalty or exact < 4
    )  # greedy misses a mode: cases matter


def test_impossible_responses_are_blank():
    table = np.full(BED_E.table_shape, -1e9)
    table[:, 0, 0] = table[:, 0, EOS] = 0.0  # a or EOS, then EOS
    table[:, 1, EOS] = 0.0

    class Strict(TabularLM):
        def unembed(self, params, hidden):
            logits = super().unembed(params, hidden)
            return jnp.where(logits < -1e8, -jnp.inf, logits)

    search = make_beam_search(Strict(), beams=4, max_new_tokens=4, eos_ids=(EOS,))
    params = {"logits": jnp.asarray(table, jnp.float32)}
    found = search(params, bed_prompts([0, 1]))
    assert _responses(found) == [[(0, 2), (2,), (), ()]] * 2
    np.testing.assert_allclose(found.scores[:, :2], np.log(0.5), rtol=1e-6)
    assert np.isneginf(found.scores[:, 2:]).all()
    assert found.ended.tolist() == [[True, True, False, False]] * 2
    assert not np.any(found.log_probs[:, 2:])


MODEL = Decoder(
    DecoderConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_length=32,
    )
)
ROWS = [[5, 6, 7, 8, 9], [10, 11], [12]]
SEARCH = make_beam_search(MODEL, beams=3, max_new_tokens=6, eos_ids=(1, 2))


def _prompts(rows, width, *, left=True):
    tokens, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    return Prompts(tokens, mask.astype(bool))


@pytest.fixture(scope="module")
def params():
    """Sharper than at initialisation, so that a wrong cache or position shows."""
    return jax.tree.map(lambda x: x * 3.0, MODEL.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def found(params):
    return jax.tree.map(np.asarray, SEARCH(params, _prompts(ROWS, 5)))


def test_log_probs_equal_a_fresh_forward(params, found):
    """Whatever the caches were reordered to."""
    forward = jax.jit(lambda params, rows: response_logits(MODEL, params, rows))
    normal = log_softmax(np.asarray(forward(params, found.sequences), np.float64))
    own = np.take_along_axis(normal, found.sequences.targets[..., None], -1)[..., 0]
    mask = found.sequences.response_mask
    np.testing.assert_allclose(found.log_probs, np.where(mask, own, 0.0), atol=1e-4)
    np.testing.assert_allclose(
        found.sequence_log_probs, found.log_probs.sum(-1), rtol=1e-5
    )
    np.testing.assert_array_equal(found.scores, found.sequence_log_probs)
    assert (np.diff(found.scores, axis=-1) < 0).all()
    ends = np.isin(found.sequences.targets, (1, 2)) & mask
    np.testing.assert_array_equal(found.ended, ends.any(-1))
    # Prefixes crossed over: the best response does not start like the best start.
    starts = found.sequences.targets[..., 0]
    assert any(len(set(row)) < 3 for row in starts.tolist())


def test_a_prompt_is_searched_alone_and_its_padding_is_not_looked_at(params, found):
    alone = [SEARCH(params, _prompts([row], 5)) for row in ROWS]
    wider = SEARCH(params, _prompts(ROWS, 9, left=False))
    alone = jax.tree.map(lambda *rows: np.concatenate(rows), *alone)
    for other in (alone, wider):
        for name in ("targets", "response_mask"):
            np.testing.assert_array_equal(
                getattr(other.sequences, name), getattr(found.sequences, name)
            )
        np.testing.assert_allclose(other.scores, found.scores, atol=1e-5)
        np.testing.assert_array_equal(other.ended, found.ended)


def test_one_beam_is_greedy(params):
    prompts = _prompts(ROWS, 5)
    search = make_beam_search(MODEL, beams=1, max_new_tokens=6, eos_ids=(1, 2, 30))
    config = SamplingConfig(6, temperature=0.0, eos_ids=(1, 2, 30))
    greedy = make_sampler(MODEL, config)(params, prompts, jax.random.key(0))
    beam = search(params, prompts)
    jax.tree.map(np.testing.assert_array_equal, beam.sequences, greedy.sequences)
    np.testing.assert_array_equal(beam.ended, greedy.ended)
    np.testing.assert_allclose(beam.log_probs, greedy.log_probs, atol=1e-6)


def test_ties_go_to_the_higher_rank_and_the_smaller_token():
    found = _search_bed(np.zeros(BED_E.table_shape), beams=3)
    assert _responses(found) == [[(EOS,), (0, 0, 0, 0), (0, 0, 0, 1)]] * 2


class Mixed:
    """A cache whose leaves hold their rows in different places, or not at all."""

    def init_cache(self, params, rows, length):
        return {
            "keys": jnp.zeros((2, rows, length)),
            "index": jnp.int32(0),
            "state": (jnp.zeros((rows,)), jnp.zeros((length, 3))),
        }


def test_rows_of_any_cache():
    axes = row_axes(Mixed(), None, 5)
    assert axes == {"keys": 1, "index": -1, "state": (0, -1)}
    keys = np.arange(2 * 2 * 5).reshape(2, 2, 5)
    cache = {"keys": keys, "index": np.int32(3), "state": (np.arange(2), np.eye(5, 3))}
    twice = repeat_rows(cache, axes, 2)
    np.testing.assert_array_equal(twice["keys"], keys[:, [0, 0, 1, 1]])
    np.testing.assert_array_equal(twice["state"][0], [0, 0, 1, 1])
    taken = take_rows(twice, axes, jnp.array([3, 0, 0, 1]))
    np.testing.assert_array_equal(taken["keys"], keys[:, [1, 0, 0, 0]])
    for kept in (twice, taken):
        assert kept["index"] == 3
        np.testing.assert_array_equal(kept["state"][1], np.eye(5, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"beams": 1.5}, "beams must be a whole number, got 1.5"),
        ({"length_penalty": float("inf")}, "got length_penalty inf"),
        ({"length_penalty": float("nan")}, "got length_penalty nan"),
        ({"length_penalty": -60.0}, r"4 \*\* length_penalty must be a float32"),
        ({"eos_ids": (0.5,)}, "each of eos_ids must be a whole number"),
        ({"eos_ids": (3,)}, r"eos_ids \[3\]"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_beam_search(TabularLM(), **({"beams": 2, "max_new_tokens": 4} | options))


def test_bad_prompts_are_named(params):
    with pytest.raises(ValueError, match="context of 32"):
        SEARCH(params, _prompts(ROWS, 27))
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        SEARCH(params, _prompts([[1], []], 5))
