"""A teacher's values and what they add to a preference, against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.signals.values import (
    length_correlation,
    make_release_signal,
    make_shaping,
    make_state_values,
    mean_value,
)
from rkd_jax.types import Sequences
from tests.evaluation.bigram import Bigram
from tests.tabular.bed import BED_E, TEACHER, TabularLM, bed_sequences, log_softmax

pytestmark = pytest.mark.usefixtures("x64")

MODEL = TabularLM()
NUMBERS = np.array([[0, 0], [1, 1]])
INDICES = np.array([[3, 30], [0, 17]])
MASK = BED_E.mask[INDICES]


def params():
    return {"logits": jnp.asarray(TEACHER)}


def sequences():
    return bed_sequences(NUMBERS, INDICES)


@functools.cache
def state_values(**options):
    return make_state_values(MODEL, **options)


def tables(value_source="log_probs", temperature=1.0, power=0.7, scale=1.0, top=None):
    """[2, 15]: V of every prefix. ``top`` tokens are told apart, the others merged."""
    scores = TEACHER / temperature
    if value_source == "log_probs":
        scores = log_softmax(scores)
    if top is not None:
        probs = np.sort(np.exp(scores), axis=-1)[..., ::-1]
        rest = probs[..., top:].sum(-1, keepdims=True)
        scores = np.log(np.concatenate([probs[..., :top], rest], axis=-1))
    return scale * np.log(np.exp(power * scores).sum(-1))


def paths(table, end):
    """V(s_0), ..., V(s_T) of each response, [2][2]; ``end`` is V(s_T) or a rule."""
    for x, i in zip(NUMBERS.ravel(), INDICES.ravel(), strict=True):
        length = len(BED_E.sequences[i])
        values = [table[x, BED_E.states[i, t]] for t in range(length)]
        yield [*values, values[-1] if end == "last_prefix" else end]


def shaping_by_hand(table, gamma, end=0.0):
    sums = [
        sum(gamma * v[t + 1] - v[t] for t in range(len(v) - 1))
        for v in paths(table, end)
    ]
    return np.reshape(sums, NUMBERS.shape)


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({}, {}),
        ({"temperature": 0.5, "power": 0.4, "scale": 2.0}, None),
        ({"value_source": "raw_logits", "power": 1.0}, None),
        ({"support": 1}, {"top": 1}),
    ],
    ids=["default", "tempered", "raw", "support"],
)
def test_values_before_and_after_each_target(options, by_hand):
    table = tables(**(options if by_hand is None else by_hand))
    found = state_values(**options)(params(), sequences())
    expected = table[NUMBERS[..., None], BED_E.states[INDICES]]
    np.testing.assert_allclose(found.before[MASK], expected[MASK], atol=1e-12)
    # The state after one target is the state before the next.
    inner = MASK[..., 1:]
    np.testing.assert_array_equal(
        found.after[..., :-1][inner], found.before[..., 1:][inner]
    )
    for values in found:
        assert not np.asarray(values)[~MASK].any()


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({"gamma": 0.7}, 0.0),
        ({"gamma": 1.0, "terminal": "last_prefix"}, "last_prefix"),
        # The table has no row after a response: its logits are 0, V is 0.3 log 3.
        ({"gamma": 1.0, "terminal": "after_eos"}, 0.3 * np.log(3)),
    ],
    ids=["zero", "last_prefix", "after_eos"],
)
def test_shaping_by_hand(options, end):
    found = make_shaping(MODEL, **options)(params(), sequences())
    expected = shaping_by_hand(tables(), options["gamma"], end)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_state_after_the_last_target_is_read_and_padding_is_not():
    """One pass; each response has its own end; the bigram's padding states are NaN."""
    model, rng = Bigram(7), np.random.default_rng(0)
    table = rng.normal(size=(7, 7)).astype(np.float32)
    batch = Sequences(
        tokens=jnp.array([[0, 3, 4, 6, 0, 0], [5, 3, 1, 2, 4, 6]], jnp.int32),
        token_mask=jnp.array([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool),
        response_mask=jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool),
    )
    value = np.log(np.exp(0.7 * log_softmax(table.astype(np.float64))).sum(-1))
    for options in ({"terminal": "after_eos"}, {"terminal": "zero", "support": None}):
        model.traces = 0
        found = make_shaping(model, **options)({"table": jnp.asarray(table)}, batch)
        assert model.traces == 1
        for row, visited in enumerate(([3, 4, 6], [3, 1, 2, 4, 6])):
            v = value[visited]
            if options["terminal"] == "zero":
                v = np.array([*v[:-1], 0.0])
            expected = (0.7 * v[1:] - v[:-1]).sum()
            np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_centring_by_the_corpus_mean():
    """Less c in every value is (1 - gamma) c T more, up to what a pair shares."""
    corpus = [(NUMBERS, INDICES), (NUMBERS, np.zeros_like(INDICES))]
    values_of = state_values()
    center = mean_value(values_of, params(), [bed_sequences(*rows) for rows in corpus])
    visited = [
        tables()[x[..., None], BED_E.states[i]][BED_E.mask[i]] for x, i in corpus
    ]
    assert center == pytest.approx(np.concatenate(visited).mean(), rel=1e-12)
    found = make_shaping(MODEL, center=center)(params(), sequences())
    plain, centred = (shaping_by_hand(tables() - c, 0.7) for c in (0.0, center))
    np.testing.assert_allclose(found, centred, atol=1e-12)
    added = 0.3 * center * MASK.sum(-1)
    np.testing.assert_allclose(found, plain + added + 0.7 * center, atol=1e-12)
    with pytest.raises(ValueError, match="no target"):
        mean_value(values_of, params(), [])


def test_length_correlation():
    lengths = MASK.sum(-1)
    shaping = np.array([[0.3, -1.0], [2.0, 0.5]])
    expected = np.corrcoef(shaping.ravel(), lengths.ravel())[0, 1]
    assert length_correlation(shaping, MASK) == pytest.approx(expected, rel=1e-12)
    assert length_correlation(-0.3 * lengths, MASK) == pytest.approx(-1.0)
    empty = np.concatenate([MASK, np.zeros((1, 2, 4), bool)])
    padded = np.concatenate([shaping, np.full((1, 2), np.nan)])
    assert length_correlation(padded, empty) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(length_correlation(np.ones((2, 2)), MASK))
    assert np.isnan(length_correlation(shaping, np.ones((2, 2, 4))))
    assert np.isnan(length_correlation(np.zeros((0, 2)), np.zeros((0, 2, 4))))


def test_release_signal_by_hand():
    found = make_release_signal(MODEL, support=1, terminal="after_eos")(
        params(), sequences()
    )
    # After a response the logits are 0: a third for one token, two thirds for the rest.
    end = np.log((1 / 3) ** 0.7 + (2 / 3) ** 0.7)
    walks = list(paths(tables(top=1), end))
    np.testing.assert_allclose(
        found.values, np.reshape([sum(v[:-1]) for v in walks], (2, 2)), atol=1e-12
    )
    np.testing.assert_allclose(
        found.next_values, np.reshape([sum(v[1:]) for v in walks], (2, 2)), atol=1e-12
    )
    assert found.reference is None
    likely = TEACHER.argmax(-1)
    ids = np.where(MASK, likely[NUMBERS[..., None], BED_E.states[INDICES]], 0)
    np.testing.assert_array_equal(found.topk_ids, ids[..., None])
    probs = np.exp(log_softmax(TEACHER))
    teacher = []
    for x, i in zip(NUMBERS.ravel(), INDICES.ravel(), strict=True):
        steps = zip(BED_E.states[i], BED_E.sequences[i], strict=False)
        picked = (
            (probs[x, k].max() if a == likely[x, k] else 1 - probs[x, k].max())
            for k, a in steps
        )
        teacher.append(sum(map(np.log, picked)))
    np.testing.assert_allclose(found.teacher, np.reshape(teacher, (2, 2)), atol=1e-12)


def test_no_gradient_reaches_the_teacher():
    shaping = make_shaping(MODEL, terminal="after_eos")
    signal = make_release_signal(MODEL, support=2)

    def total(p):
        cached = signal(p, sequences())
        sums = cached.teacher + cached.values + cached.next_values
        return (shaping(p, sequences()) + sums).sum()

    assert not np.asarray(jax.jit(jax.grad(total))(params())["logits"]).any()


def test_refusals():
    for options, message in [
        ({"gamma": 1.0}, "is plain DPO"),
        ({"power": 1.0}, "power = 1 on normalised"),
        ({"temperature": 0.0}, "temperature must lie in"),
        ({"terminal": "eos"}, "terminal must be one of zero, last_prefix, after_eos"),
        (
            {"value_source": "probs"},
            "value_source must be one of log_probs, raw_logits",
        ),
        ({"value_source": "raw_logits", "support": 2}, "raw_logits have none"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_shaping(MODEL, **options)
    with pytest.raises(ValueError, match="power = 1"):
        make_release_signal(MODEL, power=1.0)
    with pytest.raises(ValueError, match="terminal must be one of"):
        make_release_signal(MODEL, terminal="eos")
    for support in (0, 3):
        make = make_release_signal(MODEL, support=support)
        with pytest.raises(ValueError, match=f"support={support} must be positive and"):
            make(params(), sequences())
