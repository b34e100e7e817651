"""GKD on the enumerable bed, against float64 numpy; and the coin mixing its data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import forward_kl, generalized_jsd, reverse_kl
from rkd_jax.objectives.gkd import imitated_responses, make_gkd, mix_rows
from rkd_jax.objectives.kd import make_kd
from rkd_jax.types import DemonstrationBatch, ImitationBatch, TeacherSignal
from tests.tabular.bed import (
    BED_E,
    CHOSEN,
    REJECTED,
    STUDENT,
    TEACHER,
    bed_sequences,
    log_softmax,
)
from tests.tabular.posterior import QuickLM

MODEL = QuickLM()
NUMBERS = np.array([0, 1, 0, 1])
INDICES, OTHERS = np.array([[CHOSEN, REJECTED, 7, 12], [2, 5, 0, 20]])

pytestmark = pytest.mark.usefixtures("x64")


def params(table=STUDENT):
    return {"logits": jnp.asarray(table)}


def responses(indices=INDICES, numbers=NUMBERS):
    sequences = bed_sequences(numbers, indices)
    return DemonstrationBatch(sequences, sequences, jnp.arange(len(numbers)))


def signal(indices=INDICES, numbers=NUMBERS, table=TEACHER, filler=0.0):
    rows = log_softmax(table)[np.asarray(numbers)[:, None], BED_E.states[indices]]
    rows = np.where(BED_E.mask[indices][..., None], rows, filler)
    return TeacherSignal(jnp.asarray(rows))


def call(objective, batch, signal, table=STUDENT):
    return objective.student_loss(params(table), None, None, batch, signal, None)


def gradient(objective, batch, signal, argument=0):
    def total(params, signal):
        return objective.student_loss(params, None, None, batch, signal, None).total

    return jax.grad(total, argnums=argument)(params(), signal)


def visits(indices, numbers=NUMBERS):
    """(x, k) of every target."""
    return [
        (x, BED_E.states[i, t])
        for x, i in zip(numbers, indices, strict=True)
        for t in range(len(BED_E.sequences[i]))
    ]


def numpy_jsd(beta, temperature=1.0):
    """[2, 15] from the definition; the endpoints are the two KLs."""
    p, q = (np.exp(log_softmax(t / temperature)) for t in (TEACHER, STUDENT))
    m = beta * p + (1 - beta) * q
    if beta in (0.0, 1.0):
        left, right = (p, q) if beta == 0.0 else (q, p)
        return (left * np.log(left / right)).sum(-1)
    return (beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_divergence_along_the_imitated_responses(beta, temperature):
    divergence = functools.partial(generalized_jsd, beta=beta)
    objective = make_gkd(MODEL, divergence, temperature=temperature)
    batch = ImitationBatch(responses(), responses(OTHERS))
    at_temperature = signal(OTHERS, table=TEACHER / temperature, filler=np.nan)
    out = call(objective, batch, at_temperature)
    tokens = numpy_jsd(beta, temperature)
    expected = sum(tokens[visit] for visit in visits(OTHERS))
    np.testing.assert_allclose(out.total, expected, rtol=1e-10)
    assert float(out.weight) == BED_E.mask[OTHERS].sum()
    assert objective.requires == ("log_probs",)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_on_fixed_responses_it_is_kd(divergence):
    batch, taught = responses(), signal(filler=np.nan)
    found, parent = make_gkd(MODEL, divergence), make_kd(MODEL, divergence)
    for data in (batch, ImitationBatch(batch)):
        jax.tree.map(
            np.testing.assert_array_equal,
            call(found, data, taught),
            call(parent, batch, taught),
        )
        np.testing.assert_array_equal(
            gradient(found, data, taught)["logits"],
            gradient(parent, batch, taught)["logits"],
        )


def test_jsd_tends_to_the_kls_and_is_them_at_its_ends():
    batch, taught = responses(), signal()

    def total(divergence, **options):
        bound = functools.partial(divergence, **options)
        return float(call(make_gkd(MODEL, bound), batch, taught).total)

    forward, reverse = total(forward_kl), total(reverse_kl)
    small = 1e-6
    assert total(generalized_jsd, beta=0) == forward
    assert total(generalized_jsd, beta=1) == reverse
    # The interior form is smaller by the factor beta: the scale jumps at the ends.
    near = total(generalized_jsd, beta=small) / small
    assert near == pytest.approx(forward, rel=1e-4)
    near = total(generalized_jsd, beta=1 - small) / small
    assert near == pytest.approx(reverse, rel=1e-4)


def test_it_vanishes_at_the_teacher_and_sends_it_no_gradient():
    batch = responses()
    objective = make_gkd(MODEL, reverse_kl, temperature=2.0)
    same = signal(table=STUDENT / 2.0)
    assert abs(float(call(objective, batch, same).total)) < 1e-12
    np.testing.assert_allclose(
        gradient(objective, batch, same)["logits"], 0.0, atol=1e-12
    )
    other = signal(filler=np.nan)
    assert not np.asarray(gradient(objective, batch, other, argument=1).log_probs).any()
    assert np.abs(gradient(objective, batch, other)["logits"]).max() > 1e-2


def test_gradient_is_a_derivative():
    objective = make_gkd(
        MODEL, functools.partial(generalized_jsd, beta=0.3), temperature=0.7
    )
    batch, taught = responses(), signal()
    found = gradient(objective, batch, taught)["logits"]
    for index in [(0, 0, 0), (1, 2, 1), (0, 1, 2)]:
        bump = np.zeros(STUDENT.shape)
        bump[index] = 1e-5
        up, down = (
            float(call(objective, batch, taught, STUDENT + s * bump).total)
            for s in (1, -1)
        )
        assert found[index] == pytest.approx((up - down) / 2e-5, abs=1e-8)


def test_expected_loss_over_the_mixture():
    """rho = 0.3 of student samples, by enumeration: golden values at both ends."""
    numbers, indices = (
        grid.ravel() for grid in np.meshgrid(range(2), range(31), indexing="ij")
    )
    batch, taught = responses(indices, numbers), signal(indices, numbers)

    def row_totals(divergence):
        objective = make_gkd(MODEL, divergence)

        def total(batch, taught):
            batch, taught = jax.tree.map(
                lambda leaf: jnp.expand_dims(leaf, 0), (batch, taught)
            )
            return call(objective, batch, taught).total

        return jax.jit(jax.vmap(total))(batch, taught)

    fixed, sampled = (BED_E.weights(t).ravel() for t in (TEACHER, STUDENT))
    assert float(fixed @ row_totals(forward_kl)) == pytest.approx(1.517072, abs=6e-7)
    reverse = row_totals(reverse_kl)
    assert float(sampled @ reverse) == pytest.approx(1.317522, abs=6e-7)

    # The coin decides between two rows: its mean is the mixture of the means.
    def mixed(coin):
        row = mix_rows(coin, reverse[3:4], reverse[40:41], rho=0.3)
        return row[0]

    coins = jax.random.split(jax.random.key(1), 4000)
    mean = jax.jit(jax.vmap(mixed))(coins).mean()
    exact = 0.7 * reverse[3] + 0.3 * reverse[40]
    error = abs(reverse[3] - reverse[40]) * np.sqrt(0.21 / 4000)
    assert abs(mean - exact) < 4 * error


def test_mix_rows_takes_whole_rows_and_the_same_for_every_tree():
    rows = 64
    numbers = np.arange(rows) % 2
    fixed, sampled = (responses(np.full(rows, i), numbers) for i in (CHOSEN, 5))
    signals = signal(np.full(rows, CHOSEN), numbers), signal(np.full(rows, 5), numbers)
    rng = jax.random.key(3)
    mixed = mix_rows(rng, fixed, sampled, rho=0.5)
    taken = np.asarray((mixed.sequences.targets == sampled.sequences.targets).all(-1))
    assert 16 < taken.sum() < 48
    chosen = np.where(taken, 5, CHOSEN)
    jax.tree.map(
        np.testing.assert_array_equal,
        (mixed, mix_rows(rng, *signals, rho=0.5)),
        (responses(chosen, numbers), signal(chosen, numbers)),
    )


def test_mix_rows_at_its_ends_and_outside():
    fixed, sampled = responses(), responses(OTHERS)
    for rho, expected in ((0.0, fixed), (1.0, sampled)):
        for seed in range(5):
            mixed = mix_rows(jax.random.key(seed), fixed, sampled, rho=rho)
            jax.tree.map(np.testing.assert_array_equal, mixed, expected)
    with pytest.raises(ValueError, match="rho must lie in"):
        mix_rows(jax.random.key(0), fixed, sampled, rho=1.5)
    with pytest.raises(AssertionError):
        mix_rows(jax.random.key(0), fixed, responses(OTHERS[:2], NUMBERS[:2]), rho=0.5)
    slope = jax.grad(
        lambda x: mix_rows(jax.random.key(0), jnp.zeros(3), x, rho=1.0).sum()
    )(jnp.ones(3))
    np.testing.assert_array_equal(slope, np.zeros(3))


def test_imitated_responses_and_options():
    fixed, sampled = responses(), responses(OTHERS)
    assert imitated_responses(fixed) is fixed
    assert imitated_responses(ImitationBatch(fixed)) is fixed
    assert imitated_responses(ImitationBatch(fixed, sampled)) is sampled
    with pytest.raises(ValueError, match="temperature must lie in"):
        make_gkd(MODEL, temperature=0.0)
