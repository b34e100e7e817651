"""What TVKD does, exactly, on the enumerated bed: identities and its optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from rkd_jax.losses import potential_shaping
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.tvkd import make_tvkd, make_tvkd_release
from rkd_jax.signals.values import (
    length_correlation,
    make_release_signal,
    make_shaping,
    make_state_values,
)
from rkd_jax.types import PreferenceBatch, ReferenceSignal, ShapingSignal
from tests.tabular.bed import (
    BED_E,
    CHOSEN,
    REFERENCE,
    REJECTED,
    REWARD,
    STUDENT,
    TEACHER,
    TabularLM,
    bed_sequences,
    log_softmax,
)

pytestmark = pytest.mark.usefixtures("x64")

MODEL = TabularLM()
N = len(BED_E.sequences)
GOLDEN = 6e-7
NAMED = (np.zeros((1, 2), int), np.array([[CHOSEN, REJECTED]]))


def table(logits):
    return {"logits": jnp.asarray(logits)}


def pairs(numbers, indices, labels):
    sequences = bed_sequences(numbers, indices)
    return PreferenceBatch(
        sequences,
        sequences,
        jnp.asarray(labels),
        jnp.full(indices.shape, jnp.nan),
        jnp.arange(len(indices)),
    )


def named():
    return pairs(*NAMED, np.ones(1))


def reference(numbers, indices):
    return jnp.asarray(BED_E.sequence_log_probs(REFERENCE)[numbers, indices])


@functools.cache
def compiled(make):
    """Value and gradient on `named`, given the signal and traced options."""

    def total(params, signal, options):
        objective = make(MODEL, **options)
        return objective.student_loss(params, None, None, named(), signal, None).total

    return jax.jit(jax.value_and_grad(total))


def value_and_gradient(make, signal, **options):
    value, gradient = compiled(make)(table(STUDENT), signal, options)
    return float(value), np.asarray(gradient["logits"])


def exact_shaping(gamma, end=lambda values: 0.0, power=0.7):
    """[2, 31]: Psi of every response, a loop over its states."""
    values = np.log(np.exp(power * log_softmax(TEACHER)).sum(-1))
    psi = np.zeros((2, N))
    for x in range(2):
        for i, y in enumerate(BED_E.sequences):
            path = [values[x, BED_E.states[i, t]] for t in range(len(y))]
            path.append(end(path))
            psi[x, i] = sum(
                gamma * after - before
                for before, after in zip(path, path[1:], strict=False)
            )
    return psi


@pytest.mark.parametrize(
    ("options", "psi", "losses"),
    [
        ({"gamma": 0.7}, (-0.402099, -0.343033), (0.885841, 0.851556)),
        (
            {"gamma": 1.0, "terminal": "last_prefix"},
            (-0.043118, -0.019449),
            (0.875479, 0.861740),
        ),
    ],
    ids=["zero", "last_prefix"],
)
def test_golden_numbers_of_the_named_pair(options, psi, losses):
    shaping = make_shaping(MODEL, **options)(table(TEACHER), named().sequences)
    np.testing.assert_allclose(shaping[0], psi, atol=GOLDEN)
    signal = ShapingSignal(reference(*NAMED), shaping)
    for sign, golden in zip((1.0, -1.0), losses, strict=True):
        options = {"beta": 0.5, "alpha": 0.5, "sign": sign}
        value, _ = value_and_gradient(make_tvkd, signal, **options)
        assert value == pytest.approx(golden, abs=GOLDEN)


def test_golden_number_of_the_released_sum():
    make = make_release_signal(MODEL, support=2)
    signal = make(table(TEACHER), named().sequences)
    make = functools.partial(make_tvkd_release, variant="release_sum")
    value, _ = value_and_gradient(make, signal, gamma=1.0)
    assert value == pytest.approx(1.737846, abs=GOLDEN)


def plain_and_shaped(shaping, alpha=8.0):
    """DPO and TVKD of the named pair at beta 0.5."""
    scores = reference(*NAMED)
    plain = value_and_gradient(make_dpo, ReferenceSignal(scores), beta=0.5)
    signal = ShapingSignal(scores, shaping)
    options = {"beta": 0.5, "alpha": alpha, "sign": 1.0}
    return plain, value_and_gradient(make_tvkd, signal, **options)


@pytest.mark.parametrize(("power", "gamma"), [(0.7, 1.0), (1.0, 0.7)])
def test_u1_u3_the_trivial_settings_are_dpo_in_value_and_gradient(power, gamma):
    """gamma = 1 at terminal zero, and power 1 at any gamma (trap c of the release)."""
    sequences = named().sequences
    values = make_state_values(MODEL, power=power)(table(TEACHER), sequences).before
    shaping = potential_shaping(values, sequences.response_mask, gamma=gamma)
    plain, found = plain_and_shaped(shaping)
    assert plain[0] == pytest.approx(0.868593, abs=GOLDEN)
    assert found[0] == pytest.approx(plain[0], rel=1e-12)
    np.testing.assert_allclose(found[1], plain[1], atol=1e-12)
    assert (np.abs(values).max() < 1e-12) == (power == 1.0)


def test_u10_gradient_is_that_of_dpo_times_a_ratio_of_sigmoids():
    psi = exact_shaping(0.7)[:1, [CHOSEN, REJECTED]]
    (_, plain), (_, found) = plain_and_shaped(jnp.asarray(psi))
    logit = 0.5 * -0.6493112896
    shaped = logit + 8.0 * (psi[0, 0] - psi[0, 1])
    ratio = (1 + np.exp(logit)) / (1 + np.exp(shaped))
    np.testing.assert_allclose(found, ratio * plain, atol=1e-9)
    assert abs(ratio - 1) > 0.1


# Every response against the ones 1, 5 and 12 places further, in both prompts: a
# connected graph, so the labels determine the reward up to what a prompt shares.
NUMBERS = np.repeat(np.arange(2), 3 * N)[:, None] * np.ones((1, 2), int)
INDICES = np.array(
    [(i, (i + step) % N) for _ in range(2) for step in (1, 5, 12) for i in range(N)]
)


@pytest.fixture(scope="module")
def optima():
    """[2, 31] log-probs of the student that minimises DPO, and both signs of TVKD."""
    returns = BED_E.returns(REWARD)[NUMBERS, INDICES]
    labels = 1 / (1 + np.exp(returns[:, 1] - returns[:, 0]))
    with jax.enable_x64(True):
        batch = pairs(NUMBERS, INDICES, labels)
        shaping = jnp.asarray(exact_shaping(0.7)[NUMBERS, INDICES])
        signal = ShapingSignal(reference(NUMBERS, INDICES), shaping)

        def loss(flat, sign):
            objective = make_tvkd(MODEL, beta=0.6, alpha=1.5 * jnp.abs(sign), sign=sign)
            params = table(flat.reshape(BED_E.table_shape))
            out = objective.student_loss(params, None, None, batch, signal, None)
            return out.total / out.weight

        step = jax.jit(jax.value_and_grad(loss))

        def optimum(sign):
            result = minimize(
                lambda flat: tuple(map(np.asarray, step(flat, sign))),
                STUDENT.ravel(),
                jac=True,
                method="BFGS",
                options={"gtol": 1e-9, "maxiter": 2000},
            )
            return BED_E.sequence_log_probs(result.x.reshape(BED_E.table_shape))

        return {sign: optimum(sign) for sign in (1.0, 0.0, -1.0)}


def closed_form(sign):
    """log pi_ref exp((r - s alpha Psi) / beta), normalised over the responses."""
    shaped = BED_E.returns(REWARD) - sign * 1.5 * exact_shaping(0.7)
    return log_softmax(BED_E.sequence_log_probs(REFERENCE) + shaped / 0.6)


@pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
def test_t4_optimum_is_the_reference_tilted_by_reward_minus_shaping(optima, sign):
    np.testing.assert_allclose(optima[sign], closed_form(sign), atol=1e-5)


def test_t4_plus_leans_away_from_high_shaping_and_minus_towards_it(optima):
    psi = exact_shaping(0.7)
    means = {s: (np.exp(p) * psi).sum(-1) for s, p in optima.items()}
    assert (means[1.0] < means[0.0] - 5e-3).all()
    assert (means[0.0] < means[-1.0] - 5e-3).all()


def test_t7_the_shaping_is_close_to_a_length_penalty():
    """Over the responses to prompt 0, all counted alike."""
    sequences = bed_sequences(np.zeros(N, int), np.arange(N))
    mask = sequences.response_mask
    shaping = make_shaping(MODEL)(table(TEACHER), sequences)
    np.testing.assert_allclose(shaping, exact_shaping(0.7)[0], atol=1e-12)
    assert length_correlation(shaping, mask) == pytest.approx(-0.985, abs=5e-4)
