"""TVKD and the released variants on the enumerable bed, against float64 numpy.

Every objective sees one batch: three pairs of responses of different lengths, three
columns of padding, and a fourth pair that is empty and whose signals are NaN. What is
expected is computed from the three pairs alone (U8).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses.tvkd_release import RELEASE_VARIANTS
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.tvkd import make_tvkd, make_tvkd_release
from rkd_jax.signals.values import make_release_signal, make_shaping
from rkd_jax.types import (
    PreferenceBatch,
    ReferenceSignal,
    ReleaseSignal,
    Sequences,
    ShapingSignal,
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

pytestmark = pytest.mark.usefixtures("x64")

MODEL = TabularLM()
NUMBERS = np.array([[0, 0], [1, 1], [0, 0]])  # one prompt per pair
INDICES = np.array([[CHOSEN, REJECTED], [0, 17], [30, 5]])
LABELS = np.array([1.0, 0.7, 0.0])
SHAPING = np.array([[-0.4, -0.34], [0.9, -1.3], [0.2, 2.0]])
GAMMA, BETA, ALPHA = 0.7, 1.3, 0.6


def params(table=STUDENT):
    return {"logits": jnp.asarray(table)}


def batch():
    numbers, indices = (np.concatenate([x, x[:1]]) for x in (NUMBERS, INDICES))
    sequences = bed_sequences(numbers, indices)
    columns = [(0, 0), (0, 0), (0, 3)]
    response_mask = np.pad(sequences.response_mask, columns)
    response_mask[-1] = False
    sequences = Sequences(
        jnp.asarray(np.pad(sequences.tokens, columns, constant_values=2)),  # EOS
        jnp.asarray(np.pad(sequences.token_mask, columns)),
        jnp.asarray(response_mask),
    )
    label = jnp.asarray([*LABELS, 1.0])
    rewards = jnp.full((4, 2), jnp.nan)
    return PreferenceBatch(sequences, sequences, label, rewards, jnp.arange(4))


def with_empty_pair(values):
    return jnp.asarray(np.concatenate([values, np.full((1, 2), np.nan)]))


def total_of(objective, given):
    """The function of parameters and signal to differentiate, and its whole output."""

    def total(p, signal):
        out = objective.student_loss(p, None, None, given, signal, None)
        return out.total, out

    return total


def scores(table):
    return BED_E.sequence_log_probs(table)[NUMBERS, INDICES]


def mixed(logits):
    wins, losses = np.logaddexp(0, -logits), np.logaddexp(0, logits)
    return LABELS * wins + (1 - LABELS) * losses


def difference(values):
    return values[:, 0] - values[:, 1]


# The default

SETTINGS = {
    "plus": {"alpha": 0.8},
    "minus": {"alpha": 0.8, "sign": -1.0},
    "alpha is beta": {},
    "alpha zero": {"alpha": 0.0},
    "free": {"alpha": 0.8, "reference_free": True},
    "tempered": {"alpha": 0.8, "temperature": 0.5},
}


@functools.cache
def evaluated():
    """Per setting: the output, and the gradients in the student and in the signal."""
    with jax.enable_x64(True):
        given = batch()
        reference, shaping = map(with_empty_pair, (scores(REFERENCE), SHAPING))
        cases = {"dpo": (make_dpo(MODEL, beta=0.5), ReferenceSignal(reference))}
        for name, options in SETTINGS.items():
            signal = ShapingSignal(None if name == "free" else reference, shaping)
            cases[name] = (make_tvkd(MODEL, beta=0.5, **options), signal)

        def both(objective):
            total = total_of(objective, given)
            return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)

        def every(p):
            return {
                name: both(objective)(p, signal)
                for name, (objective, signal) in cases.items()
            }

        found = jax.jit(every)(params()).items()
        return {name: (out, p["logits"], data) for name, ((_, out), (p, data)) in found}


def gradient_by_hand(slopes, temperature):
    """Of the sum of slopes times scores, in the table: one-hot minus softmax."""
    gradient, probs = (
        np.zeros(STUDENT.shape),
        np.exp(log_softmax(STUDENT / temperature)),
    )
    for x, i, slope in zip(NUMBERS.flat, INDICES.flat, slopes.flat, strict=True):
        for k, a in zip(BED_E.states[i], BED_E.sequences[i], strict=False):
            gradient[x, k] += slope * (np.eye(3)[a] - probs[x, k]) / temperature
    return gradient


@pytest.mark.parametrize("name", SETTINGS)
def test_u8_value_metrics_and_gradient_of_the_pairs_alone(name):
    out, gradient, in_signal = evaluated()[name]
    options = {"alpha": 0.5, "sign": 1.0, "temperature": 1.0} | SETTINGS[name]
    frozen = 0.0 if name == "free" else scores(REFERENCE)
    margin = 0.5 * difference(scores(STUDENT / options["temperature"]) - frozen)
    added = options["sign"] * options["alpha"] * difference(SHAPING)
    logits = margin + added
    np.testing.assert_allclose(out.total, mixed(logits).sum(), rtol=1e-12)
    assert float(out.weight) == 3.0
    expected = {
        "student/preference_loss": mixed(logits),
        "student/margin": margin,
        "student/accuracy": margin > 0,
        "student/shaping_margin": added,
    }
    assert out.metrics.keys() == expected.keys()
    for key, values in expected.items():
        found = out.metrics[key]
        np.testing.assert_allclose(found.total, values.sum(), rtol=1e-12, err_msg=key)
        assert float(found.weight) == 3.0
    slope = 0.5 * (1 / (1 + np.exp(-logits)) - LABELS)
    by_hand = gradient_by_hand(np.stack([slope, -slope], -1), options["temperature"])
    np.testing.assert_allclose(gradient, by_hand, atol=1e-12)
    for leaf in jax.tree.leaves(in_signal):  # G3: the signal is data
        np.testing.assert_array_equal(leaf, np.zeros((4, 2)))


def test_alpha_zero_is_dpo_in_value_gradient_and_metrics():
    plain, in_plain, _ = evaluated()["dpo"]
    out, gradient, _ = evaluated()["alpha zero"]
    np.testing.assert_allclose(out.total, plain.total, rtol=1e-14)
    np.testing.assert_allclose(gradient, in_plain, atol=1e-14)
    for name, mean in plain.metrics.items():
        np.testing.assert_allclose(out.metrics[name].total, mean.total, rtol=1e-14)


def test_what_is_required():
    assert make_tvkd(MODEL).requires == ("log_probs", "shaping")
    assert make_tvkd(MODEL, reference_free=True).requires == ("shaping",)
    signal = ShapingSignal(None, with_empty_pair(SHAPING))
    unsigned = make_tvkd(MODEL, sign=0.5, reference_free=True)
    with pytest.raises(ValueError, match="sign must be 1 or -1"):
        jax.eval_shape(total_of(unsigned, batch()), params(), signal)


# The released variants. V = 3, so a support of 1 merges two tokens and a support of 2
# merges none: its buckets are the tokens, in another order.


def release_signal(support):
    """With NaN where the pair is empty and no token's id where the mask is not set."""
    sequences = batch().sequences
    found = make_release_signal(MODEL, support=support)(params(TEACHER), sequences)
    found = jax.tree.map(np.asarray, found)
    mask = np.expand_dims(sequences.response_mask, -1)
    return ReleaseSignal(
        topk_ids=jnp.asarray(np.where(mask, found.topk_ids, -100)),
        teacher=with_empty_pair(found.teacher[:-1]),
        reference=with_empty_pair(scores(REFERENCE)),
        values=with_empty_pair(found.values[:-1]),
        next_values=with_empty_pair(found.next_values[:-1]),
    )


def by_hand(variant, support, table=STUDENT):
    """[3, 2] returns, one target after the other."""
    teacher, student, reference = map(log_softmax, (TEACHER, table, REFERENCE))
    likely = np.argsort(-TEACHER, axis=-1)[..., :support]

    def buckets(log_probs, x, k):
        probs = np.exp(log_probs[x, k])
        ids = likely[x, k]
        return np.log(np.append(probs[ids], probs.sum() - probs[ids].sum()))

    def log_prob(log_probs, x, k, a):
        ids = list(likely[x, k])
        return buckets(log_probs, x, k)[ids.index(a) if a in ids else support]

    def value(x, k):
        return np.log(np.exp(0.7 * buckets(teacher, x, k)).sum())

    def entropy(x, k):
        each = buckets(student, x, k)
        return -(np.exp(each) * each).sum()

    def response(x, i):
        total, y, states = 0.0, BED_E.sequences[i], BED_E.states[i]
        for t, a in enumerate(y):
            k, last = states[t], t == len(y) - 1
            following = 0.0 if last else value(x, states[t + 1])
            uncertain = 0.0 if last else entropy(x, states[t + 1])
            q = log_prob(student, x, k, a)
            ratio = student[x, k, a] - reference[x, k, a]
            total += {
                "release_sum": q - GAMMA * following,
                "release_pi": q - GAMMA * following + value(x, k),
                "tpkd": BETA * q - (1 - GAMMA) * value(x, k),
                "tpkd_ref": BETA * ratio - (1 - GAMMA) * following,
                "full_dpo": q - ALPHA * log_prob(teacher, x, k, a) - GAMMA * following,
                "release_entropy": q - GAMMA * uncertain,
            }[variant]
        return total

    pairs = zip(NUMBERS.ravel(), INDICES.ravel(), strict=True)
    return np.reshape([response(x, i) for x, i in pairs], NUMBERS.shape)


each_variant = pytest.mark.parametrize("variant", RELEASE_VARIANTS)


@functools.cache
def released():
    """Per variant, as `evaluated`, given no more than what it requires."""
    with jax.enable_x64(True):
        signal, pairs = release_signal(support=1), batch()
        sums = ("teacher", "reference", "values", "next_values")

        def one(p, data, variant):
            objective = make_tvkd_release(
                MODEL, variant=variant, gamma=GAMMA, beta=BETA, alpha=ALPHA
            )
            every = data | {"topk_ids": signal.topk_ids}
            given = {name: every[name] for name in objective.requires}
            return total_of(objective, pairs)(p, ReleaseSignal(**given))

        both = jax.value_and_grad(one, argnums=(0, 1), has_aux=True)
        found = jax.jit(
            lambda p, data: {name: both(p, data, name) for name in RELEASE_VARIANTS}
        )(params(), {name: getattr(signal, name) for name in sums})
        return {
            name: (out, p["logits"], data)
            for name, ((_, out), (p, data)) in found.items()
        }


def visited_entries():
    """(x, k, a) for the prefixes that the pairs pass through."""
    for x, i in zip(NUMBERS.flat, INDICES.flat, strict=True):
        for k in BED_E.states[i, : len(BED_E.sequences[i])]:
            yield from ((x, k, a) for a in range(3))


@each_variant
def test_u8_released_variant_value_and_gradient_of_the_pairs_alone(variant):
    """Kills trap b of the release, whose loss depends on the other pairs' lengths."""
    out, gradient, in_signal = released()[variant]
    margin = difference(by_hand(variant, 1))
    np.testing.assert_allclose(out.total, mixed(margin).sum(), rtol=1e-12)
    assert float(out.weight) == 3.0
    found = {name: mean.total for name, mean in out.metrics.items()}
    np.testing.assert_allclose(found["student/margin"], margin.sum(), rtol=1e-10)
    assert float(found["student/accuracy"]) == (margin > 0).sum()
    assert found["student/preference_loss"] == out.total
    expected = np.zeros(STUDENT.shape)
    for index in visited_entries():
        bump = np.zeros(STUDENT.shape)
        bump[index] = 1e-5
        up, down = (
            mixed(difference(by_hand(variant, 1, STUDENT + s * bump))).sum()
            for s in (1, -1)
        )
        expected[index] = (up - down) / 2e-5
    np.testing.assert_allclose(gradient, expected, atol=1e-9)
    for leaf in jax.tree.leaves(in_signal):  # G3: the signal is data
        np.testing.assert_array_equal(leaf, np.zeros((4, 2)))


def test_u6_u7_released_variants_that_are_the_default():
    """tpkd_ref is sign +; release_pi is sign - without reference, on token buckets."""
    signal, pairs = release_signal(support=2), batch()
    shaping = make_shaping(MODEL, gamma=GAMMA)(params(TEACHER), pairs.sequences)

    def losses(p):
        for variant, sign in (("tpkd_ref", 1.0), ("release_pi", -1.0)):
            free = variant == "release_pi"
            default = make_tvkd(MODEL, beta=1.0, sign=sign, reference_free=free)
            given = ShapingSignal(None if free else signal.reference, shaping)
            release = make_tvkd_release(MODEL, variant=variant, gamma=GAMMA)
            for objective, data in ((release, signal), (default, given)):
                yield total_of(objective, pairs)(p, data)[0]

    plus, plus_default, minus, minus_default = jax.jit(lambda p: list(losses(p)))(
        params()
    )
    np.testing.assert_allclose(plus, plus_default, rtol=1e-12)
    np.testing.assert_allclose(minus, minus_default, rtol=1e-12)


def test_what_the_released_variants_require():
    def required(variant):
        return make_tvkd_release(MODEL, variant=variant, gamma=GAMMA).requires

    assert required("release_sum") == ("next_values", "topk_ids")
    assert required("tpkd_ref") == ("reference", "next_values")
    assert required("release_entropy") == ("topk_ids",)
    with pytest.raises(ValueError, match="variant must be one of .*, got 'adv'"):
        required("adv")
