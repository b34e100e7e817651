"""The losses released with TVKD, each re-derived step by step in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import (
    bradley_terry,
    bucket_entropy,
    bucket_log_probs,
    next_value_sum,
    potential_shaping,
    release_return,
    soft_value,
    target_bucket_log_probs,
    tvkd,
)
from rkd_jax.losses.tvkd_release import RELEASE_VARIANTS, TRAINED, ReleaseSums
from rkd_jax.masking import sequence_sum
from rkd_jax.types import Pair

pytestmark = pytest.mark.usefixtures("x64")

# Two responses, of 3 and 2 targets in 4 columns; NaN where nothing is to be read.
MASK = np.arange(4) < np.array([[3], [2]])
_RANDOM = np.random.default_rng(11)
STEPS = {
    name: np.where(MASK, _RANDOM.normal(size=(2, 4)), np.nan)
    for name in ("buckets", "student", "entropy", "reference", "teacher", "values")
}
STEPS["values"][:, 0] = 0.83  # both responses start from one prompt
GAMMA, BETA, ALPHA = 0.7, 1.3, 0.6


def sums(terminal="zero"):
    total = {
        name: sequence_sum(jnp.asarray(STEPS[name]), MASK)
        for name in ("buckets", "student", "reference", "teacher", "values")
    }
    values, entropy = (jnp.asarray(STEPS[name]) for name in ("values", "entropy"))
    return ReleaseSums(
        **total,
        next_values=next_value_sum(values, MASK, terminal=terminal),
        next_entropy=next_value_sum(entropy, MASK, terminal=terminal),
    )


def by_hand(variant, row, end=0.0):
    """R of one response, one step after the other."""
    total = 0.0
    length = int(MASK[row].sum())
    for t in range(length):
        step = {name: values[row, t] for name, values in STEPS.items()}
        last = t == length - 1
        following = end if last else STEPS["values"][row, t + 1]
        entropy = end if last else STEPS["entropy"][row, t + 1]
        q, here = step["buckets"], step["values"]
        total += {
            "release_sum": q - GAMMA * following,
            "release_pi": q - GAMMA * following + here,
            "tpkd": BETA * q - (1 - GAMMA) * here,
            "tpkd_ref": BETA * (step["student"] - step["reference"])
            - (1 - GAMMA) * following,
            "full_dpo": q - ALPHA * step["teacher"] - GAMMA * following,
            "release_entropy": q - GAMMA * entropy,
        }[variant]
    return total


def returns(variant, given):
    return release_return(given, variant=variant, gamma=GAMMA, beta=BETA, alpha=ALPHA)


each_variant = pytest.mark.parametrize("variant", RELEASE_VARIANTS)


@each_variant
def test_return_and_loss_step_by_step(variant):
    for terminal, end in (("zero", 0.0), (jnp.full(2, 1.7), 1.7)):
        found = returns(variant, sums(terminal))
        expected = [by_hand(variant, row, end) for row in (0, 1)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    loss = bradley_terry(Pair(found[0], found[1]))
    expected = np.log1p(np.exp(expected[1] - expected[0]))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


@each_variant
def test_what_is_not_read_may_be_missing_and_what_is_may_not(variant):
    given = sums()
    reads = RELEASE_VARIANTS[variant].reads
    sparse = ReleaseSums(**{name: getattr(given, name) for name in reads})
    np.testing.assert_array_equal(returns(variant, sparse), returns(variant, given))
    for name in reads:
        with pytest.raises(ValueError, match=f"{variant} reads {name}, which is None"):
            returns(variant, sparse._replace(**{name: None}))


@each_variant
def test_g3_gradient_is_the_students_alone(variant):
    gradient = jax.grad(lambda y: returns(variant, y).sum())(sums())._asdict()
    slopes = {
        "buckets": BETA if variant == "tpkd" else 1.0,
        "student": BETA,
        "next_entropy": -GAMMA,
    }
    for name, found in gradient.items():
        read = name in TRAINED and name in RELEASE_VARIANTS[variant].reads
        slope = slopes[name] if read else 0.0
        np.testing.assert_array_equal(found, np.full(2, slope))


def test_u6_tpkd_ref_is_the_default_with_sign_plus():
    given = sums()
    unit = release_return(given, variant="tpkd_ref", gamma=GAMMA)
    psi = potential_shaping(jnp.asarray(STEPS["values"]), MASK, gamma=GAMMA)
    np.testing.assert_allclose(
        bradley_terry(Pair(*unit)),
        tvkd(
            Pair(*given.student), Pair(*given.reference), Pair(*psi), beta=1.0, sign=1.0
        ),
        rtol=1e-12,
    )


@pytest.mark.parametrize("terminal", ["zero", "last_prefix", jnp.array([0.4, -1.1])])
def test_u7_release_pi_is_the_default_with_sign_minus_and_no_reference(terminal):
    given = sums(terminal)
    unit = release_return(given, variant="release_pi", gamma=GAMMA)
    psi = potential_shaping(
        jnp.asarray(STEPS["values"]), MASK, gamma=GAMMA, terminal=terminal
    )
    np.testing.assert_allclose(unit, given.buckets - psi, rtol=1e-12)
    np.testing.assert_allclose(
        bradley_terry(Pair(*unit)),
        tvkd(Pair(*given.buckets), None, Pair(*psi), beta=1.0, sign=-1.0),
        rtol=1e-12,
    )


# Buckets

LOGITS = _RANDOM.normal(scale=2.0, size=(5, 6))
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
IDS = np.argsort(-_RANDOM.normal(size=(5, 6)), axis=-1)[:, :2]


def buckets_by_hand(floor=1e-8):
    rows = []
    for probs, ids in zip(PROBS, IDS, strict=True):
        rest = sum(p for v, p in enumerate(probs) if v not in ids)
        rows.append([*probs[ids], rest])
    return np.log(np.clip(rows, floor, 1 - floor))


def test_buckets_merge_the_other_tokens():
    found = bucket_log_probs(LOGITS, IDS)
    np.testing.assert_allclose(found, buckets_by_hand(), rtol=1e-12)
    np.testing.assert_allclose(np.exp(found).sum(-1), np.ones(5), rtol=1e-12)
    entropy = -(np.exp(found) * found).sum(-1)
    np.testing.assert_allclose(bucket_entropy(found), entropy, rtol=1e-12)


def test_clamping_bounds_the_log_probs_and_stops_the_gradient():
    logits = np.array([[60.0, 0.0, -np.inf, 0.0]])

    def total(logits):
        values = bucket_log_probs(logits, jnp.array([[0, 2]]))
        return values.sum(), values

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(logits)
    expected = np.log([[1 - 1e-8, 1e-8, 1e-8]])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))
    np.testing.assert_allclose(
        bucket_log_probs(LOGITS, IDS, floor=0.2), buckets_by_hand(0.2), rtol=1e-12
    )
    everything = bucket_log_probs(LOGITS, np.tile(np.arange(6), (5, 1)))
    np.testing.assert_allclose(everything[:, -1], np.full(5, np.log(1e-8)), rtol=1e-12)


def test_a_target_outside_the_list_is_in_the_last_bucket():
    buckets = jnp.asarray(buckets_by_hand())
    targets = np.array([IDS[0, 0], IDS[1, 1], 0, 0, 0])
    for row in (2, 3, 4):
        targets[row] = next(v for v in range(6) if v not in IDS[row])
    found = target_bucket_log_probs(buckets, IDS, targets)
    picked = buckets[np.arange(5), [0, 1, 2, 2, 2]]
    np.testing.assert_array_equal(found, picked)
    gradient = jax.grad(lambda b: target_bucket_log_probs(b, IDS, targets).sum())
    one_hot = np.eye(3)[[0, 1, 2, 2, 2]]
    np.testing.assert_array_equal(gradient(buckets), one_hot)


def test_t6_merging_the_tail_lowers_the_value_below_power_one_and_raises_it_above():
    merged, full = bucket_log_probs(LOGITS, IDS), np.log(PROBS)
    for power, direction in ((0.7, -1), (2.0, 1)):
        gap = soft_value(merged, power=power) - soft_value(full, power=power)
        assert (direction * np.asarray(gap) > 1e-3).all()


@each_variant
def test_trap_b_the_released_code_pays_the_shorter_response(variant):
    """In its own form: shift left, read whatever padding holds, mask afterwards.

    A padding state has all 51 buckets at the floor. Only the last transition differs:
    the longest response of a batch gets 0 there, every other one the padding's value.
    """
    floor = soft_value(jnp.full(51, np.log(1e-8)), power=0.7)
    padding = np.log(51) + 0.7 * np.log(1e-8)
    assert float(floor) == pytest.approx(padding, rel=1e-12)
    assert padding == pytest.approx(-8.963, abs=5e-4)
    mask = MASK[:, :3]  # the columns of the longer response
    step = {name: np.where(mask, x[:, :3], 0.0) for name, x in STEPS.items()}
    values = np.where(mask, step["values"], padding)
    after, entropy = (
        np.pad(x[:, 1:], [(0, 0), (0, 1)]) for x in (values, step["entropy"])
    )
    q, ratio = step["buckets"], step["student"] - step["reference"]
    each, leak = {
        "release_sum": (q - GAMMA * after, GAMMA),
        "release_pi": (q - GAMMA * after + values, GAMMA),
        "tpkd": (BETA * q - (1 - GAMMA) * values, 0.0),
        "tpkd_ref": (BETA * ratio - (1 - GAMMA) * after, 1 - GAMMA),
        "full_dpo": (q - ALPHA * step["teacher"] - GAMMA * after, GAMMA),
        "release_entropy": (q - GAMMA * entropy, 0.0),
    }[variant]
    gained = (each * mask).sum(-1) - returns(variant, sums())
    np.testing.assert_allclose(gained, [0.0, -leak * padding], atol=1e-12)


def test_domains_and_names():
    with pytest.raises(ValueError, match="variant must be one of .*, got 'dpo_max'"):
        release_return(sums(), variant="dpo_max", gamma=1.0)
    for name, value in (("gamma", 1.5), ("beta", 0.0), ("alpha", -1.0)):
        options = {"gamma": 1.0, name: value}
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            release_return(sums(), variant="tpkd", **options)
    with pytest.raises(ValueError, match="floor must lie in"):
        bucket_log_probs(LOGITS, IDS, floor=0.5)
    with pytest.raises(AssertionError):
        bucket_log_probs(LOGITS, IDS[:3])
    with pytest.raises(AssertionError):
        target_bucket_log_probs(jnp.zeros((5, 2)), IDS, np.zeros(5, int))
