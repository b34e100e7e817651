r"""PbKD: the min-max game between a student and a reward player.

.. math:: \min_\theta \max_{r \in \mathcal R(D)} J(\pi_E, r) - J(\pi_\theta, r),
    \qquad \mathcal R(D) = \{r : \overline{\mathrm{NLL}}_r(D) \le
    \overline{\mathrm{NLL}}_{\hat r}(D) + \epsilon\}

The reward player looks, inside what the preferences allow, for the reward under which
the teacher beats the student most; the student closes that gap by policy gradient.
Both players minimise (`rkd_jax.losses.minmax`). One objective serves the offline and
the online method: online only means that the batch's preferences grow and that their
anchor is re-fitted between rounds, which is the experiment's business.

Source: PbKD, 2505.18952, for the game and the confidence set. The solver (dual ascent
on a Lagrangian, token reward, REINFORCE with a leave-one-out baseline) is a
reconstruction: the paper's practical algorithm, its constraint handling and its
hyper-parameters are not published in what we have.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from rkd_jax.losses import (
    bradley_terry,
    confidence_slack,
    dual_update,
    leave_one_out,
    leave_one_out_per_step,
    reinforce,
    reward_gap,
    reward_player_loss,
    reward_to_go,
    trajectory_return,
)
from rkd_jax.masking import sequence_mean, sequence_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.policy import target_log_probs
from rkd_jax.objectives.reward_model import TokenRewards, l2_penalty, pair_returns
from rkd_jax.types import (
    GameBatch,
    GameSignal,
    LossOutput,
    Mean,
    Objective,
    Sequences,
)

Baseline = Literal["loo_per_step", "loo_return", "none"]


def make_pbkd(
    model: CausalLM,
    token_rewards: TokenRewards,
    *,
    epsilon: float = 0.02,
    gamma: float = 1.0,
    temperature: float = 1.0,
    baseline: Baseline = "loo_per_step",
    discount_weighting: bool = False,
    constraint: Literal["dual", "fixed_lambda"] = "dual",
    hinge: bool = False,
    dual_step_size: float = 0.5,
    slack_clip: float = 10.0,
    l2: float = 0.0,
    sft_weight: float = 0.0,
) -> Objective:
    """The two players of PbKD and the step of the multiplier between them.

    Args:
        model: the student.
        token_rewards: the reward player, ``(params, sequences, features) -> [.., T]``.
        epsilon: radius of the confidence set, nats per pair above the anchor.
        gamma: discount in (0, 1].
        temperature: the policy is ``softmax(logits / temperature)``; the rollouts have
            to be sampled at it, without top-k or top-p, or the gradient is biased.
        baseline: other samples' return-to-go at the same step (default), their total
            return, or none. All unbiased; the first two need G >= 2.
        discount_weighting: weight step h by gamma**h, the exact gradient for gamma < 1.
        constraint: ``"dual"`` ascends the multiplier; ``"fixed_lambda"`` keeps the
            state's initial one.
        hinge: the reward player pays only outside the set; see `reward_player_loss`.
        dual_step_size, slack_clip: see `dual_update`.
        l2: weight of `l2_penalty` in the likelihood that defines the set, nats per
            pair. `GameSignal.anchor_nll` has to contain the anchor's own penalty.
        sft_weight: weight of the mean NLL of the teacher's responses in the student's
            loss, nats per token.

    Returns:
        `Objective` over a `GameBatch` that requires `GameSignal.anchor_nll`. Both
        losses are normalised by the number of prompts B. Metrics: ``critic/gap``,
        ``critic/nll``, ``critic/slack`` (against epsilon: positive is outside the
        set), ``critic/teacher_length``, ``critic/student_length`` (a reward player can
        win on length alone), ``student/return``, ``student/entropy_bound`` (mean NLL
        of the student's own samples, nats per token), ``student/sft`` if weighted.

    Gradient:
        ``student_loss`` reaches the student only, ``critic_loss`` the reward player
        only; the cross-gradients are exactly zero.

    Raises:
        ValueError: unknown baseline or constraint.

    References:
        PbKD, 2505.18952. Reconstruction: see the module's docstring.
    """
    policy_log_probs = partial(target_log_probs, model, temperature=temperature)
    if baseline not in ("loo_per_step", "loo_return", "none"):
        raise ValueError(f"baseline is loo_per_step, loo_return or none: {baseline!r}")
    if constraint not in ("dual", "fixed_lambda"):
        raise ValueError(f"constraint is dual or fixed_lambda: {constraint!r}")

    def critic_loss(critic, params, dual, frozen, batch, signal, rng):
        terms = _reward_player_terms(
            token_rewards, critic, batch, signal, gamma=gamma, epsilon=epsilon, l2=l2
        )
        loss = reward_player_loss(
            terms["critic/gap"], terms["critic/slack"], dual, hinge=hinge
        )
        return _per_prompt(loss, terms, batch)

    def student_loss(params, critic, frozen, batch, signal, rng):
        rewards = jax.lax.stop_gradient(
            token_rewards(critic, batch.rollouts, signal.rollouts)
        )
        mask = batch.rollouts.response_mask
        log_probs = policy_log_probs(params, batch.rollouts)
        steps = reinforce(
            log_probs,
            _advantages(rewards, mask, gamma, baseline),
            mask,
            gamma=gamma if discount_weighting else 1.0,
        )
        loss = sequence_sum(steps, mask).mean()
        metrics = {
            "student/return": trajectory_return(rewards, mask, gamma=gamma).mean(),
            "student/entropy_bound": sequence_mean(-log_probs, mask).mean(),
        }
        if sft_weight:
            taught = batch.demonstrations.sequences
            nll = -target_log_probs(model, params, taught)
            metrics["student/sft"] = sequence_mean(nll, taught.response_mask).mean()
            loss = loss + sft_weight * metrics["student/sft"]
        return _per_prompt(loss, metrics, batch)

    def dual_step(dual, metrics):
        return dual_update(
            dual,
            metrics["critic/slack"],
            epsilon=epsilon,
            step_size=dual_step_size,
            clip=slack_clip,
        )

    return Objective(
        "pbkd",
        student_loss,
        critic_loss,
        dual_step if constraint == "dual" else None,
        requires=("anchor_nll",),
    )


def _reward_player_terms(
    token_rewards: TokenRewards,
    critic,
    batch: GameBatch,
    signal: GameSignal,
    *,
    gamma: float,
    epsilon: float,
    l2: float,
) -> dict[str, jax.Array]:
    """Gap, slack and what to watch beside them, means over the batch."""
    teacher, student = batch.demonstrations.sequences, batch.rollouts

    def returns(sequences: Sequences, features):
        rewards = token_rewards(critic, sequences, features)
        return trajectory_return(rewards, sequences.response_mask, gamma=gamma)

    gap = reward_gap(
        returns(teacher, signal.demonstrations).mean(),
        returns(student, signal.rollouts).mean(),
    )
    pairs = batch.preferences
    nll = bradley_terry(
        pair_returns(token_rewards, critic, pairs.sequences, signal.preferences, gamma),
        label=pairs.label,
    )
    penalised = nll + l2 * l2_penalty(critic) if l2 else nll
    slack = confidence_slack(penalised, signal.anchor_nll, epsilon=epsilon).mean()
    return {
        "critic/gap": gap,
        "critic/nll": nll.mean(),
        "critic/slack": slack,
        "critic/teacher_length": _mean_length(teacher, gap.dtype),
        "critic/student_length": _mean_length(student, gap.dtype),
    }


def _advantages(rewards, mask, gamma: float, baseline: Baseline) -> jax.Array:
    """Return-to-go minus the baseline, ``[B, G, T]``."""
    to_go = reward_to_go(rewards, mask, gamma=gamma)
    if baseline == "none":
        return to_go
    if baseline == "loo_per_step":
        return leave_one_out_per_step(to_go, mask)
    # The other samples' return, recovered from R - leave_one_out(R).
    returns = trajectory_return(rewards, mask, gamma=gamma)
    others = returns - leave_one_out(returns)
    return to_go - jnp.expand_dims(others, -1)


def _per_prompt(loss: jax.Array, metrics, batch: GameBatch) -> LossOutput:
    """Means over the batch as sums over its prompts, so micro-batches add up."""
    rows = jnp.asarray(batch.rollouts.tokens.shape[0], loss.dtype)
    means = {name: Mean(value * rows, rows) for name, value in metrics.items()}
    return LossOutput(loss * rows, rows, means)


def _mean_length(sequences: Sequences, dtype) -> jax.Array:
    """Mean number of targets per sequence."""
    return sequences.response_mask.sum(axis=-1).astype(dtype).mean()
