"""What a frozen model said of a text is not asked again."""

import jax
import numpy as np

from experiments.game import CHUNK, Table, TextBook
from rkd_jax.types import Sequences


def rows(numbers) -> Sequences:
    """One row per number, four tokens wide, the last two a response."""
    numbers = np.asarray(numbers, np.int32)
    tokens = np.broadcast_to(numbers[..., None], (*numbers.shape, 4)).copy()
    mask = np.ones(tokens.shape, bool)
    return Sequences(tokens, mask, mask[..., 2:])


class Model:
    """Twice the token; counts the rows it is shown."""

    seen = 0

    def __call__(self, sequences: Sequences) -> np.ndarray:
        self.seen += len(sequences.tokens)
        return 2.0 * sequences.tokens[:, 2:]


def test_every_text_is_computed_once():
    model = Model()
    book = TextBook(model)
    pairs = rows([[1, 2], [3, 1], [2, 3]])
    found = book.look_up(pairs)
    assert found.shape == (3, 2, 2)
    np.testing.assert_array_equal(found, 2.0 * pairs.tokens[..., 2:])
    assert model.seen == CHUNK  # three texts, filled up to one shape
    np.testing.assert_array_equal(book.look_up(rows([3])), [[6.0, 6.0]])
    assert model.seen == CHUNK
    book.look_up(rows([[4, 1]]))
    assert model.seen == 2 * CHUNK


def test_the_mask_is_part_of_the_text():
    model = Model()
    book = TextBook(model)
    one = rows([1])
    book.look_up(one)
    shorter = jax.tree.map(np.copy, one)
    shorter.token_mask[0, -1] = False
    book.look_up(shorter)
    assert model.seen == 2 * CHUNK


def test_a_table_hands_out_records_and_goes_through_all_of_them():
    numbers = np.arange(2 * (CHUNK + 3)).reshape(-1, 2)
    labels = np.linspace(0.0, 1.0, len(numbers))
    table = Table(rows(numbers), labels, TextBook(Model()))
    np.testing.assert_array_equal(
        table.states(np.array([4, 0])), 2.0 * table.rows([4, 0]).tokens[..., 2:]
    )

    def total(sequences, states, labels):
        assert len(labels) == CHUNK  # one shape
        return states.sum((-1, -2)) + labels + sequences.tokens[:, 0, 0]

    expected = 4.0 * numbers.sum(-1) + labels + numbers[:, 0]
    np.testing.assert_allclose(table.chunks(total), expected)
    assert len(table) == len(expected)
    assert Table(rows(numbers), None, None).states(slice(None)) is None
