"""Summands of the divergences and the slopes that the fused losses take from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import generalized_jsd, skew_forward_kl, skew_reverse_kl
from rkd_jax.losses.row_losses import SUMMANDS

WEIGHTS = {"generalized_jsd": "beta", "skew_forward_kl": "alpha"}
WEIGHTS["skew_reverse_kl"] = "alpha"
CASES = [
    (divergence, {WEIGHTS[divergence.__name__]: weight} if weight is not None else {})
    for divergence in SUMMANDS
    for weight in ((0, 0.1, 0.5, 0.9) if divergence.__name__ in WEIGHTS else (None,))
]
CASES.append((generalized_jsd, {"beta": 1}))


def name(case):
    return case.__name__ if callable(case) else str(case)


def log_probs(seed):
    """Spread over 60 nats."""
    scores = np.random.default_rng(seed).normal(scale=12.0, size=(6, 41))
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.mark.parametrize(("divergence", "options"), CASES, ids=name)
def test_slopes_are_the_derivatives_of_the_terms(x64, divergence, options):
    terms, slopes, pull, _ = SUMMANDS[divergence]
    q, p = log_probs(0), log_probs(1)
    p[0, :9] = -np.inf
    q[1, 4] = p[1, 4] = -np.inf
    q, p = jnp.asarray(q), jnp.asarray(p)
    expected = jax.grad(lambda q: terms(q, p, **options).sum())(q)
    assert not jnp.isnan(expected).any()  # of reverse KL some are infinite
    np.testing.assert_allclose(slopes(q, p, **options), expected, rtol=1e-9, atol=1e-15)
    if pull is not None:
        sums = pull(q, p, **options).sum(-1)
        np.testing.assert_allclose(sums, expected.sum(-1), rtol=1e-9)


@pytest.mark.parametrize("weight", [1e-3, 0.1, 0.3, 0.5, 0.7, 0.999])
def test_a_mixture_of_equals_is_exactly_no_divergence(weight):
    logits = jnp.asarray(log_probs(2), jnp.float32)
    assert not generalized_jsd(logits, logits, beta=weight).any()
    assert not skew_forward_kl(logits, logits, alpha=weight).any()
    assert not skew_reverse_kl(logits, logits, alpha=weight).any()


def test_a_log_ratio_beyond_float32_counts_as_its_limit():
    """q and p without common tokens: log 2, whatever the logits say elsewhere."""
    scores = jnp.array([[0.0, -2e4], [0.0, -300.0], [0.0, -jnp.inf]])
    values = generalized_jsd(scores, scores[:, ::-1])
    np.testing.assert_allclose(values, np.log(2.0), rtol=1e-6)
    slopes = jax.grad(lambda x: generalized_jsd(x, scores[:, ::-1]).sum())(scores)
    assert jnp.isfinite(slopes).all()
