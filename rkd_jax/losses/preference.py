r"""Preference losses on pairs of sequence log-probs; each is a reward in disguise.

Every function takes `Pair`s that are already reduced over the tokens, by
`rkd_jax.masking.sequence_sum`, or by ``sequence_mean`` where an argument is named
``_mean``.

>>> import jax.numpy as jnp
>>> pair = Pair(chosen=jnp.array([-3.0]), rejected=jnp.array([-2.0]))
>>> print(jnp.exp(-dpo(pair, pair)))  # a student that is its reference: a coin flip
[0.5]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rkd_jax.losses.domain import check_domain
from rkd_jax.losses.pairs import log_ratio, pair_difference, scaled
from rkd_jax.losses.reward import bradley_terry
from rkd_jax.types import Pair


def dpo(
    student: Pair,
    reference: Pair,
    *,
    beta: float = 0.1,
    label_smoothing: ArrayLike = 0.0,
) -> jax.Array:
    r"""Direct preference optimisation, in nats per pair.

    Bradley-Terry on the implicit reward :math:`\beta\log(\pi_\theta / \pi_{ref})(y)`:

    .. math:: -(1 - \epsilon) \log\sigma(\beta h) - \epsilon \log\sigma(-\beta h),
        \qquad h = \log\tfrac{\pi_\theta(y_w)}{\pi_{ref}(y_w)}
        - \log\tfrac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}

    Args:
        student: `Pair` of float[*batch], log-probs *summed* over the response, nats.
        reference: the same under the frozen reference.
        beta: positive, inverse strength of the leash to the reference.
        label_smoothing: in [0, 0.5], probability that the label is wrong; or [*batch],
            where 1 minus a soft label is as good.

    Returns:
        float32[*batch], positive; log 2 where student and reference agree. Not
        reduced.

    Gradient:
        Flows to the student only: -beta sigma(-beta h) to the chosen log-prob and the
        opposite to the rejected one, without smoothing.

    Raises:
        ValueError: beta or label_smoothing out of range (Python numbers; arrays are
            not checked).
        AssertionError: shapes differ.

    References:
        Rafailov et al., Direct Preference Optimization, 2305.18290, Eq. (7); smoothing
        as in Mitchell, conservative DPO, 2023. Deviation: none.
    """
    check_domain("beta", beta, "(0, inf)")
    check_domain("label_smoothing", label_smoothing, "[0, 0.5]")
    rewards = scaled(log_ratio(student, reference), beta)
    smoothing = jnp.asarray(label_smoothing, rewards.chosen.dtype)
    return bradley_terry(rewards, label=1.0 - smoothing)


def ipo(student_mean: Pair, reference_mean: Pair, *, tau: float = 0.1) -> jax.Array:
    r"""Identity preference optimisation: a bounded target for the margin.

    .. math:: \big(h - \tfrac{1}{2\tau}\big)^2

    with h as in `dpo`, from log-probs *averaged* over the tokens.

    Args:
        student_mean: `Pair` of float[*batch], mean log-prob per response token, nats.
        reference_mean: the same under the frozen reference.
        tau: positive; the margin asked for is 1 / (2 tau) nats.

    Returns:
        float32[*batch], non-negative, nats squared; 0 iff the margin is met exactly.
        Not reduced.

    Gradient:
        Flows to the student only; changes sign where the margin is met.

    Raises:
        ValueError: tau out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        Azar et al., 2310.12036, Eq. (17). Deviation: means instead of sums, as in
        Hugging Face TRL; feed summed log-probs for the paper's form.
    """
    check_domain("tau", tau, "(0, inf)")
    margin = pair_difference(log_ratio(student_mean, reference_mean))
    return jnp.square(margin - 1.0 / (2.0 * tau))


def simpo(student_mean: Pair, *, beta: float = 2.0, gamma: float = 1.0) -> jax.Array:
    r"""Simple preference optimisation: no reference, a target margin, in nats per pair.

    .. math:: -\log\sigma\big(\beta\,(\bar\ell_w - \bar\ell_l) - \gamma\big)

    Args:
        student_mean: `Pair` of float[*batch], mean log-prob per response token, nats.
        beta: positive, scale of the implicit reward.
        gamma: at least 0, the margin itself; some code names the ratio gamma / beta.

    Returns:
        float32[*batch], positive; softplus(gamma) at equal log-probs. Not reduced.

    Gradient:
        Flows to both members of the pair, with opposite sign.

    Raises:
        ValueError: beta or gamma out of range (Python numbers; traced ones are not
            checked).
        AssertionError: shapes differ.

    References:
        Meng, Xia and Chen, SimPO, 2405.14734, Eq. (6). Deviation: none.
    """
    check_domain("beta", beta, "(0, inf)")
    check_domain("gamma", gamma, "[0, inf)")
    return bradley_terry(scaled(student_mean, beta), margin=gamma)
