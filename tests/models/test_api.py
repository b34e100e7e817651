"""States before and after each target, read from the right columns."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models.api import (
    CausalLM,
    action_hidden,
    positions_from_mask,
    response_hidden,
    response_logits,
    sequence_hidden,
)
from rkd_jax.models.decoder import Decoder
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
