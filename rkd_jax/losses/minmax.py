r"""The two sides of the imitation game, both written to be minimised.

A reward player looks for a reward under which the teacher beats the student; the
student closes the gap:

.. math:: \min_\theta \max_{r \in \mathcal R(D)} J(\pi_E, r) - J(\pi_\theta, r),
    \qquad J(\pi, r) = \mathbb E_x\, \mathbb E_{\tau\sim\pi} \sum_h \gamma^h r(s_h, a_h)

**Reward player** (`reward_player_loss`; the student is frozen). The maximum becomes a
minimum, and membership in the confidence set a Lagrangian term:

.. math:: \mathcal L(\phi) = -\big(\hat{\mathbb E}_{\pi_E} r_\phi(x, \tau)
    - \hat{\mathbb E}_{\pi_\theta} r_\phi(x, \tau)\big)
    + \lambda \big(\overline{\mathrm{NLL}}_\phi - \overline{\mathrm{NLL}}_{\hat r}
    - \epsilon\big)

**Multiplier** (`dual_update`): projected ascent on the same bracket.

**Student** (`rkd_jax.losses.policy_gradient.reinforce`; the reward is frozen). The
teacher's return does not depend on the student, so what remains is -J(student), whose
gradient is that of

.. math:: \mathcal L(\theta) = -\hat{\mathbb E}_{\pi_\theta} \sum_h w_h\,
    \mathrm{sg}[\hat G_h - b_h] \log\pi_\theta(a_h | s_h), \qquad
    w_h \in \{1, \gamma^h\}

with :math:`\hat G` from `reward_to_go` and :math:`b` a leave-one-out baseline.

**With a teacher whose distribution is known**, the reward may be written through any
function Q and an anchor policy :math:`\rho`, with :math:`V_\rho(s) = \sum_a
\rho(a|s) Q(s, a)`, as :math:`r(s, a) = Q(s, a) - \gamma V_\rho(s')`. The gap is then a
moment gap, taken by the student's responses if the teacher is the anchor and by the
teacher's if the student is (`moment_gap`), and a response's reward the prompt's
:math:`V_\rho` plus its `advantage_sum`.

Source: PbKD, 2505.18952, for the game; the solver and the form through Q are
reconstructions.

>>> import jax.numpy as jnp
>>> teacher, student = jnp.log(jnp.array([[[0.5, 0.5]], [[0.25, 0.75]]]))
>>> print(moment_gap(jnp.array([[4.0, 0.0]]), student, teacher, jnp.array([True])))
[1.]
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_domain
from rkd_jax.losses.likelihood import taken_values
from rkd_jax.losses.returns import discount_weights, reward_to_go, trajectory_return
from rkd_jax.masking import accumulator, fill_masked

__all__ = [
    "advantage_sum",
    "anchored_advantages",
    "discount_weights",
    "dual_update",
    "moment_gap",
    "reward_gap",
    "reward_player_loss",
    "reward_to_go",
    "trajectory_return",
]


def reward_gap(teacher_returns: jax.Array, student_returns: jax.Array) -> jax.Array:
    r"""By how much the teacher beats the student under a reward.

    .. math:: r(x, \tau_E) - r(x, \tau_\theta)

    Args:
        teacher_returns: float[*batch], returns of the teacher's responses.
        student_returns: float[*batch], of the student's; with several samples per
            prompt, their mean.

    Returns:
        float32[*batch], positive where the teacher is ahead. Not reduced; its mean
        estimates the imitation gap, whether or not row i of both shares a prompt.

    Gradient:
        Flows to both: they are functions of the reward player alone, and no gradient
        reaches the student through its samples.

    Raises:
        AssertionError: shapes differ.

    References:
        PbKD, 2505.18952: the game's payoff. Deviation: none.
    """
    chex.assert_equal_shape([teacher_returns, student_returns])
    dtype = accumulator(teacher_returns)
    return teacher_returns.astype(dtype) - student_returns.astype(dtype)


def moment_gap(
    q_values: jax.Array,
    student_log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
) -> jax.Array:
    r"""How far the teacher's actions are ahead of the student's, per position.

    .. math:: \gamma^h \sum_a (\pi_E - \pi_\theta)(a | s_h)\, Q(s_h, a)

    Summed over a response and averaged over the *student's* responses, this is
    J(teacher) - J(student) under the reward that Q and the teacher as anchor define;
    over the *teacher's* responses, under the one with the student as anchor.

    Args:
        q_values: float[*batch, T, V], Q of every action, in nats.
        student_log_probs: float[*batch, T, V], normalised. They and ``q_values`` may
            hold anything where the mask is not set.
        teacher_log_probs: float[*batch, T, V], normalised; -inf marks impossible
            tokens.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch, T], in the unit of Q; 0 where the mask is not set, and exactly 0
        where both policies are the same numbers. Adding c(s) to Q changes nothing.

    Gradient:
        Flows to ``q_values`` and ``student_log_probs``; the teacher is data.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked), or
            vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        MM-PbKD, 2505.18952; MMKD, 2406.02959. Reconstruction: the equations are not
        published; derived from the performance difference of the reward above.
    """
    check_vocabularies(q_values, student_log_probs, teacher_log_probs)
    teacher_log_probs = jax.lax.stop_gradient(teacher_log_probs)
    student, teacher = (
        _probabilities(log_probs, q_values, mask)
        for log_probs in (student_log_probs, teacher_log_probs)
    )
    # Differences first: policies that agree cancel exactly, whatever Q is.
    moments = jnp.sum((teacher - student) * _filled(q_values, mask), axis=-1)
    return discount_weights(mask, gamma=gamma).astype(moments.dtype) * moments


def anchored_advantages(
    q_values: jax.Array,
    teacher_log_probs: jax.Array,
    actions: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    r"""Advantage of each action over the anchor's average action, per position.

    .. math:: A_h = Q(s_h, a_h) - \sum_a \rho(a | s_h)\, Q(s_h, a)

    Minus this is the per-step cost of the student's step. It also serves as a reward:
    its discounted sum ranks the responses of a prompt as the implied reward does.

    Args:
        q_values: float[*batch, T, V], Q of every action, in nats.
        teacher_log_probs: float[*batch, T, V], normalised log-probs of the anchor, the
            teacher or any other policy; -inf allowed.
        actions: int[*batch, T], in [0, V). All three may hold anything where the mask
            is not set.
        mask: bool or 0/1 numbers, [*batch, T].

    Returns:
        float32[*batch, T], in the unit of Q; 0 where the mask is not set.

    Gradient:
        Flows to ``q_values``: one-hot minus the anchor's probabilities. The anchor is
        data.

    Raises:
        ValueError: vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        As `advantage_sum`. Reconstruction: see there.
    """
    chex.assert_equal_shape([actions, mask])
    value = expected_q(q_values, jax.lax.stop_gradient(teacher_log_probs), mask)
    return fill_masked(taken_values(q_values, actions, mask) - value, mask)


def advantage_sum(
    q_values: jax.Array,
    teacher_log_probs: jax.Array,
    actions: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
) -> jax.Array:
    r"""What a response is worth beyond its prompt, under the reward implied by Q.

    .. math:: A_\rho(\tau) = \sum_h \gamma^h \big(Q(s_h, a_h) - V_\rho(s_h)\big)

    The difference of two responses to one prompt is their Bradley-Terry logit: the
    prompt's :math:`V_\rho(x)` cancels.

    Args:
        q_values: float[*batch, T, V], Q of every action, in nats.
        teacher_log_probs: float[*batch, T, V], of the anchor; see
            `anchored_advantages`.
        actions: int[*batch, T], the response.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch], in the unit of Q; 0 where no entry is set.

    Gradient:
        Flows to ``q_values`` only.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked), or
            vocabularies of different size.
        AssertionError: leading shapes differ.

    References:
        MM-PbKD, 2505.18952. Reconstruction: the preference logit through Q is not
        published; derived from r(s, a) = Q(s, a) - gamma V(s').
    """
    advantages = anchored_advantages(q_values, teacher_log_probs, actions, mask)
    return trajectory_return(advantages, mask, gamma=gamma)


def reward_player_loss(
    gap: jax.Array, slack: jax.Array, dual: jax.Array, *, hinge: bool = False
) -> jax.Array:
    r"""The reward player's Lagrangian, to be minimised.

    .. math:: -\mathrm{gap} + \lambda\,\mathrm{slack}

    Args:
        gap: float[*batch], imitation gap (`reward_gap`); the player maximises it.
        slack: float[*batch], `rkd_jax.losses.reward.confidence_slack`, in nats.
        dual: float[], the multiplier, non-negative.
        hinge: pay only outside the set: slack becomes max(slack, 0). The constraint is
            on the mean, and a mean of hinges is not the hinge of a mean, so reduce
            gap and slack to scalars before. Inside the set nothing pulls back, so the
            iterate chatters across the boundary and the multiplier ends higher.

    Returns:
        float32[*batch], in the unit of the gap. Not reduced.

    Gradient:
        Flows to ``gap`` with weight -1 and to ``slack`` with weight ``dual``; never to
        ``dual``, which moves by `dual_update`.

    Raises:
        AssertionError: shapes of gap and slack differ, or dual is no scalar.

    References:
        PbKD, 2505.18952. Reconstruction: the constraint handling is not published.
    """
    chex.assert_equal_shape([gap, slack])
    gap = gap.astype(accumulator(gap))
    dual = jax.lax.stop_gradient(jnp.asarray(dual, gap.dtype))
    chex.assert_rank(dual, 0)
    slack = slack.astype(gap.dtype)
    return -gap + dual * (jax.nn.relu(slack) if hinge else slack)


def dual_update(
    dual: jax.Array,
    slack: jax.Array,
    *,
    epsilon: float,
    step_size: float = 0.5,
    clip: float = 10.0,
) -> jax.Array:
    r"""Projected ascent of the multiplier on the relative slack.

    .. math:: \lambda \leftarrow \big[\lambda
        + \eta\,\mathrm{clip}(\mathrm{slack} / \epsilon, \pm c)\big]_+

    Dividing by epsilon matters: ascent on the raw slack (``epsilon=1``) is far too slow
    for a small set.

    Args:
        dual: float[], the multiplier, non-negative.
        slack: float[], *mean* `rkd_jax.losses.reward.confidence_slack`, in nats.
        epsilon: positive, the radius the slack was taken against.
        step_size: positive, eta.
        clip: positive, largest relative slack one step may see; inf for no clipping.

    Returns:
        float32[], non-negative; unchanged at slack 0.

    Gradient:
        None flows through it.

    Raises:
        ValueError: epsilon, step_size or clip out of range (Python numbers; traced
            ones are not checked).
        AssertionError: dual or slack is no scalar.

    References:
        PbKD, 2505.18952. Reconstruction: the dual step is ours.
    """
    check_domain("epsilon", epsilon, "(0, inf)")
    check_domain("step_size", step_size, "(0, inf)")
    check_domain("clip", clip, "(0, inf]")
    dual = jnp.asarray(dual)
    dual = jax.lax.stop_gradient(dual.astype(accumulator(dual)))
    slack = jax.lax.stop_gradient(jnp.asarray(slack, dual.dtype))
    chex.assert_rank([dual, slack], 0)
    relative = jnp.clip(slack / epsilon, -clip, clip)
    return jnp.maximum(dual + step_size * relative, 0.0)


def expected_q(q_values: jax.Array, log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of Q under a policy, ``[.., T, V] -> [.., T]``, 0 where masked."""
    check_vocabularies(q_values, log_probs)
    probs = _probabilities(log_probs, q_values, mask)
    return jnp.sum(probs * _filled(q_values, mask), axis=-1)


def check_vocabularies(q_values: jax.Array, *policies: jax.Array) -> None:
    """Raise where Q and the policies are not about the same tokens or positions."""
    for policy in policies:
        if policy.shape[-1] != q_values.shape[-1]:
            raise ValueError(
                f"Q has {q_values.shape[-1]} vocabulary entries, a policy has "
                f"{policy.shape[-1]}: align them first "
                "(rkd_jax.models.surgery.align_vocab)"
            )
    chex.assert_equal_shape([q_values, *policies])


def _filled(q_values: jax.Array, mask: jax.Array) -> jax.Array:
    return fill_masked(q_values.astype(accumulator(q_values)), mask)


def _probabilities(log_probs: jax.Array, q_values: jax.Array, mask: jax.Array):
    """In the dtype Q is summed in; 1 everywhere in padding."""
    return jnp.exp(fill_masked(log_probs.astype(accumulator(q_values)), mask))
