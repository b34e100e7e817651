"""Distillation from a list of tokens on the enumerable bed, against float64 numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import generalized_jsd, reverse_kl
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.topk_kd import make_topk_kd
from rkd_jax.signals.teacher import make_teacher_log_probs
from rkd_jax.signals.topk import make_topk
from rkd_jax.types import DemonstrationBatch, Sequences, TeacherSignal, TopkSignal
from tests.evaluation.bigram import Bigram
from tests.tabular.bed import (
    BED_E,
    CHOSEN,
    REJECTED,
    STUDENT,
    TEACHER,
    TabularLM,
    bed_sequences,
    log_softmax,
)

MODEL = TabularLM()
NUMBERS, INDICES = np.array([0, 1, 0]), np.array([CHOSEN, REJECTED, 7])
MASK = BED_E.mask[INDICES]
OURS, THEIRS = make_topk_kd(MODEL), make_kd(MODEL)

pytestmark = pytest.mark.usefixtures("x64")


def demonstrations():
    sequences = bed_sequences(NUMBERS, INDICES)
    return DemonstrationBatch(sequences, sequences, jnp.arange(3))


def signal_of(top_k, table=TEACHER, temperature=1.0):
    sequences = demonstrations().teacher_sequences
    topk = make_topk(MODEL, top_k=top_k, temperature=temperature)
    return topk({"logits": jnp.asarray(table)}, sequences)


@functools.cache
def compiled(objective):
    """Outcome and gradient in the table."""

    def loss(table, signal):
        batch = demonstrations()
        out = objective.student_loss({"logits": table}, None, None, batch, signal, None)
        return out.total, out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def call(objective, signal, table=STUDENT):
    return compiled(objective)(jnp.asarray(table), signal)[0][1]


def gradient(objective, signal, table=STUDENT):
    return np.asarray(compiled(objective)(jnp.asarray(table), signal)[1])


def visited():
    """(prompt, prefix, action) of every target."""
    for x, i in zip(NUMBERS, INDICES, strict=True):
        for t, action in enumerate(BED_E.sequences[i]):
            yield x, BED_E.states[i, t], action


def buckets(scores, top):
    """Log-probs of the tokens in ``top`` and of all others together."""
    probs = np.exp(log_softmax(scores))
    return np.log([*probs[top], np.delete(probs, top).sum()])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_divergence_of_the_buckets_by_hand(temperature):
    objective = make_topk_kd(MODEL, temperature=temperature)
    out = call(objective, signal_of(1, temperature=temperature))
    total = 0.0
    for x, k, _ in visited():
        top = [TEACHER[x, k].argmax()]
        p, q = (
            buckets(scores[x, k] / temperature, top) for scores in (TEACHER, STUDENT)
        )
        total += (np.exp(p) * (p - q)).sum()
    np.testing.assert_allclose(out.total, total, rtol=1e-10)
    np.testing.assert_allclose(out.metrics["student/divergence"].total, total)
    assert float(out.weight) == MASK.sum()


def test_another_divergence_of_the_buckets_by_hand():
    jsd = functools.partial(generalized_jsd, beta=0.3)
    out = call(make_topk_kd(MODEL, jsd), signal_of(1))
    total = 0.0
    for x, k, _ in visited():
        top = [TEACHER[x, k].argmax()]
        p, q = (np.exp(buckets(scores[x, k], top)) for scores in (TEACHER, STUDENT))
        m = 0.3 * p + 0.7 * q
        total += (0.3 * p * np.log(p / m) + 0.7 * q * np.log(q / m)).sum()
    np.testing.assert_allclose(out.total, total, rtol=1e-10)


def test_a_divergence_that_a_full_list_makes_infinite_is_refused():
    with pytest.raises(ValueError, match=r"reverse_kl\(\) is infinite where"):
        make_topk_kd(MODEL, reverse_kl)


def test_the_gradient_by_hand():
    """q - p inside the list; outside, the tail's surplus shared out as q shares it."""
    found, expected = gradient(OURS, signal_of(1)), np.zeros(BED_E.table_shape)
    for x, k, _ in visited():
        p, q = (np.exp(log_softmax(scores[x, k])) for scores in (TEACHER, STUDENT))
        listed = np.arange(3) == p.argmax()
        outside = q * (1 - p[~listed].sum() / q[~listed].sum())
        expected[x, k] += np.where(listed, q - p, outside)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("top_k", [2, 3])
def test_it_is_kd_where_at_most_one_token_is_not_listed(top_k):
    sequences = demonstrations().teacher_sequences
    full = make_teacher_log_probs(MODEL)({"logits": jnp.asarray(TEACHER)}, sequences)
    found = call(OURS, signal_of(top_k))
    expected = call(THEIRS, TeacherSignal(full))
    np.testing.assert_allclose(found.total, expected.total, rtol=1e-9)
    np.testing.assert_array_equal(found.weight, expected.weight)
    one, other = (x.metrics["student/divergence"] for x in (found, expected))
    np.testing.assert_allclose(one.total, other.total, rtol=1e-9)
    np.testing.assert_allclose(
        gradient(OURS, signal_of(top_k)),
        gradient(THEIRS, TeacherSignal(full)),
        atol=1e-10,
    )


def test_nan_in_padding_changes_nothing():
    clean = signal_of(1)
    assert not MASK.all()
    mask = MASK[..., None]
    dirty = TopkSignal(
        jnp.where(mask, clean.ids, 10**6), jnp.where(mask, clean.log_probs, jnp.nan)
    )
    assert call(OURS, dirty).total == call(OURS, clean).total
    np.testing.assert_array_equal(gradient(OURS, dirty), gradient(OURS, clean))


def test_it_vanishes_at_the_teacher_and_leaves_the_signal_alone():
    signal = signal_of(1)
    assert abs(float(call(OURS, signal, TEACHER).total)) < 1e-10
    np.testing.assert_allclose(gradient(OURS, signal, TEACHER), 0.0, atol=1e-10)

    @jax.jit
    @jax.grad
    def slope(log_probs):
        given = TopkSignal(signal.ids, log_probs)
        return OURS.student_loss(
            {"logits": jnp.asarray(STUDENT)}, None, None, demonstrations(), given, None
        ).total

    assert not np.asarray(slope(signal.log_probs)).any()


def test_a_batch_without_a_target_is_zero():
    batch, signal = demonstrations(), signal_of(1)
    nothing = dataclasses.replace(
        batch.sequences, response_mask=jnp.zeros_like(batch.sequences.response_mask)
    )
    batch = dataclasses.replace(batch, sequences=nothing)

    @jax.jit
    def step(table):
        def loss(table):
            out = OURS.student_loss({"logits": table}, None, None, batch, signal, None)
            return out.total, out

        return jax.value_and_grad(loss, has_aux=True)(table)

    (total, out), slope = step(jnp.asarray(STUDENT))
    assert float(total) == float(out.weight) == 0.0
    assert not np.asarray(slope).any()


@pytest.mark.float32
def test_states_of_padding_may_be_nan_and_logits_are_capped():
    """The bigram's padding states are NaN; its configuration is given a soft cap."""

    @dataclasses.dataclass(frozen=True)
    class Capped(type(Bigram(3).config)):
        logit_softcap: float = 2.0

    model, rng = Bigram(7), np.random.default_rng(0)
    model.config = Capped(7, 7)
    student, teacher = 3 * rng.normal(size=(2, 7, 7)).astype(np.float32)
    tokens = np.array([[0, 3, 4, 6, 0], [5, 1, 2, 4, 6]], np.int32)
    mask = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    sequences = Sequences(tokens, mask, mask[:, 2:])
    batch = DemonstrationBatch(sequences, sequences, np.arange(2))
    p = log_softmax(teacher.astype(np.float64))[tokens[:, 1:-1]]
    ids = np.argsort(-p, axis=-1)[..., :3].astype(np.int32)
    signal = TopkSignal(ids, np.take_along_axis(p, ids, -1).astype(np.float32))
    loss = jax.jit(make_topk_kd(model).student_loss, static_argnums=(1, 2, 5))
    out = loss({"table": jnp.asarray(student)}, None, None, batch, signal, None)
    expected = 0.0
    for row, column in np.argwhere(mask[:, 2:]):
        before = tokens[row, 1 + column]
        top = ids[row, column]
        left = buckets(teacher[before].astype(np.float64), top)
        right = buckets(2 * np.tanh(student[before].astype(np.float64) / 2), top)
        expected += (np.exp(left) * (left - right)).sum()
    np.testing.assert_allclose(out.total, expected, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        make_topk_kd(MODEL, temperature=temperature)


def test_a_list_taken_at_another_temperature_is_refused():
    """By its own word; one that says nothing is taken as it is."""
    signal = signal_of(2)
    assert signal.temperature == 1.0
    warm = make_topk_kd(MODEL, temperature=2.0)
    with pytest.raises(ValueError, match=r"taken at temperature 1, .* is at 2: make"):
        call(warm, signal)
    silent = dataclasses.replace(signal, temperature=None)
    assert np.isfinite(call(warm, silent).total)
