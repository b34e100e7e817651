r"""Steps and distances on the moments of action values, for a white-box teacher.

`rkd_jax.losses.minmax` has the moments themselves (`moment_gap`, `advantage_sum`);
here are the student's steps against a critic Q, the adversarial distances of MMKD, and
what brings Q or a truncated teacher into the form that all of them read.

Memory: Q, both policies' log-probs and the gradient of Q are ``[*batch, T, V]``. At
32 responses of 64 tokens and V = 49152, float32, each takes 403 MB. Everything here is
written as sums over V and lookups, for XLA to fuse with what they read; only the
results of `centered_q` and `spread_topk` are such arrays themselves. Micro-batches
(``accumulation`` of `make_update`) divide all of it.

>>> import jax.numpy as jnp
>>> dense = spread_topk(jnp.array([2]), jnp.log(jnp.array([0.5])), 3)
>>> print(jnp.exp(dense))
[0.25 0.25 0.5 ]
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.divergences import total_variation
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.likelihood import put_tokens, taken_values
from rkd_jax.losses.minmax import anchored_advantages, expected_q
from rkd_jax.losses.policy_gradient import reinforce
from rkd_jax.losses.returns import discount_weights
from rkd_jax.masking import accumulator, fill_masked


def centered_q(
    q_values: jax.Array, teacher_log_probs: jax.Array, mask: jax.Array
) -> jax.Array:
    r"""Q without the part of it that no moment and no preference sees.

    .. math:: Q(s, a) - \sum_{a'} \rho(a' | s)\, Q(s, a')

    Gaps, advantages and steps depend on Q up to c(s) only. Centring fixes c, so that a
    bound on Q is a bound on advantages.

    Args:
        q_values: float[*batch, T, V], Q of every action, in nats.
        teacher_log_probs: float[*batch, T, V], normalised log-probs of the anchor;
            -inf allowed. Both may hold anything where the mask is not set.
        mask: bool or 0/1 numbers, [*batch, T].

    Returns:
        float32[*batch, T, V], whose mean under the anchor is 0; 0 in padding.

    Gradient:
        Flows to ``q_values``, through the mean as well; the anchor is data.

    Raises:
        ValueError: vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        MM-PbKD, 2505.18952. Reconstruction: the conditioning of Q is ours.
    """
    mean = expected_q(q_values, jax.lax.stop_gradient(teacher_log_probs), mask)
    q_values = fill_masked(q_values.astype(mean.dtype), mask)
    return fill_masked(q_values - jnp.expand_dims(mean, -1), mask)


def spread_topk(
    topk_ids: jax.Array,
    topk_log_probs: jax.Array,
    vocabulary: int,
    *,
    tail: Literal["uniform", "renormalize"] = "uniform",
) -> jax.Array:
    r"""A teacher's top k tokens as a distribution over all of them.

    With ``"uniform"`` the remaining mass is spread evenly, which makes the teacher's
    value of a state

    .. math:: \sum_a \pi_E(a) Q(a) = \sum_{a \in K} \pi_E(a) Q(a)
        + \pi_{rest}\, \overline Q_{rest}

    with the mean of Q over the tail; ``"renormalize"`` leaves the tail nothing and
    divides the listed mass by its sum.

    Args:
        topk_ids: int[*batch, K], distinct tokens in [0, V). An entry whose log-prob is
            -inf counts as absent, whatever its id.
        topk_log_probs: float[*batch, K], the full-softmax log-probs of those tokens.
        vocabulary: V.
        tail: what happens to the remaining mass.

    Returns:
        float32[*batch, V], normalised log-probs. Listed mass within 8 machine epsilons
        of 1 leaves no tail; with nothing listed, "renormalize" gives -inf everywhere.

    Gradient:
        None: the teacher is data.

    Raises:
        ValueError: unknown ``tail``.
        AssertionError: ids and log-probs have different shapes.

    References:
        Reconstruction: how a truncated teacher enters is not published. Both readings
        are approximations of the full teacher, the default elsewhere.
    """
    check_choice("tail", tail, ("uniform", "renormalize"))
    chex.assert_equal_shape([topk_ids, topk_log_probs])
    listed = jax.lax.stop_gradient(topk_log_probs.astype(accumulator(topk_log_probs)))
    present = listed > -jnp.inf
    mass = jnp.sum(jnp.exp(listed), axis=-1, keepdims=True)
    if tail == "uniform":
        rest = 1.0 - mass
        absent = vocabulary - jnp.sum(present, axis=-1, keepdims=True)
        some = (absent > 0) & (rest > 8 * jnp.finfo(rest.dtype).eps)
        share = jnp.where(some, rest, 1.0) / jnp.maximum(absent, 1).astype(rest.dtype)
        filler = jnp.where(some, jnp.log(share), -jnp.inf)
    else:
        listed = jnp.where(present, listed - jnp.log(mass), -jnp.inf)
        filler = jnp.full_like(mass, -jnp.inf)
    # An absent id points past the vocabulary, where the scatter drops it.
    ids = jnp.where(present, topk_ids, jnp.asarray(vocabulary, topk_ids.dtype))
    dense = jnp.broadcast_to(filler, (*mass.shape[:-1], vocabulary))
    return put_tokens(dense, ids, listed)


def one_step(
    q_values: jax.Array,
    student_log_probs: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
) -> jax.Array:
    r"""The student's mean action value at given states, negated, per position.

    .. math:: -\gamma^h \sum_a \pi_\theta(a | s_h)\, \mathrm{sg}[Q(s_h, a)]

    On the teacher's responses it has the gradient of the off-policy gap. On the
    student's own it leaves out how an action changes the states that follow: biased
    where Q is anchored by the teacher (unless the policies agree), exact for a Q
    anchored by this very student.

    Args:
        q_values: float[*batch, T, V], the critic's, in nats.
        student_log_probs: float[*batch, T, V], normalised. Both may hold anything where
            the mask is not set.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch, T], in the unit of Q; 0 where the mask is not set. c(s) added to
        Q shifts the value, not the gradient in the logits.

    Gradient:
        Flows to ``student_log_probs`` only; the critic is data.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked), or
            vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        MM-PbKD, 2505.18952; MMKD, 2406.02959. Reconstruction: the student's step is
        not published.
    """
    mean = expected_q(jax.lax.stop_gradient(q_values), student_log_probs, mask)
    return -discount_weights(mask, gamma=gamma).astype(mean.dtype) * mean


def one_step_plus_long(
    q_values: jax.Array,
    student_log_probs: jax.Array,
    actions: jax.Array,
    later: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
) -> jax.Array:
    r"""`one_step`, and REINFORCE for what an action does to the states after it.

    .. math:: -\gamma^h \sum_a \pi_\theta(a | s_h)\, \mathrm{sg}[Q(s_h, a)]
        - \gamma^h\, \mathrm{sg}[L_h] \log\pi_\theta(a_h | s_h), \qquad
        L_h = \gamma G_{h+1} - b_h

    with G the return-to-go of the advantages (`anchored_advantages`), anchored by the
    teacher. Unbiased, like REINFORCE on G itself, with the first step's noise summed
    out. Credit with the *full* G would count step h twice.

    Args:
        q_values: float[*batch, T, V], the critic's, in nats.
        student_log_probs: float[*batch, T, V], normalised.
        actions: int[*batch, T], the student's own samples, in [0, V).
        later: float[*batch, T], L: `reward_to_go` of the advantages, less the
            advantages themselves, less a baseline. All may hold anything where the mask
            is not set.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1], that of the return.

    Returns:
        float32[*batch, T]; 0 where the mask is not set. The value means nothing.

    Gradient:
        Flows to ``student_log_probs`` only.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked), or
            vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        MM-PbKD, 2505.18952. Reconstruction: derived from the policy gradient theorem.
    """
    chex.assert_equal_shape([actions, later, mask])
    taken = taken_values(student_log_probs, actions, mask)
    first = one_step(q_values, student_log_probs, mask, gamma=gamma)
    return first + reinforce(taken, later, mask, gamma=gamma)


def on_policy_moment(
    q_values: jax.Array,
    teacher_log_probs: jax.Array,
    actions: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
) -> jax.Array:
    r"""Sampled on-policy moment, per position of the *student's* responses.

    .. math:: \gamma^t \big(\mathbb E_{a\sim\pi_E} f(s_t, a) - f(s_t, a_t)\big)

    The critic maximises its sum over a response; the supremum over critics bounds the
    imitation gap if they contain the teacher's action values. `moment_gap` is its mean
    over the student's action.

    Args:
        q_values: float[*batch, T, V], the critic f, in the unit of the reward.
        teacher_log_probs: float[*batch, T, V], normalised; -inf allowed.
        actions: int[*batch, T], in [0, V), sampled from the student. All three may hold
            anything where the mask is not set.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch, T], in the unit of f; 0 where the mask is not set. c(s) added to
        f changes nothing.

    Gradient:
        Flows to ``q_values`` only.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked), or
            vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        MMKD, 2406.02959. Reconstruction: the abstract's idea; the repository named
        there holds no implementation.
    """
    ahead = anchored_advantages(q_values, teacher_log_probs, actions, mask)
    return -discount_weights(mask, gamma=gamma).astype(ahead.dtype) * ahead


def off_policy_moment(
    q_values: jax.Array,
    student_log_probs: jax.Array,
    actions: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
) -> jax.Array:
    r"""Sampled off-policy moment, per position of the *teacher's* responses.

    .. math:: \gamma^t \big(f(s_t, a_t) - \mathbb E_{a\sim\pi_\theta} f(s_t, a)\big)

    As `on_policy_moment`, with the roles exchanged: it needs no distribution of the
    teacher, and the bound asks for the student's action values.

    Args:
        q_values: float[*batch, T, V], the critic f, in the unit of the reward.
        student_log_probs: float[*batch, T, V], normalised; -inf allowed.
        actions: int[*batch, T], in [0, V), the teacher's. All three may hold anything
            where the mask is not set.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch, T], in the unit of f; 0 where the mask is not set. c(s) added to
        f changes nothing.

    Gradient:
        Flows to ``q_values`` and ``student_log_probs``.

    Raises:
        As `on_policy_moment`.

    References:
        MMKD, 2406.02959. Reconstruction: see `on_policy_moment`.
    """
    chex.assert_equal_shape([actions, mask])
    mean = expected_q(q_values, student_log_probs, mask)
    weights = discount_weights(mask, gamma=gamma).astype(mean.dtype)
    return weights * (taken_values(q_values, actions, mask) - mean)


def bounded_moment_distance(
    student_log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    mask: jax.Array,
    *,
    q_bound: float = 1.0,
    gamma: float = 1.0,
) -> jax.Array:
    r"""What the best critic bounded by Q would find, in closed form, per position.

    .. math:: \sup_{|f| \le Q} \gamma^t \sum_a (\pi_E - \pi_\theta)(a | s_t)\, f(s_t, a)
        = 2 Q\, \gamma^t\, \mathrm{TV}(\pi_E, \pi_\theta)(s_t)

    attained by the sign of the difference. Summed and averaged over the student's
    responses it is the on-policy distance, over the teacher's the off-policy one. An
    adversary is worth its cost only if its class is smaller than this.

    Args:
        student_log_probs: float[*batch, T, V], normalised.
        teacher_log_probs: float[*batch, T, V], normalised; -inf allowed. Both may hold
            anything where the mask is not set.
        mask: bool or 0/1 numbers, [*batch, T].
        q_bound: positive, largest absolute value of a critic.
        gamma: in [0, 1].

    Returns:
        float32[*batch, T], in the unit of the bound, non-negative; 0 where the policies
        agree and where the mask is not set.

    Gradient:
        Flows to ``student_log_probs`` at fixed states; the teacher is data.

    Raises:
        ValueError: q_bound or gamma out of range (Python numbers; traced ones are not
            checked), or vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        MMKD, 2406.02959. Derived, not stated there. Deviation: none.
    """
    check_domain("q_bound", q_bound, "(0, inf)")
    chex.assert_equal_shape_prefix([student_log_probs, mask], mask.ndim)
    student, teacher = (
        fill_masked(log_probs, mask)
        for log_probs in (student_log_probs, teacher_log_probs)
    )
    distance = total_variation(student, teacher)
    weights = discount_weights(mask, gamma=gamma).astype(distance.dtype)
    return 2.0 * q_bound * weights * distance


def gradient_penalty(
    slopes: jax.Array, mask: jax.Array, *, target: float = 0.4
) -> jax.Array:
    r"""How far a critic's slope in its input is from a target, per position.

    .. math:: \big(\lVert\nabla_{h_t} m(h_t)\rVert_2 - k\big)^2

    Args:
        slopes: float[*batch, T, D], gradient of a moment in the state's features;
            padding may hold anything.
        mask: bool or 0/1 numbers, [*batch, T].
        target: at least 0, k.

    Returns:
        float32[*batch, T], non-negative; 0 where the mask is not set.

    Gradient:
        Flows to ``slopes``; 0 where they vanish (a critic that starts at 0).

    Raises:
        ValueError: target out of range (Python numbers; traced ones are not checked).
        AssertionError: ``slopes`` has other leading axes than ``mask``.

    References:
        Gulrajani et al., WGAN-GP, 1704.00028, Eq. (3). Reconstruction: whether MMKD
        penalises its critics is not published; the target is that of an open
        implementation of adversarial value moments.
    """
    check_domain("target", target, "[0, inf)")
    slopes = fill_masked(slopes.astype(accumulator(slopes)), mask)
    square = jnp.sum(jnp.square(slopes), axis=-1)
    some = square > 0  # the root has no slope at 0
    norm = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
    return fill_masked(jnp.square(norm - target), mask)
