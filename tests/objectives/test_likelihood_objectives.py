"""SFT, SeqKD, KD and DPO on the enumerable bed, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.sft import make_seqkd, make_sft
from rkd_jax.types import (
    DemonstrationBatch,
    PreferenceBatch,
    ReferenceSignal,
    TeacherSignal,
)
from tests.tabular.bed import (
    BED_E,
    CHOSEN,
    REFERENCE,
    REJECTED,
    STUDENT,
    TEACHER,
    TabularLM,
    bed_sequences,
    log_softmax,
)

MODEL = TabularLM()
NUMBERS, INDICES = np.array([0, 1, 0]), np.array([CHOSEN, REJECTED, 7])


pytestmark = pytest.mark.usefixtures("x64")


def params(table=STUDENT):
    return {"logits": jnp.asarray(table)}


def demonstrations(indices=INDICES):
    sequences = bed_sequences(NUMBERS, indices)
    return DemonstrationBatch(sequences, sequences, jnp.arange(3))


def call(objective, batch, signal=(), table=STUDENT):
    return objective.student_loss(params(table), None, None, batch, signal, None)


def gradient(objective, batch, signal=()):
    def total(p):
        return objective.student_loss(p, None, None, batch, signal, None).total

    return jax.grad(total)(params())["logits"]


def poisoned(array, mask):
    """NaN wherever the mask is not set."""
    shape = mask.shape + (1,) * (array.ndim - mask.ndim)
    return jnp.where(mask.reshape(shape), array, jnp.nan)


def test_sft_is_the_summed_negative_log_likelihood():
    out = call(make_sft(MODEL), demonstrations())
    expected = -BED_E.sequence_log_probs(STUDENT)[NUMBERS, INDICES].sum()
    np.testing.assert_allclose(out.total, expected, rtol=1e-12)
    assert float(out.weight) == BED_E.mask[INDICES].sum()


def test_sft_gradient_is_softmax_minus_one_hot_at_visited_states():
    found = gradient(make_sft(MODEL), demonstrations())
    expected = np.zeros(BED_E.table_shape)
    probs = np.exp(log_softmax(STUDENT))
    for x, i in zip(NUMBERS, INDICES, strict=True):
        for t, action in enumerate(BED_E.sequences[i]):
            state = BED_E.states[i, t]
            expected[x, state] += probs[x, state] - np.eye(3)[action]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_seqkd_is_sft_on_the_teachers_text():
    batch = demonstrations()
    assert make_seqkd(MODEL).name == "seqkd"
    assert call(make_seqkd(MODEL), batch).total == call(make_sft(MODEL), batch).total


def test_the_policy_of_a_temperature_is_of_the_divided_logits():
    batch = demonstrations()
    expected = -BED_E.sequence_log_probs(STUDENT / 0.5)[NUMBERS, INDICES].sum()
    for make in (make_sft, make_seqkd):
        out = call(make(MODEL, temperature=0.5), batch)
        np.testing.assert_allclose(out.total, expected, rtol=1e-12)
    out = call(
        make_kd(MODEL, temperature=0.5), batch, teacher_signal(batch, table=TEACHER / 2)
    )
    log_p, log_q = log_softmax(TEACHER / 2), log_softmax(STUDENT / 0.5)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    along = divergence[NUMBERS[:, None], BED_E.states[INDICES]]
    np.testing.assert_allclose(out.total, along[BED_E.mask[INDICES]].sum(), rtol=1e-12)
    np.testing.assert_allclose(out.metrics["student/nll"].total, expected, rtol=1e-12)


@pytest.mark.parametrize("make", [make_sft, make_seqkd, make_kd])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(make, temperature):
    with pytest.raises(ValueError, match="temperature"):
        make(MODEL, temperature=temperature)


def teacher_signal(batch, poison=False, table=TEACHER):
    rows = jnp.asarray(log_softmax(table)[NUMBERS[:, None], BED_E.states[INDICES]])
    mask = batch.sequences.response_mask
    return TeacherSignal(poisoned(rows, mask) if poison else rows)


def test_kd_is_the_forward_kl_along_the_responses():
    batch = demonstrations()
    out = call(make_kd(MODEL), batch, teacher_signal(batch))
    log_p, log_q = log_softmax(TEACHER), log_softmax(STUDENT)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    expected = sum(
        divergence[x, BED_E.states[i, t]]
        for x, i in zip(NUMBERS, INDICES, strict=True)
        for t in range(len(BED_E.sequences[i]))
    )
    np.testing.assert_allclose(out.total, expected, rtol=1e-12)


def test_kd_ignores_nan_padding_in_value_and_gradient():
    batch = demonstrations()
    clean, dirty = teacher_signal(batch), teacher_signal(batch, poison=True)
    objective = make_kd(MODEL)
    assert not bool(batch.sequences.response_mask.all())  # there is padding to poison
    assert call(objective, batch, dirty).total == call(objective, batch, clean).total
    np.testing.assert_array_equal(
        gradient(objective, batch, dirty), gradient(objective, batch, clean)
    )


def test_kd_vanishes_with_zero_gradient_at_the_teacher():
    batch = demonstrations()
    objective, signal = make_kd(MODEL), teacher_signal(batch)
    assert abs(float(call(objective, batch, signal, TEACHER).total)) < 1e-12
    grads = jax.grad(
        lambda p: objective.student_loss(p, None, None, batch, signal, None).total
    )(params(TEACHER))
    np.testing.assert_allclose(grads["logits"], 0.0, atol=1e-12)


def test_kd_sends_no_gradient_to_the_teacher():
    batch = demonstrations()
    objective = make_kd(MODEL)

    def total(signal):
        return objective.student_loss(params(), None, None, batch, signal, None).total

    grads = jax.grad(total)(teacher_signal(batch))
    assert not np.asarray(grads.log_probs).any()


def preferences(label=1.0, empty=False):
    """The bed's named pair; optionally followed by a row without any target."""
    indices = np.array([[CHOSEN, REJECTED]] * (2 if empty else 1))
    sequences = bed_sequences(np.zeros_like(indices), indices)
    if empty:
        mask = sequences.response_mask.at[1].set(False)
        sequences = type(sequences)(sequences.tokens, sequences.token_mask, mask)
    rows = len(indices)
    return PreferenceBatch(
        sequences,
        sequences,
        jnp.full(rows, label),
        jnp.full((rows, 2), jnp.nan),
        jnp.arange(rows),
    )


def reference_signal(rows=1, filler=0.0):
    scores = BED_E.sequence_log_probs(REFERENCE)[0, [CHOSEN, REJECTED]]
    stack = np.stack([scores, np.full(2, filler)])[:rows]
    return ReferenceSignal(jnp.asarray(stack))


def test_dpo_of_the_named_pair_is_the_golden_value():
    out = call(make_dpo(MODEL, beta=0.5), preferences(), reference_signal())
    np.testing.assert_allclose(out.total, 0.868593, atol=5e-7)
    np.testing.assert_allclose(
        out.metrics["student/margin"].total, 0.5 * -0.649311, atol=5e-7
    )
    assert float(out.metrics["student/accuracy"].total) == 0.0


@pytest.mark.parametrize("label", [0.0, 0.3, 0.5, 1.0])
def test_dpo_with_soft_labels_mixes_both_orders(label):
    out = call(make_dpo(MODEL, beta=0.5), preferences(label), reference_signal())
    margin = -0.5 * 0.6493112896
    expected = label * np.log1p(np.exp(-margin)) + (1 - label) * np.log1p(
        np.exp(margin)
    )
    np.testing.assert_allclose(out.total, expected, atol=1e-6)


def test_dpo_at_temperature_divides_the_logits():
    temperature = 0.5
    scores = BED_E.sequence_log_probs(STUDENT / temperature)[0, [CHOSEN, REJECTED]]
    reference = reference_signal().log_probs[0]
    margin = 0.1 * ((scores[0] - scores[1]) - (reference[0] - reference[1]))
    out = call(
        make_dpo(MODEL, temperature=temperature), preferences(), reference_signal()
    )
    np.testing.assert_allclose(out.total, np.log1p(np.exp(-margin)), rtol=1e-10)


def test_dpo_does_not_count_an_empty_pair_even_with_nan_reference():
    objective = make_dpo(MODEL, beta=0.5)
    one = call(objective, preferences(), reference_signal())
    two = call(objective, preferences(empty=True), reference_signal(2, np.nan))
    assert float(two.weight) == 1.0
    np.testing.assert_allclose(two.total, one.total, rtol=1e-12)
    grads = gradient(objective, preferences(empty=True), reference_signal(2, np.nan))
    expected = gradient(objective, preferences(), reference_signal())
    np.testing.assert_allclose(grads, expected, atol=1e-12)
