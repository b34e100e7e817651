"""Soft values, potential-based shaping and TVKD against float64 numpy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    check_shaping,
    dpo,
    next_value_sum,
    potential_shaping,
    soft_value,
    trajectory_return,
    tvkd,
)
from rkd_jax.losses.value import last_entry
from rkd_jax.types import Pair

pytestmark = pytest.mark.usefixtures("x64")

GENERATOR = np.random.default_rng(5)
LOGITS = GENERATOR.normal(size=(6, 7))
LOG_PROBS = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))

# Values of three responses of 1, 4 and 2 targets, and an empty one.
LENGTHS = [1, 4, 2, 0]
MASK = np.arange(4) < np.array(LENGTHS)[:, None]
VALUES = GENERATOR.normal(size=(4, 4))
DIRTY = np.where(MASK, VALUES, np.nan)
ENDS = np.array([0.4, -0.3, 1.5, np.nan])  # explicit V(s_T); the last is not read

STUDENT = Pair(np.array([-3.0, -1.5, -40.0]), np.array([-2.0, -6.0, -60.0]))
REFERENCE = Pair(np.array([-2.5, -2.0, -41.0]), np.array([-2.25, -5.5, -58.0]))
SHAPING = Pair(np.array([-0.4, 1.2, -3.0]), np.array([-0.3, -0.7, 2.0]))


def sigmoid(u):
    return 1.0 / (1.0 + np.exp(-u))


def path(row, terminal):
    """V(s_0), ..., V(s_T) of one response."""
    values = list(VALUES[row, : LENGTHS[row]])
    rules = {"zero": 0.0, "last_prefix": values[-1], "array": ENDS[row]}
    return [*values, rules[terminal]]


def argument(terminal):
    return jnp.asarray(ENDS) if terminal == "array" else terminal


each_terminal = pytest.mark.parametrize("terminal", ["zero", "last_prefix", "array"])


# Values


@pytest.mark.parametrize(("power", "scale"), [(0.7, 1.0), (1.0, 1.0), (2.5, 0.4)])
def test_soft_value_formula_and_gradient(power, scale):
    def total(logits):
        values = soft_value(logits, power=power, scale=scale)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(LOGITS)
    weights = np.exp(power * LOGITS)
    np.testing.assert_allclose(values, scale * np.log(weights.sum(-1)), rtol=1e-12)
    expected = scale * power * weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_temperature_form_and_released_sum_form():
    tau, alpha = 2.5, 0.6
    np.testing.assert_allclose(
        soft_value(LOG_PROBS, power=1 / tau, scale=tau),
        tau * np.log(np.exp(LOG_PROBS / tau).sum(-1)),
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        soft_value(LOG_PROBS, power=alpha / tau, scale=tau),
        tau * np.log(np.exp(alpha * LOG_PROBS / tau).sum(-1)),
        rtol=1e-12,
    )


def test_t5_a_value_is_a_renyi_entropy():
    """V = (1 - p) H_p; 0 at p = 1; between 0 and (1 - p) log V below."""
    for power in (0.3, 0.7, 3.0):
        renyi = np.log((np.exp(LOG_PROBS) ** power).sum(-1)) / (1 - power)
        found = soft_value(LOG_PROBS, power=power)
        np.testing.assert_allclose(found, (1 - power) * renyi, rtol=1e-10)
    np.testing.assert_allclose(soft_value(LOG_PROBS), np.zeros(6), atol=1e-12)
    uniform = np.full(51, -np.log(51))
    assert float(soft_value(uniform, power=0.7)) == pytest.approx(1.18, abs=5e-3)
    certain = np.array([0.0, -np.inf, -np.inf])
    assert float(soft_value(certain, power=0.7)) == 0.0


def test_impossible_actions_have_no_weight_and_no_gradient():
    padded = np.concatenate([LOGITS, np.full((6, 2), -np.inf)], axis=-1)
    np.testing.assert_allclose(
        soft_value(padded, power=0.7), soft_value(LOGITS, power=0.7), rtol=1e-12
    )
    gradient = jax.grad(lambda x: soft_value(x, power=0.7).sum())(padded)
    np.testing.assert_array_equal(gradient[:, 7:], np.zeros((6, 2)))


# Shaping


@each_terminal
@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_shaping_is_the_sum_of_differences(gamma, terminal):
    found = potential_shaping(DIRTY, MASK, gamma=gamma, terminal=argument(terminal))
    assert found[3] == 0.0
    for row in range(3):
        v = path(row, terminal)
        steps = [
            gamma * after - before for before, after in zip(v, v[1:], strict=False)
        ]
        np.testing.assert_allclose(found[row], sum(steps), atol=1e-12)


@each_terminal
def test_t2_closed_form(terminal):
    gamma = 0.7
    found = potential_shaping(DIRTY, MASK, gamma=gamma, terminal=argument(terminal))
    for row in range(3):
        v = path(row, terminal)
        expected = gamma * v[-1] - v[0] - (1 - gamma) * sum(v[1:-1])
        np.testing.assert_allclose(found[row], expected, atol=1e-12)
        # and the pair's gamma = 1, terminal zero is the shared start alone, exactly
        alone = potential_shaping(DIRTY, MASK, gamma=1.0)
        assert alone[row] == -v[0]


def test_t3_discounting_the_sum_as_well_telescopes_and_leaves_dpo():
    gamma, start = 0.7, -0.9
    values = VALUES.copy()
    values[:, 0] = start  # the prompt is shared
    after = np.where(MASK[:, 1:], values[:, 1:], 0.0)  # terminal zero
    after = np.concatenate([after, np.zeros((4, 1))], axis=-1)
    steps = gamma * after - values
    sums = np.asarray(trajectory_return(jnp.asarray(steps), MASK, gamma=gamma))
    np.testing.assert_allclose(sums[:3], np.full(3, -start), atol=1e-12)
    shaping = Pair(np.full(3, sums[0]), np.full(3, sums[1]))
    np.testing.assert_allclose(
        tvkd(STUDENT, REFERENCE, shaping, beta=0.5),
        dpo(STUDENT, REFERENCE, beta=0.5),
        rtol=1e-12,
    )


@each_terminal
def test_next_values_are_read_inside_the_response(terminal):
    found = next_value_sum(DIRTY, MASK, terminal=argument(terminal))
    assert found[3] == 0.0
    for row in range(3):
        expected = sum(path(row, terminal)[1:])
        np.testing.assert_allclose(found[row], expected, atol=1e-12)


def test_gradient_of_the_shaping_in_its_values():
    """Every state pays 1 - gamma, but the first, which pays 1; the end earns gamma."""
    gamma = 0.7

    def total(values, ends, terminal=None):
        end = ends if terminal is None else terminal
        return potential_shaping(values, MASK, gamma=gamma, terminal=end).sum()

    in_values, in_ends = jax.grad(total, argnums=(0, 1))(DIRTY, ENDS)
    expected = np.where(MASK, -(1 - gamma), 0.0) - gamma * (MASK & (np.arange(4) == 0))
    np.testing.assert_allclose(in_values, expected, atol=1e-12)
    np.testing.assert_allclose(in_ends, [gamma, gamma, gamma, 0.0], atol=1e-12)
    by_prefix = jax.grad(total)(DIRTY, ENDS, "last_prefix")
    expected[[0, 1, 2], [0, 3, 1]] += gamma
    np.testing.assert_allclose(by_prefix, expected, atol=1e-12)


def test_numeric_masks_and_width_make_no_difference():
    wide = np.pad(DIRTY, [(0, 0), (0, 3)], constant_values=np.inf)
    mask = np.pad(MASK, [(0, 0), (0, 3)]).astype(np.float64)
    for terminal in ("zero", "last_prefix"):
        np.testing.assert_array_equal(
            potential_shaping(wide, mask, gamma=0.7, terminal=terminal),
            potential_shaping(DIRTY, MASK, gamma=0.7, terminal=terminal),
        )
    np.testing.assert_array_equal(
        last_entry(jnp.asarray(DIRTY), jnp.asarray(MASK)),
        [VALUES[0, 0], VALUES[1, 3], VALUES[2, 1], 0.0],
    )


# The loss


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.8])
@pytest.mark.parametrize("reference", [REFERENCE, None], ids=["reference", "free"])
def test_t1_value_and_gradient_are_those_of_reweighted_dpo(sign, alpha, reference):
    beta = 0.5

    def total(student):
        values = tvkd(student, reference, SHAPING, beta=beta, alpha=alpha, sign=sign)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(STUDENT)
    frozen = reference or Pair(np.zeros(3), np.zeros(3))
    ratio = STUDENT.chosen - STUDENT.rejected - frozen.chosen + frozen.rejected
    weight = beta if alpha is None else alpha
    logit = beta * ratio + sign * weight * (SHAPING.chosen - SHAPING.rejected)
    np.testing.assert_allclose(values, np.logaddexp(0.0, -logit), rtol=1e-12)

    plain = jax.grad(lambda s: dpo(s, frozen, beta=beta).sum())(STUDENT)
    reweighting = sigmoid(-logit) / sigmoid(-beta * ratio)
    np.testing.assert_allclose(gradient.chosen, plain.chosen * reweighting, rtol=1e-10)
    np.testing.assert_allclose(gradient.rejected, -gradient.chosen, rtol=1e-12)
    np.testing.assert_allclose(gradient.chosen, -beta * sigmoid(-logit), rtol=1e-10)


def test_alpha_zero_and_equal_shaping_are_dpo_exactly():
    plain = dpo(STUDENT, REFERENCE, beta=0.3)
    equal = Pair(SHAPING.chosen, SHAPING.chosen)
    for shaping, alpha in ((SHAPING, 0.0), (equal, 7.0)):
        found = tvkd(STUDENT, REFERENCE, shaping, beta=0.3, alpha=alpha)
        np.testing.assert_array_equal(found, plain)


def test_g3_reference_and_shaping_are_data():
    def total(reference, shaping):
        return tvkd(STUDENT, reference, shaping, beta=0.5, alpha=2.0).sum()

    for leaf in jax.tree.leaves(jax.grad(total, argnums=(0, 1))(REFERENCE, SHAPING)):
        np.testing.assert_array_equal(leaf, np.zeros(3))


def test_g5_swapping_the_pair_flips_the_logit():
    swapped = [Pair(*pair[::-1]) for pair in (STUDENT, REFERENCE, SHAPING)]
    difference = tvkd(*swapped, alpha=0.7) - tvkd(
        STUDENT, REFERENCE, SHAPING, alpha=0.7
    )
    ratio = STUDENT.chosen - STUDENT.rejected - REFERENCE.chosen + REFERENCE.rejected
    logit = 0.1 * ratio + 0.7 * (SHAPING.chosen - SHAPING.rejected)
    np.testing.assert_allclose(
        difference, logit, atol=1e-12
    )  # softplus(x) - softplus(-x)


def test_cached_float32_shaping_meets_a_float64_student():
    narrow = Pair(*(x.astype(np.float32) for x in SHAPING))
    found = tvkd(STUDENT, REFERENCE, narrow, alpha=1.0)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(
        found, tvkd(STUDENT, REFERENCE, SHAPING, alpha=1.0), rtol=1e-6
    )


def test_settings_that_are_plain_dpo_are_refused():
    with pytest.raises(ValueError, match="gamma = 1 with terminal 'zero' is plain DPO"):
        check_shaping(gamma=1.0, power=0.7, terminal="zero")
    with pytest.raises(ValueError, match="power = 1 on normalised log-probs"):
        check_shaping(gamma=0.7, power=1.0, terminal="last_prefix")
    for accepted in (
        {"gamma": 0.7, "power": 0.7, "terminal": "zero"},
        {"gamma": 1.0, "power": 0.7, "terminal": "last_prefix"},
        {"gamma": 1.0, "power": 0.7, "terminal": "after_eos"},
        {"gamma": 1.0, "power": 0.7, "terminal": jnp.zeros(2)},
        {
            "gamma": 0.7,
            "power": 1.0,
            "terminal": "zero",
            "value_source": "raw_logits",
        },
    ):
        assert check_shaping(**accepted) is None


def test_domains_and_shapes():
    for call, name in [
        (lambda: soft_value(LOGITS, power=0.0), "power"),
        (lambda: soft_value(LOGITS, scale=-1.0), "scale"),
        (lambda: potential_shaping(VALUES, MASK, gamma=1.1), "gamma"),
        (lambda: tvkd(STUDENT, REFERENCE, SHAPING, beta=0.0), "beta"),
        (lambda: tvkd(STUDENT, REFERENCE, SHAPING, alpha=-0.1), "alpha"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            call()
    with pytest.raises(ValueError, match="sign must be 1 or -1, got 0"):
        tvkd(STUDENT, REFERENCE, SHAPING, sign=0)
    for function in (potential_shaping, next_value_sum):
        options = {"gamma": 0.7} if function is potential_shaping else {}
        with pytest.raises(
            ValueError, match="terminal must be one of zero, last_prefix, "
        ):
            function(VALUES, MASK, terminal="after_eos", **options)
        with pytest.raises(AssertionError):
            function(VALUES, MASK, terminal=jnp.zeros(3), **options)
        with pytest.raises(AssertionError):
            function(VALUES, MASK[:3], **options)
    short = Pair(SHAPING.chosen[:2], SHAPING.rejected[:2])
    with pytest.raises(AssertionError):
        tvkd(STUDENT, REFERENCE, short)
