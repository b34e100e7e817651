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

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rkd_jax.losses import (
    confidence_slack,
    dual_update,
    reinforce,
    reward_gap,
    reward_player_loss,
    reward_to_go,
    trajectory_return,
)
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.masking import masked_sum, sequence_mean, sequence_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.game import (
    LESS_BASELINE,
    Baseline,
    length,
    prompt_mean,
    sft_nll,
    value_of,
    weighted,
)
from rkd_jax.objectives.per_pair import real_pairs_of
from rkd_jax.objectives.policy import target_log_probs
from rkd_jax.objectives.reward_model import (
    TokenRewards,
    batch_returns,
    l2_penalty,
    pair_losses,
)
from rkd_jax.packed import refuse_packed
from rkd_jax.types import GameBatch, GameSignal, Mean, Objective, Params, Sequences

Constraint = Literal["dual", "fixed_lambda"]
DualScale = Literal["relative", "raw"]


def make_pbkd(
    model: CausalLM,
    token_rewards: TokenRewards,
    *,
    epsilon: float = 0.02,
    gamma: float = 1.0,
    temperature: float = 1.0,
    baseline: Baseline = "loo_per_step",
    discount_weighting: bool = False,
    constraint: Constraint = "dual",
    hinge: bool = False,
    dual_scale: DualScale = "relative",
    dual_step_size: float = 0.5,
    slack_clip: float = 10.0,
    l2: float = 0.0,
    sft_weight: float = 0.0,
) -> Objective:
    """The two players of PbKD and the step of the multiplier between them.

    Args:
        model: the student.
        token_rewards: the reward player, ``(params, sequences, features) -> [.., T]``.
            A reward for every target: ``RewardModel.token_rewards``, or
            `rkd_jax.models.heads.head_token_rewards` on frozen features. One reward for
            the response, credited to its last target: ``RewardModel.sequence_rewards``,
            or `rkd_jax.models.heads.head_sequence_rewards`.
        epsilon: radius of the confidence set, nats per pair above the anchor.
        gamma: discount in (0, 1].
        temperature: the policy is ``softmax(logits / temperature)``; the rollouts have
            to be sampled at it, without top-k or top-p, or the gradient is biased.
        baseline: other samples' return-to-go at the same step (default), their total
            return, or none. All unbiased; the first two need G >= 2.
        discount_weighting: weight step h by gamma**h, the exact gradient for gamma < 1.
        constraint: ``"dual"`` ascends the multiplier from the state's initial one;
            ``"fixed_lambda"`` keeps that.
        hinge: the reward player pays only outside the set; see `reward_player_loss`.
            Decided on the mean of each micro-batch.
        dual_scale: the multiplier climbs on slack / epsilon, or on the ``"raw"`` slack.
            A trap, kept to be shown: raw slacks are so small that thousands of steps
            do not find the multiplier, and meanwhile the reward leaves the set.
        dual_step_size, slack_clip: see `dual_update`; the clip is on the scaled slack.
        l2: weight of `l2_penalty` in the likelihood that defines the set, nats per
            pair. `GameSignal.anchor_nll` has to contain the anchor's own penalty.
        sft_weight: weight of the mean NLL of the teacher's responses in the student's
            loss, nats per token, under the policy at its temperature.

    Returns:
        `Objective` over a `GameBatch` that requires `GameSignal.anchor_nll`. Its pairs
        may be packed, its prompts not. Both losses are normalised by the number of
        prompts that are not padding; that is exact over micro-batches with any number
        of pairs and at least one such prompt. Metrics:
        ``critic/gap``, ``critic/nll``, ``critic/slack`` (against epsilon: positive is
        outside the set), ``critic/teacher_length``, ``critic/student_length`` (a reward
        player can win on length alone), ``student/return``, ``student/entropy_bound``
        (mean NLL of the student's own samples, nats per token), ``student/sft`` if
        weighted.

    Gradient:
        ``student_loss`` reaches the student only, ``critic_loss`` the reward player
        only; the cross-gradients are exactly zero.

    Raises:
        ValueError: unknown baseline, constraint or dual scale, or a number out of its
            range; when traced, packed demonstrations or rollouts.

    References:
        PbKD, 2505.18952. Reconstruction: see the module's docstring.
    """
    for name, choice, choices in (
        ("baseline", baseline, LESS_BASELINE),
        ("constraint", constraint, get_args(Constraint)),
        ("dual_scale", dual_scale, get_args(DualScale)),
    ):
        check_choice(name, choice, tuple(choices))
    for name, number, interval in (
        ("epsilon", epsilon, "(0, inf)"),
        ("gamma", gamma, "(0, 1]"),
        ("temperature", temperature, "(0, inf)"),
        ("dual_step_size", dual_step_size, "(0, inf)"),
        ("slack_clip", slack_clip, "(0, inf]"),
        ("l2", l2, "[0, inf)"),
        ("sft_weight", sft_weight, "[0, inf)"),
    ):
        check_domain(name, number, interval)

    def critic_loss(critic, params, dual, frozen, batch, signal, rng):
        del params, frozen, rng
        _refuse_packed_prompts(batch)
        gap = _imitation_gap(token_rewards, critic, batch, signal, gamma)
        preferences = _preference_terms(
            token_rewards, critic, batch, signal, gamma=gamma, epsilon=epsilon, l2=l2
        )
        slack = _mean_slack(preferences["critic/slack"], gap.weight, signal)
        loss = reward_player_loss(value_of(gap), slack, dual, hinge=hinge)
        lengths = {
            "critic/teacher_length": length(batch.demonstrations.sequences),
            "critic/student_length": length(batch.rollouts),
        }
        return weighted(loss, gap.weight, {"critic/gap": gap} | preferences | lengths)

    def student_loss(params, critic, frozen, batch, signal, rng):
        del frozen, rng
        _refuse_packed_prompts(batch)
        mask = batch.rollouts.response_mask
        rewards = jax.lax.stop_gradient(
            token_rewards(critic, batch.rollouts, signal.rollouts)
        )
        returns = trajectory_return(rewards, mask, gamma=gamma)
        to_go = reward_to_go(rewards, mask, gamma=gamma)
        advantages = LESS_BASELINE[baseline](to_go, returns, mask)
        log_probs = target_log_probs(
            model,
            params,
            batch.rollouts,
            temperature=temperature,
            weights=advantages,
        )
        steps = reinforce(
            log_probs,
            advantages,
            mask,
            gamma=gamma if discount_weighting else 1.0,
        )
        surrogate = prompt_mean(sequence_sum(steps, mask), mask)
        loss = value_of(surrogate)
        metrics = {
            "student/return": prompt_mean(returns, mask),
            "student/entropy_bound": prompt_mean(sequence_mean(-log_probs, mask), mask),
        }
        if sft_weight:
            metrics["student/sft"] = sft_nll(
                model, params, batch.demonstrations, temperature=temperature
            )
            loss = loss + sft_weight * value_of(metrics["student/sft"])
        return weighted(loss, surrogate.weight, metrics)

    def dual_step(dual, metrics):
        return dual_update(
            dual,
            metrics["critic/slack"],
            epsilon=epsilon if dual_scale == "relative" else 1.0,
            step_size=dual_step_size,
            clip=slack_clip,
        )

    return Objective(
        "pbkd",
        student_loss,
        critic_loss,
        dual_step if constraint == "dual" else None,
        requires=("anchor_nll",),
        packed=True,
        whole_signal=_count_pairs,
    )


def _refuse_packed_prompts(batch: GameBatch) -> None:
    """A row of these is a prompt; pairs alone may share one."""
    for name, sequences in (
        ("demonstrations", batch.demonstrations.sequences),
        ("rollouts", batch.rollouts),
    ):
        refuse_packed(sequences, f"the {name} of pbkd")


def _count_pairs(batch: GameBatch, signal: GameSignal) -> GameSignal:
    """What the micro-batches of a game need to know of the whole: pairs per prompt."""
    mask = batch.demonstrations.sequences.response_mask
    wide = jnp.result_type(float)
    prompts = mask.any(axis=-1).sum().astype(wide)
    pairs = real_pairs_of(batch.preferences).sum().astype(wide)
    rate = jnp.broadcast_to(pairs / jnp.maximum(prompts, 1.0), mask.shape[:1])
    return dataclasses.replace(signal, pairs_per_prompt=rate)


def _mean_slack(slack: Mean, prompts: jax.Array, signal: GameSignal) -> jax.Array:
    """The slack that stands beside a gap which is a mean over ``prompts``.

    Micro-batches of packed rows differ in pairs. What each adds to the slack of them
    all is its sum over its share of the pairs, not its own mean.
    """
    if signal.pairs_per_prompt is None:
        return value_of(slack)
    share = prompts * signal.pairs_per_prompt[0].astype(prompts.dtype)
    return slack.total / jnp.where(share > 0, share, 1.0)


def _imitation_gap(
    token_rewards: TokenRewards,
    critic: Params,
    batch: GameBatch,
    signal: GameSignal,
    gamma: float,
) -> Mean:
    """By how much the teacher beats the student on average, counted in prompts."""

    def mean_return(sequences: Sequences, features: jax.Array | None) -> Mean:
        mask = sequences.response_mask
        rewards = token_rewards(critic, sequences, features)
        return prompt_mean(trajectory_return(rewards, mask, gamma=gamma), mask)

    teacher = mean_return(batch.demonstrations.sequences, signal.demonstrations)
    student = mean_return(batch.rollouts, signal.rollouts)
    gap = reward_gap(value_of(teacher), value_of(student))
    return Mean(gap * student.weight, student.weight)


def _preference_terms(
    token_rewards: TokenRewards,
    critic: Params,
    batch: GameBatch,
    signal: GameSignal,
    *,
    gamma: float,
    epsilon: float,
    l2: float,
) -> dict[str, Mean]:
    """What the pairs say about a reward; pairs without any token do not count."""
    pairs = batch.preferences
    returns = batch_returns(token_rewards, critic, pairs, signal.preferences, gamma)
    nll, real = pair_losses(returns, pairs)
    penalised = nll + l2 * l2_penalty(critic) if l2 else nll
    slack = confidence_slack(penalised, signal.anchor_nll, epsilon=epsilon)
    count = real.sum().astype(nll.dtype)
    terms = {"critic/nll": nll, "critic/slack": slack}
    return {name: Mean(masked_sum(x, real), count) for name, x in terms.items()}
