r"""Bradley-Terry maximum likelihood of a Q-function: the anchor of MM-PbKD.

.. math:: \hat Q = \arg\min_Q \overline{\mathrm{NLL}}_Q(D), \qquad
    \mathrm{NLL}_Q = -\log\sigma\big(A_\rho(\tau_0) - A_\rho(\tau_1)\big), \qquad
    A_\rho(\tau) = \sum_h \gamma^h \big(Q(s_h, a_h) - V_\rho(s_h)\big)

with :math:`\rho` the policy that anchors Q: the teacher for the on-policy gap, the
student for the off-policy one. As in `rkd_jax.objectives.reward_model`, the trained
player takes the ``student`` seat of the update.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rkd_jax.losses import bradley_terry, trajectory_return
from rkd_jax.losses.domain import check_domain
from rkd_jax.masking import fill_masked, masked_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.action_values import (
    FrozenPolicy,
    QFunction,
    QValues,
    Rows,
    action_moments,
    row_terms,
)
from rkd_jax.objectives.per_pair import real_pairs_of
from rkd_jax.objectives.policy import members
from rkd_jax.objectives.reward_model import l2_penalty
from rkd_jax.types import (
    LossOutput,
    Mean,
    Objective,
    Pair,
    Params,
    PreferenceBatch,
    Sequences,
    WhiteBoxSignal,
)


def pair_advantages(
    q_function: QFunction,
    params: Params,
    sequences: Sequences,
    features: jax.Array | None,
    anchor: Rows,
    gamma: float,
) -> Pair:
    """`rkd_jax.losses.advantage_sum` of both responses of each pair, ``[pairs]`` each.

    Their loss (`pair_losses`) under the anchor's parameters, plus its penalty if there
    is one, is the ``anchor_nll`` that the game asks for.
    """
    moments = action_moments(
        ("advantages",),
        q_function,
        q_function.along(params, sequences, features),
        sequences,
        anchor="teacher",
        teacher=anchor,
    )
    mask = sequences.response_mask
    return members(trajectory_return(moments["advantages"], mask, gamma=gamma))


class PairTerms(NamedTuple):
    """What a critic says of each pair, ``[pairs]``."""

    nll: jax.Array  # nats
    margin: jax.Array  # advantage sum of the chosen response less the other's
    valid: jax.Array  # bool, False for padding, whose numbers have no meaning


def pair_terms(
    q_function: QFunction,
    params: Params,
    pairs: PreferenceBatch,
    features: jax.Array | None,
    anchor: Rows,
    gamma: float,
) -> PairTerms:
    """Bradley-Terry loss of the differences of `pair_advantages`.

    Every pair is read once, in the forward pass, if a device can hold its log-probs.

    Gradient: to ``params``; for a mean over the pairs that are valid it is at hand.
    """
    valid = real_pairs_of(pairs)
    label = fill_masked(pairs.label, valid, 1.0)

    def conclude(moments, mask, label):
        returns = trajectory_return(moments["advantages"], mask, gamma=gamma)
        returns = members(returns)
        nll = bradley_terry(returns, label=label)
        return {"nll": nll, "margin": returns.chosen - returns.rejected}

    weights = valid.astype(jnp.float32)
    found = row_terms(
        conclude,
        label,
        ("advantages",),
        q_function,
        q_function.along(params, pairs.sequences, features),
        pairs.sequences,
        anchor="teacher",
        teacher=anchor,
        foreseen={"nll": weights, "margin": jnp.zeros_like(weights)},
    )
    return PairTerms(found["nll"], found["margin"], valid)


def make_q_anchor(
    q_values: QValues,
    *,
    anchor: CausalLM | None = None,
    temperature: float = 1.0,
    gamma: float = 1.0,
    center_q: bool = True,
    q_bound: float | None = 5.0,
    l2: float = 0.0,
) -> Objective:
    """Bradley-Terry loss of advantage sums, per pair.

    Args:
        q_values: the critic's raw action values; see `QValues`.
        anchor: the model whose states the signal holds in the place of log-probs; its
            parameters are in ``frozen["anchor"]``.
        temperature: of that model's policy.
        gamma: discount in [0, 1]; the sum is not divided by length.
        center_q, q_bound: as in `rkd_jax.objectives.mm_pbkd.make_mm_pbkd`, and equal to
            what the game will use.
        l2: weight of `l2_penalty`, nats per pair. Separable preferences have no finite
            maximum of the likelihood; with a penalty or a bound they have one.

    Returns:
        `Objective` whose ``student_loss`` trains the critic's parameters on a
        `PreferenceBatch`. It requires `WhiteBoxSignal.preferences`, the log-probs [B,
        2, T, V] of the *anchoring* policy (with ``anchor``, its states): the teacher's,
        or, for the off-policy gap, those of the student at hand. Unit: nats per pair.
        Metrics ``anchor/nll`` and ``anchor/accuracy`` (ties count half).

    Gradient:
        Flows to the critic's parameters only.

    Raises:
        ValueError: q_bound or l2 out of range; gamma when traced.

    References:
        MM-PbKD, 2505.18952. Reconstruction: see `make_mm_pbkd`.
    """
    check_domain("l2", l2, "[0, inf)")
    check_domain("temperature", temperature, "(0, inf)")
    policy = FrozenPolicy("anchor", anchor, temperature)
    q_function = QFunction(q_values, center_q, q_bound)

    def student_loss(
        params, critic, frozen, batch: PreferenceBatch, signal: WhiteBoxSignal, rng
    ):
        del critic, rng
        signal = jax.lax.stop_gradient(signal)
        nll, margin, valid = pair_terms(
            q_function,
            params,
            batch,
            signal.preference_features,
            policy(frozen, signal.preferences),
            gamma,
        )
        total = masked_sum(nll, valid)
        weight = valid.sum().astype(total.dtype)
        hit = 0.5 * (1.0 + jnp.sign(margin))
        metrics = {
            "anchor/nll": Mean(total, weight),
            "anchor/accuracy": Mean(masked_sum(hit, valid), weight),
        }
        if l2:
            total = total + l2 * weight * l2_penalty(params)
        return LossOutput(total, weight, metrics)

    return Objective("q_anchor", student_loss, requires=("preferences",))
