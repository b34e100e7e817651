"""Divergences against float64 formulas, identities, limits and -inf."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax import losses
from rkd_jax.losses import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    topk_divergence,
    topk_forward_kl,
    total_variation,
)

pytestmark = pytest.mark.usefixtures("x64")

_GENERATOR = np.random.default_rng(1)
STUDENT, TEACHER = 2.0 * _GENERATOR.normal(size=(2, 3, 4, 6))


def probabilities(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return terms.sum(-1)


Q, P = probabilities(STUDENT), probabilities(TEACHER)
FORMULAS = {
    "forward_kl": ({}, lambda q, p: kl(p, q)),
    "reverse_kl": ({}, lambda q, p: kl(q, p)),
    "generalized_jsd": (
        {"beta": 0.3},
        lambda q, p: 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
    ),
    "skew_forward_kl": ({"alpha": 0.2}, lambda q, p: kl(p, 0.2 * p + 0.8 * q)),
    "skew_reverse_kl": ({"alpha": 0.2}, lambda q, p: kl(q, 0.2 * q + 0.8 * p)),
    "total_variation": ({}, lambda q, p: 0.5 * np.abs(p - q).sum(-1)),
}
each_divergence = pytest.mark.parametrize("name", FORMULAS)


def evaluate(name, student, teacher, **more):
    options, formula = FORMULAS[name]
    loss = jax.jit(partial(getattr(losses, name), **options, **more))
    return loss(student, teacher), formula


def student_gradient(loss, *data, student=STUDENT, **options):
    return jax.jit(jax.grad(lambda z: loss(z, *data, **options).sum()))(student)


topk_value = jax.jit(topk_forward_kl, static_argnames="temperature")


@each_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_formula(name, temperature):
    value, formula = evaluate(name, STUDENT, TEACHER, temperature=temperature)
    q, p = (probabilities(z / temperature) for z in (STUDENT, TEACHER))
    np.testing.assert_allclose(value, formula(q, p), rtol=1e-10)
    assert (formula(q, p) > 0).all()


@each_divergence
def test_invariant_to_logit_offsets_and_indifferent_to_log_probs(name):
    offset = np.array([-3.0, 0.5, 7.0]).reshape(3, 1, 1)
    value, formula = evaluate(name, STUDENT + offset, np.log(P))
    np.testing.assert_allclose(value, formula(Q, P), rtol=1e-9)


@each_divergence
def test_zero_with_zero_gradient_at_the_teacher(name):
    value, _ = evaluate(name, TEACHER, TEACHER)
    np.testing.assert_allclose(value, np.zeros((3, 4)), atol=1e-14)
    options, _ = FORMULAS[name]
    gradient = student_gradient(
        getattr(losses, name), TEACHER, student=TEACHER, **options
    )
    np.testing.assert_allclose(gradient, np.zeros(TEACHER.shape), atol=1e-14)


def test_analytic_gradients():
    temperature = 1.7
    q, p = (probabilities(z / temperature) for z in (STUDENT, TEACHER))
    forward = student_gradient(forward_kl, TEACHER, temperature=temperature)
    np.testing.assert_allclose(forward, (q - p) / temperature, atol=1e-12)

    inner = np.log(q) - np.log(p) - kl(q, p)[..., None]
    reverse = student_gradient(reverse_kl, TEACHER, temperature=temperature)
    np.testing.assert_allclose(reverse, q * inner / temperature, atol=1e-12)

    side = 0.5 * np.sign(q - p)
    side = q * (side - (q * side).sum(-1, keepdims=True)) / temperature
    variation = student_gradient(total_variation, TEACHER, temperature=temperature)
    np.testing.assert_allclose(variation, side, atol=1e-12)
    assert (np.abs(variation).sum(-1) <= 0.5 / temperature).all()


def test_high_temperature_matches_centred_logits():
    tau = 1e4
    gradient = tau**2 * student_gradient(forward_kl, TEACHER, temperature=tau)
    centred = [z - z.mean(-1, keepdims=True) for z in (STUDENT, TEACHER)]
    np.testing.assert_allclose(gradient, (centred[0] - centred[1]) / 6, atol=1e-3)


class TestGeneralizedJsd:
    def test_endpoints_are_the_two_kls(self):
        ends = [generalized_jsd(STUDENT, TEACHER, beta=b) for b in (0, 0.0, 1, 1.0)]
        for value, expected in zip(ends, [kl(P, Q)] * 2 + [kl(Q, P)] * 2, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-10)

    def test_interior_vanishes_towards_the_endpoints_at_their_rate(self):
        near = 1e-9
        low = generalized_jsd(STUDENT, TEACHER, beta=near) / near
        high = generalized_jsd(STUDENT, TEACHER, beta=1 - near) / near
        np.testing.assert_allclose(low, kl(P, Q), rtol=1e-5)
        np.testing.assert_allclose(high, kl(Q, P), rtol=1e-5)

    def test_is_the_mixture_of_both_skew_divergences(self):
        beta = 0.3
        parts = beta * skew_forward_kl(STUDENT, TEACHER, alpha=beta) + (
            1 - beta
        ) * skew_reverse_kl(STUDENT, TEACHER, alpha=1 - beta)
        whole = generalized_jsd(STUDENT, TEACHER, beta=beta)
        np.testing.assert_allclose(whole, parts, rtol=1e-10)

    def test_bound_is_reached_on_disjoint_supports(self):
        never = -np.inf
        value = generalized_jsd(
            jnp.array([0.0, 1.0, never, never]),
            jnp.array([never, never, 2.0, 0.0]),
            beta=0.3,
        )
        entropy = -0.3 * np.log(0.3) - 0.7 * np.log(0.7)
        np.testing.assert_allclose(value, entropy, rtol=1e-12)

    def test_a_traced_beta_takes_the_interior_form(self):
        traced = jax.jit(lambda b: generalized_jsd(STUDENT, TEACHER, beta=b))
        half = generalized_jsd(STUDENT, TEACHER, beta=0.5)
        np.testing.assert_allclose(traced(0.5), half, rtol=1e-12)
        np.testing.assert_allclose(traced(0.0), np.zeros((3, 4)), atol=1e-15)


class TestSkew:
    def test_alpha_zero_is_the_plain_kl(self):
        forward = skew_forward_kl(STUDENT, TEACHER, alpha=0.0)
        reverse = skew_reverse_kl(STUDENT, TEACHER, alpha=0.0)
        np.testing.assert_allclose(forward, kl(P, Q), rtol=1e-10)
        np.testing.assert_allclose(reverse, kl(Q, P), rtol=1e-10)

    @pytest.mark.parametrize("loss", [skew_forward_kl, skew_reverse_kl])
    def test_bounded_by_minus_log_alpha(self, loss):
        never = -np.inf
        disjoint = loss(jnp.array([0.0, never]), jnp.array([never, 0.0]), alpha=0.1)
        np.testing.assert_allclose(disjoint, -np.log(0.1), rtol=1e-12)
        peaked = loss(STUDENT * 50, TEACHER * 50, alpha=0.1)
        assert (peaked <= -np.log(0.1) + 1e-12).all()


class TestImpossibleTokens:
    """-inf logits: value and gradient are those of the formula with p_v = 0."""

    teacher = np.where(np.arange(6) < 4, TEACHER, -np.inf)
    student = np.where(np.arange(6) < 5, STUDENT, -np.inf)

    @pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"reverse_kl"}))
    def test_masked_teacher(self, name):
        value, formula = evaluate(name, STUDENT, self.teacher)
        p = probabilities(self.teacher)
        np.testing.assert_allclose(value, formula(Q, p), rtol=1e-10)

        options, _ = FORMULAS[name]
        loss = getattr(losses, name)
        gradient = student_gradient(loss, self.teacher, **options)
        limit = np.where(np.isinf(self.teacher), -200.0, self.teacher)
        expected = student_gradient(loss, limit, **options)
        np.testing.assert_allclose(gradient, expected, atol=1e-12)

    @each_divergence
    def test_masked_vocabulary_padding_on_both_sides(self, name):
        """-inf on both sides is the same as not having those columns."""
        teacher = np.where(np.arange(6) < 5, TEACHER, -np.inf)
        value, _ = evaluate(name, self.student, teacher)
        shorter, _ = evaluate(name, STUDENT[..., :5], TEACHER[..., :5])
        np.testing.assert_allclose(value, shorter, rtol=1e-10)

        options, _ = FORMULAS[name]
        loss = getattr(losses, name)
        gradient = student_gradient(loss, teacher, student=self.student, **options)
        expected = student_gradient(
            loss, TEACHER[..., :5], student=STUDENT[..., :5], **options
        )
        np.testing.assert_allclose(gradient[..., :5], expected, atol=1e-12)
        np.testing.assert_array_equal(gradient[..., 5], np.zeros((3, 4)))

    def test_mass_where_the_right_side_has_none_is_infinite(self):
        assert np.isposinf(reverse_kl(STUDENT, self.teacher)).all()
        assert np.isposinf(forward_kl(self.teacher, STUDENT)).all()


class TestTopk:
    @staticmethod
    def top(k, logits=TEACHER):
        with np.errstate(divide="ignore"):
            log_probs = np.log(probabilities(logits))
        ids = np.argsort(-log_probs, axis=-1)[..., :k]
        return ids, np.take_along_axis(log_probs, ids, -1)

    @pytest.mark.parametrize("k", [1, 3, 5, 6])
    def test_formula_with_one_bucket_for_the_rest(self, k):
        ids, log_probs = self.top(k)
        value = topk_value(STUDENT, ids, log_probs)
        p, q = (np.take_along_axis(probs, ids, -1) for probs in (P, Q))
        expected = kl(p, q)
        if k < 6:
            expected = expected + kl(
                1 - p.sum(-1, keepdims=True), 1 - q.sum(-1, keepdims=True)
            )
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        assert (expected <= kl(P, Q) + 1e-12).all()

    @pytest.mark.parametrize("name", [x for x in FORMULAS if x != "reverse_kl"])
    @pytest.mark.parametrize("k", [1, 5])
    def test_formula_of_every_divergence(self, name, k):
        ids, log_probs = self.top(k)
        options, formula = FORMULAS[name]
        bound = partial(getattr(losses, name), **options)
        loss = jax.jit(partial(topk_divergence, divergence=bound))
        p, q = (np.take_along_axis(probs, ids, -1) for probs in (P, Q))
        p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
        np.testing.assert_allclose(
            loss(STUDENT, ids, log_probs), formula(q, p), rtol=1e-9
        )
        assert (formula(q, p) <= formula(Q, P) + 1e-12).all()
        if k == 5:  # one token outside: all that there is
            gradient = student_gradient(loss, ids, log_probs)
            expected = student_gradient(bound, TEACHER)
            np.testing.assert_allclose(gradient, expected, atol=1e-10)

    def test_forward_kl_is_what_it_is_called(self):
        found = topk_divergence(STUDENT, *self.top(3), temperature=1.6)
        expected = topk_value(STUDENT, *self.top(3), temperature=1.6)
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        "divergence",
        [
            reverse_kl,
            partial(generalized_jsd, beta=1.0),
            partial(skew_reverse_kl, alpha=0.0),
        ],
    )
    def test_what_is_infinite_outside_of_a_full_list_is_refused(self, divergence):
        bound = partial(topk_divergence, divergence=divergence)
        for call in (bound, jax.jit(bound)):
            with pytest.raises(ValueError, match=r"_\w+\(.*\) is infinite where"):
                call(STUDENT, *self.top(3))

    @pytest.mark.parametrize("k", [5, 6])
    def test_with_at_most_one_token_outside_it_is_the_full_divergence(self, k):
        tau = 1.6
        ids, log_probs = self.top(k, TEACHER / tau)
        value = topk_value(STUDENT, ids, log_probs, temperature=tau)
        full = forward_kl(STUDENT, TEACHER, temperature=tau)
        np.testing.assert_allclose(value, full, rtol=1e-9)
        gradient = student_gradient(topk_forward_kl, ids, log_probs, temperature=tau)
        expected = student_gradient(forward_kl, TEACHER, temperature=tau)
        np.testing.assert_allclose(gradient, expected, atol=1e-10)

    def test_an_entry_of_minus_inf_is_absent_whatever_its_id(self):
        ids, log_probs = self.top(2)
        junk = np.full((3, 4, 1), 10**6)
        wider = (
            np.concatenate([ids, ids[..., :1], junk], -1),
            np.concatenate([log_probs, np.full((3, 4, 2), -np.inf)], -1),
        )
        np.testing.assert_allclose(
            topk_value(STUDENT, *wider),
            topk_value(STUDENT, ids, log_probs),
            rtol=1e-12,
        )
        np.testing.assert_allclose(
            student_gradient(topk_forward_kl, *wider),
            student_gradient(topk_forward_kl, ids, log_probs),
            atol=1e-12,
        )

    def test_a_covered_teacher_has_no_tail_even_if_rounding_says_otherwise(self):
        """All of the teacher's mass is listed; the student has -inf elsewhere."""
        student = np.where(np.arange(6) < 3, STUDENT, -np.inf).astype(np.float32)
        teacher = np.where(np.arange(6) < 3, TEACHER, -np.inf)
        ids, log_probs = self.top(3, teacher)
        for lift in (0.0, -1e-7, 1e-3):  # rounding down, and up by half precision
            lifted = (log_probs + lift).astype(np.float32)
            value = topk_value(jnp.asarray(student), ids, jnp.asarray(lifted))
            p, q = probabilities(teacher), probabilities(student.astype(float))
            np.testing.assert_allclose(value, kl(p, q), rtol=2e-3, atol=2e-3)

    def test_a_list_of_all_tokens_has_no_tail_however_coarsely_it_is_stored(self):
        ids, log_probs = self.top(6)
        value = topk_value(STUDENT, ids, log_probs - 1e-3)
        np.testing.assert_allclose(value, kl(P, Q), rtol=2e-3, atol=2e-3)

    def test_the_students_tail_is_exact_where_one_minus_the_rest_would_be_zero(self):
        student = jnp.array([30.0, 0.0, 0.0], jnp.float32)
        log_probs = jnp.log(jnp.array([0.5], jnp.float32))
        value = topk_value(student, jnp.array([0]), log_probs)
        tail = np.log(2.0) - 30.0
        np.testing.assert_allclose(value, 0.5 * (-tail) - np.log(2.0), rtol=1e-6)


def test_domains():
    for loss, options, name in [
        (generalized_jsd, {"beta": 1.5}, "beta"),
        (generalized_jsd, {"beta": float("nan")}, "beta"),
        (skew_forward_kl, {"alpha": 1.0}, "alpha"),
        (skew_reverse_kl, {"alpha": -0.1}, "alpha"),
        *[(getattr(losses, n), {"temperature": 0.0}, "temperature") for n in FORMULAS],
    ]:
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            loss(STUDENT, TEACHER, **options)
    with pytest.raises(ValueError, match="temperature must lie in"):
        topk_forward_kl(STUDENT, *TestTopk.top(2), temperature=-1.0)


def test_vocabularies_of_different_size_are_named():
    with pytest.raises(ValueError, match=r"student has 6 .* teacher 5: align"):
        forward_kl(STUDENT, TEACHER[..., :5])
    with pytest.raises(AssertionError, match=r"\(3, 4, 6\)"):
        forward_kl(STUDENT, TEACHER[:2])
    ids, log_probs = TestTopk.top(2)
    with pytest.raises(AssertionError):
        topk_forward_kl(STUDENT, ids[:2], log_probs[:2])
