"""States before and after each target, read from the right columns."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.api import (
    CausalLM,
    action_hidden,
    positions_from_mask,
    positions_from_segments,
    response_hidden,
    response_logits,
    sequence_hidden,
)
from rkd_jax.models.decoder import Decoder
from rkd_jax.packed import target_segments
from rkd_jax.types import Sequences
from tests.models.reference import LLAMA

P, T = 3, 4
SEQUENCES = Sequences(
    tokens=jnp.array([[0, 7, 8, 5, 6, 2, 0], [4, 5, 6, 9, 2, 0, 0]], jnp.int32),
    token_mask=jnp.array([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]], bool),
    response_mask=jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool),
)


@dataclasses.dataclass(frozen=True)
class Echo:
    """A model whose state is what it was given: token, position, segment."""

    def hidden(self, params, tokens, *, positions=None, segment_ids=None):
        assert tokens.ndim == positions.ndim == segment_ids.ndim == 2
        return jnp.stack([tokens, positions, segment_ids], axis=-1)

    def unembed(self, params, hidden):
        return hidden.astype(jnp.float32) + params


def test_positions_count_real_tokens_only():
    mask = np.array([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    expected = [[0, 0, 0, 1, 1], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    positions = positions_from_mask(mask)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, expected)


def test_the_model_is_told_positions_and_padding():
    got = sequence_hidden(Echo(), None, SEQUENCES)
    np.testing.assert_array_equal(got[..., 0], SEQUENCES.tokens)
    np.testing.assert_array_equal(
        got[..., 1], [[0, 0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 4, 4]]
    )
    np.testing.assert_array_equal(got[..., 2], SEQUENCES.token_mask)


PACKED = Sequences(
    tokens=jnp.array([[7, 8, 5, 2, 9, 2, 0], [4, 6, 3, 0, 0, 5, 1]], jnp.int32),
    token_mask=jnp.array([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1, 1]], bool),
    response_mask=jnp.array([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]], bool),
    segment_ids=jnp.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 0, 0, 2, 2]], jnp.int32),
)


def test_positions_start_anew_in_every_segment():
    segments = np.array([[1, 1, 2, 2, 2, 3, 0], [0, 0, 1, 1, 1, 1, 1], [0] * 7])
    positions = positions_from_segments(segments.astype(np.int32))
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions[0], [0, 1, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(positions[1, 2:], [0, 1, 2, 3, 4])
    assert int(positions.max()) < 7
    one_record = np.ones((1, 7), np.int32)
    np.testing.assert_array_equal(
        positions_from_segments(one_record), positions_from_mask(one_record > 0)
    )


@pytest.mark.parametrize("garbage", [0, 2, 9, -1])
def test_the_model_is_told_segments_of_packed_rows(garbage):
    """Ids on padding may be anything: the token mask decides what is padding."""
    ids = jnp.where(PACKED.token_mask, PACKED.segment_ids, garbage)
    sequences = dataclasses.replace(PACKED, segment_ids=ids)
    got = sequence_hidden(Echo(), None, sequences)
    np.testing.assert_array_equal(got[..., 0], PACKED.tokens)
    real = np.asarray(PACKED.token_mask)
    np.testing.assert_array_equal(
        np.asarray(got[..., 1])[real], [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1]
    )
    np.testing.assert_array_equal(got[..., 2], PACKED.segment_ids)


def test_packed_targets_are_predicted_from_the_column_before_in_their_segment():
    before = np.asarray(response_hidden(Echo(), None, PACKED))
    after = np.asarray(action_hidden(Echo(), None, PACKED))
    mask = np.asarray(PACKED.response_mask)
    np.testing.assert_array_equal(before[mask][:, 0], [8, 5, 9, 4, 6, 5])
    np.testing.assert_array_equal(after[mask][:, 0], [5, 2, 2, 6, 3, 1])
    np.testing.assert_array_equal(before[mask][:, 2], after[mask][:, 2])
    np.testing.assert_array_equal(PACKED.targets, after[..., 0])
    np.testing.assert_array_equal(target_segments(PACKED), after[..., 2])
    assert target_segments(SEQUENCES) is None


def test_a_model_without_segments_refuses_packed_rows():
    class Single(Echo):
        single_segment = True

    with pytest.raises(ValueError, match=r"Single .*no segments.*packed"):
        sequence_hidden(Single(), None, PACKED)
    expected = sequence_hidden(Echo(), None, SEQUENCES)
    np.testing.assert_array_equal(sequence_hidden(Single(), None, SEQUENCES), expected)


def test_states_before_and_after_each_target():
    before = response_hidden(Echo(), None, SEQUENCES)[..., 0]
    after = action_hidden(Echo(), None, SEQUENCES)[..., 0]
    np.testing.assert_array_equal(before, [[8, 5, 6, 2], [6, 9, 2, 0]])
    np.testing.assert_array_equal(after, SEQUENCES.targets)


def test_the_head_runs_on_the_states_before_the_targets_only():
    got = response_logits(Echo(), 0.5, SEQUENCES)
    assert got.shape == (2, T, 3)
    np.testing.assert_array_equal(
        got[..., 0], [[8.5, 5.5, 6.5, 2.5], [6.5, 9.5, 2.5, 0.5]]
    )


def test_leading_batch_axes_come_back():
    pairs = Sequences(
        *(
            jnp.stack([x, jnp.flip(x, 0)], axis=1)
            for x in (
                SEQUENCES.tokens,
                SEQUENCES.token_mask,
                SEQUENCES.response_mask,
            )
        )
    )
    got = action_hidden(Echo(), None, pairs)
    flat = action_hidden(Echo(), None, SEQUENCES)
    assert got.shape == (2, 2, T, 3)
    np.testing.assert_array_equal(got[:, 0], flat)
    np.testing.assert_array_equal(got[:, 1], flat[::-1])


def test_a_row_without_prompt_is_refused():
    bare = Sequences(
        SEQUENCES.tokens[:, P:], SEQUENCES.token_mask[:, P:], SEQUENCES.response_mask
    )
    with pytest.raises(ValueError, match="no prompt column"):
        response_hidden(Echo(), None, bare)


def test_the_decoder_fulfils_the_protocol():
    assert isinstance(Decoder(LLAMA), CausalLM)
    assert not isinstance(Echo(), CausalLM)
