r"""Reward differences of an oracle, taught to a student by regression.

.. math:: \big(\Delta r^* - \Delta \hat r\big)^2, \qquad
    \Delta r = r(x, y_w) - r(x, y_l)

Differences, because a comparison says nothing about what all responses to a prompt
share. DRDO (`drdo`) regresses a reward head and adds a likelihood term. The e-DPO
family (`reward_distillation`) regresses the policy's own implicit reward, against one
oracle or pessimistically against several (`pessimistic_reduce`), whose scales are made
comparable beforehand (`reward_scale`).

>>> import jax.numpy as jnp
>>> policy = Pair(jnp.array([-3.0]), jnp.array([-2.0]))
>>> oracle = Pair(jnp.array([0.5]), jnp.array([0.0]))
>>> print(reward_distillation(policy, policy, oracle))  # a student at its reference
[0.25]
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.likelihood import log1mexp
from rkd_jax.losses.pairs import log_ratio, pair_difference
from rkd_jax.masking import accumulator, masked_mean
from rkd_jax.types import Pair

PreferenceTerm = Literal["unlikelihood", "ratio_literal"]
Reduction = Literal["min", "softmin", "ema_min", "mean"]
RewardScale = Literal["rms_pair", "std"]


class DrdoTerms(NamedTuple):
    """Both terms of `drdo`, float32[*batch] each; the loss is their sum."""

    distillation: jax.Array  # squared nats
    preference: jax.Array  # nats


class Pessimism(NamedTuple):
    """What `pessimistic_reduce` returns: the objective, and who it listens to."""

    objective: jax.Array  # float32[]
    weights: jax.Array  # float32[K], non-negative, sum 1, without gradient


def drdo(
    student_mean: Pair,
    student_rewards: Pair,
    oracle_rewards: Pair,
    *,
    alpha: float = 0.1,
    gamma: float = 2.0,
    preference_term: PreferenceTerm = "unlikelihood",
    focal_grad: bool = True,
) -> DrdoTerms:
    r"""Direct reward distillation and policy optimisation, both terms per pair.

    .. math:: \big(\Delta r^* - \Delta\hat r\big)^2, \qquad
        -\alpha (1 - p_w)^\gamma \big[z_w + \log(1 - e^{z_l})\big], \qquad
        p_w = \sigma(z_w - z_l)

    ``ratio_literal`` puts a minus sign before the logarithm. Its bracket rewards a
    likely rejected response: without the focal factor's gradient, minimising it pushes
    the rejected log-prob up, always. With it, either sign occurs.

    Args:
        student_mean: `Pair` of float[*batch], mean log-prob per response token, at most
            0, nats. Sums are legal but hardly train: there exp(z_l) is about 0, so the
            rejected response gets no gradient, and the focal factor is 0 or 1.
        student_rewards: the student's own rewards, of a head or implicit.
        oracle_rewards: the frozen oracle's rewards of the same responses.
        alpha: at least 0, weight of the preference term.
        gamma: at least 0, focus on pairs the student gets wrong; 0 weighs all alike.
        preference_term: ``"unlikelihood"`` or ``"ratio_literal"``.
        focal_grad: let gradient flow through the focal factor as well.

    Returns:
        `DrdoTerms` of float32[*batch], not reduced: squared nats, non-negative, 0 iff
        the differences agree; and nats, positive for ``unlikelihood``.

    Gradient:
        The first term reaches ``student_rewards`` only, the second ``student_mean``
        only: under ``unlikelihood`` the chosen log-prob always rises, the rejected one
        always falls. The oracle is data.

    Raises:
        ValueError: alpha or gamma out of range (Python numbers; traced ones are not
            checked), or an unknown preference term.
        AssertionError: shapes differ.

    References:
        DRDO, 2410.08458, Eq. (7). Reconstruction: the equation's second term is known
        to us from descriptions only (focal, unlikelihood-like, two hyper-parameters).
        The sign in its bracket, the length normalisation and the values of alpha and
        gamma are open; both signs are provided.
    """
    check_domain("alpha", alpha, "[0, inf)")
    check_domain("gamma", gamma, "[0, inf)")
    check_choice("preference_term", preference_term, get_args(PreferenceTerm))
    chex.assert_equal_shape([*student_mean, *student_rewards, *oracle_rewards])
    own = pair_difference(student_rewards)
    target = jax.lax.stop_gradient(pair_difference(oracle_rewards)).astype(own.dtype)

    margin = pair_difference(student_mean)
    focus = jnp.exp(-gamma * jax.nn.softplus(margin))  # (1 - p_w) ** gamma
    if not focal_grad:
        focus = jax.lax.stop_gradient(focus)
    chosen = student_mean.chosen.astype(margin.dtype)
    rest = log1mexp(student_mean.rejected).astype(margin.dtype)
    bracket = chosen + rest if preference_term == "unlikelihood" else chosen - rest
    return DrdoTerms(jnp.square(target - own), -alpha * focus * bracket)


def reward_distillation(
    student: Pair, reference: Pair, rewards: Pair, *, beta: float = 0.1
) -> jax.Array:
    r"""Squared error of DPO's implicit reward against explicit ones, per pair.

    .. math:: \big(r(y_1) - r(y_2) - h\big)^2, \qquad
        h = \beta\Big[\log\tfrac{\pi_\theta(y_1)}{\pi_{ref}(y_1)}
        - \log\tfrac{\pi_\theta(y_2)}{\pi_{ref}(y_2)}\Big]

    With pairs on full support it is 0 exactly at pi proportional to
    pi_ref exp(r / beta), DPO's own optimum. The order of a pair does not matter, so
    pairs need no label.

    Args:
        student: `Pair` of float[*batch], log-probs *summed* over the response, nats.
        reference: the same under the frozen reference.
        rewards: `Pair` of float[*batch], or [K, *batch] for an ensemble of K frozen
            reward models, nats. Dividing them by a scale s multiplies the effective
            beta by s.
        beta: positive, inverse strength of the leash to the reference.

    Returns:
        float32, the shape of the rewards; nats squared, non-negative. Not reduced.

    Gradient:
        Flows to the student only: -2 beta times the error to the first log-prob, the
        opposite to the second.

    Raises:
        ValueError: beta out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes differ, the axis K apart.

    References:
        Robust preference optimisation by reward-model distillation, 2405.19316, d-DPO.
        Reconstruction: the form is known to us from other papers; that beta multiplies
        the log-ratios follows from the optimum.
    """
    check_domain("beta", beta, "(0, inf)")
    implicit = beta * pair_difference(log_ratio(student, reference))
    rank = implicit.ndim
    chex.assert_rank(rewards.chosen, {rank, rank + 1})
    chex.assert_equal_shape_suffix([implicit, rewards.chosen], rank)
    target = jax.lax.stop_gradient(pair_difference(rewards)).astype(implicit.dtype)
    return jnp.square(target - jnp.broadcast_to(implicit, target.shape))


def pessimistic_reduce(
    losses: jax.Array,
    *,
    how: Reduction = "min",
    temperature: float = 1.0,
    mask: jax.Array | None = None,
    running: jax.Array | None = None,
) -> Pessimism:
    r"""One objective from the losses against K reward models: listen to the mildest.

    With the batch means :math:`\bar\ell_i`:

    ===========  =========================================================
    ``min``      the smallest mean; equal ones share the gradient
    ``softmin``  :math:`-\tau\log\frac1K\sum_i e^{-\bar\ell_i/\tau}`, from the minimum
                 (tau towards 0) to the mean (tau towards infinity)
    ``ema_min``  the mean of the model whose *running* mean is smallest
    ``mean``     the mean of the means
    ===========  =========================================================

    The minimum over a mini-batch is in expectation a lower bound of the minimum over
    the data, and a minimum per pair is lower still; ``ema_min`` decides over many
    batches. The model of the smallest loss is not the pessimistic optimum over the
    ensemble, which is a mixture of rewards in general.

    Args:
        losses: float[K, B], non-negative, from `reward_distillation`.
        how: see the table.
        temperature: positive, tau, in the unit of the losses; softmin only.
        mask: bool or 0/1 numbers, [B]; False is padding. None keeps every pair.
        running: float[K], running means of the losses; ema_min only, where it alone
            decides. See `running_mean_loss`.

    Returns:
        `Pessimism`: the scalar objective, float32, and the weights [K] with which the
        gradients of the K means enter it. 0 if every pair is masked.

    Gradient:
        Flows to ``losses``: weight over the number of pairs. None to ``running``.

    Raises:
        ValueError: unknown ``how``, ema_min without ``running`` or the reverse, or
            temperature out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes do not fit.

    References:
        Reward-model distillation, 2405.19316, e-DPO: a minimum over an ensemble.
        Reconstruction: over what the minimum is taken in a mini-batch is not published
        in what we have; softmin and ema_min are ours.
    """
    check_choice("how", how, get_args(Reduction))
    check_domain("temperature", temperature, "(0, inf)")
    if (how == "ema_min") != (running is not None):
        raise ValueError(f"running goes with how='ema_min' and only with it: {how!r}")
    chex.assert_rank(losses, 2)
    models, pairs = losses.shape
    mask = jnp.ones(pairs, bool) if mask is None else mask
    chex.assert_shape(mask, (pairs,))
    means = masked_mean(losses, jnp.broadcast_to(mask, losses.shape), axis=-1)
    if how == "softmin":
        scaled = -means / jnp.asarray(temperature, means.dtype)
        soft = jax.nn.logsumexp(scaled) - np.log(models).item()
        weights = jax.nn.softmax(jax.lax.stop_gradient(scaled))
        return Pessimism(-temperature * soft, weights)
    if how == "mean":
        weights = jnp.full(models, 1.0 / models, means.dtype)
    else:
        ranking = means if running is None else running.astype(means.dtype)
        chex.assert_shape(ranking, (models,))
        lowest = (ranking == jnp.min(ranking)).astype(means.dtype)
        weights = jax.lax.stop_gradient(lowest / jnp.sum(lowest))
    return Pessimism(jnp.sum(weights * means), weights)


def running_mean_loss(running: jax.Array, losses: jax.Array) -> jax.Array:
    r"""What makes parameters follow the mean loss of each reward model.

    .. math:: \tfrac12 \big(m_i - \ell_i\big)^2

    A step of plain gradient descent with rate 1 - d on its mean over a batch is the
    running mean with decay d, :math:`m \leftarrow d\,m + (1 - d)\,\bar\ell`. So the
    running means can be the parameters of a second player: they are then saved and
    resumed with the training state, and exact whatever the number of micro-batches.

    Args:
        running: float[K], the running means. A student that starts at its reference
            has the mean squared reward differences as its losses: all 1 after
            `reward_scale`.
        losses: float[K, *batch], from `reward_distillation`.

    Returns:
        float32[K, *batch], non-negative. Not reduced.

    Gradient:
        Flows to ``running`` only.

    Raises:
        AssertionError: the K of both differ.

    References:
        Textbook. Deviation: none.
    """
    chex.assert_rank(running, 1)
    chex.assert_equal_shape_prefix([running, losses], 1)
    losses = jax.lax.stop_gradient(losses.astype(accumulator(losses)))
    axes = tuple(range(1, losses.ndim))
    means = jnp.expand_dims(running.astype(losses.dtype), axes)
    return 0.5 * jnp.square(jnp.broadcast_to(means, losses.shape) - losses)


def reward_scale(rewards: Pair, *, how: RewardScale = "rms_pair") -> np.ndarray:
    """What to divide each reward model's rewards by, so that an ensemble is fair.

    Without it the reward model with the smallest scale wins the minimum at the first
    step and tends to keep it. Compute it once, over the training set, and use the same
    numbers everywhere; it multiplies the effective beta of that model.

    Args:
        rewards: `Pair` of float[N] or [K, N]: the whole training set.
        how: ``"rms_pair"``, the root mean square of the pair differences, so that a
            student at its reference has loss exactly 1 against every model; ``"std"``,
            the standard deviation over all responses.

    Returns:
        float64, [] or [K], positive; on the host.

    Gradient:
        None: host side.

    Raises:
        ValueError: an unknown ``how``, a reward that is not finite, or a reward model
            that tells no responses apart.

    References:
        Derived: DRDO and e-DPO leave the scale of the rewards open.
    """
    check_choice("how", how, get_args(RewardScale))
    chosen, rejected = (np.asarray(member, np.float64) for member in rewards)
    check_rewards(np.moveaxis(np.stack([chosen, rejected], axis=-1), -2, 0))
    if how == "rms_pair":
        scale = np.sqrt(np.mean(np.square(chosen - rejected), axis=-1))
    else:
        scale = np.std(np.concatenate([chosen, rejected], axis=-1), axis=-1)
    if not np.all(scale > 0):
        silent = np.flatnonzero(np.atleast_1d(scale) == 0).tolist()
        raise ValueError(f"reward models {silent} give all responses the same reward")
    return np.asarray(scale)


def check_rewards(rewards: ArrayLike) -> None:
    """Refuse, on the host and before training, pairs without a usable reward.

    A batch holds NaN where a record carries no reward; a loss over it would be NaN, and
    the training update refuse step after step.

    Args:
        rewards: float[N, ...], cached rewards of N pairs, as in
            `rkd_jax.types.PreferenceBatch` or `rkd_jax.types.EnsembleSignal`.

    Returns:
        Nothing.

    Gradient:
        None: host side.

    Raises:
        ValueError: a reward is NaN or infinite. The message counts the pairs, names the
            first ones and the remedy.

    References:
        Derived: none of the papers has missing rewards.
    """
    rewards = np.asarray(rewards, np.float64)
    usable = np.isfinite(rewards).reshape(len(rewards), -1).all(axis=1)
    if usable.all():
        return
    rows = np.flatnonzero(~usable)
    first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    raise ValueError(
        f"{len(rows)} of {len(usable)} pairs have no finite reward (pairs {first}): "
        "give every record chosen_reward and rejected_reward, or score the pairs with "
        "a reward model before training"
    )
