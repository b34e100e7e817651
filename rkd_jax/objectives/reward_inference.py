r"""The reward behind fixed responses, inferred beside a distillation loss.

.. math:: \mathcal R_X = \operatorname*{mean}_t\;
    D_{KL}\big(q_\phi(\cdot|s_{t+1}) \,\|\, p\big)
    - \lambda\log q_\phi(\delta_t|s_{t+1}), \qquad
    \delta_t = Q_\theta(s_t, y_t) - \gamma\,Q_\theta(s_{t+1}, y_{t+1})

What X-KD (`rkd_jax.objectives.xkd`) adds to its parents. Parameters are ``{"policy":
..., "reward_head": ...}``, and ``"q_head"`` where Q is a head.

Source: X-KD, 2602.12674. Reconstruction: no equation is published in what we have.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rkd_jax.losses import experiential_regularizer
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.posterior import NextValue, StopGradient, Terminal
from rkd_jax.losses.variational import RegularizerTerms
from rkd_jax.masking import fill_masked, masked_sum, sequence_mean
from rkd_jax.objectives.ava import ActionValues, RewardHead, RewardWeights
from rkd_jax.objectives.policy import Reading
from rkd_jax.types import Mean, Params

QSource = Literal["log_probs", "raw_logits", "q_head"]


@dataclasses.dataclass(frozen=True)
class RewardInference:
    """The heads and the options of the regulariser.

    Example: ``RewardInference(GaussianHead().apply, td_weight=0.1)``.

    Raises:
        ValueError: an option out of its domain, or a q_head without
            ``q_source="q_head"`` or the reverse.

    References:
        X-KD, 2602.12674: reconstruction, and all defaults are ours. The reward weights
        are AVA's (2411.09341): they multiply what both heads say at a target.
    """

    reward_head: RewardHead  # reads the state after each target
    q_source: QSource = "log_probs"  # what the temporal differences are of
    q_head: ActionValues | None = None  # reads the state before each target
    gamma: float = 1.0  # discount of the next value
    td_weight: float = 0.1  # lambda; from 1 on the posterior may collapse
    next_value: NextValue = "sampled"  # or expected: over the teacher's distribution
    stop_gradient: StopGradient = "none"  # see `experiential_regularizer`
    terminal: Terminal = "drop"  # or anchor: Q is 0 after the last target
    prior_mean: float = 0.0
    prior_std: float = 1.0
    reward_weights: RewardWeights | None = None  # None weighs every target 1

    def __post_init__(self) -> None:
        check_choice("q_source", self.q_source, get_args(QSource))
        check_choice("next_value", self.next_value, get_args(NextValue))
        check_choice("stop_gradient", self.stop_gradient, get_args(StopGradient))
        check_choice("terminal", self.terminal, get_args(Terminal))
        check_domain("gamma", self.gamma, "[0, 1]")
        check_domain("td_weight", self.td_weight, "[0, inf)")
        check_domain("prior_std", self.prior_std, "(0, inf)")
        if (self.q_source == "q_head") != (self.q_head is not None):
            raise ValueError(
                f"q_source={self.q_source!r} and q_head={self.q_head!r} disagree: a "
                'head is given exactly when q_source is "q_head"'
            )


def reward_regularizer(
    inference: RewardInference,
    params: Params,
    seen: Reading,
    teacher_log_probs: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Mean]]:
    """The regulariser of every response, and what to watch of it.

    Args:
        inference: heads and options.
        params: of policy and heads; gradient flows to all of them.
        seen: the policy along the responses, [B].
        teacher_log_probs: float[B, T, V], data; read for expected next values only.

    Returns:
        float32[B], nats per transition, 0 for a response without one; and the metrics
        ``student/reward_kl``, ``student/td_log_likelihood``, ``student/td_error``
        (absolute), ``student/log_std`` and, where more is read of Q than the log-probs
        of targets, ``student/lse_q`` (log-sum-exp of Q, which drifts where Q has a
        gauge), the last two also with ``.._variance``: that within a response.

    References:
        X-KD, 2602.12674: reconstruction, see the module's docstring.
    """
    mask = seen.sequences.response_mask
    q_values, actions = _action_values(inference, params, seen)
    mean, log_std = inference.reward_head(params["reward_head"], seen.states.after)
    if inference.reward_weights is not None:
        weights = inference.reward_weights(params["policy"], seen.sequences)
        weights = fill_masked(weights, mask).astype(q_values.dtype)
        q_values = q_values * jnp.expand_dims(weights, -1)
        mean, log_std = weights * mean, weights * log_std
    terms = experiential_regularizer(
        q_values,
        actions,
        mean,
        log_std,
        mask,
        gamma=inference.gamma,
        td_weight=inference.td_weight,
        next_value=inference.next_value,
        teacher_log_probs=teacher_log_probs,
        stop_gradient=inference.stop_gradient,
        terminal=inference.terminal,
        prior_mean=inference.prior_mean,
        prior_std=inference.prior_std,
    )
    metrics = _averages(terms) | _moments("student/log_std", log_std, terms.mask)
    if q_values.shape[-1] > 1:
        lse_q = jax.nn.logsumexp(fill_masked(q_values, mask), axis=-1)
        metrics |= _moments("student/lse_q", lse_q, mask)
    return sequence_mean(terms.loss, terms.mask), metrics


def _action_values(
    inference: RewardInference, params: Params, seen: Reading
) -> tuple[jax.Array, jax.Array]:
    """Q of the state before every target, ``[B, T, V]``, and the actions in it.

    Where nothing but the targets' log-probs is read, these are the only column.
    """
    targets = seen.sequences.targets
    if inference.q_source == "q_head":
        return inference.q_head(params["q_head"], seen.states.before), targets
    if inference.q_source == "raw_logits":
        return seen.logits, targets
    if inference.next_value == "expected":
        return jax.nn.log_softmax(seen.logits, axis=-1), targets
    return jnp.expand_dims(seen.log_probs, -1), jnp.zeros_like(targets)


def _averages(terms: RegularizerTerms) -> dict[str, Mean]:
    """Means over transitions."""

    def average(values: jax.Array) -> Mean:
        return Mean(masked_sum(values, terms.mask), _count(terms.mask, values))

    return {
        "student/reward_kl": average(terms.kl),
        "student/td_log_likelihood": average(terms.td_log_likelihood),
        "student/td_error": average(jnp.abs(terms.delta)),
    }


def _moments(name: str, values: jax.Array, mask: jax.Array) -> dict[str, Mean]:
    """Mean, and the variance within a response, which adds up over micro-batches."""
    mean = jnp.expand_dims(sequence_mean(values, mask), -1)
    spread = sequence_mean(jnp.square(fill_masked(values, mask) - mean), mask)
    rows = mask.any(axis=-1)
    return {
        name: Mean(masked_sum(values, mask), _count(mask, spread)),
        f"{name}_variance": Mean(masked_sum(spread, rows), _count(rows, spread)),
    }


def _count(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Number of set entries, in the dtype of ``like``."""
    return mask.sum().astype(like.dtype)
