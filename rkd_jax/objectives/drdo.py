r"""DRDO: an oracle's reward differences and the preferences, learnt in one go.

The oracle is a language model with a reward head that keeps its language-model head:

.. math:: -\log\sigma\big(r_\psi(x, y_w) - r_\psi(x, y_l)\big)
    - \alpha_o \tfrac{1}{|y_w|}\log\pi_\psi(y_w | x)

Frozen, it says two numbers per pair, which are cached in
`rkd_jax.types.PreferenceBatch.rewards`. The student is trained on

.. math:: \big(\Delta r^* - \Delta\hat r\big)^2
    - \alpha (1 - p_w)^\gamma \big[z_w + \log(1 - e^{z_l})\big]

(`rkd_jax.losses.drdo`) without any reference model, and deployed without its reward
head.

Source: DRDO, 2410.08458. Reconstruction: the second term of Eq. (7) and the weight of
the oracle's second term are known to us from descriptions only.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol, get_args

import jax
import jax.numpy as jnp

from rkd_jax.losses import bradley_terry, drdo
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.reward_distillation import DrdoTerms, PreferenceTerm
from rkd_jax.masking import fill_masked, masked_sum, sequence_mean
from rkd_jax.models.api import CausalLM, response_states
from rkd_jax.objectives.per_pair import per_pair, real_pairs_of
from rkd_jax.objectives.policy import LATER, log_probs_of_states, members
from rkd_jax.packed import (
    PackedPreferenceBatch,
    Pairs,
    last_targets,
    pair_means,
    pair_sums,
    target_segments,
)
from rkd_jax.types import LossOutput, Mean, Objective, Pair, Params

RewardSource = Literal["head", "implicit"]


class StateReward(Protocol):
    """A reward read off a state, such as `rkd_jax.models.heads.ScalarHead`."""

    def apply(self, params: Params, hidden: jax.Array) -> jax.Array:
        """``[..., D] -> [...]``."""


class TrunkAndHead(Protocol):
    """A language model with a reward head: `rkd_jax.models.heads.RewardModel`."""

    trunk: CausalLM
    head: StateReward


def make_drdo(
    model: CausalLM,
    reward_head: StateReward | None = None,
    *,
    alpha: float = 0.1,
    gamma: float = 2.0,
    reward_source: RewardSource = "head",
    beta: float = 0.1,
    preference_term: PreferenceTerm = "unlikelihood",
    focal_grad: bool = True,
    length_norm: bool = True,
    oracle_scale: float = 1.0,
    temperature: float = 1.0,
) -> Objective:
    """The student of DRDO, per pair; soft labels mix the two orders.

    Args:
        model: the student. Its parameters are ``{"policy": ..., "reward_head": ...}``,
            without the second where the reward is implicit; deploy ``"policy"``.
        reward_head: read at the last target of each response.
        alpha, gamma, preference_term, focal_grad: see `rkd_jax.losses.drdo`.
        reward_source: ``"head"``, or ``"implicit"``: beta times the response's
            log-prob, so that the policy itself is regressed.
        beta: positive; the implicit reward's factor.
        length_norm: log-probs are means over the response; False sums them.
        oracle_scale: the cached rewards are divided by it;
            `rkd_jax.losses.reward_scale` of the training set makes the root mean square
            of their differences 1.
        temperature: the policy is ``softmax(logits / temperature)``.

    Returns:
        `Objective` over pairs, packed or not, whose ``rewards`` are the oracle's; it
        needs no signal. A missing reward (NaN) makes the loss NaN, so that the update
        refuses the step: run `rkd_jax.losses.check_rewards` over the data set first.
        Metrics ``student/distillation``, ``student/preference``,
        ``student/reward_gap`` and ``student/oracle_gap`` (chosen minus rejected),
        ``student/accuracy`` (of the log-probs), ``student/chosen_log_prob`` and
        ``student/rejected_log_prob``.

    Gradient:
        Flows to the student only. The regression reaches the trunk through the head,
        but never the vocabulary head of an untied model; the preference term reaches
        the policy and never the reward head.

    Raises:
        ValueError: a reward source without its head or the reverse, an unknown option,
            or a number out of range.

    References:
        DRDO, 2410.08458, Eq. (7). Reconstruction: see `rkd_jax.losses.drdo`; beyond it,
        beta, the scale of the oracle, the temperature and soft labels are ours.
    """
    check_choice("reward_source", reward_source, get_args(RewardSource))
    if (reward_source == "head") != (reward_head is not None):
        raise ValueError(
            f"reward_source={reward_source!r} with reward_head={reward_head}: 'head' "
            "needs one, 'implicit' has none"
        )
    check_choice("preference_term", preference_term, get_args(PreferenceTerm))
    check_domain("alpha", alpha, "[0, inf)")
    check_domain("gamma", gamma, "[0, inf)")
    check_domain("beta", beta, "(0, inf)")
    oracle_scale = float(oracle_scale)
    check_domain("oracle_scale", oracle_scale, "(0, inf)")
    reduce = pair_means if length_norm else pair_sums

    def terms(student: Pair, rewards: Pair, oracle: Pair) -> DrdoTerms:
        return drdo(
            student,
            rewards,
            oracle,
            alpha=alpha,
            gamma=gamma,
            preference_term=preference_term,
            focal_grad=focal_grad,
        )

    def student_loss(params, critic, frozen, batch: Pairs, signal, rng):
        del critic, frozen, signal, rng
        sequences, valid = batch.sequences, real_pairs_of(batch)
        states = response_states(model, params["policy"], sequences)
        log_probs = log_probs_of_states(
            model,
            params["policy"],
            states.before,
            sequences,
            temperature=temperature,
            tiles=LATER,
        )
        student = members(reduce(log_probs, batch))
        if reward_source == "head":
            rewards = _rewards(reward_head, params["reward_head"], states.after, batch)
        else:
            rewards = Pair(*(beta * log_prob for log_prob in student))

        oracle = members(fill_masked(batch.rewards, valid) / oracle_scale)
        label = fill_masked(batch.label, valid)
        keep = terms(student, rewards, oracle)
        swap = terms(*(Pair(*pair[::-1]) for pair in (student, rewards, oracle)))
        preference = label * keep.preference + (1.0 - label) * swap.preference
        return per_pair(
            keep.distillation + preference,
            valid,
            distillation=keep.distillation,
            preference=preference,
            **_watched(student, rewards, oracle),
        )

    return Objective("drdo", student_loss, packed=True)


def make_drdo_oracle(reward_model: TrunkAndHead, *, alpha: float = 0.01) -> Objective:
    """The oracle of DRDO: Bradley-Terry, and a language model of the chosen response.

    Args:
        reward_model: trunk and head; parameters ``{"trunk": ..., "head": ...}``. Start
            the trunk from a fine-tuned model. Its rewards for the student's batches are
            `rkd_jax.models.heads.RewardModel.sequence_rewards`, summed over targets.
        alpha: at least 0, weight of the chosen response's mean negative log-likelihood
            per token; 0 is a Bradley-Terry reward model.

    Returns:
        `Objective` over pairs, packed or not, without signal. Unit: nats per pair.
        The label weighs the ranking; what is modelled is always member 0. Metrics
        ``reward_model/nll``, ``reward_model/accuracy`` (ties count half) and
        ``reward_model/language_nll`` (nats per token) if weighted.

    Gradient:
        Flows to trunk and head; through the second term to the vocabulary head.

    Raises:
        ValueError: alpha out of range.

    References:
        DRDO, 2410.08458, Eq. (6). Reconstruction: the weight alpha and its value are
        open.
    """
    check_domain("alpha", alpha, "[0, inf)")
    trunk, head = reward_model.trunk, reward_model.head

    def student_loss(params, critic, frozen, batch: Pairs, signal, rng):
        del critic, frozen, signal, rng
        valid = real_pairs_of(batch)
        states = response_states(trunk, params["trunk"], batch.sequences)
        rewards = _rewards(head, params["head"], states.after, batch)
        nll = bradley_terry(rewards, label=fill_masked(batch.label, valid))
        weight = valid.sum().astype(nll.dtype)
        total = masked_sum(nll, valid)
        hit = 0.5 * (1.0 + jnp.sign(rewards.chosen - rewards.rejected))
        metrics = {
            "reward_model/nll": Mean(total, weight),
            "reward_model/accuracy": Mean(masked_sum(hit, valid), weight),
        }
        if alpha:
            log_probs = _chosen_log_prob(trunk, params["trunk"], states.before, batch)
            language = masked_sum(-log_probs, valid)
            metrics["reward_model/language_nll"] = Mean(language, weight)
            total = total + alpha * language
        return LossOutput(total, weight, metrics)

    return Objective("drdo_oracle", student_loss, packed=True)


def _rewards(head: StateReward, params: Params, after: jax.Array, pairs: Pairs) -> Pair:
    """Of both responses, read at their last targets."""
    last = last_targets(pairs.sequences)
    return members(pair_sums(fill_masked(head.apply(params, after), last), pairs))


def _chosen_log_prob(
    model: CausalLM, params: Params, before: jax.Array, pairs: Pairs
) -> jax.Array:
    """Mean log-prob of the tokens of the chosen responses, ``[pairs]``."""
    sequences = pairs.sequences
    if not isinstance(pairs, PackedPreferenceBatch):
        chosen = jax.tree.map(lambda x: x[:, 0], sequences)
        log_probs = log_probs_of_states(
            model, params, before[:, 0], chosen, tiles=LATER
        )
        return sequence_mean(log_probs, chosen.response_mask)
    # Chosen responses are the odd segments; the mean of others is not looked at.
    mask = sequences.response_mask & (target_segments(sequences) % 2 == 1)
    chosen = dataclasses.replace(sequences, response_mask=mask)
    log_probs = log_probs_of_states(model, params, before, chosen, tiles=LATER)
    return pair_means(log_probs, pairs)[..., 0]


def _watched(student: Pair, rewards: Pair, oracle: Pair) -> dict[str, jax.Array]:
    """What to watch beside the loss, per pair."""
    better = student.chosen > student.rejected
    return {
        "reward_gap": rewards.chosen - rewards.rejected,
        "oracle_gap": oracle.chosen - oracle.rejected,
        "accuracy": better.astype(student.chosen.dtype),
        "chosen_log_prob": student.chosen,
        "rejected_log_prob": student.rejected,
    }
