r"""AVA: variational reward inference for text, from demonstrations or preferences.

AVRIL (`rkd_jax.losses.variational`) with a language model as the Boltzmann policy. From
demonstrations the policy's likelihood of a response goes up; from preferences that of
the chosen one goes up, that of the rejected one down, and the last rewards are asked to
rank them:

.. math:: \mathcal L_d = \sum_t -\beta\log\pi(y_t) + d_t
    - \lambda \log q_\phi(\delta_t), \qquad
    \mathcal L_p = \sum_{y^\pm}\sum_t \mp\beta\log\pi(y_t^\pm) + d_t^\pm
    - \lambda \log q_\phi(\delta_t^\pm)\; - \sigma(\mu_{last}^+ - \mu_{last}^-)

with :math:`d_t = D_{KL}(q_\phi \| \mathcal N(0, 1))`. The paper maximises the
negatives. The ranking term is a sigmoid, not its logarithm.

>>> import jax.numpy as jnp
>>> even, ids, mask = jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), int), jnp.ones((1, 3))
>>> terms = ava_demonstration(even, ids, 0 * mask, 0 * mask, mask, gamma=0.5)
>>> print(jnp.exp(-terms.nll), jnp.exp(terms.delta))
[[0.25 0.25 0.25]] [[0.5 0.5 1. ]]
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.likelihood import log1mexp, taken_values
from rkd_jax.losses.posterior import (
    AvrilTerms,
    DropLast,
    posterior_terms,
    temporal_difference,
)
from rkd_jax.masking import accumulator, fill_masked, last_target, sequence_sum

QSource = Literal["log_probs", "taken", "prob", "raw_logits", "q_head"]
RejectTerm = Literal["linear", "log1mexp", "none"]


class AvaPreferenceTerms(NamedTuple):
    """The terms of `ava_preference`; member 0 of the axis before T is the chosen one.

    ``nll + reject + kl - lambda * td_log_likelihood``, over both responses, minus
    ``contrast`` is minimised. Token terms are 0 outside their mask.
    """

    nll: jax.Array  # [*batch, 2, T], nats, weighted by how likely it is preferred
    reject: jax.Array  # [*batch, 2, T], nats, weighted by how likely it is not
    kl: jax.Array  # [*batch, 2, T], nats, under `transition_mask`
    td_log_likelihood: jax.Array  # [*batch, 2, T], nats, under `transition_mask`
    contrast: jax.Array  # [*batch], in (0, 1); a tie is 0.5, a pair without tokens 0
    mask: jax.Array  # bool[*batch, 2, T], the tokens whose likelihood counts
    transition_mask: jax.Array  # bool[*batch, 2, T]
    delta: jax.Array  # [*batch, 2, T], under `transition_mask`


def ava_demonstration(
    outputs: jax.Array,
    actions: jax.Array,
    mean: jax.Array,
    log_std: jax.Array,
    mask: jax.Array,
    *,
    q_source: QSource = "log_probs",
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    drop_last: DropLast = "irl_only",
    reward_weights: jax.Array | None = None,
) -> AvrilTerms:
    r"""The three terms of AVA from demonstrations, per token.

    ===============  ==================================  ===============================
    ``q_source``     action values Q                     policy term
    ===============  ==================================  ===============================
    ``log_probs``    log softmax(alpha logits)           beta Q(y_t)
    ``taken``        log-probs of the targets, given     beta Q(y_t)
    ``prob``         log softmax(alpha softmax(logits))  beta Q(y_t)
    ``raw_logits``   logits                              log softmax(beta Q)(y_t)
    ``q_head``       output of a Q head                  log softmax(beta Q)(y_t)
    ===============  ==================================  ===============================

    ``prob`` is the paper's letter: its softmax is over *probabilities*, which span one
    nat at alpha = 1, so that over a large vocabulary the implied policy is nearly
    uniform. ``taken`` is ``log_probs`` for who has the log-probs of the targets and no
    logits (`linear_token_log_probs`). The two forms of beta agree at 1 only.

    Args:
        outputs: float[*batch, T, V], logits of the language model, or what a Q head
            says, at the state before each target; for ``taken`` float[*batch, T, 1].
            Padding may hold anything in every argument.
        actions: int[*batch, T], the demonstrated tokens, in [0, V).
        mean: float[*batch, T], of the posterior of the reward of transition t.
        log_std: float[*batch, T], natural logarithm of its standard deviation.
        mask: bool or 0/1 numbers, [*batch, T], True on response targets, EOS included.
        q_source: see the table.
        alpha: positive; read by ``log_probs`` (an inverse temperature) and ``prob``.
        beta: positive.
        gamma: in [0, 1], discount of the temporal difference.
        drop_last: ``"irl_only"``: the last target has a likelihood, but no transition;
            ``"all_terms"``: it has neither, and the end of text is not learned.
        reward_weights: float[*batch, T], positive, multiplies Q (before the policy's
            softmax), ``mean`` and ``log_std``; None is 1 everywhere.

    Returns:
        `AvrilTerms`, float32, not reduced and not weighted by lambda. For ``q_head``
        and "all_terms" they are those of `rkd_jax.losses.avril`.

    Gradient:
        Flows to ``outputs``, ``mean``, ``log_std`` and ``reward_weights``, and through
        both values of the temporal difference.

    Raises:
        ValueError: unknown switch; alpha, beta or gamma out of range (Python numbers;
            traced ones are not checked).
        AssertionError: shapes differ.

    References:
        AVA, 2411.09341, F_d and, for ``prob``, Eqs. (12)-(14). Deviations: the default
        ``log_probs`` and ``irl_only``. Reconstruction: which standard deviation the
        reward weight multiplies is not published; here its logarithm, since scaling it
        itself by about 1 / length would make the posterior collapse.
    """
    q_values, log_policy, scale = _action_values(
        outputs, mask, reward_weights, q_source=q_source, alpha=alpha, beta=beta
    )
    log_probs, terms = _evaluate(
        q_values,
        log_policy,
        actions,
        *_weighted(mean, log_std, mask, reward_weights),
        mask,
        gamma=gamma,
        drop_last=drop_last,
    )
    return terms._replace(nll=fill_masked(-scale * log_probs, terms.mask))


def ava_preference(
    outputs: jax.Array,
    actions: jax.Array,
    mean: jax.Array,
    log_std: jax.Array,
    mask: jax.Array,
    *,
    label: ArrayLike = 1.0,
    q_source: QSource = "log_probs",
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    drop_last: DropLast = "irl_only",
    reject_term: RejectTerm = "linear",
    reject_floor: float | None = -20.0,
    reward_weights: jax.Array | None = None,
) -> AvaPreferenceTerms:
    r"""The terms of AVA from preferences, per token, and its contrast, per pair.

    Arrays have an axis of two members before T: 0 is the chosen response. What the
    rejected one contributes, per token, with p its probability:

    - ``"linear"``: beta log p, to be minimised. Its force does not fade as p goes to 0,
      so it is unbounded below; with ``reject_floor`` (nats) a log-prob below the floor
      counts as the floor and has no gradient.
    - ``"log1mexp"``: -beta log(1 - p), bounded below by 0, and without force at p = 0.
    - ``"none"``.

    Args:
        outputs: float[*batch, 2, T, V], see `ava_demonstration`.
        actions: int[*batch, 2, T].
        mean: float[*batch, 2, T].
        log_std: float[*batch, 2, T].
        mask: bool or 0/1 numbers, [*batch, 2, T].
        label: probability that member 0 was preferred, in [0, 1], or [*batch]. The
            objective is mixed over both orders.
        q_source: see `ava_demonstration`, and so for the next four.
        alpha: positive.
        beta: positive.
        gamma: in [0, 1].
        drop_last: what becomes of the last target.
        reject_term: see above.
        reject_floor: negative, or None for no floor; read by ``"linear"``.
        reward_weights: float[*batch, 2, T], see `ava_demonstration`.

    Returns:
        `AvaPreferenceTerms`, float32, not reduced and not weighted by lambda. The
        contrast reads the posterior means of the last target of either response.

    Gradient:
        Flows to ``outputs``, ``mean``, ``log_std`` and ``reward_weights``; the label is
        data.

    Raises:
        ValueError: unknown switch, a number out of range (Python numbers; traced ones
            are not checked).
        AssertionError: shapes differ.

    References:
        AVA, 2411.09341, F_p and F_c. Reconstruction: divergence and temporal difference
        on both responses. Deviations: the floor, ``log1mexp`` (the paper's exact bound,
        here per token), soft labels, and those of `ava_demonstration`.
    """
    check_domain("label", label, "[0, 1]")
    check_choice("reject_term", reject_term, get_args(RejectTerm))
    check_domain("reject_floor", reject_floor, "(-inf, 0)")
    chex.assert_axis_dimension(mask, -2, 2)
    q_values, log_policy, scale = _action_values(
        outputs, mask, reward_weights, q_source=q_source, alpha=alpha, beta=beta
    )
    mean, log_std = _weighted(mean, log_std, mask, reward_weights)
    log_probs, terms = _evaluate(
        q_values,
        log_policy,
        actions,
        mean,
        log_std,
        mask,
        gamma=gamma,
        drop_last=drop_last,
    )
    pairs = mask.astype(bool).any(axis=(-2, -1))
    label = jax.lax.stop_gradient(jnp.asarray(label, log_probs.dtype))
    label = fill_masked(jnp.broadcast_to(label, pairs.shape), pairs, 1.0)
    preferred = jnp.expand_dims(jnp.stack([label, 1.0 - label], axis=-1), -1)
    rejected = _rejection(log_probs, reject_term, reject_floor)
    contrast = jax.nn.sigmoid(_last_difference(mean, mask))
    # The other order of the pair has the complementary contrast.
    contrast = label * contrast + (1.0 - label) * (1.0 - contrast)
    return AvaPreferenceTerms(
        nll=fill_masked(_share(preferred, -scale * log_probs), terms.mask),
        reject=fill_masked(_share(1.0 - preferred, scale * rejected), terms.mask),
        kl=terms.kl,
        td_log_likelihood=terms.td_log_likelihood,
        contrast=fill_masked(contrast, pairs),
        mask=terms.mask,
        transition_mask=terms.transition_mask,
        delta=terms.delta,
    )


def _action_values(
    outputs: jax.Array,
    mask: jax.Array,
    weights: jax.Array | None,
    *,
    q_source: QSource,
    alpha: float,
    beta: float,
) -> tuple[jax.Array, jax.Array, float]:
    """Q [.., T, V], the policy's log-probs [.., T, V], and the factor of its term."""
    check_choice("q_source", q_source, get_args(QSource))
    check_domain("alpha", alpha, "(0, inf)")
    check_domain("beta", beta, "(0, inf)")
    if q_source == "taken":
        chex.assert_axis_dimension(outputs, -1, 1)
        if weights is not None:
            raise ValueError(
                'reward_weights need the log-probs of all tokens: q_source="taken" has '
                'those of the targets, take "log_probs"'
            )
        log_probs = fill_masked(outputs.astype(accumulator(outputs)), mask)
        return log_probs, log_probs, beta
    outputs = fill_masked(outputs.astype(accumulator(outputs)), mask)
    normalised = q_source in ("log_probs", "prob")
    q_values = outputs
    if q_source == "prob":
        outputs = jax.nn.softmax(outputs, axis=-1)
    if normalised:
        q_values = jax.nn.log_softmax(alpha * outputs, axis=-1)
    if weights is not None:
        weights = jnp.expand_dims(fill_masked(weights, mask, 1.0), -1)
        # The derivative in the weight of an impossible token would be 0 * -inf.
        possible = q_values > -jnp.inf
        product = weights.astype(q_values.dtype) * jnp.where(possible, q_values, 0.0)
        q_values = jnp.where(possible, product, -jnp.inf)
    if not normalised:
        return q_values, jax.nn.log_softmax(beta * q_values, axis=-1), 1.0
    policy = q_values if weights is None else jax.nn.log_softmax(q_values, axis=-1)
    return q_values, policy, beta


def _weighted(
    mean: jax.Array, log_std: jax.Array, mask: jax.Array, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The reward head's outputs times the weight, 0 in padding."""
    chex.assert_equal_shape([mean, log_std, mask])
    dtype = accumulator(mean)
    mean, log_std = (fill_masked(x.astype(dtype), mask) for x in (mean, log_std))
    if weights is None:
        return mean, log_std
    chex.assert_equal_shape([weights, mask])
    weights = fill_masked(weights, mask).astype(dtype)
    return weights * mean, weights * log_std


def _evaluate(
    q_values: jax.Array,
    log_policy: jax.Array,
    actions: jax.Array,
    mean: jax.Array,
    log_std: jax.Array,
    mask: jax.Array,
    *,
    gamma: float,
    drop_last: DropLast,
) -> tuple[jax.Array, AvrilTerms]:
    """Log-probs of the tokens, 0 in padding, and all terms but the policy's own."""
    check_choice("drop_last", drop_last, get_args(DropLast))
    if q_values.shape[-1] == 1:  # the targets' own column
        actions = jnp.zeros_like(actions)
    delta, transition_mask = temporal_difference(q_values, actions, mask, gamma=gamma)
    log_probs = taken_values(log_policy, actions, mask)
    kl, td_log_likelihood = posterior_terms(delta, mean, log_std, transition_mask)
    kept = transition_mask if drop_last == "all_terms" else mask.astype(bool)
    terms = AvrilTerms(-log_probs, kl, td_log_likelihood, kept, transition_mask, delta)
    return log_probs, terms


def _rejection(
    log_probs: jax.Array, term: RejectTerm, floor: float | None
) -> jax.Array:
    """What a token of the rejected response costs, per unit of beta."""
    if term == "none":
        return jnp.zeros_like(log_probs)
    if term == "log1mexp":
        return -log1mexp(log_probs)
    return log_probs if floor is None else jnp.maximum(log_probs, floor)


def _share(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Weight times value; 0 where the weight is, whatever the value."""
    return jnp.where(weights > 0, weights * values, 0.0)


def _last_difference(mean: jax.Array, mask: jax.Array) -> jax.Array:
    """Chosen minus rejected, of the means at the last target: ``[.., 2, T] -> [..]``.

    An empty response has mean 0.
    """
    last = sequence_sum(mean, last_target(mask))
    return last[..., 0] - last[..., 1]
