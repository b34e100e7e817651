"""AVRIL's terms, X-KD's regulariser and what they are made of, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rkd_jax.losses import (
    avril,
    experiential_regularizer,
    gaussian_kl,
    gaussian_log_prob,
)
from rkd_jax.masking import masked_mean, masked_sum
from tests.tabular.bed import BED_E, TEACHER, log_softmax

pytestmark = pytest.mark.usefixtures("x64")

GOLDEN = 6e-7  # half a unit of the sixth digit, and a little
# Bed E's critic Q at prompt 0 along y_4 = (a, b, a, EOS), and a posterior.
_K, _A = np.meshgrid(np.arange(15), np.arange(3), indexing="ij")
CRITIC = np.cos(0.6 * _K + 1.4 * _A)
Y4 = BED_E.index(0, 1, 0, 2)
STATES, ACTIONS = BED_E.states[Y4], BED_E.actions[Y4]
MEAN, LOG_STD = 0.3 * np.cos(np.arange(4)), -0.2 + 0.1 * np.arange(4)


def arrays(*values):
    return tuple(jnp.asarray(value) for value in values)


def on_y4(loss, table, **options):
    rows = arrays(table[STATES], ACTIONS, MEAN, LOG_STD, np.ones(4, bool))
    return loss(*rows, **options)


def test_kl_is_the_integral():
    mean, log_std, prior_mean, prior_std = 0.7, -0.4, -0.2, 1.7
    x = np.linspace(-12, 12, 200_001)

    def log_density(m, s):
        return -0.5 * np.log(2 * np.pi) - np.log(s) - 0.5 * ((x - m) / s) ** 2

    own = log_density(mean, np.exp(log_std))
    integrand = np.exp(own) * (own - log_density(prior_mean, prior_std))
    prior = {"prior_mean": prior_mean, "prior_std": prior_std}
    found = gaussian_kl(*arrays(mean, log_std), **prior)
    assert float(found) == pytest.approx(np.trapezoid(integrand, x), abs=1e-9)
    at_prior = gaussian_kl(*arrays(prior_mean, np.log(prior_std)), **prior)
    assert float(at_prior) == pytest.approx(0.0, abs=1e-15)


def test_log_prob_is_a_normalised_density_and_the_formula():
    x = np.linspace(-9.0, 9.0, 20_001)
    mean, log_std = np.full_like(x, 0.3), np.full_like(x, -0.7)
    log_probs = np.asarray(gaussian_log_prob(*arrays(x, mean, log_std)))
    assert np.trapezoid(np.exp(log_probs), x) == pytest.approx(1.0, abs=1e-9)
    expected = -0.5 * np.log(2 * np.pi) + 0.7 - (x - 0.3) ** 2 / (2 * np.exp(-1.4))
    np.testing.assert_allclose(log_probs, expected, rtol=1e-12)


def test_gradients_of_the_gaussian():
    values = arrays([0.4, -1.0], [0.1, 0.9], [-0.3, 0.5])
    check_grads(gaussian_log_prob, values, order=1, modes=["rev"])
    check_grads(gaussian_kl, values[1:], order=1, modes=["rev"])


GOLDEN_ROWS = {
    "raw-1": (
        (CRITIC, 1.0),
        [1.416147, 0.321247, -0.398239],
        [-1.648184, -0.834408, -0.956311],
        (2.429553, 1.572635),
    ),
    "raw-0.9": (
        (CRITIC, 0.9),
        [1.374532, 0.247508, -0.432154],
        [-1.580183, -0.823394, -0.966158],
        (2.406498, 1.570330),
    ),
    "log_probs-1": (
        (log_softmax(CRITIC), 1.0),
        [1.159815, 0.048498, 0.280075],
        [-1.270379, -0.826819, -1.000918],
        (2.315957, 1.561276),
    ),
    "log_probs-0.9": (
        (log_softmax(CRITIC), 0.9),
        [0.998128, -0.118039, 0.085530],
        [-1.082483, -0.866862, -0.941067],
        (2.246723, 1.554352),
    ),
}


@pytest.mark.parametrize(
    ("given", "delta", "td", "losses"), GOLDEN_ROWS.values(), ids=GOLDEN_ROWS
)
def test_golden_numbers_of_the_bed(given, delta, td, losses):
    table, gamma = given
    terms = on_y4(avril, table, gamma=gamma)
    np.testing.assert_array_equal(terms.mask, [True, True, True, False])
    np.testing.assert_array_equal(terms.transition_mask, terms.mask)
    np.testing.assert_allclose(terms.delta[:3], delta, atol=GOLDEN)
    np.testing.assert_allclose(terms.td_log_likelihood[:3], td, atol=GOLDEN)
    kl = [0.080160, 0.022502, 0.007793]
    np.testing.assert_allclose(terms.kl[:3], kl, atol=GOLDEN)
    nll = float(masked_mean(terms.nll, terms.mask))
    assert nll == pytest.approx(1.246434, abs=GOLDEN)
    total = terms.nll + terms.kl - terms.td_log_likelihood
    total = float(masked_mean(total, terms.mask))

    whole = on_y4(avril, table, gamma=gamma, drop_last="irl_only")
    assert bool(whole.mask.all())
    nll = float(masked_mean(whole.nll, whole.mask))
    assert nll == pytest.approx(1.421187, abs=GOLDEN)
    extra = on_y4(experiential_regularizer, table, gamma=gamma)  # lambda 0.1
    x_kd = nll + float(masked_mean(extra.loss, extra.mask))
    assert (total, x_kd) == pytest.approx(losses, abs=GOLDEN)


def ragged(seed=0):
    """q [3, 4, 3], actions, mean, log_std and mask [3, 4] of lengths 4, 1, 2."""
    generator = np.random.default_rng(seed)
    q_values = generator.normal(size=(3, 4, 3))
    actions = generator.integers(0, 3, size=(3, 4))
    mean, log_std = generator.normal(size=(2, 3, 4)) * 0.5
    mask = np.arange(4) < np.array([[4], [1], [2]])
    return q_values, actions, mean, log_std, mask


def numpy_terms(q_values, actions, mean, log_std, mask, gamma=1.0, beta=1.0):
    """Every term as a loop over transitions: dict (b, t) -> (nll, kl, td, delta)."""
    found = {}
    for b, t in np.argwhere(mask[:, :-1] & mask[:, 1:]):
        a, following = actions[b, t], actions[b, t + 1]
        delta = q_values[b, t, a] - gamma * q_values[b, t + 1, following]
        m, s = mean[b, t], np.exp(log_std[b, t])
        kl = 0.5 * (s**2 + m**2 - 1) - log_std[b, t]
        td = np.log(np.exp(-0.5 * ((delta - m) / s) ** 2) / np.sqrt(2 * np.pi) / s)
        nll = -log_softmax(beta * q_values[b, t])[a]
        found[b, t] = (nll, kl, td, delta)
    return found


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_terms_of_ragged_rows_one_by_one(beta):
    inputs = ragged()
    terms = avril(*arrays(*inputs), gamma=0.8, beta=beta)
    expected = numpy_terms(*inputs, gamma=0.8, beta=beta)
    assert len(expected) == 4  # 3 of the first row, none of the second, 1 of the last
    found = (terms.nll, terms.kl, terms.td_log_likelihood, terms.delta)
    found = np.stack([np.asarray(x) for x in found], axis=-1)
    for b, t in np.ndindex(3, 4):
        one = expected.get((b, t), np.zeros(4))
        np.testing.assert_allclose(found[b, t], one, rtol=1e-12, atol=1e-15)
        assert bool(terms.mask[b, t]) == ((b, t) in expected)


def test_irl_only_keeps_the_likelihood_of_the_last_action():
    q_values, actions, *_, mask = inputs = ragged()
    terms = avril(*arrays(*inputs), drop_last="irl_only", beta=0.7)
    np.testing.assert_array_equal(terms.mask, mask)
    followed = mask & np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_array_equal(terms.transition_mask, followed)
    log_policy = log_softmax(0.7 * q_values)
    nll = -np.take_along_axis(log_policy, actions[..., None], -1)[..., 0]
    np.testing.assert_allclose(terms.nll, np.where(mask, nll, 0.0), rtol=1e-12)
    dropped = avril(*arrays(*inputs), beta=0.7)
    np.testing.assert_array_equal(terms.kl, dropped.kl)
    np.testing.assert_array_equal(terms.td_log_likelihood, dropped.td_log_likelihood)


SWITCHES = ["none", "next", "delta_for_phi"]


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_stop_gradient_kills_exactly_its_path(switch):
    q_values, actions, mean, log_std, mask = inputs = ragged()
    expected = np.zeros(q_values.shape)
    for (b, t), (*_, delta) in numpy_terms(*inputs, gamma=0.9).items():
        pull = -(delta - mean[b, t]) * np.exp(-2 * log_std[b, t])
        if switch != "delta_for_phi":
            expected[b, t, actions[b, t]] += pull
        if switch == "none":
            expected[b, t + 1, actions[b, t + 1]] -= 0.9 * pull

    def td(q_values):
        rest = arrays(actions, mean, log_std, mask)
        terms = avril(q_values, *rest, gamma=0.9, stop_gradient=switch)
        return terms.td_log_likelihood.sum()

    found = jax.grad(td)(jnp.asarray(q_values))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("switch", SWITCHES[1:])
def test_stopping_touches_neither_the_value_nor_the_posterior(switch):
    q_values, actions, mean, log_std, mask = arrays(*ragged())

    def both(switch):
        def total(mean, log_std):
            terms = avril(q_values, actions, mean, log_std, mask, stop_gradient=switch)
            return (terms.nll + terms.kl - terms.td_log_likelihood).sum()

        return jax.value_and_grad(total, argnums=(0, 1))(mean, log_std)

    found, expected = both(switch), both("none")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_shift_of_q_by_state_moves_delta_and_not_the_likelihood():
    q_values, actions, mean, log_std, mask = ragged()
    shift = np.random.default_rng(5).normal(size=(3, 4))
    rest = arrays(actions, mean, log_std, mask)
    plain = avril(jnp.asarray(q_values), *rest, gamma=0.8)
    moved = avril(jnp.asarray(q_values + shift[..., None]), *rest, gamma=0.8)
    np.testing.assert_allclose(moved.nll, plain.nll, rtol=1e-12)
    kept = np.asarray(plain.mask)[:, :-1]
    found = np.asarray(moved.delta - plain.delta)[:, :-1]
    expected = shift[:, :-1] - 0.8 * shift[:, 1:]
    np.testing.assert_allclose(found[kept], expected[kept], atol=1e-12)


def test_anchor_values_the_end_at_zero_and_drops_nothing():
    q_values, actions, mean, log_std, mask = inputs = ragged()
    terms = avril(*arrays(*inputs), gamma=0.9, terminal="anchor")
    dropped = avril(*arrays(*inputs), gamma=0.9)
    np.testing.assert_array_equal(terms.mask, mask)
    np.testing.assert_array_equal(terms.transition_mask, mask)
    for last in ((0, 3), (1, 0), (2, 1)):
        assert float(terms.delta[last]) == q_values[last][actions[last]]
        std = np.exp(log_std[last])
        kl = 0.5 * (std**2 + mean[last] ** 2 - 1) - np.log(std)
        assert float(terms.kl[last]) == pytest.approx(kl, rel=1e-12)
    kept = np.asarray(dropped.mask)
    np.testing.assert_array_equal(terms.delta[kept], dropped.delta[kept])


def test_expected_next_value_of_the_own_policy_and_of_the_teacher():
    q_values, actions, *rest, mask = inputs = ragged()
    q_values[0, 1, (actions[0, 1] + 1) % 3] = -np.inf  # an impossible action
    impossible = np.isinf(q_values)
    teacher = np.random.default_rng(8).normal(size=q_values.shape)
    teacher = log_softmax(np.where(impossible, -np.inf, teacher))
    own = avril(*arrays(*inputs), gamma=0.9, beta=0.7, next_value="expected")
    taught = experiential_regularizer(
        *arrays(*inputs),
        gamma=0.9,
        next_value="expected",
        teacher_log_probs=jnp.asarray(teacher),
    )
    taken = np.take_along_axis(q_values, actions[..., None], -1)[..., 0]
    kept = mask[:, :-1] & mask[:, 1:]
    for log_probs, terms in ((log_softmax(0.7 * q_values), own), (teacher, taught)):
        value = (np.exp(log_probs) * np.where(impossible, 0.0, q_values)).sum(-1)
        delta = taken[:, :-1] - 0.9 * value[:, 1:]
        found = np.asarray(terms.delta)[:, :-1]
        np.testing.assert_allclose(found[kept], delta[kept], rtol=1e-12)

    def total(q_values):
        terms = avril(q_values, *arrays(actions, *rest, mask), next_value="expected")
        return (terms.nll - terms.td_log_likelihood).sum()

    gradient = np.asarray(jax.grad(total)(jnp.asarray(q_values)))
    assert np.isfinite(gradient).all()
    assert not gradient[impossible].any()
    step = np.zeros(q_values.shape)
    step[0, 2, 1] = 1e-6
    up, down = (float(total(jnp.asarray(q_values + s * step))) for s in (1, -1))
    assert gradient[0, 2, 1] == pytest.approx((up - down) / 2e-6, rel=1e-6)


def test_prior_enters_the_divergence_alone():
    inputs = ragged()
    terms = avril(*arrays(*inputs), prior_mean=0.5, prior_std=2.0)
    plain = avril(*arrays(*inputs))
    mean, log_std = inputs[2:4]
    kl = np.log(2.0) - log_std + (np.exp(2 * log_std) + (mean - 0.5) ** 2) / 8 - 0.5
    expected = np.where(plain.mask, kl, 0.0)
    np.testing.assert_allclose(terms.kl, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(terms.td_log_likelihood, plain.td_log_likelihood)


def test_regularizer_is_avrils_without_the_likelihood():
    inputs = ragged()
    options = {"gamma": 0.9, "prior_mean": 0.2, "prior_std": 1.5}
    terms = avril(*arrays(*inputs), **options)
    found = experiential_regularizer(*arrays(*inputs), td_weight=0.3, **options)
    np.testing.assert_array_equal(found.kl, terms.kl)
    np.testing.assert_array_equal(found.td_log_likelihood, terms.td_log_likelihood)
    np.testing.assert_array_equal(found.delta, terms.delta)
    np.testing.assert_array_equal(found.mask, terms.transition_mask)
    found = experiential_regularizer(*arrays(*inputs), td_weight=0.3, gamma=0.9)
    expected = sum(kl - 0.3 * td for _, kl, td, _ in numpy_terms(*inputs, 0.9).values())
    np.testing.assert_allclose(found.loss.sum(), expected, rtol=1e-12)


@pytest.mark.parametrize("switch", SWITCHES)
def test_regularizers_gradient_and_its_teacher(switch):
    q_values, actions, mean, log_std, mask = ragged()
    teacher = log_softmax(np.random.default_rng(8).normal(size=q_values.shape))

    def total(q_values, teacher):
        terms = experiential_regularizer(
            q_values,
            *arrays(actions, mean, log_std, mask),
            gamma=0.9,
            td_weight=0.3,
            next_value="expected",
            teacher_log_probs=teacher,
            stop_gradient=switch,
        )
        return masked_sum(terms.loss, terms.mask)

    found, to_teacher = jax.grad(total, argnums=(0, 1))(*arrays(q_values, teacher))
    assert not np.asarray(to_teacher).any()
    expected = np.zeros(q_values.shape)
    value = (np.exp(teacher) * q_values).sum(-1)
    for b, t in np.argwhere(mask[:, :-1] & mask[:, 1:]):
        delta = q_values[b, t, actions[b, t]] - 0.9 * value[b, t + 1]
        pull = 0.3 * (delta - mean[b, t]) * np.exp(-2 * log_std[b, t])
        if switch != "delta_for_phi":
            expected[b, t, actions[b, t]] += pull
        if switch == "none":
            expected[b, t + 1] -= 0.9 * pull * np.exp(teacher[b, t + 1])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_at_gamma_one_the_differences_telescope():
    table = log_softmax(TEACHER[0])
    taken = table[STATES, ACTIONS]
    delta = on_y4(avril, table).delta
    assert float(delta.sum()) == pytest.approx(taken[0] - taken[3], rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (avril, {"beta": 0.0}),
        (avril, {"gamma": 1.1}),
        (avril, {"prior_std": 0.0}),
        (avril, {"drop_last": "never"}),
        (avril, {"next_value": "greedy"}),
        (avril, {"stop_gradient": "phi"}),
        (avril, {"terminal": "absorb"}),
        (experiential_regularizer, {"td_weight": -0.1}),
        (experiential_regularizer, {"next_value": "expected"}),  # without a teacher
    ],
)
def test_domains_and_switches(loss, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        on_y4(loss, CRITIC, **options)


def test_shapes_must_agree():
    q_values, actions, mean, log_std, mask = arrays(*ragged())
    with pytest.raises(AssertionError):
        avril(q_values, actions[:, :3], mean, log_std, mask)
    with pytest.raises(AssertionError):
        avril(q_values, actions, mean[:, :3], log_std, mask)
