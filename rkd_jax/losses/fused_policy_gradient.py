"""The sequence-level reverse KL from states and heads.

>>> import jax.numpy as jnp
>>> states, head, mask = jnp.ones((1, 2, 1)), jnp.zeros((1, 4)), jnp.ones((1, 2), bool)
>>> sides = (states, head, states, head)
>>> print(linear_sequence_reverse_kl(*sides, jnp.zeros((1, 2), int), mask=mask))
[[0. 0.]]
"""

from __future__ import annotations

import jax

from rkd_jax.losses.fused import linear_token_log_probs
from rkd_jax.losses.fused_plan import TILES, Tiles, run
from rkd_jax.losses.importance import Importance, factors
from rkd_jax.losses.policy_gradient import (
    CreditBaseline,
    LongPart,
    long_part_credit,
)
from rkd_jax.losses.readouts import Readout
from rkd_jax.losses.row_losses import CreditedReverseKl


def linear_sequence_reverse_kl(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    *,
    mask: jax.Array,
    gamma: float = 1.0,
    long_part: LongPart = "following",
    length_normalised: bool = False,
    importance_weights: jax.Array | None = None,
    importance: Importance = "per_decision",
    baseline: CreditBaseline = "none",
    temperature: float = 1.0,
    student_bias: jax.Array | None = None,
    teacher_bias: jax.Array | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    axis_name: str | None = None,
    tiles: Tiles = TILES,
) -> jax.Array:
    """`sequence_reverse_kl` of ``hidden @ head``: MiniLLM's loss without logits.

    A first pass without gradient finds the log-ratios of the tokens, out of which their
    credit is made; a second one is the divergence.

    Args:
        student_hidden: float[*batch, T, D], along the samples.
        student_head: float[D, V].
        teacher_hidden: float[*batch, T, E]; E may differ from D.
        teacher_head: float[E, V].
        targets: int[*batch, T], the sampled tokens.
        mask: bool[*batch, T]; positions that are not set cost nothing.
        gamma: see `sequence_reverse_kl`.
        long_part: see `sequence_reverse_kl`.
        length_normalised: see `sequence_reverse_kl`.
        importance_weights: see `sequence_reverse_kl`.
        importance: see `sequence_reverse_kl`.
        baseline: see `sequence_reverse_kl`.
        temperature: positive; divides both logits.
        student_bias: float[V].
        teacher_bias: float[V].
        student_softcap: see `linear_token_log_probs`.
        teacher_softcap: see `linear_token_log_probs`.
        axis_name: see `linear_token_log_probs`.
        tiles: see `linear_token_log_probs`.

    Returns:
        float32[*batch, T], as the dense loss; 0 where ``mask`` is not set.

    Gradient:
        Flows to the student's states, head and bias. It is not the derivative of the
        value.

    Raises:
        ValueError: an option out of its domain, vocabularies of different size, or a
            head that is not cut over ``axis_name``. AssertionError: other sizes that
            disagree.

    References:
        See `sequence_reverse_kl`. Deviation: none.
    """
    student = jax.lax.stop_gradient((student_hidden, student_head, student_bias))
    teacher = jax.lax.stop_gradient((teacher_hidden, teacher_head, teacher_bias))

    def log_probs(hidden, head, bias, softcap):
        return linear_token_log_probs(
            hidden,
            head,
            targets,
            mask=mask,
            temperature=temperature,
            bias=bias,
            softcap=softcap,
            axis_name=axis_name,
            tiles=tiles,
        )

    counts = factors(importance_weights, mask, importance)
    ratios = log_probs(*student, student_softcap) - log_probs(*teacher, teacher_softcap)
    credit = long_part_credit(
        ratios,
        mask,
        gamma=gamma,
        long_part=long_part,
        length_normalised=length_normalised,
        counts=counts,
        baseline=baseline,
    )
    return run(
        CreditedReverseKl(),
        (
            Readout(student_hidden, student_head, student_bias),
            Readout(*teacher),
        ),
        (targets.astype("int32"), credit, counts.states),
        mask=mask,
        weights=None,
        temperatures=(temperature, temperature),
        softcaps=(student_softcap, teacher_softcap),
        axis_name=axis_name,
        tiles=tiles,
    )
