r"""AVA: a language model and a dense reward, inferred from responses or preferences.

.. math:: \mathcal L_d =
    \operatorname*{mean}_t \big[-\beta\log\pi_\theta(y_t | s_t)\big]
    + \operatorname*{mean}_t \big[D_{KL}(q_\phi \| \mathcal N(0, 1))
    - \lambda\log q_\phi(\delta_t)\big]

on demonstrations; on preferences the rejected response adds its log-likelihood, both
responses their bracket, and :math:`-\sigma(\mu^+ - \mu^-)` of the last rewards ranks
them (`rkd_jax.losses.ava`). Trunk, policy and heads take one step together: parameters
are ``{"policy": ..., "reward_head": ...}``, with ``"q_head"`` where Q is a head.

Two uses. To align a model directly, train it and deploy ``params["policy"]``; with
``q_source="q_head"`` its vocabulary head learns nothing, so that is for the other use:
keep the posterior, whose mean is a reward for every token (`ava_token_rewards`).

Source: AVA, 2411.09341. Its coefficients and learning rates are not published in what
we have: every default of a number is a choice of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rkd_jax.losses import ava_demonstration, ava_preference
from rkd_jax.losses.ava import QSource, RejectTerm
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.posterior import DropLast
from rkd_jax.masking import fill_masked, masked_sum, sequence_mean, sequence_sum
from rkd_jax.models.api import (
    CausalLM,
    action_hidden,
    response_hidden,
    response_states,
)
from rkd_jax.objectives.avril import posterior_metrics
from rkd_jax.objectives.per_pair import real_pairs
from rkd_jax.objectives.policy import LATER, log_probs_of_states
from rkd_jax.objectives.reward_model import TokenRewards
from rkd_jax.types import (
    DemonstrationBatch,
    LossOutput,
    Mean,
    Objective,
    Params,
    PreferenceBatch,
    Sequences,
)

RewardHead = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]
"""``(parameters, states [.., D]) -> (mean, log_std)``; a `GaussianHead`'s ``apply``."""
ActionValues = Callable[[Params, jax.Array], jax.Array]
"""``(parameters, states [.., D]) -> [.., V]``; a `QHead`'s ``apply``."""
RewardWeights = Callable[[Params, Sequences], jax.Array]
"""``(policy parameters, sequences [*batch]) -> [*batch, T]``, positive."""

Normalise = Literal["mean", "sum"]
RewardInput = Literal["h_action", "state"]


def make_ava_d(
    model: CausalLM,
    reward_head: RewardHead,
    *,
    q_head: ActionValues | None = None,
    q_source: QSource = "log_probs",
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    td_weight: float = 0.1,
    irl_weight: float = 1.0,
    drop_last: DropLast = "irl_only",
    normalise: Normalise = "mean",
    reward_input: RewardInput = "h_action",
    reward_weights: RewardWeights | None = None,
    temperature: float = 1.0,
) -> Objective:
    """AVA from demonstrations, per response.

    Args:
        model: the student, ``params["policy"]``.
        reward_head: posterior of a token's reward, e.g. ``GaussianHead().apply``: its
            default bound keeps the standard deviation from collapsing.
        q_head: action values, for ``q_source="q_head"`` and only then.
        q_source, alpha, beta, gamma, drop_last: see `rkd_jax.losses.ava_demonstration`.
        td_weight: at least 0, lambda.
        irl_weight: at least 0, weight of divergence and temporal difference together; 0
            leaves the likelihood.
        normalise: ``"mean"``: each term is a mean over its own positions of a response;
            ``"sum"``: a sum, as the paper writes it.
        reward_input: the reward of token t reads the state after it (``"h_action"``) or
            before it (``"state"``), which has not seen the token.
        reward_weights: weight of every token, e.g.
            `rkd_jax.models.attention_weights.response_attention`; None is 1 everywhere.
        temperature: the policy is ``softmax(logits / temperature)``, and Q is of the
            same logits; a ``q_head``'s values are not divided.

    Returns:
        `Objective` over a `DemonstrationBatch` without signal, normalised by the number
        of responses. Unit: nats. Metrics as `rkd_jax.objectives.avril.make_avril`, and
        with weights ``student/last_weight``, that of the last token.

    Gradient:
        Flows to all parameters.

    Raises:
        ValueError: unknown switch, a number out of range, q_head without
            ``q_source="q_head"`` or the reverse.

    References:
        AVA, 2411.09341, F_d. Reconstruction: the state that the reward head reads.
        Deviations: the default policy term, the trained EOS and the mean, see
        `rkd_jax.losses.ava_demonstration`.
    """
    check_domain("td_weight", td_weight, "[0, inf)")
    check_domain("irl_weight", irl_weight, "[0, inf)")
    q_source = _source(q_source, q_head, reward_weights)
    read = _reader(
        model,
        reward_head,
        q_head,
        q_source,
        alpha,
        reward_input,
        reward_weights,
        temperature,
    )
    reduce = _reduction(normalise)

    def student_loss(params, critic, frozen, batch: DemonstrationBatch, signal, rng):
        del critic, frozen, signal, rng
        sequences = batch.sequences
        seen = read(params, sequences)
        terms = ava_demonstration(
            seen.outputs,
            sequences.targets,
            seen.mean,
            seen.log_std,
            sequences.response_mask,
            q_source=q_source,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            drop_last=drop_last,
            reward_weights=seen.weights,
        )
        regularizer = terms.kl - td_weight * terms.td_log_likelihood
        rows = reduce(terms.nll, terms.mask)
        rows = rows + irl_weight * reduce(regularizer, terms.transition_mask)
        weight = terms.mask.any(axis=-1).sum().astype(rows.dtype)
        metrics = posterior_metrics(terms, seen.log_std)
        metrics |= _weight_metric(seen.weights, sequences, terms)
        return LossOutput(rows.sum(), weight, metrics)

    return Objective("ava_d", student_loss)


def make_ava_p(
    model: CausalLM,
    reward_head: RewardHead,
    *,
    q_head: ActionValues | None = None,
    q_source: QSource = "log_probs",
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    td_weight: float = 0.1,
    irl_weight: float = 1.0,
    cer_weight: float = 1.0,
    reject_term: RejectTerm = "linear",
    reject_floor: float | None = -20.0,
    drop_last: DropLast = "irl_only",
    normalise: Normalise = "mean",
    reward_input: RewardInput = "h_action",
    reward_weights: RewardWeights | None = None,
    temperature: float = 1.0,
) -> Objective:
    """AVA from preferences, per pair; soft labels mix the two orders.

    Args:
        model, reward_head, q_head, q_source, alpha, beta, gamma, td_weight, irl_weight,
            drop_last, normalise, reward_input, reward_weights, temperature: see
            `make_ava_d`.
        cer_weight: at least 0, weight of the contrast, the sigmoid of the difference of
            the last tokens' mean rewards, once per pair.
        reject_term, reject_floor: see `rkd_jax.losses.ava_preference`.

    Returns:
        `Objective` over a `PreferenceBatch` without signal, normalised by the number of
        pairs; both responses of a pair add up. Unit: nats. Metrics as `make_ava_d`, the
        likelihood per token of preferred responses, and ``student/reject`` per token of
        the others, ``student/contrast`` and ``student/reward_accuracy``: is the chosen
        one's sum of mean rewards larger (ties count half).

    Gradient:
        Flows to all parameters.

    Raises:
        ValueError: as `make_ava_d`.

    References:
        AVA, 2411.09341, F_p and F_c. Reconstruction and deviations: see
        `rkd_jax.losses.ava_preference` and `make_ava_d`.
    """
    check_domain("td_weight", td_weight, "[0, inf)")
    check_domain("irl_weight", irl_weight, "[0, inf)")
    check_domain("cer_weight", cer_weight, "[0, inf)")
    q_source = _source(q_source, q_head, reward_weights)
    read = _reader(
        model,
        reward_head,
        q_head,
        q_source,
        alpha,
        reward_input,
        reward_weights,
        temperature,
    )
    reduce = _reduction(normalise)

    def student_loss(params, critic, frozen, batch: PreferenceBatch, signal, rng):
        del critic, frozen, signal, rng
        sequences = batch.sequences
        seen = read(params, sequences)
        terms = ava_preference(
            seen.outputs,
            sequences.targets,
            seen.mean,
            seen.log_std,
            sequences.response_mask,
            label=batch.label,
            q_source=q_source,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            drop_last=drop_last,
            reject_term=reject_term,
            reject_floor=reject_floor,
            reward_weights=seen.weights,
        )
        regularizer = terms.kl - td_weight * terms.td_log_likelihood
        rows = reduce(terms.nll + terms.reject, terms.mask)
        rows = rows + irl_weight * reduce(regularizer, terms.transition_mask)
        pairs = real_pairs(sequences).sum().astype(rows.dtype)
        contrast = terms.contrast.sum()
        metrics = posterior_metrics(terms, seen.log_std)
        metrics |= _weight_metric(seen.weights, sequences, terms)
        metrics |= _pair_metrics(terms, seen, batch)
        metrics |= {"student/contrast": Mean(contrast, pairs)}
        return LossOutput(rows.sum() - cer_weight * contrast, pairs, metrics)

    return Objective("ava_p", student_loss)


def ava_token_rewards(
    model: CausalLM,
    reward_head: RewardHead,
    *,
    reward_input: RewardInput = "h_action",
    reward_weights: RewardWeights | None = None,
) -> TokenRewards:
    """The dense reward of a trained AVA model: the posterior mean of every token.

    Args:
        model, reward_head, reward_input, reward_weights: as it was trained.

    Returns:
        `TokenRewards`, what `rkd_jax.objectives.pbkd.make_pbkd` and policy gradients
        read: float32[*batch, T], 0 in padding. Its parameters are ``{"policy": ...,
        "reward_head": ...}``; other entries are ignored. ``features`` has to be None.

    Gradient:
        Flows to the parameters; freeze them to keep the reward.

    Raises:
        ValueError: unknown switch; features given.

    References:
        AVA, 2411.09341, Eq. (19): the policy maximises the sum of the means. Deviation:
        none.
    """
    check_choice("reward_input", reward_input, get_args(RewardInput))
    states = action_hidden if reward_input == "h_action" else response_hidden

    def token_rewards(params, sequences, features=None):
        if features is not None:
            raise ValueError("an AVA reward has a trunk of its own; give features=None")
        hidden = states(model, params["policy"], sequences)
        mean, _ = reward_head(params["reward_head"], hidden)
        if reward_weights is not None:
            mean = mean * reward_weights(params["policy"], sequences)
        return fill_masked(mean, sequences.response_mask)

    return token_rewards


class _Seen(NamedTuple):
    """What a model says about responses, in one pass."""

    outputs: jax.Array  # [*batch, T, V], or of the targets alone: [*batch, T, 1]
    mean: jax.Array  # [*batch, T]
    log_std: jax.Array  # [*batch, T]
    weights: jax.Array | None  # [*batch, T]


def _source(
    q_source: QSource,
    q_head: ActionValues | None,
    reward_weights: RewardWeights | None,
) -> QSource:
    """Where the losses take Q from: the targets alone, where no more is read."""
    check_choice("q_source", q_source, get_args(QSource))
    if (q_source == "q_head") != (q_head is not None):
        raise ValueError(f"q_source={q_source!r} and {q_head=} disagree")
    whole = reward_weights is not None or q_source != "log_probs"
    return q_source if whole else "taken"


def _reader(
    model: CausalLM,
    reward_head: RewardHead,
    q_head: ActionValues | None,
    q_source: QSource,
    alpha: float,
    reward_input: RewardInput,
    reward_weights: RewardWeights | None,
    temperature: float,
) -> Callable[[Params, Sequences], _Seen]:
    """``(params, sequences) -> _Seen``."""
    check_domain("temperature", temperature, "(0, inf)")
    check_domain("alpha", alpha, "(0, inf)")
    check_choice("reward_input", reward_input, get_args(RewardInput))

    def outputs_of(params: Params, hidden: jax.Array, sequences: Sequences):
        if q_source == "q_head":
            return q_head(params["q_head"], hidden)
        if q_source != "taken":
            return model.unembed(params["policy"], hidden) / temperature
        log_probs = log_probs_of_states(
            model,
            params["policy"],
            hidden,
            sequences,
            temperature=temperature / alpha,
            tiles=LATER,
        )
        return jnp.expand_dims(log_probs, -1)

    def read(params: Params, sequences: Sequences) -> _Seen:
        states = response_states(model, params["policy"], sequences)
        outputs = outputs_of(params, states.before, sequences)
        hidden = states.after if reward_input == "h_action" else states.before
        mean, log_std = reward_head(params["reward_head"], hidden)
        weights = None
        if reward_weights is not None:
            weights = reward_weights(params["policy"], sequences)
        return _Seen(outputs, mean, log_std, weights)

    return read


def _reduction(normalise: Normalise) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``([*batch, T], mask) -> [*batch]``."""
    check_choice("normalise", normalise, get_args(Normalise))
    return sequence_mean if normalise == "mean" else sequence_sum


def _weight_metric(weights, sequences: Sequences, terms) -> dict[str, Mean]:
    """The reward weight of the last token, which the contrast reads."""
    if weights is None:
        return {}
    last = sequences.response_mask & ~terms.transition_mask
    total = masked_sum(jax.lax.stop_gradient(weights), last)
    return {"student/last_weight": Mean(total, last.sum().astype(total.dtype))}


def _pair_metrics(terms, seen: _Seen, batch: PreferenceBatch) -> dict[str, Mean]:
    """Both policy terms per token of their own responses, and the reward's accuracy."""
    mask = batch.sequences.response_mask
    real = real_pairs(batch.sequences)
    label = fill_masked(batch.label, real, 1.0).astype(terms.nll.dtype)
    lengths = terms.mask.sum(axis=-1).astype(label.dtype)
    preferred = label * lengths[..., 0] + (1.0 - label) * lengths[..., 1]
    rewards = seen.mean if seen.weights is None else seen.mean * seen.weights
    returns = sequence_sum(jax.lax.stop_gradient(rewards), mask)
    hits = 0.5 * (1.0 + jnp.sign(returns[..., 0] - returns[..., 1]))
    return {
        "student/nll": Mean(terms.nll.sum(), preferred.sum()),
        "student/reject": Mean(terms.reject.sum(), (lengths.sum() - preferred.sum())),
        "student/reward_accuracy": Mean(
            fill_masked(hits, real).sum(), real.sum().astype(hits.dtype)
        ),
    }
