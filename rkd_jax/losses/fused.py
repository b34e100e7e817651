r"""Losses from states and vocabulary heads: ``[.., T, V]`` logits never exist.

The same numbers as the dense functions of `likelihood`, `divergences` and `value`, from
``hidden [*batch, D]`` and ``head [D, V]``, with time and memory for the positions that
``mask`` counts alone. Values and gradients agree with the dense ones up to rounding,
products are summed in float32 whatever the inputs' dtype. A head is cast to the dtype
of the states it meets; its gradient is summed in float32 and stored in its own dtype.

A gradient in the head needs the logits a second time, unless it is known beforehand
what the values will be multiplied with. ``weights`` says so, and changes no value; the
default, ``mask``, fits every sum or mean over positions (`Tiles.gradient`).

First derivatives in reverse mode alone: JAX refuses forward mode, and a second
derivative with respect to what a value is multiplied with is 0 where that is 0.

>>> import jax, jax.numpy as jnp
>>> from rkd_jax.losses import generalized_jsd
>>> states, head = jnp.eye(2), jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]])
>>> print(jnp.exp(linear_token_log_probs(states, head, jnp.array([2, 2]))).round(1))
[0.7 0.8]
>>> print(linear_divergence(states, head, states, head, divergence=generalized_jsd))
[0. 0.]

Under `jax.shard_map` with the heads' columns sharded over a mesh axis, ``axis_name``
names it: every device sees its own columns, and what passes between them is a maximum
and a sum per row. Rows may be cut over other axes, and ``check_vma`` has to be left on.
Outside of it nothing is to be said: in an update with a ``batch_sharding``, or inside
`jax.set_mesh`, rows are cut over the mesh axes of the batch and columns over that of
the vocabulary, as the rules of `rkd_jax.sharding` have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses import divergences
from rkd_jax.losses.divergences import forward_kl
from rkd_jax.losses.domain import check_choice, check_domain, static_number
from rkd_jax.losses.fused_plan import TILES, Tiles, run
from rkd_jax.losses.readouts import Readout
from rkd_jax.losses.row_losses import (
    EXPECTATION,
    PerToken,
    SoftValue,
    TokenLogProb,
    TopK,
    summand_of,
)
from rkd_jax.losses.topk import coarse_summand_of

Divergence = Callable[..., jax.Array]


def linear_token_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    temperature: float = 1.0,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    axis_name: str | None = None,
    tiles: Tiles = TILES,
) -> jax.Array:
    """Log-probability of each target, `token_log_probs` of ``hidden @ head``, in nats.

    Args:
        hidden: float[*batch, D], the state that predicts each target.
        head: float[D, V].
        targets: int[*batch], in [0, V).
        mask: bool[*batch]; positions that are not set cost nothing. None counts all.
        weights: float[*batch], what the caller will multiply the values with, where it
            is known, such as advantages; only a hint.
        temperature: positive; divides the logits.
        bias: float[V], added to the logits.
        softcap: positive c; logits become c tanh(logits / c), as in Gemma.
        axis_name: mesh axis over which ``head`` and ``bias`` are sharded in V.
        tiles: see `Tiles`.

    Returns:
        float32[*batch], at most 0; 0 where ``mask`` is not set, NaN at a target outside
        [0, V). Not reduced.

    Gradient:
        Flows to ``hidden``, ``head`` and ``bias``.

    Raises:
        ValueError: temperature or softcap out of range or traced, or a head that is not
            cut over ``axis_name``. AssertionError: sizes that disagree, or targets
            that are no integers.

    References:
        Textbook. Deviation: none.
    """
    chex.assert_shape(targets, hidden.shape[:-1])
    chex.assert_type(targets, int)
    targets = targets.astype(jnp.int32)
    values = run(
        TokenLogProb(),
        (Readout(hidden, head, bias), None),
        targets,
        mask=mask,
        weights=weights,
        temperatures=(temperature, temperature),
        softcaps=(softcap, None),
        axis_name=axis_name,
        tiles=tiles,
    )
    width = head.shape[1] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    known = (targets >= 0) & (targets < width)
    known = known if mask is None else known | ~mask.astype(bool)
    return jnp.where(known, values, jnp.nan)


def linear_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    *,
    divergence: Divergence = divergences.forward_kl,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    temperature: float = 1.0,
    student_bias: jax.Array | None = None,
    teacher_bias: jax.Array | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    axis_name: str | None = None,
    tiles: Tiles = TILES,
) -> jax.Array:
    """A divergence between student and teacher at every position, in nats.

    Args:
        student_hidden: float[*batch, D].
        student_head: float[D, V].
        teacher_hidden: float[*batch, E]; E may differ from D.
        teacher_head: float[E, V].
        divergence: a function of `rkd_jax.losses.divergences` over full distributions,
            or a `functools.partial` of one: ``partial(generalized_jsd, beta=0.1)``.
        mask: see `linear_token_log_probs`.
        weights: see `linear_token_log_probs`.
        temperature: positive; divides both logits. Give it here, not to the divergence.
        student_bias: float[V].
        teacher_bias: float[V].
        student_softcap: see `linear_token_log_probs`.
        teacher_softcap: see `linear_token_log_probs`.
        axis_name: see `linear_token_log_probs`.
        tiles: see `linear_token_log_probs`.

    Returns:
        float32[*batch], as the dense divergence; 0 where ``mask`` is not set. Not
        reduced.

    Gradient:
        Flows to the student's states, head and bias. The teacher is data: exactly 0.

    Raises:
        ValueError: a divergence that is none of those, options out of range,
            vocabularies of different size, or a head that is not cut over
            ``axis_name``. AssertionError: other sizes that disagree.

    References:
        See the dense divergence. Deviation: none.
    """
    if student_head.shape[1] != teacher_head.shape[1]:
        raise ValueError(
            f"student has {student_head.shape[1]} vocabulary entries, teacher "
            f"{teacher_head.shape[1]}: align them first "
            "(rkd_jax.models.surgery.align_vocab)"
        )
    teacher = Readout(teacher_hidden, teacher_head, teacher_bias)
    return run(
        PerToken(summand_of(divergence)),
        (Readout(student_hidden, student_head, student_bias), teacher),
        None,
        mask=mask,
        weights=weights,
        temperatures=(temperature, temperature),
        softcaps=(student_softcap, teacher_softcap),
        axis_name=axis_name,
        tiles=tiles,
    )


def linear_topk_divergence(
    hidden: jax.Array,
    head: jax.Array,
    topk_ids: jax.Array,
    topk_log_probs: jax.Array,
    *,
    divergence: Callable[..., jax.Array] = forward_kl,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    temperature: float = 1.0,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    axis_name: str | None = None,
    tiles: Tiles = TILES,
) -> jax.Array:
    """`topk_divergence` to a teacher's top k and one bucket for the rest, in nats.

    Args:
        hidden: float[*batch, D] of the student.
        head: float[D, V] of the student.
        topk_ids: int[*batch, K], as `topk_divergence`.
        topk_log_probs: float[*batch, K], taken at the same temperature.
        divergence: see `topk_divergence`.
        mask: see `linear_token_log_probs`.
        weights: see `linear_token_log_probs`.
        temperature: see `linear_token_log_probs`.
        bias: see `linear_token_log_probs`.
        softcap: see `linear_token_log_probs`.
        axis_name: see `linear_token_log_probs`.
        tiles: see `linear_token_log_probs`.

    Returns:
        float32[*batch], as `topk_divergence`; 0 where ``mask`` is not set, NaN where a
        listed id is outside [0, V). Not reduced.

    Gradient:
        Flows to the student's states, head and bias.

    Raises:
        ValueError: options out of range, a divergence that `topk_divergence` refuses,
            or a head that is not cut over ``axis_name``. AssertionError: sizes that
            disagree.

    References:
        See `topk_divergence`. Deviation: none.
    """
    chex.assert_equal_shape([topk_ids, topk_log_probs])
    chex.assert_shape(topk_ids, (*hidden.shape[:-1], None))
    chex.assert_type(topk_ids, int)
    check_domain("the length of a list", topk_ids.shape[-1], "[1, inf)")
    width = head.shape[1] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    log_probs = jax.lax.stop_gradient(topk_log_probs)
    return run(
        TopK(vocabulary=width, summand=coarse_summand_of(divergence)),
        (Readout(hidden, head, bias), None),
        (topk_ids.astype(jnp.int32), log_probs),
        mask=mask,
        weights=weights,
        temperatures=(temperature, temperature),
        softcaps=(softcap, None),
        axis_name=axis_name,
        tiles=tiles,
    )


def linear_soft_value(
    hidden: jax.Array,
    head: jax.Array,
    *,
    power: float = 0.7,
    scale: float = 1.0,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    temperature: float = 1.0,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    axis_name: str | None = None,
    tiles: Tiles = TILES,
) -> jax.Array:
    """`soft_value` of the log-probs of every state (TVKD's potential).

    Args:
        hidden: float[*batch, D].
        head: float[D, V].
        power: see `soft_value`; at 1 every value is 0.
        scale: see `soft_value`.
        mask: see `linear_token_log_probs`.
        weights: see `linear_token_log_probs`.
        temperature: see `linear_token_log_probs`.
        bias: see `linear_token_log_probs`.
        softcap: see `linear_token_log_probs`.
        axis_name: see `linear_token_log_probs`.
        tiles: see `linear_token_log_probs`.

    Returns:
        float32[*batch], nats times ``scale``; 0 where ``mask`` is not set.

    Gradient:
        Flows to ``hidden``, ``head`` and ``bias``.

    Raises:
        ValueError: options out of range, or a head that is not cut over ``axis_name``.
            AssertionError: sizes that disagree.

    References:
        See `soft_value`. Deviation: none.
    """
    power, scale = static_number("power", power), static_number("scale", scale)
    check_domain("power", power, "(0, inf)")
    check_domain("scale", scale, "(0, inf)")
    return run(
        SoftValue(power, scale),
        (Readout(hidden, head, bias), None),
        None,
        mask=mask,
        weights=weights,
        temperatures=(temperature, temperature),
        softcaps=(softcap, None),
        axis_name=axis_name,
        tiles=tiles,
    )


def linear_expectation(
    policy_hidden: jax.Array,
    policy_head: jax.Array,
    value_hidden: jax.Array,
    value_head: jax.Array,
    *,
    trains: Literal["policy", "values"],
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
    temperature: float = 1.0,
    policy_bias: jax.Array | None = None,
    value_bias: jax.Array | None = None,
    policy_softcap: float | None = None,
    value_softcap: float | None = None,
    axis_name: str | None = None,
    tiles: Tiles = TILES,
) -> jax.Array:
    r"""Mean of action values under a policy, both read from states.

    .. math:: \sum_v \pi(v | s)\, Q(s, v)

    Args:
        policy_hidden: float[*batch, D].
        policy_head: float[D, V].
        value_hidden: float[*batch, E].
        value_head: float[E, V].
        trains: who gets the gradient; the other is data.
        mask: see `linear_token_log_probs`.
        weights: see `linear_token_log_probs`.
        temperature: of the policy.
        policy_bias: float[V].
        value_bias: float[V].
        policy_softcap: see `linear_token_log_probs`.
        value_softcap: a smooth bound of the values.
        axis_name: see `linear_token_log_probs`.
        tiles: see `linear_token_log_probs`.

    Returns:
        float32[*batch], unit of Q; 0 where ``mask`` is not set. A token without mass
        counts nothing, whatever its value.

    Gradient:
        Flows to states, head and bias of one side.

    Raises:
        ValueError: options out of range, vocabularies of different size, or a head that
            is not cut over ``axis_name``. AssertionError: other sizes that disagree.

    References:
        MM-PbKD, 2505.18952: the two sides of the moment gap. Deviation: none.
    """
    check_choice("trains", trains, ("policy", "values"))
    if policy_head.shape[1] != value_head.shape[1]:
        raise ValueError(
            f"the policy has {policy_head.shape[1]} vocabulary entries, the values "
            f"{value_head.shape[1]}: align them first "
            "(rkd_jax.models.surgery.align_vocab)"
        )
    policy = Readout(policy_hidden, policy_head, policy_bias)
    values = Readout(value_hidden, value_head, value_bias)
    softcaps, temperatures = (policy_softcap, value_softcap), (temperature, 1.0)
    sides = policy, values
    if trains == "values":
        sides = values, policy
        softcaps, temperatures = softcaps[::-1], temperatures[::-1]
    return run(
        PerToken(EXPECTATION[trains]),
        sides,
        None,
        mask=mask,
        weights=weights,
        temperatures=temperatures,
        softcaps=softcaps,
        axis_name=axis_name,
        tiles=tiles,
        normalised=(trains == "policy", trains == "values"),
    )
