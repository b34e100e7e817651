"""Faults found in the losses of peer libraries, by number; ours must not have them.

T2  differences of rounded means, bfloat16 accumulation
T3  Jensen-Shannon divergence: reversed beta, no float32 cast
T6  top-k: student renormalised inside the support
T8  teacher softmax over a fixed axis
T11 NaN at -inf teacher log-probs
T13 tests that only assert that two losses differ
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax import losses
from rkd_jax.losses import forward_kl, generalized_jsd, reverse_kl, topk_forward_kl

DIVERGENCES = [
    "forward_kl",
    "reverse_kl",
    "generalized_jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("scale", [1.0, 0.02])
@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
def test_t2_bfloat16_logits_lose_nothing_but_their_own_rounding(scale, direction):
    """Against float64 on the very same bfloat16 numbers, also where KL is tiny."""
    generator = np.random.default_rng(0)
    teacher = generator.normal(size=(4, 2048)) * 2
    student = teacher + scale * generator.normal(size=(4, 2048))
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (student, teacher))
    loss = getattr(losses, direction)
    gradient, value = jax.grad(
        lambda z: (lambda v: (v.sum(), v))(loss(z, teacher)), has_aux=True
    )(student.astype(jnp.float32))
    assert loss(student, teacher).dtype == jnp.float32
    np.testing.assert_array_equal(loss(student, teacher), value)

    q, p = (softmax(np.asarray(x, np.float64)) for x in (student, teacher))
    ratio = np.log(q) - np.log(p)
    reverse = (q * ratio).sum(-1)
    if direction == "forward_kl":
        expected, slope = -(p * ratio).sum(-1), q - p
    else:
        expected, slope = reverse, q * (ratio - reverse[:, None])
    np.testing.assert_allclose(value, expected, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(gradient, slope, rtol=2e-4, atol=5e-8)
    assert (np.asarray(value) > 0).all()


def test_t3_jsd_endpoints_orientation_and_dtype(x64):
    student, teacher = np.random.default_rng(1).normal(size=(2, 5, 9))
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        np.testing.assert_allclose(
            generalized_jsd(student, teacher, beta=beta),
            generalized_jsd(teacher, student, beta=1.0 - beta),
            rtol=1e-9,
        )
    np.testing.assert_allclose(
        generalized_jsd(student, teacher, beta=0.0), forward_kl(student, teacher)
    )
    np.testing.assert_allclose(
        generalized_jsd(student, teacher, beta=1.0), reverse_kl(student, teacher)
    )
    # A mass-covering teacher weight: at beta = 0.9 the mixture is close to the teacher.
    q, p = softmax(student), softmax(teacher)
    m = 0.9 * p + 0.1 * q
    expected = 0.9 * (p * np.log(p / m)).sum(-1) + 0.1 * (q * np.log(q / m)).sum(-1)
    np.testing.assert_allclose(
        generalized_jsd(student, teacher, beta=0.9), expected, rtol=1e-9
    )
    half = generalized_jsd(jnp.bfloat16(student), jnp.float32(teacher), beta=0.9)
    assert half.dtype == jnp.float32


def test_t6_student_mass_outside_the_support_costs(x64):
    """Renormalising inside the support would leave the loss where it was."""
    ids = jnp.array([0, 1])
    log_probs = jnp.log(jnp.array([0.6, 0.3]))
    divergence = jax.jit(topk_forward_kl)

    def loss(outside):
        probs = np.array([0.6, 0.3, 0.05, 0.05])
        probs = np.append(probs[:2] * (1 - outside) / 0.9, [outside / 2] * 2)
        return float(divergence(np.log(probs), ids, log_probs))

    np.testing.assert_allclose(loss(0.1), 0.0, atol=1e-12)
    for outside in (0.2, 0.5, 0.9):
        expected = 0.9 * np.log(0.9 / (1 - outside)) + 0.1 * np.log(0.1 / outside)
        np.testing.assert_allclose(loss(outside), expected, rtol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("shape", [(4,), (4, 4), (3, 4, 4), (2, 3, 4, 4)])
def test_t8_zero_at_the_teacher_on_every_rank(name, shape):
    logits = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    value = jax.jit(getattr(losses, name))(logits, logits)
    assert value.shape == shape[:-1]
    np.testing.assert_allclose(value, np.zeros(shape[:-1]), atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"reverse_kl"}))
def test_t11_minus_inf_teacher_is_finite_in_value_and_gradient(name):
    """Token 2 is impossible and the teacher is even one-hot in the second row."""
    teacher = jnp.array([[0.3, 1.0, -jnp.inf, 0.2], [-jnp.inf, 0.0, *[-jnp.inf] * 2]])
    student = jnp.array([[0.1, -0.4, 0.7, 1.0], [0.5, 0.2, -0.3, 0.0]])
    loss = getattr(losses, name)
    evaluate = jax.jit(jax.value_and_grad(lambda z, data: loss(z, data).sum()))
    value, gradient = evaluate(student, teacher)
    expected, slope = evaluate(student, jnp.maximum(teacher, -80.0))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    assert np.isfinite(gradient).all()


def test_t11_top_k_entries_of_minus_inf():
    log_probs = jnp.array([np.log(0.75), -jnp.inf], jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(topk_forward_kl))(
        jnp.zeros(4), jnp.array([2, 0]), log_probs
    )
    expected = 0.75 * np.log(0.75 / 0.25) + 0.25 * np.log(0.25 / 0.75)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    rest = 0.25 * (0.25 - 1 / 3) + 0.75 * 0.25
    np.testing.assert_allclose(gradient, [rest, rest, -0.5, rest], atol=1e-6)


def test_t13_temperature_is_the_formula(x64):
    """Not merely "another temperature gives another loss"."""
    student, teacher = np.random.default_rng(3).normal(size=(2, 4, 8))
    q, p = softmax(student / 1.7), softmax(teacher / 1.7)
    np.testing.assert_allclose(
        forward_kl(student, teacher, temperature=1.7),
        (p * np.log(p / q)).sum(-1),
        rtol=1e-10,
    )
