"""Divergences to a teacher of whom only the most likely tokens are known.

>>> import jax.numpy as jnp
>>> from rkd_jax.losses import total_variation
>>> ids, log_probs = jnp.array([2]), jnp.log(jnp.array([0.5]))
>>> student = jnp.log(jnp.array([0.2, 0.2, 0.6]))
>>> found = topk_divergence(student, ids, log_probs, divergence=total_variation)
>>> print(found.round(3))
0.1
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from rkd_jax.losses.divergences import (
    coarse_grained,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_reverse_kl,
)
from rkd_jax.losses.row_losses import Summand, summand_of

_REVERSE_KL = {
    reverse_kl: set(),
    generalized_jsd: {("beta", 1)},
    skew_reverse_kl: {("alpha", 0)},
}
"""With which options a divergence is reverse KL."""


def topk_divergence(
    student_logits: jax.Array,
    topk_ids: jax.Array,
    topk_log_probs: jax.Array,
    *,
    divergence: Callable[..., jax.Array] = forward_kl,
    temperature: float = 1.0,
) -> jax.Array:
    r"""A divergence with all tokens outside the teacher's top k in one bucket, in nats.

    Of the distributions over K + 1 outcomes, the listed tokens and "any other". As
    every divergence here is an f-divergence, it is at most the full one.

    Args:
        student_logits: float[*batch, V], as `topk_forward_kl`.
        topk_ids: int[*batch, K], as `topk_forward_kl`.
        topk_log_probs: float[*batch, K], as `topk_forward_kl`.
        divergence: `forward_kl`, `generalized_jsd`, `skew_forward_kl`,
            `skew_reverse_kl` or `total_variation`; bind options by name with
            `functools.partial`.
        temperature: positive; divides the student's logits.

    Returns:
        float32[*batch]; equal to the full divergence if at most one token is outside.
        A teacher tail below 8 machine epsilons counts as 0. Neither masked nor reduced.

    Gradient:
        Flows to the student only.

    Raises:
        ValueError: options out of range, or reverse KL by whatever name: it is
            infinite where the teacher has no mass, and rounded lists often leave the
            bucket none.
        AssertionError: shapes disagree.

    References:
        Coarse-grained KL as in DCKD, 2502.17927. Deviation: other divergences too, and
        the student's bucket is an exact log-sum-exp over the tail.
    """
    q, p = coarse_grained(student_logits, topk_ids, topk_log_probs, temperature)
    summand = coarse_summand_of(divergence)
    return summand.terms(q, p, **dict(summand.options)).sum(-1)


def coarse_summand_of(divergence: Callable[..., jax.Array]) -> Summand:
    """The summand of a dense divergence that lists with a bucket can be given to."""
    summand = summand_of(divergence)
    function = getattr(divergence, "func", divergence)
    if function in _REVERSE_KL and _REVERSE_KL[function] <= set(summand.options):
        options = ", ".join(f"{name}={value}" for name, value in summand.options)
        raise ValueError(
            f"{function.__name__}({options}) is infinite where the student has mass "
            "and the teacher none, and a list that was rounded often leaves none to "
            "the tokens outside it: give forward_kl, total_variation, or a mixture "
            "such as generalized_jsd with beta below 1"
        )
    return summand
