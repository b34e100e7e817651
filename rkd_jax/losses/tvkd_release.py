r"""The losses in the code released with TVKD, which differ from each other and from it.

They are reference-free but for one, and know the vocabulary only as the teacher's most
likely tokens and one bucket for all others (`bucket_log_probs`). Every one is
:math:`-\log\sigma(R(y^w) - R(y^l))`, `bradley_terry` on a return (`release_return`):

===================  ===================================================================
``release_sum``      :math:`\sum_t [q_t - \gamma V(s_{t+1})]`
``release_pi``       :math:`\sum_t [q_t - \gamma V(s_{t+1}) + V(s_t)]`, which is
                     :math:`\sum_t q_t - \Psi_\gamma`
``tpkd``             :math:`\sum_t [\beta q_t - (1 - \gamma) V(s_t)]`
``tpkd_ref``         :math:`\beta\,(\log\pi_\theta - \log\pi_{ref})(y)
                     - (1 - \gamma) \sum_t V(s_{t+1})`, which at terminal zero is
                     :math:`+\Psi_\gamma` up to the shared :math:`V(s_0)`
``full_dpo``         :math:`\sum_t [q_t - \alpha\,\ell_{T,t} - \gamma V(s_{t+1})]`
``release_entropy``  ``release_sum`` with the *student's* entropy in place of V
===================  ===================================================================

q and :math:`\ell_T` are the student's and the teacher's log-prob of the bucket a target
falls into. ``release_entropy`` is what the shipped recipe runs; it contradicts the
method's description, since the teacher only selects the buckets, and is here for
comparison.

Source: the repository kaist-siit-lab/StarLab_Preference-Distillation-via-Value-based-
Reinforcement-Learning. Deviation: the value after the last target is an explicit
choice; the released code reads it from padding, which pays the shorter response of a
batch some nine nats.

>>> import jax.numpy as jnp
>>> logits = jnp.log(jnp.array([0.125, 0.125, 0.25, 0.5]))
>>> print(jnp.exp(bucket_log_probs(logits, jnp.array([3, 2]))))
[0.5  0.25 0.25]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.likelihood import put_tokens, take_tokens, tempered_log_softmax
from rkd_jax.masking import accumulator, masked_sum

ReleaseVariant = Literal[
    "release_sum", "release_pi", "tpkd", "tpkd_ref", "full_dpo", "release_entropy"
]


class ReleaseSums(NamedTuple):
    """Sums over one response, ``[...]`` each, nats; None where a variant reads none.

    Example: ``ReleaseSums(buckets=-3.31, next_values=0.43)`` for ``release_sum``.
    """

    buckets: jax.Array | None = None  # student, log-prob of each target's bucket
    student: jax.Array | None = None  # student, log-prob of each target
    next_entropy: jax.Array | None = None  # student, bucket entropy at s_1 .. s_T
    reference: jax.Array | None = None  # reference, log-prob of each target
    teacher: jax.Array | None = None  # teacher, log-prob of each target's bucket
    values: jax.Array | None = None  # teacher, V(s_0) .. V(s_{T-1})
    next_values: jax.Array | None = None  # teacher, V(s_1) .. V(s_T)


TRAINED = ("buckets", "student", "next_entropy")  # what is the student's; else data


class _Scales(NamedTuple):
    beta: float
    gamma: float
    alpha: float


class _Variant(NamedTuple):
    reads: tuple[str, ...]
    returns: Callable[[ReleaseSums, _Scales], jax.Array]


RELEASE_VARIANTS = {
    "release_sum": _Variant(
        ("buckets", "next_values"),
        lambda y, k: y.buckets - k.gamma * y.next_values,
    ),
    "release_pi": _Variant(
        ("buckets", "values", "next_values"),
        lambda y, k: y.buckets - k.gamma * y.next_values + y.values,
    ),
    "tpkd": _Variant(
        ("buckets", "values"),
        lambda y, k: k.beta * y.buckets - (1.0 - k.gamma) * y.values,
    ),
    "tpkd_ref": _Variant(
        ("student", "reference", "next_values"),
        lambda y, k: (
            k.beta * (y.student - y.reference) - (1.0 - k.gamma) * y.next_values
        ),
    ),
    "full_dpo": _Variant(
        ("buckets", "teacher", "next_values"),
        lambda y, k: y.buckets - k.alpha * y.teacher - k.gamma * y.next_values,
    ),
    "release_entropy": _Variant(
        ("buckets", "next_entropy"),
        lambda y, k: y.buckets - k.gamma * y.next_entropy,
    ),
}


def release_return(
    sums: ReleaseSums,
    *,
    variant: ReleaseVariant,
    gamma: float,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> jax.Array:
    """The return of a response under one of the released variants, in nats.

    The formulas are in the module's docstring; the loss is `bradley_terry` on the
    returns of a pair.

    Args:
        sums: `ReleaseSums` of float[*batch]; those the variant reads.
        variant: a key of ``RELEASE_VARIANTS``.
        gamma: in [0, 1].
        beta: positive; read by ``tpkd`` and ``tpkd_ref``.
        alpha: at least 0; read by ``full_dpo``.

    Returns:
        float32[*batch], not divided by length. Not reduced.

    Gradient:
        Flows to the student's sums (``buckets``, ``student``, ``next_entropy``); the
        teacher's and the reference's are data.

    Raises:
        ValueError: unknown variant, a sum it reads is missing, or a number out of range
            (Python numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        Code released with TVKD, 2509.16965; the names there are ``dpo`` with soft value
        ``sum`` (``release_sum``) or ``entropy`` (``release_entropy``) and ``PI``
        (``release_pi``). Deviation: terminal value, see the module's docstring; in
        ``tpkd_ref`` both log-probs are of the targets themselves.
    """
    check_domain("gamma", gamma, "[0, 1]")
    check_domain("beta", beta, "(0, inf)")
    check_domain("alpha", alpha, "[0, inf)")
    check_choice("variant", variant, tuple(RELEASE_VARIANTS))
    reads, returns = RELEASE_VARIANTS[variant]
    given = {name: getattr(sums, name) for name in reads}
    missing = [name for name, values in given.items() if values is None]
    if missing:
        raise ValueError(f"{variant} reads {', '.join(missing)}, which is None")
    chex.assert_equal_shape(list(given.values()))
    dtype = accumulator(given[reads[0]])
    given = {
        name: (x if name in TRAINED else jax.lax.stop_gradient(x)).astype(dtype)
        for name, x in given.items()
    }
    return returns(ReleaseSums(**given), _Scales(beta, gamma, alpha))


def bucket_log_probs(
    logits: jax.Array, topk_ids: jax.Array, *, floor: float = 1e-8
) -> jax.Array:
    """Log-probs of some tokens and of all others together, clamped, in nats.

    Args:
        logits: float[*batch, V], unnormalised; log-probs are as good. -inf marks
            impossible tokens.
        topk_ids: int[*batch, K], distinct tokens in [0, V).
        floor: in (0, 0.5), probabilities are clamped to [floor, 1 - floor].

    Returns:
        float32[*batch, K + 1], the last entry for the other tokens; log(floor) there
        if K = V. The upper limit is 1 in float32. NaN at an id outside [0, V). Neither
        masked nor reduced.

    Gradient:
        Flows to ``logits``; 0 through a clamped entry.

    Raises:
        ValueError: floor out of range (Python numbers; traced ones are not checked).
        AssertionError: leading shapes differ.

    References:
        Code released with TVKD, 2509.16965, with K = 50. Deviation: the rest is a sum
        over the other tokens, not 1 minus the sum over these, which rounding would eat.
    """
    check_domain("floor", floor, "(0, 0.5)")
    chex.assert_equal_shape_prefix([logits, topk_ids], logits.ndim - 1)
    probs = jnp.exp(tempered_log_softmax(logits, 1.0))
    others = put_tokens(probs, topk_ids, 0.0)
    rest = jnp.sum(others, axis=-1, keepdims=True)
    buckets = jnp.concatenate([take_tokens(probs, topk_ids), rest], axis=-1)
    return jnp.log(jnp.clip(buckets, floor, 1.0 - floor))


def target_bucket_log_probs(
    buckets: jax.Array, topk_ids: jax.Array, targets: jax.Array
) -> jax.Array:
    """Log-prob of the bucket that each target falls into, in nats.

    Args:
        buckets: float[*batch, K + 1], as from `bucket_log_probs`.
        topk_ids: int[*batch, K], distinct tokens.
        targets: int[*batch].

    Returns:
        float32[*batch]; the last bucket's where ``topk_ids`` does not list the target.
        Neither masked nor reduced.

    Gradient:
        Flows to the bucket's entry only.

    Raises:
        AssertionError: shapes disagree.

    References:
        Code released with TVKD, 2509.16965. Deviation: none.
    """
    chex.assert_shape(buckets, (*targets.shape, topk_ids.shape[-1] + 1))
    listed = topk_ids == jnp.expand_dims(targets, -1)
    other = ~jnp.any(listed, axis=-1, keepdims=True)
    return masked_sum(buckets, jnp.concatenate([listed, other], axis=-1), axis=-1)


def bucket_entropy(buckets: jax.Array) -> jax.Array:
    r"""Entropy over the buckets, :math:`-\sum_b q_b \log q_b`, in nats.

    Args:
        buckets: float[*batch, K + 1], as from `bucket_log_probs`.

    Returns:
        float32[*batch]; up to the clamping, the entropy of the merged distribution.
        Neither masked nor reduced.

    Gradient:
        Flows to ``buckets``.

    References:
        Code released with TVKD, 2509.16965, soft value ``entropy``. Deviation: none.
    """
    buckets = buckets.astype(accumulator(buckets))
    return -jnp.sum(jnp.exp(buckets) * buckets, axis=-1)
