r"""Divergences between next-token distributions, ``[..., V] x [..., V] -> [...]``.

Throughout, q is the student and p the teacher. *Forward* means
:math:`\mathrm{KL}(p\|q)`, *reverse* :math:`\mathrm{KL}(q\|p)`. Everything stays in log
space; a term whose left-hand probability is 0 is exactly 0, in value and gradient.
A temperature divides both logits and the value is not rescaled by its square.
Log-probs are accepted wherever logits are.

No function here takes a mask. Where padding may hold NaN, mask the inputs with
`rkd_jax.masking.fill_masked` and the values with `rkd_jax.masking.masked_sum`.

>>> import jax.numpy as jnp
>>> teacher = jnp.log(jnp.array([0.5, 0.5, 0.0]))  # the third token is impossible
>>> student = jnp.log(jnp.array([0.25, 0.25, 0.5]))
>>> print(jnp.exp(forward_kl(student, teacher)), reverse_kl(student, teacher))
2.0 inf
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.divergence_terms import (
    forward_kl_terms,
    generalized_jsd_terms,
    kl_terms,
    reverse_kl_terms,
    skew_forward_kl_terms,
    skew_reverse_kl_terms,
    total_variation_terms,
)
from rkd_jax.losses.domain import check_domain
from rkd_jax.losses.likelihood import put_tokens, take_tokens, tempered_log_softmax


def forward_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    r"""KL divergence from teacher to student, per position, in nats.

    .. math:: \mathrm{KL}(p\|q) = \sum_v p_v (\log p_v - \log q_v)

    Args:
        student_logits: float[*batch, V], unnormalised (q), any float dtype.
        teacher_logits: float[*batch, V], unnormalised (p). -inf marks impossible
            tokens.
        temperature: positive; divides both logits.

    Returns:
        float32[*batch], non-negative up to rounding, 0 iff p == q; +inf where the
        student is -inf at a token the teacher allows. Neither masked nor reduced.

    Gradient:
        Flows to the student only: (q - p) / temperature, finite for every teacher.

    Raises:
        ValueError: temperature out of range (Python numbers; traced ones are not
            checked), or vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
        Sec. 2. Deviation: no factor temperature squared; the teacher's entropy is kept.
    """
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return forward_kl_terms(q, p).sum(-1)


def reverse_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    r"""KL divergence from student to teacher, per position, in nats.

    .. math:: \mathrm{KL}(q\|p) = \sum_v q_v (\log q_v - \log p_v)

    Args:
        student_logits: float[*batch, V], unnormalised (q), any float dtype.
        teacher_logits: float[*batch, V], unnormalised (p). -inf marks impossible
            tokens.
        temperature: positive; divides both logits.

    Returns:
        float32[*batch], non-negative up to rounding, 0 iff p == q. +inf, honestly,
        where the teacher is -inf at a token the student allows: give the student the
        same -inf (vocabulary padding), or use `skew_reverse_kl`, which is bounded.
        Neither masked nor reduced.

    Gradient:
        Flows to the student only, through both factors:
        q (log q - log p - KL) / temperature. Not defined where the value is +inf.

    Raises:
        ValueError: temperature out of range (Python numbers; traced ones are not
            checked), or vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        Gu et al., MiniLLM, 2306.08543: the single-step part of its objective.
        Deviation: none.
    """
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return reverse_kl_terms(q, p).sum(-1)


def generalized_jsd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> jax.Array:
    r"""Generalised Jensen-Shannon divergence, per position, in nats.

    .. math:: \beta\,\mathrm{KL}(p\|m) + (1-\beta)\,\mathrm{KL}(q\|m), \qquad
        m = \beta p + (1-\beta) q

    The endpoints are *defined* as beta = 0: forward KL, beta = 1: reverse KL. The
    interior form vanishes towards both (JSD / beta tends to forward KL, JSD / (1 -
    beta) to reverse KL), so the scale of the loss jumps there.

    Args:
        student_logits: float[*batch, V], unnormalised (q), any float dtype.
        teacher_logits: float[*batch, V], unnormalised (p). -inf marks impossible
            tokens.
        beta: in [0, 1], the teacher's weight in the mixture. An array, unlike a
            Python number, takes the interior form at the endpoints too.
        temperature: positive; divides both logits.

    Returns:
        float32[*batch], non-negative up to rounding, 0 iff p == q; inside (0, 1) at
        most the entropy of beta (log 2 at one half), reached on disjoint supports.
        Neither masked nor reduced.

    Gradient:
        Flows to the student only, also through q inside m. Finite for every teacher,
        except where `reverse_kl` at beta = 1 is not.

    Raises:
        ValueError: beta or temperature out of range (Python numbers; traced ones are
            not checked), or vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        Agarwal et al., GKD, 2306.13649, Sec. 2. Deviation: none.
    """
    check_domain("beta", beta, "[0, 1]")
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return generalized_jsd_terms(q, p, beta=beta).sum(-1)


def skew_forward_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
) -> jax.Array:
    r"""KL from the teacher to a teacher-student mixture, per position, in nats.

    .. math:: \mathrm{KL}\big(p \,\|\, \alpha p + (1 - \alpha) q\big)

    Args:
        student_logits: float[*batch, V], unnormalised (q), any float dtype.
        teacher_logits: float[*batch, V], unnormalised (p). -inf marks impossible
            tokens.
        alpha: in [0, 1), the weight of the left distribution. 0 gives forward KL; the
            value vanishes as alpha -> 1. Where alpha is an array, log-ratios beyond 80
            nats count as 80, which only an alpha below exp(-80) would notice.
        temperature: positive; divides both logits.

    Returns:
        float32[*batch], non-negative up to rounding, 0 iff p == q, at most
        -log(alpha). Neither masked nor reduced.

    Gradient:
        Flows to the student only, through the mixture. Finite for every teacher.

    Raises:
        ValueError: alpha or temperature out of range (Python numbers; traced ones are
            not checked), or vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        Ko et al., DistiLLM, 2402.03898, skew KL. Deviation: the teacher's entropy is
        kept, which changes the value and not the gradient.
    """
    check_domain("alpha", alpha, "[0, 1)")
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return skew_forward_kl_terms(q, p, alpha=alpha).sum(-1)


def skew_reverse_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
) -> jax.Array:
    r"""KL from the student to a student-teacher mixture, per position, in nats.

    .. math:: \mathrm{KL}\big(q \,\|\, \alpha q + (1 - \alpha) p\big)

    Args:
        student_logits: float[*batch, V], unnormalised (q), any float dtype.
        teacher_logits: float[*batch, V], unnormalised (p). -inf marks impossible
            tokens.
        alpha: in [0, 1), the weight of the left distribution. 0 gives reverse KL; the
            value vanishes as alpha -> 1. See `skew_forward_kl` for arrays.
        temperature: positive; divides both logits.

    Returns:
        float32[*batch], non-negative up to rounding, 0 iff p == q, at most
        -log(alpha), so finite for every teacher if alpha > 0. Neither masked nor
        reduced.

    Gradient:
        Flows to the student only, through the left factor and the mixture.

    Raises:
        ValueError: alpha or temperature out of range (Python numbers; traced ones are
            not checked), or vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        Ko et al., DistiLLM, 2402.03898, skew reverse KL. Deviation: none.
    """
    check_domain("alpha", alpha, "[0, 1)")
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return skew_reverse_kl_terms(q, p, alpha=alpha).sum(-1)


def total_variation(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    r"""Total variation distance, per position, a probability.

    .. math:: \tfrac12 \sum_v |p_v - q_v|

    Args:
        student_logits: float[*batch, V], unnormalised (q), any float dtype.
        teacher_logits: float[*batch, V], unnormalised (p). -inf marks impossible
            tokens.
        temperature: positive; divides both logits.

    Returns:
        float32[*batch] in [0, 1], 0 iff p == q, 1 iff the supports are disjoint.
        Neither masked nor reduced.

    Gradient:
        Flows to the student only; its l1 norm is at most one half over the
        temperature. Entries with p_v == q_v up to rounding take the subgradient 0.

    Raises:
        ValueError: temperature out of range (Python numbers; traced ones are not
            checked), or vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        Wen et al., f-Distill, 2307.15190, TVD. Deviation: none.
    """
    q, p = _log_probs(student_logits, teacher_logits, temperature)
    return total_variation_terms(q, p).sum(-1)


def topk_forward_kl(
    student_logits: jax.Array,
    topk_ids: jax.Array,
    topk_log_probs: jax.Array,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    r"""Forward KL with all tokens outside the teacher's top k in one bucket, in nats.

    .. math:: \sum_{v\in K} p_v \log\frac{p_v}{q_v}
        + p_{rest} \log\frac{p_{rest}}{q_{rest}}, \qquad
        p_{rest} = 1 - \sum_{v\in K} p_v

    Neither side is renormalised inside the support, so student mass outside it costs.

    Args:
        student_logits: float[*batch, V], unnormalised (q), any float dtype.
        topk_ids: int[*batch, K], distinct tokens in [0, V). An entry whose log-prob is
            -inf counts as absent, whatever its id.
        topk_log_probs: float[*batch, K], the teacher's full-softmax log-probs of those
            tokens, *taken at the same temperature*: the tail cannot be tempered later.
        temperature: positive; divides the student's logits.

    Returns:
        float32[*batch], non-negative up to rounding and at most the full forward KL;
        equal to it if at most one token is outside; +inf where the student is -inf at
        a bucket the teacher allows. A teacher tail below 8 machine epsilons counts as
        0. Neither masked nor reduced.

    Gradient:
        Flows to the student only; finite.

    Raises:
        ValueError: temperature out of range (Python numbers; traced ones are not
            checked).
        AssertionError: shapes disagree.

    References:
        Coarse-grained KL as in DCKD, 2502.17927. Deviation: the student's bucket is an
        exact log-sum-exp over the tail, without a probability floor.
    """
    q, p = coarse_grained(student_logits, topk_ids, topk_log_probs, temperature)
    return kl_terms(p, q).sum(-1)


def coarse_grained(
    student_logits, topk_ids, topk_log_probs, temperature
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of student and teacher, [.., K + 1]: listed tokens, then all others."""
    check_domain("temperature", temperature, "(0, inf)")
    chex.assert_equal_shape([topk_ids, topk_log_probs])
    chex.assert_equal_shape_prefix([student_logits, topk_ids], student_logits.ndim - 1)
    q = tempered_log_softmax(student_logits, temperature)
    p = jax.lax.stop_gradient(topk_log_probs.astype(q.dtype))
    present = p > -jnp.inf
    listed = jnp.where(present, take_tokens(q, topk_ids), -jnp.inf)
    rest = _logsumexp_without(q, topk_ids, present)
    return (
        jnp.concatenate([listed, rest], axis=-1),
        jnp.concatenate([p, log_rest(p, q.shape[-1])], axis=-1),
    )


def _log_probs(student_logits, teacher_logits, temperature):
    """Log-probs of student and teacher in one dtype; the teacher is data."""
    check_domain("temperature", temperature, "(0, inf)")
    sizes = student_logits.shape[-1], teacher_logits.shape[-1]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"student has {sizes[0]} vocabulary entries, teacher {sizes[1]}: align "
            "them first (rkd_jax.models.surgery.align_vocab)"
        )
    chex.assert_equal_shape([student_logits, teacher_logits])
    q = tempered_log_softmax(student_logits, temperature)
    teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(q.dtype)
    return q, tempered_log_softmax(teacher_logits, temperature)


def log_rest(log_probs: jax.Array, vocabulary: int) -> jax.Array:
    """Log of the mass that K of V log-probs leave, [..., 1]; -inf if only rounding."""
    rest = 1.0 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
    # A list of all V tokens leaves nothing, however coarsely it was stored.
    complete = log_probs.shape[-1] >= vocabulary
    some = rest > (1.0 if complete else 8 * jnp.finfo(rest.dtype).eps)
    return jnp.where(some, jnp.log(jnp.where(some, rest, 1.0)), -jnp.inf)


def _logsumexp_without(
    values: jax.Array, ids: jax.Array, present: jax.Array
) -> jax.Array:
    """Log-sum-exp [..., 1] of ``values`` without the ``present`` ids; -inf of nothing.

    Exact where one minus the listed mass would have been rounded away.
    """
    # An absent id points past the vocabulary, where the scatter drops it.
    ids = jnp.where(present, ids, jnp.asarray(values.shape[-1], ids.dtype))
    rest = put_tokens(values, ids, -jnp.inf)
    some = jnp.any(rest > -jnp.inf, axis=-1, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(some, rest, 0.0), axis=-1, keepdims=True)
    return jnp.where(some, total, -jnp.inf)
