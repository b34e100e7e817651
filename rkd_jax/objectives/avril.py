r"""AVRIL: imitation and a posterior of the reward behind it, from demonstrations alone.

.. math:: \mathcal L = \frac 1N \sum_{(s, a, s', a')} -\log B(a | s; Q_\theta)
    + D_{KL}\big(q_\phi(\cdot | s) \,\|\, \mathcal N(0, 1)\big)
    - \lambda \log q_\phi(\delta | s), \qquad
    \delta = Q_\theta(s, a) - \gamma\, Q_\theta(s', a')

No dynamics, no environment. Both networks descend the same loss; nothing is stopped and
there is no target network. For control problems and tables; language models have
`rkd_jax.objectives.ava`.

At the released code's weight, 1, the posterior of a state whose temporal differences
are small collapses (`rkd_jax.losses.variational`): watch ``student/log_std``, or use a
``td_weight`` below 1.

Source: Chan and van der Schaar, 2102.06483; the defaults are those of the released
code, XanderJC/scalable-birl.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rkd_jax.losses import avril
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.posterior import (
    AvrilTerms,
    DropLast,
    NextValue,
    StopGradient,
    Terminal,
)
from rkd_jax.masking import fill_masked, masked_sum
from rkd_jax.types import LossOutput, Mean, Objective, Params, TrajectoryBatch

QNetwork = Callable[[Params, jax.Array], jax.Array]
"""``(parameters, states [B, T, ...]) -> action values [B, T, A]``."""
Encoder = Callable[[Params, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]
"""``(parameters, states [B, T, ...], actions [B, T] | None) -> (mean, log_std)``."""
RewardInput = Literal["state", "state_action", "next_state"]


def make_avril(
    q_network: QNetwork,
    encoder: Encoder,
    *,
    gamma: float = 1.0,
    beta: float = 1.0,
    td_weight: float = 1.0,
    drop_last: DropLast = "all_terms",
    next_value: NextValue = "sampled",
    stop_gradient: StopGradient = "none",
    terminal: Terminal = "drop",
    prior_mean: float = 0.0,
    prior_std: float = 1.0,
    reward_input: RewardInput = "state",
) -> Objective:
    """AVRIL, per demonstrated action.

    Args:
        q_network: action values of states; the policy is ``softmax(beta Q)``.
        encoder: posterior of the reward. It gets actions for ``"state_action"`` and
            None otherwise. `rkd_jax.models.mlp.avril_networks` makes both as the
            released code has them.
        gamma, beta, drop_last, next_value, stop_gradient, terminal, prior_mean,
            prior_std: see `rkd_jax.losses.avril`.
        td_weight: at least 0, lambda. 0 is behavioural cloning beside a posterior that
            goes to the prior; above 1 the loss is unbounded below.
        reward_input: what the reward of a transition is a function of.

    Returns:
        `Objective` over a `TrajectoryBatch` without signal. Parameters are
        ``{"policy": ..., "encoder": ...}``. The sum of all terms is divided by the
        number of actions whose likelihood counts: with the default ``drop_last`` that
        makes every term a mean over the same transitions. Unit: nats. Metrics
        ``student/nll``, ``student/reward_kl``, ``student/td_log_likelihood``,
        ``student/td_error`` (absolute) and ``student/log_std``.

    Gradient:
        Flows to both networks, less what ``stop_gradient`` stops.

    Raises:
        ValueError: unknown switch; a number out of range; ``"next_state"`` with
            ``terminal="anchor"``, for the last action has no next state.

    References:
        Chan and van der Schaar, AVRIL, 2102.06483; code XanderJC/scalable-birl.
        Deviation: none at the defaults. For ``drop_last="irl_only"`` the terms are
        divided by the same number as well, which keeps their weights in the paper's
        sum.
    """
    check_domain("td_weight", td_weight, "[0, inf)")
    check_choice("reward_input", reward_input, get_args(RewardInput))
    if reward_input == "next_state" and terminal == "anchor":
        raise ValueError(
            'reward_input="next_state" has no state after the last action to read; '
            'use terminal="drop"'
        )

    def student_loss(params, critic, frozen, batch: TrajectoryBatch, signal, rng):
        del critic, frozen, signal, rng
        states = fill_masked(batch.states, batch.mask)
        actions = fill_masked(batch.actions, batch.mask)
        mean, log_std = _posterior(
            encoder, params["encoder"], states, actions, reward_input
        )
        terms = avril(
            q_network(params["policy"], states),
            actions,
            mean,
            log_std,
            batch.mask,
            gamma=gamma,
            beta=beta,
            drop_last=drop_last,
            next_value=next_value,
            stop_gradient=stop_gradient,
            terminal=terminal,
            prior_mean=prior_mean,
            prior_std=prior_std,
        )
        regularizer = terms.kl - td_weight * terms.td_log_likelihood
        total = masked_sum(terms.nll, terms.mask)
        total = total + masked_sum(regularizer, terms.transition_mask)
        weight = terms.mask.sum().astype(total.dtype)
        return LossOutput(total, weight, posterior_metrics(terms, log_std))

    return Objective("avril", student_loss)


def posterior_metrics(terms: AvrilTerms, log_std: jax.Array) -> dict[str, Mean]:
    """Means of the terms over their masks, of |delta| and of log_std."""

    def mean(values: jax.Array, mask: jax.Array) -> Mean:
        total = masked_sum(jax.lax.stop_gradient(values), mask)
        return Mean(total, mask.sum().astype(total.dtype))

    transitions = terms.transition_mask
    return {
        "student/nll": mean(terms.nll, terms.mask),
        "student/reward_kl": mean(terms.kl, transitions),
        "student/td_log_likelihood": mean(terms.td_log_likelihood, transitions),
        "student/td_error": mean(jnp.abs(terms.delta), transitions),
        "student/log_std": mean(log_std, transitions),
    }


def _posterior(
    encoder: Encoder, params: Params, states, actions, reward_input: RewardInput
) -> tuple[jax.Array, jax.Array]:
    """Mean and log_std of the reward of every transition, ``[B, T]`` each."""
    if reward_input == "next_state":
        # The last column wraps around; it has no transition, so nobody reads it.
        states = jnp.roll(states, -1, axis=1)
    return encoder(params, states, actions if reward_input == "state_action" else None)
