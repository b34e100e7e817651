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

with :math:`\hat G` from `reward_to_go` and :math:`b` a leave-one-out baseline. Source:
PbKD, 2505.18952, for the game; the solver is a reconstruction.

>>> import jax.numpy as jnp
>>> rewards = jnp.array([1.0, 2.0, jnp.nan])
>>> mask = jnp.array([True, True, False])
>>> print(trajectory_return(rewards, mask, gamma=0.5))
2.0
>>> print(reward_to_go(rewards, mask, gamma=0.5))
[2. 2. 0.]
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_domain
from rkd_jax.masking import accumulator, fill_masked, sequence_sum


def discount_weights(mask: jax.Array, *, gamma: float) -> jax.Array:
    r"""The discount of each step, :math:`\gamma^h`, h counting response tokens from 0.

    Args:
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch, T]; 1 at the first set entry, 0 where the mask is not set.

    Gradient:
        None: hyper-parameters only.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked).

    References:
        Textbook. Deviation: none.
    """
    check_domain("gamma", gamma, "[0, 1]")
    kept = mask.astype(bool)
    step = jnp.maximum(jnp.cumsum(kept, axis=-1) - 1, 0)
    dtype = jnp.result_type(float)
    weights = jnp.power(jnp.asarray(gamma, dtype), step.astype(dtype))
    return jnp.where(kept, weights, 0.0)


def trajectory_return(
    rewards: jax.Array, mask: jax.Array, *, gamma: float = 1.0
) -> jax.Array:
    r"""Discounted return of a response, in the unit of the rewards.

    .. math:: R = \sum_h \gamma^h r_h

    Args:
        rewards: float[*batch, T], reward of each target; padding may hold anything.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch], a sum that is not divided by length; 0 where no entry is set.

    Gradient:
        Flows to set rewards, with weight gamma**h; exactly 0 elsewhere.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        PbKD, 2505.18952: trajectory reward. Deviation: none.
    """
    rewards = fill_masked(rewards.astype(accumulator(rewards)), mask)
    discounts = discount_weights(mask, gamma=gamma).astype(rewards.dtype)
    return sequence_sum(discounts * rewards, mask)


def reward_to_go(
    rewards: jax.Array, mask: jax.Array, *, gamma: float = 1.0
) -> jax.Array:
    r"""Discounted sum of the rewards from each step on.

    .. math:: G_t = r_t + \gamma G_{t+1}

    over set entries; an entry that is not set is skipped, without a discount.

    Args:
        rewards: float[*batch, T], reward of each target; padding may hold anything.
        mask: bool or 0/1 numbers, [*batch, T].
        gamma: in [0, 1].

    Returns:
        float32[*batch, T], unit of the rewards; 0 where the mask is not set. The first
        set entry equals `trajectory_return`.

    Gradient:
        Flows to set rewards only.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        Textbook. Deviation: none.
    """
    check_domain("gamma", gamma, "[0, 1]")
    chex.assert_equal_shape([rewards, mask])
    rewards = fill_masked(rewards.astype(accumulator(rewards)), mask)
    gamma = jnp.asarray(gamma, rewards.dtype)
    discounts = jnp.where(mask.astype(bool), gamma, jnp.ones_like(gamma))

    # Each step is the affine map G -> reward + discount * G; a scan composes them.
    def after(later, now):
        return later[0] * now[0], now[1] + now[0] * later[1]

    _, to_go = jax.lax.associative_scan(
        after, (discounts, rewards), reverse=True, axis=rewards.ndim - 1
    )
    return fill_masked(to_go, mask)


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
