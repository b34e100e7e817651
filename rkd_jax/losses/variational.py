r"""Reward inference beside imitation: a Gaussian posterior tied to action values.

Boltzmann behaviour makes action values an explanation of what a demonstrator did, and
Bellman's equation makes their differences rewards. A posterior
:math:`q_\phi(R \mid s, a) = \mathcal N(\mu, \sigma^2)` is asked to stay near a prior
and to find those differences likely:

.. math:: \mathcal L = \sum_t -\log B(a_t | s_t)
    + D_{KL}\big(q_\phi \,\|\, \mathcal N(m_0, s_0^2)\big)
    - \lambda \log q_\phi(\delta_t), \qquad
    \delta_t = Q(s_t, a_t) - \gamma\, Q(s_{t+1}, a_{t+1})

Facts, for one posterior shared by transitions of fixed :math:`\delta` (derived; checked
in ``tests/tabular/test_avril.py``):

- its mean is a shrunken temporal difference,
  :math:`\mu = \lambda\bar\delta / (\lambda + \sigma^2)`;
- at :math:`\lambda = 1` and :math:`|\delta| \le 1` the standard deviation collapses to
  0, above 1 the loss is unbounded below: keep :math:`\lambda < 1` or bound
  :math:`\log\sigma`, and log it;
- with the mean at its optimum, the last term is a ridge on the temporal difference,
  :math:`\lambda\delta^2 / 2(\lambda + \sigma^2)`.

Entry t of every array belongs to the transition that starts at target t. The state
after the last target has no action value, so the last target of a row has no transition
unless ``terminal="anchor"`` says that its value is 0.

>>> import jax.numpy as jnp
>>> q_values = jnp.array([[[1.0, 0.0], [0.75, 0.0]]])
>>> prior, mask = jnp.zeros((1, 2)), jnp.ones((1, 2))
>>> terms = avril(q_values, jnp.zeros((1, 2), int), prior, prior, mask)
>>> print(terms.delta, terms.transition_mask)
[[0.25 0.  ]] [[ True False]]
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import jax

from rkd_jax.losses.ava import ava_demonstration, ava_preference
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.likelihood import taken_values
from rkd_jax.losses.posterior import (
    AvrilTerms,
    DropLast,
    NextValue,
    StopGradient,
    Terminal,
    gaussian_kl,
    gaussian_log_prob,
    posterior_terms,
    temporal_difference,
)
from rkd_jax.masking import accumulator, fill_masked

__all__ = [
    "AvrilTerms",
    "RegularizerTerms",
    "ava_demonstration",
    "ava_preference",
    "avril",
    "experiential_regularizer",
    "gaussian_kl",
    "gaussian_log_prob",
]


class RegularizerTerms(NamedTuple):
    """The terms of X-KD's regulariser, ``[*batch, T]`` each, 0 outside ``mask``."""

    kl: jax.Array  # nats
    td_log_likelihood: jax.Array  # nats
    delta: jax.Array  # temporal differences, in nats for log-probs
    mask: jax.Array  # bool, the transition mask; all means are taken under it
    loss: jax.Array  # kl - td_weight * td_log_likelihood: what is minimised


def avril(
    q_values: jax.Array,
    actions: jax.Array,
    mean: jax.Array,
    log_std: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
    beta: float = 1.0,
    drop_last: DropLast = "all_terms",
    next_value: NextValue = "sampled",
    stop_gradient: StopGradient = "none",
    terminal: Terminal = "drop",
    prior_mean: float = 0.0,
    prior_std: float = 1.0,
) -> AvrilTerms:
    r"""The three terms of AVRIL, per action.

    .. math:: -\log\mathrm{softmax}(\beta Q(s_t, \cdot))_{a_t}, \qquad
        D_{KL}(q_\phi \,\|\, p), \qquad \log q_\phi(\delta_t)

    Args:
        q_values: float[*batch, T, A], Q of the state before each action; -inf marks
            impossible actions. Padding may hold anything in every argument.
        actions: int[*batch, T], the demonstrator's, in [0, A).
        mean: float[*batch, T], of the posterior of the reward of transition t.
        log_std: float[*batch, T], natural logarithm of its standard deviation.
        mask: bool or 0/1 numbers, [*batch, T], True on actions of a trajectory.
        gamma: in [0, 1], discount in the temporal difference.
        beta: positive, inverse temperature of the Boltzmann policy.
        drop_last: ``"all_terms"``, the released code: the last action of a row, which
            has no successor, counts nowhere, so a language model never learns to end.
            ``"irl_only"``: its likelihood counts.
        next_value: ``"sampled"`` takes the demonstrator's next action, ``"expected"``
            the mean over the Boltzmann policy.
        stop_gradient: ``"next"`` makes the next value a constant, ``"delta_for_phi"``
            the whole temporal difference: it is then data to the posterior, and action
            values learn from the likelihood alone.
        terminal: ``"anchor"`` sets the value after the last action of a row to 0, so
            that it has a temporal difference and nothing is dropped. For rows that end
            in a terminal state, not for truncated ones.
        prior_mean: of the prior, see `gaussian_kl`.
        prior_std: of the prior.

    Returns:
        `AvrilTerms`, float32, not reduced and not weighted by lambda.

    Gradient:
        Flows to ``q_values``, ``mean`` and ``log_std``; by default into both values of
        the temporal difference.

    Raises:
        ValueError: unknown switch; gamma, beta or prior_std out of range (Python
            numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        Chan and van der Schaar, AVRIL, 2102.06483; defaults are those of the code
        XanderJC/scalable-birl. Deviation: none at the defaults; the other switches are
        ours.
    """
    check_domain("beta", beta, "(0, inf)")
    check_choice("drop_last", drop_last, get_args(DropLast))
    q_values = fill_masked(q_values.astype(accumulator(q_values)), mask)
    log_policy = jax.nn.log_softmax(q_values * beta, axis=-1)
    delta, transition_mask = temporal_difference(
        q_values,
        actions,
        mask,
        log_policy if next_value == "expected" else None,
        gamma=gamma,
        next_value=next_value,
        stop_gradient=stop_gradient,
        terminal=terminal,
    )
    kept = transition_mask if drop_last == "all_terms" else mask.astype(bool)
    nll = fill_masked(-taken_values(log_policy, actions, mask), kept)
    kl, td_log_likelihood = posterior_terms(
        delta, mean, log_std, transition_mask, prior_mean, prior_std
    )
    return AvrilTerms(nll, kl, td_log_likelihood, kept, transition_mask, delta)


def experiential_regularizer(
    q_values: jax.Array,
    actions: jax.Array,
    mean: jax.Array,
    log_std: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
    td_weight: float = 0.1,
    next_value: NextValue = "sampled",
    teacher_log_probs: jax.Array | None = None,
    stop_gradient: StopGradient = "none",
    terminal: Terminal = "drop",
    prior_mean: float = 0.0,
    prior_std: float = 1.0,
) -> RegularizerTerms:
    r"""What X-KD adds to a distillation loss, per transition, in nats.

    .. math:: D_{KL}\big(q_\phi \,\|\, p\big) - \lambda \log q_\phi(\delta_t)

    Its effect depends on where Q comes from. Raw logits leave a gauge, Q + c(s), that
    does not change the student; with ``next_value="expected"`` a tabular student then
    meets it at no cost. Log-probs have no gauge, and the term is a ridge on
    :math:`\log\pi(y_t) - \gamma\log\pi(y_{t+1})`.

    Args:
        q_values: float[*batch, T, V], of the state before each target: the student's
            log-probs, its raw logits, or a head of their own. -inf marks impossible
            tokens. Padding may hold anything in every argument.
        actions: int[*batch, T], the demonstrated tokens, in [0, V).
        mean: float[*batch, T], of the posterior of the reward of transition t.
        log_std: float[*batch, T], natural logarithm of its standard deviation.
        mask: bool or 0/1 numbers, [*batch, T], True on response targets, EOS included.
        gamma: in [0, 1], discount in the temporal difference.
        td_weight: at least 0, lambda; see the module docstring for 1 and above.
        next_value: ``"sampled"`` takes the demonstrated next token, ``"expected"`` the
            mean of the next values over ``teacher_log_probs``.
        teacher_log_probs: float[*batch, T, V], natural log, -inf allowed; read only
            for ``next_value="expected"``.
        stop_gradient: see `avril`.
        terminal: ``"drop"``: the last target has no transition; ``"anchor"``: the value
            after it is 0.
        prior_mean: of the prior, see `gaussian_kl`.
        prior_std: of the prior.

    Returns:
        `RegularizerTerms`, float32, not reduced; ``loss`` holds the weighted sum. A
        response of one token has no transition (unless anchored) and gives zeros.

    Gradient:
        Flows to ``q_values``, ``mean`` and ``log_std``; the teacher is data.

    Raises:
        ValueError: unknown switch, "expected" without a teacher; gamma, td_weight or
            prior_std out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        X-KD, 2602.12674. Reconstruction: no equation is published in what we have; it
        is the reward term of AVRIL with the teacher as the demonstrator.
    """
    check_domain("td_weight", td_weight, "[0, inf)")
    if next_value == "expected" and teacher_log_probs is None:
        raise ValueError('next_value="expected" needs teacher_log_probs')
    q_values = fill_masked(q_values.astype(accumulator(q_values)), mask)
    if next_value == "expected":
        teacher_log_probs = fill_masked(teacher_log_probs, mask)
        teacher_log_probs = jax.lax.stop_gradient(teacher_log_probs)
    delta, transition_mask = temporal_difference(
        q_values,
        actions,
        mask,
        teacher_log_probs,
        gamma=gamma,
        next_value=next_value,
        stop_gradient=stop_gradient,
        terminal=terminal,
    )
    kl, td_log_likelihood = posterior_terms(
        delta, mean, log_std, transition_mask, prior_mean, prior_std
    )
    loss = kl - td_weight * td_log_likelihood
    return RegularizerTerms(kl, td_log_likelihood, delta, transition_mask, loss)
