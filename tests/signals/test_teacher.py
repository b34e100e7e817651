"""Frozen-model signals on the enumerable bed, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.signals.teacher import (
    make_features,
    make_sequence_scorer,
    make_teacher_log_probs,
    make_token_scorer,
)
from tests.tabular.bed import (
    BED_E,
    TEACHER,
    TabularLM,
    bed_sequences,
    log_softmax,
)

MODEL = TabularLM()
NUMBERS = np.array([[0, 0], [1, 1]])
INDICES = np.array([[3, 30], [0, 17]])


pytestmark = pytest.mark.usefixtures("x64")


def params():
    return {"logits": jnp.asarray(TEACHER)}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_are_the_tables_rows_and_zero_where_masked(temperature):
    sequences = bed_sequences(NUMBERS, INDICES)
    found = make_teacher_log_probs(MODEL, temperature=temperature)(params(), sequences)
    table = log_softmax(TEACHER / temperature)
    expected = table[NUMBERS[..., None], BED_E.states[INDICES]]
    mask = BED_E.mask[INDICES]
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-12)
    assert not np.asarray(found)[~mask].any()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sequence_scores_sum_the_token_scores(temperature):
    sequences = bed_sequences(NUMBERS, INDICES)
    expected = BED_E.sequence_log_probs(TEACHER / temperature)[NUMBERS, INDICES]
    tokens = make_token_scorer(MODEL, temperature=temperature)(params(), sequences)
    sums = make_sequence_scorer(MODEL, temperature=temperature)(params(), sequences)
    np.testing.assert_allclose(tokens.sum(-1), expected, atol=1e-12)
    np.testing.assert_allclose(sums, expected, atol=1e-12)


def test_features_are_the_states_after_each_target():
    sequences = bed_sequences(NUMBERS, INDICES)
    found = np.asarray(make_features(MODEL)(params(), sequences))
    mask = BED_E.mask[INDICES]
    assert (found.sum(-1) == mask).all()  # one-hot on targets, zero elsewhere
    # Two responses that differ in their first action differ in every later state, and
    # the last action, EOS included, has a state of its own.
    nodes = found.argmax(-1)
    first = nodes[0, 0][mask[0, 0]]
    assert len(set(first.tolist())) == len(first)


@pytest.mark.parametrize(
    "make", [make_teacher_log_probs, make_token_scorer, make_sequence_scorer]
)
def test_no_gradient_reaches_the_frozen_parameters(make):
    sequences = bed_sequences(NUMBERS, INDICES)
    score = make(MODEL)
    grads = jax.grad(lambda p: score(p, sequences).sum())(params())
    assert not np.asarray(grads["logits"]).any()
